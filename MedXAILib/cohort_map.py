"""What a network looks at in general: the mean of its maps over many scans, of which one is held at a time."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from MedXAILib import registry
from MedXAILib.errors import Cancelled, MedXAIError, unknown
from MedXAILib.explanation import Provenance, SaliencyMap
from MedXAILib.grid import resample
from MedXAILib.model import Model, Prepared
from MedXAILib.region import Region
from MedXAILib.request import Wanted, explain
from MedXAILib.run import Run
from MedXAILib.volume import Volume, load_volume

Form = Literal["absolute", "signed"]


def explain_cohort(
    model: Model,
    volumes: Sequence[Volume | str | Path | Sequence[str | Path]],
    method: str = "gradcam",
    target: Wanted = None,
    regions: Sequence[Region | None] | None = None,
    form: Form = "absolute",
    template: Volume | None = None,
    run: Run | None = None,
    **parameters: Any,
) -> SaliencyMap:
    """The mean map of what `model` says about many scans.

    Args:
        model: the network.
        volumes: the scans, or their files, which are read one at a time.
        method: one of `methods()`; `parameters` are its own.
        target: what to explain of each scan, as for `explain`; None is what is predicted for each.
        regions: for each scan the part that a patch network looks at.
        form: "absolute", the mean of the maps' absolute values, says where the decisions rest; "signed", the mean of
            the maps, where the scans on the whole speak for or against.
        template: a scan to which the others are registered, on whose grid the map is made; a scan counts as zero where
            the network does not look at it. Without one, what the network sees of each scan is laid on what it sees of
            the first, voxel on voxel, which is right for patches around a finding.
        run: as for `explain`; its progress counts scans.

    Returns:
        A map on the template's grid, or on the network's for the first scan. Its notes name the scans that could not be
        explained, with the reason.

    Raises:
        MedXAIError: when no scan could be explained.
    """
    if form not in ("absolute", "signed"):
        raise unknown("form", form, ("absolute", "signed"))
    if regions is not None and len(regions) != len(volumes):
        raise MedXAIError(f"There are {len(volumes)} scans and {len(regions)} regions: give each scan its region.")
    registry.make(method, parameters)
    run = run if run is not None else Run()
    seeing, alone, mean = _Seeing.of(model), replace(run, progress=None, partial=None), _Mean(form, template)
    made: list[SaliencyMap] = []
    skipped: list[str] = []
    with model.ready(run.device):
        for i, given in enumerate(volumes):
            run.step(i, len(volumes), "Explaining the scans")
            region = None if regions is None else regions[i]
            try:
                volume = given if isinstance(given, Volume) else load_volume(given)
                seen = seeing.look(volume, region)
                found = explain(seeing, seen, method, target, run=alone, **parameters)
                mean.add(found)
            except Cancelled:
                raise
            except MedXAIError as error:
                name = given.source if isinstance(given, Volume) else given
                skipped.append(f"Scan {i + 1}{f' ({name})' if name else ''} was left out: {error}")
                continue
            made.append(_without_map(found, volume, region))
        run.step(len(volumes), len(volumes), "Explaining the scans")
    if not made:
        raise MedXAIError(f"No scan could be explained: {skipped[0] if skipped else 'give at least one'}")
    return SaliencyMap(
        provenance=_of_all([m.provenance for m in made], form, mean.data, skipped),
        residual={name: max(m.residual[name] for m in made) for name in made[0].residual},
        data=mean.data,
        affine=mean.affine,
        signed=made[0].signed and form == "signed",
    )


@dataclass(eq=False)
class _Seeing(Model):
    """A model that is asked about what it sees of a scan, so that the map is on its own grid."""

    seen: Volume | None = None

    @classmethod
    def of(cls, model: Model) -> _Seeing:
        return cls(**{f.name: getattr(model, f.name) for f in fields(Model) if f.init})

    def look(self, volume: Volume, region: Region | None) -> Volume:
        """What it sees of `volume`."""
        prepared = super().prepare(volume, region)
        self.seen = Volume(prepared.x, prepared.affine, volume.source)
        return self.seen

    def prepare(self, volume: Volume, region: Region | None = None) -> Prepared:
        if volume is self.seen:
            return Prepared(volume.data, volume.affine)
        return super().prepare(volume, region)


class _Mean:
    """The mean of maps as they come."""

    data: Tensor
    affine: np.ndarray

    def __init__(self, form: Form, template: Volume | None) -> None:
        self.form, self.template, self.count = form, template, 0

    def add(self, found: SaliencyMap) -> None:
        data, affine = found.data.abs() if self.form == "absolute" else found.data, found.affine
        if self.template is not None:
            data = resample(data, affine, self.template.shape, self.template.affine)
            affine = self.template.affine
        if self.count == 0:
            self.data, self.affine = torch.zeros_like(data), affine
        if data.shape != self.data.shape:
            sizes = (" x ".join(map(str, d.shape[1:])) for d in (data, self.data))
            raise MedXAIError(
                "the network sees {} voxels of it and {} of the first: give a template to which the scans are "
                "registered, or regions of one size.".format(*sizes)
            )
        self.count += 1
        self.data += (data - self.data) / self.count


def _without_map(found: SaliencyMap, volume: Volume, region: Region | None) -> SaliencyMap:
    """What is kept of the explanation of one scan."""
    about = {"source": volume.source, "fingerprint": volume.fingerprint, "shape": list(volume.data.shape)}
    made = found.provenance.model_copy(
        update={"volume": about, "region": None if region is None else np.asarray(region, dtype=float).tolist()}
    )
    return replace(found, provenance=made, data=found.data[:0].clone())


def _of_all(made: list[Provenance], form: Form, mean: Tensor, skipped: list[str]) -> Provenance:
    """One provenance for the explanations of many scans."""
    first, count = made[0], f"{len(made)} scan{'s' * (len(made) > 1)}"
    same = all(p.target == first.target for p in made)
    what = "mean of the absolute maps" if form == "absolute" else "mean of the maps"
    notes = [f"The {what} of {count}.", *skipped, *(note for p in made for note in p.notes)]
    return first.model_copy(
        update={
            "title": f"{first.title}, {what} of {count}",
            "target": first.target if same else {**first.target, "which": [p.target.get("which") for p in made]},
            "target_label": ", ".join(dict.fromkeys(p.target_label for p in made)),
            "region": None if all(p.region is None for p in made) else [p.region for p in made],
            "volume": {
                "source": count,
                "fingerprint": " ".join(p.volume["fingerprint"] for p in made),
                "shape": list(mean.shape),
                "form": form,
                "scans": [p.volume for p in made],
            },
            "seconds": sum(p.seconds for p in made),
            "peak_memory": max(p.peak_memory for p in made),
            "forwards": sum(p.forwards for p in made),
            "backwards": sum(p.backwards for p in made),
            "notes": list(dict.fromkeys(notes)),
        }
    )
