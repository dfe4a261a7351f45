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
    chat: Annotated[bool, Option("--chat", help="answer the prompt, through the template of a fine-tuned run")] = False,
) -> None:
    """Continue a prompt."""
    import torch

    from remoe.data.chat import encode
    from remoe.model.thresholds import set_thresholds
    from remoe.training import load
    from remoe.training.saved import chat_template_of, tokenizer_of

    model, tokenizer = load(path), tokenizer_of(path)
    if threshold is not None:
        set_thresholds(model, threshold)
    text = sys.stdin.read() if prompt == "-" else prompt
    if chat:
        text = chat_template_of(path).render([{"role": "user", "content": text}], add_generation_prompt=True)
    ids = [*encode(tokenizer, text)] or [tokenizer.eod]
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
