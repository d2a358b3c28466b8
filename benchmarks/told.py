"""`python -m benchmarks.told` measures whether words and concepts depend on what the network learnt, and whether they
stay with faint noise; benchmarks.trust puts it in docs/measured-table-5.md."""

from __future__ import annotations

import json
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

import MedXAILib as mx
from benchmarks.measure import machine
from benchmarks.sanity import patches
from MedXAILib.trust import telling
from MedXAILib.trust.evaluation import means
from MedXAILib.trust.stability import NOISE

RESULTS = Path(__file__).resolve().parent / "results" / "told.json"
NETWORKS = {
    "captioning": "lung_nodule_captioning",
    "visual_captioning": "lung_nodule_visual_captioning",
    "semantic": "lung_nodule_semantic",
}
CASES = 24
COLUMNS = ("scrambled: alike", "noise: alike", "forwards", "backwards")


def measured(method: str, count: int) -> list[dict[str, float]]:
    """What is found of each of `count` nodules."""
    # Which puts this into its page.
    from benchmarks.trust import cases

    model, bare = patches.demo_model(NETWORKS[method]), getattr(mx.methods()[method], "bare", {})
    found = []
    for case in cases(count):
        volume = case.volume
        assert isinstance(volume, mx.Volume)
        generator = torch.Generator().manual_seed(0)
        noise = NOISE * volume.data.std() * torch.randn(volume.data.shape, generator=generator)
        told = mx.tell(model, volume, method, None, case.region)
        again = mx.tell(model, replace(volume, data=volume.data + noise), method, None, case.region, **bare)
        judged = telling.judge(told, model, volume)
        values = (judged.values["likeness"], telling.likeness(told, again), *_cost(told))
        found.append(dict(zip(COLUMNS, values, strict=True)))
        print(method, len(found), {name: round(value, 3) for name, value in found[-1].items()}, flush=True)
    return found


def _cost(told: mx.Explanation) -> tuple[float, float]:
    return float(told.provenance.forwards), float(told.provenance.backwards)


def section(results: Mapping[str, Any]) -> str:
    """What was measured, as a part of the page."""
    lines = [
        "## Words and concepts",
        "",
        "The same two questions of what is no map, which the survey finds asked by nobody (its section 4.3): how alike "
        "is what is said when the upper third of the weights is drawn again (the less, the better), and with 1 % of "
        "noise (the more, the better)? Alike is ROUGE-L of captions, and the correlation of the concepts' shares. How "
        "often they are right stands in [demo-networks.md](demo-networks.md); `tcav` and `rcv` in "
        "[concepts.md](concepts.md).",
        "",
        f"| | cases | {' | '.join(COLUMNS)} |",
        "| --- |" + " ---: |" * (len(COLUMNS) + 1),
    ]
    for method, found in results.items():
        summed: Mapping[str, float] = means(found)
        cells = [f"{summed[name]:.2f} ± {summed[f'{name} ±']:.2f}" for name in COLUMNS]
        lines.append(f"| {mx.methods()[method].title} | {len(found)} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def known() -> dict[str, Sequence[Mapping[str, float]]]:
    """What has been measured, by method."""
    return dict(json.loads(RESULTS.read_text(encoding="utf-8"))["methods"]) if RESULTS.exists() else {}


def main(count: Annotated[int, typer.Option("--cases", help="nodules")] = CASES) -> None:
    """Measure all of them anew."""
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore", module=r"(monai|torch)\b")
    found = {method: measured(method, count) for method in NETWORKS}
    RESULTS.write_text(json.dumps({"machine": machine(), "methods": found}) + "\n", encoding="utf-8")


if __name__ == "__main__":
    typer.run(main)
