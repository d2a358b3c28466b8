"""Does a map survive a change of the scan that nobody would see?

Alvarez-Melis, Jaakkola, "On the robustness of interpretability methods", 2018; Yeh et al., "On the (in)fidelity and
sensitivity of explanations", 2019 (max-sensitivity).
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from MedXAILib.errors import MedXAIError
from MedXAILib.grid import middle
from MedXAILib.report import localisation
from MedXAILib.trust.finding import Finding, Light, light
from MedXAILib.trust.judged import Judged
from MedXAILib.trust.likeness import correlation, extent, overlap
from MedXAILib.volume import Volume

TITLE = "Does a tiny change of the scan change it?"
NOISE = 0.01
"""The noise that is added, as a share of the standard deviation of the scan where the map is."""
DRAWS = 10
"""Scans around this one among which the map that changes most is looked for."""
MOVED = 0.1
"""An answer that moves by more than this share of itself is the network's own doing."""

# Two maps that share half of their variance correlate by 0.7; below 0.4 it is a sixth.
_GOOD, _FAIR = 0.7, 0.4


def judge(judged: Judged) -> Finding:
    """How alike (Pearson, with sign) the map stays with faint noise, and when the scan moves by a voxel; the worse of
    them counts.

    A network may know places and not only things: its map may move with the scan or stay, whichever is more alike. How
    like its mirror image the map of the mirrored scan is stands in the values only: not every network has to be
    symmetric. So does `sensitivity`, which is the change of the map by that one noise as a share of it.
    """
    own, volume = judged.explanation.data, judged.volume
    box = extent(own)
    if box is None:
        return _finding("The map is the same everywhere: there is nothing in it that could change.", None, {})
    noise = torch.randn(volume.data.shape, generator=_generator(judged))
    noisy = replace(volume, data=volume.data + NOISE * _spread(volume, box[1:]) * noise)
    axis = max(range(1, own.ndim), key=lambda a: (box[a].stop - box[a].start, a))
    moved = replace(volume, data=_moved(volume.data, axis))
    turned = _mirror(judged)
    mirrored = replace(volume, data=volume.data[..., turned])

    # Each scan is done with before the next, because only the last one is kept preprocessed.
    answer = _answer(judged, volume)
    with_noise, noisy_answer = judged.again(volume=noisy).data, _answer(judged, noisy)
    with_shift, moved_answer = judged.again(volume=moved).data, _answer(judged, moved)
    # The last of the moved voxels may have left what the network sees.
    inner = (*box[:axis], slice(box[axis].start, box[axis].stop - 1), *box[axis + 1 :])
    places = [with_shift.roll(-1, axis)[inner], with_shift[inner]]
    likeness = {
        "noise": correlation(own[box], with_noise[box]),
        "shift": max(correlation(own[inner], there) for there in places),
    }
    which = min(likeness, key=likeness.__getitem__)
    changes = {"noise": noisy_answer - answer, "shift": moved_answer - answer}
    relative = {f"answer_{name}": abs(change) / max(abs(answer), 1e-12) for name, change in changes.items()}
    colour = light(likeness[which], _GOOD, _FAIR)
    when = {"noise": f"when faint noise ({NOISE:.0%}) is added", "shift": "when the scan moves by one voxel"}[which]
    sentence = {
        "good": f"The map stays ({likeness[which]:.2f} alike or more) with faint noise and when the scan moves by one "
        "voxel.",
        "fair": f"The map changes in part ({likeness[which]:.2f} alike) {when}: do not read its details.",
        "poor": f"The map becomes another one ({likeness[which]:.2f} alike) {when}: do not rely on where it is.",
    }[colour]
    most = max(relative.values())
    if most > MOVED:
        sentence += f" The network's own answer moves by {most:.0%}: it is the network that is unstable."
    values = {
        **likeness,
        "sensitivity": _change(own, with_noise),
        "noise_overlap": overlap(own[box], with_noise[box]),
        "shift_overlap": max(overlap(own[inner], there) for there in places),
        "flip": correlation(own[box], judged.again(volume=mirrored).data[..., turned][box]),
        "answer": answer,
        **relative,
    }
    return _finding(sentence, colour, values)


def max_sensitivity(judged: Judged, radius: float = NOISE, draws: int = DRAWS) -> float:
    """How much the map changes at most in a small ball around the scan, as a share of it (Frobenius norm): 0 when it
    stays. The ball holds the scans of which no voxel is more than `radius` away, in units of the standard deviation
    that its channel has where the map is; of `draws` even draws from it the largest change counts, so that more draws
    find more.

    Raises:
        MedXAIError: when the map is zero everywhere.
    """
    own, volume, generator = judged.explanation.data, judged.volume, _generator(judged)
    box = localisation.extent(own)
    if box is None:
        raise MedXAIError("The map is zero everywhere, so that no change is a share of it: explain another target.")
    reach, largest = radius * _spread(volume, box), 0.0
    for draw in range(draws):
        judged.run.step(draw, draws, "Maps around the scan")
        near = volume.data + reach * (2 * torch.rand(volume.data.shape, generator=generator) - 1)
        largest = max(largest, _change(own, judged.again(volume=replace(volume, data=near)).data))
    return largest


def _change(own: Tensor, other: Tensor) -> float:
    return float((other.double() - own.double()).norm() / own.double().norm())


def _generator(judged: Judged) -> torch.Generator:
    return torch.Generator().manual_seed(judged.explanation.provenance.seed)


def _spread(volume: Volume, box: tuple[slice, ...]) -> Tensor:
    """(C, 1, ...): the standard deviation that each channel has in the box."""
    spread = volume.data[(slice(None), *box)].flatten(1).std(1, correction=0)
    return spread.reshape(-1, *[1] * (volume.data.ndim - 1))


def _moved(data: Tensor, axis: int) -> Tensor:
    """By one voxel; the outermost one is repeated."""
    size = data.shape[axis]
    return torch.cat([data.narrow(axis, 0, 1), data.narrow(axis, 0, size - 1)], axis)


def _mirror(judged: Judged) -> Tensor:
    """The index (W,) that mirrors the scan at the middle of what the network sees, along the last axis."""
    seen = judged.model.prepare(judged.volume, judged.explanation.provenance.region)
    centre = middle(seen.x.shape[1:], seen.affine)
    width = judged.volume.shape[-1]
    twice = round(2 * float(judged.volume.to_index(centre.tolist())[-1]))
    return (twice - torch.arange(width)).clamp(0, width - 1)


def _answer(judged: Judged, volume: Volume) -> float:
    """What was explained, of `volume`."""
    with judged.model.ready(judged.run.device) as device, torch.no_grad():
        question = judged.question(volume, device)
        return float(question.values(question.x)[0])


def _finding(sentence: str, colour: Light | None, values: dict[str, float]) -> Finding:
    return Finding("stability", TITLE, sentence, colour, values)
