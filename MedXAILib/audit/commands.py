"""`medxai audit`: whether a network leans on the site, the scanner, or what else it should not."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def audit(
    folder: Annotated[Path, typer.Argument(help="The folder of a cohort that was explained.", show_default=False)],
    by: Annotated[
        list[str],
        typer.Option(
            "--by", help="A column of the plan that should not matter; may be given again.", show_default=False
        ),
    ],
    label: Annotated[str, typer.Option("--label", help="The column of what is known to be right.")] = "label",
    within: Annotated[
        list[str] | None,
        typer.Option(
            "--within",
            help="A column in which sites may differ for good reasons, such as a stage; may be given again.",
            show_default=False,
        ),
    ] = None,
    method: Annotated[
        str | None, typer.Option("--method", "-m", help="Whose maps. \\[default: the plan's first]", show_default=False)
    ] = None,
    checks: Annotated[
        str | None, typer.Option("--checks", help="Which checks, with commas. \\[default: all]", show_default=False)
    ] = None,
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder to write to.")] = Path("medxai-audit"),
    device: Annotated[str | None, typer.Option("--device", help="cpu, cuda, cuda:1 ...")] = None,
    seed: Annotated[int, typer.Option("--seed", help="Seed of everything random.")] = 0,
    trust: Annotated[bool, typer.Option("--trust", help="Let the plan's model run code of its own.")] = False,
) -> None:
    """Look for shortcuts in a cohort: does the network lean on the site, beyond what the classes explain?"""
    from rich import box
    from rich.console import Console
    from rich.table import Table

    from MedXAILib.audit.audit import WORDS
    from MedXAILib.audit.audit import audit as audited
    from MedXAILib.audit.gather import gather
    from MedXAILib.cli import _live, _load
    from MedXAILib.cohort.plan import read_plan
    from MedXAILib.plain_text import plain
    from MedXAILib.report.audit import page

    columns = within or []
    wanted = None if checks is None else [one.strip() for one in checks.split(",")]
    with _live(device=device, seed=seed) as run:
        model = _load(read_plan(folder).model, trust)
        cohort, made = gather(folder, model, [*by, *columns], label, method, run)
        found = audited(cohort, by, columns, seed, run, wanted)
        made |= {"by": by, "within": columns, "seed": seed, "notes": run.notes}
        found.save(out, made)
        (out / "index.html").write_text(page(found, made), encoding="utf-8")
    table = Table("", "check", "what it says", box=box.SIMPLE)
    for one in found.findings:
        word, colour = WORDS[one.light]
        table.add_row(f"[{colour}]●[/] {word}", plain(one.check), plain(one.sentence))
    for key, why in found.left_out.items():
        table.add_row("left out", plain(key), plain(why))
    console = Console(highlight=False)
    console.print(table)
    for note in run.notes:
        console.print(f"Note: {plain(note)}")
    console.print(f"Look at [bold]{plain(str(out / 'index.html'))}[/]; every number is in the tables beside it.")
    console.print("For research only, not for diagnosis.", style="dim")
