"""The decoder: embedding, layers with the router state riding along, final norm, output head."""

from collections.abc import Collection, Mapping, Sequence
from typing import NamedTuple, Self

import torch
from torch import Tensor, nn

from remoe.errors import ConfigError
from remoe.model.attention import RotaryPositions
from remoe.model.block import DecoderLayer
from remoe.model.cache import AnyCache, KVCache
from remoe.model.config import ReMoEConfig
from remoe.model.decode import FixedDecoding
from remoe.model.generate import Prompt, Sampling, generate_tokens
from remoe.model.init import initialise
from remoe.model.linear import Embedding, Linear
from remoe.model.loss import Head
from remoe.model.placement import Placement, place_tokens
from remoe.model.post_norm import PostNormLayer, outer_values
from remoe.model.recompute import layer_runner, recomputation
from remoe.model.relative_attention import RelativePositions
from remoe.model.sequence import WHOLE, WholeSequence
from remoe.moe import MoE, RouterContext, Routing, dial
from remoe.moe.cells import share_cell
from remoe.moe.initial import Initial


class Handed(NamedTuple):
    """What layers hand on to those after them, where a process has only some (model.part)."""

    hidden_BSH: Tensor
    state_TP: Tensor | None
    """Router state of recurrent routers; None before the first."""


class ModelOutput(NamedTuple):
    """What the model returns."""

    logits: Tensor
    """[B, S, V] in the dtype the model computes in; upcast them for the loss."""
    routings: tuple[Routing | None, ...]
    """One a layer, None for dense ones; each has T = B*S tokens, row after row."""


class LossOutput(NamedTuple):
    """What the model returns instead when it is given labels."""

    losses: Tensor
    """Cross-entropies in fp32 or wider: their sum, 0-dim, or [B, S] with 0 where there is no label."""
    routings: tuple[Routing | None, ...]
    """As in ModelOutput; also None for layers that another process has."""
    handed: Handed | None = None
    """From a part without the head, whose losses are 0."""


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


def _last_state(routings: Sequence[Routing | None], handed: Handed | None) -> Tensor | None:
    """The router state after these layers; where none of them has a router, what was handed to them."""
    given = None if handed is None else handed.state_TP
    return next((routing.state_TP for routing in reversed(routings) if routing is not None), given)


class ReMoEForCausalLM(nn.Module):
    """The native language model: a decoder, LLaMA-style or post-norm, any of whose layers can be an MoE layer.

    Initial values depend on `seed` and each parameter's name only. Built under `torch.device("meta")` it has shapes
    and no values. Raises ConfigError where the config has no vocabulary size.
    """

    def __init__(self, config: ReMoEConfig, seed: int = 0) -> None:
        super().__init__()
        if config.vocab_size is None:
            raise ConfigError("model.vocab_size is null, must be a number of token ids; set it to the tokenizer's")
        self.config = config
        self.has_head = True
        """False for a part of the model that others go on from (model.part)."""
        self.model = Decoder(config, config.vocab_size)
        self.kept_decoding: FixedDecoding | None = None
        """CUDA graphs of the last text, for the next one like it; gone once the model trains."""
        self.lm_head = (
            None if config.tie_embeddings else Linear(config.hidden_size, config.vocab_size, bias=config.is_post_norm)
        )
        initialise(self, config, seed)

    def initial_values(self) -> Mapping[str, Initial]:
        """How embedding and head start where it is not N(0, init_std)."""
        return outer_values(self.config.hidden_size) if self.config.is_post_norm else {}

    @property
    def activation_checkpointing(self) -> str:
        """What is computed again in the backward pass instead of kept: none, full (each layer) or selective."""
        return self.model.activation_checkpointing

    @activation_checkpointing.setter
    def activation_checkpointing(self, mode: bool | str) -> None:
        self.model.activation_checkpointing = recomputation("activation_checkpointing", mode)

    def forward(
        self,
        tokens_BS: Tensor,
        token_mask_BS: Tensor | None = None,
        *,
        document_BS: Tensor | None = None,
        cache: KVCache | None = None,
        labels_BS: Tensor | None = None,
        reduction: str = "sum",
        logits_to_keep: int | None = None,
        handed: Handed | None = None,
    ) -> ModelOutput | LossOutput:
        """Logits of the next token at each place, or with labels their cross-entropies; and the routings.

        `token_mask_BS`: true for tokens that count; padding is not attended to, routed or counted.
        `document_BS`: attention stays among neighbours with equal numbers; None: plain causal attention.
        `cache`: keys and values of the tokens before these; the call adds its own.
        `labels_BS`: the next tokens, -100 where there is none; on a GPU not all logits exist at once then.
        `reduction`: sum, or none for each place's loss, which has no gradient on a GPU.
        `logits_to_keep`: logits of only so many last places, [B, that, V]; None: of all.
        `handed`: what the layers before these came to, where another process has them; labels are needed then.
        """
        placement = place_tokens(tokens_BS, token_mask_BS, document_BS, cache)
        hidden_BSH, routings = self.model(tokens_BS, placement, cache, handed)
        if cache is not None:
            cache.advance(tokens_BS.shape[1], placement.key_mask_BK)
        if labels_BS is not None:
            own_BS = labels_BS[:, self.model.sequence.columns(labels_BS.shape[1])]
            if not self.has_head:
                no_losses = hidden_BSH.new_zeros(() if reduction == "sum" else own_BS.shape)
                return LossOutput(no_losses, routings, Handed(hidden_BSH, _last_state(routings, handed)))
            return LossOutput(self.head().losses(hidden_BSH, own_BS, reduction), routings)
        kept_BSH = hidden_BSH if logits_to_keep is None else hidden_BSH[:, -logits_to_keep:]
        return ModelOutput(self.head().logits(kept_BSH), routings)

    def head(self) -> Head:
        """The output head: its own weights, or the embedding's."""
        if self.lm_head is None:
            return Head(self.model.embed_tokens.weight, None)
        return Head(self.lm_head.weight, self.lm_head.bias)

    def train(self, mode: bool = True) -> Self:
        """As torch's; a model that trains gives back the memory of its graphs for decoding."""
        if mode:
            self.kept_decoding = None
        return super().train(mode)

    def generate(
        self,
        tokens_BS: Tensor,
        max_new_tokens: int,
        *,
        temperature: float = 0.0,
        top_k: int | None = None,
        top_p: float | None = None,
        stop_tokens: int | Collection[int] = (),
        token_mask_BS: Tensor | None = None,
        seed: int = 0,
        cuda_graphs: bool = True,
    ) -> Tensor:
        """Continue each prompt by up to `max_new_tokens`; returns prompts and new tokens, int64 [B, S + new].

        Temperature 0 is greedy. Prompts of different lengths are padded on the left, false in `token_mask_BS`. A row
        ends with a stop token and is filled up with it. `cuda_graphs`: decode through graphs where the model runs on a
        GPU and can be captured; they are kept for the next call. Raises ConfigError for a value out of range.
        """
        stops = (stop_tokens,) if isinstance(stop_tokens, int) else stop_tokens
        sampling = Sampling(temperature=temperature, top_k=top_k, top_p=top_p, stop_tokens=frozenset(stops), seed=seed)
        return generate_tokens(self, Prompt(tokens_BS, token_mask_BS), max_new_tokens, sampling, cuda_graphs)
