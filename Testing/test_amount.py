"""Numbers in words, the same on pages, in the terminal and in Slicer."""

from __future__ import annotations

import pytest

from MedXAILib.amount import amount, amounts


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("diameter_mm", 12.34, "diameter 12.3 mm"),
        ("diameter (mm)", 9, "diameter 9 mm"),
        ("mean_intensity HU", -612.4, "mean intensity -612 HU"),
        ("percentile", 0.25, "percentile 0.25"),
        ("volume_mL", 1e-4, "volume 0.0001 mL"),
        # No unit: it is a part of the name.
        ("mm_of_margin", 3, "mm of margin 3"),
        ("", 1, "1"),
    ],
)
def test_a_number_is_said_with_its_unit_behind(name: str, value: float, words: str) -> None:
    assert amount(name, value) == words


def test_those_with_a_unit_come_first() -> None:
    assert amounts({"points": 3.0, "diameter_mm": 8, "weight": 1}) == ["diameter 8 mm", "points 3", "weight 1"]
