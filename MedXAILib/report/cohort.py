"""The page of a cohort: what was planned and done, what the maps have in common, and what else was told, in numbers
with their intervals. It is made of the folder of the plan and of the one that `medxai cohort reduce` wrote."""

from __future__ import annotations

import csv
import json
import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from itertools import groupby
from pathlib import Path
from typing import Any

from MedXAILib.cohort.plan import Plan, read_plan
from MedXAILib.cohort.work import RESULTS, receipt
from MedXAILib.errors import MedXAIError
from MedXAILib.explanation import MANIFEST, Provenance, SaliencyMap
from MedXAILib.placeless import placeless
from MedXAILib.report.case import PAGE
from MedXAILib.report.evaluation import reasons
from MedXAILib.report.methods import question, title
from MedXAILib.report.montage import montage
from MedXAILib.report.page import RESEARCH_ONLY, document, image, listed, origin
from MedXAILib.report.plot import ABOVE, BELOW, ROW, STYLE, Axis, beside, figure
from MedXAILib.volume import load_volume

_STATUSES = ("done", "refused", "failed", "waiting")
_MEANS = ["group", "cases", "mean", "low", "high"]
# Names in a plot, rows of a table, and letters of a name; the files have all.
_MOST, _ROWS, _LETTERS = 15, 60, 34
_DISCOVERY = 0.05
_TYPICAL = "In this order: the mean is the share of all that counts that a case shows, with those before it."
# Pixels of a plane.
_SIZE = 280


@dataclass(frozen=True)
class Table:
    """`<method>-<name>.csv`: its first column is `what`, and those from the second on may be `_MEANS`."""

    file: str
    name: str
    heads: list[str]
    rows: list[dict[str, str]]

    @property
    def what(self) -> str:
        return self.heads[0]

    @property
    def of_means(self) -> bool:
        return self.heads[1:6] == _MEANS


def write_page(folder: str | Path, result: str | Path) -> Path:
    """Write the page of the cohort in `folder`, reduced to `result`, into the latter.

    Raises:
        MedXAIError: when there is no plan, or nothing that was reduced.
    """
    written = Path(result) / PAGE
    written.write_text(page(folder, result), encoding="utf-8")
    return written


def page(folder: str | Path, result: str | Path) -> str:
    """The HTML page, UTF-8."""
    folder, result = Path(folder), Path(result)
    plan = read_plan(folder)
    receipts = [receipt(folder, unit.key) or {"status": "waiting", **_asked(unit)} for unit in plan.units()]
    tables = {method: list(_tables(result, method)) for method in plan.methods}
    if not any(tables.values()):
        raise MedXAIError(f"'{result}' holds no table of this cohort: 'medxai cohort reduce' writes them.")
    name, caution = _network(plan)
    many = len(plan.subjects)
    parts = [
        "<h1>What does the network go by in general?</h1>",
        f"<p class=lead>{escape(name)}, asked about {many} case{'s' * (many != 1)}.</p>",
        f"<p class=warning>{RESEARCH_ONLY} {escape(caution)}</p>",
        _done(plan, receipts),
        *(_method(folder, result, method, receipts, tables[method]) for method in plan.methods),
        _troubles(plan, receipts, tables),
        _reading(),
        _provenance(plan, receipts),
    ]
    return document(f"A cohort: {name}", parts, STYLE + _STYLE)


def _asked(unit: Any) -> dict[str, str]:
    return {"case": unit.subject.uid, "method": unit.method, "unit": unit.key}


def _network(plan: Plan) -> tuple[str, str]:
    """What the network is called, and what its maker says that everybody must know."""
    try:
        about = json.loads((Path(plan.model) / "configs" / "metadata.json").read_text(encoding="utf-8"))
    except OSError:
        return Path(plan.model).name, ""
    said = (about.get(key, "") for key in ("description", "intended_use"))
    return about.get("name") or Path(plan.model).name, " ".join(filter(None, said))


def _done(plan: Plan, receipts: Sequence[Mapping[str, Any]]) -> str:
    counts = {method: Counter(one["status"] for one in receipts if one["method"] == method) for method in plan.methods}
    rows = "".join(
        f"<tr><th>{escape(title(method))}</th>{''.join(f'<td class=number>{of[each]}</td>' for each in _STATUSES)}</tr>"
        for method, of in counts.items()
    )
    heads = "".join(f"<th>{head}</th>" for head in ("", *_STATUSES))
    left = sum(of["waiting"] for of in counts.values())
    waits = f"<p class=warning><strong>{left} of {len(receipts)} explanations are still to do.</strong></p>"
    return f"<h2>What was done</h2>{waits * bool(left)}<table><tr>{heads}</tr>{rows}</table>"


def _method(
    folder: Path, result: Path, method: str, receipts: Sequence[Mapping[str, Any]], tables: Sequence[Table]
) -> str:
    parts = [f"<h2>{escape(title(method))}</h2><p>{escape(question(method))}</p>"]
    parts += [f"<figure>{image(picture, of)}</figure>" for of, picture in _maps(folder, result, method, receipts)]
    for table in tables:
        if table.name == "differences":
            parts.append(_differences(table))
        elif table.name == "typical":
            parts.append(f"<h3>Cases to look at</h3><p>{_TYPICAL}</p>{_rows(table)}")
        elif table.of_means:
            plots = [_forest(table, *each) for each in _by_target(table)]
            parts.append(f"<div class=plots>{''.join(plots)}</div>{_folded(table)}")
    return "".join(parts) if tables else ""


def _maps(folder: Path, result: Path, method: str, receipts: Sequence[Mapping[str, Any]]) -> Iterator[tuple[str, Any]]:
    """The mean of the maps and their variance, over the template."""
    template, done = result / "template.nrrd", [one for one in receipts if one["method"] == method and "digest" in one]
    if not done or not template.exists() or not (result / f"{method}-mean.nrrd").exists():
        return
    one = json.loads((folder / RESULTS / done[0]["unit"] / MANIFEST).read_text(encoding="utf-8"))
    made = Provenance(**one["provenance"]).model_copy(update={"region": None, "partial": False})
    scan = load_volume(template)
    for what, bright in {"mean": "share of map", "variance": "cases differ"}.items():
        values = load_volume(result / f"{method}-{what}.nrrd")
        of = f"{title(method)}: {what} of the maps"
        heat = SaliencyMap(made, {}, values.data, values.affine, signed=False)
        yield of, montage(scan, heat, title=of, size=_SIZE, bright=bright)


def _tables(result: Path, method: str) -> Iterator[Table]:
    # What groups differ in comes after what they have.
    for path in sorted(result.glob(f"{method}-*.csv"), key=lambda path: (path.stem.endswith("differences"), path.stem)):
        with path.open(encoding="utf-8-sig", newline="") as file:
            reader = csv.DictReader(file, restval="")
            rows = list(reader)
        yield Table(path.name, path.stem.removeprefix(f"{method}-"), list(reader.fieldnames or [""]), rows)


def _by_target(table: Table) -> Iterator[tuple[str, list[dict[str, str]]]]:
    """The rows of means about each target, those of one name beside each other, the strongest over all cases first."""
    of_target = groupby(
        sorted(table.rows, key=lambda row: row.get("target") or ""), key=lambda row: row.get("target") or ""
    )
    for target, rows in of_target:
        by_name: dict[str, list[dict[str, str]]] = {}
        for row in rows:
            by_name.setdefault(row[table.what], []).append(row)
        ranked = sorted(by_name.values(), key=lambda of: -abs(_number(of[0]["mean"]) or 0.0))
        yield target, [row for of in ranked[:_MOST] for row in of]


def _forest(table: Table, target: str, rows: Sequence[dict[str, str]]) -> str:
    """Means with their intervals on one axis: over all cases, and below it over each group."""
    shown = [row for row in rows if _number(row["mean"]) is not None]
    if not shown:
        return ""
    ends = [_number(row[end]) for row in shown for end in ("mean", "low", "high")]
    axis, bottom = Axis.over([0.0, *(end for end in ends if end is not None)]), ABOVE + len(shown) * ROW
    drawn = axis.drawn(len(shown))
    drawn.append(f'<path class=blind d="M{axis.at(0):.1f} {ABOVE - 4}V{bottom}"/>')
    for i, row in enumerate(shown):
        mean, low, high = (_number(row[end]) for end in ("mean", "low", "high"))
        assert mean is not None
        whole = row["group"] == "all" and not row.get("by")
        name = row[table.what] if whole else f"{row.get('by') or ''} {row['group']}".strip()
        said = f"{mean:.3g} ({row['cases']})"
        tip = f"{row[table.what]}, {name}: {said}" + (
            "" if low is None or high is None else f", {low:.3g} to {high:.3g}"
        )
        drawn.append(axis.dot(i, mean, None if low is None or high is None else (low, high), tip))
        drawn.append(beside(i, name if len(name) <= _LETTERS else name[: _LETTERS - 2] + " …", said))
    names = len(dict.fromkeys(row[table.what] for row in rows))
    of = "the strongest" if names == _MOST else "all"
    says = f"{of} {names}, with 95 % intervals and the number of cases" + (f": about {target}" if target else "")
    return figure(_capital(table.name), says, drawn, bottom + BELOW)


def _differences(table: Table) -> str:
    """Which groups differ, by the q-values, the smallest first."""
    ranked = sorted(table.rows, key=lambda row: q if (q := _number(row.get("q", ""))) is not None else math.inf)
    known = [q for row in ranked if (q := _number(row.get("q", ""))) is not None]
    found = sum(q < _DISCOVERY for q in known)
    said = f"{found} of {len(known)} comparisons have a q below {_DISCOVERY:g}"
    said += f": of such, about {_DISCOVERY:.0%} or fewer are chance." if found else "."
    return (
        f"<h3>Differences between groups</h3><p>{said}</p>{_rows(Table(table.file, table.name, table.heads, ranked))}"
    )


def _folded(table: Table) -> str:
    return f"<details><summary>{_capital(table.name)} in numbers</summary>{_rows(table)}</details>"


def _rows(table: Table) -> str:
    heads = [head for head in table.heads if any(row[head] for row in table.rows)]
    head = "".join(f"<td>{escape(each)}</td>" for each in heads)
    body = "".join(f"<tr>{''.join(_cell(row[each]) for each in heads)}</tr>" for row in table.rows[:_ROWS])
    more = len(table.rows) - _ROWS
    rest = f"<p>{more} more rows are in {escape(table.file)}.</p>" if more > 0 else ""
    return f"<div class=wide><table><tr class=head>{head}</tr>{body}</table></div>{rest}"


def _cell(said: str) -> str:
    number = _number(said)
    return f"<td>{escape(said)}</td>" if number is None else f"<td class=number>{number:.3g}</td>"


def _number(said: str) -> float | None:
    try:
        number = float(said)
    except ValueError:
        return None
    return number if math.isfinite(number) else None


def _capital(name: str) -> str:
    return escape(name[:1].upper() + name[1:].replace("-", " "))


def _troubles(plan: Plan, receipts: Sequence[Mapping[str, Any]], tables: Mapping[str, Sequence[Table]]) -> str:
    files = {one.uid: one.volume for one in plan.subjects}
    each = [
        (f"{one['status']}: {_short(one['reason'], files[one['case']])}", one["method"], one["case"])
        for one in receipts
        if one["status"] in ("refused", "failed")
    ]
    each += [
        (f"left out: {_short(row['reason'], files.get(row['case'], ()))}", method, row["case"])
        for method, of in tables.items()
        for table in of
        if table.name == "left-out"
        for row in table.rows
    ]
    return reasons("What is missing, and why", each, dict.fromkeys(plan.methods, plan.subjects))


def _short(reason: str, files: Sequence[str]) -> str:
    """Without the folders in which the scan's `files` are."""
    for file in files:
        reason = reason.replace(file, Path(file).name)
    return reason


def _reading() -> str:
    lines = [
        "Each map counts alike, whatever its brightness: it was made absolute and brought to sum to one. The mean says "
        "where the answers rest; bright in the picture of the variance is where cases differ. Both lie on the "
        "template, whose anatomy is not that of each case.",
        "A dot is the mean over cases, the whisker its 95 % interval. Where whiskers overlap much, these cases do not "
        "tell what is more. The number in brackets is that of the cases.",
        "A share of a region says nothing without its size: a large one gathers more of any map.",
        "Groups can differ because of who is in them. A difference between sites is no proof that the network goes by "
        "the site.",
        "All of this is about what one network says of these cases. It can be wrong in all of them alike.",
    ]
    return f"<h2>How to read it</h2>{listed(lines)}"


def _provenance(plan: Plan, receipts: Sequence[Mapping[str, Any]]) -> str:
    done = [one for one in receipts if one["status"] == "done"]
    versions = {f"{name} {version}" for one in done for name, version in one.get("versions", {}).items()}
    columns, methods = dict.fromkeys(name for one in plan.subjects for name in one.meta), plan.methods.items()
    rows = {
        "network": placeless(plan.model),
        "fingerprint": plan.fingerprint,
        "seed": plan.seed,
        **{f"method: {title(method)}": json.dumps({"id": method, **placeless(given)}) for method, given in methods},
        "cases": ", ".join(one.uid for one in plan.subjects),
        "known of cases": ", ".join(columns),
        "versions": ", ".join(sorted(versions)),
        "devices": ", ".join(sorted({str(one["device"]) for one in done})),
        "seconds of computing": f"{sum(one['seconds'] for one in done):.0f}",
    }
    return origin((name, value) for name, value in rows.items() if value != "")


_STYLE = """
h3 { margin: 1rem 0 .3rem; font-size: 1.05rem; } img { max-width: 1000px; }
.head td { color: var(--faint); font-size: .85rem; }
"""
