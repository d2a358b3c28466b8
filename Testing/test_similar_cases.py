"""Similar cases of a network whose embedding is written into its scans, and of the shipped one on an oblique scan."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import SimpleITK as sitk
import small_explanations
import torch
from conftest import NETWORKS, make_model, oblique_affine
from monai.transforms import Compose, ScaleIntensityRange, Spacing
from torch import Tensor, nn

import MedXAILib as mx
from MedXAILib.cases.filters import conditions
from MedXAILib.cases.nearest import Usual, by_strongest, usual
from MedXAILib.cases.record import SCAN, Record
from MedXAILib.cases.shown import part
from MedXAILib.cases.spaces import SPACES, Plain, Saliency, contributions, fingerprint, said
from MedXAILib.grid import corners, shifted, transform
from MedXAILib.model import Prepared
from MedXAILib.report.montage import Look
from MedXAILib.report.residuals import residual
from MedXAILib.resources import path
from MedXAILib.trust import telling

pytest.importorskip("lancedb")
from MedXAILib.cases.library import Embedder, Library

PLACES = ((0, 0, 0), (0, 1, 2), (1, 2, 0), (1, 0, 1))
"""Of the grid of the network below."""


class Reading(nn.Module):
    """Reads three numbers in each block of 2 x 2 x 2 voxels: what is at three of its corners. The classes are the means
    of the first two."""

    def __init__(self) -> None:
        super().__init__()
        self.found = nn.Conv3d(1, 3, 2, stride=2, bias=False)
        self.head = nn.Linear(3, 2, bias=False)
        with torch.no_grad():
            self.found.weight.zero_()
            for channel, corner in enumerate(((0, 0, 0), (1, 1, 1), (0, 1, 0))):
                self.found.weight[channel, 0][corner] = 1
            self.head.weight.copy_(torch.eye(2, 3))

    def forward(self, x: Tensor) -> Tensor:
        answer: Tensor = self.head(self.found(x).mean((2, 3, 4)))
        return answer


class Embedding(nn.Module):
    """The same as an embedding, of length one, that says what each place adds to it."""

    def __init__(self) -> None:
        super().__init__()
        self.found = Reading().found

    def contributions(self, x: Tensor) -> Tensor:
        found: Tensor = self.found(x)
        return found / found[0, 0].numel()

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.normalize(self.contributions(x).flatten(2).sum(2))


def model(network: nn.Module | None = None, **known: Any) -> mx.Model:
    return mx.Model(network or Reading(), **{"class_names": ("smooth", "spiky"), "layers": ("found",), **known})


def scan(*numbers: float, place: tuple[int, int, int] = PLACES[0], source: str | None = None) -> mx.Volume:
    """A scan in which these numbers are at one place, on an oblique, anisotropic grid of 4 x 6 x 6."""
    data = torch.zeros(1, 4, 6, 6)
    d, h, w = (2 * i for i in place)
    for corner, number in zip(((0, 0, 0), (1, 1, 1), (0, 1, 0)), numbers, strict=True):
        data[0, d + corner[0], h + corner[1], w + corner[2]] = number
    return mx.Volume(data, oblique_affine(), source)


CASES: dict[str, tuple[tuple[float, float, float], str]] = {
    "a": ((4, 1, 0), "smooth"),
    "b": ((4, 2, 0), "smooth"),
    "c": ((4, 3, 0), "spiky"),
    "d": ((3, 4, 0), "spiky"),
    "e": ((2, 4, 0), "smooth"),
    "f": ((1, 4, 0), ""),
}
"""What is in the scans, and what is known of them: of c and e the network is wrong."""


def record(made: mx.Model, uid: str, of: mx.Volume, label: str = "", **known: Any) -> Record:
    x = of.data[None]
    spaces = ["plain"] if made.task == "embedding" else ["plain", "saliency"]
    with torch.no_grad():
        (says,) = said(made, made.forward(x))
    vectors = {name: SPACES[name].embed(made, x)[0].numpy() for name in spaces}
    regions = Plain().regions(made, x)[0].numpy()
    return Record(uid, known.pop("patient", f"patient {uid}"), label, says, vectors, regions, **known)


def embedder(made: mx.Model) -> Embedder:
    sizes = {"plain": 3} if made.task == "embedding" else {"plain": 6, "saliency": 3}
    return Embedder(fingerprint(made), "", "reading", {name: (size, "cosine") for name, size in sizes.items()})


@pytest.fixture
def made() -> mx.Model:
    return model()


def stored(folder: Path, made: mx.Model, cases: dict[str, Any] | None = None) -> Library:
    """A library of the `CASES`, each at another place of its scan."""
    library = Library.create(folder / "library", embedder(made))
    records = []
    for i, (uid, (numbers, label)) in enumerate((cases or CASES).items()):
        volume = scan(*numbers, place=PLACES[i % len(PLACES)])
        sitk.WriteImage(volume.to_sitk(), str(folder / "library" / f"{uid}.nrrd"))
        meta = {"diameter_mm": 10.0 + i, "site": "left" if i % 2 else "right", SCAN: volume.fingerprint}
        records.append(record(made, uid, volume, label, volume=f"{uid}.nrrd", meta=meta))
    library.add(records)
    return library


def ask(made: mx.Model, library: Library | str, volume: mx.Volume, **parameters: Any) -> mx.SimilarCases:
    where = library.path if isinstance(library, Library) else library
    found = mx.tell(made, volume, "similar_cases", library=where, **parameters)
    assert isinstance(found, mx.SimilarCases)
    return found


def on_scan(case: mx.Case, volume: mx.Volume) -> Tensor:
    """The part of the scan's grid that is kept, voxel by voxel where it belongs: (1, D, H, W)."""
    assert case.query_map is not None
    own, whole = case.query_map, torch.zeros(1, *volume.shape)
    np.testing.assert_allclose(own.affine[:3, :3], volume.affine[:3, :3], atol=1e-9)
    d, h, w = volume.to_index(own.to_point((0, 0, 0))).round().astype(int)
    box = tuple(slice(int(i), int(i) + n) for i, n in zip((d, h, w), own.shape, strict=True))
    whole[(slice(None), *box)] = own.data
    return whole


def uids(found: mx.SimilarCases, role: str) -> list[str]:
    return [case.uid for case in found.cases if case.role == role]


def cosine(one: Sequence[float], other: Sequence[float]) -> float:
    a, b = np.array(one), np.array(other)
    return float(a @ b / np.linalg.norm(a) / np.linalg.norm(b))


def test_alike_unlike_and_mistaken_in_their_order(made: mx.Model, tmp_path: Path) -> None:
    """All of a scan is at one place, so the mean is a part of the maximum, and the cosine that of the numbers."""
    asked = (4.0, 1.6, 0.0)
    found = ask(made, stored(tmp_path, made), scan(*asked), count=2, unlike=2, mistaken=2)
    assert (uids(found, "alike"), uids(found, "unlike"), uids(found, "mistaken")) == (["b", "a"], ["d", "e"], ["c"])
    for case in found.cases:
        assert case.similarity == pytest.approx(cosine(asked, CASES[case.uid][0]), abs=1e-6)
        assert case.label == CASES[case.uid][1]
    assert found.scored == "cosine similarity"
    assert "says smooth" in found.text and "2 smooth" in found.text


def test_maps_sum_to_the_similarity_at_the_place_it_comes_from(made: mx.Model, tmp_path: Path) -> None:
    """All of it comes from one block of 2 x 2 x 2 voxels, in the scan and in each case."""
    here = PLACES[2]
    volume = scan(4, 1.6, 0, place=here)
    found = ask(made, stored(tmp_path, made), volume)
    assert found.residual["sum of map"] <= 1e-5
    assert found.query_map is not None and torch.equal(found.query_map, on_scan(found.cases[0], volume))
    for case in found.cases:
        there = PLACES[list(CASES).index(case.uid) % len(PLACES)]
        assert case.map is not None and case.query_map is not None and case.volume is not None
        for values, place in ((on_scan(case, volume), here), (case.map, there)):
            block = tuple(slice(2 * i, 2 * i + 2) for i in place)
            # A unit of the grid spreads over its own voxels and half of those beside them.
            assert float(values[0].max()) == pytest.approx(float(values[0][block].max()))
            assert float(values[0].max()) > 0.5 * case.similarity
        assert torch.equal(case.volume.data, scan(*CASES[case.uid][0], place=there).data)
        index = case.volume.to_index(case.place)  # type: ignore[arg-type]
        assert all(2 * i - 1e-4 <= at <= 2 * i + 1 + 1e-4 for i, at in zip(there, index, strict=True))


def test_what_each_place_adds_sums_to_the_embedding_and_to_the_similarity() -> None:
    """Means and maxima, and cosines, as NumPy has them; of both signs, and with a maximum that two places share."""
    random = torch.Generator().manual_seed(1)
    x = torch.randn(3, 1, 4, 6, 6, generator=random)
    x[0, 0, 0::2, 0::2, 0::2] = 1.5
    made = model()
    found = made.network.found(x).detach().flatten(2).double().numpy()  # type: ignore[operator]
    expected = np.concatenate([found.mean(2), found.max(2)], 1)
    values = contributions(made, x)
    np.testing.assert_allclose(values.flatten(2).sum(2), expected, atol=1e-12)
    np.testing.assert_allclose(Plain().embed(made, x), expected, rtol=1e-6)
    alike = Plain().places(made, x).alike(torch.from_numpy(expected[1:2]))
    assert alike.shape == (3, 2, 3, 3)
    np.testing.assert_allclose(alike.flatten(1).sum(1), [cosine(row, expected[1]) for row in expected], atol=1e-12)
    # Both places that have the maximum have as much of it.
    assert float(values[0, 3, 0, 0, 0]) == pytest.approx(float(values[0, 3, 1, 1, 1])) == pytest.approx(1.5 / 18)


def test_saliency_weighs_places_by_what_speaks_for_the_class() -> None:
    """The class is the mean of the first number, so a place speaks for it by that number, if it is positive."""
    numbers = {PLACES[0]: (6.0, 0.0, 1.0), PLACES[1]: (2.0, 1.0, 5.0), PLACES[2]: (-3.0, 0.0, 7.0)}
    volume = scan(0, 0, 0)
    for place, three in numbers.items():
        volume = replace(volume, data=volume.data + scan(*three, place=place).data)
    expected = (6 * np.array((6, 0, 1)) + 2 * np.array((2, 1, 5))) / 8
    np.testing.assert_allclose(SPACES["saliency"].embed(model(), volume.data[None])[0], expected, rtol=1e-6)
    # Nothing speaks for the class of a scan with nothing in it but what speaks against both.
    against = scan(-6, -6, 9).data[None]
    np.testing.assert_allclose(SPACES["saliency"].embed(model(), against)[0], np.array((-6, -6, 9)) / 18, rtol=1e-6)


def test_saliency_space_finds_by_what_speaks_for_the_class(made: mx.Model, tmp_path: Path) -> None:
    """What is beside it, at another place, changes the plain similarity and not this one."""
    library = stored(tmp_path, made)
    volume = replace(scan(4, 1.2, 0), data=scan(4, 1.2, 0).data + scan(0, 0, 0.5, place=PLACES[1]).data)
    found = ask(made, library, volume, space="saliency")
    assert uids(found, "alike") == ["a", "b", "c"]
    nearest = {case.uid: case.similarity for case in found.cases}
    assert nearest["b"] == pytest.approx(cosine((4, 1.2), (4, 2)), abs=1e-6)
    assert found.residual["sum of map"] <= 1e-5
    plain = {case.uid: case.similarity for case in ask(made, library, volume).cases}
    assert plain["b"] == pytest.approx(cosine((4, 1.2, 0.5), (4, 2, 0)), abs=1e-6)


def test_cases_of_the_patient_are_left_out(made: mx.Model, tmp_path: Path) -> None:
    library = stored(tmp_path, made)
    assert "b" in uids(ask(made, library, scan(4, 1.6, 0)), "alike")
    assert "b" not in [case.uid for case in ask(made, library, scan(4, 1.6, 0), patient="patient b").cases]


def test_the_scan_itself_is_no_case(made: mx.Model, tmp_path: Path) -> None:
    """Neither by what the network makes of it, nor by its voxels where the network looked elsewhere."""
    library = stored(tmp_path, made)
    assert uids(ask(made, library, scan(4, 2, 0)), "alike") == ["c", "a"]
    volume = scan(4, 1.9, 0)
    other = record(made, "elsewhere", scan(4, 1.7, 0), "smooth", meta={SCAN: volume.fingerprint})
    library.add([other])
    assert "elsewhere" not in uids(ask(made, library, volume), "alike")
    assert "elsewhere" in uids(ask(made, library, scan(4, 1.8, 0), maps=False), "alike")


def test_filters(made: mx.Model, tmp_path: Path) -> None:
    library, volume = stored(tmp_path, made), scan(4, 1.6, 0)

    def of(where: Any) -> list[str]:
        return sorted(case.uid for case in ask(made, library, volume, where=where, maps=False, unlike=4).cases)

    assert of("diameter_mm=11..13") == ["b", "c", "d"]
    assert of("diameter_mm=13.., site=left") == ["d", "f"]
    assert of("label=spiky") == ["c", "d"]
    assert of("label=spiky|smooth, said=spiky") == ["d", "e"]
    assert "as was asked for" in ask(made, library, volume, where="site=above").text
    with pytest.raises(mx.MedXAIError, match="is no filter"):
        of("diameter_mm")


def test_conditions_are_ranges_numbers_and_names() -> None:
    assert conditions(["a=1..2.5", "b=..-3", "c=1e2..", "d=x|2", "d=y", "e=nan", "label=7"]) == {
        "a": (1.0, 2.5),
        "b": (None, -3.0),
        "c": (100.0, None),
        "d": {"x", "2", 2.0, "y"},
        "e": {"nan"},
        "label": {"7"},
    }
    for wrong in ("a", "=1", "a=", "a=..", "label=1..2", "a=1..2..3"):
        with pytest.raises(mx.MedXAIError, match="is no filter"):
            conditions([wrong])
    with pytest.raises(mx.MedXAIError, match="is no filter"):
        conditions(["a=1", "a=1..2"])


def test_none_is_shown_when_none_is_near(made: mx.Model, tmp_path: Path) -> None:
    """In the library the nearest are at least as alike as e and f; the third number is new to it."""
    library = stored(tmp_path, made)
    near = ask(made, library, scan(4, 1.6, 0.2))
    assert near.cases
    far = ask(made, library, scan(2, 1, 9))
    assert far.cases == () and "No case of the library is near this scan" in far.text and far.query_map is None
    unread = scan(0, 0, 0)
    unread.data[0, 1, 0, 0] = 1
    nothing = ask(made, library, unread)
    assert nothing.cases == () and "finds nothing" in nothing.text


def test_how_near_is_near_is_what_the_library_is_like() -> None:
    """By hand: four unit vectors at 0, 10, 40 and 100 degrees; the nearest are 10, 10, 30 and 60 degrees away; of the
    second patient's two, 0 and 40 degrees, each other do not count."""
    angles = np.deg2rad([0, 10, 40, 100])
    matrix = np.stack([np.cos(angles), np.sin(angles)], 1)

    def near(*patients: str) -> np.ndarray:
        return Usual.of([Record(str(i), patient) for i, patient in enumerate(patients)], matrix, Plain()).near

    apart = np.cos(np.deg2rad([60, 30, 10, 10]))
    np.testing.assert_allclose(near("a", "b", "c", "d"), apart)
    np.testing.assert_allclose(near("a", "a", "a", "a"), apart)
    np.testing.assert_allclose(near("a", "a", "c", "c"), np.cos(np.deg2rad([90, 40, 30, 30])), atol=1e-12)
    known = Usual(frozenset(), frozenset(), apart)
    assert known.percentile(np.cos(np.deg2rad(20))) == 50 and known.percentile(0.99) == 100
    assert known.least == pytest.approx(np.quantile(apart, 0.01))


def test_another_library_at_the_same_place_is_known_anew(made: mx.Model, tmp_path: Path) -> None:
    first = stored(tmp_path, made)
    labels = usual(first, Plain()).labels
    shutil.rmtree(tmp_path / "library")
    second = stored(tmp_path, made, {uid: (numbers, "other") for uid, (numbers, _) in CASES.items()})
    assert (second.path, second.version) == (first.path, first.version)
    assert labels == {"smooth", "spiky"} and usual(second, Plain()).labels == {"other"}


def test_another_network_is_refused(made: mx.Model, tmp_path: Path) -> None:
    library = stored(tmp_path, made)
    other = model()
    with torch.no_grad():
        other.network.head.weight.mul_(2)  # type: ignore[operator, union-attr]
    with pytest.raises(mx.MedXAIError, match="another network"):
        ask(other, library, scan(4, 1.6, 0))


def test_the_fingerprint_is_of_all_that_makes_a_vector() -> None:
    def scaled(spacing: float, low: float = 0.0) -> Compose:
        return Compose([Spacing((spacing,) * 3), ScaleIntensityRange(low, 1, 0, 1)])

    plain = fingerprint(model(preprocessing=scaled(1)))
    assert fingerprint(model(preprocessing=scaled(1))) == plain
    others = [
        model(preprocessing=scaled(2)),
        model(preprocessing=scaled(1, low=0.5)),
        model(preprocessing=scaled(1), layers=("head",)),
        model(preprocessing=scaled(1), patch_size=(4, 4, 4)),
        model(),
    ]
    assert len({plain, *map(fingerprint, others)}) == 6
    # Sets have another order in every process, as these two have, which are the same.
    first, second = (partial(scaled(1), of=of) for of in ({0, 8}, {8, 0}))
    assert fingerprint(model(preprocessing=first)) == fingerprint(model(preprocessing=second))
    shipped = [fingerprint(mx.load_model(path("Models/lung_nodule"))) for _ in range(2)]
    assert shipped[0] == shipped[1]


def test_recomputed_it_is_the_same_though_the_library_has_grown(made: mx.Model, tmp_path: Path) -> None:
    library, volume = stored(tmp_path, made), scan(4, 1.6, 0)
    first = ask(made, library, volume)
    assert first.provenance.parameters["version"] == library.version > 0
    library.add([record(made, "new", scan(4, 1.65, 0), "spiky")])
    again = mx.recompute(first, made, volume)
    assert [(c.uid, c.role, c.similarity) for c in again.cases] == [(c.uid, c.role, c.similarity) for c in first.cases]
    assert torch.equal(again.query_map, first.query_map)  # type: ignore[arg-type]
    for one, other in zip(again.cases, first.cases, strict=True):
        assert one.query_map is not None and other.query_map is not None
        assert torch.equal(one.query_map.data, other.query_map.data)
        assert np.array_equal(one.query_map.affine, other.query_map.affine)
    assert ask(made, library, volume).cases[0].uid == "new"


def test_saved_and_loaded_it_is_the_same(made: mx.Model, tmp_path: Path) -> None:
    volume = scan(4, 1.6, 0)
    found = ask(made, stored(tmp_path, made), volume)
    loaded = mx.load_explanation(found.save(tmp_path / "saved"))
    assert isinstance(loaded, mx.SimilarCases)
    for one, other in zip(loaded.cases, found.cases, strict=True):
        assert (one.uid, one.note, one.role, one.numbers) == (other.uid, other.note, other.role, other.numbers)
        assert torch.equal(one.map, other.map)  # type: ignore[arg-type]
        assert one.query_map is not None and other.query_map is not None
        assert torch.equal(one.query_map.data, other.query_map.data)
        np.testing.assert_allclose(one.query_map.affine, other.query_map.affine, atol=1e-9)
    # Formerly maps were kept on the whole grid of the scan.
    whole = [replace(case, query_map=mx.Volume(on_scan(case, volume), volume.affine)) for case in found.cases]
    former = mx.load_explanation(replace(found, cases=tuple(whole)).save(tmp_path / "former"))
    assert isinstance(former, mx.SimilarCases)
    for one, other in zip(former.cases, found.cases, strict=True):
        assert torch.equal(on_scan(one, volume), on_scan(other, volume))


def test_a_part_of_a_map_is_drawn_where_it_is_in_the_whole(oblique: mx.Volume) -> None:
    whole, box = torch.zeros_like(oblique.data), (slice(4, 12), slice(9, 20), slice(8, 19))
    # Drawn between voxels: the outermost are zero.
    inner = (0, *(slice(side.start + 1, side.stop - 1) for side in box))
    whole[inner] = torch.rand(6, 9, 9, generator=torch.Generator().manual_seed(0))
    focus = oblique.to_point((8, 14, 13)).tolist()
    look = Look.at(oblique, focus, 40.0)
    own = mx.Volume(whole[(slice(None), *box)], shifted(oblique.affine, np.array([4, 9, 8])))
    drawn, expected, bare = (np.array(look.draw(oblique, focus, heat)) for heat in (own, whole, None))
    np.testing.assert_array_equal(drawn, expected)
    assert (expected != bare).mean() > 0.02


def test_the_part_that_is_shown_is_that_part_of_the_scan(oblique: mx.Volume) -> None:
    """Voxel by voxel, in their places; and all that the network sees, from the upright grid of another spacing."""
    onto = np.diag([1.5, 1.5, 1.5, 1.0])
    onto[:3, 3] = oblique.to_point((9.0, 16.0, 14.0)) - 1.5 * 4
    shown = part(oblique, Prepared(torch.zeros(1, 9, 9, 9), onto))
    there = np.argwhere(np.ones(shown.shape))
    assert shown.data.shape < oblique.data.shape and 0 < len(there) < oblique.data.numel() / 4
    at = np.array([oblique.to_index(shown.to_point(index)) for index in there])
    d, h, w = np.round(at).astype(int).T
    np.testing.assert_allclose(at, np.stack([d, h, w], 1), atol=1e-6)
    assert torch.equal(shown.data[0].flatten(), oblique.data[0, d, h, w])
    ends = np.array([shown.to_index(transform(onto, corner)) for corner in corners((9, 9, 9))])
    assert (ends > -1).all() and (ends < np.array(shown.shape)).all()


def test_a_scan_that_is_gone_or_another_is_said(made: mx.Model, tmp_path: Path) -> None:
    library = stored(tmp_path, made)
    (tmp_path / "library" / "a.nrrd").unlink()
    sitk.WriteImage(scan(1, 4, 0).to_sitk(), str(tmp_path / "library" / "b.nrrd"))
    found = ask(made, library, scan(4, 1.6, 0))
    by_uid = {case.uid: case for case in found.cases}
    assert by_uid["a"].volume is None and by_uid["a"].map is None and by_uid["a"].query_map is not None
    notes = " ".join(found.provenance.notes)
    assert "'a' is shown without its scan" in notes and "'b' is not what was embedded" in notes
    assert found.residual["sum of map"] > 0.1


def test_a_scan_that_the_network_cannot_take_is_said(made: mx.Model, tmp_path: Path) -> None:
    library = stored(tmp_path, made)
    sitk.WriteImage(sitk.Image(8, 8, sitk.sitkFloat32), str(tmp_path / "library" / "a.nrrd"))
    found = ask(made, library, scan(4, 1.6, 0))
    assert next(case for case in found.cases if case.uid == "a").volume is None
    assert "'a' is shown without its scan" in " ".join(found.provenance.notes)


def test_what_is_known_of_a_case_hides_no_number(made: mx.Model, tmp_path: Path) -> None:
    library = stored(tmp_path, made)
    before = {case.uid: case.numbers["percentile"] for case in ask(made, library, scan(4, 1.6, 0)).cases}
    library.add([replace(case, meta={**case.meta, "percentile": -7.0}) for case in library.records()])
    after = {case.uid: case.numbers["percentile"] for case in ask(made, library, scan(4, 1.6, 0)).cases}
    assert after == before and -7.0 not in before.values()


def test_regions_that_are_alike_come_first(made: mx.Model, tmp_path: Path) -> None:
    """Three regions, of which the one with most in it counts: the nearest to it in each case, wherever it is."""
    most, little = np.array([3.0, 4.0]), np.array([0.1, 0.0])
    others = np.array([[4.0, 3.0], [0.0, 2.0]])
    assert by_strongest(np.stack([little, most, little]), others) == pytest.approx(0.96)
    assert by_strongest(np.stack([most]), None) == -1
    # What is apart in a case is alike as a whole, but in no region.
    library = stored(tmp_path, made, {"together": ((4.0, 3.0, 0.0), "smooth"), "other": ((4.0, 0.0, 2.0), "smooth")})
    apart = replace(scan(4, 0, 0), data=scan(4, 0, 0).data + scan(0, 3.8, 0, place=PLACES[3]).data)
    library.add([record(made, "apart", apart, "smooth")])
    volume = scan(4, 3.7, 0, place=PLACES[1])
    assert uids(ask(made, library, volume, maps=False, count=2), "alike") == ["apart", "together"]
    reranked = ask(made, library, volume, maps=False, count=2, rerank=True)
    assert uids(reranked, "alike") == ["together", "apart"]
    assert reranked.cases[1].similarity == pytest.approx(cosine((4, 3.7), (4, 3.8)), abs=1e-6)


def test_a_network_that_has_forgotten_finds_others(tmp_path: Path) -> None:
    """Nothing but the network tells which cases are alike; asked again as it is, it finds the same among the few."""
    torch.manual_seed(0)
    network = Reading()
    made = model(network)
    random = np.random.default_rng(0)
    cases = {f"case {i}": (tuple(random.uniform(0, 4, 3)), "smooth") for i in range(40)}
    library, volume = stored(tmp_path, made, cases), scan(2.0, 1.5, 1.0)
    found = ask(made, library, volume)
    again = mx.tell(
        made, volume, "similar_cases", **{**found.provenance.parameters, **type_of(found).asked_again(found)}
    )
    assert telling.likeness(found, again) == 1
    judged = telling.judge(found, made, volume)
    assert judged.light is not None and judged.values["likeness"] < 0.8
    empty = ask(made, library, scan(0, 0, 0.001), where="site=nowhere")
    assert telling.judge(empty, made, scan(0, 0, 0.001)).light is None


def test_among_a_few_cases_any_network_is_asked(made: mx.Model, tmp_path: Path) -> None:
    """It embeds them itself: here one that reads the first number as the third, and says what it makes of that."""
    library, other = stored(tmp_path, made), model()
    with torch.no_grad():
        other.network.found.weight.copy_(made.network.found.weight[[2, 1, 0]])  # type: ignore[operator, union-attr, index]
        other.network.head.weight.copy_(torch.tensor([[1.0, 0.0, 1.0], [0.0, 2.4, 0.0]]))  # type: ignore[operator, union-attr]
    found = ask(other, library, scan(4, 1.6, 0), among="a, b, c, d", patient="patient d", maps=False)
    # It says smooth where the first number is more than 2.4 times the second.
    assert (uids(found, "alike"), uids(found, "unlike")) == (["a"], ["b", "c"])
    for case in found.cases:
        assert case.similarity == pytest.approx(cosine((4, 1.6), CASES[case.uid][0][:2]), abs=1e-6)
    with pytest.raises(mx.MedXAIError, match="give uids of it"):
        ask(other, library, scan(4, 1.6, 0), among="x")


def type_of(found: mx.SimilarCases) -> Any:
    return mx.methods()[found.provenance.method]


def test_embedding_network_says_where_and_needs_no_target(tmp_path: Path) -> None:
    made = model(Embedding(), task="embedding", class_names=())
    library = stored(tmp_path, made)
    asked = (4.0, 1.6, 0.0)
    found = ask(made, library, scan(*asked, place=PLACES[3]), count=3)
    assert uids(found, "alike") == ["b", "a", "c"]
    # It says nothing, so unlike are those of another label than most of the nearest.
    assert uids(found, "unlike") == ["d"]
    for case in found.cases:
        assert case.similarity == pytest.approx(cosine(asked, CASES[case.uid][0]), abs=1e-6)
        assert case.query_map is not None and case.map is not None
        block = tuple(slice(2 * i, 2 * i + 2) for i in PLACES[3])
        values = on_scan(case, scan(*asked))
        assert float(values[0][block].max()) == pytest.approx(float(values.max())) and case.map.max() > 0
    assert found.residual["sum of map"] <= 1e-5
    with pytest.raises(mx.MedXAIError, match="use 'plain'"):
        ask(made, library, scan(*asked), space="saliency")
    assert telling.judge(found, made, scan(*asked, place=PLACES[3])).light is not None
    again = mx.recompute(found, made, scan(*asked, place=PLACES[3]))
    assert [case.uid for case in again.cases] == [case.uid for case in found.cases]


def test_a_case_at_a_right_angle_is_known_again(tmp_path: Path) -> None:
    """Another device rounds otherwise, which is much of a similarity of nearly nothing, and little of a cosine."""
    made = model(Embedding(), task="embedding", class_names=())
    library = stored(tmp_path, made, {"a": ((4, 1, 0), "x"), "z": ((1e-3, 4, 0), "y")})
    (case,) = library.records({"uid": "z"})
    vector = case.vectors["plain"]
    library.add([replace(case, vectors={"plain": vector + np.float32([1e-6, 0, 0]) * np.linalg.norm(vector)})])
    found = ask(made, library, scan(4, 0, 0), count=2)
    assert uids(found, "alike") == ["a", "z"] and found.cases[1].similarity < 1e-3
    assert found.provenance.notes == [] and found.residual["sum of map"] == pytest.approx(1e-6, rel=0.1)


@pytest.mark.parametrize("name", ["sum of map", "sum of points", "reconstruction"])
def test_what_an_explanation_misses_is_said_in_a_sentence(name: str) -> None:
    assert name not in residual(name).sentence(0.02) and "2.0%" in residual(name).sentence(0.02)


def test_shipped_network_on_oblique_scans(tmp_path: Path) -> None:
    """The similarity is the cosine of what the network's own heads see. The maps peak in the nodules, of which nobody
    told it, and on the scans' tilted and anisotropic grids, as densities, they still sum to nearly all of it."""
    made, nodules = small_explanations._model(), small_explanations._archive()[1]
    scans = dict(enumerate(small_explanations._archive()[0][:6]))
    regions = {i: small_explanations._middle(volume) for i, volume in scans.items()}
    with made.ready(), torch.no_grad():
        seen = {i: made.prepare(volume, regions[i]).x[None] for i, volume in scans.items()}
        features = {i: made.network.features(x)[0].double() for i, x in seen.items()}  # type: ignore[operator]
        answers = {i: said(made, made.forward(x))[0] for i, x in seen.items()}
    spaces: dict[str, tuple[int, Any]] = {"plain": (128, "cosine")}
    library = Library.create(tmp_path / "library", Embedder(fingerprint(made), "lung_nodule", "", spaces))
    for i in list(scans)[1:]:
        sitk.WriteImage(scans[i].to_sitk(), str(tmp_path / "library" / f"{i}.nrrd"))
        vectors = {"plain": features[i].float().numpy()}
        library.add([Record(str(i), str(i), "", answers[i], vectors, volume=f"{i}.nrrd", region=regions[i])])
    found = ask(made, library, scans[0], region=regions[0])
    assert len(found.cases) >= 3 and found.residual["sum of map"] <= 1e-5
    assert found.query_map is not None and torch.equal(found.query_map, on_scan(found.cases[0], scans[0]))
    unit = 5.0**3
    for case in found.cases:
        i = int(case.uid)
        assert case.similarity == pytest.approx(
            float(torch.cosine_similarity(features[0], features[i], dim=0)), abs=1e-6
        )
        assert case.map is not None and case.query_map is not None and case.volume is not None
        for values, affine in ((case.map, case.volume.affine), (case.query_map.data, case.query_map.affine)):
            voxel = abs(np.linalg.det(affine[:3, :3]))
            assert float(values.sum()) * voxel / unit == pytest.approx(case.similarity, rel=0.03)
        centre = np.array(regions[i]) + (nodules.centres[i].numpy() - 19.5) * 1.25
        assert np.linalg.norm(np.array(case.place) - centre) < float(nodules.attributes[i, 0]) / 2


@pytest.mark.parametrize("name", ["resnet18", "densenet121", "unet", "vit"])
def test_of_any_network_the_places_sum_to_the_cosine(name: str) -> None:
    made = make_model(name)
    x = torch.randn(2, 1, *NETWORKS[name][2], generator=torch.Generator().manual_seed(1))
    for space in (Plain(), Saliency()):
        vectors = space.embed(made, x)
        places = space.places(made, x)
        alike = places.alike(vectors[:1])
        torch.testing.assert_close(
            alike.flatten(1).sum(1).float(), torch.cosine_similarity(vectors, vectors[:1]), atol=1e-5, rtol=0
        )
        assert places.mapped and places.placed(alike).shape == x.shape


def test_plain_images_have_cases_and_no_place(tmp_path: Path) -> None:
    torch.manual_seed(0)
    layers = (nn.Conv2d(1, 4, 3, padding=1), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 2))
    made = mx.Model(nn.Sequential(*layers), class_names=("smooth", "spiky"))
    images = [mx.Volume(torch.randn(1, 20, 24), np.diag([0.5, 0.5, 1.0])) for _ in range(6)]
    spaces: dict[str, tuple[int, Any]] = {"plain": (8, "cosine"), "saliency": (4, "cosine")}
    library = Library.create(tmp_path / "library", Embedder(fingerprint(made), "", "", spaces))
    for i, image in enumerate(images[1:]):
        sitk.WriteImage(image.to_sitk(), str(tmp_path / "library" / f"{i}.nrrd"))
        library.add([record(made, str(i), image, volume=f"{i}.nrrd")])
    found = ask(made, library, images[0])
    assert found.cases and found.query_map is None and found.residual["sum of map"] <= 1e-5
    for case in found.cases:
        assert case.map is not None and case.map.shape == (1, 20, 24) and case.place is None
