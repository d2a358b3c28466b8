"""Explanations survive saving, whole or not at all, and runs report, stop and are counted."""

from __future__ import annotations

import errno
import json
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk
import torch
from conftest import make_model, oblique_affine

import MedXAILib as mx


def made(batched: bool = False, **parameters: object) -> mx.SaliencyMap:
    x = torch.randn(2, 1, 24, 24, 16, generator=torch.Generator().manual_seed(1))
    scan = x if batched else mx.Volume(x[0], oblique_affine(), source="Bürki.nrrd")
    return mx.explain(make_model("resnet18"), scan, "gradient", target="malignant", run=mx.Run(seed=5), **parameters)


@pytest.mark.parametrize("batched", [False, True])
def test_round_trip(tmp_path: Path, batched: bool) -> None:
    explanation = made(batched)
    back = mx.load_explanation(explanation.save(tmp_path / "eins zwei 三"))
    assert isinstance(back, mx.SaliencyMap)
    assert torch.equal(back.data, explanation.data) and back.data.dtype == torch.float32
    np.testing.assert_array_equal(back.affine, explanation.affine)
    assert back.provenance == explanation.provenance and back.signed == explanation.signed
    image = sitk.ReadImage(str(tmp_path / "eins zwei 三" / ("map-1.nrrd" if batched else "map.nrrd")))
    np.testing.assert_allclose(mx.Volume.from_sitk(image).affine, explanation.affine, atol=1e-9)


def test_nifti_keeps_the_map_and_its_place(tmp_path: Path) -> None:
    explanation = made()
    back = mx.load_explanation(explanation.save(tmp_path / "a", "nii.gz"))
    assert isinstance(back, mx.SaliencyMap) and torch.equal(back.data, explanation.data)
    volume = mx.load_volume(tmp_path / "a" / "map.nii.gz")
    np.testing.assert_allclose(volume.affine, explanation.affine, atol=1e-4)


def test_provenance_says_everything() -> None:
    p = made().provenance
    assert (p.method, p.target_label, p.seed, p.device) == ("gradient", "malignant", 5, "cpu")
    assert p.target == {"kind": "ClassTarget", "which": 2}
    assert p.parameters["form"] == "signed" and p.volume["source"] == "Bürki.nrrd"
    assert len(p.model["fingerprint"]) == len(p.volume["fingerprint"]) == 32
    assert p.versions["torch"] == torch.__version__ and p.versions["medxai"] == mx.__version__
    assert p.forwards == p.backwards == 1 and p.seconds > 0 and p.peak_memory >= 0


def test_saving_replaces_a_former_explanation_and_nothing_else(tmp_path: Path) -> None:
    explanation = made()
    explanation.save(tmp_path / "a")
    explanation.save(tmp_path / "a")
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "thesis.txt").write_text("years of work", encoding="utf-8")
    with pytest.raises(mx.MedXAIError, match="exists and is not a former result"):
        explanation.save(tmp_path / "b")
    assert (tmp_path / "b" / "thesis.txt").exists()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a", "b"]


@pytest.mark.parametrize("failure", [OSError(errno.ENOSPC, "No space left on device"), KeyboardInterrupt()])
def test_full_disk_or_interruption_leaves_what_was_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failure: BaseException
) -> None:
    made().save(tmp_path / "a")
    before = {p.name: p.read_bytes() for p in (tmp_path / "a").iterdir()}
    explanation = made(form="absolute")

    def refuse(*_: object, **__: object) -> None:
        raise failure

    monkeypatch.setattr(Path, "write_text", refuse)
    with pytest.raises(mx.MedXAIError if isinstance(failure, OSError) else KeyboardInterrupt) as caught:
        explanation.save(tmp_path / "a")
    if isinstance(failure, OSError):
        assert "the disk is full" in str(caught.value)
    assert {p.name: p.read_bytes() for p in (tmp_path / "a").iterdir()} == before
    assert [p.name for p in tmp_path.iterdir()] == ["a"]


def test_missing_and_damaged_explanations(tmp_path: Path) -> None:
    with pytest.raises(mx.MedXAIError, match="holds no explanation"):
        mx.load_explanation(tmp_path)
    folder = made().save(tmp_path / "a")
    (folder / "map.nrrd").write_bytes(b"")
    with pytest.raises(mx.MedXAIError, match="is damaged"):
        mx.load_explanation(folder)
    manifest = json.loads((folder / "explanation.json").read_text(encoding="utf-8"))
    del manifest["provenance"]["method"]
    (folder / "explanation.json").write_text(json.dumps(manifest), encoding="utf-8")
    with pytest.raises(mx.MedXAIError, match="is damaged"):
        mx.load_explanation(folder)


def test_progress_counts_up_and_estimates_the_time_left() -> None:
    seen: list[mx.Progress] = []
    x = torch.randn(1, 24, 24, 16)
    run = mx.Run(progress=seen.append, memory_budget=1)
    mx.explain(make_model("resnet18"), x, "smoothgrad", samples=5, run=run)
    copies = [p for p in seen if "noisy copies" in p.message]
    assert [(p.done, p.total) for p in copies] == [(i, 5) for i in range(6)]
    assert all(p.seconds_left is not None and p.seconds_left >= 0 for p in copies[1:])
    assert copies[-1].seconds_left == 0


def test_cancel_stops_between_steps() -> None:
    asked = []

    def cancel() -> bool:
        asked.append(1)
        return len(asked) > 3

    run = mx.Run(cancel=cancel, memory_budget=1)
    with pytest.raises(mx.Cancelled, match="nothing was written"):
        mx.explain(make_model("resnet18"), torch.randn(1, 24, 24, 16), "smoothgrad", samples=50, run=run)
    assert len(asked) == 4


def test_budget_bounds_what_is_computed_at_once() -> None:
    sizes: list[int] = []
    model = make_model("resnet18")
    model.network.register_forward_hook(lambda _m, inputs, _y: sizes.append(len(inputs[0])))
    x = torch.randn(1, 24, 24, 16)
    small = mx.explain(model, x, "smoothgrad", samples=6, run=mx.Run(memory_budget=1))
    assert max(sizes) == 1
    large = mx.explain(model, x, "smoothgrad", samples=6, run=mx.Run(memory_budget=10**12))
    assert max(sizes) == 6
    torch.testing.assert_close(small.data, large.data, rtol=1e-4, atol=1e-7)


def test_too_little_memory_for_one_sample_is_an_error_with_a_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    def never(*_: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    model = make_model("resnet18")
    monkeypatch.setattr(mx.Model, "forward", never)
    with pytest.raises(mx.OutOfMemory, match="choose a smaller region"):
        mx.explain(model, torch.randn(1, 24, 24, 16), "gradient")


def test_one_run_serves_many_requests() -> None:
    run = mx.Run(seed=3)
    x = torch.randn(1, 24, 24, 16)
    first, second = (mx.explain(make_model("resnet18"), x, "gradient", target=1, run=run) for _ in range(2))
    assert first.provenance.forwards == second.provenance.forwards == 1


def test_ensembles_weigh_their_members() -> None:
    x = torch.randn(2, 1, 24, 24, 16)
    models = [make_model("resnet18"), make_model("densenet121")]
    single = [mx.explain(m, x, "gradient", target=1).data for m in models]
    scaled = [m / m.abs().flatten(1).amax(1).reshape(2, 1, 1, 1, 1) for m in single]
    both = mx.explain(mx.Ensemble(models, weights=[3, 1]), x, "gradient", target=1)
    torch.testing.assert_close(both.data, 0.75 * scaled[0] + 0.25 * scaled[1])
    assert [m["name"] for m in both.provenance.model["members"]] == ["ResNet", "DenseNet"]
    assert len(mx.explain(mx.Ensemble(models), x, "gradcam", target=[0, 1])) == 2
    for weights in ([1.0], [1.0, -1.0], [0.0, 0.0]):
        with pytest.raises(mx.MedXAIError, match="as many weights"):
            mx.Ensemble(models, weights)


TEXT = 'A "bösartig" nodule of 17 mm.'


def caption(**changed: object) -> mx.Caption:
    map_of = made()
    maps = torch.cat([map_of.data, map_of.data.abs() / 3])
    words = (
        mx.Word("bösartig", 3, 11, confidence=0.25, map=1, place=(1.5, -2.0, 1 / 3)),
        mx.Word("17 mm", 23, 28, map=0),
        mx.Word("A", 0, 1),
    )
    known: dict[str, object] = {"text": TEXT, "words": words, "maps": maps, "affine": map_of.affine, **changed}
    return mx.Caption(map_of.provenance, {"completeness": 0.01}, **known)  # type: ignore[arg-type]


def similar(**changed: object) -> mx.SimilarCases:
    map_of = made()
    patch = mx.Volume(torch.randn(1, 5, 6, 7), oblique_affine((3.0, 0.7, 0.9)), source="archive/Müller 1.nii.gz")
    cases = (
        mx.Case("Müller/1", "malignant", 0.93, patch.source, (4.0, 5.5, 1 / 3), patch, torch.rand(1, 5, 6, 7)),
        mx.Case("2", "benign", -0.25, volume=mx.Volume(torch.randn(2, 4, 4, 4), np.eye(4))),
        mx.Case("3", "benign", -1.5),
    )
    known: dict[str, object] = {"cases": cases, "query_map": map_of.data, "affine": map_of.affine, **changed}
    return mx.SimilarCases(map_of.provenance, {}, **known)  # type: ignore[arg-type]


def test_caption_round_trip(tmp_path: Path) -> None:
    explanation = caption()
    back = mx.load_explanation(explanation.save(tmp_path / "a"))
    assert isinstance(back, mx.Caption)
    assert (back.text, back.words, back.residual) == (TEXT, explanation.words, {"completeness": 0.01})
    assert back.provenance == explanation.provenance
    assert torch.equal(back.maps, explanation.maps)
    np.testing.assert_array_equal(back.affine, explanation.affine)
    image = mx.load_volume(tmp_path / "a" / "map-1.nrrd")
    assert torch.equal(image.data[0], explanation.maps[1])
    np.testing.assert_allclose(image.affine, explanation.affine, atol=1e-9)


def test_caption_of_mere_words_round_trip(tmp_path: Path) -> None:
    explanation = mx.Caption(made().provenance, {}, "No nodule.", (mx.Word("nodule", 3, 9, 0.5),))
    back = mx.load_explanation(explanation.save(tmp_path / "a"))
    assert isinstance(back, mx.Caption)
    assert back.words == explanation.words and len(back.maps) == 0
    assert [p.name for p in (tmp_path / "a").iterdir()] == ["explanation.json"]


def test_similar_cases_round_trip(tmp_path: Path) -> None:
    explanation = similar()
    back = mx.load_explanation(explanation.save(tmp_path / "a"))
    assert isinstance(back, mx.SimilarCases) and back.query_map is not None and explanation.query_map is not None
    assert torch.equal(back.query_map, explanation.query_map)
    np.testing.assert_array_equal(back.affine, explanation.affine)
    for case, was in zip(back.cases, explanation.cases, strict=True):
        for name in ("uid", "label", "similarity", "source", "place"):
            assert getattr(case, name) == getattr(was, name)
        assert (case.volume is None, case.map is None) == (was.volume is None, was.map is None)
        if case.volume is not None and was.volume is not None:
            assert torch.equal(case.volume.data, was.volume.data) and case.volume.source == was.volume.source
            np.testing.assert_allclose(case.volume.affine, was.volume.affine, atol=1e-9)
        if case.map is not None and was.map is not None:
            assert torch.equal(case.map, was.map)
    place = mx.load_volume(tmp_path / "a" / "case-0-map.nrrd").affine
    np.testing.assert_allclose(place, oblique_affine((3.0, 0.7, 0.9)), atol=1e-9)


def test_similar_cases_without_a_query_map_round_trip(tmp_path: Path) -> None:
    back = mx.load_explanation(similar(query_map=None, affine=None, cases=()).save(tmp_path / "a"))
    assert isinstance(back, mx.SimilarCases) and back.query_map is back.affine is None and back.cases == ()


@pytest.mark.parametrize(
    ("word", "message"),
    [
        (mx.Word("bösartig", 4, 12), "not at 4 to 12"),
        (mx.Word("m", len(TEXT) - 2, len(TEXT) + 1), "not at"),
        (mx.Word("", 3, 3), "not at"),
        (mx.Word("A", -len(TEXT), 1), "not at"),
        (mx.Word("A", 0, 1, map=2), "map 2, and there are 2"),
        (mx.Word("A", 0, 1, map=-1), "map -1"),
        (mx.Word("A", 0, 1, confidence=1.2), "confidence 1.2"),
        (mx.Word("A", 0, 1, confidence=float("nan")), "confidence nan"),
        (mx.Word("A", 0, 1, place=(0.0, float("inf"), 0.0)), "place of the word 'A'"),
        (mx.Word("A", 0, 1, place=(0.0, 1.0)), "three finite numbers"),  # type: ignore[arg-type]
    ],
)
def test_words_that_cannot_be_are_refused(word: mx.Word, message: str) -> None:
    with pytest.raises(mx.MedXAIError, match=message):
        caption(words=(word,))


@pytest.mark.parametrize(
    ("cases", "message"),
    [
        ((mx.Case("a", "x", 1.0), mx.Case("a", "y", 0.5)), "2 cases are called 'a'"),
        ((mx.Case("", "x", 1.0),), "cases are called ''"),
        ((mx.Case("a", "x", float("nan")),), "similarity of the case 'a' is nan"),
        ((mx.Case("a", "x", 1.0, place=(0.0, 0.0, float("nan"))),), "place of the case 'a'"),
        ((mx.Case("a", "x", 1.0, map=torch.zeros(1, 2, 2, 2)),), "map of the case 'a'"),
        (
            (
                mx.Case(
                    "a", "x", 1.0, volume=mx.Volume(torch.zeros(1, 2, 2, 3), np.eye(4)), map=torch.zeros(1, 2, 2, 2)
                ),
            ),
            "not on the grid",
        ),
        (
            (mx.Case("a", "x", 1.0, query_map=mx.Volume(torch.zeros(2, 2, 2, 3), np.eye(4))),),
            "query map of the case 'a' has 2 channels",
        ),
    ],
)
def test_cases_that_cannot_be_are_refused(cases: tuple[mx.Case, ...], message: str) -> None:
    with pytest.raises(mx.MedXAIError, match=message):
        similar(cases=cases)


def test_maps_of_a_wrong_shape_are_refused() -> None:
    with pytest.raises(mx.MedXAIError, match=r"\(K, D, H, W\)"):
        caption(maps=torch.zeros(2, 3, 4))
    for wrong in ({"query_map": torch.zeros(3, 4, 5)}, {"affine": None}):
        with pytest.raises(mx.MedXAIError, match="The map of the query"):
            similar(**wrong)


@pytest.mark.parametrize(
    ("make", "damage"),
    [
        (caption, lambda said: said["words"][0].update(start=5)),
        (caption, lambda said: said["words"][0].update(map=7)),
        (caption, lambda said: said["words"][0].update(colour="red")),
        (caption, lambda said: said["words"][0].pop("end")),
        (caption, lambda said: said["files"].pop()),
        (caption, lambda said: said.pop("text")),
        (similar, lambda said: said["cases"][1].update(uid="3")),
        (similar, lambda said: said["cases"][1].update(volume=99)),
        (similar, lambda said: said["cases"][0].update(map=0)),
        (similar, lambda said: said["cases"][0].pop("similarity")),
        (similar, lambda said: said.update(kind="Poem")),
    ],
)
def test_damaged_words_and_cases_are_refused(tmp_path: Path, make, damage) -> None:  # type: ignore[no-untyped-def]
    folder = make().save(tmp_path / "a")
    manifest = json.loads((folder / "explanation.json").read_text(encoding="utf-8"))
    damage(manifest)
    (folder / "explanation.json").write_text(json.dumps(manifest), encoding="utf-8")
    with pytest.raises(mx.MedXAIError, match="is damaged"):
        mx.load_explanation(folder)


@pytest.mark.parametrize(("make", "file"), [(caption, "map-1.nrrd"), (similar, "case-0.nrrd")])
def test_missing_images_of_words_and_cases_are_noticed(tmp_path: Path, make, file) -> None:  # type: ignore[no-untyped-def]
    folder = make().save(tmp_path / "a")
    (folder / file).unlink()
    with pytest.raises(mx.MedXAIError, match="is damaged"):
        mx.load_explanation(folder)
