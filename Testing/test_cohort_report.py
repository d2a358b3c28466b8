"""The page of a cohort says what the files of the cohort say, and draws it where it is."""

from __future__ import annotations

import base64
import csv
import io
import re
from html import unescape
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk
import torch
from conftest import oblique_affine
from PIL import Image
from plain_map import saliency
from pypdf import PdfReader
from test_evaluation_page import Drawn
from typer.testing import CliRunner

import MedXAILib as mx
from MedXAILib.cli import app
from MedXAILib.cohort.plan import Plan, Subject, make_plan
from MedXAILib.cohort.work import RESULTS, write_receipt
from MedXAILib.errors import MedXAIError
from MedXAILib.report.cohort import page

SITES = ("north", "<south>")
GRID = (9, 14, 11)
BRIGHT = (2, 3, 8)
VARIED = (6, 9, 2)
"""The voxels (d, h, w) where the mean and the variance are largest."""


def subjects() -> list[Subject]:
    return [Subject(f"case-{i}", (f"scan-{i}.nrrd",), meta={"site": SITES[i % 2]}) for i in range(5)]


def told(plan: Plan, folder: Path) -> None:
    """Results and receipts: of each method one is refused, one failed and one still to do; or all done."""
    done = {"status": "done", "digest": "0", "device": "cpu", "seconds": 1.5, "versions": {"medxai": "9.8.7"}}
    for unit in plan.units():
        number = int(unit.subject.uid[-1])
        if number < 2:
            made = saliency(torch.ones(1, 2, 3, 4), np.eye(4), region=[1.0, 2.0, 3.0])
            made.save(folder / RESULTS / unit.key)
            write_receipt(folder, unit, done)
        elif number < 4:
            status = ("refused", "failed")[number - 2]
            write_receipt(folder, unit, {"status": status, "reason": f"no <{status}> reason"})


def table(path: Path, *rows: list[object]) -> None:
    with path.open("w", encoding="utf-8", newline="") as file:
        csv.writer(file).writerows(rows)


@pytest.fixture(scope="module")
def cohort(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder, result = tmp_path_factory.mktemp("cohort"), tmp_path_factory.mktemp("result")
    methods = {"gradcam": {"layers": ("a<b>",)}, "tcav": {"concepts": str(folder / "concepts.yml")}}
    plan = make_plan("some/network", "f1n9e7", methods, subjects(), seed=42)
    plan.save(folder)
    told(plan, folder)
    affine = oblique_affine((4.0, 3.0, 2.0))
    template = mx.Volume(torch.rand(1, *GRID, generator=torch.Generator().manual_seed(0)), affine)
    mean = torch.zeros(1, *GRID)
    mean[0, BRIGHT[0], BRIGHT[1], BRIGHT[2]] = 1.0
    variance = torch.zeros(1, *GRID)
    variance[0, VARIED[0], VARIED[1], VARIED[2]] = 0.5
    for name, values in {"gradcam-mean": mean, "gradcam-variance": variance, "template": template.data}.items():
        sitk.WriteImage(mx.Volume(values, affine).to_sitk(), str(result / f"{name}.nrrd"))
    heads = ["group", "cases", "mean", "low", "high"]
    table(
        result / "gradcam-regions.csv",
        ["region", *heads, "by"],
        ["left <lobe>", "all", 5, 0.25, 0.15, 0.4, ""],
        ["left <lobe>", "north", 3, 0.1, 0.05, 0.2, "site"],
        ["left <lobe>", "<south>", 2, 0.475, "", "", "site"],
        ["right", "all", 5, 0.75, 0.6, 0.85, ""],
    )
    table(
        result / "gradcam-differences.csv",
        ["region", "group", "cases", "mean", "low", "high", "by", "effect", "p", "q", "note"],
        ["right", "north - <south>", 5, 0.01, -0.1, 0.1, "site", "difference of means", 0.8, 0.8, ""],
        ["left <lobe>", "north - <south>", 5, -0.375, -0.5, -0.2, "site", "difference of means", 0.001, 0.002, ""],
        ["trachea", "north - <south>", 5, 0, 0, 0, "age", "", "", "", "too few"],
    )
    table(result / "gradcam-cases.csv", ["case", "right"], ["case-0", 0.75])
    table(result / "gradcam-left-out.csv", ["case", "reason"], ["case-1", "not <registered>"])
    table(
        result / "tcav-concepts.csv",
        ["concept", *heads, "target", "q"],
        ["size", "all", 2, 1.5, 1.0, 2.0, "malignant", 0.01],
        ["edge", "all", 2, -0.5, -1.0, 0.25, "malignant", 0.2],
        ["size", "all", 2, -0.7, -0.9, -0.5, "benign", 0.03],
        *(["rare" + str(i), "all", 1, 0.001 * i, "", "", "benign", ""] for i in range(80)),
    )
    return folder, result


@pytest.fixture(scope="module")
def said(cohort: tuple[Path, Path]) -> str:
    return page(*cohort)


def words(text: str) -> str:
    """What a reader sees but for plots."""
    text = re.sub(r"<style>.*?</style>|<svg.*?</svg>", " ", text, flags=re.DOTALL)
    return " ".join(unescape(re.sub(r"<[^>]+>", " ", text)).split())


def test_what_was_done_is_counted_and_what_was_not_is_told_with_its_reason(said: str) -> None:
    shown = words(said)
    assert "done refused failed waiting Grad-CAM 2 1 1 1 TCAV 2 1 1 1" in shown
    assert "2 of 10 explanations are still to do" in shown
    assert "refused: no <refused> reason 2 methods, 2 maps Grad-CAM, 1 of 5 cases: case-2" in shown
    assert "failed: no <failed> reason" in shown and "left out: not <registered> Grad-CAM, 1 of 5 cases" in shown


def test_means_are_drawn_where_they_are_the_strongest_above_with_groups_below(said: str) -> None:
    (plot,) = re.findall(r'<svg [^>]*aria-label="Regions">', said)
    assert plot
    drawn = Drawn(said, "Regions")
    names = [text for text, x, _ in drawn.texts if x < 250]
    assert names == ["right", "left <lobe>", "site north", "site <south>"]
    assert [drawn.at(x) for x, _ in drawn.dots] == pytest.approx([0.75, 0.25, 0.1, 0.475], abs=2e-3)
    ends = [drawn.ends(i) for i in range(3)]
    assert np.allclose(ends, [(0.6, 0.85), (0.15, 0.4), (0.05, 0.2)], atol=2e-3)
    # What has no interval has no whisker.
    assert len(drawn.whiskers) == 3 and drawn.at(drawn.blind[0]) == pytest.approx(0, abs=2e-3)
    assert [text for text, x, _ in drawn.texts if x > 510] == ["0.75 (5)", "0.25 (5)", "0.1 (3)", "0.475 (2)"]


def test_each_target_has_its_plot_and_long_tables_say_where_the_rest_is(said: str) -> None:
    plots = re.findall(r"<figcaption><strong>Concepts</strong>(.*?)</figcaption>.*?</figure>", said)
    assert [plot.rpartition(": ")[2] for plot in plots] == ["about benign", "about malignant"]
    assert "the strongest 15" in plots[0] and "all 2" in plots[1]
    assert "23 more rows are in tcav-concepts.csv." in words(said)


def test_differences_are_ranked_by_q_and_counted(said: str) -> None:
    shown = words(said)
    assert "1 of 2 comparisons have a q below 0.05: of such, about 5% or fewer are chance." in shown
    ranked = (("left <lobe>", "-0.375"), ("right", "0.01"), ("trachea", "0"))
    places = [shown.index(f"{region} north - <south> 5 {mean}") for region, mean in ranked]
    assert places == sorted(places) and "0.002" in shown and "too few" in shown


def test_the_picture_peaks_where_the_mean_does(cohort: tuple[Path, Path], said: str) -> None:
    alts = re.findall(r'<img alt="([^"]*)"', said)
    assert alts == ["Grad-CAM: mean of the maps", "Grad-CAM: variance of the maps"]
    pictures = [Image.open(io.BytesIO(base64.b64decode(c))) for c in re.findall(r'base64,([^"]+)', said)]
    for picture, voxel in zip(pictures, (BRIGHT, VARIED), strict=True):
        peaks_at(picture, voxel)


def peaks_at(picture: Image.Image, voxel: tuple[int, int, int]) -> None:
    pixels = np.asarray(picture.convert("RGB")).astype(int)
    # Three planes of 280 pixels and a gap of 10, the colours in the lower ones.
    orange = pixels[..., 0] - pixels[..., 2] > 90
    assert np.flatnonzero(orange[:, :870].any(1)).min() > pixels.shape[0] / 2
    columns = [np.flatnonzero(orange[:, i * 290 + 10 : i * 290 + 290].any(0)).mean() for i in range(3)]
    affine = oblique_affine((4.0, 3.0, 2.0))
    ends = np.array([affine @ [*(np.array(c) * (np.array(GRID) - 1)), 1] for c in np.ndindex(2, 2, 2)])[:, :3]
    away = ((affine @ [*voxel, 1])[:3] - (ends.min(0) + ends.max(0)) / 2) / np.ptp(ends, axis=0).max() * 280
    # The patient's right is on the left; the third plane is seen from the patient's left.
    assert columns == pytest.approx([140 - away[0], 140 - away[0], 140 - away[1]], abs=12)


def test_cases_to_look_at_are_in_their_order_and_no_means(cohort: tuple[Path, Path], tmp_path: Path) -> None:
    heads = ["case", "group", "cases", "mean", "low", "high", "by", "target", "of", "shows"]
    rows = [
        ["case-3", "all", 5, 0.6, "", "", "", "", "concept", "b"],
        ["case-1", "all", 5, 0.9, "", "", "", "", "concept", "a"],
    ]
    table(tmp_path / "tcav-typical.csv", heads, *rows)
    text = page(cohort[0], tmp_path)
    assert re.search("Cases to look at .*case-3 all 5 0.6 concept b case-1 all 5 0.9 concept a", words(text))
    assert "<svg" not in text


def test_folders_of_who_planned_it_are_not_on_the_page(tmp_path: Path) -> None:
    secret = tmp_path / "dr_who"
    scan = str(secret / "scan.nrrd")
    plan = make_plan(str(secret / "net"), "f", {"tcav": {"concepts": str(secret / "x.yml")}}, [Subject("a", (scan,))])
    plan.save(tmp_path)
    (unit,) = plan.units()
    write_receipt(tmp_path, unit, {"status": "refused", "reason": f"'{scan}' is damaged."})
    table(tmp_path / "tcav-left-out.csv", ["case", "reason"], ["a", f"{scan} is flat"])
    text = unescape(page(tmp_path, tmp_path))
    assert "dr_who" not in text and "'scan.nrrd' is damaged" in text and '"concepts": "x.yml"' in text


def test_where_it_comes_from_is_told(said: str) -> None:
    shown = words(said)
    for part in ("f1n9e7", "seed 42", "medxai 9.8.7", '"layers": ["a<b>"]', "seconds of computing 6", "site"):
        assert part in shown
    assert "For research only" in shown and "<script" not in said and "http" not in said.replace("http-equiv", "")


def test_the_command_writes_page_and_pdf_and_refuses_what_is_no_result(
    cohort: tuple[Path, Path], tmp_path: Path
) -> None:
    folder, result = cohort
    done = CliRunner().invoke(app, ["cohort", "report", str(folder), str(result), "--pdf"])
    assert done.exit_code == 0, done.output
    assert (result / "index.html").read_text(encoding="utf-8") == page(folder, result)
    printed = PdfReader(result / "report.pdf")
    text = "".join("".join(sheet.extract_text() for sheet in printed.pages).split())
    assert "left<lobe>" in text and "23morerowsareintcav-concepts.csv." in text
    with pytest.raises(MedXAIError, match="holds no table of this cohort"):
        page(folder, tmp_path)
    assert CliRunner().invoke(app, ["cohort", "report", str(tmp_path), str(result)]).exit_code == 1


def test_the_caution_of_the_network_is_on_the_page(cohort: tuple[Path, Path], tmp_path: Path) -> None:
    (tmp_path / "net" / "configs").mkdir(parents=True)
    about = '{"name": "A & B", "description": "Of <nodules>.", "intended_use": "Not for diagnosis."}'
    (tmp_path / "net" / "configs" / "metadata.json").write_text(about, encoding="utf-8")
    plan = make_plan(str(tmp_path / "net"), "f", {"gradcam": {}}, subjects())
    plan.save(tmp_path / "plan")
    shown = words(page(tmp_path / "plan", cohort[1]))
    assert "A & B, asked about 5 cases." in shown and "Of <nodules>. Not for diagnosis." in shown
