"""The recipe of `healthy_lung`: what healthy lung could stand where something is hidden."""

from __future__ import annotations

from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Generator, Tensor, nn

from MedXAILib import resources
from MedXAILib.loading import load_model
from MedXAILib.networks.healthy_tissue import CELL, HealthyTissue, smoothed
from MedXAILib.synthetic.lung_nodules import CLASSES, HU_RANGE, SIZE, SPACING_MM, Backgrounds, Nodules
from MedXAILib.training.bundle import write_generator
from MedXAILib.training.trainer import Recipe
from MedXAILib.visual.baseline import blurred

_SIZES_MM = (5.0, 20.0)
"""Of what is hidden, along each axis."""
_LARGE, _SECOND, _ILL = 0.05, 0.5, 0.5
"""The shares of patches in which up to everything is hidden, a second place is, and a nodule is seen."""
_OUTSIDE = 0.2
_ALIKE = 4.0
"""The scans' slices are 5 mm thick: so many voxels say the same, and are one observation."""
_HU = HU_RANGE[1] - HU_RANGE[0]
_HIDDEN = -1.0

_FREE = 0.1
"""Nats that each latent variable may tell without being charged, or none would begin to (Kingma et al. 2016)."""


def loss(network: HealthyTissue, patches: Nodules) -> Tensor:
    """The bound on the likelihood of what hides in healthy lung, errors being Laplace-distributed, of half of the
    patches; the same with all latent variables 0 of the others.

    Nodules that are in sight are to be healed, or what hides beside them would be filled with more of them.
    """
    device = network.drawn.weight.device
    # Interrupted or not, the same patches are hidden the same way.
    generator = Generator().manual_seed(int(patches.corners.sum()))
    seen, truth = (part.to(device) for part in _task(patches, generator))
    start = smoothed(seen)
    mean, log_variance = network.posterior(seen, truth, start)
    known = torch.arange(len(seen), device=device).reshape(-1, 1, 1, 1, 1) % 2 == 0
    noise = torch.randn(mean.shape, generator=generator).to(device)
    drawn = mean + (log_variance / 2).exp() * noise
    error = (network.fill(seen, torch.where(known, drawn, 0), start) - truth).abs()
    hidden = (seen < 0).to(error)
    count = hidden.flatten(1).sum(1).clamp_min(1)
    inside = (error * hidden).flatten(1).sum(1) / count
    wrong = inside + _OUTSIDE * (error * (1 - hidden)).flatten(1).mean(1)
    divergence = (log_variance.exp() + mean.square() - 1 - log_variance) / 2
    cells = network.cells(seen) * known
    told = ((divergence * cells).sum((0, 2, 3, 4)) / cells.sum().clamp_min(1)).clamp_min(_FREE).sum()
    of_known = known.flatten()
    return wrong[of_known].mean().log() + _ALIKE / CELL**3 * told + wrong[~of_known].mean().log()


def _task(patches: Nodules, generator: Generator) -> tuple[Tensor, Tensor]:
    """Every healthy patch twice: what is seen of it (below 0 where it is hidden), half of them with a nodule of other
    patches in it, and what it is, each (2 N, 1, 40, 40, 40)."""
    healthy, ill = patches.labels == 0, (patches.labels > 0).nonzero()[:, 0]
    truth = patches.images[healthy].repeat(2, 1, 1, 1, 1)
    count = len(truth)
    which = ill[torch.randint(len(ill), (count,), generator=generator)]
    # With a rim, where the nodule fades.
    nodule = _grown(patches.masks[which])
    nodule &= _chance(_ILL, count, generator)[:, None, None, None, None]
    seen = torch.where(nodule, patches.images[which].maximum(truth), truth)
    centre = torch.rand(2, count, 3, generator=generator) * SIZE
    near = patches.centres[which] + 5 * torch.randn(count, 3, generator=generator)
    centre[0] = torch.where(_chance(0.5, count, generator)[:, None], near, centre[0])
    large = _chance(_LARGE, count, generator)
    hidden = _shapes(centre[0], large, generator)
    again = _shapes(centre[1], large, generator)
    hidden |= again & _chance(_SECOND, count, generator)[:, None, None, None, None]
    return seen.masked_fill(hidden, _HIDDEN), truth


def _grown(mask: Tensor) -> Tensor:
    """`mask` (N, 1, D, H, W) with two more voxels on every side."""
    grown = mask.float()
    for kernel in ((5, 1, 1), (1, 5, 1), (1, 1, 5)):
        grown = F.max_pool3d(grown, kernel, stride=1, padding=[k // 2 for k in kernel])
    return grown > 0


def _chance(share: float, count: int, generator: Generator) -> Tensor:
    return torch.rand(count, generator=generator) < share


def _shapes(centre: Tensor, large: Tensor, generator: Generator) -> Tensor:
    """Boxes and ellipsoids about `centre` (N, 3) in voxels, at random, (N, 1, 40, 40, 40) bool."""
    count = len(centre)
    low, high = (size / SPACING_MM for size in _SIZES_MM)
    size = low + torch.where(large, 2 * SIZE, high - low)[:, None] * torch.rand(count, 3, generator=generator)
    away = (torch.arange(SIZE) - centre[..., None]).abs() / (size[..., None] / 2)
    r, a, s = away[:, 0, :, None, None], away[:, 1, None, :, None], away[:, 2, None, None, :]
    box, ball = r.maximum(a).maximum(s) < 1, r**2 + a**2 + s**2 < 1
    return torch.where(_chance(0.5, count, generator)[:, None, None, None], box, ball)[:, None]


@torch.no_grad()
def measure(network: HealthyTissue, patches: Nodules) -> dict[str, float]:
    """The mean absolute error in HU where healthy lung was hidden, of draws and of what else could be put there.

    `likeliest_hu` is the network's with all latent variables 0, `spread_hu` the standard deviation between draws,
    `inpaint_hu` that of the solution of Laplace's equation, `score` what the training looks at.
    """
    truth = patches.images[patches.labels == 0]
    generator = Generator().manual_seed(len(truth))
    centre = SIZE / 4 + torch.rand(len(truth), 3, generator=generator) * SIZE / 2
    hidden = _shapes(centre, torch.zeros(len(truth), dtype=torch.bool), generator)
    seen = truth.masked_fill(hidden, _HIDDEN)
    one, other = (_drawn(network, seen, generator) for _ in range(2))
    middle = seen.clamp_min(0).flatten(1).mean(1).reshape(-1, 1, 1, 1, 1)
    errors = {
        "error_hu": one,
        "likeliest_hu": torch.cat([network(part.to(network.drawn.weight.device)).cpu() for part in seen.split(30)]),
        "mean_hu": truth.flatten(1).mean(1).reshape(middle.shape).expand_as(truth),
        "blur_hu": torch.stack([blurred(patch, (SPACING_MM,) * 3) for patch in truth]),
        "inpaint_hu": _harmonic(torch.where(hidden, middle, truth), hidden),
    }
    found = {name: _HU * float((filled - truth)[hidden].abs().mean()) for name, filled in errors.items()}
    spread = _HU * float((one - other)[hidden].square().mean().div(2).sqrt())
    return {**found, "spread_hu": spread, "score": -found["error_hu"]}


def _drawn(network: HealthyTissue, seen: Tensor, generator: Generator) -> Tensor:
    """What is `seen`, filled at random, on the CPU."""
    noise = torch.randn(network.noise_shape(seen), generator=generator)
    parts = zip(seen.split(30), noise.split(30), strict=True)
    device = network.drawn.weight.device
    return torch.where(seen < 0, torch.cat([network.fill(s.to(device), n.to(device)).cpu() for s, n in parts]), seen)


def _harmonic(image: Tensor, hidden: Tensor) -> Tensor:
    """`image` (N, 1, D, H, W) with each hidden voxel the mean of its neighbours: Laplace's equation, by relaxation."""
    for _ in range(200):
        padded = F.pad(image, (1,) * 6, mode="replicate")
        sides = [padded.roll(by, axis) for axis in (2, 3, 4) for by in (-1, 1)]
        mean = torch.stack(sides).mean(0)[:, :, 1:-1, 1:-1, 1:-1]
        image = torch.where(hidden, mean, image)
    return image


@torch.no_grad()
def real(network: HealthyTissue, scan: Backgrounds) -> dict[str, float]:
    """The scan's own lesion, filled: its mean HU before and after, and the shipped classifier's probability of
    "malignant" before and, the mean of 8 draws, after."""
    image, mask = scan.lesion_patch()
    hidden = _grown(mask)
    seen = image.masked_fill(hidden, _HIDDEN).expand(8, *image.shape[1:])
    filled = _drawn(network, seen, Generator().manual_seed(0))
    model = load_model(resources.path("Models/lung_nodule"))
    with model.ready():
        malignant = model.probabilities(model.forward(torch.cat([image, filled])))[:, CLASSES.index("malignant")]
    return {
        "before_hu": HU_RANGE[0] + _HU * float(image[mask].mean()),
        "after_hu": HU_RANGE[0] + _HU * float(filled[:, 0, mask[0, 0]].mean()),
        "before_malignant": float(malignant[0]),
        "after_malignant": float(malignant[1:].mean()),
    }


def publish(network: nn.Module, metrics: dict[str, float], folder: Path) -> None:
    """Write the bundle."""
    about = {
        "name": "Healthy lung",
        "task": "Filling hidden places of lung CT with healthy tissue",
        "description": "What healthy lung could stand where a perturbation takes something away. Hidden voxels are "
        "those below 0.",
        "intended_use": "Infills of explanation methods that take parts of a scan away. Not for diagnosis.",
    }
    write_generator(folder, network, {}, about=about, card=_CARD.format(**metrics), metrics=metrics)


_CARD = """# Healthy lung

Fills hidden places of chest CT with **healthy lung that could be there**. It exists so that explanations which take
parts of a scan away need not leave holes (`infill=healthy`). It knows nothing of a patient beyond the surroundings that
it is shown: what it draws is plausible at best. Never use it for a patient.

A conditional variational autoencoder (Sohn, Lee and Yan 2015): it corrects a smooth interpolation from the
surroundings, and latent variables in cells of 5 mm, whose influence depends on the surroundings, make every draw
another one.

## Trained on
One chest CT (`chest_ct_mass.nrrd`, scan lung2 of pyradiomics 3.0.1, BSD 3-Clause), its own 48 mL mass left out: 2,500
fresh pieces of healthy lung, each with two sets of boxes or ellipsoids of 5 to 20 mm hidden (in 5 % of them up to
everything). In half of them a computed nodule is in sight, which is not to be continued: what is learnt is the lung
without it. The loss is the evidence lower bound with Laplace-distributed errors, and the likelihood of the most likely
draw. `medxai train healthy-lung` makes this bundle again ({seconds:.0f} s when this one was made, on a busy machine).

## Measured
Mean absolute error in HU where boxes or ellipsoids of 5 to 20 mm were hidden in healthy lung of another patient
(`chest_ct_nodule.nrrd`, lung1), 50 patches. Part of it nobody could know: the patches have noise of 8 to 25 HU.

| | HU |
|---|---|
| this network, a draw | {error_hu:.0f} |
| this network, the most likely draw | {likeliest_hu:.0f} |
| Laplace's equation (`inpaint`) | {inpaint_hu:.0f} |
| blurred by 6 mm, which still sees what is hidden | {blur_hu:.0f} |
| mean of the patch | {mean_hu:.0f} |

| | HU |
|---|---|
| standard deviation between draws | {spread_hu:.0f} |

The real nodule of lung1, replaced: {real_before_hu:.0f} HU become {real_after_hu:.0f} HU, and the classifier
`lung_nodule` says malignant with a probability of {real_after_malignant:.2f} instead of {real_before_malignant:.2f}
(mean of 8 draws).

## Limits
- One patient to train on, one to test on. The scans have slices of 5 mm.
- Places larger than 20 mm are seldom among what it learnt; deep in them it draws blurred lung.
- Draws differ less, and are smoother, than lungs do. Vessels end at larger holes.
- Lung only: in the chest wall or the mediastinum its guesses are poor.
- The nodules that it learnt to heal are computed ones.

## Reading it
Input: CT at 1.25 mm, axes (R, A, S), -1000..400 HU to 0..1, hidden voxels below 0; sides are multiples of 8 voxels.
Output: the same with the hidden voxels filled by the most likely draw. `fill(image, noise)` of
`MedXAILib.networks.healthy_tissue.HealthyTissue` gives other draws.
"""

RECIPE = Recipe(
    name="healthy-lung",
    network=HealthyTissue,
    loss=loss,
    measure=measure,
    real=real,
    score="score",
    publish=publish,
    epochs=5,
    steps=50,
    learning_rate=4e-3,
    validation=45,
    test=150,
)
