"""Does a map depend on what the network learnt? Networks that have forgotten it, from the output back.

Adebayo et al., "Sanity checks for saliency maps", 2018.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from copy import deepcopy
from statistics import mean

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from MedXAILib.engines.capture import suggest_layer
from MedXAILib.errors import MedXAIError
from MedXAILib.explainer import Question
from MedXAILib.trust.finding import Finding, Light, light
from MedXAILib.trust.judged import Judged
from MedXAILib.trust.likeness import correlation, extent

Stage = str | Sequence[str]
"""Modules, by their names in the network, that are re-drawn together with all that is in them."""

TITLE = "Does it depend on what the network learnt?"
DRAWS = 3
"""How often the upper third is re-drawn: of the demo network a single draw strays by 0.2 for maps as coarse as CAMs."""

# Half-way from chance (0, the gradients of two untrained networks) to an edge detector (1) is where docs/sanity.md lets
# a method fail, by the mean of many maps. This is one map and few draws, which stray by 0.1 or so: what is clearly
# beyond is poor.
_GOOD, _FAIR = 0.5, 0.8


def judge(judged: Judged) -> Finding:
    """How alike (Pearson, sign aside) the map stays in its own box when the upper third of the layers is re-drawn: the
    mean of `DRAWS` draws.

    When only the head is new, it is right that the map stays where the evidence is and changes its sign. Therefore the
    sign does not count, and the third is two layers at least.

    Raises:
        MedXAIError: when the network cannot be re-drawn.
    """
    made, own = judged.explanation.provenance, judged.explanation.data
    box = extent(own)
    if box is None:
        return _finding("The map is the same everywhere: there is nothing in it that could change.", None, {})
    with judged.asked() as (question, _):
        parts, x = layers(question), question.x
        alike = judged.model
        if "layers" in made.parameters and not made.parameters["layers"]:
            # Which layer suits a map is for the trained network to say.
            with torch.enable_grad():
                alike = alike.with_network(alike.network)
                alike.layers = (suggest_layer(question),)
    upper = upper_third(parts)
    found = [
        abs(correlation(own[box], judged.again(model=alike.with_network(network), target=judged.settled).data[box]))
        for network in scrambled(judged.model.network, upper, x, made.seed)
    ]
    colour = light(mean(found), _GOOD, _FAIR)
    when = f"({mean(found):.2f} alike) when the upper third of the network's weights was scrambled"
    sentence = {
        "good": f"The map changed {when}: it depends on what the network learnt.",
        "fair": f"The map changed only in part {when}: read it with caution.",
        "poor": f"The map barely changed {when}: do not read it as evidence.",
    }[colour]
    values = {"likeness": mean(found), "lowest": min(found), "highest": max(found)}
    return _finding(sentence, colour, {**values, "layers": len(parts), "scrambled": len(upper)})


def upper_third(parts: Sequence[tuple[str, ...]]) -> Sequence[tuple[str, ...]]:
    """Of the layers of a network from the output back; two at least, or only its head would be new."""
    return parts[: max(2, math.ceil(len(parts) / 3))]


def scrambled(network: nn.Module, parts: Sequence[tuple[str, ...]], x: Tensor, seed: int) -> Iterator[nn.Module]:
    """`DRAWS` copies of `network` of which `parts` have forgotten what they learnt; see `cascade`."""
    stage = [name for part in parts for name in part]
    for draw in range(DRAWS):
        yield from cascade(network, [stage], x, seed * DRAWS + draw)


def layers(question: Question) -> list[tuple[str, ...]]:
    """The layers that the target depends on, in order of use from the output back. Each comes with what has only
    vectors for parameters (normalisations, PReLU) and is used between it and the next.

    Raises:
        MedXAIError: when there is none, or what is in it cannot be re-drawn.
    """
    network = question.model.network
    _check(network)
    own = {
        name: [parameter for parameter in module.parameters(recurse=False) if parameter.is_floating_point()]
        for name, module in network.named_modules()
    }
    used: list[str] = []
    handles = [
        # When a module begins: what is in it is nearer to the output than its own parameters.
        network.get_submodule(name).register_forward_pre_hook(lambda _m, _i, name=name: used.append(name))
        for name, parameters in own.items()
        if parameters
    ]
    everything = [parameter for parameters in own.values() for parameter in parameters]
    try:
        for parameter in everything:
            parameter.requires_grad_(True)
        with torch.enable_grad():
            value = question.values(question.x)[0].sum()
        if value.requires_grad:
            gradients = torch.autograd.grad(value, everything, allow_unused=True)
            needed = {id(p) for p, gradient in zip(everything, gradients, strict=True) if gradient is not None}
        else:
            needed = set(map(id, everything))
    finally:
        for parameter in everything:
            parameter.requires_grad_(False)
        for handle in handles:
            handle.remove()
    found: list[tuple[str, ...]] = []
    waiting: tuple[str, ...] = ()
    for name in dict.fromkeys(reversed(used)):
        if not needed.isdisjoint(map(id, own[name])):
            waiting = (*waiting, name)
            if any(parameter.ndim > 1 for parameter in own[name]):
                found.append(waiting)
                waiting = ()
    found += [waiting] if waiting else []
    if not found:
        raise MedXAIError(
            f"{question.model.name} has no layer whose weights could be re-drawn: there is nothing learnt."
        )
    return found


def cascade(network: nn.Module, stages: Sequence[Stage], x: Tensor, seed: int) -> Iterator[nn.Module]:
    """Copies of `network` of which the first one, two, … of `stages` have weights as before any training.

    Each stage has a seed of its own, made of `seed` and its place. Batch normalisation, which is nothing without
    statistics, takes those of `x` (N, C, *spatial), as the first step of a training would. `network` itself is not
    among them: a mean with it would make every method look better.

    Raises:
        MedXAIError: when its weights cannot be re-drawn.
    """
    drawn = _copy(network)
    for i, stage in enumerate(stages):
        _redraw(drawn, stage, 1000 * seed + i)
        yield with_statistics(drawn, stages[: i + 1], x)


def independent(network: nn.Module, stages: Sequence[Stage], x: Tensor, seed: int) -> Iterator[nn.Module]:
    """As `cascade`, but each copy has only one of `stages` re-drawn."""
    for i, stage in enumerate(stages):
        drawn = _copy(network)
        _redraw(drawn, stage, 1000 * seed + i)
        yield with_statistics(drawn, [stage], x)


def with_statistics(network: nn.Module, stages: Sequence[Stage], x: Tensor) -> nn.Module:
    """A copy of `network`, where `x` is, in which the batch normalisations of `stages` have the statistics of `x`."""
    network = deepcopy(network).to(x.device)
    handles = []
    for stage in stages:
        for module in _modules(network, stage):
            if isinstance(module, _BatchNorm):
                module.momentum = 1.0
                handles.append(module.register_forward_pre_hook(_learn))
    with torch.no_grad():
        network(x)
    for handle in handles:
        handle.remove()
    return network.eval()


def _learn(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
    # A single value per channel, as that of one scan after pooling, has no statistics.
    module.train(inputs[0].numel() > inputs[0].shape[1])


def _copy(network: nn.Module) -> nn.Module:
    """To be re-drawn: on the CPU, so that every device has the same weights."""
    _check(network)
    try:
        return deepcopy(network).cpu().eval()
    except RuntimeError as error:
        reason = str(error).strip().splitlines()[0]
        raise MedXAIError(f"{type(network).__name__} cannot be copied to scramble its weights: {reason}") from error


def _check(network: nn.Module) -> None:
    name = type(network).__name__
    if isinstance(network, torch.jit.ScriptModule):
        raise MedXAIError(
            f"{name} is TorchScript, whose layers do not say how they were drawn before the training: load it as a "
            "MONAI bundle or from Python code."
        )
    if not any(hasattr(module, "reset_parameters") for module in network.modules()):
        raise MedXAIError(f"No layer of {name} says how it was drawn before the training: give it a reset_parameters.")


def _redraw(network: nn.Module, stage: Stage, seed: int) -> None:
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.default_generator.manual_seed(seed)
        for module in _modules(network, stage):
            before = [(parameter, parameter.clone()) for parameter in module.parameters(recurse=False)]
            reset = getattr(module, "reset_parameters", None)
            if reset is not None:
                reset()
            for parameter, old in before:
                # What nobody resets, such as the embeddings of positions.
                if parameter.is_floating_point() and torch.equal(parameter, old):
                    parameter.normal_(float(old.mean()), float(old.std(correction=0)))


def _modules(network: nn.Module, stage: Stage) -> Iterator[nn.Module]:
    for name in [stage] if isinstance(stage, str) else stage:
        yield from network.get_submodule(name).modules()


def _finding(sentence: str, colour: Light | None, values: dict[str, float]) -> Finding:
    return Finding("randomisation", TITLE, sentence, colour, values)
