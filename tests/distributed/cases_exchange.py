"""An MoE layer whose experts two ranks share, beside the same layer with all tokens in one place."""

import math
import weakref
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from remoe.distributed import expert_parallel
from remoe.distributed.expert_parallel import share_experts
from remoe.moe import MoE, MoEConfig, RouterContext, Routing
from remoe.moe.layer import Capacity

EXPERTS, HIDDEN = 4, 8
OPEN = {
    "mixed": [[1, 0, 1, 0], [0, 0, 0, 0], [1, 1, 1, 1], [1, 1, 0, 0], [0, 0, 0, 1], [1, 0, 0, 1]],
    "an expert without tokens": [[1, 0, 1, 0], [0, 0, 1, 1], [1, 0, 0, 1], [1, 0, 0, 0], [0, 0, 1, 1], [1, 0, 0, 1]],
    "all closed on the first rank": [[0, 0, 0, 0]] * 3 + [[1, 0, 1, 1], [0, 1, 0, 0], [1, 1, 1, 1]],
    "all closed on the last rank": [[1, 0, 1, 1], [0, 1, 0, 0], [1, 1, 1, 1]] + [[0, 0, 0, 0]] * 3,
    "no token for the last rank": [[1, 0, 0, 0], [0, 1, 0, 0], [1, 1, 0, 0]] * 2,
    "no token for either rank": [[0, 0, 0, 0]] * 6,
    "all open": [[1, 1, 1, 1]] * 6,
}
"""Routing maps of six tokens, three a rank; experts 0 and 1 are on the first rank."""


class GivenRouter(nn.Module):
    """Opens the gates it was given, with values that are learned."""

    state_size, penalty = 0, "none"

    def __init__(self, map_TE: Tensor, gates_TE: Tensor) -> None:
        super().__init__()
        self.map_TE = map_TE
        self.gates_TE = nn.Parameter(gates_TE)

    def forward(self, hidden_TH: Tensor, context: RouterContext | None = None) -> Routing:
        return Routing(self.gates_TE.masked_fill(~self.map_TE, 0), self.map_TE)


def layer(map_TE: Tensor, gates_TE: Tensor, router: str = "relu") -> MoE:
    """A layer with the same experts on each call."""
    torch.manual_seed(5)
    config = MoEConfig(hidden_size=HIDDEN, intermediate_size=6, num_experts=EXPERTS, top_k=1, router=router)
    moe = MoE(config)
    for parameter in moe.experts.parameters():
        nn.init.normal_(parameter, std=0.5)
    moe.router = GivenRouter(map_TE, gates_TE)
    return moe


def run(moe: MoE, hidden_BSH: Tensor, grad_BSH: Tensor) -> dict[str, Tensor]:
    """Output and gradients."""
    hidden_BSH = hidden_BSH.clone().requires_grad_()
    out_BSH, _ = moe(hidden_BSH)
    out_BSH.backward(grad_BSH)
    assert hidden_BSH.grad is not None
    gradients = {f"expert {name}": parameter.grad for name, parameter in moe.experts.named_parameters()}
    assert all(gradient is not None for gradient in gradients.values()), "an expert without rows has no gradient"
    return {"out": out_BSH[0], "hidden": hidden_BSH.grad[0], "gates": moe.router.gates_TE.grad} | gradients


def compare(
    open_TE: list[list[int]], own: slice, rows_per_token: float = math.inf, capacity: Capacity | None = None
) -> dict[str, Any]:
    """Largest differences between the shared layer and the one with all tokens; whether a second run has its bits."""
    torch.manual_seed(6)
    map_TE, gates_TE = torch.tensor(open_TE).bool(), torch.rand(len(open_TE), EXPERTS)
    gates_TE[0, 0] = 0.0  # open, though its value is 0: it has a gradient all the same
    hidden_TH, grad_TH = torch.randn(len(open_TE), HIDDEN), torch.randn(len(open_TE), HIDDEN)
    expected = run(layer(map_TE, gates_TE), hidden_TH[None], grad_TH[None])
    mesh = init_device_mesh("cpu", (dist.get_world_size(),), mesh_dim_names=("expert",))

    def shared() -> dict[str, Tensor]:
        moe = layer(map_TE[own], gates_TE[own])
        share_experts(moe, mesh, rows_per_token)
        moe.exchange.capacity = capacity  # pyright: ignore[reportOptionalMemberAccess]
        return run(moe, hidden_TH[None, own], grad_TH[None, own])

    found, again = shared(), shared()
    differences = {}
    for name, value in found.items():
        if name.startswith("expert"):
            value, again[name] = value.full_tensor(), again[name].full_tensor()  # pyright: ignore
            differences[name] = (value - expected[name]).abs().max().item()
        else:
            differences[name] = (value - expected[name][own]).abs().sum().item()
        differences[f"{name} again"] = (value - again[name]).abs().sum().item()
    return differences


def exchange() -> dict[str, Any]:
    """Each routing map of OPEN."""
    own = slice(3 * dist.get_rank(), 3 * dist.get_rank() + 3)
    return {name: compare(open_TE, own) for name, open_TE in OPEN.items()}


def with_capacity() -> dict[str, Any]:
    """The same with room for just as many rows and pairs as there are, and for more."""
    own, found = slice(3 * dist.get_rank(), 3 * dist.get_rank() + 3), {}
    for name, open_TE in OPEN.items():
        needs = needed(open_TE)
        found[f"{name}, just enough"] = compare(open_TE, own, capacity=needs)
        found[f"{name}, more"] = compare(open_TE, own, capacity=Capacity(needs.rows + 2, needs.pairs + 5))
    return found


def needed(open_TE: list[list[int]]) -> Capacity:
    """Worked out from the whole map: two ranks with three tokens and two experts each."""
    map_RTRe = torch.tensor(open_TE).view(2, 3, 2, 2).bool()
    return Capacity(int(map_RTRe.any(3).sum(1).max()), int(map_RTRe.sum((0, 1, 3)).max()))


def reported() -> dict[str, Any]:
    """What an exchange says of its needs, and whether they were too much: exact, with just enough room, with less."""
    own, found = slice(3 * dist.get_rank(), 3 * dist.get_rank() + 3), {}
    mesh = init_device_mesh("cpu", (dist.get_world_size(),), mesh_dim_names=("expert",))
    for name, open_TE in OPEN.items():
        map_TE, needs = torch.tensor(open_TE).bool()[own], needed(open_TE)
        found[name] = {"needed": list(needs)}
        room = {"exact": None, "enough": needs, "few rows": Capacity(needs.rows - 1, needs.pairs)}
        for case, capacity in (room | {"few pairs": Capacity(needs.rows, needs.pairs - 1)}).items():
            if capacity is None or min(capacity) >= 0:
                moe = layer(map_TE, torch.rand(map_TE.shape))
                share_experts(moe, mesh)
                moe.exchange.capacity = capacity  # pyright: ignore[reportOptionalMemberAccess]
                routing = moe(torch.randn(1, 3, HIDDEN))[1]
                is_too_much = None if routing.overflow is None else routing.overflow.item()
                found[name][case] = {"needs": routing.needs.tolist(), "overflow": is_too_much}
    return found


def in_parts() -> dict[str, Any]:
    """The same with a budget of a row for two tokens, and with a rank that has no tokens."""
    own = slice(3 * dist.get_rank(), 3 * dist.get_rank() + 3)
    found = {name: compare(open_TE, own, rows_per_token=0.5) for name, open_TE in OPEN.items()}
    without = slice(0, 0) if dist.get_rank() == 0 else slice(0, 6)
    return found | {"a rank without tokens": compare(OPEN["mixed"], without, rows_per_token=0.5)}


def uneven() -> dict[str, Any]:
    """Ranks with different numbers of tokens, one of them with none at all."""
    own = slice(0, 0) if dist.get_rank() == 0 else slice(0, 6)
    return compare(OPEN["mixed"], own)


def rows_sent() -> dict[str, Any]:
    """How many hidden rows the first rank sends, forward and back, for tokens with two experts on each rank."""
    rows: list[int] = []
    exchange_rows = expert_parallel.exchange_rows

    def counting(rows_MX: Tensor, splits: Any, group: Any) -> Tensor:
        if rows_MX.shape[1] == HIDDEN:
            rows.append(len(rows_MX))
        return exchange_rows(rows_MX, splits, group)

    expert_parallel.exchange_rows = counting
    try:
        compare(OPEN["all open"], slice(3 * dist.get_rank(), 3 * dist.get_rank() + 3))
    finally:
        expert_parallel.exchange_rows = exchange_rows
    return {"rows": rows}


class ReceivedRows:
    """Counts the rows that exchanges have received and that still take memory."""

    def __init__(self) -> None:
        self.now, self.peak = 0, 0

    def count(self, received: Tensor) -> None:
        self.now += len(received)
        self.peak = max(self.peak, self.now)
        weakref.finalize(received, self._forget, len(received))

    def _forget(self, rows: int) -> None:
        self.now -= rows


def peak_rows() -> dict[str, Any]:
    """The most rows that take memory at a time in forward and backward passes of four layers, by batch and budget: the
    least of three runs, for gloo's threads may hold a tensor a moment longer than the pass does.
    """
    own_tokens, ranks = 32, dist.get_world_size()
    one_sided = torch.zeros(own_tokens, EXPERTS, dtype=torch.bool)
    one_sided[:, -1] = True  # all tokens of all ranks need the last rank alone
    batches = {"dense start": torch.ones(own_tokens, EXPERTS, dtype=torch.bool), "unlucky": one_sided}
    mesh = init_device_mesh("cpu", (ranks,), mesh_dim_names=("expert",))
    return {
        f"{name}, {budget}": min(most_rows(map_TE, mesh, budget) for _ in range(3)) / own_tokens
        for name, map_TE in batches.items()
        for budget in (math.inf, 1.0, 0.25)
    }


def most_rows(map_TE: Tensor, mesh: DeviceMesh, budget: float) -> int:
    """The peak for one batch."""
    rows, all_to_all = ReceivedRows(), expert_parallel._all_to_all

    def counting(sent: Tensor, splits: Any, group: Any) -> Tensor:
        received = all_to_all(sent, splits, group)
        if received.shape[1] == HIDDEN:
            rows.count(received)
        return received

    expert_parallel._all_to_all = counting
    try:
        layers = [layer(map_TE, torch.rand(map_TE.shape)) for _ in range(4)]
        hidden_BSH = torch.randn(1, len(map_TE), HIDDEN, requires_grad=True)
        out_BSH = hidden_BSH
        for moe in layers:
            share_experts(moe, mesh, budget)
            out_BSH = out_BSH + moe(out_BSH)[0]
        out_BSH.sum().backward()
    finally:
        expert_parallel._all_to_all = all_to_all
    return rows.peak


CASES: dict[str, Callable[[], Any]] = {
    "exchange": exchange, "with_capacity": with_capacity, "reported": reported, "in_parts": in_parts,
    "uneven": uneven, "rows_sent": rows_sent, "peak_rows": peak_rows,
}  # fmt: skip
