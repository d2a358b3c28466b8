"""Nodules of known shape, attributes and class in real lung: patches whose right explanation is known.

A patch is a real piece of a chest CT into which a nodule was computed. Its class follows from its attributes by
`rule_logit`, so it is known not only *where* the nodule is (the mask) but also *why* it has its class. "Malignant" is
the name of one side of that rule; it is not a pathologist's finding.

Sample k of a seed is the same in every batch and for every size of the set. Its place, shape, texture and noise do not
depend on its attributes, so that two renderings that differ in one attribute differ in nothing else:

    attributes, labels = draw(8, seed=1)
    changed = attributes.clone()
    changed[:, ATTRIBUTES.index("spiculation")] = 0.0
    before, after = render(backgrounds, attributes, labels, seed=1), render(backgrounds, changed, labels, seed=1)
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import SimpleITK as sitk
import torch
import torch.nn.functional as F
from monai.data import MetaTensor
from monai.transforms import Compose, Orientation, Spacing
from torch import Generator, Tensor

from MedXAILib import resources
from MedXAILib.errors import MedXAIError

SIZE = 40
"""Voxels along each side of a patch; its axes are (R, A, S)."""
SPACING_MM = 1.25
HU_RANGE = (-1000.0, 400.0)
"""What becomes 0 and 1 at the network's input; values beyond are clipped."""
CLASSES = ("none", "benign", "malignant")
ATTRIBUTES = ("diameter_mm", "elongation", "lobulation", "spiculation", "solidity", "calcification", "margin_mm")
RULE = {"bias": -2.6, "diameter": 3.0, "spiculated": 3.0, "lobulated": 1.0, "part_solid": 1.5, "calcified": -4.0}
"""Weights of `rule_logit`. Elongation and margin have none: concepts that must turn out not to matter."""

_DIAMETER_MM = (7.0, 24.0)
_CLEAR, _BORDERLINE = 1.4, 0.8
_JITTER = 12
_LESION_GROWTH = 3
_CHUNK = 16


@dataclass(frozen=True, eq=False)
class Backgrounds:
    """A chest CT to take pieces of. `hu` (R, A, S) at `SPACING_MM`; `affine` takes its indices to RAS mm.

    `inside` and `vessels` (K, 3) are indices in the lung, off its border: all of it, and its bright part. `lesion`
    (R, A, S) bool is the patient's own lesion; no synthetic patch touches the box around it.
    """

    hu: Tensor
    affine: np.ndarray
    inside: Tensor
    vessels: Tensor
    lesion: Tensor | None = None

    @classmethod
    def from_scan(cls, image: str | Path, lesion: str | Path | None = None) -> Backgrounds:
        """Read a chest CT in Hounsfield units, and the mask of its lesion, if it has one.

        Raises:
            MedXAIError: when no lung is found in it.
        """
        hu = to_grid(sitk.ReadImage(str(image)), "bilinear")
        mask = None if lesion is None else to_grid(sitk.ReadImage(str(lesion)), "nearest")[0].as_tensor() > 0
        lung = lung_mask(hu[0].numpy())
        core = sitk.GetArrayFromImage(sitk.BinaryErode(_image(lung), [6, 6, 6])).astype(bool)
        voxels = hu[0].as_tensor()
        # Amid the large vessels of the hilum nobody could tell where a nodule begins.
        airy = F.avg_pool3d(voxels[None], 9, stride=1, padding=4)[0] < -600
        inside = torch.from_numpy(core) & airy
        if not bool(inside.any()):
            raise MedXAIError(f"No lung was found in '{image}': give a chest CT in Hounsfield units.")
        vessels = (inside & (voxels > -500)).nonzero()
        return cls(voxels, hu.affine.numpy(), inside.nonzero(), vessels, mask)

    @classmethod
    def training(cls) -> Backgrounds:
        """The shipped scan that the demo networks are trained on."""
        folder = resources.path("SampleData")
        return cls.from_scan(folder / "chest_ct_mass.nrrd", folder / "chest_ct_mass_mask.nrrd")

    @classmethod
    def test(cls) -> Backgrounds:
        """The shipped scan of another patient, which no demo network has seen."""
        folder = resources.path("SampleData")
        return cls.from_scan(folder / "chest_ct_nodule.nrrd", folder / "chest_ct_nodule_mask.nrrd")

    @cached_property
    def lesion_box(self) -> tuple[Tensor, Tensor] | None:
        """The lowest and highest index (R, A, S) of the patient's own lesion and 3 voxels around it."""
        if self.lesion is None:
            return None
        where = self.lesion.nonzero()
        return where.amin(0) - _LESION_GROWTH, where.amax(0) + _LESION_GROWTH

    def lesion_patch(self, r: int = 0, a: int = 0, s: int = 0) -> tuple[Tensor, Tensor]:
        """The patient's own lesion as a network gets it, (1, 1, 40, 40, 40) in 0..1, and its mask (bool).

        The patch is centred on the mask's centre of mass, moved by `r`, `a` and `s` voxels.

        Raises:
            MedXAIError: when the scan came without a mask of its lesion.
        """
        if self.lesion is None:
            raise MedXAIError("These backgrounds know of no lesion: give its mask to Backgrounds.from_scan.")
        centre = self.lesion.nonzero().float().mean(0).round().long() + torch.tensor([r, a, s])
        cut = tuple(slice(int(c) - SIZE // 2, int(c) + SIZE // 2) for c in centre)
        return scale(self.hu[cut])[None, None], self.lesion[cut][None, None]


@dataclass(frozen=True)
class Nodules:
    """Patches and all that is known of them.

    `images` (N, 1, 40, 40, 40) float32 in 0..1 as a network gets them, `masks` of the same shape (bool), `labels` (N,)
    indices into `CLASSES`, `attributes` (N, 7) in the order of `ATTRIBUTES` (NaN where there is no nodule), `centres`
    (N, 3) of the nodule in voxels of the patch, `corners` (N, 3) of the patch in voxels of the background.
    """

    images: Tensor
    masks: Tensor
    labels: Tensor
    attributes: Tensor
    centres: Tensor
    corners: Tensor

    def __len__(self) -> int:
        return len(self.labels)


def rule_logit(attributes: Tensor) -> Tensor:
    """The rule: attributes (N, 7) -> logit (N,); above 0 is "malignant", below is "benign"."""
    diameter, _, lobulation, spiculation, solidity, calcification, _ = attributes.unbind(-1)
    low, high = _DIAMETER_MM
    return (
        RULE["bias"]
        + RULE["diameter"] * (diameter - low) / (high - low)
        + RULE["spiculated"] * (spiculation > 0)
        + RULE["lobulated"] * (lobulation > 0)
        + RULE["part_solid"] * ((solidity > 0.1) & (solidity < 0.9))
        + RULE["calcified"] * (calcification > 0)
    )


def draw(count: int, seed: int, borderline: bool = False) -> tuple[Tensor, Tensor]:
    """Attributes (N, 7) and labels (N,): none, benign, malignant in turn.

    Clear cases have a |rule logit| above 1.4; `borderline` lets those above 0.8 in as well.
    """
    attributes = torch.full((count, len(ATTRIBUTES)), math.nan)
    margin = _BORDERLINE if borderline else _CLEAR
    for k in range(count):
        label = k % len(CLASSES)
        if label:
            pool = _attributes(_generator(seed, k, 0), 128)
            logit = rule_logit(pool)
            attributes[k] = pool[int((logit > margin if label == 2 else logit < -margin).int().argmax())]
    return attributes, torch.arange(count) % len(CLASSES)


def synthesise(
    backgrounds: Backgrounds, count: int, seed: int, borderline: bool = False, jitter: int = _JITTER
) -> Nodules:
    """`count` patches, a third of each class; see `draw` for `borderline`, and `render` for `jitter`."""
    return render(backgrounds, *draw(count, seed, borderline), seed, jitter)


def render(backgrounds: Backgrounds, attributes: Tensor, labels: Tensor, seed: int, jitter: int = _JITTER) -> Nodules:
    """Patches with nodules of these attributes (N, 7), up to `jitter` voxels from the middle along each axis; label 0
    leaves the lung as it is."""
    parts = []
    for start in range(0, len(labels), _CHUNK):
        rows = range(start, min(start + _CHUNK, len(labels)))
        part = attributes[start : rows.stop], labels[start : rows.stop]
        parts.append(_render(backgrounds, *part, seed, rows, jitter))
    return Nodules(*(torch.cat(column) for column in zip(*parts, strict=True)))


def to_grid(image: sitk.Image, mode: str) -> MetaTensor:
    """A scan as the networks see it, (1, R, A, S) at `SPACING_MM`, by the transforms that their bundles ship."""
    array = sitk.GetArrayFromImage(image).astype(np.float32).transpose(2, 1, 0)
    affine = np.eye(4)
    affine[:3, :3] = np.reshape(image.GetDirection(), (3, 3)) * np.asarray(image.GetSpacing())
    affine[:3, 3] = image.GetOrigin()
    volume = MetaTensor(torch.from_numpy(array.copy())[None], affine=np.diag([-1.0, -1.0, 1.0, 1.0]) @ affine)
    return Compose([Orientation("RAS", labels=None), Spacing(SPACING_MM, mode=mode)])(volume)


def turned(images: Tensor, generator: Generator) -> Tensor:
    """Patches (N, 1, D, H, W), all flipped, and transposed in the axial plane, at random."""
    flips = [2 + axis for axis in range(3) if torch.rand((), generator=generator) < 0.5]
    images = images.flip(flips)
    return images.transpose(2, 3) if torch.rand((), generator=generator) < 0.5 else images


def scale(hu: Tensor) -> Tensor:
    """Hounsfield units to the network's input, as ScaleIntensityRange does in the bundles."""
    low, high = HU_RANGE
    return ((hu - low) / (high - low)).clamp(0, 1)


def lung_mask(hu: np.ndarray) -> np.ndarray:
    """The lungs with their vessels (bool) in a chest CT in Hounsfield units at `SPACING_MM`."""
    air = sitk.ConnectedComponent(_image(hu < -400))
    label = sitk.GetArrayViewFromImage(air)
    size = np.bincount(label.ravel())
    # Lung is the large air that does not reach the sides of the scan; it may well be cut at the top and the bottom.
    sides = [label[0], label[-1], label[:, 0], label[:, -1]]
    size[np.unique(np.concatenate([side.ravel() for side in sides]))] = 0
    size[0] = 0
    lung = np.isin(label, np.flatnonzero(size > 50_000))
    return sitk.GetArrayFromImage(sitk.BinaryMorphologicalClosing(_image(lung), [4, 4, 4])).astype(bool)


def _image(mask: np.ndarray) -> sitk.Image:
    return sitk.GetImageFromArray(mask.astype(np.uint8))


def _generator(seed: int, sample: int, purpose: int) -> Generator:
    return Generator().manual_seed((seed * 1_000_003 + sample) * 8 + purpose)


def _uniform(generator: Generator, low: float, high: float, *shape: int) -> Tensor:
    return low + (high - low) * torch.rand(shape, generator=generator)


def _attributes(generator: Generator, count: int) -> Tensor:
    """Candidates (count, 7), before the rule chooses among them."""
    chance = torch.rand(4, count, generator=generator)
    solidity = _uniform(generator, 0.2, 0.6, count)
    solidity = torch.where(chance[2] < 0.2, torch.full_like(solidity, 0.02), solidity)
    return torch.stack(
        [
            _uniform(generator, *_DIAMETER_MM, count),
            _uniform(generator, 0.55, 1.0, count),
            _uniform(generator, 0.12, 0.25, count) * (chance[0] < 0.5),
            _uniform(generator, 0.8, 1.4, count) * (chance[1] < 0.5),
            torch.where(chance[2] < 0.45, solidity, torch.ones(())),
            (chance[3] < 0.3).float(),
            _uniform(generator, 0.5, 1.6, count),
        ],
        dim=-1,
    )


@dataclass(frozen=True)
class Draws:
    """What is random about a sample besides its attributes.

    `corner` (3,) is that of the patch in the scan, `centre` (3,) that of the nodule in the patch, turned as it will be.
    """

    corner: Tensor
    centre: Tensor
    flips: Tensor
    swap: bool
    warp: Tensor
    rotation: Tensor
    lobes: Tensor
    phases: Tensor
    spikes: Tensor
    lengths: Tensor
    texture: Tensor
    slices: int
    noise: Tensor


def drawn(
    backgrounds: Backgrounds,
    generator: Generator,
    part: tuple[Tensor, Tensor] | None = None,
    jitter: int = _JITTER,
) -> Draws:
    """A place, and all else that is random; the patch lies between the voxels `part` of the scan (from, to)."""
    corner, centre = _place(backgrounds, generator, part, jitter)
    swap = bool(torch.rand((), generator=generator) < 0.5)
    flips = torch.rand(3, generator=generator) < 0.5
    # The nodule goes where its piece of lung goes.
    centre = centre[[1, 0, 2]] if swap else centre
    return Draws(
        corner=corner,
        centre=torch.where(flips, SIZE - 1 - centre, centre),
        flips=flips,
        swap=swap,
        warp=torch.randn(3, 4, 4, 4, generator=generator) * 1.2,
        rotation=torch.linalg.qr(torch.randn(3, 3, generator=generator))[0],
        lobes=F.normalize(torch.randn(6, 3, generator=generator), dim=1),
        phases=_uniform(generator, 0, 2 * math.pi, 6),
        spikes=F.normalize(torch.randn(16, 3, generator=generator), dim=1),
        lengths=_uniform(generator, 0.6, 1.0, 16),
        texture=torch.randn(SIZE, SIZE, SIZE, generator=generator),
        slices=(1, 1, 2, 4)[int(torch.randint(4, (), generator=generator))],
        noise=torch.randn(SIZE, SIZE, SIZE, generator=generator) * _uniform(generator, 8, 25)
        + torch.randn((), generator=generator) * _uniform(generator, 8, 30),
    )


def _place(
    backgrounds: Backgrounds, generator: Generator, part: tuple[Tensor, Tensor] | None, jitter: int
) -> tuple[Tensor, Tensor]:
    """The corner of a patch in the scan, and where in the patch a nodule's centre belongs: in lung.

    Patches without a nodule follow the same law, so that the place gives the class away to nobody. Every sixth is at a
    vessel, which is what a network must learn not to take for a nodule.
    """
    # Few of a scan's places lie in a part of it.
    tries, rounds = (256, 1) if part is None else (4096, 100)
    first, last = part or (torch.zeros(3), torch.tensor(backgrounds.hu.shape))
    for _ in range(rounds):
        points = backgrounds.vessels if torch.rand((), generator=generator) < 1 / 6 else backgrounds.inside
        point = points[torch.randint(len(points), (tries,), generator=generator)]
        corner = point - SIZE // 2 + torch.randint(-jitter, jitter + 1, (tries, 3), generator=generator)
        good = ((corner >= first) & (corner + SIZE <= last)).all(1)
        if backgrounds.lesion_box is not None:
            low, high = backgrounds.lesion_box
            good &= ((corner + SIZE <= low) | (corner > high)).any(1)
        if bool(good.any()):
            k = int(good.int().argmax())
            return corner[k], (point - corner)[k] + _uniform(generator, -0.5, 0.5, 3)
    raise MedXAIError("The scan has no piece of lung of 50 mm beside its lesion: use a scan with more lung.")


def _render(
    backgrounds: Backgrounds, attributes: Tensor, labels: Tensor, seed: int, rows: range, jitter: int
) -> Iterator[Tensor]:
    draws = [drawn(backgrounds, _generator(seed, row, 1), jitter=jitter) for row in rows]
    hu = _lung(backgrounds, draws)
    masks = torch.zeros(hu.shape, dtype=torch.bool)
    lesion = labels > 0
    if bool(lesion.any()):
        chosen = [draw for draw, yes in zip(draws, lesion.tolist(), strict=True) if yes]
        hu[lesion], masks[lesion] = insert(hu[lesion], attributes[lesion], chosen)
    hu += torch.stack([d.noise for d in draws])
    centres = torch.stack([d.centre for d in draws])
    corners = torch.stack([d.corner for d in draws])
    return iter((scale(hu)[:, None], masks[:, None], labels, attributes, centres, corners))


def _lung(backgrounds: Backgrounds, draws: list[Draws]) -> Tensor:
    """Pieces of the scan, flipped, transposed in the axial plane and slightly deformed, (N, 40, 40, 40)."""
    patches = []
    for d in draws:
        r, a, s = d.corner.tolist()
        patch = backgrounds.hu[r : r + SIZE, a : a + SIZE, s : s + SIZE]
        patch = patch.transpose(0, 1) if d.swap else patch
        patches.append(patch.flip([axis for axis in range(3) if d.flips[axis]]))
    warp = F.interpolate(torch.stack([d.warp for d in draws]), size=(SIZE,) * 3, mode="trilinear", align_corners=True)
    axis = torch.linspace(-1, 1, SIZE)
    identity = torch.stack(torch.meshgrid(axis, axis, axis, indexing="ij")[::-1], dim=-1)
    grid = identity + warp.movedim(1, -1) * (2 / (SIZE - 1))
    return F.grid_sample(torch.stack(patches)[:, None], grid, padding_mode="border", align_corners=True)[:, 0]


def insert(hu: Tensor, attributes: Tensor, draws: list[Draws]) -> tuple[Tensor, Tensor]:
    """Nodules of `attributes` (N, 7) in lung (N, 40, 40, 40): what a scanner would show, and the exact mask."""
    diameter, elongation, lobulation, spiculation, solidity, calcification, margin = attributes.T[..., None, None, None]
    radius = diameter / 2
    distance, direction = _polar(elongation, draws)
    lobes, phases = (torch.stack([getattr(d, name) for d in draws]) for name in ("lobes", "phases"))
    waves = torch.baddbmm(phases[:, None], direction, 3.2 * lobes.mT).cos().sum(-1)
    # Six waves of random phase have a standard deviation of sqrt(3).
    shape = (1 + lobulation * _cube(waves) / math.sqrt(3)).clamp(0.5, 1.6)
    spikes, lengths = (torch.stack([getattr(d, name) for d in draws]) for name in ("spikes", "lengths"))
    # The longest of length * exp(45 (cos - 1)), with one exponential instead of one per spike.
    longest = torch.baddbmm(lengths.log()[:, None] - 45, direction, 45 * spikes.mT).amax(-1).exp()
    surface = radius * shape + spiculation * 5 * _cube(longest)
    alpha = torch.sigmoid(2.2 * (surface - distance) / margin)
    core = torch.sigmoid(2.2 * (solidity ** (1 / 3) * surface - distance))
    texture = _smooth(torch.stack([d.texture for d in draws]))
    tissue = 35 + 15 * texture + 550 * calcification * torch.exp(-((distance / (0.38 * radius)) ** 4))
    # Ground glass lets the vessels through; solid tissue does not.
    glass = hu.maximum(-480 + 15 * texture)
    inside = glass * (1 - core) + tissue * core
    return hu + _slices(alpha * (inside.maximum(hu) - hu), draws), distance < surface


def _polar(elongation: Tensor, draws: list[Draws]) -> tuple[Tensor, Tensor]:
    """Distance (N, 40, 40, 40) in mm and unit direction (N, 64000, 3) from the centre, where the body is a sphere."""
    axis = torch.arange(SIZE, dtype=torch.float32)
    index = torch.stack(torch.meshgrid(axis, axis, axis, indexing="ij"), dim=-1).reshape(-1, 3)
    offset = (index - torch.stack([d.centre for d in draws])[:, None]) * SPACING_MM
    e = elongation.reshape(-1, 1)
    stretch = torch.cat([e.rsqrt(), torch.ones_like(e), e.sqrt()], dim=1)
    offset = offset @ torch.stack([d.rotation for d in draws]) / stretch[:, None]
    distance = offset.norm(dim=-1).clamp_min(1e-4)
    return _cube(distance), offset / distance[..., None]


def _cube(flat: Tensor) -> Tensor:
    return flat.reshape(-1, SIZE, SIZE, SIZE)


def _smooth(noise: Tensor) -> Tensor:
    """White noise (N, 40, 40, 40) as texture of a few millimetres, of standard deviation 1."""
    for _ in range(2):
        noise = F.avg_pool3d(noise[:, None], 3, stride=1, padding=1)[:, 0]
    return noise / noise.std(dim=(1, 2, 3), keepdim=True)


def _slices(added: Tensor, draws: list[Draws]) -> Tensor:
    """What is left of the nodule (N, 40, 40, 40) in slices of 1.25, 2.5 or 5 mm.

    The backgrounds are interpolated from slices of 5 mm: a nodule that is always sharp along S would give itself away.
    """
    kept = []
    for one, d in zip(added, draws, strict=True):
        thick = F.avg_pool1d(one, d.slices)
        kept.append(F.interpolate(thick, size=SIZE, mode="linear", align_corners=False))
    return torch.stack(kept)
