"""Influence functions.

Koh and Liang, "Understanding black-box predictions via influence functions", 2017; Pruthi et al., "Estimating training
data influence by tracing gradient descent", 2020 (TracIn); Park et al., "TRAK: attributing model behavior at scale",
2023.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from pydantic import Field

from MedXAILib.cases.checkpoints import at_checkpoints, gradients_of_cases
from MedXAILib.cases.filters import conditions
from MedXAILib.cases.gradient_space import Gradient
from MedXAILib.cases.library import Library
from MedXAILib.cases.record import SCAN, Record
from MedXAILib.cases.shown import part
from MedXAILib.cases.space import Space
from MedXAILib.cases.spaces import Plain, fingerprint, said
from MedXAILib.cases.teaching import DAMPING, Refit, influence_by_group
from MedXAILib.engines.training_gradients import LENGTH, TRAK_DAMPING, TrainingGradients, answer, trak
from MedXAILib.errors import MedXAIError
from MedXAILib.example_based.library_method import LibraryMethod, shown_among_others
from MedXAILib.explainer import Folder, Names, Question, Taxonomy
from MedXAILib.explanation import Explanation
from MedXAILib.similar_cases import Case, Role, SimilarCases
from MedXAILib.target import ClassTarget, RegressionTarget
from MedXAILib.volume import Volume

# Of so many cases at least is a group whose influence is told, and the greatest so many are.
_FEWEST, _TOLD = 5, 4
# Of more labels than this only the sum over all is told.
_LABELS = 24
# A last layer that says otherwise more often than this is another one than the network's.
_ALIKE = 0.9


class Influence(LibraryMethod):
    """Learning from which cases speaks for what the network says of this scan, and learning from which against it?

    The influence of a case on a score is by how much the score would be lower, had the network not learnt from it. That
    is known of the last layer alone, learnt anew from the cases of a library, and estimated of the whole network from
    its gradients: for one step of training (TracIn), or with all cases together (TRAK).
    """

    id: ClassVar[str] = "influence"
    title: ClassVar[str] = "Influential cases"
    paper: ClassVar[str] = "Koh 2017"
    kind: ClassVar[str] = "SimilarCases"
    taxonomy: ClassVar[Taxonomy] = Taxonomy(
        "3.3",
        "example-based",
        "post hoc",
        "model-specific",
        ("local", "global"),
        strengths="what the decision rests on in the training; tested against learning again; finds wrong labels",
        limits="of the whole network only an estimate; the library has to be what the network learnt from",
    )

    library: Folder = Field(
        "",
        description="library of the cases that were learnt from, as medxai cases build makes them; demonstration "
        "nodules when left out",
    )
    by: Literal["last layer", "tracin", "trak"] = Field(
        "last layer",
        description="whose learning: the last layer's, learnt anew from the library; or the whole network's, estimated "
        "by one step on each case (tracin) or by a linear model of it (trak)",
    )
    count: int = Field(3, ge=1, description="cases to show for, and as many against")
    damping: float = Field(
        0,
        ge=0,
        description="how strongly weights are held near zero: half of this times their squares comes to the mean loss "
        "of the last layer; so often comes its mean eigenvalue to the kernel of trak; 0 takes "
        f"{DAMPING:g} and {TRAK_DAMPING:g}",
    )
    checkpoints: Names = Field(
        (),
        json_schema_extra={"path": True},
        description="files of weights, or folders of them, of the network's training or of others of its kind: tracin "
        "and trak are the mean over them; the network as it is when left out",
    )
    length: int = Field(
        LENGTH, ge=0, description="numbers that are kept of each gradient at checkpoints; 0 keeps all of it"
    )
    where: Names = Field(
        (), description="what must hold of a case to be shown, such as diameter_mm=10..20 or label=none|benign"
    )
    patient: str = Field("", description="whose scan this is: cases of the same patient are not shown")
    among: Names = Field((), description="uids of the only cases to learn from; the network embeds them anew")

    @classmethod
    def asked_again(cls, told: Explanation) -> Mapping[str, Any]:
        # Another network embeds otherwise. It is asked for the influences of a few cases, those that were among them.
        assert isinstance(told, SimilarCases)
        return {"among": shown_among_others(told), "checkpoints": ()}

    def tell(self, question: Question, volume: Volume) -> Callable[..., Explanation]:
        run = question.run
        score = _Score.of(question)
        library = self.opened(question)
        run.step(0, 1, self.title)
        taught = self._taught(question, library, score)
        found = self._learnt(question, library, taught, score)
        cases = list[Case]()
        for role, record, influence in self._shown(question, volume, library, taught, found):
            run.step(len(cases), 2 * self.count, self.title)
            cases.append(_case(question, library, record, role, influence))
        _note_groups(question, taught, found.influences)
        says = [f"The network says {score.says}."] if score.says else []
        return partial(
            SimilarCases,
            residual={},
            cases=tuple(cases),
            scored=f"influence on {score.name}",
            text=" ".join([*says, found.how, _sums(taught, found.influences, score.name)]),
        )

    def _taught(self, question: Question, library: Library, score: _Score) -> _Taught:
        """The cases that the network could have learnt from."""
        model = question.model
        if not self.among:
            library.require(fingerprint(model), "build a library with it")
        every = library.records({"uid": set(self.among)} if self.among else None, whole=False)
        answers = [answer(model, record.label, score.outputs) for record in every]
        rows = [i for i, one in enumerate(answers) if one is not None]
        if not rows:
            raise MedXAIError(
                f"No case of '{library.path}' has a label that {model.name} could have learnt "
                f"({', '.join(score.names) or 'a number'}): fill the column 'label' of the table, and build it again."
            )
        return _Taught([every[i] for i in rows], np.array([answers[i] for i in rows], dtype=float), rows)

    def _vectors(self, question: Question, library: Library, taught: _Taught, space: Space) -> np.ndarray:
        """The vectors (N, K) of the cases in `space`."""
        if not self.among:
            return library.matrix(space.name)[1][taught.rows]
        run, found = question.run, []
        for i, record in enumerate(taught.records):
            run.step(i, len(taught.records), "Embedding cases anew")
            x = question.model.prepare(library.volume(record), record.region).x[None].to(question.x)
            found.append(space.embed(question.model, x, [record.label])[0].numpy())
            run.cost.forwards += 1
        return np.stack(found)

    def _learnt(self, question: Question, library: Library, taught: _Taught, score: _Score) -> _Found:
        if self.by == "last layer":
            return self._of_last_layer(question, self._vectors(question, library, taught, Plain()), taught, score)
        run, model = question.run, question.model
        if self.checkpoints:
            several = [TrainingGradients(m, self.length, run.seed) for m in at_checkpoints(model, self.checkpoints)]
            run.note(f"The fingerprints of the weights: {', '.join(one.model.fingerprint for one in several)}.")
            each = gradients_of_cases(several, library, taught.records, run)
        else:
            several, each = [TrainingGradients(model)], [self._vectors(question, library, taught, Gradient())]
        directions = []
        for one, kept in zip(several, each, strict=True):
            with one.model.ready(question.x.device):
                asked = one.asked(question.x, question.bound[0].value, run)
            if self.by == "trak":
                directions.append(trak(kept, asked, self.damping or TRAK_DAMPING))
            else:
                directions.append(np.append(asked, 0.0))
        influences = np.mean([kept @ one for kept, one in zip(each, directions, strict=True)], axis=0)
        at = f"{len(several)} sets of weights" if self.checkpoints else "the network's weights"
        # How large a step was is not known, so that of steps only shares are.
        whole = max(float(np.abs(influences).sum()), 1e-30) if self.by == "tracin" else 1.0
        how = f"By a linear model of the training, at {at}, on {taught}: an estimate."
        if self.by == "tracin":
            how = f"By one step of training, at {at}, on each of {taught}, as shares of them all: an estimate."
        return _Found(influences / whole, how, None if self.checkpoints or self.among else directions[0] / whole)

    def _of_last_layer(self, question: Question, features: np.ndarray, taught: _Taught, score: _Score) -> _Found:
        run, model, damping = question.run, question.model, self.damping or DAMPING
        here = Plain().embed(model, question.x)[0].numpy()
        run.cost.forwards += 1
        run.note(
            "These are influences on a last layer that was learnt anew from the library: what the layers below learnt, "
            "and what else the network learnt from, is not in them."
        )
        if model.task == "regression":
            refit = Refit.of(features, taught.answers[:, None], damping, "identity")
            missed = np.abs(refit.scores(features)[:, 0] - taught.answers).mean()
            now = f"says {refit.scores(here[None])[0, 0]:.3g} of this scan and is wrong by {missed:.2g} about them"
        else:
            refit = Refit.of(features, np.eye(len(score.names))[taught.answers.astype(int)], damping)
            says = [score.names[k] for k in refit.scores(np.stack([here, *features])).argmax(1)]
            alike = float(np.mean([a == r.said for a, r in zip(says[1:], taught.records, strict=True)]))
            now = f"says {says[0]} of this scan and the same as the network of {alike:.0%} of them"
            if alike < _ALIKE or says[0] != score.says:
                run.note(f"The last layer that was learnt anew {now}: it is not the network's.")
        how = f"A last layer that is learnt anew from {taught} {now}."
        return _Found(refit.influences(here, score.weights), how)

    def _shown(
        self, question: Question, volume: Volume, library: Library, taught: _Taught, found: _Found
    ) -> list[tuple[Role, Record, float]]:
        """The most helpful and the most harmful cases, but none of the scan itself."""
        records, own = taught.records, [r.meta.get(SCAN) == volume.fingerprint for r in taught.records]
        if any(own):
            mine = found.influences[own].sum()
            question.run.note(f"The scan is in the library itself and not shown; its influence is {mine:+.3g}.")
        where, shown = conditions(self.where), list[tuple[Role, Record, float]]()
        whose = {self.patient, library.pseudonym(self.patient)} if self.patient else set()
        allowed = {r.uid for r in library.records(where, whole=False)} if where else {r.uid for r in records}
        roles: tuple[tuple[Role, int], ...] = (("helpful", 1), ("harmful", -1))
        for role, sign in roles:
            if found.direction is not None:
                asked = sign * found.direction
                hits = library.search(asked, self.count + sum(own), Gradient.name, where, self.patient or None)
                best = [(hit.record, sign * hit.similarity) for hit in hits]
            else:
                order = np.argsort(-sign * found.influences, kind="stable")
                best = [(records[i], float(found.influences[i])) for i in order]
            best = [
                (record, influence)
                for record, influence in best
                if sign * influence > 0
                and record.uid in allowed
                and record.patient not in whose
                and record.meta.get(SCAN) != volume.fingerprint
            ]
            shown += [(role, *one) for one in best[: self.count]]
        return shown


@dataclass(frozen=True, eq=False)
class _Score:
    """What is asked about: the `name` of a score of a network with so many `outputs`, as `weights` (K,) of those of the
    classes `names`; and what the network `says`."""

    name: str
    outputs: int
    names: tuple[str, ...]
    weights: np.ndarray
    says: str

    @classmethod
    def of(cls, question: Question) -> _Score:
        """
        Raises:
            MedXAIError: when it is no class of a classifier, and no value of a regression network of one output.
        """
        model, bound = question.model, question.bound[0]
        target, label = bound.target, bound.label
        with torch.no_grad():
            output = model.forward(question.x)
        question.run.cost.forwards += 1
        (says,), outputs = said(model, output), output.shape[1] if output.ndim == 2 else 0
        if target.layer is None and isinstance(target, RegressionTarget) and outputs == 1:
            return cls(label, outputs, (), np.ones(1), says)
        if target.layer is not None or not isinstance(target, ClassTarget) or model.task != "classification":
            raise MedXAIError(
                f"Influences are known on the score of a class, or on the value of a network that has one; this is "
                f"{label} of {model.name} ({model.task}). Use similar_cases, which takes any network."
            )
        names = tuple(model.class_name(k, outputs) for k in range(max(2, outputs)))
        assert isinstance(target.which, int) and not isinstance(target.versus, str)
        # The one score of a binary network is the lead over the other class.
        versus = 1 - target.which if outputs == 1 else target.versus
        weights = np.eye(len(names))[target.which] - (0 if versus is None else np.eye(len(names))[versus])
        return cls(f"the logit of {label}", outputs, names, weights, says)


@dataclass(frozen=True, eq=False)
class _Taught:
    """Cases with what a network is to say of them, and which of a library's they are."""

    records: Sequence[Record]
    answers: np.ndarray
    rows: list[int]

    def __str__(self) -> str:
        return f"the {len(self.records)} cases of the library that have a label"


@dataclass(frozen=True, eq=False)
class _Found:
    """The influences (N,) of cases, `how` they came about, and, when the library has all else, the `direction` (K + 1,)
    to search it in."""

    influences: np.ndarray
    how: str
    direction: np.ndarray | None = None


def _case(question: Question, library: Library, record: Record, role: Role, influence: float) -> Case:
    shown = None
    if record.volume:
        try:
            scan = library.volume(record)
            shown = part(scan, question.model.prepare(scan, record.region))
        except MedXAIError as error:
            question.run.note(f"The case '{record.uid}' is shown without its scan: {error}")
    says = f" The network says {record.said}." if record.said else ""
    return Case(
        uid=record.uid,
        label=record.label,
        similarity=influence,
        source=str(library.scan(record)) if record.volume else None,
        place=record.region,
        volume=shown,
        role=role,
        note=f"Known as {record.label}.{says} It speaks {'for' if influence > 0 else 'against'} it: {influence:+.2g}.",
        numbers={name: float(value) for name, value in record.meta.items() if not isinstance(value, str)},
    )


def _sums(taught: _Taught, influences: np.ndarray, score: str) -> str:
    """What the cases of each label come to."""
    of_labels = [g for g in influence_by_group(taught.records, influences, ()) if not g.what]
    if len(of_labels) > _LABELS:
        return f"Together they add {influences.sum():+.2g} to {score}."
    each = ", ".join(f"{g.count} {g.label} {g.sum:+.2g}" for g in sorted(of_labels, key=lambda g: -g.sum))
    return f"To {score} they add together: {each}."


def _note_groups(question: Question, taught: _Taught, influences: np.ndarray) -> None:
    """Say which groups of cases have the greatest influence, each case alone."""
    if question.model.task == "regression":
        return
    groups = [g for g in influence_by_group(taught.records, influences) if g.what and g.count >= _FEWEST]
    told = [
        f"{g.label} with {g.what} {g.mean:+.2g} ({g.count} cases)"
        for g in sorted(groups, key=lambda g: -abs(g.mean))[:_TOLD]
    ]
    if told:
        question.run.note(f"Greatest mean influence by attribute: {', '.join(told)}.")
