"""A case: a scan that was embedded, and what is known of it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np

from MedXAILib.errors import MedXAIError

NAMES = ("uid", "patient", "label", "said")
"""What every case has, as text; no key of its meta may be called so."""
SCAN = "scan"
"""The key of the meta under which the fingerprint of a case's scan is, by which the very same scan is known again."""


@dataclass(frozen=True, eq=False)
class Record:
    """A case of a library.

    `label` is what is known of it, `said` what the network said when it was embedded; "" is unknown. `vectors` has an
    embedding (K,) for each space, and `regions` (R, K) one for each place of the case in the space "plain". `meta` is
    anything else, numbers or text, to filter by. `volume` is where the scan is, absolute or from the library's folder,
    `region` the point in it (RAS mm) where the network looked, and `thumbnail` a small PNG.

    Raises:
        MedXAIError: when it has no uid, or a number that is NaN or infinite.
    """

    uid: str
    patient: str
    label: str = ""
    said: str = ""
    vectors: Mapping[str, np.ndarray] = field(default_factory=dict)
    regions: np.ndarray | None = None
    meta: Mapping[str, float | str] = field(default_factory=dict)
    volume: str = ""
    region: tuple[float, float, float] | None = None
    thumbnail: bytes = b""

    def __post_init__(self) -> None:
        if not self.uid:
            raise MedXAIError("A case has no uid: give every case a name of its own.")
        object.__setattr__(self, "vectors", {s: np.asarray(v, dtype=np.float32) for s, v in self.vectors.items()})
        arrays = {**self.vectors, **({} if self.regions is None else {"regions": np.asarray(self.regions)})}
        for name, array in arrays.items():
            if not np.isfinite(array).all():
                raise MedXAIError(
                    f"The vector '{name}' of the case '{self.uid}' has NaN or infinite numbers: embed it again."
                )
        for key, value in self.meta.items():
            if key in NAMES:
                raise MedXAIError(
                    f"'{key}' of the case '{self.uid}' is in its meta: call what is meant there otherwise."
                )
            if not isinstance(value, str) and not math.isfinite(value):
                raise MedXAIError(f"'{key}' of the case '{self.uid}' is {value}: leave out what is not known.")


@dataclass(frozen=True, eq=False)
class Hit:
    """A case that was found, and how similar it is."""

    record: Record
    similarity: float
