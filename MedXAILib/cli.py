"""The command line. What takes long to import is imported where it is used, so that help comes at once."""

from __future__ import annotations

import json
import re
import sys
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from enum import Enum
from pathlib import Path, PureWindowsPath
from typing import TYPE_CHECKING, Annotated, Any, get_origin

import typer
from rich import box
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn
from rich.table import Table
from typer.core import TyperGroup

from MedXAILib import __version__
from MedXAILib.audit.commands import audit
from MedXAILib.cases import commands as cases
from MedXAILib.cohort import commands as cohort
from MedXAILib.errors import Cancelled, MedXAIError, Untrusted, unknown
from MedXAILib.plain_text import plain, visible
from MedXAILib.study import commands as study

if TYPE_CHECKING:
    from MedXAILib.explanation import Explanation, SaliencyMap
    from MedXAILib.model import Model, Prediction
    from MedXAILib.report.page import Shown
    from MedXAILib.run import Progress as Step
    from MedXAILib.run import Run
    from MedXAILib.trust.card import TrustCard
    from MedXAILib.volume import Volume

# The library speaks of Python arguments; here they are options.
_OPTIONS = {
    "pass trust=True": "add --trust",
    "region=(x, y, z)": "--region X,Y,Z",
    "((x0, y0, z0), (x1, y1, z1))": "X0,Y0,Z0,X1,Y1,Z1",
}

_CANCELLED = 130


class _Commands(TyperGroup):
    """Commands whose errors are a line, not a trace."""

    def invoke(self, ctx: Any) -> Any:
        try:
            with warnings.catch_warnings():
                # What other packages tell their developers is not for the person at the terminal.
                warnings.filterwarnings("ignore", module=r"(monai|torch)\b")
                return super().invoke(ctx)
        except (KeyboardInterrupt, Cancelled):
            typer.echo("Cancelled; what was not finished was not written.", err=True)
            raise typer.Exit(_CANCELLED) from None
        except MedXAIError as error:
            if ctx.params.get("debug"):
                raise
            message = " ".join(str(error).split())
            for argument, option in _OPTIONS.items():
                message = message.replace(argument, option)
            typer.echo(f"Error: {visible(message)}", err=True)
            if isinstance(error, Untrusted) and error.code:
                typer.echo(visible(error.code), err=True)
            raise typer.Exit(1) from None
        except (OSError, ValueError, TypeError, RuntimeError, AttributeError, LookupError, AssertionError) as error:
            # The ways to leave a command are errors too, and a closed pipe is nobody's defect.
            if ctx.params.get("debug") or isinstance(error, (typer.Exit, typer.Abort, BrokenPipeError)):
                raise
            message = " ".join(f"{type(error).__name__}: {error}".split())
            typer.echo(f"Error: {visible(message)} (unexpected: 'medxai --debug ...' shows where)", err=True)
            raise typer.Exit(1) from None


app = typer.Typer(
    cls=_Commands,
    help="Why does a network say what it says about a 3-D medical image? For research only, not for diagnosis.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


app.command()(audit)
app.add_typer(cases.app, name="cases")
app.add_typer(cohort.app, name="cohort")
app.add_typer(study.app, name="study")


class Format(str, Enum):
    """How maps are written."""

    nrrd = "nrrd"
    nifti = "nii.gz"


class Into(str, Enum):
    """What an explanation is written as for other programs."""

    dicom = "dicom"
    bids = "bids"
    csv = "csv"


def _numbers(text: str) -> Any:
    """A point X,Y,Z, or the two corners of a box, as the library takes them (two numbers a point for plain images)."""
    try:
        numbers = [float(part) for part in text.split(",")]
    except ValueError:
        numbers = []
    if len(numbers) in (2, 3):
        return tuple(numbers)
    if len(numbers) == 6:
        return (tuple(numbers[:3]), tuple(numbers[3:]))
    raise typer.BadParameter("give a point X,Y,Z or a box X0,Y0,Z0,X1,Y1,Z1 in RAS mm, without spaces")


def _bytes(text: str) -> int:
    found = re.fullmatch(r"([\d.]+)\s*([KMGT]?)B?", text.strip().upper())
    if found is None or found[1].count(".") > 1:
        raise typer.BadParameter("give a size such as 4GB or 500MB")
    return int(float(found[1]) * 1000 ** " KMGT".index(found[2] or " "))


def _pair(text: str) -> tuple[str, str]:
    name, equals, value = text.partition("=")
    if not (name and equals):
        raise typer.BadParameter("give a parameter as name=value, such as samples=32")
    return name.strip(), value.strip()


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"medxai {__version__}")
        raise typer.Exit()


@app.callback()
def main(
    debug: Annotated[bool, typer.Option("--debug", help="Show where an error comes from.")] = False,
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Say which version this is.")
    ] = False,
) -> None:
    pass


_Out = Annotated[Path, typer.Option("--out", "-o", help="Folder to write to. A former result there is replaced.")]
_Seed = Annotated[int, typer.Option("--seed", help="Seed of everything random.")]
_Trust = Annotated[
    bool, typer.Option("--trust", help="Let the model run code of its own. Only if you trust its maker.")
]
_MODEL = "A shipped model by name, a MONAI bundle (folder or zip), package.module:function, or a TorchScript file."


@app.command()
def demo(out: _Out = Path("medxai-demo")) -> None:
    """Explain a real lung nodule in a real chest CT with the network that ships with MedXAI."""
    with _live() as run:
        from MedXAILib import demo as example

        found = example.demo(out, run)
    console = Console()
    first = found.shown[0]
    scores = found.prediction.scores
    said = max(scores, key=scores.__getitem__)
    console.print(f"\nThe network looked at 50 mm of a real chest CT around a nodule and says [bold]{said}[/].")
    console.print(_said(found.prediction, example.TARGET))
    for sentence in first.localisation.words("nodule") if first.localisation else ():
        console.print(sentence)
    console.print(_comparison(found.shown))
    console.print(f"Look at [bold]{plain(str(out / 'index.html'))}[/]; the picture alone is montage.png beside it.")
    console.print("Then: medxai methods, medxai models, medxai explain --help.")
    console.print(f"{example.CAUTION} For research only, not for diagnosis.", style="dim")


@app.command()
def methods(
    name: Annotated[str | None, typer.Argument(help="A method, to see its parameters.", show_default=False)] = None,
    markdown: Annotated[bool, typer.Option("--markdown", help="Write docs/methods.md to the output.")] = False,
) -> None:
    """List the methods of explanation, or the parameters of one."""
    with _busy("Looking up the methods"):
        from MedXAILib.registry import EXPLAINERS
        from MedXAILib.report import methods as described
    if markdown:
        sys.stdout.write(described.markdown())
        return
    if name is None:
        table = Table(box=box.SIMPLE, show_header=False, padding=(0, 2, 1, 0))
        table.add_column(no_wrap=True)
        for id, kind in EXPLAINERS.items():
            place = f"{kind.taxonomy.family}, {kind.taxonomy.built}, {' and '.join(kind.taxonomy.scope)}"
            said = plain(f"{kind.title} ({kind.paper})\n{described.question(id)}")
            table.add_row(f"[bold]{id}[/]\n[dim]{place}[/]", said)
        Console(highlight=False).print(table)
        return
    if name not in EXPLAINERS:
        raise unknown("method", name, EXPLAINERS)
    kind = EXPLAINERS[name]
    console = Console(highlight=False)
    console.print(f"[bold]{kind.title}[/] ({kind.paper}). {plain(described.question(name))}")
    console.print(f"Good: {plain(kind.taxonomy.strengths)}.\nLimits: {plain(kind.taxonomy.limits)}.")
    table = Table("parameter", "type", "default", "range", "what it does", box=box.SIMPLE)
    for p in described.parameters(kind):
        table.add_row(f"[bold]{p.name}[/]", *map(escape, (p.type, p.default, p.range, p.help)))
    console.print(table)
    console.print(f"medxai explain MODEL VOLUME --method {name} --set name=value", style="dim")


@app.command()
def models(
    model: Annotated[str | None, typer.Argument(help=_MODEL, show_default=False)] = None,
    layers: Annotated[bool, typer.Option("--layers", help="List the layers, as --set layers=... takes them.")] = False,
    trust: _Trust = False,
) -> None:
    """List the networks that ship with MedXAI, or say what a network is."""
    console = Console(highlight=False)
    if model is None:
        table = Table("model", "what it does", "for", box=box.SIMPLE)
        table.columns[0].no_wrap = True
        for name, bundle in _shipped().items():
            about = json.loads((bundle / "configs" / "metadata.json").read_text(encoding="utf-8"))
            table.add_row(f"[bold]{name}[/]", plain(about.get("task", "")), plain(about.get("intended_use", "")))
        console.print(table)
        console.print("medxai models MODEL says more; docs/README.md in a model's folder is its card.", style="dim")
        return
    with _busy("Reading the network"):
        loaded = _load(model, trust)
    table = Table(box=box.SIMPLE, show_header=False)
    for row in _facts(loaded):
        table.add_row(row[0], plain(row[1]))
    console.print(table)
    if layers:
        console.print(_layers(loaded))


@app.command()
def explain(
    model: Annotated[str, typer.Argument(help=_MODEL, show_default=False)],
    volume: Annotated[
        list[Path],
        typer.Argument(
            help="The scan: NIfTI, NRRD, MHA, or a DICOM file or folder. Several files are channels.",
            show_default=False,
        ),
    ],
    method: Annotated[str, typer.Option("--method", "-m", help="How to explain; see 'medxai methods'.")] = "gradcam",
    target: Annotated[
        str | None,
        typer.Option("--target", "-t", help="A class, by name or number. \\[default: what is predicted]"),
    ] = None,
    versus: Annotated[str | None, typer.Option("--versus", help="Why the target rather than this class.")] = None,
    region: Annotated[
        str | None,
        typer.Option(
            "--region",
            "-r",
            help="Where to look, in RAS mm: a centre X,Y,Z or a box X0,Y0,Z0,X1,Y1,Z1. "
            "\\[default: all of the scan, or the centre of the segmentation for a network that takes only patches]",
        ),
    ] = None,
    segmentation: Annotated[
        Path | None, typer.Option("--segmentation", "-s", help="Where the map should be, to outline and compare with.")
    ] = None,
    out: _Out = Path("medxai-explanation"),
    format: Annotated[Format, typer.Option("--format", help="How to write the map.")] = Format.nrrd,
    settings: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="NAME=VALUE", help="A parameter of the method; may be given again."),
    ] = None,
    device: Annotated[str | None, typer.Option("--device", help="cpu, cuda, cuda:1 ...")] = None,
    memory: Annotated[
        str | None,
        typer.Option("--memory", help="How much to use at once, such as 4GB. \\[default: half of what is free]"),
    ] = None,
    check: Annotated[
        bool, typer.Option("--check", help="Also check how far the map can be trusted: up to ten times as long.")
    ] = False,
    pdf: Annotated[bool, typer.Option("--pdf", help="Also write the page as a PDF.")] = False,
    seed: _Seed = 0,
    trust: _Trust = False,
) -> None:
    """Explain why MODEL says what it says about VOLUME: a map, a picture and a page."""
    if pdf:
        # First: that it cannot be printed should not be known only when it is computed.
        from MedXAILib.report.pdf import print_page
    where = None if region is None else _numbers(region)
    given = dict(map(_pair, settings or ()))
    with _live(device=device, seed=seed, memory_budget=None if memory is None else _bytes(memory)) as run:
        from MedXAILib.explanation import SaliencyMap, written_whole
        from MedXAILib.report.case import show, write
        from MedXAILib.report.localisation import centre
        from MedXAILib.report.told import write_told
        from MedXAILib.request import tell
        from MedXAILib.volume import load_volume

        parameters = _parameters(method, given)
        run.step(0, 1, "Reading the network and the scan")
        network = _load(model, trust)
        scan = load_volume(volume)
        mask = None if segmentation is None else load_volume(segmentation)
        if where is None and mask is not None and not network.takes_whole:
            where = centre(mask)
        # First, so that a place that cannot be written to does not cost the computation.
        with written_whole(out) as folder:
            run.step(0, 1, "Asking the network")
            prediction = network.predict(scan, where)
            found = tell(network, scan, method, _target(network, target, versus), where, run, **parameters)
            if not isinstance(found, SaliencyMap):
                card = _told_card(found, network, scan, run) if check else None
                run.step(0, 1, "Writing")
                write_told(folder, scan, found, prediction, card, format.value)
            else:
                card = _card(found, network, scan, mask, run) if check else None
                run.step(0, 1, "Writing")
                shown = show(scan, found, prediction, mask, card)
                write(folder, shown, prediction, image_format=format.value)
            if pdf:
                print_page(folder)
    if isinstance(found, SaliencyMap):
        _report(shown, prediction, out)
    else:
        _tell(found, card, out)


@app.command()
def evaluate(
    model: Annotated[str, typer.Argument(help=_MODEL, show_default=False)],
    cases: Annotated[
        Path,
        typer.Argument(
            help="A CSV file, a row for each scan: volume, and if known segmentation, target, region (x y z, RAS mm).",
            show_default=False,
        ),
    ],
    method: Annotated[
        list[str] | None,
        typer.Option(
            "--method", "-m", help="A method to compare; may be given again. \\[default: all]", show_default=False
        ),
    ] = None,
    checks: Annotated[
        str | None, typer.Option("--checks", help="Which checks, with commas. \\[default: all]", show_default=False)
    ] = None,
    out: _Out = Path("medxai-evaluation"),
    device: Annotated[str | None, typer.Option("--device", help="cpu, cuda, cuda:1 ...")] = None,
    seed: _Seed = 0,
    trust: _Trust = False,
) -> None:
    """Compare methods over many scans: are they right, robust, and worth it? Goes on where it was interrupted."""
    with _live(device=device, seed=seed) as run:
        from MedXAILib.registry import methods
        from MedXAILib.trust.evaluation import evaluate as compare
        from MedXAILib.trust.evaluation import read_cases

        wanted = None if checks is None else [check.strip() for check in checks.split(",")]
        compared: dict[str, dict[str, Any]] = {name: {} for name in method or methods("SaliencyMap")}
        rows = compare(_load(model, trust), read_cases(cases), compared, out, run, wanted)
    console = Console(highlight=False)
    console.print(_compared(rows))
    console.print(f"Look at [bold]{plain(str(out / 'index.html'))}[/]; every number is in table.csv beside it.")


@app.command()
def export(
    explanation: Annotated[Path, typer.Argument(help="The folder of an explanation.", show_default=False)],
    series: Annotated[
        Path | None,
        typer.Argument(help="The folder of the DICOM series that was explained, for DICOM.", show_default=False),
    ] = None,
    to: Annotated[
        Into,
        typer.Option("--to", help="DICOM objects, a BIDS derivative data set, or a table of what is said."),
    ] = Into.dicom,
    out: Annotated[
        Path | None,
        typer.Option(
            "--out",
            "-o",
            help="Folder, or CSV file. A former result there is replaced. "
            "\\[default: medxai-dicom, medxai-bids, medxai.csv]",
            show_default=False,
        ),
    ] = None,
) -> None:
    """Write an explanation for other programs: DICOM, BIDS or CSV."""
    if (series is None) is (to is Into.dicom):
        raise typer.BadParameter("DICOM objects need the folder of the series that was explained; others need none")
    with _busy("Writing"):
        from MedXAILib.explanation import load_explanation

        found = load_explanation(explanation)
        source = str(found.provenance.volume.get("source") or "scan")
        # It may have been explained on Windows, whose paths are no paths elsewhere.
        case = PureWindowsPath(source).name.partition(".")[0]
        out = out or Path("medxai.csv" if to is Into.csv else f"medxai-{to.value}")
        if series is not None:
            from MedXAILib.export.dicom import write_dicom
            from MedXAILib.trust.card import load_card

            names = ": " + ", ".join(file.name for file in write_dicom(found, series, out, load_card(explanation)))
        elif to is Into.bids:
            from MedXAILib.cohort.plan import Subject
            from MedXAILib.export.bids import write_bids

            write_bids([(Subject(case, (source,)), found)], out)
            names = ""
        else:
            from MedXAILib.export.rows import write_table

            names = f": {write_table(out, [(case, found)])} rows"
    typer.echo(f"Written to {visible(str(out))}{names}")


@app.command()
def report(
    explanation: Annotated[Path, typer.Argument(help="The folder of an explanation.", show_default=False)],
    volume: Annotated[
        list[Path] | None,
        typer.Argument(
            help="The scan that was explained, as for 'medxai explain'. \\[default: where it was then]",
            show_default=False,
        ),
    ] = None,
    segmentation: Annotated[
        Path | None, typer.Option("--segmentation", "-s", help="Where the map should be, to outline and compare with.")
    ] = None,
    pdf: Annotated[bool, typer.Option("--pdf", help="Also write the page as a PDF.")] = False,
) -> None:
    """Write the picture and the page of an explanation that was saved without, or anew."""
    with _busy("Writing"):
        from MedXAILib.report.saved import write_page

        written = write_page(explanation, volume or None, segmentation, pdf)
    typer.echo(f"Look at {visible(str(written))}")


@app.command()
def pdf(
    folder: Annotated[
        Path,
        typer.Argument(help="Of an explanation, an evaluation or anything else with a page.", show_default=False),
    ],
) -> None:
    """Print the page in FOLDER to a PDF beside it."""
    with _busy("Printing"):
        from MedXAILib.report.pdf import print_page

        printed = print_page(folder)
    typer.echo(f"Written to {visible(str(printed))}")


@app.command()
def train(
    name: Annotated[
        str | None, typer.Argument(help="What to train. Without, what there is to train.", show_default=False)
    ] = None,
    data: Annotated[
        Path | None,
        typer.Option(
            "--data",
            help="Your own data, a CSV file: volume, label, region (x y z, RAS mm), patient, split, segmentation, "
            "report, and any numbers to learn as well. \\[default: computed nodules in a chest CT]",
            show_default=False,
        ),
    ] = None,
    classes: Annotated[
        str | None,
        typer.Option(
            "--classes", help="Of your data, with commas, in order. \\[default: alphabetical]", show_default=False
        ),
    ] = None,
    size: Annotated[int, typer.Option("--size", help="Of your data: voxels along each side of what it sees.")] = 40,
    spacing: Annotated[float, typer.Option("--spacing", help="Of your data: mm between voxels.")] = 1.25,
    intensities: Annotated[
        tuple[float, float], typer.Option("--intensities", help="Of your data: what is black and what is white.")
    ] = (-1000.0, 400.0),
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help="Folder of the bundle. \\[default: the name]", show_default=False)
    ] = None,
    device: Annotated[str | None, typer.Option("--device", help="cpu, cuda, cuda:1 ...")] = None,
    seed: _Seed = 0,
    quick: Annotated[bool, typer.Option("--quick", help="Only go through the motions, in seconds.")] = False,
) -> None:
    """Train a network that ships with MedXAI again, or on your own data. The same command goes on with an interrupted
    training."""
    with _live(device=device, seed=seed) as run:
        from MedXAILib import training
        from MedXAILib.training.bundle import Grid
        from MedXAILib.training.table import read_table

        if name is None:
            for recipe in training.RECIPES.values():
                typer.echo(recipe.name + (" (also on your own data)" if recipe.own is not None else ""))
            return
        out = Path(name.replace("-", "_")) if out is None else out
        order = None if classes is None else [each.strip() for each in classes.split(",")]
        grid = Grid(size, spacing, intensities)
        if data is None and (order, grid) != (None, Grid()):
            raise MedXAIError("--classes, --size, --spacing and --intensities are of your own data: add --data.")
        measured = training.train(name, out, run, quick, None if data is None else read_table(data, grid, order, seed))
    table = Table("measured", "value", box=box.SIMPLE)
    for key, value in measured.items():
        table.add_row(plain(key.replace("_", " ")), f"{value:g}")
    console = Console(highlight=False)
    console.print(table)
    console.print(f"The bundle is in [bold]{plain(str(out))}[/]: medxai models {plain(str(out))}")


@contextmanager
def _live(**settings: Any) -> Iterator[Run]:
    """A run that shows on the terminal how far it is, and how long it still takes."""
    columns = SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), TextColumn("{task.fields[left]}")
    terminal = Console(stderr=True)
    with Progress(*columns, console=terminal, transient=True, disable=not terminal.is_terminal) as bar:
        task = bar.add_task("Starting", total=None, left="")
        from MedXAILib.run import Run

        def tell(step: Step) -> None:
            left = "" if step.seconds_left is None else _duration(step.seconds_left) + " left"
            bar.update(task, description=plain(step.message), completed=step.done, total=step.total, left=left)

        yield Run(progress=tell, **settings)


@contextmanager
def _busy(doing: str) -> Iterator[None]:
    with Console(stderr=True).status(doing):
        yield


def _duration(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 90 else f"{seconds / 60:.0f} min"


def _shipped() -> dict[str, Path]:
    """The bundles that ship with MedXAI."""
    from MedXAILib.resources import path

    found = sorted(path("Models").iterdir())
    return {bundle.name: bundle for bundle in found if (bundle / "configs" / "metadata.json").is_file()}


def _load(name: str, trust: bool) -> Model:
    """The model at a path or entry point, or the shipped one of that name."""
    from MedXAILib.loading import load_model

    if Path(name).exists() or not re.fullmatch(r"[\w-]+", name):
        # An entry point is looked for where the person stands, too.
        sys.path.append(str(Path.cwd()))
        return load_model(name, trust)
    shipped = _shipped()
    if name.replace("-", "_") not in shipped:
        raise unknown("file, and no shipped model,", name, shipped)
    return load_model(shipped[name.replace("-", "_")], trust)


def _parameters(method: str, given: dict[str, str]) -> dict[str, Any]:
    """What was typed, as the method takes it: checked before anything slow is done."""
    from MedXAILib.registry import EXPLAINERS, make

    fields = EXPLAINERS[method].model_fields if method in EXPLAINERS else {}
    several = {name for name, field in fields.items() if get_origin(field.annotation) is tuple}
    typed = {name: _parts(value) if name in several else value for name, value in given.items()}
    make(method, typed)
    return typed


def _parts(text: str) -> tuple[str, ...]:
    return tuple(part.strip() for part in text.split(",") if part.strip())


def _target(model: Model, name: str | None, versus: str | None) -> Any:
    from MedXAILib.target import ClassTarget

    def meant(text: str) -> str | int:
        return int(text) if text.isdecimal() and text not in model.class_names else text

    which = None if name is None else meant(name)
    return which if versus is None else ClassTarget(which, versus=meant(versus))


def _card(found: SaliencyMap, network: Model, scan: Volume, mask: Volume | None, run: Run) -> TrustCard:
    from MedXAILib.trust.card import estimate, trust_card
    from MedXAILib.trust.judged import Judged

    planned = estimate(found)
    message = f"Checking the map by {len(planned.checks)} tests: about {_duration(planned.seconds)}"
    typer.echo(message, err=True)
    return trust_card(Judged(found, network, scan, mask, replace(run)))


def _told_card(found: Explanation, network: Model, scan: Volume, run: Run) -> TrustCard:
    from MedXAILib.trust.card import TrustCard
    from MedXAILib.trust.telling import judge

    own = replace(run)
    return TrustCard((judge(found, network, scan, own),), {}, own.cost.forwards, own.cost.backwards)


def _tell(found: Explanation, card: TrustCard | None, out: Path) -> None:
    """What was found otherwise than as one map."""
    from MedXAILib.report.terminal import told

    console, made = Console(highlight=False), found.provenance
    console.print(*(part if isinstance(part, Table) else plain(part) for part in told(found)), sep="\n")
    for name, missed in found.residual.items():
        console.print(f"{name.capitalize()}: missed by {missed:.2%}.")
    for note in made.notes:
        console.print(f"Note: {plain(note)}")
    if card is not None:
        console.print(_checked(card))
    _wrote(found, out)


def _wrote(explanation: Explanation, out: Path) -> None:
    console, made = Console(highlight=False), explanation.provenance
    console.print(
        f"{made.seconds:.1f} s, {made.forwards} forward(s), {made.backwards} backward(s), "
        f"{made.peak_memory / 1e6:.0f} MB more memory."
    )
    console.print(f"Written to [bold]{plain(str(out))}[/]: {', '.join(sorted(p.name for p in out.iterdir()))}")
    console.print("For research only, not for diagnosis.", style="dim")


def _report(shown: Shown, prediction: Prediction, out: Path) -> None:
    from MedXAILib.report.localisation import peak
    from MedXAILib.report.methods import title

    console, explanation = Console(highlight=False), shown.explanation
    made = explanation.provenance
    console.print(_said(prediction, made.target_label) if prediction.scores else plain(prediction.text))
    where = ", ".join(f"{value:.1f}" for value in peak(explanation))
    console.print(f"{title(made.method)} for [bold]{plain(made.target_label)}[/] peaks at {where} (RAS mm).")
    for sentence in shown.localisation.words() if shown.localisation else ():
        console.print(sentence)
    for name, missed in explanation.residual.items():
        console.print(f"{name.capitalize()}: missed by {missed:.2%}.")
    for note in made.notes:
        console.print(f"Note: {plain(note)}")
    if shown.card is not None:
        console.print(_checked(shown.card))
    _wrote(explanation, out)


def _compared(rows: Sequence[dict[str, Any]]) -> Table:
    """The numbers of a comparison that say most."""
    shown = {
        "validity: auprc": "AUPRC",
        "validity: pointing": "hit",
        "faithfulness: blur: score": "faithful",
        "randomisation: likeness": "scrambled: alike",
        "stability: noise": "noise: alike",
        "cost: seconds": "seconds",
    }
    names = {name: title for name, title in shown.items() if any(name in row for row in rows)}
    table = Table("method", "cases", *names.values(), box=box.SIMPLE)
    for row in rows:
        cells = [f"{row[name]:.2f} ± {row[f'{name} ±']:.2f}" if name in row else "" for name in names]
        table.add_row(f"[bold]{row['method']}[/]", str(row["cases"]), *cells)
    return table


def _checked(card: TrustCard) -> Table:
    from MedXAILib.trust.finding import COLOURS

    table = Table("", "check", "what it says", box=box.SIMPLE)
    for found in card.findings:
        word, colour = COLOURS[found.light]
        table.add_row(f"[{colour}]●[/] {word}", found.title, plain(found.sentence))
    for name, why in card.left_out.items():
        table.add_row("left out", name, plain(why))
    return table


def _said(prediction: Prediction, target: str) -> Table:
    table = Table(*(("label", "mL") if prediction.labels is not None else ("class", "score")), box=box.SIMPLE)
    for name, score in sorted(prediction.scores.items(), key=lambda item: -item[1]):
        table.add_row(plain(name), f"{score:.3f}", style="bold" if name == target else None)
    return table


def _comparison(shown: Sequence[Shown]) -> Table:
    from MedXAILib.report.methods import title

    table = Table("method", "peak", "inside the nodule", "seconds", box=box.SIMPLE)
    for one in shown:
        made, met = one.explanation.provenance, one.localisation
        hit = "" if met is None else "in the nodule" if met.hit else f"{met.distance:.0f} mm off"
        mass = "" if met is None else f"{met.mass:.0%}"
        table.add_row(title(made.method), hit, mass, f"{made.seconds:.1f}")
    return table


def _facts(model: Model) -> Iterator[tuple[str, str]]:
    yield "name", model.name
    yield "from", model.source or ""
    yield "task", model.task
    yield "classes", ", ".join(model.class_names) or "(no names: counted from 0)"
    size = " x ".join(map(str, model.patch_size)) + " voxels, after preprocessing" if model.patch_size else "any size"
    yield "input", f"{model.channels or '?'} channel(s), {model.spatial_dims}-D, {size}"
    if model.window is not None:
        window = " x ".join(map(str, model.window.roi_size))
        yield (
            "whole scans",
            f"by windows of {window} voxels, blended ({model.window.mode}, overlap {model.window.overlap})",
        )
    yield "parameters", f"{sum(p.numel() for p in model.network.parameters()):,}"
    yield "layers for class activation maps", ", ".join(model.layers) or "found when explaining"


def _layers(model: Model) -> Table:
    """The layers, and the shape of what they give where the size of the input is known."""
    import torch

    from MedXAILib.target import read_layers

    modules = {name: module for name, module in model.network.named_modules() if name}
    shapes: dict[str, str] = {}
    if model.patch_size is not None and model.channels is not None and not model.scripted:
        with model.ready() as device, torch.no_grad():
            x = torch.zeros(1, model.channels, *model.patch_size, device=device)
            read = read_layers(model, x, list(modules))
        shapes = {
            str(name): " x ".join(map(str, y.shape[1:])) for name, y in read.items() if isinstance(y, torch.Tensor)
        }
    table = Table("layer", "kind", "output", box=box.SIMPLE)
    for name, module in modules.items():
        style = "bold" if name in model.layers else None
        table.add_row(plain(name), type(module).__name__, shapes.get(name, ""), style=style)
    return table
