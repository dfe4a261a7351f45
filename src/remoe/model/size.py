"""Parameters, FLOPs and memory of a model, from its config alone."""

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from remoe.config import check_choice, check_range
from remoe.errors import ConfigError
from remoe.kernels.expert_mlp.chunks import chunks_of
from remoe.kernels.linear_cross_entropy import CHUNK_BYTES
from remoe.model.config import ReMoEConfig, router_without_values
from remoe.model.recompute import recomputation
from remoe.moe import RouterContext, build_router
from remoe.moe.cells import share_cell
from remoe.moe.experts import row_cap
from remoe.moe.routers import router_class


@dataclass(frozen=True, kw_only=True)
class ParameterCount:
    """Parameters that exist, and those that one token uses on average (router included)."""

    total: int
    active: int


def parameter_count(config: ReMoEConfig) -> ParameterCount:
    """Count a model's parameters without building it (ReMoE §3, RMoE §5)."""
    layers, moe_layers = config.num_layers, config.num_moe_layers
    attention = 2 * config.hidden_size * config.head_width * (config.num_heads + config.kv_heads)
    mlp = _mlp_parameters(config)
    routers = _router_parameters(config) if moe_layers else 0
    shared = _outer_parameters(config) + layers * attention + _layer_norms(config) + routers
    shared += (layers - moe_layers) * mlp
    return ParameterCount(
        total=shared + moe_layers * (mlp + _later_biases(config)) * config.num_experts,
        active=shared + moe_layers * (mlp + _later_biases(config)) * config.top_k,
    )


def _outer_parameters(config: ReMoEConfig) -> int:
    """Embedding, output head, and what stands between layers and head or is shared by all layers."""
    vocab_size = _vocab_size(config)
    vocabulary = vocab_size * config.hidden_size * (1 if config.tie_embeddings else 2)
    if config.is_post_norm:
        return vocabulary + vocab_size + config.head_width * config.attention_span
    return vocabulary + config.hidden_size


def _mlp_parameters(config: ReMoEConfig) -> int:
    """One dense MLP or one expert before granularity."""
    hidden, size = config.hidden_size, config.intermediate_size
    return 2 * hidden * size + size + hidden if config.is_post_norm else 3 * hidden * size


def _later_biases(config: ReMoEConfig) -> int:
    """What granularity adds to an expert: each of its G parts has an output bias."""
    return (config.granularity - 1) * config.hidden_size if config.is_post_norm else 0


def _layer_norms(config: ReMoEConfig) -> int:
    """RMSNorms have a weight, LayerNorms a bias too; a post-norm MoE layer has four, one of them unused."""
    if not config.is_post_norm:
        return 2 * config.num_layers * config.hidden_size
    return (4 * config.num_moe_layers + 2 * (config.num_layers - config.num_moe_layers)) * 2 * config.hidden_size


def flops_per_token(config: ReMoEConfig, sequence_length: int, active_experts: float | None = None) -> float:
    """Forward and backward FLOPs of one token in a sequence of this length (ReMoE §3).

    `active_experts` per token as measured, after granularity; None: top_k. As in the paper: attention scores over the
    whole sequence (post_norm: the span), norms and router left out, nothing recomputed.
    """
    check_range("sequence_length", sequence_length, 1)
    hidden, moe_layers = config.hidden_size, config.num_moe_layers
    projections = 2 * hidden * config.head_width * (config.num_heads + config.kv_heads)
    scores = 2 * sequence_length if not config.is_post_norm else 3 * config.attention_span  # the third: position keys
    mlp = (2 if config.is_post_norm else 3) * hidden * config.intermediate_size
    active = config.top_k if active_experts is None else active_experts / config.granularity
    multiply_adds = config.num_layers * (projections + scores * config.head_width * config.num_heads)
    multiply_adds += mlp * (config.num_layers - moe_layers) + hidden * _vocab_size(config)
    return 3 * 2 * (multiply_adds + mlp * active * moe_layers)


def training_flops_per_token(config: ReMoEConfig, sequence_length: int, active_experts: float | None) -> float:
    """As `flops_per_token`, with the routers' products too: what a run really computes.

    `active_experts` as measured; None for a dense model.
    """
    if config.num_moe_layers == 0:
        return flops_per_token(config, sequence_length)
    options = config.moe.router_options
    if getattr(router_class(config.moe.router_name), "experts", "grouped") == "merged":  # one expert, merged by segment
        active_experts = 1 + config.moe.routed_experts / options.get("segment_length", sequence_length)
    return flops_per_token(config, sequence_length, active_experts) + 3 * config.num_moe_layers * router_flops(config)


def router_flops(config: ReMoEConfig) -> float:
    """Forward FLOPs of one layer's router for one token, counted while a small batch runs through it."""
    counts = [_counted_router_flops(config, num_tokens) for num_tokens in (32, 64)]
    return (counts[1] - counts[0]) / 32  # what does not grow with the tokens (a hypernetwork) is left out


def _counted_router_flops(config: ReMoEConfig, num_tokens: int) -> int:
    from torch.utils.flop_counter import FlopCounterMode

    moe = config.moe
    options = moe.router_options
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        router: Any = build_router(moe.router_name, moe.hidden_size, moe.routed_experts, moe.routed_top_k, **options)
        context = RouterContext(
            state_TP=torch.zeros(num_tokens, router.state_size) if router.state_size else None,
            token_ids_T=torch.zeros(num_tokens, dtype=torch.int64),
            sequence_start_T=torch.arange(num_tokens) == 0,
            layer_index=0,
        )
        with FlopCounterMode(display=False) as counter:
            router(torch.zeros(num_tokens, moe.hidden_size), context)
    return counter.get_total_flops()


def flops_per_sequence(config: ReMoEConfig, sequence_length: int) -> float:
    """Forward and backward FLOPs of one sequence."""
    return sequence_length * flops_per_token(config, sequence_length)


@dataclass(frozen=True, kw_only=True)
class Memory:
    """Estimated bytes of training on one device; activations at the peak of a step."""

    weights: int
    gradients: int
    optimizer: int
    """AdamW's two moments."""
    compute_copies: int
    """Weights cast to bf16 by autocast; 0 in fp32."""
    activations: int
    """With top_k experts active per token."""
    activations_at_start: int
    """At the first steps: ReLU routing starts with half of all gates open."""
    total: int
    total_at_start: int


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What a run needs; `dataclasses.asdict` gives plain values."""

    parameters: ParameterCount
    flops_per_token: float
    memory: Memory


@dataclass(frozen=True, kw_only=True)
class Workload:
    """How the model is trained, as far as memory depends on it."""

    sequence_length: int
    micro_batch_size: int
    precision: str = "fp32"
    activation_checkpointing: bool | str = "none"
    """One of recompute.MODES; true is full."""

    def __post_init__(self) -> None:
        check_range("sequence_length", self.sequence_length, 1)
        check_range("micro_batch_size", self.micro_batch_size, 1)
        check_choice("precision", self.precision, ("fp32", "bf16"))

    @property
    def num_tokens(self) -> int:
        """Tokens of one forward pass."""
        return self.sequence_length * self.micro_batch_size

    @property
    def compute_bytes(self) -> int:
        """Bytes of a number in matrix products."""
        return 2 if self.precision == "bf16" else 4


def plan(config: ReMoEConfig, workload: Workload) -> Plan:
    """Parameters, FLOPs and memory of training this model on one device, without building it."""
    parameters = parameter_count(config)
    return Plan(
        parameters=parameters,
        flops_per_token=flops_per_token(config, workload.sequence_length),
        memory=_memory(config, workload, parameters.total),
    )


def _memory(config: ReMoEConfig, workload: Workload, num_parameters: int) -> Memory:
    weights, gradients, optimizer = 4 * num_parameters, 4 * num_parameters, 8 * num_parameters
    compute_copies = 2 * num_parameters if workload.precision == "bf16" else 0
    activations = _activations(config, workload, config.moe.routed_top_k)
    activations_at_start = _activations(config, workload, active_at_start(config))
    fixed = weights + gradients + optimizer + compute_copies
    return Memory(
        weights=weights,
        gradients=gradients,
        optimizer=optimizer,
        compute_copies=compute_copies,
        activations=activations,
        activations_at_start=activations_at_start,
        total=fixed + activations,
        total_at_start=fixed + activations_at_start,
    )


def active_at_start(config: ReMoEConfig) -> int:
    """Experts of a token in the first steps: with ReLU gates half of all."""
    moe = config.moe
    if config.num_moe_layers == 0 or router_without_values(moe).penalty != "sparsity_l1":
        return moe.routed_top_k
    return max(moe.routed_top_k, moe.routed_experts // 2)


def _activations(config: ReMoEConfig, workload: Workload, active_experts: int) -> int:
    """Bytes kept for the backward pass plus the largest temporary: the loss, or one layer's backward pass.

    As on a GPU; on a CPU each norm keeps one more copy of its input, and more rows than the cap are kept all the same.
    """
    moe_layers = config.num_moe_layers
    dense_layers = config.num_layers - moe_layers
    attention = _attention_bytes(config, workload)
    dense = attention + _dense_mlp_bytes(config, workload) if dense_layers else 0
    moe = attention + _moe_bytes(config, workload, active_experts) if moe_layers else 0
    last_norm = 8 * config.hidden_size
    kept, recomputed = last_norm + dense_layers * dense + moe_layers * moe, 0
    merged = _merged_bytes(config, workload) if moe_layers else 0
    kept_merged = moe_layers * merged
    mode = recomputation("activation_checkpointing", workload.activation_checkpointing)
    if mode != "none":
        kept = last_norm + 4 * config.num_layers * config.hidden_size + moe_layers * _routing_bytes(config)
        recomputed, kept_merged = max(dense, moe), merged
    if mode == "selective":
        kept += moe_layers * _expert_bytes(config, workload, active_experts)
    rows = _row_bytes(config, workload, active_experts) if moe_layers else 0
    temporary = max(_loss_bytes(config, workload), workload.num_tokens * (recomputed + rows))
    return workload.num_tokens * kept + temporary + kept_merged + merged  # the last: a layer's gradients of merged ones


def _attention_bytes(config: ReMoEConfig, workload: Workload) -> int:
    """A token's share: residual and norm output; query, key, value and result of all heads."""
    heads = config.num_heads * config.head_width
    key_value = config.kv_heads * config.head_width if workload.precision == "bf16" else heads
    own = 4 * config.hidden_size + workload.compute_bytes * (config.hidden_size + 2 * heads + 2 * key_value)
    return own + _score_bytes(config, workload) if config.is_post_norm else own


def _score_bytes(config: ReMoEConfig, workload: Workload) -> int:
    """A token's share of relative attention: softmax and dropout mask over the span, and the shares over all slots."""
    span, width = config.attention_span, workload.compute_bytes
    dropout = span if config.dropout else 0
    return config.num_heads * (4 * span + dropout + width * (span + workload.sequence_length))


def _dense_mlp_bytes(config: ReMoEConfig, workload: Workload) -> int:
    """A token's share: residual and norm output; gate, its activation, up, and their product."""
    return 4 * config.hidden_size + workload.compute_bytes * (config.hidden_size + 4 * config.intermediate_size)


def _moe_bytes(config: ReMoEConfig, workload: Workload, active_experts: int) -> int:
    """A token's share: residual, norm output (in fp32 too for the router; GPUs with few experts do without),
    routing, and rows' pre-activations and lists.
    """
    cast = workload.compute_bytes * config.hidden_size if workload.precision == "bf16" else 0
    state_size: Any = router_without_values(config.moe).state_size
    cell = 4 * 5 * state_size  # the state and four gates (RMoE §2.13)
    return 8 * config.hidden_size + cast + _routing_bytes(config) + cell + _pair_bytes(config, workload, active_experts)


def _pair_bytes(config: ReMoEConfig, workload: Workload, active_experts: int) -> int:
    """A token's rows: their lists, and the pre-activations of as many as are kept."""
    kept, *_ = _chunks(config, workload, active_experts)
    return active_experts * 3 * 8 + math.ceil(kept * workload.compute_bytes * 2 * config.moe.expert_size)


def _chunks(config: ReMoEConfig, workload: Workload, active_experts: int) -> list[float]:
    """A token's rows that a layer's kernels work off at a time: all, or those that are kept and then the others."""
    if config.is_post_norm or config.kernels not in ("auto", "triton", "quack"):
        return [active_experts]
    moe, num_tokens = config.moe, workload.num_tokens
    cap = row_cap(moe.kept_rows_per_token, num_tokens)
    chunks = chunks_of(active_experts * num_tokens, cap, moe.hidden_size, moe.expert_size)
    return [chunk.size / num_tokens for chunk in chunks]


def _expert_bytes(config: ReMoEConfig, workload: Workload, active_experts: int) -> int:
    """A token's share of what the experts' kernels return: the rows and the layer's output."""
    return _pair_bytes(config, workload, active_experts) + workload.compute_bytes * config.hidden_size


def _merged_bytes(config: ReMoEConfig, workload: Workload) -> int:
    """One layer's merged matrices, an expert a segment (Lory); 0 for routers that merge none."""
    router: Any = router_without_values(config.moe)
    if getattr(router, "experts", "grouped") != "merged":
        return 0
    segments = workload.micro_batch_size * math.ceil(workload.sequence_length / router.segment_length)
    return workload.compute_bytes * segments * 3 * config.moe.hidden_size * config.moe.expert_size


def _routing_bytes(config: ReMoEConfig) -> int:
    """A token's gates and logits in fp32, and its map."""
    return 9 * config.moe.routed_experts


def _row_bytes(config: ReMoEConfig, workload: Workload, active_experts: int) -> int:
    """A token's share of one layer's backward pass: gathered rows and gradients, which come and go.

    All of the plain path's; GPUs' kernels hold 3F + H numbers of a row at a time.
    """
    moe = config.moe
    combined = 4 * moe.hidden_size if workload.precision == "bf16" else 0
    row = workload.compute_bytes * (3 * moe.hidden_size + 3 * moe.expert_size) + combined
    return round(max(_chunks(config, workload, active_experts)) * row)


def _loss_bytes(config: ReMoEConfig, workload: Workload) -> int:
    """A chunk of the logits; the gradients of hidden states and head, the head's in fp32 and in the compute dtype."""
    vocab_size, width = _vocab_size(config), workload.compute_bytes
    logits = min(width * vocab_size * workload.num_tokens, CHUNK_BYTES)
    head = (4 + width) * vocab_size * config.hidden_size
    return logits + head + width * config.hidden_size * workload.num_tokens


def _vocab_size(config: ReMoEConfig) -> int:
    if config.vocab_size is None:
        raise ConfigError("model.vocab_size is null, must be a number of token ids to count parameters")
    return config.vocab_size


def _router_parameters(config: ReMoEConfig) -> int:
    """All layers' routers, and once the cell that recurrent ones share."""
    router = router_without_values(config.moe)
    cell = share_cell([router])
    return config.num_moe_layers * _num_parameters(router) + (_num_parameters(cell) if cell else 0)


def _num_parameters(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())
