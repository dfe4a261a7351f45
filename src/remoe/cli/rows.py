"""The rows of a comparison as a table."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from remoe.cli.table import number, table

if TYPE_CHECKING:
    from remoe.recipes.comparison import Row

INERT = "(inert)"


def as_table(rows: Sequence["Row"], num_seeds: int) -> str:
    """The rows of a comparison as text."""
    first = rows[0].router
    header = (
        "router",
        "valid loss",
        f"minus {first}",
        "95 % interval",
        "active experts",
        "balance",
        "FLOPs",
        "tokens/s",
    )
    lines = [
        (
            row.router,
            number(row.valid_loss.mean, ".4f"),
            number(row.difference.mean, "+.4f") if row.difference else "",
            _ends(row),
            number(row.active_experts, ".3f"),
            _balance(row),
            number(row.training_flops, ".3e"),
            number(row.tokens_per_second, ",.0f"),
        )
        for row in rows
    ]
    windows = (
        "\nlosses: on validation text at the end; experts, balance and tokens/s: over the last quarter of the steps"
    )
    inert = f"\n{INERT}: that balance was measured, the router is not trained for it (load_balancing_coef is 0)"
    notes = inert if any(_is_inert(row) for row in rows) else ""
    if num_seeds == 1:
        notes += "\none seed: no interval; --seeds 0,1,2 gives one"
    return table(header, lines) + windows + notes


def _balance(row: "Row") -> str:
    """The balance term a layer, and whether the arm was trained with it."""
    if row.load_balancing is None:
        return ""
    return f"{row.load_balancing:.3f}" + (f" {INERT}" if _is_inert(row) else "")


def _is_inert(row: "Row") -> bool:
    return row.load_balancing is not None and not row.load_balancing_coef


def _ends(row: "Row") -> str:
    if row.difference is None or row.difference.low is None:
        return ""
    return f"{row.difference.low:+.4f} to {row.difference.high:+.4f}"
