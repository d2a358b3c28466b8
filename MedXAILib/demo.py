"""The demo: why does the shipped network call a real nodule in a real chest CT malignant?"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from MedXAILib.explanation import written_whole
from MedXAILib.loading import load_model
from MedXAILib.model import Model, Prediction
from MedXAILib.report.case import show, write
from MedXAILib.report.localisation import centre
from MedXAILib.report.page import Shown
from MedXAILib.request import explain
from MedXAILib.resources import path
from MedXAILib.run import Run
from MedXAILib.volume import load_volume

MODEL, TARGET = "Models/lung_nodule", "malignant"
SCAN, NODULE = "SampleData/chest_ct_nodule.nrrd", "SampleData/chest_ct_nodule_mask.nrrd"

CAUTION = '"Malignant" is a rule about nodules that this network was taught, not pathology.'

# The first is the demo's own, the others are there to compare.
METHODS: dict[str, dict[str, Any]] = {"hirescam": {}, "gradcam": {}, "integrated_gradients": {"max_steps": 45}}


@dataclass(frozen=True)
class Demo:
    """What the demo found: what the network said, where it was asked (RAS mm), and a map by each method."""

    model: Model
    prediction: Prediction
    region: tuple[float, ...]
    shown: tuple[Shown, ...]


def demo(out: Path, run: Run) -> Demo:
    """Explain the sample scan and write what came out to the folder `out`.

    Raises:
        MedXAIError: when `out` holds something else or cannot be written.
        Cancelled: when the person asked to stop.
    """
    with written_whole(out) as folder:
        run.step(0, 1, "Reading the scan and the network")
        model = load_model(path(MODEL))
        volume = load_volume(path(SCAN))
        nodule = load_volume(path(NODULE))
        region = centre(nodule)
        run.step(0, 1, "Asking the network")
        prediction = model.predict(volume, region)
        shown = []
        for method, parameters in METHODS.items():
            explanation = explain(model, volume, method, TARGET, region, run, **parameters)
            shown.append(show(volume, explanation, prediction, nodule))
        run.step(0, 1, "Writing")
        write(folder, shown[0], prediction, shown[1:], CAUTION)
    return Demo(model, prediction, region, tuple(shown))
