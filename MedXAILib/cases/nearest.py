"""What is near a scan in a library: by what the network says, and whether anything is near at all."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass, field, replace
from functools import cached_property, lru_cache
from typing import Any, Protocol

import numpy as np

from MedXAILib.cases.library import Library
from MedXAILib.cases.record import SCAN, Hit, Record
from MedXAILib.cases.similarity import late_interaction
from MedXAILib.cases.space import Space
from MedXAILib.similar_cases import Role

FAR = 0.01
"""Nothing is near a scan whose nearest case is less similar to it than those of all but this share of the cases are to
theirs."""
FIRST = 100
"""Cases among which those with the most similar regions are looked for."""

# So many cases tell how near cases are to each other.
_SAMPLE = 500


class Searched(Protocol):
    """What can be searched as a `Library` can."""

    def search(
        self, vector: np.ndarray, k: int, space: str, where: Any, not_patient: str | None, embedder: str | None
    ) -> list[Hit]:
        """The `k` cases of which `where` holds that are most similar to `vector`."""


@dataclass(frozen=True)
class Few:
    """A few cases in memory, to be searched as a library is, by what is known and was said of them."""

    cases: Sequence[Record]
    space: Space

    def search(
        self, vector: np.ndarray, k: int, space: str, where: Any, not_patient: str | None, embedder: str | None
    ) -> list[Hit]:
        """As `Library.search`."""
        held = [r for r in self.cases if all(getattr(r, name) in values for name, values in where.items())]
        if not held:
            return []
        similarity = self.space.similarity(vector[None], np.stack([record.vectors[space] for record in held]))[0]
        hits = [Hit(record, float(s)) for record, s in zip(held, similarity, strict=True)]
        return sorted(hits, key=lambda hit: (-hit.similarity, hit.record.uid))[:k]


@dataclass(frozen=True)
class Query:
    """A scan to find the like of: its `vector` (K,) by `embedder`, what the network `says` of it ("" when it names
    nothing), whose it is, and the fingerprint of the `scan`. With `regions` (R, K) the nearest are ordered by
    late interaction; `where` is what must hold of all (see `cases.filters`)."""

    vector: np.ndarray
    says: str
    embedder: str
    patient: str = ""
    scan: str = ""
    regions: np.ndarray | None = None
    where: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Usual:
    """What cases are like: the labels that are known of them, what was said of them, and how `near` they are: how
    similar to their nearest of another patient (of any, where all are of one), the least first."""

    labels: frozenset[str]
    answers: frozenset[str]
    near: np.ndarray

    @classmethod
    def of(cls, cases: Sequence[Record], matrix: np.ndarray, space: Space) -> Usual:
        """What `cases` are like, whose vectors in `space` are `matrix` (N, K): how near, of all or of 500 of them."""
        patients, count = np.array([case.patient for case in cases]), len(cases)
        near = np.zeros(0)
        if count > 1:
            drawn = np.sort(np.random.default_rng(0).permutation(count)[:_SAMPLE])
            one = len(set(patients)) == 1
            same = drawn[:, None] == np.arange(count) if one else patients[drawn, None] == patients
            near = np.sort(np.where(same, -np.inf, space.similarity(matrix[drawn], matrix)).max(1))
        labels, answers = ({getattr(case, name) for case in cases} - {""} for name in ("label", "said"))
        return cls(frozenset(labels), frozenset(answers), near)

    def percentile(self, similarity: float) -> float:
        """Of how many in a hundred cases the nearest is less similar to them than `similarity`."""
        return float(100 * np.mean(self.near < similarity)) if len(self.near) else 0.0

    @property
    def least(self) -> float:
        """The similarity of what is barely near."""
        return float(np.quantile(self.near, FAR)) if len(self.near) else -np.inf


def usual(library: Library, space: Space) -> Usual:
    """What the cases of a library are like. What was asked of a version before is not computed again."""
    return _usual(library.path, library.pseudonym(""), library.version, space)


@lru_cache(maxsize=8)
def _usual(path: str, key: str, version: int, space: Space) -> Usual:
    # Where a library was, another may be: its key tells it from that.
    library = Library.open(path, version)
    return Usual.of(library.records(whole=False), library.matrix(space.name)[1], space)


@dataclass(frozen=True)
class Nearest:
    """Those of `cases` that are near a scan in `space`."""

    query: Query
    cases: Searched
    usual: Usual
    space: Space

    def roles(self, count: int, unlike: int, mistaken: int) -> list[tuple[Role, Hit]]:
        """The `count` nearest cases of which the network says the same, the nearest `unlike` of which it says
        otherwise, and the nearest `mistaken` others about which it is wrong. Where it names nothing, the nearest are
        alike, and unlike are those of another label than most of them."""
        says, labels, answers = self.query.says, self.usual.labels, self.usual.answers
        found: list[tuple[Role, Hit]] = []

        def add(role: Role, count: int, *wanted: Mapping[str, Set[str]]) -> None:
            shown = {hit.record.uid for _, hit in found}
            hits = [hit for one in wanted for hit in self.hits(one, count and count + len(shown))]
            fresh = sorted((hit for hit in hits if hit.record.uid not in shown), key=self._rank)
            found.extend((role, hit) for hit in fresh[:count])

        add("alike", count, {"said": {says}} if says else {})
        most = Counter(hit.record.label for _, hit in found if hit.record.label).most_common(1)
        if says:
            add("unlike", unlike, {"said": answers - {says}})
        elif most:
            add("unlike", unlike, {"label": labels - {most[0][0]}})
        # What is known of a case may be no answer of the network at all.
        add("mistaken", mistaken, *({"said": {one}, "label": (labels & answers) - {one}} for one in sorted(answers)))
        return found

    @cached_property
    def best(self) -> float:
        """How similar the nearest of all cases is, whatever the filters."""
        free = replace(self, query=replace(self.query, where={}, regions=None))
        return max((hit.similarity for hit in free.hits({}, 1)), default=-np.inf)

    def hits(self, wanted: Mapping[str, Set[Any]], count: int) -> list[Hit]:
        """The `count` nearest cases of which the filters and what is `wanted` hold, but none of the scan itself."""
        asked = self.query
        shared = asked.where.keys() & wanted.keys()
        where = {**asked.where, **wanted, **{name: asked.where[name] & wanted[name] for name in shared}}
        if not count or any(value == set() for value in where.values()):
            return []
        ask = max(count, FIRST) if asked.regions is not None else count
        while True:
            every = self.cases.search(asked.vector, ask, self.space.name, where, asked.patient or None, asked.embedder)
            found = [hit for hit in every if not self.itself(hit)]
            if len(every) < ask or len(found) >= count:
                break
            ask *= 2
        return sorted(found, key=self._rank)[:count]

    def itself(self, hit: Hit) -> bool:
        """Whether a case is of the scan itself: the same file, or the same to the network."""
        vector, other = self.query.vector, hit.record.vectors[self.space.name]
        same = np.allclose(vector, other, rtol=0, atol=1e-5 * float(np.abs(vector).max()))
        return same or hit.record.meta.get(SCAN) == self.query.scan

    def _rank(self, hit: Hit) -> tuple[float, str]:
        regions = self.query.regions
        score = hit.similarity if regions is None else by_strongest(regions, hit.record.regions)
        return -score, hit.record.uid


def by_strongest(regions: np.ndarray, others: np.ndarray | None) -> float:
    """The late interaction of the quarter of `regions` (R, K) in which most was found with the regions `others` (S, K);
    -1 where there are none."""
    if others is None or not len(others):
        return -1.0
    a, b = (np.asarray(part, dtype=np.float64) for part in (regions, others))
    most = np.argsort(-np.linalg.norm(a, axis=1), kind="stable")[: -(-len(a) // 4)]
    return late_interaction(a[most], b)
