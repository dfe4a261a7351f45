"""The language model: the decoder and its output head, logits or losses, and text."""

from collections.abc import Collection, Mapping, Sequence
from typing import NamedTuple

from torch import Tensor

from remoe.errors import ConfigError
from remoe.model.cache import KVCache
from remoe.model.config import ReMoEConfig
from remoe.model.decode import DecodingModel
from remoe.model.decoder import Decoder, Handed
from remoe.model.generate import Prompt, Sampling, generate_tokens
from remoe.model.init import initialise
from remoe.model.linear import Linear
from remoe.model.loss import Head
from remoe.model.placement import place_tokens
from remoe.model.post_norm import outer_values
from remoe.model.recompute import recomputation
from remoe.moe import Routing
from remoe.moe.initial import Initial


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


def _last_state(routings: Sequence[Routing | None], handed: Handed | None) -> Tensor | None:
    """The router state after these layers; where none of them has a router, what was handed to them."""
    given = None if handed is None else handed.state_TP
    return next((routing.state_TP for routing in reversed(routings) if routing is not None), given)


class ReMoEForCausalLM(DecodingModel):
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
