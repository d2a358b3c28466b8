"""What a bundle says that learnt from a person's own table: what from, how well, and what nobody knows of it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from MedXAILib.training.table import SPLITS, Table


def told_of(
    table: Table,
    recipe: str,
    name: str,
    metrics: Mapping[str, float],
    task: str,
    does: str,
    meaning: str,
    output: str = "logits",
) -> dict[str, Any]:
    """What `write_bundle` is told of a network called `name` that learnt from `table` by `recipe`: what it `does` with
    a cube, what its `output` is, and the `meaning` of both it and `metrics`, in Markdown."""
    patients = len({case.patient for case in table.cases})
    return {
        "about": {
            "name": name,
            "task": task,
            "description": f"Trained on a table of {len(table.cases)} patches of {patients} patients.",
            "intended_use": "Research on the data it was trained for. Not for diagnosis.",
            "authors": "not given",
            "copyright": "not given",
            "data_source": table.path.name,
            "data_type": "table",
        },
        "card": _card(table, recipe, name, metrics, does, meaning, output),
        "metrics": metrics,
        "grid": table.grid,
        "image": {"format": "magnitude", "modality": "not given"},
        "licence": "",
    }


def _card(
    table: Table, recipe: str, name: str, metrics: Mapping[str, float], does: str, meaning: str, output: str
) -> str:
    low, high = table.grid.intensities
    tested = table.of("test")
    return _CARD.format(
        name=name,
        recipe=recipe,
        table=table.path.name,
        does=does,
        meaning=meaning,
        output=output,
        counts=_counts(table),
        attributes=_attributes(table),
        patches=len(tested),
        patients=len({case.patient for case in tested}),
        measured="\n".join(f"| {key} | {value:.3f} |" for key, value in metrics.items() if key != "seconds"),
        seconds=metrics["seconds"],
        size=table.grid.size,
        reach=table.grid.size * table.grid.spacing_mm,
        spacing=table.grid.spacing_mm,
        low=low,
        high=high,
    )


def _counts(table: Table) -> str:
    heads = ["split", "patients", "scans", "patches", *table.classes]
    rows = [heads, ["---"] * len(heads)]
    for split in SPLITS:
        cases = table.of(split)
        distinct = [len({case.patient for case in cases}), len({case.volume for case in cases}), len(cases)]
        rows.append([split, *map(str, distinct)])
        rows[-1] += [str(sum(case.label == index for case in cases)) for index in range(len(table.classes))]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def _attributes(table: Table) -> str:
    known = (~table.known().isnan()).sum(0).tolist()
    told = [f"{name} (known of {count})" for name, count in zip(table.attributes, known, strict=True)]
    return f"Attributes in the table: {', '.join(told)}." if told else "The table has no attributes."


_CARD = """# {name}

Looks at a cube of {reach:.0f} mm and {does}.

Made by `medxai train {recipe}` from a person's own table of scans. **Never use it for a patient**: nobody but its maker
knows how the scans were chosen and who said what is in them.

## Trained on
`{table}`. A patient is in one split only.

{counts}

The validation chose the epoch whose weights were kept; the test was not looked at before the end. Patches of the
training were flipped along any axis and moved by up to 4 voxels at random. It took {seconds:.0f} s.
{attributes}

## Measured
On the {patches} patches of {patients} patients of the test:

| | |
|---|---|
{measured}

{meaning}

## Limits
- Tested on patients from the same table only. Other scanners, protocols and populations were never seen.
- If patches were chosen about findings, nothing is known of places elsewhere.

## Reading it
Input: axes (R, A, S) at {spacing:g} mm, {low:g} to {high:g} as 0 to 1, {size} x {size} x {size} voxels.
Output: {output}.
"""
