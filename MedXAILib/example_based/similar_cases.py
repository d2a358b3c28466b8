"""Similar cases.

Silva, Poellinger, Cardoso, Reyes, "Interpretability-guided content-based medical image retrieval", 2020; for the maps,
Stylianou, Souvenir, Pless, "Visualizing deep similarity networks", 2019.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from MedXAILib.cases.filters import conditions
from MedXAILib.cases.library import Library
from MedXAILib.cases.nearest import FAR, Few, Nearest, Query, Usual, usual
from MedXAILib.cases.record import Hit, Record
from MedXAILib.cases.shown import part
from MedXAILib.cases.space import Places
from MedXAILib.cases.spaces import Plain, Pooled, Saliency, fingerprint, said
from MedXAILib.errors import MedXAIError
from MedXAILib.example_based.library_method import LibraryMethod, shown_among_others
from MedXAILib.explainer import Folder, Names, Question, Taxonomy
from MedXAILib.explanation import Explanation
from MedXAILib.grid import pasted, resample, resample_part, shifted
from MedXAILib.model import Prepared
from MedXAILib.report.localisation import highest
from MedXAILib.similar_cases import Case, Role, SimilarCases
from MedXAILib.volume import Volume

_SCORED = "cosine similarity"
_SPACES: dict[str, Pooled] = {space.name: space for space in (Plain(), Saliency())}
# By so much a cosine may change when a case is embedded again.
_CHANGED = 1e-3


class SimilarCaseSearch(LibraryMethod):
    """Which other scans are like this one to the network, what does it say of them, and is it right about them?

    Similarity is the cosine between embeddings. These are sums over the places of a layer's grid, and so is the cosine:
    the maps show how much each place of the scan, and of the case, adds to it. Nothing is shown when nothing is near:
    when the nearest case is less similar than those of 99 % of the library's cases are to theirs.
    """

    id: ClassVar[str] = "similar_cases"
    title: ClassVar[str] = "Similar cases"
    paper: ClassVar[str] = "Silva 2020"
    kind: ClassVar[str] = "SimilarCases"
    bare: ClassVar[Mapping[str, Any]] = {"maps": False}
    taxonomy: ClassVar[Taxonomy] = Taxonomy(
        "3.3",
        "example-based",
        "post hoc",
        "model-specific",
        ("local",),
        strengths="by cases, as readers reason; shows where the likeness lies; says when nothing is near",
        limits="alike to the network need not be alike to a radiologist; no better than the library",
    )

    library: Folder = Field(
        "",
        description="library of cases that this network embedded, as medxai cases build makes them; demonstration "
        "nodules when left out",
    )
    count: int = Field(4, ge=1, description="nearest cases to show of which the network says the same")
    unlike: int = Field(2, ge=0, description="nearest cases to show of which the network says otherwise")
    mistaken: int = Field(1, ge=0, description="nearest other cases to show about which the network is wrong")
    space: Literal["plain", "saliency"] = Field(
        "plain",
        description="what is compared: all that the network found, or what speaks for the class that it predicts",
    )
    rerank: bool = Field(False, description="order the 100 nearest by their most similar regions (late interaction)")
    where: Names = Field(
        (), description="what must hold of a case, such as diameter_mm=10..20, label=malignant or label=none|benign"
    )
    patient: str = Field("", description="whose scan this is: cases of the same patient are not shown")
    among: Names = Field((), description="uids of the only cases to compare with; the network embeds them anew")
    maps: bool = Field(True, description="show where in the scan, and in each case, the likeness lies")

    @classmethod
    def asked_again(cls, told: Explanation) -> Mapping[str, Any]:
        # Another network embeds otherwise. It is asked which of a few cases are similar, those that were among them.
        assert isinstance(told, SimilarCases)
        return {**cls.bare, "among": shown_among_others(told)}

    def tell(self, question: Question, volume: Volume) -> Callable[..., Explanation]:
        run, space = question.run, _SPACES[self.space]
        library = self.opened(question)
        run.step(0, 1, self.title)
        here = self._places(question, question.x)
        query = self._query(question, volume, here.vectors[0])
        if not query.vector.any():
            return _nothing("The network finds nothing in this scan that could be compared.")
        nearest = self._nearest(question, library, query)
        found = nearest.roles(self.count, self.unlike, self.mistaken)
        if not found:
            return _nothing("No case of the library is as was asked for.")
        least = nearest.usual.least
        if nearest.best < least:
            return _nothing(
                f"No case of the library is near this scan: its nearest is less similar ({nearest.best:.3f}) than "
                f"those of {1 - FAR:.0%} of the cases are to theirs ({least:.3f} or more)."
            )
        cases, missed, shown = [], [0.0], None
        for i, (role, hit) in enumerate(found):
            run.step(i, len(found), self.title)
            percentile = nearest.usual.percentile(hit.similarity)
            case = _case(hit, role, percentile, library)
            if self.maps:
                alike = here.alike(torch.tensor(hit.record.vectors[space.name])[None])
                case, miss = self._with_scan(case, hit, question, library, here)
                missed += [miss, _missed(alike, hit.similarity)]
                if len(volume.shape) == 3 and here.mapped:
                    values = here.placed(alike)[0].float()
                    box, where = resample_part(values, question.seen[0].affine, volume.shape, volume.affine)
                    corner = shifted(volume.affine, np.array([side.start for side in where]))
                    # None where the network looks between two slices.
                    case = replace(case, query_map=Volume(box, corner) if box.numel() else None)
                    shown = pasted(box, where, volume.shape) if shown is None else shown
            cases.append(case)
        return partial(
            SimilarCases,
            residual={"sum of map": max(missed)} if self.maps else {},
            cases=tuple(cases),
            query_map=shown,
            affine=None if shown is None else volume.affine,
            scored=_SCORED,
            text=_text(query.says, found),
        )

    def _query(self, question: Question, volume: Volume, vector: Tensor) -> Query:
        model = question.model
        with torch.no_grad():
            (says,) = said(model, model.forward(question.x))
        question.run.cost.forwards += 1 + self.rerank
        return Query(
            vector=vector.float().numpy(),
            says=says,
            embedder=fingerprint(model),
            patient=self.patient,
            scan=volume.fingerprint,
            regions=Plain().regions(model, question.x)[0].numpy() if self.rerank else None,
            where={} if self.among else conditions(self.where),
        )

    def _nearest(self, question: Question, library: Library, query: Query) -> Nearest:
        space = _SPACES[self.space]
        if not self.among:
            return Nearest(query, library, usual(library, space), space)
        few = self._anew(question, library)
        matrix = np.stack([record.vectors[space.name] for record in few])
        return Nearest(query, Few(few, space), Usual.of(few, matrix, space), space)

    def _anew(self, question: Question, library: Library) -> list[Record]:
        """The cases to look among, embedded by the network that is asked."""
        model, run, space = question.model, question.run, _SPACES[self.space]
        held = library.records({**conditions(self.where), "uid": set(self.among)})
        whose = {self.patient, library.pseudonym(self.patient)} if self.patient else set()
        found = []
        for i, record in enumerate(held):
            run.step(i, len(held), "Embedding cases anew")
            if record.patient not in whose:
                x = _seen(question, record, library.volume(record))[1]
                with torch.no_grad():
                    (says,) = said(model, model.forward(x))
                vectors = {space.name: space.embed(model, x)[0].numpy()}
                regions = Plain().regions(model, x)[0].numpy() if self.rerank else None
                found.append(replace(record, said=says, vectors=vectors, regions=regions))
                run.cost.forwards += 2
        if not found:
            raise MedXAIError(
                "None of the cases to look among is in the library, or as was asked for: give uids of it."
            )
        return found

    def _places(self, question: Question, x: Tensor) -> Places:
        cost = question.run.cost
        cost.forwards += len(x)
        cost.backwards += len(x) * (self.space == "saliency")
        return _SPACES[self.space].places(question.model, x)

    def _with_scan(
        self, case: Case, hit: Hit, question: Question, library: Library, here: Places
    ) -> tuple[Case, float]:
        """`case` with its scan, and where in it the likeness lies, or as it is when the scan cannot be read; and by how
        much the map misses the similarity."""
        run = question.run
        try:
            scan = library.volume(hit.record)
            seen, x = _seen(question, hit.record, scan)
        except MedXAIError as error:
            run.note(f"The case '{case.uid}' is shown without its scan: {error}")
            return case, 0.0
        there = self._places(question, x)
        alike = there.alike(here.vectors)
        missed = _missed(alike, hit.similarity)
        if missed > _CHANGED:
            run.note(f"The scan of the case '{case.uid}' is not what was embedded: add the case again.")
        inside = part(scan, seen)
        placed = _on(there, alike, seen, inside)
        return replace(case, volume=inside, map=placed, place=_peak(placed, inside)), missed


def _on(places: Places, alike: Tensor, seen: Prepared, volume: Volume) -> Tensor | None:
    """What each place adds, on the grid of `volume`: (1, D, H, W). None where the network does not say."""
    if not places.mapped:
        return None
    return resample(places.placed(alike)[0].float(), seen.affine, volume.shape, volume.affine)


def _peak(values: Tensor | None, volume: Volume) -> Any:
    """The point of a map in RAS mm; none of a plain image."""
    if values is None or len(volume.shape) < 3:
        return None
    return tuple(float(v) for v in volume.to_point(highest(values[0])))


def _nothing(why: str) -> Callable[..., Explanation]:
    return partial(SimilarCases, residual={}, cases=(), scored=_SCORED, text=f"{why} None is shown.")


def _seen(question: Question, record: Record, scan: Volume) -> tuple[Prepared, Tensor]:
    """What the network sees of a case."""
    seen = question.model.prepare(scan, record.region)
    return seen, seen.x[None].to(question.x)


def _missed(alike: Tensor, similarity: float) -> float:
    return abs(float(alike.sum()) - similarity)


def _case(hit: Hit, role: Role, percentile: float, library: Library) -> Case:
    record = hit.record
    known = {name: float(value) for name, value in record.meta.items() if not isinstance(value, str)}
    own = {"percentile": percentile}
    return Case(
        uid=record.uid,
        label=record.label,
        similarity=hit.similarity,
        source=str(library.scan(record)) if record.volume else None,
        role=role,
        note=_note(record, percentile),
        # First, and whatever else may be called so.
        numbers=own | known | own,
    )


def _note(record: Record, percentile: float) -> str:
    """What a person should know of a case."""
    known = f"Known as {record.label}." if record.label else "Nothing is known of it."
    says = f" The network says {record.said}." if record.said else ""
    near = f" It is nearer than {percentile:.0f} % of the library's cases are to their nearest."
    return known + says + near


def _text(says: str, found: Sequence[tuple[Role, Hit]]) -> str:
    """What the cases come to."""
    words: dict[Role, str] = {
        "alike": " of which it says so, too" if says else "",
        "unlike": " of which it says otherwise" if says else " of another label",
        "mistaken": " about which it is wrong",
    }
    parts = [f"The network says {says}."] if says else []
    for role, which in words.items():
        hits = [hit for of, hit in found if of == role]
        if hits:
            count = f"{len(hits)} nearest cases" if len(hits) > 1 else "nearest case"
            labels = Counter(hit.record.label or "unknown" for hit in hits)
            known = ", ".join(f"{n} {label}" for label, n in labels.most_common())
            parts.append(f"The {count}{which} (similarity up to {max(hit.similarity for hit in hits):.2f}): {known}.")
    return " ".join(parts)
