"""How every chart is drawn: matplotlib to SVG whose colours are CSS variables, the same bytes each time."""

import io
import re
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np

from remoe.analysis.html import Html, escape
from remoe.analysis.record import COLOURS
from remoe.errors import MissingExtraError

if TYPE_CHECKING:
    from matplotlib.axes import Axes

WIDTH, HEIGHT = 400, 270  # units of the view box; a phone shows one chart at about 0.9 of this
SERIES = COLOURS
HEAT = 13

# Colours that no chart uses otherwise; each becomes var(--name), so that a style sheet can choose light or dark.
_MARKERS = {"ink": "#000101", "muted": "#000102", "grid": "#000103", "paper": "#000104", "band": "#000105"}
_MARKERS |= {f"c{i}": f"#0002{i:02x}" for i in range(SERIES)} | {f"h{i}": f"#0003{i:02x}" for i in range(HEAT)}
_MARKERS |= {f"x{i}": f"#0004{i:02x}" for i in range(HEAT)}
INK, MUTED, GRID, PAPER, BAND = (_MARKERS[name] for name in ("ink", "muted", "grid", "paper", "band"))

_STYLES = ("-", (0, (5, 2)), (0, (1, 1.5)), (0, (6, 2, 1, 2)))
POINTS = ("o", "s", "^", "D", "v", "P", "X", "*")

_RC: Any = {
    "svg.fonttype": "none",
    "svg.hashsalt": "remoe",
    "text.parse_math": False,
    "font.family": "DejaVu Sans",
    "font.size": 11.5,
    "axes.titlesize": 11.5,
    "axes.labelsize": 11.5,
    "xtick.labelsize": 11,
    "ytick.labelsize": 11,
    "text.color": INK,
    "axes.labelcolor": INK,
    "axes.titlecolor": INK,
    "axes.edgecolor": MUTED,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "axes.facecolor": "none",
    "figure.facecolor": "none",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.grid.axis": "y",
    "axes.axisbelow": True,
    "grid.color": GRID,
    "grid.linewidth": 0.8,
    "lines.linewidth": 1.7,
    "lines.solid_capstyle": "round",
    "axes.linewidth": 0.8,
    "axes.unicode_minus": True,
    "axes.formatter.limits": (-4, 6),
    "hatch.linewidth": 0.7,
    "hatch.color": MUTED,
}


def series_colour(index: int) -> str:
    """The colour of the index-th run or domain; it is told apart by colour-blind readers too."""
    return _MARKERS[f"c{index % SERIES}"]


def series_style(index: int) -> Any:
    """A dash pattern that changes where the colours start again."""
    return _STYLES[index // SERIES % len(_STYLES)]


def heat_colour(share: float) -> str:
    """A colour of the sequential scale, 0 to 1."""
    return _MARKERS[f"h{heat_step(share)}"]


def heat_text_colour(share: float) -> str:
    """The colour of text on `heat_colour(share)`."""
    return _MARKERS[f"x{heat_step(share)}"]


def heat_step(share: float) -> int:
    """The step of the sequential scale, 0 to HEAT - 1, for a share of 0 to 1."""
    return min(HEAT - 1, max(0, int(share * HEAT)))


def chart(paint: Callable[[Any], None], *, label: str, height: int = HEIGHT, **grid: Any) -> Html:
    """Draw one chart: `paint` gets the axes (an array of them if `grid` asks for several, as `subplots` does)."""
    try:
        import matplotlib
        from matplotlib.backends.backend_svg import FigureCanvasSVG
        from matplotlib.figure import Figure
    except ImportError:
        raise MissingExtraError("matplotlib", "report") from None

    with matplotlib.rc_context(_RC):
        figure = Figure(figsize=(WIDTH / 72, height / 72), layout="constrained")
        FigureCanvasSVG(figure)
        paint(figure.subplots(**grid))
        out = io.StringIO()
        figure.savefig(out, format="svg", metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
    return _inline(out.getvalue(), label)


def line(axes: "Axes", steps: np.ndarray, values: np.ndarray, index: int, **style: Any) -> None:
    """A curve in the index-th colour, thinned to what the chart's width can show."""
    steps, values = thin(steps, values)
    style = {"color": series_colour(index), "linestyle": series_style(index)} | style
    axes.plot(steps, values, **style)


def thin(steps: np.ndarray, values: np.ndarray, bins: int = 300) -> tuple[np.ndarray, np.ndarray]:
    """At most two points a bin, its lowest and its highest, so that spikes stay visible."""
    if len(steps) <= 2 * bins:
        return steps, values
    keep: set[int] = {0, len(steps) - 1}
    for part in np.array_split(np.arange(len(steps)), bins):
        keep |= {int(part[np.argmin(values[part])]), int(part[np.argmax(values[part])])}
    chosen = np.array(sorted(keep))
    return steps[chosen], values[chosen]


def compact(number: float) -> str:
    """An axis number with a unit letter: 1500 is 1.5k, 2000000 is 2M."""
    for unit, letter in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if abs(number) >= unit:
            return f"{number / unit:.3g}{letter}"
    return f"{number:.3g}"


def compact_ticks(axis: Any) -> None:
    """Write the ticks of an axis with unit letters."""
    from matplotlib.ticker import FuncFormatter, MaxNLocator

    axis.set_major_locator(MaxNLocator(nbins=6, integer=True))
    axis.set_major_formatter(FuncFormatter(lambda value, _: compact(value)))


def log_scale(axis: Any) -> None:
    """A log axis whose ticks read 10⁻³: matplotlib's own are TeX, which stays off because labels may hold anything."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    axis.axes.set_yscale("log")
    axis.set_major_locator(LogLocator(numticks=6))
    axis.set_major_formatter(FuncFormatter(lambda value, _: power_of_ten(value)))
    axis.set_minor_formatter(NullFormatter())


def power_of_ten(value: float) -> str:
    """0.001 as 10⁻³; 0.1, 1 and 10 as they are."""
    exponent = round(float(np.log10(value)))
    if -2 <= exponent <= 2:
        return f"{value:g}"
    return "10" + str(exponent).translate(str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹"))


def whole_ticks(axis: Any, count: int, first: int = 0) -> None:
    """Ticks at whole numbers `first` ... `first + count - 1`, all of them where there is room."""
    every = max(1, -(-count // 16))
    axis.set_ticks(range(first, first + count, every))


def _inline(svg: str, label: str) -> Html:
    """An SVG file as an element of a page: no prolog, no metadata, no ids that clash, colours as variables."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>\s*", "", svg, flags=re.DOTALL)
    svg = re.sub(r"<[^>]+>", lambda found: re.sub(r"(\d+\.\d\d)\d+", r"\1", found[0]), svg)
    svg = re.sub(r"\n\s*", "\n", svg)
    svg = _without_clashing_ids(svg, label)
    for name, colour in _MARKERS.items():
        svg = svg.replace(colour, f"var(--{name})")
    view_box = re.search(r'viewBox="([^"]+)"', svg)
    assert view_box, "matplotlib writes a viewBox"
    opened = f'<svg role="img" aria-label="{escape(label)}" viewBox="{view_box[1]}">'
    return Html(opened + svg[svg.index(">") + 1 :].strip())


def _without_clashing_ids(svg: str, label: str) -> str:
    used = set(re.findall(r'(?:href="#|url\(#)([^")]+)', svg))
    prefix = re.sub(r"[^a-z0-9]+", "-", label.lower()).strip("-") + "-"
    svg = re.sub(r' id="([^"]+)"', lambda found: f' id="{prefix}{found[1]}"' if found[1] in used else "", svg)
    return re.sub(r'(xlink:href="#|url\(#)', lambda found: found[1].replace("xlink:", "") + prefix, svg)
