"""Networks that draw what they have seen again from a few numbers: variational autoencoders of nodules.

Kingma and Welling, "Auto-encoding variational Bayes", 2014; Pati and Lerch, "Attribute-based regularization of latent
spaces for variational auto-encoders", 2021, for numbers that have a name.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional

from MedXAILib.networks.lung_nodule import LungNoduleClassifier, block

SIZE = 32
"""Voxels along each side of what is drawn."""
_WHOLE, _NOTHING = 13.0, 16.0
"""Voxels from the middle up to which all of it counts, and beyond which nothing does."""
_LEAST = 1e-3


class Autoencoder(nn.Module):
    """Image (N, 1, 32, 32, 32) in 0..1 -> the same, drawn from its codes (N, K), which are about standard normal.

    `names` are those of the first codes; where it is that of an attribute, more of one is more of the other. The
    buffers say what the codes of the training were: their mean `typical` (K,), `whitening` (K, K), with which they are
    uncorrelated and of spread 1, `reading` (A, K) and `offset` (A,), which read `attributes` off them, and `limits`:
    the distance from `typical` and the mean absolute error in the window beyond which 1 % of new images of the
    training's patient lie. `places` (M, 2) and `kinds` (M,) are cases on a map, if the network has one, and what of
    `classes` they are.
    """

    typical: Tensor
    whitening: Tensor
    reading: Tensor
    offset: Tensor
    limits: Tensor
    places: Tensor
    kinds: Tensor
    window: Tensor

    def __init__(
        self, latent: int, names: Sequence[str], attributes: Sequence[str], classes: Sequence[str], cases: int = 0
    ) -> None:
        super().__init__()
        self.names, self.attributes, self.classes = tuple(names), tuple(attributes), tuple(classes)
        self.register_buffer("typical", torch.zeros(latent))
        self.register_buffer("whitening", torch.eye(latent))
        self.register_buffer("reading", torch.zeros(len(attributes), latent))
        self.register_buffer("offset", torch.zeros(len(attributes)))
        self.register_buffer("limits", torch.full((2,), torch.inf))
        self.register_buffer("places", torch.zeros(cases, 2))
        self.register_buffer("kinds", torch.zeros(cases, dtype=torch.long))
        axis = (torch.arange(SIZE) - (SIZE - 1) / 2).square()
        away = (axis[:, None, None] + axis[:, None] + axis).sqrt()
        self.register_buffer("window", ((_NOTHING - away) / (_NOTHING - _WHOLE)).clamp(0, 1), persistent=False)

    @abstractmethod
    def encode(self, image: Tensor) -> Tensor:
        """The most likely codes (N, K) of images (N, 1, 32, 32, 32)."""

    @abstractmethod
    def decode(self, codes: Tensor) -> Tensor:
        """The images (N, 1, 32, 32, 32) of codes (N, K)."""

    def forward(self, image: Tensor) -> Tensor:
        return self.decode(self.encode(image))

    def changed(self, image: Tensor, start: Tensor, codes: Tensor) -> Tensor:
        """`image` (N, 1, 32, 32, 32) of codes `start` (N, K) as it would look with other `codes`, in 0..1.

        What the codes do not tell of it stays as it is where nothing changes. Of what is taken away it goes with it, as
        a spike goes with its nodule, and where there is more it is covered, each in proportion.
        """
        before, after = self.decode(start), self.decode(codes)
        off = after - before
        share = torch.where(off < 0, image / before.clamp_min(_LEAST), (1 - image) / (1 - before).clamp_min(_LEAST))
        return (image + off * share * self.window).clamp(0, 1)

    def place(self, codes: Tensor) -> Tensor:
        """Where codes (N, K) are on the map of all cases, (N, 2)."""
        return codes[:, :2]

    def distance(self, codes: Tensor) -> Tensor:
        """How far codes (N, K) are from those of the training (Mahalanobis), (N,)."""
        return ((codes - self.typical) @ self.whitening).norm(dim=1)

    def read(self, codes: Tensor) -> Tensor:
        """The `attributes` (N, A) that codes (N, K) speak of, in their units."""
        return codes @ self.reading.T + self.offset

    def error(self, image: Tensor, drawn: Tensor) -> Tensor:
        """The mean absolute difference of two images (N, 1, 32, 32, 32) in the window, (N,)."""
        return ((image - drawn).abs() * self.window).flatten(1).sum(1) / self.window.sum()


class VAE(Autoencoder):
    """A variational autoencoder: the encoder gives each code a mean and a variance."""

    def __init__(
        self,
        latent: int = 16,
        names: Sequence[str] = (),
        attributes: Sequence[str] = (),
        classes: Sequence[str] = (),
        width: int = 16,
    ) -> None:
        super().__init__(latent, names, attributes, classes)
        self.encoder = Encoder(2 * latent, 12)
        self.decoder = Decoder(latent, width)

    def posterior(self, image: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and logarithm of the variance of the codes, (N, K) each."""
        mean, log_variance = self.encoder(image).chunk(2, dim=1)
        return mean, log_variance.clamp(-8, 2)

    def encode(self, image: Tensor) -> Tensor:
        return self.posterior(image)[0]

    def decode(self, codes: Tensor) -> Tensor:
        drawn: Tensor = self.decoder(codes)
        return drawn


class Encoder(nn.Module):
    """Image (N, 1, 32, 32, 32) -> numbers (N, outputs). It sees by the `trunk` of a classifier, which is fixed."""

    def __init__(self, outputs: int, width: int) -> None:
        super().__init__()
        self.trunk = LungNoduleClassifier(1, 0)
        self.trunk.class_head = self.trunk.attribute_head = nn.Identity()  # type: ignore[assignment]
        self.trunk.requires_grad_(False)
        self.where = nn.Sequential(nn.Conv3d(48, width, 3, stride=2, padding=1), nn.ReLU(), nn.Flatten())
        self.told = nn.Linear(64 * width + 128, outputs)

    def train(self, mode: bool = True) -> Encoder:
        super().train(mode)
        self.trunk.eval()
        return self

    def forward(self, image: Tensor) -> Tensor:
        trunk = self.trunk
        with torch.no_grad():
            shape = trunk.shape(trunk.texture(trunk.stem(image)))
            evidence = trunk.evidence(shape, functional.avg_pool3d(image, 4))
        features = [self.where(shape), evidence.mean((2, 3, 4)), evidence.amax((2, 3, 4))]
        told: Tensor = self.told(torch.cat(features, dim=1))
        return told


class Decoder(nn.Sequential):
    """Numbers (N, inputs) -> image (N, 1, 32, 32, 32) in 0..1."""

    def __init__(self, inputs: int, width: int) -> None:
        super().__init__(
            nn.Linear(inputs, 64 * 24),
            nn.ReLU(),
            nn.Unflatten(1, (24, 4, 4, 4)),
            _larger(24, 2 * width),
            block(2 * width, 2 * width),
            _larger(2 * width, width),
            block(width, width),
            nn.ConvTranspose3d(width, 1, 4, stride=2, padding=1),
            nn.Sigmoid(),
        )


def _larger(inputs: int, outputs: int) -> nn.Sequential:
    return nn.Sequential(
        nn.ConvTranspose3d(inputs, outputs, 4, stride=2, padding=1, bias=False),
        nn.BatchNorm3d(outputs),
        nn.ReLU(inplace=True),
    )
