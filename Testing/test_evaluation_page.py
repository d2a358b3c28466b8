"""The page of a comparison: what is drawn is what was measured, and everything that was refused is there."""

from __future__ import annotations

import re
from xml.etree import ElementTree

import numpy as np
import pytest
from test_report import Tags
from typer.testing import CliRunner

from MedXAILib.cli import app
from MedXAILib.report.evaluation import NUMBERS, page
from MedXAILib.resources import path
from MedXAILib.trust.evaluation import summary
from MedXAILib.trust.finding import COLOURS

SCAN, MASK = path("SampleData/chest_ct_nodule.nrrd"), path("SampleData/chest_ct_nodule_mask.nrrd")

# 95 % of Student's t for three cases, from any table.
T_OF_3 = 4.3027


def case(
    name: str, seconds: float = 1.0, light: str | None = "good", memory: float = 0.0, **values: dict[str, float]
) -> dict:
    findings = [{"check": check, "light": light, "values": known} for check, known in values.items()]
    return {"case": name, "cost": {"seconds": seconds, "peak_memory": memory}, "findings": findings, "left_out": {}}


def written(results: dict) -> str:
    return page("net", [summary(method, found) for method, found in results.items()], results)


class Drawn:
    """What a reader sees of a plot of a page: where the names, dots, whiskers and bars are."""

    def __init__(self, text: str, called: str) -> None:
        (plot,) = re.findall(rf'<svg [^>]*role=img aria-label="{re.escape(called)}">.*?</svg>', text)
        # Attributes without quotes are HTML, not XML.
        root = ElementTree.fromstring(re.sub(r"(\w+)=(\w[\w-]*)(?=[ />])", r'\1="\2"', plot))
        self.texts = [(t.text or "", float(t.attrib["x"]), float(t.attrib["y"])) for t in root.iter("text")]
        faint = [(t.text or "", float(t.attrib["x"])) for t in root.iter("text") if t.attrib["class"] == "faint"]
        self.axis = [(float(said), x) for said, x in faint if re.fullmatch(r"-?[\d.e-]+", said)]
        self.dots = [(float(c.attrib["cx"]), float(c.attrib["cy"])) for c in root.iter("circle")]
        self.whiskers = [p.attrib["d"] for p in root.iter("path") if p.attrib["class"] == "whisker"]
        self.blind = [float(p.attrib["d"][1:].split()[0]) for p in root.iter("path") if p.attrib["class"] == "blind"]
        self.bars = [r.attrib for r in root.iter("rect") if "fill" in r.attrib]

    def at(self, x: float, logarithmic: bool = False) -> float:
        """The value at a place, going by the labels of the axis alone."""
        (low, left), (high, right) = self.axis[0], self.axis[-1]
        if logarithmic:
            return float(10 ** np.interp(x, [left, right], np.log10([low, high])))
        return float(np.interp(x, [left, right], [low, high]))

    def ends(self, i: int) -> tuple[float, float]:
        found = re.match(r"M([\d.]+) [\d.]+H([\d.]+)", self.whiskers[i])
        assert found is not None
        return self.at(float(found[1])), self.at(float(found[2]))


def test_dots_are_means_and_whiskers_their_intervals_with_the_best_above() -> None:
    values = {"gradient": (0.30, 0.34, 0.38), "hirescam": (0.7, 0.8, 0.6), "gradcam": (-0.7, -0.1, 0.4)}
    found = {
        method: [case(str(v), additivity={"sensitivity-n": v}, randomisation={"likeness": v}) for v in three]
        for method, three in values.items()
    }
    text = written(found)
    plots = {called: Drawn(text, called) for called in ("Amounts", "Scrambled network")}
    order = ["HiResCAM", "Gradient", "Grad-CAM"]
    for plot, names in zip(plots.values(), (order, order[::-1]), strict=True):
        heights = {said: y for said, _, y in plot.texts if said in order}
        assert sorted(heights, key=heights.__getitem__) == names
        for i, name in enumerate(names):
            three = np.array(values[{"HiResCAM": "hirescam", "Gradient": "gradient", "Grad-CAM": "gradcam"}[name]])
            half = T_OF_3 * three.std(ddof=1) / 3**0.5
            x, y = plot.dots[i]
            assert abs(y - heights[name]) < 5
            assert plot.at(x) == pytest.approx(three.mean(), abs=0.01)
            # No correlation is above 1, whatever the interval.
            assert plot.ends(i) == pytest.approx((three.mean() - half, min(1.0, three.mean() + half)), abs=0.01)
            assert any(said == f"{three.mean():.2f} ± {half:.2f}" for said, _, at in plot.texts if at == heights[name])
    assert plots["Amounts"].at(plots["Amounts"].blind[0]) == pytest.approx(0, abs=0.01)
    assert "better →" in {said for said, _, _ in plots["Amounts"].texts}
    assert "← better" in {said for said, _, _ in plots["Scrambled network"].texts}


def test_the_best_map_that_knows_nothing_is_drawn_beside_the_methods() -> None:
    blind = {"centre: auprc": 0.25, "intensity: auprc": 0.4, "random: auprc": 0.02}
    plot = Drawn(written({"gradient": [case("a", validity={"auprc": 0.6, **blind})]}), "AUPRC")
    assert plot.at(plot.blind[0]) == pytest.approx(0.4, abs=0.01)
    assert (plot.axis[0][0], plot.axis[-1][0]) == (0, 1)
    # One case has no interval.
    assert not plot.whiskers and ("0.60" in {said for said, _, _ in plot.texts})


def test_costs_are_on_a_logarithmic_axis_and_memory_that_is_nothing_is_not_drawn() -> None:
    found = {"gradient": [case("a", 0.02), case("b", 0.04)], "occlusion": [case("a", 30.0), case("b", 50.0)]}
    text = written(found)
    plot = Drawn(text, "Time")
    assert [plot.at(x, logarithmic=True) for x, _ in plot.dots] == pytest.approx([0.03, 40.0], rel=0.05)
    assert 'aria-label="Memory"' not in text
    found["lime"] = [case("a", memory=2e7), case("b", memory=2e7)]
    found["gradient"] = [case("a", memory=4e3), case("b", memory=8e3)]
    plot = Drawn(written(found), "Memory")
    assert [plot.at(x, logarithmic=True) for x, _ in plot.dots] == pytest.approx([1.0, 1.0, 20.0], rel=0.05)
    assert [said for said, _, _ in plot.texts if said.endswith("MB")] == ["under 1 MB", "under 1 MB", "20 ± 0 MB"]


def test_bars_are_as_long_as_there_are_lights() -> None:
    lights = {"gradient": "good good fair poor".split(), "lrp": ["good"] * 3 + [None], "gradcam": ["poor"] * 2}
    found = {
        method: [case(str(i), light=light, stability={}) for i, light in enumerate(some)]
        for method, some in lights.items()
    }
    plot = Drawn(written(found), "Does a tiny change of the scan change it?")
    colours = {colour: light for light, (_, colour) in COLOURS.items()}
    rows: dict[float, list[tuple[str | None, float]]] = {}
    for bar in plot.bars:
        row = rows.setdefault(float(bar["y"]), [])
        assert float(bar["x"]) == pytest.approx(float(plot.bars[0]["x"]) + sum(width for _, width in row), abs=0.2)
        row.append((colours[bar["fill"]], float(bar["width"])))
    unit = max(sum(width for _, width in row) for row in rows.values()) / 4
    counted = [[(light, width / unit) for light, width in row] for _, row in sorted(rows.items())]
    assert counted == [
        [("good", pytest.approx(3)), (None, pytest.approx(1))],
        [("good", pytest.approx(2)), ("fair", pytest.approx(1)), ("poor", pytest.approx(1))],
        [("poor", pytest.approx(2))],
    ]
    assert [said for said, _, _ in plot.texts if said.startswith("of ")] == ["of 4", "of 4", "of 2"]


def test_what_was_refused_is_told_with_its_cases() -> None:
    refused = {"case": "patient 7", "refused": "it has no attention"}
    left = case("patient 1") | {"left_out": {"stability": "too wild"}}
    text = written({"attention_rollout": [refused, case("patient 1")], "gradient": [left, left], "lrp": [left]})
    assert "<td>it has no attention</td>" in text and "Attention rollout, 1 of 2 cases</summary>" in text
    assert "<td>stability: too wild</td>" in text and "2 methods, 3 maps</summary>" in text
    assert "1 of 2 cases: patient 7<" in text


def test_a_page_without_anything_refused_or_checked_says_nothing_of_it() -> None:
    text = written({"gradient": [case("a")]})
    assert "refused, and why" not in text and "What the checks say" not in text and "Is it right?" not in text


def test_the_page_escapes_what_others_wrote_and_asks_nobody_for_anything() -> None:
    evil = "</title><script>alert(1)</script><img src=x onerror='alert(2)'>\"{0}"
    values = {number.name.partition(": ")[2]: 0.5 for numbers in NUMBERS.values() for number in numbers}
    found = {
        evil: [case(evil, validity=values), {"case": evil, "refused": evil}, case(evil) | {"left_out": {evil: evil}}]
    }
    text = page(evil, [summary(method, some) for method, some in found.items()], found)
    tags = Tags(text).found
    assert {tag for tag, _ in tags}.isdisjoint({"script", "link", "iframe", "object", "a", "base", "form", "img"})
    assert not any(name.startswith("on") for _, attributes in tags for name in attributes)
    assert "http:" not in text and "https:" not in text and "url(" not in text
    assert "not for diagnosis" in text.lower()


def test_the_command_line_writes_the_page_and_says_where_it_is(tmp_path) -> None:
    table, out = tmp_path / "cases.csv", tmp_path / "out"
    table.write_text(f"volume,segmentation,target\n{SCAN},{MASK},malignant\n", encoding="utf-8")
    asked = ["evaluate", "lung_nodule", str(table), "-m", "gradient", "-m", "attention_rollout", "--checks", "validity"]
    result = CliRunner().invoke(app, [*asked, "-o", str(out)])
    assert result.exit_code == 0, result.output
    assert str(out / "index.html") in "".join(result.output.split("\n")) and "table.csv" in result.output
    text = (out / "index.html").read_text(encoding="utf-8")
    assert "2 methods, asked of Lung nodule classifier about 1 case." in text
    assert "Attention rollout, 1 of 1 cases" in text and Drawn(text, "AUPRC").dots
