"""A rule: conditions on measures and words that a person knows, and what a network says where they hold.

Without PyTorch, so that Slicer's panels can read rules out.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

Interval = tuple[float, float]


@dataclass(frozen=True)
class Condition:
    """`feature` is at most, or more than, `threshold` (in `unit`)."""

    feature: str
    relation: Literal["<=", ">"]
    threshold: float
    unit: str = ""

    @property
    def phrase(self) -> str:
        """The condition as a person says it."""
        than = "more than" if self.relation == ">" else "at most"
        name = self.feature.removesuffix(f"_{self.unit}").replace("_", " ")
        # Three digits, and never a power of ten: HU and mm³ have thousands.
        value = f"{self.threshold:.0f}" if abs(self.threshold) >= 999.5 else f"{self.threshold:.3g}"
        return f"{name} is {than} {value} {self.unit}".rstrip()


@dataclass(frozen=True)
class Rule:
    """Where all `conditions` hold, the network says `says`.

    Silva et al. 2018 judge a rule by its completeness (the share of all cases that it covers), correctness (the share
    of those of which the network says it) and compactness (the number of conditions). The intervals are of 95 %.
    `cases` is how many it covers, `truth` in what share of them the label says it too (None: unknown), and `applies`
    whether it covers the scan explained. `scope` is "case" for a rule about the neighbourhood of that scan.
    """

    conditions: tuple[Condition, ...]
    says: str
    completeness: float
    correctness: float
    cases: int
    completeness_interval: Interval | None = None
    correctness_interval: Interval | None = None
    truth: float | None = None
    applies: bool = False
    scope: Literal["all", "case"] = "all"

    @property
    def compactness(self) -> int:
        """The number of conditions."""
        return len(self.conditions)

    @classmethod
    def read(cls, said: Mapping[str, Any]) -> Rule:
        """The reverse of `dataclasses.asdict`, from JSON."""
        pairs = ("completeness_interval", "correctness_interval")
        known = {name: said[name] and tuple(said[name]) for name in pairs}
        return cls(**{**said, **known, "conditions": tuple(Condition(**one) for one in said["conditions"])})

    @property
    def sentence(self) -> str:
        """The rule as a person says it."""
        where = " and ".join(condition.phrase for condition in self.conditions)
        covers = f"covers {self.completeness:.0%} of the cases"
        right = f"the network says so in {self.correctness:.0%} of them{_range(self.correctness_interval)}"
        truth = "" if self.truth is None else f", their label in {self.truth:.0%}"
        return f"{f'If {where}' if where else 'Otherwise'}: {self.says} ({covers}; {right}{truth})."


def _range(interval: Interval | None) -> str:
    return "" if interval is None else f" ({interval[0]:.0%} to {interval[1]:.0%})"
