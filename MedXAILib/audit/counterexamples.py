"""Is the network worse where a site does not go with the class that it usually goes with?"""

from __future__ import annotations

import numpy as np

from MedXAILib.audit.cohort import Cohort
from MedXAILib.audit.groups import Groups
from MedXAILib.audit.outcome import Outcome, Test
from MedXAILib.errors import MedXAIError
from MedXAILib.run import Run
from MedXAILib.textual.significance import exceeded

TITLE = "Is it worse where the site does not go with the class?"

# Of probability: so much less for what is right.
_LEAST = 0.1


def check(cohort: Cohort, groups: Groups, run: Run) -> Outcome:
    """The probability that the right class gets where it is that which the group usually goes with, less where it is
    not, class for class."""
    if not all(cohort.labels):
        raise MedXAIError("What is right is not known: give the column of the label.")
    sure, right = cohort.sureness, np.array(cohort.said) == np.array(cohort.labels)
    classes, label = np.unique(np.asarray(cohort.labels), return_inverse=True)
    usual = np.array([_usual(label[groups.at == g], label, len(classes)) for g in range(len(groups.names))])
    # How many of each group are of each class is the same for all draws, so that what is usual is.
    agrees = usual[groups.draws] == label
    centred = groups.centred(sure[:, None])[:, 0]
    weight = _weight(agrees[0], groups.strata)
    if weight <= 0:
        raise MedXAIError(f"No case of a class is of a '{groups.column}' that goes with another: nothing to compare.")
    effect = agrees @ centred / weight
    rows = []
    for g, name in enumerate(groups.names):
        for k, of in enumerate(classes):
            here = (groups.at == g) & (label == k)
            if here.any():
                one = {"group": name, "class": str(of), "usual": bool(usual[g] == k), "cases": int(here.sum())}
                rows.append({**one, "accuracy": float(right[here].mean()), "probability": float(sure[here].mean())})
    met = agrees[0]
    says = (
        f"The right class gets a probability of {sure[met].mean():.2f} where the {groups.column} usually goes with it "
        f"(accuracy {right[met].mean():.0%}) and {sure[~met].mean():.2f} where it does not ({right[~met].mean():.0%}); "
        f"class for class {effect[0]:+.2f}"
    )
    test = Test(says, float(effect[0]), _LEAST, exceeded(effect[0], effect[1:]), effect[1:])
    return Outcome([test], {"agree": float(sure[met].mean()), "disagree": float(sure[~met].mean())}, rows)


def _usual(own: np.ndarray, label: np.ndarray, classes: int) -> int:
    """The class that is more frequent in a group than in all, by the largest ratio."""
    return int((np.bincount(own, minlength=classes) / np.bincount(label, minlength=classes)).argmax())


def _weight(agrees: np.ndarray, strata: np.ndarray) -> float:
    inside = [agrees[strata == stratum] for stratum in np.unique(strata)]
    return float(sum(one.sum() * (~one).sum() / len(one) for one in inside))
