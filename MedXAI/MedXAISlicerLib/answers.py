"""An explanation as the scene takes it in: numbers and arrays, read without PyTorch, on any thread."""

from __future__ import annotations

import json
import tempfile
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import numpy as np

from MedXAISlicerLib import display


@dataclass(frozen=True)
class Answer:
    """What `MedXAILib.explanation.Explanation.save` wrote: its manifest, and its images by file name.

    An image is a float32 array (D, H, W), or (D, H, W, C) for several channels, with its affine from (d, h, w) to RAS
    mm.
    """

    manifest: dict
    images: dict[str, tuple[np.ndarray, np.ndarray]] = field(default_factory=dict)
    card: dict | None = None
    """Its trust card, if it has one."""

    @property
    def kind(self):
        """SaliencyMap, Caption, ConceptScores, SimilarCases, Traversal or RuleSet."""
        return self.manifest["kind"]

    @property
    def provenance(self):
        """How it was made, as `MedXAILib.explanation.Provenance` has it."""
        return self.manifest["provenance"]

    @cached_property
    def map(self):
        """A saliency map (D, H, W): what its channels say together."""
        array, _ = self.images[self.manifest["files"][0]]
        return array if array.ndim == 3 else array.sum(axis=-1)

    @property
    def interval(self):
        """Of a saliency map that is an estimate, half the width of the 95 % confidence interval of each value,
        (D, H, W) or (D, H, W, C); None of others."""
        files = self.manifest.get("intervals")
        return None if not files else self.images[files[0]][0]

    @cached_property
    def window(self):
        """Where the colours of a saliency map end."""
        return display.windowLimit(self.map)

    @cached_property
    def hotSpots(self):
        """The hot spots of a saliency map."""
        from MedXAILib.hotspots import find

        return find(self.map)


def read(folder):
    """The answer in a folder, with everything about it that takes time to find out.

    Raises:
        MedXAIError: when there is none, or it is damaged.
    """
    import SimpleITK as sitk

    from MedXAILib.errors import MedXAIError

    folder = Path(folder)
    manifest = folder / "explanation.json"
    if not manifest.is_file():
        raise MedXAIError(f"'{folder}' holds no explanation (explanation.json is missing): choose the folder it is in.")
    try:
        said = json.loads(manifest.read_text(encoding="utf-8"))
        files = [*said.get("files", []), *said.get("intervals", [])]
        images = {name: arrayOf(sitk.ReadImage(str(folder / name))) for name in files}
        said["kind"], said["provenance"]["method"], said["residual"]
        beside = folder / "trust.json"
        card = json.loads(beside.read_text(encoding="utf-8")) if beside.is_file() else None
    except (ValueError, KeyError, TypeError, RuntimeError) as error:
        reason = str(error).strip().splitlines()[-1]
        raise MedXAIError(f"The explanation in '{folder}' is damaged ({reason}): compute it again.") from error
    answer = Answer(said, images, card)
    if answer.kind == "SaliencyMap":
        _ = answer.window, answer.hotSpots
    return answer


def of(explanation):
    """The answer that an explanation in memory is."""
    with tempfile.TemporaryDirectory(prefix="medxai-") as folder:
        return read(explanation.save(Path(folder) / "explanation"))


def arrayOf(image):
    """The array (D, H, W) or (D, H, W, C) of an image of SimpleITK, and its affine from (d, h, w) to RAS mm."""
    import SimpleITK as sitk

    # SimpleITK places (x, y, z) in LPS mm.
    directions = np.reshape(image.GetDirection(), (3, 3)) * image.GetSpacing()
    affine = np.eye(4)
    affine[:3, :3] = (np.diag([-1, -1, 1]) @ directions)[:, ::-1]
    affine[:3, 3] = np.diag([-1, -1, 1]) @ image.GetOrigin()
    return sitk.GetArrayFromImage(image).astype(np.float32, copy=False), affine
