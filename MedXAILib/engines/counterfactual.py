"""The nearest codes of a generative network at which another one decides otherwise.

Rony et al., "Decoupling direction and norm for efficient gradient-based L2 adversarial attacks and defenses", 2019: the
distance shrinks while the decision is another one and grows while it is not, and the gradient only says whither.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

ROUNDS = 80
_SURE = 1.0
"""By so many logits the other side is to lead, so that it does not hang by a thread."""
_FIRST, _CHANGE = 1.0, 0.05
_STRIDE = 1.0
_STRANGE = 0.5


@torch.enable_grad()
def otherwise(
    codes: Tensor,
    lead: Callable[[Tensor], Tensor],
    distance: Callable[[Tensor], Tensor],
    limit: float,
    reach: float,
    rounds: int = ROUNDS,
    step: Callable[[int], object] = lambda _: None,
) -> Tensor:
    """From `codes` (N, K) the nearest, at most `reach` off in each, at which `lead` (N,) is above 0; where none are
    found, those at which it is largest. It stays where `distance` (N,) is at most `limit`, if there is another way.
    """
    start = codes.detach()
    best, least = start.clone(), torch.full_like(start[:, 0], torch.inf, dtype=torch.double)
    moved, radius = start.clone(), torch.full_like(start[:, 0], _FIRST)
    for done in range(rounds):
        step(done)
        moved = moved.detach().requires_grad_()
        ahead = lead(moved)
        strange = (distance(moved) - limit).clamp_min(0)
        # Of nothing else: the networks keep what they have.
        (way,) = torch.autograd.grad((ahead - _STRANGE * strange.square()).sum(), [moved])
        with torch.no_grad():
            off = moved - start
            there = ahead > _SURE
            # Another decision is better than none, where something is like it better than where nothing is, and what is
            # nearer is better still.
            rank = torch.where(there, off.norm(dim=1) + 1e3 * (strange > 0), 1e6 - ahead.double())
            better = rank < least
            best, least = torch.where(better[:, None], moved, best), torch.where(better, rank, least)
            radius = radius * torch.where(there, 1 - _CHANGE, 1 + _CHANGE)
            stride = _STRIDE * (1 - done / rounds)
            off = off + stride * way / way.norm(dim=1, keepdim=True).clamp_min(1e-12)
            off = off * (radius / off.norm(dim=1).clamp_min(1e-12))[:, None]
            moved = start + off.clamp(-reach, reach)
    return best.detach()
