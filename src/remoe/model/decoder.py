"""The decoder: embedding, layers with the router state riding along, final norm."""

from typing import NamedTuple

import torch
from torch import Tensor, nn

from remoe.model.attention import RotaryPositions
from remoe.model.block import DecoderLayer
from remoe.model.cache import AnyCache
from remoe.model.config import ReMoEConfig
from remoe.model.linear import Embedding
from remoe.model.placement import Placement
from remoe.model.post_norm import PostNormLayer
from remoe.model.recompute import layer_runner
from remoe.model.relative_attention import RelativePositions
from remoe.model.sequence import WHOLE, WholeSequence
from remoe.moe import MoE, RouterContext, Routing, dial
from remoe.moe.cells import share_cell


class Handed(NamedTuple):
    """What layers hand on to those after them, where a process has only some (model.part)."""

    hidden_BSH: Tensor
    state_TP: Tensor | None
    """Router state of recurrent routers; None before the first."""


class Decoder(nn.Module):
    """Embedding, layers and final norm; with recurrent routers also the one cell that they share."""

    def __init__(self, config: ReMoEConfig, vocab_size: int) -> None:
        super().__init__()
        self.config = config
        self.activation_checkpointing = "none"
        """One of recompute.MODES."""
        self.sequence: WholeSequence = WHOLE
        self.embed_tokens = Embedding(vocab_size, config.hidden_size)
        layer_class = PostNormLayer if config.is_post_norm else DecoderLayer
        self.layers = nn.ModuleList(layer_class(config, layer) for layer in range(config.num_layers))
        self.own_layers = range(config.num_layers)
        self.positions = RelativePositions(config) if config.is_post_norm else RotaryPositions(config)
        self.norm = nn.Identity() if config.is_post_norm else nn.RMSNorm(config.hidden_size, eps=config.norm_eps)
        self.draws = config.dropout > 0 or any(getattr(module, "draws", False) for module in self.modules())
        if any(config.layer_thresholds):
            dial.set_thresholds(self, config.layer_thresholds)
        self.router_cell = share_cell(layer.mlp.router for layer in self.layers if isinstance(layer.mlp, MoE))

    def forward(
        self, tokens_BS: Tensor, placement: Placement, cache: AnyCache | None, handed: Handed | None = None
    ) -> tuple[Tensor, tuple[Routing | None, ...]]:
        """The normed last hidden states and each layer's routing."""
        attention = self.positions(placement, cache)
        own = self.sequence.columns(tokens_BS.shape[1])
        context = _router_context(tokens_BS, placement, cache, own)
        if handed is None:
            hidden_BSH = self.embed_tokens(tokens_BS[:, own])
        else:
            hidden_BSH, context = handed.hidden_BSH, context._replace(state_TP=handed.state_TP)
        run = layer_runner(self.activation_checkpointing if self._can_recompute(cache) else "none", self.draws)
        routings: list[Routing | None] = [None] * len(self.layers)
        for layer_index in self.own_layers:
            context = context._replace(layer_index=layer_index)
            hidden_BSH, routing = run(self.layers[layer_index], hidden_BSH, attention, context)
            if routing is not None:
                context = context._replace(state_TP=routing.state_TP)
            routings[layer_index] = routing
        return self.norm(hidden_BSH), tuple(routings)

    def present_layers(self) -> list[nn.Module]:
        """The layers that this process has: all, or those of its part of the model."""
        return [self.layers[index] for index in self.own_layers]

    def _can_recompute(self, cache: AnyCache | None) -> bool:
        return cache is None and torch.is_grad_enabled()


def _router_context(tokens_BS: Tensor, placement: Placement, cache: AnyCache | None, own: slice) -> RouterContext:
    token_mask_BS = placement.token_mask_BS
    return RouterContext(
        token_ids_T=tokens_BS[:, own].flatten(),
        token_mask_T=None if token_mask_BS is None else token_mask_BS[:, own].flatten(),
        sequence_start_T=placement.sequence_start_BS[:, own].flatten(),
        cache=None if cache is None else cache.router_memory,
    )
