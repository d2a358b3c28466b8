"""Slicer is closed while it computes."""

from __future__ import annotations

import psutil
import pytest

slicer = pytest.importorskip("slicer")

import slicer_host  # noqa: E402
import slicer_scene  # noqa: E402

from MedXAILib.resources import path  # noqa: E402


def test_nothing_is_left_of_the_worker(tmp_path):
    with slicer_host.running(tmp_path) as host:
        module = host.open("MedXAI")
        panel = module.explainPanel
        host.until(lambda: module.logic.methods and panel.chooser.model)
        choices = panel.parameterNode
        choices.inputVolume = slicer_scene.read_volume(path("SampleData/chest_ct_nodule.nrrd"), "Chest CT")
        choices.point = slicer.mrmlScene.AddNewNodeByClass("vtkMRMLMarkupsFiducialNode")
        choices.point.AddControlPoint(21.9, 120.5, -611.5)
        choices.regionKind, choices.method = "point", "integrated_gradients"
        choices.methodParameters = '{"integrated_gradients": {"steps": 1000, "max_steps": 10000}}'
        panel.ui.explainButton.click()
        host.until(lambda: panel.running.progress is not None and panel.running.progress.done)
        from MedXAISlicerLib import workers

        folder = workers.shared().log.parent
        (worker,) = [p for p in psutil.Process().children(recursive=True) if "MedXAILib.worker" in p.cmdline()]
        host.close()
        assert not worker.is_running() or worker.status() == psutil.STATUS_ZOMBIE
        assert not folder.exists()
        assert panel.running is None
