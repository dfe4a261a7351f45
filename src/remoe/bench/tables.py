"""Results on a terminal."""

from collections.abc import Sequence

from rich.console import Console
from rich.table import Table

from remoe.bench.clock import GIB
from remoe.bench.results import Results, Row

_WIDTH = 200
"""Where nobody's window limits it, as in a log."""


def console() -> Console:
    """Standard output; a file or pipe is wide enough for every table."""
    found = Console(highlight=False, soft_wrap=False)
    return found if found.is_terminal else Console(highlight=False, width=_WIDTH)


def layer_table(results: Results) -> Table:
    """One line a candidate and routing, shapes apart; times in ms."""
    table = Table(title=_layer_title(results), title_justify="left", box=None, pad_edge=False, header_style="bold")
    for column in ("shape", "routing", "candidate"):
        table.add_column(column, no_wrap=True)
    for column in ("fwd", "fwd+bwd", "TFLOP/s", "of limit", "held GiB", "peak GiB", "error", "first s"):
        table.add_column(column, justify="right", no_wrap=True)
    table.add_column("note", overflow="fold")
    previous = None
    for row in results.rows:
        if previous is not None and row["shape"] != previous:
            table.add_section()
        table.add_row(*_layer_cells(row), style="bold" if row.get("kind") == "ours" else None)
        previous = row["shape"]
    return table


def layer_line(row: Row) -> str:
    """A row as it is measured."""
    cells = _layer_cells(row)
    return f"{cells[0]:16} {cells[1]:10} {cells[2]:32} {cells[3]:>8} {cells[4]:>8}  {cells[9]:>7}  {cells[11]}".rstrip()


def profile_table(row: Row) -> Table:
    """The kernels of one measured row."""
    title = f"{row['candidate']} at {row['shape']}/{row['route']}, forward and backward"
    table = Table(title=title, title_justify="left", box=None, pad_edge=False, header_style="bold")
    table.add_column("kernel", overflow="ellipsis", max_width=90, no_wrap=True)
    for column in ("calls", "us", "share", "TFLOP/s"):
        table.add_column(column, justify="right")
    for kernel in row["profile"]:
        cells = (str(kernel["calls"]), _number(kernel["us"], ".1f"), _number(kernel["share"], ".1%"))
        table.add_row(kernel["kernel"], *cells, _number(kernel.get("tflops"), ".0f"))
    return table


def _layer_title(results: Results) -> str:
    limits, about = results.about["limits"], results.about
    device = ", ".join(about["gpus"]) or f"{about['processor']}, {about['threads']} threads"
    return (
        f"{device}, torch {about['versions']['torch']}, {about['dtype']}: "
        f"matrix product {limits['matmul_tflops']:.3g} TFLOP/s, copy {limits['copy_gb_per_second']:.4g} GB/s"
    )


def _layer_cells(row: Row) -> Sequence[str]:
    total = row.get("forward_backward_ms")
    return (
        row["shape"],
        row.get("route", ""),
        row.get("candidate", ""),
        _number(row.get("forward_ms"), ".3f"),
        _number(total, ".3f"),
        _number(row.get("tflops"), ".3g"),
        _number(row["floor_ms"] / total if total else None, ".0%"),
        _number(_gib(row.get("held_bytes")), ".2f"),
        _number(_gib(row.get("peak_bytes")), ".2f"),
        _error(row),
        _number(row.get("first_call_seconds"), ".1f"),
        "DIFFERS" if row.get("mismatches") and "error" not in row else row.get("error", row.get("note", "")),
    )


def _error(row: Row) -> str:
    ratio = row.get("worst_error_ratio")
    return "" if ratio is None else f"{ratio:.2f}x"


def _gib(size: int | None) -> float | None:
    return None if size is None else size / GIB


def _number(value: float | None, form: str) -> str:
    return "" if value is None else format(value, form)
