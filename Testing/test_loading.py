"""Models load from bundles, code and TorchScript; nothing that could run unseen code does so without trust."""

from __future__ import annotations

import importlib
import json
import os
import pickle
import shutil
import sys
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import make_model
from safetensors.torch import save_file
from torch import Tensor, nn

import MedXAILib as mx

NETWORK = {
    "_target_": "ResNet",
    "block": "basic",
    "layers": [1, 1, 1, 1],
    "block_inplanes": [4, 8, 8, 16],
    "n_input_channels": "@channels",
    "num_classes": 3,
    "conv1_t_size": 3,
    "no_max_pool": True,
}
METADATA = {
    "name": "Nodule grader",
    "task": "Lung nodule classification",
    "network_data_format": {
        "inputs": {"image": {"num_channels": 1, "spatial_shape": [24, 24, 16]}},
        "outputs": {
            "pred": {"format": "classification", "channel_def": {"0": "none", "1": "benign", "2": "malignant"}}
        },
    },
}


def make_bundle(folder: Path, weights: str = "model.safetensors", **changes: Any) -> Path:
    config: dict[str, Any] = {
        "bundle_root": ".",
        "channels": 1,
        "device": "$torch.device('cuda:0' if torch.cuda.is_available() else 'cpu')",
        "network_def": NETWORK,
        "preprocessing": {
            "_target_": "Compose",
            "transforms": [
                {"_target_": "LoadImaged", "keys": "image"},
                {"_target_": "EnsureChannelFirstd", "keys": "image"},
                {"_target_": "Orientationd", "keys": "image", "axcodes": "RAS", "labels": None},
                {"_target_": "ScaleIntensityd", "keys": "image"},
            ],
        },
        **changes,
    }
    (folder / "configs").mkdir(parents=True)
    (folder / "models").mkdir()
    (folder / "configs" / "metadata.json").write_text(json.dumps(METADATA), encoding="utf-8")
    (folder / "configs" / "inference.json").write_text(json.dumps(config), encoding="utf-8")
    state = make_model("resnet18").network.state_dict()
    if weights.endswith("safetensors"):
        save_file(state, str(folder / "models" / weights))
    else:
        torch.save(state, folder / "models" / weights)
    return folder


@pytest.mark.parametrize("weights", ["model.safetensors", "model.pt"])
@pytest.mark.parametrize("zipped", [False, True])
def test_bundle(tmp_path: Path, oblique: mx.Volume, weights: str, zipped: bool) -> None:
    path = make_bundle(tmp_path / "grader", weights)
    if zipped:
        path = Path(shutil.make_archive(str(tmp_path / "packed"), "zip", tmp_path, "grader"))
    model = mx.load_model(path)
    assert (model.name, model.task, model.channels) == ("Nodule grader", "classification", 1)
    assert tuple(model.class_names) == ("none", "benign", "malignant") and model.patch_size == (24, 24, 16)
    assert model.fingerprint == make_model("resnet18").fingerprint
    centre = tuple(oblique.to_point((9, 16, 13)))
    made = mx.explain(model, oblique, "hirescam", region=centre)
    assert made.data.shape == oblique.data.shape and made.provenance.model["source"] == str(path)


HOSTILE = {
    "expression in the network": {"network_def": {**NETWORK, "num_classes": "$__import__('os').getpid()"}},
    "referred expression": {"channels": "$print('hello') or 1"},
    "any callable": {"network_def": {"_target_": "os.system", "command": "echo hello"}},
    "callable of a safe module": {"network_def": {"_target_": "monai.networks.utils.torch.hub.load", "repo": "x"}},
    "method of a safe class": {"network_def": {"_target_": "monai.networks.nets.UNet.load_state_dict"}},
    "in the preprocessing": {
        "preprocessing": {
            "_target_": "Compose",
            "transforms": [{"_target_": "Lambdad", "keys": "image", "func": "$lambda x: x"}],
        }
    },
    "by a short name": {"network_def": {"_target_": "download_and_extract", "url": "x"}},
    "included file": {"network_def": "%secret.json"},
    "included file that nothing needs": {"unused": "%secret.json"},
    "relative reference": {"network_def": {**NETWORK, "num_classes": "@##count"}, "count": "$print('hello') or 3"},
    "reference to all": {"first": "$print('hello')", "network_def": {**NETWORK, "num_classes": "@"}},
    "two of one path": {
        "network_def": {**NETWORK, "num_classes": "@own::count"},
        "own::count": "$print('hello') or 3",
        "own": {"count": 3},
    },
    "a path by another sign": {"network_def#num_classes": "$print('hello') or 3"},
    "a path that is empty": {
        "": {"count": "$print('hello') or 3"},
        "count": 3,
        "network_def": {**NETWORK, "num_classes": "@count"},
    },
    "a transform that writes, by the name of where it is imported": {
        "preprocessing": {
            "_target_": "Compose",
            "transforms": [
                {"_target_": "Compose", "transforms": [{"_target_": "monai.transforms.SaveImaged", "keys": "image"}]}
            ],
        }
    },
    "weights from anywhere": {"network_def": {"_target_": "HoVerNet", "pretrained_url": "http://localhost:9/weights"}},
    "a checkpoint from anywhere": {"network_def": {"_target_": "CellSamWrapper", "checkpoint": "../other.pt"}},
    "a debugger": {"network_def": {**NETWORK, "_mode_": "debug"}},
    "another debugger": {"network_def": {**NETWORK, "_debug_": True}},
}


@pytest.mark.parametrize("how", HOSTILE)
def test_bundles_that_run_code_need_trust_and_show_it(tmp_path: Path, how: str) -> None:
    with pytest.raises(mx.Untrusted, match=r"would run code of its own.*trust=True") as caught:
        mx.load_model(make_bundle(tmp_path / "b", **HOSTILE[how]))
    assert caught.value.code


@pytest.mark.parametrize("how", ["relative reference", "two of one path", "a path that is empty"])
def test_what_needs_trust_would_have_run(how: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """MONAI finds these expressions where one who looks at the configuration finds none; a person is shown them."""
    with pytest.raises(mx.Untrusted) as caught:
        mx.load_model(make_bundle(tmp_path / "a", **HOSTILE[how]))
    assert "print('hello')" in caught.value.code
    assert mx.load_model(make_bundle(tmp_path / "b", **HOSTILE[how]), trust=True)
    assert "hello" in capsys.readouterr().out


def test_other_trainings_are_looked_for_beside_the_bundle_alone(tmp_path: Path) -> None:
    """A path elsewhere could open anything, such as another computer of the network."""
    own, beside, elsewhere = (make_bundle(tmp_path / name) for name in ("home/own", "home/others/one", "elsewhere"))
    says: dict[str, Any] = {
        "retrained": ["../others/one", str(elsewhere), "../../elsewhere", ".", "../none", "//host/share/one"],
        "permuted": "../others/one",
    }
    (own / "configs" / "metadata.json").write_text(json.dumps({**METADATA, "medxai": says}), encoding="utf-8")
    # A zipped bundle names those beside the archive: what it was unpacked to is gone.
    zipped = Path(shutil.make_archive(str(own.parent / "packed"), "zip", own))
    for path in (own, zipped):
        model = mx.load_model(path)
        assert (list(model.retrained), model.permuted) == ([beside.resolve()], beside.resolve())
    says = {"retrained": "../others/one", "permuted": None}
    (own / "configs" / "metadata.json").write_text(json.dumps({**METADATA, "medxai": says}), encoding="utf-8")
    model = mx.load_model(own)
    assert (list(model.retrained), model.permuted) == ([beside.resolve()], None)


def test_what_a_person_trusts_is_the_whole_bundle(tmp_path: Path) -> None:
    changes: dict[str, Any] = {"network_def": {**NETWORK, "_target_": "scripts.grader.Grader"}}
    path = make_bundle(tmp_path / "b", **changes)
    (path / "scripts").mkdir()
    (path / "scripts" / "grader.py").write_text("from scripts import layers\n", encoding="utf-8")
    (path / "scripts" / "layers.py").write_text("print('ran')\n", encoding="utf-8")

    def code(path: Path) -> str:
        with pytest.raises(mx.Untrusted) as caught:
            mx.load_model(path)
        return caught.value.code

    first = code(path)
    assert "_target_: scripts.grader.Grader" in first
    assert "# scripts/grader.py\nfrom scripts import layers\n" in first and "print('ran')" in first
    zipped = shutil.make_archive(str(tmp_path / "packed"), "zip", tmp_path, "b")
    moved = shutil.copytree(path, tmp_path / "elsewhere")
    (moved / "scripts" / "__pycache__").mkdir()
    (moved / "scripts" / "__pycache__" / "layers.pyc").write_bytes(b"x")
    (moved / ".DS_Store").write_bytes(b"x")
    assert code(Path(zipped)) == code(moved) == first
    # A Python file, what an expression may read, and the weights.
    for name in ("scripts/layers.py", "configs/metadata.json", "configs/more.txt", "models/model.safetensors"):
        changed = shutil.copytree(path, tmp_path / name.replace("/", "-"))
        with (changed / name).open("ab") as file:
            file.write(b" ")
        assert code(changed) != first


def test_each_trusted_bundle_has_its_own_scripts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every bundle calls them `scripts`, and so may the person."""
    (tmp_path / "scripts").mkdir()
    (tmp_path / "scripts" / "__init__.py").write_text("mine = True", encoding="utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    mine = importlib.import_module("scripts")
    for number in (1, 2):
        path = make_bundle(tmp_path / f"b{number}", network_def={**NETWORK, "_target_": "scripts.grader.Grader"})
        (path / "scripts").mkdir()
        (path / "scripts" / "__init__.py").touch()
        (path / "scripts" / "number.py").write_text(f"NUMBER = {number}", encoding="utf-8")
        (path / "scripts" / "grader.py").write_text(
            "from monai.networks.nets import ResNet\n"
            "from scripts.number import NUMBER\n"
            "class Grader(ResNet):\n"
            "    number = NUMBER\n",
            encoding="utf-8",
        )
        archive = Path(shutil.make_archive(str(tmp_path / f"packed{number}"), "zip", tmp_path, f"b{number}"))
        for source in (path, archive):
            assert mx.load_model(source, trust=True).network.number == number
    assert importlib.import_module("scripts") is mine
    assert not [name for name in sys.modules if name.startswith("scripts.")]


def test_trusted_code_runs(tmp_path: Path) -> None:
    path = make_bundle(tmp_path / "b", network_def={**NETWORK, "num_classes": "$1 + 2"})
    assert mx.load_model(path, trust=True).task == "classification"


def test_damaged_bundles(tmp_path: Path) -> None:
    cut = make_bundle(tmp_path / "cut")
    weights = cut / "models" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(mx.MedXAIError, match=r"'model.safetensors' .* is damaged"):
        mx.load_model(cut)
    weights.unlink()
    with pytest.raises(mx.MedXAIError, match="holds no weights"):
        mx.load_model(cut)
    other = make_bundle(tmp_path / "other", network_def={**NETWORK, "num_classes": 5})
    with pytest.raises(mx.MedXAIError, match="does not fit the network"):
        mx.load_model(other)
    bad = make_bundle(tmp_path / "bad")
    (bad / "configs" / "inference.json").unlink()
    with pytest.raises(mx.MedXAIError, match=r"no configs/inference\.json"):
        mx.load_model(bad)
    (bad / "configs" / "metadata.json").write_text("{", encoding="utf-8")
    with pytest.raises(mx.MedXAIError, match=r"'metadata\.json' of the bundle cannot be read"):
        mx.load_model(bad)
    (tmp_path / "empty").mkdir()
    with pytest.raises(mx.MedXAIError, match="is no MONAI bundle"):
        mx.load_model(tmp_path / "empty")


class Payload:
    """Touches a file when unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("trust", [False, True])
def test_pickles_are_never_opened(tmp_path: Path, trust: bool) -> None:
    mark = tmp_path / "unpickled"
    torch.save({"model": Payload(mark)}, tmp_path / "model.pth")
    (tmp_path / "model.pkl").write_bytes(pickle.dumps(Payload(mark)))
    for name in ("model.pth", "model.pkl"):
        with pytest.raises(mx.MedXAIError, match=f"'{name}' is a pickled checkpoint.*safetensors"):
            mx.load_model(tmp_path / name, trust=trust)
    bundle = make_bundle(tmp_path / "b", "model.pt")
    torch.save({"model": Payload(mark)}, bundle / "models" / "model.pt")
    with pytest.raises(mx.MedXAIError, match="holds more than weights"):
        mx.load_model(bundle, trust=trust)
    assert not mark.exists()


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
def test_torchscript(tmp_path: Path) -> None:
    model, x = make_model("resnet18"), torch.randn(1, 24, 24, 16)
    torch.jit.trace(model.network.eval(), x[None]).save(str(tmp_path / "grader.ts"))
    loaded = mx.load_model(tmp_path / "grader.ts", class_names=("none", "benign", "malignant"))
    assert loaded.name == "grader" and loaded.scripted
    for method in ("gradient", "integrated_gradients", "smoothgrad"):
        known = {"max_steps": 5} if method == "integrated_gradients" else {}
        made, plain = (mx.explain(m, x, method, target="malignant", **known).data for m in (loaded, model))
        torch.testing.assert_close(made, plain, rtol=1e-3, atol=1e-5 * float(plain.abs().max()))
    for layers in ((), ("layer4",)):
        with pytest.raises(mx.MedXAIError, match="is TorchScript, whose layers cannot be reached"):
            mx.explain(loaded, x, "gradcam", layers=layers)


class Writing(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        torch.save(x, "/tmp/taken")
        return x


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
def test_torchscript_that_reaches_the_disk_needs_trust(tmp_path: Path) -> None:
    torch.jit.script(Writing()).save(str(tmp_path / "writing.ts"))
    with pytest.raises(mx.Untrusted, match="reads or writes files") as caught:
        mx.load_model(tmp_path / "writing.ts")
    assert "save" in caught.value.code
    # Not only the lines that are shown are what was trusted.
    other = Writing()
    other.eval()
    torch.jit.script(nn.Sequential(nn.ReLU(), other)).save(str(tmp_path / "other.ts"))
    with pytest.raises(mx.Untrusted) as again:
        mx.load_model(tmp_path / "other.ts")
    assert again.value.code != caught.value.code


def test_damaged_torchscript(tmp_path: Path) -> None:
    (tmp_path / "cut.ts").write_bytes(b"PK\x03\x04 half a file")
    with pytest.raises(mx.MedXAIError, match="damaged TorchScript"):
        mx.load_model(tmp_path / "cut.ts")
    with zipfile.ZipFile(tmp_path / "odd.ts", "w") as archive:
        archive.writestr("odd/code/x.py", "def forward(")
    with pytest.raises(mx.MedXAIError, match="damaged TorchScript"):
        mx.load_model(tmp_path / "odd.ts")


def network_for_test() -> nn.Module:
    return make_model("resnet18").network


def model_for_test() -> mx.Model:
    return make_model("resnet18")


def test_entry_points() -> None:
    assert mx.load_model("test_loading:network_for_test", class_names=("a", "b", "c")).class_names == ("a", "b", "c")
    model = mx.load_model("test_loading:model_for_test")
    assert model.class_names[2] == "malignant" and model.source == "test_loading:model_for_test"
    assert mx.load_model(model_for_test).source == "test_loading:model_for_test"
    for entry, said in (
        ("test_loading:network_for_tst", "did you mean network_for_test"),
        ("no_such_package:f", "cannot be imported"),
        ("os:getcwd", "it must return a network or a Model"),
        ("nothing here", "There is no model 'nothing here'"),
    ):
        with pytest.raises(mx.MedXAIError, match=said):
            mx.load_model(entry)
