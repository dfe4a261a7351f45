"""How likely a model finds given continuations: the numbers that multiple-choice evaluations compare."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from remoe.config import check_range
from remoe.errors import ConfigError
from remoe.eval.shared_context import Rows, Tree, lay_out, plant
from remoe.model import ReMoEForCausalLM
from remoe.moe import moe_layers
from remoe.training.micro_batch import autocast
from remoe.training.validation import evaluating

LOGITS_AT_ONCE = 1 << 25


class Request(NamedTuple):
    """Token ids: what is given, at least one, and what is scored after it, at least one."""

    context: Sequence[int]
    continuation: Sequence[int]


class Answer(NamedTuple):
    """Log-probability of a continuation in nats, and whether greedy decoding would write it."""

    loglikelihood: float
    is_greedy: bool


@dataclass(frozen=True, kw_only=True)
class ScoringConfig:
    """How requests are cut and batched."""

    max_length: int
    """Tokens that the model reads of one request; of a longer context the beginning is left out."""
    batch_size: int = 16
    """Requests of `max_length` tokens that a forward pass has room for; of shorter ones it takes more."""
    precision: str = "fp32"
    """fp32, or bf16: products under autocast; logits are always compared in fp32."""
    share_contexts: bool = True
    """Compute what continuations have in common once, where the routers allow it."""

    def __post_init__(self) -> None:
        check_range("max_length", self.max_length, 1)
        check_range("batch_size", self.batch_size, 1)


def loglikelihoods(
    model: ReMoEForCausalLM,
    requests: Sequence[Request],
    config: ScoringConfig,
    on_batch: Callable[[int], object] = lambda _: None,
) -> list[Answer]:
    """An answer a request, in their order. `on_batch` is told how many requests each forward pass has answered.

    Only logits at which a continuation is read are computed. Raises ConfigError for a request without context or
    continuation, or a continuation longer than `max_length`.
    """
    if not requests:
        return []
    device = next(model.parameters()).device
    cut = [_cut(request, config.max_length) for request in requests]
    trees = sorted(plant(cut, config.share_contexts and shares_contexts(model)), key=lambda tree: -tree.length)
    reads: list[tuple[Tensor, Tensor]] = []
    request_M: list[Tensor] = []
    with evaluating(model), autocast(config.precision, device):
        for batch in _batches(trees, config.batch_size * config.max_length):
            rows = lay_out(batch, device)
            reads += _read(model, rows)
            request_M.append(rows.request_M)
            on_batch(sum(len(tree.branches) for tree in batch))
    return _answers(len(requests), reads, torch.cat(request_M))


def shares_contexts(model: ReMoEForCausalLM) -> bool:
    """Whether a token's output depends on the tokens it attends to alone, at whatever place of the row they stand.

    Not so with relative positions, which count places, nor with routers that choose among or average over tokens.
    """
    routers = [layer.router for layer in moe_layers(model)]
    return not model.config.is_post_norm and not any(getattr(router, "mixes_tokens", False) for router in routers)


def _cut(request: Request, max_length: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Context and continuation such that the model reads at most max_length tokens."""
    context, continuation = tuple(request.context), tuple(request.continuation)
    if not context or not continuation:
        raise ConfigError(
            f"a request has {len(context)} tokens of context and {len(continuation)} to score, must have at least 1 of "
            "each; begin an empty context with the end-of-document token"
        )
    if len(continuation) > max_length:
        raise ConfigError(
            f"max_length is {max_length}, must be at least {len(continuation)}: so long is a continuation to score; "
            "raise it (remoe eval: --sequence-length)"
        )
    return context[-(max_length + 1 - len(continuation)) :], continuation


def _batches(trees: Sequence[Tree], max_tokens: int) -> Iterator[list[Tree]]:
    """Trees from the longest on, as many as fill `max_tokens` with their padding."""
    start = 0
    while start < len(trees):
        rows = max(1, max_tokens // trees[start].length)
        yield list(trees[start : start + rows])
        start += rows


def _read(model: ReMoEForCausalLM, rows: Rows) -> Iterator[tuple[Tensor, Tensor]]:
    """Log-probability of each label, and whether another token is likelier; a part of the logits at a time."""
    hidden_BSH, _ = model.model(rows.tokens_BS, rows.placement, None)
    head = model.head()
    size = max(1, LOGITS_AT_ONCE // head.weight_VH.shape[0])
    for place_M, label_M in zip(rows.place_M.split(size), rows.label_M.split(size), strict=True):
        logits_MV = head.logits(hidden_BSH.flatten(0, 1)[place_M])
        logits_MV = logits_MV.to(torch.promote_types(logits_MV.dtype, torch.float32))
        log_prob_M = logits_MV.gather(1, label_M[:, None])[:, 0] - logits_MV.logsumexp(1)
        yield log_prob_M, logits_MV.argmax(1) != label_M


def _answers(count: int, reads: Sequence[tuple[Tensor, Tensor]], request_M: Tensor) -> list[Answer]:
    """Sums over each request's tokens, in float64 and on the CPU: the same bits each time."""
    log_prob_M, is_miss_M = (torch.cat(column).cpu() for column in zip(*reads, strict=True))
    total_R = torch.zeros(count, dtype=torch.float64).index_add_(0, request_M, log_prob_M.to(torch.float64))
    misses_R = torch.zeros(count, dtype=torch.int64).index_add_(0, request_M, is_miss_M.to(torch.int64))
    return [Answer(total, misses == 0) for total, misses in zip(total_R.tolist(), misses_R.tolist(), strict=True)]
