"""Scans with nodules somewhere in them, of which only the grade is told.

A scan has no nodule, or one to three, and the grade of its worst: none < benign < malignant (see
`MedXAILib.synthetic.lung_nodules`). Where they are is for a test to know.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import cast

import torch
import torch.nn.functional as F
from torch import Generator, Tensor

from MedXAILib import resources
from MedXAILib.errors import MedXAIError
from MedXAILib.loading import load_model
from MedXAILib.networks.healthy_tissue import HealthyTissue
from MedXAILib.synthetic.lung_nodules import CLASSES, HU_RANGE, SIZE, Backgrounds, Draws, draw, drawn, insert, scale

MOST = 3
"""Nodules in one scan."""

_TRIES = 256


@dataclass(frozen=True)
class Scans:
    """`images` (N, 1, D, H, W) float32 in 0..1 with the axes (R, A, S), their `grades` (N,) as indices into `CLASSES`,
    and `masks` of the same shape as the images (uint8): the grade of the nodule at each voxel."""

    images: Tensor
    grades: Tensor
    masks: Tensor

    def __len__(self) -> int:
        return len(self.grades)


def crops(backgrounds: Backgrounds, count: int, seed: int, borderline: bool = False, size: int = 80) -> Scans:
    """`count` cubes of `size` voxels a side about places in the lung, a third of each grade.

    Flipped and transposed in the axial plane at random. None touches the patient's own lesion.
    """
    made = []
    for k in range(count):
        generator = _generator(seed, k // len(CLASSES))
        part = _place(backgrounds, size, generator)
        image, mask = _scan(backgrounds, backgrounds.hu, part, k % len(CLASSES), seed * 1000 + k, borderline)
        made.append(_turned(image, mask, generator, swap=True))
    return _stacked(made)


def whole(backgrounds: Backgrounds, count: int, seed: int, borderline: bool = False) -> Scans:
    """`count` times all of the scan, a third of each grade, flipped at random; the patient's own lesion is healed."""
    hu, part = healed(backgrounds), (torch.zeros(3, dtype=torch.long), torch.tensor(backgrounds.hu.shape))
    made = []
    for k in range(count):
        image, mask = _scan(backgrounds, hu, part, k % len(CLASSES), seed * 1000 + k, borderline)
        made.append(_turned(image, mask, _generator(seed, k), swap=False))
    return _stacked(made)


def healed(backgrounds: Backgrounds) -> Tensor:
    """The scan in Hounsfield units, with what the shipped `healthy_lung` draws in the place of the patient's lesion.

    Raises:
        MedXAIError: when the lesion is larger than a patch.
    """
    if backgrounds.lesion is None or backgrounds.lesion_box is None:
        return backgrounds.hu
    low, high = backgrounds.lesion_box
    if bool((high - low >= SIZE).any()):
        raise MedXAIError("The lesion of this scan is too large to be healed: use a scan with a smaller one.")
    corner = ((low + high) // 2 - SIZE // 2).minimum(torch.tensor(backgrounds.hu.shape) - SIZE).clamp_min(0)
    cut = _cut(corner, corner + SIZE)
    network = cast(HealthyTissue, load_model(resources.path("Models/infills/healthy_lung")).network.eval())
    # With a rim, where the lesion fades.
    hidden = F.max_pool3d(backgrounds.lesion[cut][None, None].float(), 5, stride=1, padding=2) > 0
    seen = scale(backgrounds.hu[cut])[None, None].masked_fill(hidden, -1)
    with torch.no_grad():
        noise = torch.randn(network.noise_shape(seen), generator=Generator().manual_seed(0))
        filled = network.fill(seen, noise)
    hu = backgrounds.hu.clone()
    first, last = HU_RANGE
    hu[cut] = torch.where(hidden[0, 0], first + (last - first) * filled[0, 0], hu[cut])
    return hu


def _scan(
    backgrounds: Backgrounds, hu: Tensor, part: tuple[Tensor, Tensor], grade: int, seed: int, borderline: bool
) -> tuple[Tensor, Tensor]:
    """The `part` of `hu` with nodules, in 0..1, and its mask, both (D, H, W)."""
    generator = _generator(seed, 1)
    image = hu[_cut(*part)].clone()
    mask = torch.zeros(image.shape, dtype=torch.uint8)
    attributes, labels = draw(MOST * len(CLASSES), seed, borderline)
    nodules = int(torch.randint(1, MOST + 1, (), generator=generator)) if grade else 0
    for k in range(nodules):
        # The first is what the scan has its grade from.
        label = int(torch.randint(1, grade + 1, (), generator=generator)) if k else grade
        chance = _upright(drawn(backgrounds, generator, part))
        here = _cut(chance.corner - part[0], chance.corner - part[0] + SIZE)
        with_nodule, inside = insert(image[here][None], attributes[labels == label][k][None], [chance])
        image[here] = with_nodule[0]
        mask[here] = torch.where(inside[0], mask[here].clamp_min(label), mask[here])
    spread, offset = 8 + 17 * torch.rand((), generator=generator), 8 + 22 * torch.rand((), generator=generator)
    noise = torch.randn(image.shape, generator=generator) * spread
    return scale(image + noise + offset * torch.randn((), generator=generator)), mask


def _upright(chance: Draws) -> Draws:
    """The same with the nodule where it is in a patch that is not turned."""
    centre = torch.where(chance.flips, SIZE - 1 - chance.centre, chance.centre)
    return replace(chance, centre=centre[[1, 0, 2]] if chance.swap else centre)


def _place(backgrounds: Backgrounds, size: int, generator: Generator) -> tuple[Tensor, Tensor]:
    """From where to where a crop reaches."""
    shape = torch.tensor(backgrounds.hu.shape)
    if bool((shape < size).any()):
        raise MedXAIError(f"The scan is smaller than {size} voxels along an axis: use a larger scan, or smaller crops.")
    middle = backgrounds.inside[torch.randint(len(backgrounds.inside), (_TRIES,), generator=generator)]
    corner = middle - size // 2
    # With lung in the middle there is a place for a nodule.
    good = ((corner >= 0) & (corner + size <= shape)).all(1)
    if backgrounds.lesion_box is not None:
        low, high = backgrounds.lesion_box
        good &= ((corner + size <= low) | (corner > high)).any(1)
    if not bool(good.any()):
        raise MedXAIError(f"The scan has no {size} voxels of lung beside its lesion: use a scan with more lung.")
    chosen = corner[int(good.int().argmax())]
    return chosen, chosen + size


def _turned(image: Tensor, mask: Tensor, generator: Generator, swap: bool) -> tuple[Tensor, Tensor]:
    axes = (torch.rand(3, generator=generator) < 0.5).nonzero().flatten().tolist()
    swap = swap and bool(torch.rand((), generator=generator) < 0.5)
    image, mask = (one.transpose(0, 1) if swap else one for one in (image, mask))
    return image.flip(axes), mask.flip(axes)


def _stacked(made: list[tuple[Tensor, Tensor]]) -> Scans:
    images, masks = (torch.stack(column)[:, None] for column in zip(*made, strict=True))
    return Scans(images, torch.arange(len(made)) % len(CLASSES), masks)


def _cut(low: Tensor, high: Tensor) -> tuple[slice, ...]:
    return tuple(slice(int(a), int(b)) for a, b in zip(low, high, strict=True))


def _generator(seed: int, purpose: int) -> Generator:
    return Generator().manual_seed(seed * 1_000_003 + purpose)
