"""`medxai cases`: libraries of cases on the command line."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich import box
from rich.console import Console
from rich.table import Table

from MedXAILib.plain_text import plain

if TYPE_CHECKING:
    from MedXAILib.cases.library import Library
    from MedXAILib.cases.record import Hit

app = typer.Typer(
    help="Libraries of cases: make one of many scans, and find those that are alike to a network.",
    no_args_is_help=True,
)

_Place = Annotated[str, typer.Argument(help="Where the library is: a folder, or s3://... .", show_default=False)]
_Rows = Annotated[
    Path,
    typer.Argument(
        help="A CSV file: volume, region (x y z, RAS mm), label, patient, uid, and anything to filter by.",
        show_default=False,
    ),
]
_Identifiers = Annotated[
    bool, typer.Option("--keep-identifiers", help="Keep patients and uids as they are, not as pseudonyms.")
]
_NoPaths = Annotated[
    bool, typer.Option("--no-paths", help="Do not keep where the scans are; then nobody can look at them.")
]
_Again = Annotated[bool, typer.Option("--again", help="Embed again what is there.")]
_Device = Annotated[str | None, typer.Option("--device", help="cpu, cuda, cuda:1 ...")]
_Trust = Annotated[
    bool, typer.Option("--trust", help="Let the model run code of its own. Only if you trust its maker.")
]


@app.command()
def build(
    table: _Rows,
    model: Annotated[str, typer.Option("--model", help="The network that embeds: see medxai models.")],
    out: Annotated[str, typer.Option("--out", "-o", help="Folder of the library, or s3://... .")] = "medxai-cases",
    keep_identifiers: _Identifiers = False,
    no_paths: _NoPaths = False,
    again: _Again = False,
    device: _Device = None,
    trust: _Trust = False,
) -> None:
    """Make a library of the scans in a table. The same command goes on with an interrupted one."""
    _filled(model, table, out, keep_identifiers, no_paths, again, device, trust)


@app.command()
def add(
    library: _Place,
    table: _Rows,
    keep_identifiers: _Identifiers = False,
    no_paths: _NoPaths = False,
    again: _Again = False,
    device: _Device = None,
    trust: _Trust = False,
) -> None:
    """Add the scans in a table to a library, by the network that it was made with."""
    _filled(_network(_opened(library), trust), table, library, keep_identifiers, no_paths, again, device, trust)


def _filled(
    model: str, table: Path, out: str, identifiers: bool, no_paths: bool, again: bool, device: str | None, trust: bool
) -> None:
    from MedXAILib.cli import _live, _load

    with _live(device=device) as run:
        from MedXAILib.cases.building import build as make

        library = make(_load(model, trust), table, out, run, identifiers, not no_paths, again)
    console = Console(highlight=False)
    for note in run.notes:
        console.print(f"Note: {plain(note)}")
    console.print(f"[bold]{plain(library.path)}[/] has {len(library)} cases (version {library.version}).")


@app.command()
def search(
    library: _Place,
    volume: Annotated[
        list[Path],
        typer.Argument(help="The scan to find others like it. Several files are channels.", show_default=False),
    ],
    region: Annotated[
        str | None,
        typer.Option("--region", "-r", help="Where to look in it, RAS mm: X,Y,Z, or the corners of a box."),
    ] = None,
    count: Annotated[int, typer.Option("--count", "-k", help="How many.", min=1)] = 10,
    space: Annotated[str, typer.Option("--space", help="What to compare.")] = "plain",
    where: Annotated[
        list[str] | None,
        typer.Option(
            "--where",
            metavar="NAME=VALUE",
            help="Only cases of which this holds, such as label=malignant, label=none|benign, or diameter_mm=10..20; "
            "may be given again.",
        ),
    ] = None,
    not_patient: Annotated[str | None, typer.Option("--not-patient", help="Whose cases do not count.")] = None,
    version: Annotated[int | None, typer.Option("--version", help="Of the library. \\[default: the last]")] = None,
    device: _Device = None,
    trust: _Trust = False,
) -> None:
    """Find the cases that are most similar to a scan."""
    from MedXAILib.cases.filters import conditions
    from MedXAILib.cli import _live, _load, _numbers

    held = conditions(where or [])
    corner = None if region is None else _numbers(region)
    cases = _opened(library, version)
    cases.embedder.dimension(space)
    with _live(device=device) as run:
        from MedXAILib.cases import spaces
        from MedXAILib.volume import load_volume

        run.step(0, 1, "Embedding the scan")
        model = _load(_network(cases, trust), trust)
        with model.ready(device):
            seen = model.prepare(load_volume(volume), corner)
            vector = spaces.space(space).embed(model, seen.x[None])[0].numpy()
        hits = cases.search(vector, count, space, held, not_patient, spaces.fingerprint(model))
    Console(highlight=False).print(_found(hits))


@app.command()
def remove(
    library: _Place,
    uids: Annotated[list[str], typer.Argument(help="Of the cases, or what they were called.", show_default=False)],
) -> None:
    """Take cases out of a library. Older versions of it still have them."""
    cases = _opened(library)
    gone = cases.remove(uids)
    typer.echo(f"{gone} of {len(uids)} removed; {len(cases)} cases are left (version {cases.version}).")
    if gone < len(uids):
        raise typer.Exit(1)


@app.command()
def check(
    library: _Place,
    read: Annotated[bool, typer.Option("--read", help="Also read every scan, which may take long.")] = False,
) -> None:
    """Check how well and how fast a library is searched, and whether its scans are there; if anything is wrong, the
    exit code is 1."""
    from MedXAILib.cli import _live

    cases = _opened(library)
    with _live() as run:
        from MedXAILib.cases.library import RECALL

        health = cases.check(run, read)
    console = Console(highlight=False)
    made = cases.embedder
    console.print(f"{health.cases} cases (version {health.version}), embedded by [bold]{plain(made.name)}[/].")
    table = Table("space", "numbers", "similarity", "recall of the 10 nearest", "ms a search", box=box.SIMPLE)
    for space, quality in health.quality.items():
        size, metric = made.spaces[space]
        table.add_row(plain(space), f"{size}", metric, f"{quality.recall:.3f}", f"{quality.milliseconds:.1f}")
    console.print(table)
    for path, what in health.wrong.items():
        console.print(f"{plain(path)}: {plain(what)}")
    if health.wrong or any(quality.recall < RECALL for quality in health.quality.values()):
        raise typer.Exit(1)


@app.command()
def suspects(
    library: _Place,
    count: Annotated[int, typer.Option("--count", "-k", help="How many.", min=1)] = 20,
) -> None:
    """List the cases that are most likely to have a wrong label: those that only themselves account for."""
    from MedXAILib.cases import teaching

    found = teaching.suspects(_opened(library))
    table = Table("case", "label", "the network said", "influence on itself", box=box.SIMPLE)
    for case, score in found[:count]:
        table.add_row(*map(plain, (case.uid, case.label, case.said, f"{score:.3g}")))
    Console(highlight=False).print(table)


@app.command()
def demo(
    model: Annotated[str, typer.Argument(help="The network that embeds: see medxai models.")] = "lung_nodule",
    out: Annotated[
        Path | None,
        typer.Option("--out", "-o", help="Folder. \\[default: where methods look for it]", show_default=False),
    ] = None,
    device: _Device = None,
    trust: _Trust = False,
) -> None:
    """Make the demo library of a network: computed nodules, of which everything is known, and two real lesions."""
    from MedXAILib.cli import _live, _load

    with _live(device=device) as run:
        from MedXAILib.cases.demo import demo_library

        library = demo_library(_load(model, trust), run, out)
    Console(highlight=False).print(f"[bold]{plain(library.path)}[/] has {len(library)} cases.")


def _opened(place: str, version: int | None = None) -> Library:
    from MedXAILib.cases.library import Library

    return Library.open(place, version)


def _network(library: Library, trust: bool) -> str:
    """What a library says it was embedded by. Who made it may have written anything there."""
    from MedXAILib.errors import MedXAIError
    from MedXAILib.loading import is_code

    named = library.embedder.model
    if is_code(named) and not trust:
        raise MedXAIError(
            f"The library '{library.path}' names '{named}' as its network, and that is code: read it, and pass --trust "
            "if you trust its maker."
        )
    return named


def _found(hits: Sequence[Hit]) -> Table:
    from MedXAILib.cases.record import SCAN

    table = Table("case", "label", "the network said", "similarity", "known of it", box=box.SIMPLE)
    for hit in hits:
        case = hit.record
        meta = {name: value if isinstance(value, str) else f"{value:g}" for name, value in case.meta.items()}
        known = ", ".join(f"{name} {value}" for name, value in meta.items() if name != SCAN)
        table.add_row(*map(plain, (case.uid, case.label, case.said, f"{hit.similarity:.4g}", known)))
    return table
