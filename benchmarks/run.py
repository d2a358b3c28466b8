"""Measure cases: `python -m benchmarks.run --case gradcam --model resnet18 --size 96`, `--all` or `--small`."""

from __future__ import annotations

import json
import platform
from collections.abc import Callable
from datetime import datetime, timezone
from pathlib import Path
from statistics import median
from typing import Annotated, Any

import torch
import typer
from torch import Tensor

from benchmarks import measure, peers, table
from benchmarks.cases import CASES, NETWORKS, Case, Row, network

SMALL = (("gradcam", "resnet18-medicalnet", 64), ("gradient", "densenet121", 64))
"""What continuous integration can afford. A goal counts there when it is missed by more than SLACK."""
SLACK = 0.3
DISTRIBUTIONS = (
    "medxai",
    "torch",
    "numpy",
    "monai",
    "captum",
    "medcam",
    "grad-cam",
    "torchcam",
    "zennit",
    "shap",
    "lxt",
    "lime",
)

app = typer.Typer(add_completion=False)


@app.command()
def main(
    case: Annotated[str, typer.Option(help=f"one of {', '.join(CASES)}")] = "gradcam",
    model: Annotated[str, typer.Option(help=f"one of {', '.join(NETWORKS)}")] = "resnet18-medicalnet",
    size: Annotated[int, typer.Option(help="side of the volume, in voxels")] = 96,
    threads: Annotated[int, typer.Option(help="of PyTorch; processor time compares only at 1")] = 1,
    reps: Annotated[int | None, typer.Option(help="repetitions, after one that does not count")] = None,
    every: Annotated[bool, typer.Option("--all", help="every case on every network it is for: four hours")] = False,
    small: Annotated[bool, typer.Option(help="a few minutes; fails when a goal is far off; keeps nothing")] = False,
    results: Annotated[
        Path, typer.Option(help="where to keep what was measured; the page is of the default")
    ] = table.RESULTS,
) -> None:
    """Measure MedXAI and its peers on the same work, in one process."""
    full = [(c, m, s) for c, known in CASES.items() for m, s in known.sizes.items()]
    far_off = False
    for name, of, side in SMALL if small else full if every else [(case, model, size)]:
        result = run(name, of, side, threads, reps, processes=1 if small else CASES[name].processes)
        print(table.section(result), flush=True)
        far_off |= any((goal["missed_by"] or 0) > SLACK for goal in result["goals"])
        if not small:
            results.mkdir(parents=True, exist_ok=True)
            text = json.dumps(result, indent=1, ensure_ascii=False) + "\n"
            (results / f"{name}-{of}-{side}.json").write_text(text, encoding="utf-8")
    if small:
        raise typer.Exit(int(far_off))
    if results == table.RESULTS:
        table.write()


def run(name: str, model: str, size: int, threads: int, reps: int | None, processes: int) -> dict[str, Any]:
    """Case `name` on network `model` and a volume of `size`: everything that was measured, as JSON."""
    case, reps, x = CASES[name], reps or CASES[name].reps, NETWORKS[model].scan(size)
    torch.set_num_threads(threads)
    bare = network(model)

    def forward() -> Tensor:
        with torch.inference_mode():
            return bare(x)

    forward()
    ready: dict[str, Any] = {}
    rows: dict[str, dict[str, Any]] = {}
    maps: dict[str, Tensor] = {}
    for row in case.rows:
        try:
            peer = _peer(case, row, model)
            maps[row.name] = peer(x).detach()
            ready[row.name] = peer
        except Exception as error:  # whatever it is that a peer raises, the table says so
            rows[row.name] = {"status": "fails", "reason": _words(error)}
    right = _right(case, ready, maps, model, x)
    for row in case.rows:
        if row.name in ready:
            rows[row.name] = _agreement(case, row, ready[row.name], maps, right, x)

    works: dict[str, Callable[[], object]] = {"forward": forward}
    works |= {of: lambda peer=peer: peer(x) for of, peer in ready.items()}  # type: ignore[misc]
    taken = measure.interleaved(works, reps)
    unit = [t.cpu for t in taken["forward"]]
    ours = [t.cpu for t in taken[case.rows[0].name]]
    for row in case.rows:
        if row.name not in ready:
            continue
        cpu = [t.cpu for t in taken[row.name]]
        forwards = [c / u for c, u in zip(cpu, unit, strict=True)]
        rows[row.name] |= {
            "cpu_seconds": median(cpu),
            "wall_seconds": median(t.wall for t in taken[row.name]),
            "forwards": median(forwards),
            "forwards_range": [min(forwards), max(forwards)],
        }
        if rows[row.name]["status"] == "same":
            rows[row.name]["ratio"] = median(c / o for c, o in zip(cpu, ours, strict=True))
        rows[row.name] |= _in_fresh_processes(processes, name, row, model, size, threads)
    return {
        "case": name,
        "title": case.title,
        "model": model,
        "size": size,
        "layer": NETWORKS[model].layer,
        "threads": threads,
        "repetitions": reps,
        "measured": datetime.now(timezone.utc).isoformat(timespec="minutes"),
        "machine": measure.machine(),
        "versions": {"python": platform.python_version()} | {d: peers.version(d) for d in DISTRIBUTIONS},
        "forward": _rounded({"cpu_seconds": median(unit), "wall_seconds": median(t.wall for t in taken["forward"])}),
        "rows": [{"name": row.name, "note": row.note} | _rounded(rows[row.name]) for row in case.rows],
        "goals": [_rounded(goal.measured(rows)) for goal in case.goals],
    }


def _peer(case: Case, row: Row, model: str) -> Any:
    return peers.make(row.package, case.method, network(model), NETWORKS[model].layer, case.classes, row.parameters)


def _right(case: Case, ready: dict[str, Any], maps: dict[str, Tensor], model: str, x: Tensor) -> Tensor:
    """The maps that all should find: those of the case's reference, else MedXAI's, at the layer where there is one."""
    ours = case.rows[0].name
    if case.reference is not None:
        right = _peer(case, case.reference, model)(x)
    else:
        right = ready[ours].at_layer(x) if hasattr(ready[ours], "at_layer") else maps[ours]
    if not bool(right.flatten(1).any(1).all()):
        raise RuntimeError(f"The right map of {case.title} on {model} is empty: it cannot tell anything.")
    return right


def _agreement(case: Case, row: Row, peer: Any, maps: dict[str, Tensor], right: Tensor, x: Tensor) -> dict[str, Any]:
    """How far a row's maps are from what they should be, and whether that is the same work as MedXAI's."""
    ours = case.rows[0].name
    same_hands = row.package == "medxai" and case.reference is None
    expected = maps[ours] if same_hands else peer.expected(right, x.shape[2:])
    error = _distance(maps[row.name], expected)
    found: dict[str, Any] = {"error": error, "difference": float((maps[row.name] - expected).abs().max())}
    if case.best:
        found["found"] = _found(maps[row.name], expected, case.best)
    allowed = max(case.tolerance, _distance(maps[ours], right)) if case.reference is not None else case.tolerance
    if error <= allowed:
        return {"status": "same", **found}
    return {"status": "different work", **found, "reason": f"{error:.2g} from the map it should give"}


def _distance(found: Tensor, right: Tensor) -> float:
    """Relative L2 distance."""
    found, right = found.reshape(right.shape).double(), right.double()
    return float((found - right).norm() / right.norm())


def _found(found: Tensor, right: Tensor, best: int) -> int:
    """How many of the `best` places of the `right` map are among the best of the map that was found."""
    one, other = (set(t.abs().flatten().topk(best).indices.tolist()) for t in (found, right))
    return len(one & other)


def _in_fresh_processes(count: int, name: str, row: Row, model: str, size: int, threads: int) -> dict[str, Any]:
    arguments = (_first_call, name, row.name, model, size, threads)
    try:
        found = [measure.in_fresh_process(*arguments) for _ in range(count)]
    except Exception as error:  # such as the process having been killed when memory ran out
        return {"peak_mb": None, "first_forwards": None, "reason": _words(error)}
    return {key: median(f[key] for f in found) for key in found[0]}


def _first_call(name: str, row_name: str, model: str, size: int, threads: int) -> dict[str, Any]:
    """The first call of a row in a process that has so far done one forward: its peak memory and its time."""
    torch.set_num_threads(threads)
    case, x, bare = CASES[name], NETWORKS[model].scan(size), network(model)
    row = next(r for r in case.rows if r.name == row_name)
    peer, peak = _peer(case, row, model), []  # type: ignore[var-annotated]

    def forward() -> None:
        with torch.inference_mode():
            bare(x)

    forward()
    unit = measure.Seconds.of(forward).cpu
    with measure.growth(peak):
        first = measure.Seconds.of(lambda: peer(x)).cpu
    return {"peak_mb": peak[0] / 2**20, "first_forwards": first / unit}


def _words(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0][:160] if lines else ''}"


def _rounded(values: dict[str, Any]) -> dict[str, Any]:
    """Four significant digits, which is more than repeats."""

    def short(value: Any) -> Any:
        return float(f"{value:.4g}") if isinstance(value, float) else value

    return {k: [short(i) for i in v] if isinstance(v, list) else short(v) for k, v in values.items()}


if __name__ == "__main__":
    app()
