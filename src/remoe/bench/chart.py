"""Charts of results, one look each: how near ours and the best peer come to the machine's own limit."""

import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from remoe.bench.results import Row
from remoe.errors import ConfigError, MissingExtraError

_COLOURS = {  # in light, in dark
    "ink": ("#1a1e24", "#e7eaef"),
    "muted": ("#66707c", "#98a2af"),
    "grid": ("#e4e8ed", "#29303a"),
    "paper": ("#ffffff", "#161a21"),
    "ours": ("#0b63a5", "#5fb0f0"),
    "ours_light": ("#7fb2dc", "#2f6ea6"),
    "peer": ("#d2560b", "#ff9248"),
    "peer_light": ("#efb48f", "#a85a25"),
    "ceiling": ("#a9b1bb", "#5d6672"),
}
_WIDTH, _BAR, _GAP, _EDGES = 8.6, 0.2, 0.16, 1.35  # inches


class Bar(NamedTuple):
    """One measurement beside the limit."""

    group: str
    series: str
    colour: str
    share: float
    """Of the limit: 1 is as fast as the machine allows."""
    label: str


def check_chart_path(path: Path | None) -> None:
    """ConfigError for a file type that no chart has, MissingExtraError without matplotlib: before anything is timed."""
    if path is None:
        return
    if path.suffix not in (".svg", ".png"):
        raise ConfigError(f"--chart is {path}, must end in .svg or .png")
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        raise MissingExtraError("matplotlib", "report") from None


def draw(results: Mapping[str, Any], path: Path) -> None:
    """Draw a benchmark's results, as `Results.to_dict` gives them or a file holds them."""
    {"layer": _draw_layer, "model": _draw_model, "decode": _draw_decode}[results["benchmark"]](results, path)


def _draw_layer(results: Mapping[str, Any], path: Path) -> None:
    note = f"100 % = the machine's limit: {_limit_words(results)}, whichever binds"
    _draw(layer_bars(results["rows"]), path, f"One MoE layer, forward and backward ({_machine(results)})", note)


def _draw_model(results: Mapping[str, Any], path: Path) -> None:
    note = f"100 % = the machine's limit: {results['limits']['matmul_tflops']:.3g} TFLOP/s in a large matrix product"
    bars = model_bars(results["rows"], results["limits"]["matmul_tflops"])
    _draw(bars, path, f"Training ({_machine(results)})", note)


def _draw_decode(results: Mapping[str, Any], path: Path) -> None:
    note = f"100 % = the machine's limit: {_limit_words(results)}, reading only the weights of experts in use"
    _draw(decode_bars(results["rows"]), path, f"Generating text ({_machine(results)})", note)


def _machine(results: Mapping[str, Any]) -> str:
    return f"{', '.join(results['gpus']) or results['processor']}, {results['dtype']}"


def _limit_words(results: Mapping[str, Any]) -> str:
    limits = results["limits"]
    copy = limits["copy_gb_per_second"] / 1000
    return f"{limits['matmul_tflops']:.3g} TFLOP/s in a large matrix product or {copy:.3g} TB/s in a copy"


def model_bars(rows: Sequence[Row], limit_tflops: float) -> list[Bar]:
    """Steady-state training: ReLU, Top-K and each peer, by the FLOPs of their nominal top_k."""
    steady = [row for row in rows if row.get("phase") == "steady" and row.get("model_tflops")]
    return [
        Bar(row["model"], *_arm(row), row["model_tflops"] / limit_tflops, _speed(row))
        for row in sorted(steady, key=lambda row: row["model"])
    ]


def decode_bars(rows: Sequence[Row]) -> list[Bar]:
    """Prefill and decoding at each batch: ReLU, Top-K and each peer."""
    measured = [row for row in rows if row.get("tokens_per_second")]
    bars = [
        Bar(
            f"{row['model']}\n{row['phase']}, batch {row['batch']}",
            *_arm(row),
            row["tokens_per_second"] / row["limit_tokens_per_second"],
            _speed(row),
        )
        for row in measured
    ]
    return sorted(bars, key=lambda bar: bar.group)


def _arm(row: Row) -> tuple[str, str]:
    colours = {"relu": "ours", "topk": "ours_light"}
    names = {"relu": "remoe, ReLU", "topk": "remoe, Top-K"}
    name = row["candidate"]
    return names.get(name, "transformers"), colours.get(name, "peer")


def _speed(row: Row) -> str:
    return f"{row['tokens_per_second']:,.0f} tokens/s" + (f"  {row['candidate']}" if row["kind"] == "peer" else "")


def layer_bars(rows: Sequence[Row]) -> list[Bar]:
    """The bars of each shape: ours and the best peer by routing, and the dense MLP."""
    measured = [row for row in rows if row.get("forward_backward_ms")]
    bars: list[Bar] = []
    for shape in dict.fromkeys(row["shape"] for row in measured):
        here = [row for row in measured if row["shape"] == shape]
        for route, words in (("var", "variable counts"), ("topk", "fixed k")):
            shade = "" if route == "var" else "_light"
            for kind, who in (("ours", "remoe"), ("peer", "best peer")):
                found = [row for row in here if row["kind"] == kind and row["route"] == route]
                bars += [_bar(row, f"{who}, {words}", kind + shade) for row in _best(found)]
        # Where the experts' weights bind, a dense MLP with one expert's weights has another limit.
        found = [row for row in here if row["kind"] == "ceiling" and row["forward_backward_ms"] > row["floor_ms"]]
        bars += [_bar(row, "dense MLP, same FLOPs", "ceiling") for row in found]
    return bars


def _best(rows: Sequence[Row]) -> list[Row]:
    return sorted(rows, key=lambda row: row["forward_backward_ms"])[:1]


def _bar(row: Row, series: str, colour: str) -> Bar:
    milliseconds = row["forward_backward_ms"]
    label = f"{milliseconds:.2f} ms" + (f"  {row['candidate']}" if row["kind"] == "peer" else "")
    return Bar(_group(row), series, colour, row["floor_ms"] / milliseconds, label)


def _group(row: Row) -> str:
    sizes = [f"{name} {size:,}" for name, size in zip(("T", "H", "F", "E", "k"), row.get("sizes", ()), strict=False)]
    return "\n".join([row["shape"], " ".join(sizes[:2]), " ".join(sizes[2:])]).rstrip()


def _draw(bars: Sequence[Bar], path: Path, title: str, note: str) -> None:
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    groups = list(dict.fromkeys(bar.group for bar in bars))
    height = len(bars) * _BAR + len(groups) * _GAP + _EDGES
    path.parent.mkdir(parents=True, exist_ok=True)
    with matplotlib.rc_context(_style()):
        figure = Figure(figsize=(_WIDTH, height), layout="constrained")
        FigureCanvasAgg(figure)
        axes = figure.subplots()
        _paint(axes, bars, groups)
        axes.set_title(title, x=0, ha="left", fontsize=11, pad=10)
        axes.set_xlabel(note, x=0, ha="left", fontsize=8.5, color=_COLOURS["muted"][0])
        figure.legend(loc="outside lower left", ncols=5, frameon=False, fontsize=8, columnspacing=1.2, handlelength=1.2)
        metadata = {"Date": None, "Creator": None} if path.suffix == ".svg" else None
        figure.savefig(path, dpi=160, metadata=metadata)
    if path.suffix == ".svg":
        path.write_text(_in_light_and_dark(path.read_text(encoding="utf-8")), encoding="utf-8")


def _paint(axes: Any, bars: Sequence[Bar], groups: Sequence[str]) -> None:
    place, ticks, known = 0.0, [], set()
    for group in groups:
        own = [bar for bar in bars if bar.group == group]
        ticks.append(place + (len(own) - 1) / 2)
        for bar in own:
            label = None if bar.series in known else bar.series
            known.add(bar.series)
            axes.barh(place, bar.share, height=0.82, color=_COLOURS[bar.colour][0], label=label)
            axes.text(bar.share + 0.008, place, bar.label, va="center", fontsize=8, color=_COLOURS["ink"][0])
            place += 1
        place += _GAP / _BAR
    axes.axvline(1.0, color=_COLOURS["ink"][0], linewidth=1.2)
    axes.set_yticks(ticks, groups)
    axes.set_ylim(place - _GAP / _BAR - 0.4, -0.6)
    axes.set_xlim(0, 1.04)
    axes.xaxis.set_major_formatter(_percent())
    axes.tick_params(length=0)


def _percent() -> Any:
    from matplotlib.ticker import PercentFormatter

    return PercentFormatter(1.0, decimals=0)


def _style() -> Any:
    light: Callable[[str], str] = lambda name: _COLOURS[name][0]  # noqa: E731
    return {
        "svg.fonttype": "none",
        "svg.hashsalt": "remoe",
        "text.parse_math": False,
        "font.family": "DejaVu Sans",
        "font.size": 9.5,
        "ytick.labelsize": 8.5,
        "figure.facecolor": light("paper"),
        "axes.facecolor": light("paper"),
        "axes.edgecolor": light("muted"),
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.spines.left": False,
        "axes.grid": True,
        "axes.grid.axis": "x",
        "axes.axisbelow": True,
        "grid.color": light("grid"),
        "text.color": light("ink"),
        "xtick.color": light("muted"),
        "ytick.color": light("ink"),
    }


def _in_light_and_dark(svg: str) -> str:
    """Colours as CSS variables that follow the reader's system; matplotlib writes each colour as its hex code."""
    for name, (light, _) in _COLOURS.items():
        svg = svg.replace(light, f"var(--{name})")
    light, dark = ("".join(f"--{name}:{shades[theme]};" for name, shades in _COLOURS.items()) for theme in range(2))
    in_dark = f"@media (prefers-color-scheme:dark){{svg{{{dark}}}}}"
    style = f"<style>svg{{max-width:100%;height:auto;{light}}}{in_dark}</style>"
    svg = re.sub(r"<metadata>.*?</metadata>\s*", "", svg, flags=re.DOTALL)
    head, opened, rest = re.split(r"(<svg[^>]*>)", svg, maxsplit=1)
    return head + opened + style + rest
