"""`python -m benchmarks.cohort` explains 200 computed nodules by three methods with one worker and with two, and once
more while workers and the driver are killed: does a second worker halve the time, does memory stay flat, and does the
same come out?"""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import SimpleITK as sitk
import torch

from benchmarks.measure import machine
from MedXAILib.cohort.plan import Subject, make_plan, read_plan
from MedXAILib.cohort.reduce import reduce
from MedXAILib.cohort.state import state
from MedXAILib.cohort.work import RECEIPTS, receipt
from MedXAILib.loading import load_model
from MedXAILib.resources import path
from MedXAILib.synthetic.lung_nodules import SPACING_MM, Backgrounds, synthesise
from MedXAILib.volume import Volume, load_volume

RESULTS = Path(__file__).resolve().parent / "results" / "cohort.json"
MODEL = path("Models/lung_nodule")
SCANS, METHODS = 200, ("gradient", "hirescam", "gradcam")
KILLS = 5
_REDUCED = ("mean", "variance")

_DRIVER = """
import sys
from MedXAILib.cohort.engine import compute
if __name__ == "__main__":
    compute(sys.argv[1], workers=int(sys.argv[2]))
"""


def scans(folder: Path) -> list[Subject]:
    """Computed nodules as files, in Hounsfield units."""
    found = []
    # Patches have the axes (R, A, S), volumes (S, A, R).
    affine = np.diag([SPACING_MM, SPACING_MM, SPACING_MM, 1.0])[[2, 1, 0, 3]]
    for i, image in enumerate(synthesise(Backgrounds.training(), SCANS, seed=11).images):
        file = folder / f"nodule-{i:03d}.nrrd"
        sitk.WriteImage(Volume(image.permute(0, 3, 2, 1) * 1400 - 1000, affine).to_sitk(), str(file), True)
        found.append(Subject(file.stem, (str(file),)))
    return found


def driver(folder: Path, workers: int) -> subprocess.Popen[bytes]:
    """A process that computes the plan, each worker on one core."""
    script = folder / "driver.py"
    script.write_text(_DRIVER, encoding="utf-8")
    args = [sys.executable, str(script), str(folder), str(workers)]
    return subprocess.Popen(args, env=os.environ | {"OMP_NUM_THREADS": "1"}, stderr=subprocess.DEVNULL)


def workers_of(process: subprocess.Popen[bytes]) -> list[psutil.Process]:
    """The workers of a driver that are alive."""
    found = []
    for one in psutil.Process(process.pid).children(recursive=True):
        try:
            if "spawn_main" in " ".join(one.cmdline()):
                found.append(one)
        except psutil.Error:
            continue
    return found


def undisturbed(folder: Path, workers: int) -> dict[str, Any]:
    """Units a second from the first receipt to the last, and the memory of a worker at a quarter and at the end."""
    memory: list[tuple[int, float]] = []
    process = driver(folder, workers)
    while process.poll() is None:
        done = len(list((folder / RECEIPTS).glob("*.json")))
        sizes = [one.memory_info().rss / 1e6 for one in workers_of(process)]
        if done and sizes:
            memory.append((done, max(sizes)))
        time.sleep(0.5)
    times = sorted(file.stat().st_mtime for file in (folder / RECEIPTS).glob("*.json"))
    quarter = next(mb for done, mb in memory if done >= len(times) / 4)
    return {
        "units_per_second": (len(times) - 1) / (times[-1] - times[0]),
        "memory_mb": {"at a quarter": round(quarter), "at the end": round(memory[-1][1])},
    }


def disturbed(folder: Path) -> dict[str, int]:
    """Kill workers at random, and the driver with all it started once, and begin again until all is done."""
    draw, killed, drivers = random.Random(0), 0, 0
    while True:
        process = driver(folder, 2)
        while process.poll() is None:
            time.sleep(draw.uniform(4, 8))
            alive = workers_of(process) if process.poll() is None else []
            if not alive or not any((folder / RECEIPTS).glob("*.json")):
                continue
            if killed == KILLS // 2 and not drivers:
                for one in [psutil.Process(process.pid), *alive]:
                    one.kill()
                drivers += 1
            elif killed < KILLS:
                draw.choice(alive).kill()
                killed += 1
        if process.returncode == 0:
            return {"workers killed": killed, "drivers killed": drivers}


def digests(folder: Path) -> list[str | None]:
    """What each unit says."""
    return [(receipt(folder, unit.key) or {}).get("digest") for unit in read_plan(folder).units()]


def main() -> None:
    with tempfile.TemporaryDirectory() as place:
        here = Path(place)
        subjects = scans(here)
        plan = make_plan(str(MODEL), load_model(MODEL).fingerprint, {method: {} for method in METHODS}, subjects)
        folders = {name: here / name for name in ("one", "two", "killed")}
        for folder in folders.values():
            folder.mkdir()
            plan.save(folder)
        one, two = undisturbed(folders["one"], 1), undisturbed(folders["two"], 2)
        kills = disturbed(folders["killed"])
        template = load_volume(subjects[0].volume[0])
        first, last = (reduce(folders[name], template) for name in ("one", "killed"))
        pairs = [(getattr(a, name), getattr(b, name)) for a, b in zip(first, last, strict=True) for name in _REDUCED]
        found = {
            "machine": machine(),
            "units": SCANS * len(METHODS),
            "states": {name: dict(state(folder).counts) for name, folder in folders.items()},
            "one worker": one,
            "two workers": two,
            "efficiency": two["units_per_second"] / one["units_per_second"] / 2,
            **kills,
            "results equal": digests(folders["one"]) == digests(folders["two"]) == digests(folders["killed"]),
            "reduced maps equal": all(torch.equal(a, b) for a, b in pairs),
        }
    RESULTS.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
