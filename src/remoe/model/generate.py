"""Text from the model: one token a step, keys and values kept, greedy or sampled."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from remoe.config import check_range
from remoe.errors import ConfigError
from remoe.model.decode import Decoding, DecodingModel, decoding_for, give_back

_STEPS_BETWEEN_LOOKS = 16  # on a GPU: to see whether all rows have stopped, the host waits


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How the next token is chosen from the logits."""

    temperature: float = 0.0
    """0 is greedy; else the logits are divided by it."""
    top_k: int | None = None
    """Only this many likeliest tokens."""
    top_p: float | None = None
    """Only the likeliest tokens that together reach this probability."""
    stop_tokens: frozenset[int] = frozenset()
    """A row ends with any of these."""
    seed: int = 0

    def __post_init__(self) -> None:
        check_range("temperature", self.temperature, 0.0, fix="0 is greedy")
        if self.top_k is not None:
            check_range("top_k", self.top_k, 1, fix="None keeps all tokens")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise ConfigError(f"top_p is {self.top_p}, must be above 0 and at most 1; None keeps all tokens")

    def stops(self, device: torch.device) -> Tensor:
        """The stop tokens, int64."""
        return torch.tensor(sorted(self.stop_tokens), dtype=torch.int64, device=device)


class Prompt(NamedTuple):
    """What to go on from."""

    tokens_BS: Tensor
    token_mask_BS: Tensor | None = None
    """Bool: false for padding, on the left; None: there is none."""


def generate_tokens(
    model: DecodingModel, prompt: Prompt, max_new_tokens: int, sampling: Sampling, cuda_graphs: bool = True
) -> Tensor:
    """The prompts, each followed by up to `max_new_tokens` tokens: int64 [B, at most S + max_new_tokens].

    Ends early once every row has stopped; a row that stopped before is filled up with its stop token.
    """
    new = list(stream_tokens(model, prompt, max_new_tokens, sampling, cuda_graphs))
    if not new:
        return prompt.tokens_BS
    new_BS = torch.stack(new, dim=1)
    return torch.cat((prompt.tokens_BS, new_BS[:, : _used(new_BS, sampling)]), dim=1)


@torch.inference_mode(False)  # else what the model keeps for the next text would be unusable outside of inference mode
@torch.no_grad()
def stream_tokens(
    model: DecodingModel, prompt: Prompt, max_new_tokens: int, sampling: Sampling, cuda_graphs: bool = True
) -> Iterator[Tensor]:
    """The new tokens one place after the other, int64 [B] each, as soon as they are on their way.

    A GPU works on while the caller does; it may go on for up to 15 places after every row has stopped. The model is in
    eval mode until the end.
    """
    _check(model, prompt, max_new_tokens, sampling)
    was_training = model.training
    model.eval()
    decoding = decoding_for(model, prompt.tokens_BS, max_new_tokens, cuda_graphs)
    try:
        yield from _continue(model, decoding, prompt, max_new_tokens, sampling)
    except Exception:
        decoding = None  # what failed half way is not used again
        raise
    finally:
        give_back(model, decoding)
        model.train(was_training)


def _continue(
    model: DecodingModel, decoding: Decoding, prompt: Prompt, max_new_tokens: int, sampling: Sampling
) -> Iterator[Tensor]:
    if max_new_tokens == 0:
        return
    device = prompt.tokens_BS.device
    generator = torch.Generator(device).manual_seed(sampling.seed)
    stops = sampling.stops(device)
    steps_between_looks = _STEPS_BETWEEN_LOOKS if device.type == "cuda" else 1
    tokens_B = choose(decoding.begin(model, *prompt), sampling, generator)
    stopped_B = _is_stop(tokens_B, stops)
    for step in range(1, max_new_tokens):
        yield tokens_B
        if sampling.stop_tokens and step % steps_between_looks == 0 and stopped_B.all():
            return
        # a row that stopped takes no expert's time
        logits_BV = decoding.step(model, tokens_B, ~stopped_B if sampling.stop_tokens else None)
        tokens_B = torch.where(stopped_B, tokens_B, choose(logits_BV, sampling, generator))
        stopped_B = stopped_B | _is_stop(tokens_B, stops)
    yield tokens_B


def _is_stop(tokens: Tensor, stops: Tensor) -> Tensor:
    return (tokens[..., None] == stops).any(-1)  # torch.isin sorts, which waits for the GPU


def _used(new_BS: Tensor, sampling: Sampling) -> int:
    """How many places there are until every row has stopped, that one included."""
    if not sampling.stop_tokens:
        return new_BS.shape[1]
    has_stopped_BS = _is_stop(new_BS, sampling.stops(new_BS.device)).cumsum(1) > 0
    return min(new_BS.shape[1], int((~has_stopped_BS.all(0)).sum()) + 1)


def choose(logits_BV: Tensor, sampling: Sampling, generator: torch.Generator) -> Tensor:
    """The next token of each row: int64 [B]."""
    if sampling.temperature == 0:
        return logits_BV.argmax(-1)
    scores_BV = logits_BV.float() / sampling.temperature
    if sampling.top_k is not None and sampling.top_k < scores_BV.shape[1]:
        smallest_B1 = scores_BV.topk(sampling.top_k).values[:, -1:]
        scores_BV = scores_BV.masked_fill(scores_BV < smallest_B1, -torch.inf)
    if sampling.top_p is not None and sampling.top_p < 1:
        scores_BV = _nucleus(scores_BV, sampling.top_p)
    # torch.multinomial draws in this way too, but first looks at the probabilities, for which a GPU waits
    noise_BV = torch.empty_like(scores_BV).exponential_(generator=generator)
    return (scores_BV.softmax(-1) / noise_BV).argmax(-1)


def _nucleus(scores_BV: Tensor, top_p: float) -> Tensor:
    sorted_BV, order_BV = scores_BV.sort(dim=-1, descending=True)
    probability_BV = sorted_BV.softmax(-1)
    before_BV = probability_BV.cumsum(-1) - probability_BV
    kept_BV = sorted_BV.masked_fill(before_BV >= top_p, -torch.inf)  # the likeliest always stays: nothing is before it
    return torch.empty_like(scores_BV).scatter(1, order_BV, kept_BV)


def _check(model: DecodingModel, prompt: Prompt, max_new_tokens: int, sampling: Sampling) -> None:
    check_range("max_new_tokens", max_new_tokens, 0)
    tokens_BS, token_mask_BS = prompt
    vocab_size = model.config.vocab_size
    assert vocab_size is not None, "a model has a vocabulary size"
    if tokens_BS.dim() != 2 or tokens_BS.numel() == 0:
        raise ConfigError(f"the prompt has shape {list(tokens_BS.shape)}, must be [batch, at least one token]")
    if sampling.top_k is not None:
        check_range("top_k", sampling.top_k, 1, vocab_size)
    for stop_token in sampling.stop_tokens:
        check_range("stop_tokens", stop_token, 0, vocab_size - 1)
    lowest, highest = (int(token) for token in tokens_BS.aminmax())
    check_range("a prompt token", lowest if lowest < 0 else highest, 0, vocab_size - 1, fix="use the model's tokenizer")
    if token_mask_BS is not None and not token_mask_BS[:, -1].all():
        raise ConfigError("token_mask_BS masks the last token of a row, must be true there; pad prompts on the left")
