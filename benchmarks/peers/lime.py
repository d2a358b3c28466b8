"""lime."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from lime.lime_image import LimeImageExplainer
from torch import Tensor, nn

from benchmarks.cases import cubes
from benchmarks.peers import Peer


class LIME(Peer):
    """LimeImageExplainer, given the scan (D, H, W) and a segmentation of it into cubes of `size` voxels, all of them in
    the result; the same draws each time. `setting` as lime calls it."""

    def __init__(self, network: nn.Module, layer: str, classes: Sequence[int], size: int, **setting: Any) -> None:
        super().__init__(network, layer, classes)
        self.size, self.setting = size, setting

    def __call__(self, x: Tensor) -> Tensor:
        segments = cubes(x, self.size)[0, 0]
        made = LimeImageExplainer(random_state=0).explain_instance(
            x[0, 0].numpy(),
            self._scores,
            labels=self.classes,
            top_labels=None,
            num_features=int(segments.max()) + 1,
            segmentation_fn=lambda _: segments.numpy(),
            **self.setting,
        )
        values = torch.zeros(int(segments.max()) + 1)
        for cube, value in made.local_exp[self.classes[0]]:
            values[cube] = value
        return values[segments][None, None]

    def _scores(self, images: np.ndarray) -> np.ndarray:
        with torch.inference_mode():
            return self.network(torch.from_numpy(images)[:, None]).numpy()
