"""3D Slicer's application, imitated around its real scene, so that the module can be clicked through and photographed.

Nothing of MRML is imitated: scene, logics, the layouts' description and what the views show are Slicer's own, from the
package slicer-core (see `slicer_scene`). The rest is a stand-in, and this is all it does:

- `qt` is PySide6 with PythonQt's manners: properties as attributes, with the setters and getters beside them;
  `connect` and `disconnect` by signature; `name` for objectName; `className`. A property that does not exist can be
  written, but is found at the end of `running`, which then fails. `qt.QSettings()` is a file of the test.
- Dialogs never wait: `host.dialogs` says what was shown, `host.reply` whether the person agrees, `host.files` which
  paths are chosen. Error boxes are shown as in an application with a main window that is not in testing mode.
- `ctk` and Slicer's own widgets are small copies with the properties, methods and signals that are named in them.
  Only the connections of the .ui file give them the scene. A node selector follows the scene, but its menu for new
  nodes is left out. What has no copy raises NotImplementedError by name.
- `slicer.i18n` does not translate. `slicer.ScriptedLoadableModule` has the four classes without the developer's
  section. `slicer.parameterNodeWrapper` keeps values in the node under Slicer's own names, and is as strict about
  types and about the widgets they can be tied to. With MEDXAI_SLICER_SOURCE, a checkout of Slicer's sources, all
  three are Slicer's own: the tests pass either way.
- `slicer.app` has the signals, folders and answers of `application.Application`; the layout manager registers the
  slice logics and draws slice and 3-D views when a picture is asked for; plot and table views stay grey.
- `SampleData` writes down what is registered. `slicer.util.delayDisplay` does not delay.
- Errors of slots and observers, which Slicer only prints, make the test fail.

It needs PySide6 and slicer-core (on Debian with libegl1, libgl1, libxkbcommon0, libdbus-1-3, libfontconfig1, and
fonts-dejavu-core, for PySide6 has no fonts of its own).
"""

import contextlib
import functools
import importlib.util
import os
import sys
import time
import traceback
from pathlib import Path
from types import SimpleNamespace

import pytest

# Installed, it still needs libraries of the system.
pytest.importorskip("PySide6.QtWidgets", exc_type=ImportError)
slicer = pytest.importorskip("slicer")
os.environ.setdefault("QT_QPA_PLATFORM", "offscreen")

import slicer_scene  # noqa: E402

from . import (  # noqa: E402
    application,
    dialogs,
    i18n,
    layouts,
    loader,  # noqa: F401 - gives `qt` its QUiLoader
    mrml_widgets,
    parameter_node,
    sample_data,
    scripted_module,
)
from .ctk_widgets import ctk  # noqa: E402
from .pythonqt import QtCore, manners, qt, strays  # noqa: E402

_MODULES = Path(__file__).resolve().parents[2] / "MedXAI"
_STAND_INS = {
    "slicer.i18n": i18n,
    "slicer.parameterNodeWrapper": parameter_node,
    "slicer.ScriptedLoadableModule": scripted_module,
}


@functools.cache
def _python_of_slicer():
    """Slicer's own Python modules when its sources are there, else the stand-ins."""
    if not os.environ.get("MEDXAI_SLICER_SOURCE"):
        return _STAND_INS
    slicer.__path__.append(str(Path(os.environ["MEDXAI_SLICER_SOURCE"], "Base", "Python", "slicer")))
    try:
        for name in _STAND_INS:
            importlib.import_module(name)
    finally:
        slicer.__path__.pop()
    return {name: module for name, module in sys.modules.items() if name.startswith(tuple(_STAND_INS))}


class Host:
    """What a test does with the application."""

    def __init__(self, app, folder, after):
        self.scene, self.logic, self.folder = app.scene, app.logic, folder
        self.dialogs, self.files, self.errors = dialogs.state.shown, dialogs.state.files, []
        self.longest_block = 0.0
        self.module = self.widget = self._scrolled = None
        self._here, self._closed, self._after = False, False, after

    @property
    def reply(self):
        return dialogs.state.reply

    @reply.setter
    def reply(self, agree):
        dialogs.state.reply = agree

    def process(self):
        """Serve the events that are due; errors of slots, which Qt only prints, fail here."""
        application.qapplication().processEvents()
        application.qapplication().sendPostedEvents(None, QtCore.QEvent.DeferredDelete)
        self._raise()

    def until(self, condition, seconds=60):
        """Serve events until the condition holds, and note in `longest_block` the longest time, in ms, none was."""
        loop, beat = qt.QEventLoop(), qt.QTimer()
        started = last = time.monotonic()
        reached = False

        def look():
            nonlocal last, reached
            now = time.monotonic()
            self.longest_block = max(self.longest_block, 1000 * (now - last))
            last = now
            try:
                reached = bool(condition())
            except Exception as error:
                # Raised from here it would only be printed, again and again.
                self.errors.append(error)
            if reached or self.errors or now - started > seconds:
                loop.quit()

        beat.timeout.connect(look)
        beat.start(5)
        loop.exec()
        beat.stop()
        self._raise()
        assert reached, f"Not within {seconds} s"

    def _raise(self):
        if self.errors:
            error, self.errors[:] = self.errors[0], []
            raise error

    def picture(self, widget, path, width=460):
        """Photograph a widget: one that is not inside another, or the module's panel, as high as it wants to be."""
        top = self._scrolled if self._scrolled is not None and widget is self._scrolled.widget() else widget
        if top.isWindow():
            top.setAttribute(qt.Qt.WA_DontShowOnScreen)
            wanted = widget.heightForWidth(width) if widget.hasHeightForWidth() else widget.sizeHint.height()
            top.resize(width, max(wanted, widget.minimumSizeHint.height()))
            top.show()
        self.process()
        assert widget.grab().save(str(path))
        return Path(path)

    def window(self, path, size=(1400, 900), panel=460):
        """Photograph the module's panel and, beside it, the views of the layout (which needs OpenGL)."""
        image = qt.QImage(*size, qt.QImage.Format_RGB888)
        image.fill(qt.QColor(40, 40, 40))
        painter, left = qt.QPainter(image), 0
        if self.widget is not None:
            self._scrolled.setAttribute(qt.Qt.WA_DontShowOnScreen)
            self._scrolled.resize(panel, size[1])
            self._scrolled.show()
            self.process()
            painter.drawPixmap(0, 0, self._scrolled.grab())
            left = panel + 4
        slicer.app.layoutManager().draw(painter, qt.QRect(left, 0, size[0] - left, size[1]))
        painter.end()
        assert image.save(str(path), "PNG", 0)  # as small as it gets
        return Path(path)

    def open(self, name, folder=_MODULES):
        """Load a module as Slicer does, and go to its panel."""
        path = Path(folder) / f"{name}.py"
        sys.path.insert(0, str(path.parent))
        self._after.callback(sys.path.remove, str(path.parent))
        spec = importlib.util.spec_from_file_location(name, path)
        python = importlib.util.module_from_spec(spec)
        self._after.callback(sys.modules.pop, name, None)
        sys.modules[name] = python
        spec.loader.exec_module(python)
        parent = SimpleNamespace(path=str(path), name=name, icon=None)
        self.module = getattr(python, name)(parent)
        setattr(slicer.modules, name.lower(), parent)
        slicer.app.startupCompleted.emit()
        panel = slicer.qMRMLWidget()
        panel.setLayout(qt.QVBoxLayout())
        panel.setMRMLScene(slicer.mrmlScene)
        self._scrolled = qt.QScrollArea()
        self._scrolled.widgetResizable = True
        self._scrolled.frameShape = qt.QFrame.NoFrame
        self._scrolled.setWidget(panel)
        self.widget = getattr(python, f"{name}Widget")(panel)
        setattr(slicer.modules, f"{name}Widget", self.widget)
        self.widget.setup()
        self._enter(True)
        self.process()
        return self.widget

    def _enter(self, here):
        """To the module or away from it."""
        if self.widget is not None and here != self._here:
            self._here = here
            getattr(self.widget, "enter" if here else "exit", lambda: None)()

    def close(self):
        """As when Slicer quits; nothing else comes after it."""
        if self._closed:
            return
        self._closed = True
        slicer.app.aboutToQuit.emit()
        if self.widget is not None:
            self._enter(False)
            slicer.app.moduleManager().moduleAboutToBeUnloaded.emit(self.widget.moduleName)
        found = [stray for widget in application.qapplication().topLevelWidgets() for stray in strays(widget)]
        assert not found, "; ".join(found)
        self.widget = None
        self.process()


@contextlib.contextmanager
def running(folder):
    """The application with an empty scene, as `slicer`, `qt` and `ctk`; `folder` is for its settings and files."""
    application.qapplication()
    settings = Path(folder) / "settings"
    QtCore.QSettings.setDefaultFormat(QtCore.QSettings.IniFormat)
    QtCore.QSettings.setPath(QtCore.QSettings.IniFormat, QtCore.QSettings.UserScope, str(settings))
    QtCore.QCoreApplication.setOrganizationName("NA-MIC")
    QtCore.QCoreApplication.setApplicationName("Slicer")
    dialogs.state.shown, dialogs.state.files, dialogs.state.reply = [], [], True
    with slicer_scene.opened() as app, manners(), _modules(), contextlib.ExitStack() as after:
        host = Host(app, Path(folder), after)
        after.enter_context(_errors(host.errors))
        slicer.app = application.Application(app.logic, folder)
        window = application.MainWindow(lambda name: host._enter(name == host.widget.moduleName))
        try:
            yield host
        except BaseException:
            # What goes wrong while tidying up would hide what went wrong first.
            with contextlib.suppress(Exception):
                host.close()
            raise
        else:
            host.close()
        finally:
            slicer.app.layoutManager().close()
            for widget in application.qapplication().topLevelWidgets():
                widget.deleteLater()
            application.qapplication().sendPostedEvents(None, QtCore.QEvent.DeferredDelete)
            del window


@contextlib.contextmanager
def _errors(errors):
    """Qt prints what goes wrong in a slot and goes on: keep it, for a test must fail."""
    before = sys.excepthook

    def keep(kind, error, trace):
        traceback.print_exception(kind, error, trace)
        errors.append(error)

    sys.excepthook = keep
    try:
        yield
    finally:
        sys.excepthook = before


@contextlib.contextmanager
def _modules():
    """What only the application has among the modules and in `slicer`, as long as it runs."""
    before, names = dict(vars(slicer)), dict(sys.modules)
    added = {"qt": qt, "ctk": ctk, "SampleData": sample_data}
    sys.modules.update(added)
    for kind in (*mrml_widgets.widgets, *mrml_widgets.only_names, layouts.qSlicerSingletonViewFactory):
        setattr(slicer, kind.__name__, kind)
    slicer.selfTests = {}
    delay, slicer.util.delayDisplay = slicer.util.delayDisplay, dialogs.delayDisplay
    try:
        added |= _python_of_slicer()
        sys.modules.update(added)
        for name in _STAND_INS:
            setattr(slicer, name.partition(".")[2], added[name])
        yield
    finally:
        slicer.util.delayDisplay = delay
        for name in added:
            sys.modules.pop(name, None)
            if name in names:
                sys.modules[name] = names[name]
        for name in set(vars(slicer)) - set(before):
            delattr(slicer, name)
        vars(slicer).update(before)
