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
