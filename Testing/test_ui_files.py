"""The panels' .ui files: what Slicer and translators expect of them, and every person who points at a widget."""

from __future__ import annotations

import ast
import re
from pathlib import Path
from xml.etree import ElementTree

import pytest

MODULE = Path(__file__).resolve().parent.parent / "MedXAI"
FILES = sorted((MODULE / "Resources" / "UI").glob("*.ui"))
CODE = [MODULE / "MedXAI.py", *sorted((MODULE / "MedXAISlicerLib" / "panels").glob("*.py"))]

# How the names of widgets of a class end; a class that is not here is new to the panels.
SUFFIXES = {
    "QCheckBox": ("CheckBox",),
    "QComboBox": ("Selector", "ComboBox"),
    "QDoubleSpinBox": ("SpinBox",),
    "QFrame": ("Frame", "Bar", "Line"),
    "QGroupBox": ("Box",),
    "QLabel": ("Label", "Title"),
    "QLineEdit": ("LineEdit",),
    "QListWidget": ("List",),
    "QPlainTextEdit": ("Text", "TextEdit"),
    "QProgressBar": ("Bar",),
    "QPushButton": ("Button",),
    "QRadioButton": ("RadioButton",),
    "QScrollArea": ("Area",),
    "QSpinBox": ("SpinBox",),
    "QStackedWidget": ("Widget",),
    "QTableWidget": ("Table",),
    "QTabWidget": ("TabWidget",),
    "QTextBrowser": ("Browser",),
    "QTextEdit": ("Text", "TextEdit"),
    "QToolButton": ("Button",),
    "QWidget": ("Widget", "Tab", "Page"),
    "ctkCollapsibleButton": ("Button",),
    "ctkDirectoryButton": ("Button",),
    "ctkPathLineEdit": ("LineEdit",),
    "ctkRangeWidget": ("RangeWidget",),
    "ctkSliderWidget": ("Slider", "SliderWidget"),
    "qMRMLNodeComboBox": ("Selector",),
    "qMRMLSegmentSelectorWidget": ("Selector",),
    "qMRMLSegmentsTableView": ("Table",),
    "qMRMLSubjectHierarchyTreeView": ("Tree",),
}
# Their own text says what happens, or there is nothing to operate.
SELF_EXPLANATORY = {
    *("QFrame", "QGroupBox", "QLabel", "QProgressBar", "QScrollArea", "QStackedWidget", "QTabWidget", "QWidget"),
    *("QPlainTextEdit", "QTextBrowser", "QTextEdit", "ctkCollapsibleButton"),
}
# What a widget can hold when it names a parameter; nodes are compared by the classes that can be selected.
TYPES = {
    "QCheckBox": {"bool"},
    "QPushButton": {"bool"},
    "QComboBox": {"str", "int", "float", "bool"},
    "QDoubleSpinBox": {"float", "int"},
    "QLineEdit": {"str"},
    "QPlainTextEdit": {"str"},
    "QSpinBox": {"int"},
    "QTextEdit": {"str"},
    "ctkDirectoryButton": {"Path"},
    "ctkPathLineEdit": {"Path"},
    "ctkSliderWidget": {"float", "int"},
}
NOT_FOR_PEOPLE = {"SlicerParameterName", "nodeTypes", "hideChildNodeTypes", "baseName", "styleSheet", "shortcut"}

pytestmark = pytest.mark.skipif(not FILES, reason="no panels")
each_file = pytest.mark.parametrize("file", FILES, ids=lambda file: file.name)


def widgets(file: Path) -> list[ElementTree.Element]:
    return list(ElementTree.parse(file).getroot().iter("widget"))


def properties(widget: ElementTree.Element) -> dict[str, ElementTree.Element]:
    return {known.get("name", ""): known for known in widget.findall("property")}


def words(known: ElementTree.Element) -> list[str]:
    return [(string.text or "").strip() for string in known.iter("string")]


def code(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def parameters() -> dict[str, set[str]]:
    """The fields of the parameter node, and the names in their types."""
    body = code(MODULE / "MedXAISlicerLib" / "parameters.py").body
    (node,) = (n for n in body if isinstance(n, ast.ClassDef) and n.name == "MedXAIParameterNode")
    return {
        field.target.id: {name.id for name in ast.walk(field.annotation) if isinstance(name, ast.Name)}
        for field in node.body
        if isinstance(field, ast.AnnAssign)
    }


@each_file
def test_top_level_widget_passes_the_scene_on(file):
    top = ElementTree.parse(file).getroot().find("widget")
    assert (top.get("class"), top.get("name")) == ("qMRMLWidget", file.stem)


@each_file
def test_names_are_unique_and_end_in_their_kind(file):
    names = [widget.get("name", "") for widget in ElementTree.parse(file).getroot().iter() if widget.get("class")]
    assert len(set(names)) == len(names)
    for widget in widgets(file)[1:]:
        assert widget.get("name", "").endswith(SUFFIXES[widget.get("class", "")]), widget.attrib
    for layout in ElementTree.parse(file).getroot().iter("layout"):
        assert layout.get("name", "").endswith("Layout"), layout.attrib


@each_file
def test_what_can_be_operated_has_a_tooltip(file):
    silent = [
        widget.get("name", "")
        for widget in widgets(file)[1:]
        if widget.get("class") not in SELF_EXPLANATORY
        and not any(words(properties(widget).get("toolTip", ElementTree.Element("none"))))
    ]
    # The code sets tooltips that change with what is chosen, and those of the items of a list.
    functions = [node for path in CODE for node in ast.walk(code(path)) if isinstance(node, ast.FunctionDef)]
    setting = [text for text in map(ast.unparse, functions) if re.search(r"\.toolTip = |\.setToolTip\(", text)]
    assert not [name for name in silent if not any(re.search(rf"\b{name}\b", text) for text in setting)]


@each_file
def test_what_people_read_can_be_translated(file):
    for element in ElementTree.parse(file).getroot().iter("property"):
        untranslated = [s.text for s in element.iter() if s.get("notr") == "true"]
        assert not untranslated or element.get("name") in NOT_FOR_PEOPLE, (element.get("name"), untranslated)


@each_file
def test_parameters_exist_and_suit_their_widgets(file):
    known = parameters()
    for widget in widgets(file):
        if "SlicerParameterName" not in properties(widget):
            continue
        (name,) = words(properties(widget)["SlicerParameterName"])
        assert name in known, f"{widget.get('name')} names the parameter '{name}', which does not exist"
        if widget.get("class") == "qMRMLNodeComboBox":
            selectable = set(words(properties(widget)["nodeTypes"]))
            assert selectable == {kind for kind in known[name] if kind.startswith("vtkMRML")}, widget.get("name")
        else:
            assert known[name] & TYPES[widget.get("class", "")], widget.get("name")


@each_file
def test_labels_lead_to_what_they_label(file):
    names = {widget.get("name") for widget in widgets(file)}
    buddies = {b.findtext("cstring") for w in widgets(file) if (b := properties(w).get("buddy")) is not None}
    assert buddies <= names


@each_file
def test_some_panel_loads_it(file):
    assert any(file.name in path.read_text(encoding="utf-8") for path in CODE)
