"""One file per package, one class per method: how a knowledgeable person would call it.

A class is made with (network, layer, classes, **setting) and called with x (1, C, D, H, W); it gives the maps of
`classes` as (classes, 1, *any). Each class has a network of its own, so what one leaves behind does not reach the next.
"""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from importlib import metadata
from typing import Any

from torch import Tensor, nn


class Peer:
    """A method of a package, ready to explain `classes` of `network`."""

    def __init__(self, network: nn.Module, layer: str, classes: Sequence[int]) -> None:
        self.network, self.layer, self.classes = network, layer, list(classes)

    def __call__(self, x: Tensor) -> Tensor:
        """The maps of `x`."""
        raise NotImplementedError

    def expected(self, right: Tensor, size: Sequence[int]) -> Tensor:
        """What it gives when it computes the `right` maps, and does to them what it always does (stretch, rescale)."""
        return right


def make(
    package: str, method: str, network: nn.Module, layer: str, classes: Sequence[int], setting: dict[str, Any]
) -> Any:
    """The class for `method` in the file of `package`, made ready.

    Raises:
        ImportError: when the package is not installed.
    """
    return getattr(importlib.import_module(f"benchmarks.peers.{package}"), method)(network, layer, classes, **setting)


def version(distribution: str) -> str | None:
    """The installed version, or None."""
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None
