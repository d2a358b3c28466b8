"""`medxai study`: the order of a reader study, and what its readers answered."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(help="Reader studies: does an explanation help those who read scans?", no_args_is_help=True)

_Design = Annotated[Path, typer.Argument(help="The design of the study, a JSON file.", show_default=False)]


@app.command()
def order(
    design: _Design,
    out: Annotated[Path, typer.Option("--out", "-o", help="The table to write.")] = Path("order.csv"),
) -> None:
    """Write who sees what, and when: for those who run the study, and for nobody who reads."""
    from MedXAILib.study.allocation import imbalances, table
    from MedXAILib.study.design import read_study
    from MedXAILib.table import write_rows

    study = read_study(design)
    heads, rows = table(study)
    write_rows(out, heads, rows)
    typer.echo(
        f"{len(study.design.readers)} readers, {len(study.cases)} cases, {len(rows)} trials (design "
        f"{study.fingerprint}): {out}"
    )
    _warn(imbalances(study))


@app.command()
def results(
    design: _Design,
    journals: Annotated[Path, typer.Argument(help="The folder of the readers' journals.", show_default=False)],
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder to write the tables to.")] = Path("study-results"),
) -> None:
    """Say what came out for each arm, and write the answers for other programs (CSV, iMRMC)."""
    from rich import box
    from rich.console import Console
    from rich.table import Table

    from MedXAILib.plain_text import plain
    from MedXAILib.study.allocation import imbalances
    from MedXAILib.study.design import read_study
    from MedXAILib.study.results import readings, summary, unfinished, write

    study = read_study(design)
    found = readings(study, journals)
    write(study, found, out)
    shown = Table("arm", "", "value (95 % interval)", box=box.SIMPLE)
    for arm, values in summary(study, found).items():
        count = sum(one.arm == arm for one in found)
        shown.add_row(f"[bold]{plain(arm)}[/]", "answers", str(count))
        for name, value in values.items():
            shown.add_row("", plain(name), str(value))
    console = Console(highlight=False)
    console.print(shown)
    console.print("Intervals are over other readers and other cases.", style="dim")
    console.print(f"Every answer is in [bold]{plain(str(out / 'readings.csv'))}[/]; imrmc.csv is for doIMRMC of R.")
    _warn([*imbalances(study), *unfinished(study, found)])


def _warn(said: list[str]) -> None:
    for sentence in said:
        typer.echo(f"Not balanced: {sentence}", err=True)
