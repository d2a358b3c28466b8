"""A question on its way: from the scene to the worker, and back into the scene. Nobody waits for it who need not."""

from __future__ import annotations

import shutil
import threading

import slicer

from MedXAISlicerLib import answers, deleting, display, mrml, regions, results, settings, workers


def load(source, onDone, worker=None):
    """Let the worker load a model from a file, with the code that the person has allowed it to run. `onDone` gets the
    job, whose result is what there is to know of the model, and whether it was trusted. Returns the job."""
    worker = worker or workers.shared()

    def ask(trust):
        return worker.submit({"op": "load", "model": str(source), "trust": trust}, lambda job: answered(job, trust))

    def answered(job, trust):
        from MedXAILib.errors import Untrusted

        if isinstance(job.error, Untrusted) and not trust and settings.isTrusted(job.error.code):
            ask(trust=True)
        else:
            onDone(job, trust)

    return ask(trust=False)


class Asking:
    """What was asked about a volume, and how far it is.

    `state` is "running", "done", "failed" or "cancelled"; `progress` is as in `MedXAILib.client`; `error` is there when
    it failed. `onChange(self)` is called on the main thread whenever one of these changes.
    """

    op = ""
    canFinish = False
    """Whether there is part of an answer, which `finish` keeps."""

    def __init__(self, volumeNode, model, region=None, onChange=None, worker=None, **fields):
        """Ask a model in a file, by its path, about a volume; `volumeNode` as for `mrml.scanOf`, `region` as for
        `regions.inVolume`, `fields` as in docs/worker.md.

        Raises:
            MedXAIError: when it cannot even be asked.
        """
        self.state, self.progress, self.error = "running", None, None
        self.model = None
        """What the worker says of the model, once it is loaded."""
        self.sourceNode, *self._moreChannels = volumeNode if isinstance(volumeNode, (list, tuple)) else [volumeNode]
        self._region, self._onChange = region, onChange
        self._worker = worker or workers.shared()
        self._cancelled = self._lost = False
        self._source = str(model)
        device = settings.get("device") or None
        self._fields = {"volume": mrml.scanOf(volumeNode), "device": device, **fields}
        self._job = load(model, self._loaded, self._worker)
        self._worker.watch(self._advance)

    @property
    def finished(self):
        """Whether it is done, failed or cancelled."""
        return self.state != "running"

    @property
    def cancelled(self):
        """Whether it was told to stop, and to leave nothing."""
        return self._cancelled

    @property
    def stopping(self):
        """Whether it was told to stop, whatever becomes of it."""
        return self._cancelled

    def cancel(self):
        """Stop it. This returns at once, and the scene stays as it was."""
        self._cancelled = True
        self._job.cancel()

    def wait(self):
        """Wait until it is finished.

        Raises:
            MedXAIError: why it is not done.
        """
        while not self.finished:
            self._worker.poll(0.05)
        if self.error is not None:
            raise self.error

    def _loaded(self, job, trust):
        from MedXAILib.errors import MedXAIError

        self.model = job.result
        if job.error is not None or self._cancelled or self._lost:
            self._finish(job.error)
            return
        try:
            self._fields |= self._fieldsFor(job.result)
        except MedXAIError as error:
            self._finish(error)
            return
        request = {"op": self.op, "model": self._source, "trust": trust, **self._fields}
        self._job = self._worker.submit(request, self._heard, self._progressed, self._grown)

    def _fieldsFor(self, model):
        """What of the request depends on the model."""
        if self._region is None:
            return {"region": None}
        return {"region": regions.inVolume(self.sourceNode, self._region, asCentre=model["patch_size"] is not None)}

    def _progressed(self, job):
        self.progress = job.progress
        self._changed()

    # What to do with part of an answer, where there can be one.
    _grown = None

    def _heard(self, job):
        if job.error is not None:
            self._finish(job.error)
        else:
            self._take(job)

    def _take(self, job):
        """Take in the answer."""
        raise NotImplementedError

    def _advance(self):
        """Look whether there is still somebody to answer; returns whether this is over."""
        if self.sourceNode.GetScene() is None and not self._lost and not self.finished:
            # Removed, or its scene was closed.
            self._lost = True
            self._job.cancel()
        return self.finished

    def _finish(self, error=None):
        from MedXAILib.errors import Cancelled, MedXAIError

        if self._lost:
            error = MedXAIError("The volume was removed while it was explained: load it again, or choose another.")
        elif self._cancelled:
            error = Cancelled("Cancelled; the scene is as it was.")
        self.error = error
        self.state = "done" if error is None else "cancelled" if isinstance(error, Cancelled) else "failed"
        self._fields = {}
        self._changed()

    def _changed(self):
        if self._onChange is not None:
            self._onChange(self)


class Predicting(Asking):
    """What does the model say? `scores` by class, and the `text` of a network that writes captions, once it is done."""

    op = "predict"
    scores = None
    text = ""

    def wait(self):
        """Wait until it is finished, and return the scores.

        Raises:
            MedXAIError: why there are none.
        """
        super().wait()
        return self.scores

    def _take(self, job):
        self.scores, self.text = job.result["scores"], job.result.get("text", "")
        self._finish()


class Explaining(Asking):
    """Why does the model say so? `nodes` are the explanation nodes once it is done, one for each target.

    The scene gets all of the result or nothing; while it is computed a map that grows is shown where the method can.
    What has been shown can be kept by ending early, if the method is `anytime`.
    """

    op = "explain"

    def __init__(
        self,
        volumeNode,
        model,
        method="gradcam",
        target=None,
        parameters=None,
        region=None,
        label=None,
        anytime=False,
        **options,
    ):
        """Ask as for `Asking`. Regions of the scene may be among the `parameters`, as for `regions.asParameter`.
        `label` says how a label of a segmentation network is explained, when that is not left to the library: its
        `measure`, and `within` what, as for `MedXAILib.SegmentationTarget`, or within a segment as for
        `regions.maskIn`. Other networks pass over it. `anytime` is what the worker says of the method."""
        self.nodes = []
        self._label, self._anytime, self._finishing = label, anytime, False
        self._partialNode = self._read = self._adding = None
        super().__init__(
            volumeNode,
            model,
            region,
            method=method,
            target=target.spec() if hasattr(target, "spec") else target,
            parameters=dict(parameters or {}),
            allow_cpu=settings.get("allowCpu"),
            allow_smaller_region=settings.get("allowSmallerRegion"),
            **options,
        )

    @property
    def stopping(self):
        return self._cancelled or self._finishing

    @property
    def canFinish(self):
        """Whether a map has been shown, which `finish` keeps."""
        return self._anytime and self._partialNode is not None and not self.stopping and not self.finished

    def finish(self):
        """End it early and keep the map as far as it is, marked as partial; where there is none to keep, cancel. The
        step that is being computed is still waited for: meanwhile it can be cancelled."""
        if self.canFinish:
            self._finishing = True
            self._job.finish()
        else:
            self.cancel()

    def _fieldsFor(self, model):
        fields, target = super()._fieldsFor(model), self._fields["target"]
        given = self._fields["parameters"]
        fields["parameters"] = {name: regions.asParameter(self.sourceNode, value) for name, value in given.items()}
        if self._label is None or model["task"] != "segmentation" or not isinstance(target, (str, int, type(None))):
            return fields
        within = self._label["within"]
        if isinstance(within, tuple):
            within = regions.maskIn(self.sourceNode, *within)
        which = {} if target is None else {"which": target}
        return {**fields, "target": {"kind": "SegmentationTarget", **self._label, **which, "within": within}}

    def wait(self):
        """Wait until it is finished, and return the explanation nodes.

        Raises:
            MedXAIError: why there are none.
        """
        super().wait()
        return self.nodes

    def _grown(self, job, array):
        if self._cancelled or self.sourceNode.GetScene() is None:
            return
        if self._partialNode is None or self._partialNode.GetScene() is None:
            self._partialNode = results.addMapNode(self.sourceNode, array, f"{self.sourceNode.GetName()} so far")
            self._partialNode.SetSaveWithScene(False)
        else:
            slicer.util.updateVolumeFromArray(self._partialNode, array)
        self._partialNode.SetAttribute("MedXAI.Signed", str(int(array.min() < 0)))
        display.colour(self._partialNode)
        display.overlay(self._partialNode)
        self._changed()

    def _take(self, job):
        # Reading and measuring a large map takes longer than a user interface may stand still.
        self._read = _Read(job.result["folders"])

    def _advance(self):
        over = super()._advance()
        if self._read is not None and not self._read.is_alive() and not over:
            self._add()
        return self.finished

    def _add(self):
        """Do the next piece of adding the result to the scene: all at once would hold up the user interface."""
        from MedXAILib.errors import MedXAIError

        if self._read.error is not None or self._cancelled or self._lost:
            if self._adding is not None:
                self._adding.close()
            self._finish(self._read.error)
            return
        self._adding = self._adding or mrml.addingAnswers(self.sourceNode, self._read.answers)
        try:
            next(self._adding)
        except StopIteration as done:
            self.nodes = done.value
            for node in self.nodes:
                results.setMoreChannels(node, self._moreChannels)
            self._finish()
        except MedXAIError as error:
            self._finish(error)

    def _finish(self, error=None):
        if self._partialNode is not None and self._partialNode.GetScene() is not None:
            deleting.remove(self._partialNode)
        super()._finish(error)


class Checking(Asking):
    """How far can a map be trusted? Its node has its trust card, as for `results.card`, once it is done."""

    op = "check"

    def __init__(self, mapNode, segment=None, onChange=None, worker=None):
        """Check the map of a network in a file; `segment` is where it should be, as for `regions.maskIn`, if that is
        known.

        Raises:
            MedXAIError: when it cannot even be asked.
        """
        self.mapNode = mapNode
        scans, made = results.scans(mapNode), results.provenance(mapNode)
        super().__init__(
            scans,
            made["model"]["source"],
            onChange=onChange,
            worker=worker,
            explanation={
                "provenance": made,
                "residual": results.residual(mapNode),
                "map": mrml.scanOf(results.part(mapNode, "Channels") or mapNode),
                "signed": results.isSigned(mapNode),
            },
            segmentation=None if segment is None else regions.maskIn(scans[0], *segment),
        )

    def _fieldsFor(self, model):
        return {}

    def _take(self, job):
        results.setCard(self.mapNode, job.result)
        self._finish()

    def _advance(self):
        if self.mapNode.GetScene() is None and not self.stopping and not self.finished:
            self.cancel()
        return super()._advance()


class _Read(threading.Thread):
    """Reads the folders of a result, and removes them."""

    def __init__(self, folders):
        super().__init__(daemon=True)
        self.answers, self.error = [], None
        self._folders = folders
        self.start()

    def run(self):
        from MedXAILib.errors import MedXAIError

        try:
            self.answers = [answers.read(folder) for folder in self._folders]
        except (MedXAIError, OSError) as error:
            self.error = error if isinstance(error, MedXAIError) else MedXAIError(f"{error}: make room and try again.")
        for folder in self._folders:
            shutil.rmtree(folder, ignore_errors=True)
