"""Rules: when a network says what, in measures and words that a person knows."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from MedXAILib.errors import MedXAIError
from MedXAILib.explanation import Explanation, ImageFormat

Interval = tuple[float, float]


@dataclass(frozen=True)
class Condition:
    """`feature` is at most, or more than, `threshold` (in `unit`)."""

    feature: str
    relation: Literal["<=", ">"]
    threshold: float
    unit: str = ""


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


@dataclass(frozen=True, eq=False)
class RuleSet(Explanation):
    """When: rules that say what the network says; of several that apply the first counts.

    `text` sums up, `values` are the features of the scan explained.

    Raises:
        MedXAIError: when a share is none.
    """

    rules: tuple[Rule, ...]
    text: str = ""
    values: dict[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        object.__setattr__(self, "rules", tuple(self.rules))
        for rule in self.rules:
            for name in ("completeness", "correctness", "truth"):
                share = getattr(rule, name)
                if share is not None and not 0 <= share <= 1:
                    raise MedXAIError(f"The {name} of the rule for '{rule.says}' is {share}: give 0 to 1.")
            for condition in rule.conditions:
                if not math.isfinite(condition.threshold):
                    raise MedXAIError(
                        f"The threshold of '{condition.feature}' is {condition.threshold}: give a number."
                    )

    def _write(self, folder: Path, image_format: ImageFormat) -> dict[str, Any]:
        return {"rules": [asdict(rule) for rule in self.rules], "text": self.text, "values": self.values}

    @classmethod
    def _read(cls, folder: Path, manifest: dict[str, Any], common: dict[str, Any]) -> RuleSet:
        return cls(
            **common,
            rules=tuple(_rule(said) for said in manifest["rules"]),
            text=manifest["text"],
            values=manifest["values"],
        )


def _rule(said: dict[str, Any]) -> Rule:
    pairs = ("completeness_interval", "correctness_interval")
    known = {name: said[name] and tuple(said[name]) for name in pairs}
    return Rule(**{**said, **known, "conditions": tuple(Condition(**one) for one in said["conditions"])})
