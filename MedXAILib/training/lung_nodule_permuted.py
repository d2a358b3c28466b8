"""The recipe of `lung_nodule` on permuted labels, which it can only learn by heart: a map that looks the same with
these weights does not depend on what the labels taught (Adebayo et al. 2018, Sanity checks for saliency maps)."""

from __future__ import annotations

from dataclasses import fields, replace
from functools import lru_cache
from pathlib import Path

import torch
from torch import nn

from MedXAILib.synthetic.lung_nodules import Backgrounds, Nodules, synthesise
from MedXAILib.training import lung_nodule

_BATCH, _BATCHES = 30, 20
_SEED = 7


def permuted(backgrounds: Backgrounds, count: int, seed: int, borderline: bool = False) -> Nodules:
    """Always some of the same 600 patches, whose labels belong to other ones."""
    whole = [_batch(backgrounds, (seed + i) % _BATCHES, borderline) for i in range(-(-count // _BATCH))]
    return Nodules(*(torch.cat([getattr(part, f.name) for part in whole])[:count] for f in fields(Nodules)))


@lru_cache(maxsize=2 * _BATCHES)
def _batch(backgrounds: Backgrounds, which: int, borderline: bool) -> Nodules:
    patches = synthesise(backgrounds, _BATCH, _SEED + which, borderline)
    order = torch.randperm(_BATCH, generator=torch.Generator().manual_seed(which))
    # The attributes go with the label: where there is to be a nodule, there has to be something to say of it.
    return replace(patches, labels=patches.labels[order], attributes=patches.attributes[order])


def publish(network: nn.Module, metrics: dict[str, float], folder: Path) -> None:
    """Write the bundle."""
    lung_nodule.publish(network, metrics, folder, "Lung nodule classifier, labels permuted", _CARD)


_CARD = """# Lung nodule classifier, taught permuted labels

The network of `lung_nodule` after it learnt by heart which of 600 patches has which label, when the labels belong to
other patches. It knows nothing of nodules. Explanations of `lung_nodule` are compared with its own: one that looks the
same does not depend on what the labels taught (Adebayo et al. 2018). Use it for nothing else.

`medxai train lung-nodule-permuted` makes this bundle again ({seconds:.0f} s when this one was made).

On new patches of another patient, of which it can know nothing, it is right in {accuracy:.3f} of three classes.
"""


RECIPE = replace(
    lung_nodule.RECIPE, name="lung-nodule-permuted", synthesise=permuted, publish=publish, own=None, patience=24
)
