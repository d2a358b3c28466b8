"""A library to begin with: computed nodules in real lung, about which everything is known, and two real lesions."""

from __future__ import annotations

import math
import shutil
import uuid
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import SimpleITK as sitk
import torch
from torch import Tensor

from MedXAILib import resources
from MedXAILib.cases.building import Source, fill, opened
from MedXAILib.cases.library import Library
from MedXAILib.cases.spaces import fingerprint
from MedXAILib.errors import MedXAIError
from MedXAILib.grid import shifted, transform
from MedXAILib.model import Model
from MedXAILib.report.localisation import centre
from MedXAILib.run import Run
from MedXAILib.synthetic.lung_nodules import ATTRIBUTES, CLASSES, HU_RANGE, SIZE, Backgrounds, draw, render
from MedXAILib.volume import Volume, load_volume

ROUNDS = 26
"""Of so many computed cases: 10 benign and 10 malignant nodules and 3 places without one; every second round is near
the border of the rule, where a network errs more often."""

_SEED, _DRAWN, _NONE = 20, 30, 12
_JITTER = 4
_REAL = {"real nodule": "chest_ct_nodule", "real mass": "chest_ct_mass"}


def demo_library(model: Model, run: Run, folder: str | Path | None = None, rounds: int = ROUNDS) -> Library:
    """The demo library of a network, made on first use: 520 computed nodules and 78 places without one in the lung of
    the patient that the demo networks are trained on, each as if it were another patient's, and the real lesions of
    both sample scans.

    Args:
        folder: where. Without, in the person's cache folder, one for each network.

    Raises:
        MedXAIError: when the network cannot take such scans, or the disk refuses.
    """
    if folder is None:
        folder = resources.user_folder() / "cases" / fingerprint(model)
    folder = Path(folder).absolute()
    if not Library.is_at(folder):
        _make(model, run, folder, rounds)
    return Library.open(folder)


def _make(model: Model, run: Run, folder: Path, rounds: int) -> None:
    """Beside `folder`, and moved there when all is well: it is there as a whole or not at all."""
    fresh = folder.parent / f".{folder.name}-{uuid.uuid4().hex[:8]}"
    try:
        (fresh / "volumes").mkdir(parents=True)
        sources = [*_real(fresh, model), *_computed(fresh, run, rounds)]
        fill(opened(fresh, model, sources, run), model, sources, run)
        try:
            fresh.rename(folder)
        except OSError:
            # Where another process was faster, its own is as good.
            if not Library.is_at(folder):
                raise
    except OSError as error:
        raise MedXAIError(f"The demo library cannot be written to '{folder}' ({error.strerror}): make room.") from error
    finally:
        shutil.rmtree(fresh, ignore_errors=True)


def _real(folder: Path, model: Model) -> Iterator[Source]:
    for uid, name in _REAL.items():
        scan = folder / "volumes" / f"{name}.nrrd"
        shutil.copyfile(resources.path(f"SampleData/{name}.nrrd"), scan)
        x, y, z = centre(load_volume(resources.path(f"SampleData/{name}_mask.nrrd")))
        region = None if model.patch_size is None else (x, y, z)
        yield Source(uid, uid, scan, f"volumes/{scan.name}", region, meta={"made": "real"})


def _computed(folder: Path, run: Run, rounds: int) -> Iterator[Source]:
    run.step(0, rounds, "Computing nodules")
    backgrounds = Backgrounds.training()
    for i in range(rounds):
        run.step(i, rounds, "Computing nodules")
        attributes, labels = draw(_DRAWN, _SEED + i, borderline=bool(i % 2))
        kept = (labels > 0) | (torch.arange(_DRAWN) % _NONE == 0)
        nodules = render(backgrounds, attributes[kept], labels[kept], _SEED + i, _JITTER)
        for k in range(len(nodules)):
            uid = f"computed {i}-{k}"
            affine = shifted(backgrounds.affine, nodules.corners[k].numpy())
            scan = folder / "volumes" / f"{uid.replace(' ', '-')}.nrrd"
            _write(nodules.images[k], affine, scan)
            x, y, z = transform(affine, np.full(3, (SIZE - 1) / 2)).tolist()
            known = zip(ATTRIBUTES, nodules.attributes[k].tolist(), strict=True)
            meta = {name: round(value, 3) for name, value in known if not math.isnan(value)}
            label = CLASSES[int(nodules.labels[k])]
            made = "computed, near the border" if i % 2 else "computed, clear"
            yield Source(uid, uid, scan, f"volumes/{scan.name}", (x, y, z), label, {**meta, "made": made})


def _write(image: Tensor, affine: np.ndarray, path: Path) -> None:
    low, high = HU_RANGE
    scan = Volume((low + (high - low) * image).round(), affine).to_sitk()
    sitk.WriteImage(sitk.Cast(scan, sitk.sitkInt16), str(path), useCompression=True)
