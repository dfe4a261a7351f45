"""Small Megatron models that run on a CPU; the stand-ins for CUDA are here and nowhere in the product."""

import contextlib
from collections.abc import Iterator
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from megatron.core import parallel_state, tensor_parallel
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_decoder_block_spec
from megatron.core.transformer.moe import moe_utils, token_dispatcher
from megatron.core.transformer.moe.moe_utils import MoEAuxLossAutoScaler
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor
from torch.overrides import TorchFunctionMode

from remoe.distributed.adapters.megatron import Routers, RouterSettings
from remoe.model import ReMoEConfig, ReMoEForCausalLM

CPU = torch.device("cpu")
VOCABULARY, LENGTH = 64, 8
SIZES: dict[str, Any] = {
    "num_layers": 3, "hidden_size": 16, "num_attention_heads": 4, "num_query_groups": 2, "ffn_hidden_size": 24,
    "moe_ffn_hidden_size": 24, "num_moe_experts": 4, "moe_router_topk": 1,
}  # fmt: skip
PLAIN: dict[str, Any] = {
    "add_bias_linear": False, "gated_linear_unit": True, "activation_func": torch.nn.functional.silu,
    "normalization": "RMSNorm", "layernorm_epsilon": 1e-5, "attention_dropout": 0.0, "hidden_dropout": 0.0,
    "bias_activation_fusion": False, "masked_softmax_fusion": False, "bias_dropout_fusion": False,
    "attention_softmax_in_fp32": False, "use_cpu_initialization": True, "init_method_std": 0.2,
    "moe_router_pre_softmax": True,  # Megatron asks for it with k = 1
    "moe_router_load_balancing_type": "none", "moe_token_dispatcher_type": "alltoall",
    "params_dtype": torch.float64,
}  # fmt: skip


class _Stream:
    """A stream of a device that has none."""

    def wait_stream(self, other: Any) -> None: ...

    def synchronize(self) -> None: ...

    def record_event(self) -> "_Stream":
        return self


class _OnCPU(TorchFunctionMode):
    """Tensors that Megatron's schedules make on "cuda" come to the CPU."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if kwargs.get("device") is not None and torch.device(kwargs["device"]).type == "cuda":
            kwargs["device"] = CPU
        return func(*args, **kwargs)


def _on_host(tensor: Tensor | None, as_numpy: bool = False, record_stream: bool = False) -> Any:
    """Megatron's own reads numbers of rows only from a GPU."""
    return tensor.numpy() if as_numpy and tensor is not None else tensor


@contextlib.contextmanager
def megatron_on_cpu(**sizes: int) -> Iterator[None]:
    """Megatron's groups over gloo, and stand-ins for the CUDA calls of its dispatcher and random states."""
    stream = _Stream()
    stand_ins = {
        "Stream": lambda: stream, "current_stream": lambda: stream, "current_device": lambda: CPU,
        "synchronize": lambda: None,
    }  # fmt: skip
    tracker = tensor_parallel.get_cuda_rng_tracker()
    with contextlib.ExitStack() as stack:
        stack.enter_context(_OnCPU())
        for name, value in stand_ins.items():
            stack.enter_context(mock.patch.object(torch.cuda, name, value))
        for owner, name in ((torch.cuda, "stream"), (tracker, "fork")):
            stack.enter_context(mock.patch.object(owner, name, return_value=contextlib.nullcontext()))
        for name in ("_get_cuda_rng_state", "_set_cuda_rng_state"):
            stack.enter_context(mock.patch.object(tensor_parallel.random, name, return_value=None))
        stack.enter_context(mock.patch.object(token_dispatcher, "maybe_move_tensor_to_cpu", _on_host))
        stack.enter_context(mock.patch.object(moe_utils, "te_general_gemm", None, create=True))
        parallel_state.initialize_model_parallel(**sizes)
        stack.callback(parallel_state.destroy_model_parallel)
        yield


class _Norm(torch.nn.RMSNorm):
    """Megatron's own without TransformerEngine refuses sequence parallelism."""

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float) -> None:
        super().__init__(hidden_size, eps)
        self.weight.sequence_parallel = config.sequence_parallel  # pyright: ignore


def megatron_config(**changes: Any) -> TransformerConfig:
    """A small model's config in fp64."""
    return TransformerConfig(**(SIZES | PLAIN | changes))


def megatron_model(config: TransformerConfig, routers: Routers | None = None, **options: Any) -> GPTModel:
    """A GPT model with our routers in its MoE layers, or with Megatron's own; norms in the model's dtype."""
    torch.manual_seed(0)
    stage = {"vp_stage": options.get("vp_stage")}
    spec = get_gpt_decoder_block_spec(config, False, normalization=config.normalization, **stage)
    spec.layer_norm = _Norm
    for layer in spec.layer_specs:
        layer.submodules.input_layernorm = layer.submodules.pre_mlp_layernorm = _Norm
    spec = spec if routers is None else routers.layer_spec(spec)
    positions = {"position_embedding_type": "rope", "rotary_base": 10_000}
    model = GPTModel(
        config, spec, VOCABULARY, LENGTH, share_embeddings_and_output_weights=False, **positions, **options
    )
    return model.to(config.params_dtype)


def routed_model(
    config: TransformerConfig | None = None, settings: RouterSettings | None = None
) -> tuple[GPTModel, Routers]:
    """A model and its routers."""
    config = megatron_config() if config is None else config
    routers = Routers(config, settings, device=CPU)
    return megatron_model(config, routers), routers


def native_config(config: TransformerConfig, router: str | dict[str, Any]) -> ReMoEConfig:
    """Ours for the same model."""
    frequency = config.moe_layer_freq
    moe_layers = "all" if frequency == 1 else [i for i, has in enumerate(frequency) if has]  # pyright: ignore
    return ReMoEConfig(
        vocab_size=VOCABULARY, hidden_size=config.hidden_size, num_layers=config.num_layers,
        num_heads=config.num_attention_heads, num_kv_heads=config.num_query_groups,
        intermediate_size=config.ffn_hidden_size, num_experts=config.num_moe_experts, top_k=config.moe_router_topk,
        router=router, moe_layers=moe_layers, rope_theta=10_000.0, norm_eps=config.layernorm_epsilon,
    )  # fmt: skip


def native_model(config: ReMoEConfig, weights: dict[str, Tensor]) -> ReMoEForCausalLM:
    """Ours with these weights: all of them, and no other."""
    model = ReMoEForCausalLM(config).to(next(iter(weights.values())).dtype)
    model.load_state_dict(weights, strict=True)
    return model


def tokens(rows: int = 2, seed: int = 0) -> Tensor:
    """Token ids [B, S]."""
    return torch.randint(VOCABULARY, (rows, LENGTH), generator=torch.Generator().manual_seed(seed))


def logits_of(model: GPTModel, tokens_BS: Tensor, padding_mask_BS: Tensor | None = None) -> Tensor:
    """Logits [B, S, V] of a Megatron model."""
    length = tokens_BS.shape[1]
    position_BS = torch.arange(length).expand_as(tokens_BS)
    mask = torch.ones(1, 1, length, length, dtype=torch.bool).triu(1)
    return model(tokens_BS, position_BS, mask, padding_mask=padding_mask_BS)


def loss_of(logits_BSV: Tensor, tokens_BS: Tensor) -> Tensor:
    """Mean cross-entropy of ids that have nothing to do with the tokens."""
    labels_BS = (tokens_BS * 7 + 3) % VOCABULARY
    return torch.nn.functional.cross_entropy(logits_BSV.flatten(0, 1), labels_BS.flatten())


def train_micro_batch(model: GPTModel, tokens_BS: Tensor, num_micro_batches: int = 1, **inputs: Any) -> None:
    """Forward and backward of one micro-batch, scaled as Megatron's schedules scale it."""
    MoEAuxLossAutoScaler.main_loss_backward_scale = torch.ones(1, dtype=torch.float64) / num_micro_batches
    (loss_of(logits_of(model, tokens_BS, **inputs), tokens_BS) / num_micro_batches).backward()


def gradients(model: torch.nn.Module) -> dict[str, Tensor]:
    """Every parameter's gradient."""
    found = {name: parameter.grad for name, parameter in model.named_parameters()}
    missing = [name for name, gradient in found.items() if gradient is None]
    assert not missing, f"no gradient for {missing}"
    return found  # pyright: ignore[reportReturnType]


def single_process() -> None:
    """A process group of one, without a port."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
