"""The measured table: patches are seen whole, maps that know nothing are found out, and limits let few of them by."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

import MedXAILib as mx
from benchmarks import trust
from benchmarks.blind import BLIND
from benchmarks.sanity import patches
from benchmarks.trust import LIMITS, SHARE, Limit, Wanted
from MedXAILib.registry import EXPLAINERS
from MedXAILib.report.localisation import centre


@pytest.fixture(autouse=True)
def forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    """What measures puts maps that know nothing into the registry of its process: here they are taken away again."""
    for id, kind in BLIND.items():
        monkeypatch.setitem(EXPLAINERS, id, kind)


@pytest.fixture(scope="module")
def six() -> list[trust.Asked]:
    return trust.cases(6)


def test_the_network_sees_each_patch_whole_and_unmoved_with_its_nodule_off_the_middle(six) -> None:
    model, away = patches.demo_model(), []
    assert len(six) == 6
    for case in six:
        seen = model.prepare(case.volume, case.region)
        assert torch.equal(seen.x, case.volume.data)
        assert np.array_equal(seen.affine, case.volume.affine)
        assert max(model.predict(case.volume, case.region).scores.items(), key=lambda item: item[1])[0] == case.target
        away.append(np.linalg.norm(np.subtract(centre(case.segmentation), case.region)))
    # 20 voxels of 1.25 mm reach from the middle to a side.
    assert np.mean(away) > 8 and max(away) < 25 * 3**0.5


def test_what_the_network_is_wrong_about_is_no_case(monkeypatch) -> None:
    class Malignant(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.tensor([[0.0, 0.0, 1.0]]).expand(len(x), 3)

    monkeypatch.setattr(patches, "demo_model", lambda: mx.Model(Malignant(), channels=1, spatial_dims=3))
    assert [case.target for case in trust.cases.__wrapped__(3)] == ["malignant"] * 3


def test_maps_that_know_nothing_are_what_they_are_called() -> None:
    ramp = 3 * torch.arange(9.0)[:, None, None] + 4 * torch.arange(7.0)[:, None] + 12 * torch.arange(5.0)
    x, labels = ramp[None, None], torch.zeros(1)
    maps, again = (
        {id: kind.reference.maps(None, x, labels)[0] for id, kind in BLIND.items()}  # type: ignore[attr-defined]
        for _ in range(2)
    )
    assert torch.allclose(maps["edge-detector"], torch.full_like(ramp, 13.0))
    assert torch.equal(maps["brightness-of-the-scan"], ramp)
    middle = maps["centre-of-the-patch"]
    assert middle[4, 3, 2] == middle.max() and middle[0, 0, 0] == middle[-1, -1, -1] == middle.min()
    assert torch.equal(maps["noise"], again["noise"]) and maps["noise"].min() >= 0
    assert maps["noise"].unique().numel() == ramp.numel()


def test_the_checks_find_an_edge_detector_out(six, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(trust, "cases", lambda count: six)
    (found,) = trust.measured(Wanted("edge-detector", {}), slice(2, 3), 6, None, tmp_path)
    assert found["values"]["randomisation: likeness"] == pytest.approx(1)
    assert found["values"]["discrimination: likeness"] == pytest.approx(1)
    assert found["lights"]["randomisation"] == found["lights"]["discrimination"] == "poor"
    # It goes on where it was: what is kept is not measured again, but another case is.
    (kept,) = tmp_path.glob("edge-detector/cases/*.json")
    edited = json.loads(kept.read_text(encoding="utf-8"))
    assert edited["case"] == six[2].name
    edited["cost"]["forwards"] = 77
    kept.write_text(json.dumps(edited), encoding="utf-8")
    (again,) = trust.measured(Wanted("edge-detector", {}), slice(2, 3), 6, None, tmp_path)
    assert again == found | {"values": found["values"] | {"cost: forwards": 77.0}}


def test_a_method_that_compares_with_patches_of_lung_is_checked_like_the_others(six, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(trust, "cases", lambda count: six)
    (row,) = (row for row in trust.every() if row.method == "deep_shap")
    (found,) = trust.measured(row, slice(0, 1), 6, None, tmp_path)
    assert {"randomisation", "discrimination", "stability"} <= set(found["lights"])
    written = [mx.load_volume(path).data for path in sorted(tmp_path.glob("lung-*.nrrd"))]
    assert len(written) == 5 and all(map(torch.equal, written, (volume.data for volume in patches.lung())))


def test_a_calibrated_limit_lets_five_in_a_hundred_by() -> None:
    hundred = [i / 100 for i in range(100)]
    assert Limit(("v",), 0.4, 0.15).calibrated(hundred) == 0.95
    assert Limit(("v",), 0.5, 0.8).calibrated(hundred) == 0.04
    # In binary 0.29 is a little less than 29 hundredths, and 0.07 a little more than 7.
    assert [Limit(("v",), 1, 0).calibrated([v] * 20) for v in (0.29, 0.07)] == [0.3, 0.08]
    assert [Limit(("v",), 0, 1).calibrated([v] * 20) for v in (0.29, 0.07)] == [0.28, 0.06]
    drawn = np.random.default_rng(0).normal(size=(20, 37)).tolist()
    for limit in (Limit(("v",), 0.4, 0.15), Limit(("v",), 0.5, 0.8)):
        for values in drawn:
            good = limit.calibrated(values)
            laxer = good - 0.01 if limit.more else good + 0.01
            shares = [np.mean([limit.lets(v, by) for v in values]) for by in (good, laxer)]
            assert shares[0] <= SHARE < shares[1]


def test_a_check_goes_by_the_worse_of_its_values() -> None:
    case = {"values": {"stability: noise": 0.9, "stability: shift": 0.3, "randomisation: likeness": 0.2}}
    assert LIMITS["stability"].of(case) == 0.3 and LIMITS["stability"].more
    assert LIMITS["randomisation"].of(case) == 0.2 and not LIMITS["randomisation"].more
    assert LIMITS["validity"].of(case) is None


def result(method: str, cases: list[dict], **other: object) -> dict:
    return {
        **Wanted(method, {}).described,
        "machine": {"processor": "P", "cores": 2, "graphics": "G"},
        "cases": cases,
    } | other


def test_the_page_has_what_was_measured_and_says_what_was_not(tmp_path: Path) -> None:
    def case(score: float, light: str) -> dict:
        values = {"faithfulness: blur: score": score, "validity: auprc": score / 2}
        return {"values": values, "lights": {"faithfulness": light, "validity": "good"}}

    found = {
        "noise": result("noise", [case(0.1, "poor"), case(0.3, "fair")]),
        "gradient": result("gradient", [case(0.2, "fair"), case(0.6, "good"), {"refused": "too small"}]),
        "hirescam": result("hirescam", [case(0.5, "good")]),
        "attention_rollout": result("attention_rollout", [{"refused": "it has none"}]),
        # As it was before the patches were seen whole.
        "gradcam": result("gradcam", [case(0.9, "good")], region="the nodule"),
    }
    for method, one in found.items():
        (tmp_path / f"{method}.json").write_text(json.dumps(one), encoding="utf-8")
    text = trust.written(trust._known(tmp_path))
    # Student's t of one degree of freedom is 12.706; the two scores are 0.2 off their mean.
    settings = len(mx.methods()["gradient"].model_fields)
    assert f"| Gradient | 3.1.1 | 2 | 0.20 ± 1.27 | 0.40 ± 2.54 | the inside | {settings} |" in text
    assert "| Noise |  | 2 | 0.10 ± 0.64 | 0.20 ± 1.27 | nothing |  |" in text
    assert "| HiResCAM | 3.1.1 | 1 | 0.25 | 0.50 | a layer |" in text
    assert "- Attention rollout: it has none" in text
    assert "| Grad-CAM |" not in text and ", Grad-CAM," in text.split("Not measured yet")[1].split("\n")[0]
    assert "Measured on: G, P (2 cores)." in text
    # The lights are those of today's limits, 0.8 and 0.4.
    # A limit just above 0.3 lets none of the noise by, and two of the three maps of the methods.
    assert f"| faithfulness | from {LIMITS['faithfulness'].good:g} | 0, 0, 2 | 0, 2, 1 | from 0.31 | 67% |" in text
    assert "| faithfulness | 3 | 0.87 |" in text and "| hit |" not in text


def test_slow_methods_get_few_cases_one_at_a_time() -> None:
    rows = {row.method: row for row in trust.every()}
    assert set(BLIND) <= set(rows) and "counterfactual_infill" not in rows
    quick, slow = (trust._parts(rows[method], 30) for method in ("gradient", "occlusion"))
    assert quick == [slice(0, 12), slice(12, 24), slice(24, 30)]
    assert slow == [slice(i, i + 1) for i in range(12)]
    assert trust._parts(rows["occlusion"], 2) == [slice(0, 1), slice(1, 2)]
