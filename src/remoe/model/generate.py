"""Text from the model: one token a step, keys and values kept, greedy or sampled."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from remoe.config import check_range
from remoe.errors import ConfigError
from remoe.model.cache import KVCache

if TYPE_CHECKING:
    from remoe.model.decoder import ReMoEForCausalLM


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


@torch.no_grad()
def generate_tokens(
    model: ReMoEForCausalLM, tokens_BS: Tensor, max_new_tokens: int, sampling: Sampling, token_mask_BS: Tensor | None
) -> Tensor:
    """The prompts, each followed by up to `max_new_tokens` tokens: int64 [B, at most S + max_new_tokens].

    Ends early once every row has stopped; a row that stopped before is filled up with its stop token.
    """
    _check(model, tokens_BS, max_new_tokens, sampling, token_mask_BS)
    was_training = model.training
    model.eval()
    try:
        return _extend(model, tokens_BS, max_new_tokens, sampling, token_mask_BS)
    finally:
        model.train(was_training)


def _extend(
    model: ReMoEForCausalLM, tokens_BS: Tensor, max_new_tokens: int, sampling: Sampling, token_mask_BS: Tensor | None
) -> Tensor:
    device = tokens_BS.device
    stop_tokens = torch.tensor(sorted(sampling.stop_tokens), dtype=torch.int64, device=device)
    generator = torch.Generator(device).manual_seed(sampling.seed)
    cache = KVCache(tokens_BS.shape[1] + max_new_tokens)
    pieces = [tokens_BS]
    new_BS, mask_BS = tokens_BS, token_mask_BS
    stopped_B = torch.zeros(tokens_BS.shape[0], dtype=torch.bool, device=device)
    for _ in range(max_new_tokens):
        logits_BV = model(new_BS, mask_BS, cache=cache).logits[:, -1]
        chosen_B = torch.where(stopped_B, new_BS[:, -1], choose(logits_BV, sampling, generator))
        new_BS, mask_BS = chosen_B[:, None], None
        pieces.append(new_BS)
        if stop_tokens.numel():
            stopped_B = stopped_B | torch.isin(chosen_B, stop_tokens)
            mask_BS = ~stopped_B[:, None]  # a row that stopped takes no expert's time
            if stopped_B.all():
                break
    return torch.cat(pieces, dim=1)


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
    return torch.multinomial(scores_BV.softmax(-1), 1, generator=generator)[:, 0]


def _nucleus(scores_BV: Tensor, top_p: float) -> Tensor:
    sorted_BV, order_BV = scores_BV.sort(dim=-1, descending=True)
    probability_BV = sorted_BV.softmax(-1)
    before_BV = probability_BV.cumsum(-1) - probability_BV
    kept_BV = sorted_BV.masked_fill(before_BV >= top_p, -torch.inf)  # the likeliest always stays: nothing is before it
    return torch.empty_like(scores_BV).scatter(1, order_BV, kept_BV)


def _check(
    model: ReMoEForCausalLM, tokens_BS: Tensor, max_new_tokens: int, sampling: Sampling, token_mask_BS: Tensor | None
) -> None:
    check_range("max_new_tokens", max_new_tokens, 0)
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
