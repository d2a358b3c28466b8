"""Which few cases to look at to see what a network goes by in general.

Ribeiro, Singh and Guestrin, "Why should I trust you? Explaining the predictions of any classifier", 2016: the
submodular pick. There a case shows a feature or not; here it shows it as strongly as it counts in it, against where it
counts most, because almost everything counts a little everywhere.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from typing import TypeVar

import numpy as np

Name = TypeVar("Name", bound=Hashable)

COUNT = 5
_NAMED = 3


def typical(values: Mapping[str, Mapping[Name, float]], count: int = COUNT) -> list[tuple[str, float, list[Name]]]:
    """Up to `count` cases that together show most of what counts, by what each (uid) says of each name.

    Returns:
        The uid of each, in the order in which they were chosen; the share of all importance that it and those before it
        show; and the names of which it adds most. What adds nothing is not chosen.
    """
    uids, names = list(values), list(dict.fromkeys(name for one in values.values() for name in one))
    if not names:
        return []
    size = np.abs([[one.get(name, 0.0) for name in names] for one in values.values()])
    importance = np.sqrt(size.sum(0))
    shows = importance * size / np.where(importance > 0, size.max(0), 1)
    shown, chosen = np.zeros(len(names)), list[tuple[str, float, list[Name]]]()
    while len(chosen) < min(count, len(uids)):
        added = np.clip(shows - shown, 0, None)
        # The first of those that add as much, but for rounding.
        best = int(added.sum(1).round(12).argmax())
        if added[best].sum() <= 1e-12:
            break
        most = [names[j] for j in np.argsort(-added[best], kind="stable")[:_NAMED] if added[best, j] > 0]
        shown = np.maximum(shown, shows[best])
        chosen.append((uids[best], float(shown.sum() / importance.sum()), most))
    return chosen
