"""`python -m benchmarks.trust` measures what is missing and writes docs/measured-table-5.md: how right, robust and
costly every method is on the demo network, by the checks of the trust card, and what these make of maps that know
nothing. With `--workers 16 --device cuda` it does so in processes that share a graphics card."""

from __future__ import annotations

import json
import math
import multiprocessing
import os
import warnings
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from statistics import mean
from typing import Annotated, Any

import numpy as np
import SimpleITK as sitk
import torch
import typer
from scipy.stats import spearmanr

import MedXAILib as mx
from benchmarks import told
from benchmarks.blind import BLIND
from benchmarks.measure import machine
from benchmarks.sanity import patches, rows
from MedXAILib.explainer import Technique
from MedXAILib.registry import EXPLAINERS
from MedXAILib.run import Run
from MedXAILib.synthetic.lung_nodules import CLASSES, SPACING_MM, synthesise
from MedXAILib.synthetic.whole_lungs import crops
from MedXAILib.trust import additivity, discrimination, faithfulness, randomisation, retraining, stability, validity
from MedXAILib.trust.evaluation import Asked, means, numbers
from MedXAILib.trust.evaluation import results as evaluated
from MedXAILib.trust.finding import Light, light
from MedXAILib.visual.perturbing import Perturbing

ROOT = Path(__file__).resolve().parents[1]
RESULTS, PAGE = ROOT / "benchmarks" / "results" / "trust", ROOT / "docs" / "measured-table-5.md"
CASES, FEW, SEED = 204, 12, 402
SLICE = 12
"""Cases that a process takes at once; one where a single one takes long."""

NETWORKS = {"attention": "lung_nodule_attention", "mil": "lung_mil_attention"}
"""What explains itself is of a network that does; all else is of `lung_nodule`."""

SLOW = frozenset({"mil", "scorecam", "deep_shap", "gradient_shap"})
"""These ask about many scans for each map, as the methods do that perturb."""

COLUMNS = {
    "validity: pointing": "hit",
    "validity: mass": "mass",
    "validity: auprc": "AUPRC",
    "faithfulness: blur: score": "faithful",
    "additivity: sensitivity-n": "amounts",
    "randomisation: likeness": "scrambled: alike",
    "permuted: likeness": "permuted labels: alike",
    "discrimination: likeness": "runner-up: alike",
    "stability: noise": "noise: alike",
    "stability: sensitivity": "noise: change",
    "stability: shift": "shift: alike",
    "repeatability: likeness": "retrained: alike",
    "cost: forwards": "forwards",
    "cost: backwards": "backwards",
}
LIGHTS = {"good": 1.0, "fair": 0.5, "poor": 0.0}
SHARE = 0.05
"""Of the maps that know nothing, those that a light may take for good."""


@dataclass(frozen=True)
class Limit:
    """What the light of a check goes by: the worst of `values`, which is good from `good` on and fair from `fair`."""

    values: tuple[str, ...]
    good: float
    fair: float

    @property
    def more(self) -> bool:
        """Whether more is better."""
        return self.good > self.fair

    def of(self, case: Mapping[str, Any]) -> float | None:
        """The value of a case that has it."""
        found = [case["values"][name] for name in self.values if name in case["values"]]
        return (min if self.more else max)(found) if found else None

    def calibrated(self, blind: Sequence[float]) -> float:
        """To two digits the limit that lets as many of the maps that know nothing be good as `SHARE` says, or fewer."""
        first_that_must_not = sorted(blind, reverse=self.more)[int(SHARE * len(blind))]
        hundreds = round(100 * first_that_must_not, 6)
        return (math.floor(hundreds) + 1 if self.more else math.ceil(hundreds) - 1) / 100

    def lets(self, value: float, good: float) -> bool:
        """Whether a value is good by the limit `good`."""
        return value >= good if self.more else value <= good


LIMITS = {
    "validity": Limit(("validity: gain",), validity._GOOD, validity._FAIR),
    "randomisation": Limit(("randomisation: likeness",), randomisation._GOOD, randomisation._FAIR),
    "faithfulness": Limit(("faithfulness: blur: score",), faithfulness._GOOD, faithfulness._FAIR),
    "discrimination": Limit(("discrimination: likeness",), discrimination._GOOD, discrimination._FAIR),
    "stability": Limit(("stability: noise", "stability: shift"), stability._GOOD, stability._FAIR),
    "additivity": Limit(("additivity: sensitivity-n",), additivity._GOOD, additivity._FAIR),
    "permuted": Limit(("permuted: likeness",), retraining._OTHER, retraining._RELATED),
    "repeatability": Limit(("repeatability: likeness",), retraining._SAME, retraining._SIMILAR),
}
"""Of the checks that are made here."""

INTRODUCTION = """\
# Right, robust, and worth its cost?

The survey asks of every technique five things: ease of use, validity, robustness, computational need and fine-tuning,
and finds that validity and robustness were often never tested (its Table 5). This page is that table for the methods of
MedXAI, measured by the checks of the trust card ([trust.md](trust.md)) on the demo network `lung_nodule` and synthetic
nodules in 50 mm of real lung, of which it is known where they are ([demo-networks.md](demo-networks.md)). The network
looks at all of the 50 mm, and the nodules lie 15 mm off the middle on average: who points at the middle mostly misses.
The first rows are maps that know nothing of the network, to compare with. `python -m benchmarks.trust` measures what is
missing and writes the page.

`attention` and `mil` are of networks of their own, `mil` of pieces of lung of 100 mm.

Means over cases ± half the 95 % confidence interval.

- *Survey*: the section in which the survey has the technique.
- *Validity*. **hit**, **mass**, **AUPRC**: against the mask of the nodule. **faithful**: insertion less deletion with
  blurred tissue, 0 by chance, above 1 where a part moves the answer further than all of it. **amounts**: how well the
  values foresee what the answer loses without parts of the scan.
- *Robustness*. How alike the map stays (1: the same) when the upper third of the weights is **scrambled**, when the
  network learnt **permuted labels**, and for the **runner-up** of the classes: the less, the better. With 1 % of
  **noise**, after a **shift** by a voxel, and of **retrained** networks: the more, the better. **change**: by how much
  of itself the map changes; the less, the better.
- *Computational need*: **forwards** and **backwards** for one map.
- *Ease of use*: what it **needs** of the network: only its answers, its inside, or a layer of it. *Fine-tuning*: how
  many **settings** it has; all have a default.

One small network and one kind of lesion: the order of methods is theirs, not that of methods in general.
"""

SURVEY = """\
## What the survey's own table says

Of the textual and the example-based techniques (its sections 3.2 and 3.3: captions, concepts, semantic attributes;
triplet networks, influence functions, prototypes, latent spaces, similar cases, capsules) the survey's Table 5 says
"n.t.", not tested, for validity and for robustness alike. What it says of the visual ones are judgements from the
literature, on other networks and scans; they are not repeated here.
"""

app = typer.Typer(add_completion=False)


@dataclass(frozen=True)
class Wanted:
    """A row of the table: a method and its parameters."""

    method: str
    parameters: Mapping[str, Any]
    slow: bool = False

    @property
    def network(self) -> str:
        """Which of the shipped ones."""
        return NETWORKS.get(self.method, "lung_nodule")

    @property
    def described(self) -> dict[str, Any]:
        """What its result begins with. A result that begins otherwise is out of date."""
        described = {"method": self.method, "network": self.network, "parameters": dict(self.parameters)}
        return described | {"region": "the whole patch", "checks": list(LIMITS)}

    def count(self, cases: int) -> int:
        """How many of the `cases` it is asked about."""
        return min(FEW, cases) if self.slow else cases


def every() -> Iterator[Wanted]:
    """What knows nothing, then every method that makes maps, but those of one region. A method that docs/sanity.md has
    in one setting only has that one here."""
    yield from (Wanted(method, {}) for method in BLIND)
    for method, kind in mx.methods("SaliencyMap").items():
        if method not in rows.OF_ONE_REGION:
            _, *others = settings = list(rows.SETTINGS.get(method, {"": {}}).values())
            slow = method in SLOW or issubclass(kind, Perturbing)
            yield Wanted(method, {} if others else settings[0], slow)


@cache
def cases(count: int) -> list[Asked]:
    """Nodules that the network names rightly, benign and malignant, and what it names them; each with the middle of its
    patch, so that the network looks at all of the patch, wherever the nodule is."""
    drawn = synthesise(patches.scan(), 3 * count, SEED)
    model = patches.demo_model()
    with model.ready(), torch.no_grad():
        said = torch.cat([model.forward(some).argmax(1) for some in drawn.images.split(32)])
    right = ((said == drawn.labels) & (drawn.labels > 0)).nonzero()[:count, 0].tolist()
    affine = np.diag([SPACING_MM] * 3 + [1.0])
    return [
        Asked(
            f"nodule {i}",
            volume := mx.Volume(drawn.images[i], affine),
            mx.Volume(drawn.masks[i].float(), affine),
            CLASSES[int(drawn.labels[i])],
            tuple(map(float, volume.to_point([(n - 1) / 2 for n in volume.shape]))),
        )
        for i in right
    ]


@cache
def lungs(count: int) -> list[Asked]:
    """Pieces of lung of 100 mm with nodules, for the network that looks at more than a patch, and takes all of them."""
    drawn = crops(patches.scan(), 2 * count, SEED)
    affine = np.diag([SPACING_MM] * 3 + [1.0])
    return [
        Asked(f"lung {i}", mx.Volume(drawn.images[i], affine), mx.Volume(drawn.masks[i].float(), affine), "nodule")
        for i in drawn.grades.nonzero()[:count, 0].tolist()
    ]


@cache
def _model(name: str, device: str | None) -> mx.Model:
    model = patches.demo_model(name)
    # Once, and not for each map.
    model.network.to(device or "cpu")
    return model


@cache
def _lung(scratch: Path) -> list[str]:
    """The patches that `rows.LUNG` stands for, as files: a check that explains again has only their names."""
    scratch.mkdir(parents=True, exist_ok=True)
    files = []
    for i, volume in enumerate(patches.lung()):
        path = scratch / f"lung-{i}.nrrd"
        if not path.exists():
            # Other processes may be about to do the same.
            beside = scratch / f"{os.getpid()}-{path.name}"
            sitk.WriteImage(volume.to_sitk(), str(beside))
            beside.replace(path)
        files.append(str(path))
    return files


def measured(row: Wanted, some: slice, count: int, device: str | None, scratch: Path) -> list[dict[str, Any]]:
    """What the page needs of `some` of `count` cases; what is in `scratch` already is not measured again. In a process
    of its own, whose registry then has the explainers that know nothing."""
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore", module=r"(monai|torch)\b")
    EXPLAINERS.update(BLIND)
    methods = {row.method: {k: _lung(scratch) if v == rows.LUNG else v for k, v in row.parameters.items()}}
    model, run = _model(row.network, device), Run(device=device)
    of = lungs if row.method == "mil" else cases
    found = evaluated(model, of(count)[some], methods, scratch / row.method, run, tuple(LIMITS))
    return [_kept(one) for one in found[row.method]]


@app.command()
def main(
    only: Annotated[list[str] | None, typer.Option(help="a method by its id; may be repeated")] = None,
    count: Annotated[int, typer.Option("--cases", help="so many at most")] = CASES,
    workers: Annotated[int, typer.Option(help="processes at once")] = 1,
    device: Annotated[str | None, typer.Option(help="cpu, or cuda for all of them")] = None,
    results: Annotated[Path, typer.Option(help="where the result of each method is kept")] = RESULTS,
    page: Annotated[Path, typer.Option(help="the page to write")] = PAGE,
    scratch: Annotated[Path, typer.Option(help="where the results of cases are kept")] = ROOT / "build" / "trust",
) -> None:
    """Measure every method that has no result of so many cases yet, and write the page."""
    known = _known(results)
    missing = [
        row
        for row in every()
        if (not only or row.method in only) and len(known.get(row.method, {}).get("cases", ())) < row.count(count)
    ]
    measured_on = machine() | ({"graphics": torch.cuda.get_device_name(device)} if "cuda" in (device or "") else {})
    results.mkdir(parents=True, exist_ok=True)
    with ProcessPoolExecutor(workers, multiprocessing.get_context("spawn")) as pool:
        # What takes longest first, so that in the end not all wait for it.
        waiting = {
            row.method: (row, [pool.submit(measured, row, part, count, device, scratch) for part in _parts(row, count)])
            for row in sorted(missing, key=lambda row: not row.slow)
        }
        for method, (row, parts) in waiting.items():
            try:
                found = [one for part in parts for one in part.result()]
            except Exception as error:
                # What the others have measured is not lost by it.
                print(f"{method}: {type(error).__name__}: {error}", flush=True)
                continue
            kept = {**row.described, "machine": measured_on, "cases": found}
            (results / f"{method}.json").write_text(json.dumps(kept, ensure_ascii=False) + "\n", encoding="utf-8")
            print(method, len(found), flush=True)
    page.write_text(written(_known(results)), encoding="utf-8")


def _parts(row: Wanted, count: int) -> list[slice]:
    size = 1 if row.slow else SLICE
    last = row.count(count)
    return [slice(start, min(start + size, last)) for start in range(0, last, size)]


def _known(results: Path) -> dict[str, dict[str, Any]]:
    """The results that are not out of date, by method."""
    found = {}
    for row in every():
        path = results / f"{row.method}.json"
        kept = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
        if row.described.items() <= kept.items():
            found[row.method] = kept
    return found


def _kept(result: Mapping[str, Any]) -> dict[str, Any]:
    """What the page needs of a case."""
    if "refused" in result:
        return {"refused": result["refused"]}
    wanted = {*COLUMNS, *(name for limit in LIMITS.values() for name in limit.values)}
    values = {name: round(value, 4) for name, value in numbers(result).items() if name in wanted}
    return {"values": values, "lights": {f["check"]: f["light"] for f in result["findings"]}}


def written(results: Mapping[str, Mapping[str, Any]]) -> str:
    """The page, of what has been measured."""
    found = {method: [one for one in result["cases"] if "values" in one] for method, result in results.items()}
    columns = [name for name in COLUMNS if any(name in one["values"] for some in found.values() for one in some)]
    kinds: dict[str, type[Technique]] = {**BLIND, **mx.methods("SaliencyMap")}
    heads = ["", "survey", "cases", *(COLUMNS[name] for name in columns), "needs", "settings"]
    lines = [f"| {' | '.join(heads)} |", "| --- |" + " ---: |" * (len(heads) - 1)]
    lines += [_row(kinds[method], results[method], some, columns) for method, some in found.items() if some]
    refused = [f"- {kinds[m].title}: {results[m]['cases'][0]['refused']}" for m, some in found.items() if not some]
    missing = [kinds[row.method].title for row in every() if row.method not in results]
    machines = dict.fromkeys(_said(result["machine"]) for result in results.values())
    parts = [INTRODUCTION, "\n".join(lines) + "\n"]
    parts += ["Not for this network:\n\n" + "\n".join(refused) + "\n"] if refused else []
    parts += [f"Not measured yet: {', '.join(missing)}.\n"] if missing else []
    parts += [f"Measured on: {'; '.join(machines)}.\n"] if machines else []
    blind = [one for method in BLIND for one in found.get(method, ())]
    others = [one for method, some in found.items() if method not in BLIND for one in some]
    words = [told.section(told.known())] if told.known() else []
    return "\n".join([*parts, *words, SURVEY, _calibration(blind, others), _predicting(others)])


def _row(
    kind: type[Technique], result: Mapping[str, Any], some: Sequence[Mapping[str, Any]], columns: Sequence[str]
) -> str:
    said = ", ".join(f"{name} {value}" for name, value in result["parameters"].items())
    said += f" of {result['network']}" if kind.id in NETWORKS else ""
    title = f"{kind.title} ({said.strip()})" if said else kind.title
    found = means([one["values"] for one in some])
    # One case has no interval.
    half = {name: f" ± {found[f'{name} ±']:.2f}" if len(some) > 1 else "" for name in columns if name in found}
    cells = [f"{found[name]:.2f}{half[name]}" if name in found else "" for name in columns]
    section, needs, settings = "", "nothing", ""
    if kind.id not in BLIND:
        inside = "a layer" if kind.layered else "the inside"
        needs = "answers" if kind.taxonomy.applies == "model-agnostic" else inside
        needs += ", scans" if "background" in kind.model_fields else ""
        section, settings = kind.taxonomy.section, str(len(kind.model_fields))
    return f"| {title} | {section} | {len(some)} | {' | '.join(cells)} | {needs} | {settings} |"


def _said(made: Mapping[str, Any]) -> str:
    return ", ".join(filter(None, (made.get("graphics"), f"{made['processor']} ({made['cores']} cores)")))


def _calibration(blind: Sequence[Mapping[str, Any]], others: Sequence[Mapping[str, Any]]) -> str:
    """What the lights make of maps that know nothing, and which limits would tell them from the others."""
    lines = [
        "## What is a green light worth?",
        "",
        f"The same checks of {len(blind)} maps that know nothing of the network, and of {len(others)} maps of the "
        f"methods: how many get green, yellow and red. The last columns have the limit that at most {SHARE:.0%} of the "
        "maps that know nothing would pass, and how many of the methods' maps would. Where hardly any would, the check "
        "cannot tell them apart by itself: a map can be stable and know nothing.",
        "",
        "| check | green | know nothing | methods | limit | methods then |",
        "| --- | --- | --- | --- | --- | ---: |",
    ]
    for check, limit in LIMITS.items():
        values = [[v for one in some if (v := limit.of(one)) is not None] for some in (blind, others)]
        if all(values):
            good, to = limit.calibrated(values[0]), "from" if limit.more else "up to"
            passed = mean(limit.lets(value, good) for value in values[1])
            counts = [_lights(some, check) for some in (blind, others)]
            lines.append(f"| {check} | {to} {limit.good:g} | {' | '.join(counts)} | {to} {good:g} | {passed:.0%} |")
    return "\n".join(lines) + "\n"


def _lights(some: Sequence[Mapping[str, Any]], check: str) -> str:
    count = Counter(_light(one, check) for one in some)
    return ", ".join(str(count[light]) for light in LIGHTS)


def _light(case: Mapping[str, Any], check: str) -> Light | None:
    """By the limits of today, which may have moved since the case was measured."""
    limit, given = LIMITS[check], case["lights"].get(check)
    value = limit.of(case)
    # The light of validity also goes by where the peak is.
    return given if check == "validity" or given is None or value is None else light(value, limit.good, limit.fair)


def _predicting(maps: Sequence[Mapping[str, Any]]) -> str:
    """Whether the lights of the card that need no segmentation foresee how well a map meets it."""
    lights: dict[str, list[float]] = defaultdict(list)
    meets: dict[str, list[float]] = defaultdict(list)
    for one in maps:
        known = {c: LIGHTS[lit] for c in LIMITS if c != "validity" and (lit := _light(one, c)) is not None}
        if not known:
            continue
        for check, lit in [*known.items(), ("all together", mean(known.values()))]:
            lights[check].append(lit)
            meets[check].append(one["values"]["validity: auprc"])
    lines = ["## Do the lights foresee whether a map meets the nodule?", ""]
    lines += [
        "Spearman's rank correlation between the lights that need no segmentation (green 1, yellow ½, red 0) and the "
        "AUPRC, over all maps of the methods above:",
        "",
        "| check | maps | rank correlation |",
        "| --- | ---: | ---: |",
    ]
    for check, values in lights.items():
        found = spearmanr(values, meets[check]).statistic if len(set(values)) > 1 else math.nan
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
