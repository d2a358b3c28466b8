"""`medxai cases`: libraries made of scans in a table, searched, mended and checked, and the demo library."""

from __future__ import annotations

import io
import math
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk
import torch
from PIL import Image
from torch import Tensor, nn
from typer.testing import CliRunner, Result

import MedXAILib as mx
from MedXAILib import cli, resources
from MedXAILib.cases import building, demo
from MedXAILib.cases.building import build, thumbnail
from MedXAILib.cases.demo import demo_library
from MedXAILib.cases.library import Embedder, Library
from MedXAILib.cases.spaces import SPACES
from MedXAILib.errors import Cancelled, MedXAIError
from MedXAILib.model import Prepared
from MedXAILib.run import Run
from MedXAILib.synthetic.lung_nodules import ATTRIBUTES, rule_logit
from MedXAILib.volume import Volume, load_volume

pytest.importorskip("lancedb")

# Oblique and anisotropic, as scanners make them: index (x, y, z) to LPS mm.
SPACING, ORIGIN = (1.5, 1.0, 2.0), (-12.0, 30.0, 7.0)
DIRECTION = (0.8, -0.6, 0.0, 0.6, 0.8, 0.0, 0.0, 0.0, 1.0)
SHAPE = (12, 16, 20)
PATCH = (8, 8, 8)
MODEL = "test_cases_cli:network"


class Network(nn.Module):
    """Two classes by the brightest place and the mean of a convolution."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.convolution = nn.Conv3d(1, 4, 3, padding=1)
        self.classes = nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.classes(self.convolution(x).relu().mean((2, 3, 4)))


def network() -> mx.Model:
    """It looks at patches; `test_cases_cli:network` on the command line."""
    return mx.Model(Network(), class_names=("healthy", "[red]tumour"), patch_size=PATCH, name="Small")


def whole_network() -> mx.Model:
    """The same, looking at whole scans."""
    return mx.Model(Network(), class_names=("healthy", "[red]tumour"))


def scan(path: Path, seed: int) -> Volume:
    values = np.random.default_rng(seed).normal(size=SHAPE).astype(np.float32)
    image = sitk.GetImageFromArray(values)
    image.SetSpacing(SPACING)
    image.SetOrigin(ORIGIN)
    image.SetDirection(DIRECTION)
    sitk.WriteImage(image, str(path))
    return load_volume(path)


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder to work in, with a table of five places in three scans, of which one does not exist and one is torn."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")
    first, second = scan(Path("smith-1.nrrd"), 1), scan(Path("b.nrrd"), 2)
    Path("torn.nrrd").write_bytes(b"NRRD0004\n")
    places = {name: " ".join(f"{v:.2f}" for v in first.to_point(index)) for name, index in POINTS.items()}
    rows = [
        "volume,region,label,patient,site,age,report",
        f"smith-1.nrrd,{places['middle']},healthy,smith,left,61,says Smith",
        f"smith-1.nrrd,{places['corner']},[red]tumour,smith,right,61,",
        f"torn.nrrd,{places['middle']},healthy,jones,left,,",
        f"nowhere.nrrd,{places['middle']},healthy,miller,left,,",
        f"b.nrrd,{places['middle']},,weber,left,old,",
    ]
    Path("table.csv").write_text("\n".join(rows), encoding="utf-8")
    assert second.shape == SHAPE
    return tmp_path


# Between voxels, so that an even patch leans to neither side.
POINTS = {"middle": (6.5, 8.5, 10.5), "corner": (2.5, 3.5, 4.5)}


def medxai(*words: object) -> Result:
    return CliRunner().invoke(cli.app, [str(word) for word in words])


def expected(volume: Path, index: tuple[float, float, float]) -> tuple[np.ndarray, str]:
    """The plain embedding and the class of the patch about a voxel, by hand."""
    values = load_volume(volume).data
    low = [math.floor(i - 3.5) for i in index]
    grown = nn.functional.pad(values, (4, 4, 4, 4, 4, 4), value=float(values.min()))
    patch = grown[(slice(None), *(slice(a + 4, a + 12) for a in low))][None]
    one = Network().eval()
    with torch.no_grad():
        found = one.convolution(patch)[0].flatten(1)
        said = ("healthy", "[red]tumour")[int(one(patch).argmax())]
    return np.concatenate([found.mean(1), found.amax(1)]), said


def test_a_library_of_a_table(here: Path):
    made = medxai("cases", "build", "table.csv", "--model", MODEL, "--out", "library")
    assert made.exit_code == 0, made.output
    assert "has 3 cases" in made.output
    assert "'torn.nrrd' cannot be read" in made.output
    assert "no file or folder 'nowhere.nrrd'" in made.output
    assert "The paths of 2 of the 5 scans have the patient or the uid in them" in made.output
    library = Library.open("library")
    assert library.embedder.model == MODEL
    assert library.embedder.spaces["plain"] == (8, "cosine")
    # Nothing says who they are but the path, of which the person is told; nor is the report kept.
    stored = b"".join(f.read_bytes() for f in Path("library").rglob("*") if f.is_file()).lower()
    assert b"weber" not in stored
    assert stored.count(b"smith") == stored.count(b"smith-1.nrrd")
    for name, index, volume in (("left", "middle", "smith-1.nrrd"), ("right", "corner", "smith-1.nrrd")):
        (case,) = library.records({"site": name, "patient": "smith"})
        vector, said = expected(here / volume, POINTS[index])
        np.testing.assert_allclose(case.vectors["plain"], vector, atol=1e-5)
        assert case.said == said
        assert case.label == ("healthy" if name == "left" else "[red]tumour")
        assert case.patient == library.pseudonym("smith")
        assert case.meta["age"] == 61.0
        assert library.volume(case).fingerprint == load_volume(volume).fingerprint
        np.testing.assert_allclose(load_volume(volume).to_index(case.region), POINTS[index], atol=0.01)
    (other,) = library.records({"patient": "weber"})
    assert (other.label, other.meta["age"], other.meta["site"]) == ("", "old", "left")
    assert set(other.meta) <= {"age", "site", "scan"}


def test_a_library_goes_on(here: Path, monkeypatch: pytest.MonkeyPatch):
    read = []
    monkeypatch.setattr(building, "load_volume", lambda path: read.append(Path(path).name) or load_volume(path))
    steps = []

    def cancel() -> bool:
        steps.append(None)
        return len(steps) > 1

    # One patch at a time, and cancelled at the second.
    monkeypatch.setattr(building, "_VOXELS", 1)
    with pytest.raises(Cancelled):
        build(network(), "table.csv", "library", Run(cancel=cancel))
    assert len(Library.open("library")) == 1
    read.clear()
    library = build(network(), "table.csv", "library", Run())
    assert len(library) == 3
    assert read == ["smith-1.nrrd", "torn.nrrd", "nowhere.nrrd", "b.nrrd"]
    read.clear()
    version = library.version
    with pytest.raises(MedXAIError, match="None of the 2 scans can be embedded"):
        build(network(), "table.csv", "library", Run())
    assert "b.nrrd" not in read
    # Another label is another label only when it is embedded again.
    text = Path("table.csv").read_text(encoding="utf-8")
    Path("table.csv").write_text(text.replace(",,weber", ",healthy,weber"), encoding="utf-8")
    again = build(network(), "table.csv", "library", Run(), again=True)
    assert [case.label for case in again.records({"patient": "weber"})] == ["healthy"]
    assert [case.label for case in Library.open("library", version).records({"patient": "weber"})] == [""]


def test_identifiers_and_paths_are_kept_as_asked(here: Path):
    kept = build(network(), "table.csv", "kept", Run(), identifiers=True, paths=False)
    assert {case.patient for case in kept.records()} == {"smith", "weber"}
    assert {case.volume for case in kept.records()} == {""}
    with pytest.raises(MedXAIError, match="does not know where the scan"):
        kept.volume(kept.records()[0])


def test_what_cannot_be_a_library_is_said(here: Path):
    build(network(), "table.csv", "library", Run())
    other = network()
    with torch.no_grad():
        other.network.classes.weight += 0.1
    with pytest.raises(MedXAIError, match=r"embedded by Small .* this is another network"):
        build(other, "table.csv", "library", Run())
    Path("bad.csv").write_text("volume\ntorn.nrrd\n", encoding="utf-8")
    with pytest.raises(MedXAIError, match="None of the scans can be read"):
        build(network(), "bad.csv", "bad", Run())
    assert not Library.is_at("bad")
    failed = medxai("cases", "search", "nowhere", "b.nrrd")
    assert (failed.exit_code, "no library of cases" in failed.output) == (1, True)


def test_every_row_is_a_case_of_its_own(here: Path):
    Path("twice.csv").write_text("volume,label\nb.nrrd,healthy\nsmith-1.nrrd,healthy\nb.nrrd,[red]tumour\n")
    with pytest.raises(MedXAIError, match=r"Row 4 .* column 'uid': this is the case of row 2 again"):
        build(whole_network(), "twice.csv", "twice", Run())
    assert not Path("twice").exists()


def test_the_network_of_a_library_is_found_from_anywhere(here: Path):
    model = whole_network()
    model.source = "b.nrrd"
    Path("one.csv").write_text("volume\nb.nrrd\n", encoding="utf-8")
    assert build(model, "one.csv", "one", Run()).embedder.model == str(here / "b.nrrd")


def test_scans_of_several_sizes_and_one_that_cannot_be_embedded(here: Path):
    model = whole_network()
    big = torch.zeros(1, 1, 10, 10, 10)
    big[0, 0, 2] = 1
    sitk.WriteImage(sitk.GetImageFromArray(big[0, 0].numpy()), "big.nrrd")
    broken = np.full(SHAPE, 3e38, np.float32)
    broken[0] = -3e38
    sitk.WriteImage(sitk.GetImageFromArray(broken), "broken.nrrd")
    Path("more.csv").write_text("volume\nb.nrrd\nbroken.nrrd\nbig.nrrd\nsmith-1.nrrd\n", encoding="utf-8")
    run = Run()
    library = build(model, "more.csv", "more", run, identifiers=True)
    assert library.uids() == ["b.nrrd", "big.nrrd", "smith-1.nrrd"]
    assert [note for note in run.notes if "broken" in note]


def test_search_on_the_command_line(here: Path):
    medxai("cases", "build", "table.csv", "--model", MODEL, "--out", "library", "--keep-identifiers")
    place = ",".join(str(v) for v in load_volume("b.nrrd").to_point(POINTS["middle"]))
    found = medxai("cases", "search", "library", "b.nrrd", "--region", place, "--trust")
    assert found.exit_code == 0, found.output
    lines = [line.split() for line in found.output.splitlines() if ".nrrd" in line]
    assert len(lines) == 3
    assert lines[0][0] == "b.nrrd"
    assert "[red]tumour" in found.output
    # Itself: a cosine of one.
    assert "1" in lines[0]
    for words, names in (
        (["--where", "site=right"], ["smith-1.nrrd"]),
        (["--where", "age=60..62", "--where", "label=healthy"], ["smith-1.nrrd"]),
        (["--where", "age=old", "--where", "age=61"], ["b.nrrd", "smith-1.nrrd", "smith-1.nrrd"]),
        (["--where", "age=..3"], []),
        (["--not-patient", "smith"], ["b.nrrd"]),
        (["--count", "1"], ["b.nrrd"]),
    ):
        found = medxai("cases", "search", "library", "b.nrrd", "--region", place, "--trust", *words)
        assert sorted(line.split()[0] for line in found.output.splitlines() if ".nrrd" in line) == names, words
    wrong = medxai("cases", "search", "library", "b.nrrd", "--region", place, "--space", "plan")
    assert (wrong.exit_code, "did you mean plain" in wrong.output) == (1, True)


def test_remove_check_and_add_on_the_command_line(here: Path):
    medxai("cases", "build", "table.csv", "--model", MODEL, "--out", "library", "--keep-identifiers")
    checked = medxai("cases", "check", "library", "--read")
    assert checked.exit_code == 0, checked.output
    assert "3 cases" in checked.output
    assert "1.000" in checked.output
    uid = next(uid for uid in Library.open("library").uids() if uid.startswith("b.nrrd"))
    removed = medxai("cases", "remove", "library", uid, "nobody")
    assert (removed.exit_code, "1 of 2 removed; 2 cases are left" in removed.output) == (1, True)
    added = medxai("cases", "add", "library", "table.csv", "--keep-identifiers", "--trust")
    assert "has 3 cases" in added.output, added.output
    Path("b.nrrd").unlink()
    checked = medxai("cases", "check", "library")
    assert checked.exit_code == 1
    assert "There is no file or folder" in checked.output


def test_a_space_that_only_a_library_knows_is_said(here: Path):
    model = whole_network()
    torch.jit.script(model.network).save("network.ts")
    Library.create("library", Embedder("f", "network.ts", "Kind", {"odd": (4, "cosine")}))
    found = medxai("cases", "search", "library", "b.nrrd", "--space", "odd")
    assert (found.exit_code, "There is no space 'odd'" in found.output) == (1, True), found.output


def test_code_that_a_library_names_is_not_run_without_trust(here: Path, monkeypatch: pytest.MonkeyPatch):
    Path("from_a_stranger.py").write_text("open('ran', 'w').close()\n", encoding="utf-8")
    Library.create("library", Embedder("f", "from_a_stranger:network", "Kind", {"plain": (4, "cosine")}))
    # As `medxai` is run: from where the person stands.
    monkeypatch.syspath_prepend(str(here))
    for words in (["add", "library", "table.csv"], ["search", "library", "b.nrrd"]):
        refused = medxai("cases", *words)
        assert (refused.exit_code, "--trust" in refused.output) == (1, True), refused.output
        assert not Path("ran").exists()
    medxai("cases", "search", "library", "b.nrrd", "--trust")
    assert Path("ran").exists()


def test_a_thumbnail_shows_the_patient_as_radiologists_do():
    """A point to the patient's left, behind the middle, is to the right and below in the picture."""
    values = torch.zeros(1, 20, 16, 12)
    image = sitk.GetImageFromArray(values[0].numpy())
    image.SetSpacing(SPACING)
    image.SetDirection(DIRECTION)
    volume = Volume.from_sitk(image)
    middle = volume.to_point((9.5, 7.5, 5.5))
    index = volume.to_index(middle + np.array([-4.0, -3.0, 0.0])).round().astype(int)
    volume.data[(0, 9, *index[1:])] = 2
    volume.data[(0, 10, *index[1:])] = 2
    picture = np.asarray(Image.open(io.BytesIO(thumbnail(Prepared(volume.data, volume.affine)))))
    assert picture.shape == (96, 96)
    assert picture.max() > 200
    y, x = (picture.astype(float) / picture.sum() * np.indices((96, 96))).sum((1, 2))
    point = volume.to_point(index)
    size = max(20 * 2.0, 16 * 1.0, 12 * 1.5)
    assert x == pytest.approx(47.5 - (point[0] - middle[0]) / size * 96, abs=1)
    assert y == pytest.approx(47.5 - (point[1] - middle[1]) / size * 96, abs=1)


def test_the_persons_folder_is_where_it_is_told_to_be(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("MEDXAI_HOME", str(tmp_path / "own"))
    assert resources.user_folder() == tmp_path / "own"
    monkeypatch.delenv("MEDXAI_HOME")
    assert "medxai" in str(resources.user_folder()).lower()


def test_the_demo_library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("MEDXAI_HOME", str(tmp_path))
    model = mx.load_model(resources.path("Models/lung_nodule"))
    with pytest.raises(Cancelled):
        demo_library(model, Run(cancel=lambda: True), rounds=1)
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]
    library = demo_library(model, Run(), rounds=1)
    assert Path(library.path).is_relative_to(tmp_path)
    computed = library.records({"made": "computed, clear"})
    chest = load_volume(resources.path("SampleData/chest_ct_mass.nrrd"))
    assert len(computed) == 23
    assert len({case.patient for case in computed}) == 23
    for case in computed:
        if case.label != "none":
            logit = rule_logit(torch.tensor([[case.meta[name] for name in ATTRIBUTES]]))
            assert case.label == ("malignant" if logit > 0 else "benign")
        # A piece of the patient's own chest, 50 mm wide, and in its middle the place.
        volume = library.volume(case)
        np.testing.assert_allclose(volume.spacing, 1.25)
        np.testing.assert_allclose(volume.to_point(np.full(3, 19.5)), case.region, atol=1e-3)
        assert all(0 < i < n for i, n in zip(chest.to_index(case.region), chest.shape, strict=True))
    # The stored scan, asked where the record says, is what was embedded.
    for case in (computed[0], *library.records({"made": "real"})):
        output = model.predict(library.volume(case), case.region)
        assert case.said == max(output.scores, key=output.scores.__getitem__)
        again = SPACES["plain"].embed(model, model.prepare(library.volume(case), case.region).x[None])
        np.testing.assert_allclose(case.vectors["plain"], again[0], atol=1e-4)
    assert [case.uid for case in library.records({"made": "real"})] == ["real mass", "real nodule"]
    assert library.check(Run(), read=True).wrong == {}
    # It is not made again, and of two processes that make it at once one wins.
    monkeypatch.setattr(demo, "_computed", lambda folder, run, rounds: iter(()))
    assert demo_library(model, Run()).version == library.version
    demo._make(model, Run(), Path(library.path), 1)
    assert len(demo_library(model, Run())) == 25
    assert [path.name for path in Path(library.path).parent.iterdir()] == [Path(library.path).name]
    (tmp_path / "full" / "of things").mkdir(parents=True)
    with pytest.raises(MedXAIError, match=r"cannot be written to .*full"):
        demo._make(model, Run(), tmp_path / "full", 1)
