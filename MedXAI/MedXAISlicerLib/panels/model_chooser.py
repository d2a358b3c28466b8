"""Which network: a demonstration, one used before, or one from the disk, and what the worker says of it."""

from pathlib import Path

import qt
import slicer
from slicer.i18n import tr as _

from MedXAISlicerLib import asking, settings


class ModelChooser:
    """A combo box of networks with a line about the chosen one. `path` and `model`, what the worker says of it, are
    there when they are; `onChosen(path)` and `onLoaded()` tell so."""

    def __init__(self, box, label, onChosen, onLoaded):
        from MedXAILib.resources import path

        self.path = ""
        self.model = None
        self._box, self._label, self._onChosen, self._onLoaded = box, label, onChosen, onLoaded
        demos = sorted(p for p in path("Models").iterdir() if (p / "configs" / "metadata.json").is_file())
        self._first = str(path("Models/lung_nodule"))
        recent = [Path(p) for p in settings.get("recentModels")]
        for model in [*demos, *(p for p in recent if p not in demos and p.exists())]:
            self._add(model, box.count, demo=model in demos)
        box.insertSeparator(box.count)
        box.addItem(_("Open a bundle folder…"), "folder")
        box.addItem(_("Open a file (zipped bundle, TorchScript)…"), "file")
        box.addItem(_("Type a path, such as one on the machine that computes…"), "path")
        box.connect("activated(int)", self._activated)

    def choose(self, path=""):
        """Choose a network by its path; the first demonstration when there is none."""
        path = path or self._first
        if self._box.findData(path) < 0:
            self._add(Path(path), 0)
        self._box.currentIndex = self._box.findData(path)
        self.path, self.model = path, None
        self._onChosen(path)

    def load(self):
        """Let the worker look at the network, which tells its answers, channels and layers."""
        path, self.model = self.path, None
        self._label.text = _("Loading…")
        asking.load(path, lambda job, trusted: self._loaded(path, job))

    def _loaded(self, path, job):
        from MedXAILib.errors import Untrusted

        if path != self.path:
            return
        if isinstance(job.error, Untrusted) and trusts(job.error):
            self.load()
            return
        self.model = job.result
        if job.error is not None:
            self._label.text = forPerson(job.error)
            return
        size = self.model["patch_size"]
        looks = _("patches of {size} voxels").format(size=" × ".join(map(str, size))) if size else _("any size of scan")
        if size and self.model["window"]:
            looks = _("{patches}, one after the other over a whole scan").format(patches=looks)
        self._label.text = _("{task} · {looks}").format(task=self.model["task"].capitalize(), looks=looks)
        self._onLoaded()

    def _add(self, path, at, demo=False):
        name = path.stem.replace("_", " ")
        self._box.insertItem(at, _("Demonstration: {name}").format(name=name) if demo else name, str(path))
        self._box.setItemData(at, str(path), qt.Qt.ToolTipRole)

    def _activated(self, index):
        chosen = self._box.itemData(index)
        if chosen == "folder":
            chosen = qt.QFileDialog.getExistingDirectory(self._box, _("The folder of a MONAI bundle"))
        elif chosen == "file":
            kinds = _("Networks") + " (*.zip *.ts *.pt *.torchscript)"
            chosen = qt.QFileDialog.getOpenFileName(self._box, _("A network"), "", kinds)
        elif chosen == "path":
            chosen = qt.QInputDialog.getText(self._box, _("A network"), _("Path of a bundle or TorchScript file:"))
        # PySide gives the filter, or whether it was confirmed, too.
        chosen = chosen[0] if isinstance(chosen, tuple) else chosen
        self.choose(chosen or self.path)


def trusts(error):
    """Whether the person lets a network run the code it brings along; what they allowed once is not asked again."""
    asked = _("{what}\n\nLet it run, now and in future?").format(what=forPerson(error))
    if not slicer.util.confirmYesNoDisplay(asked, windowTitle=_("Code of a network"), detailedText=error.code):
        return False
    settings.trust(error.code)
    return True


def forPerson(error):
    """An error as the panels say it: how to pass an argument is for programmers."""
    said = str(error).replace("pass trust=True only if you trust its maker", "let it run only if you trust its maker")
    said = said.replace("say where with region=(x, y, z) in RAS mm", "say where to look, such as around a point")
    said = said.replace("it would take too long; ask for it", "it would take too long")
    return said.replace("within='everywhere'", "explain it everywhere")
