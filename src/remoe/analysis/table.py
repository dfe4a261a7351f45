"""The numbers of a figure as a table: shown under it and downloadable as CSV."""

import base64
import csv
import io
from dataclasses import dataclass

from remoe.analysis.html import Html, tag

Cell = str | int | float | None

SHOWN_ROWS = 120


@dataclass(frozen=True, kw_only=True)
class Table:
    """Columns with a name each, and rows of text, numbers, or None where nothing was measured."""

    columns: tuple[str, ...]
    rows: tuple[tuple[Cell, ...], ...]

    def to_csv(self) -> str:
        """The whole table as CSV. Text that a spreadsheet would run as a formula gets a quote in front."""
        out = io.StringIO()
        writer = csv.writer(out, lineterminator="\n")
        writer.writerow(self.columns)
        writer.writerows([_csv_cell(cell) for cell in row] for row in self.rows)
        return out.getvalue()

    def to_html(self) -> Html:
        """A table element; long tables show their two ends and say how many rows are left out."""
        if len(self.rows) <= SHOWN_ROWS:
            body = [_html_row(row) for row in self.rows]
        else:
            half = SHOWN_ROWS // 2
            left_out = f"{len(self.rows) - SHOWN_ROWS:,} more rows in the CSV file"
            between = tag("tr", tag("td", left_out, colspan=len(self.columns), class_="gap"))
            body = [*map(_html_row, self.rows[:half]), between, *map(_html_row, self.rows[-half:])]
        return tag("table", self.head(), tag("tbody", *body))

    def head(self) -> Html:
        """The row of column names; those of numbers stand right, above them."""
        is_text = [any(isinstance(row[column], str) for row in self.rows) for column in range(len(self.columns))]
        cells = zip(self.columns, is_text, strict=True)
        names = (tag("th", name, scope="col", class_=None if text else "number") for name, text in cells)
        return tag("thead", tag("tr", *names))

    def download(self, file_name: str) -> Html:
        """A link that holds the CSV itself: it works from disk, without a network or a script."""
        data = base64.b64encode(self.to_csv().encode()).decode()
        return tag("a", "CSV", href=f"data:text/csv;charset=utf-8;base64,{data}", download=file_name, class_="csv")


def show(cell: Cell, digits: int = 4) -> str:
    """A cell as people read it: thousands separated, floats with a few digits, a dash for nothing."""
    if cell is None or (isinstance(cell, float) and cell != cell):
        return "–"
    if isinstance(cell, bool | str):
        return str(cell)
    if isinstance(cell, int):
        return f"{cell:,}"
    return f"{cell:,.0f}" if 10**digits <= abs(cell) < 1e15 else f"{cell:.{digits}g}"


def _csv_cell(cell: Cell) -> Cell:
    if isinstance(cell, str) and cell[:1] in ("=", "+", "-", "@", "\t", "\r"):
        return "'" + cell
    if isinstance(cell, float):
        return "" if cell != cell else f"{cell:.7g}"
    return cell


def _html_row(row: tuple[Cell, ...]) -> Html:
    return tag("tr", *(tag("td", show(cell), class_=None if isinstance(cell, str) else "number") for cell in row))
