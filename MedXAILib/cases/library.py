"""A library of cases: what a network makes of many scans, kept on disk, to find those that are alike to it.

A library is a folder, or a place in an object store (``s3://bucket/name``), with a LanceDB table in it. Several
processes may read and write it at once, each call of `Library.add` and `Library.remove` comes about as a whole or not
at all, and every version it ever had can be opened again.
"""

from __future__ import annotations

import hashlib
import hmac
import json
import secrets
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar

import numpy as np

from MedXAILib.cases.record import NAMES, Hit, Record
from MedXAILib.errors import MedXAIError, unknown
from MedXAILib.volume import Volume, load_volume

Metric = Literal["cosine", "dot"]
Condition = str | float | tuple[float | None, float | None] | set[str] | set[float]
Where = Mapping[str, Condition]
"""What must hold of a case, all of it: ``{"label": "malignant", "diameter_mm": (10, 20), "site": {"left", "right"}}``:
equal to, within (None is an open end), or one of. Names are those of `NAMES` and the keys of the meta."""

EXACT_BELOW = 200_000
"""Cases: of fewer, all are compared."""

_FORMAT = 1
_TABLE, _KEYS = "cases", "pseudonyms"
# Writers that met others at the same moment try again so often, each time on top of what those wrote.
_TRIES = 50

_T = TypeVar("_T")


@dataclass(frozen=True)
class Embedder:
    """What made the vectors of a library: a network with all that precedes it, and the spaces it embeds into.

    `fingerprint` tells it from any other, `model` is its path or shipped name, `name` what to call it, and `spaces` the
    dimension and the metric of each space by name.
    """

    fingerprint: str
    model: str
    name: str
    spaces: Mapping[str, tuple[int, Metric]]

    def __post_init__(self) -> None:
        spaces = {space: (int(size), metric) for space, (size, metric) in self.spaces.items()}
        object.__setattr__(self, "spaces", spaces)

    def dimension(self, space: str) -> int:
        """Of a space.

        Raises:
            MedXAIError: when there is none of that name.
        """
        if space not in self.spaces:
            raise unknown(f"space of {self.name}", space, self.spaces)
        return self.spaces[space][0]


class Library:
    """Cases that one network embedded. It shows them as they were when it was opened, or when it last wrote itself."""

    def __init__(self, path: str, table: Any, embedder: Embedder, pinned: bool = False) -> None:
        self.path = path
        self.embedder = embedder
        self._table = table
        self._pinned = pinned
        self._secret: bytes | None = None

    @classmethod
    def create(cls, path: str | Path, embedder: Embedder) -> Library:
        """An empty library at `path`.

        Raises:
            MedXAIError: when there is one, or when LanceDB is not installed.
        """
        where = _place(path)
        with _told(where):
            if _has_table(where):
                raise MedXAIError(f"There is a library at '{where}' already: open it, or choose another folder.")
            database = _connect(where)
            _key(database)
            table = database.create_table(_TABLE, schema=_schema(embedder))
        return cls(where, table, embedder)

    @classmethod
    def open(cls, path: str | Path, version: int | None = None) -> Library:
        """The library at `path`, as it is, or as it was at `version`; that one cannot be written to.

        Raises:
            MedXAIError: when there is none, or none of that version, when it is damaged or of a newer MedXAI, or when
                LanceDB is not installed.
        """
        where = _place(path)
        with _told(where):
            if not _has_table(where):
                raise MedXAIError(f"There is no library of cases at '{where}': 'medxai cases build' makes one.")
            table = _connect(where).open_table(_TABLE)
            if version is not None:
                known = [one["version"] for one in table.list_versions()]
                if version not in known:
                    raise MedXAIError(
                        f"The library '{where}' has no version {version}: the last one is {max(known)}, the first "
                        f"that is kept {min(known)}."
                    )
                table.checkout(version)
            about = json.loads((table.schema.metadata or {}).get(b"medxai", b"{}"))
        if about.get("format", 0) > _FORMAT:
            raise MedXAIError(f"The library '{where}' was made by a newer MedXAI: update this one.")
        if "embedder" not in about:
            raise MedXAIError(f"'{where}' is no library of MedXAI: give the folder that 'medxai cases build' made.")
        return cls(where, table, Embedder(**about["embedder"]), pinned=version is not None)

    @property
    def version(self) -> int:
        """Grows with every change; `open` takes it."""
        return int(self._table.version)

    def __len__(self) -> int:
        return int(self._table.count_rows())

    def pseudonym(self, name: str) -> str:
        """What stands for the name of a patient or a scan in this library: always the same, and nobody can say what it
        stands for without the library's key, the folder ``pseudonyms.lance`` in it."""
        if self._secret is None:
            with _told(self.path):
                self._secret = _key(_connect(self.path))
        return hmac.new(self._secret, name.encode(), hashlib.sha256).hexdigest()[:16]

    def add(self, records: Iterable[Record]) -> int:
        """Add cases, in the place of those with the same uid; returns the version that has them.

        All of them are there once it returns, whatever happens to this process then, and else none of them.

        Raises:
            MedXAIError: when a case has not the vectors of this library's spaces, or two have one uid.
        """
        added = list(records)
        for record in added:
            self._check(record)
        uids = {record.uid for record in added}
        if len(uids) < len(added):
            raise MedXAIError(f"Of {len(added)} cases only {len(uids)} have a uid of their own: name them apart.")
        if added:
            rows = _rows(added, self.embedder)
            merge = self._table.merge_insert("uid").when_matched_update_all().when_not_matched_insert_all()
            self._write(lambda: merge.execute(rows))
        return self.version

    def remove(self, uids: Iterable[str]) -> int:
        """Take cases out, by uid or what the uid stands for; returns how many there were. Older versions have them."""
        named = self._named(uids)
        if not named:
            return 0
        return int(self._write(lambda: self._table.delete(f"uid IN {_list(named)}")).num_deleted_rows)

    def records(self, where: Where | None = None, whole: bool = True) -> list[Record]:
        """The cases of which `where` holds, in the order of their uids; not `whole`: without vectors and pictures."""
        query = self._table.search()
        if not whole:
            query = query.select([*NAMES, "numbers", "texts", "volume", "region"])
        if condition := self._condition(where, None):
            query = query.where(condition)
        with _told(self.path):
            found = query.to_arrow().sort_by("uid")
        return list(_records(found))

    def matrix(self, space: str) -> tuple[list[str], np.ndarray]:
        """The uids of all cases in their order, and their vectors in `space`, float32, (N, K)."""
        size = self.embedder.dimension(space)
        with _told(self.path):
            found = self._table.search().select(["uid", _column(space)]).to_arrow().sort_by("uid")
        vectors = found.column(_column(space)).combine_chunks().flatten().to_numpy()
        return found.column("uid").to_pylist(), vectors.reshape(-1, size)

    def search(
        self,
        vector: np.ndarray | Sequence[float],
        k: int = 10,
        space: str = "plain",
        where: Where | None = None,
        not_patient: str | None = None,
        embedder: str | None = None,
    ) -> list[Hit]:
        """The `k` cases of which `where` holds that are most similar to `vector` (K,), the most similar first.

        All are compared below `EXACT_BELOW` cases, and an index is asked above, where there is one.

        Args:
            space: in which the vector is; its metric says what similar is.
            not_patient: whose cases do not count, by name or pseudonym.
            embedder: the fingerprint of what made the vector, to refuse another than made the library.

        Raises:
            MedXAIError: for a vector of another embedder or dimension, with NaN or all zero, and an unknown space.
        """
        asked = self._asked(vector, space, embedder)
        query = self._table.search(asked, vector_column_name=_column(space)).limit(k)
        query = query.distance_type(self.embedder.spaces[space][1])
        if condition := self._condition(where, not_patient):
            query = query.where(condition, prefilter=True)
        with _told(self.path):
            found = list(_records(query.to_arrow()))
        hits = [Hit(record, self.similarity(asked, record.vectors[space], space)) for record in found]
        return sorted(hits, key=_by_similarity)

    def maxsim(
        self,
        vectors: np.ndarray,
        k: int = 10,
        first: int = 100,
        where: Where | None = None,
        not_patient: str | None = None,
        embedder: str | None = None,
    ) -> list[Hit]:
        """The `k` cases whose regions are most similar to the regions `vectors` (R, K): by late interaction, the mean
        over `vectors` of the cosine with the nearest region of the case (Khattab and Zaharia 2020), among the `first`
        cases that are most similar to the mean of `vectors`.

        Raises:
            MedXAIError: as `search`.
        """
        asked = np.asarray(vectors, dtype=np.float32)
        if asked.ndim != 2:
            raise MedXAIError(f"Regions are (R, K), not {asked.shape}: give a vector for each.")
        found = self.search(asked.mean(0), first, "plain", where, not_patient, embedder)
        asked = _unit(asked)
        hits = [
            Hit(hit.record, float((asked @ _unit(hit.record.regions).T).max(1).mean()))
            for hit in found
            if hit.record.regions is not None and len(hit.record.regions)
        ]
        return sorted(hits, key=_by_similarity)[:k]

    def similarity(self, vector: np.ndarray, other: np.ndarray, space: str) -> float:
        """Of two vectors (K,) of `space`: their inner product, or the cosine between them."""
        pair = np.stack([vector, other]).astype(np.float64)
        a, b = pair if self.embedder.spaces[space][1] == "dot" else _unit(pair)
        return float(a @ b)

    def volume(self, record: Record) -> Volume:
        """The scan of a case, read.

        Raises:
            MedXAIError: when the library does not know where it is, or it cannot be read.
        """
        if not record.volume:
            raise MedXAIError(f"The library does not know where the scan of the case '{record.uid}' is: add it again.")
        return load_volume(self.scan(record))

    def scan(self, record: Record) -> Path:
        """Where the scan of a case is."""
        return Path(record.volume) if "://" in self.path else Path(self.path) / record.volume

    def _write(self, change: Callable[[], _T]) -> _T:
        if self._pinned:
            raise MedXAIError(f"Version {self.version} of '{self.path}' stays as it is: open it without a version.")
        with _told(self.path):
            for attempt in range(_TRIES):
                try:
                    return change()
                except (OSError, RuntimeError, ValueError) as error:
                    if not _collided(error) or attempt == _TRIES - 1:
                        raise
                    self._table.checkout_latest()
        raise AssertionError

    def _check(self, record: Record) -> None:
        spaces = self.embedder.spaces
        if record.vectors.keys() != spaces.keys():
            raise MedXAIError(
                f"The case '{record.uid}' has vectors in {', '.join(record.vectors) or 'no space'}, the library in "
                f"{', '.join(spaces)}: embed it by {self.embedder.name}."
            )
        for space, vector in record.vectors.items():
            if vector.shape != (spaces[space][0],):
                raise _of_other_size(f"The vector of the case '{record.uid}'", vector, space, self.embedder)
        regions = record.regions
        if regions is not None and ("plain" not in spaces or regions.shape[1:] != (spaces["plain"][0],)):
            raise _of_other_size(f"The regions of the case '{record.uid}'", regions, "plain", self.embedder)

    def _asked(self, vector: np.ndarray | Sequence[float], space: str, embedder: str | None) -> np.ndarray:
        size = self.embedder.dimension(space)
        if embedder is not None and embedder != self.embedder.fingerprint:
            raise MedXAIError(
                f"The library '{self.path}' was embedded by {self.embedder.name} ({self.embedder.model}), and the scan "
                "by another network, or by that one with other weights or preprocessing: ask with that network, or "
                "build a library with this one."
            )
        asked = np.asarray(vector, dtype=np.float32)
        if asked.shape != (size,):
            raise _of_other_size("The vector to search for", asked, space, self.embedder)
        if not np.isfinite(asked).all() or not asked.any():
            what = "zero everywhere" if not asked.any() else "NaN or infinite in places"
            raise MedXAIError(f"The vector to search for is {what}: check the scan and the network.")
        return asked

    def _condition(self, where: Where | None, not_patient: str | None) -> str:
        parts = [self._holds(name, value) for name, value in (where or {}).items()]
        if not_patient is not None:
            parts.append(f"patient NOT IN {_list(self._named([not_patient]))}")
        return " AND ".join(parts)

    def _holds(self, name: str, value: Any) -> str:
        number = f"json_get_float(numbers, {_quoted(name)})"
        if isinstance(value, tuple):
            low, high = value
            sides = [f"{number} {side} {float(end)!r}" for side, end in ((">=", low), ("<=", high)) if end is not None]
            return " AND ".join(sides) or "true"
        values = list(value) if isinstance(value, (set, frozenset, list)) else [value]
        words = [one for one in values if isinstance(one, str)]
        if name in ("uid", "patient"):
            words = self._named(words)
        text = name if name in NAMES else f"json_get_string(texts, {_quoted(name)})"
        parts = [f"{text} IN {_list(words)}"] if words else []
        parts += [f"{number} = {float(one)!r}" for one in values if not isinstance(one, str)]
        return f"({' OR '.join(parts)})" if parts else "false"

    def _named(self, names: Iterable[str]) -> list[str]:
        """What may stand for `names` in the table: themselves, and their pseudonyms."""
        return [each for name in names for each in (name, self.pseudonym(name))]


def _schema(embedder: Embedder) -> Any:
    import pyarrow as pa

    text = pa.string()
    plain = embedder.spaces.get("plain", (1, "cosine"))[0]
    # By which one of two writers that add the same case at the same moment notices the other.
    key = {"lance-schema:unenforced-primary-key:position": "1"}
    fields = [
        *(pa.field(name, text, nullable=False, metadata=key if name == "uid" else None) for name in NAMES),
        *(
            pa.field(_column(s), pa.list_(pa.float32(), size), nullable=False)
            for s, (size, _) in embedder.spaces.items()
        ),
        pa.field("regions", pa.list_(pa.list_(pa.float16(), plain))),
        # Apart, so that a number is never looked for in a text.
        pa.field("numbers", pa.json_(text)),
        pa.field("texts", pa.json_(text)),
        pa.field("volume", text, nullable=False),
        pa.field("region", pa.list_(pa.float64(), 3)),
        pa.field("thumbnail", pa.binary(), nullable=False),
    ]
    return pa.schema(fields, metadata={"medxai": json.dumps({"format": _FORMAT, "embedder": asdict(embedder)})})


def _rows(records: Sequence[Record], embedder: Embedder) -> Any:
    import pyarrow as pa

    schema = _schema(embedder)

    def told(kind: type) -> list[str]:
        return [json.dumps({n: v for n, v in r.meta.items() if isinstance(v, str) is (kind is str)}) for r in records]

    def vectors(space: str) -> Any:
        flat = np.concatenate([record.vectors[space] for record in records])
        return pa.FixedSizeListArray.from_arrays(pa.array(flat), embedder.spaces[space][0])

    def regions(record: Record) -> list[np.ndarray] | None:
        return None if record.regions is None else list(record.regions.astype(np.float16))

    columns: dict[str, Any] = {name: [getattr(record, name) for record in records] for name in NAMES}
    columns |= {_column(space): vectors(space) for space in embedder.spaces}
    columns |= {
        "regions": pa.array([regions(record) for record in records], schema.field("regions").type),
        "numbers": pa.array(told(float), pa.string()).cast(pa.json_(pa.string())),
        "texts": pa.array(told(str), pa.string()).cast(pa.json_(pa.string())),
        "volume": [record.volume for record in records],
        "region": [record.region for record in records],
        "thumbnail": [record.thumbnail for record in records],
    }
    return pa.table(columns, schema=schema)


def _records(found: Any) -> Iterator[Record]:
    spaces = [name for name in found.column_names if name.startswith("vector: ")]
    plain = "regions" in found.column_names
    vectors = {s: found.column(s).combine_chunks().flatten().to_numpy().reshape(len(found), -1) for s in spaces}
    rest = found.select([name for name in found.column_names if name not in vectors]).to_pylist()
    for i, row in enumerate(rest):
        yield Record(
            **{name: row[name] for name in NAMES},
            vectors={space.removeprefix("vector: "): values[i] for space, values in vectors.items()},
            regions=np.array(row["regions"], np.float16) if plain and row["regions"] is not None else None,
            meta={**json.loads(row["numbers"]), **json.loads(row["texts"])},
            volume=row["volume"],
            region=row["region"] and tuple(row["region"]),
            thumbnail=row.get("thumbnail", b""),
        )


def _column(space: str) -> str:
    return f"vector: {space}"


def _quoted(text: str) -> str:
    return "'" + text.replace("'", "''") + "'"


def _list(texts: Iterable[str]) -> str:
    return f"({', '.join(map(_quoted, texts))})"


def _unit(vectors: np.ndarray) -> np.ndarray:
    """Vectors (N, K) of length one; those of length zero as they are."""
    found = np.asarray(vectors, dtype=np.float64)
    return found / np.maximum(np.linalg.norm(found, axis=-1, keepdims=True), 1e-30)


def _by_similarity(hit: Hit) -> tuple[float, str]:
    return -hit.similarity, hit.record.uid


def _of_other_size(what: str, array: np.ndarray, space: str, embedder: Embedder) -> MedXAIError:
    return MedXAIError(
        f"{what} is {array.shape} and those of {embedder.name} in '{space}' are of "
        f"{embedder.spaces.get(space, (0, ''))[0]} numbers: embed it by the network and in the space of the library."
    )


def _place(path: str | Path) -> str:
    return str(path) if "://" in str(path) else str(Path(path).expanduser().absolute())


def _connect(where: str) -> Any:
    try:
        import lancedb
    except ImportError as error:
        raise MedXAIError(
            "Libraries of cases need LanceDB: install it by pip install 'medxai[cases]'. There is none for Macs with "
            "Intel processors."
        ) from error
    return lancedb.connect(where)


def _has_table(where: str) -> bool:
    # To connect would make the folder.
    return (
        _TABLE in _connect(where).list_tables().tables if "://" in where else (Path(where) / f"{_TABLE}.lance").is_dir()
    )


def _key(database: Any) -> bytes:
    """The key of the library's pseudonyms: made by whoever comes first, and a table as the library is one, because that
    can be written as a whole in an object store, too."""
    import pyarrow as pa

    with suppress(ValueError):
        database.create_table(_KEYS, pa.table({"key": [secrets.token_bytes(32)]}))
    return bytes(database.open_table(_KEYS).to_arrow().column("key")[0].as_py())


def _collided(error: Exception) -> bool:
    text = str(error).lower()
    return "conflict" in text or "concurrent" in text


@contextmanager
def _told(where: str) -> Iterator[None]:
    """What LanceDB says when it cannot, said as MedXAI does."""
    try:
        yield
    except (OSError, RuntimeError, ValueError) as error:
        reason = " ".join(str(error).split())[:200]
        raise MedXAIError(
            f"The library '{where}' cannot be read or written ({reason}): check it and its place."
        ) from error
