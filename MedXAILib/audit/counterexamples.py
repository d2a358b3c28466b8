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
    """The probability that the right class gets where its group is seen with it more than chance would have it,
    less where it is not, class for class."""
    if not all(cohort.labels):
        raise MedXAIError("What is right is not known: give the column of the label.")
    sure, right = cohort.sureness, np.array(cohort.said) == np.array(cohort.labels)
    classes, label = np.unique(np.asarray(cohort.labels), return_inverse=True)
    # How many of each group are of each class is the same for all draws, and so is what goes together.
    count = np.zeros((len(groups.names), len(classes)))
    np.add.at(count, (groups.at, label), 1)
    together = count * count.sum() > count.sum(0) * count.sum(1, keepdims=True)
    agrees = together[groups.draws, label]
    centred = groups.centred(sure[:, None])[:, 0]
    weight = _weight(agrees[0], groups.strata)
    if weight <= 0:
        raise MedXAIError(f"No class has cases of a '{groups.column}' that goes with it and of one that does not.")
    effect = agrees @ centred / weight
    rows = []
    for g, name in enumerate(groups.names):
        for k, of in enumerate(classes):
            here = (groups.at == g) & (label == k)
            if here.any():
                one = {"group": name, "class": str(of), "usual": bool(together[g, k]), "cases": int(here.sum())}
                rows.append({**one, "accuracy": float(right[here].mean()), "probability": float(sure[here].mean())})
    met = agrees[0]
    says = (
        f"The right class gets a probability of {sure[met].mean():.2f} where the {groups.column} usually goes with it "
        f"(accuracy {right[met].mean():.0%}) and {sure[~met].mean():.2f} where it does not ({right[~met].mean():.0%}); "
        f"class for class {effect[0]:+.2f}"
    )
    test = Test(says, float(effect[0]), _LEAST, exceeded(effect[0], effect[1:]), effect[1:])
    return Outcome([test], {"agree": float(sure[met].mean()), "disagree": float(sure[~met].mean())}, rows)


def _weight(agrees: np.ndarray, strata: np.ndarray) -> float:
    inside = [agrees[strata == stratum] for stratum in np.unique(strata)]
    return float(sum(one.sum() * (~one).sum() / len(one) for one in inside))
