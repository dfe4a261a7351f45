"""`remoe density`: fewer or more experts a token without training, and what that does to the loss."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from typer import Option

from remoe.cli.options import AsJson, RunPath, words
from remoe.cli.table import table
from remoe.errors import ConfigError

if TYPE_CHECKING:
    from remoe.eval.density import DensityCurve

TARGETS = "active experts a token and MoE layer to measure, comma-separated; by default 0.25 to 1.5 times the model's"
CHOOSE = "save the model with the thresholds for so many active experts; needs --to"


def density_command(
    path: RunPath,
    data: Annotated[str | None, Option(help="text; by default the run's own validation text")] = None,
    targets: Annotated[str | None, Option(help=TARGETS)] = None,
    choose: Annotated[float | None, Option(help=CHOOSE)] = None,
    to: Annotated[Path | None, Option("--to", metavar="DIR", help="folder for that model; new or empty")] = None,
    sequences: Annotated[int, Option(help="sequences to measure on", min=1)] = 64,
    calibration_sequences: Annotated[int, Option(help="sequences before them, to choose on", min=1)] = 32,
    batch_size: Annotated[int, Option(help="sequences of one forward pass", min=1)] = 16,
    device: Annotated[str, Option(help="auto, cpu, cuda or cuda:N")] = "auto",
    as_json: AsJson = False,
) -> None:
    """Measure loss against active experts: the curve of the density dial.

    The first part of the text chooses each layer's threshold for each target, the rest measures. Writes density.json
    beside the weights; `remoe analyze` draws it.
    """
    import dataclasses
    import json
    import sys

    from remoe.eval.density import DensityConfig, measure_density, save_at, save_curve
    from remoe.eval.held_out import text_beside
    from remoe.export import check_new
    from remoe.training.run import DENSITY
    from remoe.training.saved import run_of

    if (choose is None) != (to is None):
        raise ConfigError("--choose and --to go together: the wished number of experts, and the folder for the model")
    if to is not None:
        check_new(to)
    config = DensityConfig(
        targets=_targets(targets, choose), calibration_sequences=calibration_sequences, sequences=sequences,
        batch_size=batch_size, device=device,
    )  # fmt: skip
    text = None if data is None else text_beside(path, data)
    curve = measure_density(path, text, config, report=lambda line: print(line, file=sys.stderr))
    run = run_of(path)
    save_curve(curve, (run.path if run else path) / DENSITY)
    if choose is not None and to is not None:
        save_at(curve.at(choose), path, to)
    print(json.dumps(dataclasses.asdict(curve), indent=1) if as_json else _text(curve))


def _targets(text: str | None, choose: float | None) -> tuple[float, ...]:
    try:
        given = [float(word) for word in words(text or "")]
    except ValueError:
        raise ConfigError(f"--targets is {text!r}, must be numbers such as 0.5,1,1.5") from None
    wished = given if choose is None or choose in given else [*given, choose]
    return tuple(wished)


def _text(curve: "DensityCurve") -> str:
    header = ("thresholds", "active experts", "loss", "minus trained")
    rows = [
        (
            point.kind.replace("_", " ") if point.kind != "one_number" else f"one number, {point.thresholds[0]:.4f}",
            f"{point.active_experts:.3f}",
            f"{point.loss:.4f}",
            f"{point.loss - curve.trained.loss:+.4f}",
        )
        for point in curve.points
    ]
    chosen = f"thresholds chosen on {curve.calibration_tokens:,} tokens, measured on {curve.tokens:,} others"
    return f"{table(header, rows)}\n{chosen}"
