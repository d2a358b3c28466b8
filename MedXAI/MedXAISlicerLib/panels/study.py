"""Reading a study: a scan, what is shown of the network, a question; then the next one."""

from functools import partial

import qt
import slicer
from slicer.i18n import tr as _

from MedXAISlicerLib import results, studies
from MedXAISlicerLib.panels.cases import CasesPanel
from MedXAISlicerLib.panels.panel import Panel
from MedXAISlicerLib.panels.words import WordsPanel

_VIEWS = {"text": WordsPanel, "cases": CasesPanel, "prototypes": CasesPanel}

# How often it is seen whether the time is over, ms.
_TICK = 500


class StudyPanel(Panel):
    """Shows trial after trial and asks. It tells neither the truth nor what is compared with what."""

    uiFile = "Study.ui"
    title = _("Reader study")

    def __init__(self, logic):
        super().__init__(logic)
        self.sitting = None
        self._views, self._buttons, self._pointObserved = {}, {}, None
        self._answer, self._isSure = None, False
        self._timer = qt.QTimer()
        self._timer.setInterval(_TICK)
        self._timer.connect("timeout()", self._onTick)
        ui = self.ui
        ui.designPathLineEdit.nameFilters = [_("Design of a study (*.json)")]
        ui.designPathLineEdit.settingKey = "MedXAI/study"
        ui.designPathLineEdit.connect("currentPathChanged(QString)", self._fillReaders)
        ui.readerSelector.connect("currentIndexChanged(int)", self._showReader)
        ui.beginButton.connect("clicked(bool)", self._onBegin)
        ui.pauseButton.connect("clicked(bool)", self._onPause)
        ui.stopButton.connect("clicked(bool)", self._onStop)
        ui.overlayCheckBox.connect("clicked(bool)", self._onOverlay)
        ui.whereButton.connect("clicked(bool)", self._onWhere)
        ui.confidenceSlider.connect("valueChanged(double)", self._onConfidence)
        ui.nextButton.connect("clicked(bool)", self._onNext)
        self._showTrial(None)
        self._fillReaders()

    def setParameterNode(self, parameterNode):
        super().setParameterNode(parameterNode)
        if parameterNode is None and self.sitting is not None:
            # The scene is about to be closed, and takes the scan away.
            self._onStop()

    def cleanup(self):
        self._end()
        super().cleanup()

    def _fillReaders(self, *_path):
        """Offer the readers of the chosen design; nobody reads as another by accident."""
        path, selector = self.ui.designPathLineEdit.currentPath, self.ui.readerSelector
        chosen = selector.currentText
        selector.clear()
        study = self._tried(_readStudy, path) if path else None
        if study is not None:
            selector.addItems(list(study.design.readers))
        selector.currentIndex = selector.findText(chosen)
        self._showReader()

    def _showReader(self, *_index):
        self.ui.beginButton.enabled = self.ui.readerSelector.currentIndex >= 0

    def _onBegin(self, _checked=False):
        path, reader = self.ui.designPathLineEdit.currentPath, self.ui.readerSelector.currentText
        self.sitting = self._tried(studies.Sitting, path, reader)
        if self.sitting is None:
            return
        self.ui.designPathLineEdit.addCurrentPathToHistory()
        design = self.sitting.study.design
        self.ui.questionLabel.text = design.question
        self.ui.placeWidget.visible = design.localise
        for answer in design.answers:
            button = qt.QPushButton(answer)
            button.checkable = True
            button.toolTip = _("Answer: {answer}").format(answer=answer)
            button.connect("clicked(bool)", partial(self._onAnswer, answer))
            self.ui.answersWidget.layout().addWidget(button)
            self._buttons[answer] = button
        self._next()

    def _next(self):
        """Show the trial to go on with; or that this was the last one, or why there is none for now."""
        self._leaveTrial()
        trial = self._tried(self.sitting.next)
        if trial is None:
            if not self.ui.messageLabel.text:
                self.ui.messageLabel.text = _("This was the last one. Thank you for reading!")
            self._end()
            return
        self.ui.messageLabel.text = ""
        self._showTrial(trial)

    def _showTrial(self, trial):
        ui = self.ui
        ui.startWidget.visible = trial is None
        ui.trialWidget.visible = trial is not None
        if trial is None:
            return
        many = len(self.sitting.journal.trials)
        text = _("Scan {number} of {many}, to practise on") if trial.case.training else _("Scan {number} of {many}")
        ui.progressLabel.text = text.format(number=trial.index + 1, many=many)
        said = self.sitting.said()
        ui.saidLabel.visible = said is not None
        if said is not None:
            answer, score = said
            text = _("The network says: {answer}") + ("" if score is None else _(" (score {score:.2f})"))
            ui.saidLabel.text = text.format(answer=answer, score=score)
        ui.overlayCheckBox.visible = bool(self.sitting.maps)
        ui.overlayCheckBox.checked = True
        for part, node in self.sitting.explanations.items():
            if part in _VIEWS:
                self._view(part).show(node)
                self._view(part).widget.visible = True
        self._answer = None
        for button in self._buttons.values():
            button.checked = False
        ui.confidenceSlider.value = 0
        self._isSure = False
        ui.pauseButton.checked = False
        self._showPaused(False)
        self._refresh()
        if self.sitting.study.design.seconds is not None:
            self._timer.start()
            self._onTick()

    def _view(self, part):
        """The view of a part of an arm; there is none before a study wants it."""
        if part not in self._views:
            view = self._views[part] = _VIEWS[part](self.logic)
            self.ui.shownWidget.layout().addWidget(view.widget)
            if isinstance(view, WordsPanel):
                # These, too, turn a map on and off.
                view.ui.textBrowser.connect("anchorClicked(QUrl)", lambda _url: self._onLook(True))
                view.ui.hideMapButton.connect("clicked(bool)", lambda _checked: self._onLook(False))
        return self._views[part]

    def _onLook(self, shown):
        self._tried(self.sitting.noteLook, shown)
        self.ui.overlayCheckBox.checked = shown

    def _onOverlay(self, shown):
        self._tried(self.sitting.showOverlay, shown)

    def _onAnswer(self, answer, _checked=True):
        self._answer = answer
        for text, button in self._buttons.items():
            button.checked = text == answer
        self._refresh()

    def _onConfidence(self, _value):
        self._isSure = True
        self._refresh()

    def _onWhere(self, _checked=False):
        node = self.sitting.askPlace()
        if node is not self._pointObserved:
            self._pointObserved = node
            self.addObserver(node, node.PointPositionDefinedEvent, self._refresh)
        self._refresh()

    def _refresh(self, *_event):
        """Let the reader go on once everything is answered, and say what is not."""
        design, place = self.sitting.study.design, self.sitting.place
        self.ui.placeLabel.text = _("Not shown yet") if place is None else results.inWords(place)
        missing = [
            text
            for text, isMissing in (
                (_("choose an answer"), self._answer is None),
                (_("move the slider to say how sure you are"), not self._isSure),
                (_("show where"), design.localise and self._answer == design.answers[-1] and place is None),
            )
            if isMissing
        ]
        self.ui.nextButton.enabled = not missing
        self.ui.nextButton.toolTip = (
            _("First {missing}.").format(missing=_(" and ").join(missing))
            if missing
            else _("Keep the answer, and go on")
        )

    def _onNext(self, _checked=False):
        self._tried(self.sitting.answer, self._answer, self.ui.confidenceSlider.value)
        if not self.ui.messageLabel.text:
            self._next()

    def _onPause(self, paused):
        for view in self._views.values():
            view.show(None)
        if paused:
            self._tried(self.sitting.pause)
        else:
            self._tried(self.sitting.resume, self.ui.overlayCheckBox.checked)
            for part, node in self.sitting.explanations.items():
                if part in _VIEWS:
                    self._view(part).show(node)
        self._showPaused(paused)

    def _showPaused(self, paused):
        self.ui.pauseButton.text = _("Go on") if paused else _("Pause")
        self.ui.readWidget.visible = not paused

    def _onTick(self):
        left = self.sitting.study.design.seconds - self.sitting.seconds
        text = _("{seconds:.0f} s left") if left > 0 else _("Time is over: please answer.")
        self.ui.timeLabel.text = text.format(seconds=left)

    def _onStop(self, _checked=False):
        self.ui.messageLabel.text = _("Begin again to go on where you are; the open scan comes anew.")
        self._end()

    def _leaveTrial(self):
        """Let go of what is shown, before it leaves the scene."""
        self._timer.stop()
        self.ui.timeLabel.text = ""
        self._pointObserved = None
        self.removeObservers(self._refresh)
        for view in self._views.values():
            view.show(None)
            view.widget.visible = False

    def _end(self):
        """Back to the choice of a study."""
        self._leaveTrial()
        if self.sitting is not None:
            self.sitting.close()
        self.sitting = None
        for view in self._views.values():
            view.cleanup()
        for widget in (*self._buttons.values(), *(view.widget for view in self._views.values())):
            widget.setParent(None)
            widget.deleteLater()
        self._buttons, self._views = {}, {}
        self._showTrial(None)

    def _onNodeRemoved(self, *_event):
        sitting = self.sitting
        isOpen = sitting is not None and sitting.trial is not None
        if isOpen and sitting.scan.GetScene() is None and not slicer.mrmlScene.IsBatchProcessing():
            self._onStop()

    def _tried(self, action, *given):
        """What an action returns; None when it cannot be done, and the panel says why."""
        from MedXAILib.errors import MedXAIError

        self.ui.messageLabel.text = ""
        try:
            return action(*given)
        except MedXAIError as error:
            self.ui.messageLabel.text = str(error)
        except ModuleNotFoundError as error:
            text = _("{package} is missing: install what MedXAI needs first (button above).")
            self.ui.messageLabel.text = text.format(package=error.name)
        return None


def _readStudy(path):
    from MedXAILib.study.design import read_study

    return read_study(path)
