"""What must not grow: network calls, recorded bytes, operations. Counted, so that a busy machine changes nothing."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from conftest import make_model
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

import MedXAILib as mx

LAYERS = {"resnet18": "layer4", "densenet121": "features.denseblock3"}
VOLUME = torch.randn(1, 32, 32, 32, generator=torch.Generator().manual_seed(1))


@dataclass
class Seen:
    """What really went through a network, in samples."""

    forwards: int = 0
    backwards: int = 0
    through_stem: int = 0
    """Of the backwards, those that reached the network's first layer."""


@contextmanager
def watched(network: nn.Module, layer: str | None = None) -> Iterator[Seen]:
    """Count the samples that pass forward through `network`, and backward from its output."""
    seen = Seen()

    def backward(gradient: Tensor) -> None:
        seen.backwards += len(gradient)

    def through_stem(gradient: Tensor) -> None:
        seen.through_stem += len(gradient)

    def stem(_module: nn.Module, _inputs: object, output: Tensor) -> None:
        if output.requires_grad:
            output.register_hook(through_stem)

    def whole(_module: nn.Module, _inputs: object, output: Tensor) -> None:
        seen.forwards += len(output)
        if output.requires_grad:
            output.register_hook(backward)

    first = next(m for m in network.modules() if isinstance(m, nn.Conv3d))
    handles = [network.register_forward_hook(whole), first.register_forward_hook(stem)]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


@dataclass
class Recorded:
    """Bytes that autograd keeps for a backward, each storage once."""

    kept: dict[int, int] = field(default_factory=dict)

    @property
    def bytes(self) -> int:
        return sum(self.kept.values())


@contextmanager
def recording() -> Iterator[Recorded]:
    """Sum what autograd keeps while this is on."""
    recorded = Recorded()

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        recorded.kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        yield recorded


class Operations(TorchDispatchMode):
    """Floating-point operations of convolutions and matrix products. (PyTorch's FlopCounterMode also follows modules,
    which it cannot while a gradient is taken at the network's input.)"""

    def __init__(self) -> None:
        super().__init__()
        self.total = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func._overloadpacket in flop_registry:
            self.total += flop_registry[func._overloadpacket](*args, **(kwargs or {}), out_val=result)
        return result


def operations(work: Callable[[], object]) -> int:
    with Operations() as counter:
        work()
    return counter.total


def forward(model: mx.Model) -> Callable[[], object]:
    def work() -> None:
        with torch.no_grad():
            model.network.eval()(VOLUME[None])

    return work


@pytest.mark.parametrize(
    ("method", "parameters"),
    [
        ("gradient", {}),
        ("gradient", {"form": "times_input"}),
        ("smoothgrad", {"samples": 5}),
        ("vargrad", {"samples": 3}),
        ("integrated_gradients", {"steps": 2, "max_steps": 6, "tolerance": 0}),
        ("gradcam", {"layers": ("layer4",)}),
        ("gradcam", {"layers": ("layer2", "layer4")}),
        ("gradcam", {}),
        ("gradcam_plus_plus", {"layers": ("layer4",)}),
        ("hirescam", {"layers": ("layer4",)}),
        ("layercam", {"layers": ("layer4",)}),
        ("cam", {"layers": ("layer4",)}),
        ("scorecam", {"layers": ("layer4",), "clusters": 4}),
        ("guided_backprop", {}),
        ("deconvnet", {"samples": 2}),
        ("guided_gradcam", {"layers": ("layer4",)}),
        ("deeplift", {}),
        ("deep_shap", {"background": ("zero", "mean", "blur")}),
        ("gradient_shap", {"samples": 4}),
    ],
)
@pytest.mark.parametrize("targets", [[1], [0, 1, 2]])
def test_the_counts_are_what_the_network_really_saw(
    method: str, parameters: dict[str, object], targets: list[int]
) -> None:
    model = make_model("resnet18")
    with watched(model.network) as seen:
        maps = mx.explain(model, VOLUME, method, target=targets, **parameters)
    for explanation in maps:
        assert explanation.provenance.forwards == seen.forwards
    assert maps[0].provenance.backwards == seen.backwards


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("classes", [1, 3])
def test_class_activation_maps_take_one_forward_and_a_tail_backward_for_each_class(name: str, classes: int) -> None:
    model = make_model(name)
    with watched(model.network) as seen:
        mx.explain(model, VOLUME, "gradcam", target=list(range(classes)), layers=(LAYERS[name],))
    assert (seen.forwards, seen.backwards, seen.through_stem) == (1, classes, 0)


def test_a_found_layer_is_looked_for_once() -> None:
    model = make_model("densenet121")
    mx.explain(model, VOLUME, "gradcam", target=1)
    with watched(model.network) as seen:
        mx.explain(model, VOLUME, "gradcam", target=1)
    assert (seen.forwards, seen.backwards) == (1, 1)


@pytest.mark.parametrize("name", LAYERS)
def test_only_the_tail_is_recorded(name: str) -> None:
    model = make_model(name)
    with recording() as whole:
        mx.explain(model, VOLUME, "gradient", target=1)
    with recording() as tail:
        mx.explain(model, VOLUME, "gradcam", target=1, layers=(LAYERS[name],))
    assert 0 < tail.bytes < whole.bytes / 5


@pytest.mark.parametrize("name", LAYERS)
def test_a_class_activation_map_costs_about_a_forward(name: str) -> None:
    model = make_model(name)
    one = operations(forward(model))
    for classes, limit in ((1, 1.01), (3, 1.03)):
        targets = list(range(classes))
        cost = operations(lambda t=targets: mx.explain(model, VOLUME, "gradcam", target=t, layers=(LAYERS[name],)))
        assert one <= cost <= limit * one


@pytest.mark.parametrize("name", LAYERS)
def test_a_gradient_takes_no_gradient_of_the_parameters(name: str) -> None:
    model = make_model(name)
    costs = []
    for learning in (True, False):
        model.network.requires_grad_(learning)
        costs.append(operations(lambda: mx.explain(model, VOLUME, "gradient", target=1)))
    assert costs[0] == costs[1]


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize(
    ("method", "parameters", "forwards", "backwards"),
    [
        ("guided_backprop", {}, 1, 1),
        ("lrp", {"composite": "epsilon"}, 1, 1),
        # Once more for the positive parts, and in the first layer, whose input has both signs, for both.
        ("lrp", {"composite": "epsilon_plus"}, 3, 2),
        ("lrp", {"composite": "epsilon_plus_flat"}, 2, 1),
        ("deeplift", {}, 2, 1),
        ("deep_shap", {"background": ("zero", "minimum", "mean")}, 4, 3),
    ],
)
def test_rules_take_no_more_operations_than_they_must(
    name: str, method: str, parameters: dict[str, object], forwards: float, backwards: float
) -> None:
    model = make_model(name)
    one = operations(forward(model))
    back = operations(lambda: mx.explain(model, VOLUME, "gradient", target=1)) - one
    cost = operations(lambda: mx.explain(model, VOLUME, method, target=1, **parameters))
    assert cost <= 1.01 * (forwards * one + backwards * back)


def test_integrated_gradients_keeps_its_points_when_it_refines() -> None:
    model = make_model("resnet18")
    points: list[int] = []
    for most in (2, 6, 18):
        with watched(model.network) as seen:
            mx.explain(model, VOLUME, "integrated_gradients", target=1, steps=2, max_steps=most, tolerance=0)
        points.append(seen.backwards)
        # The sample, the baseline, and what is needed to see how much fits come on top of the points.
        assert seen.forwards == most + 3
    assert points == [2, 6, 18]


def test_integrated_gradients_records_no_more_than_the_budget_allows() -> None:
    model = make_model("resnet18")
    with recording() as one:
        mx.explain(model, VOLUME, "gradient", target=1)
    live: list[int] = []
    hook = model.network.register_forward_hook(lambda _m, inputs, _o: live.append(len(inputs[0])))
    try:
        budget = mx.Run(memory_budget=4 * one.bytes)
        mx.explain(model, VOLUME, "integrated_gradients", target=1, steps=9, max_steps=9, run=budget)
    finally:
        hook.remove()
    assert 1 <= max(live) <= 2
