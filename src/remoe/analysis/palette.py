"""The report's colours, light and dark, as CSS variables. The series stay apart for colour-blind readers."""

from remoe.analysis.drawing import HEAT

_LIGHT = {
    "page": "#f4f5f7",
    "paper": "#ffffff",
    "ink": "#1a1e24",
    "muted": "#66707c",
    "grid": "#e4e8ed",
    "edge": "#dde2e8",
    "band": "#f6e3b8",
    "accent": "#0b63a5",
}
_LIGHT_SERIES = ("#0b63a5", "#d2560b", "#0b7f5d", "#a8478a", "#a97a00", "#4aa0cf", "#6d7580", "#7a4a22")
_LIGHT_TEXT_TURNS, _DARK_TEXT_TURNS = 8, 7
"""The first heat step on which text takes the page's colour instead of the ink's: contrast stays above 4."""
_LIGHT_HEAT = (
    *("#f1f6fb", "#e2edf6", "#d3e4f2", "#bcd8eb", "#a6cde4", "#86bbda", "#66a9d1"),
    *("#4a94c5", "#2f7fb9", "#206caa", "#125a9a", "#0e4480", "#0a2f66"),
)
_DARK = {
    "page": "#0e1116",
    "paper": "#161a21",
    "ink": "#e7eaef",
    "muted": "#98a2af",
    "grid": "#29303a",
    "edge": "#2a313b",
    "band": "#453a1d",
    "accent": "#6cb4ee",
}
_DARK_SERIES = ("#5fb0f0", "#ff9248", "#3ec79b", "#e089c2", "#e3b53c", "#9fd8f7", "#aab3be", "#c9946a")
_DARK_HEAT = (
    *("#1b2530", "#1c3041", "#1c3a52", "#1e4765", "#1f5478", "#24668f", "#2877a6"),
    *("#3a8ab8", "#4d9ccb", "#6cb0d8", "#8cc4e6", "#b6daf2", "#dff1fd"),
)


def css() -> str:
    """Variables for light and dark, by the reader's system or by the page's own switch, and the heat classes."""
    light = _variables(_LIGHT, _LIGHT_SERIES, _LIGHT_HEAT, _LIGHT_TEXT_TURNS)
    dark = _variables(_DARK, _DARK_SERIES, _DARK_HEAT, _DARK_TEXT_TURNS)
    heat = "".join(f".t{step}{{background:var(--h{step});color:var(--x{step})}}\n" for step in range(HEAT))
    return (
        f":root{{color-scheme:light;{light}}}\n"
        f"@media (prefers-color-scheme:dark){{:root:not([data-theme=light]){{color-scheme:dark;{dark}}}}}\n"
        f":root[data-theme=dark]{{color-scheme:dark;{dark}}}\n{heat}"
    )


def _variables(named: dict[str, str], series: tuple[str, ...], heat: tuple[str, ...], text_turns: int) -> str:
    colours = named | {f"c{i}": c for i, c in enumerate(series)} | {f"h{i}": c for i, c in enumerate(heat)}
    colours |= {f"x{step}": named["ink" if step < text_turns else "paper"] for step in range(HEAT)}
    return "".join(f"--{name}:{colour};" for name, colour in colours.items())
