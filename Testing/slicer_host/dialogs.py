"""Dialogs that wait for nobody: what they say is written down, and what was prepared is answered."""

from types import SimpleNamespace

from .pythonqt import QtWidgets, own, qt

# What was shown, as (kind, text); whether the person agrees; the paths to choose, in turn.
state = SimpleNamespace(shown=[], reply=True, files=[])

_YES = ("Ok", "Yes", "Retry", "Save", "Apply", "Open")
_KINDS = {"Information": "info", "Warning": "warning", "Critical": "error", "Question": "confirm", "NoIcon": "info"}
_Box = QtWidgets.QMessageBox


def _answer(buttons):
    """The button that agrees, or the one that does not; the only one when there is no choice."""
    offered = [button for button in _Box.StandardButton if button in buttons and button.value]
    agreeing = [button for button in offered if button.name in _YES]
    wanted = agreeing if state.reply else [button for button in offered if button not in agreeing]
    return (wanted or offered or [_Box.Ok])[0]


def _execute(dialog):
    """Instead of `exec`, which would wait for somebody to click."""
    if isinstance(dialog, _Box):
        state.shown.append((_KINDS[dialog.icon.name], dialog.text))
        return _answer(dialog.standardButtons)
    if isinstance(dialog, QtWidgets.QDialog):
        labels = [label.text for label in dialog.findChildren(QtWidgets.QLabel)]
        state.shown.append(("dialog", " ".join([dialog.windowTitle, *labels]).strip()))
        return int(state.reply)
    if isinstance(dialog, QtWidgets.QMenu):
        state.shown.append(("menu", ", ".join(action.text for action in dialog.actions())))
        return None
    return type(dialog).exec(dialog)


own["exec_"] = own["exec"] = _execute


def _shown(icon, default):
    def show(parent, title, text, buttons=default, *_):
        box = QtWidgets.QMessageBox(parent)
        box.icon, box.text, box.standardButtons = icon, text, buttons
        return _execute(box)

    return staticmethod(show)


def delayDisplay(message, *_, **__):
    """Slicer shows it for a second."""
    state.shown.append(("info", message))
    QtWidgets.QApplication.processEvents()


class QMessageBox(_Box):
    """PySide's, but for the functions that show a box and wait."""

    information = _shown(_Box.Information, _Box.Ok)
    warning = _shown(_Box.Warning, _Box.Ok)
    critical = _shown(_Box.Critical, _Box.Ok)
    question = _shown(_Box.Question, _Box.Yes | _Box.No)


class ctkMessageBox(QMessageBox):
    """With the box "Don't show again", which nobody ever ticks."""

    dontShowAgainSettingsKey = qt.Property(str, lambda self: "", lambda self, key: None)


def _next(*_, **__):
    return state.files.pop(0) if state.files else ""


class QFileDialog(QtWidgets.QFileDialog):
    """PythonQt's functions give the path alone."""

    getOpenFileName = getSaveFileName = getExistingDirectory = staticmethod(_next)
    getOpenFileNames = staticmethod(lambda *_, **__: state.files.pop(0) if state.files else [])


qt.QMessageBox, qt.QFileDialog = QMessageBox, QFileDialog
