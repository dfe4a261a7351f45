"""fp32 weights behind a model that holds its matrices in bf16: what the optimizer moves and a checkpoint keeps.

Under autocast alone each micro-batch would round every matrix anew and widen every gradient again. Here matrices are
rounded once after each optimizer step, and each gradient is added to the fp32 sum as it comes: those of experts by
remoe::expert_mlp, the others by a hook. Same numbers, less work; on the Triton path experts' gradients are not even
rounded to bf16 before.
"""

from collections.abc import Collection, Iterator
from contextlib import contextmanager

import torch
from torch import nn

from remoe.model.linear import Linear
from remoe.moe.experts import GroupedExperts, MergedExperts
from remoe.moe.relu_experts import ReLUExperts


class MasterWeights:
    """Turns a model's matrices to bf16 in place, and keeps them and their gradients in fp32 beside it."""

    def __init__(self, model: nn.Module) -> None:
        self._masters: dict[nn.Parameter, nn.Parameter] = {}
        for matrix in multiplied_in_compute_dtype(model):
            self._masters[matrix] = nn.Parameter(matrix.detach().clone())
            matrix.data = matrix.data.to(torch.bfloat16)
        self._sums = {
            matrix: torch.zeros_like(self._masters[matrix])
            for experts in adding_experts(model, self._masters)
            for matrix in (experts.gate_up_proj, experts.down_proj)
        }
        for matrix in self._masters.keys() - self._sums.keys():
            matrix.register_post_accumulate_grad_hook(self._absorb)
        self.zero_sums()
        self.join(model)

    def join(self, model: nn.Module) -> None:
        """Let the experts of a model, this one or one that shares its parameters, add to the masters' gradients."""
        for experts in adding_experts(model, self._masters):
            experts.gradient_sums = self._sums[experts.gate_up_proj], self._sums[experts.down_proj]

    def complete_gradients(self) -> None:
        """Nothing: gradients come to their masters by themselves."""

    def zero_sums(self) -> None:
        """Give masters whose gradient the optimizer has dropped their sum back, at 0; others it has zeroed in place."""
        for matrix, gradient_sum in self._sums.items():
            master = self._masters[matrix]
            if master.grad is None:
                master.grad = gradient_sum.zero_()

    def named_parameters(self, model: nn.Module) -> dict[str, nn.Parameter]:
        """The model's parameters by name, those that have masters replaced by them."""
        return {name: self._masters.get(parameter, parameter) for name, parameter in model.named_parameters()}

    @torch.no_grad()
    def update_model(self) -> None:
        """Round the masters into the model, after they have changed."""
        if self._masters:
            torch._foreach_copy_(list(self._masters), list(self._masters.values()))

    @contextmanager
    def in_fp32(self) -> Iterator[None]:
        """Let the model hold the masters themselves inside, for a look at it without autocast."""
        rounded = [matrix.data for matrix in self._masters]
        for matrix, master in self._masters.items():
            matrix.data = master.data
        try:
            yield
        finally:
            for matrix, data in zip(self._masters, rounded, strict=True):
                matrix.data = data

    def _absorb(self, matrix: nn.Parameter) -> None:
        """Add a gradient that has just come to its master's."""
        master, gradient, matrix.grad = self._masters[matrix], matrix.grad, None
        assert gradient is not None, "torch calls this with a gradient"
        if master.grad is None:
            master.grad = gradient.to(master.dtype)
        else:
            master.grad += gradient


def adding_experts(model: nn.Module, masters: Collection[nn.Parameter]) -> Iterator[GroupedExperts]:
    """Those whose matrices both have masters, and get their gradients from remoe::expert_mlp."""
    for module in model.modules():
        if not isinstance(module, GroupedExperts) or isinstance(module, MergedExperts):
            continue
        if module.gate_up_proj in masters and module.down_proj in masters:
            yield module


def multiplied_in_compute_dtype(model: nn.Module) -> Iterator[nn.Parameter]:
    """The trained matrices that autocast would round at each use: projections and experts, not embedding or routers."""
    for module in model.modules():
        if isinstance(module, (Linear, GroupedExperts, ReLUExperts)):
            own = module.parameters(recurse=False)
            yield from (parameter for parameter in own if parameter.requires_grad and is_matrix(module, parameter))


def is_matrix(module: nn.Module, parameter: nn.Parameter) -> bool:
    """Whether a module's parameter is a matrix, or one for each expert, rather than a bias."""
    return parameter.ndim == (2 if isinstance(module, Linear) else 3)
