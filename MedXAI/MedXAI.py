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
from slicer.util import VTKObservationMixin


class MedXAI(ScriptedLoadableModule):
    """What Slicer shows about the module."""

    def __init__(self, parent):
        ScriptedLoadableModule.__init__(self, parent)
        self.parent.title = _("MedXAI")
        self.parent.categories = [translate("qSlicerAbstractCoreModule", "Analysis")]
        self.parent.dependencies = []
        self.parent.contributors = ["MedXAI developers"]
        self.parent.helpText = _(
            "Shows why a deep-learning model says what it says about a 3-D medical image: where it looked, in words, "
            "and by similar cases; and how far that can be trusted. For research only, not for diagnosis."
        )
        self.parent.acknowledgementText = _("MedXAI builds on PyTorch, MONAI and SimpleITK.")
        # An installed extension has MedXAILib beside this file; in a checkout it is one folder up.
        checkout = Path(__file__).resolve().parent.parent
        if (checkout / "MedXAILib" / "__init__.py").exists() and str(checkout) not in sys.path:
            sys.path.append(str(checkout))
        slicer.app.connect("startupCompleted()", _registerSampleData)


def _registerSampleData():
    from MedXAISlicerLib import samples

    samples.registerSampleData()


class MedXAIWidget(ScriptedLoadableModuleWidget, VTKObservationMixin):
    """Puts the panels together, and shows in them the explanation that is chosen."""

    def __init__(self, parent=None):
        ScriptedLoadableModuleWidget.__init__(self, parent)
        VTKObservationMixin.__init__(self)
        self.logic = None
        self.panels = []
        self._parameterNode = None
        self._guiTag = None
        self._shown = None

    def setup(self):
        ScriptedLoadableModuleWidget.setup(self)
        # Here, because they need the path that the module adds, and Qt.
        from MedXAISlicerLib.panels.cases import CasesPanel
        from MedXAISlicerLib.panels.explain import ExplainPanel
        from MedXAISlicerLib.panels.result import ResultPanel
        from MedXAISlicerLib.panels.settings import SettingsPanel
        from MedXAISlicerLib.panels.study import StudyPanel
        from MedXAISlicerLib.panels.trust import TrustPanel
        from MedXAISlicerLib.panels.variants import VariantsPanel
        from MedXAISlicerLib.panels.words import WordsPanel

        self.logic = MedXAILogic()
        self.widget = slicer.util.loadUI(self.resourcePath("UI/MedXAI.ui"))
        self.widget.setMRMLScene(slicer.mrmlScene)
        self.layout.addWidget(self.widget)
        self.ui = slicer.util.childWidgetVariables(self.widget)
        for kind in ("vtkMRMLScalarVolumeNode", "vtkMRMLTextNode", "vtkMRMLTableNode"):
            self.ui.explanationSelector.addAttribute(kind, "MedXAI.Provenance")
        self.explainPanel = ExplainPanel(self.logic, onExplained=self._explained, onReady=self._showAgain)
        self.ui.explainCollapsibleButton.layout().addWidget(self.explainPanel.widget)
        self.settingsPanel = SettingsPanel(self.logic, onChanged=self._showStatus)
        self.ui.settingsCollapsibleButton.layout().addWidget(self.settingsPanel.widget)
        self.studyPanel = StudyPanel(self.logic)
        self.ui.studyCollapsibleButton.layout().addWidget(self.studyPanel.widget)
        self.panels = [kind(self.logic) for kind in (ResultPanel, WordsPanel, CasesPanel, VariantsPanel, TrustPanel)]
        for panel in self.panels:
            self.ui.panelsTabWidget.addTab(panel.widget, panel.title)
        self.ui.installButton.connect("clicked(bool)", self._install)
        self.ui.openButton.connect("clicked(bool)", self._open)
        self.addObserver(slicer.mrmlScene, slicer.mrmlScene.StartCloseEvent, self._sceneStartsClosing)
        self.addObserver(slicer.mrmlScene, slicer.mrmlScene.EndCloseEvent, self._sceneClosed)
        self.addObserver(slicer.mrmlScene, slicer.mrmlScene.EndImportEvent, self._sceneLoaded)
        self._initializeParameterNode()

    def enter(self):
        """The module is opened: be ready to explain."""
        self._initializeParameterNode()
        self._showStatus()

    def cleanup(self):
        self._setParameterNode(None)
        self.removeObservers()
        for panel in (self.explainPanel, self.settingsPanel, self.studyPanel, *self.panels):
            panel.cleanup()

    def onReload(self):
        """For developers: take in changes of all files of the module, not only of this one."""
        from MedXAISlicerLib import workers

        workers.shared().close()
        for name in [n for n in sys.modules if n.split(".")[0] in ("MedXAISlicerLib", "MedXAILib")]:
            del sys.modules[name]
        ScriptedLoadableModuleWidget.onReload(self)

    def _initializeParameterNode(self):
        parameterNode = self.logic.getParameterNode()
        if parameterNode.inputVolume is None:
            parameterNode.inputVolume = self._firstScan()
        self._setParameterNode(parameterNode)

    @staticmethod
    def _firstScan():
        """The first volume that is a scan, and not a map of one."""
        for node in slicer.util.getNodesByClass("vtkMRMLScalarVolumeNode"):
            if node.GetNodeReference("MedXAI.Source") is None and not node.IsA("vtkMRMLLabelMapVolumeNode"):
                return node
        return None

    def _setParameterNode(self, parameterNode):
        before = self._parameterNode
        if before is not None and parameterNode is not None and before.parameterNode is parameterNode.parameterNode:
            return
        if before is not None:
            before.disconnectGui(self._guiTag)
            self.removeObserver(before.parameterNode, "ModifiedEvent", self._showChosen)
        self._parameterNode = parameterNode
        for panel in (self.explainPanel, self.studyPanel, *self.panels):
            panel.setParameterNode(parameterNode)
        if parameterNode is not None:
            self._guiTag = parameterNode.connectParametersToGui({"explanation": self.ui.explanationSelector})
            self.addObserver(parameterNode.parameterNode, "ModifiedEvent", self._showChosen)
            self._showChosen()

    def _explained(self, nodes):
        self._parameterNode.explanation = nodes[0]

    def _showChosen(self, *_event):
        """Show the chosen explanation in the views and in all panels."""
        node = self._parameterNode.explanation
        if node is self._shown:
            return
        self._shown = node
        if node is not None:
            self.logic.show(node)
        for panel in self.panels:
            panel.show(node)

    def _showAgain(self):
        """Take in what has become known of the methods."""
        for panel in self.panels:
            panel.show(self._shown)

    def _open(self, _checked=False):
        import qt

        from MedXAILib.errors import MedXAIError

        folder = qt.QFileDialog.getExistingDirectory(self.widget, _("The folder of an explanation"))
        if not folder:
            return
        try:
            self._explained([self.logic.open(self._parameterNode.inputVolume, folder)])
        except MedXAIError as error:
            slicer.util.errorDisplay(str(error), windowTitle=_("MedXAI"))

    def _sceneStartsClosing(self, *_event):
        self._shown = None
        for panel in self.panels:
            panel.show(None)
        self._setParameterNode(None)

    def _sceneClosed(self, *_event):
        self._initializeParameterNode()

    def _sceneLoaded(self, *_event):
        """A loaded scene comes back as it was saved, layout included."""
        self._setParameterNode(None)
        self._initializeParameterNode()
        self.logic.restore()

    def _showStatus(self):
        self.ui.statusLabel.text, self.ui.statusLabel.toolTip = self.logic.checkInstallation()
        self.ui.installButton.visible = not self.logic.ready
        if self.logic.ready:
            self.explainPanel.begin()

    def _install(self, _checked=False):
        from MedXAILib.errors import MedXAIError

        try:
            self.logic.install()
        except MedXAIError as error:
            slicer.util.errorDisplay(str(error), windowTitle=_("MedXAI"))
        self._showStatus()


class MedXAILogic(ScriptedLoadableModuleLogic):
    """Explanations without a panel, for scripts and tests."""

    def __init__(self, parent=None):
        ScriptedLoadableModuleLogic.__init__(self, parent)
        self.methods = {}
        """What the worker says of each method, by id; empty until it has started."""
        self.ready = False
        """Whether everything needed is installed, as of the last `checkInstallation`."""

    def getParameterNode(self):
        from MedXAISlicerLib.parameters import MedXAIParameterNode

        return MedXAIParameterNode(ScriptedLoadableModuleLogic.getParameterNode(self))

    def explain(
        self,
        volumeNode,
        model,
        method="gradcam",
        target=None,
        parameters=None,
        region=None,
        waitForCompletion=True,
    ):
        """Explain what a model says about a volume, and show it.

        Args:
            volumeNode: the scan, or a list of volumes on one grid as channels.
            model: path of a MONAI bundle or TorchScript file, which the worker computes with; or a `MedXAILib.Model`
                in memory, which is explained here.
            method, target, parameters: as for `MedXAILib.explain`; a list of targets gives a list of explanations. What
                takes a box or a mask also takes a region of interest, or a segment as below.
            region: a region of interest, a segment as (segmentation node, segment ID or name), or a point or box in
                RAS mm.
            waitForCompletion: False returns at once, with an `asking.Explaining` to watch and to cancel.

        Returns:
            The explanation node: of a saliency map the volume node.

        Raises:
            MedXAIError: what is wrong, and the remedy; the scene is as it was.
        """
        from MedXAISlicerLib import asking, mrml

        if not isinstance(model, (str, Path)):
            return mrml.explain(volumeNode, model, method, target, region, **(parameters or {}))
        anytime = self.methods.get(method, {}).get("anytime", False)
        explaining = asking.Explaining(volumeNode, model, method, target, parameters, region, anytime=anytime)
        if not waitForCompletion:
            return explaining
        nodes = explaining.wait()
        return nodes if isinstance(target, (list, tuple)) else nodes[0]

    def predict(self, volumeNode, model, region=None):
        """The model's scores for a volume, by class."""
        from MedXAISlicerLib import asking

        return asking.Predicting(volumeNode, model, region).wait()

    def open(self, volumeNode, folder):
        """Add an explanation of a volume that was saved to a folder, of any kind, and show it; returns its node.

        Raises:
            MedXAIError: when the folder holds none, or one of something else.
        """
        from MedXAISlicerLib import answers, mrml

        return mrml.addAnswers(volumeNode, [answers.read(folder)])[0]

    def explanations(self):
        """The nodes of all explanations in the scene, oldest first."""
        from MedXAISlicerLib import results

        return results.findExplanations()

    def show(self, node):
        """Show one explanation in all views, and hide the others."""
        from MedXAISlicerLib import display

        display.show(node)

    def restore(self):
        """Show a loaded scene as it was: its layout, and its latest explanation."""
        from MedXAISlicerLib import display, layouts

        display.restore()
        layouts.restore()

    def askMethods(self, onKnown):
        """Ask the worker for its methods; `onKnown()` is called when they are there."""
        from MedXAISlicerLib import workers

        def known(job):
            if job.error is None:
                self.methods = {method["id"]: method for method in job.result["methods"]}
                onKnown()

        workers.shared().submit({"op": "methods"}, onDone=known)

    def checkInstallation(self):
        """See what is installed. Returns a line about it, and all of it in full."""
        from MedXAISlicerLib import install

        status = install.status()
        self.ready = status.ready
        return install.describe(status)

    def install(self):
        """Install what is missing, if the person agrees.

        Raises:
            MedXAIError: why that was not possible.
        """
        from MedXAISlicerLib import install

        self.ready = install.ensure()


class MedXAITest(ScriptedLoadableModuleTest):
    """The self-test: a small network, and the demonstration in the worker, explained on volumes of the scene."""

    def setUp(self):
        slicer.mrmlScene.Clear()

    def runTest(self):
        for test in (self.test_map_has_the_place_of_the_volume_and_is_shown, self.test_worker_explains_a_scan):
            self.setUp()
            test()

    def test_worker_explains_a_scan(self):
        from MedXAILib.resources import path
        from MedXAISlicerLib import geometry

        volumeNode = slicer.util.loadVolume(str(path("SampleData/chest_ct_nodule.nrrd")))
        nodule = (21.9, 120.5, -611.5)
        mapNode = MedXAILogic().explain(volumeNode, path("Models/lung_nodule"), "hirescam", "malignant", region=nodule)
        self.assertLess(np.linalg.norm(np.subtract(geometry.peak(mapNode), nodule)), 15)

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
