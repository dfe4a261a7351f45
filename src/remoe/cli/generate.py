"""`remoe generate`: text from a run, a checkpoint or an export."""

import sys
from typing import Annotated

from typer import Option

from remoe.cli.options import THRESHOLD, RunPath


def generate_command(
    path: RunPath,
    prompt: Annotated[str, Option(help="text to go on from; `-` reads it from standard input")] = "",
    max_new_tokens: Annotated[int, Option(help="tokens to add, at most")] = 200,
    temperature: Annotated[float, Option(help="0 takes the likeliest token each time")] = 0.8,
    top_k: Annotated[int | None, Option(help="only this many likeliest tokens")] = None,
    top_p: Annotated[float | None, Option(help="only the likeliest that together reach this probability")] = None,
    threshold: Annotated[float | None, Option(help=THRESHOLD)] = None,
    seed: Annotated[int, Option(help="the same seed gives the same text")] = 0,
) -> None:
    """Continue a prompt."""
    import torch

    from remoe.model.thresholds import set_thresholds
    from remoe.training import load
    from remoe.training.saved import tokenizer_of

    model, tokenizer = load(path), tokenizer_of(path)
    if threshold is not None:
        set_thresholds(model, threshold)
    text = sys.stdin.read() if prompt == "-" else prompt
    ids = [*tokenizer.encode(text)] or [tokenizer.eod]
    tokens_BS = model.generate(
        torch.tensor([ids]),
        max_new_tokens,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        stop_tokens=(tokenizer.eod,),
        seed=seed,
    )
    print(tokenizer.decode(tokens_BS[0].tolist()))
