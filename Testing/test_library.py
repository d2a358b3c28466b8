"""Libraries of cases: what is found, compared with NumPy, and what survives, compared with what was acknowledged."""

from __future__ import annotations

import math
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from MedXAILib.cases import library as cases
from MedXAILib.cases.library import Embedder, Library
from MedXAILib.cases.recall import Sample
from MedXAILib.cases.record import Hit, Record
from MedXAILib.cases.similarity import late_interaction
from MedXAILib.errors import MedXAIError
from MedXAILib.run import Run

pytest.importorskip("lancedb")

# Not multiples of 8, which is what an index takes.
PLAIN, SCORES = 12, 5
EMBEDDER = Embedder("f0" * 16, "lung_nodule", "A network", {"plain": (PLAIN, "cosine"), "scores": (SCORES, "dot")})


def record(i: int, **known: object) -> Record:
    """Case `i`: two of each patient; every third without regions."""
    rng = np.random.default_rng(i)
    said = {
        "uid": f"case {i:04d}",
        "patient": f"patient {i // 2}",
        "label": ("benign", "malignant")[i % 2],
        "said": ("benign", "malignant")[i % 3 == 0],
        # Far from the origin on one side, so that inner products with the opposite are negative.
        "vectors": {"plain": rng.normal(size=PLAIN), "scores": 3 + rng.normal(size=SCORES)},
        "regions": rng.normal(size=(4, PLAIN)) if i % 3 else None,
        "meta": {"diameter_mm": i / 10, "site": f'o\'hara "{i % 4}"'} | ({"age": float(i)} if i % 2 else {}),
        "volume": f"volumes/{i}.nrrd",
        "region": (1.5, -2.0, 88.25) if i % 2 else None,
        "thumbnail": bytes([i % 256]) * 10,
    }
    return Record(**{**said, **known})  # type: ignore[arg-type]


def filled(path: Path, count: int) -> Library:
    library = Library.create(path, EMBEDDER)
    library.add(record(i) for i in reversed(range(count)))
    return library


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Library:
    """60 cases, for tests that only read."""
    return filled(tmp_path_factory.mktemp("shared") / "library", 60)


def nearest(asked: np.ndarray, space: str, kept: list[int]) -> list[str]:
    """By NumPy: the uids of the cases `kept`, the most similar first."""
    vectors = np.array([record(i).vectors[space] for i in kept], np.float64).reshape(len(kept), len(asked))
    if space == "plain":
        vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    return [f"case {kept[k]:04d}" for k in np.argsort(-(vectors @ asked))]


def uids(hits: list[Hit]) -> list[str]:
    return [hit.record.uid for hit in hits]


@pytest.mark.parametrize("space", ["plain", "scores"])
@pytest.mark.parametrize("sign", [1, -1])
def test_search_is_that_of_numpy(shared: Library, space: str, sign: int):
    asked = sign * record(7).vectors[space]
    hits = shared.search(asked, 12, space)
    assert uids(hits) == nearest(asked, space, list(range(60)))[:12]
    other = record(int(hits[3].record.uid[5:])).vectors[space].astype(np.float64)
    product = float(asked.astype(np.float64) @ other)
    length = np.linalg.norm(asked.astype(np.float64)) * np.linalg.norm(other)
    assert hits[3].similarity == pytest.approx(product if space == "scores" else product / length, abs=1e-6)
    if space == "scores" and sign < 0:
        assert hits[0].similarity < 0


def test_a_case_comes_back_as_it_was_added(shared: Library):
    for i in (3, 4):
        found = shared.records({"uid": f"case {i:04d}"})
        assert len(found) == 1
        got, put = found[0], record(i)
        for name in ("uid", "patient", "label", "said", "meta", "volume", "region", "thumbnail"):
            assert getattr(got, name) == getattr(put, name), name
        for space, vector in put.vectors.items():
            np.testing.assert_array_equal(got.vectors[space], vector)
        assert (got.regions is None) == (put.regions is None)
        if put.regions is not None:
            np.testing.assert_allclose(got.regions, put.regions, atol=2e-3)
    bare = shared.records({"uid": "case 0004"}, whole=False)[0]
    assert (bare.meta, bare.vectors, bare.thumbnail) == (record(4).meta, {}, b"")


@pytest.mark.parametrize(
    "where, holds",
    [
        ({"label": "malignant"}, lambda r: r.label == "malignant"),
        ({"label": {"benign", "neither"}, "said": "malignant"}, lambda r: (r.label, r.said) == ("benign", "malignant")),
        ({"diameter_mm": (1.05, 3.0)}, lambda r: 1.05 <= r.meta["diameter_mm"] <= 3.0),
        ({"diameter_mm": (None, 2.5)}, lambda r: r.meta["diameter_mm"] <= 2.5),
        ({"age": (10, None)}, lambda r: r.meta.get("age", -1) >= 10),
        ({"age": 11}, lambda r: r.meta.get("age") == 11),
        ({"site": 'o\'hara "2"'}, lambda r: r.meta["site"] == 'o\'hara "2"'),
        ({"site": {'o\'hara "1"', "x' OR '1'='1"}}, lambda r: r.meta["site"] == 'o\'hara "1"'),
        ({"patient": "patient 9"}, lambda r: r.patient == "patient 9"),
        ({"uid": {"case 0002", "case 0003"}}, lambda r: r.uid in {"case 0002", "case 0003"}),
        ({"nobody said": (0, 1)}, lambda r: False),
        ({"label": set()}, lambda r: False),
        ({"site": (0, 1)}, lambda r: False),
        ({}, lambda r: True),
    ],
)
def test_filters_are_those_of_python(shared: Library, where: cases.Where, holds):
    kept = [i for i in range(60) if holds(record(i))]
    assert [found.uid for found in shared.records(where, whole=False)] == [f"case {i:04d}" for i in kept]
    asked = record(50).vectors["plain"]
    assert uids(shared.search(asked, 60, where=where)) == nearest(asked, "plain", kept)


def test_any_name_and_any_text_can_be_filtered_by(tmp_path: Path):
    odd = ["0", "a.b", "$", '"', "'", "\\", "[0]", "*", "null", "x' OR '1'='1", "two\nlines", "ü", "%", "", "--"]
    library = Library.create(tmp_path / "library", EMBEDDER)
    library.add(record(i, uid=f"{i}", meta={odd[i]: odd[-1 - i]}) for i in range(len(odd)))
    for i, name in enumerate(odd):
        assert [found.uid for found in library.records({name: odd[-1 - i]})] == [f"{i}"], name
        assert library.records({name: odd[-1 - i] + "?"}) == []


def test_no_number_is_too_large(tmp_path: Path):
    library = Library.create(tmp_path / "library", EMBEDDER)
    large = 1e7 * np.ones((2, PLAIN)) * [[1.0], [-2.0]]
    library.add([record(1, regions=large, meta={"a": 1.0}), record(2, meta={"a": 3.0})])
    (found,) = library.records({"a": (-math.inf, 2.0)})
    assert found.uid == "case 0001" and found.regions is not None
    np.testing.assert_allclose(found.regions / found.regions[0, 0], large / large[0, 0], rtol=1e-3)
    assert len(library.records({"a": (2.0, math.inf)})) == 1 and library.records({"a": math.nan}) == []


def test_nobody_is_like_himself(shared: Library):
    asked = record(10).vectors["plain"]
    assert uids(shared.search(asked, 1)) == ["case 0010"]
    kept = [i for i in range(60) if i // 2 != 5]
    # As many as were asked for: they do not count, rather than being left out of what is found.
    assert uids(shared.search(asked, 2, not_patient="patient 5")) == nearest(asked, "plain", kept)[:2]


def test_late_interaction_is_the_mean_of_the_best():
    random = np.random.default_rng(99)
    asked, regions = random.normal(size=(3, PLAIN)), random.normal(size=(5, PLAIN))
    best = [max(float(a @ b / np.linalg.norm(a) / np.linalg.norm(b)) for b in regions) for a in asked]
    assert late_interaction(asked, regions) == pytest.approx(sum(best) / 3)
    assert late_interaction(regions, asked) != pytest.approx(sum(best) / 3)


def test_matrix_and_records_are_in_one_order(shared: Library):
    names, matrix = shared.matrix("scores")
    assert names == [found.uid for found in shared.records()] == shared.uids() == sorted(names)
    np.testing.assert_array_equal(matrix, np.stack([found.vectors["scores"] for found in shared.records()]))


def test_what_was_written_is_seen_and_older_versions_stay(tmp_path: Path):
    library = filled(tmp_path / "library", 6)
    before = library.version
    other = Library.open(tmp_path / "library")
    after = library.add([record(2, label="changed"), record(6)])
    assert len(library) == 7
    assert [found.label for found in library.records({"uid": "case 0002"})] == ["changed"]
    assert library.remove(["case 0000", "case 0001", "nobody"]) == 2
    assert library.version > after > before
    # The other one stays at what it opened, so that what it explains is of one library.
    assert len(other) == 6
    assert len(Library.open(tmp_path / "library")) == 5
    library.compact()
    assert len(library) == 5
    for version, count, label in ((before, 6, "benign"), (after, 7, "changed")):
        pinned = Library.open(tmp_path / "library", version)
        assert (len(pinned), pinned.version) == (count, version)
        assert pinned.search(record(2).vectors["plain"], 1)[0].record.label == label
        with pytest.raises(MedXAIError, match=f"Version {version} .* stays as it is"):
            pinned.add([record(9)])
    with pytest.raises(MedXAIError, match="has no version 99"):
        Library.open(tmp_path / "library", 99)


def test_an_addition_with_a_fault_adds_nothing(tmp_path: Path):
    library = filled(tmp_path / "library", 2)
    wide = {"plain": np.ones(PLAIN + 1), "scores": np.ones(SCORES)}
    for wrong, said in (
        (record(9, vectors=wide), r"'case 0009' is \(13,\) .* 12 numbers"),
        (record(9, vectors={"plain": np.ones(PLAIN)}), "has vectors in plain, the library in plain, scores"),
        (record(9, regions=np.ones((2, 3))), "regions of the case 'case 0009'"),
        (record(8), "Of 2 cases only 1 have a uid of their own"),
    ):
        with pytest.raises(MedXAIError, match=said):
            library.add([record(8), wrong])
    assert len(Library.open(tmp_path / "library")) == 2
    assert library.add([]) == library.version


def test_records_must_be_sound():
    broken = np.ones(PLAIN)
    broken[3] = np.nan
    for known, said in (
        ({"uid": ""}, "no uid"),
        ({"vectors": {"plain": broken, "scores": np.ones(SCORES)}}, "'plain' of the case 'case 0001' has NaN"),
        ({"regions": np.full((1, PLAIN), np.inf)}, "'regions' of the case 'case 0001' has NaN"),
        ({"meta": {"age": float("nan")}}, "leave out what is not known"),
        ({"meta": {"label": "x"}}, "'label' of the case 'case 0001' is in its meta"),
    ):
        with pytest.raises(MedXAIError, match=said):
            record(1, **known)


def test_wrong_questions_are_refused(shared: Library):
    right = np.ones(PLAIN)
    for asked, known, said in (
        (right[:5], {}, r"is \(5,\) and those of A network in 'plain' are of 12 numbers"),
        (right[None], {}, r"is \(1, 12\)"),
        (right, {"space": "scores"}, r"is \(12,\) .* 'scores' are of 5"),
        (right * np.nan, {}, "is NaN or infinite"),
        (right * 0, {}, "is zero everywhere"),
        (right, {"space": "plan"}, "no space of A network 'plan': did you mean plain"),
        (right, {"embedder": "another"}, "was embedded by A network .* by another network"),
    ):
        with pytest.raises(MedXAIError, match=said):
            shared.search(asked, **known)
    assert shared.search(right, embedder=EMBEDDER.fingerprint)


def test_what_is_no_library_is_said(tmp_path: Path):
    with pytest.raises(MedXAIError, match=r"no library of cases at .*nowhere"):
        Library.open(tmp_path / "nowhere")
    assert not (tmp_path / "nowhere").exists()
    filled(tmp_path / "library", 1)
    with pytest.raises(MedXAIError, match=r"is a library at .* already"):
        Library.create(tmp_path / "library", EMBEDDER)
    for file in (tmp_path / "library" / "cases.lance").rglob("*"):
        if file.is_file():
            file.write_bytes(b"torn")
    with pytest.raises(MedXAIError, match="cannot be read or written"):
        Library.open(tmp_path / "library")


@pytest.mark.parametrize(
    ("about", "said"),
    [
        ('{"format": 99, "embedder": {"other": 1}}', "newer MedXAI"),
        ("[]", "no library of MedXAI"),
        ("torn", "no library of MedXAI"),
        ('{"embedder": {}}', "no library of MedXAI"),
        ('{"embedder": {"fingerprint": "f", "model": "", "name": "", "spaces": {"plain": 5}}}', "no library of MedXAI"),
    ],
)
def test_what_is_written_of_another_library_is_not_relied_on(tmp_path: Path, about: str, said: str):
    lancedb, pyarrow = pytest.importorskip("lancedb"), pytest.importorskip("pyarrow")
    schema = pyarrow.schema([pyarrow.field("uid", pyarrow.string())], metadata={"medxai": about})
    lancedb.connect(tmp_path).create_table("cases", schema=schema)
    with pytest.raises(MedXAIError, match=said):
        Library.open(tmp_path)


def test_lancedb_is_imported_by_those_who_open_a_library_only():
    program = (
        "import sys, MedXAILib, MedXAILib.registry, MedXAILib.cli, MedXAILib.cases.building, MedXAILib.cases.demo; "
        "assert not {'lancedb', 'pyarrow'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", program], cwd=Path(cases.__file__).parents[2], check=True)


def test_without_lancedb_the_remedy_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "lancedb", None)
    with pytest.raises(MedXAIError, match=r"pip install 'medxai\[cases\]'"):
        Library.create(tmp_path / "library", EMBEDDER)


def test_pseudonyms_are_one_for_each_and_differ_between_libraries(tmp_path: Path):
    library, other = (Library.create(tmp_path / name, EMBEDDER) for name in ("one", "other"))
    smith = library.pseudonym("Smith, John")
    assert smith == Library.open(tmp_path / "one").pseudonym("Smith, John") != other.pseudonym("Smith, John")
    assert library.pseudonym("Smith, Jon") != smith
    library.add([record(1, uid=library.pseudonym("scan 1"), patient=smith), record(2)])
    assert "Smith" not in b"".join(f.read_bytes() for f in (tmp_path / "one").rglob("*") if f.is_file()).decode("latin")
    # By the name the person is found who is not named, and left out where they are to be.
    assert len(library.records({"patient": "Smith, John"})) == 1
    assert uids(library.search(record(1).vectors["plain"], 5, not_patient="Smith, John")) == ["case 0002"]
    assert library.remove(["scan 1"]) == 1


def test_an_index_finds_what_comparing_all_finds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    from lancedb import index

    library = filled(tmp_path / "library", 700)
    run = Run()
    library.index(run)
    assert not library._table.list_indices()
    monkeypatch.setattr(cases, "EXACT_BELOW", 500)
    monkeypatch.setattr(cases, "_SAMPLE", 50)
    # So small a library would be one part.
    monkeypatch.setattr(cases, "_PARTS", (1, 2, 4, 8, 12, 16))
    ivf_rq = index.IvfRq
    monkeypatch.setattr(index, "IvfRq", lambda **how: ivf_rq(num_partitions=16, **how))
    library.index(run)
    assert {each.index_type for each in library._table.list_indices()} == {"IvfRq"}
    # What comes later is found without being in it.
    library.add([record(700)])
    library = Library.open(tmp_path / "library")
    kept = list(range(701))
    for space in ("plain", "scores"):
        known = library._tuned(space)
        assert known["rows"] == 700
        assert known["recall"] >= 0.98
        assert known["parts"] > 1
        for asked in (record(900).vectors[space], -record(700).vectors[space]):
            assert len({*uids(library.search(asked, 10, space))} & {*nearest(asked, space, kept)[:10]}) >= 9
        even = [i for i in kept if i % 2 == 0]
        found = library.search(asked, 10, space, {"label": "benign"})
        assert len({*uids(found)} & {*nearest(asked, space, even)[:10]}) >= 9
    assert uids(library.search(record(700).vectors["plain"], 1)) == ["case 0700"]
    assert run.notes == []
    # An index that finds too little is not passed over in silence.
    monkeypatch.setattr(cases, "_PARTS", (1,))
    monkeypatch.setattr(cases, "RECALL", 1.1)
    library.add(record(i) for i in range(701, 800))
    library.index(run)
    assert any("finds only" in note for note in run.notes)


def test_recall_is_the_share_of_the_nearest_that_is_found():
    vectors = np.eye(3)[:1]
    angles = np.linspace(0, 1.5, 30)
    all_ = np.stack([np.cos(angles), np.sin(angles), 0 * angles], 1)
    sample = Sample.of(vectors, [all_[:13], all_[13:]], "cosine")
    np.testing.assert_allclose(sample.nearest[0], np.cos(angles[:11]))
    assert sample.recall(lambda asked: np.cos(angles[:11]).tolist()) == 1
    # Itself, and four of the ten others; the rest is farther away.
    assert sample.recall(lambda asked: np.cos(angles[[0, 1, 3, 5, 7, 20, 21, 22, 23, 24, 25]]).tolist()) == 0.4


def test_check_says_how_well_it_is_searched_and_what_is_missing(tmp_path: Path):
    library = filled(tmp_path / "library", 4)
    folder = tmp_path / "library" / "volumes"
    folder.mkdir()
    for i in range(3):
        (folder / f"{i}.nrrd").write_bytes(b"no scan")
    found = library.check(Run())
    assert (found.cases, found.version) == (4, library.version)
    assert {space: quality.recall for space, quality in found.quality.items()} == {"plain": 1.0, "scores": 1.0}
    assert [Path(path).name for path in found.wrong] == ["3.nrrd"]
    assert len(library.check(Run(), read=True).wrong) == 4
    with pytest.raises(MedXAIError, match="cannot be read as an image"):
        library.volume(record(1))
    with pytest.raises(MedXAIError, match="does not know where the scan"):
        library.volume(record(1, volume=""))


# Without what the package imports, so that it is there at once.
WRITER = """
import sys, types
path, first, step = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
package = sys.modules["MedXAILib"] = types.ModuleType("MedXAILib")
package.__path__ = [sys.argv[4]]
from MedXAILib.cases.library import Library
from MedXAILib.cases.record import Record
library = Library.open(path)
for i in range(first, 10**6, step):
    vectors = {space: [float(i + k) for k in range(size)] for space, (size, _) in library.embedder.spaces.items()}
    library.add(Record(uid, "", vectors=vectors, meta={"written": i}) for uid in (f"case {i:04d}", "common"))
    print(i, flush=True)
"""


def writer(path: Path, first: int, step: int = 1) -> subprocess.Popen[str]:
    """A process that adds case after case, each time with the case that all writers share, and says which it has
    added."""
    package = Path(cases.__file__).parents[1]
    command = [sys.executable, "-c", WRITER, str(path), str(first), str(step), str(package)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)


def acknowledged(process: subprocess.Popen[str], count: int) -> list[int]:
    """The next `count` cases that a writer says it added."""
    assert process.stdout is not None
    return [int(process.stdout.readline()) for _ in range(count)]


def test_a_killed_writer_loses_nothing_that_it_acknowledged(tmp_path: Path):
    writers = []
    for k in range(3):
        Library.create(tmp_path / f"{k}", EMBEDDER)
        writers.append(writer(tmp_path / f"{k}", 0))
    for k, process in enumerate(writers):
        acknowledged(process, 2 + k)
        # In the middle of the next addition, or not.
        time.sleep(0.003 * k)
        process.kill()
        told, _ = process.communicate()
        count = 2 + k + len([line for line in told.splitlines() if line])
        library = Library.open(tmp_path / f"{k}")
        # The one it was at may be there as well, as a whole.
        assert len(library) in (count + 1, count + 2)
        found = library.records()
        assert [one.uid for one in found] == [f"case {i:04d}" for i in range(len(found) - 1)] + ["common"]
        assert found[-1].meta == {"written": len(found) - 2}
        last = np.arange(PLAIN) + count - 1
        assert f"case {count - 1:04d}" in uids(library.search(last, 3))
        library.add([record(9999)])
        assert len(Library.open(tmp_path / f"{k}")) == len(found) + 1


def test_four_write_at_once_and_one_is_killed(tmp_path: Path):
    Library.create(tmp_path / "library", EMBEDDER)
    writers = [writer(tmp_path / "library", k, step=4) for k in range(4)]
    told = {k: acknowledged(process, 3) for k, process in enumerate(writers)}
    writers[0].kill()
    for k in (1, 2, 3):
        told[k] += acknowledged(writers[k], 3)
    for k, process in enumerate(writers):
        process.kill()
        rest, _ = process.communicate()
        told[k] += [int(line) for line in rest.splitlines() if line]
    found = Library.open(tmp_path / "library").uids()
    assert len(set(found)) == len(found)
    assert {f"case {i:04d}" for each in told.values() for i in each} | {"common"} <= set(found)
    # At most the one that each was at when it was killed.
    assert len(found) <= sum(map(len, told.values())) + 1 + 4
