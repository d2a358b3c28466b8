"""What the cases of a library teach the last layer of a network, and what groups of them do."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from MedXAILib.cases.library import Library
from MedXAILib.cases.record import SCAN, Record
from MedXAILib.engines.last_layer import LARGEST, LastLayer, Link, Scaling
from MedXAILib.errors import MedXAIError

DAMPING = 0.1
"""Half of this times the squared weights comes to the mean loss."""


# An attribute that is 0 in this part of the cases is one that can be absent.
_ABSENT = 0.1


@dataclass(frozen=True, eq=False)
class Refit:
    """A last layer that was learnt anew from features, and their `scaling`."""

    head: LastLayer
    scaling: Scaling

    @classmethod
    def of(cls, features: np.ndarray, answers: np.ndarray, damping: float = DAMPING, link: Link = "softmax") -> Refit:
        """That of `features` (N, F) with `answers` (N, K) (see `LastLayer.fit`)."""
        scaling = Scaling.of(features, LARGEST // answers.shape[1] - 1)
        return cls(LastLayer.fit(scaling(features), answers, damping * len(features), link), scaling)

    def scores(self, features: np.ndarray) -> np.ndarray:
        """What it says (M, K) of `features` (M, F)."""
        return self.head.scores(self.scaling(features))

    def influences(self, features: np.ndarray, output: np.ndarray) -> np.ndarray:
        """That of each case (N,) on `output` (K,) @ scores of `features` (F,)."""
        return self.head.kept @ self.head.asked(self.scaling(features), output)


@dataclass(frozen=True)
class Group:
    """Cases with one label of which something holds (`what`, such as "diameter_mm > 14"), how many there are, and the
    `mean` and the `sum` of their influences."""

    label: str
    what: str
    count: int
    mean: float
    sum: float


def influence_by_group(
    records: Sequence[Record], influences: np.ndarray, attributes: Sequence[str] | None = None
) -> list[Group]:
    """The `influences` (N,) of cases, or (N, M) on several queries, by label and attribute of their meta (Wang et al.
    2019): numbers above and up to the median of all, or 0 where many are 0; texts one by one. All attributes when left
    out. The first groups are the labels alone, and their `what` is ""."""
    each = np.asarray(influences, dtype=float).reshape(len(records), -1).mean(1)
    labels = np.array([record.label for record in records])
    held: dict[str, np.ndarray] = {"": np.ones(len(records), dtype=bool)}
    names = dict.fromkeys(name for record in records for name in record.meta if name != SCAN)
    for name in names if attributes is None else attributes:
        held |= _levels(name, [record.meta.get(name) for record in records])
    found = []
    for what, there in held.items():
        for label in sorted(set(labels.tolist()) - {""}):
            chosen = each[there & (labels == label)]
            if len(chosen):
                found.append(Group(label, what, len(chosen), float(chosen.mean()), float(chosen.sum())))
    return found


def suspects(library: Library, damping: float = DAMPING, space: str = "plain") -> list[tuple[Record, float]]:
    """The labelled cases of a library and the influence of each on itself, the greatest first: for the label of a
    mislabelled case nothing speaks but that case itself.

    Raises:
        MedXAIError: when there are not two labels to mistake for each other.
    """
    records = library.records(whole=False)
    known = [i for i, record in enumerate(records) if record.label]
    names = sorted({records[i].label for i in known})
    if len(names) < 2:
        raise MedXAIError(
            f"The cases of '{library.path}' have {len(names) or 'no'} label{'s' * (len(names) != 1)}: mislabelled ones "
            "are found among cases of two labels or more."
        )
    answers = np.eye(len(names))[[names.index(records[i].label) for i in known]]
    scores = Refit.of(library.matrix(space)[1][known], answers, damping).head.self_influence
    return [(records[known[i]], float(scores[i])) for i in np.argsort(-scores, kind="stable")]


def _levels(name: str, values: Sequence[float | str | None]) -> Mapping[str, np.ndarray]:
    """Which cases (N,) have an attribute, by how it is said."""
    texts = sorted({value for value in values if isinstance(value, str)})
    found = {f"{name} = {text}": np.array([value == text for value in values]) for text in texts}
    numbers = np.array([np.nan if value is None or isinstance(value, str) else float(value) for value in values])
    if np.unique(numbers[~np.isnan(numbers)]).size > 1:
        # Of what many do not have at all, those that have any.
        absent = np.mean(numbers[~np.isnan(numbers)] == 0) >= _ABSENT
        middle = 0.0 if absent else float(np.nanmedian(numbers))
        middle = middle if middle < np.nanmax(numbers) else float(np.nanmin(numbers))
        found |= {f"{name} <= {middle:.3g}": numbers <= middle, f"{name} > {middle:.3g}": numbers > middle}
    return found
