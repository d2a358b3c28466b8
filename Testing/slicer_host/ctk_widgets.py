"""The module `ctk`: the widgets that panels are made of."""

import types

from .dialogs import ctkMessageBox
from .pythonqt import qt

_ANY = 16777215  # Qt's word for no maximum


def _fold(widget, header=None):
    """Hide the children of a collapsed widget; those that the panel itself has hidden stay so when it is opened."""
    for child in widget.children():
        if isinstance(child, qt.QWidget) and child is not header:
            if widget._collapsed and not child.isHidden():
                child.setProperty("folded", True)
                child.visible = False
            elif not widget._collapsed and child.property("folded"):
                child.setProperty("folded", False)
                child.visible = True


class ctkCollapsibleButton(qt.QWidget):
    """A header with a triangle, and below it what is hidden when it is collapsed."""

    contentsCollapsed = qt.Signal(bool)
    toggled = qt.Signal(bool)
    clicked = qt.Signal(bool)

    def __init__(self, *arguments):
        super().__init__(*[argument for argument in arguments if isinstance(argument, qt.QWidget)])
        self._header = qt.QToolButton(self)
        self._header.text = next((argument for argument in arguments if isinstance(argument, str)), "")
        self._header.toolButtonStyle = qt.Qt.ToolButtonTextBesideIcon
        self._header.arrowType = qt.Qt.DownArrow
        self._header.setSizePolicy(qt.QSizePolicy.Expanding, qt.QSizePolicy.Fixed)
        self._header.clicked.connect(self._toggle)
        self._collapsed = False
        self._fit()

    def _fit(self):
        height = self._header.sizeHint.height()
        self._header.geometry = qt.QRect(0, 0, self.width, height)
        self.setContentsMargins(0, height, 0, 0)

    def _toggle(self):
        self.collapsed = not self._collapsed
        self.clicked.emit(not self._collapsed)

    def _get_collapsed(self):
        return self._collapsed

    def _set_collapsed(self, collapsed):
        if collapsed == self._collapsed:
            return
        self._collapsed = collapsed
        self._header.arrowType = qt.Qt.RightArrow if collapsed else qt.Qt.DownArrow
        self.maximumHeight = self._header.sizeHint.height() if collapsed else _ANY
        _fold(self, self._header)
        self.contentsCollapsed.emit(collapsed)
        self.toggled.emit(not collapsed)

    def showEvent(self, event):
        _fold(self, self._header)
        super().showEvent(event)

    def _set_text(self, text):
        self._header.text = text
        self._fit()

    def resizeEvent(self, event):
        self._fit()
        super().resizeEvent(event)

    collapsed = qt.Property(bool, _get_collapsed, _set_collapsed)
    checked = qt.Property(bool, lambda self: not self._collapsed, lambda self, on: self._set_collapsed(not on))
    text = qt.Property(str, lambda self: self._header.text, _set_text)


class ctkCollapsibleGroupBox(qt.QGroupBox):
    """A group box with a check mark that hides what is in it."""

    def __init__(self, *arguments):
        super().__init__(*arguments)
        self.checkable = True
        self.toggled.connect(self._folded)
        self._collapsed = False

    def _folded(self, _on=True):
        self._collapsed = not self.checked
        self.maximumHeight = self.fontMetrics().height() + 8 if self._collapsed else _ANY
        _fold(self)

    def showEvent(self, event):
        _fold(self)
        super().showEvent(event)

    def _set_collapsed(self, collapsed):
        self.checked = not collapsed

    collapsed = qt.Property(bool, lambda self: self._collapsed, _set_collapsed)


class ctkSliderWidget(qt.QWidget):
    """A slider with a number box."""

    valueChanged = qt.Signal(float)

    def __init__(self, parent=None):
        super().__init__(parent)
        layout = qt.QHBoxLayout(self)
        layout.setContentsMargins(0, 0, 0, 0)
        self._slider, self._box = qt.QSlider(qt.Qt.Horizontal), qt.QDoubleSpinBox()
        layout.addWidget(self._slider, 1)
        layout.addWidget(self._box)
        self._box.maximum = 100.0
        self._box.valueChanged.connect(self._changed)
        self._slider.maximum = 1000
        self._slider.valueChanged.connect(self._slid)

    def _changed(self, value):
        self._place()
        self.valueChanged.emit(value)

    def _place(self):
        width = self._box.maximum - self._box.minimum
        self._slider.blockSignals(True)
        self._slider.value = round(1000 * (self._box.value - self._box.minimum) / width) if width else 0
        self._slider.blockSignals(False)

    def _slid(self, position):
        self._box.value = self._box.minimum + position / 1000 * (self._box.maximum - self._box.minimum)

    def _of_box(kind, name):
        def write(self, value):
            setattr(self._box, name, value)
            self._place()

        return qt.Property(kind, lambda self: getattr(self._box, name), write)

    value = _of_box(float, "value")
    minimum = _of_box(float, "minimum")
    maximum = _of_box(float, "maximum")
    singleStep = _of_box(float, "singleStep")
    decimals = _of_box(int, "decimals")
    suffix = _of_box(str, "suffix")
    prefix = _of_box(str, "prefix")
    pageStep = qt.Property(float, lambda self: 1.0, lambda self, value: None)
    tracking = qt.Property(bool, lambda self: True, lambda self, value: None)


class ctkRangeWidget(qt.QWidget):
    """Two number boxes for the ends of a range; the slider between them is left out."""

    valuesChanged = qt.Signal(float, float)

    def __init__(self, parent=None):
        super().__init__(parent)
        layout = qt.QHBoxLayout(self)
        layout.setContentsMargins(0, 0, 0, 0)
        self._low, self._high = qt.QDoubleSpinBox(), qt.QDoubleSpinBox()
        for box in (self._low, self._high):
            layout.addWidget(box, 1)
            box.valueChanged.connect(lambda _value: self.valuesChanged.emit(self._low.value, self._high.value))

    def setRange(self, low, high):
        for box in (self._low, self._high):
            box.setRange(low, high)

    def setValues(self, low, high):
        self._low.value, self._high.value = low, high

    minimum = qt.Property(float, lambda self: self._low.minimum)
    maximum = qt.Property(float, lambda self: self._low.maximum)
    minimumValue = qt.Property(
        float, lambda self: self._low.value, lambda self, value: setattr(self._low, "value", value)
    )
    maximumValue = qt.Property(
        float, lambda self: self._high.value, lambda self, value: setattr(self._high, "value", value)
    )


class ctkPathLineEdit(qt.QWidget):
    """A path to type or to choose."""

    currentPathChanged = qt.Signal(str)

    Dirs, Files, Readable, Writable, Executable = 1, 2, 16, 32, 64

    def __init__(self, parent=None):
        super().__init__(parent)
        layout = qt.QHBoxLayout(self)
        layout.setContentsMargins(0, 0, 0, 0)
        self._edit, self._browse = qt.QComboBox(), qt.QToolButton()
        self._edit.editable = True
        self._browse.text = "…"
        layout.addWidget(self._edit, 1)
        layout.addWidget(self._browse)
        self._filters, self._names = self.Files, []
        self._edit.currentTextChanged.connect(self.currentPathChanged)
        self._browse.clicked.connect(lambda: self.browse())

    def browse(self):
        folder = self._filters & self.Dirs
        path = qt.QFileDialog.getExistingDirectory() if folder else qt.QFileDialog.getOpenFileName()
        if path:
            self.currentPath = path

    def addCurrentPathToHistory(self):
        history = [path for path in self._history() if path != self.currentPath]
        if self.currentPath:
            self._stored().setValue(f"ctkPathLineEdit/{self._key}", [self.currentPath, *history])
            self._fill()

    def _history(self):
        return self._stored().value(f"ctkPathLineEdit/{self._key}") or []

    @staticmethod
    def _stored():
        return qt.QSettings()

    def _fill(self):
        path = self.currentPath
        self._edit.clear()
        self._edit.addItems(self._history())
        # As the real one, which chooses the latest where there was no path.
        self._edit.currentText = path or (self._edit.itemText(0) if self._edit.count else "")

    def _set_path(self, path):
        self._edit.currentText = path

    def _named(name, kind):
        return qt.Property(kind, lambda self: getattr(self, name), lambda self, value: setattr(self, name, value))

    currentPath = qt.Property(str, lambda self: self._edit.currentText, _set_path)
    filters = _named("_filters", int)
    nameFilters = _named("_names", "QStringList")

    def _set_key(self, key):
        self._key = key
        self._fill()

    _label, _key, _button = "", "", True
    label = _named("_label", str)
    settingKey = qt.Property(str, lambda self: self._key, _set_key)
    showHistoryButton = _named("_button", bool)


class ctkComboBox(qt.QComboBox):
    """With a text for when nothing is chosen."""

    defaultText = qt.Property(str, lambda self: self.placeholderText, lambda self, text: _set_default(self, text))


def _set_default(box, text):
    box.placeholderText = text


def missing(name):
    """A widget that is only a name: Slicer's sources ask whether something is one."""

    def refuse(*_):
        raise NotImplementedError(f"No stand-in for {name}")

    return type(name, (), {"__init__": refuse})


def _find(name):
    if not name.startswith("ctk"):
        raise AttributeError(f"module 'ctk' has no attribute '{name}'")
    setattr(ctk, name, missing(name))
    return getattr(ctk, name)


ctk = types.ModuleType("ctk")
ctk.__getattr__ = _find
widgets = (
    ctkCollapsibleButton,
    ctkCollapsibleGroupBox,
    ctkSliderWidget,
    ctkRangeWidget,
    ctkPathLineEdit,
    ctkComboBox,
)
for _kind in (*widgets, ctkMessageBox):
    setattr(ctk, _kind.__name__, _kind)
