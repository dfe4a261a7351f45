"""Inputs of one layer shape, the same for all candidates: hidden states, weights, gradients and routings."""

from typing import NamedTuple

import torch
from torch import Tensor, nn

from remoe.bench.shapes import LayerShape

ROUTES = ("topk", "var", "even_fixed", "even_var")
"""topk: k experts a token, given as indices and weights. var: as many pairs in all, 0 to E a token, given as gates
[T, E] that are 0 where an expert is off (what a ReLU router returns). even_fixed and even_var: gates as well, with
exactly k a token or 0 to E, and in both the same number of tokens at each expert."""


class Routing(NamedTuple):
    """One way to route the tokens; `weights` is a leaf that gets a gradient."""

    name: str
    weights: Tensor
    """Of topk [T, K], else the gates [T, E]; fp32 or wider."""
    index_TK: Tensor | None
    """The experts of topk."""
    num_experts: int

    def dense(self) -> tuple[Tensor, Tensor]:
        """weights_TE and routing_map_TE, as our routers return them."""
        if self.index_TK is None:
            return self.weights, self.weights.detach() > 0
        shape = (self.weights.shape[0], self.num_experts)
        weights_TE = self.weights.new_zeros(shape).scatter(1, self.index_TK, self.weights)
        map_TE = torch.zeros(shape, dtype=torch.bool, device=self.weights.device).scatter_(1, self.index_TK, True)
        return weights_TE, map_TE

    def lists(self) -> tuple[Tensor, Tensor, Tensor]:
        """token_N, expert_N and weight_N token by token, as the user of a peer makes them (gates: a host sync)."""
        if self.index_TK is not None:
            num_tokens, top_k = self.index_TK.shape
            token_N = torch.arange(num_tokens, device=self.index_TK.device).repeat_interleave(top_k)
            return token_N, self.index_TK.reshape(-1), self.weights.reshape(-1)
        pair_N = (self.weights.detach().reshape(-1) > 0).nonzero().reshape(-1)
        weight_N = self.weights.reshape(-1).index_select(0, pair_N)
        return pair_N // self.num_experts, pair_N % self.num_experts, weight_N

    def padded(self) -> tuple[Tensor, Tensor]:
        """Experts and weights [T, K] for peers that take no variable counts: up to the longest list (a host sync).

        Expert E stands in the gaps, with weight 0.
        """
        if self.index_TK is not None:
            return self.index_TK, self.weights
        longest = int((self.weights.detach() > 0).sum(1).max())
        weights_TK, index_TK = self.weights.topk(longest, dim=-1)
        return index_TK.masked_fill(weights_TK.detach() <= 0, self.num_experts), weights_TK


class Problem:
    """Leaves of a shape: `hidden_TH`, `gate_up_proj` [E, 2F, H], `down_proj` [E, H, F]; and the output's gradient."""

    def __init__(self, shape: LayerShape, device: torch.device, dtype: torch.dtype, seed: int = 1) -> None:
        self.shape, self.device, self.dtype = shape, device, dtype
        self.generator = torch.Generator(device).manual_seed(seed)
        hidden, width, experts = shape.hidden_size, shape.expert_size, shape.num_experts
        self.hidden_TH = self._normal(shape.num_tokens, hidden).requires_grad_()
        self.grad_out_TH = self._normal(shape.num_tokens, hidden)
        self.gate_up_proj = self._stacked(experts, 2 * width, hidden)
        self.down_proj = self._stacked(experts, hidden, width)

    def leaves(self, routing: Routing) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """What gradients are taken of."""
        return self.hidden_TH, self.gate_up_proj, self.down_proj, routing.weights

    def route(self, name: str) -> Routing:
        """A new routing of this kind."""
        if name == "topk":
            scores_TE = self._uniform()
            index_TK = scores_TE.topk(self.shape.top_k, dim=-1).indices
            weights_TK = scores_TE.gather(1, index_TK) + 0.1
            return Routing(name, weights_TK.requires_grad_(), index_TK, self.shape.num_experts)
        masks = {"var": self._variable, "even_fixed": self._even_fixed, "even_var": self._even_variable}
        gates_TE = (self._uniform() + 0.1) * masks[name]()
        return Routing(name, gates_TE.requires_grad_(), None, self.shape.num_experts)

    def _variable(self) -> Tensor:
        """Each pair on with probability k / E, then random ones flipped until exactly T * k are."""
        shape = self.shape
        mask_TE = self._uniform() < shape.top_k / shape.num_experts
        pairs = mask_TE.view(-1)
        excess = int(pairs.sum()) - shape.num_pairs
        candidates = (pairs if excess > 0 else ~pairs).nonzero().view(-1)
        order = torch.randperm(len(candidates), generator=self.generator, device=self.device)
        pairs[candidates[order[: abs(excess)]]] = excess < 0
        return mask_TE

    def _even_fixed(self) -> Tensor:
        """Groups of E tokens share out a random order of the experts, k after k; tokens of a group are not neighbours.

        One order for all would let neighbouring experts read the same tokens from the cache, as no router does.
        """
        shape = self.shape
        num_groups = -(-shape.num_tokens // shape.num_experts)
        scores_GE = torch.rand(num_groups, shape.num_experts, generator=self.generator, device=self.device)
        turn_T = torch.randperm(shape.num_tokens, generator=self.generator, device=self.device)
        first_T = turn_T % shape.num_experts * shape.top_k
        place_TK = (first_T[:, None] + torch.arange(shape.top_k, device=self.device)) % shape.num_experts
        index_TK = scores_GE.argsort(1)[turn_T // shape.num_experts].gather(1, place_TK)
        return torch.zeros_like(self._uniform(), dtype=torch.bool).scatter(1, index_TK, True)

    def _even_variable(self) -> Tensor:
        scores_TE = self._uniform()
        index_CE = scores_TE.topk(self.shape.num_pairs // self.shape.num_experts, dim=0).indices
        return torch.zeros_like(scores_TE, dtype=torch.bool).scatter(0, index_CE, True)

    def _uniform(self) -> Tensor:
        size = (self.shape.num_tokens, self.shape.num_experts)
        return torch.rand(size, generator=self.generator, device=self.device)

    def _normal(self, *size: int, std: float = 1.0) -> Tensor:
        values = torch.randn(size, generator=self.generator, device=self.device) * std
        return values.to(self.dtype)

    def _stacked(self, num_experts: int, rows: int, columns: int) -> nn.Parameter:
        """Expert by expert: an fp32 copy of all weights at once would be the largest tensor of the benchmark."""
        weight = torch.empty(num_experts, rows, columns, dtype=self.dtype, device=self.device)
        for expert in range(num_experts):
            weight[expert] = self._normal(rows, columns, std=columns**-0.5)
        return nn.Parameter(weight)
