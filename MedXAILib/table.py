"""Tables: those that people write, a CSV file with a row for each scan, and what is wrong with them."""

from __future__ import annotations

import csv
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from MedXAILib.errors import MedXAIError


def write_rows(path: Path, heads: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
    """Write a CSV file, UTF-8, in which no text is a formula."""
    with path.open("w", encoding="utf-8", newline="") as file:
        csv.writer(file).writerows([inert(cell) for cell in row] for row in [heads, *rows])


def without_nan(rows: Iterable[Sequence[object]]) -> Iterator[list[object]]:
    """`rows` whose cells are empty where a number is not known (NaN)."""
    return (["" if cell != cell else cell for cell in row] for row in rows)


def inert(cell: object) -> object:
    """Text that spreadsheets would compute, as a formula, behind an apostrophe: names may be a stranger's."""
    if not isinstance(cell, str) or cell[:1] not in ("=", "+", "-", "@"):
        return cell
    try:
        float(cell)
    except ValueError:
        return f"'{cell}"
    return cell


@dataclass(frozen=True)
class Row:
    """A row of `table`. `number` is what a spreadsheet calls it: the names of the columns are row 1."""

    table: Path
    number: int
    cells: Mapping[str, str]

    def __getitem__(self, column: str) -> str:
        """What is in `column`; "" where there is nothing, or no such column."""
        return self.cells.get(column, "")

    def wrong(self, column: str, what: str) -> MedXAIError:
        """The error that says `what` is wrong in `column`, and what would be right."""
        return MedXAIError(f"Row {self.number} of '{self.table}', column '{column}': {what}")

    @property
    def volume(self) -> Path:
        """The scan."""
        path = self.file("volume")
        if path is None:
            raise self.wrong("volume", "it is empty: give the path of a scan.")
        return path

    def file(self, column: str) -> Path | None:
        """The file or folder in `column`, whose path is absolute or begins where the table is."""
        name = self[column]
        path = self.table.parent / name
        if name and not path.exists():
            raise self.wrong(column, f"there is no {column} '{name}': give a path that begins where the table is.")
        return path if name else None

    def number_in(self, column: str) -> float:
        """The number in `column`; NaN where there is none."""
        try:
            number = float(self[column] or "nan")
        except ValueError:
            number = math.inf
        if math.isinf(number):
            raise self.wrong(column, f"'{self[column]}' is not a number, such as 0.5; leave empty what is not known.")
        return number

    def point(self, column: str) -> tuple[float, float, float] | None:
        """The point in RAS mm in `column`."""
        try:
            point = [float(number) for number in self[column].split()]
        except ValueError:
            point = [math.nan]
        if point and (len(point) != 3 or not all(map(math.isfinite, point))):
            raise self.wrong(column, f"'{self[column]}' is not three numbers in RAS mm, such as 12.5 -40 88.")
        return (point[0], point[1], point[2]) if point else None


def read_rows(table: Path, column: str = "volume") -> list[Row]:
    """The rows of a CSV file, or of a TSV file if its name says so, with a `column` that has to be there.

    Raises:
        MedXAIError: when it cannot be read, holds no row, or a row has more cells than there are columns.
    """
    kind, delimiter, apart = ("TSV", "\t", "tabs") if table.suffix == ".tsv" else ("CSV", ",", "commas")
    try:
        with table.open(encoding="utf-8-sig", newline="") as file:
            read = csv.reader(file, delimiter=delimiter)
            lines = [(n, [cell.strip() for cell in line]) for n, line in enumerate(read, 1)]
    except OSError as error:
        raise MedXAIError(f"The table '{table}' cannot be read ({error.strerror}): check the path.") from error
    except UnicodeDecodeError as error:
        raise MedXAIError(f"'{table}' is not a text file in UTF-8: save it as '{kind} UTF-8'.") from error
    except csv.Error as error:
        raise MedXAIError(f"'{table}' is not a {kind} file ({error}): separate cells by {apart}.") from error
    (_, columns), *filled = [line for line in lines if any(line[1])] or [(1, [])]
    if column not in columns or not filled:
        said = f"; its first row is '{','.join(columns)[:80]}'" if columns else ""
        raise MedXAIError(
            f"'{table}' holds no cases: give a {kind} file with a column '{column}' and a row for each case{said}."
        )
    twice = next((column for column in columns if column and columns.count(column) > 1), None)
    if twice:
        raise MedXAIError(f"'{table}' has two columns '{twice}': rename or remove one.")
    return [_row(table, number, columns, cells) for number, cells in filled]


def _row(table: Path, number: int, columns: list[str], cells: list[str]) -> Row:
    if any(cells[len(columns) :]):
        raise MedXAIError(
            f"Row {number} of '{table}' has {len(cells)} cells and there are {len(columns)} columns: put quotes around "
            "text with commas."
        )
    return Row(table, number, {name: cell for name, cell in zip(columns, cells, strict=False) if name})
