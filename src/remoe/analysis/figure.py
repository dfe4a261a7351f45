"""A figure of the report: charts with a legend, one sentence, where it comes from, and its numbers."""

from collections.abc import Sequence
from dataclasses import dataclass

from remoe.analysis.html import Html, escape, join, tag
from remoe.analysis.record import COLOURS, RunRecord, places
from remoe.analysis.table import Table


@dataclass(frozen=True)
class Chart:
    """One drawing, or another block of markup, with the line above it."""

    caption: str
    body: Html
    legend: "tuple[Key, ...]" = ()


@dataclass(frozen=True)
class Key:
    """An entry of the legend, which is text beside the charts: it never covers data and wraps on a phone."""

    label: str
    colour: str
    shape: str = "line"
    """line, dash, dot, box, band or hatch: a class of the style sheet."""


@dataclass(frozen=True, kw_only=True)
class Figure:
    """Everything that the page shows of one figure. `columns`: charts beside each other where there is room."""

    key: str
    title: str
    says: str
    source: str
    charts: tuple[Chart, ...]
    table: Table
    columns: int = 2
    legend: tuple[Key, ...] = ()
    notes: tuple[str, ...] = ()

    def to_html(self) -> Html:
        """The figure as a section of the page."""
        return tag(
            "section",
            tag("h2", self.title),
            tag("p", self.says, " ", tag("span", self.source, class_="source"), class_="says"),
            *(tag("p", note, class_="note") for note in self.notes),
            join([_legend(self.legend)] if self.legend else []),
            tag("div", *map(_chart, self.charts), class_="charts", style=f"--columns:{self.columns}"),
            self._numbers(),
            id=self.key,
            class_="figure",
        )

    def _numbers(self) -> Html:
        count = len(self.table.rows)
        summary = tag("summary", f"Numbers ({count:,} {'row' if count == 1 else 'rows'})")
        details = tag("details", summary, tag("div", self.table.to_html(), class_="scroll", tabindex=0))
        return tag("div", details, self.table.download(f"{self.key}.csv"), class_="numbers")


def run_keys(runs: Sequence[RunRecord], shape: str = "line") -> tuple[Key, ...]:
    """A legend of runs; a run has the same colour in every figure."""
    return tuple(run_key(run.name, place, shape) for place, run in zip(places(runs), runs, strict=True))


def run_key(name: str, place: int, shape: str = "line") -> Key:
    """The legend's entry of one run."""
    dashed = shape == "line" and place >= COLOURS
    return Key(name, f"c{place % COLOURS}", "dash" if dashed else shape)


def _legend(keys: Sequence[Key]) -> Html:
    return tag("ul", *(tag("li", _swatch(key), key.label) for key in keys), class_="legend")


def _swatch(key: Key) -> Html:
    return tag("i", class_=f"swatch {key.shape}", style=f"--swatch:var(--{escape(key.colour)})")


def _chart(chart: Chart) -> Html:
    caption = tag("figcaption", chart.caption, _legend(chart.legend) if chart.legend else "")
    return tag("figure", caption, tag("div", chart.body, class_="body"))
