"""torchtitan's MoE layer with ReMoE's gate: its experts and shared experts, its router's matrix, ReLU for Top-K."""

# pyright: reportMissingImports=false

import dataclasses
import math
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torchtitan.models.common.moe import MoE

from remoe.distributed.adapters.counts import counted_in_backward, counts_of, summed
from remoe.moe import losses
from remoe.moe.gates import linear_logits, relu
from remoe.moe.routing import Routing


class ReLUMoE(MoE):
    """Gates R = ReLU(X W^T), any number of experts a token, and the load-balanced L1 term (ReMoE eq. 6, 10).

    Buffers: `log_coef`, float64, the coefficient as all layers have it, in checkpoints; `routing_counts`, int64
    [E + 1], tokens at each expert and tokens since the last optimizer step.
    """

    @dataclass(kw_only=True, slots=True)
    class Config(MoE.Config):
        """What the layer needs besides the config of the one that it replaces."""

        num_moe_layers: int
        """The L1 term of a model is the mean over them."""
        tokens_per_step: int
        """Tokens of one optimizer step over all ranks: torchtitan divides sums over a step by that number."""
        init: float = 1e-8
        """The coefficient of the first step."""

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        self.top_k = config.router.top_k
        self.num_experts = config.num_experts
        self.term_share = 1 / (config.num_moe_layers * config.tokens_per_step)
        self.data_ranks: dist.ProcessGroup | None = None
        """Whose loads weigh the term, and whose counts move the coefficient; None: this process alone."""
        self.initial_log_coef = math.log(config.init)
        self.register_buffer("log_coef", torch.tensor(self.initial_log_coef, dtype=torch.float64))
        counts_E1 = torch.zeros(self.num_experts + 1, dtype=torch.int64)
        self.register_buffer("routing_counts", counts_E1, persistent=False)

    def forward(self, x_BLD: Tensor) -> Tensor:
        """As the base's; the auxiliary term is a gradient of the gates."""
        gate = self.router.gate
        logits_TE = linear_logits(x_BLD.flatten(0, 1), gate.weight, gate.bias)
        weights_TE, routing_map_TE = relu(logits_TE)
        routing = Routing(weights_TE, routing_map_TE, logits_TE)
        if self.training and torch.is_grad_enabled():
            weights_TE = self._trained(routing)
        weights_BLE = weights_TE.unflatten(0, x_BLD.shape[:2])
        expert_ids_BLE = torch.arange(self.num_experts, device=x_BLD.device).expand_as(weights_BLE)
        out_BLD = self.routed_experts(x_BLD, weights_BLE, expert_ids_BLE, routing_map_TE.sum(0))
        return out_BLD if self.shared_experts is None else out_BLD + self.shared_experts(x_BLD)

    def _trained(self, routing: Routing) -> Tensor:
        """The gates, whose backward pass adds the term's gradient and counts this routing, once a micro-batch."""
        counts_E1 = counts_of(routing)
        all_E1 = summed(counts_E1, self.data_ranks)
        l1 = losses.sparsity_l1(routing, self.top_k, loads_E=all_E1[:-1] / all_E1[-1].clamp(min=1))
        term = self.log_coef.exp() * self.term_share * counts_E1[-1] * l1  # of this rank's tokens
        weights_TE: Tensor = _WithTerm.apply(routing.weights_TE, term)  # pyright: ignore[reportAssignmentType]
        return counted_in_backward(weights_TE, counts_E1, self.routing_counts)

    def parallelize(self, parallel_dims: Any) -> None:
        """As the base's; torchtitan wants a placement of each buffer, here that of the base's bias: on all ranks."""
        sharding = self._sharding_config
        if sharding is not None:
            own = dict.fromkeys(("log_coef", "routing_counts"), sharding.state_shardings["expert_bias_E"])
            self._sharding_config = dataclasses.replace(sharding, state_shardings=sharding.state_shardings | own)
        super().parallelize(parallel_dims)

    def _init_self_buffers(self, *, buffer_device: torch.device | None = None) -> None:
        super()._init_self_buffers(buffer_device=buffer_device)
        device = buffer_device or self.log_coef.device
        self.log_coef = torch.tensor(self.initial_log_coef, dtype=torch.float64, device=device)
        self.routing_counts = torch.zeros(self.num_experts + 1, dtype=torch.int64, device=device)


class _WithTerm(torch.autograd.Function):
    """The gates unchanged; the backward pass also starts from the term, with weight 1."""

    @staticmethod
    def forward(ctx: Any, weights_TE: Tensor, term: Tensor) -> Tensor:
        ctx.dtype, ctx.device = term.dtype, term.device
        return weights_TE.view_as(weights_TE)

    @staticmethod
    def backward(ctx: Any, grad_TE: Tensor) -> tuple[Tensor, Tensor]:  # pyright: ignore
        return grad_TE, torch.ones((), dtype=ctx.dtype, device=ctx.device)
