"""All runs in one table: how good, how sparse, how fast, how large (ReMoE Tables 2 and 7)."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from remoe.analysis.drawing import compact
from remoe.analysis.figure import Chart, Figure
from remoe.analysis.html import Html, tag
from remoe.analysis.record import RunRecord
from remoe.analysis.table import Cell, Table, show


@dataclass(frozen=True, kw_only=True)
class RunSummary:
    """The figures of one run that people compare first; None where it was not measured."""

    run: str
    router: str
    valid_loss: float | None
    best_loss: float | None
    per_domain: dict[str, float]
    active_experts: float | None
    sparsity: float | None
    tokens_per_second: float | None
    tokens: int | None
    steps: int | None
    total_parameters: int
    active_parameters: int


def numbers(runs: Sequence[RunRecord]) -> list[RunSummary]:
    """One summary a run."""
    return [_summary(run) for run in runs]


def draw(summaries: Sequence[RunSummary]) -> list[Chart]:
    """The runs as rows, and their losses by domain; the lowest loss of each column is marked."""
    charts = [Chart("", _grid(_main_table(summaries), {2}))]
    domains = _domain_table(summaries)
    if len(domains.columns) > 2:
        charts.append(Chart("Validation loss by domain", _grid(domains, set(range(1, len(domains.columns))))))
    return charts


def figure(runs: Sequence[RunRecord]) -> Figure:
    """The figure; there is always one."""
    summaries = numbers(runs)
    main, domains = _main_table(summaries), _domain_table(summaries)
    rows = tuple(left + right[1:] for left, right in zip(main.rows, domains.rows, strict=True))
    losses = tuple(f"loss: {name}" for name in domains.columns[1:])
    return Figure(
        key="summary",
        title="The run" if len(runs) == 1 else "The runs",
        says=(
            "Validation loss in nats per token (the best in bold); how many experts a token of the validation text "
            "used at the end (without a checkpoint: as the log says); sparsity and speed over the last quarter of the "
            "steps, on the machine that trained; and size."
        ),
        source="ReMoE, Tables 2 and 7",
        charts=tuple(draw(summaries)),
        columns=1,
        table=Table(columns=main.columns + losses, rows=rows),
    )


def _summary(run: RunRecord) -> RunSummary:
    losses = run.metrics.series("valid_loss")[0]
    return RunSummary(
        run=run.name,
        router=run.router,
        valid_loss=float(losses[-1]) if len(losses) else None,
        best_loss=float(losses.min()) if len(losses) else None,
        per_domain=dict(run.metrics.last("valid_loss_per_domain") or {}),
        active_experts=_active(run),
        sparsity=run.metrics.late_mean("sparsity") if run.router != "dense" else None,
        tokens_per_second=run.metrics.late_median("tokens_per_second"),
        tokens=run.metrics.last("tokens"),
        steps=run.metrics.last("step"),
        total_parameters=run.total_parameters,
        active_parameters=run.active_parameters,
    )


def _active(run: RunRecord) -> float | None:
    if run.counts is None:  # dense, or known by its log alone
        logged = run.metrics.last("valid_active_experts") or run.metrics.last("active_experts")
        return logged if run.router != "dense" else None
    return float(run.counts.load_LDE.sum() / run.counts.num_tokens / len(run.counts.layers))


def _main_table(summaries: Sequence[RunSummary]) -> Table:
    columns = (
        "run",
        "router",
        "validation loss",
        "experts per token (at the end)",
        "sparsity (last quarter)",
        "tokens per second (last quarter)",
        "tokens",
        "steps",
        "parameters",
        "active parameters",
    )
    rows = [
        (
            summary.run,
            summary.router,
            summary.valid_loss,
            summary.active_experts,
            summary.sparsity,
            None if summary.tokens_per_second is None else round(summary.tokens_per_second),
            summary.tokens,
            summary.steps,
            summary.total_parameters,
            summary.active_parameters,
        )
        for summary in summaries
    ]
    return Table(columns=columns, rows=tuple(rows))


def _domain_table(summaries: Sequence[RunSummary]) -> Table:
    domains = list(dict.fromkeys(name for summary in summaries for name in summary.per_domain))
    rows = [(summary.run, *(summary.per_domain.get(name) for name in domains)) for summary in summaries]
    return Table(columns=("run", *domains), rows=tuple(rows))


def _grid(table: Table, lower_is_better: set[int]) -> Html:
    """The table for reading: large numbers with a unit letter, the lowest value of some columns marked."""
    best = {column: _lowest(row[column] for row in table.rows) for column in lower_is_better}
    body = [_row(row, best if len(table.rows) > 1 else {}) for row in table.rows]
    return tag("div", tag("table", table.head(), tag("tbody", *body)), class_="scroll wide", tabindex=0)


def _lowest(cells: Iterable[Cell]) -> float | None:
    return min((cell for cell in cells if isinstance(cell, float)), default=None)


def _row(row: tuple[Cell, ...], best: Mapping[int, float | None]) -> Html:
    cells = []
    for column, cell in enumerate(row):
        text = tag("strong", _show(cell)) if cell is not None and best.get(column) == cell else _show(cell)
        cells.append(tag("td", text, class_=None if isinstance(cell, str) else "number"))
    return tag("tr", *cells)


def _show(cell: Cell) -> str:
    if isinstance(cell, float):
        return f"{cell:.4f}"
    return compact(cell) if isinstance(cell, int) and cell >= 10_000 else show(cell)
