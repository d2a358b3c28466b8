"""From a request to an explanation."""

from __future__ import annotations

import platform
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from datetime import datetime, timezone
from typing import Any, TypeVar, cast, overload

import monai
import numpy as np
import SimpleITK as sitk
import torch
from torch import Tensor, nn

from MedXAILib import __version__, registry
from MedXAILib.engines.stitching import explain_by_windows
from MedXAILib.engines.whole_scan import WholeScan
from MedXAILib.ensemble import Ensemble, combine
from MedXAILib.errors import MedXAIError
from MedXAILib.explainer import Attribution, Explainer, Question, Technique, Teller
from MedXAILib.explanation import Explanation, Provenance, SaliencyMap
from MedXAILib.generator import External
from MedXAILib.grid import resample, resample_part
from MedXAILib.model import Model, Prepared
from MedXAILib.region import Region
from MedXAILib.run import Partial, Run
from MedXAILib.target import Bound, Target, as_target, from_spec
from MedXAILib.volume import Volume

# By how much a lower precision may change the value that is explained, relative to it.
_PRECISE = 0.02

Scan = Volume | Tensor | sitk.Image
Wanted = Target | str | int | None
Made = TypeVar("Made", bound=Explanation)


@overload
def explain(
    model: Model | Ensemble,
    volume: Scan,
    method: str = ...,
    target: Wanted = ...,
    region: Region | None = ...,
    run: Run | None = ...,
    **parameters: Any,
) -> SaliencyMap: ...


@overload
def explain(
    model: Model | Ensemble,
    volume: Scan,
    method: str = ...,
    *,
    target: Sequence[Wanted],
    region: Region | None = ...,
    run: Run | None = ...,
    **parameters: Any,
) -> list[SaliencyMap]: ...


def explain(
    model: Model | Ensemble,
    volume: Scan,
    method: str = "gradcam",
    target: Wanted | Sequence[Wanted] = None,
    region: Region | None = None,
    run: Run | None = None,
    **parameters: Any,
) -> SaliencyMap | list[SaliencyMap]:
    """Explain why `model` says what it says about `volume`.

    Args:
        model: the network, or an ensemble of several.
        volume: a `Volume`, a SimpleITK image, or a tensor (C, D, H, W) or (N, C, D, H, W). It is not modified.
        method: one of `methods()`; `parameters` are its own.
        target: what to explain: a target, a class name or index, or None for what the model predicts. A list gives a
            list of explanations, computed together.
        region: the part a patch network looks at: a centre or a box in RAS mm.
        run: device, seed, memory budget, precision, progress, cancel, and whom to show the map while it becomes.

    Returns:
        A map on the volume's own grid, zero outside the region. Methods that answer in words, by concepts or by cases
        return an explanation of that kind; `tell` is the same to a type checker.

    Raises:
        MedXAIError: when it cannot be done, saying what would work.
    """
    if isinstance(model, nn.Module):
        raise MedXAIError("Say what the network is for first: Model(network, task=..., class_names=...).")
    technique = registry.make(method, parameters)
    several = isinstance(target, (list, tuple))
    wanted: Sequence[Wanted] = target if several else [target]  # type: ignore[assignment, list-item]
    found: Any
    if isinstance(technique, Teller):
        # Vectors and words are of the network as it is.
        found = _tell(model, technique, volume, wanted, region, replace(_fresh(run), precision=None))
    elif isinstance(model, Ensemble):
        # What one member has so far is nothing that the ensemble would say.
        alone = replace(_fresh(run), partial=None)
        members = [_explain(m, technique, volume, wanted, region, _fresh(alone)) for m in model.models]
        found = [combine(model, of_target) for of_target in zip(*members, strict=True)]
    else:
        found = _explain(model, technique, volume, wanted, region, _fresh(run))
    answer: SaliencyMap | list[SaliencyMap] = found if several else found[0]
    return answer


def tell(
    model: Model,
    volume: Scan,
    method: str,
    target: Wanted = None,
    region: Region | None = None,
    run: Run | None = None,
    **parameters: Any,
) -> Explanation:
    """`explain` by a method that answers otherwise than with one map."""
    return explain(model, volume, method, target, region, run, **parameters)


def recompute(explanation: Made, model: Model, volume: Scan, run: Run | None = None) -> Made:
    """Compute an explanation again from its provenance.

    Raises:
        MedXAIError: when `model` or `volume` is not the one that was explained.
    """
    made = explanation.provenance
    check_explained(made, model, volume)
    run = run if run is not None else Run(device=made.device)
    run = replace(run, seed=made.seed, precision=made.model.get("precision"))
    again = explain(model, volume, made.method, from_spec(made.target), made.region, run, **made.parameters)
    return cast(Made, again)


def check_explained(made: Provenance, model: Model, volume: Scan) -> None:
    """Refuse another network or volume than those of an explanation.

    Raises:
        MedXAIError: when `model` or `volume` is not the one that was explained.
    """
    for name, known, given in (
        ("network", made.model.get("fingerprint"), model.fingerprint),
        ("volume", made.volume["fingerprint"], _Batch.of(volume, model).fingerprint),
    ):
        if known != given:
            raise MedXAIError(f"This is not the {name} that was explained ({known} then, {given} now): give that one.")


@dataclass(frozen=True)
class _Batch:
    """The volumes of a request, and whether it came as a batch."""

    volumes: list[Volume]
    batched: bool

    @classmethod
    def of(cls, volume: Scan, model: Model) -> _Batch:
        if isinstance(volume, Volume):
            return cls([volume], False)
        if isinstance(volume, sitk.Image):
            return cls([Volume.from_sitk(volume)], False)
        rank = model.spatial_dims or 3
        if not isinstance(volume, Tensor) or volume.ndim not in (rank + 1, rank + 2) or not volume.numel():
            shape = tuple(volume.shape) if hasattr(volume, "shape") else type(volume).__name__
            axes = "C, D, H, W" if rank == 3 else "C, H, W"
            raise MedXAIError(f"A volume is a Volume, an image, or a tensor ({axes}) or (N, {axes}), not {shape}.")
        batched = volume.ndim == rank + 2
        return cls([Volume(v, np.eye(rank + 1)) for v in (volume if batched else volume[None])], batched)

    @property
    def fingerprint(self) -> str:
        return " ".join(v.fingerprint for v in self.volumes)


def _tell(
    model: Model | Ensemble, teller: Teller, volume: Scan, wanted: Sequence[Wanted], region: Region | None, run: Run
) -> list[Explanation]:
    if isinstance(model, Ensemble):
        raise MedXAIError(f"{teller.title} is of one network, not of an ensemble: ask its members one by one.")
    batch = _Batch.of(volume, model)
    if batch.batched:
        raise MedXAIError(f"{teller.title} is of one scan at a time: ask about each scan of the batch.")
    # What is like a scan is asked of no other scan.
    default = "itself" if model.task == "embedding" and teller.kind == "SimilarCases" else None
    targets = [as_target(default if t is None else t, model) for t in wanted]
    (scan,) = batch.volumes
    with model.ready(run.device) as device, run.measured(device):
        run.step(0, 1, "Preprocessing")
        seen = model.prepare(scan, region)
        if model.slides(seen.x.shape[1:]):
            raise MedXAIError(
                f"{model.name} looks at this scan window by window: say where with region=(x, y, z) in RAS mm."
            )
        x = seen.x[None].to(device, model.dtype)
        told = []
        for target in targets:
            question = Question(model, x, [seen], [target], run)
            with torch.no_grad():
                if bool(question.values(x)[0].isnan().any()):
                    raise _overflow(teller, model)
            told.append((teller.tell(question, scan), question.bound[0]))
    made = _common(model, teller, batch, region, run, device)
    return [finish(provenance=Provenance(**made, **_of_target([(bound, 1)]))) for finish, bound in told]


def _explain(
    model: Model, explainer: Technique, volume: Scan, wanted: Sequence[Wanted], region: Region | None, run: Run
) -> list[SaliencyMap]:
    assert isinstance(explainer, Explainer)
    if isinstance(model.network, External):
        raise MedXAIError(f"{model.name} is a report generator, whose inside is not known: ask it by captioning.")
    batch = _Batch.of(volume, model)
    targets = [as_target(t, model) for t in wanted]
    with model.ready(run.device) as device, run.measured(device):
        seen = []
        for i, v in enumerate(batch.volumes):
            run.step(i, len(batch.volumes), "Preprocessing")
            seen.append(model.prepare(v, region))
        answers: list[tuple[list[Bound], list[Attribution]]] = []
        look = _onlooker(run, seen, batch)
        slides = model.slides(seen[0].x.shape[1:])
        kind = WholeScan if slides else Question

        def answer(start: int, stop: int) -> None:
            x = torch.stack([p.x for p in seen[start:stop]]).to(device, model.dtype)
            question = kind(model, x, seen[start:stop], [t.part(start, stop) for t in targets], run, look=look)
            with _precise(question):
                if isinstance(question, WholeScan) and explainer.stitching is not None:
                    attributions = explain_by_windows(explainer, question)
                else:
                    attributions = explainer.attribute(question)
            answers.append((question.bound, attributions))

        # Whole scans are too large for two at a time.
        run.chunks(len(seen), size=1 if slides else len(seen)).map(answer, explainer.title)
        maps, intervals = [], []
        for i in range(len(targets)):
            values = torch.cat([a[i].values.detach().float().cpu() for _, a in answers])
            if not all(torch.isfinite(end) for end in values.aminmax()):
                raise _overflow(explainer, model)
            maps.append(_placed(values, seen, batch))
            found = [a[i].interval for _, a in answers]
            known = [half.detach().float().cpu() for half in found if half is not None]
            intervals.append(_placed(torch.cat(known), seen, batch) if known else None)
    made = _common(model, explainer, batch, region, run, device)
    return [
        SaliencyMap(
            provenance=Provenance(**made, **_of_target([(b[i], len(a[i].values)) for b, a in answers])),
            residual=_worst([attributions[i].residual for _, attributions in answers]),
            data=data,
            affine=batch.volumes[0].affine,
            signed=explainer.signed,
            batched=batch.batched,
            interval=interval,
        )
        for i, (data, interval) in enumerate(zip(maps, intervals, strict=True))
    ]


def _overflow(technique: Technique, model: Model) -> MedXAIError:
    return MedXAIError(
        f"{technique.title} of {model.name} is not finite: the network overflows on this input; check that it is "
        "preprocessed as in training."
    )


def _placed(values: Tensor, seen: Sequence[Prepared], batch: _Batch) -> Tensor:
    """Maps (N, C or 1, *spatial) on the grids of the volumes they are of."""
    pairs = zip(values, seen, batch.volumes, strict=True)
    placed = [resample(m, p.affine, v.shape, v.affine) for m, p, v in pairs]
    return torch.stack(placed) if batch.batched else placed[0]


def _onlooker(run: Run, seen: Sequence[Prepared], batch: _Batch) -> Callable[[Tensor], object] | None:
    """What shows a map that is not finished to whom the run says, on the volume's grid; not for a batch."""
    partial, volume = run.partial, batch.volumes[0]
    if partial is None or len(seen) > 1:
        return None

    def look(values: Tensor) -> None:
        # A copy, because the explainer goes on with its own.
        values = values[0].detach().to("cpu", torch.float32, copy=True)
        part, where = resample_part(values, seen[0].affine, volume.shape, volume.affine)
        partial(Partial(part, where, volume.shape))

    return look


@contextmanager
def _precise(question: Question) -> Iterator[None]:
    """Inside, the network computes in the precision of the run, if what it says then is what it says in its own.

    Raises:
        MedXAIError: when it is not.
    """
    model, precision = question.model, question.run.precision
    if precision is None:
        yield
        return
    with torch.no_grad():
        exact = question.values(question.x)
    with model.computing_in(precision):
        with torch.no_grad():
            found = question.values(question.x)
        # Stacked, because Python's max may pass over what is not a number.
        missed = float(torch.stack([((f - e) / e).abs() for f, e in zip(found, exact, strict=True)]).max())
        said = f"{precision} changes what is explained by {missed:.2%}"
        if not missed <= _PRECISE:
            raise MedXAIError(f"{said}, more than {_PRECISE:.0%}: leave the precision as it is.")
        question.run.note(f"The network computed in {precision}: {said}.")
        yield


def _fresh(run: Run | None) -> Run:
    """The same settings with nothing tallied yet, so that one `Run` may serve many requests."""
    return replace(run) if run is not None else Run()


def _of_target(chunks: list[tuple[Bound, int]]) -> dict[str, Any]:
    """One target over the chunks of a batch, each with its number of samples."""
    specs = [(b.target.spec(), count) for b, count in chunks]
    target = specs[0][0]
    for key in [key for key in target if any(s[key] != target[key] for s, _ in specs)]:
        each = [v for s, n in specs for v in (s[key] if isinstance(s[key], tuple) else (s[key],) * n)]
        target = {**target, key: each}
    return {"target": target, "target_label": ", ".join(dict.fromkeys(b.label for b, _ in chunks))}


def _worst(residuals: list[dict[str, float]]) -> dict[str, float]:
    return {name: max(r[name] for r in residuals) for name in residuals[0]}


def _common(
    model: Model, explainer: Technique, batch: _Batch, region: Region | None, run: Run, device: torch.device
) -> dict[str, Any]:
    return {
        "method": explainer.id,
        "title": explainer.title,
        "parameters": {**explainer.model_dump(mode="json"), **run.settled},
        "region": None if region is None else np.asarray(region, dtype=float).tolist(),
        "model": {
            "name": model.name,
            "task": model.task,
            "source": model.source,
            "fingerprint": model.fingerprint,
            **({} if model.window is None else {"window": asdict(model.window)}),
            **({} if run.precision is None else {"precision": run.precision}),
        },
        "volume": {
            "source": batch.volumes[0].source,
            "fingerprint": batch.fingerprint,
            "shape": list(batch.volumes[0].data.shape),
        },
        "versions": {
            "medxai": __version__,
            "python": platform.python_version(),
            "torch": torch.__version__,
            "monai": monai.__version__,
            "numpy": np.__version__,
            "SimpleITK": sitk.Version.VersionString(),
        },
        "seed": run.seed,
        "device": str(device),
        "created": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "seconds": run.cost.seconds,
        "peak_memory": run.cost.peak_memory,
        "forwards": run.cost.forwards,
        "backwards": run.cost.backwards,
        "notes": list(run.notes),
        "partial": run.unfinished,
        "operators": run.operators,
    }
