"""A saliency map of given values, whose provenance says nothing that a test does not ask for."""

from __future__ import annotations

import numpy as np
import torch

from MedXAILib.explanation import Provenance, SaliencyMap


def saliency(data: torch.Tensor, affine: np.ndarray, signed: bool = False, **made: object) -> SaliencyMap:
    """`made` says what is told of how it was made."""
    known = {
        "method": "gradcam",
        "parameters": {},
        "target": {},
        "target_label": "marker",
        "model": {"name": "network", "task": "classification"},
        "volume": {"source": "scan.nrrd"},
        "versions": {},
        "seed": 0,
        "device": "cpu",
        "created": "2026-01-01",
        "seconds": 1.0,
        "peak_memory": 0,
        "forwards": 1,
        "backwards": 1,
    }
    return SaliencyMap(Provenance(**{**known, **made}), {}, data.float(), affine, signed)
