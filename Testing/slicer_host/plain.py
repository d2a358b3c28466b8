"""Qt's classes with their plain methods: PySide6 chooses the manner of a class by the file that looks at it."""

import functools


@functools.cache
def method(cls, name):
    """The function of that name which the class has when nobody turned its getters and setters into properties."""
    return getattr(cls, name, None)


def change(kind, name, value):
    """Change a class as it is in the manner of this file."""
    setattr(kind, name, value)
