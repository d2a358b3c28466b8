"""What a person sets once: in Slicer's settings file where there is Qt, else for the session."""

from __future__ import annotations

import sys
from types import SimpleNamespace

import pytest

from MedXAISlicerLib import settings


@pytest.fixture(params=["file", "memory"])
def stored(request, monkeypatch, tmp_path):
    """Where settings are kept."""
    if request.param == "file":
        core = pytest.importorskip("PySide6.QtCore", exc_type=ImportError)
        file = str(tmp_path / "Slicer.ini")
        qt = SimpleNamespace(QSettings=lambda: core.QSettings(file, core.QSettings.Format.IniFormat))
        monkeypatch.setitem(sys.modules, "qt", qt)
        return qt.QSettings()
    # What None stands for in sys.modules cannot be imported.
    monkeypatch.setitem(sys.modules, "qt", None)
    monkeypatch.setattr(settings, "_memory", {})
    return settings._store()


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("workerCommand", '"C:\\Program Files\\python.exe" -m MedXAILib.worker'),
        ("workerStream", True),
        ("allowCpu", False),
        ("recentModels", ["/one, and only"]),
        ("recentModels", []),
    ],
)
def test_a_value_comes_back_as_it_was(stored, name, value):
    assert settings.get(name) == settings.DEFAULTS[name]
    settings.set(name, value)
    if hasattr(stored, "sync"):
        stored.sync()
    assert settings.get(name) == value
    assert type(settings.get(name)) is type(value)


def test_what_somebody_else_wrote_there_is_no_harm(stored):
    for text in ("", "yes", "7", "[1"):
        stored.setValue("MedXAI/recentModels", text)
        assert settings.get("recentModels") == []


def test_a_list_that_was_asked_for_is_ones_own(stored):
    settings.get("trusted").append("everything")
    assert settings.get("trusted") == []


def test_recent_models_are_newest_first_and_few(stored):
    for name in [*"abcdefghijkl", "e"]:
        settings.addRecentModel(name)
    assert settings.get("recentModels") == [*"elkjihgfdc"]


def test_trust_is_for_exactly_this_code(stored):
    assert not settings.isTrusted("import os")
    settings.trust("import os")
    settings.trust("import os")
    assert settings.isTrusted("import os")
    assert not settings.isTrusted("import os ")
    assert len(settings.get("trusted")) == 1
    # A model that shows no code has shown nothing that could be allowed.
    settings.trust("")
    assert not settings.isTrusted("")


def test_there_are_no_other_settings(stored):
    for use in (lambda: settings.get("wokerCommand"), lambda: settings.set("wokerCommand", "x")):
        with pytest.raises(KeyError):
            use()
