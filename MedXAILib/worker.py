"""The process that computes: ``python -m MedXAILib.worker``. It reads requests from its standard input and answers on
its standard output (docs/worker.md); `MedXAILib.client` starts it and talks to it."""

from __future__ import annotations

import contextlib
import faulthandler
import inspect
import json
import os
import queue
import shutil
import signal
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import asdict
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch

from MedXAILib import protocol
from MedXAILib.description import describe
from MedXAILib.errors import MedXAIError, NotInstalled, Untrusted, unknown
from MedXAILib.explanation import Provenance, SaliencyMap
from MedXAILib.loading import load_model
from MedXAILib.memory_ladder import within_memory
from MedXAILib.model import Model
from MedXAILib.registry import EXPLAINERS
from MedXAILib.request import explain
from MedXAILib.run import Partial, Progress, Run, out_of_memory
from MedXAILib.target import Target, from_spec
from MedXAILib.trust.card import trust_card
from MedXAILib.trust.judged import Judged
from MedXAILib.volume import Volume, load_volume

# Seconds a request has to stop when nobody is there any more to hear its answer.
_GRACE = 2.0

# Seconds between two reports on the same step: nobody reads faster.
_PACE = 0.05


class Worker:
    """Answers one request after the other. The last two networks, the last scan and what they make of it are kept."""

    def __init__(self, channel: protocol.Channel) -> None:
        self._channel = channel
        self._requests: queue.Queue[dict[str, Any] | None] = queue.Queue()
        self._cancelled: set[int] = set()
        self._finishing: set[int] = set()
        self._alone = threading.Event()
        # The client's folder; None when the two have no disk in common.
        self._scratch: Path | None = None
        self._scan: tuple[Any, Volume] | None = None
        self._operations: dict[str, Callable[..., dict[str, Any]]] = {
            "hello": self._hello,
            "methods": self._methods,
            "load": self._load,
            "predict": self._predict,
            "explain": self._explain,
            "check": self._check,
        }

    def serve(self) -> None:
        """Answer until told to stop, or until the client is gone."""
        threading.Thread(target=self._listen, daemon=True).start()
        for request in iter(self._requests.get, None):
            self._answer(**request)
        self._tidy()

    def _listen(self) -> None:
        try:
            for message in self._channel:
                if message["op"] == "shutdown":
                    self._requests.put(None)
                    return
                if message["op"] == "cancel":
                    self._cancelled.add(message["id"])
                elif message["op"] == "finish":
                    self._finishing.add(message["id"])
                else:
                    self._requests.put(message)
            # The client is gone, and with it whoever would have removed its files.
            self._alone.set()
        except (ValueError, KeyError, OSError):
            _log()
        self._requests.put(None)
        time.sleep(_GRACE)
        self._tidy()
        os._exit(1)

    def _tidy(self) -> None:
        if self._alone.is_set() and self._scratch is not None:
            shutil.rmtree(self._scratch, ignore_errors=True)

    def _answer(self, id: int, op: str, **fields: Any) -> None:
        try:
            if op not in self._operations:
                raise unknown("request", op, self._operations)
            try:
                inspect.signature(self._operations[op]).bind(id, **fields)
            except TypeError as error:
                raise MedXAIError(f"This is not how to ask to {op} ({error}): see docs/worker.md.") from error
            self._say(id, "result", value=self._operations[op](id, **fields))
        except Exception as error:
            _log()
            # When even this cannot be said there is nobody to hear it, which _listen notices.
            with contextlib.suppress(EOFError):
                self._say(id, "error", **_described(error))
        if torch.cuda.is_available():
            # Whoever draws the result may want to do so on the same GPU.
            torch.cuda.empty_cache()

    def _say(self, id: int, type: str, **fields: Any) -> None:
        folder = None if self._scratch is None else self._scratch / str(id)
        self._channel.send({"id": id, "type": type, **fields}, folder)

    def _show(self, id: int, so_far: Partial) -> None:
        folder = None if self._scratch is None else self._scratch / str(id) / "partial"
        # It is there to be looked at: no reason to stop when it cannot be written.
        with contextlib.suppress(OSError):
            if folder is not None:
                folder.mkdir(exist_ok=True)
            start = [axis.start for axis in so_far.where]
            part = {"map": so_far.part.sum(0).numpy(), "start": start, "shape": so_far.shape}
            self._channel.send({"id": id, "type": "partial", **part}, folder)

    def _hello(self, id: int, scratch: str | None = None, **client: Any) -> dict[str, Any]:
        protocol.check(client)
        self._scratch = None if scratch is None else Path(scratch)
        gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
        return {**protocol.greeting(), "torch": torch.__version__, "gpus": gpus, "finishes": True}

    def _methods(self, id: int) -> dict[str, Any]:
        return {"methods": [describe(kind) for kind in EXPLAINERS.values()]}

    def _load(self, id: int, model: str, trust: bool = False, known: dict[str, Any] | None = None) -> dict[str, Any]:
        loaded = _model(model, trust, known)
        return {
            "name": loaded.name,
            "source": loaded.source,
            "fingerprint": loaded.fingerprint,
            "task": loaded.task,
            "class_names": list(loaded.class_names),
            "channels": loaded.channels,
            "spatial_dims": loaded.spatial_dims,
            "patch_size": None if loaded.patch_size is None else list(loaded.patch_size),
            "window": list(loaded.window.roi_size) if loaded.window is not None and loaded.takes_whole else None,
            "suggested_layers": list(loaded.layers),
            "layers": [] if loaded.scripted else [name for name, _ in loaded.network.named_modules() if name],
        }

    def _predict(
        self,
        id: int,
        model: str,
        volume: Any,
        region: Sequence[Any] | None = None,
        device: str | None = None,
        trust: bool = False,
        known: dict[str, Any] | None = None,
    ) -> dict[str, Any]:
        run = self._run(id)
        run.step(0, 1, "Reading the network")
        network = _model(model, trust, known)
        _place(network, device or _device())
        run.step(0, 1, "Reading the scan")
        scan = self._volume(volume)
        run.step(0, 1, "Asking the network")
        prediction = network.predict(scan, region)
        labels = None if prediction.labels is None else prediction.labels.data.short().numpy()
        return {"scores": prediction.scores, "labels": labels, "text": prediction.text}

    def _explain(
        self,
        id: int,
        model: str,
        volume: Any,
        method: str = "gradcam",
        target: Any = None,
        region: Sequence[Any] | None = None,
        parameters: dict[str, Any] | None = None,
        seed: int = 0,
        device: str | None = None,
        memory_budget: int | None = None,
        allow_smaller_region: bool = False,
        allow_cpu: bool = False,
        partial: bool = False,
        trust: bool = False,
        known: dict[str, Any] | None = None,
    ) -> dict[str, Any]:
        show = (lambda so_far: self._show(id, so_far)) if partial else None
        anytime = method in EXPLAINERS and EXPLAINERS[method].anytime
        run = self._run(id, anytime, device=device or _device(), seed=seed, memory_budget=memory_budget, partial=show)
        run.step(0, 1, "Reading the network")
        network = _model(model, trust, known)
        run.step(0, 1, "Reading the scan")
        scan = self._volume(volume)
        given = _with_volumes(parameters or {})
        wanted = [_target(t) for t in (target if isinstance(target, list) else [target])]
        # A network that does not fit stays where it is, which the ladder notices in its turn.
        with contextlib.suppress(torch.OutOfMemoryError):
            _place(network, device or _device())
        found = within_memory(
            lambda region, run: explain(network, scan, method, target=wanted, region=region, run=run, **given),
            network,
            scan,
            region,
            run,
            allow_smaller_region=allow_smaller_region,
            allow_cpu=allow_cpu,
        )
        run.step(0, 1, "Writing")
        if self._scratch is not None:
            return {"folders": [e.save(self._scratch / str(id) / str(i)) for i, e in enumerate(found)]}
        with tempfile.TemporaryDirectory(prefix="medxai-") as own:
            return {"folders": [_files(e.save(Path(own) / str(i))) for i, e in enumerate(found)]}

    def _check(
        self,
        id: int,
        model: str,
        volume: Any,
        explanation: dict[str, Any],
        segmentation: Any = None,
        checks: Sequence[str] | None = None,
        device: str | None = None,
        memory_budget: int | None = None,
        trust: bool = False,
        known: dict[str, Any] | None = None,
    ) -> dict[str, Any]:
        run = self._run(id, device=device or _device(), memory_budget=memory_budget)
        run.step(0, 1, "Reading the network")
        network = _model(model, trust, known)
        _place(network, device or _device())
        run.step(0, 1, "Reading the scan")
        scan = self._volume(volume)
        mask = None if segmentation is None else _volume(segmentation)
        map = _volume(explanation["map"])
        found = SaliencyMap(
            Provenance(**explanation["provenance"]),
            explanation["residual"],
            map.data,
            map.affine,
            explanation["signed"],
        )
        return trust_card(Judged(found, network, scan, mask, run), checks).to_json()

    def _run(self, id: int, anytime: bool = False, **settings: Any) -> Run:
        """The run of a request: told to finish, one that is `anytime` gives what it has, and any other gives up."""

        def finishing() -> bool:
            return id in self._finishing

        def cancelled() -> bool:
            return id in self._cancelled or self._alone.is_set() or (finishing() and not anytime)

        return Run(progress=self._reporter(id), cancel=cancelled, enough=finishing, **settings)

    def _reporter(self, id: int) -> Callable[[Progress], None]:
        last = "", 0.0

        def report(progress: Progress) -> None:
            nonlocal last
            now = time.monotonic()
            if progress.message != last[0] or progress.done == progress.total or now - last[1] >= _PACE:
                last = progress.message, now
                self._say(id, "progress", **asdict(progress))

        return report

    def _volume(self, given: Any) -> Volume:
        """The scan that a request names by path, or brings along; one brought along before is known by its key."""
        if not isinstance(given, dict):
            return load_volume(given)
        key = given.get("key")
        if "data" not in given:
            if self._scan is None or self._scan[0] != key:
                raise MedXAIError(f"The worker does not have the scan '{key}' any more: send it again.")
            return self._scan[1]
        scan = _volume(given)
        self._scan = None if key is None else (key, scan)
        return scan


def _volume(given: dict[str, Any]) -> Volume:
    # A copy, because the client is about to remove the file that the array is mapped from.
    data = torch.from_numpy(np.array(given["data"], dtype=np.float32))
    return Volume(data, np.asarray(given["affine"]), given.get("source"))


def _with_volumes(given: dict[str, Any]) -> dict[str, Any]:
    """The same, with volumes for what came as one: a mask, or another scan."""
    return {name: _volume(v) if isinstance(v, dict) and "data" in v else v for name, v in given.items()}


def _target(given: Any) -> Target | str | int | None:
    if not isinstance(given, dict):
        return given
    try:
        return from_spec(_with_volumes(given))
    except (KeyError, TypeError) as error:
        raise MedXAIError(f"{given} is no target ({error}): give what Target.spec() says.") from error


def _model(source: str, trust: bool, known: dict[str, Any] | None) -> Model:
    path = Path(source)
    stamp = [(str(p), p.stat().st_mtime_ns, p.stat().st_size) for p in (path, *path.glob("*/*")) if p.exists()]
    return _loaded(source, trust, json.dumps(known or {}), tuple(sorted(stamp)))


@lru_cache(maxsize=2)
def _loaded(source: str, trust: bool, known: str, stamp: object) -> Model:
    model = load_model(source, trust, **json.loads(known))
    model.keeps_last = True
    return model


def _device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


def _place(model: Model, device: str) -> None:
    """Move `model` to `device` for good: there and back for every request would cost more than many a map."""
    with model.ready(device) as there:
        pass
    model.network.to(there)


def _files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def _described(error: Exception) -> dict[str, Any]:
    """An error as the client gets it: its kind, one line, and the code of a model that is not trusted or what pip has
    to install."""
    kinds = (kind for kind, type_ in protocol.ERRORS.items() if isinstance(error, type_))
    kind = "out_of_memory" if out_of_memory(error) else next(kinds, "unexpected")
    message = " ".join(str(error).split())
    if kind == "unexpected":
        message = f"{type(error).__name__}: {message} (unexpected: the worker's log says where)"
    elif not isinstance(error, MedXAIError):
        message = "Out of memory: choose a smaller region or a coarser spacing, or close other programs."
    code = error.code if isinstance(error, Untrusted) else ""
    requirement = error.requirement if isinstance(error, NotInstalled) else ""
    return {"kind": kind, "message": message, "code": code, "requirement": requirement}


def _log() -> None:
    # The client, who keeps the log, may be gone.
    with contextlib.suppress(OSError):
        traceback.print_exc()


def main() -> None:
    """Serve whoever started this process."""
    # Ctrl+C in a terminal is for the client, which then tells us.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    faulthandler.enable()
    reader, writer = os.fdopen(os.dup(0), "rb"), os.fdopen(os.dup(1), "wb")
    # From here on whatever else is printed goes to the log, by Python and by the libraries below it.
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.dup2(2, 1)
    sys.stdout = sys.stderr
    Worker(protocol.Channel(reader, writer, lambda line: print(f"Not a request: {line[:200]!r}"))).serve()


if __name__ == "__main__":
    main()
