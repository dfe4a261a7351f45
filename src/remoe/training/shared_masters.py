"""fp32 weights that ranks share, behind a model that each of them holds whole (`parallel.sharded: optimizer`)."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from remoe.distributed.optimizer_shards import Share, Shared, gather_weights, sum_gradients
from remoe.kernels.expert_mlp.sums import Sums
from remoe.moe.experts import GroupedExperts
from remoe.training.master_weights import adding_experts, multiplied_in_compute_dtype


class SharedMasterWeights:
    """This rank's part of every trained parameter, in fp32; with `is_rounded` the model's matrices turn to bf16.

    As in MasterWeights, gradients add up in fp32 over the micro-batches of a step: those of experts in their kernels,
    those of other rounded matrices by a hook, and all others in `grad`.
    """

    def __init__(self, model: nn.Module, shares: Mapping[nn.Parameter, Share], is_rounded: bool) -> None:
        self._shared = {
            parameter: Shared(parameter, nn.Parameter(share.part(parameter.detach())), share)
            for parameter, share in shares.items()
            if parameter.requires_grad
        }
        rounded = list(multiplied_in_compute_dtype(model)) if is_rounded else []
        for matrix in rounded:
            matrix.data = matrix.data.to(torch.bfloat16)
        self._experts_sums: dict[nn.Parameter, Tensor] = {}
        for experts in adding_experts(model, self._shared):
            gate_up_sum, down_sum = experts.gradient_sums = _zeros(experts)
            self._experts_sums |= {experts.gate_up_proj: gate_up_sum, experts.down_proj: down_sum}
        self._sums: dict[nn.Parameter, Tensor] = {}
        for matrix in rounded:
            if matrix not in self._experts_sums:
                matrix.register_post_accumulate_grad_hook(self._absorb)

    def zero_sums(self) -> None:
        """Forget what passes have added."""
        if self._experts_sums:
            torch._foreach_zero_(list(self._experts_sums.values()))
        self._drop_gradients()

    def complete_gradients(self) -> None:
        """Give each master its part of the sum of all ranks' gradients, which they let go of. Once a step."""
        own = self._experts_sums | self._sums
        gradients = ((shared, own.get(parameter, parameter.grad)) for parameter, shared in self._shared.items())
        sum_gradients((shared, gradient) for shared, gradient in gradients if gradient is not None)
        self._drop_gradients()

    def named_parameters(self, model: nn.Module) -> dict[str, nn.Parameter]:
        """The model's parameters by name, those that are trained replaced by this rank's part."""
        shared = self._shared
        return {
            name: shared[parameter].master if parameter in shared else parameter
            for name, parameter in model.named_parameters()
        }

    def update_model(self) -> None:
        """Gather the masters into the model, after they have changed."""
        gather_weights(self._shared.values())

    def _drop_gradients(self) -> None:
        self._sums.clear()
        for parameter in self._shared:
            parameter.grad = None

    def _absorb(self, matrix: nn.Parameter) -> None:
        """Add a gradient that has just come to those before it."""
        gradient, matrix.grad = matrix.grad, None
        assert gradient is not None, "torch calls this with a gradient"
        if matrix in self._sums:
            self._sums[matrix] += gradient
        else:
            self._sums[matrix] = gradient.float()


def _zeros(experts: GroupedExperts) -> Sums:
    gate_up_proj, down_proj = experts.gate_up_proj, experts.down_proj
    return torch.zeros_like(gate_up_proj, dtype=torch.float32), torch.zeros_like(down_proj, dtype=torch.float32)
