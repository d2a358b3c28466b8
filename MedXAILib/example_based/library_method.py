"""What the methods have in common that look into a library of cases."""

from __future__ import annotations

import numpy as np
from pydantic import Field

from MedXAILib.cases.library import Library
from MedXAILib.explainer import Folder, Question, Teller
from MedXAILib.similar_cases import SimilarCases

# Cases among which a network that forgot is asked.
_FEW = 24


class LibraryMethod(Teller):
    """A method that asks about the cases of a library, or of the demo library of the network."""

    library: Folder = ""
    version: int = Field(0, ge=0, description="version of the library; 0 is the newest")

    def opened(self, question: Question) -> Library:
        """The library, whose path and version the run settles."""
        if self.library:
            library = Library.open(self.library, self.version or None)
        else:
            from MedXAILib.cases.demo import demo_library

            library = demo_library(question.model, question.run)
        question.run.settled |= {"library": library.path, "version": library.version}
        return library


def shown_among_others(told: SimilarCases) -> tuple[str, ...]:
    """The uids of the cases that were shown and of some others of the library: among so few, a network that embeds
    otherwise can be asked again."""
    made = told.provenance
    shown = [case.uid for case in told.cases]
    library = Library.open(made.parameters["library"], made.parameters["version"])
    others = sorted(set(library.uids()).difference(shown))
    drawn = np.random.default_rng(made.seed).permutation(others)[: max(_FEW - len(shown), 1)]
    return (*shown, *drawn.tolist())
