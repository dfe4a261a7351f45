"""One pass of a model over labelled text: who worked for whom, as whole numbers, without storing any routing."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from remoe.data import Batch
from remoe.model import ReMoEForCausalLM
from remoe.moe import Routing, stats

TOKEN_LOADS_LIMIT = 2**21
"""Up to this many (layer, expert, token id) counts, all layers keep them; above, the middle layer only."""


@dataclass(frozen=True, kw_only=True)
class TextCounts:
    """What the routers of a model did with a stretch of text. All arrays are int64; L counts MoE layers only."""

    layers: tuple[int, ...]
    """The model's index of each MoE layer."""
    top_k: int
    domains: tuple[str, ...]
    tokens_D: np.ndarray
    load_LDE: np.ndarray
    """(token, expert) pairs by layer, domain and expert."""
    tokens_by_active_LA: np.ndarray
    """Tokens that used 0, 1, ... E experts, by layer."""
    token_ids_U: np.ndarray
    """The token ids that occurred, ascending."""
    occurrences_U: np.ndarray
    active_U: np.ndarray
    """Active experts summed over all layers and occurrences of an id."""
    token_layers: tuple[int, ...]
    """The MoE layers (counted from 0 among MoE layers) that `token_load_NEU` tells of."""
    token_load_NEU: np.ndarray
    """(token, expert) pairs by layer, expert and token id."""

    @property
    def num_tokens(self) -> int:
        """Tokens counted."""
        return int(self.tokens_D.sum())

    @property
    def num_experts(self) -> int:
        """Experts of a layer."""
        return self.load_LDE.shape[2]

    @property
    def load_LE(self) -> np.ndarray:
        """Share of all tokens at each expert, n_e / T, by layer."""
        return self.load_LDE.sum(1) / max(1, self.num_tokens)


@torch.inference_mode()
def collect(
    model: ReMoEForCausalLM, batches: Iterable[Batch], domains: Sequence[str], *, document_mask: bool = False
) -> TextCounts:
    """Count the routing of every token that has a label, on the model's device. The model is in eval mode."""
    device = next(model.parameters()).device
    vocab_size = model.config.vocab_size
    assert vocab_size is not None, "a model that exists knows its vocabulary"
    tally: _Tally | None = None
    for batch in batches:
        batch = Batch(*(part.to(device) for part in batch))
        document_BS = batch.document_BS if document_mask else None
        routings = model(batch.tokens_BS, document_BS=document_BS).routings
        tally = tally or _Tally(routings, len(domains), vocab_size, device)
        tally.add(batch, [routing for routing in routings if routing is not None])
    assert tally is not None, "validation has at least one batch"
    return tally.counts(tuple(domains), model.config.moe.routed_top_k)


class _Tally:
    """Running sums; integers, so that neither the order nor the size of batches matters."""

    def __init__(
        self, routings: Sequence[Routing | None], num_domains: int, vocab_size: int, device: torch.device
    ) -> None:
        self.layers = tuple(index for index, routing in enumerate(routings) if routing is not None)
        assert self.layers, "a dense model has no routing to count"
        routing = routings[self.layers[0]]
        assert routing is not None
        num_layers, num_experts = len(self.layers), routing.routing_map_TE.shape[1]
        everything = num_layers * num_experts * vocab_size <= TOKEN_LOADS_LIMIT
        self.token_layers = tuple(range(num_layers)) if everything else (num_layers // 2,)

        def zeros(*shape: int) -> Tensor:
            return torch.zeros(shape, dtype=torch.int64, device=device)

        self.tokens_D = zeros(num_domains)
        self.load_LDE = zeros(num_layers, num_domains, num_experts)
        self.tokens_by_active_LA = zeros(num_layers, num_experts + 1)
        self.occurrences_V, self.active_V = zeros(vocab_size), zeros(vocab_size)
        self.token_load_NVE = zeros(len(self.token_layers), vocab_size, num_experts)

    def add(self, batch: Batch, routings: Sequence[Routing]) -> None:
        counted_T = batch.labels_BS.flatten() >= 0
        tokens_T, domain_T = batch.tokens_BS.flatten()[counted_T], batch.domain_BS.flatten()[counted_T]
        ones_T = torch.ones_like(tokens_T)
        self.tokens_D.index_add_(0, domain_T, ones_T)
        self.occurrences_V.index_add_(0, tokens_T, ones_T)
        for layer, routing in enumerate(routings):
            map_TE = routing.routing_map_TE[counted_T].long()
            active_T = stats.active_per_token(routing)[counted_T]
            self.load_LDE[layer].index_add_(0, domain_T, map_TE)
            self.tokens_by_active_LA[layer].index_add_(0, active_T, ones_T)
            self.active_V.index_add_(0, tokens_T, active_T)
            if layer in self.token_layers:
                self.token_load_NVE[self.token_layers.index(layer)].index_add_(0, tokens_T, map_TE)

    def counts(self, domains: tuple[str, ...], top_k: int) -> TextCounts:
        ids_U = self.occurrences_V.nonzero().flatten()
        return TextCounts(
            layers=self.layers,
            top_k=top_k,
            domains=domains,
            tokens_D=self.tokens_D.cpu().numpy(),
            load_LDE=self.load_LDE.cpu().numpy(),
            tokens_by_active_LA=self.tokens_by_active_LA.cpu().numpy(),
            token_ids_U=ids_U.cpu().numpy(),
            occurrences_U=self.occurrences_V[ids_U].cpu().numpy(),
            active_U=self.active_V[ids_U].cpu().numpy(),
            token_layers=self.token_layers,
            token_load_NEU=self.token_load_NVE[:, ids_U].transpose(1, 2).contiguous().cpu().numpy(),
        )
