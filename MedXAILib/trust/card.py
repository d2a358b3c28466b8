"""The trust card: a few quick checks of one explanation, in plain sentences, with the numbers behind them."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from MedXAILib.errors import Cancelled, MedXAIError, OutOfMemory, unknown
from MedXAILib.explanation import SaliencyMap
from MedXAILib.trust import (
    additivity,
    channels,
    discrimination,
    faithfulness,
    randomisation,
    retraining,
    stability,
    validity,
)
from MedXAILib.trust.finding import Finding
from MedXAILib.trust.judged import Judged

FILE = "trust.json"

LIMIT = 10.0
"""A card takes at most so many times as long as the explanation did."""

# A backward takes about as long as two forwards.
_BACKWARD = 2


@dataclass(frozen=True)
class Check:
    """A check `judge` that takes about as many forwards as `again` explanations and `forwards` more."""

    title: str
    judge: Callable[[Judged], Finding | None]
    again: int = 0
    forwards: int = 0

    def price(self, own: float) -> float:
        """About how many forwards it takes when the explanation itself took `own`."""
        return self.again * own + self.forwards


def _faithfulness(judged: Judged) -> Finding:
    return faithfulness.judge(judged, ("blur",), steps=_STEPS)


# Two curves share their ends.
_STEPS, _SETS = 6, 16

CHECKS: dict[str, Check] = {
    "validity": Check(validity.TITLE, validity.judge),
    "randomisation": Check(randomisation.TITLE, randomisation.judge, randomisation.DRAWS, 2),
    "faithfulness": Check(faithfulness.TITLE, _faithfulness, 0, 2 * _STEPS),
    "stability": Check(stability.TITLE, stability.judge, 3, 3),
    "discrimination": Check(discrimination.TITLE, discrimination.judge, 1, 1),
    "channels": Check(channels.TITLE, channels.judge, 0, 2**2),
    "additivity": Check(additivity.TITLE, lambda judged: additivity.judge(judged, _SETS), 0, _SETS + 1),
    "permuted": Check(retraining.PERMUTED, retraining.permuted, 1),
    "repeatability": Check(retraining.REPEATED, retraining.repeatability, 2),
}
"""In the order of what matters most. A new check is a file of its own and a line here."""


@dataclass(frozen=True)
class Estimate:
    """What a card will do: the `checks`, those `left_out` because they would take too long, and about how many
    `seconds` it takes."""

    checks: tuple[str, ...]
    left_out: tuple[str, ...]
    seconds: float


@dataclass(frozen=True)
class TrustCard:
    """What was found of an explanation, what was `left_out` and why, and what it cost."""

    findings: tuple[Finding, ...]
    left_out: dict[str, str]
    forwards: int
    backwards: int

    def to_json(self) -> dict[str, Any]:
        """As plain data."""
        return {
            "findings": [finding.to_json() for finding in self.findings],
            "left_out": self.left_out,
            "forwards": self.forwards,
            "backwards": self.backwards,
        }

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> TrustCard:
        """The reverse of `to_json`."""
        return cls(**{**data, "findings": tuple(Finding(**finding) for finding in data["findings"])})

    def save(self, folder: Path) -> Path:
        """Write it beside the explanation that is saved in `folder`."""
        path = folder / FILE
        path.write_text(json.dumps(self.to_json(), indent=2, ensure_ascii=False), encoding="utf-8")
        return path


def load_card(folder: Path) -> TrustCard | None:
    """The card beside an explanation that was saved to `folder`, if there is one."""
    path = folder / FILE
    return TrustCard.from_json(json.loads(path.read_text(encoding="utf-8"))) if path.exists() else None


def estimate(explanation: SaliencyMap, limit: float = LIMIT) -> Estimate:
    """Which checks take together at most `limit` times as long as the explanation, and about how long that is."""
    made = explanation.provenance
    own = max(1.0, made.forwards + _BACKWARD * made.backwards)
    chosen, left_out, spent = [], [], 0.0
    for name, check in CHECKS.items():
        price = check.price(own)
        if spent + price <= limit * own:
            chosen.append(name)
            spent += price
        else:
            left_out.append(name)
    return Estimate(tuple(chosen), tuple(left_out), made.seconds * spent / own)


def trust_card(judged: Judged, checks: Sequence[str] | None = None) -> TrustCard:
    """Check an explanation: by those `checks`, or those that take at most ten times as long as it did. A check that
    cannot be made is left out, and the card says why.

    Raises:
        MedXAIError: for an unknown check.
        Cancelled: when the person asked to stop.
    """
    left_out: dict[str, str] = {}
    if checks is None:
        planned = estimate(judged.explanation)
        checks, left_out = planned.checks, dict.fromkeys(planned.left_out, "it would take too long; ask for it")
    for name in checks:
        if name not in CHECKS:
            raise unknown("check", name, CHECKS)
    findings = []
    # Nearly every check asks about the same scan: it is preprocessed once.
    with judged.model.keeping_last():
        for done, name in enumerate(checks):
            judged.run.step(done, len(checks), CHECKS[name].title)
            try:
                found = CHECKS[name].judge(judged)
            except (Cancelled, OutOfMemory):
                raise
            except MedXAIError as error:
                left_out[name] = str(error)
                continue
            if found is not None:
                findings.append(found)
    return TrustCard(tuple(findings), left_out, judged.run.cost.forwards, judged.run.cost.backwards)
