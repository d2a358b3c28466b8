"""Which infill finds the nodule best? `python -m benchmarks.infills` measures what is missing, and writes
docs/infills.md and its picture.

Uzunova et al. 2019 and Lenis et al. 2020 report that what generative networks put in the place of what is taken away
makes maps of perturbation methods end nearer to the lesion, by the Hausdorff distance.
"""

from __future__ import annotations

import json
import math
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

import MedXAILib as mx
from benchmarks import measure
from benchmarks.sanity.patches import Patches, demo_model, scan
from MedXAILib.engines.masks import Masks
from MedXAILib.engines.shapley import student
from MedXAILib.explainer import Question
from MedXAILib.infills.choice import INFILLS, infill
from MedXAILib.model import Prepared
from MedXAILib.report.localisation import highest
from MedXAILib.run import Run
from MedXAILib.synthetic.lung_nodules import CLASSES, HU_RANGE, SPACING_MM, synthesise

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "infills" / "nodules.json"
PAGE, PICTURE = ROOT / "docs" / "infills.md", ROOT / "docs" / "images" / "infills.png"

SEED, OF_EACH_CLASS = 701, 5
"""Of the nodules. No training, no test and no other page has seen them."""
METHODS: dict[str, dict[str, Any]] = {
    "occlusion": {"window": (10.0,), "stride": (7.0,)},
    "meaningful_perturbation": {},
}
NAMES = ("minimum", "mean", "blur", "local_mean", "inpaint", "healthy")
"""Zero is what the minimum is in this network's input."""
MEASURES = ("hausdorff_mm", "hausdorff_95_mm", "peak", "mass")
AFFINE = np.diag([SPACING_MM, SPACING_MM, SPACING_MM, 1.0])


def cases(model: mx.Model) -> Patches:
    """Nodules in the lung of a patient whom no network has seen, which the network classifies rightly."""
    drawn = synthesise(scan(), 4 * OF_EACH_CLASS, SEED)
    with model.ready(), torch.no_grad():
        right = model.forward(drawn.images).argmax(1) == drawn.labels
    kept = [(right & (drawn.labels == CLASSES.index(c))).nonzero()[:OF_EACH_CLASS, 0] for c in ("benign", "malignant")]
    chosen = torch.cat(kept)
    return Patches(drawn.images[chosen], drawn.masks[chosen], drawn.labels[chosen])


def hausdorff(one: Tensor, other: Tensor) -> tuple[float, float]:
    """The Hausdorff distance of two masks (D, H, W) in mm, and the same with the 95th percentile of the distances in
    the place of the largest."""
    points = [mask.nonzero().float() * SPACING_MM for mask in (one, other)]
    away = torch.cdist(*points)
    to_other, to_one = away.amin(1), away.amin(0)
    return (
        float(to_other.max().maximum(to_one.max())),
        float(to_other.quantile(0.95).maximum(to_one.quantile(0.95))),
    )


def located(found: Tensor, mask: Tensor) -> dict[str, float]:
    """How well a map (D, H, W) meets a mask: the distances are between the mask and as many of the map's highest
    voxels (more, where several are as high as the last of them)."""
    flat, inside = found.flatten(), mask.flatten()
    lowest = flat.topk(int(inside.sum())).values[-1]
    worst, most = hausdorff(found >= lowest, mask)
    positive = flat.clamp_min(0)
    return {
        "hausdorff_mm": worst,
        "hausdorff_95_mm": most,
        "peak": float(mask[highest(found)]),
        "mass": float((positive * inside).sum() / positive.sum().clamp_min(1e-30)),
    }


def measured(method: str, name: str, model: mx.Model, some: Patches) -> dict[str, Any]:
    """What is measured of each case with one infill."""
    rows = []
    started = time.process_time()
    for image, mask, label in zip(some.images, some.masks, some.labels, strict=True):
        volume = mx.Volume(image, AFFINE)
        told = mx.explain(model, volume, method, int(label), infill=name, **METHODS[method])
        rows.append(located(told.data[0], mask[0]))
    return {
        "method": method,
        "infill": name,
        "parameters": METHODS[method],
        "cpu_seconds": round(time.process_time() - started, 1),
        **{key: [round(row[key], 3) for row in rows] for key in MEASURES},
    }


def main() -> None:
    """Measure what is missing, or the infills that are named; write the page and the picture."""
    torch.set_num_threads(1)
    again = set(sys.argv[1:])
    found: list[dict[str, Any]] = json.loads(RESULTS.read_text(encoding="utf-8"))["rows"] if RESULTS.exists() else []
    found = [row for row in found if row["infill"] not in again]
    model = demo_model()
    some = cases(model)
    for method, name in [(m, n) for m in METHODS for n in NAMES if m in mx.methods() and n in INFILLS]:
        if not any((row["method"], row["infill"]) == (method, name) for row in found):
            found.append(measured(method, name, model, some))
            keep(found)
            print(method, name, found[-1]["cpu_seconds"], flush=True)
    PAGE.write_text(markdown(found), encoding="utf-8")
    picture().save(PICTURE, optimize=True)


def keep(found: Sequence[Mapping[str, Any]]) -> None:
    """Write the results."""
    text = json.dumps({"seed": SEED, "machine": measure.machine(), "rows": found}, indent=1)
    RESULTS.parent.mkdir(exist_ok=True)
    RESULTS.write_text(text + "\n", encoding="utf-8")


_COLUMNS = {
    "hausdorff_mm": "Hausdorff (mm)",
    "hausdorff_95_mm": "95 % Hausdorff (mm)",
    "peak": "peak in the nodule",
    "mass": "relevance in the nodule",
}

_INTRODUCTION = """# What stands in for what is taken away

Methods that take parts of a scan away have to put something there (`--set infill=...`). A network may react to the hole
instead of to the loss, so infills that look like tissue should give better maps. Uzunova et al. 2019 and Lenis et al.
2020 report so for infills by generative networks. `python -m benchmarks.infills` asks whether it is so here.

![A real nodule, and what each infill puts in its place](images/infills.png)

A real nodule (sample scan, 1.36 mL) and what each infill puts in its place, two draws of those that are random; lung
window, axial and coronal through its middle. The fixed ones leave a hole or a ghost; `noise` and `gaussian` have the
contrast of the whole patch, chest wall included; `inpaint` goes on smoothly; `healthy` is drawn by the network in
`Resources/Models/infills/healthy_lung`, which never saw this patient.
"""

_MEASURED = """
## Measured

{count} computed nodules, half benign, half malignant, in the lung of a patient whom neither network has seen, all
classified rightly by `lung_nodule`; the map is of that class. `occlusion` has windows of 10 mm every 7 mm. The mask is
compared with as many voxels of the map as it has, the highest ones. Mean and 95 % confidence interval; small distances
are good. With so few nodules only large differences can show: that none does is not to say that there is none.
"""


def markdown(found: Sequence[Mapping[str, Any]]) -> str:
    """The page."""
    parts = [_INTRODUCTION, _MEASURED.format(count=len(found[0]["peak"]))]
    for method in METHODS:
        rows = sorted((row for row in found if row["method"] == method), key=lambda row: NAMES.index(row["infill"]))
        if rows:
            parts += ["", f"### {mx.methods()[method].title}", "", *_table(rows), "", *_compared(rows)]
    return "\n".join(parts) + "\n"


def _table(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    lines = [f"| infill | {' | '.join(_COLUMNS.values())} |", "|---|" + "---:|" * len(_COLUMNS)]
    for row in rows:
        cells = [" ± ".join(f"{v:.{1 if key.endswith('mm') else 2}f}" for v in interval(row[key])) for key in _COLUMNS]
        lines.append(f"| {row['infill']} | {' | '.join(cells)} |")
    return lines


def interval(values: Sequence[float]) -> tuple[float, float]:
    """The mean, and half the width of its 95 % confidence interval."""
    return mean(values), student(len(values) - 1) * stdev(values) / math.sqrt(len(values))


def _compared(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """`healthy` against each other infill, nodule by nodule."""
    by_name = {row["infill"]: row for row in rows}
    if "healthy" not in by_name:
        return []
    ours, theirs = by_name["healthy"], {name: row for name, row in by_name.items() if name != "healthy"}
    lines = [_concluded(ours, theirs), "", "`healthy` less the others, nodule by nodule:", ""]
    for name, row in theirs.items():
        lines.append(f"- {name}: {'; '.join(_difference(ours[key], row[key], key) for key in _COLUMNS)}.")
    return lines


def _concluded(ours: Mapping[str, Any], theirs: Mapping[str, Mapping[str, Any]]) -> str:
    """Whose maps end nearer to the nodule, in a sentence for each of the two distances."""
    told = []
    for key in ("hausdorff_mm", "hausdorff_95_mm"):
        by_verdict: dict[str, list[str]] = {}
        for name, row in theirs.items():
            by_verdict.setdefault(_verdict(ours[key], row[key], key), []).append(f"`{name}`")
        parts = [f"{verdict} {_THAN[verdict]} {', '.join(names)}" for verdict, names in by_verdict.items()]
        told.append(f"By the {_COLUMNS[key].removesuffix(' (mm)')} distance `healthy` is {'; '.join(parts)}.")
    return " ".join(told)


_BETTER, _WORSE, _SAME = "**better**", "**worse**", "no different"
_THAN = {_BETTER: "than", _WORSE: "than", _SAME: "from"}


def _verdict(ours: Sequence[float], theirs: Sequence[float], key: str) -> str:
    middle, half = interval([a - b for a, b in zip(ours, theirs, strict=True)])
    better = (middle < 0) == key.endswith("mm")
    return _SAME if abs(middle) <= half else _BETTER if better else _WORSE


def _difference(ours: Sequence[float], theirs: Sequence[float], key: str) -> str:
    middle, half = interval([a - b for a, b in zip(ours, theirs, strict=True)])
    digits = 1 if key.endswith("mm") else 2
    return f"{_COLUMNS[key]} {middle:+.{digits}f} ± {half:.{digits}f}, {_verdict(ours, theirs, key)}"


_VOXEL, _COLUMNS_SHOWN = 4, 3
_WINDOW_HU = (-1350.0, 150.0)


def picture() -> Image.Image:
    """The real nodule, and what each infill puts in its place."""
    image, mask = scan().lesion_patch()
    share = torch.nn.functional.max_pool3d(mask.float(), 5, stride=1, padding=2)
    question = Question(demo_model(), image, [Prepared(image[0], AFFINE)], [], Run())
    shown = {"the scan": image, "what is taken away": torch.where(share > 0, torch.ones_like(image), image)}
    for name in INFILLS:
        chosen = infill(question, name)
        for k in range(2 if chosen.random else 1):
            filled = torch.lerp(image, chosen.patches(Masks.everywhere(share), [k]), share)
            shown[f"{name}, draw {k + 1}" if chosen.random else name] = filled
    side, line = _VOXEL * image.shape[-1], 22
    middle = [int(i) for i in mask[0, 0].nonzero().float().mean(0).round()]
    rows = math.ceil(len(shown) / _COLUMNS_SHOWN)
    sheet = Image.new("L", (_COLUMNS_SHOWN * (2 * side + 14) - 10, rows * (side + line + 6)), 16)
    draw = ImageDraw.Draw(sheet)
    for k, (name, filled) in enumerate(shown.items()):
        x, y = k % _COLUMNS_SHOWN * (2 * side + 14), k // _COLUMNS_SHOWN * (side + line + 6)
        draw.text((x + 2, y + 3), name, 235, font=ImageFont.load_default(14))
        # Seen from the front and from the feet: the patient's right is on the left, anterior and superior are up.
        axial, coronal = filled[0, 0, :, :, middle[2]], filled[0, 0, :, middle[1], :]
        for i, plane in enumerate((axial, coronal)):
            hu = HU_RANGE[0] + (HU_RANGE[1] - HU_RANGE[0]) * plane.T.flip(0, 1)
            grey = (255 * (hu - _WINDOW_HU[0]) / (_WINDOW_HU[1] - _WINDOW_HU[0])).clamp(0, 255)
            part = Image.fromarray(grey.round().byte().numpy()).resize((side, side), Image.Resampling.BICUBIC)
            sheet.paste(part, (x + i * (side + 2), y + line))
    return sheet


if __name__ == "__main__":
    main()
