"""The auxiliary terms of a micro-batch beside its language-model loss, and how they are weighed (ReMoE eq. 8-10)."""

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor

from remoe.moe import losses, stats
from remoe.moe.revival import revival
from remoe.moe.routing import Routing, count_tokens
from remoe.training.config import LossConfig, SparsityConfig
from remoe.training.counts import RoutingCounts


def experts_per_token(routing: Routing, loads_E: Tensor | None = None) -> Tensor:
    """The k of a token-choice router as it is now, 0-dim: above top_k while Top-K warms up nearly dense."""
    if loads_E is not None:
        return loads_E.sum().clamp(min=1).to(routing.weights_TE.dtype)
    pairs, tokens = stats.active_pairs(routing), count_tokens(routing)
    return (pairs / tokens.clamp(min=1)).clamp(min=1).to(routing.weights_TE.dtype)


def with_logits(routing: Routing) -> Routing:
    """The routing itself, or for a router without logits (hash) one whose softmax is its choice."""
    if routing.logits_TE is not None:
        return routing
    return routing._replace(logits_TE=torch.zeros_like(routing.weights_TE).masked_fill(~routing.routing_map_TE, -1e9))


@dataclass(frozen=True, kw_only=True)
class Objective:
    """Which auxiliary terms a model is trained with and how they are weighed. `top_k` is k*G."""

    losses: LossConfig
    sparsity: SparsityConfig
    penalty: str
    top_k: int
    num_layers: int | None = None
    """MoE layers of the whole model, where only some of them are given at a time; None: all are."""

    @property
    def load_balancing_coef(self) -> float:
        """What the load-balancing term is multiplied by: 0 for routers that are not trained with it."""
        return self.losses.load_balancing_coef if self.penalty == "load_balancing" else 0.0

    def terms(
        self, routings: Sequence[Routing], loads_LE: Tensor | None = None, balance_loads_LE: Tensor | None = None
    ) -> dict[str, Tensor]:  # fmt: skip
        """Un-weighted terms by name, one value [L] each over the MoE layers; load_balancing also where it is inert.

        `loads_LE` (L1) and `balance_loads_LE` hold each layer's n_e/T where it was counted elsewhere; None: each
        routing counts its own.
        """
        if not routings:
            return {}
        terms = {}
        if self.penalty == "sparsity_l1":
            terms["sparsity_l1"] = torch.stack(
                [
                    losses.sparsity_l1(routing, self.top_k, self.sparsity.load_balanced, loads_E)
                    for routing, loads_E in zip(routings, _by_layer(loads_LE, routings), strict=True)
                ]
            )
        with nullcontext() if self.penalty == "load_balancing" else torch.no_grad():  # seen in every arm
            terms["load_balancing"] = torch.stack(
                [
                    losses.load_balancing(with_logits(routing), experts_per_token(routing, loads_E), loads_E)
                    for routing, loads_E in zip(routings, _by_layer(balance_loads_LE, routings), strict=True)
                ]
            )
        if self.losses.router_z_coef > 0 and routings[0].logits_TE is not None:
            terms["router_z"] = torch.stack([losses.router_z(r) for r in routings])
        if self.penalty == "sparsity_l1" and self.sparsity.revival_coef > 0:
            terms["revival"] = torch.stack([revival(r, self.top_k, self.sparsity.density_floor) for r in routings])
        return terms

    def spare_starving(self, counts: RoutingCounts | None, sparsity_coef: Tensor | None) -> Tensor | None:
        """The coefficient of each layer: 0 for those below `sparsity.density_floor`, where there is one."""
        if sparsity_coef is None or counts is None or self.sparsity.density_floor == 0:
            return sparsity_coef
        starving_L = counts.active_L < self.sparsity.density_floor * self.top_k * counts.tokens_L
        return torch.where(starving_L, 0, sparsity_coef)

    def penalties(self, terms: dict[str, Tensor], sparsity_coef: Tensor | None) -> Tensor | float:
        """The weighted sum that is added to the language-model loss. `sparsity_coef` is 0-dim or [L]."""
        total: Tensor | float = 0.0
        if "sparsity_l1" in terms:
            assert sparsity_coef is not None, "a model with the L1 term has a controller"
            weighted_L = sparsity_coef * terms["sparsity_l1"]
            is_mean = averages_layers("sparsity_l1", self.sparsity.mode)
            total = total + weighted_L.sum() / ((self.num_layers or len(weighted_L)) if is_mean else 1)
        if "load_balancing" in terms and self.load_balancing_coef:
            total = total + self.load_balancing_coef * terms["load_balancing"].sum()
        if "router_z" in terms:
            total = total + self.losses.router_z_coef * terms["router_z"].sum()
        if "revival" in terms:
            total = total + self.sparsity.revival_coef * terms["revival"].sum()
        return total


def _by_layer(loads_LE: Tensor | None, routings: Sequence[Routing]) -> Sequence[Tensor | None]:
    return [None] * len(routings) if loads_LE is None else loads_LE.unbind()


def averages_layers(name: str, mode: str) -> bool:
    """Whether a term of the model is the mean over its layers rather than their sum: the paper's L1 term is."""
    return name == "sparsity_l1" and mode == "paper"
