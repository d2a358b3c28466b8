"""Stand-in for `slicer.parameterNodeWrapper`: the same names in the node, and as strict about types and widgets."""

import inspect
import pathlib
import types
import typing
from collections.abc import MutableSequence

import slicer
import vtk

from .ctk_widgets import ctkComboBox, ctkPathLineEdit, ctkSliderWidget
from .mrml_widgets import qMRMLNodeComboBox, qMRMLSliderWidget
from .pythonqt import qt
from .validators import Choice, Default, Maximum, Minimum, Validator, WithinRange

__all__ = ["Choice", "Default", "Maximum", "Minimum", "WithinRange", "isParameterNodeWrapper", "parameterNodeWrapper"]

_PLAIN = {str: "", bool: False, int: 0, float: 0.0, pathlib.Path: pathlib.Path()}


def _split(annotated):
    kind, *notes = typing.get_args(typing.Annotated[annotated, None])
    return kind, notes[:-1]


def _is_node(kind):
    return inspect.isclass(kind) and issubclass(kind, slicer.vtkMRMLNode)


class _Value:
    """A text of the node."""

    def __init__(self, kind):
        self.kind, self.default = kind, _PLAIN[kind]

    def check(self, value):
        if not isinstance(value, (int, float) if self.kind is float else self.kind):
            raise TypeError(f"{value!r} is no {self.kind.__name__}")

    def known(self, node, name):
        return node.HasParameter(name)

    def read(self, node, name):
        text = node.GetParameter(name)
        return text == "True" if self.kind is bool else self.kind(text)

    def write(self, node, name, value):
        self.check(value)
        node.SetParameter(name, str(value))

    def remove(self, node, name):
        node.UnsetParameter(name)


class _Node(_Value):
    """A node reference, and an empty text to tell None from nothing."""

    def __init__(self, kind):
        self.kind, self.default = kind, None

    def check(self, value):
        if value is not None and not isinstance(value, self.kind):
            raise TypeError(f"{value!r} is no {self.kind.__name__}")

    def read(self, node, name):
        return node.GetNodeReference(name)

    def write(self, node, name, value):
        self.check(value)
        node.SetParameter(name, "")
        node.SetNodeReferenceID(name, value.GetID() if value is not None else None)

    def remove(self, node, name):
        super().remove(node, name)
        node.RemoveNodeReferenceIDs(name)


class _Nothing(_Value):
    """None, as one of the types of a union."""

    def __init__(self):
        self.default = None

    def read(self, node, name):
        return None

    def write(self, node, name, value):
        node.SetParameter(name, "True")


class _Union:
    """One of several types. None is refused unless it is one of them."""

    def __init__(self, kinds):
        self.kinds, self.members = kinds, [_stored(kind) for kind in kinds]
        self.default = self.members[0].default

    def _named(self, name):
        return [(member, f"{name}.{index}") for index, member in enumerate(self.members)]

    def known(self, node, name):
        return any(member.known(node, part) for member, part in self._named(name))

    def read(self, node, name):
        return next(member.read(node, part) for member, part in self._named(name) if member.known(node, part))

    def write(self, node, name, value):
        for kind, (member, part) in zip(self.kinds, self._named(name), strict=True):
            if isinstance(value, kind):
                with slicer.util.NodeModify(node):
                    self.remove(node, name)
                    member.write(node, part, value)
                return
        raise TypeError(f"Unable to write value '{value}' of type '{type(value)}'")

    def remove(self, node, name):
        for member, part in self._named(name):
            member.remove(node, part)


class _List:
    """Several values, and how many."""

    default = ()

    def __init__(self, kind):
        self.member, self.length = _stored(kind), _Value(int)

    def known(self, node, name):
        return self.length.known(node, f"{name}.len")

    def _count(self, node, name):
        return self.length.read(node, f"{name}.len") if self.known(node, name) else 0

    def read(self, node, name):
        values = [self.member.read(node, f"{name}.{index}") for index in range(self._count(node, name))]
        return _ObservedList(values, lambda: self.write(node, name, values))

    def write(self, node, name, values):
        with slicer.util.NodeModify(node):
            before = self._count(node, name)
            for index, value in enumerate(values):
                self.member.write(node, f"{name}.{index}", value)
            self.length.write(node, f"{name}.len", len(values))
            for index in range(len(values), before):
                self.member.remove(node, f"{name}.{index}")


class _ObservedList(MutableSequence):
    """A list that is written to the node whenever it changes."""

    def __init__(self, values, changed):
        self._values, self._changed = values, changed

    def __getitem__(self, index):
        return self._values[index]

    def __len__(self):
        return len(self._values)

    def __eq__(self, other):
        return self._values == list(other)

    __hash__ = None

    def __setitem__(self, index, value):
        self._values[index] = value
        self._changed()

    def __delitem__(self, index):
        del self._values[index]
        self._changed()

    def insert(self, index, value):
        self._values.insert(index, value)
        self._changed()


def _stored(annotated):
    kind, _ = _split(annotated)
    if kind in _PLAIN:
        return _Value(kind)
    if _is_node(kind):
        return _Node(kind)
    if kind is type(None):
        return _Nothing()
    if typing.get_origin(kind) in (typing.Union, types.UnionType):
        return _Union(typing.get_args(kind))
    if typing.get_origin(kind) is list:
        return _List(*typing.get_args(kind))
    raise NotImplementedError(f"No stand-in for parameters of type {kind}")


class _Parameter:
    """One typed attribute of a parameter node."""

    def __init__(self, name, annotated, cls):
        self.name, self.annotated = name, annotated
        self.kind, self.notes = _split(annotated)
        self.stored = _stored(annotated)
        given = [note.value for note in self.notes if isinstance(note, Default)]
        self.default = getattr(cls, name, (given or [self.stored.default])[0])

    def __get__(self, wrapper, _owner=None):
        if wrapper is None:
            return self
        if not self.stored.known(wrapper.parameterNode, self.name):  # closing the scene empties the node
            self.stored.write(wrapper.parameterNode, self.name, self.default)
        return self.stored.read(wrapper.parameterNode, self.name)

    def __set__(self, wrapper, value):
        for note in self.notes:
            if isinstance(note, Validator):
                note.validate(value)
        self.stored.write(wrapper.parameterNode, self.name, value)

    def note(self, kind):
        return next((note for note in self.notes if isinstance(note, kind)), None)


def _connector(widget, parameter):
    """How a widget holds a value: signal, read, write."""
    kind, box, choice = parameter.kind, type(widget), parameter.note(Choice)
    kinds = [of for of in typing.get_args(kind) or (kind,) if of is not type(None)]
    bounds = parameter.note(WithinRange)
    if box is qMRMLNodeComboBox and typing.get_origin(kind) is not list and all(map(_is_node, kinds)):
        widget.nodeTypes = [of.__name__ for of in kinds]
        return widget.currentNodeChanged, widget.currentNode, widget.setCurrentNode
    if kind is bool and box in (qt.QCheckBox, qt.QPushButton):
        widget.checkable = True
        return widget.toggled, *_property(widget, "checked")
    if kind is str and box is qt.QLineEdit:
        return widget.textChanged, *_property(widget, "text")
    if kind is str and box is qt.QLabel:
        return None, *_property(widget, "text")
    if kind is str and box is qt.QTextEdit:
        return widget.textChanged, *_property(widget, "plainText")
    if kind is pathlib.Path and box is ctkPathLineEdit:
        return (
            widget.currentPathChanged,
            lambda: pathlib.Path(widget.currentPath),
            lambda value: setattr(widget, "currentPath", str(value)),
        )
    if kind in (str, int, float, bool) and box in (qt.QComboBox, ctkComboBox) and choice is not None:
        widget.clear()
        widget.addItems([str(value) for value in choice.choices])
        return (
            widget.currentIndexChanged,
            lambda: choice.choices[widget.currentIndex],
            lambda value: setattr(widget, "currentIndex", choice.choices.index(value)),
        )
    sliding = (qt.QSlider, ctkSliderWidget, qMRMLSliderWidget)
    whole = kind is int and box in (qt.QSlider, qt.QSpinBox)
    real = kind in (int, float) and box in (qt.QDoubleSpinBox, ctkSliderWidget, qMRMLSliderWidget)
    if (whole or real) and (bounds or box not in sliding):
        least, most = parameter.note(Minimum), parameter.note(Maximum)
        far = 2**31 - 1 if whole else float("inf")
        widget.minimum = bounds.minimum if bounds else least.minimum if least else -far
        widget.maximum = bounds.maximum if bounds else most.maximum if most else far
        return widget.valueChanged, lambda: kind(widget.value), lambda value: setattr(widget, "value", kind(value))
    raise RuntimeError(f"Slicer ties no {kind} to a {box.__name__}: parameter {parameter.name}")


def _property(widget, name):
    return lambda: getattr(widget, name), lambda value: setattr(widget, name, value)


class _Wrapper:
    """What the decorator adds to a class of typed attributes."""

    _is_parameter_node_wrapper = True

    def __init__(self, parameterNode, prefix=None):
        self.parameterNode = parameterNode
        self._guis, self._updating = {}, False
        for name in self.allParameters:
            getattr(self, name)

    def connectGui(self, gui):
        widgets = gui.findChildren(qt.QWidget) if hasattr(gui, "findChildren") else vars(gui).values()
        named = [(widget.property("SlicerParameterName"), widget) for widget in widgets]
        return self.connectParametersToGui({name: widget for name, widget in named if name})

    def connectParametersToGui(self, mapping):
        unknown = set(mapping) - set(self.allParameters)
        if unknown:
            raise ValueError(f"Cannot find a param with the given name: {unknown}")
        tied = {name: _connector(widget, self.allParameters[name]) for name, widget in mapping.items()}
        slots = []
        for name, (signal, read, write) in tied.items():
            write(getattr(self, name))
            if signal is not None:
                slots.append((signal, lambda *_, name=name, read=read: self._from_gui(name, read)))
                signal.connect(slots[-1][1])
        tag = max(self._guis, default=-1) + 1
        event = self.parameterNode.AddObserver(vtk.vtkCommand.ModifiedEvent, lambda *_: self._to_guis())
        self._guis[tag] = tied, slots, event
        return tag

    def disconnectGui(self, tag):
        if tag in self._guis:
            _, slots, event = self._guis.pop(tag)
            for signal, slot in slots:
                signal.disconnect(slot)
            self.parameterNode.RemoveObserver(event)

    def _from_gui(self, name, read):
        if not self._updating:
            with slicer.util.NodeModify(self.parameterNode):
                setattr(self, name, read())

    def _to_guis(self):
        if self._updating:
            return
        self._updating = True
        try:
            for tied, _, _ in self._guis.values():
                for name, (_, read, write) in tied.items():
                    if read() != getattr(self, name):
                        write(getattr(self, name))
        finally:
            self._updating = False

    def getValue(self, name):
        return getattr(self, name)

    def setValue(self, name, value):
        setattr(self, name, value)

    def default(self, name):
        return Default(self.allParameters[name].default)

    def dataType(self, name):
        return self.allParameters[name].annotated

    def StartModify(self):
        return self.parameterNode.StartModify()

    def EndModify(self, was):
        return self.parameterNode.EndModify(was)

    def AddObserver(self, event, callback, priority=0.0):
        return self.parameterNode.AddObserver(event, callback, priority)

    def RemoveObserver(self, tag):
        self.parameterNode.RemoveObserver(tag)

    def Modified(self):
        self.parameterNode.Modified()


def parameterNodeWrapper(cls=None):
    """Make typed attributes of a class the parameters of a vtkMRMLScriptedModuleNode."""
    if cls is None:
        return parameterNodeWrapper
    hints = typing.get_type_hints(cls, include_extras=True)
    parameters = {name: _Parameter(name, annotated, cls) for name, annotated in hints.items()}
    return type(cls.__name__, (_Wrapper, cls), {**parameters, "allParameters": parameters, "__doc__": cls.__doc__})


def isParameterNodeWrapper(thing):
    return getattr(thing, "_is_parameter_node_wrapper", False)
