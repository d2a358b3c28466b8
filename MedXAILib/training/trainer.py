"""One plain training loop: reproducible, stoppable, resumable."""

from __future__ import annotations

import math
import os
from collections import deque
from collections.abc import Callable, Generator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from MedXAILib.errors import MedXAIError
from MedXAILib.model import available
from MedXAILib.run import Run
from MedXAILib.synthetic.lung_nodules import Backgrounds, synthesise
from MedXAILib.training.table import Patches, Table

_VALIDATION_SEED = 1
_WARM_UP = 0.2
_AHEAD = min(4, max(1, (os.cpu_count() or 1) // 2))
"""Batches in the making while the network learns from another."""


@dataclass(frozen=True)
class Recipe:
    """How a demo network comes about.

    `network()` builds it; `loss(network, batch)` is minimised; `measure(network, batch)` gives named numbers of which
    `score` chooses the epoch whose weights are kept; `real(network, backgrounds)` does so for the scan's own lesion;
    `publish(network, metrics, folder)` writes the bundle.
    A batch is what `synthesise(backgrounds, count, seed)` makes, with `borderline=True` for a harder test; several
    threads call it at once. Every one is fresh, so an epoch is only the distance between two validations. `examine`
    makes the test, where that is of something else than what the network learns from. `repeat(backgrounds, count,
    seed)` makes the batches, of the same few patches, where fresh ones take too long. When the training is over, and
    the best weights are back, `project(network, batches)` is called with the batches of its first epoch, then
    `finish(network, batch)` with the patches of the validation. `own(recipe, table)` is it for a person's own data, if
    it can be (see `MedXAILib.training.table`).
    """

    name: str
    network: Callable[[], Any]
    loss: Callable[[Any, Any], Tensor]
    measure: Callable[[Any, Any], dict[str, float]]
    real: Callable[[Any, Backgrounds], dict[str, float]]
    score: str
    publish: Callable[[Any, dict[str, float], Path], None]
    epochs: int
    steps: int
    own: Callable[[Recipe, Table], Recipe] | None = None
    synthesise: Callable[..., Any] = synthesise
    examine: Callable[..., Any] | None = None
    repeat: Callable[..., Any] | None = None
    project: Callable[[Any, Any], None] | None = None
    finish: Callable[[Any, Any], None] | None = None
    batch: int = 30
    learning_rate: float = 3e-3
    patience: int = 8
    validation: int = 300
    test: int = 450

    def smoke(self) -> Recipe:
        """The same in seconds: what it yields is no good, but it is all there."""
        return replace(self, epochs=2, steps=5, batch=6, validation=12, test=min(12, self.test // 10))


def fit(
    recipe: Recipe,
    data: Backgrounds | Patches,
    checkpoint: Path,
    run: Run,
    held_out: Any = None,
    source: str = "one chest CT",
) -> nn.Module:
    """Train on what `recipe.synthesise` makes of `data`, validating with `held_out`, or with more of the same; the
    weights of the best validation are returned, on the run's device. `source` tells one set of data from others.

    After every epoch all that is needed to go on is in `checkpoint`. When it is there at the start, training goes on
    from it and ends with the same weights as if it had never been interrupted.

    Raises:
        Cancelled: when the person asked to stop.
        MedXAIError: when `checkpoint` is damaged or belongs to another training, or `held_out` cannot tell good weights
            from bad.
    """
    device = available(run.device or "cpu")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(run.seed)
        network = recipe.network().to(device)
    optimiser = torch.optim.AdamW(network.parameters(), weight_decay=0.02)
    if held_out is None:
        held_out = recipe.synthesise(data, recipe.validation, _VALIDATION_SEED)
    identity = f"{recipe.name}, seed {run.seed}, {recipe.epochs} x {recipe.steps} x {recipe.batch}, {source}"
    epoch, best_epoch, best = 0, 0, -math.inf
    weights = _weights(network)
    if checkpoint.exists():
        try:
            state = torch.load(checkpoint, map_location=device, weights_only=True)
        except Exception as error:
            raise MedXAIError(f"'{checkpoint}' is damaged: delete it to begin anew.") from error
        if state["identity"] != identity:
            raise MedXAIError(f"'{checkpoint}' is of another training ({state['identity']}): delete it to begin anew.")
        network.load_state_dict(state["network"])
        optimiser.load_state_dict(state["optimiser"])
        epoch, best_epoch, best, weights = state["epoch"], state["best_epoch"], state["best"], state["weights"]
    total = recipe.epochs * recipe.steps

    def batch(step: int) -> Any:
        return (recipe.repeat or recipe.synthesise)(data, recipe.batch, _step_seed(run, step))

    devices = [device] if device.type == "cuda" else []
    steps = range(epoch * recipe.steps, total)
    with closing(_ahead(batch, steps)) as batches, torch.random.fork_rng(devices=devices):
        while epoch < recipe.epochs and epoch - best_epoch < recipe.patience:
            for step in range(epoch * recipe.steps, (epoch + 1) * recipe.steps):
                run.step(step, total, f"Training {recipe.name}")
                patches = next(batches)
                for group in optimiser.param_groups:
                    group["lr"] = recipe.learning_rate * _one_cycle(step / total)
                # Interrupted or not, dropout drops the same.
                torch.manual_seed(_step_seed(run, step))
                network.train()
                optimiser.zero_grad()
                recipe.loss(network, patches).backward()
                optimiser.step()
            epoch += 1
            network.eval()
            score = recipe.measure(network, held_out).get(recipe.score, math.nan)
            if math.isnan(score) and best_epoch == 0:
                raise MedXAIError(f"The validation says nothing of '{recipe.score}': give it cases of every kind.")
            if score > best:
                best, best_epoch, weights = score, epoch, _weights(network)
            state = {
                "identity": identity,
                "network": network.state_dict(),
                "optimiser": optimiser.state_dict(),
                "epoch": epoch,
                "best_epoch": best_epoch,
                "best": best,
                "weights": weights,
            }
            _save(state, checkpoint)
    network.load_state_dict(weights)
    network.eval()
    if recipe.project is not None:
        recipe.project(network, map(batch, range(recipe.steps)))
    if recipe.finish is not None:
        recipe.finish(network, held_out)
    return network


def _ahead(make: Callable[[int], Any], steps: range) -> Generator[Any, None, None]:
    """`make(step)` for each of `steps`, in their order, made in threads before they are asked for."""
    with ThreadPoolExecutor(_AHEAD) as threads:
        coming: deque[Future[Any]] = deque()
        for step in steps:
            coming.append(threads.submit(make, step))
            if len(coming) > _AHEAD:
                yield coming.popleft().result()
        while coming:
            yield coming.popleft().result()


def _step_seed(run: Run, step: int) -> int:
    return (run.seed + 1) * 1_000_000 + step


def _weights(network: nn.Module) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in network.state_dict().items()}


def _one_cycle(done: float) -> float:
    """The learning rate's share of its peak: a linear rise, then half a cosine down (Smith and Topin 2018)."""
    if done < _WARM_UP:
        return 0.05 + 0.95 * done / _WARM_UP
    return 0.5 * (1 + math.cos(math.pi * (done - _WARM_UP) / (1 - _WARM_UP)))


def _save(state: dict[str, object], path: Path) -> None:
    beside = path.with_name(path.name + ".part")
    torch.save(state, beside)
    beside.replace(path)
