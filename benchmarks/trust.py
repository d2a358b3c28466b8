"""`python -m benchmarks.trust` measures what is missing and writes docs/measured-table-5.md: how right, robust and
costly every method is on the demo network, by the checks of the trust card."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import mean
from typing import Annotated, Any

import numpy as np
import torch
import typer
from scipy.stats import spearmanr

import MedXAILib as mx
from benchmarks.measure import machine
from benchmarks.sanity import patches, rows
from MedXAILib.synthetic.lung_nodules import CLASSES, SPACING_MM, synthesise
from MedXAILib.trust.evaluation import Asked, evaluate, means, numbers
from MedXAILib.visual.perturbing import Perturbing

ROOT = Path(__file__).resolve().parents[1]
RESULTS, PAGE = ROOT / "benchmarks" / "results" / "trust", ROOT / "docs" / "measured-table-5.md"
CASES, FEW, SEED = 204, 12, 402
CHECKS = ("validity", "randomisation", "faithfulness", "discrimination", "stability")

SLOW = frozenset({"scorecam", "deep_shap", "gradient_shap"})
"""These ask about many scans for each map, as the methods do that perturb."""

COLUMNS = {
    "validity: pointing": "hit",
    "validity: mass": "mass",
    "validity: auprc": "AUPRC",
    "faithfulness: blur: score": "faithful",
    "randomisation: likeness": "scrambled: alike",
    "stability: noise": "noise: alike",
    "stability: shift": "shift: alike",
    "discrimination: likeness": "runner-up: alike",
    "cost: forwards": "forwards",
    "cost: backwards": "backwards",
}
BLIND = {"centre": "Centre of the patch", "intensity": "Brightness of the scan", "random": "Noise"}
LIGHTS = {"good": 1.0, "fair": 0.5, "poor": 0.0}

INTRODUCTION = """\
# Right, robust, and worth its cost?

The survey asks of every technique whether it is valid, robust and cheap, and finds that most were never tested (its
Table 5). This page is that table for the methods of MedXAI, measured by the checks of the trust card
([trust.md](trust.md)) on the demo network `lung_nodule` and synthetic nodules in 50 mm of real lung, of which it is
known where they are ([demo-networks.md](demo-networks.md)). The network looks at a patch around the nodule, as far as
the 50 mm reach: so whoever points at the middle is often right, and the first rows are what to compare with.
`python -m benchmarks.trust` measures what is missing and writes it.

Means over cases ± half the 95 % confidence interval. **hit**, **mass**, **AUPRC**: against the mask of the nodule.
**faithful**: insertion less deletion with blurred tissue, 0 by chance, above 1 where a part moves the answer further
than all of it. **scrambled**: how alike the map stays when the upper third of the weights is drawn again: the less, the
better. **noise**, **shift**: how alike it stays when the scan gets 1 % of noise or moves by a voxel: the more, the
better. **runner-up**: how alike the map of the second class is.
One small network and one kind of lesion: the order of methods is theirs, not that of methods in general.
"""

app = typer.Typer(add_completion=False)


def cases() -> list[Asked]:
    """Nodules that the network names rightly, benign and malignant, and what it names them."""
    drawn = synthesise(patches.scan(), 3 * CASES, SEED)
    model = patches.demo_model()
    with model.ready(), torch.no_grad():
        said = torch.cat([model.forward(some).argmax(1) for some in drawn.images.split(32)])
    right = ((said == drawn.labels) & (drawn.labels > 0)).nonzero()[:CASES, 0].tolist()
    affine = np.diag([SPACING_MM] * 3 + [1.0])
    return [
        Asked(
            f"nodule {i}",
            mx.Volume(drawn.images[i], affine),
            mx.Volume(drawn.masks[i].float(), affine),
            CLASSES[int(drawn.labels[i])],
        )
        for i in right
    ]


@app.command()
def main(
    only: Annotated[list[str] | None, typer.Option(help="a method by its id; may be repeated")] = None,
    scratch: Annotated[Path, typer.Option(help="where the results of cases are kept")] = ROOT / "build" / "trust",
) -> None:
    """Measure every method that has no result yet, and write the page."""
    torch.set_num_threads(1)
    RESULTS.mkdir(parents=True, exist_ok=True)
    known, model = None, patches.demo_model()
    for method, kind in mx.methods().items():
        path = RESULTS / f"{method}.json"
        if path.exists() or method in rows.OF_ONE_REGION or (only and method not in only):
            continue
        known = known or cases()
        slow = method in SLOW or issubclass(kind, Perturbing)
        # A method that docs/sanity.md has in one setting only has that one here.
        _, *others = settings = list(rows.SETTINGS.get(method, {"": {}}).values())
        setting = {} if others else settings[0]
        evaluate(model, known[: FEW if slow else None], {method: rows.meant(setting)}, scratch / method, checks=CHECKS)
        found = [json.loads(p.read_text(encoding="utf-8")) for p in sorted((scratch / method).glob("cases/*.json"))]
        kept = {"method": method, "parameters": setting, "machine": machine(), "cases": [_kept(one) for one in found]}
        path.write_text(json.dumps(kept, ensure_ascii=False) + "\n", encoding="utf-8")
        print(method, len(found), flush=True)
    PAGE.write_text(page(), encoding="utf-8")


def _kept(result: Mapping[str, Any]) -> dict[str, Any]:
    """What the page needs of a case."""
    if "refused" in result:
        return {"refused": result["refused"]}
    wanted = {*COLUMNS, *(f"validity: {name}: {of}" for name in BLIND for of in ("pointing", "mass", "auprc"))}
    values = {name: round(value, 4) for name, value in numbers(result).items() if name in wanted}
    return {"values": values, "lights": {f["check"]: f["light"] for f in result["findings"]}}


def page() -> str:
    """The page, from what has been measured."""
    results = [json.loads(p.read_text(encoding="utf-8")) for p in sorted(RESULTS.glob("*.json"))]
    by_id = {result["method"]: result for result in results}
    head = ["| | cases |", "| --- | ---: |"]
    for title in COLUMNS.values():
        head = [head[0] + f" {title} |", head[1] + " ---: |"]
    lines, refused = [], []
    most = max((r["cases"] for r in results), key=len, default=[])
    for name, title in BLIND.items():
        values = [
            {c: one["values"].get(c.replace("validity: ", f"validity: {name}: ")) for c in COLUMNS if "validity" in c}
            for one in most
        ]
        lines.append(_row(title, [{k: v for k, v in one.items() if v is not None} for one in values]))
    for method, kind in mx.methods().items():
        if method in by_id:
            of_method = [one["values"] for one in by_id[method]["cases"] if "values" in one]
            if of_method:
                lines.append(_row(_named(kind.title, by_id[method]["parameters"]), of_method))
            else:
                refused.append(f"- {kind.title}: {by_id[method]['cases'][0]['refused']}")
    missing = [kind.title for m, kind in mx.methods().items() if m not in by_id and m not in rows.OF_ONE_REGION]
    parts = [INTRODUCTION, "\n".join([*head, *lines]) + "\n"]
    parts += ["Not for this network:\n\n" + "\n".join(refused) + "\n"] if refused else []
    parts += [f"Not measured yet: {', '.join(missing)}.\n"] if missing else []
    parts.append(_predicting(results))
    return "\n".join(parts)


def _named(title: str, parameters: Mapping[str, Any]) -> str:
    said = ", ".join(f"{name} {value}" for name, value in parameters.items())
    return f"{title} ({said})" if said else title


def _row(title: str, values: Sequence[Mapping[str, float]]) -> str:
    found = means(values)
    cells = [f"{found[name]:.2f} ± {found[f'{name} ±']:.2f}" if name in found else "" for name in COLUMNS]
    return f"| {title} | {len(values)} | {' | '.join(cells)} |"


def _predicting(results: Sequence[Mapping[str, Any]]) -> str:
    """Whether the lights of the card that need no segmentation foresee how well a map meets it."""
    lights: dict[str, list[float]] = defaultdict(list)
    meets: dict[str, list[float]] = defaultdict(list)
    for one in (case for result in results for case in result["cases"] if "values" in case):
        known = {check: LIGHTS[light] for check, light in one["lights"].items() if light and check != "validity"}
        if not known:
            continue
        for check, light in [*known.items(), ("all together", mean(known.values()))]:
            lights[check].append(light)
            meets[check].append(one["values"]["validity: auprc"])
    lines = ["## Do the lights foresee whether a map meets the nodule?", ""]
    lines += [
        "Spearman's rank correlation between the lights that need no segmentation (green 1, yellow ½, red 0) and the "
        "AUPRC, over all maps above:",
        "",
        "| check | maps | rank correlation |",
        "| --- | ---: | ---: |",
    ]
    for check, values in lights.items():
        found = spearmanr(values, meets[check]).statistic
        said = "the lights are all alike" if np.isnan(found) else f"{found:.2f}"
        lines.append(f"| {check} | {len(values)} | {said} |")
    lines += [
        "",
        "A light says something about the map, not about the place: a map can depend on the network and be stable, "
        "and still lie elsewhere, because the network looked elsewhere.",
        "",
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    app()
