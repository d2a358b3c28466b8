"""Explanations as BIDS derivatives and as tables: the same map on the same grid to another library, names that BIDS
allows and that are nobody else's, and nothing of where it was made."""

from __future__ import annotations

import csv
import json
import ntpath
import os
import re
import shutil
import subprocess
from collections import Counter
from dataclasses import replace
from pathlib import Path

import nibabel
import numpy as np
import pytest
import torch
from plain_map import saliency
from typer.testing import CliRunner

import MedXAILib as mx
from MedXAILib.cli import app
from MedXAILib.cohort.plan import Subject, make_plan
from MedXAILib.cohort.work import RESULTS, write_receipt
from MedXAILib.export.bids import label, write_bids
from MedXAILib.export.rows import COLUMNS, regions, rows, write_table
from MedXAILib.placeless import without_folders
from MedXAILib.registry import EXPLAINERS

SHAPE = (9, 14, 11)


def tilted() -> np.ndarray:
    """Array index to RAS mm of an oblique, anisotropic grid far from the middle of the scanner."""
    turned, _ = np.linalg.qr(np.array([[1.0, 0.2, -0.1], [-0.15, 1.0, 0.3], [0.05, -0.25, 1.0]]))
    affine = np.eye(4)
    affine[:3, :3] = (turned * np.sign(np.diag(turned)))[:, ::-1] * (3.1, 0.9, 1.3)
    affine[:3, 3] = (-212.7, 431.1, -1203.3)
    return affine


def a_map(seed: int = 0, **made: object) -> mx.SaliencyMap:
    data = torch.randn(1, *SHAPE, generator=torch.Generator().manual_seed(seed))
    return saliency(data, tilted(), True, **{"volume": {"source": "scan.nrrd", "fingerprint": "f"}, **made})


def of(kind: str, **said: object) -> mx.Explanation:
    """A caption, concepts, cases, rules or steps with what `a_map` knows of how it was made."""
    return getattr(mx, kind)(provenance=a_map(method=kind.lower()).provenance, residual={}, **said)


def told() -> list[mx.Explanation]:
    step = mx.Step(0.0, 1.5, {"benign": 0.25}, {"error": 0.125}, strange=True)
    rule = mx.Rule((mx.Condition("diameter_mm", ">", 8.0, "mm"),), "malignant", 0.5, 0.75, 4, applies=True)
    return [
        of(
            "ConceptScores",
            concepts=[
                mx.Concept("size", 0.5, 0.125, 12.0, "mm", "deep", 0, numbers={"p": 0.01, "score": 3.0}),
                mx.Concept("edge", refused="not known\tto it"),
            ],
            scored="TCAV score",
            text="It goes by\nsize.",
            maps=a_map(3).data,
            affine=tilted(),
        ),
        of("Caption", text="A nodule.", words=[mx.Word("nodule", 2, 8, 0.75, place=(1.0, -2.5, 3.0))]),
        of("SimilarCases", cases=[mx.Case("x-1", "benign", 0.875, note="in '/home/jane/x.nrrd'", role="unlike")]),
        of("RuleSet", rules=[rule]),
        of("Traversal", steps=[step], images=torch.zeros(1, 2, 2, 2), affine=np.eye(4), along="size"),
    ]


def table(path: Path) -> list[dict[str, str]]:
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file, delimiter="\t" if path.suffix == ".tsv" else ","))


def said(path: Path) -> dict[str, object]:
    return json.loads(path.read_text(encoding="utf-8"))


def scan_in_bids(root: Path, name: str = "sub-01/ses-a/anat/sub-01_ses-a_run-2_T1w.nii.gz") -> Subject:
    """A scan of a BIDS data set, whose place has a name that nobody should read."""
    (root / name).parent.mkdir(parents=True, exist_ok=True)
    (root / name).touch()
    raw = {"Name": "raw", "BIDSVersion": "1.10.0", "DatasetDOI": "doi:10.1/x"}
    (root / "dataset_description.json").write_text(json.dumps(raw), encoding="utf-8")
    return Subject((root / name).name.partition(".")[0], (str(root / name),))


def test_a_map_comes_back_equal_on_the_grid_of_the_scan(tmp_path: Path) -> None:
    one = replace(a_map(), interval=a_map(1).data.abs())
    out = write_bids([(Subject("case", ("scan.nrrd",)), one)], tmp_path / "out")
    folder = out / "sub-case" / "anat"
    image = nibabel.load(folder / "sub-case_desc-gradcamMarker_attrmap.nii.gz")
    # NIfTI has x first, and an affine in float32, from x y z.
    assert image.get_data_dtype() == np.float32
    assert np.array_equal(np.asarray(image.dataobj).T, one.data[0].numpy())
    expected = tilted()[:, [2, 1, 0, 3]]
    assert np.allclose(image.affine, expected, rtol=2e-7, atol=2e-6)
    assert np.allclose(image.get_qform(), expected, atol=2e-4) and image.header["sform_code"] == 1
    half = nibabel.load(folder / "sub-case_desc-gradcamMarker_attrinterval.nii.gz")
    assert one.interval is not None and np.array_equal(np.asarray(half.dataobj).T, one.interval[0].numpy())
    about = said(folder / "sub-case_desc-gradcamMarker_attrmap.json")
    assert (about["Signed"], about["Units"], about["Method"]) == (True, "arbitrary", "gradcam")

    # Each hot spot is the voxels of its index and more; it is the smallest set that holds its share.
    labels = nibabel.load(folder / "sub-case_desc-gradcamMarker_dseg.nii.gz")
    assert np.array_equal(labels.affine, image.affine)
    number, values = np.asarray(labels.dataobj).T, one.data[0].clamp_min(0).numpy().astype(float)
    spots = table(folder / "sub-case_desc-gradcamMarker_dseg.tsv")
    assert [spot["index"] for spot in spots] == ["1", "2", "3"]
    for spot, share in zip(spots, (0.5, 0.25, 0.1), strict=True):
        inside = number >= int(spot["index"])
        assert values[inside].min() >= values[~inside].max()
        assert values[inside].sum() >= share * values.sum() > values[inside].sum() - values[inside].min()
        assert float(spot["volume_ml"]) == pytest.approx(inside.sum() * 3.1 * 0.9 * 1.3 / 1000)
        assert float(spot["mean"]) == pytest.approx(values[inside].mean())
        peak = tilted() @ [*np.unravel_index(values.argmax(), SHAPE), 1]
        assert [float(spot[axis]) for axis in "xyz"] == pytest.approx(peak[:3], abs=1e-3)


def test_labels_are_legal_and_nobody_elses() -> None:
    assert label("hirescam", "malignant") == "hirescamMalignant" and label("01") == "01"
    names = ["a-b", "ab", "aB", "a b", "A b", "患者", "病人", "", "x" * 60, "x" * 61, "p1/ct", "p1ct", "-", "é", "../x"]
    names += [label(name) for name in names]
    found = [label(name) for name in dict.fromkeys(names)]
    assert all(re.fullmatch("[0-9a-zA-Z]{1,41}", one) for one in found)
    # Where small and capital letters are one, too; and a label is a name of its own.
    assert len({one.lower() for one in found}) == len(set(names))
    methods = {label(*method.split("_"), "malignant").lower() for method in EXPLAINERS}
    assert len(methods) == len(EXPLAINERS) and "predictionDifferenceMalignant".lower() in methods
    assert label("lime", "a", "b c") != label("lime", "a b", "c") != label("lime", "a", "b", "c")
    # What looks like a label with a hash has one, too.
    assert label("lime", "x01234567") != "limeX01234567"


def test_a_scan_of_a_bids_data_set_keeps_its_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    subject = scan_in_bids(tmp_path / "secret" / "raw")
    other = scan_in_bids(tmp_path / "secret" / "raw", "sub-01/ses-a/anat/sub-01_ses-a_run-2_T2w.nii.gz")
    again = replace(subject, uid="second nodule")
    out = tmp_path / "secret" / "raw" / "derivatives" / "medxai"
    write_bids([(subject, a_map()), (other, a_map(1)), (again, a_map(2))], out)
    names = sorted(path.name for path in (out / "sub-01" / "ses-a" / "anat").glob("*_attrmap.nii.gz"))
    assert len(names) == 3 and names[1:] == [
        "sub-01_ses-a_run-2_desc-gradcamMarkerT1w_attrmap.nii.gz",
        "sub-01_ses-a_run-2_desc-gradcamMarkerT2w_attrmap.nii.gz",
    ]
    about = said(out / "sub-01" / "ses-a" / "anat" / names[1].replace("nii.gz", "json"))
    assert about["Sources"] == ["bids:source:sub-01/ses-a/anat/sub-01_ses-a_run-2_T1w.nii.gz"]
    description = said(out / "dataset_description.json")
    assert description["DatasetType"] == "derivative" and description["DatasetLinks"] == {"source": "../.."}
    assert description["SourceDatasets"] == [{"URL": "../..", "DOI": "doi:10.1/x"}]
    assert description["GeneratedBy"][0]["Version"] == mx.__version__  # type: ignore[index]
    assert not (out / "participants.tsv").exists()
    if os.name != "nt":
        # As in DataLad's data sets, a file may be a link to another.
        scan = Path(other.volume[0]).rename(tmp_path / "MD5E-s0.nii.gz")
        Path(other.volume[0]).symlink_to(scan)
        linked = write_bids([(other, a_map())], out)
        (path,) = linked.rglob("*_attrmap.json")
        assert said(path)["Sources"] == ["bids:source:sub-01/ses-a/anat/sub-01_ses-a_run-2_T2w.nii.gz"]
    # From one drive of Windows there is no way to another.
    with monkeypatch.context() as two_drives:
        two_drives.setattr("os.path.relpath", lambda *_: ntpath.relpath("D:\\raw", "C:\\out"))
        assert "DatasetLinks" not in said(write_bids([(subject, a_map())], out) / "dataset_description.json")
    # From elsewhere, the way there would say where it was made.
    far = said(write_bids([(subject, a_map())], tmp_path / "out") / "dataset_description.json")
    assert "DatasetLinks" not in far and far["SourceDatasets"] == [{"DOI": "doi:10.1/x"}]


def test_whose_cases_they_are_is_said(tmp_path: Path) -> None:
    cases = [
        Subject("Doe, Jane", ("a.nrrd",), meta={"site": "north", "label": "x"}),
        Subject("nodule-1", ("b.nrrd",), meta={"patient": "p7", "age": "61", "side": "left"}),
        Subject("nodule-2", ("b.nrrd",), meta={"patient": "p7", "age": "61", "side": "right"}),
    ]
    out = write_bids([(case, a_map(i)) for i, case in enumerate(cases)], tmp_path / "out")
    people = {row["uid"]: row for row in table(out / "participants.tsv")}
    assert list(people) == ["Doe, Jane", "nodule-1; nodule-2"]
    assert people["nodule-1; nodule-2"]["site"] == "n/a" and people["nodule-1; nodule-2"]["age"] == "61"
    # One value of two would be said of both.
    assert "side" not in people["nodule-1; nodule-2"]
    assert people["Doe, Jane"]["label"] == "x"
    first = next(iter(table(out / "participants.tsv")[0]))
    assert first == "participant_id" and people["nodule-1; nodule-2"]["participant_id"] == "sub-p7"
    maps = list((out / "sub-p7").rglob("*_attrmap.json"))
    assert {said(path)["Case"] for path in maps} == {"nodule-1", "nodule-2"}
    described = {row["desc_id"] for row in table(out / "descriptions.tsv")}
    assert described == {re.search("desc-[^_]*", path.name)[0] for path in out.rglob("*_desc-*")}  # type: ignore[index]


def test_tables_say_what_the_explanations_do(tmp_path: Path) -> None:
    out = write_bids([(Subject("case", ("scan.nrrd",)), one) for one in told()], tmp_path / "out")
    found = {path.name.rpartition("_")[2][:-4]: path for path in (out / "sub-case").rglob("*.tsv")}
    assert sorted(found) == ["cases", "concepts", "dseg", "rules", "steps", "texts", "words"]
    size, edge = table(found["concepts"])
    assert (size["name"], size["score"], size["interval"], size["value"]) == ("size", "0.5", "0.125", "12.0")
    # A number of the concept's own by the name of a column is not taken for it.
    assert (size["p"], size["score (its own)"]) == ("0.01", "3.0")
    assert (edge["score"], edge["value"], edge["note"]) == ("n/a", "n/a", "not known to it")
    (word,) = table(found["words"])
    assert [word[name] for name in ("name", "x", "y", "z", "score", "start")] == "nodule 1.0 -2.5 3.0 0.75 2".split()
    (case,) = table(found["cases"])
    assert (case["role"], case["score"], case["note"]) == ("unlike", "0.875", "in 'x.nrrd'")
    (rule,) = table(found["rules"])
    assert (rule["says"], rule["applies"], rule["correctness"], rule["cases"]) == ("malignant", "true", "0.75", "4")
    (step,) = table(found["steps"])
    assert (step["value"], step["score of benign"], step["error"], step["strange"]) == ("1.5", "0.25", "0.125", "true")
    for path in found.values():
        about, heads = said(path.with_suffix(".json")), list(table(path)[0])
        assert all(about[head]["Description"] for head in heads if head != "index")  # type: ignore[index]
        assert (about.get("x") or {"Units": "mm"})["Units"] == "mm"  # type: ignore[index]

    count = write_table(tmp_path / "all.csv", [("a", one) for one in told()] + [("b", a_map())])
    flat = table(tmp_path / "all.csv")
    kinds = Counter((row["case"], row["kind"]) for row in flat)
    assert count == len(flat) == 14
    assert kinds["a", "hot spot"] == kinds["b", "hot spot"] == 3 and kinds["a", "concept"] == kinds["a", "text"] == 2
    assert [row["name"] for row in flat if row["kind"] == "text"] == ["It goes by size.", "A nodule."]
    assert next(row for row in flat if row["name"] == "size")["score"] == "0.5"
    assert set(flat[0]) - set(COLUMNS) == {"p", "score (its own)", "score of benign", "error"}


def test_no_name_is_a_formula_to_a_spreadsheet(tmp_path: Path) -> None:
    # As OWASP has it: text that begins so is computed, and may reach other files, pages and programs.
    names = ['=HYPERLINK("//x/")', "@SUM(1)", "+1-1", "-2+cmd|' /C calc'!A0", "- nodule", "-1.5", "+3", "a=b", "-"]
    pairs = [(name, of("SimilarCases", cases=[mx.Case(name, name, -0.5)])) for name in names]
    write_table(tmp_path / "all.csv", pairs)
    people = [(Subject(name, ("a.nrrd",), meta={"=site": name}), one) for name, one in pairs]
    out = write_bids(people, tmp_path / "out")
    numbers, text = ("-1.5", "+3"), [f"'{name}" if name in names[:5] or name == "-" else name for name in names]
    flat = table(tmp_path / "all.csv")
    assert [row["case"] for row in flat] == [row["label"] for row in flat] == text
    assert {row["score"] for row in flat} == {"-0.5"}
    assert {row["uid"] for row in table(out / "participants.tsv")} == set(text)
    for path in [tmp_path / "all.csv", *out.rglob("*.tsv")]:
        cells = [cell for row in table(path) for cell in (*row, *row.values())]
        assert not [one for one in cells if one[:1] in tuple("=+-@") and one not in (*numbers, "-0.5")], path


def test_regions_are_the_supervoxels() -> None:
    # Eight boxes, of which two neighbours have one value, and one has none.
    values = torch.tensor([3.0, -5.0, 0.0, 1.0, 1.0, 2.0, 0.5, -0.25])
    painted = values.reshape(2, 2, 2).repeat_interleave(4, 0).repeat_interleave(5, 1).repeat_interleave(6, 2)
    found = list(regions(saliency(painted[None], tilted(), method="lime")))
    # (1, 0, 0) and (0, 1, 1) share an edge alone.
    assert [row["value"] for row in found] == [-5.0, 3.0, 2.0, 1.0, 1.0, 0.5, -0.25]
    box = 4 * 5 * 6
    assert {row["voxels"] for row in found} == {box}
    assert found[0]["volume_ml"] == pytest.approx(box * 3.1 * 0.9 * 1.3 / 1000)
    assert found[0]["share"] == pytest.approx(5 / 12.75)
    middle = tilted() @ [1.5, 2.0, 8.5, 1]
    assert [found[0][axis] for axis in "xyz"] == pytest.approx(middle[:3], abs=1e-3)
    merged = torch.where(painted == 3, -5.0, painted)
    assert next(row["voxels"] for row in regions(saliency(merged[None], tilted(), method="lime"))) == 2 * box
    # Other methods have none; nor does a map that was blended on the way back from another grid.
    assert not list(regions(saliency(painted[None], tilted(), method="rise")))
    other = tilted() @ np.diag([1.3, 0.7, 0.9, 1])
    blended = mx.grid.resample(painted[None], other, painted.shape, tilted())
    assert not list(regions(saliency(blended, tilted(), method="lime")))


def test_nothing_says_where_it_was_made(tmp_path: Path) -> None:
    secret = tmp_path / "jane"
    made = {
        "model": {"name": "network", "task": "classification", "source": "/home/jane/model"},
        "parameters": {"library": "/home/jane/cases", "tables": ["C:\\jane\\a.csv", 3], "layer": "shape/1"},
        "notes": ["Left out: '/home/jane/scan 1.nrrd' is constant."],
        "volume": {"source": "/home/jane/scan.nrrd", "fingerprint": "f"},
    }
    subject = Subject("case", (str(secret / "scan.nrrd"),), meta={"mask": "/home/jane/mask.nrrd"})
    pairs = [(subject, a_map(**made)), *((scan_in_bids(secret / "raw"), one) for one in told())]
    out = write_bids(pairs, tmp_path / "out")
    count = write_table(tmp_path / "all.csv", [("case", one) for _, one in pairs])
    assert count > 10
    for path in [*out.rglob("*"), tmp_path / "all.csv"]:
        assert "jane" not in path.name and (path.is_dir() or b"jane" not in path.read_bytes()), path
    about = said(out / "sub-case" / "anat" / "sub-case_desc-gradcamMarker_attrmap.json")
    assert about["Parameters"] == {"library": "cases", "tables": ["a.csv", 3], "layer": "shape/1"}
    assert about["Notes"] == ["Left out: 'scan 1.nrrd' is constant."]


@pytest.mark.parametrize(
    ("text", "left"),
    [
        ("in '/home/o'brien/x 1.nrrd': it's constant", "in 'x 1.nrrd': it's constant"),
        ("'C:\\Users\\Jane Doe\\ct\\' and '\\\\server\\jane\\ct'", "'ct' and 'ct'"),
        ('/home/jane/x.nrrd has NaN; "D:/jane/y" (/jane/z)', 'x.nrrd has NaN; "y" (z)'),
        ("5 mm/s, 60 /min, 1 / 2, a/b/c, '/', https://a.b/c", "5 mm/s, 60 /min, 1 / 2, a/b/c, '/', https://a.b/c"),
    ],
)
def test_paths_in_sentences_lose_their_folders(text: str, left: str) -> None:
    assert without_folders(text) == left


def test_another_data_set_is_not_replaced(tmp_path: Path) -> None:
    subject = scan_in_bids(tmp_path / "raw")
    with pytest.raises(mx.MedXAIError, match="holds another data set"):
        write_bids([(subject, a_map())], tmp_path / "raw")
    assert Path(subject.volume[0]).exists()
    # A former result is, as a whole.
    out = tmp_path / "raw" / "derivatives" / "medxai"
    write_bids([(subject, a_map())], out)
    write_bids([(subject, a_map(method="rise"))], out)
    assert not list(out.rglob("*gradcam*"))
    with pytest.raises(mx.MedXAIError, match="Two results are called"):
        write_bids([(subject, a_map()), (subject, a_map(1))], out)
    assert list(out.rglob("*rise*"))


@pytest.mark.skipif(shutil.which("bids-validator-deno") is None, reason="needs bids-validator-deno")
def test_the_data_set_is_valid(tmp_path: Path) -> None:
    odd = ("sub-02/pet/sub-02_pet.nii.gz", "sub-02/anat/sub-02_inv-1_MP2RAGE.nii.gz")
    maps = [(scan_in_bids(tmp_path / "raw"), one) for one in (a_map(), *told())]
    maps += [(scan_in_bids(tmp_path / "raw", name), a_map()) for name in odd]
    named = Subject("患者 1", ("a.nrrd",), meta={"site": "north", "sex": "F", "patient": "n 1"})
    for i, pairs in enumerate((maps, [*maps, (named, a_map())])):
        out = write_bids(pairs, tmp_path / "raw" / "derivatives" / str(i))
        command = ["bids-validator-deno", str(out), "--format", "json"]
        answer = subprocess.run(command, capture_output=True, text=True, check=False, env=os.environ).stdout
        issues = json.loads(answer)["issues"]["issues"]
        assert not [one for one in issues if one["severity"] == "error"]
        known = {"TOO_FEW_AUTHORS", "SIDECAR_KEY_RECOMMENDED"}
        assert {one["code"] for one in issues} <= known


def test_another_reader_finds_them_by_their_entities(tmp_path: Path) -> None:
    bids = pytest.importorskip("bids")
    write_bids([(scan_in_bids(tmp_path / "raw"), one) for one in (a_map(), *told())], tmp_path / "out")
    layout = bids.BIDSLayout(tmp_path / "out", validate=False, is_derivative=True)
    (found,) = layout.get(
        subject="01", session="a", run=2, desc="gradcamMarkerT1w", suffix="attrmap", extension="nii.gz"
    )
    assert layout.get_metadata(found.path)["Method"] == "gradcam"
    assert np.array_equal(np.asarray(found.get_image().dataobj).T, a_map().data[0].numpy())
    assert {one.entities["suffix"] for one in layout.get(extension="tsv")} >= {"dseg", "concepts", "words"}


def test_the_command_line_writes_them(tmp_path: Path) -> None:
    def medxai(*args: object, code: int = 0) -> str:
        answer = CliRunner().invoke(app, list(map(str, args)))
        assert answer.exit_code == code, answer.output
        return answer.output

    subject = scan_in_bids(tmp_path / "raw")
    one = a_map(volume={"source": subject.volume[0], "fingerprint": "f"})
    one.save(tmp_path / "kept")
    out = tmp_path / "raw" / "derivatives" / "medxai"
    medxai("export", tmp_path / "kept", "--to", "bids", "--out", out)
    (found,) = out.rglob("*_attrmap.nii.gz")
    assert found.name == "sub-01_ses-a_run-2_desc-gradcamMarkerT1w_attrmap.nii.gz"
    medxai("export", tmp_path / "kept", "--to", "csv", "--out", tmp_path / "one.csv")
    assert {row["case"] for row in table(tmp_path / "one.csv")} == {subject.uid}
    a_map(volume={"source": "C:\\jane\\ct 1.nrrd", "fingerprint": "f"}).save(tmp_path / "windows")
    medxai("export", tmp_path / "windows", "--to", "csv", "--out", tmp_path / "one.csv")
    assert {row["case"] for row in table(tmp_path / "one.csv")} == {"ct 1"}
    assert "need the folder of the series" in " ".join(medxai("export", tmp_path / "kept", code=2).split())

    plan = make_plan("m", "f", {"gradcam": {}, "rise": {}}, [subject, Subject("b", ("b.nrrd",))])
    plan.save(tmp_path / "cohort")
    assert "holds no explanation yet" in medxai("cohort", "export", tmp_path / "cohort", code=1)
    for unit in list(plan.units())[:3]:
        a_map(method=unit.method).save(tmp_path / "cohort" / RESULTS / unit.key)
        write_receipt(tmp_path / "cohort", unit, {"status": "done"})
    medxai("cohort", "export", tmp_path / "cohort", "--out", tmp_path / "all")
    assert len(list((tmp_path / "all").rglob("*_attrmap.nii.gz"))) == 3
    assert "9 rows" in medxai("cohort", "export", tmp_path / "cohort", "--to", "csv", "--out", tmp_path / "all.csv")
    assert Counter((r["case"], r["method"]) for r in table(tmp_path / "all.csv")) == {
        (subject.uid, "gradcam"): 3,
        ("b", "gradcam"): 3,
        (subject.uid, "rise"): 3,
    }


def test_a_batch_is_refused(tmp_path: Path) -> None:
    one = a_map()
    batch = replace(one, data=one.data[None], batched=True)
    with pytest.raises(mx.MedXAIError, match="batch"):
        write_bids([(Subject("a", ("a",)), batch)], tmp_path / "out")
    with pytest.raises(mx.MedXAIError, match="batch"):
        list(rows(batch))
    assert not (tmp_path / "out").exists()
