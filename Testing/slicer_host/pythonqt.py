"""The module `qt`: PySide6 in the manner of PythonQt, by which Slicer's Python speaks to Qt.

PySide6 has PythonQt's properties as its feature `true_property`, but gives it only to files that ask for it. Here every
look at a Qt object goes through this file, which does ask, so that the files under test need not. Tests take Qt from
here, too: a file that imports PySide6 itself finds its classes in either manner.
"""

import contextlib
import functools
import inspect
import sys
import types
import weakref

from PySide6 import QtCore, QtGui, QtUiTools, QtWidgets

import __feature__  # isort: skip - there is no such module before PySide6 is imported

from . import plain

# It reads the source of every module there is, and some of PyTorch's only look like modules.
_unusual = {name: module for name, module in sys.modules.items() if type(module) is not types.ModuleType}
for _name in _unusual:
    del sys.modules[_name]
__feature__.set_selection(__feature__.true_property, __name__)
__feature__.set_selection(0, plain.__name__)
sys.modules.update(_unusual)

_read = QtCore.QObject.__getattribute__
# Who is connected to what: PythonQt finds a connection again by its signature and slot.
_connections = weakref.WeakKeyDictionary()


def _signal(owner, signature):
    """The signal of that signature, e.g. "clicked(bool)"."""
    meta = _read(owner, "metaObject")()
    name = signature.partition("(")[0]
    normal = bytes(QtCore.QMetaObject.normalizedSignature(signature).data()).decode()
    # The stand-ins cannot have signals of Slicer's own types.
    if meta.indexOfSignal(normal) < 0 and not ("vtk" in signature and hasattr(type(owner), name)):
        raise ValueError(f"{meta.className()} has no signal {signature}")
    return _read(owner, name)


def _connect(self, signature, slot):
    count = 0 if signature.endswith("()") else signature.count(",") + 1
    code = getattr(slot, "__code__", None)
    called = slot
    if not count or code is None or code.co_flags & inspect.CO_VARARGS:
        # PySide6 counts the arguments of a function to choose among signals of one name; of others it knows nothing.
        called = (lambda: slot(), lambda a: slot(a), lambda a, b: slot(a, b), lambda a, b, c: slot(a, b, c))[count]
    _signal(self, signature).connect(called)
    _connections.setdefault(self, []).append((signature, slot, called))
    return True


def _disconnect(self, signature, slot=None):
    for known in list(_connections.get(self, ())):
        if known[0] == signature and slot in (None, known[1]):
            _signal(self, signature).disconnect(known[2])
            _connections[self].remove(known)
            return True
    return False


def _class_name(self):
    return _read(self, "metaObject")().className()


own = {"connect": _connect, "disconnect": _disconnect, "className": _class_name}


def _get(self, name):
    if name in own:
        return types.MethodType(own[name], self)
    kind = type(self)
    if hasattr(kind, name) or name.startswith("_"):
        return _read(self, name)
    # PythonQt has the setters and getters beside the properties.
    method = plain.method(kind, name)
    kind.objectName  # noqa: B018 - back from the plain manner
    return _read(self, name) if method is None else functools.partial(method, self)


def _change(kind, name, value):
    """Change a class as it is in the manner of this file."""
    setattr(kind, name, value)


def strays(widget):
    """What was written to a widget of Qt's own though it has no such property: PythonQt would have refused."""
    for one in (widget, *widget.findChildren(QtWidgets.QWidget)):
        ours = type(one).__module__.startswith(("PySide6", __package__))
        for name, value in one.__dict__.items() if ours else ():
            # PySide6 itself keeps signals and methods there, and the children of a .ui file.
            if not (
                name.startswith("_") or callable(value) or isinstance(value, (QtCore.QObject, QtCore.SignalInstance))
            ):
                yield f"{type(one).__name__} {one.objectName} has no property {name}"


@contextlib.contextmanager
def manners():
    """Look at all Qt objects of the process as PythonQt does."""

    def put(read):
        # A class has one set of attributes for each manner.
        for change in (plain.change, _change):
            change(QtCore.QObject, "__getattribute__", read)

    # Files that use PySide6, as tests may, get its plain manner, and leave it behind to others; now none does.
    chosen, asked = __feature__.pyside_feature_dict, __feature__._mod_uses_pyside
    before = dict(chosen)
    chosen.update({name: -1 for name in chosen if name not in (__name__, plain.__name__)})
    __feature__._mod_uses_pyside = lambda module: False
    named = property(lambda self: self.objectName, lambda self, name: setattr(self, "objectName", name))
    _change(QtCore.QObject, "name", named)
    put(_get)
    try:
        yield
    finally:
        put(_read)
        __feature__._mod_uses_pyside = asked
        chosen.update(before)


def _find(name):
    for module in (QtCore, QtGui, QtWidgets, QtUiTools):
        if hasattr(module, name):
            return getattr(module, name)
    raise AttributeError(f"module 'qt' has no attribute '{name}'")


qt = types.ModuleType("qt")
qt.__getattr__ = _find
