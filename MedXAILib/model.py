"""A network plus all that makes it usable: preprocessing, task, class names, where its layers are."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import torch
from monai.data import MetaTensor
from torch import Tensor, nn

from MedXAILib.errors import MedXAIError, unknown
from MedXAILib.generator import External, decoder, spoken
from MedXAILib.grid import from_4x4, resample, to_4x4
from MedXAILib.region import Region, cut
from MedXAILib.run import Precision, out_of_memory
from MedXAILib.tokens import written
from MedXAILib.volume import Volume
from MedXAILib.window import Window

Task = Literal["classification", "multilabel", "ordinal", "regression", "segmentation", "embedding", "captioning"]

Source = str | Path | Callable[[], Any]
"""What `load_model` makes a model of."""

_CONVOLUTIONS: dict[type, int] = {nn.Conv1d: 1, nn.Conv2d: 2, nn.Conv3d: 3}


@dataclass(frozen=True, eq=False)
class Prepared:
    """What the network sees of a volume: `x` (C, *spatial) and the affine of its grid (array index to RAS mm)."""

    x: Tensor
    affine: np.ndarray

    @property
    def spacing(self) -> tuple[float, ...]:
        """Distance between neighbouring voxels along the spatial axes of `x`, in mm."""
        return tuple(float(s) for s in np.linalg.norm(self.affine[:-1, :-1], axis=0))


@dataclass(frozen=True, eq=False)
class Prediction:
    """What the network says: `scores` by class (probabilities, values for regression, mL for labels), `labels` for a
    segmentation, on the volume's own grid, and `text` for a caption."""

    output: Tensor
    scores: dict[str, float]
    labels: Volume | None = None
    text: str = ""


@dataclass(eq=False)
class Model:
    """A network in memory, ready to be asked and explained.

    Args:
        network: any PyTorch module from (N, C, D, H, W), or (N, C, H, W), to class scores (N, K), values (N, K),
            or a label image (N, K, D, H, W). It is never modified.
        task: what the output means.
        class_names: the names of the K outputs.
        preprocessing: from a MONAI MetaTensor (C, X, Y, Z), as MONAI's LoadImage gives it, to the network's input;
            spatial transforms must keep the affine up to date, as MONAI's do.
        patch_size: the voxels a patch network looks at; None when it takes a whole volume.
        window: how a network that segments patches takes a whole volume all the same, when it is not told where to
            look.
        output: the key of the output to use when the network returns a dictionary (a tuple: its first item).
        layers: good layers for class activation maps, best first; found by itself when empty.
        channels: input channels, and `spatial_dims`: 2 or 3; both read from the first convolution when left out.
        name, source: what to call it, and where it came from.
        retrained, permuted: the same network after other trainings, and after one on permuted labels, to be loaded.
    """

    network: nn.Module
    task: Task = "classification"
    class_names: Sequence[str] = ()
    preprocessing: Callable[[MetaTensor], Tensor] | None = None
    patch_size: Sequence[int] | None = None
    window: Window | None = None
    output: str | None = None
    layers: Sequence[str] = ()
    channels: int | None = None
    spatial_dims: int | None = None
    name: str = ""
    source: str | None = None
    retrained: Sequence[Source] = ()
    permuted: Source | None = None
    keeps_last: bool = field(default=False, init=False)
    """Whether to keep the last volume preprocessed, which the next question is often about: memory for time."""
    _kept: tuple[Any, Prepared] | None = field(default=None, init=False, repr=False)
    _precision: Precision | None = field(default=None, init=False, repr=False)
    _suggested: dict[Any, str] = field(default_factory=dict, init=False, repr=False)
    _hashed: tuple[Any, str] | None = field(default=None, init=False, repr=False)

    def __post_init__(self) -> None:
        if not isinstance(self.network, nn.Module):
            raise MedXAIError(f"A network is a torch.nn.Module, not {type(self.network).__name__}: wrap it in one.")
        if self.task not in get_args(Task):
            raise unknown("task", self.task, get_args(Task))
        first = next((m for m in self.network.modules() if type(m) in _CONVOLUTIONS), None)
        if self.spatial_dims is None:
            self.spatial_dims = _CONVOLUTIONS[type(first)] if first is not None else 3
        if self.channels is None and first is not None:
            self.channels = int(first.in_channels)  # type: ignore[arg-type]
        self.class_names = tuple(self.class_names)
        self.name = self.name or type(self.network).__name__

    @property
    def scripted(self) -> bool:
        """Whether it is TorchScript: its inside cannot be seen, so layer methods cannot be used."""
        return isinstance(self.network, torch.jit.ScriptModule)

    @property
    def device(self) -> torch.device:
        """Where the network's parameters are."""
        return next((p.device for p in self.network.parameters()), torch.device("cpu"))

    @property
    def dtype(self) -> torch.dtype:
        """The precision of the network's parameters, which its input has to have."""
        return next((p.dtype for p in self.network.parameters() if p.is_floating_point()), torch.float32)

    @property
    def fingerprint(self) -> str:
        """A hash of the network's class and of every parameter and buffer."""
        state = self.network.state_dict()
        key = tuple((name, value.data_ptr(), value._version) for name, value in state.items())
        if self._hashed is None or self._hashed[0] != key:
            digest = hashlib.sha256(type(self.network).__name__.encode())
            for name, value in state.items():
                digest.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
                digest.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
            self._hashed = key, digest.hexdigest()[:32]
        return self._hashed[1]

    def layer(self, name: str) -> nn.Module:
        """The layer called `name`, as in `network.named_modules()`.

        Raises:
            MedXAIError: when there is none, naming the nearest; and for TorchScript.
        """
        if self.scripted:
            raise MedXAIError(
                f"{self.name} is TorchScript, whose layers cannot be reached: load it as a MONAI bundle or from Python "
                "code, or use a method that needs no layer (gradient, integrated_gradients)."
            )
        modules = dict(self.network.named_modules())
        if not name or name not in modules:
            raise unknown("layer", name, [n for n in modules if n])
        return modules[name]

    def classes(self, outputs: int) -> Sequence[str]:
        """The names of what so many `outputs` tell apart: of a single one with a single name, that it is not so, and
        that it is."""
        names = tuple(self.class_names)
        return (f"not {names[0]}", names[0]) if outputs == 1 and len(names) == 1 else names

    def class_index(self, which: str | int, count: int, outputs: int = 0) -> int:
        """Which of `count` classes a name or index means; of a network of so many `outputs`, see `classes`.

        Raises:
            MedXAIError: when there is no such class, naming the nearest.
        """
        names = self.classes(outputs)
        if isinstance(which, str) and which in names:
            return names.index(which)
        if isinstance(which, str):
            raise unknown("class", which, names or map(str, range(count)))
        if not 0 <= which < count:
            raise MedXAIError(f"There is no class {which}: {self.name} has {count}, counted from 0.")
        return which

    def class_name(self, index: int, outputs: int = 0) -> str:
        """The name of class `index`, or its number when it has none; see `classes`."""
        names = self.classes(outputs)
        return names[index] if index < len(names) else str(index)

    @property
    def takes_whole(self) -> bool:
        """Whether it takes a whole scan, however large that is."""
        return self.patch_size is None or (self.window is not None and self.task == "segmentation")

    def slides(self, shape: Sequence[int]) -> bool:
        """Whether the network looks at an input of `shape` (*spatial) window by window."""
        return self.window is not None and self.task == "segmentation" and self.window.slides(shape)

    def forward(self, x: Tensor) -> Tensor:
        """The network's output for (N, C, *spatial), as one tensor; of an input larger than its window, blended.

        Raises:
            MedXAIError: when the network cannot take this input or gives no tensor.
        """
        if self.window is not None and self.slides(x.shape[2:]):
            return self.window.blended(self._asked, x)
        return self._asked(x)

    def _asked(self, x: Tensor) -> Tensor:
        try:
            with self._autocast(x.device.type):
                y = self.network(x)
        except (RuntimeError, ValueError, AssertionError, IndexError) as error:
            if out_of_memory(error):
                raise
            wants = f" (it was made for patches of {tuple(self.patch_size)} voxels)" if self.patch_size else ""
            reason = str(error).strip().splitlines()[-1] if str(error).strip() else type(error).__name__
            raise MedXAIError(
                f"{self.name} cannot take an input of shape {tuple(x.shape)}{wants}: {reason[:200]}"
            ) from error
        if isinstance(y, dict):
            if self.output not in y:
                raise unknown("output", self.output, [str(k) for k in y])
            y = y[self.output]
        elif isinstance(y, (tuple, list)):
            y = y[0]
        if not isinstance(y, Tensor):
            raise MedXAIError(
                f"{self.name} returns {type(y).__name__}, not a tensor: wrap it so that it returns scores."
            )
        return y

    @contextmanager
    def ready(self, device: str | torch.device | None = None) -> Iterator[torch.device]:
        """The network in evaluation mode, parameters frozen, on `device`; all as it was before afterwards."""
        home = self.device
        there = available(device) if device is not None else home
        training = {module: module.training for module in self.network.modules()}
        learning = {parameter: parameter.requires_grad for parameter in self.network.parameters()}
        try:
            self.network.eval()
            for parameter in learning:
                parameter.requires_grad_(False)
            if there != home:
                self.network.to(there)
            # A caller's no_grad or inference_mode must not reach the explainers, which need gradients.
            with torch.inference_mode(False), torch.enable_grad():
                yield there
        finally:
            if there != home:
                self.network.to(home)
            for parameter, flag in learning.items():
                parameter.requires_grad_(flag)
            for module, flag in training.items():
                module.training = flag

    @contextmanager
    def computing_in(self, precision: Precision | None) -> Iterator[None]:
        """Inside, the network's costly operators work in `precision`; its parameters and input stay what they are."""
        before, self._precision = self._precision, precision
        try:
            yield
        finally:
            self._precision = before

    def _autocast(self, device: str) -> AbstractContextManager[object]:
        # Left alone unless asked for: a caller may have an autocast of their own.
        return nullcontext() if self._precision is None else torch.autocast(device, getattr(torch, self._precision))

    def preprocess(self, volume: Volume) -> Prepared:
        """The whole of `volume`, preprocessed."""
        if self.preprocessing is None:
            return Prepared(volume.data, volume.affine)
        rank = len(volume.shape)
        # MONAI's LoadImage gives arrays as (C, X, Y, Z).
        x = volume.data.permute(0, *range(rank, 0, -1)).contiguous()
        affine = to_4x4(volume.affine[:, [*reversed(range(rank)), rank]])
        y = self.preprocessing(MetaTensor(x, affine=torch.from_numpy(affine)))
        if not isinstance(y, MetaTensor):
            raise MedXAIError(f"The preprocessing of {self.name} lost the geometry: use MONAI's array transforms.")
        return Prepared(y.as_tensor().float(), from_4x4(y.affine.numpy(), rank))

    def prepare(self, volume: Volume, region: Region | None = None) -> Prepared:
        """The part of `volume` that the network looks at, preprocessed.

        Raises:
            MedXAIError: for voxels or channels it cannot take, and when a patch network is not told where to look.
        """
        volume.check()
        if len(volume.shape) != self.spatial_dims:
            raise MedXAIError(f"{self.name} takes {self.spatial_dims}-D volumes and this one is {len(volume.shape)}-D.")
        whole = self._whole(volume)
        x, affine = whole.x, whole.affine
        if self.channels is not None and x.shape[0] != self.channels:
            raise MedXAIError(
                f"{self.name} takes {self.channels} channel(s) and {volume.source or 'the volume'} has {x.shape[0]}: "
                "give one file per channel, in the order the network was trained on."
            )
        if region is not None:
            window = None if self.window is None else self.window.size(x.shape[1:])
            return Prepared(*cut(x, affine, region, self.patch_size or window))
        if self.slides(x.shape[1:]):
            return whole
        if self.patch_size is not None and any(s > p for s, p in zip(x.shape[1:], self.patch_size, strict=True)):
            size = " x ".join(f"{p * s:.0f}" for p, s in zip(self.patch_size, Prepared(x, affine).spacing, strict=True))
            raise MedXAIError(
                f"{self.name} looks at {size} mm and the scan is larger: say where with region=(x, y, z) in RAS mm."
            )
        return Prepared(x, affine)

    def _whole(self, volume: Volume) -> Prepared:
        if not self.keeps_last or self.preprocessing is None:
            return self.preprocess(volume)
        key = volume.fingerprint, self.preprocessing
        if self._kept is None or self._kept[0] != key:
            # Not two at a time.
            self._kept = None
            self._kept = key, self.preprocess(volume)
        return self._kept[1]

    def with_network(self, network: nn.Module) -> Model:
        """The same around another network that takes the same input; what is kept of the last volume serves both."""
        other = replace(self, network=network)
        other.keeps_last, other._kept = self.keeps_last, self._kept
        return other

    @contextmanager
    def keeping_last(self) -> Iterator[None]:
        """Inside, the last volume preprocessed is kept."""
        before, self.keeps_last = self.keeps_last, True
        try:
            yield
        finally:
            self.keeps_last = before
            if not before:
                self._kept = None

    def predict(self, volume: Volume, region: Region | None = None) -> Prediction:
        """What the network says about `volume` (see `prepare` for `region`)."""
        with self.ready() as device, torch.no_grad():
            prepared = self.prepare(volume, region)
            output = self.forward(prepared.x[None].to(device, self.dtype))
            text = self._text(volume, output) if self.task == "captioning" else ""
        output = output.float().cpu()
        outputs = output.shape[1] if output.ndim > 1 else 0
        if self.task == "segmentation":
            labels = output.argmax(1) if output.shape[1] > 1 else (output[:, 0] > 0).long()
            on_grid = Volume(
                resample(labels.float(), prepared.affine, volume.shape, volume.affine, nearest=True), volume.affine
            )
            counts = on_grid.data.flatten().long().bincount(minlength=max(2, output.shape[1])).tolist()
            voxel_ml = math.prod(on_grid.spacing) / 1000
            volumes = {self.class_name(i, outputs): n * voxel_ml for i, n in enumerate(counts)}
            return Prediction(output, volumes, on_grid)
        if self.task == "captioning":
            return Prediction(output, {}, text=text)
        values = self.probabilities(output)[0].flatten()
        sides = outputs if len(values) > outputs else 0
        return Prediction(output, {self.class_name(i, sides): float(v) for i, v in enumerate(values)})

    def _text(self, volume: Volume, output: Tensor) -> str:
        if isinstance(self.network, External):
            return written([token.text for token in self.network.generator.generate(volume)])[0]
        words = decoder(self.network, self.name)
        return written(spoken(words, words.beam(output)[0]))[0]

    def probabilities(self, output: Tensor) -> Tensor:
        """Scores (N, K, ...) as probabilities where the task has them; a single score becomes two classes."""
        if self.task in ("regression", "embedding"):
            return output
        if self.task in ("multilabel", "ordinal"):
            return output.sigmoid()
        if output.shape[1] == 1:
            return torch.cat([(-output).sigmoid(), output.sigmoid()], dim=1)
        return output.softmax(1)


def available(device: str | torch.device) -> torch.device:
    """The device of that name.

    Raises:
        MedXAIError: when this machine has none.
    """
    try:
        return torch.empty(0, device=device).device
    except (RuntimeError, AssertionError) as error:
        raise MedXAIError(
            f"There is no device '{device}' on this machine: use 'cpu', or leave the device out."
        ) from error
