"""The scan as it would be if a region of it were something else."""

from __future__ import annotations

from typing import Any

import torch

from MedXAILib.engines.boxes import put
from MedXAILib.engines.perturbation import changed
from MedXAILib.explainer import Question
from MedXAILib.infills.choice import infill
from MedXAILib.model import Model
from MedXAILib.region import Region
from MedXAILib.registry import make
from MedXAILib.run import Run
from MedXAILib.visual.counterfactual_infill import CounterfactualInfill, replaced
from MedXAILib.volume import Volume


def what_if(
    model: Model,
    volume: Volume,
    within: Any,
    region: Region | None = None,
    run: Run | None = None,
    **parameters: Any,
) -> Volume:
    """What `model` would see if what is `within` a mask or box were replaced, on its own grid and preprocessed: what
    `counterfactual_infill`, whose `parameters` these are, asks about in its first draw.

    Raises:
        MedXAIError: when there is nothing to replace there, or a parameter is not possible.
    """
    asked = make(CounterfactualInfill.id, {"within": within, **parameters})
    assert isinstance(asked, CounterfactualInfill)
    run = run if run is not None else Run()
    with model.ready(run.device) as device, torch.no_grad():
        seen = model.prepare(volume, region)
        question = Question(model, seen.x[None].to(device, model.dtype), [seen], [], run)
        masks = replaced(question, asked.within, asked.margin)
        instead = infill(question, asked.infill)
        x = question.x.clone()
        put(x, torch.zeros_like(masks.low), changed(x, masks, instead, [0]), masks.low)
    return Volume(x[0].cpu(), seen.affine)
