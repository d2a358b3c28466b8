"""Parts of a network that are computed twice instead of kept: the same gradients, in less memory, and no trace."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from conftest import NETWORKS, make_model
from monai.networks import nets
from test_counters import operations
from test_invariants import assert_same, state
from torch import Tensor, nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import MedXAILib as mx
from MedXAILib.engines.checkpointing import Block, Kept, checkpointed


class Live(TorchDispatchMode):
    """The most bytes that were there at once of all that was made inside, kept by autograd or not."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.most = 0
        self.known: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor):
                self.see(tensor.untyped_storage())
        return result

    def see(self, storage: torch.UntypedStorage) -> None:
        where, size = storage._cdata, storage.nbytes()
        if where in self.known:
            return

        def gone() -> None:
            self.known.discard(where)
            self.now -= size

        self.known.add(where)
        self.now += size
        self.most = max(self.most, self.now)
        weakref.finalize(storage, gone)


def live(work: Callable[[], object]) -> int:
    with Live() as seen:
        work()
    return seen.most


def sequence() -> nn.Module:
    """A network without blocks of its own, which works in place."""

    def layer(a: int, b: int) -> list[nn.Module]:
        return [nn.Conv3d(a, b, 3, padding=1), nn.BatchNorm3d(b), nn.ReLU(inplace=True)]

    layers = [*layer(1, 6), *layer(6, 6), nn.MaxPool3d(2), *layer(6, 8), *layer(8, 8), nn.MaxPool3d(2)]
    return nn.Sequential(*layers, *layer(8, 8), nn.AdaptiveAvgPool3d(1), nn.Flatten(), nn.Linear(8, 3))


def forgetful() -> nn.Module:
    """A network that checkpoints by itself."""
    few = (1, 1, 1, 1)
    return nets.SwinUNETR(
        in_channels=1, out_channels=3, feature_size=12, depths=few, num_heads=few, use_checkpoint=True
    )


CASES: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    **{name: (lambda name=name: make_model(name).network, size) for name, (_, _, size) in NETWORKS.items()},
    "sequence": (sequence, (24, 24, 16)),
    "forgetful": (forgetful, (64, 32, 32)),
}


def case(name: str) -> tuple[nn.Module, Tensor]:
    build, size = CASES[name]
    torch.manual_seed(0)
    network = build().eval().requires_grad_(False)
    return network, torch.randn(1, 1, *size, generator=torch.Generator().manual_seed(1))


def score(network: nn.Module, x: Tensor) -> Tensor:
    y = network(x)
    return (y[0] if isinstance(y, tuple) else y).flatten(1)[:, 1:].square().sum()


def gradient(network: nn.Module, x: Tensor) -> Tensor:
    leaf = x.clone().requires_grad_()
    return torch.autograd.grad(score(network, leaf), leaf)[0]


def kept(network: nn.Module, x: Tensor) -> Kept:
    return Kept(network, lambda: network(x.clone().requires_grad_()))


def traces(network: nn.Module) -> list[dict[str, Any]]:
    return [dict(module.__dict__) for module in network.modules()]


def near(actual: Tensor, expected: Tensor) -> bool:
    return float((actual - expected).norm()) <= 1e-6 * float(expected.norm())


def names(network: nn.Module, blocks: list[Block]) -> list[str]:
    found = {module: name for name, module in network.named_modules()}
    return [found[b.module] + ("" if b.part is None else f"[{b.part.start}:{b.part.stop}]") for b in blocks]


class Waves(nn.Module):
    """Keeps two tensors, but not what it is given."""

    def forward(self, x: Tensor) -> Tensor:
        return (x + 1).sin().cos()


def children(block: Block) -> list[nn.Module]:
    return [block.module] if block.part is None else list(block.module._modules.values())[block.part]


@pytest.mark.parametrize("name", CASES)
def test_gradients_are_the_same_in_less_memory_for_at_most_a_forward(name: str) -> None:
    network, x = case(name)
    measured = kept(network, x)
    blocks = measured.blocks(0)
    expected, before, looks = gradient(network, x), state(network), traces(network)
    with torch.no_grad():
        forward = operations(lambda: network(x))
    plain = operations(lambda: gradient(network, x))
    with checkpointed(blocks):
        assert near(gradient(network, x), expected)
        again = operations(lambda: gradient(network, x))
        least = live(lambda: gradient(network, x))
    assert blocks and measured.peak(blocks) < measured.bytes / 1.2
    assert least < live(lambda: gradient(network, x))
    # What such a network computes twice by itself, it then computes three times.
    assert 0 < again - plain <= (2 if name == "forgetful" else 1) * forward
    assert_same(before, state(network))
    assert traces(network) == looks


def test_of_a_densenet_less_than_a_third_is_kept_and_a_quarter_of_the_time_lost() -> None:
    network = nets.DenseNet121(3, 1, 3).eval().requires_grad_(False)
    x = torch.randn(1, 1, 48, 48, 48, generator=torch.Generator().manual_seed(1))
    measured = kept(network, x)
    tight, loose = measured.blocks(measured.bytes // 3), measured.blocks(measured.bytes * 2 // 5)
    assert measured.peak(tight) <= measured.bytes / 3 and measured.peak(loose) <= measured.bytes * 2 / 5
    plain, most = operations(lambda: gradient(network, x)), live(lambda: gradient(network, x))
    with checkpointed(tight):
        assert live(lambda: gradient(network, x)) <= most / 2.5
        assert operations(lambda: gradient(network, x)) <= 1.35 * plain
    with checkpointed(loose):
        assert operations(lambda: gradient(network, x)) <= 1.3 * plain


@pytest.mark.parametrize("name", CASES)
def test_only_as_much_is_computed_again_as_the_budget_asks_for(name: str) -> None:
    network, x = case(name)
    measured = kept(network, x)
    assert measured.blocks(measured.bytes) == []
    least = measured.peak(measured.blocks(0))
    costs = []
    for budget in (least, (least + measured.bytes) // 2, measured.bytes - 1):
        blocks = measured.blocks(budget)
        assert blocks and measured.peak(blocks) <= budget
        with checkpointed(blocks):
            costs.append(operations(lambda: gradient(network, x)))
    assert costs[2] <= costs[0]
    assert measured.blocks(least - 1) and measured.peak(measured.blocks(least - 1)) == least


def test_measuring_keeps_nothing_and_leaves_no_trace() -> None:
    network, x = case("resnet18")
    before, looks = state(network), traces(network)
    with torch.no_grad():
        forward = live(lambda: network(x))
    found: list[Kept] = []
    assert live(lambda: found.append(kept(network, x))) < forward * 1.5 < found[0].bytes
    assert_same(before, state(network))
    assert traces(network) == looks


def test_what_is_kept_is_what_autograd_is_seen_to_keep() -> None:
    network, x = case("sequence")
    seen: list[int] = []
    own = {t.data_ptr() for t in (*network.parameters(), *network.buffers())}

    def count(tensor: Tensor) -> Tensor:
        seen.append(0 if tensor.data_ptr() in own else tensor.untyped_storage().nbytes())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(count, lambda t: t):
        network(x.clone().requires_grad_())
    assert kept(network, x).bytes == sum(seen)


def test_the_peak_is_what_is_kept_when_most_is() -> None:
    network, x = nn.Sequential(Waves(), Waves(), Waves()), torch.randn(1, 1, 4, 4, 4)
    measured, size = kept(network, x), x.nbytes
    first, last = [Block(network[0])], [Block(network, slice(2, 3))]
    assert measured.bytes == 6 * size
    # The first: its input and all of the others, and at last its own. The last: its own beside all of the others.
    assert measured.peak(first) == 5 * size and measured.peak(last) == 7 * size
    assert measured.peak(first, several=True) == measured.peak(last, several=True) == 7 * size
    assert measured.peak([*first, *last]) == 6 * size
    assert measured.peak([*first, *last], several=True) == 6 * size


def test_a_look_at_the_network_without_a_gradient_does_not_count() -> None:
    network, x = case("densenet121")

    def twice() -> None:
        with torch.no_grad():
            network(x)
        network(x.clone().requires_grad_())

    measured = Kept(network, twice)
    assert names(network, measured.blocks(0)) == names(network, kept(network, x).blocks(0))


def test_what_saves_next_to_nothing_is_not_computed_again() -> None:
    network, x = case("vit")
    chosen = names(network, kept(network, x).blocks(0))
    assert chosen and not any("norm" in name for name in chosen)


def test_several_backwards_through_one_forward() -> None:
    network, x = case("densenet121")
    measured = kept(network, x)
    blocks = measured.blocks(0, several=True)
    # What the last block needs stays there while the first is computed again.
    assert measured.peak(blocks, several=True) > measured.peak(blocks)

    def both() -> list[Tensor]:
        leaf = x.clone().requires_grad_()
        y = network(leaf)
        return [torch.autograd.grad(y[0, i], leaf, retain_graph=not i)[0] for i in (0, 1)]

    expected = both()
    with checkpointed(blocks):
        assert all(near(a, b) for a, b in zip(both(), expected, strict=True))


@pytest.mark.parametrize("where", ["forward", "backward"])
def test_after_an_error_there_is_no_trace(where: str, monkeypatch: pytest.MonkeyPatch) -> None:
    network, x = case("resnet18")
    blocks = kept(network, x).blocks(0)
    own = network.layer3[0].forward
    network.layer4[0].forward = special = lambda *args: own  # somebody else's
    before, looks = state(network), traces(network)
    calls: list[int] = []

    def breaks(*_: Any) -> None:
        calls.append(1)
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError), checkpointed([*blocks, Block(network.layer4[0])]):
        leaf = x.clone().requires_grad_()
        inside = network.layer1(network.maxpool(network.bn1(network.conv1(leaf))))
        if where == "backward":
            monkeypatch.setattr(type(network.layer1[0]), "forward", breaks)
            monkeypatch.setattr(nn.BatchNorm3d, "forward", breaks)
            torch.autograd.grad(inside.sum(), leaf)
        breaks()
    assert calls
    monkeypatch.undo()
    assert_same(before, state(network))
    assert traces(network) == looks and network.layer4[0].forward is special


def test_the_backward_may_come_later() -> None:
    network, x = case("unet")
    expected, leaf = gradient(network, x), x.clone().requires_grad_()
    with checkpointed(kept(network, x).blocks(0)):
        value = score(network, leaf)
    assert near(torch.autograd.grad(value, leaf)[0], expected)


@pytest.mark.parametrize("name", ["resnet18", "sequence", "unet"])
def test_hooks_run_once_and_still_have_their_say(name: str) -> None:
    network, x = case(name)
    free = kept(network, x).blocks(0)
    hooked = list(network.modules())[5]
    calls: list[int] = []

    def double(_module: nn.Module, _inputs: Any, output: Tensor) -> Tensor:
        calls.append(1)
        return output * 2

    handle = hooked.register_forward_hook(double)
    expected = gradient(network, x)
    calls.clear()
    with checkpointed(free):
        assert near(gradient(network, x), expected)
    assert calls == [1]
    # Blocks that are chosen now leave the module out, and so save what they promise.
    chosen = kept(network, x).blocks(0)
    for block in chosen:
        assert all(hooked is block.module or hooked not in child.modules() for child in children(block))
    handle.remove()


def test_what_is_on_in_the_forward_can_be_on_again() -> None:
    class Cubes(TorchFunctionMode):
        def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if func is functional.relu:
                return args[0] ** 3 / 10
            return func(*args, **(kwargs or {}))

    network, x = case("sequence")
    with Cubes():
        expected = gradient(network, x)
    blocks = Kept(network, lambda: network(x.clone().requires_grad_())).blocks(0)
    leaf = x.clone().requires_grad_()
    with checkpointed(blocks, recompute=Cubes), Cubes():
        value = score(network, leaf)
    assert near(torch.autograd.grad(value, leaf, retain_graph=True)[0], expected)
    assert near(torch.autograd.grad(value, leaf)[0], expected)
    leaf = x.clone().requires_grad_()
    with checkpointed(blocks), Cubes():
        value = score(network, leaf)
    assert not near(torch.autograd.grad(value, leaf)[0], expected)


def test_what_python_attached_to_inputs_is_there_again() -> None:
    class Notes(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.found: list[Any] = []

        def forward(self, x: Tensor) -> Tensor:
            self.found.append(getattr(x, "note", None))
            return x.exp().sin()

    class Outer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = Notes()

        def forward(self, x: Tensor) -> Tensor:
            x = x * 2
            x.note = "in"  # type: ignore[attr-defined]
            return torch.utils.checkpoint.checkpoint(self.inner, x, use_reentrant=False)

    def carry(before: Any, now: Any) -> None:
        for b, n in zip(before, now, strict=True):
            n.note = b.note

    alone, x = Notes(), torch.ones(3, requires_grad=True)
    y = x * 2
    y.note = "in"  # type: ignore[attr-defined]
    with checkpointed([Block(alone)]):
        torch.autograd.grad(alone(y).sum(), x)
    assert alone.found == ["in", "in"]
    for how, last in ((None, None), (carry, "in")):
        outer = Outer()
        with checkpointed([Block(outer.inner)], carry=how):
            torch.autograd.grad(outer(x).sum(), x)
        assert outer.inner.found[0] == "in" and outer.inner.found[-1] == last


class Awkward(nn.Module):
    """Modules that cannot be computed again, and some that can."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv3d(1, 4, 3, padding=1)
        self.spoilt = Waves()
        self.spoils = nn.Sequential(nn.ReLU(inplace=True), self._some())
        self.twice = self._some()
        self.listed = _Listed(self._some())
        self.kept = nn.Sequential(self._some(), self._some())
        self.alias = nn.Sequential(*self.kept)
        self.scripted = torch.jit.script(self._some())

    @staticmethod
    def _some() -> nn.Sequential:
        return nn.Sequential(nn.Conv3d(4, 4, 3, padding=1), nn.InstanceNorm3d(4), nn.PReLU(4))

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        y = self.spoilt(x)
        x = x.add_(1)
        x = self.spoils(x * 2) + y
        x = self.twice(self.twice(x))
        x = self.listed(x, [x])
        x = self.kept(self.scripted(x))
        return functional.dropout(x.mean((2, 3, 4)), 0.5, training=True)


class _Listed(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor, xs: list[Tensor]) -> Tensor:
        return self.inner(xs.pop()) + x


def test_only_what_can_be_computed_again_is() -> None:
    torch.manual_seed(0)
    network, x = Awkward().eval().requires_grad_(False), torch.randn(1, 1, 12, 12, 12)
    measured = kept(network, x)
    for budget in (0, measured.bytes // 2, measured.bytes * 3 // 4):
        blocks = measured.blocks(budget)
        chosen = names(network, blocks)
        runs = [m for b in blocks for child in children(b) for m in child.modules()]
        assert chosen and len(set(runs)) == len(runs)
        for name in chosen:
            assert name.split(".")[0].split("[")[0] not in ("spoilt", "twice", "scripted", "")
            assert name not in ("spoils", "spoils[0:1]", "spoils[0:2]", "listed")
        torch.manual_seed(1)
        expected = gradient(network, x)
        torch.manual_seed(1)
        with checkpointed(blocks):
            assert near(gradient(network, x), expected)
    assert any(name.startswith(("kept", "alias")) for name in names(network, measured.blocks(0)))


def test_what_enters_and_leaves_a_block_can_be_changed() -> None:
    network, x = nn.Sequential(Waves(), Waves()), torch.randn(1, 1, 4, 4, 4)
    seen: list[Tensor] = []
    with checkpointed([Block(network[1])], edge=lambda t: seen.append(t) or t * 2):
        made = gradient(network, x)
    inner = nn.Sequential(network[0], Times(2), network[1], Times(2))
    # The second time nobody asks for the input, and no longer for what leaves.
    assert near(made, gradient(inner, x)) and len(seen) == 2


class Times(nn.Module):
    def __init__(self, by: float) -> None:
        super().__init__()
        self.by = by

    def forward(self, x: Tensor) -> Tensor:
        return x * self.by


class Random(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return functional.dropout(x, 0.5, training=True).sin().cos()


def test_chance_is_the_same_again() -> None:
    network, x = nn.Sequential(Random(), Random()), torch.randn(1, 1, 8, 8, 8)
    torch.manual_seed(3)
    expected = gradient(network, x)
    torch.manual_seed(3)
    with checkpointed([Block(network[0]), Block(network, slice(1, 2))]):
        assert torch.equal(gradient(network, x), expected)


def test_a_lower_precision_is_the_same_again() -> None:
    network, x = case("unet")
    blocks = kept(network, x).blocks(0)

    def low() -> Tensor:
        leaf = x.clone().requires_grad_()
        with torch.autocast("cpu", torch.bfloat16):
            value = network(leaf)[:, 1].float().sum()
        return torch.autograd.grad(value, leaf)[0]

    expected = low()
    with checkpointed(blocks):
        assert near(low(), expected)


def test_without_a_gradient_nothing_changes() -> None:
    network, x = case("densenet121")
    with checkpointed(kept(network, x).blocks(0)), torch.no_grad():
        made = network(x)
    assert not made.requires_grad and torch.equal(made, network(x))


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


BUDGETED = [
    ("gradient", {}),
    ("integrated_gradients", {"steps": 2, "max_steps": 2}),
    ("guided_backprop", {}),
    ("lrp", {"composite": "epsilon"}),
    ("lrp", {"composite": "epsilon_plus_flat"}),
    ("deeplift", {"baseline": "blur"}),
    ("deep_shap", {"background": ("blur", "mean")}),
]


@pytest.mark.parametrize(("method", "parameters"), BUDGETED)
@pytest.mark.parametrize("name", ["densenet121", "unet", "segresnet", "vit"])
def test_a_method_gives_the_same_map_when_memory_is_short(name: str, method: str, parameters: dict[str, Any]) -> None:
    model, x = make_model(name), torch.randn(1, *NETWORKS[name][2], generator=torch.Generator().manual_seed(1))
    targets = [0, 1] if model.task == "classification" else [1]
    whole = mx.explain(model, x, method, target=targets, **parameters)
    short = mx.explain(model, x, method, target=targets, run=mx.Run(memory_budget=1), **parameters)
    for a, b in zip(whole, short, strict=True):
        assert float((a.data - b.data).norm()) <= 1e-5 * float(a.data.norm())
        assert any("computed twice" in note for note in b.provenance.notes)
        assert not any("computed twice" in note for note in a.provenance.notes)
        assert b.residual.get("conservation", 0) < 1e-5
