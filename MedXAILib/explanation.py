"""What comes back: an explanation with its provenance, that can be saved, loaded and recomputed."""

from __future__ import annotations

import contextlib
import errno
import json
import re
import shutil
import tempfile
import uuid
from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any, Literal

import numpy as np
import SimpleITK as sitk
import torch
from pydantic import BaseModel, ConfigDict
from torch import Tensor

from MedXAILib.errors import MedXAIError
from MedXAILib.volume import Volume

MANIFEST = "explanation.json"

ImageFormat = Literal["nrrd", "nii.gz"]


class Provenance(BaseModel):
    """Everything needed to know where an explanation comes from, and to compute it again."""

    model_config = ConfigDict(frozen=True)

    method: str
    title: str = ""
    """What the method is called."""
    parameters: dict[str, Any]
    target: dict[str, Any]
    target_label: str
    region: list[Any] | None = None
    model: dict[str, Any]
    volume: dict[str, Any]
    versions: dict[str, str]
    seed: int
    device: str
    created: str
    seconds: float
    peak_memory: int
    forwards: int
    backwards: int
    notes: list[str] = []
    partial: bool = False
    """Whether it was ended early. To compute it again is to finish it."""
    operators: dict[str, dict[str, int]] = {}
    """Of a method that has rules for operators: which rule met which, how often."""


@dataclass(frozen=True, eq=False)
class Explanation(ABC):
    """One explanation of one decision; each kind adds what it shows. `residual` is by how much it misses what theory
    demands of it (relative)."""

    provenance: Provenance
    residual: dict[str, float]

    @property
    def in_words(self) -> str:
        """Its text; "" of a kind that has none."""
        return getattr(self, "text", "")

    def save(self, folder: str | Path, image_format: ImageFormat = "nrrd") -> Path:
        """Write it to `folder`, whole or not at all. An explanation that is there already is replaced.

        Raises:
            MedXAIError: when the folder holds something else, or cannot be written.
        """
        folder = Path(folder)
        with written_whole(folder) as fresh:
            manifest = {
                "kind": type(self).__name__,
                "provenance": self.provenance.model_dump(mode="json"),
                "residual": self.residual,
                **self._write(fresh, image_format),
            }
            (fresh / MANIFEST).write_text(json.dumps(manifest, indent=2, ensure_ascii=False), encoding="utf-8")
        return folder

    @abstractmethod
    def _write(self, folder: Path, image_format: ImageFormat) -> dict[str, Any]:
        """Write what the manifest cannot hold to `folder`, and say what the manifest must."""

    @classmethod
    @abstractmethod
    def _read(cls, folder: Path, manifest: dict[str, Any], common: dict[str, Any]) -> Explanation:
        """The reverse of `_write`."""


@dataclass(frozen=True, eq=False)
class SaliencyMap(Explanation):
    """Where: a map on the volume's own grid.

    `data` is float32, (1 or C, D, H, W), with N first where the input had it; `affine` takes its index (d, h, w) to RAS
    mm. `signed` maps speak for (positive) and against (negative) the target; the others are zero or more. Of a map that
    is an estimate, `interval` (as `data`) is half the width of the 95 % confidence interval of each voxel.
    """

    data: Tensor
    affine: np.ndarray
    signed: bool
    batched: bool = False
    interval: Tensor | None = None

    def to_sitk(self, sample: int = 0) -> sitk.Image:
        """The map, or that of one sample of a batch, as an image in the place of the volume."""
        return self._image(self.data, sample)

    def _image(self, values: Tensor, sample: int) -> sitk.Image:
        return Volume(values[sample] if self.batched else values, self.affine).to_sitk()

    def _write(self, folder: Path, image_format: ImageFormat) -> dict[str, Any]:
        found = {"files": self.data} if self.interval is None else {"files": self.data, "intervals": self.interval}
        written: dict[str, Any] = {}
        for key, values in found.items():
            name = "map" if key == "files" else "interval"
            names = [f"{name}-{i}" for i in range(len(values))] if self.batched else [name]
            written[key] = [f"{name}.{image_format}" for name in names]
            for sample, file in enumerate(written[key]):
                sitk.WriteImage(self._image(values, sample), str(folder / file), useCompression=True)
        return {**written, "affine": self.affine.tolist(), "signed": self.signed, "batched": self.batched}

    @classmethod
    def _read(cls, folder: Path, manifest: dict[str, Any], common: dict[str, Any]) -> SaliencyMap:
        def values(files: list[str]) -> Tensor:
            maps = [Volume.from_sitk(sitk.ReadImage(str(folder / name))).data for name in files]
            return torch.stack(maps) if manifest["batched"] else maps[0]

        return cls(
            **common,
            data=values(manifest["files"]),
            interval=values(manifest["intervals"]) if "intervals" in manifest else None,
            affine=np.array(manifest["affine"]),
            signed=manifest["signed"],
            batched=manifest["batched"],
        )


def map_of(explanation: Explanation, values: Tensor, affine: np.ndarray, of: str) -> SaliencyMap:
    """One of the maps (D, H, W) in an explanation of another kind, as a map of its own: `of` what it is."""
    made = explanation.provenance.model_copy(update={"target_label": of})
    return SaliencyMap(made, {}, values[None], affine, signed=bool(values.min() < 0))


def write_maps(folder: Path, maps: Tensor, affine: np.ndarray, image_format: ImageFormat) -> list[str]:
    """Write the maps (K, D, H, W) in an explanation of another kind to `folder`: the names of their files."""
    files = [f"map-{i}.{image_format}" for i in range(len(maps))]
    for file, one in zip(files, maps, strict=True):
        sitk.WriteImage(Volume(one[None], affine).to_sitk(), str(folder / file), useCompression=True)
    return files


def read_maps(folder: Path, files: list[str]) -> Tensor:
    """The reverse of `write_maps`."""
    maps = [Volume.from_sitk(sitk.ReadImage(str(folder / name))).data for name in files]
    return torch.cat(maps) if maps else torch.zeros(0, 1, 1, 1)


# The module of each kind, imported when one is read: those that build on this module could not be imported here.
_KINDS = {
    "SaliencyMap": "explanation",
    "Caption": "caption",
    "ConceptScores": "concept_scores",
    "SimilarCases": "similar_cases",
    "Traversal": "traversal",
    "RuleSet": "rule_set",
}


def load_explanation(folder: str | Path) -> Explanation:
    """Read what `Explanation.save` wrote.

    Raises:
        MedXAIError: when the folder holds no explanation, or a damaged one.
    """
    folder = Path(folder)
    if not (folder / MANIFEST).is_file():
        raise MedXAIError(f"'{folder}' holds no explanation ({MANIFEST} is missing): give the folder it was saved to.")
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        common = {"provenance": Provenance(**manifest["provenance"]), "residual": manifest["residual"]}
        kind: type[Explanation] = getattr(import_module(f"MedXAILib.{_KINDS[manifest['kind']]}"), manifest["kind"])
        return kind._read(folder, manifest, common)
    except (ValueError, KeyError, TypeError, IndexError, RuntimeError, MedXAIError) as error:
        reason = str(error).strip().splitlines()[-1]
        raise MedXAIError(f"The explanation in '{folder}' is damaged ({reason}): compute it again.") from error


@contextlib.contextmanager
def written_whole(folder: Path, manifest: str = MANIFEST) -> Iterator[Path]:
    """A fresh folder beside `folder` that takes its place when all went well, and vanishes when anything did not.

    Raises:
        MedXAIError: when `folder` holds something else than a former result (no `manifest` in it), or the disk refuses.
    """
    if folder.exists() and (not folder.is_dir() or (any(folder.iterdir()) and not (folder / manifest).exists())):
        raise MedXAIError(f"'{folder}' exists and is not a former result: choose another folder.")
    fresh: Path | None = None
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        fresh = folder.parent / f".{folder.name}-{uuid.uuid4().hex[:8]}"
        fresh.mkdir()
        yield fresh
        _replace(folder, fresh)
    except (OSError, RuntimeError) as error:
        # SimpleITK reports a failed write as RuntimeError.
        if isinstance(error, RuntimeError) and not re.search("SimpleITK (ImageFileWriter|WriteImage)", str(error)):
            raise
        full = (isinstance(error, OSError) and error.errno == errno.ENOSPC) or shutil.disk_usage(
            folder.parent
        ).free < 1e6
        reason = "the disk is full" if full else str(error).strip().splitlines()[-1]
        raise MedXAIError(f"'{folder}' could not be written ({reason}): nothing was changed there.") from error
    finally:
        if fresh is not None and fresh.exists():
            shutil.rmtree(fresh, ignore_errors=True)


def _replace(folder: Path, fresh: Path) -> None:
    """Put `fresh` where `folder` is. A folder cannot be renamed onto another, so the former steps aside first."""
    if folder.exists():
        aside = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
        folder.rename(aside / folder.name)
        try:
            fresh.rename(folder)
        except BaseException:
            (aside / folder.name).rename(folder)
            raise
        finally:
            shutil.rmtree(aside, ignore_errors=True)
    else:
        fresh.rename(folder)
