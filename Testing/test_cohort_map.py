"""One map over many scans: the mean of what each gives by itself, on the right grid, and what is said of it."""

from __future__ import annotations

import weakref
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk
import torch
from conftest import make_model, oblique_affine
from monai.transforms import Compose, Spacing
from torch import Tensor, nn

import MedXAILib as mx
from MedXAILib import cohort_map
from MedXAILib.cohort_map import explain_cohort
from MedXAILib.grid import resample

SIZE = (24, 24, 16)


def scan(seed: int, shape: tuple[int, ...] = SIZE, affine: np.ndarray | None = None, **more: object) -> mx.Volume:
    data = torch.randn(1, *shape, generator=torch.Generator().manual_seed(seed))
    return mx.Volume(data, oblique_affine() if affine is None else affine, **more)


def mean(maps: list[Tensor]) -> Tensor:
    return torch.stack(maps).mean(0)


@pytest.mark.parametrize("method", ["gradient", "gradcam"])
def test_it_is_the_mean_of_the_maps_of_each(method: str) -> None:
    model, scans = make_model("resnet18"), [scan(i) for i in range(4)]
    alone = [mx.explain(model, s, method, target=1) for s in scans]
    signed = explain_cohort(model, scans, method, target=1, form="signed")
    absolute = explain_cohort(model, scans, method, target=1)
    torch.testing.assert_close(signed.data, mean([a.data for a in alone]))
    torch.testing.assert_close(absolute.data, mean([a.data.abs() for a in alone]))
    assert signed.signed == alone[0].signed and not absolute.signed
    assert np.array_equal(signed.affine, scans[0].affine)


def test_it_is_on_the_grid_of_what_the_network_sees() -> None:
    """Patches around findings, each in another place of another scanner, lie on one another."""
    spacing = Compose([Spacing(pixdim=(1.5, 1.5, 1.5))])
    known = make_model("resnet18")
    model = mx.Model(known.network, patch_size=(16, 16, 16), preprocessing=spacing)
    scans = [scan(i, (20, 40, 40), oblique_affine((2.0 + i, 1.0, 1.2))) for i in range(3)]
    regions = [s.to_point((9 + i, 20, 18)) for i, s in enumerate(scans)]
    made = explain_cohort(model, scans, "gradient", target=1, regions=regions, form="signed")
    patches = [model.prepare(s, r) for s, r in zip(scans, regions, strict=True)]
    plain = mx.Model(known.network)
    alone = [mx.explain(plain, mx.Volume(p.x, p.affine), "gradient", target=1).data for p in patches]
    torch.testing.assert_close(made.data, mean(alone))
    np.testing.assert_allclose(made.affine, patches[0].affine)
    assert made.provenance.region == [np.asarray(r).tolist() for r in regions]


def test_a_scan_to_compare_with_is_still_preprocessed() -> None:
    """What the network sees of a scan is not preprocessed once more; an atlas is."""
    network = make_model("resnet18").network
    model, plain = mx.Model(network, preprocessing=Compose([lambda image: image * 2 + 1])), mx.Model(network)
    scans, more = [scan(i) for i in range(2)], {"target": 1, "steps": 3, "max_steps": 3}
    made = explain_cohort(model, scans, "integrated_gradients", form="signed", baseline=scan(9), **more)
    seen = [mx.Volume(p.x, p.affine) for p in map(model.preprocess, [*scans, scan(9)])]
    alone = [mx.explain(plain, s, "integrated_gradients", baseline=seen[2], **more) for s in seen[:2]]
    torch.testing.assert_close(made.data, mean([a.data for a in alone]))
    assert made.residual == {"completeness": max(a.residual["completeness"] for a in alone)}


def test_a_template_is_the_grid_of_registered_scans() -> None:
    model, here = make_model("resnet18"), oblique_affine()
    moved = here.copy()
    moved[:3, 3] += here[:3, 0] * 4
    scans, template = [scan(0), scan(1, affine=moved)], scan(5, (30, 20, 12), here)
    made = explain_cohort(model, scans, "gradient", target=1, form="signed", template=template)
    alone = [mx.explain(model, s, "gradient", target=1) for s in scans]
    on_template = [resample(a.data, a.affine, template.shape, template.affine) for a in alone]
    torch.testing.assert_close(made.data, mean(on_template))
    assert made.data.shape[1:] == template.shape and np.array_equal(made.affine, template.affine)
    # Only the second reaches there, and half of it is what two scans say.
    assert not on_template[0][:, 24:].any()
    torch.testing.assert_close(made.data[:, 24:28], alone[1].data[:, 20:24, :20, :12] / 2)


def test_every_channel_has_its_map() -> None:
    network = nn.Sequential(nn.Conv3d(2, 3, 3), nn.ReLU(), nn.AdaptiveAvgPool3d(1), nn.Flatten())
    scans = [mx.volume.stack([scan(i), scan(i + 50)]) for i in range(2)]
    made = explain_cohort(mx.Model(network), scans, "gradient", target=1, per_channel=True, template=scans[0])
    assert made.data.shape == (2, *SIZE)


def test_scans_that_cannot_be_explained_are_left_out_and_named(tmp_path: Path) -> None:
    model = make_model("resnet18")
    flat = mx.Volume(torch.ones(1, *SIZE), np.eye(4), "flat.nii")
    given = [flat, scan(0), tmp_path / "gone.nii", scan(1, (24, 24, 24)), scan(2)]
    made = explain_cohort(model, given, "gradient", target=1)
    torch.testing.assert_close(made.data, explain_cohort(model, [given[1], given[4]], "gradient", target=1).data)
    notes = made.provenance.notes
    assert notes[0] == "The mean of the absolute maps of 2 scans." and len(notes) == 4
    assert notes[1].startswith("Scan 1 (flat.nii) was left out: flat.nii is constant")
    assert notes[2].startswith(f"Scan 3 ({tmp_path / 'gone.nii'}) was left out: There is no file")
    assert notes[3].startswith("Scan 4 was left out: the network sees 24 x 24 x 24 voxels of it and 24 x 24 x 16 of")
    assert len(made.provenance.volume["scans"]) == 2


@pytest.mark.parametrize("given", [[], [mx.Volume(torch.ones(1, *SIZE), np.eye(4))]])
def test_no_scan_at_all_is_an_error(given: list[mx.Volume]) -> None:
    with pytest.raises(mx.MedXAIError, match=r"No scan could be explained: .*(is constant|give at least one)"):
        explain_cohort(make_model("resnet18"), given, "gradient")


def test_a_wrong_request_is_refused_at_once() -> None:
    model, scans = make_model("resnet18"), [scan(0)]
    for more, said in (
        ({"form": "mean"}, "There is no form 'mean'"),
        ({"method": "gradientt"}, "did you mean gradient"),
        ({"steps": 2}, "There is no parameter of gradient 'steps'"),
        ({"regions": [None, None]}, "There are 1 scans and 2 regions"),
    ):
        with pytest.raises(mx.MedXAIError, match=rf"^(?!No scan).*{said}"):
            explain_cohort(model, scans, **{"method": "gradient", **more})


@pytest.mark.parametrize("at", range(1, 9))
def test_cancelling_stops_it(at: int) -> None:
    """Whether between scans or within one, and without being asked twice."""
    asked: list[int] = []
    run = mx.Run(cancel=lambda: bool(asked.append(1)) or len(asked) == at)
    with pytest.raises(mx.Cancelled):
        explain_cohort(make_model("resnet18"), [scan(i) for i in range(9)], "gradient", run=run)
    assert len(asked) == at


def test_provenance_says_what_went_in_and_what_it_cost(tmp_path: Path) -> None:
    model, files = make_model("resnet18"), [tmp_path / f"{i}.nrrd" for i in range(3)]
    for i, file in enumerate(files):
        sitk.WriteImage(scan(i).to_sitk(), str(file))
    steps: list[mx.Progress] = []
    run = mx.Run(seed=5, progress=steps.append)
    made = explain_cohort(model, files, "smoothgrad", samples=2, run=run)
    about = made.provenance
    scans = [mx.load_volume(f) for f in files]
    alone = [mx.explain(model, s, "smoothgrad", samples=2, run=mx.Run(seed=5)) for s in scans]
    assert about.volume["source"] == "3 scans" and about.volume["form"] == "absolute"
    assert about.volume["scans"] == [
        {"source": str(f), "fingerprint": s.fingerprint, "shape": [1, *SIZE]} for f, s in zip(files, scans, strict=True)
    ]
    assert about.title == "SmoothGrad, mean of the absolute maps of 3 scans" and about.seed == 5
    assert (about.method, about.parameters) == ("smoothgrad", alone[0].provenance.parameters)
    assert about.model == alone[0].provenance.model and about.seconds > 0
    assert about.backwards == sum(a.provenance.backwards for a in alone) == 6
    labels = [a.provenance.target["which"] for a in alone]
    assert about.target["which"] == (labels if len(set(labels)) > 1 else labels[0])
    assert about.target_label == ", ".join(dict.fromkeys(a.provenance.target_label for a in alone))
    assert [(s.done, s.total, s.message) for s in steps] == [(i, 3, "Explaining the scans") for i in range(4)]
    # It is an explanation as others are, only that it is of no single scan.
    again = mx.load_explanation(made.save(tmp_path / "map"))
    assert again.provenance == about and torch.equal(again.data, made.data)
    with pytest.raises(mx.MedXAIError, match="This is not the volume"):
        mx.recompute(made, model, scans[0])


def test_predictions_that_differ_are_all_said() -> None:
    class Sign(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            score = x.flatten(1).sum(1, keepdim=True)
            return torch.cat([-score, score], 1)

    base = scan(0)
    scans = [mx.Volume(base.data.abs(), base.affine), mx.Volume(-base.data.abs(), base.affine)]
    made = explain_cohort(mx.Model(Sign(), class_names=("down", "up")), scans, "gradient", form="signed")
    assert made.provenance.target["which"] == [1, 0] and made.provenance.target_label == "up, down"
    assert not made.data.any()


def test_one_scan_is_held_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files = [tmp_path / f"{i}.nrrd" for i in range(4)]
    for i, file in enumerate(files):
        sitk.WriteImage(scan(i).to_sitk(), str(file))
    read: list[weakref.ref[Tensor]] = []
    held: list[int] = []

    def load(path: Path) -> mx.Volume:
        held.append(sum(r() is not None for r in read))
        found = mx.load_volume(path)
        read.append(weakref.ref(found.data))
        return found

    def explain(*given: object, **more: object) -> mx.SaliencyMap:
        mapped.append(sum(m() is not None for m in maps))
        found = mx.explain(*given, **more)
        maps.append(weakref.ref(found.data))
        return found

    maps: list[weakref.ref[Tensor]] = []
    mapped: list[int] = []
    monkeypatch.setattr(cohort_map, "load_volume", load)
    monkeypatch.setattr(cohort_map, "explain", explain)
    explain_cohort(make_model("resnet18"), files, "gradient", form="signed")
    # While the next is read and explained, the last is only just being let go.
    assert len(read) == len(maps) == 4 and max(held + mapped) <= 1


def test_the_model_is_as_before() -> None:
    model = make_model("resnet18")
    model.network.train()
    explain_cohort(model, [scan(0)], "gradient")
    assert model.network.training and all(p.requires_grad for p in model.network.parameters())
