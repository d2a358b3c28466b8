"""Sites, and what chance makes of them: sites dealt out anew among the cases of a class, and nothing else.

A site may see sicker patients than another, and nothing is wrong with a network then. So sites are compared within a
class alone, and what a difference means is told by permutations within classes: under the null, what the network sees
says nothing about the site once the class is known.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from MedXAILib.errors import MedXAIError
from MedXAILib.textual.significance import exceeded

# Groups that are fewer than this, in cases that can be compared with as many others of their class, are not compared.
_LEAST = 5.0


@dataclass(frozen=True, eq=False)
class Contrast:
    """Of the group called `group`, how much more it has than the others of its class (`effect`), of column `column` of
    what was measured; how often chance gives as much (`p`), and what it gave (`null`): the largest of all groups and
    columns, in the units of the one that varies most."""

    group: str
    column: int
    effect: float
    p: float
    null: np.ndarray


@dataclass(frozen=True, eq=False)
class Groups:
    """The groups `names` of the column `column`, such as sites, of N cases of known `strata` (N,).

    `draws` (1 + P, N) are the group of each case, and then P times groups dealt out anew within strata. `weights` (G,)
    say how many cases can be compared; groups with too few are left out of what is compared.
    """

    column: str
    names: tuple[str, ...]
    cells: Sequence[str]
    strata: np.ndarray
    draws: np.ndarray
    seed: int

    @classmethod
    def of(cls, column: str, cells: Sequence[str], strata: np.ndarray, seed: int, draws: int) -> Groups:
        """Those that `cells` (N) name.

        Raises:
            MedXAIError: when no two can be compared.
        """
        names, at = np.unique(np.asarray(cells), return_inverse=True)
        random = np.random.default_rng(seed)
        drawn = np.tile(at.astype(np.int16), (draws + 1, 1))
        for stratum in np.unique(strata):
            inside = np.flatnonzero(strata == stratum)
            drawn[1:, inside] = random.permuted(drawn[1:, inside], axis=1)
        found = cls(column, tuple(names.tolist()), cells, strata, drawn, seed)
        if not found.compared.any():
            raise MedXAIError(
                f"'{column}' and the label go together so closely, or cases are so few, that no two groups can be "
                "compared within a class: give more cases of each group and class."
            )
        return found

    def taken(self, which: np.ndarray) -> Groups:
        """Only these cases, their groups dealt out anew among them."""
        cells = [self.cells[i] for i in which]
        return Groups.of(self.column, cells, self.strata[which], self.seed, len(self.draws) - 1)

    @property
    def at(self) -> np.ndarray:
        """The group of each case (N,)."""
        return self.draws[0]

    @cached_property
    def weights(self) -> np.ndarray:
        """(G,): of two groups of n and m cases in a class, n m / (n + m), summed over classes (Mantel and Haenszel)."""
        total = np.zeros(len(self.names))
        for stratum in np.unique(self.strata):
            count = np.bincount(self.at[self.strata == stratum], minlength=len(self.names))
            total += count * (count.sum() - count) / count.sum()
        return total

    @property
    def compared(self) -> np.ndarray:
        """Which groups have cases enough (G,)."""
        return self.weights >= _LEAST

    def centred(self, values: np.ndarray) -> np.ndarray:
        """`values` (N, ...) less the mean of their stratum."""
        values = np.array(values, dtype=np.float64)
        for stratum in np.unique(self.strata):
            inside = self.strata == stratum
            values[inside] -= values[inside].mean(0)
        return values

    def contrasts(self, values: np.ndarray) -> np.ndarray:
        """(1 + P, G, M): how much more of `values` (N, M) each group has than the others of its stratum, over strata
        with the weights of Mantel and Haenszel; NaN of groups that are not compared."""
        centred = self.centred(values)
        found = np.full((len(self.draws), len(self.names), values.shape[1]), np.nan)
        for g in np.flatnonzero(self.compared):
            found[:, g] = (self.draws == g).astype(np.float64) @ centred / self.weights[g]
        return found

    def contrast(self, values: np.ndarray) -> Contrast:
        """The largest difference in `values` (N, M), measured by how much chance makes of it."""
        return self.largest(self.contrasts(values))

    def largest(self, found: np.ndarray) -> Contrast:
        """That of `found` (1 + P, G, M), the first as measured and the others by chance, which is most unlike chance.

        Its p is of the largest of all (Westfall and Young), so that it does not matter among how many it was chosen.
        """
        spread = found[1:].std(0)
        apart = np.abs(np.divide(found, spread, out=np.zeros_like(found), where=spread > 1e-12))
        apart = np.nan_to_num(apart).reshape(len(found), -1)
        group, column = np.unravel_index(int(apart[0].round(9).argmax()), found.shape[1:])
        most = apart.max(1)
        effect, p = float(found[0, group, column]), exceeded(most[0], most[1:])
        return Contrast(self.names[int(group)], int(column), effect, p, most[1:] * np.nanmax(spread))
