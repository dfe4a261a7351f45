"""One of two data ranks under FSDP: `torchrun --nproc-per-node 2 -m …worker OUTPUT`; the first writes what it found."""

import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torchtitan.distributed.fsdp import disable_fsdp_gradient_division

from remoe.distributed.adapters.torchtitan import with_relu_routing
from remoe.distributed.adapters.torchtitan.moe import ReLUMoE
from tests.distributed.adapters.torchtitan.models import ONE_PROCESS, batch, built, small_spec, train

TOKENS, STEPS = 64, 3


def trained(rows: slice, mesh: Any = None) -> dict[str, Any]:
    """Router weights, coefficients and losses after some steps on these rows of the batch."""
    spec = with_relu_routing(small_spec(), TOKENS, init=0.3)
    model, dims = built(spec), ONE_PROCESS
    if mesh is not None:
        for block in model.layers.values():
            fully_shard(block, mesh=mesh)
        fully_shard(model, mesh=mesh)
        disable_fsdp_gradient_division(model)
        for module in (model, *model.layers.values()):
            module.set_force_sum_reduction_for_comms(True)  # gloo has no scaled sums
        dims = SimpleNamespace(**(vars(ONE_PROCESS) | {"get_optional_mesh": lambda _: mesh}))
    losses = train(model, spec, STEPS, batch(rows), TOKENS, dims)
    layers = [module for module in model.modules() if isinstance(module, ReLUMoE)]
    weights = [layer.router.gate.weight for layer in layers]
    whole = [weight.full_tensor() if mesh is not None else weight for weight in weights]  # pyright: ignore
    return {
        "losses": losses,
        "coefficients": [layer.log_coef.exp().item() for layer in layers],
        "routers": [weight.detach().tolist() for weight in whole],
    }


def main() -> None:
    """Both ranks together, and the first one alone on all rows."""
    dist.init_process_group("gloo")
    mesh = init_device_mesh("cpu", (2,))
    rank = dist.get_rank()
    found: list[Any] = [None, None]
    dist.all_gather_object(found, trained(slice(rank, rank + 1), mesh))
    if rank == 0:
        content = {"ranks": found, "whole": trained(slice(None))}
        Path(sys.argv[1]).write_text(json.dumps(content))
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    torch.manual_seed(0)
    main()
