"""`python -m benchmarks.sanity` measures the rows that are missing, and writes docs/sanity.md."""

from __future__ import annotations

import json
import platform
import time
from collections.abc import Callable
from datetime import datetime, timezone
from typing import Annotated, Any

import torch
import typer

from benchmarks import measure, peers
from benchmarks.sanity import page, rows, width
from benchmarks.sanity.bench import Bench

DISTRIBUTIONS = ("medxai", "torch", "numpy", "monai")

app = typer.Typer(add_completion=False)


@app.command()
def main(
    only: Annotated[
        list[str] | None, typer.Option(help="a method to measure again, by its id; may be repeated")
    ] = None,
    every: Annotated[bool, typer.Option("--all", help="measure all of them again: some ten minutes")] = False,
) -> None:
    """Where the maps of every method are, and whether they change with the weights, on the demo network."""
    torch.set_num_threads(1)
    again = set(only or ())
    bench = None
    for row in rows.every():
        if every or row.method in again or not _kept(row.slug, row.described):
            bench = bench or Bench()
            _keep(row.slug, row.described, lambda row=row, bench=bench: bench.measured(row))  # type: ignore[misc]
    if every or again & set(width.METHODS) or not _kept(page.WIDTH, width.DESCRIBED):
        _keep(page.WIDTH, width.DESCRIBED, width.measured)
    page.write()


def _kept(name: str, described: dict[str, Any]) -> bool:
    """Whether it was measured with the settings it has now."""
    path = page.RESULTS / f"{name}.json"
    return path.exists() and described.items() <= json.loads(path.read_text(encoding="utf-8")).items()


def _keep(name: str, described: dict[str, Any], work: Callable[[], dict[str, Any]]) -> None:
    started = time.process_time()
    result = {
        **described,
        **page.rounded(work()),
        "cpu_seconds": round(time.process_time() - started, 1),
        "measured": datetime.now(timezone.utc).isoformat(timespec="minutes"),
        "machine": measure.machine(),
        "versions": {"python": platform.python_version()} | {d: peers.version(d) for d in DISTRIBUTIONS},
    }
    page.RESULTS.mkdir(parents=True, exist_ok=True)
    text = json.dumps(result, indent=1, ensure_ascii=False) + "\n"
    (page.RESULTS / f"{name}.json").write_text(text, encoding="utf-8")
    print(f"{name}: {result['cpu_seconds']} s {result.get('refused', '')}", flush=True)


if __name__ == "__main__":
    app()
