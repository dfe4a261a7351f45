"""`remoe generate`: text from a run, a checkpoint or an export."""

import sys
from collections.abc import Iterable, Iterator
from itertools import chain
from typing import Annotated, Any

from typer import Option

from remoe.cli.options import THRESHOLD, Device, RunPath

LARGEST_SEED = 2**63 - 1


def generate_command(
    path: RunPath,
    prompt: Annotated[str, Option(help="text to go on from; `-` reads it from standard input")] = "",
    max_new_tokens: Annotated[int, Option(help="tokens to add, at most", min=0)] = 200,
    temperature: Annotated[float, Option(help="0 takes the likeliest token each time")] = 0.8,
    top_k: Annotated[int | None, Option(help="only this many likeliest tokens", min=1)] = None,
    top_p: Annotated[float | None, Option(help="only the likeliest that together reach this probability")] = None,
    threshold: Annotated[float | None, Option(help=THRESHOLD)] = None,
    seed: Annotated[int, Option(help="the same seed gives the same text", min=0, max=LARGEST_SEED)] = 0,
    chat: Annotated[bool, Option("--chat", help="answer the prompt, through the template of a fine-tuned run")] = False,
    device: Device = "auto",
) -> None:
    """Continue a prompt.

    A terminal shows the text while it is written; tokens per second are printed on standard error.
    """
    import time

    from remoe.data.chat import encode
    from remoe.model.generate import Sampling
    from remoe.model.thresholds import set_thresholds
    from remoe.training import load
    from remoe.training.saved import chat_template_of, tokenizer_of
    from remoe.training.setup import pick_device

    model, tokenizer = load(path).to(pick_device(device)), tokenizer_of(path)
    if threshold is not None:
        set_thresholds(model, threshold)
    text = sys.stdin.read() if prompt == "-" else prompt
    if chat:
        text = chat_template_of(path).render([{"role": "user", "content": text}], add_generation_prompt=True)
    ids = encode(tokenizer, text).tolist() or [tokenizer.eod]
    ends = frozenset({tokenizer.eod})
    sampling = Sampling(temperature=temperature, top_k=top_k, top_p=top_p, stop_tokens=ends, seed=seed)
    started, new = time.perf_counter(), []
    for piece in _pieces(tokenizer, ids, _new_tokens(model, ids, max_new_tokens, sampling, new)):
        print(piece, end="", flush=True)
    seconds = time.perf_counter() - started
    print()
    print(f"{len(new)} tokens in {seconds:.2f} s, {len(new) / seconds:,.1f} tokens/s", file=sys.stderr)


def _new_tokens(model: Any, ids: list[int], most: int, sampling: Any, new: list[int]) -> Iterator[int]:
    """The tokens after the prompt's up to one that stops, each also put into `new`."""
    import torch

    from remoe.model.generate import Prompt, stream_tokens

    prompt = Prompt(torch.tensor([ids], device=next(model.parameters()).device))
    for tokens_B in stream_tokens(model, prompt, most, sampling):
        new.append(int(tokens_B))
        yield new[-1]
        if new[-1] in sampling.stop_tokens:
            return


def _pieces(tokenizer: Any, ids: list[int], new: Iterable[int]) -> Iterable[str]:
    """The text: piece by piece for a person who watches, else as a whole."""
    from remoe.data.text_stream import text_pieces

    tokens = chain(ids, new)
    return text_pieces(tokenizer, tokens) if sys.stdout.isatty() else [tokenizer.decode(list(tokens))]
