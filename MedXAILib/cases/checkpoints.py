"""What a network learnt from the cases of a library at several moments of its training, by their gradients there."""

from __future__ import annotations

import copy
import hashlib
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from MedXAILib import resources
from MedXAILib.bundle import load_weights
from MedXAILib.cases.library import Library
from MedXAILib.cases.record import Record
from MedXAILib.cases.spaces import fingerprint
from MedXAILib.engines.training_gradients import TrainingGradients
from MedXAILib.errors import Cancelled, MedXAIError, OutOfMemory
from MedXAILib.model import Model
from MedXAILib.run import Run

_ENDINGS = (".safetensors", ".pt", ".pth")


def at_checkpoints(model: Model, names: Sequence[str]) -> list[Model]:
    """The network of `model` with the weights in files, or in all those of a folder, in the order of their names.

    Raises:
        MedXAIError: when there are none, or some do not fit.
    """
    found = []
    for name in names:
        path = Path(name).expanduser()
        files = sorted(f for f in path.iterdir() if f.suffix in _ENDINGS) if path.is_dir() else [path]
        if not files or not files[0].is_file():
            raise MedXAIError(f"There are no weights at '{name}': give files, or a folder, of {', '.join(_ENDINGS)}.")
        for file in files:
            network = copy.deepcopy(model.network)
            load_weights(network, file, file.name)
            found.append(model.with_network(network))
    return found


def gradients_of_cases(
    several: Sequence[TrainingGradients], library: Library, records: Sequence[Record], run: Run
) -> list[np.ndarray]:
    """What is kept (N, K + 1) of the cases `records` by each of `several` networks that take the same input. All of it
    is kept on disk, because every case is read for it.

    A case whose scan cannot be read teaches nothing, which is noted; then nothing is kept on disk.

    Raises:
        MedXAIError: when that is so of all.
    """
    files = [_file(one, library, records) for one in several]
    if all(file.is_file() for file in files):
        return [np.load(file) for file in files]
    found, lost = _computed(several, library, records, run)
    # What cannot be read now may be there the next time.
    if not lost:
        for file, kept in zip(files, found, strict=True):
            file.parent.mkdir(parents=True, exist_ok=True)
            beside = file.with_name(f"{os.getpid()}-{file.name}")
            np.save(beside, kept)
            beside.replace(file)
    return found


def _computed(
    several: Sequence[TrainingGradients], library: Library, records: Sequence[Record], run: Run
) -> tuple[list[np.ndarray], int]:
    """What is kept by each, and how many cases cannot be read."""
    rows: list[dict[int, np.ndarray]] = [{} for _ in several]
    lost: list[MedXAIError] = []
    model = several[0].model
    with model.keeping_last():
        # Those of one scan follow each other, so that it is preprocessed once.
        for done, i in enumerate(sorted(range(len(records)), key=lambda i: records[i].volume)):
            run.step(done, len(records), "Gradients of the cases")
            try:
                seen = model.prepare(library.volume(records[i]), records[i].region)
            except (Cancelled, OutOfMemory):
                raise
            except MedXAIError as error:
                lost.append(error)
                continue
            x = seen.x[None].to(model.device, model.dtype)
            for one, kept in zip(several, rows, strict=True):
                with one.model.ready(model.device):
                    kept[i] = one.kept(x, [records[i].label], run)[0]
    if len(lost) == len(records):
        raise MedXAIError(f"None of the {len(lost)} cases can be read. The first: {lost[0]}") from lost[0]
    if lost:
        run.note(f"{len(lost)} of {len(records)} cases count for nothing, because they cannot be read: {lost[0]}")
    blank = [np.zeros_like(next(iter(kept.values()))) for kept in rows]
    every = range(len(records))
    return [np.stack([k.get(i, zero) for i in every]) for k, zero in zip(rows, blank, strict=True)], len(lost)


def _file(one: TrainingGradients, library: Library, records: Sequence[Record]) -> Path:
    """Named after all that decides what is in it."""
    cases = [(record.uid, record.label, record.region) for record in records]
    digest = hashlib.sha256(repr((fingerprint(one.model), one.length, one.seed, cases)).encode())
    digest.update(library.matrix("plain")[1].tobytes())
    return resources.user_folder() / "gradients" / f"{digest.hexdigest()[:32]}.npy"
