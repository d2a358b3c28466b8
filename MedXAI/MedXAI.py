"""The MedXAI module of 3D Slicer."""

import sys
from pathlib import Path

import numpy as np
import slicer
from slicer.i18n import tr as _
from slicer.i18n import translate
from slicer.ScriptedLoadableModule import (
    ScriptedLoadableModule,
    ScriptedLoadableModuleLogic,
    ScriptedLoadableModuleTest,
    ScriptedLoadableModuleWidget,
)


class MedXAI(ScriptedLoadableModule):
    """What Slicer shows about the module."""

    def __init__(self, parent):
        ScriptedLoadableModule.__init__(self, parent)
        self.parent.title = _("MedXAI")
        self.parent.categories = [translate("qSlicerAbstractCoreModule", "Analysis")]
        self.parent.dependencies = []
        self.parent.contributors = ["MedXAI developers"]
        self.parent.helpText = _(
            "Shows which voxels of a 3-D medical image speak for and against the answer of a deep-learning model. "
            "For research only, not for diagnosis."
        )
        self.parent.acknowledgementText = _("MedXAI builds on PyTorch, MONAI and SimpleITK.")
        # An installed extension has MedXAILib beside this file; in a checkout it is one folder up.
        checkout = Path(__file__).resolve().parent.parent
        if (checkout / "MedXAILib" / "__init__.py").exists() and str(checkout) not in sys.path:
            sys.path.append(str(checkout))


class MedXAIWidget(ScriptedLoadableModuleWidget):
    """Slicer's own panel for a module; explanations are asked for through `MedXAILogic`."""


class MedXAILogic(ScriptedLoadableModuleLogic):
    """Explanations without a panel, for scripts and tests."""

    def explain(self, volumeNode, model, method="gradcam", target=None, region=None, **parameters):
        """Explain what a model says about a volume, and show it; returns the volume node of the map.

        `region` is a region of interest, a segment as (segmentation node, segment ID or name), or a point or box in RAS
        mm. The rest is as for `MedXAISlicerLib.mrml.explain`.
        """
        from MedXAISlicerLib import mrml

        return mrml.explain(volumeNode, model, method, target, region, **parameters)

    def explanations(self):
        """The maps of all explanations in the scene, oldest first."""
        from MedXAISlicerLib import results

        return results.findExplanations()

    def show(self, mapNode):
        """Show one explanation in all views, and hide the others."""
        from MedXAISlicerLib import display

        display.show(mapNode)


class MedXAITest(ScriptedLoadableModuleTest):
    """The self-test: a small network explained on a volume of the scene."""

    def setUp(self):
        slicer.mrmlScene.Clear()

    def runTest(self):
        self.setUp()
        self.test_map_has_the_place_of_the_volume_and_is_shown()

    def test_map_has_the_place_of_the_volume_and_is_shown(self):
        import torch

        import MedXAILib as mx

        array = np.random.default_rng(0).random((9, 10, 11), dtype=np.float32)
        volumeNode = slicer.util.addVolumeFromArray(array, np.diag([-1.0, -2.0, 3.0, 1.0]), "Scan")
        network = torch.nn.Sequential(torch.nn.Conv3d(1, 2, 3), torch.nn.AdaptiveAvgPool3d(1), torch.nn.Flatten())
        model = mx.Model(network, class_names=("no", "yes"))
        roiNode = slicer.mrmlScene.AddNewNodeByClass("vtkMRMLMarkupsROINode")
        roiNode.SetCenter(-4, -9, 12)
        roiNode.SetSize(6, 10, 12)
        logic = MedXAILogic()
        mapNode = logic.explain(volumeNode, model, method="gradient", target="yes", region=roiNode)
        self.assertEqual(slicer.modules.volumes.logic().CompareVolumeGeometry(volumeNode, mapNode), "")
        explained = np.argwhere(slicer.util.arrayFromVolume(mapNode))
        self.assertEqual(explained.min(axis=0).tolist(), [2, 2, 1])
        self.assertEqual(explained.max(axis=0).tolist(), [6, 7, 7])
        self.assertEqual(logic.explanations(), [mapNode])
        for compositeNode in slicer.util.getNodesByClass("vtkMRMLSliceCompositeNode"):
            self.assertEqual(compositeNode.GetForegroundVolumeID(), mapNode.GetID())
