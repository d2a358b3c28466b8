"""Perturbation of whole scans: the network is asked again only about the windows that a change touches."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import groupby
from math import prod

import torch
from torch import Tensor

from MedXAILib.engines.boxes import put
from MedXAILib.engines.perturbation import Evaluator
from MedXAILib.engines.whole_scan import WholeScan

# How many batches of windows are asked about between two steps that can be seen and cancelled.
_BATCHES = 4


class ByWindow(Evaluator):
    """Asks only about the windows that a change touches, and of those only about the ones a target looks at.

    Exact for any network, because a window's output depends on nothing outside it. What a linear target gains is the
    sum of what the windows gain; for any other the blended output is put together again.
    """

    def __init__(self, question: WholeScan, box: Sequence[int]) -> None:
        self.question = question
        self.at_sample = question.values(question.x)
        output, targets = question.blended().output, range(len(question.targets))
        self._linear = {t: question.lead(t, output) for t in targets if question.linear(t)}
        self._others = [t for t in targets if t not in self._linear]
        self._changed = output.clone() if self._others else output
        self._shares: dict[int, dict[int, Tensor]] = {}
        self.size = self._at_a_time(box)

    def values(self, patches: Tensor, low: Tensor) -> list[Tensor]:
        windows, x = self.question.windows, self.question.x
        over = (low < 0) | (low + torch.tensor(patches.shape[2:]) > torch.tensor(windows.shape))
        if not windows.mirrors and not (windows.pads and bool(over.any())):
            return self._values(patches, low + windows.before)
        # What is around the scan changes with it, or must not be changed.
        found = []
        for patch, place in zip(patches.split(1), low.split(1), strict=True):
            whole = x.clone()
            put(whole, torch.zeros_like(place), patch, place)
            found.append(self._values(windows.padded(whole), torch.zeros_like(place)))
        return [torch.cat(of_target) for of_target in zip(*found, strict=True)]

    def _values(self, patches: Tensor, low: Tensor) -> list[Tensor]:
        """As `values`, with places in the padded scan."""
        question, blended = self.question, self.question.blended()
        grid, found = blended.grid, [value.repeat(len(low)) for value in self.at_sample]
        for m, answers in groupby(self._asked(patches, low), key=lambda answer: answer[0]):
            touched = []
            for _, w, output, before in answers:
                place = grid.places[w]
                touched.append(place)
                for t, lead in self._linear.items():
                    found[t][m] += (output * grid.weight * lead[place]).sum() - self._shares[w][t]
                if self._others:
                    self._changed[place] += (output - before) * grid.weight / grid.total[place]
            for t in self._others:
                found[t][m] = question.bound[t].value(self._changed[grid.inside])[0]
            if self._others:
                for place in touched:
                    self._changed[place] = blended.output[place]
        return found

    def _asked(self, patches: Tensor, low: Tensor) -> Iterator[tuple[int, int, Tensor, Tensor]]:
        """For each change and each window to ask about: their numbers, the window's output, and what it was before."""
        question, windows, reach = self.question, self.question.windows, self.question.blended().reach
        begins, box = windows.low[reach], torch.tensor(patches.shape[2:])
        meets = (low[:, None] < begins + torch.tensor(windows.roi)) & (low[:, None] + box > begins)
        pairs = [(m, reach[i]) for m, i in meets.all(-1).nonzero().tolist()]
        self._share_out([w for w in dict.fromkeys(w for _, w in pairs) if w not in self._shares])
        for i in range(0, len(pairs), question.batch):
            some = pairs[i : i + question.batch]
            which = [w for _, w in some]
            parts, begin = windows.cut(question.padded, which), 0
            for m, same in groupby(m for m, _ in some):
                stop = begin + len(list(same))
                patch, place = patches[m].expand(stop - begin, *patches.shape[1:]), low[m].expand(stop - begin, -1)
                put(parts[begin:stop], windows.low[which[begin:stop]], patch, place)
                begin = stop
            with torch.no_grad():
                outputs = question.ask(parts)
            before = question.outputs(which) if self._others else outputs
            yield from ((m, w, output, old) for (m, w), output, old in zip(some, outputs, before, strict=True))

    def _share_out(self, which: Sequence[int]) -> None:
        """Find out what some windows contribute to the linear targets as they are."""
        grid, batch = self.question.blended().grid, self.question.batch
        for i in range(0, len(which) if self._linear else 0, batch):
            some = which[i : i + batch]
            for w, output in zip(some, self.question.outputs(some), strict=True):
                place = grid.places[w]
                self._shares[w] = {t: (output * grid.weight * lead[place]).sum() for t, lead in self._linear.items()}

    def _at_a_time(self, box: Sequence[int]) -> int:
        """As many boxes as fill a few batches of windows, if they touch as many as they do on average."""
        question, windows = self.question, self.question.windows
        fits = question.run.fitting(16 * question.x[0, :, 0].nbytes * prod(box), prod(box), question.x.device)
        share = prod(min(1.0, (r + b) / n) for r, b, n in zip(windows.roi, box, windows.size, strict=True))
        touched = max(share * len(question.blended().reach), 1e-9)
        return max(1, min(fits, int(_BATCHES * question.batch / touched)))
