"""Training of the demo networks: `train(name, out, run)` makes the bundle that ships under that name."""

from __future__ import annotations

import os
import time
from pathlib import Path

from MedXAILib.errors import MedXAIError, unknown
from MedXAILib.run import Run
from MedXAILib.synthetic.lung_nodules import Backgrounds
from MedXAILib.training import (
    attention_classifier,
    attention_segmentation,
    healthy_tissue,
    lung_nodule,
    lung_nodule_segmentation,
    mil,
)
from MedXAILib.training.trainer import Recipe, fit

RECIPES: dict[str, Recipe] = {
    recipe.name: recipe
    for recipe in (
        lung_nodule.RECIPE,
        lung_nodule_segmentation.RECIPE,
        healthy_tissue.RECIPE,
        attention_classifier.RECIPE,
        attention_segmentation.RECIPE,
        mil.RECIPE,
    )
}

_TEST_SEED, _BORDERLINE_SEED = 2, 3


def train(name: str, out: Path, run: Run, quick: bool = False) -> dict[str, float]:
    """Train the demo network `name`, test it on the other patient and write its MONAI bundle to the folder `out`.

    An interrupted training leaves `<out>.checkpoint.pt`; the same call goes on from there. `quick` goes through the
    motions in seconds. Returns what was measured: `accuracy` or `dice` and the like on clear cases, `borderline_...`
    with borderline cases put back, `real_...` on the real lesion, and `seconds`.

    Raises:
        MedXAIError: for an unknown name or a place that cannot be written to.
        Cancelled: when the person asked to stop.
    """
    if name not in RECIPES:
        raise unknown("training recipe", name, RECIPES)
    recipe = RECIPES[name].smoke() if quick else RECIPES[name]
    out = Path(out)
    out.parent.mkdir(parents=True, exist_ok=True)
    if not os.access(out.parent, os.W_OK) or (out.exists() and not (out / "configs" / "metadata.json").exists()):
        raise MedXAIError(f"'{out}' is not a place for a bundle: give a new folder, or the bundle to replace.")
    checkpoint = out.with_name(out.name + ".checkpoint.pt")
    began = time.monotonic()
    network = fit(recipe, Backgrounds.training(), checkpoint, run)
    seconds = time.monotonic() - began
    test = Backgrounds.test()
    examine = recipe.examine or recipe.synthesise
    metrics = recipe.measure(network, examine(test, recipe.test, _TEST_SEED))
    borderline = recipe.measure(network, examine(test, recipe.test, _BORDERLINE_SEED, borderline=True))
    metrics |= {f"borderline_{key}": value for key, value in borderline.items()}
    metrics |= {f"real_{key}": value for key, value in recipe.real(network, test).items()}
    metrics = {key: round(value, 4) for key, value in metrics.items()} | {"seconds": round(seconds)}
    recipe.publish(network, metrics, out)
    checkpoint.unlink()
    return metrics
