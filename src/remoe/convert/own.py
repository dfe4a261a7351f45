"""Our own checkpoints: Top-K gates swapped for ReLU gates, and dense models made mixtures of experts."""

import dataclasses

import torch
from torch import Tensor

from remoe.config import check_range
from remoe.convert.agreement import Conversion, Logits, layer_figures, measure_agreement
from remoe.convert.native import filled
from remoe.convert.swap import StandIns, native_gates
from remoe.convert.text import ConversionText
from remoe.errors import ConfigError
from remoe.model import ReMoEConfig, ReMoEForCausalLM

_BREAKS_TIES = 0.05  # of a gate: how much copies of one expert differ at first


def swap_native_gates(source: ReMoEForCausalLM, text: ConversionText) -> tuple[ReMoEForCausalLM, Conversion]:
    """A model with ReLU gates (bias, normalised) that shares all other tensors, and how close it is to its source.

    Raises ConfigError for a model that is not routed by Top-K.
    """
    config = source.config
    if config.num_moe_layers == 0 or config.moe.router_name != "topk":
        router = config.moe.router_name if config.num_moe_layers else "none: the model is dense"
        raise ConfigError(f"the source's router is {router}, must be topk to be swapped for relu")
    stand_ins = StandIns(native_gates(source))
    with torch.no_grad(), stand_ins:
        source(text.calibration.tokens_BS)
        stand_ins.restart_counts()
        for batch in text.batches:
            source(batch.tokens_BS)
    converted = _with_relu_gates(source, stand_ins)
    agreement = measure_agreement(native_logits(source), native_logits(converted), text.batches)
    return converted, Conversion(
        source="native", target="native", agreement=agreement, top_k=config.moe.routed_top_k,
        **layer_figures(stand_ins.counts),
    )  # fmt: skip


def _with_relu_gates(source: ReMoEForCausalLM, stand_ins: StandIns) -> ReMoEForCausalLM:
    router = {"name": "relu", "bias": True, "normalize": True}
    state = {name: tensor for name, tensor in source.state_dict(keep_vars=True).items() if ".mlp.router." not in name}
    routed = [index for index in range(source.config.num_layers) if source.config.is_moe_layer(index)]
    for index, gate in zip(routed, stand_ins.all_fitted, strict=True):
        for key, tensor in gate._asdict().items():
            state[f"model.layers.{index}.mlp.router.{key}"] = torch.nn.Parameter(tensor)
    return filled(dataclasses.replace(source.config, router=router), state)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Upcycling:
    """The experts that each dense MLP becomes: `num_experts` copies, each split in `granularity` slices.

    `top_k` counts copies, as in `model:`; training steers to top_k * granularity of all slices.
    """

    num_experts: int = 8
    top_k: int = 1
    granularity: int = 1


def upcycle(source: ReMoEForCausalLM, config: Upcycling, seed: int = 0) -> ReMoEForCausalLM:
    """A mixture of experts that is the dense model's function, with every expert on, for training to thin out.

    Each of E copies has gate 1/E, so their sum is the MLP; slices of one copy add up to it by themselves. With several
    copies the router's rows are small and random but add up to 0 over the copies of a slice: gates differ, so copies do
    not stay equal in training, and the sum does not change. Raises ConfigError for a model that is not dense.
    """
    if source.config.num_moe_layers or source.config.is_post_norm:
        raise ConfigError("the source has experts or block post_norm, must be dense with block pre_norm to be upcycled")
    check_range("num_experts", config.num_experts, 1)
    model = dataclasses.replace(
        source.config, moe_layers="all", router={"name": "relu", "bias": True}, num_experts=config.num_experts,
        top_k=config.top_k, granularity=config.granularity,
    )  # fmt: skip
    generator = torch.Generator().manual_seed(seed)
    state: dict[str, Tensor] = {}
    mlps: dict[str, dict[str, Tensor]] = {}
    for name, tensor in source.state_dict(keep_vars=True).items():
        layer, is_mlp, part = name.partition(".mlp.")
        if is_mlp:
            mlps.setdefault(layer, {})[part.removesuffix(".weight")] = tensor.detach()
        else:
            state[name] = tensor
    for layer, parts in mlps.items():
        experts = _experts(parts["gate_proj"], parts["up_proj"], parts["down_proj"], config)
        router = _router(model, generator)
        state |= {f"{layer}.mlp.{key}": torch.nn.Parameter(value) for key, value in (experts | router).items()}
    return filled(model, state)


def _experts(gate_FH: Tensor, up_FH: Tensor, down_HF: Tensor, config: Upcycling) -> dict[str, Tensor]:
    """Slice by slice: expert e*G + g is slice g of copy e."""
    slices = config.granularity
    gate_up = torch.cat((_in_slices(gate_FH, slices), _in_slices(up_FH, slices)), dim=1)
    down = _in_slices(down_HF.mT, slices).mT
    copies = (config.num_experts, 1, 1)
    return {"experts.gate_up_proj": gate_up.repeat(copies), "experts.down_proj": down.repeat(copies).contiguous()}


def _in_slices(matrix_FH: Tensor, slices: int) -> Tensor:
    return matrix_FH.unflatten(0, (slices, -1))


def _router(config: ReMoEConfig, generator: torch.Generator) -> dict[str, Tensor]:
    copies, slices, hidden = config.num_experts, config.granularity, config.hidden_size
    rows = torch.randn(copies, slices, hidden, generator=generator) * _BREAKS_TIES / (copies * hidden**0.5)
    rows = rows - rows.mean(0)
    return {"router.weight": rows.flatten(0, 1), "router.bias": torch.full((copies * slices,), 1 / copies)}


def native_logits(model: ReMoEForCausalLM) -> Logits:
    """How `measure_agreement` asks a model of ours."""
    return lambda tokens_BS: model(tokens_BS).logits
