"""`benchmarks/slurm/private.sh python -m benchmarks.slurm` explains computed nodules on a SLURM of its own, by an array
of jobs and by dask-jobqueue, while jobs are requeued and cancelled and a driver is killed: is all done, and does the
same come out as where nothing is disturbed?"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import typer

from benchmarks.cohort import MODEL, digests, scans
from benchmarks.measure import machine
from MedXAILib.cohort.engine import compute
from MedXAILib.cohort.plan import make_plan
from MedXAILib.cohort.state import state
from MedXAILib.cohort.work import RECEIPTS
from MedXAILib.loading import load_model

RESULTS = Path(__file__).resolve().parent.parent / "results" / "slurm.json"
# Units of a second or two: long enough to be interrupted.
METHODS: dict[str, dict[str, Any]] = {"rise": {"samples": 300}, "hirescam": {}}
SCANS, JOBS = 12, 4


def said(*command: object, given: str | None = None) -> str:
    """What a command writes."""
    return subprocess.run(
        [*map(str, command)], input=given, stdout=subprocess.PIPE, text=True, check=True
    ).stdout.strip()


def medxai(*args: object) -> list[str]:
    """The command."""
    return [sys.executable, "-m", "MedXAILib", "cohort", *map(str, args)]


def until(happened: Callable[[], object]) -> float:
    """Wait for what has to happen; the seconds it took."""
    begun = time.monotonic()
    while not happened():
        if time.monotonic() - begun > 600:
            raise RuntimeError("Nothing has happened for ten minutes.")
        time.sleep(0.1)
    return round(time.monotonic() - begun, 1)


def receipts(folder: Path) -> int:
    """Units done."""
    return len(list((folder / RECEIPTS).glob("*.json")))


def queue(states: str = "pending,running,completing") -> set[str]:
    """The jobs there are."""
    return set(said("squeue", "--noheader", "--array", "--format=%i", f"--states={states}").split())


def array(folder: Path) -> dict[str, Any]:
    """An array of jobs. When something is done, its first job is requeued, and its second cancelled and sent again."""
    script = said(*medxai("slurm", folder, "--jobs", JOBS))
    job = said("sbatch", "--parsable", given=script)
    first, second = f"{job}_0", f"{job}_1"
    until(lambda: receipts(folder) > 1 and {first, second} <= queue("running"))
    done = receipts(folder)
    said("scontrol", "requeue", first)
    said("scancel", second)
    # SLURM has what was requeued wait for two minutes.
    until(lambda: first in queue("pending"))
    said("scontrol", "update", f"JobId={first}", "StartTime=now")
    said("sbatch", "--array=1", given=script)
    until(lambda: not queue())
    restarts = said("scontrol", "--oneliner", "show", "job", first).partition("Restarts=")[2].split()[0]
    return {"done when disturbed": done, "restarts of the first job": int(restarts)}


def jobqueue(folder: Path, patient: bool) -> dict[str, Any]:
    """Workers in jobs, of which one is cancelled; then the driver is killed. Another goes on, and if one is `patient`
    both of its jobs are cancelled, so that it has to send them again."""
    command = medxai("run", folder, "--jobqueue", "slurm", "--jobs", 2, "--memory", "2GB", "--walltime", "00:20:00")

    def further(units: int) -> None:
        aim = receipts(folder) + units
        until(lambda: receipts(folder) >= aim)

    told: dict[str, Any] = {}
    driver = subprocess.Popen(command)
    further(2)
    said("scancel", min(queue()))
    further(2)
    driver.kill()
    driver.wait()
    told["done when the driver was killed"] = receipts(folder)
    told["seconds until its jobs had ended"] = until(lambda: not queue())
    with subprocess.Popen(command) as driver:
        further(2)
        if patient:
            said("scancel", *queue())
            told["done when all jobs were cancelled"] = receipts(folder)
    until(lambda: not queue())
    known = said("scontrol", "--oneliner", "show", "jobs").count(" JobName=medxai ")
    return {**told, "ended with": driver.returncode, "jobs with those of the array": known}


def main(place: Path | None = None, patient: bool = True) -> None:
    """In the folders `array` and `jobqueue` of `place`, which hold plans; else on computed nodules, compared with a run
    that is not disturbed."""
    if place is not None:
        print(json.dumps({"array": array(place / "array"), "jobqueue": jobqueue(place / "jobqueue", patient)}))
        return
    # As many threads as a job has cores: sums in another order have other last bits.
    os.environ["OMP_NUM_THREADS"] = "1"
    with tempfile.TemporaryDirectory() as temporary:
        here = Path(temporary)
        plan = make_plan(str(MODEL), load_model(MODEL).fingerprint, METHODS, scans(here, SCANS))
        folders = {name: here / name for name in ("undisturbed", "array", "jobqueue")}
        for folder in folders.values():
            folder.mkdir()
            plan.save(folder)
        compute(folders["undisturbed"], workers=2)
        found = {
            "machine": machine(),
            "versions": {"slurm": said("sinfo", "--version").split()[1]}
            | {name: version(name) for name in ("dask-jobqueue", "distributed")},
            "units": len(list(plan.units())),
            "array": array(folders["array"]),
            "jobqueue": jobqueue(folders["jobqueue"], patient),
            "states": {name: dict(state(folder).counts) for name, folder in folders.items()},
            "results equal": all(digests(folder) == digests(folders["undisturbed"]) for folder in folders.values()),
        }
    RESULTS.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(found, indent=1))


if __name__ == "__main__":
    typer.run(main)
