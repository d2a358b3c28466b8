"""What the worker and its client say to one another: one JSON message a line, its arrays in files beside it or, where
there is no disk in common, in the lines before it. docs/worker.md lists the messages."""

from __future__ import annotations

import base64
import io
import json
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any
from uuid import uuid4

import numpy as np

from MedXAILib import __version__
from MedXAILib.errors import Cancelled, MedXAIError, NotInstalled, OutOfMemory, Untrusted

PROTOCOL = 2

ERRORS: dict[str, type[MedXAIError]] = {
    "cancelled": Cancelled,
    "untrusted": Untrusted,
    "not_installed": NotInstalled,
    "out_of_memory": OutOfMemory,
    "refused": MedXAIError,
}
"""The kinds of error; "unexpected", a defect, has no type of its own."""

# A part of an array in the stream: small, so that nothing else waits long for the line.
_PART = 3 << 18
# No message is longer: what is can only be noise.
_LONGEST = 1 << 24


class Channel:
    """One end of the conversation. `noise` is told every line that is no message: other programs write to a standard
    output, too."""

    def __init__(self, reader: IO[bytes], writer: IO[bytes], noise: Callable[[bytes], object]) -> None:
        self._reader, self._writer, self._noise = reader, writer, noise
        self._writing = threading.Lock()
        self._parts: dict[str, bytearray] = {}

    def send(self, message: dict[str, Any], folder: Path | None = None) -> None:
        """Send `message`, which may hold arrays, bytes and paths anywhere. Arrays become .npy files in `folder`, for
        the other end to map into its memory, or travel in the stream when there is none; bytes always do.

        Raises:
            EOFError: when the other end is gone.
            OSError: when an array cannot be written.
            TypeError: when the message holds something else.
        """
        with self._writing:
            # The parts of arrays go out while their message is being put together, and so before it.
            self._write(json.dumps(message, default=lambda value: self._pack(value, folder)))

    def __iter__(self) -> Iterator[dict[str, Any]]:
        """The messages from the other end, until it is gone.

        Raises:
            ValueError, KeyError, OSError: when an array of a message is not there, or not whole.
        """
        while line := self._reader.readline(_LONGEST):
            try:
                message = json.loads(line)
            except (ValueError, RecursionError):
                message = None
            if not isinstance(message, dict):
                if line.strip():
                    self._noise(line)
            elif "part" in message:
                self._parts.setdefault(message["blob"], bytearray()).extend(base64.b64decode(message["part"]))
            else:
                yield self._unpack(message)

    def _write(self, line: str) -> None:
        # Noise may lack the end of its line, which would swallow the message after it.
        try:
            self._writer.write(b"\n" + line.encode("ascii") + b"\n")
            self._writer.flush()
        except (OSError, ValueError) as error:
            raise EOFError("The other end is gone.") from error

    def _pack(self, value: Any, folder: Path | None) -> Any:
        if isinstance(value, np.ndarray):
            if folder is None:
                buffer = io.BytesIO()
                np.save(buffer, value, allow_pickle=False)
                return {"npy": buffer.getvalue()}
            path = folder / f"{uuid4().hex}.npy"
            np.save(path, value, allow_pickle=False)
            return {"npy": str(path)}
        if isinstance(value, bytes):
            name = uuid4().hex
            for start in range(0, len(value), _PART):
                part = base64.b64encode(value[start : start + _PART]).decode("ascii")
                self._write(json.dumps({"blob": name, "part": part}))
            return {"blob": name, "size": len(value)}
        if isinstance(value, Path):
            return str(value)
        if isinstance(value, np.generic):
            return value.item()
        raise TypeError(f"A request cannot hold {type(value).__name__}: give numbers, text, lists and arrays.")

    def _unpack(self, value: Any) -> Any:
        if isinstance(value, list):
            return [self._unpack(item) for item in value]
        if not isinstance(value, dict):
            return value
        if value.keys() == {"blob", "size"}:
            data = bytes(self._parts.pop(value["blob"], b""))
            if len(data) != value["size"]:
                raise ValueError(f"{len(data)} of {value['size']} bytes arrived")
            return data
        if value.keys() == {"npy"}:
            file = self._unpack(value["npy"])
            if isinstance(file, bytes):
                return np.load(io.BytesIO(file), allow_pickle=False)
            return np.load(file, mmap_mode="r", allow_pickle=False)
        return {key: self._unpack(item) for key, item in value.items()}


def greeting() -> dict[str, Any]:
    """Who is speaking."""
    return {"protocol": PROTOCOL, "version": __version__}


def check(other: dict[str, Any]) -> None:
    """Refuse to work with another protocol or another version, whose maps need not be the same.

    Raises:
        MedXAIError: naming both.
    """
    if {key: other.get(key) for key in greeting()} != greeting():
        raise MedXAIError(
            f"MedXAI {other.get('version')} (protocol {other.get('protocol')}) and MedXAI {__version__} (protocol "
            f"{PROTOCOL}) cannot work together: install the same version for the worker and for its client."
        )


def error(message: dict[str, Any]) -> MedXAIError:
    """The error that a message of type "error" tells of."""
    kind = ERRORS.get(message["kind"], MedXAIError)
    if kind is Untrusted:
        return Untrusted(message["message"], message["code"])
    if kind is NotInstalled:
        return NotInstalled(message["message"], message["requirement"])
    return kind(message["message"])
