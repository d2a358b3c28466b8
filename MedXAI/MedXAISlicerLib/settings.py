"""What a person sets once on their machine, whatever scene is open: kept in Slicer's settings."""

import hashlib
import json
from pathlib import Path

DEFAULTS = {
    # Command line of another worker, on this machine or another one; empty for this Slicer's own Python.
    "workerCommand": "",
    # Whether that worker shares no disk with this machine: scans and maps are sent through the connection.
    "workerStream": False,
    # Where to compute: "cpu", "cuda", "cuda:1", ...; empty for a GPU where there is one.
    "device": "",
    # Whether the CPU may take over what a GPU is too small for.
    "allowCpu": True,
    # Whether a part of the region may be explained when all of it does not fit in memory.
    "allowSmallerRegion": False,
    # Folder with wheels to install from where there is no network; empty to download.
    "wheelFolder": "",
    # Paths of the models used last, newest first.
    "recentModels": [],
    # SHA-256 of the code, brought along by models, that the person has allowed to run.
    "trusted": [],
}
MOST_RECENT = 10

_memory = {}


def get(name):
    """The value of a setting, of the type of its default."""
    default = DEFAULTS[name]
    stored = _store().value(f"MedXAI/{name}")
    try:
        value = json.loads(stored)
    except (TypeError, ValueError):
        value = default
    # A copy, so that whoever changes a list they got does not change the default.
    return type(default)(value if isinstance(value, type(default)) else default)


def set(name, value):
    """Keep a setting from now on."""
    # JSON, because settings files know nothing but text: true comes back as "true", a list of one as its only item.
    _store().setValue(f"MedXAI/{name}", json.dumps(type(DEFAULTS[name])(value)))


def addRecentModel(path):
    """Put a model at the top of those used last."""
    path = str(Path(path))
    set("recentModels", [path, *(p for p in get("recentModels") if p != path)][:MOST_RECENT])


def isTrusted(code):
    """Whether the person has allowed exactly this code to run."""
    return _sha256(code) in get("trusted")


def trust(code):
    """Let this code run from now on, whichever model brings it along."""
    if code and not isTrusted(code):
        set("trusted", [*get("trusted"), _sha256(code)])


def _sha256(code):
    return hashlib.sha256(code.encode()).hexdigest()


def _store():
    try:
        import qt
    except ModuleNotFoundError:
        return _Memory
    return qt.QSettings()


class _Memory:
    """Settings of a session without Qt, which end with it."""

    @staticmethod
    def value(key):
        return _memory.get(key)

    @staticmethod
    def setValue(key, text):
        _memory[key] = text
