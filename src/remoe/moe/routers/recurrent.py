"""Layerwise recurrent routing: a small cell hands each token's routing state from layer to layer (RMoE §2, §7)."""

import math
from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from remoe.config import from_dict
from remoe.moe import gates, initial
from remoe.moe.cells import affine
from remoe.moe.initial import Constant, Initial, Normal, Orthogonal, Uniform
from remoe.moe.recurrence import RecurrentOptions, build_cell, given_state, normalized, passed
from remoe.moe.routing import RouterContext, Routing, without_masked_tokens


class RMoERouter(nn.Module):
    """u = P x; h = cell(u, h of the layer before, at first 0); logits = s G N(h) + c; then softmax and top-k.

    The state, an input and an output, is [cell state, and with r-alpha the logits handed on]. Alone the router owns its
    `cell`; `cells.share_cell` makes the routers of a model use one.
    """

    penalty = "load_balancing"
    options = RecurrentOptions
    defaults: ClassVar[dict[str, Any]] = {}

    def __init__(
        self, hidden_size: int, num_experts: int, top_k: int, *, init_std: float = 0.02, **options: Any
    ) -> None:
        super().__init__()
        self.config = config = from_dict(RecurrentOptions, {**self.defaults, **options})
        self.top_k = top_k
        self.renormalize = gates.renormalizes(config.renormalize, top_k)
        self.init_std = init_std
        self.hidden_size = hidden_size
        self.mixes_tokens = config.passing == "shuffle"
        self.penalty = "sparsity_l1" if config.gate == "relu" else "load_balancing"
        self.threshold: float | None = 0.0 if config.gate == "relu" else None  # the density dial (moe.dial)
        self.cell = build_cell(config, hidden_size)
        self.state_size = self.cell.state_size + (num_experts if config.residual_coef else 0)
        width, is_shared, is_cosine = config.state_size, config.projector == "shared", config.head == "cosine"
        read_size = config.head_size if is_cosine else width
        self.projector = _parameter(not is_shared, width, hidden_size)
        self.projector_bias = _parameter(config.bias and not is_shared, width)
        self.head_proj = _parameter(is_cosine, read_size, width)
        self.head = nn.Parameter(torch.empty(num_experts, read_size))
        self.head_bias = _parameter(config.bias, num_experts)
        self.log_temperature = _parameter(is_cosine, 1)
        self.weight = _parameter(config.input_residual, num_experts, hidden_size)
        initial.reset(self, init_std)

    def initial_values(self) -> Mapping[str, Initial]:
        """`matched`: with RMSNorm on h, logits start as wide as a linear router's (§7.4); all biases at 0."""
        config, width = self.config, self.config.state_size
        values: dict[str, Initial] = {"projector_bias": Constant(0.0), "head_bias": Constant(0.0)}
        projector, head = (Uniform(1 / math.sqrt(size)) for size in (self.hidden_size, width))
        if config.initial == "library":
            values |= {"projector": projector, "projector_bias": projector, "head": head, "head_bias": head}
        if config.initial == "matched":
            values["head"] = Normal(self.init_std * math.sqrt(self.hidden_size / width))
        if config.head == "cosine":  # as XMoE starts
            values |= {"head_proj": head, "head": Orthogonal(0.32)}
            values["log_temperature"] = Constant(math.log(config.temperature))
        if config.input_residual:
            values["head"] = Constant(0.0)
        return values

    def forward(self, hidden_TH: Tensor, context: RouterContext | None = None) -> Routing:
        """Route T tokens; a context without state starts at 0. The maths runs in fp32 or wider."""
        context = RouterContext() if context is None else context
        dtype = torch.promote_types(self.head.dtype, torch.float32)
        with torch.autocast(hidden_TH.device.type, enabled=False):
            hidden_TH = hidden_TH.to(dtype)
            state_TP = given_state(context, hidden_TH, self.state_size)
            previous_TP = passed(state_TP[:, : self.cell.state_size], self.config.passing, context)
            cell_TP = self.cell(self._input(hidden_TH), previous_TP)
            logits_TE = own_TE = self._logits(cell_TP[:, : self.cell.width], hidden_TH)
            if self.config.residual_coef:
                logits_TE = own_TE + self.config.residual_coef * self._handed(state_TP)
                handed_TE = own_TE if self.config.residual_mode == "one_step" else logits_TE
                cell_TP = torch.cat((cell_TP, handed_TE), dim=-1)
        weights_TE, routing_map_TE = self._gate(logits_TE)
        return without_masked_tokens(Routing(weights_TE, routing_map_TE, logits_TE, cell_TP), context)

    def _input(self, hidden_TH: Tensor) -> Tensor:
        return hidden_TH if self.projector is None else affine(hidden_TH, self.projector, self.projector_bias)

    def _logits(self, h_TP: Tensor, hidden_TH: Tensor) -> Tensor:
        if self.log_temperature is not None and self.head_proj is not None:
            return gates.cosine_logits(affine(h_TP, self.head_proj), self.head, self.log_temperature.exp())
        if self.config.norm == "rms":
            h_TP = normalized(h_TP, self.config.norm_eps)
        logits_TE = affine(self.config.scale * h_TP, self.head, self.head_bias)
        return logits_TE if self.weight is None else logits_TE + affine(hidden_TH, self.weight)

    def _handed(self, state_TP: Tensor) -> Tensor:
        logits_TE = state_TP[:, self.cell.state_size :]
        return logits_TE.detach() if self.config.detach_residual else logits_TE

    def _gate(self, logits_TE: Tensor) -> tuple[Tensor, Tensor]:
        if self.threshold is not None:
            return gates.relu(logits_TE, self.threshold)
        return gates.topk_softmax(logits_TE, self.top_k, self.renormalize)


class RecurrentReLURouter(RMoERouter):
    """RMoE's state with ReMoE's gate: R = ReLU(s G N(h)), scale-matched to a linear router (RMoE §7)."""

    penalty = "sparsity_l1"
    defaults: ClassVar[dict[str, Any]] = {"gate": "relu", "norm": "rms", "initial": "matched"}


def _parameter(exists: bool, *shape: int) -> nn.Parameter | None:
    return nn.Parameter(torch.empty(shape)) if exists else None
