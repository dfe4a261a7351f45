"""Hash routing: the expert is a fixed function of the input token's id; nothing is learned (Roller et al. 2021)."""

import heapq
from typing import TypeVar, cast

import torch
from torch import Tensor, nn

from remoe.config import check_choice
from remoe.errors import ConfigError
from remoe.moe.routing import RouterContext, Routing, without_masked_tokens

Ids = TypeVar("Ids", int, Tensor)


class HashRouter(nn.Module):
    """Expert = table[token id], gate 1; top_k above 1 takes the experts after it too (slices of one wide expert).

    `table` is `mod` (id mod E, ReMoE's), `random` (a scrambled id mod E), or `balanced`: ids from the most frequent
    on, each to the expert with the least load so far, by the counts that the trainer hands to `prepare`; until then it
    is id mod E. `per_layer` gives each layer its own random or balanced table.
    """

    state_size = 0
    penalty = "none"
    table: Tensor
    """int64 [V]: the first expert of each id; only balanced hashing has one. It is in the checkpoint."""

    def __init__(
        self, hidden_size: int, num_experts: int, top_k: int, *,
        table: str = "mod", per_layer: bool = False, seed: int = 0, vocab_size: int | None = None,
    ) -> None:  # fmt: skip
        super().__init__()
        check_choice("router option table", table, ("mod", "random", "balanced"))
        if per_layer and table == "mod":
            raise ConfigError("router option per_layer needs table random or balanced: id mod E is one for all layers")
        self.num_experts = num_experts
        self.top_k = top_k
        self.kind = table
        self.per_layer = per_layer
        self.seed = seed
        if table == "balanced":
            self.register_buffer("table", torch.arange(vocab_size or 0) % num_experts)

    def forward(self, hidden_TH: Tensor, context: RouterContext | None = None) -> Routing:
        """Route each token by its id; the hidden states only say how many tokens there are and on which device."""
        if context is None or context.token_ids_T is None:
            raise ConfigError("router 'hash' routes by token ids; give them as token_ids_T of its RouterContext")
        first_T1 = self._first_expert(context.token_ids_T, context.layer_index)[:, None]
        expert_TK = (first_T1 + torch.arange(self.top_k, device=hidden_TH.device)) % self.num_experts
        closed_TE = torch.zeros(len(hidden_TH), self.num_experts, dtype=torch.bool, device=hidden_TH.device)
        routing_map_TE = closed_TE.scatter(1, expert_TK, True)
        weights_TE = routing_map_TE.to(torch.promote_types(hidden_TH.dtype, torch.float32))
        return without_masked_tokens(Routing(weights_TE, routing_map_TE), context)

    @property
    def needs_token_counts(self) -> bool:
        """Whether `prepare` has anything to do; counting a large text takes a while."""
        return self.kind == "balanced"

    def prepare(self, token_counts_V: Tensor, layer_index: int) -> None:
        """Fill the balanced table from the training text's token counts."""
        if len(token_counts_V) != len(self.table):
            raise ConfigError(
                f"router 'hash' has a table of {len(self.table)} ids, got counts of {len(token_counts_V)}; "
                "set its option vocab_size (a model does)"
            )
        seed = scrambled(self.seed, layer_index) if self.per_layer else None
        self.table.copy_(balanced_table(token_counts_V, self.num_experts, seed))

    def _first_expert(self, token_ids_T: Tensor, layer_index: int | None) -> Tensor:
        if self.kind == "balanced":
            if len(self.table) == 0:
                raise ConfigError("router 'hash' with table balanced needs its option vocab_size (a model sets it)")
            return self.table[token_ids_T]
        if self.kind == "mod":
            return token_ids_T % self.num_experts
        if self.per_layer and layer_index is None:
            raise ConfigError("router 'hash' with per_layer needs layer_index in its RouterContext")
        layer = layer_index if self.per_layer and layer_index is not None else 0
        return scrambled(token_ids_T, scrambled(self.seed, layer)) % self.num_experts


def scrambled(ids: Ids, salt: int) -> Ids:
    """A fixed pseudo-random number below 2^32 for each id, another one for each salt."""
    mixed = (ids + salt * 0x9E3779B9) & 0xFFFFFFFF
    for _ in range(2):
        mixed = (((mixed >> 16) ^ mixed) * 0x45D9F3B) & 0xFFFFFFFF  # stays below 2^59: int64 never overflows
    return (mixed >> 16) ^ mixed


def balanced_table(token_counts_V: Tensor, num_experts: int, seed: int | None = None) -> Tensor:
    """Each id's expert, int64 [V]: ids by falling count, each to the expert with the least load so far.

    A seed blurs the order (a count passes for as little as half of itself), so that tables differ.
    """
    counts_V = token_counts_V.to("cpu", torch.float64) + 1  # ids that never occur are spread as well
    rank_V = counts_V
    if seed is not None:
        draw_V = torch.rand(len(counts_V), generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        rank_V = counts_V * (1 - draw_V / 2)
    counts = cast(list[float], counts_V.tolist())  # pyright: ignore[reportUnknownMemberType]
    order = cast(list[int], rank_V.argsort(descending=True, stable=True).tolist())  # pyright: ignore[reportUnknownMemberType]
    loads = [(0.0, expert) for expert in range(num_experts)]
    experts = [0] * len(counts)
    for token in order:
        load, experts[token] = loads[0]
        heapq.heapreplace(loads, (load + counts[token], experts[token]))
    return torch.tensor(experts, dtype=torch.int64)
