"""How costs grow: python -m benchmarks.curves [CURVE ...], each as a CSV file and a figure for docs/benchmarks.md."""

from __future__ import annotations

import csv
from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime, timezone
from functools import cache
from pathlib import Path
from typing import Annotated, Any

import matplotlib
import torch
import typer
from matplotlib import pyplot

import MedXAILib as mx
from benchmarks import peers, table
from benchmarks.cases import NETWORKS, network, windows
from benchmarks.measure import Seconds, machine
from MedXAILib.engines.shapley import student
from MedXAILib.engines.sliding_window import Windows
from MedXAILib.window import Window

RESNET, CLASS = "resnet18-medicalnet", 1
# So many of the windows stand for all in the loop by hand, which takes as long for any.
SOME = 16
ORDERS = 20
ERROR = 0.1
# The window of the network, its overlap, and the box that is covered.
ROI, OVERLAP, BOX = 96, 0.5, 16

Values = dict[str, float]
"""The height of each line at a point."""


@dataclass(frozen=True)
class Curve:
    """What `at` says of each of the `points`."""

    caption: str
    x: str
    y: str
    points: tuple[int, ...]
    at: Callable[[int], Values]


@cache
def _peer(package: str, method: str, **setting: Any) -> peers.Peer:
    return peers.make(package, method, network(RESNET), NETWORKS[RESNET].layer, [CLASS], setting)


def _occlusion(size: int, stride: int) -> Values:
    """Seconds of processor time for a map."""
    x, place = NETWORKS[RESNET].scan(size), {"window": 16, "stride": stride}
    ours = _peer("medxai", "Occlusion", **place)
    loop = _peer("pytorch", "SomeWindows", **place, batch=8, count=SOME)
    loop(x)  # What PyTorch does the first time only does not count.
    each = Seconds.of(lambda: loop(x)).cpu / (SOME + 1)
    return {"MedXAI": Seconds.of(lambda: ours(x)).cpu, "batched loop": each * (len(windows(x, **place)) + 1)}


def _at_size(size: int) -> Values:
    return _occlusion(size, 16)


def _at_stride(stride: int) -> Values:
    return _occlusion(96, stride)


def _evaluations(per_side: int) -> Values:
    """Forwards to a standard error of ERROR of the map's norm, from that after ORDERS, for it falls as 1 / sqrt(n)."""
    x = NETWORKS["lung-nodule"].scan(40)
    size = x.shape[-1] / per_side
    setting = {"supervoxels": "grid", "size_mm": size, "infill": "zero", "permutations": ORDERS}
    found = mx.explain(mx.Model(network("lung-nodule")), x, "permutation_shap", target=2, **setting)
    assert found.interval is not None
    noise = (found.interval / student(ORDERS - 1)).square().sum()
    orders = ORDERS * noise / (found.data.square().sum() - noise) / ERROR**2
    return {"permutation_shap": float(orders) * 2 * (per_side**3 - 1) + 2}


def _calls(slices: int) -> Values:
    """Calls of the network for a map of a whole CT with boxes side by side."""
    shape = (slices, 512, 512)
    every = Windows(Window((ROI,), OVERLAP), shape)
    boxes, touched = 1, 1
    # A window is touched where it is along each axis, so the sums over boxes multiply.
    for axis, length in enumerate(every.size):
        low = every.low[:, axis].unique()
        starts = torch.arange(0, length, BOX)[:, None]
        boxes *= len(starts)
        touched *= int(((low < starts + BOX) & (low + every.roi[axis] > starts)).sum())
    return {"all windows again": len(every) * (boxes + 1), "windows that a box touches": len(every) + touched}


CURVES = {
    "occlusion-size": Curve(
        "Occlusion of ResNet18 with MedicalNet's stem, windows of 16 voxels side by side, against the size of the "
        f"volume. The loop's time is that for {SOME} windows drawn from all, times their number.",
        "voxels per side",
        "processor time (s)",
        (48, 64, 80, 96, 128, 160),
        _at_size,
    ),
    "occlusion-windows": Curve(
        "The same at 96 voxels per side, against the stride, from 64 windows (32) to 343 (14).",
        "stride (voxels)",
        "processor time (s)",
        (32, 20, 16, 14),
        _at_stride,
    ),
    "shapley-supervoxels": Curve(
        f"Evaluations that Permutation SHAP takes to a standard error of {ERROR:.0%} of the map (relative L2 norm) for "
        f"the shipped lung nodule network, from the spread of {ORDERS} orders. An odd number per side leaves one in "
        "the middle of the nodule, an even number parts the nodule among eight.",
        "supervoxels per side",
        "evaluations",
        (3, 4, 5, 6, 7),
        _evaluations,
    ),
    "window-reuse": Curve(
        f"Calls of a network that looks at a CT of 512 x 512 voxels a slice through a window of {ROI} voxels a side "
        f"(overlap {OVERLAP:g}), for occlusion with boxes of {BOX} voxels side by side: counted, not run.",
        "slices",
        "network calls",
        (100, 200, 300, 400, 600, 800),
        _calls,
    ),
}


def main(
    names: Annotated[list[str] | None, typer.Argument(help=f"of {', '.join(CURVES)}; all if left out")] = None,
    points: Annotated[str, typer.Option(help="other points, such as 48,64, to try it: keeps nothing")] = "",
) -> None:
    torch.set_num_threads(1)
    for name in names or CURVES:
        curve, rows = CURVES[name], []
        for point in map(int, points.split(",")) if points else curve.points:
            rows.append({curve.x: point} | {line: float(f"{y:.4g}") for line, y in curve.at(point).items()})
            print(name, rows[-1], flush=True)
        if not points:
            keep(name, curve, rows)
            table.write()


def keep(name: str, curve: Curve, rows: list[Values]) -> None:
    """Write the CSV file, whose first line says what it is of, and the figure."""
    caption, (first, *others) = curve.caption, list(rows[0])[1:]
    for other in others:
        times = ", ".join(f"{row[other] / row[first]:.3g}" for row in rows)
        caption += f" {other.capitalize()} over {first}: {times}."
    table.CURVES.mkdir(parents=True, exist_ok=True)
    with (table.CURVES / f"{name}.csv").open("w", encoding="utf-8", newline="") as file:
        today = datetime.now(timezone.utc).date()
        file.write(f"# {caption} {machine()['processor']}, 1 thread, torch {torch.__version__}, {today}.\n")
        writer = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    draw(curve, rows, table.figure(name))


def draw(curve: Curve, rows: list[Values], path: Path) -> None:
    """The lines on logarithmic axes, the same file for the same rows."""
    matplotlib.rcParams |= {"svg.hashsalt": "medxai", "svg.fonttype": "none", "font.size": 11}
    figure, axes = pyplot.subplots(figsize=(6, 4), layout="constrained")
    at = [row[curve.x] for row in rows]
    for line in list(rows[0])[1:]:
        axes.plot(at, [row[line] for row in rows], marker="o", label=line)
    axes.set(xscale="log", yscale="log", xlabel=curve.x, ylabel=curve.y)
    axes.set_xticks(at, [f"{x:g}" for x in at])
    axes.minorticks_off()
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    figure.savefig(path, metadata={"Date": None})
    pyplot.close(figure)


if __name__ == "__main__":
    typer.run(main)
