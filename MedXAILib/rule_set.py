"""Rules: when a network says what, in measures and words that a person knows."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from MedXAILib.errors import MedXAIError
from MedXAILib.explanation import Explanation, ImageFormat
from MedXAILib.rule import Rule


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
            rules=tuple(Rule.read(said) for said in manifest["rules"]),
            text=manifest["text"],
            values=manifest["values"],
        )
