"""ReMoE in transformers, in one file: an export carries it, to load where remoe is not installed.

Hence nothing but torch and transformers is imported here, and there is no kernel of ours: `import remoe.hf` registers
those, as experts implementation "remoe". Weights, their names and the numbers are those of `remoe.ReMoEForCausalLM`.

Shapes: B batch, S sequence, T = B*S tokens, H hidden, F ffn, E experts, K experts listed for a token, N active (token,
expert) rows, P router state, V vocabulary, A heads, D head size.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import initialization as init
from transformers.cache_utils import Cache, DynamicCache
from transformers.configuration_utils import PreTrainedConfig
from transformers.generation import GenerationConfig, GenerationMixin
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS, use_experts_implementation
from transformers.masking_utils import create_causal_mask
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import MoeCausalLMOutputWithPast, MoeModelOutputWithPast
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS, PreTrainedModel
from transformers.utils.generic import can_return_tuple, merge_with_config_defaults
from transformers.utils.output_capturing import OutputRecorder, capture_outputs

ROUTER_OPTIONS: dict[str, dict[str, Any]] = {
    "relu": {"normalize": False, "init_scale": 1.0, "eps": 1e-6, "bias": False},
    "topk": {"bias": False, "renormalize": False, "warmup_steps": 0, "warmup_top_k": None},
    "rmoe": {
        "state_size": 128, "cell": "gru", "projector": "layer", "bias": False, "cell_bias": True, "leak": 0.5,
        "learned_leak": "no", "passing": "full", "norm": "none", "norm_eps": 1e-6, "scale": 1.0, "gate": "topk",
        "renormalize": None, "head": "linear", "head_size": 16, "temperature": 0.3, "input_residual": False,
        "residual_coef": 0.0, "residual_mode": "accumulated", "detach_residual": False, "initial": "normal",
    },
}  # fmt: skip
"""The routers that this file has, with their options and defaults."""
ROUTER_OPTIONS["recurrent_relu"] = ROUTER_OPTIONS["rmoe"] | {"gate": "relu", "norm": "rms", "initial": "matched"}

ALIGNMENT = 64  # bytes, of memory that torch allocates itself
NUM_CELL_GATES = {"gru": 3, "rnn": 1, "lstm": 4}
AUTO_MAP = {
    "AutoConfig": "modeling_remoe.ReMoEConfig",
    "AutoModel": "modeling_remoe.ReMoEModel",  # what vLLM asks for
    "AutoModelForCausalLM": "modeling_remoe.ReMoEForCausalLM",
}


class ReMoEConfig(PreTrainedConfig):
    """Settings of the model, by the names of remoe's `model:` section; transformers' own names work as well.

    `num_experts` and `top_k` count before `granularity` G splits each expert in G. `router` is a name or
    `{"name": NAME, option: value, ...}`; `moe_layers` is "all", "none" or a list of layer indices.
    """

    model_type = "remoe"
    keys_to_ignore_at_inference = [  # noqa: RUF012  the Trainer adds a list to it
        "past_key_values", "router_logits", "aux_loss", "tokens_per_expert", "num_tokens",
    ]  # fmt: skip
    attribute_map = {  # noqa: RUF012  transformers' own name for it
        "num_hidden_layers": "num_layers",
        "num_attention_heads": "num_heads",
        "num_key_value_heads": "num_kv_heads",
        "head_dim": "head_size",
        "tie_word_embeddings": "tie_embeddings",
        "initializer_range": "init_std",
        "rms_norm_eps": "norm_eps",
    }

    vocab_size: int = 257
    hidden_size: int = 256
    num_layers: int = 4
    num_heads: int = 4
    num_kv_heads: int | None = None
    head_size: int | None = None
    intermediate_size: int = 512
    num_experts: int = 8
    top_k: int = 1
    granularity: int = 1
    router: str | dict[str, Any] = "relu"
    moe_layers: str | list[int] = "all"
    thresholds: float | list[float] = 0.0
    """The density dial of ReLU gates: what logits must be above; one number, or one for each MoE layer."""
    tie_embeddings: bool = False
    rope_theta: float = 1_000_000.0
    norm_eps: float = 1e-5
    init_std: float = 0.01
    block: str = "pre_norm"
    hidden_act: str = "silu"
    max_position_embeddings: int = 2048
    """Trained length; positions are rotary, so nothing breaks beyond it."""
    max_active_experts: int | None = None
    """List no more than so many experts a token, the largest gates: a cap for servers of fixed width. None: all."""
    sparsity_coef: float = 0.0
    """Times the L1 term of ReLU gates in `loss`, the mean over layers; remoe.hf.SparsityCallback adapts it."""
    load_balanced: bool = True
    """Weigh each expert's gates in the L1 term by its load (ReMoE eq. 10)."""
    router_aux_loss_coef: float = 0.01
    """Times the load-balancing term of Top-K gates in `loss`, the sum over layers."""
    output_router_logits: bool = False
    use_cache: bool = True
    pad_token_id: int | None = None
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        for name in self.attribute_map.keys() & kwargs.keys():
            setattr(self, name, kwargs.pop(name))
        self.num_kv_heads = self.num_heads if self.num_kv_heads is None else self.num_kv_heads
        self.head_size = self.hidden_size // self.num_heads if self.head_size is None else self.head_size
        self._check_support()
        super().__post_init__(**{"auto_map": dict(AUTO_MAP)} | kwargs)

    def _check_support(self) -> None:
        if self.block != "pre_norm":
            raise ValueError(f"block is {self.block!r}, must be 'pre_norm' in transformers; remoe.load has the others")
        if not any(self.is_moe_layer(layer_idx) for layer_idx in range(self.num_layers)):
            return
        if self.router_name not in ROUTER_OPTIONS:
            names = ", ".join(ROUTER_OPTIONS)
            raise ValueError(f"router is {self.router_name!r}, must be one of {names} in transformers")
        known = ROUTER_OPTIONS[self.router_name]
        given = {} if isinstance(self.router, str) else self.router
        unknown = sorted(given.keys() - known.keys() - {"name", "init_std"})
        if unknown:
            raise ValueError(
                f"router {self.router_name!r} has no option {unknown[0]!r} in transformers; it has {', '.join(known)}"
            )
        if given.get("passing") == "shuffle":
            raise ValueError("router.passing is 'shuffle', an experiment of training, must be another in transformers")

    @property
    def router_name(self) -> str:
        """The router's name."""
        return self.router if isinstance(self.router, str) else str(self.router.get("name"))

    @property
    def router_options(self) -> dict[str, Any]:
        """All options of the router, defaults included."""
        given = {} if isinstance(self.router, str) else self.router
        return ROUTER_OPTIONS.get(self.router_name, {}) | {key: value for key, value in given.items() if key != "name"}

    @property
    def is_relu_gated(self) -> bool:
        """Whether a token's gates are ReLUs, so that it uses any number of experts."""
        return self.router_name == "relu" or self.router_options.get("gate") == "relu"

    @property
    def routed_experts(self) -> int:
        """Experts that the router sees: E = num_experts * G."""
        return self.num_experts * self.granularity

    @property
    def routed_top_k(self) -> int:
        """Experts that a token uses, on average for ReLU gates: top_k * G."""
        return self.top_k * self.granularity

    @property
    def moe_intermediate_size(self) -> int:
        """Width of one routed expert."""
        return self.intermediate_size // self.granularity

    @property
    def num_experts_per_tok(self) -> int:
        """K: the experts listed for a token; of a ReLU gate's, the inactive ones have weight 0."""
        most = self.routed_experts if self.is_relu_gated else self.routed_top_k
        if self.router_options.get("warmup_steps"):
            most = self.router_options["warmup_top_k"] or max(most, 3 * self.routed_experts // 4)
        return most if self.max_active_experts is None else min(most, self.max_active_experts)

    def threshold_of(self, layer_idx: int) -> float:
        """The density dial of a layer."""
        if not isinstance(self.thresholds, list):
            return self.thresholds
        return self.thresholds[sum(self.is_moe_layer(index) for index in range(layer_idx))]

    def is_moe_layer(self, layer_idx: int) -> bool:
        """Whether this layer has experts instead of a dense MLP."""
        return self.moe_layers == "all" if isinstance(self.moe_layers, str) else layer_idx in self.moe_layers


class ReMoERouting(NamedTuple):
    """What a router returns; masked tokens have weight 0 everywhere and are not counted."""

    router_logits: Tensor
    """[T, E], before the gate."""
    top_k_weights: Tensor
    """[T, K] gates, fp32 or wider; 0 where the expert is inactive."""
    top_k_index: Tensor
    """[T, K] int64, always valid experts."""
    state: Tensor | None
    """[T, P] for the next layer's router, if it is a recurrent one."""
    aux_loss: Tensor
    """0-dim, un-weighted: the L1 term of a ReLU gate, the load-balancing term of Top-K."""
    tokens_per_expert: Tensor
    """[E] int64."""


class ReMoERouter(nn.Module):
    """A router computes logits in fp32 or wider, also under autocast, and puts a gate on them."""

    def __init__(self, config: ReMoEConfig, layer_idx: int) -> None:
        super().__init__()
        self.is_relu_gated = config.is_relu_gated
        self.num_experts = config.routed_experts
        self.top_k = config.routed_top_k
        self.num_columns = config.num_experts_per_tok
        self.load_balanced = config.load_balanced
        self.options = config.router_options
        self.threshold = config.threshold_of(layer_idx) if config.is_relu_gated else None

    def forward(
        self,
        hidden_states: Tensor,
        router_state: Tensor | None = None,
        token_mask: Tensor | None = None,
        router_cell: nn.Module | None = None,
    ) -> ReMoERouting:
        """Route hidden_states [T, H]; token_mask [T] is true for tokens that count."""
        dtype = torch.promote_types(next(self.parameters()).dtype, torch.float32)
        with torch.autocast(hidden_states.device.type, enabled=False):
            logits_TE, router_state = self.scores(hidden_states.to(dtype), router_state, router_cell)
        gates_TE, weights_TE, is_active_TE = self.gate(logits_TE)
        num_tokens = _count(hidden_states, token_mask)
        if token_mask is not None:
            is_active_TE = is_active_TE & token_mask[:, None]
            gates_TE, weights_TE = (x.masked_fill(~token_mask[:, None], 0) for x in (gates_TE, weights_TE))
        tokens_per_expert_E = is_active_TE.sum(0)
        penalty = self.sparsity_l1 if self.is_relu_gated else self.load_balancing
        shares_TE = gates_TE if self.is_relu_gated else _without(logits_TE.softmax(-1), token_mask)
        aux_loss = penalty(shares_TE, tokens_per_expert_E, num_tokens.clamp(min=1).to(shares_TE.dtype))
        return ReMoERouting(logits_TE, *self.listed(weights_TE), router_state, aux_loss, tokens_per_expert_E)

    def scores(
        self, hidden_TH: Tensor, state_TP: Tensor | None, cell: nn.Module | None
    ) -> tuple[Tensor, Tensor | None]:
        """Logits [T, E] and the state for the next layer."""
        raise NotImplementedError

    def init_weights(self, std: float) -> None:
        """Draw first values as remoe does."""
        raise NotImplementedError

    def gate(self, logits_TE: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """From logits to the gates that the L1 term sums, the weights, and which experts are active; [T, E] each."""
        if self.threshold is not None:
            gates_TE, is_active_TE = relu_gate(logits_TE, self.threshold)
            return gates_TE, gates_TE, is_active_TE
        return topk_gate(logits_TE, self.top_k, self.top_k, renormalizes(self.options["renormalize"], self.top_k))

    def listed(self, weights_TE: Tensor) -> tuple[Tensor, Tensor]:
        """The K columns that the experts are given: weights and expert numbers."""
        if self.num_columns == self.num_experts:
            return weights_TE, torch.arange(self.num_experts, device=weights_TE.device).expand_as(weights_TE)
        index_TK = weights_TE.topk(self.num_columns, dim=-1).indices
        return weights_TE.gather(1, index_TK), index_TK

    def sparsity_l1(self, gates_TE: Tensor, tokens_per_expert_E: Tensor, num_tokens: Tensor) -> Tensor:
        """(1/T) sum of f_e R_te with f_e = (E/k) n_e/T (ReMoE eq. 10), or f_e = 1 (eq. 9)."""
        sums_E = gates_TE.sum(0) / num_tokens
        if not self.load_balanced:
            return sums_E.sum()
        return (tokens_per_expert_E / num_tokens * (self.num_experts / self.top_k) * sums_E).sum()

    def load_balancing(self, probs_TE: Tensor, tokens_per_expert_E: Tensor, num_tokens: Tensor) -> Tensor:
        """E sum of F_e P_e with F_e = n_e/(kT) and P_e the mean probability (ReMoE §4.2)."""
        shares_E = tokens_per_expert_E / num_tokens
        top_k = shares_E.sum().clamp(min=1)
        return self.num_experts * (shares_E / top_k * (probs_TE.sum(0) / num_tokens)).sum()


class ReMoELinearRouter(ReMoERouter):
    """logits = X W^T (+ b) under a ReLU gate, normalised or not, or under Top-K with its nearly dense warm-up."""

    def __init__(self, config: ReMoEConfig, layer_idx: int) -> None:
        super().__init__(config, layer_idx)
        self.weight = nn.Parameter(torch.empty(self.num_experts, config.hidden_size))
        self.bias = nn.Parameter(torch.empty(self.num_experts)) if self.options.get("bias") else None
        self.scale = nn.Parameter(torch.empty(self.num_experts)) if self.options.get("normalize") else None
        if self.options.get("warmup_steps"):
            self.register_buffer("steps_done", torch.zeros((), dtype=torch.int64))

    def scores(
        self, hidden_TH: Tensor, state_TP: Tensor | None, cell: nn.Module | None
    ) -> tuple[Tensor, Tensor | None]:
        """See ReMoERouter."""
        return affine(hidden_TH, self.weight, self.bias), None

    def gate(self, logits_TE: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """See ReMoERouter; normalised gates are divided by their root mean square over the experts (BlockFFN)."""
        if self.options.get("warmup_steps"):
            is_over = self.steps_done >= self.options["warmup_steps"]
            top_k = torch.where(is_over, self.top_k, self.num_columns)
            return topk_gate(logits_TE, self.num_columns, top_k, self.options["renormalize"])
        gates_TE, weights_TE, is_active_TE = super().gate(logits_TE)
        if self.scale is not None:
            mean_square_T1 = gates_TE.square().mean(dim=-1, keepdim=True)
            weights_TE = gates_TE * torch.rsqrt(mean_square_T1 + self.options["eps"]) * self.scale.to(gates_TE.dtype)
        return gates_TE, weights_TE, is_active_TE

    def init_weights(self, std: float) -> None:
        """See ReMoERouter."""
        init.normal_(self.weight, std=std)
        if self.bias is not None:
            init.normal_(self.bias, std=std)
        if self.scale is not None:
            init.constant_(self.scale, self.options["init_scale"])


class ReMoERecurrentRouter(ReMoERouter):
    """u = P x; h = cell(u, h of the layer before); logits = s G N(h) + c; then ReLU, or Top-K (RMoE §2, §7).

    The state is [cell state, and with r-alpha the logits handed on].
    """

    def __init__(self, config: ReMoEConfig, layer_idx: int) -> None:
        super().__init__(config, layer_idx)
        options, width = self.options, self.options["state_size"]
        self.hidden_size = config.hidden_size
        self.cell_size = width * (2 if options["cell"] == "lstm" else 1)
        has_projector, is_cosine = options["projector"] == "layer", options["head"] == "cosine"
        read_size = options["head_size"] if is_cosine else width
        self.projector = _parameter(has_projector, width, config.hidden_size)
        self.projector_bias = _parameter(has_projector and options["bias"], width)
        self.head_proj = _parameter(is_cosine, read_size, width)
        self.head = nn.Parameter(torch.empty(self.num_experts, read_size))
        self.head_bias = _parameter(options["bias"], self.num_experts)
        self.log_temperature = _parameter(is_cosine, 1)
        if options["input_residual"]:  # else no such attribute: PEFT takes a `weight` of None for one to adapt
            self.weight = nn.Parameter(torch.empty(self.num_experts, config.hidden_size))

    def scores(
        self, hidden_TH: Tensor, state_TP: Tensor | None, cell: nn.Module | None
    ) -> tuple[Tensor, Tensor | None]:
        """See ReMoERouter; the first layer's state is 0."""
        assert cell is not None, "the model hands its cell to recurrent routers"
        if state_TP is None:  # one row for all tokens
            handed_size = self.num_experts if self.options["residual_coef"] else 0
            state_TP = hidden_TH.new_zeros(1, self.cell_size + handed_size)
        input_TP = hidden_TH if self.projector is None else affine(hidden_TH, self.projector, self.projector_bias)
        cell_TP = cell(input_TP, self._passed(state_TP[:, : self.cell_size].to(hidden_TH.dtype)))
        logits_TE = self._logits(cell_TP[:, : self.options["state_size"]], hidden_TH)
        if not self.options["residual_coef"]:
            return logits_TE, cell_TP
        handed_TE = state_TP[:, self.cell_size :].to(hidden_TH.dtype)
        handed_TE = handed_TE.detach() if self.options["detach_residual"] else handed_TE
        summed_TE = logits_TE + self.options["residual_coef"] * handed_TE
        next_TE = logits_TE if self.options["residual_mode"] == "one_step" else summed_TE
        return summed_TE, torch.cat((cell_TP, next_TE), dim=-1)

    def _passed(self, state_TP: Tensor) -> Tensor:
        passing = self.options["passing"]
        if passing == "detach":
            return state_TP.detach()
        if passing == "gradient_only":
            return state_TP - state_TP.detach()
        return state_TP.new_zeros(1, state_TP.shape[1]) if passing == "none" else state_TP

    def _logits(self, h_TP: Tensor, hidden_TH: Tensor) -> Tensor:
        if self.head_proj is not None and self.log_temperature is not None:  # XMoE's head
            read_TP = F.normalize(affine(h_TP, self.head_proj), dim=-1)
            head = F.normalize(self.head.to(read_TP.dtype), dim=-1)
            return F.linear(read_TP, head) / self.log_temperature.exp()
        if self.options["norm"] == "rms":
            h_TP = h_TP * torch.rsqrt(h_TP.square().mean(dim=-1, keepdim=True) + self.options["norm_eps"])
        logits_TE = affine(self.options["scale"] * h_TP, self.head, self.head_bias)
        return logits_TE + affine(hidden_TH, self.weight) if self.options["input_residual"] else logits_TE

    def init_weights(self, std: float) -> None:
        """See ReMoERouter; `matched` makes logits as wide as a linear router's (RMoE §7.4), `library` is torch's."""
        options, width = self.options, self.options["state_size"]
        head_std = std * math.sqrt(self.hidden_size / width) if options["initial"] == "matched" else std
        for weight in (self.projector, self.head_proj):
            _each(init.normal_, weight, std=std)
        if options["input_residual"]:
            init.normal_(self.weight, std=std)
        init.normal_(self.head, std=head_std)
        for bias in (self.projector_bias, self.head_bias):
            _each(init.zeros_, bias)
        if options["initial"] == "library":
            for weight in (self.projector, self.projector_bias):
                _each(init.uniform_, weight, a=-(self.hidden_size**-0.5), b=self.hidden_size**-0.5)
            for weight in (self.head, self.head_bias):
                _each(init.uniform_, weight, a=-(width**-0.5), b=width**-0.5)
        if self.log_temperature is not None:
            _each(init.uniform_, self.head_proj, a=-(width**-0.5), b=width**-0.5)
            init.orthogonal_(self.head, gain=0.32)
            init.constant_(self.log_temperature, math.log(options["temperature"]))
        if options["input_residual"]:
            init.zeros_(self.head)


class ReMoERouterCell(nn.Module):
    """The recurrence over layers that all recurrent routers share: (input [T, P], state [T or 1, P]) → state [T, P]."""

    def __init__(self, config: ReMoEConfig) -> None:
        super().__init__()
        options = config.router_options
        self.kind, self.bias, width = options["cell"], options["initial"] != "matched", options["state_size"]
        self.width = width
        rows = NUM_CELL_GATES.get(self.kind, 0) * width
        input_size = config.hidden_size if options["projector"] == "shared" else width
        self.weight_ih = _parameter(rows, rows, input_size)
        self.weight_hh = _parameter(rows, rows, width)
        self.bias_ih = _parameter(rows and options["cell_bias"], rows)
        self.bias_hh = _parameter(rows and options["cell_bias"], rows)
        self.initial_leak = options["leak"]
        leak_shape = {"scalar": (1,), "vector": (width,)}.get(options["learned_leak"])
        self.leak = nn.Parameter(torch.empty(leak_shape)) if self.kind == "leaky" and leak_shape else options["leak"]

    def forward(self, input_TP: Tensor, state_TP: Tensor) -> Tensor:
        """The state after this layer; the gates are packed as in torch's own cells."""
        if self.kind == "identity":
            return input_TP
        if self.kind == "leaky":
            leak = self.leak.to(input_TP.dtype) if isinstance(self.leak, Tensor) else self.leak
            return input_TP + leak * state_TP
        h_TP, *rest = state_TP.split(self.width, dim=-1)
        from_input, from_state = (
            affine(input_TP, cast(Tensor, self.weight_ih), self.bias_ih),
            affine(h_TP, cast(Tensor, self.weight_hh), self.bias_hh),
        )
        if self.kind == "rnn":
            return torch.tanh(from_input + from_state)
        if self.kind == "lstm":
            write, forget, new, output = (from_input + from_state).chunk(4, dim=-1)
            c_TP = torch.sigmoid(forget) * rest[0] + torch.sigmoid(write) * torch.tanh(new)
            return torch.cat((torch.sigmoid(output) * torch.tanh(c_TP), c_TP), dim=-1)
        reset_u, update_u, new_u = from_input.chunk(3, dim=-1)
        reset_h, update_h, new_h = from_state.chunk(3, dim=-1)
        new_TP = torch.tanh(new_u + torch.sigmoid(reset_u + reset_h) * new_h)
        return torch.lerp(new_TP, h_TP, torch.sigmoid(update_u + update_h))

    def init_weights(self) -> None:
        """As torch's cells start; with `initial: matched` biases are 0."""
        for weight in (self.weight_ih, self.weight_hh):
            _each(init.uniform_, weight, a=-(self.width**-0.5), b=self.width**-0.5)
        for bias in (self.bias_ih, self.bias_hh):
            if self.bias:
                _each(init.uniform_, bias, a=-(self.width**-0.5), b=self.width**-0.5)
            else:
                _each(init.zeros_, bias)
        if isinstance(self.leak, Tensor):
            init.constant_(self.leak, self.initial_leak)


@use_experts_implementation
class ReMoEExperts(nn.Module):
    """E SwiGLU MLPs: gate_up_proj [E, 2F, H] (gate rows first), down_proj [E, H, F]."""

    _apply_gate: Callable[[Tensor], Tensor]
    """silu(gate) * up; the decorator adds it."""

    def __init__(self, config: ReMoEConfig) -> None:
        super().__init__()
        self.num_experts = config.routed_experts
        size = config.moe_intermediate_size
        self.gate_up_proj = nn.Parameter(torch.empty(self.num_experts, 2 * size, config.hidden_size))
        self.down_proj = nn.Parameter(torch.empty(self.num_experts, config.hidden_size, size))
        self.act_fn = nn.SiLU()

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """Each token's experts, weighted and summed: [T, H]. Pairs of weight 0 cost nothing.

        One product an expert over its own rows, then a gather-sum: no atomics, so the same bits each run.
        """
        weights_TE = top_k_weights.new_zeros(len(hidden_states), self.num_experts)
        weights_TE = weights_TE.scatter(1, top_k_index, top_k_weights)
        is_active_TE = weights_TE != 0
        expert_N, token_N = is_active_TE.t().nonzero(as_tuple=True)
        x_NH = hidden_states.index_select(0, token_N)
        matrices = zip(self.gate_up_proj.unbind(), self.down_proj.unbind(), strict=True)
        y_NH = torch.cat(  # an expert without rows stays in the graph: DDP waits for each parameter's gradient
            [
                F.linear(self._apply_gate(F.linear(x, gate_up)), down)
                for x, (gate_up, down) in zip(x_NH.split(is_active_TE.sum(0).tolist()), matrices, strict=True)
            ]
        )
        if len(token_N) == 0:
            return hidden_states * 0 + y_NH.sum()
        dtype = torch.promote_types(y_NH.dtype, weights_TE.dtype)
        row_N = torch.argsort(token_N * self.num_experts + expert_N)
        offsets = F.pad(is_active_TE.sum(1).cumsum(0), (1, 0))
        weights_N = weights_TE[token_N, expert_N].to(dtype).index_select(0, row_N)
        out_TH = F.embedding_bag(
            row_N, y_NH.to(dtype), offsets, mode="sum", per_sample_weights=weights_N, include_last_offset=True
        )
        return out_TH.to(hidden_states.dtype)


class ReMoESparseMoeBlock(nn.Module):
    """Router, then experts."""

    def __init__(self, config: ReMoEConfig, layer_idx: int) -> None:
        super().__init__()
        router_class = ReMoELinearRouter if config.router_name in ("relu", "topk") else ReMoERecurrentRouter
        self.router = router_class(config, layer_idx)
        self.experts = ReMoEExperts(config)

    def forward(
        self,
        hidden_states: Tensor,
        router_state: Tensor | None = None,
        token_mask: Tensor | None = None,
        router_cell: nn.Module | None = None,
    ) -> tuple[Tensor, ReMoERouting]:
        """The layer's output [B, S, H] and its routing over T tokens."""
        hidden_TH, device = hidden_states.flatten(0, 1), hidden_states.device.type
        if torch.is_autocast_enabled(device):  # the router reads what the experts read
            hidden_TH = hidden_TH.to(torch.get_autocast_dtype(device))
        routing = self.router(hidden_TH, router_state, token_mask, router_cell)
        out_TH = self.experts(hidden_TH, routing.top_k_index, routing.top_k_weights)
        return out_TH.view_as(hidden_states), routing


class ReMoEOutputProjection(nn.Linear):
    """Into the residual stream: its initial values are narrower by sqrt(2L)."""


class ReMoEMLP(nn.Module):
    """A dense SwiGLU MLP."""

    def __init__(self, config: ReMoEConfig) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = ReMoEOutputProjection(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, hidden_states: Tensor) -> Tensor:
        """down(silu(gate x) * (up x))."""
        return self.down_proj(F.silu(self.gate_proj(hidden_states)) * self.up_proj(hidden_states))


class ReMoEAttention(nn.Module):
    """Grouped-query attention with rotary positions."""

    def __init__(self, config: ReMoEConfig, layer_idx: int) -> None:
        super().__init__()
        self.config = config
        self.layer_idx = layer_idx
        self.head_dim, num_kv_heads = cast(int, config.head_size), cast(int, config.num_kv_heads)
        self.num_key_value_groups = config.num_heads // num_kv_heads
        self.scaling = 1 / math.sqrt(self.head_dim)
        self.is_causal = True
        self.q_proj = nn.Linear(config.hidden_size, config.num_heads * self.head_dim, bias=False)
        self.k_proj = nn.Linear(config.hidden_size, num_kv_heads * self.head_dim, bias=False)
        self.v_proj = nn.Linear(config.hidden_size, num_kv_heads * self.head_dim, bias=False)
        self.o_proj = ReMoEOutputProjection(config.num_heads * self.head_dim, config.hidden_size, bias=False)

    def forward(
        self,
        hidden_states: Tensor,
        position_embeddings: tuple[Tensor, Tensor],
        attention_mask: Tensor | None = None,
        past_key_values: Cache | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        """The output [B, S, H] and, from implementations that have them, the attention weights."""
        query, key, value = (
            projection(hidden_states).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)
            for projection in (self.q_proj, self.k_proj, self.v_proj)
        )
        query, key = (rotate(heads, *position_embeddings) for heads in (query, key))
        if past_key_values is not None:
            key, value = past_key_values.update(key, value, self.layer_idx)
        attend = ALL_ATTENTION_FUNCTIONS.get_interface(str(self.config._attn_implementation), eager_attention)
        mixed, attention_weights = attend(
            self, query, key, value, attention_mask, dropout=0.0, scaling=self.scaling, **kwargs
        )
        return self.o_proj(mixed.reshape(*hidden_states.shape[:-1], -1)), attention_weights


def eager_attention(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float,
    **kwargs: Any,
) -> tuple[Tensor, Tensor]:
    """Attention with its weights, for `output_attentions`; the mask is added to the scores."""
    key, value = (heads.repeat_interleave(module.num_key_value_groups, dim=1) for heads in (key, value))
    scores = query @ key.transpose(2, 3) * scaling
    scores = scores if attention_mask is None else scores + attention_mask
    weights = scores.softmax(dim=-1, dtype=torch.float32).to(query.dtype)
    return (weights @ value).transpose(1, 2), weights


class ReMoEDecoderLayer(GradientCheckpointingLayer):
    """hidden + attention(norm(hidden)), then the same with the MLP."""

    def __init__(self, config: ReMoEConfig, layer_idx: int) -> None:
        super().__init__()
        self.input_layernorm = nn.RMSNorm(config.hidden_size, eps=config.norm_eps)
        self.self_attn = ReMoEAttention(config, layer_idx)
        self.post_attention_layernorm = nn.RMSNorm(config.hidden_size, eps=config.norm_eps)
        self.is_sparse = config.is_moe_layer(layer_idx)
        self.mlp = ReMoESparseMoeBlock(config, layer_idx) if self.is_sparse else ReMoEMLP(config)

    def forward(
        self,
        hidden_states: Tensor,
        router_state: Tensor | None = None,
        token_mask: Tensor | None = None,
        router_cell: nn.Module | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor | None, ...]:
        """hidden_states, router_state, then of an MoE layer aux_loss and tokens_per_expert: a flat tuple of tensors, as
        reentrant checkpointing wants it."""
        hidden_states = hidden_states + self.self_attn(self.input_layernorm(hidden_states), **kwargs)[0]
        normed = self.post_attention_layernorm(hidden_states)
        if not self.is_sparse:
            return hidden_states + self.mlp(normed), router_state, None, None
        out, routing = self.mlp(normed, router_state, token_mask, router_cell)
        return hidden_states + out, routing.state, routing.aux_loss, routing.tokens_per_expert


@dataclass
class ReMoEModelOutput(MoeModelOutputWithPast):
    """What the decoder returns; L counts MoE layers."""

    aux_losses: Tensor | None = None
    """[L], un-weighted; None in a dense model."""
    tokens_per_expert: Tensor | None = None
    """[L, E] int64."""
    num_tokens: Tensor | None = None
    """0-dim int64: tokens that count."""


@dataclass
class ReMoECausalLMOutput(MoeCausalLMOutputWithPast):
    """What the model returns. `loss` holds all terms; `aux_loss` is the router's alone, weighted, for logging."""

    tokens_per_expert: Tensor | None = None
    """[L, E] int64: what the sparsity controller counts."""
    num_tokens: Tensor | None = None
    """0-dim int64: tokens that count."""


class ReMoEPreTrainedModel(PreTrainedModel):
    """What transformers needs to know of the architecture."""

    config_class = ReMoEConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["ReMoEDecoderLayer"]  # noqa: RUF012
    _skip_keys_device_placement = ["past_key_values"]  # noqa: RUF012
    _supports_flash_attn = True
    _supports_sdpa = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _can_compile_fullgraph = False  # the experts' rows depend on the data
    _can_record_outputs = {  # noqa: RUF012
        "router_logits": OutputRecorder(ReMoERouter, index=0),
        "hidden_states": OutputRecorder(ReMoEDecoderLayer, index=0),
        "attentions": OutputRecorder(ReMoEAttention, index=1),
    }

    @classmethod
    def from_pretrained(cls, *args: Any, **kwargs: Any) -> Any:
        """As transformers'. On a CPU no parameter stays at an odd address of its file: products would round otherwise
        there than with tensors of one's own, and the model would differ from remoe's in the last bit."""
        loaded = super().from_pretrained(*args, **kwargs)
        model = loaded[0] if isinstance(loaded, tuple) else loaded
        for parameter in model.parameters():
            if parameter.device.type == "cpu" and parameter.data_ptr() % ALIGNMENT:
                parameter.data = parameter.data.clone()
        return loaded

    def get_correct_experts_implementation(self, requested_experts: str | None) -> str:
        """By default remoe's kernels where `remoe.hf` was imported, else the loop here: both skip inactive experts."""
        own = "remoe" if "remoe" in ALL_EXPERTS_FUNCTIONS else "eager"
        return super().get_correct_experts_implementation(requested_experts or own)

    @torch.no_grad()
    def _init_weights(self, module: Any) -> None:
        super()._init_weights(module)
        std = self.config.init_std
        output_std = std / math.sqrt(2 * self.config.num_layers)
        if isinstance(module, ReMoERouter):
            module.init_weights(self.config.router_options.get("init_std", std))
        elif isinstance(module, ReMoERouterCell):
            module.init_weights()
        elif isinstance(module, ReMoEExperts):
            init.normal_(module.get_parameter("gate_up_proj"), std=std)
            init.normal_(module.get_parameter("down_proj"), std=output_std)
        elif isinstance(module, ReMoEOutputProjection):
            init.normal_(module.weight, std=output_std)


class ReMoEModel(ReMoEPreTrainedModel):
    """The decoder without its head; with recurrent routers it owns the one cell that they share."""

    def __init__(self, config: ReMoEConfig) -> None:
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(ReMoEDecoderLayer(config, layer_idx) for layer_idx in range(config.num_layers))
        self.norm = nn.RMSNorm(config.hidden_size, eps=config.norm_eps)
        has_cell = config.router_name in ("rmoe", "recurrent_relu") and any(layer.is_sparse for layer in self.layers)
        self.router_cell = ReMoERouterCell(config) if has_cell else None
        self.gradient_checkpointing = False
        self.post_init()

    @merge_with_config_defaults
    @capture_outputs
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        **kwargs: Any,
    ) -> ReMoEModelOutput:
        """Hidden states of all tokens. A 2-D attention_mask also says which tokens routers route and count."""
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give either input_ids or inputs_embeds")
        hidden_states = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        if use_cache and past_key_values is None:
            past_key_values = DynamicCache(config=self.config)
        token_mask = _new_columns(attention_mask, hidden_states.shape[1])
        if position_ids is None:
            position_ids = _positions(hidden_states, attention_mask, past_key_values)
        causal_mask = create_causal_mask(
            config=self.config,
            inputs_embeds=hidden_states,
            attention_mask=attention_mask,
            past_key_values=past_key_values,
            position_ids=position_ids,
        )
        kwargs |= {
            "position_embeddings": rotary_angles(
                position_ids, cast(int, self.config.head_size), self.config.rope_theta
            ),
            "attention_mask": causal_mask,
            "past_key_values": past_key_values,
            "position_ids": position_ids,
        }
        router_state, counted = None, []
        for layer in self.layers:
            hidden_states, router_state, *more = layer(
                hidden_states, router_state, token_mask, router_cell=self.router_cell, **kwargs
            )
            counted += [more] if layer.is_sparse else []
        aux_losses = tokens_per_expert = None
        if counted:
            aux_losses, tokens_per_expert = (torch.stack(parts) for parts in zip(*counted, strict=True))
        return ReMoEModelOutput(
            last_hidden_state=self.norm(hidden_states),
            past_key_values=past_key_values,
            aux_losses=aux_losses,
            tokens_per_expert=tokens_per_expert,
            num_tokens=_count(hidden_states.flatten(0, 1), token_mask),
        )


class ReMoEGenerationDefaults(GenerationConfig):
    """Generation settings out of a model's config: without `top_k`, which counts experts there, not likely tokens."""

    @classmethod
    def from_model_config(cls, model_config: PreTrainedConfig | dict[str, Any]) -> GenerationConfig:
        """A plain GenerationConfig."""
        values = model_config if isinstance(model_config, dict) else model_config.to_dict()
        values = {key: value for key, value in values.items() if key != "top_k"}
        return GenerationConfig.from_model_config(values)


class ReMoEForCausalLM(ReMoEPreTrainedModel, GenerationMixin):
    """The decoder with its output head."""

    generation_config_class = ReMoEGenerationDefaults
    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}  # noqa: RUF012

    def __init__(self, config: ReMoEConfig) -> None:
        super().__init__(config)
        self.model = ReMoEModel(config)
        self.vocab_size = config.vocab_size
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.sparsity_coef: float | Tensor = config.sparsity_coef
        """What `loss` multiplies the L1 term by: a number, 0-dim, or [L] with one a layer."""
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        output_router_logits: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        **kwargs: Any,
    ) -> ReMoECausalLMOutput:
        """Logits, and with labels the loss: cross-entropy plus the weighted auxiliary term of the routers."""
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            output_router_logits=self.config.output_router_logits
            if output_router_logits is None
            else output_router_logits,
            **kwargs,
        )
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.lm_head(outputs.last_hidden_state[:, kept])
        aux_loss = self._weighted(outputs.aux_losses)
        loss = None
        if labels is not None:
            loss = self.loss_function(logits, labels, self.vocab_size, **kwargs)
            loss = loss if aux_loss is None else loss + _share(labels, **kwargs) * aux_loss.to(loss.device)
        return ReMoECausalLMOutput(
            loss=loss,
            aux_loss=aux_loss,
            logits=logits,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            router_logits=outputs.router_logits,
            tokens_per_expert=outputs.tokens_per_expert,
            num_tokens=outputs.num_tokens,
        )

    def _weighted(self, aux_losses: Tensor | None) -> Tensor | None:
        """ReMoE averages its L1 term over layers; load-balancing terms are summed, as the baselines were trained."""
        if aux_losses is None:
            return None
        if self.config.is_relu_gated:
            return (self.sparsity_coef * aux_losses).mean()
        return self.config.router_aux_loss_coef * aux_losses.sum()

    def adjust_generation_fn(self, generation_config: Any, *args: Any, **kwargs: Any) -> None:
        """As transformers'; where there is no generation_config.json, see ReMoEGenerationDefaults."""
        super().adjust_generation_fn(generation_config, *args, **kwargs)  # pyright: ignore[reportAttributeAccessIssue]
        if generation_config is None and self.generation_config._from_model_config:
            self.generation_config = ReMoEGenerationDefaults.from_model_config(self.config)


def affine(input_TX: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """X W^T + b in the dtype of X, whatever the parameters' is."""
    return F.linear(input_TX, weight.to(input_TX.dtype), None if bias is None else bias.to(input_TX.dtype))


def renormalizes(renormalize: bool | None, top_k: int) -> bool:
    """Whether gates are divided by their sum; None: from k = 2 on, as RMoE does."""
    return top_k > 1 if renormalize is None else renormalize


def relu_gate(logits_TE: Tensor, threshold: float) -> tuple[Tensor, Tensor]:
    """ReLU (ReMoE eq. 6) with remoe's density dial: gates, and which are active.

    A threshold above 0 cuts gates up to it; one below 0 is a shift, which opens gates that were closed.
    """
    if threshold == 0:
        gates_TE = logits_TE.relu()
        return gates_TE, gates_TE > 0
    is_active_TE = logits_TE > threshold
    return (logits_TE - min(threshold, 0.0)).masked_fill(~is_active_TE, 0), is_active_TE


def topk_gate(logits_TE: Tensor, most: int, top_k: int | Tensor, renormalize: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Softmax, then the top_k (at most `most`) largest: weights twice, as ReMoERouter.gate does, and what is active."""
    probs_TE = logits_TE.softmax(dim=-1)
    index_TK = probs_TE.topk(most, dim=-1).indices
    is_active_TK = (torch.arange(most, device=index_TK.device) < top_k).expand_as(index_TK)
    is_active_TE = torch.zeros_like(probs_TE, dtype=torch.bool).scatter(1, index_TK, is_active_TK)
    weights_TE = probs_TE.masked_fill(~is_active_TE, 0)
    if renormalize:
        weights_TE = weights_TE / weights_TE.sum(dim=-1, keepdim=True)
    return weights_TE, weights_TE, is_active_TE


def rotary_angles(position_ids: Tensor, head_size: int, theta: float) -> tuple[Tensor, Tensor]:
    """Cosine and sine, fp32 [B, 1, S, D/2] whatever the model computes in: bf16 would merge positions beyond 256."""
    pair = torch.arange(0, head_size, 2, device=position_ids.device, dtype=torch.float32)
    angle = position_ids[:, None, :, None].float() * theta ** (-pair / head_size)
    return angle.cos(), angle.sin()


def rotate(heads_BASD: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn the pairs (i, i + D/2) of each head; keeps the dtype. In memory a token's heads lie side by side."""
    cos, sin = cos.transpose(1, 2), sin.transpose(1, 2)
    first, second = heads_BASD.transpose(1, 2).chunk(2, dim=-1)
    turned_BSAD = torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)
    return turned_BSAD.to(heads_BASD.dtype).transpose(1, 2)


def _positions(hidden_states: Tensor, attention_mask: Tensor | None, past_key_values: Cache | None) -> Tensor:
    """Index of each token within its row; padding takes none."""
    if attention_mask is not None and attention_mask.dim() == 2:
        counts = attention_mask.long()
        return (counts.cumsum(1) - counts)[:, -hidden_states.shape[1] :]
    num_cached = 0 if past_key_values is None else past_key_values.get_seq_length()
    return (torch.arange(hidden_states.shape[1], device=hidden_states.device) + num_cached)[None]


def _new_columns(attention_mask: Tensor | None, num_new: int) -> Tensor | None:
    """Bool [T]: which of the new tokens count; None: all, as far as a mask of another form tells."""
    if attention_mask is None or attention_mask.dim() != 2:
        return None
    return attention_mask[:, -num_new:].flatten().bool()


def _count(values_TX: Tensor, token_mask: Tensor | None) -> Tensor:
    """Tokens that count, 0-dim int64; summed and not read from the shape, which torch.export would fix."""
    return (values_TX.new_ones(values_TX.shape[0], dtype=torch.int64) if token_mask is None else token_mask).sum()


def _share(labels: Tensor, num_items_in_batch: Tensor | int | None = None, **kwargs: Any) -> Tensor | float:
    """This micro-batch's part of the step, so that the auxiliary term is a mean over it as cross-entropy is."""
    if num_items_in_batch is None:
        return 1.0
    return (labels[..., 1:] != -100).sum() / num_items_in_batch


def _without(values_TE: Tensor, token_mask: Tensor | None) -> Tensor:
    return values_TE if token_mask is None else values_TE.masked_fill(~token_mask[:, None], 0)


def _parameter(exists: Any, *shape: int) -> nn.Parameter | None:
    return nn.Parameter(torch.empty(shape)) if exists else None


def _each(initialise: Any, parameter: Tensor | None, **settings: float) -> None:
    if parameter is not None:
        initialise(parameter, **settings)


ReMoEConfig.register_for_auto_class()
ReMoEModel.register_for_auto_class("AutoModel")
ReMoEForCausalLM.register_for_auto_class("AutoModelForCausalLM")
