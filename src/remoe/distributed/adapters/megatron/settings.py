"""Settings of the routers of a Megatron model, and the options of Megatron's own that would be ignored with them."""

# pyright: reportMissingImports=false

from typing import Any

import torch
from megatron.core.transformer.transformer_config import TransformerConfig

from remoe.config import check_choice, check_range, config_class, setting
from remoe.errors import ConfigError
from remoe.moe import build_router
from remoe.moe.sparsity import SparsityController

NAMES = ("relu", "recurrent_relu", "rmoe")


@config_class
class RouterSettings:
    """Router and sparsity control; sizes are TransformerConfig's: num_moe_experts is E*G, moe_router_topk k*G."""

    router: str | dict[str, Any] = setting("relu", "relu, recurrent_relu or rmoe, or {name: NAME, option: value, ...}")
    init: float = setting(1.0e-8, "sparsity coefficient of the first step (ReMoE)")
    multiplier: float = setting(1.2, "factor of one update (ReMoE)")
    min_coef: float = setting(1e-16, "smallest coefficient")
    max_coef: float = setting(1e4, "largest coefficient")
    load_balanced: bool = setting(True, "weigh each expert by its load (eq. 10); false: plain L1 (eq. 9)")
    mode: str = setting("paper", "paper, or released: sum over layers, loads of the micro-batch, a tie lowers")
    loads: str = setting("data_ranks", "whose loads weigh the term: data_ranks or micro_batch")

    def __post_init__(self) -> None:
        check_choice("router", self.name, NAMES)
        check_choice("mode", self.mode, ("paper", "released"))
        check_choice("loads", self.loads, ("data_ranks", "micro_batch"))

    @property
    def name(self) -> str:
        """The router's registered name."""
        return self.router if isinstance(self.router, str) else str(self.router.get("name"))

    @property
    def options(self) -> dict[str, Any]:
        """The router's own options."""
        return {} if isinstance(self.router, str) else {k: v for k, v in self.router.items() if k != "name"}

    @property
    def is_released(self) -> bool:
        """Whether the term is that of ReMoE's released code."""
        return self.mode == "released"

    @property
    def loads_of_all(self) -> bool:
        """Whether loads are counted over all data ranks rather than over those that share a micro-batch."""
        return self.loads == "data_ranks" and not self.is_released

    def controller(self, config: TransformerConfig) -> SparsityController:
        """The controller of a model, at its first coefficient."""
        return SparsityController(
            config.moe_router_topk,
            experts_of(config),
            init=self.init,
            multiplier=self.multiplier,
            min_coef=self.min_coef,
            max_coef=self.max_coef,
            released=self.is_released,
        )


_NEEDED: dict[str, tuple[Any, ...]] = {
    "moe_token_dispatcher_type": ("alltoall", "allgather"),
    "moe_router_score_function": ("softmax",),
    "moe_router_num_groups": (None,),
    "moe_router_group_topk": (None,),
    "moe_router_topk_scaling_factor": (None,),
    "moe_router_enable_expert_bias": (False,),
    "moe_router_force_load_balancing": (False,),
    "moe_router_fusion": (False,),
    "moe_router_padding_for_quantization": (False, None),
    "moe_enable_routing_replay": (False,),
    "moe_apply_probs_on_input": (False,),
    "moe_input_jitter_eps": (None,),
    "moe_z_loss_coeff": (None, 0.0),
    "moe_expert_capacity_factor": (None,),
    "moe_pad_expert_input_to_capacity": (False,),
    "mtp_num_layers": (None, 0),
}
"""Values that an option may have: another one would silently do nothing, or wrong, with these routers."""


def check_config(config: TransformerConfig, settings: RouterSettings) -> None:
    """Raise ConfigError for a router option that does not exist, and for Megatron options that do not go with it."""
    check_range("moe_router_topk", config.moe_router_topk, 1, experts_of(config))
    with torch.device("meta"):
        router: Any = build_router(
            settings.name, config.hidden_size, experts_of(config), config.moe_router_topk, **settings.options
        )
    for key, allowed in _NEEDED.items():
        value = getattr(config, key, allowed[0])  # options come and go with Megatron's versions
        if value not in allowed:
            raise ConfigError(f"{key} is {value!r}, must be {_either(allowed)} with router {settings.name!r}")
    _check_balancing(config, router.penalty, settings.name)
    if router.state_size:
        _check_recurrent(config, settings.name)


def experts_of(config: TransformerConfig) -> int:
    """Number of experts of an MoE layer; ConfigError for a dense model."""
    if config.num_moe_experts is None:
        raise ConfigError("num_moe_experts is None, must be a number of experts: a dense model has no router")
    return config.num_moe_experts


def moe_layers_of(config: TransformerConfig) -> int:
    """How many layers of the whole model have experts: dense ones never count."""
    frequency = config.moe_layer_freq
    if isinstance(frequency, int):
        return len(range(0, config.num_layers, frequency))
    return sum(frequency)


def _check_balancing(config: TransformerConfig, penalty: str, name: str) -> None:
    coefficient = config.moe_aux_loss_coeff
    if penalty == "sparsity_l1" and coefficient != 0:
        raise ConfigError(
            f"moe_aux_loss_coeff is {coefficient}, must be 0 with router {name!r}: its L1 term balances the loads"
        )
    if isinstance(coefficient, list):
        raise ConfigError(f"moe_aux_loss_coeff is {coefficient}, must be one number with router {name!r}")


def _check_recurrent(config: TransformerConfig, name: str) -> None:
    stages = config.pipeline_model_parallel_size
    if stages > 1:
        raise ConfigError(
            f"pipeline_model_parallel_size is {stages}, must be 1 with router {name!r}: Megatron sends no router state "
            "from stage to stage; use router 'relu', or tensor, expert and context parallelism"
        )
    if config.recompute_granularity == "selective" and "moe" in (config.recompute_modules or []):
        raise ConfigError(
            f"recompute_modules is {config.recompute_modules}, must be without 'moe' with router {name!r}: the layer "
            "would be computed again without its router state; recompute_granularity 'full' works"
        )
    if getattr(config, "cuda_graph_impl", "none") != "none":
        raise ConfigError(f"cuda_graph_impl is {config.cuda_graph_impl!r}, must be 'none' with router {name!r}")


def _either(allowed: tuple[Any, ...]) -> str:
    return " or ".join(repr(value) for value in allowed)
