"""A reader study in the scene: trial after trial the scan, and what its arm shows of what the network says.

Nothing that a reader can come across (texts, names of nodes, attributes) tells the truth, the file, or the arm: maps
lose how they were made, so that a placebo differs from the map of the scan in its values alone.
"""

from __future__ import annotations

import time
from dataclasses import replace
from itertools import product
from pathlib import Path

import numpy as np
import slicer

from MedXAISlicerLib import answers, deleting, display, geometry, mrml, results

JOURNALS = "journals"
"""The folder beside a design with what its readers answered."""

# In the order in which they are asked for: the first one lies over the scan.
_KINDS = {
    "map": ("SaliencyMap",),
    "placebo": ("SaliencyMap",),
    "text": ("Caption", "ConceptScores", "RuleSet"),
    "cases": ("SimilarCases",),
    "prototypes": ("SimilarCases",),
}
# Tells how an explanation was made, and from what.
_SECRET = {
    "model": {"name": ""},
    "volume": {"source": ""},
    "created": "1970-01-01T00:00:00+00:00",
    "seconds": 0.0,
    "device": "",
    "notes": [],
    "parameters": {},
}


class Sitting:
    """A reader at a study, who sees one trial at a time. `trial` is the open one, `scan` the node of its volume, and
    `explanations` are the nodes of what is shown of it, by part of the arm."""

    def __init__(self, design, reader, clock=time.monotonic, **known):
        """Open the journal of a reader, or begin it; `known` is as for `MedXAILib.study.journal.Journal`.

        Raises:
            MedXAIError: when the design or the journal is none, or the reader is not of the study.
        """
        from MedXAILib.study.design import read_study
        from MedXAILib.study.journal import Journal

        self.study = read_study(design)
        self.journal = Journal(self.study, reader, Path(design).parent / JOURNALS, **known)
        self._clock = clock
        self._forget()

    def _forget(self):
        self.trial = self.scan = self.point = None
        self.explanations = {}
        self._since, self._seen = None, 0.0

    def next(self):
        """Open the trial to go on with, in the place of the former one. Returns it; None when all are answered.

        Raises:
            MedXAIError: when its session may not begin yet, or it cannot be shown; the journal says why.
        """
        from MedXAILib.errors import MedXAIError

        self.close()
        trial = self.journal.next()
        if trial is None:
            return None
        try:
            self._load(trial)
        except Exception as error:
            self.close()
            self.journal.write("failed", trial=trial.index, why=str(error))
            # What went wrong would tell which scan it is, or what is to be shown of it.
            raise MedXAIError(
                f"Trial {trial.index + 1} cannot be shown: tell those who run the study, whose journal says why."
            ) from None
        self.journal.begin(trial)
        self.trial, self._since = trial, self._clock()
        return trial

    def _load(self, trial):
        from MedXAILib.study.design import parts

        array, affine = _read(trial.case.volume)
        # Without a file, whose name may tell what it is.
        self.scan = slicer.util.addVolumeFromArray(array, affine[:, [2, 1, 0, 3]], "Scan")
        self.scan.CreateDefaultDisplayNodes()
        slicer.util.setSliceViewerLayers(background=self.scan)
        # Whatever explanation there was before goes out of sight.
        display.show(self.scan)
        slicer.util.resetSliceViews()
        shown = [part for part in _KINDS if part in parts(trial.arm)]
        found = [_blinded(part, answers.read(trial.case.explanations[part]), self.scan) for part in shown]
        nodes = mrml.addAnswers(self.scan, found) if found else []
        self.explanations = dict(zip(shown, nodes, strict=True))

    def said(self):
        """The network's answer and its score (None without one), where the arm tells it; None elsewhere."""
        from MedXAILib.study.design import parts

        case = self.trial.case
        return (case.answer, case.score) if "ai" in parts(self.trial.arm) else None

    @property
    def maps(self):
        """All maps that may lie over the scan, the one that does at first in front."""
        return [mapNode for node in self.explanations.values() for mapNode in results.maps(node)]

    @property
    def seconds(self):
        """For how long the trial has been looked at, without pauses."""
        return self._seen + (0.0 if self._since is None else self._clock() - self._since)

    def showOverlay(self, shown):
        """Lay the map over the scan, or take it away, as the reader wishes; the slices stay where they are."""
        self._overlay(shown)
        self.noteLook(shown)

    def noteLook(self, shown):
        """Put down that the reader turned a map on or off."""
        self.journal.write("look", trial=self.trial.index, shown=shown)

    def _overlay(self, shown):
        for mapNode in self.maps:
            display.setVisible(mapNode, False)
        slicer.util.setSliceViewerLayers(foreground=None)
        if shown and self.maps:
            display.overlay(self.maps[0])
            display.setVisible(self.maps[0], True)

    def pause(self):
        """Take everything out of sight, and stop the clock."""
        self._seen, self._since = self.seconds, None
        self._overlay(False)
        slicer.util.setSliceViewerLayers(background=None)
        self._showPoint(False)
        self.journal.write("pause", trial=self.trial.index)

    def resume(self, overlay=True):
        """Show everything again, the map with it or not, and let the clock go on."""
        slicer.util.setSliceViewerLayers(background=self.scan)
        self._overlay(overlay)
        self._showPoint(True)
        self.journal.write("resume", trial=self.trial.index)
        self._since = self._clock()

    def askPlace(self):
        """Let the reader click where it is; another click moves the point. Returns its node."""
        if self.point is None or self.point.GetScene() is None:
            self.point = slicer.mrmlScene.AddNewNodeByClass("vtkMRMLMarkupsFiducialNode", "Here")
            self.point.CreateDefaultDisplayNodes()
            self.point.SetMaximumNumberOfControlPoints(1)
        self.point.RemoveAllControlPoints()
        markups = slicer.modules.markups.logic()
        markups.SetActiveList(self.point)
        markups.StartPlaceMode(False)
        return self.point

    @property
    def place(self):
        """Where the reader pointed, RAS mm; None as long as that is nowhere."""
        if self.point is None or self.point.GetScene() is None or not self.point.GetNumberOfDefinedControlPoints():
            return None
        place = [0.0, 0.0, 0.0]
        self.point.GetNthControlPointPositionWorld(0, place)
        return tuple(place)

    def answer(self, answer, confidence):
        """The reader decides. Raises MedXAIError as `Journal.answer` does."""
        self.journal.answer(self.trial, answer, confidence, round(self.seconds, 3), self.place)

    def close(self):
        """Take the open trial out of the scene; without an answer it is opened anew the next time."""
        explanations, others = self.explanations.values(), (self.scan, self.point)
        # Before anybody sees the scan of an open trial leave the scene.
        self._forget()
        for node in explanations:
            if node.GetScene() is not None:
                deleting.delete(node)
        for node in others:
            if node is not None and node.GetScene() is not None:
                deleting.remove(node)

    def _showPoint(self, shown):
        if self.point is not None and self.point.GetScene() is not None:
            self.point.SetDisplayVisibility(shown)


def _read(path):
    """The first channel of a scan, a file or a folder of one DICOM series, and its affine from (d, h, w) to RAS mm.

    Raises:
        MedXAIError: for a folder of no or several series; RuntimeError where a file cannot be read.
    """
    import SimpleITK as sitk

    from MedXAILib.errors import MedXAIError

    files = str(path)
    if path.is_dir():
        count = len(sitk.ImageSeriesReader.GetGDCMSeriesIDs(str(path)))
        if count != 1:
            raise MedXAIError(f"'{path}' holds {count} DICOM series: give a folder of one.")
        files = sitk.ImageSeriesReader.GetGDCMSeriesFileNames(str(path))
    array, affine = answers.arrayOf(sitk.ReadImage(files))
    return (array if array.ndim == 3 else array[..., 0]), affine


def _blinded(part, answer, scan):
    """An answer without anything that tells how it was made, and of what.

    Raises:
        MedXAIError: for one of another kind than this part of an arm, and for the map of another grid in its place.
    """
    from MedXAILib.errors import MedXAIError

    if answer.kind not in _KINDS[part]:
        raise MedXAIError(f"'{part}' shows a {' or '.join(_KINDS[part])}, and this is a {answer.kind}: give another.")
    if answer.kind != "SaliencyMap":
        made = answer.provenance
        # What is shown of concepts depends on the task.
        kept = {**made, **_SECRET, "model": {"name": "", "task": made["model"].get("task")}}
        return replace(answer, manifest={**answer.manifest, "provenance": kept, "residual": {}}, card=None)
    affine, shape = geometry.affine(scan), slicer.util.arrayFromVolume(scan).shape
    _, own = answer.images[answer.manifest["files"][0]]
    if part == "map" and (answer.map.shape != shape or not np.allclose(own, affine, atol=1e-3)):
        raise MedXAIError("The map is not on the grid of the scan: give the map of this scan.")
    kept = {"kind": answer.kind, "files": ["map.nrrd"], "signed": answer.manifest["signed"], "residual": {}}
    made = {**_SECRET, "method": "saliency", "target_label": "map"}
    array = _stretched(answer.map, own, shape, affine)
    return answers.Answer({**kept, "provenance": made}, {"map.nrrd": (array, affine)})


def _stretched(array, own, shape, affine):
    """A map on another grid, the box about its own stretched to the box about that one: head to head, left to left.

    The map of the scan itself goes through this as well, and comes out as it was: a placebo that took longer to come
    would be known by that.
    """
    from scipy.ndimage import affine_transform

    (middle, size), (ownMiddle, ownSize) = _box(shape, affine), _box(array.shape, own)
    stretch = np.eye(4)
    stretch[:3, :3] = np.diag(ownSize / size)
    stretch[:3, 3] = ownMiddle - ownSize / size * middle
    matrix = np.linalg.inv(own) @ stretch @ affine
    return affine_transform(array, matrix, output_shape=shape, order=1, mode="grid-constant")


def _box(shape, affine):
    """The middle and the size, along R, A and S, of the box about a grid, mm."""
    corners = np.array([(*corner, 1) for corner in product(*((-0.5, n - 0.5) for n in shape))]) @ affine.T
    return corners[:, :3].mean(axis=0), np.ptp(corners[:, :3], axis=0)
