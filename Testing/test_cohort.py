"""Cohorts: whatever is killed, the same comes out; nothing is computed twice, and one bad scan spoils nothing."""

from __future__ import annotations

import csv
import errno
import json
import os
import shlex
import shutil
import subprocess
import sys
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import psutil
import pytest
import SimpleITK as sitk
import torch
from typer.testing import CliRunner

import MedXAILib as mx
from MedXAILib.cli import app
from MedXAILib.cohort import engine, sums, work
from MedXAILib.cohort.engine import compute, todo
from MedXAILib.cohort.plan import Plan, Unit, make_plan, read_plan
from MedXAILib.cohort.reduce import by_group, reduce
from MedXAILib.cohort.state import retry, state, verify
from MedXAILib.cohort.subjects import find_subjects
from MedXAILib.cohort.work import RECEIPTS, RESULTS, receipt
from MedXAILib.grid import resample
from MedXAILib.resources import path

MODEL = path("Models/lung_nodule")


def scans(folder: Path, count: int) -> Path:
    """A table of small scans on oblique, anisotropic grids; the first is damaged, the second constant."""
    folder.mkdir(parents=True, exist_ok=True)
    generator = torch.Generator().manual_seed(0)
    rows = []
    for i in range(count):
        data = torch.randn(1, 16, 30, 34, generator=generator) * 200 - 600
        affine = np.array([[0.1, 0.2, 1.3, -20.0], [-0.2, 1.5, 0.1, 5.0 + i], [3.1, 0.1, -0.2, 60.0], [0, 0, 0, 1.0]])
        turned, _ = np.linalg.qr(affine[:3, :3])
        affine[:3, :3] = turned * np.linalg.norm(affine[:3, :3], axis=0)
        file = folder / f"scan-{i}.nrrd"
        sitk.WriteImage(mx.Volume(data if i != 1 else torch.zeros_like(data), affine).to_sitk(), str(file))
        if i == 0:
            file.write_bytes(file.read_bytes()[:200])
        middle = affine @ [7.5, 14.5, 16.5, 1]
        rows.append([f"case-{i}", file.name, " ".join(f"{v:.3f}" for v in middle[:3]), ("north", "south")[i % 2]])
    with (folder / "cases.csv").open("w", encoding="utf-8", newline="") as file:
        csv.writer(file).writerows([["uid", "volume", "region", "site"], *rows])
    return folder / "cases.csv"


def planned(table: Path, folder: Path, **methods: dict[str, object]) -> Plan:
    made = make_plan(str(MODEL), mx.load_model(MODEL).fingerprint, methods or METHODS, find_subjects(table))
    made.save(folder)
    return made


METHODS: dict[str, dict[str, object]] = {"gradient": {}, "hirescam": {}}


@pytest.fixture(scope="module")
def table(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return scans(tmp_path_factory.mktemp("scans"), 7)


@pytest.fixture(scope="module")
def undisturbed(table: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("undisturbed")
    planned(table, folder)
    assert compute(folder) == {"done": 10, "refused": 4}
    return folder


def digests(folder: Path) -> dict[str, str | None]:
    units = read_plan(folder).units()
    return {unit.key: (receipt(folder, unit.key) or {}).get("digest") for unit in units}


def test_each_unit_is_what_explain_says(undisturbed: Path) -> None:
    model = mx.load_model(MODEL)
    for unit in read_plan(undisturbed).units():
        known = receipt(undisturbed, unit.key)
        assert known is not None and (known["case"], known["method"]) == (unit.subject.uid, unit.method)
        if unit.subject.uid in ("case-0", "case-1"):
            assert known["status"] == "refused" and ("constant" in known["reason"] or "cannot" in known["reason"])
            continue
        volume = mx.load_volume(unit.subject.volume[0])
        expected = mx.explain(model, volume, unit.method, region=unit.subject.region)
        found = mx.load_explanation(undisturbed / RESULTS / unit.key)
        assert isinstance(found, mx.SaliencyMap) and torch.equal(found.data, expected.data)
        assert known["volume"] == volume.fingerprint


def test_nothing_is_computed_twice(undisturbed: Path) -> None:
    before = {file: file.stat().st_mtime_ns for file in undisturbed.rglob("*.json")}
    assert todo(undisturbed) == [] and compute(undisturbed) == {}
    assert {file: file.stat().st_mtime_ns for file in undisturbed.rglob("*.json")} == before


def test_what_was_changed_is_found_and_computed_again(table: Path, undisturbed: Path, tmp_path: Path) -> None:
    planned(table, tmp_path)
    compute(tmp_path)
    done = [key for key, digest in digests(tmp_path).items() if digest]
    changed = tmp_path / RESULTS / done[0] / "map.nrrd"
    *kept, last = changed.read_bytes()
    changed.write_bytes(bytes([*kept, last ^ 1]))
    (tmp_path / RESULTS / done[1] / "explanation.json").unlink()
    assert verify(tmp_path) == done[:2] == todo(tmp_path)
    assert compute(tmp_path) == {"done": 2}
    assert verify(tmp_path) == [] and digests(tmp_path) == digests(undisturbed)
    # What was refused may be mended: then it is tried again.
    assert retry(tmp_path) == 4 and compute(tmp_path) == {"refused": 4}
    assert state(tmp_path).counts == {"done": 10, "refused": 4} and len(state(tmp_path).troubles) == 4


def test_parts_of_an_array_of_jobs_do_everything_once(table: Path, undisturbed: Path, tmp_path: Path) -> None:
    planned(table, tmp_path)
    counts = [compute(tmp_path, shard=(i, 3)) for i in range(3)]
    assert sum(counts, Counter()) == {"done": 10, "refused": 4} and min(map(Counter.total, counts)) >= 4
    assert digests(tmp_path) == digests(undisturbed)


_DRIVER = """
import sys
from MedXAILib.cohort.engine import compute
if __name__ == "__main__":
    print(dict(compute(sys.argv[1], workers=2)))
"""


@pytest.mark.slow
def test_workers_and_driver_may_be_killed(table: Path, undisturbed: Path, tmp_path: Path) -> None:
    planned(table, tmp_path / "cohort")
    (tmp_path / "driver.py").write_text(_DRIVER, encoding="utf-8")
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    args = [sys.executable, str(tmp_path / "driver.py"), str(tmp_path / "cohort")]

    def receipts() -> int:
        return len(list((tmp_path / "cohort" / RECEIPTS).glob("*.json")))

    def started() -> subprocess.Popen[str]:
        return subprocess.Popen(args, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, env=environment)

    def after(count: int, process: subprocess.Popen[str]) -> None:
        while receipts() < count and process.poll() is None:
            time.sleep(0.05)

    # First the driver with all that it started; what it did stays.
    with started() as process:
        after(3, process)
        family = psutil.Process(process.pid).children(recursive=True)
        process.kill()
        for one in family:
            if one.is_running():
                one.kill()
    kept = receipts()
    assert 3 <= kept < 14
    # Then a worker.
    with started() as process:
        after(kept + 1, process)
        workers = [one for one in psutil.Process(process.pid).children(recursive=True) if _works(one)]
        # Memory that is returned at once and asked for again takes a third of the time.
        assert "MALLOC_TRIM_THRESHOLD_" not in workers[0].environ()
        workers[0].kill()
        assert process.stdout is not None
        said = process.stdout.read()
        assert process.wait() == 0, said
    assert state(tmp_path / "cohort").counts == {"done": 10, "refused": 4}
    assert digests(tmp_path / "cohort") == digests(undisturbed)
    assert verify(tmp_path / "cohort") == []


def _works(process: psutil.Process) -> bool:
    try:
        return "spawn_main" in " ".join(process.cmdline())
    except psutil.Error:
        return False


def test_what_dies_every_time_is_given_up_and_the_rest_is_done(
    table: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from MedXAILib.cohort import engine

    planned(table, tmp_path, gradient={})
    true, bad = engine.do, read_plan(tmp_path).units()
    victim = [unit.key for unit in bad][4]

    def dies(folder: str, key: str, device: str | None, attempt: int) -> str:
        if key == victim:
            raise RuntimeError(f"broken at attempt {attempt}")
        return true(folder, key, device, attempt)

    monkeypatch.setattr(engine, "do", dies)
    assert compute(tmp_path) == {"done": 4, "refused": 2, "failed": 1}
    known = receipt(tmp_path, victim)
    assert known is not None and known["reason"] == "RuntimeError: broken at attempt 3"
    monkeypatch.undo()
    assert retry(tmp_path) == 3 and compute(tmp_path) == {"done": 1, "refused": 2}


def test_what_fits_nowhere_is_refused_and_the_rest_goes_on(
    table: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []

    def too_large(*given: object) -> None:
        asked.append(given[-1])
        raise mx.errors.OutOfMemory("too large") if given[-1] == "cuda" else mx.MedXAIError("constant")

    planned(table, tmp_path, gradient={})
    monkeypatch.setattr(work, "_explained", too_large)
    assert compute(tmp_path, device="cuda") == {"refused": 7}
    # The damaged one is never asked of a network.
    assert asked == ["cuda", "cpu"] * 6


def test_what_another_program_did_meanwhile_stays(
    table: Path, undisturbed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    unit = list(planned(table, tmp_path, gradient={}).units())[3]
    true = work._explained

    def overtaken(*given: Any) -> Any:
        found = true(*given)
        (tmp_path / RESULTS / unit.key).mkdir(parents=True)
        work.write_receipt(tmp_path, unit, {"status": "done", "digest": "of the other"})
        return found

    monkeypatch.setattr(work, "_explained", overtaken)
    assert work.do(str(tmp_path), unit.key) == "done"
    known = receipt(tmp_path, unit.key)
    assert known is not None and known["digest"] == "of the other"
    assert not list((tmp_path / RESULTS / unit.key).iterdir())


def test_a_scan_by_two_names_is_computed_once(table: Path, tmp_path: Path) -> None:
    one = find_subjects(table)[3]
    plan = make_plan(str(MODEL), "f", {"gradient": {}}, [one, replace(one, uid="again")])
    plan.save(tmp_path)
    assert len(list(plan.units())) == 2 and len(todo(tmp_path)) == 1


def moved(file: Path, seconds: float = 1.0) -> None:
    """Let a file look as if it was written at another time."""
    known = file.stat()
    os.utime(file, ns=(known.st_atime_ns, known.st_mtime_ns + int(seconds * 1e9)))


def test_a_scan_that_was_replaced_is_explained_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    table = scans(tmp_path / "scans", 5)
    planned(table, tmp_path / "cohort", gradient={})
    compute(tmp_path / "cohort")
    before = digests(tmp_path / "cohort")
    assert state(tmp_path / "cohort").replaced == 0
    whole, other = tmp_path / "scans" / "scan-2.nrrd", tmp_path / "scans" / "scan-3.nrrd"
    # One gets the voxels of another in its place, one is copied as it is, one is gone, and the damaged one is mended.
    image, there = sitk.ReadImage(str(whole)), sitk.ReadImage(str(other))
    image.CopyInformation(there)
    sitk.WriteImage(image, str(other))
    moved(other)
    moved(whole)
    (tmp_path / "scans" / "scan-4.nrrd").unlink()
    sitk.WriteImage(there, str(tmp_path / "scans" / "scan-0.nrrd"))
    assert state(tmp_path / "cohort").replaced == 2
    run = mx.Run()
    assert compute(tmp_path / "cohort", run=run) == {"done": 2}
    assert any("2 scans were replaced" in note for note in run.notes)
    after = digests(tmp_path / "cohort")
    units = {unit.subject.uid: unit.key for unit in read_plan(tmp_path / "cohort").units()}
    assert [uid for uid, key in units.items() if after[key] != before[key]] == ["case-0", "case-3"]
    known = receipt(tmp_path / "cohort", units["case-3"])
    assert known is not None and known["volume"] == mx.load_volume(other).fingerprint
    # That which is as it was is read once, and not again.
    work._fingerprint.cache_clear()
    monkeypatch.setattr(work, "load_volume", None)
    assert compute(tmp_path / "cohort") == {} and verify(tmp_path / "cohort") == []
    monkeypatch.undo()
    sitk.WriteImage(there, str(whole))
    assert verify(tmp_path / "cohort") == [units["case-2"]] == todo(tmp_path / "cohort")


def test_scans_with_other_times_are_read_once_and_are_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # As after a copy, on another file system, or where clocks go otherwise.
    table = scans(tmp_path / "scans", 4)
    planned(table, tmp_path / "cohort")
    compute(tmp_path / "cohort")
    for file in (tmp_path / "scans").glob("*.nrrd"):
        moved(file)
    read = []
    monkeypatch.setattr(work, "load_volume", lambda file: read.append(file) or mx.load_volume(file))
    # Neither the damaged one nor the constant one, which were refused, is another now.
    assert state(tmp_path / "cohort").replaced == 0 and compute(tmp_path / "cohort") == {}
    assert len(read) == len(set(read)) == 4


def test_files_of_a_series_are_looked_at_one_by_one(tmp_path: Path) -> None:
    (tmp_path / "ct").mkdir()
    for name in ("a.dcm", "b.dcm"):
        (tmp_path / "ct" / name).write_bytes(b"1234")
    first = work.stamp([str(tmp_path / "ct")])
    assert first == work.stamp([str(tmp_path / "ct")])
    moved(tmp_path / "ct" / "a.dcm")
    second = work.stamp([str(tmp_path / "ct")])
    (tmp_path / "ct" / "b.dcm").rename(tmp_path / "ct" / "c.dcm")
    assert len({first, second, work.stamp([str(tmp_path / "ct")]), None}) == 4
    assert work.stamp([str(tmp_path / "ct"), str(tmp_path / "none")]) is None


def test_a_receipt_that_cannot_be_read_is_as_none(table: Path, undisturbed: Path, tmp_path: Path) -> None:
    shutil.copytree(undisturbed, tmp_path / "cohort")
    files = sorted((tmp_path / "cohort" / RECEIPTS).iterdir())
    for file, text in zip(files, ("", "[1]", "{}", '{"unit": "x", "status": "done"}', "\xff"), strict=False):
        file.write_text(text, encoding="latin-1")
    assert state(tmp_path / "cohort").counts["waiting"] == 5
    assert compute(tmp_path / "cohort").total() == 5 and digests(tmp_path / "cohort") == digests(undisturbed)


def test_everything_refused_is_no_success(tmp_path: Path) -> None:
    table = scans(tmp_path / "scans", 3)
    planned(table, tmp_path / "cohort", gradient={})
    planned_of_bad = make_plan(str(MODEL), mx.load_model(MODEL).fingerprint, {"gradient": {}}, find_subjects(table)[:2])
    planned_of_bad.save(tmp_path / "bad")
    run = CliRunner().invoke
    assert run(app, ["cohort", "run", str(tmp_path / "cohort")]).exit_code == 0
    said = run(app, ["cohort", "run", str(tmp_path / "bad")])
    assert said.exit_code == 4 and "Nothing could be explained" in said.output
    # Nor is it when there is nothing left to do.
    assert run(app, ["cohort", "run", str(tmp_path / "bad")]).exit_code == 4


def test_a_damaged_plan_is_said_to_be(table: Path, tmp_path: Path) -> None:
    text = planned(table, tmp_path).save(tmp_path).read_text(encoding="utf-8")
    said = json.loads(text)
    first = said["subjects"][0]
    wrong = [
        {**said, "subjects": "x"},
        {**said, "subjects": [{**first, "region": "north"}]},
        {**said, "subjects": [{**first, "volume": [1]}]},
        {**said, "methods": ["gradient"]},
        {**said, "seed": "first"},
        {**said, "format": 2},
        [said],
        "plan",
        None,
    ]
    for damaged in ["\xff", text[: len(text) // 2], "", *map(json.dumps, wrong)]:
        (tmp_path / "plan.json").write_text(damaged, encoding="latin-1")
        with pytest.raises(mx.MedXAIError, match=r"plan\.json' is damaged"):
            read_plan(tmp_path)
    (tmp_path / "plan.json").write_text(json.dumps(wrong[1]), encoding="utf-8")
    answer = CliRunner().invoke(app, ["cohort", "status", str(tmp_path)])
    assert answer.exit_code == 1 and "damaged (subjects.0.region: Input should be a valid array)" in answer.output


def test_a_participants_table_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    (tmp_path / "sub-01").mkdir()
    (tmp_path / "sub-01" / "sub-01_T1w.nii").touch()
    (tmp_path / "dataset_description.json").touch()
    for text, said in (
        ("id\tsex\nsub-01\tF\n", "column 'participant_id'"),
        ("participant_id,sex\nsub-01,F\n", "column 'participant_id'"),
        ("participant_id\tsex\nsub-01\tF\tnorth\n", "3 cells and there are 2 columns"),
        ("participant_id\tort\nsub-01\tM\xfcnchen\n", "not a text file in UTF-8"),
    ):
        (tmp_path / "participants.tsv").write_text(text, encoding="latin-1")
        with pytest.raises(mx.MedXAIError, match=f"participants.tsv.*{said}"):
            find_subjects(tmp_path)


_OWN_CODE = """
import torch
import MedXAILib as mx

def make():
    torch.manual_seed(0)
    network = torch.nn.Sequential(torch.nn.AdaptiveAvgPool3d(2), torch.nn.Flatten(), torch.nn.Linear(8, 2))
    return mx.Model(network, task="classification", class_names=("a", "b"), patch_size=(8, 8, 8))
"""


def test_code_that_lies_where_the_plan_was_made_is_found(
    table: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "its_own_network.py").write_text(_OWN_CODE, encoding="utf-8")
    elsewhere = list(sys.path)

    def said(where: Path, *args: object) -> str:
        """What another process says, which knows nothing of this folder but that it stands in `where`."""
        monkeypatch.setattr(sys, "path", list(elsewhere))
        sys.modules.pop("its_own_network", None)
        work._model.cache_clear()
        monkeypatch.chdir(where)
        return CliRunner().invoke(app, ["cohort", *map(str, args)]).output

    folder, model = tmp_path / "cohort", ("--model", "its_own_network:make", "--method", "gradient")
    assert "7 cases" in said(tmp_path, "plan", folder, "--data", table, *model)
    assert read_plan(folder).code == str(tmp_path)
    # The plan may be from a stranger, and so the folder that it names.
    assert "say --trust" in said(tmp_path.parent, "run", folder)
    assert "5 done" in said(tmp_path.parent, "run", folder, "--trust")
    # What is installed is found without.
    assert make_plan("json:loads", "f", METHODS, find_subjects(table)).code is None
    sys.modules.pop("its_own_network", None)


def full(*_: object, **__: object) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def full_by_itk(*_: object, **__: object) -> None:
    """What a full file system of 260 kB made it say."""
    raise RuntimeError(
        "Exception thrown in SimpleITK ImageFileWriter_Execute: itkNrrdImageIO.cxx:1349:\nITK ERROR: NrrdImageIO: "
        "Write: Error writing map.nrrd:\n[nrrd] _nrrdFormatNRRD_write: couldn't write gzip data"
    )


def test_a_full_disk_ends_the_run_and_leaves_nothing_half_done(
    table: Path, undisturbed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    planned(table, tmp_path)
    for module, name, fails in ((os, "fsync", full), (sitk, "WriteImage", full), (sitk, "WriteImage", full_by_itk)):
        monkeypatch.setattr(module, name, fails)
        with pytest.raises(mx.MedXAIError, match=r"No space left|disk is full|couldn't write gzip data"):
            compute(tmp_path)
        monkeypatch.undo()
        assert not [path.name for path in (tmp_path / RECEIPTS).glob(".*")]
    said = compute(tmp_path)
    assert said["failed"] == 0 and digests(tmp_path) == digests(undisturbed) and verify(tmp_path) == []


def test_two_drivers_at_once_do_the_same_as_one(
    table: Path, undisturbed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    planned(table, tmp_path)

    def explained(_plan: object, unit: Unit, *_: object) -> mx.Explanation:
        return mx.load_explanation(undisturbed / RESULTS / unit.key)

    # Two threads in step, whose network is as quick: they meet at every unit.
    monkeypatch.setattr(work, "_explained", explained)
    monkeypatch.setattr(work, "_model", lambda *_: SimpleNamespace(fingerprint=read_plan(tmp_path).fingerprint))
    with ThreadPoolExecutor(2) as both:
        said = list(both.map(compute, [tmp_path, tmp_path]))
    assert all(one["failed"] == 0 for one in said)
    assert state(tmp_path).counts == {"done": 10, "refused": 4}
    assert digests(tmp_path) == digests(undisturbed) and verify(tmp_path) == []
    assert not list((tmp_path / RESULTS).glob(".*"))


def test_a_driver_that_is_a_moment_late_takes_no_harm(
    table: Path, undisturbed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    unit = list(planned(table, tmp_path, gradient={}).units())[3]
    true = work.digest

    def overtaken(place: Path) -> str:
        # The other has put its result there, or is about to, and has not written its receipt yet.
        shutil.copytree(place, tmp_path / RESULTS / unit.key)
        (tmp_path / RESULTS / unit.key / "map.nrrd").write_bytes(b"half")
        return true(place)

    monkeypatch.setattr(work, "digest", overtaken)
    assert work.do(str(tmp_path), unit.key) == "done"
    monkeypatch.undo()
    assert digests(tmp_path)[unit.key] == digests(undisturbed)[unit.key] and verify(tmp_path) == []
    assert [path.name for path in (tmp_path / RESULTS).iterdir()] == [unit.key]
    # What the other has done is not given up, nor refused, by one for which it goes wrong.
    assert engine.given_up(tmp_path, unit, RuntimeError("late")) == "done"
    known = receipt(tmp_path, unit.key)
    assert known is not None and known["status"] == "done"


_TOGETHER = threading.Barrier(2, timeout=20)


def _not_alone(folder: str, key: str, device: str | None, attempt: int) -> str:
    if key != "first":
        _TOGETHER.wait()
    return "done"


def test_workers_that_come_late_are_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from distributed import Client, LocalCluster

    # The first is alone, as there is no worker yet; of the others none goes on before another is there.
    monkeypatch.setattr(engine, "do", _not_alone)
    with (
        LocalCluster(n_workers=1, threads_per_worker=2, processes=False, dashboard_address=None) as cluster,
        Client(cluster) as client,
    ):
        known: list[dict[str, int]] = [{}]
        monkeypatch.setattr(client, "nthreads", lambda: known.pop() if known else {"late": 2})
        assert list(engine._by_dask(client, engine.Explaining(tmp_path), ["first", *"1234"], None)) == ["done"] * 5
        # What Dask keeps for ever does not grow with the cohort.
        assert set(cluster.scheduler.task_prefixes) == {"unit"}
        # What goes wrong later is not blamed on the address.
        with pytest.raises(OSError, match="of its own"), engine._client(0, cluster.scheduler_address):
            raise OSError("of its own")


def test_a_plan_is_not_believed_that_its_model_may_run_code(table: Path, tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    make_plan(str(tmp_path / "model"), "f", {"gradient": {}}, find_subjects(table), trust=True).save(tmp_path)
    with pytest.raises(mx.MedXAIError, match="run code of its own: say --trust"):
        compute(tmp_path)
    with pytest.raises(mx.MedXAIError, match="no MONAI bundle"):
        compute(tmp_path, trust=True)


def test_a_plan_holds_wherever_it_is_computed(table: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(MODEL.parent)
    assert make_plan(MODEL.name, "f", METHODS, find_subjects(table)).model == str(MODEL.resolve())


def test_labels_of_nine_digits_are_counted() -> None:
    # As in the atlas of the Allen Institute; a table of all numbers below it would take five gigabytes.
    labels = torch.tensor([[[0, 614454277], [-7, 614454277]]])
    values = torch.tensor([[[0.1, 0.2], [0.3, 0.4]]], dtype=torch.float64)
    found = sums.by_region(values, labels, {614454277: "Supraoculomotor"})
    assert found == pytest.approx({"outside": 0.1, "Supraoculomotor": 0.6, "label -7": 0.3})


def test_another_plan_and_another_network_are_refused(table: Path, tmp_path: Path) -> None:
    made = planned(table, tmp_path)
    made.save(tmp_path)
    with pytest.raises(mx.MedXAIError, match="holds another plan"):
        planned(table, tmp_path, gradient={})
    other = Plan(**{**vars(made), "fingerprint": "another"})
    (tmp_path / "other").mkdir()
    other.save(tmp_path / "other")
    with pytest.raises(mx.MedXAIError, match="not the network of the plan any more"):
        compute(tmp_path / "other")
    assert not (tmp_path / "other" / RECEIPTS).exists()
    with pytest.raises(mx.MedXAIError, match="2 cases are called"):
        make_plan("m", "f", METHODS, [made.subjects[0]] * 2)
    with pytest.raises(mx.MedXAIError, match="gradcam"):
        make_plan("m", "f", {"gradcamm": {}}, made.subjects)


def test_bids_and_dicom_are_found(tmp_path: Path) -> None:
    bids = tmp_path / "bids"
    for name in (
        "sub-01/anat/sub-01_T1w.nii.gz",
        "sub-02/ses-a/anat/sub-02_ses-a_T1w.nii",
        "sub-01/anat/sub-01_T2w.nii.gz",
    ):
        (bids / name).parent.mkdir(parents=True, exist_ok=True)
        (bids / name).touch()
    (bids / "dataset_description.json").write_text(json.dumps({"Name": "x", "BIDSVersion": "1.10"}), encoding="utf-8")
    (bids / "participants.tsv").write_text(
        "participant_id\tsex\tsite\nsub-01\tF\tnorth\nsub-02\tM\tn/a\n", encoding="utf-8"
    )
    found = {one.uid: one for one in find_subjects(bids, "T1w")}
    assert sorted(found) == ["sub-01_T1w", "sub-02_ses-a_T1w"]
    assert found["sub-01_T1w"].meta == {"sex": "F", "site": "north", "participant": "sub-01", "suffix": "T1w"}
    assert "site" not in found["sub-02_ses-a_T1w"].meta
    assert len(find_subjects(bids)) == 3
    if os.name != "nt":
        # A file that is a link, as DataLad's are, is known by its own name.
        named = bids / "sub-01/anat/sub-01_T2w.nii.gz"
        named.symlink_to(named.rename(tmp_path / "MD5E-s0.nii.gz"))
        assert find_subjects(bids, "T2w")[0].volume == (str(named.parent.resolve() / named.name),)

    from dicom_series import write_series

    volume = mx.Volume(torch.arange(60.0).reshape(1, 3, 4, 5), np.diag([2.0, 1.0, 1.0, 1.0]))
    write_series(volume, tmp_path / "tree" / "p1" / "ct")
    for name in ("p2", "患者", "病人"):
        write_series(volume, tmp_path / "tree" / name)
    assert [one.uid for one in find_subjects(tmp_path / "tree")] == ["p1/ct", "p2", "患者", "病人"]
    with pytest.raises(mx.MedXAIError, match="holds no case"):
        find_subjects(tmp_path / "bids" / "sub-01")


def maps_of(folder: Path, method: str) -> dict[str, mx.SaliencyMap]:
    found = {}
    for unit in read_plan(folder).units():
        if unit.method == method and (folder / RESULTS / unit.key).exists():
            one = mx.load_explanation(folder / RESULTS / unit.key)
            assert isinstance(one, mx.SaliencyMap)
            found[unit.subject.uid] = one
    return found


def test_what_a_cohort_has_in_common(undisturbed: Path) -> None:
    maps = maps_of(undisturbed, "gradient")
    first = next(iter(maps.values()))
    template = mx.Volume(torch.zeros(1, *first.data.shape[1:]), first.affine)
    atlas = torch.zeros(1, *template.shape)
    atlas[:, :, :15] = 1
    atlas[:, :, 15:, :10] = 4
    found = {o.method: o for o in reduce(undisturbed, template, mx.Volume(atlas, first.affine), {1: "front"})}
    overall = found["gradient"]
    assert overall.cases == len(maps) == 5
    # By hand: the scans lie on one grid but for a shift of whole millimetres, which another resampler follows.
    laid = []
    for one in maps.values():
        moved = resample(one.data.abs().double(), one.affine, template.shape, template.affine)[0]
        laid.append(moved / moved.sum())
    stack = torch.stack(laid)
    assert torch.allclose(overall.mean, stack.mean(0), atol=1e-6) and overall.mean.sum() == pytest.approx(1)
    assert torch.allclose(overall.variance, stack.var(0), atol=1e-8)
    for (uid, shares), one in zip(overall.shares.items(), stack, strict=True):
        assert shares["front"] == pytest.approx(float(one[:, :15].sum()), abs=1e-4), uid
        assert shares["label 4"] == pytest.approx(float(one[:, 15:, :10].sum()), abs=1e-4)
        assert sum(shares.values()) == pytest.approx(1)
    rows = {(s.region, s.group): s for s in by_group(overall.shares, read_plan(undisturbed).subjects, ["site"])}
    south = [s["front"] for uid, s in overall.shares.items() if int(uid[-1]) % 2]
    assert rows["front", "south"].mean == pytest.approx(np.mean(south)) and rows["front", "south"].cases == 2
    assert rows["front", "all"].low <= rows["front", "all"].mean <= rows["front", "all"].high


def test_a_case_is_laid_through_its_transform(table: Path, tmp_path: Path) -> None:
    shift = sitk.TranslationTransform(3, (5.0, -3.0, 4.0))
    sitk.WriteTransform(shift, str(tmp_path / "to-scan.tfm"))
    one = find_subjects(table)[3]
    moved = replace(one, transform=str(tmp_path / "to-scan.tfm"))
    make_plan(str(MODEL), mx.load_model(MODEL).fingerprint, {"gradient": {}}, [moved]).save(tmp_path)
    compute(tmp_path)
    (made,) = maps_of(tmp_path, "gradient").values()
    # A template moved against the scan as the transform says sees the map as it is. RAS is LPS with two signs turned.
    affine = made.affine.copy()
    affine[:3, 3] -= [-5.0, 3.0, 4.0]
    (overall,) = reduce(tmp_path, mx.Volume(torch.zeros(1, *made.data.shape[1:]), affine))
    expected = made.data.abs()[0].double()
    assert torch.allclose(overall.mean, expected / expected.sum(), atol=1e-6)


def test_a_transform_that_cannot_be_read_is_named(table: Path, tmp_path: Path) -> None:
    (tmp_path / "bent.tfm").write_text("#Insight Transform File V1.0\n", encoding="utf-8")
    one = replace(find_subjects(table)[3], transform=str(tmp_path / "bent.tfm"))
    make_plan(str(MODEL), mx.load_model(MODEL).fingerprint, {"gradient": {}}, [one]).save(tmp_path)
    compute(tmp_path)
    (made,) = maps_of(tmp_path, "gradient").values()
    with pytest.raises(mx.MedXAIError, match=r"bent\.tfm' cannot be read as a transform"):
        list(reduce(tmp_path, mx.Volume(torch.zeros(1, *made.data.shape[1:]), made.affine)))


def test_the_command_line_goes_all_the_way(table: Path, undisturbed: Path, tmp_path: Path) -> None:
    def medxai(*args: object, code: int = 0) -> str:
        said = CliRunner().invoke(app, ["cohort", *map(str, args)])
        assert said.exit_code == code, said.output
        return said.output

    folder = tmp_path / "cohort"
    methods = ("--method", "gradient", "--method", "hirescam")
    assert "7 cases, 2 methods" in medxai("plan", folder, "--model", "lung_nodule", "--data", table, *methods)
    assert "10 done" in medxai("run", folder) and "done already" in medxai("run", folder, "--shard", "1/3")
    assert digests(folder) == digests(undisturbed)
    told = medxai("status", folder)
    assert "10 done" in told and "case-1, gradient: refused" in told and "constant" in told
    assert "0 results are gone" in medxai("verify", folder) and "4 are tried again" in medxai("retry", folder)
    assert "give a part as I/N" in medxai("run", folder, "--shard", "3/3", code=2)
    medxai("run", folder, "--workers", -1, code=2)
    quoted = tmp_path / "it's $HOME"
    assert "holds no plan" in medxai("slurm", quoted, code=1) and not quoted.exists()
    planned(table, quoted)
    words = shlex.split(medxai("slurm", quoted, "--trust").splitlines()[-1])
    assert words[6] == str(quoted.resolve()) and words[-1] == "--trust"
    script = medxai("slurm", folder, "--jobs", 7)
    assert "--array=0-6" in script and '"$SLURM_ARRAY_TASK_ID/7"' in script
    out = tmp_path / "out"
    medxai("reduce", folder, "--template", read_plan(folder).subjects[2].volume[0], "--by", "site", "--out", out)
    images = ("error.nrrd", "mean.nrrd", "variance.nrrd", "variation.nrrd")
    assert {path.name for path in out.glob("gradient-*")} == {
        f"gradient-{name}" for name in ("cases.csv", "regions.csv", *images)
    }
    assert mx.load_volume(out / "template.nrrd").shape == mx.load_volume(out / "gradient-mean.nrrd").shape
