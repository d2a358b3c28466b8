"""How far something that was asked is, in a bar and in words."""

from slicer.i18n import tr as _


def show(bar, progress):
    """Let a bar show it; returns the words."""
    # A single step has no length: the bar shows only that something goes on.
    bar.setRange(0, progress.total if progress.total > 1 else 0)
    bar.value = progress.done
    left = progress.seconds_left
    about = "" if left is None or left < 1 else _(" · about {time} left").format(time=roughly(left))
    return f"{progress.message}{about}"


def roughly(seconds):
    """A time that nobody knows exactly."""
    return f"{seconds:.0f} s" if seconds < 90 else f"{seconds / 60:.0f} min"
