"""The panel that asks: which network, which scan, where, which answer, by which method."""

import slicer
from slicer.i18n import tr as _

from MedXAISlicerLib import asking, install, method_parameters, regions, results, settings, workers
from MedXAISlicerLib.panels import progress
from MedXAISlicerLib.panels.label_chooser import LabelChooser
from MedXAISlicerLib.panels.method_words import described, listed
from MedXAISlicerLib.panels.model_chooser import ModelChooser, forPerson, trusts
from MedXAISlicerLib.panels.panel import Panel
from MedXAISlicerLib.panels.parameter_form import ParameterForm

# The formats of parameters that say where, or by which examples: they are part of the question, and not of how it is
# answered.
_ASKED = ("region", "mask", "file", "folder")


class ExplainPanel(Panel):
    """Asks, shows how far it is, and lets it be cancelled. `onExplained(nodes)` gets what came of it, `onReady()` says
    that the methods are known."""

    uiFile = "Explain.ui"
    title = _("Explain")

    def __init__(self, logic, onExplained, onReady):
        super().__init__(logic)
        self._onExplained, self._onReady = onExplained, onReady
        self.running = None
        self._scores = {}
        self._looked = self._observed = None
        self.form = ParameterForm(self._parameterChanged)
        self.ui.advancedCollapsibleButton.layout().addWidget(self.form.widget)
        self.whereForm = ParameterForm(self._parameterChanged, self._roiAdded)
        self.ui.whereWidget.layout().addWidget(self.whereForm.widget)
        self.ui.regionKindSelector.addItem(_("The whole scan"), "whole")
        self.ui.regionKindSelector.addItem(_("Around a point"), "point")
        self.ui.regionKindSelector.addItem(_("A region of interest"), "roi")
        self.ui.regionKindSelector.addItem(_("A segment"), "segment")
        self.chooser = ModelChooser(self.ui.modelSelector, self.ui.modelInfoLabel, self._modelChosen, self._modelLoaded)
        self.labelChooser = LabelChooser(self.ui)
        self.ui.regionKindSelector.connect("currentIndexChanged(int)", self._regionKindChosen)
        self.ui.pointButton.connect("clicked(bool)", self._placePoint)
        self.ui.roiSelector.connect("nodeAddedByUser(vtkMRMLNode*)", self._roiAdded)
        self.ui.segmentSelector.connect("currentSegmentChanged(QString)", self._segmentChosen)
        self.ui.targetSelector.connect("activated(int)", self._targetChosen)
        self.ui.predictButton.connect("clicked(bool)", self._predict)
        self.ui.methodSelector.connect("currentIndexChanged(int)", self._methodChosen)
        self.ui.explainButton.connect("clicked(bool)", self._explainOrCancel)
        self.ui.progressBar.visible = False
        self._fillTargets()

    def setParameterNode(self, parameterNode):
        if self._observed is not None:
            self.parameterNode.RemoveObserver(self._observed)
        super().setParameterNode(parameterNode)
        self._observed = None if parameterNode is None else parameterNode.AddObserver("ModifiedEvent", self._update)
        self.labelChooser.setParameterNode(parameterNode)
        if parameterNode is not None:
            segment = parameterNode.segment
            self.ui.segmentSelector.setCurrentNode(parameterNode.segmentation)
            self.ui.segmentSelector.setCurrentSegmentID(segment)
            self.chooser.choose(parameterNode.model)

    def cleanup(self):
        if self.running is not None:
            self.running.cancel()
        super().cleanup()

    def begin(self):
        """Let the worker tell what can be chosen; once everything needed is installed."""
        self.logic.askMethods(self._fillMethods)
        self.chooser.load()

    # What can be chosen

    def _fillMethods(self):
        listed(self.ui.methodSelector, self.logic.methods.values())
        if self.parameterNode is not None:
            self._select(self.ui.methodSelector, self.parameterNode.method)
            self._showMethod()
            self._update()
        self._onReady()

    def _modelChosen(self, path):
        if path != self.parameterNode.model:
            self.parameterNode.target = ""
        self.parameterNode.model = path
        self._scores = {}
        self._fillTargets()
        if self.logic.ready:
            self.chooser.load()
        self._update()

    def _modelLoaded(self):
        if self.parameterNode is not None:
            self._fillTargets()
            self._fillChannels()
            self._showMethod()
            self._update()

    def _fillTargets(self):
        box = self.ui.targetSelector
        box.clear()
        names = self.chooser.model["class_names"] if self.chooser.model else ()
        segments = self._task() == "segmentation"
        most = max(self._scores, key=self._scores.get, default=None)
        if segments:
            box.addItem(_("The first label beyond the background"), "")
        else:
            box.addItem(_("What it predicts") if most is None else _("What it predicts: {name}").format(name=most), "")
        for name in names:
            score = self._scores.get(name)
            said = "" if score is None else f" ({score:.2f} mL)" if segments else f" ({score:.1%})"
            box.addItem(f"{name}{said}", name)
        if self.parameterNode is not None:
            self._select(box, self.parameterNode.target)

    def _fillChannels(self):
        """A selector for each channel beyond the first, where the network wants several."""
        layout = self.ui.channelsWidget.layout()
        while layout.count():
            layout.takeAt(0).widget().deleteLater()
        chosen = self.parameterNode.moreChannels
        for channel in range(1, self.chooser.model["channels"] or 1):
            selector = slicer.qMRMLNodeComboBox()
            selector.nodeTypes = ["vtkMRMLScalarVolumeNode"]
            selector.addEnabled = selector.removeEnabled = False
            selector.noneEnabled = True
            selector.objectName = f"channel{channel + 1}Selector"
            selector.toolTip = _("Channel {number} of the network, such as another MR sequence of this scan").format(
                number=channel + 1
            )
            selector.setMRMLScene(slicer.mrmlScene)
            selector.setCurrentNode(chosen[channel - 1] if channel <= len(chosen) else None)
            selector.connect("currentNodeChanged(vtkMRMLNode*)", self._channelsChosen)
            layout.addWidget(selector)

    def _select(self, box, data):
        box.blockSignals(True)
        box.currentIndex = max(0, box.findData(data))
        box.blockSignals(False)

    # What is chosen

    def _channelsChosen(self, _node):
        layout = self.ui.channelsWidget.layout()
        nodes = [layout.itemAt(i).widget().currentNode() for i in range(layout.count())]
        self.parameterNode.moreChannels = [node for node in nodes if node is not None]

    def _regionKindChosen(self, index):
        self.parameterNode.regionKind = self.ui.regionKindSelector.itemData(index)
        if self.parameterNode.regionKind == "point" and self.parameterNode.point is None:
            self._placePoint()

    def _segmentChosen(self, segmentID):
        if self.parameterNode is not None:
            self.parameterNode.segmentation = self.ui.segmentSelector.currentNode()
            self.parameterNode.segment = segmentID or ""

    def _targetChosen(self, index):
        self.parameterNode.target = self.ui.targetSelector.itemData(index)

    def _methodChosen(self, index):
        method = self.ui.methodSelector.itemData(index)
        if method and self.parameterNode is not None:
            self.parameterNode.method = method
            self._showMethod()

    def _showMethod(self):
        method = self.logic.methods.get(self.parameterNode.method)
        if method is None:
            return
        self.ui.methodInfoLabel.text = _("Good: {strengths}").format(strengths=method["taxonomy"]["strengths"])
        self.ui.methodInfoLabel.toolTip = self.ui.methodSelector.toolTip = described(method)
        layers = self.chooser.model["layers"] if self.chooser.model else ()
        changed = self._changedParameters()
        where = [parameter for parameter in method["parameters"] if parameter["format"] in _ASKED]
        self.form.show([p for p in method["parameters"] if p not in where], changed, layers)
        self.whereForm.show(where, changed)
        self.ui.whereWidget.visible = bool(where)

    def _changedParameters(self):
        return method_parameters.read(self.parameterNode, self.parameterNode.method)

    def _parameterChanged(self):
        if self.parameterNode is None:
            # The scene is being closed, and its regions with it.
            return
        problem = self.form.problem()
        if not problem:
            changed = {**self.form.values(), **self.whereForm.values()}
            method_parameters.write(self.parameterNode, self.parameterNode.method, changed)
        self._say(problem)
        self._update()

    def _placePoint(self, _checked=False):
        """Let the person click the place in a slice view."""
        if self.parameterNode.point is None:
            node = slicer.mrmlScene.AddNewNodeByClass("vtkMRMLMarkupsFiducialNode", _("Look here"))
            node.CreateDefaultDisplayNodes()
            node.SetMaximumNumberOfControlPoints(1)
            self.parameterNode.point = node
        self.parameterNode.point.RemoveAllControlPoints()
        markups = slicer.modules.markups.logic()
        markups.SetActiveList(self.parameterNode.point)
        markups.StartPlaceMode(False)

    def _roiAdded(self, node):
        """A new region of interest lies around the middle of the scan, where it can be seen."""
        scan = self.parameterNode.inputVolume
        if scan is not None:
            regions.placeAroundMiddle(node, scan)

    # Asking

    def region(self):
        """Where to look, as for `regions.inVolume`."""
        chosen = self.parameterNode
        return {
            "whole": None,
            "point": chosen.point,
            "roi": chosen.roi,
            "segment": (chosen.segmentation, chosen.segment) if chosen.segmentation and chosen.segment else None,
        }[chosen.regionKind]

    def _place(self):
        """What is looked at, to tell it from another."""
        chosen = self.parameterNode
        return chosen.inputVolume, chosen.regionKind, self.region()

    def _task(self):
        """What kind of answer the network gives; None as long as nobody knows."""
        return self.chooser.model["task"] if self.chooser.model else None

    def _hasTarget(self):
        """Whether the chosen method is asked about one of the answers."""
        return self.logic.methods.get(self.parameterNode.method, {}).get("kind") != "Caption"

    def _lacking(self):
        """What has still to be chosen, in words; empty when nothing."""
        chosen = self.parameterNode
        if chosen is None or chosen.inputVolume is None:
            return _("Choose a scan first, or load one")
        if self.logic.ready and not self.logic.methods:
            return _("The worker is starting: wait a moment")
        if chosen.regionKind != "whole" and self.region() is None:
            return _("Say where to look first, or choose the whole scan")
        if self._task() in (None, "segmentation") and self.labelChooser.lacks():
            return _("Choose the segment in which the label is explained, or explain it where it is predicted")
        return self.form.problem() or self.whereForm.problem()

    def _update(self, *_event):
        chosen, busy = self.parameterNode, self.running is not None
        if chosen is None:
            return
        ui, lacking = self.ui, self._lacking()
        self._select(ui.regionKindSelector, chosen.regionKind)
        if ui.methodSelector.itemData(ui.methodSelector.currentIndex) != chosen.method:
            # Another scene, or a script, has chosen.
            self._select(ui.methodSelector, chosen.method)
            self._showMethod()
        if self._scores and self._place() != self._looked:
            # They were of another place.
            self._scores = {}
            self._fillTargets()
        for widget, kind in ((ui.pointButton, "point"), (ui.roiSelector, "roi"), (ui.segmentSelector, "segment")):
            widget.visible = chosen.regionKind == kind
        ui.regionWidget.visible = chosen.regionKind != "whole"
        self.labelChooser.update(self._task() == "segmentation")
        ui.targetSelector.enabled = self._hasTarget()
        ui.targetSelector.toolTip = (
            _("The answer to explain: what speaks for it, and against it")
            if self._hasTarget()
            else _("A caption is all that the network says: there is no answer to choose.")
        )
        ui.explainButton.enabled = busy or not lacking
        ui.predictButton.enabled = not busy and not lacking
        if busy:
            self._nameCancel(self.running)
        else:
            ui.explainButton.text = _("Explain")
            ui.explainButton.toolTip = lacking or _("Show what speaks for the answer")

    def _nameCancel(self, run):
        """Say what the button does while something is asked."""
        button = self.ui.explainButton
        if run.canFinish:
            button.text = _("Stop and keep the map")
            button.toolTip = _(
                "Stop now. The map stays as far as it is, marked as partial; you can delete it like any other."
            )
        else:
            button.text = _("Discard") if run.stopping and not run.cancelled else _("Cancel")
            button.toolTip = _("Stop at once; the scene stays as it is")

    def _predict(self, _checked=False):
        self._begin(asking.Predicting)

    def _explainOrCancel(self, _checked=False):
        if self.running is not None:
            if self.running.canFinish:
                self.running.finish()
                self._say(_("Finishing this step, to keep the map as far as it is…"))
            else:
                self.running.cancel()
                self._say(_("Stopping…"))
            self._nameCancel(self.running)
            return
        chosen = self.parameterNode
        self._begin(
            asking.Explaining,
            method=chosen.method,
            target=(chosen.target or None) if self._hasTarget() else None,
            parameters=self._changedParameters(),
            label=self.labelChooser.label(),
            anytime=self.logic.methods[chosen.method]["anytime"],
        )

    def _begin(self, kind, **fields):
        from MedXAILib.errors import MedXAIError

        chosen = self.parameterNode
        try:
            if not self.logic.ready:
                self.logic.install()
                self.begin()
            scan = [chosen.inputVolume, *chosen.moreChannels] if chosen.moreChannels else chosen.inputVolume
            self.running = kind(scan, chosen.model, region=self.region(), onChange=self._changed, **fields)
        except MedXAIError as error:
            self._say(forPerson(error))
            return
        self._say(_("Starting…"))
        self.ui.progressBar.setRange(0, 0)
        self.ui.progressBar.visible = True
        self._update()

    def _changed(self, run):
        if not run.finished:
            if not run.stopping:
                if run.progress is not None:
                    self._say(progress.show(self.ui.progressBar, run.progress))
                self._nameCancel(run)
            return
        self.running = None
        self.ui.progressBar.visible = False
        self._update()
        if run.state == "done":
            self._succeeded(run)
        else:
            self._failed(run)

    def _succeeded(self, run):
        settings.addRecentModel(self.parameterNode.model)
        self.whereForm.remember()
        self._say("")
        if isinstance(run, asking.Predicting):
            if run.text:
                self._say(_("The network says: {text}").format(text=run.text))
            self._scores, self._looked = run.scores, self._place()
            self._fillTargets()
        else:
            self._onExplained(run.nodes)
            if results.isPartial(run.nodes[0]):
                self._say(_("Stopped early: the map is partial. What was not reached has no colour."))

    def _failed(self, run):
        from MedXAILib.errors import NotInstalled, Untrusted

        self._say(forPerson(run.error))
        if isinstance(run.error, Untrusted) and trusts(run.error):
            self.chooser.load()
        # On another machine nothing can be installed from here.
        if isinstance(run.error, NotInstalled) and not settings.get("workerCommand"):
            self._install(run.error.requirement)

    def _install(self, requirement):
        """Offer to install what only the chosen method needs."""
        from MedXAILib.errors import MedXAIError

        try:
            install.ensure(also=[requirement])
        except MedXAIError as error:
            self._say(forPerson(error))
            return
        # A new one knows of it.
        workers.shared().close()
        self._say(_("It is installed: press Explain again."))

    def _say(self, text):
        self.ui.statusLabel.text = text
