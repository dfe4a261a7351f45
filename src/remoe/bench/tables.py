"""Results on a terminal."""

from collections.abc import Sequence

from rich.console import Console
from rich.table import Table

from remoe.bench.clock import GIB
from remoe.bench.model import RUN_STEPS
from remoe.bench.results import Results, Row

_WIDTH = 200
"""Where nobody's window limits it, as in a log."""


def console() -> Console:
    """Standard output; a file or pipe is wide enough for every table."""
    found = Console(highlight=False, soft_wrap=False)
    return found if found.is_terminal else Console(highlight=False, width=_WIDTH)


def layer_table(results: Results) -> Table:
    """One line a candidate and routing, shapes apart; times in ms."""
    names = ("fwd", "fwd+bwd", "TFLOP/s", "of limit", "held GiB", "peak GiB", "error", "first s")
    table = _table(_title(results), ("shape", "routing", "candidate"), names)
    previous = None
    for row in results.rows:
        if previous is not None and row["shape"] != previous:
            table.add_section()
        _add(table, row, _layer_cells(row))
        previous = row["shape"]
    return table


def layer_line(row: Row) -> str:
    """A row as it is measured."""
    cells = _layer_cells(row)
    return f"{cells[0]:16} {cells[1]:10} {cells[2]:32} {cells[3]:>8} {cells[4]:>8}  {cells[9]:>7}  {cells[11]}".rstrip()


def profile_table(row: Row) -> Table:
    """The kernels of one measured row."""
    where = f"{row['shape']}/{row['route']}, forward and backward" if "shape" in row else f"{row['model']}, one step"
    title = f"{row['candidate']} at {where}"
    table = Table(title=title, title_justify="left", box=None, pad_edge=False, header_style="bold")
    table.add_column("kernel", overflow="ellipsis", max_width=90, no_wrap=True)
    for column in ("calls", "us", "share", "rate"):
        table.add_column(column, justify="right")
    for kernel in row["profile"]:
        rate = f"{kernel['tflops']:.0f} TFLOP/s" if "tflops" in kernel else ""
        rate = f"{kernel['gb_per_second']:.0f} GB/s" if "gb_per_second" in kernel else rate
        table.add_row(kernel["kernel"], str(kernel["calls"]), f"{kernel['us']:.1f}", f"{kernel['share']:.1%}", rate)
    return table


def model_table(results: Results) -> Table:
    """Training: one line a model, phase and candidate; then ReLU's ratios."""
    names = ("step ms", "tokens/s", "model TFLOP/s", "MFU", "density", "peak GiB", "micro-batch", "first s")
    table = _table(_title(results), ("model", "phase", "candidate"), names)
    for row in results.rows:
        if row.get("kind") != "ratio":
            _add(table, row, _model_cells(row))
    return table


def ratio_lines(results: Results) -> list[str]:
    """What ReLU costs over Top-K, in words."""
    return [_ratio_line(row) for row in results.rows if row.get("kind") == "ratio"]


def _ratio_line(row: Row) -> str:
    line = f"{row['model']}: ReLU at {row['speed']:.3f} of Top-K's tokens/s"
    if "start_step" not in row:
        return line
    line += (
        f"; a dense first step takes {row['start_step']:.2f} steady ones, so Stages I and II add at most "
        f"{row['stages_extra_time']:.2%} to a run of {RUN_STEPS:,} steps"
    )
    if "start_peak" not in row:
        return line
    peaks = f"{row['start_peak']:.2f} of its steady state's, {row['start_peak_over_topk']:.2f} of Top-K's"
    return f"{line}; its peak memory is {peaks}"


def decode_table(results: Results) -> Table:
    """Inference: one line a model, phase, batch and candidate."""
    names = ("batch", "tokens/s", "ms/token", "of limit", "density")
    table = _table(_title(results), ("model", "phase", "candidate"), names)
    for row in results.rows:
        _add(table, row, _decode_cells(row))
    return table


def model_line(row: Row) -> str:
    """A row of a model's training or inference as it is measured."""
    if row.get("kind") == "ratio":
        return _ratio_line(row)
    speed = _number(row.get("tokens_per_second"), ",.0f")
    where = f"{row.get('phase', '')} {row.get('batch', '')}".strip()
    return f"{row['model']:20} {where:12} {row.get('candidate', ''):24} {speed:>12} tokens/s  {_note(row)}".rstrip()


def _model_cells(row: Row) -> Sequence[str]:
    micro_batch, accumulation = row.get("micro_batch"), row.get("accumulation")
    return (
        row["model"],
        row.get("phase", ""),
        row.get("candidate", ""),
        _number(row.get("step_ms"), ",.1f"),
        _number(row.get("tokens_per_second"), ",.0f"),
        _number(row.get("model_tflops"), ".3g"),
        _number(row.get("mfu"), ".1%"),
        _number(row.get("density"), ".4f"),
        _number(_gib(row.get("peak_bytes")), ".2f"),
        f"{micro_batch} x {accumulation}" if micro_batch else "",
        _number(row.get("first_step_seconds"), ".1f"),
        _note(row),
    )


def _decode_cells(row: Row) -> Sequence[str]:
    speed, limit = row.get("tokens_per_second"), row.get("limit_tokens_per_second")
    return (
        row["model"],
        row.get("phase", ""),
        row.get("candidate", ""),
        str(row.get("batch", "")),
        _number(speed, ",.0f"),
        _number(row.get("ms_per_token"), ".3f"),
        _number(speed / limit if speed and limit else None, ".0%"),
        _number(row.get("density"), ".4f"),
        _note(row),
    )


def tune_line(row: Row) -> str:
    """What tuning found for a shape."""
    if "best" not in row:
        return f"{row['shape']:16} {_note(row)}"
    best = ", ".join(f"{part} {choice}" for part, choice in row["best"].items())
    first_ms = row["first_ms"] if isinstance(row["first_ms"], str) else f"{row['first_ms']:.3f}"
    return f"{row['shape']:16} {first_ms} -> {row['best_ms']:.3f} ms: {best}"


def _table(title: str, words: Sequence[str], numbers: Sequence[str]) -> Table:
    table = Table(title=title, title_justify="left", box=None, pad_edge=False, header_style="bold")
    for column in words:
        table.add_column(column, no_wrap=True)
    for column in numbers:
        table.add_column(column, justify="right", no_wrap=True)
    table.add_column("note", overflow="fold")
    return table


def _add(table: Table, row: Row, cells: Sequence[str]) -> None:
    table.add_row(*cells, style="bold" if row.get("kind") == "ours" else None)


def _note(row: Row) -> str:
    if row.get("mismatches") and "error" not in row:
        return "DIFFERS"
    implementation = row.get("experts_implementation")
    return row.get("error", row.get("note", f"experts: {implementation}" if implementation else ""))


def _title(results: Results) -> str:
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
        _note(row),
    )


def _error(row: Row) -> str:
    ratio = row.get("worst_error_ratio")
    return "" if ratio is None else f"{ratio:.2f}x"


def _gib(size: int | None) -> float | None:
    return None if size is None else size / GIB


def _number(value: float | None, form: str) -> str:
    return "" if value is None else format(value, form)
