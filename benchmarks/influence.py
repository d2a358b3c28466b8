"""`python -m benchmarks.influence` measures what is missing and writes docs/influence.md: whether influences say what
learning without a case, or from half of the cases, changes; what finds wrong labels; and what attributes speak for
malignancy. Three minutes of one core."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import MedXAILib as mx
from benchmarks.measure import resumed
from benchmarks.sanity.patches import demo_model
from MedXAILib.cases.record import Record
from MedXAILib.cases.spaces import Plain
from MedXAILib.cases.teaching import DAMPING, Refit, influence_by_group
from MedXAILib.engines.last_layer import LastLayer
from MedXAILib.engines.training_gradients import TRAK_DAMPING, TrainingGradients, trak
from MedXAILib.run import Run
from MedXAILib.synthetic.lung_nodules import ATTRIBUTES, CLASSES, Backgrounds, synthesise
from MedXAILib.trust.data_attribution import (
    datamodelling_scores,
    found_by,
    halves,
    left_out,
    neighbour_shapley,
    neighbour_votes,
    removal_curve,
)

ROOT = Path(__file__).resolve().parents[1]
RESULTS, PAGE = ROOT / "benchmarks" / "results" / "influence.json", ROOT / "docs" / "influence.md"

TAUGHT, ASKED = (300, 901), (90, 902)
"""How many patches of the one patient are learnt from, and of the other are asked about, and their seeds; no training
and no other page has seen them. The networks that are trained from scratch are asked about the first 60."""
LEFT_OUT, HALVES, SEEDS = 100, 60, 3
SHARES = (0.0, 0.01, 0.02, 0.05, 0.1, 0.2)
FLIPPED = 0.1
STEPS, DECAY, CHECKPOINTS, NETWORKS = 60, 1e-2, (10, 20, 35), 4
MALIGNANT = CLASSES.index("malignant")


@dataclass(frozen=True)
class Patches:
    """What was synthesised: `features` (N, F) of the shipped network before its last layer, the `grid` (N, 16, 5, 5, 5)
    of its second block, labels (N,) and attributes (N, 7)."""

    features: np.ndarray
    grid: Tensor
    labels: np.ndarray
    attributes: np.ndarray


@cache
def patches(test: bool) -> Patches:
    """Those that are asked about (`test`), or those that are learnt from."""
    made = synthesise(Backgrounds.test() if test else Backgrounds.training(), *(ASKED if test else TAUGHT))
    model = demo_model()
    with model.ready(), torch.no_grad():
        parts = made.images.split(30)
        network = model.network
        features = torch.cat([Plain().embed(model, part) for part in parts]).double().numpy()
        grid = torch.cat([F.max_pool3d(network.texture(network.stem(part)), 2) for part in parts])
    return Patches(features, grid, made.labels.numpy(), made.attributes.double().numpy())


def refit(labels: np.ndarray | None = None) -> Refit:
    """The last layer learnt anew from the patches, with other labels if given."""
    taught = patches(False)
    return Refit.of(taught.features, np.eye(len(CLASSES))[taught.labels if labels is None else labels])


def influences(of: Refit, wanted: np.ndarray) -> np.ndarray:
    """(N, M), on the logit of a class `wanted` (M,) of each patch that is asked about."""
    outputs = np.eye(len(CLASSES))[wanted]
    asked = zip(patches(True).features, outputs, strict=True)
    return np.stack([of.influences(features, output) for features, output in asked], axis=1)


def neighbours(taught: np.ndarray, asked: np.ndarray, wanted: np.ndarray) -> dict[str, np.ndarray]:
    """What needs no influence: likeness of features, with the sign of the class, and Shapley values of neighbours."""
    unit = [v / np.linalg.norm(v, axis=1, keepdims=True) for v in (taught, asked)]
    alike, same = unit[0] @ unit[1].T, patches(False).labels[:, None] == wanted
    return {"neighbours": neighbour_votes(alike, same), "neighbour Shapley values": neighbour_shapley(alike, same, 20)}


def learner(of: Refit, wanted: np.ndarray) -> Callable[[np.ndarray], np.ndarray]:
    """From which cases to learn to the logits (M,) of the class `wanted` (M,) of each patch that is asked about."""
    taught, asked = patches(False), of.scaling(patches(True).features)
    x, y = of.scaling(taught.features), np.eye(len(CLASSES))[taught.labels]
    strength = DAMPING * len(x)

    def learn(keep: np.ndarray) -> np.ndarray:
        head = LastLayer.fit(x, y, strength, counts=keep.astype(float), start=of.head.weights)
        return head.scores(asked)[np.arange(len(asked)), wanted]

    return learn


def left_out_of_last_layer() -> dict[str, Any]:
    """Influences against learning again without a case, by Newton's step and to first order."""
    of = refit()
    said = of.scores(patches(True).features)
    wanted = said.argmax(1)
    which = np.random.default_rng(0).permutation(TAUGHT[0])[:LEFT_OUT]
    learn = learner(of, wanted)
    head, scaled = of.head, of.scaling(patches(True).features)
    directions = np.array([head.asked(q, np.eye(len(CLASSES))[k]) for q, k in zip(scaled, wanted, strict=True)])
    gradients = (head.wrong[:, :, None] * head.features[:, None]).reshape(len(head.wrong), -1)
    started = time.process_time()
    of.influences(patches(True).features[0], np.eye(len(CLASSES))[2])
    query = time.process_time() - started
    return {
        "accuracy": float((wanted == patches(True).labels).mean()),
        "newton": left_out(head.kept @ directions.T, which, learn),
        "first order": left_out(gradients @ directions.T, which, learn),
        "seconds of a query": query,
    }


def halves_of_last_layer() -> dict[str, Any]:
    """Linear datamodelling scores of the last layer, for the class that each patch is of."""
    of, wanted = refit(), patches(True).labels
    learn, parts = learner(of, wanted), halves(TAUGHT[0], HALVES)
    said = np.array([learn(part) for part in parts])
    found = {"last layer": influences(of, wanted)}
    found |= neighbours(patches(False).features, patches(True).features, wanted)
    return {name: mean(datamodelling_scores(one, parts, said)) for name, one in found.items()}


def removed() -> dict[str, list[float]]:
    """The logit of the predicted class, mean over patches, after learning without the most helpful cases of each."""
    of = refit()
    wanted = of.scores(patches(True).features).argmax(1)
    learn = learner(of, wanted)
    found = {"last layer": influences(of, wanted)}
    found |= neighbours(patches(False).features, patches(True).features, wanted)
    found["at random"] = np.random.default_rng(0).normal(size=found["last layer"].shape)
    few = range(0, len(wanted), 6)
    return {
        name: np.mean([removal_curve(one[:, q], SHARES, learn, q) for q in few], axis=0).tolist()
        for name, one in found.items()
    }


def flipped() -> dict[str, list[float]]:
    """How well wrong labels are found, by seed."""
    labels = patches(False).labels
    found: dict[str, list[float]] = {"self-influence": [], "loss": [], "neighbours": []}
    unit = patches(False).features / np.linalg.norm(patches(False).features, axis=1, keepdims=True)
    alike = unit @ unit.T - 2 * np.eye(len(unit))
    for seed in range(5):
        random = np.random.default_rng(seed)
        wrong = random.permutation(len(labels)) < FLIPPED * len(labels)
        given = np.where(wrong, (labels + random.integers(1, len(CLASSES), len(labels))) % len(CLASSES), labels)
        head = refit(given).head
        nearest = np.argsort(-alike, axis=1)[:, :5]
        scores = {
            "self-influence": head.self_influence,
            "loss": np.abs(head.wrong).sum(1),
            "neighbours": (given[nearest] != given[:, None]).mean(1),
        }
        for name, score in scores.items():
            found[name].append(found_by(score, wrong))
    return found


def groups() -> list[dict[str, Any]]:
    """The mean influence of cases on the logit of "malignant", over all nodules that are asked about, by attribute."""
    taught, nodules = patches(False), patches(True).labels > 0
    each = influences(refit(), np.full(ASKED[0], MALIGNANT))[:, nodules]
    records = [
        Record(str(i), str(i), CLASSES[label], meta={n: v for n, v in zip(ATTRIBUTES, row, strict=True) if v == v})
        for i, (label, row) in enumerate(zip(taught.labels, taught.attributes.tolist(), strict=True))
    ]
    return [vars(group) for group in influence_by_group(records, each)]


class Small(nn.Module):
    """What is trained from scratch, many times: a convolution of the grid, and a last layer on its mean and maximum."""

    def __init__(self) -> None:
        super().__init__()
        self.evidence, self.head = nn.Conv3d(16, 16, 3, padding=1), nn.Linear(32, len(CLASSES))

    def features(self, x: Tensor) -> Tensor:
        found = F.relu(self.evidence(x))
        return torch.cat([found.mean((2, 3, 4)), found.amax((2, 3, 4))], 1)

    def forward(self, x: Tensor) -> Tensor:
        scores: Tensor = self.head(self.features(x))
        return scores


@cache
def grids() -> tuple[Tensor, Tensor]:
    """What `Small` looks at, of one size."""
    taught, asked = patches(False).grid, patches(True).grid[:60]
    middle, spread = taught.mean((0, 2, 3, 4), keepdim=True), taught.std((0, 2, 3, 4), keepdim=True)
    return (taught - middle) / spread, (asked - middle) / spread


def trained(keep: np.ndarray, seed: int) -> list[dict[str, Tensor]]:
    """The weights at `CHECKPOINTS` and at the end of a training on these cases."""
    torch.manual_seed(seed)
    network, saved = Small(), []
    optimiser = torch.optim.Adam(network.parameters())
    x, y = grids()[0][keep], torch.from_numpy(patches(False).labels[keep])
    for step in range(STEPS):
        if step in CHECKPOINTS:
            saved.append({name: value.clone() for name, value in network.state_dict().items()})
        for group in optimiser.param_groups:
            group["lr"] = 1e-2 * (1 - step / STEPS)
        optimiser.zero_grad()
        decay = sum((p.square().sum() for p in network.parameters()), torch.zeros(()))
        (F.cross_entropy(network(x), y) + DECAY * decay).backward()
        optimiser.step()
    return [*saved, network.state_dict()]


def halves_of_network() -> dict[str, Any]:
    """Linear datamodelling scores of a network that learnt all of it, convolution included."""
    wanted, parts = patches(True).labels[:60], halves(TAUGHT[0], HALVES, seed=1)
    said = []
    for part in parts:
        each = []
        for seed in range(SEEDS):
            network = Small()
            network.load_state_dict(trained(part, 100 + seed)[-1])
            with torch.no_grad():
                each.append(network(grids()[1])[torch.arange(len(wanted)), torch.from_numpy(wanted)].numpy())
        said.append(np.mean(each, axis=0))
    everything = np.ones(TAUGHT[0], dtype=bool)
    networks = [[Taught.of(weights) for weights in trained(everything, seed)] for seed in range(NETWORKS)]
    last = [network[-1] for network in networks]
    found = neighbours(last[0].features, last[0].asked_features, wanted)
    for count in (1, NETWORKS):
        some = last[:count]
        found |= {
            f"last layer, {count}": sum(one.last_layer(wanted) for one in some),
            f"tracin, {count}": sum(one.tracin() for network in networks[:count] for one in network),
            f"trak, {count}": sum(one.trak() for one in some),
        }
    dampings = {f"trak, {NETWORKS}, damping {d:g}": sum(one.trak(d) for one in last) for d in (0.01, 1.0, 3.0, 30.0)}
    dampings |= {f"last layer, 1, damping {d:g}": last[0].last_layer(wanted, d) for d in (0.01, 0.03, 0.3, 1.0)}
    scored = {**found, **dampings}
    return {name: mean(datamodelling_scores(one, parts, np.array(said))) for name, one in scored.items()}


@dataclass(frozen=True)
class Taught:
    """At some weights: what is `kept` of the cases (N, K + 1), what is `asked` for each patch (M, K), and features."""

    kept: np.ndarray
    asked: np.ndarray
    features: np.ndarray
    asked_features: np.ndarray

    @classmethod
    def of(cls, weights: Mapping[str, Tensor]) -> Taught:
        network = Small()
        network.load_state_dict(weights)
        model = mx.Model(network, class_names=CLASSES)
        gradients, run = TrainingGradients(model), Run()
        labels, (taught, asked) = patches(False).labels, grids()
        with model.ready():
            rows = [
                gradients.kept(part, [CLASSES[k] for k in labels[50 * i : 50 * i + 50]], run)
                for i, part in enumerate(taught.split(50))
            ]
            directions = [
                gradients.asked(one[None], lambda output, k=int(k): output[:, k], run)
                for one, k in zip(asked, patches(True).labels[: len(asked)], strict=True)
            ]
            with torch.no_grad():
                features = [network.features(x).double().numpy() for x in (taught, asked)]
        return cls(np.concatenate(rows), np.stack(directions), *features)

    def last_layer(self, wanted: np.ndarray, damping: float = DAMPING) -> np.ndarray:
        """Influences (N, M) on the last layer alone."""
        head = Refit.of(self.features, np.eye(len(CLASSES))[patches(False).labels], damping)
        outputs = np.eye(len(CLASSES))[wanted]
        return np.stack([head.influences(f, o) for f, o in zip(self.asked_features, outputs, strict=True)], axis=1)

    def tracin(self) -> np.ndarray:
        """Of one step, (N, M)."""
        return self.kept[:, :-1] @ self.asked.T

    def trak(self, damping: float = TRAK_DAMPING) -> np.ndarray:
        """By a linear model of the network, (N, M)."""
        return np.stack([self.kept @ trak(self.kept, one, damping) for one in self.asked], axis=1)


def mean(values: np.ndarray) -> dict[str, float]:
    """The mean of scores of queries, and its 95 % interval by bootstrap over them."""
    random = np.random.default_rng(0)
    drawn = values[random.integers(0, len(values), (2000, len(values)))].mean(1)
    low, high = np.quantile(drawn, (0.025, 0.975))
    return {"mean": float(values.mean()), "low": float(low), "high": float(high)}


PARTS: dict[str, Callable[[], Any]] = {
    "left out": left_out_of_last_layer,
    "halves, last layer": halves_of_last_layer,
    "removed": removed,
    "flipped": flipped,
    "groups": groups,
    "halves, network": halves_of_network,
}


def main() -> None:
    """Measure what is missing and write the page."""
    torch.set_num_threads(1)
    PAGE.write_text(page(resumed(PARTS, RESULTS)), encoding="utf-8")


def page(found: Mapping[str, Any]) -> str:
    """docs/influence.md."""
    left, flips, groups = found["left out"], found["flipped"], found["groups"]
    halved = ["| | last layer learnt anew | network trained from scratch |", "|---|---:|---:|"]
    last, network = found["halves, last layer"], found["halves, network"]
    renamed = {"last layer, 1": "last layer"}
    names = list(dict.fromkeys([*last, *(renamed.get(name, name) for name in network)]))
    whole = {renamed.get(name, name): score for name, score in network.items()}
    halved += [f"| {name} | {_interval(last.get(name))} | {_interval(whole.get(name))} |" for name in names]
    curves = [f"| without | {' | '.join(f'{share:.0%}' for share in SHARES)} |", f"|---|{'---:|' * len(SHARES)}"]
    curves += [
        f"| {name} | {' | '.join(f'{logit:+.2f}' for logit in curve)} |" for name, curve in found["removed"].items()
    ]
    held = dict.fromkeys(group["what"] for group in groups)
    table = [f"| cases | {' | '.join(CLASSES)} |", f"|---|{'---:|' * len(CLASSES)}"]
    for what in held:
        cells = {
            group["label"]: f"{1000 * group['mean']:+.1f} ({group['count']})"
            for group in groups
            if group["what"] == what
        }
        table.append(f"| {what or 'all'} | {' | '.join(cells.get(name, '') for name in CLASSES)} |")
    values = {
        f"{name}_{kind}".replace(" ", "_"): value
        for name in ("newton", "first order")
        for kind, value in left[name].items()
    }
    return PAGE_TEXT.format(
        taught=TAUGHT[0],
        asked=ASKED[0],
        left=LEFT_OUT,
        halves=HALVES,
        seeds=SEEDS,
        networks=NETWORKS,
        flipped=FLIPPED,
        accuracy=left["accuracy"],
        halved="\n".join(halved),
        curves="\n".join(curves),
        groups="\n".join(table),
        flips="; ".join(f"{name} {np.mean(auc):.3f} ({min(auc):.3f} at least)" for name, auc in flips.items()),
        **values,
    )


def _interval(score: Mapping[str, float] | None) -> str:
    return "" if score is None else f"{score['mean']:.2f} ({score['low']:.2f} to {score['high']:.2f})"


PAGE_TEXT = """\
# Influence: what the network learnt it from

"Because of which training cases does it say malignant?" `influence` names the cases of a [library](../README.md) that
speak for what the network says of a scan (*helpful*) and those that speak against it (*harmful*). The influence of a
case on a score is by how much the score would be lower, had the network not learnt from that case.

```bash
medxai cases build nodules.csv --model lung_nodule --out nodules         # the cases that the network learnt from
medxai explain lung_nodule scan.nrrd --method influence --target malignant --region 21.9,120.5,-611.5 \\
    --set library=nodules
medxai cases suspects nodules                                            # the cases that may be labelled wrongly
```

- **`by=last layer`** (the default): a last layer is learnt anew from the library, on what the layers below found. Its
  optimum and its Hessian are known, so that an influence is exact but for one step of Newton's method without the case.
  The text says how often the new layer says what the network says; where that is less than 90 %, it is another layer.
- **`by=tracin`**: what one step of training on each case would do to the score, at the network's weights or at the
  `checkpoints` of its training (files of weights, safetensors or PyTorch). Every layer counts, 3-D convolutions too.
- **`by=trak`**: as if the whole network were linear in its weights around those. The mean over `checkpoints` of several
  trainings is far better than one.

Gradients are projected to 512 numbers and kept in the library, in the space `gradient`, where they are searched.

## Pitfalls

- **The library has to be what the network learnt from.** The demonstration library is not: there the last layer is
  learnt from the library, and TracIn and TRAK say what further training on it would do.
- **It is about training, not about likeness.** A harmful case may look just like the scan, with another label.
- **Not what the cases have in common.** See the groups below, or `influence_by_group`, for that.

## Measured

`python -m benchmarks.influence`: {taught} patches of one patient are learnt from, and {asked} of another are asked
about, on features of the shipped `lung_nodule`; the last layer learnt anew is right about {accuracy:.0%} of those.

**Without a case.** Learning again without each of {left} cases, the scores of the predicted class change as the
influences say: Pearson {newton_pearson:.4f} (mean over patches; {newton_pearson_lowest:.4f} at least), Spearman
{newton_spearman:.4f}. To first order, as is usual: Pearson {first_order_pearson:.4f}
({first_order_pearson_lowest:.4f} at least).

**From half of the cases.** Linear datamodelling score: the rank correlation of summed influences with what is said
after learning from each of {halves} random halves (mean over patches, 95 % interval by bootstrap). The network from
scratch is a 3-D convolution and a last layer, on the features of the shipped network's second block; of each half it is
trained {seeds} times. A number after a name is that of the trainings over which influences are averaged.

{halved}

The last layer is ahead of the neighbours, and TRAK is with several trainings; TracIn is not. All of them are estimates
of a network that learns from scratch, and what its trainings have by chance none of them knows.

**Without the most helpful.** The score of the predicted class, mean over patches, after learning without these shares
of the cases, the most helpful first:

{curves}

**Wrong labels.** {flipped:.0%} of the labels were changed at random, five times. Area under the ROC curve for finding
them: {flips}.
To find wrong labels it is enough to count the nearest cases with another label.

**By attribute.** Mean influence of a case on the logit of "malignant", times 1000, over all nodules that are asked
about, and the number of cases:

{groups}
"""


if __name__ == "__main__":
    main()
