"""What a reader did, line by line: nothing written is ever changed, and a crash costs the open trial at most."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable
from contextlib import suppress
from datetime import datetime, timedelta, timezone
from pathlib import Path
from typing import Any

from MedXAILib.errors import MedXAIError
from MedXAILib.study.allocation import Trial, trials
from MedXAILib.study.design import Study

Now = Callable[[], datetime]


def _now() -> datetime:
    return datetime.now(timezone.utc)


class Journal:
    """The file of one reader, `<reader>.jsonl` in the study's folder of results.

    Every line is an event with the hash of the line before, written through to the disk before anything goes on. A line
    that a crash cut off stays where it is, and is not read.
    """

    def __init__(self, study: Study, reader: str, folder: str | Path, now: Now = _now) -> None:
        """Open it, or begin it.

        Raises:
            MedXAIError: for a reader whom the design does not name, a journal of another design, or one in which lines
                were changed; or when it cannot be written.
        """
        self.study, self.reader, self._now = study, reader, now
        self.trials = trials(study, reader)
        self.path = Path(folder) / f"{reader}.jsonl"
        self.events, self._last = read(self.path)
        torn = self.path.exists() and not self.path.read_bytes().endswith(b"\n")
        self._break = "\n" if torn else ""
        self._size = self._on_disk()
        if not self.events:
            self.write("study", name=study.design.name, design=study.fingerprint, reader=reader)
        elif self.events[0].get("design") != study.fingerprint:
            raise MedXAIError(
                f"'{self.path}' was begun with another design or other cases: go on with those, or choose another "
                "folder for the results."
            )
        elif self.events[0].get("reader") != reader:
            raise MedXAIError(f"'{self.path}' is the journal of '{self.events[0].get('reader')}': give that its name.")

    def write(self, event: str, **told: Any) -> None:
        """Add an event; once this returns, it is on the disk.

        Raises:
            MedXAIError: when it cannot be written, or another program wrote to the journal since this one read it.
        """
        if self._on_disk() != self._size:
            raise MedXAIError(f"Another program writes '{self.path}', too: close one, and open the study again.")
        line = {"event": event, "at": self._now().isoformat(timespec="milliseconds"), "after": self._last, **told}
        text = json.dumps(line, ensure_ascii=False)
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with self.path.open("ab") as file:
                file.write(f"{self._break}{text}\n".encode())
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            # All of the line may be there, or a part. What no one was told of goes again.
            with suppress(OSError):
                os.truncate(self.path, self._size)
            if self._on_disk() != self._size:
                self._break, self._size = "\n", self._on_disk()
            raise MedXAIError(f"'{self.path}' cannot be written ({error.strerror}): nothing was answered.") from error
        self.events.append(line)
        self._last, self._break, self._size = _hash(text), "", self._on_disk()

    def _on_disk(self) -> int:
        return self.path.stat().st_size if self.path.exists() else 0

    @property
    def answered(self) -> dict[int, dict[str, Any]]:
        """The answer to each trial that has one."""
        return {event["trial"]: event for event in self.events if event["event"] == "answer"}

    def next(self) -> Trial | None:
        """The trial to go on with; None when all are answered.

        Raises:
            MedXAIError: when its session may not begin yet, saying when it may.
        """
        done = self.answered
        coming = next((trial for trial in self.trials if trial.index not in done), None)
        if coming is None or coming.session < 2:
            return coming
        before = [done[t.index]["at"] for t in self.trials if t.session == coming.session - 1]
        earliest = datetime.fromisoformat(max(before)) + timedelta(days=self.study.design.washout_days)
        if self._now() < earliest:
            raise MedXAIError(
                f"Session {coming.session} of {self.reader} begins on {earliest:%d %B %Y at %H:%M} UTC at the "
                "earliest: come back then."
            )
        return coming

    def begin(self, trial: Trial) -> None:
        """The reader sees the case."""
        self.write("begin", trial=trial.index)

    def answer(
        self,
        trial: Trial,
        answer: str,
        confidence: float,
        seconds: float,
        point: tuple[float, float, float] | None = None,
        **told: Any,
    ) -> None:
        """The reader decides for `answer`, `confidence` (0 to 100) sure of it, after `seconds`; `point` (RAS mm) is
        where.

        Raises:
            MedXAIError: for an answer that there is not, one given already, and a confidence out of range.
        """
        design = self.study.design
        if answer not in design.answers:
            raise MedXAIError(f"'{answer}' is no answer of this study: choose {' or '.join(design.answers)}.")
        if trial.index in self.answered:
            raise MedXAIError(f"Trial {trial.index} of {self.reader} is answered already: go on with the next.")
        if not 0 <= confidence <= 100:
            raise MedXAIError(f"A confidence is from 0 to 100, not {confidence}.")
        where = None if point is None else list(point)
        known = {"answer": answer, "confidence": confidence, "seconds": seconds, "point": where}
        self.write("answer", trial=trial.index, **known, **told)


def read(path: Path) -> tuple[list[dict[str, Any]], str]:
    """The events of a journal, and the hash of its last whole line; none where there is no file.

    Raises:
        MedXAIError: when a line was changed, taken out or put in.
    """
    events: list[dict[str, Any]] = []
    last = ""
    lines = path.read_bytes().split(b"\n") if path.exists() else []
    for number, line in enumerate(lines, 1):
        try:
            event = json.loads(line.decode())
        except ValueError:
            # Cut off by a crash: what comes next follows the line before.
            continue
        if not isinstance(event, dict) or event.get("after") != last:
            raise MedXAIError(
                f"Line {number} of '{path}' does not follow the line before it: the journal was changed, or two "
                "programs wrote it at once. Take a copy of before."
            )
        events.append(event)
        last = _hash(line.decode())
    return events, last


def _hash(line: str) -> str:
    return hashlib.sha256(line.encode()).hexdigest()[:16]
