"""The demo networks are as good as their cards say, and their training can be repeated, stopped and resumed."""

from __future__ import annotations

import json
import math
import threading
from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest
import torch
from monai.bundle import ConfigParser, verify_net_in_out
from torch import nn

from MedXAILib import resources
from MedXAILib.errors import Cancelled, MedXAIError
from MedXAILib.networks.lung_nodule import LungNoduleClassifier
from MedXAILib.run import Run
from MedXAILib.synthetic.lung_nodules import ATTRIBUTES, CLASSES, Backgrounds, Nodules, synthesise
from MedXAILib.training import RECIPES, lung_nodule, lung_nodule_segmentation, train, trainer
from MedXAILib.training.trainer import fit

BUNDLES = ["lung_nodule", "lung_nodule_segmentation"]
# Not the seeds of the tables in the model cards: these patches nobody has looked at.
CLEAR, BORDERLINE = 101, 102


seen, scan = cache(Backgrounds.training), cache(Backgrounds.test)


@pytest.fixture(autouse=True)
def scans_are_read_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Backgrounds, "training", seen)
    monkeypatch.setattr(Backgrounds, "test", scan)


@cache
def patches(seed: int) -> Nodules:
    return synthesise(scan(), 150, seed, borderline=seed == BORDERLINE)


@cache
def shipped(name: str) -> nn.Module:
    """Built as MONAI builds it, from the bundle's own definition and weights."""
    folder = resources.path(f"Models/{name}")
    config = json.loads((folder / "configs" / "inference.json").read_text("utf-8"))
    network = ConfigParser(config).get_parsed_content("network_def")
    network.load_state_dict(torch.load(folder / "models" / "model.pt", weights_only=True))
    return network.eval()


def test_the_classifier_is_accurate_on_the_other_patient() -> None:
    clear = lung_nodule.measure(shipped("lung_nodule"), patches(CLEAR))
    assert clear["accuracy"] >= 0.93
    assert lung_nodule.measure(shipped("lung_nodule"), patches(BORDERLINE))["accuracy"] >= 0.89


def test_it_looks_at_the_nodule_and_random_weights_do_not() -> None:
    trained = lung_nodule.measure(shipped("lung_nodule"), patches(CLEAR))
    assert trained["mass"] >= 0.75
    assert trained["pointing"] >= 0.95
    torch.manual_seed(0)
    masses = []
    for _ in range(3):
        network = lung_nodule.build().train()
        network(patches(CLEAR).images[:60])  # so that batch normalisation has seen lung
        _, maps = lung_nodule.hirescam(network.eval(), patches(CLEAR).images)
        lesion = patches(CLEAR).labels > 0
        positive, mask = maps[lesion].clamp_min(0), patches(CLEAR).masks[lesion]
        masses.append(float((positive * mask).sum() / positive.sum().clamp_min(1e-12)))
    assert max(masses) < 0.2


def test_the_real_nodule_is_called_malignant_wherever_the_patch_is_centred() -> None:
    found = lung_nodule.real(shipped("lung_nodule"), scan())
    assert found["centred"] > 0.9
    assert found["shifted_min"] > 0.9


def test_the_relevance_at_the_last_stage_adds_up_to_the_logit() -> None:
    network = shipped("lung_nodule")
    kept: list[torch.Tensor] = []
    handle = network.evidence.register_forward_hook(lambda module, inputs, output: kept.append(output))
    logits = network(patches(CLEAR).images[:6])
    handle.remove()
    (gradient,) = torch.autograd.grad(logits[:, 2].sum(), kept[0])
    relevance = (gradient * kept[0]).flatten(1).sum(1)
    assert torch.allclose(relevance, logits[:, 2] - network.class_head.bias[2], atol=1e-4)


def test_attributes_can_be_read_at_the_attribute_head() -> None:
    read: list[torch.Tensor] = []
    handle = shipped("lung_nodule").attribute_head.register_forward_hook(lambda module, inputs, out: read.append(out))
    with torch.no_grad():
        assert shipped("lung_nodule")(patches(CLEAR).images).shape == (150, len(CLASSES))
    handle.remove()
    lesion = patches(CLEAR).labels > 0
    told, true = read[0][lesion].T, patches(CLEAR).attributes[lesion].T
    correlation = {
        name: float(torch.corrcoef(torch.stack([told[i], true[i]]))[0, 1]) for i, name in enumerate(ATTRIBUTES)
    }
    assert correlation["diameter_mm"] > 0.9
    assert correlation["calcification"] > 0.8
    assert correlation["spiculation"] > 0.7
    assert float((told[0] - true[0]).abs().mean()) < 2.5  # mm, not arbitrary units


@pytest.mark.parametrize("size", [(24, 24, 24), (40, 40, 40), (33, 47, 52)])
def test_the_classifier_takes_patches_of_other_sizes(size: tuple[int, ...]) -> None:
    with torch.no_grad():
        assert LungNoduleClassifier().eval()(torch.rand(2, 1, *size)).shape == (2, 3)


def test_the_segmentation_finds_nodules_in_the_other_patient() -> None:
    found = lung_nodule_segmentation.measure(shipped("lung_nodule_segmentation"), patches(CLEAR))
    assert found["dice"] > 0.7
    assert found["detected"] > 0.9
    assert lung_nodule_segmentation.real(shipped("lung_nodule_segmentation"), scan())["dice"] > 0.5


@pytest.mark.parametrize("name", BUNDLES)
def test_the_bundles_are_what_monai_expects(name: str) -> None:
    folder = resources.path(f"Models/{name}")
    verify_net_in_out(
        "network_def",
        meta_file=str(folder / "configs" / "metadata.json"),
        config_file=str(folder / "configs" / "inference.json"),
        device="cpu",
    )
    meta = json.loads((folder / "configs" / "metadata.json").read_text("utf-8"))
    versions = "version changelog monai_version pytorch_version numpy_version required_packages_version"
    assert set(f"{versions} task description authors copyright network_data_format".split()) <= set(meta)
    assert meta["network_data_format"]["inputs"]["image"]["spatial_shape"] == [40, 40, 40]
    assert sum(file.stat().st_size for file in folder.rglob("*") if file.is_file()) <= 2_000_000
    assert (folder / "LICENSE").exists()
    card = (folder / "docs" / "README.md").read_text("utf-8")
    assert "Never use it for a patient" in card
    assert f"{meta['eval_metrics'][RECIPES[name.replace('_', '-')].score if 'seg' in name else 'accuracy']:.3f}" in card


def test_the_card_says_that_malignant_is_a_rule() -> None:
    card = resources.path("Models/lung_nodule/docs/README.md").read_text("utf-8")
    assert '"Malignant" is a rule, not pathology' in card


@pytest.mark.parametrize("name", list(RECIPES))
def test_a_quick_training_goes_all_the_way_to_a_bundle(name: str, tmp_path: Path) -> None:
    steps: list[int] = []
    metrics = train(name, tmp_path / "new" / "bundle", Run(progress=lambda p: steps.append(p.done)), quick=True)
    assert steps == list(range(10))
    assert {"seconds"} < set(metrics)
    assert [p.name for p in (tmp_path / "new").iterdir()] == ["bundle"]
    config = json.loads((tmp_path / "new" / "bundle" / "configs" / "inference.json").read_text("utf-8"))
    network = ConfigParser(config).get_parsed_content("network_def")
    weights = torch.load(tmp_path / "new" / "bundle" / "models" / "model.pt", weights_only=True)
    network.load_state_dict(weights)
    recipe = RECIPES[name]
    batch = recipe.synthesise(Backgrounds.training(), recipe.batch, seed=50)
    torch.manual_seed(0)
    before, after = (float(recipe.loss(n.train(), batch).detach()) for n in (recipe.network(), network))
    # These begin as a smooth interpolation (see test_healthy_tissue), and with what another network has learnt, which
    # take more than ten steps to better.
    assert after < before or name in ("healthy-lung", "lung-mil", "lung-nodule-triplet", "lung-nodule-tc-vae")


def test_an_interrupted_training_ends_with_the_same_weights(tmp_path: Path) -> None:
    recipe = replace(RECIPES["lung-nodule"], epochs=2, steps=2, batch=6, validation=6)
    backgrounds = Backgrounds.training()
    whole = fit(recipe, backgrounds, tmp_path / "whole.pt", Run(seed=3)).state_dict()
    asked: list[int] = []

    def cancel() -> bool:
        asked.append(1)
        return len(asked) == 4

    with pytest.raises(Cancelled):
        fit(recipe, backgrounds, tmp_path / "broken.pt", Run(seed=3, cancel=cancel))
    assert torch.load(tmp_path / "broken.pt", weights_only=True)["epoch"] == 1
    resumed = fit(recipe, backgrounds, tmp_path / "broken.pt", Run(seed=3)).state_dict()
    assert all(torch.equal(value, resumed[key]) for key, value in whole.items())
    with pytest.raises(MedXAIError, match="another training"):
        fit(recipe, backgrounds, tmp_path / "broken.pt", Run(seed=4))


def test_batches_are_made_ahead_in_order_and_not_too_far(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trainer, "_AHEAD", 3)
    together, made = threading.Barrier(3), []

    def make(step: int) -> int:
        if step < 3:
            together.wait(timeout=30)  # Never passed by fewer than three at once.
        made.append(step)
        return step

    for step, batch in enumerate(trainer._ahead(make, range(10, 10))):
        raise AssertionError((step, batch))
    for step, batch in enumerate(trainer._ahead(make, range(9))):
        assert batch == step
        assert max(made) <= step + 3
    assert sorted(made) == list(range(9))


def test_dropout_is_resumed_too(tmp_path: Path) -> None:
    def network() -> nn.Module:
        return nn.Sequential(nn.AdaptiveAvgPool3d(4), nn.Flatten(), nn.Dropout(), nn.Linear(64, 3))

    def loss(network: nn.Module, patches: Nodules) -> torch.Tensor:
        return nn.functional.cross_entropy(network(patches.images), patches.labels)

    recipe = replace(RECIPES["lung-nodule"], network=network, loss=loss, measure=lambda *_: {"log_likelihood": 0.0})
    recipe = replace(recipe, epochs=2, steps=2, batch=6, validation=6)
    kept: list[dict[str, torch.Tensor]] = []
    for name, stop in (("whole", 99), ("broken", 3), ("broken", 99)):
        steps = iter(range(stop))
        run = Run(cancel=lambda steps=steps: next(steps, None) is None)
        try:
            fit(recipe, scan(), tmp_path / name, run)
        except Cancelled:
            assert name == "broken"
        kept.append(torch.load(tmp_path / name, weights_only=True)["network"])
        torch.rand(5)  # Whatever else draws random numbers in between.
    assert all(torch.equal(value, kept[2][key]) for key, value in kept[0].items())


def test_what_could_not_be_measured_is_not_in_the_metadata(tmp_path: Path) -> None:
    """JSON (RFC 8259) has no NaN."""
    measured = {"accuracy": 0.5, "pointing": math.nan}
    about = dict.fromkeys(("name", "task", "description", "intended_use"), "x")
    lung_nodule.write_classifier(tmp_path / "new", lung_nodule.build(), about, ["evidence"], "", measured)

    def refuse(constant: str) -> None:
        raise AssertionError(constant)

    said = (tmp_path / "new" / "configs" / "metadata.json").read_text(encoding="utf-8")
    assert json.loads(said, parse_constant=refuse)["eval_metrics"] == {"accuracy": 0.5}


def test_training_refuses_what_it_cannot_do(tmp_path: Path) -> None:
    with pytest.raises(MedXAIError, match="did you mean lung-nodule"):
        train("lung-nodul", tmp_path / "bundle", Run())
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("years of work", encoding="utf-8")
    with pytest.raises(MedXAIError, match="not a place for a bundle"):
        train("lung-nodule", tmp_path / "mine", Run())
    assert (tmp_path / "mine" / "thesis.txt").exists()
    with pytest.raises(MedXAIError, match=r"'.*thesis.txt' cannot be made .*another folder"):
        train("lung-nodule", tmp_path / "mine" / "thesis.txt" / "bundle", Run())


@pytest.mark.parametrize("content", [b"", b"junk"])
def test_a_damaged_checkpoint_is_not_gone_on_from(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "new.checkpoint.pt").write_bytes(content)
    with pytest.raises(MedXAIError, match=r"'.*new.checkpoint.pt' is damaged: delete it"):
        train("lung-nodule", tmp_path / "new", Run(), quick=True)
