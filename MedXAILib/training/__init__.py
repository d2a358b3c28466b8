"""Training: `train(name, out, run)` makes the bundle that ships under that name, or one that learnt from a person's
own data."""

from __future__ import annotations

import os
import time
from pathlib import Path

from torch import nn

from MedXAILib.errors import MedXAIError, unknown
from MedXAILib.model import available
from MedXAILib.run import Run
from MedXAILib.synthetic.lung_nodules import Backgrounds
from MedXAILib.training import (
    attention_classifier,
    attention_segmentation,
    capsules,
    captioner,
    healthy_tissue,
    ladder_vae,
    lung_nodule,
    lung_nodule_permuted,
    lung_nodule_segmentation,
    lung_nodule_shortcut,
    mil,
    prototypes,
    semantic,
    triplet,
    vae,
)
from MedXAILib.training.table import Table, fingerprint
from MedXAILib.training.trainer import Recipe, fit

RECIPES: dict[str, Recipe] = {
    recipe.name: recipe
    for recipe in (
        lung_nodule.RECIPE,
        lung_nodule_permuted.RECIPE,
        lung_nodule_shortcut.RECIPE,
        lung_nodule_segmentation.RECIPE,
        healthy_tissue.RECIPE,
        attention_classifier.RECIPE,
        attention_segmentation.RECIPE,
        mil.RECIPE,
        mil.ATTENTION_RECIPE,
        semantic.RECIPE,
        capsules.RECIPE,
        captioner.RECIPE,
        captioner.VISUAL_RECIPE,
        prototypes.RECIPE,
        triplet.RECIPE,
        vae.RECIPE,
        vae.TC_RECIPE,
        ladder_vae.RECIPE,
    )
}

_TEST_SEED, _BORDERLINE_SEED = 2, 3


def train(name: str, out: str | Path, run: Run, quick: bool = False, data: Table | None = None) -> dict[str, float]:
    """Train the network `name`, test it on other patients and write its MONAI bundle to the folder `out`.

    It learns from `data` (see `read_table`), or from computed nodules in one chest CT, as the network that ships under
    that name did. An interrupted training leaves `<out>.checkpoint.pt`; the same call goes on from there. `quick` goes
    through the motions in seconds. Returns what was measured: `accuracy` or `dice` and the like on the test of the
    table, or on clear cases, `borderline_...` with borderline cases put back, `real_...` on the real lesion; and
    `seconds`.

    Raises:
        MedXAIError: for an unknown name, data that it cannot learn from, a place that cannot be written to, a device
            that is not there, and a damaged checkpoint.
        Cancelled: when the person asked to stop.
    """
    if name not in RECIPES:
        raise unknown("training recipe", name, RECIPES)
    recipe = RECIPES[name] if data is None else _own(RECIPES[name], data)
    recipe = recipe.smoke() if quick else recipe
    out = Path(out)
    # Said before scans are read, which takes long.
    available(run.device or "cpu")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise MedXAIError(f"'{out.parent}' cannot be made ({error.strerror}): give another folder.") from error
    if not os.access(out.parent, os.W_OK) or (out.exists() and not (out / "configs" / "metadata.json").exists()):
        raise MedXAIError(f"'{out}' is not a place for a bundle: give a new folder, or the bundle to replace.")
    checkpoint = out.with_name(out.name + ".checkpoint.pt")
    if data is None:
        network, metrics = _learnt_from_lung(recipe, checkpoint, run)
    else:
        network, metrics = _learnt_from_table(recipe, data, checkpoint, run)
    metrics = {key: round(value, 4) for key, value in metrics.items()}
    recipe.publish(network, metrics, out)
    checkpoint.unlink()
    return metrics


def _own(recipe: Recipe, data: Table) -> Recipe:
    if recipe.own is None:
        able = ", ".join(name for name, other in RECIPES.items() if other.own is not None)
        raise MedXAIError(f"'{recipe.name}' cannot learn from a table: leave it out, or train {able}.")
    return recipe.own(recipe, data)


def _learnt_from_lung(recipe: Recipe, checkpoint: Path, run: Run) -> tuple[nn.Module, dict[str, float]]:
    began = time.monotonic()
    network = fit(recipe, Backgrounds.training(), checkpoint, run)
    seconds = round(time.monotonic() - began)
    test = Backgrounds.test()
    examine = recipe.examine or recipe.synthesise
    metrics = recipe.measure(network, examine(test, recipe.test, _TEST_SEED))
    borderline = recipe.measure(network, examine(test, recipe.test, _BORDERLINE_SEED, borderline=True))
    metrics |= {f"borderline_{key}": value for key, value in borderline.items()}
    metrics |= {f"real_{key}": value for key, value in recipe.real(network, test).items()}
    return network, metrics | {"seconds": seconds}


def _learnt_from_table(recipe: Recipe, table: Table, checkpoint: Path, run: Run) -> tuple[nn.Module, dict[str, float]]:
    began = time.monotonic()
    patches = table.read(run)
    source = f"{table.path.name} {fingerprint(patches)}"
    network = fit(recipe, patches["train"], checkpoint, run, patches["validation"], source)
    seconds = round(time.monotonic() - began)
    return network, recipe.measure(network, patches["test"]) | {"seconds": seconds}
