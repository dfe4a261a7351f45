"""From run folders to one report: read the runs, keep what was found as JSON, draw every figure."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from remoe.analysis import page
from remoe.analysis.curves import has_curve_alone, write_curves
from remoe.analysis.examine import examine_all
from remoe.analysis.figure import Figure
from remoe.analysis.figures import (
    density,
    domain_activity,
    domain_share,
    expert_tokens,
    flips,
    generated,
    layer_sparsity,
    load_map,
    loss_curves,
    stages,
    summary,
    text_sample,
    token_frequency,
)
from remoe.analysis.record import RunRecord, load_records, save_records
from remoe.errors import ConfigError

FIGURES = (
    summary,
    loss_curves,
    stages,
    layer_sparsity,
    density,
    load_map,
    domain_share,
    domain_activity,
    token_frequency,
    expert_tokens,
    flips,
    text_sample,
    generated,
)


def write_report(runs: Sequence[Path], to: Path) -> Path:
    """Write one self-contained HTML page about one run, or several to compare (the first one is the main one).

    `to` is the HTML file, or a folder to put report.html in; analysis.json with all its numbers goes beside it. Of
    models that are no runs, whose density dial was measured, the page holds those curves alone.
    Raises CheckpointError for a folder that is not a run, DataError if its text has gone, MissingExtraError without
    matplotlib.
    """
    if not runs:
        raise ConfigError("no run was given to report on; name at least one folder below runs/")
    if all(has_curve_alone(Path(run)) for run in runs):
        return write_curves([Path(run) for run in runs], Path(to))
    return draw_report(_named_apart(examine_all([Path(run) for run in runs])), Path(to))


def redraw_report(analysis: Path, to: Path) -> Path:
    """Draw a report again from the analysis.json beside it, without models or text."""
    return draw_report(load_records(Path(analysis)), Path(to))


def draw_report(runs: Sequence[RunRecord], to: Path) -> Path:
    """Draw the figures of examined runs and write page and analysis.json; returns the page's path."""
    to = to if to.suffix else to / "report.html"
    text = page.render(runs, draw_figures(runs))
    to.parent.mkdir(parents=True, exist_ok=True)
    save_records(runs, to.with_name("analysis.json"))
    to.write_text(text, encoding="utf-8")
    return to


def draw_figures(runs: Sequence[RunRecord]) -> list[Figure]:
    """The figures that these runs have something to show in, in the order of the page."""
    return [figure for figure in (module.figure(runs) for module in FIGURES) if figure is not None]


def _named_apart(runs: Sequence[RunRecord]) -> list[RunRecord]:
    """The runs with a number after each name that an earlier one has too."""
    seen: Counter[str] = Counter()
    named = []
    for run in runs:
        seen[run.name] += 1
        named.append(run if seen[run.name] == 1 else replace(run, name=f"{run.name} ({seen[run.name]})"))
    return named
