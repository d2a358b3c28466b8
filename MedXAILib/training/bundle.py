"""Writing a trained network as a MONAI bundle."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

import torch
from monai.transforms import Compose, Orientation, ScaleIntensityRange, Spacing
from torch import nn

from MedXAILib.errors import MedXAIError
from MedXAILib.synthetic.lung_nodules import HU_RANGE, SIZE, SPACING_MM

_COPYRIGHT = "Copyright 2026 the MedXAI authors"
_LICENCE = f"""{_COPYRIGHT}

Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with the
License. You may obtain a copy of the License at

    http://www.apache.org/licenses/LICENSE-2.0

Unless required by applicable law or agreed to in writing, software distributed under the License is distributed on an
"AS IS" BASIS, WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the License for the specific
language governing permissions and limitations under the License.

The weights were trained on pieces of a chest CT that pyradiomics 3.0.1 distributes under the BSD 3-Clause licence
(Copyright 2017 Harvard Medical School).
"""

_SMALLEST = 24


@dataclass(frozen=True)
class Grid:
    """What a network is given: a cube of `size` voxels of `spacing_mm` a side, whose axes are (R, A, S), with the
    `intensities` (low, high) of a scan as 0 and 1; what is beyond is clipped.

    Raises:
        MedXAIError: for less than 24 voxels, a spacing that is not positive, and intensities in the wrong order.
    """

    size: int = SIZE
    spacing_mm: float = SPACING_MM
    intensities: tuple[float, float] = HU_RANGE

    def __post_init__(self) -> None:
        if self.size < _SMALLEST:
            raise MedXAIError(f"A patch has at least {_SMALLEST} voxels a side, not {self.size}: give a larger size.")
        if not self.spacing_mm > 0:
            raise MedXAIError(f"Voxels are not {self.spacing_mm:g} mm apart: give a spacing above 0.")
        if not self.intensities[0] < self.intensities[1]:
            raise MedXAIError(f"Intensities go from low to high, not from {' to '.join(map(str, self.intensities))}.")

    def transforms(self) -> Compose:
        """The preprocessing that a bundle of this grid describes, on a MetaTensor (C, X, Y, Z)."""
        scaled = ScaleIntensityRange(*self.intensities, 0.0, 1.0, clip=True)
        return Compose([Orientation("RAS", labels=None), Spacing(self.spacing_mm, mode="bilinear"), scaled])


_GRID = Grid()
_CT = {"format": "hounsfield", "modality": "CT"}
_ALONE: Mapping[str, Any] = {}


def write_bundle(
    folder: Path,
    network: nn.Module,
    *,
    definition: Mapping[str, Any],
    inferer: Mapping[str, Any],
    postprocessing: list[Mapping[str, Any]],
    handlers: list[Mapping[str, Any]],
    about: Mapping[str, Any],
    output: Mapping[str, Any],
    layers: list[str],
    card: str,
    metrics: Mapping[str, float],
    grid: Grid = _GRID,
    spatial_shape: Sequence[int | str] | None = None,
    image: Mapping[str, str] = _CT,
    licence: str = _LICENCE,
    trainings: Mapping[str, Any] = _ALONE,
) -> None:
    """Write `folder` as a MONAI bundle; it appears complete or not at all, and replaces an older one.

    `definition` is the network's `_target_` and arguments, `handlers` what else `monai.bundle run` does with the
    predictions, `about` the metadata's task, description and intended use (and authors and source of the data, where
    they are not those of the demo networks), `output` the metadata's description of the prediction, `layers` where
    explanations had best look, `card` the model card in Markdown, `grid` what the network is given, `spatial_shape`
    which others it takes ("23+n": any from 24), `image` the format and modality of scans, `licence` the text, if any,
    `trainings` where other trainings of it are (docs/trust.md).
    """
    beside = folder.with_name(folder.name + ".part")
    shutil.rmtree(beside, ignore_errors=True)
    for name in ("configs", "models", "docs"):
        (beside / name).mkdir(parents=True)
    # MONAI's specification wants model.pt; a bare state dict of tensors loads with weights_only, without unpickling.
    torch.save({name: value.cpu() for name, value in network.state_dict().items()}, beside / "models" / "model.pt")
    _write_json(beside / "configs" / "inference.json", _inference(definition, inferer, postprocessing, handlers, grid))
    given = {**image, "spatial_shape": list(spatial_shape or (grid.size,) * 3)}
    _write_json(
        beside / "configs" / "metadata.json", _metadata(about, given, output, {"layers": layers, **trainings}, metrics)
    )
    (beside / "docs" / "README.md").write_text(card, encoding="utf-8")
    if licence:
        (beside / "LICENSE").write_text(licence, encoding="utf-8")
    shutil.rmtree(folder, ignore_errors=True)
    beside.replace(folder)


def write_scorer(
    folder: Path,
    network: nn.Module,
    definition: Mapping[str, Any],
    names: Sequence[str],
    kind: Literal["classes", "ordinal", "embedding"],
    **other: Any,
) -> None:
    """Write the bundle of a network that gives a logit for each of `names` (see `write_bundle`): of `classes` of which
    one is right, or of `ordinal` grades, each of that grade or a higher one; or whose numbers are an `embedding`."""
    activation = {"classes": "softmax", "ordinal": "sigmoid"}.get(kind)
    write_bundle(
        folder,
        network,
        definition=definition,
        inferer={"_target_": "SimpleInferer"},
        postprocessing=[{"_target_": "Activationsd", "keys": "pred", activation: True}] if activation else [],
        handlers=[
            {
                "_target_": "ClassificationSaver",
                "output_dir": "@output_dir",
                "batch_transform": "$lambda batch: [item['image'].meta for item in batch]",
                "output_transform": "$lambda output: [item['pred'] for item in output]",
            }
        ],
        output={
            "type": "probabilities" if activation else kind,
            "format": kind,
            "num_channels": len(names),
            "spatial_shape": [1, 1, 1],
            "dtype": "float32",
            "value_range": [0, 1] if activation else [-1, 1],
            "is_patch_data": False,
            "channel_def": {str(i): name for i, name in enumerate(names)},
        },
        **other,
    )


def write_generator(
    folder: Path, network: nn.Module, arguments: Mapping[str, Any], size: int = SIZE, **other: Any
) -> None:
    """Write the bundle of a network that `arguments` build, and that makes patches of `size` voxels a side (see
    `write_bundle`)."""
    kind = type(network)
    write_bundle(
        folder,
        network,
        definition={"_target_": f"{kind.__module__}.{kind.__name__}", **arguments},
        inferer={"_target_": "SimpleInferer"},
        postprocessing=[],
        handlers=[],
        output={
            "type": "image",
            "format": "hounsfield",
            "num_channels": 1,
            "spatial_shape": [size] * 3,
            "dtype": "float32",
            "value_range": [0, 1],
            "is_patch_data": True,
            "channel_def": {"0": "image"},
        },
        layers=[],
        grid=Grid(size=size),
        **other,
    )


def _write_json(path: Path, content: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def _inference(
    definition: Mapping[str, Any],
    inferer: Mapping[str, Any],
    postprocessing: list[Mapping[str, Any]],
    handlers: list[Mapping[str, Any]],
    grid: Grid,
) -> dict[str, Any]:
    low, high = grid.intensities
    return {
        "imports": ["$import glob", "$import os"],
        "bundle_root": ".",
        "image_key": "image",
        "dataset_dir": "$@bundle_root + '/data'",
        "output_dir": "$@bundle_root + '/eval'",
        "datalist": "$sorted(glob.glob(os.path.join(@dataset_dir, '*.nii.gz')))",
        "device": "$torch.device('cuda' if torch.cuda.is_available() else 'cpu')",
        "network_def": dict(definition),
        "network": "$@network_def.to(@device)",
        "preprocessing": {
            "_target_": "Compose",
            "transforms": [
                {"_target_": "LoadImaged", "keys": "@image_key"},
                {"_target_": "EnsureChannelFirstd", "keys": "@image_key"},
                {"_target_": "Orientationd", "keys": "@image_key", "axcodes": "RAS", "labels": None},
                {"_target_": "Spacingd", "keys": "@image_key", "pixdim": [grid.spacing_mm] * 3, "mode": "bilinear"},
                {
                    "_target_": "ScaleIntensityRanged",
                    "keys": "@image_key",
                    "a_min": low,
                    "a_max": high,
                    "b_min": 0.0,
                    "b_max": 1.0,
                    "clip": True,
                },
            ],
        },
        "dataset": {
            "_target_": "Dataset",
            "data": "$[{@image_key: path} for path in @datalist]",
            "transform": "@preprocessing",
        },
        "dataloader": {"_target_": "DataLoader", "dataset": "@dataset", "batch_size": 1},
        "inferer": dict(inferer),
        "postprocessing": {"_target_": "Compose", "transforms": [dict(step) for step in postprocessing]},
        "handlers": [
            {
                "_target_": "CheckpointLoader",
                "load_path": "$@bundle_root + '/models/model.pt'",
                "load_dict": {"model": "@network"},
            },
            *(dict(handler) for handler in handlers),
        ],
        "evaluator": {
            "_target_": "SupervisedEvaluator",
            "device": "@device",
            "val_data_loader": "@dataloader",
            "network": "@network",
            "inferer": "@inferer",
            "postprocessing": "@postprocessing",
            "val_handlers": "@handlers",
        },
        "initialize": [],
        "run": ["$@evaluator.run()"],
    }


def _metadata(
    about: Mapping[str, Any],
    image: Mapping[str, Any],
    output: Mapping[str, Any],
    own: Mapping[str, Any],
    metrics: Mapping[str, float],
) -> dict[str, Any]:
    return {
        "version": "1.0.0",
        "changelog": {"1.0.0": "first release"},
        "monai_version": version("monai"),
        "pytorch_version": version("torch").split("+")[0],
        "numpy_version": version("numpy"),
        "required_packages_version": {"nibabel": "5.3.0", "pytorch-ignite": "0.5.0"},
        "authors": "the MedXAI authors",
        "copyright": _COPYRIGHT,
        "data_source": "chest CT lung2 of pyradiomics 3.0.1 (BSD 3-Clause), with computed nodules",
        "data_type": "nrrd",
        **about,
        # JSON has no NaN.
        "eval_metrics": {name: value for name, value in metrics.items() if math.isfinite(value)},
        "medxai": dict(own),
        "network_data_format": {
            "inputs": {
                "image": {
                    "type": "image",
                    "num_channels": 1,
                    **image,
                    "dtype": "float32",
                    "value_range": [0, 1],
                    "is_patch_data": all(isinstance(size, int) for size in image["spatial_shape"]),
                    "channel_def": {"0": "image"},
                }
            },
            "outputs": {"pred": dict(output)},
        },
    }
