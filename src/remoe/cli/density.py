"""`remoe density`: fewer or more experts a token without training, and what that does to the loss."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from typer import Option

from remoe.cli.options import AsJson, Device, RunPath, words
from remoe.cli.table import table
from remoe.errors import ConfigError

if TYPE_CHECKING:
    from remoe.eval.density import DensityCurve

TARGETS = "active experts a token and MoE layer to measure, comma-separated; by default 0.25 to 1.5 times the model's"
LENGTH = "with --data: tokens read at once; by default the run's, and for an export 256"
CHOOSE = "save the model with the thresholds for so many active experts; needs --to"


def density_command(
    path: RunPath,
    data: Annotated[str | None, Option(help="text; by default the run's own validation text")] = None,
    sequence_length: Annotated[int | None, Option(help=LENGTH, min=2)] = None,
    targets: Annotated[str | None, Option(help=TARGETS)] = None,
    choose: Annotated[float | None, Option(help=CHOOSE)] = None,
    to: Annotated[Path | None, Option("--to", metavar="DIR", help="folder for that model; new or empty")] = None,
    one_number: Annotated[bool, Option("--one-number", help="with --choose: one threshold for all layers")] = False,
    sequences: Annotated[int, Option(help="sequences to measure on", min=1)] = 64,
    calibration_sequences: Annotated[int, Option(help="sequences before them, to choose on", min=1)] = 32,
    batch_size: Annotated[int, Option(help="sequences of one forward pass", min=1)] = 16,
    device: Device = "auto",
    as_json: AsJson = False,
) -> None:
    """Measure loss against active experts: the curve of the density dial.

    RUN may also be a model of transformers that `remoe convert` made. The first part of the text chooses each layer's
    threshold for each target, the rest measures. Writes density.json beside the weights; `remoe analyze` draws it.
    """
    import dataclasses
    import json
    import sys

    from remoe.convert.either import load_either, save_at
    from remoe.eval.density import ONE_NUMBER, PER_LAYER, DensityConfig, measure_density, save_curve
    from remoe.eval.held_out import text_beside
    from remoe.export import check_new
    from remoe.training.run import DENSITY
    from remoe.training.saved import run_of

    if (choose is None) != (to is None):
        raise ConfigError("--choose and --to go together: the wished number of experts, and the folder for the model")
    if one_number and choose is None:
        raise ConfigError("--one-number needs --choose: it says which thresholds are saved")
    if sequence_length is not None and data is None:
        raise ConfigError("--sequence-length needs --data")
    if to is not None:
        check_new(to)
    config = DensityConfig(
        targets=_targets(targets, choose), calibration_sequences=calibration_sequences, sequences=sequences,
        batch_size=batch_size, device=device,
    )  # fmt: skip
    text = None if data is None else text_beside(path, data, sequence_length)
    curve = measure_density(path, text, config, lambda line: print(line, file=sys.stderr), load_either)
    run = run_of(path)
    save_curve(curve, (run.path if run else path) / DENSITY)
    if choose is not None and to is not None:
        save_at(curve.at(choose, ONE_NUMBER if one_number else PER_LAYER), path, to)
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
