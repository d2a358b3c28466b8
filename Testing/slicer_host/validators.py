"""What may be said about a parameter beside its type."""


class Default:
    """The value a parameter starts with."""

    def __init__(self, value=None, *, generator=None):
        self._value, self._generator = value, generator

    @property
    def value(self):
        return self._generator() if self._generator else self._value


class Validator:
    """Refuses values."""


class _Bounded(Validator):
    minimum, maximum = float("-inf"), float("inf")

    def validate(self, value):
        if not self.minimum <= value <= self.maximum:
            raise ValueError(f"Value must be within range [{self.minimum}, {self.maximum}], is {value}")


class WithinRange(_Bounded):
    def __init__(self, minimum, maximum):
        self.minimum, self.maximum = minimum, maximum


class Minimum(_Bounded):
    def __init__(self, minimum):
        self.minimum = minimum


class Maximum(_Bounded):
    def __init__(self, maximum):
        self.maximum = maximum


class Choice(Validator):
    def __init__(self, choices):
        self.choices = choices

    def validate(self, value):
        if value not in self.choices:
            raise ValueError(f"Value is {value}, but must be in one of the following: {self.choices}")
