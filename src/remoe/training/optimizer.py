"""AdamW with decay on matrices only, whose steps can be cancelled by a flag on the device."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from remoe.training.config import OptimizerConfig


def build_optimizer(parameters: Iterable[nn.Parameter], config: OptimizerConfig) -> torch.optim.AdamW:
    """AdamW over those of the parameters that are trained, with its whole state in place before the first step.

    Tensors of two or more dimensions decay (embeddings too); norms and biases do not. The fused kernels, which CPU and
    CUDA both have, can cancel a step on the device.
    """
    optimizer = torch.optim.AdamW(
        _groups([p for p in parameters if p.requires_grad], config.weight_decay),
        lr=config.lr,
        betas=(config.beta1, config.beta2),
        eps=config.eps,
        fused=True,
    )
    _create_state(optimizer)
    return optimizer


def optimizer_step(optimizer: torch.optim.AdamW, lr: float, skipped: Tensor) -> None:
    """One update with this learning rate; where the 0-dim bool `skipped` is true, weights and state stay as they are.

    This is the switch that torch's GradScaler uses; nothing waits for the device.
    """
    for group in optimizer.param_groups:
        group["lr"] = lr
    optimizer.grad_scale, optimizer.found_inf = None, skipped.to(torch.float32)  # pyright: ignore[reportAttributeAccessIssue]
    optimizer.step()


def optimizer_tensors(parameters: Mapping[str, nn.Parameter], optimizer: torch.optim.AdamW) -> dict[str, Tensor]:
    """The optimizer's state by parameter name, e.g. `lm_head.weight.exp_avg`: the live tensors, not copies."""
    names: dict[Tensor, str] = {parameter: name for name, parameter in parameters.items()}
    return {
        f"{names[parameter]}.{key}": value
        for parameter, state in optimizer.state.items()
        for key, value in state.items()
    }


def _groups(parameters: Sequence[nn.Parameter], weight_decay: float) -> list[dict[str, Any]]:
    """By decay; and by mesh where ranks share parameters: no kernel takes tensors of two meshes."""
    groups: dict[tuple[bool, Any], list[nn.Parameter]] = {}
    for parameter in sorted(parameters, key=lambda p: p.ndim < 2):
        key = parameter.ndim >= 2, getattr(parameter, "device_mesh", None)
        groups.setdefault(key, []).append(parameter)
    return [{"params": group, "weight_decay": weight_decay if decays else 0.0} for (decays, _), group in groups.items()]


def _create_state(optimizer: torch.optim.AdamW) -> None:
    """What AdamW makes in its first step, made now: a checkpoint has the same tensors at any step."""
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            optimizer.state[parameter] = {
                "step": torch.zeros((), dtype=torch.float32, device=parameter.device),
                "exp_avg": torch.zeros_like(parameter, memory_format=torch.preserve_format),
                "exp_avg_sq": torch.zeros_like(parameter, memory_format=torch.preserve_format),
            }
