"""`remoe eval`: how well a model predicts text it has not seen, per domain."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from typer import Option

from remoe.cli.options import AsJson, RunPath
from remoe.cli.table import number, table

if TYPE_CHECKING:
    from remoe.data import DataConfig
    from remoe.eval import Evaluation


def eval_command(
    path: RunPath,
    data: Annotated[str | None, Option(help="text to score; by default the run's own validation text")] = None,
    sequences: Annotated[
        int | None, Option(help="sequences to score; by default as many as the run's own", min=1)
    ] = None,
    sequence_length: Annotated[int | None, Option(help="tokens a sequence, for an export (256)", min=2)] = None,
    batch_size: Annotated[int, Option(help="sequences of one forward pass", min=1)] = 16,
    device: Annotated[str, Option(help="auto, cpu, cuda or cuda:N")] = "auto",
    as_json: AsJson = False,
) -> None:
    """Loss, perplexity and bits per character on text."""
    import contextlib
    import json
    import sys

    from remoe.errors import DataError
    from remoe.eval import evaluate_checkpoint

    text = None if data is None else _held_out(path, data, sequence_length)
    try:
        with contextlib.redirect_stdout(sys.stderr):  # standard output is for the scores alone
            result = evaluate_checkpoint(path, text, num_sequences=sequences, batch_size=batch_size, device=device)
    except DataError as error:
        raise DataError(str(error).replace("data.validation", "--data")) if data else error from None
    print(json.dumps(result.to_dict(), indent=1) if as_json else _text(result))


def _held_out(path: Path, data: str, sequence_length: int | None) -> "DataConfig":
    """The run's data settings with `data` as validation text; an export has its tokenizer with it."""
    import dataclasses

    from remoe.data import DataConfig
    from remoe.training.saved import run_of

    run = run_of(path)
    own = run.config.data if run else DataConfig(tokenizer=str(path))
    return dataclasses.replace(own, validation=data, sequence_length=sequence_length or own.sequence_length)


def _text(result: "Evaluation") -> str:
    header = ("text", "loss", "perplexity", "bits/byte", "bits/character", "tokens")
    scores = [*result.per_domain.items(), ("all", result.total)]
    columns = ("loss", "perplexity", "bits_per_byte", "bits_per_character")
    rows = [
        (name, *(f"{getattr(score, column):.4f}" for column in columns), f"{score.tokens:,}") for name, score in scores
    ]
    text = f"{table(header, rows)}\nactive experts per token: {number(result.active_experts, '.3f')}"
    others = (f"\n\nevaluated as {way}:\n{_text(other)}" for way, other in result.others.items())
    return text + "".join(others)
