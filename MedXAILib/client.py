"""Asking a worker process to explain, without ever waiting for it: for a user interface, and for anyone else.

>>> with WorkerClient() as client:
...     job = client.submit({"op": "explain", "model": "bundle", "volume": "chest.nrrd", "method": "gradcam"})
...     folder = job.wait()["folders"][0]           # or call client.poll() from a timer and look at job.state
"""

from __future__ import annotations

import contextlib
import os
import queue
import shlex
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np

from MedXAILib import protocol
from MedXAILib.errors import Cancelled, MedXAIError
from MedXAILib.link import Link

State = Literal["queued", "running", "done", "failed", "cancelled"]

# Bytes of log to keep, at most twice that on the disk.
_LOG = 500_000


class Progress(NamedTuple):
    """As `MedXAILib.run.Progress`, which needs PyTorch: `done` of `total` steps, what it does, seconds left or None."""

    done: int
    total: int
    message: str
    seconds_left: float | None


class Job:
    """One request on its way. `state` says where it is; `progress`, `result` and `error` are there when they are.

    The result of "explain" has the "folders" of its explanations, for `MedXAILib.load_explanation`. They are there
    until `discard`, or until the client is closed.
    """

    def __init__(
        self,
        client: WorkerClient,
        id: int,
        request: dict[str, Any],
        on_progress: Callable[[Job], object] | None,
        on_done: Callable[[Job], object] | None,
        on_partial: Callable[[Job, np.ndarray], object] | None,
    ) -> None:
        self.id, self.op = id, str(request["op"])
        self.state: State = "queued"
        self.progress: Progress | None = None
        self.result: dict[str, Any] | None = None
        self.error: MedXAIError | None = None
        self._client, self._request = client, request
        self._on_progress, self._on_done, self._on_partial = on_progress, on_done, on_partial
        self._deadline: float | None = None

    @property
    def finished(self) -> bool:
        """Whether it is done, failed or cancelled."""
        return self.state in ("done", "failed", "cancelled")

    def wait(self, timeout: float | None = None) -> dict[str, Any]:
        """The result, waiting at most `timeout` seconds for it.

        Raises:
            MedXAIError: Cancelled, Untrusted, OutOfMemory or another reason why there is none.
            TimeoutError: when it takes longer; it goes on.
        """
        until = None if timeout is None else time.monotonic() + timeout
        while not self.finished:
            if until is not None and time.monotonic() > until:
                raise TimeoutError(f"No result within {timeout} s.")
            self._client.poll(0.05)
        if self.error is not None:
            raise self.error
        assert self.result is not None
        return self.result

    def cancel(self) -> None:
        """Stop it: at its next step, or together with the worker when that takes too long."""
        self._client._cancel(self)

    def finish(self) -> None:
        """End it early with the map as far as it is, which its provenance then calls partial. What cannot end early
        (methods that are not `anytime`, other requests, and workers that do not know how to) is cancelled. It may
        still be cancelled afterwards."""
        self._client._finish_early(self)

    def discard(self) -> None:
        """Remove the files of the result, once they have been read or copied."""
        shutil.rmtree(self._client.folder / str(self.id), ignore_errors=True)


class WorkerClient:
    """Keeps a worker process running and hands it one job at a time. To be used from one thread.

    Args:
        command: what starts the worker: a Python on this machine, or ["ssh", "host", "python", "-m",
            "MedXAILib.worker"] for one elsewhere.
        folder: where to make the folder for what passes between the two (default: the system's temporary folder).
        stream: whether scans and results travel in the stream, because the worker has no disk in common with us.
        environment: the environment variables of the worker (default: ours).
        log: the file that gets what the worker has to say (default: worker.log in `client.folder`).
        grace: seconds a cancelled job has to stop by itself before the worker is killed.
        patience: seconds the worker has to start.
    """

    def __init__(
        self,
        command: Sequence[str] = (sys.executable, "-m", "MedXAILib.worker"),
        folder: str | Path | None = None,
        *,
        stream: bool = False,
        environment: Mapping[str, str] | None = None,
        log: str | Path | None = None,
        grace: float = 0.8,
        patience: float = 120.0,
    ) -> None:
        self.command, self.stream, self.grace, self.patience = list(command), stream, grace, patience
        self.environment = {**(os.environ if environment is None else environment), "PYTHONUTF8": "1"}
        if self.command[0] == sys.executable:
            # The same Python must find the same MedXAI, even where that was never installed.
            paths = str(Path(__file__).resolve().parent.parent), self.environment.get("PYTHONPATH")
            self.environment["PYTHONPATH"] = os.pathsep.join(filter(None, paths))
        self._temporary = tempfile.TemporaryDirectory(prefix="medxai-", dir=folder, ignore_cleanup_errors=True)
        self.folder = Path(self._temporary.name).resolve()
        self.log = self.folder / "worker.log" if log is None else Path(log)
        self.log.parent.mkdir(parents=True, exist_ok=True)
        self.worker: dict[str, Any] = {}
        """What the worker said of itself: version, PyTorch, GPUs."""
        self._events: queue.Queue[tuple[Link, dict[str, Any]]] = queue.Queue()
        self._waiting: deque[Job] = deque()
        self._running: Job | None = None
        self._link: Link | None = None
        self._jobs = 0
        self._logging = threading.Lock()

    def __enter__(self) -> WorkerClient:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def start(self) -> None:
        """Start the worker if there is none, so that it is warm when it is needed. This does not wait for it."""
        if self._link is not None:
            return
        try:
            self._link = Link(self.command, self.environment, self.folder, self.patience, self._told, self._log)
        except OSError as error:
            self._fail_waiting(f"The worker cannot be started ({error}): check the command '{self._command}'.")
            return
        scratch = None if self.stream else str(self.folder)
        self._link.outbox.put(({"id": 0, "op": "hello", **protocol.greeting(), "scratch": scratch}, None))

    def submit(
        self,
        request: dict[str, Any],
        on_progress: Callable[[Job], object] | None = None,
        on_done: Callable[[Job], object] | None = None,
        on_partial: Callable[[Job, np.ndarray], object] | None = None,
    ) -> Job:
        """Ask for one of the operations of docs/worker.md, such as ``{"op": "explain", ...}``. `poll` calls the
        callbacks with the job, and `on_partial` also with what the map is so far, (D, H, W) on the volume's grid. Leave
        arrays alone until the job is finished: they are read in the background."""
        self._jobs += 1
        if on_partial is not None:
            request = {**request, "partial": True}
        job = Job(self, self._jobs, request, on_progress, on_done, on_partial)
        self._waiting.append(job)
        self.start()
        self._next()
        return job

    def poll(self, wait: float = 0.0) -> None:
        """Take in what the worker said since, waiting at most `wait` seconds for something, and see that it is well."""
        with contextlib.suppress(queue.Empty):
            event = self._events.get(timeout=wait) if wait > 0 else self._events.get_nowait()
            while True:
                self._take(*event)
                event = self._events.get_nowait()
        now, link, job = time.monotonic(), self._link, self._running
        if link is not None and not link.ending:
            if not link.ready and now > link.deadline:
                self._end(link, f"no answer within {self.patience:g} s")
            elif job is not None and job._deadline is not None and now > job._deadline:
                self._end(link, "killed")
        self._next()

    def close(self) -> None:
        """End the worker, cancel every job and remove every file."""
        link, self._link = self._link, None
        if link is not None:
            if self._running is None:
                link.outbox.put(({"id": 0, "op": "shutdown"}, None))
                with contextlib.suppress(subprocess.TimeoutExpired):
                    link.process.wait(self.grace)
            link.end()
        for job in [*filter(None, [self._running]), *self._waiting]:
            self._finish(job, Cancelled("Cancelled: the worker was closed."))
        self._waiting.clear()
        self._temporary.cleanup()

    @property
    def _command(self) -> str:
        return " ".join(shlex.join(self.command).split())

    def _told(self, link: Link, message: dict[str, Any]) -> None:
        self._events.put((link, message))

    def _next(self) -> None:
        """Hand the next job to the worker, if it is free."""
        link = self._link
        if link is None or not link.ready or link.ending or self._running is not None or not self._waiting:
            return
        if link.process.poll() is not None:
            # It died idle: the job waits for the one that follows.
            return
        job = self._running = self._waiting.popleft()
        job.state = "running"
        request, volume = job._request, job._request.get("volume")
        if isinstance(volume, dict) and volume.get("key") is not None:
            if volume["key"] == link.volume:
                request = {**request, "volume": {"key": volume["key"]}}
            link.volume = volume["key"]
        link.outbox.put(({**request, "id": job.id}, None if self.stream else self._of(job) / "request"))

    def _take(self, link: Link, message: dict[str, Any]) -> None:
        if link is not self._link:
            return
        job, kind = self._running, message.get("type")
        if kind == "gone":
            self._lost(link, message["why"])
        elif message.get("id") == 0 and kind in ("result", "error") and not link.ready:
            self._greeted(link, message)
        elif job is None or message.get("id") != job.id:
            self._log(f"Nobody asked for this: {str(message)[:200]}")
        elif kind == "progress":
            job.progress = Progress(*(message[name] for name in Progress._fields))
            if job._on_progress is not None:
                job._on_progress(job)
        elif kind == "partial":
            if link.partials and job._on_partial is not None:
                job._on_partial(job, link.partials.pop())
        elif kind == "error":
            self._finish(job, protocol.error(message))
        elif kind == "result":
            try:
                job.result = self._received(job, message["value"])
            except OSError as error:
                said = f"The result did not arrive whole ({error}): try again, with more room in '{self.folder}'."
                self._finish(job, MedXAIError(said))
            else:
                self._finish(job, None)

    def _greeted(self, link: Link, message: dict[str, Any]) -> None:
        try:
            if message["type"] == "error":
                raise protocol.error(message)
            protocol.check(message["value"])
        except MedXAIError as error:
            self._link = None
            self._end(link, "refused")
            self._fail_waiting(str(error))
            return
        self.worker = message["value"]
        link.ready = True

    def _received(self, job: Job, result: dict[str, Any]) -> dict[str, Any]:
        """The result with its explanations in folders of ours.

        Raises:
            OSError: when they are not whole.
        """
        if "folders" not in result:
            return result
        folders = [self._of(job) / str(i) for i in range(len(result["folders"]))]
        for folder, files in zip(folders, result["folders"], strict=True):
            if isinstance(files, dict):
                folder.mkdir(parents=True)
                for name, data in files.items():
                    (folder / Path(name).name).write_bytes(data)
            if not (folder / "explanation.json").is_file():
                raise FileNotFoundError(f"{folder / 'explanation.json'} is missing")
        return {**result, "folders": folders}

    def _end(self, link: Link, why: str) -> None:
        """Kill a worker, without waiting until it is gone."""
        link.ending, link.why = True, why
        threading.Thread(target=link.end, daemon=True).start()

    def _lost(self, link: Link, why: str) -> None:
        """The worker is gone: say so to whom it concerns, and start another where it is missed."""
        self._link, job = None, self._running
        self._log(f"The worker is gone: {why}.")
        if job is not None:
            said = (
                f"The worker stopped in the middle of this ({why}), perhaps for lack of memory: try again, or choose a "
                f"smaller region; its log is '{self.log}'."
            )
            self._finish(job, MedXAIError(said))
        if not link.ready:
            said = ", ".join([why, *link.last_words])
            self._fail_waiting(f"The worker did not start ({said}): check the command '{self._command}'.")
        elif job is not None or self._waiting:
            self.start()

    def _cancel(self, job: Job) -> None:
        if job in self._waiting:
            self._waiting.remove(job)
            self._finish(job, Cancelled("Cancelled before it began."))
        elif job is self._running and job._deadline is None and self._link is not None:
            job._deadline = time.monotonic() + self.grace
            self._link.outbox.put(({"id": job.id, "op": "cancel"}, None))

    def _finish_early(self, job: Job) -> None:
        if job is self._running and self._link is not None and self.worker.get("finishes"):
            self._link.outbox.put(({"id": job.id, "op": "finish"}, None))
        else:
            self._cancel(job)

    def _fail_waiting(self, why: str) -> None:
        waiting, self._waiting = self._waiting, deque()
        for job in waiting:
            self._finish(job, MedXAIError(why))

    def _finish(self, job: Job, error: MedXAIError | None) -> None:
        if job is self._running:
            self._running = None
        if job._deadline is not None:
            # It may have ended in another way just before it heard.
            error = Cancelled("Cancelled; no result was written.")
        if error is not None:
            job.result = None
            if self._link is not None:
                # Whether the worker got as far as keeping the scan is not known.
                self._link.volume = None
        job.error, job._request = error, {}
        job.state = "done" if error is None else "cancelled" if isinstance(error, Cancelled) else "failed"
        passing = [self._of(job) / "request", self._of(job) / "partial"] if error is None else [self._of(job)]
        for folder in passing:
            shutil.rmtree(folder, ignore_errors=True)
        if job._on_done is not None:
            job._on_done(job)

    def _of(self, job: Job) -> Path:
        return self.folder / str(job.id)

    def _log(self, text: str) -> None:
        with self._logging, contextlib.suppress(OSError):
            with self.log.open("a", encoding="utf-8") as file:
                file.write(f"{text}\n")
            if self.log.stat().st_size > 2 * _LOG:
                self.log.write_bytes(self.log.read_bytes()[-_LOG:])
