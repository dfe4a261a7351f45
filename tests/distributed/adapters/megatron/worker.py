"""One process of several: `torchrun --nproc-per-node 2 worker.py OUTPUT`: every layout beside one process of ours."""

import json
import sys
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.transformer.moe.moe_utils import MoEAuxLossAutoScaler
from megatron.core.transformer.spec_utils import build_module
from torch import Tensor

from remoe.convert.megatron.names import to_native
from remoe.convert.megatron.shards import Rank, join
from remoe.distributed.adapters.megatron import Routers, RouterSettings
from remoe.moe import losses
from tests.distributed.adapters.megatron.models import (
    CPU,
    LENGTH,
    gradients,
    loss_of,
    megatron_config,
    megatron_model,
    megatron_on_cpu,
    native_config,
    native_model,
    tokens,
)

LAYOUTS: dict[str, dict[str, Any]] = {
    "data": {},
    "tensor": {  # gloo gathers no parts of different sizes, as the all-to-all dispatcher does over tensor ranks
        "tensor_model_parallel_size": 2, "sequence_parallel": True, "moe_token_dispatcher_type": "allgather",
    },
    "expert": {"expert_model_parallel_size": 2},
    "pipeline": {"pipeline_model_parallel_size": 2, "pipeline_dtype": torch.float64},
    "virtual pipeline": {
        "pipeline_model_parallel_size": 2, "virtual_pipeline_model_parallel_size": 2, "pipeline_dtype": torch.float64,
    },
}  # fmt: skip
RECURRENT = {"name": "recurrent_relu", "state_size": 8}
CASES: dict[str, tuple[str, Any]] = {name: (name, "relu") for name in LAYOUTS} | {
    f"recurrent {name}": (name, RECURRENT) for name in ("data", "tensor", "expert")
}
COEFFICIENT, MICRO_BATCHES = 0.3, 2


def run(layout: str, router: Any) -> dict[str, Any]:
    """Coefficient and counts of this rank; on the first also the largest differences to our model."""
    options = LAYOUTS[layout] | {"num_layers": 4, "moe_router_topk": 2}
    sizes = {key: value for key, value in options.items() if key.endswith("_parallel_size")}
    with megatron_on_cpu(**sizes):
        config = megatron_config(**options)
        routers = Routers(config, RouterSettings(router=router, init=COEFFICIENT), device=CPU)
        chunks = model_chunks(config, routers)
        train_step(chunks, config)
        routers.after_optimizer_step()
        found = {"coef": float(routers.coef), "counts": routers.last_step.rows_LE1.tolist()}
        place = Rank(
            parallel_state.get_tensor_model_parallel_rank(),
            parallel_state.get_pipeline_model_parallel_rank(),
            parallel_state.get_expert_model_parallel_rank(),
        )
        weights, gradients_ = gathered(place, chunks)
    return found | (compared(config, router, weights, gradients_) if dist.get_rank() == 0 else {})


def model_chunks(config: Any, routers: Routers) -> list[Any]:
    """This rank's chunks, each behind Megatron's own data parallel wrapper, with the weights of one rank."""
    num_chunks = config.virtual_pipeline_model_parallel_size or 1
    chunks = []
    for chunk in range(num_chunks):
        stage = {"vp_stage": chunk} if num_chunks > 1 else {}
        ends = {
            "pre_process": parallel_state.is_pipeline_first_stage(ignore_virtual=num_chunks == 1, **stage),
            "post_process": parallel_state.is_pipeline_last_stage(ignore_virtual=num_chunks == 1, **stage),
        }
        model = megatron_model(config, routers, **ends, **stage)
        make_different(model, 1 + 0.1 * (parallel_state.get_pipeline_model_parallel_rank() + 2 * chunk))
        settings = DistributedDataParallelConfig(grad_reduce_in_fp32=False, overlap_grad_reduce=False)
        chunks.append(DistributedDataParallel(config, settings, model))
    return chunks


@torch.no_grad()
def make_different(model: Any, factor: float) -> None:
    """Megatron draws the same numbers on every stage and expert rank, which would hide a mistaken place."""
    expert_factor = 1 + 0.2 * parallel_state.get_expert_model_parallel_rank()
    for parameter in model.parameters():
        parameter.mul_(factor if getattr(parameter, "allreduce", True) else factor * expert_factor)


def train_step(chunks: list[Any], config: Any) -> None:
    """A step of several micro-batches through Megatron's own schedule; each data rank has rows of its own."""
    config.finalize_model_grads_func = finalize_model_grads
    for chunk in chunks:
        chunk.zero_grad_buffer()
    data_rank = parallel_state.get_data_parallel_rank()
    batches = [iter([tokens(seed=10 * data_rank + step) for step in range(MICRO_BATCHES)]) for _ in chunks]
    get_forward_backward_func()(
        forward_step_func=forward_step, data_iterator=batches if len(chunks) > 1 else batches[0],
        model=chunks if len(chunks) > 1 else chunks[0], num_microbatches=MICRO_BATCHES, seq_length=LENGTH,
        micro_batch_size=2, forward_only=False,
    )  # fmt: skip


def forward_step(batches: Any, model: Any) -> Any:
    """What a training script gives to the schedule."""
    tokens_BS = next(batches)
    position_BS = torch.arange(LENGTH).expand_as(tokens_BS)
    output = model(tokens_BS, position_BS, torch.ones(1, 1, LENGTH, LENGTH, dtype=torch.bool).triu(1))

    def loss(logits_BSV: Tensor) -> tuple[Tensor, dict[str, Any]]:
        whole_BSV = from_tensor_ranks(logits_BSV)
        return loss_of(whole_BSV, tokens_BS), {}

    return output, loss


def from_tensor_ranks(logits_BSV: Tensor) -> Tensor:
    """All of the vocabulary; the gradient of a rank's part is its own."""
    from megatron.core.tensor_parallel import gather_from_tensor_model_parallel_region

    return gather_from_tensor_model_parallel_region(logits_BSV)


def gathered(place: Rank, chunks: list[Any]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Weights and gradients of the whole model, put together by our converter."""
    own = [{name: (p.detach(), p.main_grad) for name, p in chunk.module.named_parameters()} for chunk in chunks]
    everyone: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, (place, own))
    parts: dict[Rank, list[Any]] = dict(everyone)  # ranks that hold the same part have the same numbers
    weights, gradients_ = (
        join({rank: [{name: pair[index] for name, pair in chunk.items()} for chunk in parts[rank]] for rank in parts})
        for index in (0, 1)
    )
    return weights, gradients_


def compared(config: Any, router: Any, weights: dict[str, Tensor], found: dict[str, Tensor]) -> dict[str, Any]:
    """Largest difference of each gradient to our model's, in one process over the same tokens; and its counts."""
    own_config = native_config(config, router)
    ours = native_model(own_config, to_native(weights, own_config))
    data_ranks = dist.get_world_size() // (config.tensor_model_parallel_size * config.pipeline_model_parallel_size)
    counts = []
    for step in range(MICRO_BATCHES):
        tokens_BS = torch.cat([tokens(seed=10 * rank + step) for rank in range(data_ranks)])
        output = ours(tokens_BS)
        penalty = sum(losses.sparsity_l1(r, config.moe_router_topk) for r in output.routings) / config.num_layers
        ((loss_of(output.logits, tokens_BS) + COEFFICIENT * penalty) / MICRO_BATCHES).backward()
        counts.append([[*r.routing_map_TE.sum(0).tolist(), tokens_BS.numel()] for r in output.routings])
    differences = {
        name: (to_native(found, own_config)[name] - gradient).abs().max().item() / gradient.abs().max().item()
        for name, gradient in gradients(ours).items()
    }
    return {"differences": differences, "expected": torch.tensor(counts).sum(0).tolist()}


def context_parallel() -> dict[str, Any]:
    """An MoE layer whose tokens two ranks share, and the same one with all tokens on each rank.

    Not a model: Megatron's attention needs TransformerEngine for context parallelism.
    """
    whole, shared = (one_layer(num_ranks) for num_ranks in (1, 2))
    gradient = shared.pop("gradient")
    dist.all_reduce(gradient)
    expected = whole.pop("gradient")
    return shared | {"differences": {"router": ((gradient / 2 - expected).abs().max() / expected.abs().max()).item()}}


def one_layer(num_ranks: int) -> dict[str, Any]:
    """The router's gradient over this rank's share of the tokens, and the coefficient after the step."""
    with megatron_on_cpu(context_parallel_size=num_ranks):
        config = megatron_config(context_parallel_size=num_ranks)
        routers = Routers(config, RouterSettings(init=COEFFICIENT, loads="micro_batch"), device=CPU)
        torch.manual_seed(0)
        spec = routers.layer_spec(get_gpt_layer_local_spec(num_experts=4, normalization="RMSNorm"))
        layer = build_module(spec.submodules.mlp, config=config)
        layer.set_layer_number(1)
        torch.manual_seed(3)
        hidden_SBH, grad_SBH = torch.randn(2, LENGTH, 2, config.hidden_size, dtype=torch.float64)
        own = slice(dist.get_rank() % num_ranks, None, num_ranks)
        MoEAuxLossAutoScaler.main_loss_backward_scale = torch.tensor([float(num_ranks)])  # as schedules do
        layer(hidden_SBH[own].contiguous())[0].backward(num_ranks * grad_SBH[own])
        routers.after_optimizer_step()
    counts = (routers.last_step.rows_LE1 * num_ranks // 2).tolist()  # with one rank both have all tokens
    return {"gradient": layer.router.weight.grad, "coef": float(routers.coef), "counts": counts}


def main() -> None:
    """Every case in turn."""
    dist.init_process_group("gloo")
    results: dict[str, list[Any]] = {}
    for name, case in {
        **{name: partial(run, *case) for name, case in CASES.items()},
        "context": context_parallel,
    }.items():
        results[name] = [None] * dist.get_world_size()
        dist.all_gather_object(results[name], case())
    if dist.get_rank() == 0:
        Path(sys.argv[1]).write_text(json.dumps(results))
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
