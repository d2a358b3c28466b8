"""Where the units of a cohort are computed: here, on the cores of this machine, or on a cluster, by Dask.

Dask hands out work; what was done is known by the receipts alone. So whatever is killed, a worker, the scheduler or the
driver, the same call goes on from where it was.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from MedXAILib.cohort.batch import Jobs
from MedXAILib.cohort.plan import Unit, read_plan, unit_of
from MedXAILib.cohort.state import outdated
from MedXAILib.cohort.work import RECEIPTS, Status, do, write_receipt
from MedXAILib.errors import MedXAIError
from MedXAILib.run import Run

ATTEMPTS = 3
# A worker that dies takes down what waits for it as well, which Dask counts against all of it.
_DEATHS = 10
_WITHOUT_WORKERS, _GONE = "10 minutes", "5 minutes"
# Units for each worker that the scheduler knows of.
_QUEUED = 2


class Task(Protocol):
    """What can be done piece by piece, in whatever process: it is pickled, and what comes back is a word."""

    def do(self, key: str, device: str | None, attempt: int) -> Status:
        """Do the piece `key`, unless it is done. What is raised is tried again, but for a `MedXAIError`."""

    def give_up(self, key: str, error: BaseException) -> Status:
        """What becomes of a piece that went wrong every time."""


@dataclass(frozen=True)
class Explaining:
    """The units of the plan in `folder`."""

    folder: Path

    def do(self, key: str, device: str | None, attempt: int) -> Status:
        """See `work.do`."""
        return do(str(self.folder), key, device, attempt)

    def give_up(self, key: str, error: BaseException) -> Status:
        """Say so in its receipt."""
        return given_up(self.folder, unit_of(str(self.folder), key)[1], error)


def todo(folder: Path) -> list[str]:
    """The keys of the units that have no receipt, in the order of the plan."""
    done = {path.stem for path in (folder / RECEIPTS).glob("*.json")}
    # Two cases of the same scan, asked the same, are one unit.
    return list(dict.fromkeys(unit.key for unit in read_plan(folder).units() if unit.key not in done))


def compute(
    folder: str | Path,
    workers: int = 0,
    scheduler: str | Jobs | None = None,
    device: str | None = None,
    shard: tuple[int, int] | None = None,
    run: Run | None = None,
    trust: bool = False,
) -> Counter[str]:
    """Compute what is still to do of the plan in `folder`; returns how many units were done, refused and failed.

    Args:
        workers: processes on this machine, one unit each at a time; 0 computes in this one.
        scheduler: the address of a Dask scheduler (``tcp://...``) whose workers see the same folder, instead,
            or jobs of a batch system.
        device: where the network runs. Workers of a scheduler that name a resource "GPU" get the work for "cuda".
        shard: this is part i of n (from 0): what a job of an array of jobs does, without a scheduler.
        run: progress and cancel.
        trust: whether the plan's model may run code that it brings along. A plan that says so itself is not believed.

    Raises:
        Cancelled: when the person asked to stop; what was done is kept.
        MedXAIError: when there is no plan, one of a model that is not trusted, or when Dask is not installed.
    """
    folder, run = Path(folder).resolve(), run or Run()
    plan = read_plan(folder)
    if (plan.trust or plan.code is not None) and not trust:
        raise MedXAIError(
            f"The plan in '{folder}' lets its model '{plan.model}' run code of its own: say --trust (trust=True) if "
            "you trust who made both."
        )
    units = list(plan.units())[slice(None) if shard is None else slice(shard[0], None, shard[1])]
    again = outdated(folder, units)
    if again:
        run.note(f"{len(again)} scans were replaced since, or receipts are damaged: their results are computed again.")
    left = set(todo(folder))
    # Two cases of the same scan, asked the same, are one unit.
    keys = [key for key in dict.fromkeys(unit.key for unit in units) if key in left]
    return carry_out(Explaining(folder), keys, "Explaining the cohort", workers, scheduler, device, run)


def carry_out(
    task: Task,
    keys: list[str],
    title: str,
    workers: int = 0,
    scheduler: str | Jobs | None = None,
    device: str | None = None,
    run: Run | None = None,
) -> Counter[str]:
    """Do the pieces `keys` of `task`, called `title`, where `compute` says; returns how many ended how."""
    run = run or Run()
    said: Counter[str] = Counter()
    with _outcomes(task, keys, workers, scheduler, device) as outcomes:
        run.step(0, len(keys), title)
        for done, status in enumerate(outcomes, 1):
            said[status] += 1
            run.step(done, len(keys), title)
    return said


@contextmanager
def _outcomes(
    task: Task, keys: list[str], workers: int, scheduler: str | Jobs | None, device: str | None
) -> Iterator[Iterator[str]]:
    """What becomes of each of `keys`, as it is known."""
    if not keys or (not workers and scheduler is None):
        yield _here(task, keys, device)
        return
    with _client(workers, scheduler) as client:
        yield _by_dask(client, task, keys, device)


def _here(task: Task, keys: list[str], device: str | None) -> Iterator[str]:
    for key in keys:
        for attempt in range(1, ATTEMPTS + 1):
            try:
                yield task.do(key, device, attempt)
                break
            except MedXAIError:
                # Nothing that another attempt would mend: the disk is full, the network is another.
                raise
            except Exception as error:
                if attempt == ATTEMPTS:
                    yield task.give_up(key, error)


def _by_dask(client: Any, task: Task, keys: list[str], device: str | None) -> Iterator[str]:
    from distributed import as_completed

    on = {"GPU": 1} if device is not None and device.startswith("cuda") and _has_gpus(client) else {}
    attempts: Counter[str] = Counter()
    waiting = list(reversed(keys))

    def submit(key: str) -> Any:
        attempts[key] += 1
        # A name of its own for each attempt: Dask would remember the error of the last. The first word is for what Dask
        # keeps for all names that are alike, and never forgets.
        name = ("unit", key, attempts[key])
        return client.submit(task.do, key, device, attempts[key], key=name, pure=False, resources=on)

    futures = as_completed()

    def fill() -> None:
        # Fewer than all at once: a scheduler should not hold what a plan holds. Workers come and go.
        ahead = max(1, _QUEUED * len(client.nthreads()))
        while waiting and futures.count() < ahead:
            futures.add(submit(waiting.pop()))

    fill()
    for future in futures:
        _, key, _ = future.key
        error = future.exception() if future.status == "error" else None
        if isinstance(error, MedXAIError):
            raise error
        if type(error).__name__ == "NoWorkerError":
            raise MedXAIError("No worker is left: see what ended them, and compute again; what was done is kept.")
        if error is not None and attempts[key] < ATTEMPTS:
            futures.add(submit(key))
        else:
            yield future.result() if error is None else task.give_up(key, error)
        fill()


def given_up(folder: Path, unit: Unit, error: BaseException) -> Status:
    """Say in the receipt of `unit` that it went wrong every time."""
    reason = " ".join(f"{type(error).__name__}: {error}".split())[:500]
    return write_receipt(folder, unit, {"status": "failed", "reason": reason, "attempt": ATTEMPTS})


def _has_gpus(client: Any) -> bool:
    return any("GPU" in worker["resources"] for worker in client.scheduler_info(n_workers=-1)["workers"].values())


@contextmanager
def _client(workers: int, scheduler: str | Jobs | None) -> Iterator[Any]:
    try:
        import dask
        from distributed import Client, LocalCluster
    except ImportError as error:
        raise MedXAIError("More than one process needs Dask: install it by pip install 'medxai[cohort]'.") from error
    settings = {
        "distributed.scheduler.allowed-failures": _DEATHS,
        "distributed.scheduler.no-workers-timeout": _WITHOUT_WORKERS,
        # A worker that was killed is started anew, and given up for good if it is not back by then: importing PyTorch
        # takes long on a busy machine.
        "distributed.deploy.lost-worker-timeout": _GONE,
        # Dask has freed memory returned to the system at once, which makes a network a third slower.
        "distributed.nanny.pre-spawn-environ.MALLOC_TRIM_THRESHOLD_": None,
    }
    with dask.config.set(settings):
        if isinstance(scheduler, str):
            try:
                client = Client(scheduler, timeout=30)
            except OSError as error:
                raise MedXAIError(f"No scheduler answers at '{scheduler}': start one, or check the address.") from error
            with client:
                yield client
            return
        if scheduler is not None:
            with scheduler.submitted() as cluster, Client(cluster) as client:
                yield client
            return
        # No dashboard: it would be one more port, and needs another package.
        with (
            LocalCluster(
                n_workers=workers, threads_per_worker=1, processes=True, host="127.0.0.1", dashboard_address=None
            ) as cluster,
            Client(cluster) as client,
        ):
            yield client
