"""The small classifier of lung patches, with attention in the place of pooling."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from MedXAILib.networks.attention_gate import AttentionGate
from MedXAILib.networks.lung_nodule import AttributeHead, LungNoduleClassifier, block


class AttentionClassifier(LungNoduleClassifier):
    """Image (N, 1, D, H, W), at least 24 voxels a side -> class logits (N, classes).

    `fine` attends to what `stem` and the first half of `texture` see at stride 2, `coarse` to the evidence at stride 4;
    `context`, at stride 8, is the gating signal of both. The heads are linear in what is attended to and see nothing
    else, so what has no attention has no influence on a score but by where the attention goes.
    Unit i of `fine` is centred at voxel 2 i + 0.5, of `coarse` at 4 i + 1.5.
    """

    def __init__(self, classes: int = 3, attributes: int = 7, width: int = 16) -> None:
        super().__init__(classes, attributes, width)
        self.context = nn.Sequential(nn.MaxPool3d(2), block(4 * width, 2 * width))
        self.fine = AttentionGate(width, 2 * width, width)
        self.coarse = AttentionGate(4 * width, 2 * width, 2 * width)
        self.class_head = nn.Linear(5 * width, classes)
        self.attribute_head = AttributeHead(5 * width, attributes)

    def features(self, image: Tensor) -> Tensor:
        """What both heads see, (N, 5 * width): the fine, then the coarse features, as much as they are attended to."""
        texture, pooling = self.texture
        fine = texture(self.stem(image))
        evidence = self.evidence(self.shape(pooling(fine)), F.avg_pool3d(image, 4))
        signal = self.context(evidence)
        attended = self.fine(fine, signal), self.coarse(evidence, signal)
        return torch.cat([features.sum((2, 3, 4)) for features in attended], dim=1)
