"""Testing with concept activation vectors.

Kim et al., "Interpretability beyond feature attribution: quantitative testing with concept activation vectors", 2018;
Schnoor et al., "alpha-TCAV: a unified framework for testing with concept activation vectors", 2026 (a smooth function
in the place of the sign). For the concept's map, Clough et al., "Global and local interpretability for cardiac MRI
classification", 2019.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar, Literal

import numpy as np
from pydantic import Field
from scipy.stats import norm  # type: ignore[import-untyped]
from sklearn.linear_model import LogisticRegression  # type: ignore[import-untyped]

from MedXAILib.explainer import Taxonomy
from MedXAILib.run import Run
from MedXAILib.textual.concept_method import FEW, ConceptMethod, Found, Scored
from MedXAILib.textual.concept_sets import Examples
from MedXAILib.textual.significance import among, exceeded, folds, shuffled

Vector = Literal["logistic", "pattern"]

# With fewer examples than this nothing can be held out; a gate with a larger p than that stays shut.
_LEAST, _GATE = 10, 0.05

# The inverse of the regularisation of the logistic regression, in units of the layer's spread.
_FREEDOM = 0.1

_WIDTH = 1.96


class TCAV(ConceptMethod):
    """Does the answer change when there is more of a concept, such as spiculation, by a person's own examples?

    A concept activation vector (CAV) tells examples with the concept from those without. Only if it does so for those
    that were held out, too, is it asked how the score of the target changes along it, and whether more than along CAVs
    of random sets: the same examples, dealt out anew.
    """

    id: ClassVar[str] = "tcav"
    title: ClassVar[str] = "TCAV"
    paper: ClassVar[str] = "Kim 2018"
    taxonomy: ClassVar[Taxonomy] = Taxonomy(
        "3.2",
        "textual",
        "post hoc",
        "model-specific",
        ("local", "global"),
        strengths="in a person's own terms, of any network with a named layer; tested against random concepts",
        limits="needs examples of each concept; what goes with a concept in them passes for it (see the cosines)",
    )

    vector: Vector = Field(
        "logistic", description="the CAV: the normal of a logistic regression, or the difference of the means (pattern)"
    )
    score: Literal["alpha", "sign", "magnitude"] = Field(
        "alpha",
        description="the share of cases whose score rises along the CAV, each counted as it is likely (alpha) or by "
        "its sign, from -1 to 1; or by how much it changes from without to with the concept (magnitude)",
    )
    draws: int = Field(50, ge=30, le=1000, description="random sets to compare with")

    @property
    def says(self) -> str:
        if self.score == "magnitude":
            return "change of the score from without to with the concept"
        return f"{'alpha-' if self.score == 'alpha' else ''}TCAV, -1 (against) to 1 (for)"

    def known(self, examples: Examples, run: Run) -> dict[str, tuple[np.ndarray, str]]:
        found = examples.there(self.concepts)
        few = [name for name, values in found.items() if min((values == 1).sum(), (values == 0).sum()) < FEW]
        if few:
            run.note(f"Fewer than {FEW} examples with or without: {', '.join(few)}.")
        return {name: (values, "") for name, values in found.items()}

    def found(
        self, x: np.ndarray, known: np.ndarray, patients: Sequence[str], at: np.ndarray, random: np.random.Generator
    ) -> Found:
        y = known == 1
        numbers = {"with": float(y.sum()), "without": float((~y).sum())}
        if min(numbers.values()) < _LEAST:
            return Found(numbers, f"{y.sum()} examples with it and {(~y).sum()} without: give {FEW} of each, or more")
        x, back = _compact(x)
        held = folds(patients, random)
        sets = [shuffled(y, patients, random) for _ in range(self.draws)]
        accuracy = held_out_accuracy(x, y, held, self.vector)
        numbers["accuracy"] = accuracy
        numbers["accuracy_p"] = exceeded(accuracy, [held_out_accuracy(x, one, held, self.vector) for one in sets])
        if numbers["accuracy_p"] > _GATE:
            return Found(
                numbers,
                "the network tells held-out examples with it from those without no better than by chance (accuracy "
                f"{accuracy:.0%}, p = {numbers['accuracy_p']:.2g}): give more or clearer ones, or another layer",
            )
        unit = concept_vector(x, y, self.vector)
        without, apart = x[~y].mean(0) @ unit, _apart(x, y) @ unit
        drawn = np.stack([_separating(x, one, self.vector) for one in sets])
        value = (at @ back.T @ unit - without) / apart
        return Found(numbers, "", unit @ back, apart * unit @ back, drawn @ back, float(value))

    def scored(self, found: Found, gradients: np.ndarray, random: np.random.Generator) -> Scored:
        return score(gradients @ found.direction, gradients @ found.drawn.T, self.score)


def score(changes: np.ndarray, drawn: np.ndarray, kind: Literal["alpha", "sign", "magnitude"] = "alpha") -> Scored:
    """From how the score of each case changes along the CAV (M,), and along those of random sets (M, draws).

    `alpha` counts a change as the normal distribution does that those of the case along random CAVs follow: a random
    concept gets any share of it equally often, where its sign would say all or nothing. The interval is that by which
    random CAVs scatter, and `p` is of the mean change.
    """
    mean, by_chance = float(changes.mean()), drawn.mean(0)
    spread = drawn.std(1, ddof=1)
    sure = np.divide(changes, spread, out=np.zeros_like(changes), where=spread > 0)
    shares = {"alpha": norm.cdf(sure).mean(), "sign": (changes > 0).mean()}
    if kind == "alpha":
        ends = [norm.cdf(sure + side * _WIDTH).mean() for side in (-1, 1)]
    else:
        ends = [(sure + side * _WIDTH > 0).mean() for side in (-1, 1)]
    numbers = {"alpha_tcav": float(shares["alpha"]), "tcav": float(shares["sign"]), "magnitude": mean}
    p, chance = among(mean, by_chance), tuple(by_chance.tolist())
    if kind == "magnitude":
        return Scored(mean, float(_WIDTH * by_chance.std(ddof=1)), p, numbers, chance)
    return Scored(float(2 * shares[kind] - 1), float(ends[1] - ends[0]), p, numbers, chance)


def concept_vector(x: np.ndarray, y: np.ndarray, kind: Vector) -> np.ndarray:
    """The CAV (F,), of length 1, of vectors `x` (N, F) that have the concept where `y` (N,) is true; zero when all are
    of one side."""
    if y.all() or not y.any():
        return np.zeros(x.shape[1])
    w = _apart(x, y)
    if kind == "logistic":
        fit = LogisticRegression(
            C=_FREEDOM, class_weight="balanced", solver="newton-cholesky", max_iter=100, tol=1e-3
        ).fit(x, y)
        w = fit.coef_[0]
    return w / max(float(np.linalg.norm(w)), 1e-12)


def held_out_accuracy(x: np.ndarray, y: np.ndarray, held: Sequence[np.ndarray], kind: Vector) -> float:
    """How often the CAV of the others puts what was held out on its side of their middle; both sides count alike."""
    told = np.zeros(len(y), dtype=bool)
    for out in held:
        seen, of = x[~out], y[~out]
        w = concept_vector(seen, of, kind)
        if w.any():
            middle = (seen[of].mean(0) + seen[~of].mean(0)) / 2
            told[out] = (x[out] - middle) @ w > 0
    return float((told[y].mean() + (~told[~y]).mean()) / 2)


def _separating(x: np.ndarray, y: np.ndarray, kind: Vector) -> np.ndarray:
    """The CAV, as long as the two sides are apart along it."""
    unit = concept_vector(x, y, kind)
    return unit * (_apart(x, y) @ unit)


def _apart(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    return x[y].mean(0) - x[~y].mean(0)


def _compact(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """`x` (N, F) in as few coordinates as its rows need, and the way back (coordinates, F). What is fitted is made of
    the rows, so nothing is lost."""
    if x.shape[1] <= len(x):
        return x, np.eye(x.shape[1])
    u, s, vt = np.linalg.svd(x, full_matrices=False)
    return u * s, vt
