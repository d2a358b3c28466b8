"""How the scan would have to look for the network to say otherwise: a walk among the codes of a generative network.

Biffi et al., "Explainable anatomical shape analysis through deep hierarchical generative models", 2020; Clough et al.,
"Global and local interpretability for cardiac MRI classification", 2019, for walks along a concept; Sarhan et al.,
"Learning interpretable disentangled representations using adversarial VAEs", 2019.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from MedXAILib import resources
from MedXAILib.engines.counterfactual import ROUNDS, otherwise
from MedXAILib.engines.nodule_size import diameter
from MedXAILib.errors import MedXAIError, unknown
from MedXAILib.explainer import Question, Taxonomy, Teller
from MedXAILib.explanation import Explanation
from MedXAILib.grid import middle, resample
from MedXAILib.loading import load_model
from MedXAILib.model import Model, Prepared
from MedXAILib.networks.vae import Autoencoder
from MedXAILib.target import read_layers
from MedXAILib.textual.concept_sets import ExampleSource, read_examples
from MedXAILib.textual.tcav import TCAV
from MedXAILib.traversal import Place, Step, Traversal
from MedXAILib.volume import Volume, load_volume

DECISION = "decision"
_SHIPPED = "Models/generators"
_DEFAULT = "lung_nodule_vae"
_OF_DRAWING = ("reconstruction error", "distance")
_PLACES = 50
"""Of each segment, when examples are a segmentation."""
_ALIKE = 0.98
"""What the network sees has to follow what the generator sees at least so closely (R²)."""


class Latent(Teller):
    """How would the scan look further along a direction, and where does the network decide otherwise?

    A generative network says the scan in a few codes, moves them, and what it draws then differently is added to the
    scan, so that all it could not say stays. Towards another decision it goes the shortest way it finds.
    """

    id: ClassVar[str] = "latent"
    title: ClassVar[str] = "Latent traversal"
    paper: ClassVar[str] = "Biffi 2020"
    kind: ClassVar[str] = "Traversal"
    taxonomy: ClassVar[Taxonomy] = Taxonomy(
        "3.3",
        "example-based",
        "post hoc",
        "model-specific",
        ("local", "global"),
        strengths="shows what else the network would need to see; says when that is no longer like any scan",
        limits="only as good as the generative network, and only of what that has learnt: nodules in lung CT",
    )

    generator: str = Field(
        "",
        json_schema_extra={"path": True},
        description="the bundle of a generative network, or the name of one that ships; lung_nodule_vae if left out",
    )
    along: str = Field(
        DECISION,
        description="'decision', the name of what the generator knows (such as diameter) or, with examples, of what "
        "some of them have, or the number of a code",
    )
    examples: ExampleSource = ""
    towards: str = Field("", description="of a decision, the class to go to; the second likeliest if left out")
    steps: int = Field(9, ge=2, le=99, description="images, with the scan itself")
    reach: float = Field(4.0, gt=0, le=10, description="how far to go at most, in standard deviations of each code")
    rounds: int = Field(ROUNDS, ge=1, le=1000, description="how long to look for another decision")

    @classmethod
    def asked_again(cls, told: Explanation) -> Mapping[str, Any]:
        # Another network may say already what this one was to be led to.
        return {"towards": ""}

    def tell(self, question: Question, volume: Volume) -> Callable[..., Explanation]:
        run, model = question.run, question.model
        run.step(0, 1, "Reading the generative network")
        question.bind()
        generator = _generator(self.generator or _DEFAULT)
        run.note(f"Drawn by {generator.name}, whose fingerprint is {generator.fingerprint}.")
        scan = _Scan.of(question, volume, generator)
        with torch.no_grad():
            start = scan.network.encode(scan.image)
            before = scan.said(start, start)
        if self.along == DECISION:
            walk = self._to_decision(scan, start, before)
        else:
            known = isinstance(self.examples, str) and not self.examples
            way = _direction(scan.network, self.along) if known else self._concept(scan, volume, generator, start)
            walk = self._along(start, way)
        steps, decisions, images = [], [], []
        plain = resample(volume.data, volume.affine, question.x.shape[2:], question.seen[0].affine)
        for done, (position, codes) in enumerate(zip(walk.positions, walk.codes.split(1), strict=True)):
            run.step(done, len(walk.codes), self.title)
            with torch.no_grad():
                said = scan.said(start, codes)
                numbers, strange = scan.numbers(start, codes)
            scores = _scores(model, said.output)
            steps.append(Step(position, float(said.value), scores, numbers, strange))
            decisions.append(_decided(model, said))
            images.append(plain[0] + scan.per_value * scan.placed(scan.added(start, codes))[0, 0].detach().cpu())
        here = min(range(len(steps)), key=lambda i: abs(steps[i].position))
        others = [i for i, decision in enumerate(decisions) if decision != decisions[here]]
        flipped = min(others, key=lambda i: abs(steps[i].position), default=None)
        network = scan.network
        mapped = len(network.places) > 0
        return partial(
            Traversal,
            residual={"reconstruction": steps[here].numbers["reconstruction error"] / scan.per_value},
            steps=tuple(steps),
            images=torch.stack(images),
            affine=question.seen[0].affine,
            along=walk.along,
            text=_text(steps, here, flipped, walk.along, decisions[here] is not None),
            flipped=flipped,
            cohort=_cohort(network) if mapped else (),
            path=network.place(walk.codes).detach().double().cpu().numpy() if mapped else None,
        )

    def _to_decision(self, scan: _Scan, start: Tensor, before: _Said) -> _Walk:
        """The straight way to the nearest codes that were found at which the network decides otherwise."""
        run, model = scan.question.run, scan.question.model
        lead, along = _lead(model, before, self.towards)
        codes = otherwise(
            start,
            lambda codes: lead(scan.said(start, codes)),
            scan.network.distance,
            float(scan.network.limits[0]),
            self.reach,
            self.rounds,
            lambda done: run.step(done, self.rounds, "Looking for another decision"),
        )
        run.cost.backwards += self.rounds
        share = torch.linspace(0, 1, self.steps)
        far = float(((codes - start) @ scan.network.whitening).norm())
        return _Walk(start + share[:, None].to(start) * (codes - start), (far * share).tolist(), along)

    def _concept(self, scan: _Scan, volume: Volume, generator: Model, start: Tensor) -> Tensor:
        """The direction (1, K) of length 1 in which the codes of examples with what is asked for lie from the others.

        Raises:
            MedXAIError: when the codes of examples that were held out do not tell which have it.
        """
        run = scan.question.run
        examples = read_examples(self.examples, (self.along,), volume, _PLACES, run)
        ((name, known),) = examples.there((self.along,)).items()
        load, rows = lru_cache(maxsize=1)(load_volume), []
        for done, one in enumerate(examples.scans):
            run.step(done, len(examples.scans), "Examples")
            image = one.prepare(generator, load).x[None].to(start)
            rows.append(scan.network.encode(image).detach()[0].double().cpu().numpy())
        there = np.flatnonzero(~np.isnan(known)).tolist()
        random, patients = np.random.default_rng(run.seed), [examples.groups[i] for i in there]
        at = start.detach()[0].double().cpu().numpy()
        found = TCAV.model_validate({}).found(np.stack(rows)[there], known[there], patients, at, random)
        if found.refused:
            raise MedXAIError(f"{name}: {found.refused}.")
        run.note(f"Of examples that were held out, {found.numbers['accuracy']:.0%} are told by their codes: {name}.")
        way = torch.from_numpy(found.direction).to(start)
        return (way / way.norm())[None]

    def _along(self, start: Tensor, way: Tensor) -> _Walk:
        """The same distance to both sides of the scan; of an even number of images one less behind it."""
        ahead = self.steps // 2
        share = torch.arange(ahead - self.steps + 1, ahead + 1) / ahead * self.reach
        return _Walk(start + share[:, None].to(start) * way, share.tolist(), f"along {self.along}")


@dataclass(frozen=True)
class _Walk:
    """Codes (S, K), how far each is along the way, and what that is called."""

    codes: Tensor
    positions: list[float]
    along: str


@dataclass(frozen=True)
class _Said:
    """The target's value (N,) and the network's output (N, ...)."""

    value: Tensor
    output: Tensor


@dataclass(frozen=True)
class _Scan:
    """A scan as the explained network sees it, `question`, and as the generative one does: `image` (1, 1, *spatial) on
    its own grid. When that grows by 1 what the explained network sees does by `per_seen`, and the scan by `per_value`.
    """

    question: Question
    network: Autoencoder
    image: Tensor
    affine: np.ndarray
    per_seen: float
    per_value: float

    @classmethod
    def of(cls, question: Question, volume: Volume, generator: Model) -> _Scan:
        """
        Raises:
            MedXAIError: when what the networks see of it is not the same but for a factor.
        """
        x, seen, name = question.x, question.seen[0], question.model.name
        if len(volume.shape) != 3 or x.shape[1] != 1 or len(volume.data) != 1:
            raise MedXAIError(
                f"{generator.name} draws 3-D scans of one channel. This one is {len(volume.shape)}-D with "
                f"{len(volume.data)} channel(s), and {name} sees {x.shape[1]} of them: ask about a scan of that kind."
            )
        centre = middle(x.shape[2:], seen.affine)
        own = generator.prepare(volume, centre.tolist())

        def on(values: Tensor, affine: np.ndarray) -> Tensor:
            there = resample(torch.cat([values, torch.ones_like(values)]), affine, own.x.shape[1:], own.affine)
            return torch.where(there[1:] > 0.99, there[:1], torch.nan)

        per_seen = _slope(on(x[0].float().cpu(), seen.affine), own.x)
        per_value = _slope(on(volume.data, volume.affine), own.x)
        if per_seen is None or per_value is None:
            raise MedXAIError(
                f"{generator.name} does not see this scan as {name} does: it draws nodules in lung CT, in Hounsfield "
                "units; point at one with region=(x, y, z), or give the generator of another kind of scan."
            )
        network = generator.network.eval().requires_grad_(False).to(x.device)
        return cls(question, network, own.x[None].to(x.device), own.affine, per_seen, per_value)  # type: ignore[arg-type]

    def added(self, start: Tensor, codes: Tensor) -> Tensor:
        """What is added to the image (N, 1, *spatial) when its codes `start` become `codes` (N, K)."""
        return self.network.changed(self.image, start, codes) - self.image

    def placed(self, added: Tensor) -> Tensor:
        """The same on the grid of the explained network, (N, 1, *spatial)."""
        seen = self.question.seen[0]
        return resample(added[:, 0], self.affine, self.question.x.shape[2:], seen.affine)[:, None]

    def said(self, start: Tensor, codes: Tensor) -> _Said:
        """What the explained network says with other codes."""
        question, layer = self.question, self.question.bound[0].target.layer
        x = question.x + self.per_seen * self.placed(self.added(start, codes)).to(question.x)
        read = read_layers(question.model, x, [layer, None])
        question.run.cost.forwards += len(x)
        return _Said(question.bound[0].value(read[layer]), read[None])

    def numbers(self, start: Tensor, codes: Tensor) -> tuple[dict[str, float], bool]:
        """What is known of an image with other codes (1, K), and whether it is like none of the training."""
        network, image = self.network, self.image + self.added(start, codes)
        again = network.encode(image)
        error, distance = float(network.error(image, network.decode(again))), float(network.distance(codes))
        spacing = Prepared(image[0], self.affine).spacing
        found = {"reconstruction error": error * self.per_value, "distance": distance}
        for name, value in zip(network.attributes, network.read(again)[0].tolist(), strict=True):
            if name == "diameter_mm":
                # Not by the network that has drawn it.
                value = diameter(image[0, 0].cpu().numpy(), spacing)
            found[name.replace("_mm", " (mm)")] = value
        return found, distance > float(network.limits[0]) or error > float(network.limits[1])


def _generator(which: str) -> Model:
    """
    Raises:
        MedXAIError: when there is none, or it is of another kind.
    """
    folder = Path(which)
    if not folder.exists():
        shipped = {bundle.name: bundle for bundle in sorted(resources.path(_SHIPPED).iterdir())}
        if which not in shipped:
            raise unknown("generator", which, shipped)
        folder = shipped[which]
    model = load_model(folder)
    if not isinstance(model.network, Autoencoder):
        raise MedXAIError(
            f"'{which}' draws no scans from codes: give a bundle as `medxai train lung-nodule-vae` makes one."
        )
    return model


def _slope(values: Tensor, image: Tensor) -> float | None:
    """By how much `values` grow with `image`, where neither is NaN or clipped; None where they do not go together."""
    known = values.isfinite() & (image > 0) & (image < 1)
    if int(known.sum()) < 100:
        return None
    low, high = values[known].aminmax()
    known &= (values > low) & (values < high)
    x, y = image[known].double(), values[known].double()
    x, y = x - x.mean(), y - y.mean()
    both, own, other = float((x * y).sum()), float(x.square().sum()), float(y.square().sum())
    return both / own if both * both >= _ALIKE * own * other > 0 else None


def _lead(model: Model, before: _Said, towards: str) -> tuple[Callable[[_Said], Tensor], str]:
    """By how much another decision leads, and what it is called.

    Raises:
        MedXAIError: when the network does not decide, or there is no such decision.
    """
    if model.task in ("multilabel", "ordinal") and not towards:
        side = 1 if float(before.value) > 0 else -1
        return lambda said: -side * said.value, "towards no" if side > 0 else "towards yes"
    if model.task != "classification":
        raise MedXAIError(
            f"{model.name} is for {model.task} and has no other class to go to: leave towards out, and name what is to "
            "change with along=, such as along=diameter."
        )
    outputs = before.output.shape[1]
    scores = _sides(before.output)[0]
    now = int(scores.argmax())
    second = int(scores.index_fill(0, torch.tensor(now, device=scores.device), -torch.inf).argmax())
    to = model.class_index(towards, len(scores), outputs) if towards else second
    if to == now:
        raise MedXAIError(f"{model.name} says '{model.class_name(to, outputs)}' already: go towards another class.")
    others = [k for k in range(len(scores)) if k != to]
    return lambda said: _sides(said.output)[:, to] - _sides(said.output)[:, others].amax(1), (
        f"towards {model.class_name(to, outputs)}"
    )


def _sides(output: Tensor) -> Tensor:
    """The scores of all classes (N, K), also of a network with a single one."""
    return torch.cat([-output, output], dim=1) if output.shape[1] == 1 else output


def _decided(model: Model, said: _Said) -> object:
    if model.task == "classification" and said.output.ndim == 2:
        return int(_sides(said.output).argmax())
    return float(said.value) > 0 if model.task in ("multilabel", "ordinal") else None


def _scores(model: Model, output: Tensor) -> dict[str, float]:
    if output.ndim != 2:
        return {}
    values, outputs = model.probabilities(output)[0], output.shape[1]
    sides = outputs if len(values) > outputs else 0
    return {model.class_name(i, sides): float(value) for i, value in enumerate(values)}


def _direction(network: Autoencoder, along: str) -> Tensor:
    """The direction (1, K) of length 1 in which there is more of it.

    Raises:
        MedXAIError: when the network knows of no such thing.
    """
    codes = len(network.typical)
    readings = {name.removesuffix("_mm"): row for name, row in zip(network.attributes, network.reading, strict=True)}
    if along in network.names or (along.isdecimal() and int(along) < codes):
        index = network.names.index(along) if along in network.names else int(along)
        way = torch.eye(codes)[index]
    elif along in readings:
        way = readings[along]
    else:
        known = dict.fromkeys([DECISION, *network.names, *readings, *map(str, range(codes))])
        raise unknown("direction", along, list(known))
    return (way / way.norm().clamp_min(1e-12)).to(network.typical)[None]


def _cohort(network: Autoencoder) -> tuple[Place, ...]:
    rows = zip(network.places.tolist(), network.kinds.tolist(), strict=True)
    return tuple(Place(f"training {i}", network.classes[kind], x, y) for i, ((x, y), kind) in enumerate(rows))


def _text(steps: Sequence[Step], here: int, flipped: int | None, along: str, decides: bool) -> str:
    """What becomes of the answer on the way, and whether to believe it."""
    start, end = steps[here], steps[-1 if flipped is None else flipped]
    before, after = (_answer(step, decides) for step in (start, end))
    where = f"{along[0].upper()}{along[1:]}, {abs(end.position):.1f} standard deviations "
    where += "further" if end.position >= 0 else "back"
    still = ": it does not decide otherwise" if decides and flipped is None else ""
    said = [f"The network says {before} of this scan", f"{where}, it says {after}{still}"]
    moved = [f"{n} {v:.2g} → {end.numbers[n]:.2g}" for n, v in start.numbers.items() if n not in _OF_DRAWING]
    said += [f"There: {', '.join(moved)}"] if moved else []
    if start.strange:
        said.append("No case that the generator learnt from is like this scan: do not rely on any of it")
    elif end.strange:
        said.append("No case that the generator learnt from is like what it would have to be: it says little")
    return ". ".join(said) + "."


def _answer(step: Step, decides: bool) -> str:
    if not decides or not step.scores:
        return f"{step.value:.3g}"
    name = max(step.scores, key=step.scores.__getitem__)
    return f"{name} ({step.scores[name]:.0%})"
