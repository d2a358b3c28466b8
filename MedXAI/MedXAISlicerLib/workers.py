"""The worker of this Slicer: one process for all that is computed, from its first use to the end of Slicer."""

from __future__ import annotations

import os
import shlex
import shutil
import sys
from pathlib import Path

import slicer

from MedXAISlicerLib import settings

# Between two looks at what the worker has said, ms.
_INTERVAL = 10

_shared = None


def shared():
    """The worker that everything in this Slicer uses."""
    global _shared
    if _shared is None:
        _shared = Worker()
        if hasattr(slicer, "app"):
            slicer.app.connect("aboutToQuit()", _end)
    return _shared


def _end():
    global _shared
    ending, _shared = _shared, None
    ending.close()


class Worker:
    """Takes requests (docs/worker.md) and, from a timer or while somebody waits, hands their answers back."""

    def __init__(self):
        self._client = None
        self._jobs = []
        self._watching = []
        self._timer = None
        self._polling = False

    def submit(self, request, onDone=None, onProgress=None, onPartial=None):
        """Ask for something; the callbacks get the job. Returns the job, a `MedXAILib.client.Job`.

        Raises:
            MedXAIError: when the worker cannot be had at all.
        """
        job = self._started().submit(request, onProgress, onDone, onPartial)
        self._jobs.append(job)
        self._resume()
        return job

    def watch(self, advance):
        """Call `advance()` at every look until it returns True: it has something to do beside the worker."""
        self._watching.append(advance)
        self._resume()

    def start(self):
        """Start the process if there is none, so that it is warm when it is needed."""
        self._started().start()

    def poll(self, wait=0.0):
        """Look at what the worker has said, for at most so many seconds."""
        if self._polling:
            # A dialog that one of the callbacks has opened serves the timer, too.
            return
        self._polling = True
        try:
            if self._client is not None:
                self._client.poll(wait)
            self._jobs = [job for job in self._jobs if not job.finished]
            for advance in list(self._watching):
                if advance():
                    self._watching.remove(advance)
        finally:
            self._polling = False
        if self._timer is not None and not self._jobs and not self._watching:
            self._timer.stop()

    def close(self):
        """End the process and what it was doing, and remove its files; the next request starts another."""
        client, self._client = self._client, None
        if client is not None:
            client.close()
        self.poll()

    @property
    def log(self):
        """Where the worker says what it does; None before it is started."""
        return None if self._client is None else self._client.log

    @property
    def worker(self):
        """What the process said of itself when it began: version, PyTorch, GPUs."""
        return {} if self._client is None else self._client.worker

    def _started(self):
        if self._client is None:
            from MedXAILib.client import WorkerClient

            self._client = WorkerClient(
                command(), stream=settings.get("workerStream"), environment=environment(), grace=0.5
            )
        return self._client

    def _resume(self):
        # Without the application nobody serves a timer: whoever needs an answer waits for it.
        if not hasattr(slicer, "app"):
            return
        if self._timer is None:
            import qt

            self._timer = qt.QTimer()
            self._timer.interval = _INTERVAL
            self._timer.connect("timeout()", self.poll)
        self._timer.start()


def command():
    """What starts the worker: the person's own command, or this Slicer's Python."""
    own = settings.get("workerCommand")
    if own:
        # Windows writes paths with backslashes, which POSIX rules would take for something else.
        return [part.strip('"') for part in shlex.split(own, posix=os.name != "nt")]
    # Within Slicer sys.executable is the application itself.
    return [shutil.which("PythonSlicer") or sys.executable, "-m", "MedXAILib.worker"]


def environment():
    """The variables the worker starts with: it must find the same MedXAILib as Slicer does."""
    import MedXAILib

    paths = str(Path(MedXAILib.__file__).resolve().parent.parent), os.environ.get("PYTHONPATH")
    return {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths))}
