"""`python -m benchmarks.concepts` measures what is missing and writes docs/concepts.md: what concepts mean to the demo
network, whose rule is known, and how often one is found that means nothing. Minutes on two cores."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy.stats import spearmanr
from torch import Tensor, nn

import MedXAILib as mx
from benchmarks.measure import resumed
from benchmarks.sanity.patches import demo_model, scan
from MedXAILib.synthetic.lung_nodules import ATTRIBUTES, CLASSES, SPACING_MM, draw, render, rule_logit, synthesise
from MedXAILib.textual.concept_sets import Examples

ROOT = Path(__file__).resolve().parents[1]
RESULTS, PAGE = ROOT / "benchmarks" / "results" / "concepts.json", ROOT / "docs" / "concepts.md"

SEED, DRAWN = 801, 630
"""Of the nodules; no training, no test and no other page has seen them. A third of the patches have none."""
SEEDS, EXAMPLES = 5, 200
"""The examples of each seed are drawn from the nodules."""
NULLS, NULL_EXAMPLES = 100, 100
CHANGED = 24
"""Nodules that are rendered again with and without each concept."""
LIMIT_MM, LONG, WIDE_MM = 15.0, 0.775, 1.05
"""From where on a nodule is large, round, blurred: about the middle of what they are."""

CONCEPTS: dict[str, tuple[str, float, float]] = {
    "spiculation": ("spiculation", 0.0, 1.1),
    "calcification": ("calcification", 0.0, 1.0),
    f"diameter_mm > {LIMIT_MM:g}": ("diameter_mm", 11.0, 20.0),
    "part_solid": ("solidity", 1.0, 0.4),
    "lobulation": ("lobulation", 0.0, 0.18),
    f"elongation > {LONG:g}": ("elongation", 0.65, 0.9),
    f"margin_mm > {WIDE_MM:g}": ("margin_mm", 0.75, 1.35),
}
"""The attribute that each concept is of, and its value without and with it."""
PLANTED, NULL = tuple(CONCEPTS)[:3], tuple(CONCEPTS)[5:]


@cache
def nodules() -> tuple[list[mx.Volume], np.ndarray, list[str]]:
    """Volumes of nodules in the lung of a patient whom the network has not seen, their attributes and classes."""
    made = synthesise(scan(), DRAWN, SEED)
    there = (made.labels > 0).nonzero()[:, 0]
    volumes = [volume(made.images[i]) for i in there]
    return volumes, made.attributes[there].double().numpy(), [CLASSES[made.labels[i]] for i in there]


def volume(image: Tensor) -> mx.Volume:
    """A patch (1, R, A, S) in its place."""
    return mx.Volume(image, np.diag([SPACING_MM] * 3 + [1.0]))


def examples(which: np.ndarray, **more: np.ndarray) -> Examples:
    """Some of the nodules, with what is known of them and `more`."""
    volumes, attributes, labels = nodules()
    known = dict(zip(ATTRIBUTES, attributes[which].T, strict=True))
    solidity = known["solidity"]
    known |= {
        "spiculation": (known["spiculation"] > 0).astype(float),
        "lobulation": (known["lobulation"] > 0).astype(float),
        "part_solid": ((solidity > 0.1) & (solidity < 0.9)).astype(float),
    }
    return Examples.of([volumes[i] for i in which], {**known, **more}, [labels[i] for i in which])


def told(model: mx.Model, method: str, given: Examples, seed: int, **parameters: Any) -> dict[str, dict[str, Any]]:
    """What a method says of each concept, for the malignant examples."""
    asked = {"explained": "class", "maps": "none", **parameters}
    found = mx.tell(model, given.scans[0].volume, method, "malignant", run=mx.Run(seed=seed), examples=given, **asked)
    return {c.name: {"score": c.score, "interval": c.interval, **c.numbers} for c in found.concepts}


def planted() -> list[dict[str, Any]]:
    """TCAV of all concepts, by seed."""
    model, found = demo_model(), []
    for seed in range(SEEDS):
        which = np.random.default_rng(seed).permutation(len(nodules()[0]))[:EXAMPLES]
        found.append(told(model, "tcav", examples(which), seed, concepts=tuple(CONCEPTS)))
    return found


def measures() -> list[dict[str, Any]]:
    """RCV of the measures and of noise, by seed."""
    model, found = demo_model(), []
    for seed in range(SEEDS):
        random = np.random.default_rng(seed)
        which = random.permutation(len(nodules()[0]))[:EXAMPLES]
        given = examples(which, noise=random.normal(size=EXAMPLES))
        found.append(told(model, "rcv", given, seed, concepts=(*ATTRIBUTES, "noise")))
    return found


def nulls() -> list[dict[str, Any]]:
    """TCAV of concepts that mean nothing: labels by the toss of a coin, and two that the rule does not know."""
    model, found = demo_model(), []
    for seed in range(NULLS):
        random = np.random.default_rng(1000 + seed)
        which = random.permutation(len(nodules()[0]))[:NULL_EXAMPLES]
        given = examples(which, random=random.permutation(np.arange(NULL_EXAMPLES) % 2).astype(float))
        found.append(told(model, "tcav", given, seed, concepts=("random", *NULL), draws=30))
    return found


def scrambled() -> dict[str, Any]:
    """TCAV of all concepts when the network has learnt nothing."""
    model = demo_model()
    torch.manual_seed(0)
    for module in model.network.modules():
        if isinstance(module, (nn.Conv3d, nn.Linear)):
            module.reset_parameters()
    which = np.random.default_rng(0).permutation(len(nodules()[0]))[:EXAMPLES]
    return told(model, "tcav", examples(which), 0, concepts=tuple(CONCEPTS))


def interventions() -> dict[str, dict[str, float]]:
    """What each concept is worth: in the rule, and in the score when the same nodules are rendered with and without."""
    model = demo_model()
    attributes, labels = draw(3 * CHANGED // 2, SEED + 1, borderline=True)
    there = labels > 0
    attributes, labels = attributes[there], labels[there]
    found = {}
    for name, (attribute, without, having) in CONCEPTS.items():
        scores, rules = [], []
        for value in (without, having):
            changed = attributes.clone()
            changed[:, ATTRIBUTES.index(attribute)] = value
            with model.ready(), torch.no_grad():
                images = render(scan(), changed, labels, SEED + 1).images
                scores.append(model.forward(images)[:, CLASSES.index("malignant")].mean())
            rules.append(rule_logit(changed).mean())
        found[name] = {"rule": float(rules[1] - rules[0]), "network": float(scores[1] - scores[0])}
    return found


PARTS: dict[str, Callable[[], Any]] = {
    "planted": planted,
    "measures": measures,
    "nulls": nulls,
    "scrambled": scrambled,
    "interventions": interventions,
}


def main() -> None:
    """Measure what is missing and write the page."""
    torch.set_num_threads(1)
    PAGE.write_text(page(resumed(PARTS, RESULTS)), encoding="utf-8")


def page(found: Mapping[str, Any]) -> str:
    """docs/concepts.md."""
    return (HOW_TO + measured(found)).rstrip() + "\n"


def measured(found: Mapping[str, Any]) -> str:
    """What was found, in tables."""
    by_seed, worth = found["planted"], found["interventions"]

    def each(name: str, key: str) -> list[float]:
        return [one[name][key] for one in by_seed if one[name].get(key) is not None]

    rows = [
        "| concept | worth in the rule | score when it is rendered | told apart (held out) | TCAV score | magnitude "
        "| largest q | refused |",
        "|---|---:|---:|---:|---:|---:|---:|---:|",
    ]
    magnitude = {}
    for name in CONCEPTS:
        changes = each(name, "magnitude")
        magnitude[name] = sum(changes) / SEEDS
        said = ["-"] * 3
        if changes:
            said = [f"{np.mean(each(name, 'score')):+.2f}", f"{np.mean(changes):+.2f}", f"{max(each(name, 'q')):.1e}"]
        rows.append(
            f"| {name} | {worth[name]['rule']:+.1f} | {worth[name]['network']:+.2f} "
            f"| {np.mean(each(name, 'accuracy')):.0%} | {' | '.join(said)} | {SEEDS - len(changes)} of {SEEDS} |"
        )
    orders = {
        what: float(spearmanr([magnitude[n] for n in CONCEPTS], [worth[n][what] for n in CONCEPTS]).statistic)
        for what in ("rule", "network")
    }
    sure = sum(one[name].get("q", 1) < 0.01 for one in by_seed for name in PLANTED)
    none = found["nulls"]
    null_rows = ["| concept | let through by the gate | shown with q < 0.05 |", "|---|---:|---:|"]
    for name in ("random", *NULL):
        through = [one[name] for one in none if one[name]["score"] is not None]
        shown = sum(one["q"] < 0.05 for one in through)
        null_rows.append(f"| {name} | {len(through)} of {len(none)} | {shown} of {len(none)} |")
    empty = [name for name, one in found["scrambled"].items() if one["score"] is not None and one["q"] < 0.05]
    measures_rows = ["| measure | held-out R² | Br | refused |", "|---|---:|---:|---:|"]
    for name in (*ATTRIBUTES, "noise"):
        seen = [one[name] for one in found["measures"]]
        scores = [one["score"] or 0.0 for one in seen]
        measures_rows.append(
            f"| {name} | {np.mean([one['r2'] for one in seen]):+.2f} ({min(one['r2'] for one in seen):+.2f} at least) "
            f"| {np.mean(scores):+.2f} ({min(scores):+.2f} to {max(scores):+.2f}) "
            f"| {sum(one['score'] is None for one in seen)} of {SEEDS} |"
        )
    return MEASURED.format(
        nodules=EXAMPLES,
        pool=DRAWN * 2 // 3,
        seeds=SEEDS,
        table="\n".join(rows),
        sure=sure,
        tests=SEEDS * len(PLANTED),
        nulls=NULLS,
        null_examples=NULL_EXAMPLES,
        null_table="\n".join(null_rows),
        empty=", ".join(empty) or "none",
        measures="\n".join(measures_rows),
        **orders,
    )


HOW_TO = """\
# Concepts: what a person has a word for

"Is it malignant because it is spiculated?" `tcav` and `rcv` ask that of any network with a named layer, by your own
examples. The network is not trained again and need not know the word.

- **`tcav`**: there or not. A *concept activation vector* (CAV) tells examples with the concept from those without, in
  the activations of a layer; then: does the score of the target rise along it, and more than along CAVs of random sets?
- **`rcv`**: how much of it. A ridge regression reads a measure (a diameter, an ejection fraction) off the layer; then:
  does the score rise with it?

## Examples

A **table** (CSV, the one that `medxai train` takes): `volume`, `region` (x y z in RAS mm, the middle of the patch),
`label` (the class), `patient` (all scans of one are held out together), `segmentation`, and a column for each concept,
0, 1 or a number, empty where it is not known.

```csv
volume,region,label,patient,spiculation,diameter_mm
ct/001.nrrd,21.9 120.5 -611.5,malignant,P1,1,18.2
ct/002.nrrd,-60.1 88.0 -540.0,benign,P2,0,7.5
```

```bash
medxai explain lung_nodule scan.nrrd --method tcav --target malignant --region 21.9,120.5,-611.5 \\
    --set examples=nodules.csv --set "concepts=spiculation,diameter_mm > 15" --set explained=class
```

```python
told = mx.tell(model, volume, "rcv", "malignant", region, examples="nodules.csv", concepts=("diameter_mm", "roundness"))
for concept in told.concepts:
    print(concept.name, concept.score, concept.value, concept.unit, concept.refused, dict(concept.numbers))
```

Numbers are split at their median for `tcav` unless it is said where (`diameter_mm > 15`). `rcv` measures what has a
`segmentation` by itself: `volume_ml`, `diameter_mm`, `elongation`, `flatness`, `roundness`, `mean_intensity`,
`sd_intensity`, `edge_sharpness`.

A **folder** with a folder of scans for each concept and one called `random` of others. A **segmentation** of the scan,
as Slicer writes it: places in each segment against places elsewhere (or in a segment called `random`). Or in memory:
`mx.Examples.of(volumes, {"spiculation": [...]}, labels)`.

`explained` says whose answer is to be sensitive: that to the `scan` alone (local), to the examples whose label is the
target (`class`, global, as in the paper), or to `all`. The SHA-256 of the examples is kept, and `mx.recompute` refuses
others.

## What it says

- `accuracy`, `accuracy_p`: of the CAV on examples that were held out, both sides counting alike; its p by permutation.
  Above p = 0.05 there is no score: the concept is *refused*, and it says why.
- The score is alpha-TCAV, from -1 (against) to 1 (for): each case counts as the normal distribution has it, in units of
  what random CAVs do. `tcav` is the classic share of cases whose score rises; `magnitude`, by how much it rises from
  without to with the concept.
- `p`, `q`: two-sided, against random sets, which are the same examples dealt out anew; q is the rate of false
  discoveries over concepts, layers and classes.
- `consistency`: with several `layers`, how far they agree on how much of it is in each example.
- The value in this scan: 0 is as in the examples without it, 1 as in those with it; for `rcv` in its own unit.
- `alike`: the cosine between each two CAVs. Concepts with a high one pass for each other.
- The map: where in the scan it is (`maps=activation`; sums to what the CAV reads), or where more of it would move the
  score (`maps=gradient`; sums to by how much).
- `r2`, `r2_p`, `fold_angle`: of `rcv`, held-out R², its p by permutation, and by how many degrees the regressions of
  the folds differ.
- Br: of `rcv`, R² times mean over standard deviation of how the score changes along the regression, over cases and over
  regressions of examples drawn anew; with its bootstrap interval.

## Pitfalls

- **What the concept is told apart from is half of its meaning.** Nodules with spiculae against lung without nodules
  is "nodule". Take examples that differ in the concept and in nothing else, from the same scanners and patients.
- **What goes with it passes for it.** If the spiculated nodules of the table are the large ones, the CAV is of both.
  Look at `alike`, and at tables in which each goes without the other.
- **The layer matters.** An early layer may hold a concept that the decision does not use, and a late one may have
  thrown it away. Ask several (`layers=shape,evidence`), and trust what they agree on.
- **Pooling forgets the place.** "In the upper lobe" cannot be a concept of a pooled layer.
- **Some 50 examples of each side**, better 100; of several patients. Places of one segmentation are neighbours: their p
  is too small, and the answer says so.
- It is about the network, not about the world, and not about causes: it says how the score would move, to first order.
"""

MEASURED = """
## Measured

`python -m benchmarks.concepts`: the shipped `lung_nodule`, layer `evidence`, target "malignant", `explained=class`;
{nodules} of {pool} computed nodules in the lung of a patient whom the network has not seen, drawn anew for each of
{seeds} seeds. The rule is known ([demo-networks.md](demo-networks.md)): *worth in the rule* is by how much the concept
changes its logit, *when it is rendered* by how much the network's score changes when the same nodules are computed with
and without it. Means over seeds.

{table}

- Planted concepts (spiculation, calcification, diameter) have q < 0.01 in {sure} of {tests} tests.
- The order of magnitudes (0 where refused) and that of the rule: Spearman {rule:.2f}; and that of the rendered changes:
  {network:.2f}. A magnitude is first order along one direction: its order and sign are to be trusted, not its size.
- With random weights of all convolutions and linear layers, concepts with q < 0.05: {empty}.

**Concepts that mean nothing**: {nulls} draws of {null_examples} nodules; labels by the toss of a coin, and the two
attributes that the rule does not know. (The network was trained to tell these two as well, which it does poorly.)

{null_table}

**Measures** (`rcv`), the attributes as numbers, and noise; a refused one counts as Br 0:

{measures}

That the scores equal captum's with the same vector, that sensitivities and maps have their closed form, and that p is
even under the null, is in `Testing/test_tcav.py` and `Testing/test_rcv.py`.
"""

if __name__ == "__main__":
    main()
