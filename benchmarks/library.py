"""`python -m benchmarks.library` measures libraries of cases: what is lost when a writer is killed, and how fast and
how well large ones are searched. What it finds stands in docs/cases.md. It needs a system that can fork."""

from __future__ import annotations

import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer

from benchmarks.measure import machine
from MedXAILib.cases.library import Embedder, Library, Where
from MedXAILib.cases.recall import BEST, Sample
from MedXAILib.cases.record import Record
from MedXAILib.run import Run

RESULTS = Path(__file__).resolve().parent / "results" / "library.json"
SIZE = 128
EMBEDDER = Embedder("0" * 32, "", "Numbers", {"plain": (SIZE, "cosine")})

_QUERIES = 100
# Cases that a writer adds at once, each with eight regions and a thumbnail of 4 kB, and trials in one library.
_BATCH, _TOGETHER = 10, 50
_TOLERANCE = 1e-5
_LABELS = ("benign", "malignant")

# Whatever takes long is done once; then a copy of this process adds cases, says so, and is killed.
_WRITERS = """
import os, signal, sys, time, types
package = sys.modules["MedXAILib"] = types.ModuleType("MedXAILib")
package.__path__ = [sys.argv[1]]
import lancedb.index, numpy as np
from MedXAILib.cases.library import Library
from MedXAILib.cases.record import Record

def write(path, who, batch, pipe):
    rng = np.random.default_rng()
    library = Library.open(path)
    size = library.embedder.spaces["plain"][0]
    os.write(pipe, b"open ")
    for i in range(10**6):
        library.add(
            Record(f"{who} {i} {k}", who, vectors={"plain": rng.normal(size=size)}, regions=rng.normal(size=(8, size)),
                   thumbnail=rng.bytes(4000))
            for k in range(batch)
        )
        os.write(pipe, b"%d " % i)

for line in sys.stdin:
    path, who, batch, seconds = line.rstrip().split("|")
    there, here = os.pipe()
    child = os.fork()
    if child == 0:
        write(path, who, int(batch), here)
    os.close(here)
    said = os.read(there, 5)
    time.sleep(float(seconds))
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    while part := os.read(there, 65536):
        said += part
    os.close(there)
    print(said.decode(), flush=True)
"""


def killed(trials: int, folder: Path) -> dict[str, Any]:
    """A process adds ten cases at a time and is killed at a random moment, again and again. All that it acknowledged
    must be there, ten by ten, and the library can be read and written to."""
    draw = random.Random(0)
    found = dict.fromkeys(("acknowledged", "lost", "in part", "not acknowledged", "unreadable"), 0)
    with _writers() as write:
        for trial in range(trials):
            path = folder / f"killed-{trial // _TOGETHER}"
            if trial % _TOGETHER == 0:
                Library.create(path, EMBEDDER)
            told = {int(i) for i in write(path, str(trial), _BATCH, draw.uniform(0, 0.25))}
            try:
                mine = [uid.split() for uid in Library.open(path).uids() if uid.split()[0] == str(trial)]
            except Exception as error:
                print(trial, error, flush=True)
                found["unreadable"] += 1
                continue
            there = {i: sum(int(each[1]) == i for each in mine) for i in {int(each[1]) for each in mine}}
            found["acknowledged"] += len(told) * _BATCH
            found["lost"] += sum(_BATCH - there.get(i, 0) for i in told)
            found["in part"] += sum(count != _BATCH for count in there.values())
            found["not acknowledged"] += len(there.keys() - told)
            if trial % 50 == 49:
                print(trial + 1, found, flush=True)
    return {"trials": trials, **found}


def at_once(seconds: float, folder: Path) -> dict[str, Any]:
    """Four processes add to one library at once; one of them is killed halfway, the others at the end."""
    path = folder / "at-once"
    Library.create(path, EMBEDDER)
    with ExitStack() as stack, ThreadPoolExecutor(4) as pool:
        writers = [stack.enter_context(_writers()) for _ in range(4)]
        told = list(
            pool.map(lambda k: writers[k](path, f"{k}", _BATCH, seconds * (0.5 if k == 0 else 1)), range(len(writers)))
        )
    library = Library.open(path)
    uids = library.uids()
    acknowledged = {f"{k} {i} {n}" for k, said in enumerate(told) for i in said for n in range(_BATCH)}
    return {
        "seconds": seconds,
        "acknowledged of each": [len(said) * _BATCH for said in told],
        "lost": len(acknowledged - set(uids)),
        "not acknowledged": len(set(uids) - acknowledged),
        "twice": len(uids) - len(set(uids)),
        "versions": library.version,
    }


@contextmanager
def _writers() -> Iterator[Callable[[Path, str, int, float], list[str]]]:
    package = Path(__file__).resolve().parents[1] / "MedXAILib"
    command = [sys.executable, "-W", "ignore", "-c", _WRITERS, str(package)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdin is not None and process.stdout is not None
        into, out = process.stdin, process.stdout

        def write(path: Path, who: str, batch: int, seconds: float) -> list[str]:
            """Write for so long, then be killed; what was acknowledged."""
            print(path, who, batch, seconds, sep="|", file=into, flush=True)
            return out.readline().split()[1:]

        yield write
        into.close()


def searched(count: int, kind: str, folder: Path) -> dict[str, Any]:
    """A library of `count` vectors of 128 numbers, about 2,000 centres or about none, and searches for others of the
    same kind; recall is of the 10 nearest."""
    path = folder / f"searched-{count}-{kind}"
    rng = np.random.default_rng(0)
    centres = rng.normal(size=(2000, SIZE))

    def vectors(n: int) -> np.ndarray:
        drawn = rng.normal(size=(n, SIZE))
        return (centres[rng.integers(len(centres), size=n)] + 0.7 * drawn if kind == "clustered" else drawn).astype(
            np.float32
        )

    library, run = Library.create(path, EMBEDDER), Run()
    batches, started = [], time.perf_counter()
    for start in range(0, count, 20_000):
        batches.append(vectors(min(20_000, count - start)))
        library.add(
            Record(
                f"{i}", f"{i // 2}", ("benign", "malignant")[i % 2], vectors={"plain": v}, meta={"age": float(i % 80)}
            )
            for i, v in enumerate(batches[-1], start)
        )
    added, started = time.perf_counter() - started, time.perf_counter()
    library.compact()
    library.index(run)
    indexed = time.perf_counter() - started
    queries = vectors(_QUERIES)
    nearest = Sample.of(queries, batches, "cosine").nearest[:, :BEST]
    del batches
    library = Library.open(path)
    found: dict[str, Any] = {"seconds to add": added, "seconds to index": indexed, **library._tuned("plain")}
    filters: dict[str, Where | None] = {"": None, ", filtered": {"age": (20, 23), "label": "benign"}}
    for name, where in filters.items():
        library.search(queries[0], BEST, where=where)
        seconds, hits, busy = [], [], time.process_time()
        for query in queries:
            started = time.perf_counter()
            hits.append([hit.similarity for hit in library.search(query, BEST, where=where)])
            seconds.append(1000 * (time.perf_counter() - started))
        found[f"processor ms{name}"] = 1000 * (time.process_time() - busy) / _QUERIES
        found[f"p50 ms{name}"], found[f"p95 ms{name}"] = np.percentile(seconds, [50, 95]).tolist()
        if where is None:
            found["recall"] = float(np.mean(np.array(hits) >= nearest[:, -1:] - _TOLERANCE))
    found["MB on disk"] = sum(file.stat().st_size for file in path.rglob("*") if file.is_file()) / 1e6
    shutil.rmtree(path)
    return found


def main(
    what: Annotated[str, typer.Argument(help="killed, at-once, 32000 or 1000000.")],
    trials: Annotated[int, typer.Option(help="Of killed.")] = 1000,
) -> None:
    """Measure one thing, and keep it beside what was measured before."""
    folder = Path(tempfile.mkdtemp(prefix="medxai-library-"))
    try:
        if what == "killed":
            found = {what: killed(trials, folder)}
        elif what == "at-once":
            found = {what: at_once(30, folder)}
        else:
            found = {f"{what}, {kind}": searched(int(what), kind, folder) for kind in ("clustered", "unstructured")}
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    # Read only now: another measurement may have ended in the meantime.
    known = json.loads(RESULTS.read_text(encoding="utf-8")) if RESULTS.exists() else {}
    load = round(os.getloadavg()[1], 1)
    known |= {"machine": machine(), **{name: {**values, "load": load} for name, values in found.items()}}
    RESULTS.write_text(json.dumps(known, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    print(json.dumps(found, indent=1))


if __name__ == "__main__":
    typer.run(main)
