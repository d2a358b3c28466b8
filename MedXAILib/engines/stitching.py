"""Explanations of whole scans, put together from those of the windows that a network looks at."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from MedXAILib.engines.whole_scan import WholeScan
from MedXAILib.explainer import Attribution, Explainer, Question
from MedXAILib.grid import shifted
from MedXAILib.model import Model, Prepared
from MedXAILib.target import Bound, Target

# For a backward a network keeps some ten to hundred times its input, and an explainer may want a few of that.
_BACKWARD = 250


@dataclass(frozen=True, eq=False)
class Share(Target):
    """What windows contribute to a value: the sum of their outputs, each times its `lead` (N, K, *part)."""

    lead: Tensor

    def part(self, start: int, stop: int) -> Target:
        return replace(self, lead=self.lead[start:stop])

    def bind(self, model: Model, output: Tensor, seen: Sequence[Prepared]) -> Bound:
        def value(output: Tensor) -> Tensor:
            lead = self.lead.repeat(len(output) // len(self.lead), *[1] * (output.ndim - 1))
            return (output * lead).flatten(1).sum(1)

        return Bound(self, value, "what a window contributes")


def explain_by_windows(explainer: Explainer, scan: WholeScan) -> list[Attribution]:
    """`explainer`'s answer about a whole scan, put together from what it says of each window that a target looks at.

    The question to a window is what it contributes to the value, as the inferer weighs it, to first order. So maps that
    add up (gradients, and what shares out a score) are summed: the gradient of the scan is exactly that. Others, of
    layers, are blended with the inferer's own weights, a window that no target looks at being empty.

    What an explainer does that is not linear, it does within a window: a ReLU, an absolute value, a variance over noisy
    copies; and a baseline that depends on the scan, such as its mean, is the window's. A volume or Dice is replaced by
    its tangent at the scan. The residual is the mean of the windows', each weighed with the size of its map.
    """
    windows, blended = scan.windows, scan.blended()
    leads = [scan.lead(t, blended.output) for t in range(len(scan.targets))]
    grid, here = blended.grid, windows.grid(windows.roi, scan.x)
    counts = torch.stack([torch.stack([(lead[p].abs() * grid.weight).sum() for p in grid.places]) for lead in leads])
    counts = (counts / counts.sum(1, keepdim=True).clamp_min(1e-30)).cpu()
    # Those that count most first, so that the map is there early.
    order = [w for w in counts.amax(0).argsort(descending=True).tolist() if bool(counts[:, w].any())]
    blend = explainer.stitching == "blend"
    # Steps within a window are nobody's concern, and what is said of one would be said again of each.
    run = replace(scan.run, progress=None, partial=None, enough=None)
    run.cost = scan.run.cost
    maps = [here.zeros(1) for _ in leads]
    missed: list[list[tuple[float, dict[str, float]]]] = [[] for _ in leads]
    fitting, recomputed = 0, scan.recomputed

    def work(start: int, stop: int) -> None:
        nonlocal fitting, recomputed
        which = order[start:stop]
        x, low = windows.cut(scan.padded, which), (windows.low[which] - windows.before).numpy()
        seen = [Prepared(part, shifted(scan.seen[0].affine, begin)) for part, begin in zip(x, low, strict=True)]
        targets = [Share(torch.cat([lead[grid.places[w]] * grid.weight for w in which])) for lead in leads]
        asked = Question(scan.model, x, seen, targets, run, fitting=fitting, recomputed=recomputed)
        found = explainer.attribute(asked)
        fitting, recomputed = asked.fitting, asked.recomputed
        for t, attribution in enumerate(found):
            values = attribution.values.detach()
            if maps[t].shape[1] != values.shape[1]:
                maps[t] = here.zeros(values.shape[1])
            missed[t].append((float(values.abs().sum()), attribution.residual))
            for w, one in zip(which, values, strict=True):
                if counts[t, w]:
                    place = here.places[w]
                    maps[t][place] += one * here.weight / here.total[place] if blend else one
        if start == 0:
            for note in run.notes:
                scan.run.note(f"In the windows that count most: {note}")
        scan.run.operators = run.operators
        scan.show(lambda: maps[0][here.inside])

    message = f"{explainer.title} of {len(order)} windows of the scan"
    each = windows.cut(scan.padded, [0])
    scan.run.chunks(len(order), scan.run.fitting(_BACKWARD * each.nbytes, each[0, 0].numel(), each.device)).map(
        work, message, anytime=True
    )
    return [Attribution(total[here.inside], _mean(of)) for total, of in zip(maps, missed, strict=True)]


def _mean(residuals: list[tuple[float, dict[str, float]]]) -> dict[str, float]:
    """The mean of residuals, each with its weight."""
    whole = sum(weight for weight, _ in residuals) or 1.0
    names = residuals[0][1] if residuals else {}
    return {name: sum(weight * of[name] for weight, of in residuals) / whole for name in names}
