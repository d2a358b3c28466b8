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

    def explain(self, volumeNode, modelSource, method="gradcam", target=None, regionRAS=None, **parameters):
        """Explain what a model says about a volume; see `MedXAISlicerLib.mrml.explain`. Returns the node of the map."""
        from MedXAISlicerLib import mrml

        return mrml.explain(volumeNode, modelSource, method, target, regionRAS, **parameters)


class MedXAITest(ScriptedLoadableModuleTest):
    """The self-test: a small network explained on a volume of the scene."""

    def setUp(self):
        slicer.mrmlScene.Clear()

    def runTest(self):
        self.setUp()
        self.test_map_has_the_place_of_the_volume()

    def test_map_has_the_place_of_the_volume(self):
        import torch

        import MedXAILib as mx

        array = np.random.default_rng(0).random((9, 10, 11), dtype=np.float32)
        volumeNode = slicer.util.addVolumeFromArray(array, np.diag([-1.0, -2.0, 3.0, 1.0]), "Scan")
        network = torch.nn.Sequential(torch.nn.Conv3d(1, 2, 3), torch.nn.AdaptiveAvgPool3d(1), torch.nn.Flatten())
        model = mx.Model(network, class_names=("no", "yes"))
        mapNode = MedXAILogic().explain(volumeNode, model, method="gradient", target="yes")
        self.assertEqual(slicer.modules.volumes.logic().CompareVolumeGeometry(volumeNode, mapNode), "")
        self.assertGreater(np.abs(slicer.util.arrayFromVolume(mapNode)).max(), 0)
