"""A page with the density curves of models that are no runs: exports, and converted models of transformers."""

from collections.abc import Sequence
from pathlib import Path

from remoe.analysis import page
from remoe.analysis.figures.density import RunDensity, figure_of
from remoe.eval.density import load_curve
from remoe.training.run import DENSITY, is_run


def has_curve_alone(folder: Path) -> bool:
    """Whether `remoe density` measured the model in a folder that is no run."""
    return not is_run(folder) and (folder / DENSITY).is_file()


def write_curves(folders: Sequence[Path], to: Path) -> Path:
    """Write one self-contained HTML page, `to` or report.html in that folder; returns its path."""
    to = to if to.suffix else to / "report.html"
    names = [str(folder) for folder in folders]
    curves = [load_curve(folder / DENSITY) for folder in folders]
    figure = figure_of(
        [RunDensity(name, place, curve) for place, (name, curve) in enumerate(zip(names, curves, strict=True))]
    )
    text = page.render_alone(figure.title, names, figure, f"{DENSITY} in a model's folder")
    to.parent.mkdir(parents=True, exist_ok=True)
    to.write_text(text, encoding="utf-8")
    return to
