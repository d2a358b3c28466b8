"""What a click in the Slicer module costs, beside the library call it stands for: python -m benchmarks.slicer_panel

Clicks through the module on the test host (Testing/slicer_host): warm demonstration network, chest CT, and a worker of
its own. The event loop is asked every 5 ms whether it is served.
"""

from __future__ import annotations

import json
import statistics
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT / "Testing"), str(ROOT / "MedXAI")]

import slicer_host  # noqa: E402
import slicer_scene  # noqa: E402

import MedXAILib as mx  # noqa: E402
from benchmarks.measure import machine  # noqa: E402
from MedXAILib.resources import path  # noqa: E402

REPEATS = 7
NODULE = (21.9, 120.5, -611.5)
METHODS = ("hirescam", "gradcam", "gradient", "smoothgrad")


def main() -> None:
    with tempfile.TemporaryDirectory() as folder, slicer_host.running(Path(folder)) as host:
        module = host.open("MedXAI")
        panel = module.explainPanel
        host.until(lambda: module.logic.methods and panel.chooser.model)
        _look_at_nodule(panel)
        found = {method: _measured(host, panel, method) for method in METHODS}
        found["cancel (s)"] = _cancelled(host, panel)
        host.close()
    result = {"rows": found, "repeats": REPEATS, "machine": machine()}
    text = json.dumps(result, indent=2)
    (ROOT / "benchmarks" / "results" / "slicer" / "panel.json").write_text(text + "\n", encoding="utf-8")
    print(text)


def _look_at_nodule(panel) -> None:
    import slicer

    choices = panel.parameterNode
    choices.inputVolume = slicer_scene.read_volume(path("SampleData/chest_ct_nodule.nrrd"), "CT")
    choices.point = slicer.mrmlScene.AddNewNodeByClass("vtkMRMLMarkupsFiducialNode")
    choices.point.AddControlPoint(NODULE)
    choices.regionKind, choices.target = "point", "malignant"


def _measured(host, panel, method: str) -> dict[str, object]:
    """One method: the library call and the click, in turn, so that both meet the same machine."""
    model, volume = mx.load_model(path("Models/lung_nodule")), mx.load_volume(path("SampleData/chest_ct_nodule.nrrd"))
    panel.parameterNode.method = method
    calls, clicks, blocks = [], [], []
    for repeat in range(REPEATS + 1):
        started = time.perf_counter()
        mx.explain(model, volume, method, target="malignant", region=NODULE)
        called = time.perf_counter()
        host.longest_block = 0.0
        panel.ui.explainButton.click()
        host.until(lambda: panel.running is None)
        assert not panel.ui.statusLabel.text, panel.ui.statusLabel.text
        if repeat:
            calls.append(called - started)
            clicks.append(time.perf_counter() - called)
            blocks.append(host.longest_block)
    return {
        "library call (s)": statistics.median(calls),
        "click to overlay (s)": statistics.median(clicks),
        "ratio": statistics.median(b / a for a, b in zip(calls, clicks, strict=True)),
        "longest block (ms), median": statistics.median(blocks),
        "longest block (ms), worst": max(blocks),
    }


def _cancelled(host, panel) -> dict[str, float]:
    panel.parameterNode.method = "integrated_gradients"
    slow = {"steps": 1000, "max_steps": 10000, "tolerance": 1e-9}
    panel.parameterNode.methodParameters = json.dumps({"integrated_gradients": slow})
    seconds = []
    for _ in range(REPEATS):
        panel.ui.explainButton.click()
        host.until(lambda: panel.running.progress is not None and panel.running.progress.done)
        started = time.perf_counter()
        panel.ui.explainButton.click()
        host.until(lambda: panel.running is None)
        seconds.append(time.perf_counter() - started)
    return {"median": statistics.median(seconds), "worst": max(seconds)}


if __name__ == "__main__":
    main()
