"""Regression concept vectors: what a measure means to a network.

Graziani et al., "Regression concept vectors for bidirectional explanations in histopathology", 2018, and "Concept
attribution: explaining CNN decisions to physicians", 2020.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import numpy as np
from pydantic import Field
from sklearn.linear_model import Ridge, RidgeCV  # type: ignore[import-untyped]

from MedXAILib.explainer import Taxonomy
from MedXAILib.run import Run
from MedXAILib.textual.concept_method import FEW, ConceptMethod, Found, Scored
from MedXAILib.textual.concept_sets import MEASURES, Examples
from MedXAILib.textual.significance import exceeded, folds, shuffled

_LEAST, _GATE = 20, 0.05

# Of the ridge, in units of the layer's spread; which is best is told by leaving one example out.
_PENALTIES = np.logspace(-2, 5, 15)

_UNITS = {"mm": "mm", "ml": "mL", "hu": "HU"}


class RCV(ConceptMethod):
    """Does the answer change as a measure grows, such as the diameter?

    A ridge regression reads the measure off a layer. If it does so for examples that were held out, the relevance of
    the measure (Br) is their R² times the mean change of the target's score along the regression, in standard
    deviations of that change: over cases, and over regressions of examples drawn anew. (Where the score is linear in
    the layer it is the same for all cases, and the deviation over cases alone, as in the paper, would be zero.)
    """

    id: ClassVar[str] = "rcv"
    title: ClassVar[str] = "Regression concept vectors"
    paper: ClassVar[str] = "Graziani 2018"
    taxonomy: ClassVar[Taxonomy] = Taxonomy(
        "3.2",
        "textual",
        "post hoc",
        "model-specific",
        ("local", "global"),
        strengths="of any measure, by name or taken from segmentations; says how well the network knows it",
        limits="linear; measures that go together (volume and diameter) pass for one another",
    )

    draws: int = Field(100, ge=30, le=1000, description="permutations of the measure, and examples drawn anew")

    @property
    def says(self) -> str:
        return "Br, negative against and positive for"

    def known(self, examples: Examples, run: Run) -> dict[str, tuple[np.ndarray, str]]:
        found = examples.amounts(self.concepts, run)
        few = [name for name, values in found.items() if (~np.isnan(values)).sum() < FEW]
        if few:
            run.note(f"Fewer than {FEW} examples are measured: {', '.join(few)}.")
        return {name: (values, _unit(name)) for name, values in found.items()}

    def found(
        self, x: np.ndarray, known: np.ndarray, patients: Sequence[str], at: np.ndarray, random: np.random.Generator
    ) -> Found:
        numbers = {"examples": float(len(known))}
        if len(known) < _LEAST or known.std() == 0:
            what = f"{len(known)} examples are measured" if len(known) < _LEAST else "all examples have as much of it"
            return Found(numbers, f"{what}: give {FEW} that differ, or more")
        # Permutations are fitted beside the measure itself, which takes no longer.
        y = np.stack([known, *(shuffled(known, patients, random) for _ in range(self.draws))], 1)
        told, ways = np.empty_like(y), []
        for out in folds(patients, random):
            fit = RidgeCV(_PENALTIES, alpha_per_target=True).fit(x[~out], y[~out])
            told[out] = fit.predict(x[out])
            ways.append(_unit_vector(fit.coef_[0]))
        r2 = explained(y, told)
        whole = RidgeCV(_PENALTIES).fit(x, known)
        unit = _unit_vector(whole.coef_)
        angles = np.degrees(np.arccos(np.clip(np.stack(ways) @ unit, -1, 1)))
        p = exceeded(r2[0], r2[1:])
        numbers |= {"r2": float(r2[0]), "r2_p": p, "fold_angle": float(angles.mean())}
        if p > _GATE or r2[0] <= 0:
            return Found(
                numbers,
                f"the network does not know it: held-out R² is {r2[0]:.2f} (p = {p:.2g}); give more examples, or "
                "another layer",
            )
        anew = random.integers(len(known), size=(self.draws, len(known)))
        drawn = [_unit_vector(Ridge(whole.alpha_).fit(x[rows], known[rows]).coef_) for rows in anew]
        # Where a measure is rare, all that are drawn may have as much of it.
        some = anew[known[anew].std(1) > 0]
        again = explained(known[some].T, told[:, 0][some].T)
        numbers["r2_interval"] = _half(again)
        return Found(numbers, "", whole.coef_, unit, np.stack(drawn), float(whole.predict(at[None])[0]))

    def scored(self, found: Found, gradients: np.ndarray, random: np.random.Generator) -> Scored:
        r2, along, anew = found.numbers["r2"], gradients @ found.direction, gradients @ found.drawn.T
        cases = random.integers(len(gradients), size=(anew.shape[1], len(gradients)))
        drawn = np.array([_relevance(r2, anew[rows, k], anew[rows]) for k, rows in enumerate(cases)])
        numbers = {"sensitivity": float(along.mean())}
        return Scored(_relevance(r2, along, anew), _half(drawn), found.numbers["r2_p"], numbers)


def explained(known: np.ndarray, told: np.ndarray) -> np.ndarray:
    """R² of what was `told` (N, K) of each measure `known` (N, K)."""
    return 1 - ((known - told) ** 2).sum(0) / ((known - known.mean(0)) ** 2).sum(0)


def _relevance(r2: float, along: np.ndarray, anew: np.ndarray) -> float:
    """Br, of the changes of the score along the regression (M,), and along those of examples drawn anew (M, draws)."""
    spread = float(anew.std())
    return r2 * float(along.mean()) / spread if spread > 0 else 0.0


def _unit_vector(way: np.ndarray) -> np.ndarray:
    return way / max(float(np.linalg.norm(way)), 1e-12)


def _half(drawn: np.ndarray) -> float:
    """Half the width of the interval that holds 95 % of those drawn."""
    low, high = np.quantile(drawn, (0.025, 0.975))
    return float(high - low) / 2


def _unit(name: str) -> str:
    return MEASURES.get(name, _UNITS.get(name.rpartition("_")[2].lower(), ""))
