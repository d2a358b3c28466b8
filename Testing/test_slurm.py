"""Cohorts on batch systems: what jobs ask for, and a real SLURM where there may be one."""

from __future__ import annotations

import gc
import json
import os
import shlex
import shutil
import subprocess
import sys
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
from test_cohort import digests, planned, scans

import MedXAILib as mx
from MedXAILib.cohort.batch import Jobs, array
from MedXAILib.cohort.engine import compute
from MedXAILib.cohort.state import state

ROOT = Path(__file__).resolve().parent.parent
PRIVATE = ROOT / "benchmarks" / "slurm" / "private.sh"

pytest.importorskip("dask_jobqueue", reason="there are batch systems on Linux only")


@pytest.fixture
def system(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Puts programs of a batch system on the path: what each does, by name."""

    def there(**programs: str) -> None:
        for name, does in programs.items():
            (tmp_path / name).write_text(f"#!/bin/sh\n{does}\n", encoding="utf-8")
            (tmp_path / name).chmod(0o755)
        monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")

    return there


def directives(script: str, word: str) -> list[str]:
    """What a script asks its batch system for."""
    return [line.removeprefix(f"#{word} ") for line in script.splitlines() if line.startswith(f"#{word} ")]


# As the manuals of the three have it: sbatch(1), qsub(1B) of OpenPBS, bsub(1).
ASKED = {
    "slurm": ("SBATCH", ["-p gpu", "--cpus-per-task=3", "--mem=6G", "-t 04:00:00", "--gres=gpu:1"]),
    "pbs": ("PBS", ["-q gpu", "-l select=1:ncpus=3:mem=6GB:ngpus=1", "-l walltime=04:00:00"]),
    "lsf": ("BSUB", ["-q gpu", "-n 3", "-M 6000000", "-W 04:00:00", "-gpu num=1"]),
}


@pytest.mark.parametrize("name", ASKED)
def test_jobs_ask_for_what_was_asked(name: str, system: Any, tmp_path: Path) -> None:
    import dask

    system(sbatch="", qsub="", bsub="")
    # What a site has set for all that it does with Dask holds as well.
    site = {f"jobqueue.{name}.job-script-prologue": ["export SITE=here"], f"jobqueue.{name}.name": "other"}
    with (
        dask.config.set({**site, f"jobqueue.{name}.worker-extra-args": ["--lifetime", "3h"]}),
        Jobs(name, tmp_path / "logs", 2, "gpu", "04:00:00", "6GB", 3, gpu=True).cluster() as cluster,
    ):
        script = cluster.job_script()
    word, asked = ASKED[name]
    assert set(asked) <= set(directives(script, word))
    command = script.splitlines()[-1].split()
    assert command[0] == sys.executable and command[-20:].count("--lifetime") == 1
    # One unit at a time, and nothing that others can read.
    assert [command[i + 1] for i, part in enumerate(command) if part == "--nthreads"][-1] == "1"
    assert command[3].startswith("tls://") and "--tls-key" in command
    # What the worker finds when it starts: run up to there, by the shell.
    before = "\n".join(script.splitlines()[:-1])
    said = subprocess.run(["bash", "-c", f"{before}\nenv"], stdout=subprocess.PIPE, text=True, check=True).stdout
    found = dict(line.split("=", 1) for line in said.splitlines() if line.startswith(("SITE", "OMP", "DASK")))
    assert found["SITE"] == "here" and found["OMP_NUM_THREADS"] == "3"
    own = dask.config.update(deepcopy(dask.config.config), dask.config.collect_env(found))
    assert dask.config.get("distributed.nanny.pre-spawn-environ.MALLOC_TRIM_THRESHOLD_", config=own) is None


def test_what_a_batch_system_refuses_is_said(system: Any, tmp_path: Path) -> None:
    with pytest.raises(mx.MedXAIError, match=r"no batch system 'sge'.*slurm"):
        Jobs("sge", tmp_path).cluster()
    with pytest.raises(mx.MedXAIError, match="LSF is not here"):
        Jobs("lsf", tmp_path).cluster()
    system(sbatch="echo 'sbatch: error: invalid partition specified: gpuu' >&2; exit 1", scancel="")
    with pytest.raises(mx.MedXAIError, match="without spaces"):
        Jobs("slurm", tmp_path / "a b" / "logs").cluster()
    with (
        pytest.raises(mx.MedXAIError, match=r"SLURM refuses the jobs: sbatch: error: invalid partition.*gpuu"),
        Jobs("slurm", tmp_path / "logs", 2, "gpuu").submitted(),
    ):
        pass
    # The keys go with the cluster.
    gc.collect()


def test_an_array_asks_for_a_gpu_and_says_where_python_is(tmp_path: Path) -> None:
    folder = tmp_path / '50% of "all"'
    folder.mkdir()
    script = array(folder, 7, "cuda")
    assert "--gres=gpu:1" in directives(script, "SBATCH") and "--gres" not in array(folder, 7)
    # sbatch takes a doubled per cent sign for one.
    (log,) = [line for line in directives(script, "SBATCH") if line.startswith("--output=")]
    assert shlex.split(log) == [f'--output={tmp_path}/50%% of "all"/logs/%A_%a.txt'] and (folder / "logs").is_dir()
    # The shell, without the command: what it would start.
    line = script.splitlines()[-1].replace("exec", "printf '%s\\n'", 1)
    said = subprocess.run(
        ["sh", "-c", line],
        env={**os.environ, "SLURM_ARRAY_TASK_ID": "3"},
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    told = [sys.executable, "-m", "MedXAILib", "cohort", "run", str(folder), "--shard", "3/7", "--device", "cuda"]
    assert said.stdout.splitlines() == told
    (tmp_path / "a\nrm b").mkdir()
    with pytest.raises(mx.MedXAIError, match="without line breaks"):
        array(tmp_path / "a\nrm b", 7)


def private_slurm() -> str:
    """Why there is no SLURM of one's own; nothing if there is."""
    missing = [name for name in ("ip", "munged", "slurmctld", "slurmd", "sbatch", "unshare") if not shutil.which(name)]
    if missing:
        return f"no {', '.join(missing)} here"
    try:
        tried = subprocess.run([PRIVATE, "true"], stderr=subprocess.PIPE, text=True, timeout=60)
    except subprocess.TimeoutExpired:
        return "it does not start within a minute"
    return f"it does not start: {tried.stderr[-200:]}" if tried.returncode else ""


@pytest.mark.slow
def test_on_a_real_slurm_jobs_are_requeued_cancelled_and_drivers_killed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if why := private_slurm():
        pytest.skip(why)
    # A job has one core.
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    table = scans(tmp_path / "scans", 6)
    folders = {name: tmp_path / name for name in ("undisturbed", "array", "jobqueue")}
    for folder in folders.values():
        planned(table, folder, rise={"samples": 60}, hirescam={})
    compute(folders["undisturbed"], workers=1)
    command = [PRIVATE, sys.executable, "-m", "benchmarks.slurm", "--place", tmp_path, "--no-patient"]
    said = json.loads(subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout.splitlines()[-1])
    assert said["array"]["restarts of the first job"] == 1 and said["array"]["done when disturbed"] < 12
    assert said["jobqueue"]["ended with"] == 0 and said["jobqueue"]["done when the driver was killed"] < 12
    for folder in folders.values():
        assert state(folder).counts == {"done": 8, "refused": 4} and digests(folder) == digests(folders["undisturbed"])
