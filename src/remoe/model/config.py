"""Settings of the native model: the `model:` section of a run's config."""

import math
from dataclasses import fields
from typing import Any

import torch
from torch import nn

from remoe.config import check_choice, check_positive, check_size, config_class, setting
from remoe.errors import ConfigError
from remoe.moe import MoEConfig, build_router


@config_class
class ReMoEConfig:
    """A decoder any of whose layers can be an MoE layer. Defaults are small; recipes hold the papers'."""

    vocab_size: int | None = setting(None, "token ids; null: the tokenizer's")
    hidden_size: int = setting(256, "width H of the residual stream")
    num_layers: int = setting(4, "decoder layers L")
    num_heads: int = setting(4, "attention heads")
    num_kv_heads: int | None = setting(2, "key/value heads of grouped-query attention; null: num_heads")
    head_size: int | None = setting(None, "width of one head; null: hidden_size / num_heads")
    intermediate_size: int = setting(512, "width F of a dense MLP, and of one expert before granularity splits it")
    num_experts: int = setting(8, "experts E a layer, before granularity")
    top_k: int = setting(1, "experts k per token, before granularity (an average for ReLU routing)")
    granularity: int = setting(1, "G: E*G experts of width F/G, k*G active")
    router: str | dict[str, Any] = setting("relu", "router name, or {name: NAME, option: value, ...}")
    moe_layers: str | list[int] = setting("all", "all, none (a dense model), or a list of layer indices from 0")
    thresholds: float | list[float] = setting(
        0.0, "density dial: what router logits must be above; one number, or one for each MoE layer"
    )
    tie_embeddings: bool = setting(False, "use the input embedding as the output head too")
    rope_theta: float = setting(1_000_000.0, "base of the rotary position embedding (ReMoE's scripts)")
    norm_eps: float = setting(1e-5, "epsilon of RMSNorm (ReMoE's scripts)")
    init_std: float = setting(0.01, "initial standard deviation; output projections get it divided by sqrt(2L)")
    block: str = setting("pre_norm", "pre_norm (LLaMA-style), or post_norm: RMoE's character models")
    attention_span: int = setting(2048, "post_norm: how many tokens back attention sees")
    dropout: float = setting(0.0, "post_norm: dropout of attention, in experts and of their output")
    kernels: str = setting("auto", "how swiglu experts are run: auto, triton, quack, grouped_mm or plain")

    def __post_init__(self) -> None:
        for key in ("hidden_size", "num_layers", "num_heads", "intermediate_size"):
            check_size(f"model.{key}", getattr(self, key))
        if self.vocab_size is not None:
            check_size("model.vocab_size", self.vocab_size)
        for key in ("rope_theta", "norm_eps", "init_std"):
            check_positive(f"model.{key}", getattr(self, key))
        self._check_heads()
        self._check_block()
        self._check_layers()
        self._check_moe()

    def _check_heads(self) -> None:
        if self.head_size is None and self.hidden_size % self.num_heads:
            raise ConfigError(
                f"model.num_heads is {self.num_heads}, must divide model.hidden_size = {self.hidden_size}; "
                "or set model.head_size"
            )
        if self.head_width < 1 or (self.head_width % 2 and not self.is_post_norm):
            raise ConfigError(
                f"model.head_size is {self.head_width}, must be even and at least 2: rotary embeddings turn pairs"
            )
        check_size("model.head_size", self.head_width)
        if self.kv_heads < 1 or self.num_heads % self.kv_heads:
            raise ConfigError(
                f"model.num_kv_heads is {self.num_kv_heads}, must divide model.num_heads = {self.num_heads}"
            )

    def _check_block(self) -> None:
        check_choice("model.block", self.block, ("pre_norm", "post_norm"))
        check_size("model.attention_span", self.attention_span)
        if not 0 <= self.dropout < 1:
            raise ConfigError(f"model.dropout is {self.dropout}, must be at least 0 and below 1")
        if not self.is_post_norm and self.dropout:
            raise ConfigError(f"model.dropout is {self.dropout}, must be 0 with model.block pre_norm, which has none")
        if self.is_post_norm and self.kv_heads != self.num_heads:
            raise ConfigError(f"model.num_kv_heads is {self.num_kv_heads}, must be null with model.block post_norm")
        if self.is_post_norm and self.tie_embeddings:
            raise ConfigError("model.tie_embeddings is true, must be false with model.block post_norm")

    def _check_moe(self) -> None:
        """What the layer checks itself, in a dense model too; its messages do not know this section's name."""
        try:
            moe = self.moe
            router = router_without_values(moe) if self.num_moe_layers else None
        except ConfigError as error:
            is_own_key = str(error).startswith(tuple(field.name for field in fields(self)))
            raise ConfigError(f"model.{error}" if is_own_key else str(error)) from None
        self._check_thresholds(has_dial=getattr(router, "threshold", None) is not None)

    def _check_thresholds(self, has_dial: bool) -> None:
        values = self.thresholds if isinstance(self.thresholds, list) else [self.thresholds]
        if not all(map(math.isfinite, values)):
            raise ConfigError(f"model.thresholds is {self.thresholds}, must be finite; 0 is the trained gate")
        if any(values) and not has_dial:
            raise ConfigError(
                f"model.thresholds is {self.thresholds}, must be 0 without a ReLU gate (router relu or recurrent_relu)"
            )
        if isinstance(self.thresholds, list) and len(values) != self.num_moe_layers:
            raise ConfigError(
                f"model.thresholds has {len(values)} numbers, must be one number, or a list with one for each of "
                f"{self.num_moe_layers} MoE layers"
            )

    def _check_layers(self) -> None:
        if isinstance(self.moe_layers, str):
            if self.moe_layers not in ("all", "none"):
                raise ConfigError(f"model.moe_layers is {self.moe_layers!r}, must be all, none, or a list of layers")
            return
        wrong = [layer for layer in self.moe_layers if not 0 <= layer < self.num_layers]
        if wrong:
            raise ConfigError(f"model.moe_layers names layer {wrong[0]}, must be between 0 and {self.num_layers - 1}")

    @property
    def is_post_norm(self) -> bool:
        """Whether this is RMoE's character model: post-norm layers, relative positions, ReLU experts with biases."""
        return self.block == "post_norm"

    @property
    def head_width(self) -> int:
        """Width D of one attention head."""
        return self.head_size if self.head_size is not None else self.hidden_size // self.num_heads

    @property
    def kv_heads(self) -> int:
        """Number of key/value heads."""
        return self.num_kv_heads if self.num_kv_heads is not None else self.num_heads

    def is_moe_layer(self, layer_index: int) -> bool:
        """Whether this layer has experts instead of a dense MLP."""
        if isinstance(self.moe_layers, str):
            return self.moe_layers == "all"
        return layer_index in self.moe_layers

    @property
    def num_moe_layers(self) -> int:
        """How many layers have experts."""
        return sum(self.is_moe_layer(layer) for layer in range(self.num_layers))

    @property
    def layer_thresholds(self) -> list[float]:
        """The density dial of each MoE layer."""
        if isinstance(self.thresholds, list):
            return self.thresholds
        return [self.thresholds] * self.num_moe_layers

    @property
    def moe(self) -> MoEConfig:
        """The settings of each MoE layer."""
        return MoEConfig(
            hidden_size=self.hidden_size,
            intermediate_size=self.intermediate_size,
            num_experts=self.num_experts,
            top_k=self.top_k,
            granularity=self.granularity,
            router=self.router,
            vocab_size=self.vocab_size,
            init_std=self.init_std,
            experts="relu" if self.is_post_norm else "swiglu",
            dropout=self.dropout,
            kernels=self.kernels,
        )


def router_without_values(config: MoEConfig) -> nn.Module:
    """A layer's router on the meta device: its sizes, its penalty, and ConfigError for options it does not have."""
    with torch.device("meta"):
        return build_router(
            config.router_name,
            config.hidden_size,
            config.routed_experts,
            config.routed_top_k,
            **config.router_options,
        )
