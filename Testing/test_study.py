"""Reader studies: who sees what is balanced and reproducible, no answer is lost, and what is said of the arms is so."""

from __future__ import annotations

import csv
import errno
import json
import os
import random
import re
import subprocess
import sys
from collections import Counter
from datetime import datetime, timedelta, timezone
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from scipy.stats import mannwhitneyu
from sklearn.metrics import roc_auc_score
from typer.testing import CliRunner

import MedXAILib as mx
from MedXAILib.cli import app
from MedXAILib.study.allocation import imbalances, table, trials, williams
from MedXAILib.study.design import Study, read_study
from MedXAILib.study.journal import Journal
from MedXAILib.study.results import Reading, _auc, alpha, readings, summary, write

ARMS = ("none", "ai", "ai+map", "ai+placebo")


def study(folder: Path, cases: int = 24, practice: int = 2, **changed: Any) -> Study:
    """A third of the cases have something, and the network is wrong about a quarter of each kind."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "scan.nrrd").touch()
    for name in ("made", "of-another"):
        (folder / name).mkdir(exist_ok=True)
    design = {
        "name": "nodules",
        "question": "Is it malignant?",
        "answers": ["benign", "malignant"],
        "arms": ARMS,
        "readers": ["r1", "r2", "r3", "r4"],
        "cases": "cases.csv",
        **changed,
    }
    (folder / "design.json").write_text(json.dumps(design), encoding="utf-8")
    with (folder / "cases.csv").open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["uid", "volume", "truth", "answer", "training", "map", "placebo"])
        for i in range(cases + practice):
            truth = i % 3 == 0
            said = truth != (i % 12 in (0, 5, 7))
            names = [("benign", "malignant")[yes] for yes in (truth, said)]
            writer.writerow([f"case-{i:02d}", "scan.nrrd", *names, "yes" if i >= cases else "", "made", "of-another"])
    return read_study(folder / "design.json")


@pytest.mark.parametrize("count", range(2, 8))
def test_every_arm_is_in_every_place_and_after_every_other_as_often(count: int) -> None:
    rows = williams(count)
    times = len(rows) // count
    assert all(sorted(row) == list(range(count)) for row in rows)
    for place in zip(*rows, strict=True):
        assert Counter(place) == dict.fromkeys(range(count), times)
    followed = Counter(pair for row in rows for pair in pairwise(row))
    assert followed == {(a, b): times for a in range(count) for b in range(count) if a != b}


def test_in_a_crossover_everybody_sees_everything_in_every_arm(tmp_path: Path) -> None:
    made = study(tmp_path)
    for reader in made.design.readers:
        seen = trials(made, reader)
        assert [t.index for t in seen] == list(range(2 + 24 * 4))
        assert [t.case.training for t in seen] == [True] * 2 + [False] * 96
        assert Counter((t.arm, t.case.uid) for t in seen[2:]) == {(a, c.uid): 1 for a in ARMS for c in made.cases}
        assert len({(t.session, t.arm) for t in seen[2:]}) == 4
        sessions = [[t.case.uid for t in seen if t.session == s] for s in range(1, 5)]
        assert len({tuple(order) for order in sessions}) == 4
    assert len({tuple(t.case.uid for t in trials(made, r)) for r in made.design.readers}) == 4


@pytest.mark.parametrize("cases", [24, 23, 25])
def test_in_a_split_arms_are_alike_for_readers_cases_and_strata(tmp_path: Path, cases: int) -> None:
    made = study(tmp_path, cases, kind="split")
    of_case: dict[str, list[str]] = {}
    for reader in made.design.readers:
        seen = [t for t in trials(made, reader) if t.session]
        assert sorted(t.case.uid for t in seen) == sorted(c.uid for c in made.cases)
        for chosen in ({c.stratum for c in made.cases}, *({s} for s in {c.stratum for c in made.cases})):
            counts = Counter(t.arm for t in seen if t.case.stratum in chosen)
            assert max(counts.values()) - min(counts[a] for a in ARMS) <= 1
        # No arm comes late: of as many trials in a row as there are arms, from the first on, each has one.
        assert all(len({t.arm for t in seen[i : i + 4]}) == 4 for i in range(0, len(seen) - 3, 4))
        for t in seen:
            of_case.setdefault(t.case.uid, []).append(t.arm)
    assert all(sorted(arms) == sorted(ARMS) for arms in of_case.values())


def test_the_order_follows_from_the_seed_alone(tmp_path: Path) -> None:
    # Fixed: another order on another machine, or in another version, would spoil a study that is under way.
    first = trials(study(tmp_path / "a"), "r2")[2:6]
    assert [(t.arm, t.case.uid) for t in first] == GOLDEN
    assert table(study(tmp_path / "a")) == table(study(tmp_path / "b"))
    assert table(study(tmp_path / "a")) != table(study(tmp_path / "c", seed=1))


GOLDEN = [("ai", "case-12"), ("ai", "case-07"), ("ai", "case-14"), ("ai", "case-22")]


@pytest.mark.parametrize(
    ("changed", "says"),
    [
        ({"arms": ["none", "ai+heat"]}, "part of the arm 'ai\\+heat'"),
        ({"arms": ["none", "none"]}, "'none' is twice among the arms"),
        ({"readers": ["Jane Doe"]}, "readers.0"),
        ({"readers": ["r1", "R1"]}, "'r1' is twice among the readers"),
        ({"answers": ["benign", "cancer"]}, r"Row \d+ .*column 'truth'.*malignant"),
        ({"arms": ["ai+text"]}, "column 'text': it is empty, and an arm shows it"),
        ({"wrong": 0.5}, "wrong about 25% of the cases"),
        ({"wahsout_days": 3}, "wahsout_days"),
    ],
)
def test_a_design_that_cannot_be_is_refused(tmp_path: Path, changed: dict[str, Any], says: str) -> None:
    with pytest.raises(mx.MedXAIError, match=says):
        study(tmp_path, **changed)


@pytest.mark.parametrize(
    ("changed", "says"),
    [
        ({}, []),
        ({"arms": ARMS[:3]}, ["4 readers are no multiple of 6: orders of the arms"]),
        ({"readers": ["r1", "r2", "r3", "r4", "r5", "r6"]}, ["6 readers are no multiple of 4: orders of the arms"]),
        ({"arms": ["ai"], "readers": ["r1", "r2", "r3"]}, []),
        ({"kind": "split", "cases": 48}, []),
        (
            {"kind": "split", "cases": 48, "readers": ["r1", "r2"]},
            ["2 readers are no multiple of 4: cases are not seen"],
        ),
        # Of 12 cases the network is wrong about 2 of those that have nothing, and 1 of those that have something.
        (
            {"kind": "split", "cases": 12},
            ["2 'benign' .* is wrong", "1 'malignant' .* is wrong", "3 'malignant' .* right"],
        ),
    ],
)
def test_what_is_not_balanced_is_told(tmp_path: Path, changed: dict[str, Any], says: list[str]) -> None:
    made = study(tmp_path, **changed)
    found = imbalances(made)
    assert len(found) == len(says) and all(re.search(*pair) for pair in zip(says, found, strict=True)), found
    # Counted: is every arm read in every place (in a crossover), and every case seen in every arm, equally often?
    seen = [(t.session, t.arm, t.case.uid) for r in made.design.readers for t in trials(made, r) if t.session]
    arms = made.design.arms
    if made.design.kind == "crossover":
        counts = Counter((session, arm) for session, arm, _ in seen)
        pairs = {(session, arm) for session in range(1, len(arms) + 1) for arm in arms}
    else:
        counts = Counter((case, arm) for _, arm, case in seen)
        pairs = {(case.uid, arm) for case in made.cases for arm in arms}
    even = set(counts) == pairs and len(set(counts.values())) == 1
    assert even == ("no multiple" not in str(found))
    told = CliRunner().invoke(app, ["study", "order", str(made.path), "--out", str(tmp_path / "order.csv")])
    assert told.exit_code == 0 and [line for line in told.stderr.splitlines() if "Not balanced: " in line] == [
        f"Not balanced: {sentence}" for sentence in found
    ]


def test_a_placebo_is_of_another_scan(tmp_path: Path) -> None:
    study(tmp_path)
    for folder, scan in (("made", "a"), ("of-another", "b")):
        made = json.dumps({"provenance": {"volume": {"fingerprint": scan}}})
        (tmp_path / folder / "explanation.json").write_text(made, encoding="utf-8")
    read_study(tmp_path / "design.json")
    # A copy of the map, and the map itself.
    (tmp_path / "of-another" / "explanation.json").write_text(
        (tmp_path / "made" / "explanation.json").read_text(encoding="utf-8"), encoding="utf-8"
    )
    with pytest.raises(mx.MedXAIError, match=r"Row 2 .* 'placebo': it is of the same scan as the map"):
        read_study(tmp_path / "design.json")
    table_ = tmp_path / "cases.csv"
    table_.write_text(table_.read_text(encoding="utf-8").replace("of-another", "made"), encoding="utf-8")
    (tmp_path / "made" / "explanation.json").unlink()
    with pytest.raises(mx.MedXAIError, match="it is of the same scan as the map"):
        read_study(tmp_path / "design.json")


def answer_all(journal: Journal, limit: int = 10_000) -> None:
    while (trial := journal.next()) is not None and trial.index < limit:
        journal.begin(trial)
        journal.answer(trial, trial.case.answer, 80, 3.5)


def test_sessions_are_kept_apart(tmp_path: Path) -> None:
    made, time = study(tmp_path, washout_days=14), datetime(2026, 1, 1, 12, tzinfo=timezone.utc)
    journal = Journal(made, "r1", tmp_path, lambda: time)
    with pytest.raises(mx.MedXAIError, match="Session 2 of r1 begins on 15 January 2026 at 12:00"):
        answer_all(journal)
    assert len(journal.answered) == 26
    again = Journal(made, "r1", tmp_path, lambda: time + timedelta(days=14))
    trial = again.next()
    assert trial is not None and (trial.index, trial.session) == (26, 2)


def test_wherever_a_journal_is_cut_off_only_the_last_line_is_lost(tmp_path: Path) -> None:
    made = study(tmp_path, kind="split")
    answer_all(Journal(made, "r1", tmp_path), 5)
    whole = (tmp_path / "r1.jsonl").read_bytes()
    lines = whole.split(b"\n")[:-1]
    ends = np.cumsum([len(line) + 1 for line in lines])
    for cut in random.Random(0).sample(range(len(lines[0]) + 1, len(whole) + 1), 60):
        (tmp_path / "r1.jsonl").write_bytes(whole[:cut])
        journal = Journal(made, "r1", tmp_path)
        # The line break alone may be missing.
        assert len(journal.events) == int((ends - 1 <= cut).sum())
        answer_all(journal, 5)
        assert sorted(Journal(made, "r1", tmp_path).answered) == [0, 1, 2, 3, 4]


def test_what_a_full_disk_took_after_all_is_gone_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Some disks say that they are full only when the whole line was handed over."""

    def full(_file: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    made = study(tmp_path, kind="split")
    journal = Journal(made, "r1", tmp_path)
    trial = journal.trials[0]
    with monkeypatch.context() as patched:
        patched.setattr(os, "fsync", full)
        with pytest.raises(mx.MedXAIError, match=r"No space left on device.*: nothing was answered"):
            journal.answer(trial, "benign", 50, 1)
    assert journal.answered == {} == Journal(made, "r1", tmp_path).answered
    journal.answer(trial, "malignant", 60, 2)
    assert Journal(made, "r1", tmp_path).answered[0]["answer"] == "malignant"


def test_a_changed_journal_and_another_design_are_refused(tmp_path: Path) -> None:
    made = study(tmp_path, kind="split")
    answer_all(Journal(made, "r1", tmp_path), 5)
    path = tmp_path / "r1.jsonl"
    whole = path.read_text(encoding="utf-8")
    path.write_text(whole.replace('"confidence": 80', '"confidence": 99', 1), encoding="utf-8")
    with pytest.raises(mx.MedXAIError, match=r"Line 4 .* does not follow"):
        Journal(made, "r1", tmp_path)
    path.write_text(f"{whole}5\n", encoding="utf-8")
    with pytest.raises(mx.MedXAIError, match=r"Line \d+ .* does not follow"):
        Journal(made, "r1", tmp_path)
    path.write_text(whole, encoding="utf-8")
    with pytest.raises(mx.MedXAIError, match="begun with another design"):
        Journal(study(tmp_path, kind="split", seed=1), "r1", tmp_path)
    journal = Journal(study(tmp_path, kind="split"), "r1", tmp_path)
    with pytest.raises(mx.MedXAIError, match="answered already"):
        journal.answer(journal.trials[0], "benign", 50, 1)
    with pytest.raises(mx.MedXAIError, match="'maybe' is no answer"):
        journal.answer(journal.trials[5], "maybe", 50, 1)


def test_of_two_programs_at_once_one_is_refused_and_nothing_is_lost(tmp_path: Path) -> None:
    made = study(tmp_path, kind="split")
    first, second = (Journal(made, "r1", tmp_path) for _ in range(2))
    answer_all(first, 3)
    with pytest.raises(mx.MedXAIError, match="Another program writes"):
        second.begin(second.trials[0])
    answer_all(first, 7)
    assert sorted(Journal(made, "r1", tmp_path).answered) == [0, 1, 2, 3, 4, 5, 6]


def test_the_journal_of_another_reader_is_refused(tmp_path: Path) -> None:
    made = study(tmp_path, kind="split")
    answer_all(Journal(made, "r1", tmp_path), 5)
    (tmp_path / "r1.jsonl").rename(tmp_path / "r2.jsonl")
    with pytest.raises(mx.MedXAIError, match="is the journal of 'r1'"):
        Journal(made, "r2", tmp_path)
    with pytest.raises(mx.MedXAIError, match="is the journal of 'r1'"):
        readings(made, tmp_path)


def test_a_design_may_be_written_in_notepad(tmp_path: Path) -> None:
    made = study(tmp_path)
    made.path.write_text(made.path.read_text(encoding="utf-8"), encoding="utf-8-sig")
    assert read_study(made.path).fingerprint == made.fingerprint


_READER = """
import sys
from MedXAILib.study.design import read_study
from MedXAILib.study.journal import Journal
journal = Journal(read_study(sys.argv[1]), "r3", sys.argv[2])
while (trial := journal.next()) is not None:
    journal.begin(trial)
    journal.answer(trial, "benign", 50, 1.0)
    print(trial.index, flush=True)
"""


def test_a_killed_program_loses_no_answer(tmp_path: Path) -> None:
    made = study(tmp_path, kind="split", cases=120)
    acknowledged: list[int] = []
    for kill in (3, 40, 17):
        args = [sys.executable, "-c", _READER, str(made.path), str(tmp_path / "results")]
        with subprocess.Popen(args, stdout=subprocess.PIPE, text=True) as process:
            assert process.stdout is not None
            for _ in range(kill):
                acknowledged.append(int(process.stdout.readline()))
            process.kill()
            acknowledged += [int(line) for line in process.stdout]
        answered = Journal(made, "r3", tmp_path / "results").answered
        assert set(acknowledged) <= set(answered) and len(answered) - len(acknowledged) <= 1 + kill
        assert sorted(answered) == list(range(len(answered)))
        acknowledged = sorted(answered)


def test_krippendorff_s_own_example() -> None:
    # Krippendorff, Computing Krippendorff's alpha-reliability, 2011, section C: nominal data, four observers, missing
    # values: 0.743.
    answers = [
        "1 2 3 3 2 1 4 1 2 . . .",
        "1 2 3 3 2 2 4 1 2 5 . 3",
        ". 3 3 3 2 3 4 2 2 5 1 .",
        "1 2 3 3 2 4 4 1 2 5 1 .",
    ]
    units = [[a for a in unit if a != "."] for unit in zip(*(line.split() for line in answers), strict=True)]
    assert alpha(units) == pytest.approx(0.743, abs=5e-4)
    assert alpha([["a", "a"], ["b", "b"]]) == 1 and np.isnan(alpha([["a", "a"]]))


def area(rows: list[Reading], reader: str) -> float:
    """Of a reader's answers, by another library."""
    own = [r for r in rows if r.reader == reader]
    signed = [r.confidence if r.answer == "malignant" else -r.confidence for r in own]
    return float(roc_auc_score([r.truth == "malignant" for r in own], signed))


@pytest.mark.parametrize("seed", range(5))
def test_areas_of_readers_who_were_drawn_count_by_how_often_and_by_how_much_they_read(seed: int) -> None:
    """In a bootstrap answers count 0, 1, 2 ... times. Ratings are tied, and readers read unequally many cases."""
    random_ = np.random.default_rng(seed)
    rows = [
        SimpleNamespace(reader=reader, truth=("benign", "malignant")[i % 3 == 0], rating=float(rating))
        for reader, count in (("r1", 9), ("r2", 20), ("r3", 30))
        for i, rating in enumerate(random_.integers(-3, 4, count))
    ]
    weights = random_.integers(0, 3, len(rows)).astype(float)
    areas, much = [], []
    for reader in ("r1", "r2", "r3"):
        own = [i for i, row in enumerate(rows) if row.reader == reader]
        truth, ratings = [rows[i].truth == "malignant" for i in own], [rows[i].rating for i in own]
        areas.append(roc_auc_score(truth, ratings, sample_weight=weights[own]))
        much.append(weights[own].sum())
    assert _auc(rows, weights, "malignant") == pytest.approx(np.dot(areas, much) / np.sum(much))
    # Who saw none that had something, as drawn, says nothing.
    weights[:9] = [0, 1, 1] * 3
    assert _auc(rows, weights, "malignant") == pytest.approx(np.dot(areas[1:], much[1:]) / np.sum(much[1:]))


def test_what_is_said_of_an_arm_is_so(tmp_path: Path) -> None:
    made = study(tmp_path, kind="split", cases=48)
    draw = random.Random(3)
    for reader in made.design.readers:
        journal = Journal(made, reader, tmp_path)
        while (trial := journal.next()) is not None:
            journal.begin(trial)
            journal.write("look", trial=trial.index, what="map", on=True)
            # In "ai" readers do what the network says; else they are right in three of four cases.
            right = draw.random() < 0.75
            other = {"benign": "malignant", "malignant": "benign"}
            own = trial.case.truth if right else other[trial.case.truth]
            told = trial.case.answer if trial.arm == "ai" else own
            journal.answer(trial, told, draw.randint(0, 100), 5.0, (1.0, 2.0, 3.0))
    found = readings(made, tmp_path)
    assert len(found) == 4 * 48 and all(r.looks == 1 and (r.x, r.y, r.z) == (1, 2, 3) for r in found)
    said = summary(made, found, draws=200)
    for arm in ARMS:
        rows = [r for r in found if r.arm == arm]
        accuracy = said[arm]["accuracy"]
        assert accuracy.value == pytest.approx(np.mean([r.answer == r.truth for r in rows]))
        assert accuracy.low <= accuracy.value <= accuracy.high
        # Everybody reads 12 of 48 in every arm.
        assert said[arm]["AUC"].value == pytest.approx(np.mean([area(rows, r) for r in made.design.readers]))
        assert said[arm]["AUC"].low <= said[arm]["AUC"].value <= said[arm]["AUC"].high
        difference = said[arm]["accuracy beyond none"].value
        assert difference == pytest.approx(accuracy.value - said["none"]["accuracy"].value)
    assert (said["ai"]["over-reliance"].value, said["ai"]["under-reliance"].value) == (1, 0)
    assert said["ai"]["agreement"].value != said["ai"]["agreement"].value  # Nobody else saw a case in this arm.
    assert "over-reliance" not in said["none"]
    assert said["ai"]["accuracy"].value == pytest.approx(0.75, abs=0.05)

    write(made, found, tmp_path / "out")
    with (tmp_path / "out" / "imrmc.csv").open(encoding="utf-8") as file:
        head, *lines = csv.reader(file)
    assert head == ["readerID", "caseID", "modalityID", "score"]
    assert [line for line in lines if line[0] == "truth"] == [
        ["truth", c.uid, "truth", str(int(c.truth == "malignant"))] for c in made.cases
    ]
    assert len(lines) == 48 + 4 * 48
    # As the programs for it count: of each reader and arm, how often a diseased case is rated above another one.
    truth = {case: int(score) for reader, case, _, score in lines if reader == "truth"}
    for reader in made.design.readers:
        for arm in ARMS:
            scores: tuple[list[float], list[float]] = ([], [])
            for _, case, _, score in (line for line in lines if (line[0], line[2]) == (reader, arm)):
                scores[truth[case]].append(float(score))
            u = mannwhitneyu(scores[1], scores[0]).statistic
            assert u / (len(scores[0]) * len(scores[1])) == pytest.approx(
                area([r for r in found if r.arm == arm], reader)
            )
    told = CliRunner().invoke(app, ["study", "results", str(made.path), str(tmp_path), "--out", str(tmp_path / "cli")])
    assert told.exit_code == 0 and "ai+placebo" in told.output and "Not balanced" not in told.output
    assert (tmp_path / "cli" / "imrmc.csv").read_bytes() == (tmp_path / "out" / "imrmc.csv").read_bytes()
    # A reader who gave up.
    path = tmp_path / "r3.jsonl"
    path.write_bytes(b"".join(path.read_bytes().splitlines(keepends=True)[:-60]))
    told = CliRunner().invoke(app, ["study", "results", str(made.path), str(tmp_path), "--out", str(tmp_path / "cli")])
    assert "Not balanced: 'r3' has answered 28 of 48 trials." in told.stderr
    args = ["study", "order", str(made.path), "--out", str(tmp_path / "order.csv")]
    told = CliRunner().invoke(app, args)
    assert told.exit_code == 0 and "4 readers, 48 cases, 200 trials" in told.output
    assert len((tmp_path / "order.csv").read_text(encoding="utf-8").splitlines()) == 201
    with (tmp_path / "out" / "columns.csv").open(encoding="utf-8") as file:
        meant = [name for name, _ in list(csv.reader(file))[1:]]
    with (tmp_path / "out" / "readings.csv").open(encoding="utf-8") as file:
        assert next(csv.reader(file)) == meant
