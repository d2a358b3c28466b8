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
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np

from MedXAILib.cases.recall import BEST, Sample
from MedXAILib.cases.record import NAMES, Hit, Record
from MedXAILib.cases.similarity import Metric, similarities
from MedXAILib.errors import MedXAIError, NotInstalled, unknown

if TYPE_CHECKING:
    # Which bring PyTorch along; a process that only writes cases starts ten times as fast without.
    from MedXAILib.run import Run
    from MedXAILib.volume import Volume

Condition = str | float | tuple[float | None, float | None] | set[str] | set[float]
Where = Mapping[str, Condition]
"""What must hold of a case, all of it: ``{"label": "malignant", "diameter_mm": (10, 20), "site": {"left", "right"}}``:
equal to, within (None is an open end), or one of. Names are those of `NAMES` and the keys of the meta."""

EXACT_BELOW = 200_000
"""Cases: of fewer, all are compared."""
RECALL = 0.98
"""Of the nearest cases, an index is to find so many."""

_FORMAT = 1
_TABLE, _KEYS = "cases", "pseudonyms"
# Writers that met others at the same moment try again so often, each time on top of what those wrote.
_TRIES = 50
_FOREVER = timedelta(days=36500)
# How many of the nearest parts of an index are looked into, and of how many times as many as asked for the similarity
# is then computed anew.
_PARTS, _REFINED = (16, 32, 64, 128, 256, 512), 5
_SAMPLE, _GROWN = 200, 0.1
# The index takes vectors of so many numbers, or a multiple: zeros are added, which change no similarity.
_MULTIPLE = 8

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


@dataclass(frozen=True)
class Quality:
    """How well one space is searched: the share of the 10 nearest cases that is found, and how long that takes."""

    recall: float
    milliseconds: float


@dataclass(frozen=True)
class Health:
    """What `Library.check` finds: the number of cases, the version, the quality of each space by name, and what is
    wrong with scans, by path."""

    cases: int
    version: int
    quality: Mapping[str, Quality]
    wrong: Mapping[str, str]


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
    def is_at(cls, path: str | Path) -> bool:
        """Whether there is a library at `path`."""
        where = _place(path)
        with _told(where):
            return _has_table(where)

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
            told = (table.schema.metadata or {}).get(b"medxai", b"{}")
        try:
            about = json.loads(told)
            embedder = None if about.get("format", 0) > _FORMAT else Embedder(**about["embedder"])
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise MedXAIError(
                f"'{where}' is no library of MedXAI: give the folder that 'medxai cases build' made."
            ) from error
        if embedder is None:
            raise MedXAIError(f"The library '{where}' was made by a newer MedXAI: update this one.")
        return cls(where, table, embedder, pinned=version is not None)

    @property
    def version(self) -> int:
        """Grows with every change; `open` takes it."""
        return int(self._table.version)

    def __len__(self) -> int:
        return int(self._table.count_rows())

    def require(self, embedder: str, remedy: str) -> None:
        """Refuse another network than made the vectors, by its fingerprint; `remedy` says what to do.

        Raises:
            MedXAIError: when it is another.
        """
        if self.embedder.fingerprint != embedder:
            raise MedXAIError(
                f"The library '{self.path}' was embedded by {self.embedder.name} ({self.embedder.model}), and this is "
                f"another network, or that one with other weights or preprocessing: {remedy}."
            )

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
        return list(_records(found, self.embedder))

    def uids(self) -> list[str]:
        """Of all cases, in their order."""
        with _told(self.path):
            found: list[str] = self._table.search().select(["uid"]).to_arrow().sort_by("uid").column("uid").to_pylist()
        return found

    def matrix(self, space: str) -> tuple[list[str], np.ndarray]:
        """The uids of all cases in their order, and their vectors in `space`, float32, (N, K)."""
        size = self.embedder.dimension(space)
        with _told(self.path):
            found = self._table.search().select(["uid", _column(space)]).to_arrow().sort_by("uid")
        return found.column("uid").to_pylist(), _vectors(found, space, size)

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
        parts = 0 if self._exact else self._tuned(space).get("parts", 0)
        query = self._near(asked, space, k, parts)
        if condition := self._condition(where, not_patient):
            query = query.where(condition, prefilter=True)
        with _told(self.path):
            found = list(_records(query.to_arrow(), self.embedder))
        hits = [Hit(record, self.similarity(asked, record.vectors[space], space)) for record in found]
        return sorted(hits, key=_by_similarity)

    def similarity(self, vector: np.ndarray, other: np.ndarray, space: str) -> float:
        """Of two vectors (K,) of `space`."""
        a, b = np.asarray(vector, np.float64), np.asarray(other, np.float64)
        return float(similarities(a[None], b[None], self.embedder.spaces[space][1])[0, 0])

    def compact(self) -> None:
        """Put together what many small additions left in pieces; no version is lost by it."""
        self._write(lambda: self._table.optimize(cleanup_older_than=_FOREVER))

    def index(self, run: Run) -> None:
        """Of `EXACT_BELOW` cases and more, make the index by which they are searched; how many of its parts a search
        looks into is raised until it finds `RECALL` of what comparing all would find. More cases are found without
        being in it, and it is made anew when a tenth is.

        The index keeps 8 bits of each number (RaBitQ, Gao and Long 2024), and the best are compared as they are. A
        recall that stays below is a note of the run.
        """
        if self._exact:
            return
        for i, (space, (_, metric)) in enumerate(self.embedder.spaces.items()):
            run.step(i, len(self.embedder.spaces), "Indexing the library")
            if abs(len(self) - self._tuned(space).get("rows", 0)) <= _GROWN * len(self):
                continue
            self._write(partial(_make_index, self._table, _column(space), metric))
            sample, recall = self._sample(space), 0.0
            for parts in _PARTS:
                recall = sample.recall(partial(self._similarities, space=space, parts=parts))
                if recall >= RECALL:
                    break
            if recall < RECALL:
                run.note(f"A search of '{space}' in '{self.path}' finds only {recall:.0%} of the {BEST} nearest cases.")
            tuned = {"parts": parts, "recall": recall, "rows": len(self)}
            change = {"path": _column(space), "metadata": {"medxai": json.dumps(tuned)}}
            self._write(partial(self._table.update_field_metadata, change))

    def check(self, run: Run, read: bool = False) -> Health:
        """How well and how fast the library is searched, and which scans are not where they were, or, if they are to be
        `read`, cannot be."""
        quality: dict[str, Quality] = {}
        for i, space in enumerate(self.embedder.spaces):
            run.step(i, len(self.embedder.spaces), "Searching the library")
            seconds: list[float] = []

            def timed(vector: np.ndarray, space: str = space, seconds: list[float] = seconds) -> list[float]:
                started = time.perf_counter()
                hits = self.search(vector, BEST + 1, space)
                seconds.append(time.perf_counter() - started)
                return [hit.similarity for hit in hits]

            recall = self._sample(space).recall(timed)
            quality[space] = Quality(recall, 1000 * float(np.median(seconds or [0.0])))
        wrong: dict[str, str] = {}
        scans = {str(self.scan(record)): record for record in self.records(whole=False) if record.volume}
        for i, (path, record) in enumerate(scans.items()):
            run.step(i, len(scans), "Looking for the scans")
            try:
                if read:
                    self.volume(record)
                elif not Path(path).exists():
                    wrong[path] = f"There is no file or folder '{path}'."
            except MedXAIError as error:
                wrong[path] = str(error)
        return Health(len(self), self.version, quality, wrong)

    def volume(self, record: Record) -> Volume:
        """The scan of a case, read.

        Raises:
            MedXAIError: when the library does not know where it is, or it cannot be read.
        """
        from MedXAILib.volume import load_volume

        if not record.volume:
            raise MedXAIError(f"The library does not know where the scan of the case '{record.uid}' is: add it again.")
        return load_volume(self.scan(record))

    def scan(self, record: Record) -> Path:
        """Where the scan of a case is."""
        return Path(record.volume) if "://" in self.path else Path(self.path) / record.volume

    def _near(self, asked: np.ndarray, space: str, k: int, parts: int) -> Any:
        """What asks for the `k` rows nearest to `asked`: of all, or of those in as many `parts` of the index."""
        query = self._table.search(_padded(asked[None])[0], vector_column_name=_column(space))
        query = query.distance_type(self.embedder.spaces[space][1]).limit(k)
        return query.nprobes(parts).refine_factor(_REFINED) if parts else query.bypass_vector_index()

    def _similarities(self, asked: np.ndarray, space: str, parts: int) -> list[float]:
        found = self._near(asked, space, BEST + 1, parts).select([_column(space), "_distance"]).to_arrow()
        size, metric = self.embedder.spaces[space]
        similar: list[float] = similarities(asked[None], _vectors(found, space, size), metric)[0].tolist()
        return similar

    def _sample(self, space: str) -> Sample:
        size, metric = self.embedder.spaces[space]
        places = sorted(set(np.linspace(0, max(len(self) - 1, 0), _SAMPLE).astype(int).tolist()))
        chosen = self._table.take_offsets(places if len(self) else []).select([_column(space)]).to_arrow()
        batches = self._table.search().select([_column(space)]).to_batches(batch_size=8192)
        queries = _vectors(chosen, space, size)
        # To a vector that is zero nothing is near.
        queries = queries[queries.any(1)]
        return Sample.of(queries, (_vectors(batch, space, size) for batch in batches), metric)

    @property
    def _exact(self) -> bool:
        return len(self) < EXACT_BELOW

    def _tuned(self, space: str) -> dict[str, Any]:
        """What is known of the index of a space; nothing where there is none."""
        told = (self._table.schema.field(_column(space)).metadata or {}).get(b"medxai", b"{}")
        return dict(json.loads(told))

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
            sides = [f"{number} {side} {_number(end)}" for side, end in ((">=", low), ("<=", high)) if end is not None]
            return " AND ".join(sides) or "true"
        values = list(value) if isinstance(value, (set, frozenset, list)) else [value]
        words = [one for one in values if isinstance(one, str)]
        if name in ("uid", "patient"):
            words = self._named(words)
        text = name if name in NAMES else f"json_get_string(texts, {_quoted(name)})"
        parts = [f"{text} IN {_list(words)}"] if words else []
        parts += [f"{number} = {_number(one)}" for one in values if not isinstance(one, str)]
        return f"({' OR '.join(parts)})" if parts else "false"

    def _named(self, names: Iterable[str]) -> list[str]:
        """What may stand for `names` in the table: themselves, and their pseudonyms."""
        return [each for name in names for each in (name, self.pseudonym(name))]


def _schema(embedder: Embedder) -> Any:
    import pyarrow as pa

    text, sizes = pa.string(), embedder.spaces.items()
    plain = embedder.spaces.get("plain", (1, "cosine"))[0]
    # By which one of two writers that add the same case at the same moment notices the other.
    key = {"lance-schema:unenforced-primary-key:position": "1"}
    fields = [
        *(pa.field(name, text, nullable=False, metadata=key if name == "uid" else None) for name in NAMES),
        *(pa.field(_column(s), pa.list_(pa.float32(), k + -k % _MULTIPLE), nullable=False) for s, (k, _) in sizes),
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
        values = _padded(np.stack([record.vectors[space] for record in records]))
        return pa.FixedSizeListArray.from_arrays(pa.array(values.ravel()), values.shape[1])

    def regions(record: Record) -> list[np.ndarray] | None:
        if record.regions is None:
            return None
        # Half a float ends at 65504; of regions only directions count.
        most = np.abs(record.regions).max(initial=0.0)
        return list((record.regions / max(1.0, float(most) / 6e4)).astype(np.float16))

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


def _records(found: Any, embedder: Embedder) -> Iterator[Record]:
    there = {s: k for s, (k, _) in embedder.spaces.items() if _column(s) in found.column_names}
    vectors = {space: _vectors(found, space, size) for space, size in there.items()}
    rows = found.drop_columns([_column(space) for space in there]).to_pylist()
    for i, row in enumerate(rows):
        yield Record(
            **{name: row[name] for name in NAMES},
            vectors={space: values[i] for space, values in vectors.items()},
            regions=None if row.get("regions") is None else np.array(row["regions"], np.float16),
            meta={**json.loads(row["numbers"]), **json.loads(row["texts"])},
            volume=row["volume"],
            region=row["region"] and tuple(row["region"]),
            thumbnail=row.get("thumbnail", b""),
        )


def _vectors(found: Any, space: str, size: int) -> np.ndarray:
    column = found.column(_column(space))
    flat = (column.combine_chunks() if hasattr(column, "combine_chunks") else column).flatten()
    return np.asarray(flat.to_numpy()).reshape(found.num_rows, size + -size % _MULTIPLE)[:, :size]


def _padded(vectors: np.ndarray) -> np.ndarray:
    """Vectors (N, K), wider by zeros if need be."""
    return np.pad(vectors, [(0, 0), (0, -vectors.shape[1] % _MULTIPLE)])


def _make_index(table: Any, column: str, metric: Metric) -> Any:
    from lancedb.index import IvfRq

    return table.create_index(column, config=IvfRq(distance_type=metric, num_bits=8))


def _column(space: str) -> str:
    return f"vector: {space}"


def _quoted(text: str) -> str:
    return "'" + text.replace("'", "''") + "'"


def _number(value: float) -> str:
    # So that it may be infinite.
    return f"CAST('{float(value)!r}' AS DOUBLE)"


def _list(texts: Iterable[str]) -> str:
    return f"({', '.join(map(_quoted, texts))})"


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
        raise NotInstalled(
            "Libraries of cases need LanceDB: install it by pip install 'medxai[cases]'. There is none for Macs with "
            "Intel processors.",
            "lancedb>=0.40",
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
