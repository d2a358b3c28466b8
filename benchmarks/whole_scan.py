"""Occlusion of a whole scan that a network looks at window by window: python -m benchmarks.whole_scan [SCAN]

How often the network is asked when only the windows are asked again that a covered box touches, beside inference of the
whole scan for every box; and whether that says the same. The network is the shipped one that segments lung nodules.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
from torch import Tensor
from torch.nn import functional

import MedXAILib as mx
from benchmarks.measure import Seconds, growth, machine
from MedXAILib.engines.boxes import put
from MedXAILib.engines.by_window import ByWindow
from MedXAILib.engines.whole_scan import WholeScan
from MedXAILib.model import Prepared
from MedXAILib.resources import path
from MedXAILib.run import Run

RESULTS = Path(__file__).parent / "results" / "whole_scan"
BOX = (16, 16, 16)
SAMPLE = path("SampleData/chest_ct_nodule.nrrd")
# Boxes near the nodule lie within so many mm of its middle.
NEAR = 40.0


def main(
    scan: Annotated[Path, typer.Argument(help="A chest CT.")] = SAMPLE,
    positions: Annotated[int, typer.Option(help="How many boxes are covered.")] = 200,
    naive: Annotated[int, typer.Option(help="For how many of each kind the whole scan is asked again.")] = 2,
    threads: Annotated[int, typer.Option(help="Threads to compute with.")] = 1,
) -> None:
    torch.set_num_threads(threads)
    model, volume = mx.load_model(path("Models/lung_nodule_segmentation")), mx.load_volume(scan)
    with model.ready(), torch.no_grad():
        found = measured(model, volume, positions, naive)
    size = " x ".join(map(str, volume.shape[::-1]))
    text = json.dumps({"scan": f"{size} chest CT", **found, "threads": threads, "machine": machine()}, indent=2)
    RESULTS.mkdir(parents=True, exist_ok=True)
    (RESULTS / f"{size.replace(' ', '')}.json").write_text(text + "\n", encoding="utf-8")
    print(text)


def measured(model: mx.Model, volume: mx.Volume, positions: int, naive: int) -> dict[str, Any]:
    """What `positions` boxes cost, by target and by where the boxes are."""
    prepared = model.prepare(volume)
    nodule, middle = predicted(model, prepared)
    anywhere = places(prepared, positions, None)
    near = places(prepared, positions, middle)
    where, everywhere = mx.SegmentationTarget("nodule", nodule), mx.SegmentationTarget("nodule", "everywhere")
    cases = {
        "nodule (logit), boxes near": (where, near),
        "nodule (volume), boxes near": (mx.SegmentationTarget("nodule", nodule, "volume"), near),
        "nodule (logit), boxes anywhere": (where, anywhere),
        "all of the scan (logit), boxes anywhere": (everywhere, anywhere),
    }
    question = {name: asked(model, prepared, target) for name, (target, _) in cases.items()}
    rows, values = {}, {}
    for name, (_, low) in cases.items():
        rows[name], values[name] = row(question[name], low)
    # Compared where most changes, because elsewhere anything would agree.
    for low, decisive in ((near, "nodule (logit), boxes near"), (anywhere, "all of the scan (logit), boxes anywhere")):
        change = (values[decisive] - rows[decisive]["value"]).abs()
        most = change.argsort(descending=True)[:naive]
        outputs, seconds = whole(model, prepared, low[most])
        for name in [name for name, (_, places) in cases.items() if places is low]:
            exact = torch.cat([question[name].bound[0].value(output) for output in outputs])
            rows[name] |= agreement(values[name][most], exact, rows[name]["value"])
            rows[name]["naive seconds"] = seconds * (len(low) + 1)
    return {"voxels": list(prepared.x.shape[1:]), "box": list(BOX), "boxes": positions, "rows": rows}


def asked(model: mx.Model, prepared: Prepared, target: mx.Target) -> WholeScan:
    return WholeScan(model, prepared.x[None], [prepared], [target], Run())


def predicted(model: mx.Model, prepared: Prepared) -> tuple[mx.Volume, np.ndarray]:
    """Where the network sees the surest nodule, and its middle in voxels."""
    soft = model.forward(prepared.x[None]).softmax(1)[:, 1:]
    smooth = functional.avg_pool3d(soft, 9, stride=1, padding=4)
    middle = np.array(np.unravel_index(int(smooth.argmax()), smooth.shape[2:]))
    mask = torch.zeros_like(soft[0])
    reach = [
        slice(max(0, m - round(NEAR / s)), m + round(NEAR / s)) for m, s in zip(middle, prepared.spacing, strict=True)
    ]
    mask[(slice(None), *reach)] = (soft[0][(slice(None), *reach)] > 0.5).float()
    return mx.Volume(mask, prepared.affine), middle


def places(prepared: Prepared, count: int, middle: np.ndarray | None) -> Tensor:
    """Where `count` boxes begin (M, 3): anywhere, or near `middle`."""
    random = np.random.default_rng(0)
    most = np.array(prepared.x.shape[1:]) - BOX
    if middle is None:
        return torch.from_numpy(random.integers(0, most + 1, (count, 3)))
    reach = np.round(NEAR / np.array(prepared.spacing)).astype(int)
    low = middle - np.array(BOX) // 2 + random.integers(-reach, reach + 1, (count, 3))
    return torch.from_numpy(np.clip(low, 0, most))


def patches(prepared: Prepared, low: Tensor) -> Tensor:
    """What the boxes are covered with: the scan's mean."""
    return prepared.x.mean().expand(len(low), 1, *BOX)


def whole(model: mx.Model, prepared: Prepared, low: Tensor) -> tuple[list[Tensor], float]:
    """What the network says of the whole scan for each box, and the seconds of processor time that took."""
    outputs = []

    def ask() -> None:
        for place in low.split(1):
            x = prepared.x[None].clone()
            put(x, torch.zeros_like(place), patches(prepared, place), place)
            outputs.append(model.forward(x))

    return outputs, Seconds.of(ask).cpu / len(low)


def row(question: WholeScan, low: Tensor) -> tuple[dict[str, Any], Tensor]:
    """What boxes at `low` (M, 3) cost, and the values (M,)."""
    peak: list[int] = []
    found: list[Tensor] = []

    def ask() -> None:
        evaluator = ByWindow(question, BOX)
        for some in low.split(evaluator.size):
            found.append(evaluator.values(patches(question.seen[0], some), some)[0])

    with growth(peak):
        seconds = Seconds.of(ask)
    values, windows, calls = torch.cat(found), len(question.windows), question.run.cost.forwards
    at_scan = float(question.values(question.x)[0])
    return {
        "value": at_scan,
        "largest change": float((values - at_scan).abs().max()),
        "calls": calls,
        "calls of the scan itself": windows,
        "naive calls": windows * (len(low) + 1),
        "fewer calls": windows * (len(low) + 1) / calls,
        "seconds": seconds.cpu,
        "memory (MB)": peak[0] / 1e6,
    }, values


def agreement(values: Tensor, exact: Tensor, at_scan: float) -> dict[str, Any]:
    """By how much `values` (M,) differ from those of inference of the whole scan."""
    return {
        "compared with inference of the whole scan": len(exact),
        "largest difference": float((values - exact).abs().max()),
        "largest difference, relative": float(((values - exact) / exact).abs().max()),
        "smallest change among them": float((exact - at_scan).abs().min()),
    }


if __name__ == "__main__":
    typer.run(main)
