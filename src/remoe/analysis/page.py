"""The page around the figures: one HTML file that needs no network, and that allows none."""

import base64
import hashlib
from collections.abc import Iterable, Mapping, Sequence
from importlib.resources import files
from typing import Any

from remoe.analysis import palette
from remoe.analysis.figure import Figure
from remoe.analysis.figures import stages, summary
from remoe.analysis.html import Html, join, tag
from remoe.analysis.record import RunRecord, setups
from remoe.analysis.table import Table, show


def render(runs: Sequence[RunRecord], figures: Sequence[Figure]) -> str:
    """The whole page as text; the same runs give the same bytes."""
    main = tag("main", *(figure.to_html() for figure in figures), _settings(runs))
    return _document(_names(runs), _header(runs, figures), main, _footer("analysis.json beside it has"))


def render_alone(title: str, names: Sequence[str], figure: Figure, numbers: str) -> str:
    """A page with one figure of models that are no runs; `numbers` says where they are."""
    header = tag("header", tag("h1", title), _theme(), tag("p", ", ".join(names), class_="lead"))
    return _document(", ".join(names), header, tag("main", figure.to_html()), _footer(f"{numbers} has"))


def _document(title: str, *parts: Html) -> str:
    script, style = _asset("page.js"), palette.css() + _asset("page.css")
    head = tag(
        "head",
        Html('<meta charset="utf-8">'),
        Html(f'<meta http-equiv="Content-Security-Policy" content="{_policy(script)}">'),
        Html('<meta name="viewport" content="width=device-width, initial-scale=1">'),
        Html('<meta name="color-scheme" content="light dark">'),
        Html('<link rel="icon" href="data:,">'),
        tag("title", f"remoe: {title}"),
        tag("style", Html(style)),
    )
    return f'<!doctype html>\n<html lang="en">{head}{tag("body", *parts)}<script>{script}</script></html>\n'


def headlines(runs: Sequence[RunRecord]) -> list[tuple[str, str]]:
    """The few numbers that come first: (value, what it is). Runs that differ only in their seed are averaged."""
    groups = setups(runs)
    summaries = [(_group_name(group), summary.numbers(group)) for group in groups]
    losses = [(name, _mean(run.valid_loss for run in group)) for name, group in summaries]
    experts = [(name, _mean(run.active_experts for run in group)) for name, group in summaries]
    settled = [(_group_name(group), _mean(run.stage_2_end for run in stages.numbers(group))) for group in groups]
    target = f"reached its target sparsity (paper: {stages.PAPER_SETTLING_STEPS})"
    return [
        *((f"{loss:.4f}", f"validation loss, {name}") for name, loss in losses if loss is not None),
        *((f"{count:.2f}", f"experts per token and layer, {name}") for name, count in experts if count is not None),
        *((f"{steps:,.0f} steps", f"until {name} {target}") for name, steps in settled if steps is not None),
    ]


def _group_name(group: Sequence[RunRecord]) -> str:
    return group[0].name if len(group) == 1 else f"{group[0].name} and {len(group) - 1} more seeds (mean)"


def _mean(values: Iterable[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None


def _policy(script: str) -> str:
    """Nothing is loaded from anywhere, and no script runs but the page's own."""
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    return f"default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'sha256-{digest}'"


def _asset(name: str) -> str:
    return files("remoe.analysis").joinpath("assets", name).read_text(encoding="utf-8")


def _names(runs: Sequence[RunRecord]) -> str:
    return ", ".join(run.name for run in runs)


def _header(runs: Sequence[RunRecord], figures: Sequence[Figure]) -> Html:
    title = "One run, looked at closely" if len(runs) == 1 else f"{len(runs)} runs, side by side"
    tiles = [tag("div", tag("b", value), tag("span", what), class_="tile") for value, what in headlines(runs)]
    links = [tag("a", figure.title, href=f"#{figure.key}") for figure in figures]
    return tag(
        "header",
        tag("h1", title),
        _theme(),
        tag("p", _names(runs), class_="lead"),
        tag("div", *tiles, class_="tiles"),
        tag("nav", *links, tag("a", "Data and settings", href="#settings"), aria_label="Figures"),
    )


def _theme() -> Html:
    return tag("button", "◐ auto", class_="theme", type="button", aria_label="Change between light and dark")


def _settings(runs: Sequence[RunRecord]) -> Html:
    return tag(
        "section",
        tag("h2", "Data and settings"),
        tag("p", "What the runs read and how they were set up; enough to start them again.", class_="says"),
        *(_setting(run) for run in runs),
        id="settings",
        class_="figure",
    )


def _setting(run: RunRecord) -> Html:
    return tag(
        "details",
        tag("summary", run.name),
        tag("div", _tree(run.corpus).to_html(), class_="scroll", tabindex=0),
        tag("pre", _yaml(run.config), tabindex=0),
    )


def _tree(values: Mapping[str, Any]) -> Table:
    """Nested values as rows of dotted key and value."""
    return Table(columns=("corpus", "value"), rows=tuple(_leaves("", values)))


def _leaves(prefix: str, value: Any) -> list[tuple[str, str]]:
    if isinstance(value, Mapping):
        return [leaf for key, item in value.items() for leaf in _leaves(f"{prefix}.{key}".lstrip("."), item)]
    if isinstance(value, list) and any(isinstance(item, Mapping | list) for item in value):
        return [leaf for index, item in enumerate(value) for leaf in _leaves(f"{prefix}.{index}", item)]
    if isinstance(value, list):
        return [(prefix, ", ".join(map(str, value)))]
    return [(prefix, show(value) if isinstance(value, int | float | str | None) else str(value))]


def _yaml(values: Mapping[str, Any]) -> str:
    import yaml

    return yaml.safe_dump(dict(values), sort_keys=False, allow_unicode=True)


def _footer(numbers: str) -> Html:
    text = f"Made by remoe. The file needs no network: every number is in it, and {numbers} them all."
    return tag("footer", join([tag("p", text)]))
