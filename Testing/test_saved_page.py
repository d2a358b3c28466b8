"""The page of a saved explanation: the one that was written when it was made, and never that of another scan."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk
import torch
from plain_map import saliency
from test_cli import here, medxai, refused  # noqa: F401
from test_report import sphere

import MedXAILib as mx
from MedXAILib.cohort.work import digest
from MedXAILib.report.case import show, write
from MedXAILib.report.pdf import pdf
from MedXAILib.report.saved import write_page
from MedXAILib.report.told import write_told
from MedXAILib.trust.card import TrustCard
from MedXAILib.trust.finding import Finding

CARD = TrustCard((Finding("validity", "Is it so?", "It is so.", "good", {"mass": 0.5}),), {"stability": "slow"}, 3, 4)


def files(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir()}


def stored(volume: mx.Volume, file: Path) -> mx.Volume:
    """The scan as a file has it: where it is in space differs in the last bit."""
    sitk.WriteImage(volume.to_sitk(), str(file))
    return mx.load_volume(file)


def bare(folder: Path) -> dict[str, bytes]:
    """Take the page away: what had been written."""
    written = files(folder)
    for file in (folder / "index.html", *folder.glob("*.png")):
        file.unlink()
    return written


@pytest.fixture
def mapped(tmp_path: Path) -> tuple[Path, mx.Volume, mx.SaliencyMap, mx.Volume]:
    """An oblique, anisotropic scan with a map of it, and the segmentation of what is in it."""
    volume, heat, mask = sphere()
    scan = stored(volume, tmp_path / "scan.nrrd")
    made = saliency(heat.data, scan.affine, volume={"source": scan.source, "fingerprint": scan.fingerprint})
    return tmp_path / "kept", scan, made, stored(mask, tmp_path / "mask.nrrd")


@pytest.mark.parametrize("given", [False, True])
def test_the_page_of_a_map_is_that_of_its_making(mapped, given: bool) -> None:
    folder, scan, made, mask = mapped
    folder.mkdir()
    write(folder, show(scan, made, segmentation=mask, card=CARD))
    written = bare(folder)
    assert write_page(folder, scan.source if given else None, mask.source) == folder / "index.html"
    assert files(folder) == written and {"index.html", "montage.png", "trust.json"} <= set(written)
    assert b"It is so." in written["index.html"] and b"Does it meet the segmentation?" in written["index.html"]


def told(heat: mx.SaliencyMap, scan: mx.Volume) -> list[mx.Explanation]:
    """One of each kind that is not one map."""
    made, maps, onto = heat.provenance, heat.data, heat.affine
    words = (mx.Word("round", 2, 7, 0.2), mx.Word("nodule", 8, 14, 0.9, 0, (21.0, -14.0, 33.0)))
    concepts = (mx.Concept("size", 1.2, 0.3, 15.0, "mm", map=0, numbers={"p": 0.001}), mx.Concept("edge", refused="no"))
    cases = tuple(mx.Case(f"case {i}", "ill", 0.9 - i / 10, volume=scan, map=maps) for i in range(2))
    steps = tuple(mx.Step(float(p), 1.0 - p, {"ill": 1 - p / 2}, {"size": 9.0 + p}) for p in (-1, 0, 1))
    images = torch.cat([scan.data * share for share in (0.5, 1.0, 1.5)])
    rule = mx.Rule((mx.Condition("size", ">", 12.0, "mm"),), "ill", 0.3, 0.9, 31, applies=True)
    return [
        mx.Caption(made, {}, "A round nodule.", words, maps, onto),
        mx.ConceptScores(made, {"shares": 1e-7}, concepts, "score", "By size.", maps, onto, alike=np.eye(2)),
        mx.SimilarCases(made, {}, cases, maps, onto, text="Two."),
        mx.Traversal(made, {}, steps, images, onto, "by size", "It flips.", 2, (), None),
        mx.RuleSet(made, {}, (rule,), "By size.", {"size": 15.0}),
    ]


@pytest.mark.parametrize("kind", range(5))
def test_the_page_of_every_other_kind_is_that_of_its_making(mapped, kind: int) -> None:
    folder, scan, heat, mask = mapped
    folder.mkdir()
    write_told(folder, scan, told(heat, scan)[kind], card=CARD)
    written = bare(folder)
    write_page(folder)
    assert files(folder) == written and b"It is so." in written["index.html"]
    with pytest.raises(mx.MedXAIError, match="leave the segmentation out"):
        write_page(folder, segmentation=mask.source)


def test_a_former_page_and_its_pdf_are_replaced_and_nothing_else(mapped) -> None:
    folder, _, made, _ = mapped
    made.save(folder)
    kept = files(folder)
    (folder / "notes.txt").write_bytes(b"former")
    computed = digest(folder)
    for name in ("index.html", "report.pdf"):
        (folder / name).write_bytes(b"former")
    write_page(folder, printed=True)
    # A cohort takes its result for what it was.
    assert digest(folder) == computed
    now = files(folder)
    assert now.pop("report.pdf") == pdf(now["index.html"].decode())
    assert b"Why" in now.pop("index.html") and now.pop("montage.png") and now == {**kept, "notes.txt": b"former"}
    write_page(folder)
    assert not (folder / "report.pdf").exists()


def test_only_the_scan_that_was_explained_is_taken(mapped, tmp_path: Path) -> None:
    folder, scan, made, _ = mapped
    made.save(folder)
    kept = files(folder)
    # One voxel of another value, and the same voxels 1 mm away.
    other, away = scan.data.clone(), scan.affine.copy()
    other[0, 3, 4, 5] += 1
    away[0, 3] += 1
    for name, wrong in {"value": mx.Volume(other, scan.affine), "place": mx.Volume(scan.data, away)}.items():
        stored(wrong, tmp_path / f"{name}.nrrd")
        with pytest.raises(mx.MedXAIError, match=rf"{name}\.nrrd' is not the scan .*scan\.nrrd"):
            write_page(folder, tmp_path / f"{name}.nrrd")
    shutil.move(tmp_path / "scan.nrrd", tmp_path / "moved.nrrd")
    with pytest.raises(mx.MedXAIError, match=r"scan\.nrrd', is not there: give the scan"):
        write_page(folder)
    shutil.copy(tmp_path / "value.nrrd", tmp_path / "scan.nrrd")
    with pytest.raises(mx.MedXAIError, match="is not the scan"):
        write_page(folder)
    assert files(folder) == kept
    write_page(folder, tmp_path / "moved.nrrd")
    assert set(files(folder)) == {*kept, "index.html", "montage.png"}


def test_a_scan_that_was_explained_in_slicer_is_known_again(tmp_path: Path) -> None:
    # The same upright grid; Slicer builds it by VTK, whose zeros have no sign.
    place = np.array([[0.0, 0.0, -1.5, 12.0], [0.0, -1.0, 0.0, -30.0], [2.0, 0.0, 0.0, 7.0], [0.0, 0.0, 0.0, 1.0]])
    there = mx.Volume(torch.rand(1, 4, 5, 6), place, "CT")
    scan = stored(there, tmp_path / "scan.nrrd")
    assert np.signbit(scan.affine[0, 0]) and np.array_equal(scan.affine, place)
    made = {"source": "CT", "fingerprint": there.fingerprint}
    saliency(there.data, place, volume=made).save(tmp_path / "kept")
    assert write_page(tmp_path / "kept", scan.source).exists()
    with pytest.raises(mx.MedXAIError, match="'CT', is not there: give the scan"):
        write_page(tmp_path / "kept")


def test_what_cannot_be_written_leaves_the_former_page(mapped, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, _, made, _ = mapped
    made.save(folder)
    (folder / "index.html").write_text("former", encoding="utf-8")
    kept = files(folder)

    def full(self: Path, *_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_text", full)
    with pytest.raises(mx.MedXAIError, match="No space left"):
        write_page(folder)
    assert files(folder) == kept


def test_the_command_writes_what_explain_wrote_but_for_the_prediction(here: Path) -> None:  # noqa: F811
    done = medxai("explain", "test_cli:network", "scan.nrrd", "-s", "block.nrrd", "--pdf", "--out", "out")
    assert done.exit_code == 0, done.output
    explained = (here / "out" / "index.html").read_text(encoding="utf-8")
    mx.load_explanation("out").save("kept")
    done = medxai("report", "kept", "-s", "block.nrrd", "--pdf")
    assert done.exit_code == 0 and "index.html" in done.output, done.output
    written = (here / "kept" / "index.html").read_text(encoding="utf-8")

    def without(page: str) -> list[str]:
        return [line for line in page.splitlines() if "What the network said" not in line and "<img" not in line]

    assert without(written) == without(explained)
    assert {p.name for p in (here / "kept").iterdir()} == {p.name for p in (here / "out").iterdir()}
    assert (here / "kept" / "report.pdf").read_bytes() == pdf(written)
    refused(medxai("report", "kept", "block.nrrd"), "not the scan that was explained")
    refused(medxai("report", "kept", "scan.nrrd", "block.nrrd"), "not the scan that was explained")
    refused(medxai("report", "."), "holds no explanation")
