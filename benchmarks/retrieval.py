"""`python -m benchmarks.retrieval` measures how good the nodules are that are found for a nodule of another patient, by
each embedding that ships; benchmarks/results/retrieval.json and docs/cases.md have what it found."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
import typer
from torch import Tensor

import MedXAILib as mx
from benchmarks.measure import machine
from MedXAILib import resources
from MedXAILib.cases.nearest import FIRST, by_strongest
from MedXAILib.cases.spaces import Plain, Pooled, Saliency
from MedXAILib.synthetic.lung_nodules import ATTRIBUTES, CLASSES, Backgrounds, Nodules, synthesise
from MedXAILib.trust import retrieval

RESULTS = Path(__file__).resolve().parent / "results" / "retrieval.json"
QUERIES, LIBRARY = 450, 1350
"""Patches, of which two thirds have a nodule."""
SEEDS = {"queries": 12, "library": 11}
AT = 10
"""Cases that are looked at."""
RELEVANT = 4
"""Of five attributes so many are shared by what counts as relevant in measures without degrees."""
NEAR_MM = 3.0

_TOGETHER = 30


class Means(Pooled):
    """What most systems compare: the means of the last layer alone."""

    name = "means"
    title = "Means alone"

    def embed(self, model: mx.Model, x: Tensor, labels: object = None) -> Tensor:
        both = Plain().embed(model, x)
        return both[:, : both.shape[1] // 2]

    def places(self, model: mx.Model, x: Tensor) -> Any:
        raise NotImplementedError


EMBEDDINGS: dict[str, tuple[str, Pooled]] = {
    "means": ("lung_nodule", Means()),
    "plain": ("lung_nodule", Plain()),
    "saliency": ("lung_nodule", Saliency()),
    "triplet": ("lung_nodule_triplet", Plain()),
}
"""What is compared: networks and spaces. Those that are not there are left out."""
AGAINST = ("means", "plain")
"""Every embedding is compared with these."""


def nodules(backgrounds: Backgrounds, count: int, seed: int) -> Nodules:
    """The nodules among `count` patches."""
    made = synthesise(backgrounds, count, seed)
    there = made.labels > 0
    return Nodules(*(value[there] for value in vars(made).values()))


def shared(queries: Nodules, library: Nodules) -> np.ndarray:
    """How many of five attributes a query has in common with a case (Q, N): class, spiculation, part-solid or not,
    calcification, and a diameter of within 3 mm."""
    kinds = []
    for each in (queries, library):
        known = dict(zip(ATTRIBUTES, each.attributes.T, strict=True))
        solidity = known["solidity"]
        kinds.append(
            torch.stack(
                [
                    each.labels == 2,
                    known["spiculation"] > 0,
                    (solidity > 0.1) & (solidity < 0.9),
                    known["calcification"] > 0,
                ]
            )
        )
    alike = (kinds[0][:, :, None] == kinds[1][:, None, :]).sum(0)
    sizes = [each.attributes[:, ATTRIBUTES.index("diameter_mm")] for each in (queries, library)]
    return (alike + ((sizes[0][:, None] - sizes[1][None]).abs() <= NEAR_MM)).double().numpy()


def embedded(model: mx.Model, space: Pooled, images: Tensor) -> np.ndarray:
    """The vectors (N, K) of patches."""
    return torch.cat([space.embed(model, part) for part in images.split(_TOGETHER)]).numpy()


def reordered(model: mx.Model, similarity: np.ndarray, queries: Tensor, library: Tensor) -> np.ndarray:
    """The `similarity` (Q, N) with the first 100 of each query in the order of their regions."""
    asked, held = (
        torch.cat([Plain().regions(model, part) for part in images.split(_TOGETHER)]).half().numpy()
        for images in (queries, library)
    )
    found = similarity.copy()
    for q, regions in enumerate(asked):
        for n in np.argsort(-similarity[q], kind="stable")[:FIRST]:
            found[q, n] = 2 + by_strongest(regions, held[n])
    return found


def row(values: Mapping[str, np.ndarray], against: Mapping[str, np.ndarray], classes: list[str]) -> dict[str, Any]:
    """Each measure with its 95 % interval, nDCG of each class of nodules, and by how much that of all is higher than
    those `against`."""
    name = f"nDCG@{AT}"
    return {
        **{measure: retrieval.interval(value) for measure, value in values.items()},
        **{f"{name} of {one}": v[name] for one, v in retrieval.stratified({name: values[name]}, classes).items()},
        **{f"lead over {other}": retrieval.interval(values[name] - than) for other, than in against.items()},
    }


def measure(queries: Nodules, library: Nodules) -> dict[str, dict[str, Any]]:
    """What each embedding finds, and by chance."""
    relevance = shared(queries, library)
    chance = np.random.default_rng(0).random(relevance.shape)
    networks = {name: network for name, (network, _) in EMBEDDINGS.items() if _there(network)}
    models = {network: mx.load_model(resources.path(f"Models/{network}")) for network in {*networks.values()}}
    similarity, extra = {"chance": chance}, dict[str, dict[str, Any]]()
    for name, network in networks.items():
        model, space = models[network], EMBEDDINGS[name][1]
        started = time.process_time()
        held, asked = (embedded(model, space, each.images) for each in (library, queries))
        similarity[name] = space.similarity(asked, held)
        seconds = (time.process_time() - started) / (len(held) + len(asked))
        stays = retrieval.consistency(space, model, queries.images[:100], held, AT)
        moved = space.similarity(embedded(model, space, queries.images.roll(1, -1)), held)
        good = retrieval.measured(retrieval.ranking(moved, relevance), AT, RELEVANT)[f"nDCG@{AT}"]
        extra[name] = {
            "dimension": held.shape[1],
            "seconds": seconds,
            "moved by a voxel": retrieval.interval(good),
            **{f"stays with {change}": retrieval.interval(value) for change, value in stays.items()},
        }
        print(name, flush=True)
    base = models[EMBEDDINGS["plain"][0]]
    similarity["plain, by regions"] = reordered(base, similarity["plain"], queries.images, library.images)
    values = {
        name: retrieval.measured(retrieval.ranking(value, relevance), AT, RELEVANT)
        for name, value in similarity.items()
    }
    against = {name: values[name][f"nDCG@{AT}"] for name in AGAINST}
    classes = [CLASSES[label] for label in queries.labels.tolist()]
    return {
        name: {**row(value, {n: v for n, v in against.items() if n != name}, classes), **extra.get(name, {})}
        for name, value in values.items()
    }


def _there(network: str) -> bool:
    try:
        return resources.path(f"Models/{network}").exists()
    except mx.MedXAIError:
        return False


def table(results: Mapping[str, Any]) -> str:
    """What was measured, for a page."""
    leads = [f"lead over {name}" for name in AGAINST]
    columns = [
        f"nDCG@{AT}",
        *leads,
        f"P@{AT}",
        "mAP",
        "MRR",
        "moved by a voxel",
        "stays with noise",
        "stays with shift",
    ]
    lines = [f"| | {' | '.join(columns)} |", "| --- |" + " ---: |" * len(columns)]
    for name, found in results["embeddings"].items():
        lines.append(f"| {name} | {' | '.join(_cell(found.get(column)) for column in columns)} |")
    return "\n".join(lines)


def _cell(value: tuple[float, float, float] | None) -> str:
    return "" if value is None else f"{value[0]:.3f} ({value[1]:.3f} to {value[2]:.3f})"


def main(queries: int = QUERIES, library: int = LIBRARY) -> None:
    torch.set_num_threads(1)
    asked = nodules(Backgrounds.test(), queries, SEEDS["queries"])
    held = nodules(Backgrounds.training(), library, SEEDS["library"])
    results = {
        "machine": machine(),
        "queries": len(asked),
        "library": len(held),
        "relevance": "shared of class, spiculation, part-solid, calcification, diameter within 3 mm",
        "embeddings": measure(asked, held),
    }
    if (queries, library) == (QUERIES, LIBRARY):
        RESULTS.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    print(table(results))


if __name__ == "__main__":
    typer.run(main)
