"""The PDF of a page, read by another program: its words, pictures, bars and lights are those of the page."""

from __future__ import annotations

import base64
import io
import json
import re
from html import escape, unescape
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk
import small_explanations
import torch
from PIL import Image
from plain_map import saliency
from pypdf import PdfReader
from test_report import sphere
from typer.testing import CliRunner

import MedXAILib as mx
from MedXAILib import __version__
from MedXAILib.cli import app
from MedXAILib.model import Prediction
from MedXAILib.report import evaluation
from MedXAILib.report.case import show
from MedXAILib.report.cases import of_cases
from MedXAILib.report.page import document, image, listed, page
from MedXAILib.report.pdf import pdf
from MedXAILib.report.rules import of_rules
from MedXAILib.report.told import told_page
from MedXAILib.report.traversal import of_traversal
from MedXAILib.report.words import of_caption, of_concepts
from MedXAILib.resources import path
from MedXAILib.trust.card import TrustCard
from MedXAILib.trust.evaluation import summary
from MedXAILib.trust.finding import COLOURS, Finding

MADE = "2026-03-29T01:30:00+02:00"
SAID = {"marker": 0.75, "<none>": 0.25}


def of_map() -> str:
    """The page of a map with everything on it."""
    volume, heat, segmentation = sphere()
    heat = saliency(heat.data, heat.affine, created=MADE, notes=["Zoë Çelik, Ελένη, Ольга: 5 mm² × 3 ≥ “2”"])
    lights = [Finding("validity", f"Is it {n}?", f"It is {n} & so.", n, {"mass": 1 / 3}) for n in COLOURS]
    card = TrustCard(tuple(lights), {"stability": "it would take too long"}, 1, 1)
    return page(
        show(volume, heat, Prediction(torch.empty(0), SAID), segmentation, card), Prediction(torch.empty(0), SAID)
    )


def of_what_was_told() -> dict[str, str]:
    """The pages of what is not one map."""
    made = saliency(torch.ones(1, 2, 3, 4), np.diag([9.0, 8.0, 7.0, 1.0]), created=MADE)
    volume, maps = mx.Volume(torch.rand(1, 2, 3, 4), made.affine), made.data
    made_by = made.provenance
    words = (mx.Word("round", 2, 7, 0.2), mx.Word("nodule", 8, 14, 0.9, 0, (1.0, 2.0, 3.0)))
    caption = mx.Caption(made_by, {}, "A round nodule.", words, maps, made.affine)
    concepts = mx.ConceptScores(
        made_by,
        {},
        (mx.Concept("size", 1.2, 0.3, 15.0, "mm", numbers={"p": 0.001}), mx.Concept("edge", refused="not <told>")),
        "score",
        "By size.",
        alike=np.eye(2),
    )
    cases = tuple(mx.Case(f"case {i}", "ill", 0.9 - i / 10, volume=volume, map=maps) for i in range(3))
    similar = mx.SimilarCases(made_by, {}, cases, maps, made.affine, text="Three.")
    rule = mx.Rule((mx.Condition("size", ">", 12.0, "mm"),), "ill", 0.3, 0.9, 31, applies=True)
    rules = mx.RuleSet(made_by, {}, (rule, mx.Rule((), "well", 0.7, 0.8, 69)), "By size.", {"size": 15.0})
    steps = [mx.Step(float(p), 1.0 - p, {"ill": 1 - p / 2}, {"size": 9 + p}) for p in (-1, 0, 1)]
    places = (mx.Place("a", "ill", 0, 0), mx.Place("b", "well", 1, 2))
    traversal = mx.Traversal(
        made_by, {}, steps, torch.rand(3, 2, 3, 4), made.affine, "by size", "It flips.", 2, places, np.eye(3, 2)
    )
    return {
        "caption": told_page(caption, of_caption(volume, caption)),
        "concepts": told_page(concepts, of_concepts(volume, concepts)),
        "cases": told_page(similar, of_cases(volume, similar)),
        "rules": told_page(rules, of_rules(volume, rules)),
        "traversal": told_page(traversal, of_traversal(volume, traversal)),
    }


def of_evaluation() -> str:
    found = [Finding("validity", "", "", light, {"auprc": 0.5}).to_json() for light in ("good", "good", "poor")]
    done = [
        {"case": f"c{i}", "cost": {"seconds": 1.0 + i, "peak_memory": 0}, "findings": [one], "left_out": {}}
        for i, one in enumerate(found)
    ]
    results = {"gradient": done, "rise": [{"case": "c0", "refused": "no <reason>"}]}
    return evaluation.page("net", [summary(name, each) for name, each in results.items()], results)


@pytest.fixture(scope="module")
def pages() -> dict[str, str]:
    return {"map": of_map(), "evaluation": of_evaluation(), **of_what_was_told()}


def read(printed: bytes) -> PdfReader:
    return PdfReader(io.BytesIO(printed))


def letters(text: str) -> str:
    """Without what depends on where lines end."""
    return "".join(text.split())


def printed_letters(reader: PdfReader) -> str:
    """The letters on all sheets but for what stands at the foot of each, which must be there."""
    said = ""
    for number, sheet in enumerate(reader.pages, 1):
        foot = "For research only. Not for diagnosis or treatment."
        foot = letters(f"{foot} MedXAI {__version__} · page {number} of {len(reader.pages)}")
        whole = letters(sheet.extract_text())
        assert whole.startswith(foot)
        said += whole.removeprefix(foot)
    return said


def page_letters(text: str) -> str:
    """What a reader of the page sees with all folds open; the numbers of ordered lists as well."""
    body = re.sub(r"<title>.*?</title>", "", text[text.index("<body>") :], flags=re.DOTALL)
    for ordered in re.findall(r"<ol>.*?</ol>", body, flags=re.DOTALL):
        first, *items = ordered.split("<li")
        body = body.replace(ordered, first + "".join(f"{i}. <li{item}" for i, item in enumerate(items, 1)))
    return letters(unescape(re.sub("<[^>]+>", " ", body)))


@pytest.mark.parametrize("name", ["map", "evaluation", "caption", "concepts", "cases", "rules", "traversal"])
def test_the_pdf_says_all_that_the_page_says_in_its_order_and_the_same_bytes_each_time(pages, name) -> None:
    printed = pdf(pages[name])
    assert printed_letters(read(printed)).replace("•", "") == page_letters(pages[name])
    assert pdf(pages[name]) == printed


def test_pictures_keep_every_pixel(pages) -> None:
    for name in ("map", "cases", "traversal"):
        kept = [Image.open(io.BytesIO(base64.b64decode(c))) for c in re.findall(r'base64,([^"]+)', pages[name])]
        printed = [
            np.asarray(one.image.convert("RGB")) for sheet in read(pdf(pages[name])).pages for one in sheet.images
        ]
        assert len(printed) >= 1
        for one in kept:
            assert any(np.array_equal(np.asarray(one.convert("RGB")), other) for other in printed)


def test_the_file_says_what_it_is_and_when_it_was_made(pages) -> None:
    reader = read(pdf(pages["map"]))
    known = reader.metadata
    assert known is not None and known.title == "Why marker: Grad-CAM"
    assert known.author == f"MedXAI {__version__}" and "research only" in (known.subject or "")
    assert known["/CreationDate"] == known["/ModDate"] == "D:20260328233000Z"
    assert "/CreationDate" not in (of := read(pdf(pages["evaluation"])).metadata or {}) or not of["/CreationDate"]
    assert [float(side) for side in reader.pages[0].mediabox[2:]] == pytest.approx([595.3, 841.9], abs=0.1)


def test_headings_are_bookmarks_to_their_sheets(pages) -> None:
    reader = read(pdf(pages["map"]))
    first, below = reader.outline
    assert first.title == "Why “marker”?" and [one.title for one in below] == re.findall("<h2>(.*?)</h2>", pages["map"])
    for one in [first, *below]:
        sheet = reader.pages[reader.get_destination_page_number(one)]
        assert letters(one.title) in letters(sheet.extract_text())


def rectangles(printed: bytes) -> list[tuple[float, str]]:
    """The widths of all rectangles on paper, and their colours in hexadecimal digits."""
    found: list[tuple[float, str]] = []
    filled = ["#000000"]

    def see(operator, operands, matrix, _text) -> None:
        if operator == b"rg":
            filled[0] = "#" + "".join(f"{round(255 * float(part)):02x}" for part in operands)
        if operator == b"re":
            found.append((float(operands[2]) * matrix[0], filled[0]))

    for sheet in read(printed).pages:
        sheet.extract_text(visitor_operand_before=see)
    return found


def test_bars_are_as_long_as_what_they_say(pages) -> None:
    orange = [width for width, colour in rectangles(pdf(pages["map"])) if colour == "#b45309"]
    grey = {width for width, colour in rectangles(pdf(pages["map"])) if colour == "#d9dce0"}
    (whole,) = {round(width, 3) for width in grey}
    assert orange == pytest.approx([0.75 * whole, 0.25 * whole])
    good, poor = (
        [width for width, colour in rectangles(pdf(pages["evaluation"])) if colour == COLOURS[light][1]]
        for light in ("good", "poor")
    )
    # Two lights of three, and one; the plot is 260 pixels of 640, of 0.6 points.
    assert good == pytest.approx([2 / 3 * 260 * 0.6], abs=0.1) and poor == pytest.approx([1 / 3 * 260 * 0.6], abs=0.1)


def test_lights_have_their_colours(pages) -> None:
    text = b"".join(sheet.get_contents().get_data() for sheet in read(pdf(pages["map"])).pages).decode("latin-1")
    used = {tuple(map(float, found)) for found in re.findall(r"([\d.]+) ([\d.]+) ([\d.]+) rg", text)}
    # And what warns has the colour of a light screen, not of a dark one.
    for colour in (*(colour for _, colour in COLOURS.values()), "#8a4b00"):
        meant = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
        assert any(np.allclose(meant, other, atol=1e-3) for other in used)


def test_a_long_table_goes_on_on_the_next_sheet_below_its_heads() -> None:
    rows = "".join(f"<tr><th>row {i} of it</th><td class=number>{i} ± {i}</td></tr>" for i in range(300))
    text = document("Long", [f"<h1>Long</h1><table><tr class=head><td>which</td><td>what</td></tr>{rows}</table>"])
    reader = read(pdf(text))
    assert len(reader.pages) > 4
    sheets = [sheet.extract_text() for sheet in reader.pages]
    assert all(sheet.count("which") == 1 for sheet in sheets)
    found = [int(number) for sheet in sheets for number in re.findall(r"row (\d+) of it", sheet)]
    assert found == list(range(300))


def test_nothing_lies_outside_the_sheet() -> None:
    heads = "".join(f"<th>heading {i}</th>" for i in range(24))
    cells = "".join(f"<td class=number>0.57 ± {i}.25</td>" for i in range(24))
    words = f"<table><tr><th>{'x' * 900}</th><td>{'word ' * 3000}</td><td>{'y' * 4000}</td></tr></table>"
    text = document(
        "Wide", [f"<h1>{'w' * 3300}</h1><table><tr>{heads}</tr><tr>{cells}</tr></table>", words, "z" * 9000]
    )
    reader, seen = read(pdf(text)), []
    assert [len(one.title) for one in reader.outline] == [3300]

    def see(said, on, at, *_) -> None:
        # Where a line begins, in the coordinates of the text, and these in those of the sheet.
        if re.search("heading|word|xx|yy|zz|ww|0.57", said):
            seen.append(at[4] * on[0] + on[4])

    for sheet in reader.pages:
        sheet.extract_text(visitor_text=see)
    assert min(seen) > 41.9 and 500 < max(seen) < 595 - 42
    # A row that is longer than a sheet goes on on the next, with every word.
    said = printed_letters(reader)
    assert [said.count(each) for each in ("word", "x", "y", "z")] == [3000, 900, 4000, 9000]


def test_what_others_wrote_is_text_and_what_cannot_be_written_is_a_box() -> None:
    names = ['<b>&amp;</b><img src="file:///etc/passwd">', "<para><font color='red'>", "{0} %s \\ \x07"]
    shown = "Ångström Škoda Łódź Ñuñez Γαλανός Ἀθηνᾶ Жуков Їжак ●○■→←≥≤×±²“”‘’–—…"
    missing = "张伟 한 👩🏽 \U00020000"
    text = document("<i>", [f"<h1>{escape(shown)}</h1>", listed([*names, shown, missing]), "e\u0301"])
    said = printed_letters(read(pdf(text)))
    for name in names[:2]:
        assert letters(name) in said
    assert said.count(letters(shown)) == 2 and "{0}%s\\□" in said
    assert "□□□□□□" in said and said.endswith("é")


def test_pictures_are_those_of_the_page_alone(tmp_path: Path) -> None:
    Image.new("RGB", (4, 4), (1, 2, 3)).save(tmp_path / "own.png")
    own = Image.new("RGB", (9, 7), (7, 8, 9))
    parts = [f'<img src="{(tmp_path / "own.png").as_uri()}">', f"<img src={tmp_path / 'own.png'}>", image(own, "it")]
    (found,) = [one for sheet in read(pdf(document("x", parts))).pages for one in sheet.images]
    assert found.image.size == (9, 7)


def test_a_page_that_was_saved_is_printed_and_without_one_it_is_said(tmp_path: Path, pages) -> None:
    (tmp_path / "kept").mkdir()
    (tmp_path / "kept" / "index.html").write_text(pages["rules"], encoding="utf-8")
    done = CliRunner().invoke(app, ["pdf", str(tmp_path / "kept")])
    assert done.exit_code == 0 and "report.pdf" in done.output
    assert (tmp_path / "kept" / "report.pdf").read_bytes() == pdf(pages["rules"])
    refused = CliRunner().invoke(app, ["pdf", str(tmp_path)])
    assert refused.exit_code == 1 and "holds no page" in refused.output


def test_an_explanation_is_printed_as_it_is_made(tmp_path: Path) -> None:
    sitk.WriteImage(small_explanations.chest().to_sitk(), str(tmp_path / "scan.nrrd"))
    where = ",".join(map(str, small_explanations.NODULE))
    asked = ["explain", "lung_nodule", str(tmp_path / "scan.nrrd"), f"--region={where}", "-m", "gradient", "--pdf"]
    done = CliRunner().invoke(app, [*asked, "--out", str(tmp_path / "out")])
    assert done.exit_code == 0, done.output
    kept = (tmp_path / "out" / "report.pdf").read_bytes()
    assert kept == pdf((tmp_path / "out" / "index.html").read_text(encoding="utf-8"))
    made = json.loads((tmp_path / "out" / "explanation.json").read_text(encoding="utf-8"))["provenance"]["created"]
    assert (read(kept).metadata or {})["/CreationDate"][2:10] == re.sub("-", "", made[:10])


def test_the_fonts_are_small_and_their_licence_is_beside_them() -> None:
    assert sum(file.stat().st_size for file in path("Fonts").glob("*.ttf")) < 800_000
    assert "Bitstream" in (path("Fonts") / "LICENSE").read_text(encoding="utf-8")
