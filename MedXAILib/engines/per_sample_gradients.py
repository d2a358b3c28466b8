"""The gradient of each sample of a batch by itself with respect to all parameters of a network, whatever its layers."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap

from MedXAILib.errors import MedXAIError
from MedXAILib.model import Model
from MedXAILib.run import Run, out_of_memory

Measure = Callable[[Tensor, Tensor], Tensor]
"""From the output of one sample (1, ...) and what is given for it (...) to one number."""


def per_sample_gradients(model: Model, x: Tensor, given: Tensor, measure: Measure, run: Run) -> Tensor:
    """The gradients (N, D) of `measure` for samples `x` (N, C, *spatial), each with its `given` (N, ...), with respect
    to the D numbers that the parameters of `model` hold, in their order.

    The network has to be in evaluation mode (see `Model.ready`): in training, samples change each other. All at once,
    or one by one where the network does not allow for it, which the run's notes say.

    Raises:
        MedXAIError: when the network is not differentiable.
    """
    asked = _Asked(model)
    parameters = {name: p.detach() for name, p in asked.named_parameters() if p.is_floating_point()}

    def of_one(parameters: dict[str, Tensor], sample: Tensor, given: Tensor) -> Tensor:
        # A network may begin with what works in place, and the samples are to stay as they are.
        return measure(functional_call(asked, parameters, (sample[None].clone(),)), given)

    alone = grad(of_one)
    run.cost.forwards += len(x)
    run.cost.backwards += len(x)
    try:
        found = vmap(alone, (None, 0, 0))(parameters, x, given)
    except (RuntimeError, MedXAIError, ValueError) as error:
        if out_of_memory(error):
            raise
        run.note(f"The gradients of {model.name} were computed one sample at a time: it does not allow for several.")
        each = [alone(parameters, *one) for one in zip(x, given, strict=True)]
        found = {name: torch.stack([one[name] for one in each]) for name in parameters}
    return torch.cat([gradient.flatten(1) for gradient in found.values()], dim=1)


class _Asked(nn.Module):
    """A model as a module, so that it can be asked with other parameters."""

    def __init__(self, model: Model) -> None:
        super().__init__()
        self.network, self.forward = model.network, model.forward
