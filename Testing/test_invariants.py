"""What holds of every explainer on every network, whatever it computes."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from conftest import NETWORKS, make_model
from torch import Tensor, nn

import MedXAILib as mx

QUICK: dict[str, dict[str, Any]] = {
    "smoothgrad": {"samples": 3},
    "vargrad": {"samples": 3},
    "integrated_gradients": {"steps": 2, "max_steps": 6},
    "gradient_shap": {"samples": 4},
    "deep_shap": {"background": ("zero", "blur")},
    "scorecam": {"clusters": 3},
    "occlusion": {"window": (16.0,)},
    # Four boxes of the smaller scans, which Shapley values are exact for.
    "supervoxel_ablation": {"supervoxels": "grid", "size_mm": 16.0},
    "lime": {"size_mm": 12.0, "samples": 12},
    "kernel_shap": {"supervoxels": "grid", "size_mm": 16.0, "samples": 12},
    "permutation_shap": {"supervoxels": "grid", "size_mm": 16.0, "permutations": 1},
    "rise": {"samples": 12, "tolerance": 0.0},
    "prediction_difference": {"window": (16.0,), "samples": 2},
    "meaningful_perturbation": {"steps": 2, "jitter": 0.0, "noise": 0.0},
    "counterfactual_infill": {"within": ((4.0, 4.0, 4.0), (15.0, 15.0, 9.0))},
}
METHODS = list(mx.methods("SaliencyMap"))
NOT_MIRRORED = {
    "smoothgrad": "the noise",
    "vargrad": "the noise",
    "lime": "what is drawn",
    "rise": "what is drawn",
    "prediction_difference": "what is drawn",
    "counterfactual_infill": "the region",
}


def explain(model: mx.Model, x: Any, method: str, **more: Any) -> mx.SaliencyMap:
    """The explanation, or a skip where the method says that it is not made for this network."""
    try:
        return mx.explain(model, x, method, **{"target": 1, **QUICK.get(method, {}), **more})
    except mx.MedXAIError as error:
        if method == "cam" and "CAM is exact only where" in str(error):
            pytest.skip("no CAM architecture")
        if method.startswith("attention") and "has no attention" in str(error):
            pytest.skip("no attention")
        if method == "mil" and "pools no instances" in str(error):
            pytest.skip("no instances")
        raise


def state(network: nn.Module) -> dict[str, Any]:
    """Everything about a network that a call could change."""
    return {
        "values": {k: v.clone() for k, v in network.state_dict().items()},
        "grads": {k: p.grad for k, p in network.named_parameters()},
        "learning": {k: p.requires_grad for k, p in network.named_parameters()},
        "training": {k: m.training for k, m in network.named_modules()},
        "inplace": {k: getattr(m, "inplace", None) for k, m in network.named_modules()},
        "hooks": {
            k: (len(m._forward_hooks), len(m._forward_pre_hooks), len(m._backward_hooks))
            for k, m in network.named_modules()
        },
    }


def assert_same(before: dict[str, Any], after: dict[str, Any]) -> None:
    values, now = before.pop("values"), after.pop("values")
    assert before == after
    assert all(torch.equal(values[k], now[k]) for k in values)


def assert_near(actual: Tensor, expected: Tensor, within: float = 1e-3) -> None:
    """Equal but for rounding, which at the kink of an activation can change a few voxels visibly."""
    assert float((actual - expected).norm()) <= within * float(expected.norm())


@pytest.mark.parametrize("method", METHODS)
def test_model_and_input_are_as_before(monai_case: tuple[str, mx.Model, Tensor], method: str) -> None:
    _, model, x = monai_case
    model.network.train()
    next(model.network.children()).eval()
    next(model.network.parameters()).requires_grad_(False)
    before, kept = state(model.network), x.clone()
    explain(model, x, method)
    assert_same(before, state(model.network))
    assert torch.equal(x, kept) and not x.requires_grad and x.grad is None


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("trouble", ["cancel", "error"])
def test_model_is_as_before_after_trouble(method: str, trouble: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = make_model("resnet18")
    model.network.train()
    x = torch.randn(1, 1, *NETWORKS["resnet18"][2])
    before = state(model.network)
    if trouble == "cancel":
        with pytest.raises(mx.Cancelled):
            explain(model, x, method, run=mx.Run(cancel=lambda: True))
    else:
        calls = []

        def breaks(*_: Any) -> None:
            calls.append(1)
            raise ZeroDivisionError

        monkeypatch.setattr(type(model.network.fc), "forward", breaks)
        with pytest.raises(ZeroDivisionError):
            explain(model, x, method)
        assert calls
    assert_same(before, state(model.network))


@pytest.mark.parametrize("method", METHODS)
def test_map_is_finite_and_not_empty_on_the_grid(monai_case: tuple[str, mx.Model, Tensor], method: str) -> None:
    _name, model, x = monai_case
    made = explain(model, x[0], method)
    assert made.data.shape == x[0].shape and made.data.dtype == torch.float32
    assert torch.isfinite(made.data).all()
    assert made.signed or (made.data >= 0).all()
    if (made.signed and method != "guided_gradcam") or method in ("vargrad", "scorecam"):
        assert made.data.abs().max() > 0


@pytest.mark.parametrize("method", METHODS)
def test_batch_of_many_is_many_of_one(monai_case: tuple[str, mx.Model, Tensor], method: str) -> None:
    name, model, x = monai_case
    if name == "swinunetr":
        pytest.skip("takes long, and its blocks are those of vit and segresnet")
    other = torch.randn_like(x) * 0.5
    # Leave the class open: each sample is explained for what is predicted for it. Where a label is predicted is not:
    # these networks have learnt nothing, and rounding, which differs with the batch, decides in many a voxel.
    target = (
        mx.SegmentationTarget(1, ((-30.0, -30.0, 0.0), (30.0, 30.0, 9.0))) if model.task == "segmentation" else None
    )
    both = explain(model, torch.cat([x, other]), method, target=target)
    alone = [explain(model, one, method, target=target).data for one in (x[0], other[0])]
    assert both.data.shape[0] == 2
    for sample, single in zip(both.data, alone, strict=True):
        # Guided backpropagation has a kink of its own at every activation, and of four points each weighs much.
        within = 2e-2 if method == "gradient_shap" else 5e-3 if "guided" in method else 1e-3
        assert_near(sample, single, within=within)


@pytest.mark.parametrize("method", METHODS)
def test_same_seed_same_map_and_provenance_recomputes(monai_case: tuple[str, mx.Model, Tensor], method: str) -> None:
    name, model, x = monai_case
    if name == "swinunetr":
        pytest.skip("takes long, and its blocks are those of vit and segresnet")
    first = explain(model, x[0], method, run=mx.Run(seed=3))
    again = mx.recompute(first, model, x[0])
    torch.testing.assert_close(again.data, first.data, rtol=1e-5, atol=1e-6 * float(first.data.abs().max()))
    assert again.provenance.parameters == first.provenance.parameters and again.provenance.seed == 3


class Flipped(nn.Module):
    """A network that sees its input mirrored along every axis."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, x: Tensor) -> Tensor:
        y = self.network(x.flip((2, 3, 4)))
        y = y[0] if isinstance(y, tuple) else y
        return y.flip((2, 3, 4)) if y.ndim == 5 else y


@pytest.mark.parametrize("method", METHODS)
def test_flipping_volume_and_network_flips_the_map(monai_case: tuple[str, mx.Model, Tensor], method: str) -> None:
    name, model, x = monai_case
    mirrored = mx.Model(Flipped(copy.deepcopy(model.network)), task=model.task)
    if method in NOT_MIRRORED:
        pytest.skip(f"{NOT_MIRRORED[method]} is not mirrored")
    if name == "swinunetr" and method in ("kernel_shap", "permutation_shap"):
        pytest.skip("of so many supervoxels coalitions are drawn, and these are not mirrored")
    plain = explain(model, x[0], method)
    turned = explain(mirrored, x[0].flip((1, 2, 3)), method)
    expected = plain.data.flip((1, 2, 3))
    assert_near(turned.data, expected)


@pytest.mark.parametrize("method", METHODS)
def test_memory_running_out_halves_the_work_and_says_so(method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = make_model("resnet18")
    x = torch.randn(2, 1, *NETWORKS["resnet18"][2])
    whole = explain(model, x, method)
    forward = mx.Model.forward

    def small(self: mx.Model, x: Tensor) -> Tensor:
        if len(x) > 1:
            raise RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory")
        return forward(self, x)

    monkeypatch.setattr(mx.Model, "forward", small)
    made = explain(model, x, method)
    assert_near(made.data, whole.data)
    assert any("Out of memory" in note for note in made.provenance.notes)


@pytest.mark.parametrize("method", METHODS)
def test_works_in_a_callers_no_grad(method: str) -> None:
    model = make_model("resnet18")
    x = torch.randn(1, *NETWORKS["resnet18"][2])
    expected = explain(model, x, method)
    with torch.inference_mode():
        made = explain(model, x.clone(), method)
    torch.testing.assert_close(made.data, expected.data)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.parametrize("method", METHODS)
def test_gpu_equals_cpu(monai_case: tuple[str, mx.Model, Tensor], method: str) -> None:
    _, model, x = monai_case
    cpu = explain(model, x, method)
    gpu = explain(model, x, method, run=mx.Run(device="cuda"))
    assert_near(gpu.data, cpu.data, within=1e-2)
    assert model.device.type == "cpu"
