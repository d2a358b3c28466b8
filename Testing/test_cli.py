"""The command line: the good path, and every bad input as one line and an exit code."""

from __future__ import annotations

import errno
import json
import os
import pickle
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk
import torch
from PIL import Image
from torch import nn
from typer.testing import CliRunner, Result

import MedXAILib as mx
from MedXAILib import cli
from MedXAILib.report import case
from MedXAILib.window import Window

SPACING, ORIGIN = (1.5, 1.0, 2.0), (-12.0, 30.0, 7.0)


def network() -> mx.Model:
    """A classifier whose first channel answers to brightness; `test_cli:network` on the command line."""
    torch.manual_seed(0)
    layers = nn.Conv3d(1, 4, 3, padding=1), nn.ReLU(), nn.AdaptiveAvgPool3d(1), nn.Flatten(), nn.Linear(4, 2)
    return mx.Model(nn.Sequential(*layers), class_names=("healthy", "[red]tumour"), layers=("1",))


def patch_network() -> mx.Model:
    """The same, looking at patches."""
    model = network()
    model.patch_size = (8, 8, 8)
    return model


def segmenter() -> mx.Model:
    """Labels what is bright."""
    model = mx.Model(nn.Conv3d(1, 2, 1), task="segmentation", class_names=("background", "lesion"))
    with torch.no_grad():
        model.network.weight[:] = torch.tensor([-1.0, 1.0]).reshape(2, 1, 1, 1, 1)
        model.network.bias.zero_()
    return model


def window_segmenter() -> mx.Model:
    """The same, made for patches, and for whole scans through a window."""
    model = segmenter()
    model.patch_size, model.window = (8, 8, 8), Window((8, 8, 8), overlap=0.5)
    return model


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder to work in, with a scan and the segmentation of a bright block in it."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")
    values = np.random.default_rng(0).normal(size=(12, 16, 20)).astype(np.float32)
    values[4:8, 6:10, 8:12] += 6
    block = np.zeros_like(values, dtype=np.uint8)
    block[4:8, 6:10, 8:12] = 1
    for name, array in (("scan.nrrd", values), ("block.nrrd", block)):
        image = sitk.GetImageFromArray(array)
        image.SetSpacing(SPACING)
        image.SetOrigin(ORIGIN)
        image.SetDirection((0, 1, 0, -1, 0, 0, 0, 0, 1))
        sitk.WriteImage(image, name)
    return tmp_path


def medxai(*words: object) -> Result:
    return CliRunner().invoke(cli.app, [str(word) for word in words])


def refused(result: Result, said: str, code: int = 1) -> None:
    """The command failed with one line that says `said`."""
    lines = result.stderr.strip().splitlines()
    assert result.exit_code == code, result.output
    assert len(lines) == 1 and re.search(said, lines[0]), lines
    assert "Traceback" not in result.output


def only_what_was_there(folder: Path) -> bool:
    return {p.name for p in folder.iterdir()} == {"scan.nrrd", "block.nrrd"}


def test_explain_writes_everything_on_the_grid_of_the_scan(here):
    done = medxai("explain", "test_cli:network", "scan.nrrd", "-t", "[red]tumour", "-s", "block.nrrd", "--out", "out")
    assert done.exit_code == 0, done.output
    assert {p.name for p in (here / "out").iterdir()} == {"explanation.json", "map.nrrd", "montage.png", "index.html"}
    assert "[red]tumour" in done.stdout and "(RAS mm)" in done.stdout and "peak of the map" in done.stdout
    written, scan = sitk.ReadImage("out/map.nrrd"), sitk.ReadImage("scan.nrrd")
    assert written.GetSize() == scan.GetSize()
    for place in ("GetSpacing", "GetOrigin", "GetDirection"):
        assert np.allclose(getattr(written, place)(), getattr(scan, place)())
    loaded = mx.load_explanation(here / "out")
    computed = mx.explain(network(), mx.load_volume("scan.nrrd"), "gradcam", "[red]tumour")
    assert torch.equal(loaded.data, computed.data)
    assert torch.equal(torch.from_numpy(sitk.GetArrayFromImage(written)), computed.data[0])
    assert Image.open("out/montage.png").size[0] > 1000
    assert "&quot;" in (here / "out" / "index.html").read_text(encoding="utf-8") or "tumour" in done.stdout


def test_explain_writes_nifti(here):
    assert medxai("explain", "test_cli:network", "scan.nrrd", "--format", "nii.gz", "-o", "out").exit_code == 0
    scan, written = sitk.ReadImage("scan.nrrd"), sitk.ReadImage("out/map.nii.gz")
    assert np.allclose(written.GetOrigin(), scan.GetOrigin(), atol=1e-4)
    assert np.allclose(written.GetDirection(), scan.GetDirection(), atol=1e-5)
    computed = mx.explain(network(), mx.load_volume("scan.nrrd"))
    loaded = mx.load_explanation("out")
    assert torch.equal(loaded.data, computed.data)
    assert np.allclose(loaded.affine, computed.affine)
    assert not (here / "out" / "map.nrrd").exists()


class Writer(nn.Module):
    """It writes one word, whatever it sees."""

    vocabulary = ("lump",)

    def __init__(self) -> None:
        super().__init__()
        self.seen = nn.Conv3d(1, 2, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.seen(x)

    def log_probabilities(self, features: torch.Tensor, words: torch.Tensor) -> torch.Tensor:
        return features.mean((2, 3, 4)).log_softmax(1)[:, None].expand(-1, words.shape[1] + 1, -1)

    def beam(self, features: torch.Tensor, width: int = 3) -> torch.Tensor:
        return torch.ones(len(features), 1, dtype=torch.long)


def writer() -> mx.Model:
    return mx.Model(Writer(), "captioning")


def test_the_map_of_a_word_comes_with_the_caption(here):
    result = medxai("explain", "test_cli:writer", "scan.nrrd", "-m", "gradient", "-t", "lump", "-o", "out")
    assert result.exit_code == 0 and "“lump” peaks at" in result.stdout
    assert result.stdout.startswith("Lump\n")


def test_parameters_reach_the_method(here):
    words = "--set", "samples=2", "--set", "noise=0.2", "--set", "per_channel=true", "--seed", "5", "-o", "out"
    assert medxai("explain", "test_cli:network", "scan.nrrd", "-m", "gradient", *words).exit_code == 0
    made = mx.load_explanation("out").provenance
    assert (made.parameters["samples"], made.parameters["noise"], made.parameters["per_channel"]) == (2, 0.2, True)
    assert made.seed == 5
    for layers in ("layers=0,1", "layers=0, 1,"):
        assert medxai("explain", "test_cli:network", "scan.nrrd", "--set", layers, "-o", "out").exit_code == 0
    assert mx.load_explanation("out").provenance.parameters["layers"] == ["0", "1"]


def test_patch_network_looks_at_the_segmentation(here):
    done = medxai("explain", "test_cli:patch_network", "scan.nrrd", "-s", "block.nrrd", "-o", "out")
    assert done.exit_code == 0, done.output
    block = mx.load_volume("block.nrrd")
    middle = torch.nonzero(block.data[0]).double().mean(0).tolist()
    assert np.allclose(mx.load_explanation("out").provenance.region, block.to_point(middle))


def test_box_numbers_versus_and_memory(here):
    words = "-t", "1", "--versus", "healthy", "--memory", "1.5GB", "--device", "cpu", "-o", "out"
    done = medxai("explain", "test_cli:network", "scan.nrrd", "--region", "-4,-31,10,12,-5,28", *words)
    assert done.exit_code == 0, done.output
    made = mx.load_explanation("out").provenance
    assert made.region == [[-4, -31, 10], [12, -5, 28]]
    assert made.target_label == "[red]tumour rather than healthy"


def test_segmentation_networks_are_explained(here):
    done = medxai("explain", "test_cli:segmenter", "scan.nrrd", "-m", "gradient", "-t", "lesion", "-o", "out")
    assert done.exit_code == 0, done.output
    labels = network_says(segmenter())
    assert re.search(rf"lesion\s+{labels:.2f}", done.stdout)


def test_whole_scans_are_explained_through_a_window(here):
    words = "-m", "occlusion", "-t", "lesion", "-s", "block.nrrd", "-o", "out"
    done = medxai("explain", "test_cli:window_segmenter", "scan.nrrd", *words)
    assert done.exit_code == 0, done.output
    assert re.search(rf"lesion\s+{network_says(segmenter()):.2f}", done.stdout)
    assert mx.load_explanation("out").provenance.region is None
    told = medxai("models", "test_cli:window_segmenter")
    assert re.search(r"whole scans\s+by windows of 8 x 8 x 8 voxels, blended \(constant, overlap 0.5\)", told.stdout)


def network_says(model: mx.Model) -> float:
    """The lesion in mL."""
    labels = model.predict(mx.load_volume("scan.nrrd")).labels
    return float(labels.data.sum()) * np.prod(SPACING) / 1000


def test_several_files_are_channels(here):
    refused(medxai("explain", "test_cli:network", "scan.nrrd", "scan.nrrd"), "Error: Sequential takes 1 channel.*has 2")
    assert only_what_was_there(here)


BAD = {
    "missing scan": (["test_cli:network", "no.nrrd"], r"There is no file or folder 'no\.nrrd'"),
    "corrupt scan": (["test_cli:network", "corrupt.nii.gz"], "cannot be read as an image"),
    "nan": (["test_cli:network", "nan.nrrd"], "NaN"),
    "constant": (["test_cli:network", "constant.nrrd"], "constant"),
    "missing model": (["no/bundle", "scan.nrrd"], "There is no model 'no/bundle'"),
    "unknown shipped model": (["lung_nodul", "scan.nrrd"], "lung_nodule"),
    "no function": (["test_cli:netwrok", "scan.nrrd"], "did you mean network"),
    "pickle": (["model.pt", "scan.nrrd"], "pickled checkpoint"),
    "method": (["test_cli:network", "scan.nrrd", "-m", "gradcamm"], "no method 'gradcamm': did you mean gradcam"),
    "class": (["test_cli:network", "scan.nrrd", "-t", "healty"], "no class 'healty': did you mean healthy"),
    "class number": (["test_cli:network", "scan.nrrd", "-t", "7"], "There is no class 7"),
    "layer": (["test_cli:network", "scan.nrrd", "--set", "layers=11"], "There is no layer '11': did you mean 1"),
    "flat layer": (["test_cli:network", "scan.nrrd", "--set", "layers=3"], "no spatial layout"),
    "parameter": (["test_cli:network", "scan.nrrd", "--set", "layer=1"], "no parameter of gradcam 'layer'.*layers"),
    "value": (["test_cli:network", "scan.nrrd", "-m", "gradient", "--set", "samples=many"], "samples = 'many'"),
    "region outside": (["test_cli:patch_network", "scan.nrrd", "-r", "900,0,0"], "lies outside the scan"),
    "no region": (["test_cli:patch_network", "scan.nrrd"], "say where with --region X,Y,Z"),
    "device": (["test_cli:network", "scan.nrrd", "--device", "coda"], "no device 'coda' on this machine: use 'cpu'"),
    "empty segmentation": (["test_cli:network", "scan.nrrd", "-s", "empty.nrrd"], "is empty"),
    "segmentation elsewhere": (["test_cli:network", "scan.nrrd", "-s", "elsewhere.nrrd"], "has no voxel in the scan"),
    "place": (["test_cli:network", "scan.nrrd", "-o", "taken"], "is not a former result"),
}


@pytest.mark.parametrize(("words", "said"), BAD.values(), ids=BAD)
def test_bad_input_is_one_line_and_leaves_nothing_behind(here, words, said):
    image = sitk.ReadImage("scan.nrrd")
    (here / "corrupt.nii.gz").write_bytes(b"not an image")
    (here / "model.pt").write_bytes(pickle.dumps({"weights": 1}))
    sitk.WriteImage(image * float("nan"), "nan.nrrd")
    sitk.WriteImage(image * 0 + 3, "constant.nrrd")
    sitk.WriteImage(sitk.Cast(image * 0, sitk.sitkUInt8), "empty.nrrd")
    block = sitk.ReadImage("block.nrrd")
    block.SetOrigin((5000, 0, 0))
    sitk.WriteImage(block, "elsewhere.nrrd")
    (here / "taken").mkdir()
    (here / "taken" / "thesis.txt").touch()
    before = sorted(here.rglob("*"))
    refused(medxai("explain", *words), f"^Error: .*{said}")
    assert sorted(here.rglob("*")) == before


@pytest.mark.parametrize(
    "words",
    [["explain"], ["explain", "a", "b", "--region", "1,2,3,4"], ["explain", "a", "b", "--region", "x"],
     ["explain", "a", "b", "--set", "samples"], ["explain", "a", "b", "--memory", "lots"],
     ["explain", "a", "b", "--format", "png"], ["explain", "a", "b", "--seed", "x"], ["paint"]],
)  # fmt: skip
def test_wrong_use_is_code_2(here, words):
    result = medxai(*words)
    assert result.exit_code == 2 and "Traceback" not in result.output


def test_untrusted_bundle_shows_what_it_would_run(here):
    configs = here / "bundle" / "configs"
    configs.mkdir(parents=True)
    (here / "bundle" / "models").mkdir()
    torch.save(network().network.state_dict(), here / "bundle" / "models" / "model.pt")
    (configs / "metadata.json").write_text(json.dumps({"name": "sly"}))
    (configs / "inference.json").write_text(json.dumps({"network_def": "$__import__('os').system('true')\x1b[2K"}))
    result = medxai("explain", "bundle", "scan.nrrd")
    assert result.exit_code == 1
    first, *code = result.stderr.strip().splitlines()
    assert first.startswith("Error: ") and "add --trust" in first
    assert code[:-1] == [r"$__import__('os').system('true')\x1b[2K"]  # nothing can make itself unseen
    assert not (here / "medxai-explanation").exists()


def test_full_disk_leaves_nothing_behind(here, monkeypatch):
    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(Image.Image, "save", full)
    refused(medxai("explain", "test_cli:network", "scan.nrrd"), "the disk is full")
    assert only_what_was_there(here)


def test_interrupt_leaves_the_former_result(here, monkeypatch):
    assert medxai("explain", "test_cli:network", "scan.nrrd", "-o", "out").exit_code == 0
    before = {p.name: p.read_bytes() for p in (here / "out").iterdir()}

    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(case, "page", interrupted)
    refused(medxai("explain", "test_cli:network", "scan.nrrd", "-o", "out"), "^Cancelled", code=130)
    assert {p.name: p.read_bytes() for p in (here / "out").iterdir()} == before
    assert {p.name for p in here.iterdir()} == {"scan.nrrd", "block.nrrd", "out"}


def test_defect_is_a_line_unless_asked_for_more(here, monkeypatch):
    monkeypatch.setattr(case, "page", lambda *_: {}["nothing"])
    refused(medxai("explain", "test_cli:network", "scan.nrrd"), "KeyError.*--debug")
    assert only_what_was_there(here)
    assert isinstance(medxai("--debug", "explain", "test_cli:network", "scan.nrrd").exception, KeyError)


def test_methods_and_their_parameters(here):
    listed = medxai("methods")
    assert listed.exit_code == 0 and all(name in listed.stdout for name in mx.methods())
    one = medxai("methods", "integrated_gradients")
    assert "Sundararajan 2017" in one.stdout and "max_steps" in one.stdout and "1 to 10000" in one.stdout
    refused(medxai("methods", "gradcamm"), "did you mean gradcam")


def test_every_method_is_described(here):
    for name, kind in mx.methods().items():
        described = medxai("methods", name)
        assert described.exit_code == 0 and all(field in described.stdout for field in kind.model_fields)


def test_models_says_what_a_network_is(here):
    said = medxai("models", "test_cli:patch_network", "--layers")
    assert said.exit_code == 0, said.output
    assert "healthy, [red]tumour" in said.stdout and "8 x 8 x 8" in said.stdout
    assert re.search(r"1\s+ReLU\s+4 x 8 x 8 x 8", said.stdout)


def test_training_of_an_unknown_network(here):
    refused(medxai("train", "lung-nodul"), "did you mean lung-nodule")


def test_training_says_what_was_measured(here, monkeypatch):
    from MedXAILib import training

    def train(name: str, out: Path, run: mx.Run, quick: bool, data: None) -> dict[str, float]:
        run.step(1, 2, "epoch 1")
        return {"accuracy": 0.95, "seconds": run.seed, "quick": quick, name: len(out.name)}

    monkeypatch.setattr(training, "train", train)
    done = medxai("train", "lung-nodule", "--seed", "3", "--quick")
    assert done.exit_code == 0 and re.search(r"accuracy\s+0.95", done.stdout) and re.search(r"seconds\s+3", done.stdout)
    assert re.search(rf"lung-nodule\s+{len('lung_nodule')}", done.stdout)


def test_shipped_models_are_listed(here):
    listed = medxai("models")
    assert listed.exit_code == 0 and "lung_nodule_segmentation" in listed.stdout


def test_version():
    assert medxai("--version").stdout.split() == ["medxai", mx.__version__]


def test_the_command_line_itself_imports_nothing_slow():
    """So that help and wrong use are answered at once (apart from what the package imports)."""
    code = (
        "import sys, types; package = types.ModuleType('MedXAILib'); package.__version__ = ''; "
        "package.__path__ = ['MedXAILib']; sys.modules['MedXAILib'] = package; import MedXAILib.cli; "
        "sys.exit(any(name in sys.modules for name in ('torch', 'monai', 'SimpleITK', 'PIL')))"
    )
    root = Path(cli.__file__).resolve().parent.parent
    assert subprocess.run([sys.executable, "-c", code], cwd=root).returncode == 0


@pytest.mark.slow
def test_demo_convinces(here):
    done = medxai("demo", "--out", "demo")
    assert done.exit_code == 0, done.output
    assert "says malignant" in done.stdout and "Hit: the peak of the map lies in the nodule" in done.stdout
    assert {"gradcam", "integrated_gradients", "index.html", "montage.png"} <= {p.name for p in Path("demo").iterdir()}
