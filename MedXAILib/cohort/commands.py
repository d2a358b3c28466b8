"""`medxai cohort`: many cases by many methods, on this machine or a cluster, and what they have in common."""

from __future__ import annotations

import json
from enum import Enum
from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(
    help="Explain many scans, here or on a cluster, whatever is interrupted; and see what they have in common.",
    no_args_is_help=True,
)

_Folder = Annotated[Path, typer.Argument(help="The folder of the plan and its results.", show_default=False)]
_Scheduler = Annotated[
    str | None,
    typer.Option("--scheduler", help="The address of a Dask scheduler, tcp://host:8786.", show_default=False),
]
_Workers = Annotated[int, typer.Option("--workers", "-w", min=0, help="Processes on this machine; 0: in this one.")]


class Into(str, Enum):
    """What explanations are written as for other programs."""

    bids = "bids"
    csv = "csv"


@app.command()
def plan(
    folder: _Folder,
    model: Annotated[str, typer.Option("--model", help="As for medxai explain.", show_default=False)],
    data: Annotated[
        Path, typer.Option("--data", help="A CSV table, a BIDS folder or a tree of DICOM series.", show_default=False)
    ],
    method: Annotated[
        list[str],
        typer.Option(
            "--method",
            "-m",
            help="A method, or one with parameters, as 'rise:samples=200;cell=6'; may be given again.",
            show_default=False,
        ),
    ],
    suffix: Annotated[str, typer.Option("--suffix", help="Which images of a BIDS folder, such as T1w.")] = "",
    seed: Annotated[int, typer.Option("--seed", help="Seed of everything random.")] = 0,
    trust: Annotated[bool, typer.Option("--trust", help="Let the model run code of its own.")] = False,
) -> None:
    """Write down what is to be computed. Nothing is computed yet."""
    from MedXAILib.cli import _load, _pair, _parameters
    from MedXAILib.cohort.plan import make_plan
    from MedXAILib.cohort.subjects import find_subjects

    network = _load(model, trust)
    methods = {}
    for one in method:
        name, _, given = one.partition(":")
        methods[name] = _parameters(name, dict(_pair(part) for part in given.split(";") if part))
    made = make_plan(network.source or model, network.fingerprint, methods, find_subjects(data, suffix), seed, trust)
    made.save(folder)
    typer.echo(f"{len(made.subjects)} cases, {len(methods)} methods: {folder}. Then: medxai cohort run {folder}")


@app.command()
def run(
    folder: _Folder,
    workers: _Workers = 0,
    scheduler: _Scheduler = None,
    jobqueue: Annotated[
        str | None,
        typer.Option("--jobqueue", help="Submit jobs to this batch system: slurm, pbs or lsf.", show_default=False),
    ] = None,
    jobs: Annotated[int, typer.Option("--jobs", min=1, help="Of the batch system: how many jobs.")] = 10,
    queue: Annotated[str | None, typer.Option("--queue", help="... queue or partition.", show_default=False)] = None,
    walltime: Annotated[
        str | None, typer.Option("--walltime", help="... time of a job, as the system has it.", show_default=False)
    ] = None,
    memory: Annotated[str, typer.Option("--memory", help="... memory of a job.")] = "8GB",
    cores: Annotated[int, typer.Option("--cores", min=1, help="... cores of a job.")] = 1,
    shard: Annotated[
        str | None, typer.Option("--shard", help="Only part I of N, as 3/20: for arrays of jobs.", show_default=False)
    ] = None,
    device: Annotated[str | None, typer.Option("--device", help="cpu, cuda, cuda:1 ...")] = None,
    trust: Annotated[bool, typer.Option("--trust", help="Let the plan's model run code of its own.")] = False,
) -> None:
    """Compute what is still to do. It may be interrupted at any time, and goes on where it was.

    Ends with 3 if anything failed, and with 4 if nothing could be explained: everything was refused.
    """
    from MedXAILib.cli import _live
    from MedXAILib.cohort.batch import Jobs
    from MedXAILib.cohort.engine import compute
    from MedXAILib.cohort.state import state

    part = None
    if shard is not None:
        index, _, count = shard.partition("/")
        if not (index.isdecimal() and count.isdecimal() and int(index) < int(count)):
            raise typer.BadParameter("give a part as I/N, counted from 0: 3/20")
        part = int(index), int(count)
    where: str | Jobs | None = scheduler
    if jobqueue is not None:
        gpu = (device or "").startswith("cuda")
        where = Jobs(jobqueue, folder.resolve() / "logs", jobs, queue, walltime, memory, cores, gpu)
    with _live() as live:
        said = compute(folder, workers, where, device, part, live, trust)
    typer.echo(", ".join(f"{count} {status}" for status, count in said.items()) or "Everything was done already.")
    for note in live.notes:
        typer.echo(f"Note: {note}")
    if said["failed"]:
        raise typer.Exit(3)
    counts = state(folder).counts
    if counts["refused"] and not counts["done"]:
        typer.echo(f"Nothing could be explained: 'medxai cohort status {folder}' says why.", err=True)
        raise typer.Exit(4)


@app.command()
def status(folder: _Folder) -> None:
    """Say how far it is, and what went wrong."""
    from MedXAILib.cohort.state import state
    from MedXAILib.plain_text import visible

    now = state(folder)
    typer.echo(", ".join(f"{count} {status}" for status, count in now.counts.items()))
    if now.replaced:
        typer.echo(f"{now.replaced} are of scans that were replaced since: the next run computes them again.")
    for one in now.troubles:
        typer.echo(visible(f"{one['case']}, {one['method']}: {one['status']}: {one['reason']}"))


@app.command()
def verify(folder: _Folder) -> None:
    """Check that results are what they were; those that are not are computed again by the next run."""
    from MedXAILib.cohort.state import verify as verified

    wrong = verified(folder)
    which = f": {', '.join(wrong)}" if wrong else ""
    typer.echo(f"{len(wrong)} results are gone, were changed, or are of scans that were replaced{which}.")


@app.command()
def retry(folder: _Folder) -> None:
    """Let what was refused or failed be tried again by the next run."""
    from MedXAILib.cohort.state import retry as retried

    typer.echo(f"{retried(folder)} are tried again by: medxai cohort run {folder}")


@app.command()
def slurm(
    folder: _Folder,
    jobs: Annotated[int, typer.Option("--jobs", min=1, help="Jobs of the array.")] = 10,
    device: Annotated[str | None, typer.Option("--device", help="cpu, cuda ...")] = None,
    trust: Annotated[bool, typer.Option("--trust", help="Let the plan's model run code of its own.")] = False,
) -> None:
    """Print a script for sbatch, which computes the plan as an array of jobs, without a scheduler of its own."""
    from MedXAILib.cohort.batch import array
    from MedXAILib.cohort.plan import read_plan

    read_plan(folder)
    typer.echo(array(folder, jobs, device, trust), nl=False)


@app.command()
def export(
    folder: _Folder,
    to: Annotated[
        Into,
        typer.Option("--to", help="A BIDS derivative data set, or one long table of what is said."),
    ] = Into.bids,
    out: Annotated[
        Path | None,
        typer.Option(
            "--out", "-o", help="Folder, or CSV file. \\[default: medxai-bids, medxai.csv]", show_default=False
        ),
    ] = None,
) -> None:
    """Write what was explained for other programs: maps, hot spots and tables of every case."""
    from MedXAILib.cli import _live
    from MedXAILib.cohort.state import results

    with _live() as live:
        found = results(folder, live)
        if to is Into.bids:
            from MedXAILib.export.bids import write_bids

            typer.echo(f"Written to {write_bids(found, out or Path('medxai-bids'))}")
        else:
            from MedXAILib.export.rows import write_table

            out = out or Path("medxai.csv")
            count = write_table(out, ((subject.uid, one) for subject, one in found))
            typer.echo(f"Written to {out}: {count} rows")


@app.command()
def register(
    folder: _Folder,
    template: Annotated[Path, typer.Option("--template", help="The scan to which the others are brought.")],
    kind: Annotated[str, typer.Option("--kind", help="rigid, affine or deformable.")] = "affine",
    mask: Annotated[
        Path | None, typer.Option("--mask", help="Where in the template they should fit.", show_default=False)
    ] = None,
    workers: _Workers = 0,
    scheduler: _Scheduler = None,
    retry: Annotated[bool, typer.Option("--retry", help="Try again what was refused or failed.")] = False,
) -> None:
    """Register the scans that have no transform to a template, for reduce. It may be interrupted at any time.

    What does not fit is refused, with the reason, and left out of what is put together. Ends with 3 if anything failed.
    """
    from MedXAILib.cli import _live
    from MedXAILib.cohort.registration import register as registered
    from MedXAILib.cohort.registration import troubles
    from MedXAILib.plain_text import visible

    with _live() as live:
        said = registered(folder, template, kind, mask, workers, scheduler, retry, live)
    typer.echo(", ".join(f"{count} {status}" for status, count in said.items()) or "Everything was done already.")
    for one in troubles(folder):
        typer.echo(visible(f"{one['case']}: {one['status']}: {one['reason']}"))
    if said["failed"]:
        raise typer.Exit(3)


@app.command()
def reduce(
    folder: _Folder,
    template: Annotated[Path | None, typer.Option("--template", help="The scan on whose grid maps are laid.")] = None,
    atlas: Annotated[Path | None, typer.Option("--atlas", help="Integer labels in the template's space.")] = None,
    names: Annotated[
        Path | None, typer.Option("--names", help='What labels are called, JSON: {"1": "left ..."}.')
    ] = None,
    by: Annotated[
        list[str] | None, typer.Option("--by", help="A column of the plan to split by, such as site; several times.")
    ] = None,
    workers: _Workers = 0,
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder to write to.")] = Path("medxai-cohort"),
) -> None:
    """Write the mean and the spread of the maps, their shares in the regions of an atlas and whether groups differ, and
    what is told otherwise than with maps (concepts, prototypes, rules, words, cases), by groups."""
    from SimpleITK import WriteImage

    from MedXAILib.cli import _live
    from MedXAILib.cohort import reduce as reduction
    from MedXAILib.cohort import told
    from MedXAILib.cohort.plan import read_plan
    from MedXAILib.errors import MedXAIError, unknown
    from MedXAILib.volume import load_volume

    called = {} if names is None else {int(k): v for k, v in json.loads(names.read_text(encoding="utf-8")).items()}
    labels = None if atlas is None else load_volume(atlas)
    subjects = read_plan(folder).subjects
    columns = dict.fromkeys(name for one in subjects for name in one.meta)
    for column in by or []:
        if column not in columns:
            raise unknown("column of the plan", column, columns)
    with _live() as live:
        for method, tables in told.reduce(folder, by or [], live):
            tables.write(method, out)
        if template is None and told.maps(folder):
            raise MedXAIError(f"Maps are laid on a template: give --template. What else is told is in '{out}'.")
        if template is not None:
            onto = load_volume(template)
            for overall in reduction.reduce(folder, onto, labels, called, live, workers):
                reduction.write(overall, subjects, by or [], out)
            WriteImage(onto.to_sitk(), str(out / "template.nrrd"), useCompression=True)
    typer.echo(f"Written to {out}: {', '.join(sorted(path.name for path in out.iterdir()))}")


@app.command()
def report(
    folder: _Folder,
    result: Annotated[Path, typer.Argument(help="The folder that reduce wrote.", show_default=False)],
    pdf: Annotated[bool, typer.Option("--pdf", help="Also write the page as a PDF.")] = False,
) -> None:
    """Write what was done and found as a page into the folder RESULT."""
    from MedXAILib.report.cohort import write_page

    typer.echo(f"Look at {write_page(folder, result)}")
    if pdf:
        from MedXAILib.report.pdf import print_page

        typer.echo(f"Printed to {print_page(result)}")
