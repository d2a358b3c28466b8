"""Settings: each is kept at once, and another worker answers from then on."""

from __future__ import annotations

import sys

import pytest

pytest.importorskip("slicer_host")


@pytest.fixture
def panel(host):
    from MedXAISlicerLib.panels.settings import SettingsPanel

    panel = SettingsPanel(None, onChanged=lambda: panel.changes.append(1))
    panel.changes = []
    return panel


def test_what_is_set_is_kept(host, panel):
    from MedXAISlicerLib import settings
    from MedXAISlicerLib.panels.settings import SettingsPanel

    panel.ui.allowCpuCheckBox.click()
    panel.ui.allowSmallerRegionCheckBox.click()
    panel.ui.deviceSelector.setCurrentIndex(1)
    panel.ui.deviceSelector.activated.emit(1)
    panel.ui.wheelFolderPathLineEdit.currentPath = "wheels"
    kept = [settings.get(name) for name in ("allowCpu", "allowSmallerRegion", "device", "wheelFolder")]
    assert kept == [False, True, "cpu", "wheels"]
    again = SettingsPanel(None, onChanged=None).ui
    shown = again.allowCpuCheckBox.isChecked(), again.allowSmallerRegionCheckBox.isChecked()
    assert shown == (False, True)
    assert again.deviceSelector.itemText(1) == "CPU"
    assert not panel.changes


def test_another_worker_answers_from_then_on(host, panel, tmp_path):
    panel.ui.testButton.click()
    host.until(lambda: "It works" in panel.ui.testLabel.text)
    panel.ui.commandLineEdit.setText(f'"{tmp_path / "no such python"}" -m MedXAILib.worker')
    panel.ui.commandLineEdit.editingFinished.emit()
    assert panel.changes == [1]
    panel.ui.testButton.click()
    host.until(lambda: "cannot be started" in panel.ui.testLabel.text)
    panel.ui.commandLineEdit.setText(f'"{sys.executable}" -m MedXAILib.worker')
    panel.ui.commandLineEdit.editingFinished.emit()
    panel.ui.testButton.click()
    host.until(lambda: "It works" in panel.ui.testLabel.text)
    panel.ui.logButton.click()
    assert host.dialogs
