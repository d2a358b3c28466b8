"""What the methods have in common that take supervoxels of a scan away."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
from pydantic import Field, PlainSerializer, PlainValidator, WithJsonSchema
from torch import Tensor

from MedXAILib.engines.masks import Masks, Stream
from MedXAILib.engines.perturbation import perturb
from MedXAILib.errors import MedXAIError, unknown
from MedXAILib.explainer import Attribution, Question
from MedXAILib.grid import resample
from MedXAILib.infills.choice import infill
from MedXAILib.infills.infill import Infill
from MedXAILib.model import Prepared
from MedXAILib.supervoxels import Supervoxels, automatic_size, grid, numbered, slic
from MedXAILib.visual.perturbing import Perturbing
from MedXAILib.volume import Volume, load_volume
from MedXAILib.within import mask_on

KINDS = ("slic", "grid")


def _chosen(what: str, words: Sequence[str]) -> Callable[[Any], str | Volume]:
    def valid(value: Any) -> str | Volume:
        if isinstance(value, (str, Path)) and str(value) not in words and not Path(value).exists():
            raise ValueError(str(unknown(f"{what} or file", value, words)))
        if not isinstance(value, (str, Path, Volume)):
            raise ValueError(f"{what} is one of {', '.join(words)}, a file, or a Volume")
        return value if isinstance(value, Volume) else str(value)

    return valid


_AsText = PlainSerializer(lambda v: v if isinstance(v, str) else f"volume {v.fingerprint}", return_type=str)

SupervoxelChoice = Annotated[
    Any,
    PlainValidator(_chosen("a kind of supervoxels", KINDS)),
    _AsText,
    WithJsonSchema({"type": "string", "examples": list(KINDS)}),
    Field(
        description="parts that are taken away whole: slic follows the edges of the scan, grid makes boxes; or a "
        "segmentation in the space of the scan, each of whose labels is one part"
    ),
]

Within = Annotated[
    Any,
    PlainValidator(_chosen("a mask", ("",))),
    _AsText,
    WithJsonSchema({"type": "string", "format": "mask"}),
    Field(description="a mask in the space of the scan, such as an organ; outside it nothing is ever changed"),
]


@dataclass(frozen=True)
class Estimate:
    """What one target owes to each supervoxel, (count,); `half` the width of their 95 % confidence intervals, if they
    are estimates; and what theory demands, missed by `residual`."""

    values: Tensor
    half: Tensor | None = None
    residual: dict[str, float] = field(default_factory=dict)


class BySupervoxels(Perturbing):
    """An explainer whose map has one value for each supervoxel."""

    supervoxels: SupervoxelChoice = "slic"
    size_mm: float = Field(0.0, ge=0, description="size of a supervoxel in mm; 0 makes about 200")
    compactness: float = Field(1.0, gt=0, description="slic: round supervoxels (large) or ones along edges (small)")
    within: Within = ""

    @abstractmethod
    def estimates(self, question: Question, supervoxels: Supervoxels, infill: Infill) -> list[Estimate]:
        """One estimate for each target of `question`, which holds one sample."""

    def of_sample(self, question: Question) -> list[Attribution]:
        supervoxels = self._supervoxels(question)
        with torch.no_grad():
            found = self.estimates(question, supervoxels, infill(question, self.infill))
        return [
            Attribution(
                supervoxels.painted(one.values),
                one.residual,
                None if one.half is None else supervoxels.painted(one.half),
            )
            for one in found
        ]

    def ask(
        self,
        question: Question,
        supervoxels: Supervoxels,
        infill: Infill,
        present: Tensor,
        so_far: Callable[[Tensor], Tensor],
    ) -> Tensor:
        """Each target's value (M, T) when only the supervoxels `present` (M, count) are left; fewer rows than asked for
        when somebody said that it is enough. `so_far` makes of them the first target's values to be shown, (count,)."""
        x, found = question.x, [torch.zeros(0, len(question.targets), dtype=torch.float64)]

        def make(start: int, stop: int) -> Masks:
            return supervoxels.masks(~present[start:stop], x)

        def take(start: int, masks: Masks, values: list[Tensor]) -> None:
            found.append(torch.stack(values, 1).double().cpu())
            question.show(lambda: supervoxels.painted(so_far(torch.cat(found))))

        stream = Stream(len(present), tuple(x.shape[2:]), make)
        perturb(question, stream, infill, take, self.title)
        return torch.cat(found)

    def _supervoxels(self, question: Question) -> Supervoxels:
        """The supervoxels of `question`'s sample.

        Raises:
            MedXAIError: when there are none where the network looks.
        """
        x, seen = question.x[0].float().cpu().numpy(), question.seen[0]
        spatial = x.shape[1:]
        inside = np.ones(spatial, dtype=bool)
        if isinstance(self.within, Volume) or self.within:
            inside = mask_on(seen, _loaded(self.within, seen), spatial).numpy()
        size = self.size_mm or automatic_size(spatial, seen.spacing, max(float(inside.mean()), 1e-9))
        if self.supervoxels == "grid":
            labels = grid(spatial, seen.spacing, size)
        elif self.supervoxels == "slic":
            labels = slic(x, seen.spacing, size, self.compactness, inside) if inside.any() else inside
        else:
            given = _loaded(self.supervoxels, seen)
            nearest = resample(given.data[:1], given.affine, spatial, seen.affine, nearest=True)
            labels = nearest[0].round().long().cpu().numpy()
            inside &= labels > 0
        if not inside.any():
            raise MedXAIError(
                "The mask or segmentation has nothing where the network looks: check that it is of this scan, or "
                "choose another region."
            )
        found = numbered(labels, inside)
        return Supervoxels(found.labels.to(question.x.device), found.count)


def _loaded(given: str | Volume, seen: Prepared) -> Volume:
    """A mask or segmentation of what is `seen`."""
    volume = given if isinstance(given, Volume) else load_volume(given)
    if len(volume.affine) != len(seen.affine):
        raise MedXAIError(f"{volume.source or 'The mask or segmentation'} has not as many axes as the scan.")
    return volume
