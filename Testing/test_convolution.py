"""Convolutions that keep only their shape: the same values and gradients as PyTorch's, and nothing kept."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from test_counters import recording
from torch import Tensor

from MedXAILib.engines.convolution import convolution

CASES: dict[str, tuple[tuple[int, ...], tuple[int, ...], dict[str, Any]]] = {
    # The input, the weight, and how: strided stems of few channels go back in their own way.
    "stem": ((2, 1, 13, 10, 9), (6, 1, 7, 7, 7), {"stride": 2, "padding": 3}),
    "stem, flat": ((1, 2, 9, 12, 11), (4, 2, 3, 7, 7), {"stride": (1, 2, 2), "padding": (1, 3, 3)}),
    "kernel shorter than the stride": ((1, 3, 11, 9, 10), (4, 3, 2, 1, 3), {"stride": (3, 4, 2)}),
    "what the last window does not reach": ((1, 1, 10, 10, 10), (2, 1, 4, 4, 4), {"stride": 4}),
    "uneven padding": ((1, 1, 8, 9, 10), (2, 1, 3, 4, 5), {"stride": (2, 3, 2), "padding": (0, 2, 1)}),
    "one dimension": ((2, 1, 21), (3, 1, 5), {"stride": 3, "padding": 2}),
    "two dimensions": ((2, 3, 15, 14), (4, 3, 5, 3), {"stride": (2, 3), "padding": (2, 1)}),
    "many channels": ((1, 12, 8, 8, 8), (4, 12, 3, 3, 3), {"stride": 2, "padding": 1}),
    "plain": ((2, 3, 7, 6, 5), (4, 3, 3, 3, 3), {"padding": 1}),
    "grouped": ((1, 4, 8, 8, 8), (6, 2, 3, 3, 3), {"stride": 2, "padding": 1, "groups": 2}),
    "dilated": ((1, 1, 12, 12, 12), (3, 1, 3, 3, 3), {"stride": 2, "padding": 2, "dilation": 2}),
    "transposed": ((1, 3, 5, 6, 4), (3, 2, 3, 3, 3), {"stride": 2, "padding": 1, "output_padding": 1}),
    "transposed, grouped": ((1, 4, 5, 6, 4), (4, 3, 2, 2, 2), {"stride": 2, "groups": 2, "dilation": 2}),
}


def seeded(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("name", CASES)
def test_values_and_gradients_are_those_of_pytorch(name: str) -> None:
    of_input, of_weight, how = CASES[name]
    transposed = name.startswith("transposed")
    outputs = of_weight[1] * how.get("groups", 1) if transposed else of_weight[0]
    x, bias = seeded(*of_input, seed=1).requires_grad_(), seeded(outputs, seed=2).requires_grad_()
    weight = seeded(*of_weight, seed=3)
    native = getattr(F, f"conv{'_transpose' if transposed else ''}{len(of_input) - 2}d")
    expected = native(x, weight, bias, **how)
    found = convolution(x, weight, bias, **how, transposed=transposed)
    torch.testing.assert_close(found, expected, rtol=0, atol=0)
    m = seeded(*expected.shape, seed=4)
    for given in ((x, bias), (x,), (bias,)):
        right = torch.autograd.grad(expected, given, m, retain_graph=True)
        torch.testing.assert_close(torch.autograd.grad(found, given, m, retain_graph=True), right)


def test_nothing_is_kept_but_the_weight() -> None:
    x, weight = seeded(1, 4, 16, 16, 16, seed=1).requires_grad_(), seeded(4, 4, 3, 3, 3, seed=2)
    with recording() as kept:
        convolution(x, weight, padding=1)
    assert kept.bytes == weight.untyped_storage().nbytes()


def test_in_low_precision_the_gradient_has_that_of_the_input() -> None:
    x, weight = seeded(1, 1, 12, 12, 12, seed=1).float().requires_grad_(), seeded(4, 1, 3, 3, 3, seed=2).float()
    with torch.autocast("cpu", torch.bfloat16):
        y = convolution(x, weight, stride=2)
    assert y.dtype == torch.bfloat16
    (found,) = torch.autograd.grad(y.sum(), x)
    (exact,) = torch.autograd.grad(F.conv3d(x, weight, stride=2).sum(), x)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, exact, rtol=0.05, atol=0.05)
