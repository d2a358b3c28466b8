"""Do rules on nodules of one patient hold for those of another? `python -m benchmarks.rules` takes a minute.

The known attributes of computed nodules, and what the shipped classifier says of them: 600 in the lung of the patient
that it learnt from choose and judge the rules as the method does, and 450 in that of another patient judge them again.
"""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch

import MedXAILib as mx
from MedXAILib.engines.rule_fit import Cases, covers, grown, halves, judged
from MedXAILib.resources import path
from MedXAILib.synthetic.lung_nodules import ATTRIBUTES, CLASSES, Backgrounds, synthesise

RESULTS = Path(__file__).parent / "results" / "rules.json"


def cases(network: torch.nn.Module, backgrounds: Backgrounds, count: int, seed: int) -> Cases:
    """Nodules and what `network` says of them; patches without a nodule have no attributes."""
    nodules = synthesise(backgrounds, count, seed, borderline=True)
    with torch.no_grad():
        says = torch.cat([network(part).argmax(1) for part in nodules.images.split(50)]).numpy()
    lesion = nodules.labels.numpy() > 0
    names = np.array(CLASSES)
    return Cases(
        features=ATTRIBUTES,
        values=nodules.attributes.numpy()[lesion],
        says=names[says[lesion]],
        labels=names[nodules.labels.numpy()[lesion]],
        patients=np.arange(count)[lesion].astype(str),
        units={"diameter_mm": "mm", "margin_mm": "mm"},
    )


def main() -> None:
    network = mx.load_model(path("Models/lung_nodule")).network
    choosing, judging = halves(cases(network, Backgrounds.training(), 900, 31), 0)
    other = cases(network, Backgrounds.test(), 675, 32)
    columns = dict(zip(ATTRIBUTES, other.values.T, strict=True))
    rows, right, covered = [], 0, 0
    for chosen in grown(choosing, 3, 5, 0):
        rule = judged(chosen, judging, 0)
        if rule is not None:
            there = covers(rule, columns)
            agree = int((other.says[there] == rule.says).sum())
            right, covered = right + agree, covered + int(there.sum())
            known = {"cases": int(there.sum()), "correctness": agree / max(1, int(there.sum()))}
            rows.append({**asdict(rule), "sentence": rule.sentence, "other_patient": known})
    found = {
        "chosen_by": len(choosing),
        "judged_by": len(judging),
        "correctness": sum(r["correctness"] * r["cases"] for r in rows) / sum(r["cases"] for r in rows),
        "completeness": sum(r["completeness"] for r in rows),
        "other_patient": {
            "cases": len(other),
            "completeness": covered / len(other),
            "correctness": right / covered,
            "says_most_often": float(np.unique(other.says, return_counts=True)[1].max() / len(other)),
        },
        "rules": rows,
    }
    RESULTS.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")
    print(json.dumps({key: value for key, value in found.items() if key != "rules"}, indent=2))
    print("\n".join(row["sentence"] for row in rows))


if __name__ == "__main__":
    main()
