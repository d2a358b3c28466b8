"""What a person sets once: where explanations are computed, and where packages come from."""

import slicer
from slicer.i18n import tr as _

from MedXAISlicerLib import settings, workers
from MedXAISlicerLib.panels.panel import Panel


class SettingsPanel(Panel):
    """Keeps every change at once; `onChanged()` follows, when another worker answers from now on."""

    uiFile = "Settings.ui"
    title = _("Settings")

    def __init__(self, logic, onChanged):
        super().__init__(logic)
        self._onChanged = onChanged
        ui = self.ui
        self._fillDevices([])
        ui.allowCpuCheckBox.checked = settings.get("allowCpu")
        ui.allowSmallerRegionCheckBox.checked = settings.get("allowSmallerRegion")
        ui.commandLineEdit.text = settings.get("workerCommand")
        ui.streamCheckBox.checked = settings.get("workerStream")
        ui.wheelFolderPathLineEdit.currentPath = settings.get("wheelFolder")
        ui.deviceSelector.connect("activated(int)", self._deviceChosen)
        ui.allowCpuCheckBox.connect("toggled(bool)", lambda checked: settings.set("allowCpu", checked))
        ui.allowSmallerRegionCheckBox.connect(
            "toggled(bool)", lambda checked: settings.set("allowSmallerRegion", checked)
        )
        ui.commandLineEdit.connect("editingFinished()", self._workerChanged)
        ui.streamCheckBox.connect("toggled(bool)", self._workerChanged)
        ui.wheelFolderPathLineEdit.connect(
            "currentPathChanged(QString)", lambda path: settings.set("wheelFolder", path)
        )
        ui.testButton.connect("clicked(bool)", self._test)
        ui.logButton.connect("clicked(bool)", self._showLog)

    def _fillDevices(self, gpus):
        box, chosen = self.ui.deviceSelector, settings.get("device")
        box.clear()
        box.addItem(_("A GPU where there is one"), "")
        box.addItem(_("CPU"), "cpu")
        for index, name in enumerate(gpus):
            box.addItem(name, f"cuda:{index}")
        if box.findData(chosen) < 0:
            box.addItem(chosen, chosen)
        box.currentIndex = box.findData(chosen)

    def _deviceChosen(self, index):
        settings.set("device", self.ui.deviceSelector.itemData(index))

    def _workerChanged(self, *_value):
        command, stream = self.ui.commandLineEdit.text.strip(), self.ui.streamCheckBox.checked
        if (command, stream) == (settings.get("workerCommand"), settings.get("workerStream")):
            return
        settings.set("workerCommand", command)
        settings.set("workerStream", stream)
        workers.shared().close()
        self._onChanged()

    def _test(self, _checked=False):
        """Ask the worker who it is."""
        self.ui.testLabel.text = _("Asking…")
        workers.shared().submit({"op": "methods"}, onDone=self._answered)

    def _answered(self, job):
        if job.error is not None:
            self.ui.testLabel.text = str(job.error)
            return
        worker = workers.shared().worker
        self._fillDevices(worker["gpus"])
        self.ui.testLabel.text = _("It works: MedXAI {version}, PyTorch {torch}, {gpus}.").format(
            version=worker["version"], torch=worker["torch"], gpus=", ".join(worker["gpus"]) or _("no GPU")
        )

    def _showLog(self, _checked=False):
        log = workers.shared().log
        text = log.read_text(encoding="utf-8", errors="replace") if log is not None and log.exists() else ""
        said = _("The log of the worker is in the details.") if text else _("The worker has said nothing yet.")
        slicer.util.infoDisplay(said, windowTitle=_("Log"), detailedText=text)
