"""The parameters of a method as a form, built from what the worker says of them."""

import math
import re

import ctk
import qt
from slicer.i18n import tr as _

from MedXAISlicerLib.panels.region_chooser import RegionChooser

# The parameters whose values are layers of the network.
_LAYERS = ("layer", "layers")


class ParameterForm:
    """One row for each parameter; `values()` holds what differs from the defaults. `onChange()` follows every edit,
    `onRegionAdded(node)` a new region of interest."""

    def __init__(self, onChange, onRegionAdded=lambda node: None):
        self.widget = qt.QWidget()
        self._layout = qt.QFormLayout(self.widget)
        self._onChange, self._onRegionAdded = onChange, onRegionAdded
        self._rows = {}

    def show(self, parameters, values, layers=()):
        """Show the parameters of a method (as the worker's `methods` lists them), set to `values` where given. `layers`
        are those of the network, to choose from."""
        while self._layout.rowCount():
            self._layout.removeRow(0)
        self._rows = {}
        for parameter in parameters:
            make = getattr(self, f"_{parameter['format'] or parameter['type']}")
            value = values.get(parameter["name"], parameter["default"])
            widget, read = make(parameter, value)
            widget.toolTip = parameter["help"]
            widget.objectName = f"{parameter['name']}Parameter"
            if parameter["name"] in _LAYERS and layers:
                widget.setCompleter(qt.QCompleter(list(layers), widget))
            self._layout.addRow(_("{name}:").format(name=_named(parameter["name"])), widget)
            self._rows[parameter["name"]] = (parameter, read)

    def values(self):
        """What the person changed, by name."""
        read = {name: (parameter, now()) for name, (parameter, now) in self._rows.items()}
        return {name: value for name, (parameter, value) in read.items() if value != parameter["default"]}

    def problem(self):
        """What is missing or cannot be meant, in words; empty when nothing. Masks may be left out, regions not."""
        for parameter, read in self._rows.values():
            name, value = _named(parameter["name"]), read()
            if parameter["format"] == "numbers" and None in value:
                return _("{name}: type a number, or several with commas between").format(name=name)
            if parameter["format"] == "region" and not value:
                return _("{name}: choose a region of interest or a segment first").format(name=name)
        return ""

    def remember(self):
        """Offer the folders that are chosen now again, in every scene."""
        for row in range(self._layout.rowCount()):
            widget = self._layout.itemAt(row, qt.QFormLayout.FieldRole).widget()
            if isinstance(widget, ctk.ctkPathLineEdit) and widget.settingKey:
                widget.addCurrentPathToHistory()

    def _bool(self, parameter, value):
        box = qt.QCheckBox()
        box.checked = bool(value)
        box.connect("toggled(bool)", self._changed)
        return box, lambda: box.checked

    def _int(self, parameter, value):
        box = qt.QSpinBox()
        box.setRange(_limit(parameter["minimum"], -(10**9)), _limit(parameter["maximum"], 10**9))
        box.value = value
        box.connect("valueChanged(int)", self._changed)
        return box, lambda: box.value

    def _float(self, parameter, value):
        box = qt.QDoubleSpinBox()
        box.decimals = 4
        box.setRange(_limit(parameter["minimum"], -1e9), _limit(parameter["maximum"], 1e9))
        box.singleStep = max(abs(parameter["default"]) / 10, 10**-box.decimals)
        box.value = value
        box.connect("valueChanged(double)", self._changed)
        # A spin box rounds: what was not touched stays exactly what it was.
        untouched = box.value
        return box, lambda: value if box.value == untouched else box.value

    def _choice(self, parameter, value):
        box = qt.QComboBox()
        # Where a file may be given instead, its path is typed in, and names stay as they are written.
        box.editable = parameter["open"]
        for choice in parameter["choices"]:
            box.addItem(choice if parameter["open"] else _named(choice))
        if parameter["open"]:
            box.setEditText(value)
            box.connect("editTextChanged(QString)", self._changed)
            return box, lambda: box.currentText or parameter["default"]
        box.currentIndex = parameter["choices"].index(value)
        box.connect("currentIndexChanged(int)", self._changed)
        return box, lambda: parameter["choices"][box.currentIndex]

    def _text(self, parameter, value):
        line = qt.QLineEdit("" if value is None else str(value))
        line.placeholderText = str(parameter["default"] or "")
        line.connect("editingFinished()", self._changed)
        return line, lambda: line.text or parameter["default"]

    def _list(self, parameter, value):
        line = qt.QLineEdit(", ".join(map(str, value or [])))
        untouched = ", ".join(map(str, parameter["default"] or []))
        line.placeholderText = _("as the network suggests") if parameter["name"] in _LAYERS else untouched
        line.connect("editingFinished()", self._changed)
        return line, lambda: [part.strip() for part in line.text.split(",") if part.strip()] or parameter["default"]

    def _numbers(self, parameter, value):
        line = qt.QLineEdit(_typed(value))
        line.placeholderText = _typed(parameter["default"]) or _("as suits the scan")
        line.connect("editingFinished()", self._changed)
        return line, lambda: _numbersOf(line.text) or parameter["default"]

    def _file(self, parameter, value):
        return self._path(ctk.ctkPathLineEdit(), parameter, value)

    def _folder(self, parameter, value):
        line = ctk.ctkPathLineEdit()
        line.filters = ctk.ctkPathLineEdit.Dirs
        # What was used last is offered again, whatever method asks for a folder of this name.
        line.settingKey = f"MedXAI/{parameter['name']}"
        return self._path(line, parameter, value)

    def _path(self, line, parameter, value):
        line.currentPath = value or ""
        line.connect("currentPathChanged(QString)", self._changed)
        return line, lambda: line.currentPath or parameter["default"]

    def _region(self, parameter, value):
        # The name of a file, which scripts may give, is no node.
        node = None if isinstance(value, str) else value
        chooser = RegionChooser(node, self._changed, self._onRegionAdded, mask=parameter["format"] == "mask")
        return chooser.widget, lambda: chooser.value() or parameter["default"]

    _mask = _region

    def _changed(self, *_value):
        self._onChange()


def _named(name):
    return name.replace("_", " ").capitalize()


def _typed(numbers):
    return ", ".join("" if number is None else f"{number:g}" for number in numbers or [])


def _numbersOf(text):
    """The numbers that were typed; None in the place of what is none."""
    return [_numberOf(part) for part in re.split(r"[,;\s]+", text.strip()) if part]


def _numberOf(text):
    try:
        number = float(text)
    except ValueError:
        return None
    return number if math.isfinite(number) else None


def _limit(given, otherwise):
    return otherwise if given is None else given
