"""Jobs of batch systems: SLURM, PBS or LSF compute the units of a cohort."""

from __future__ import annotations

import shlex
import shutil
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from MedXAILib.errors import MedXAIError, unknown

# Jobs wait for hours. One that is gone is submitted again when its worker is not back by then.
_PATIENCE = {"distributed.scheduler.no-workers-timeout": None, "distributed.deploy.lost-worker-timeout": "1 minute"}
# What `engine` asks of the workers that it starts itself. These are started by their job.
_TRIM = """export DASK_DISTRIBUTED__NANNY__PRE_SPAWN_ENVIRON='{"MALLOC_TRIM_THRESHOLD_": None}'"""

_ARRAY = """#!/bin/sh
#SBATCH --job-name=medxai
#SBATCH --array=0-{last}
#SBATCH --cpus-per-task=1
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output={log}
{gpu}# A job that is requeued leaves out what it has done already.
export OMP_NUM_THREADS="$SLURM_CPUS_PER_TASK"
exec {python} -m MedXAILib cohort run {folder} --shard "$SLURM_ARRAY_TASK_ID/{jobs}"{more}
"""


@dataclass(frozen=True)
class Jobs:
    """`count` jobs of the batch system `system` ("slurm", "pbs" or "lsf"), with a Dask worker in each that computes one
    unit at a time, on so many `cores` and perhaps a GPU, in so much `memory`, for as long as `walltime` says, written
    as the system has it. What they say is written to `logs`. Any other setting (an account, the network's interface,
    modules to load) is taken from dask-jobqueue's own (~/.config/dask/jobqueue.yaml)."""

    system: str
    logs: Path
    count: int = 10
    queue: str | None = None
    walltime: str | None = None
    memory: str = "8GB"
    cores: int = 1
    gpu: bool = False

    @contextmanager
    def submitted(self) -> Iterator[Any]:
        """The cluster of these jobs. One that ends before all is done is submitted again; all are cancelled at the end.

        Raises:
            MedXAIError: for an unknown system, when it or dask-jobqueue is not here, and when it refuses the jobs.
        """
        import dask

        with dask.config.set(_PATIENCE), ExitStack() as stack:
            cluster = self.cluster()
            # Named before it is entered: then a job that is refused is an error, not a line in a log.
            for _ in range(self.count):
                cluster.worker_spec.update(cluster.new_worker_spec())
            try:
                stack.enter_context(cluster)
            except (RuntimeError, AssertionError) as error:
                # Dask stumbles over the worker that never was, and hides why.
                said = str(error.__context__ or error).partition("stderr:")[2].split("\n")
                raise MedXAIError(f"{self.system.upper()} refuses the jobs: {' '.join(said).strip()}") from error
            cluster.adapt(minimum_jobs=self.count, maximum_jobs=self.count)
            yield cluster

    def cluster(self) -> Any:
        """The same, without any job yet: its `job_script()` says what would be submitted."""
        try:
            import dask
            import dask_jobqueue
        except ImportError as error:
            raise MedXAIError("Batch systems need dask-jobqueue: pip install 'medxai[cohort]'.") from error
        kinds: Any = dask_jobqueue
        known = {"slurm": kinds.SLURMCluster, "pbs": kinds.PBSCluster, "lsf": kinds.LSFCluster}
        if self.system not in known:
            raise unknown("batch system", self.system, known)
        if shutil.which(known[self.system].job_cls.submit_command) is None:
            raise MedXAIError(f"{self.system.upper()} is not here: compute where jobs are submitted.")
        if any(letter.isspace() for letter in str(self.logs)):
            raise MedXAIError(f"Scripts of jobs do without spaces: '{self.logs.parent}' has some.")
        self.logs.mkdir(parents=True, exist_ok=True)
        own = dask.config.get(f"jobqueue.{self.system}")
        more: dict[str, Any] = {}
        if self.gpu and self.system == "pbs":
            more["resource_spec"] = f"select=1:ncpus={self.cores}:mem={self.memory}:ngpus=1"
        elif self.gpu:
            asked = {"slurm": "--gres=gpu:1", "lsf": "-gpu num=1"}[self.system]
            more["job_extra_directives"] = [*own["job-extra-directives"], asked]
        return known[self.system](
            job_name="medxai",
            cores=self.cores,
            memory=self.memory,
            processes=1,
            queue=self.queue,
            walltime=self.walltime,
            python=shlex.quote(sys.executable),
            job_script_prologue=[*own["job-script-prologue"], f"export OMP_NUM_THREADS={self.cores}", _TRIM],
            # Dask would have as many units at once as there are cores. Of two numbers the last holds.
            worker_extra_args=[*own["worker-extra-args"], "--nthreads", "1"],
            log_directory=str(self.logs),
            # Who reaches the scheduler runs what they want, and a cluster is shared: keys that only this person reads.
            security=True,
            shared_temp_directory=str(self.logs),
            scheduler_options={**own["scheduler-options"], "dashboard_address": None},
            **more,
        )


def array(folder: Path, jobs: int, device: str | None = None, trust: bool = False) -> str:
    """A script for SLURM's sbatch: an array of `jobs` jobs that compute the plan in `folder`, without a scheduler.

    Raises:
        MedXAIError: when there is a line break in the folder's name.
    """
    logs = folder.resolve() / "logs"
    if not str(logs).isprintable():
        # What follows a line break would be a line of the script.
        raise MedXAIError(f"Scripts of jobs do without line breaks: {str(folder)!r} has some.")
    logs.mkdir(exist_ok=True)
    log = str(logs).replace("%", "%%").replace('"', '\\"')
    return _ARRAY.format(
        last=jobs - 1,
        log=f'"{log}/%A_%a.txt"',
        gpu="#SBATCH --gres=gpu:1\n" * (device or "").startswith("cuda"),
        python=shlex.quote(sys.executable),
        folder=shlex.quote(str(folder.resolve())),
        jobs=jobs,
        more=(f" --device {shlex.quote(device)}" if device else "") + " --trust" * trust,
    )
