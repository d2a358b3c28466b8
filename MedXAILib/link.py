"""The process of a worker, and the threads that speak with it."""

from __future__ import annotations

import contextlib
import queue
import signal
import subprocess
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import IO, Any

import numpy as np
import psutil

from MedXAILib import protocol


class Link:
    """A worker process with a thread for each of its pipes, so that nobody ever waits for one of them.

    `tell` gets its messages, the last of which says that it is "gone"; `log` gets what else it prints. `folder` is for
    what passes between the two.
    """

    def __init__(
        self,
        command: Sequence[str],
        environment: Mapping[str, str],
        folder: Path,
        patience: float,
        tell: Callable[[Link, dict[str, Any]], object],
        log: Callable[[str], object],
    ) -> None:
        self.ready = False
        self.ending = False
        self.why = ""
        self.volume: str | None = None
        self.partials: deque[np.ndarray] = deque(maxlen=1)
        """The latest map that is not finished: nobody may come to fetch them for long."""
        self.outbox: queue.Queue[tuple[dict[str, Any], Path | None] | None] = queue.Queue()
        self.last_words: deque[str] = deque(maxlen=3)
        self.deadline = time.monotonic() + patience
        self._folder, self._tell, self._write_log = folder, tell, log
        self.process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env=environment,
            creationflags=getattr(subprocess, "CREATE_NO_WINDOW", 0),
        )
        stdin, stdout, stderr = self.process.stdin, self.process.stdout, self.process.stderr
        assert stdin is not None and stdout is not None and stderr is not None
        self._channel = protocol.Channel(stdout, stdin, self._log)
        work = ((self._read, stdout), (self._write, stdin), (self._keep_log, stderr))
        self._threads = [threading.Thread(target=target, args=(pipe,), daemon=True) for target, pipe in work]
        for thread in self._threads:
            thread.start()

    def end(self) -> None:
        """Kill the process and those it started, which a launcher or a shell would leave behind; then say that it is
        gone. This waits until it is."""
        self.ending = True
        if not self.why:
            # It has closed its output and is about to end by itself, which tells more.
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.process.wait(1)
        with contextlib.suppress(psutil.NoSuchProcess):
            parent = psutil.Process(self.process.pid)
            for process in [*parent.children(recursive=True), parent]:
                with contextlib.suppress(psutil.NoSuchProcess):
                    process.kill()
        code = self.process.wait()
        self.outbox.put(None)
        for thread in self._threads:
            if thread is not threading.current_thread():
                thread.join(1)
        why = f"{signal.strsignal(-code)}" if code < 0 else f"exit code {code}"
        self._tell(self, {"type": "gone", "why": self.why or why})

    def _read(self, pipe: IO[bytes]) -> None:
        with pipe:
            try:
                for message in self._channel:
                    if message.get("type") == "partial":
                        self.partials.append(self._taken(message))
                    self._tell(self, message)
            except (ValueError, KeyError, OSError) as error:
                self.why = f"what it said arrived damaged: {error}"
        self.end()

    def _taken(self, message: dict[str, Any]) -> np.ndarray:
        """The map of a message on the volume's grid, and its file removed."""
        array = message.pop("map")
        own = np.zeros(message["shape"], np.float32)
        own[tuple(slice(a, a + size) for a, size in zip(message["start"], array.shape, strict=True))] = array
        path = getattr(array, "filename", None)
        # On Windows a file that is mapped cannot be removed.
        del array
        if path is not None and Path(path).is_relative_to(self._folder):
            # What is left goes with the job.
            with contextlib.suppress(OSError):
                Path(path).unlink()
        return own

    def _write(self, pipe: IO[bytes]) -> None:
        with contextlib.suppress(OSError), pipe:
            for message, folder in iter(self.outbox.get, None):
                try:
                    if folder is not None:
                        folder.mkdir(parents=True, exist_ok=True)
                    self._channel.send(message, folder)
                except EOFError:
                    return
                except (OSError, TypeError) as error:
                    full = f"The scan cannot be handed to the worker ({error}): make room in '{self._folder}'."
                    said = full if isinstance(error, OSError) else str(error)
                    failed = {"id": message["id"], "type": "error", "kind": "refused", "message": said, "code": ""}
                    self._tell(self, failed)

    def _keep_log(self, pipe: IO[bytes]) -> None:
        with pipe:
            for line in iter(lambda: pipe.readline(1 << 16), b""):
                self._log(line)

    def _log(self, line: bytes) -> None:
        if text := line.decode("utf-8", "replace").rstrip():
            self.last_words.append(text)
            self._write_log(text)
