"""Pipeline parallelism: each stage has some of the layers, and the micro-batches pass through all stages in turn.

Training runs through torch's 1F1B schedule. Between stages travel hidden states, the state of recurrent routers, and
the loss so far, to which a stage adds its part: the auxiliary terms of its layers, in the last one the language
model's loss too. Tokens do not travel: each stage has the batch anyway.
"""

from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.pipelining import PipelineStage, Schedule1F1B

from remoe.model.causal_lm import LossOutput, ReMoEForCausalLM
from remoe.model.config import ReMoEConfig
from remoe.model.decoder import Handed
from remoe.model.part import keep_part, layers_of_part
from remoe.moe import moe_layers

PartOfStep = Callable[[Handed | None, Tensor, Mapping[str, Tensor]], tuple[Handed | None, Tensor]]
"""(what came from the stage before, the loss so far, a micro-batch's tensors) → (what the next one needs, the loss)."""


class Pipeline:
    """One stage of a model. `group` holds the stages that pass micro-batches on to each other, in order."""

    def __init__(self, group: dist.ProcessGroup, device: torch.device, columns: Callable[[int], slice]) -> None:
        self.group, self.device = group, device
        self.index, self.num_stages = group.rank(), group.size()
        self._columns = columns
        self._widths = [0]

    def place(self, model: ReMoEForCausalLM) -> None:
        """Keep this stage's layers of a model."""
        routers: list[Any] = [layer.router for layer in moe_layers(model)]
        state_size = max((router.state_size for router in routers), default=0)
        self._widths = [model.config.hidden_size, *([state_size] if state_size else [])]
        keep_part(model, layers_of_part(model.config.num_layers, self.num_stages, self.index))

    def moe_layers(self, config: ReMoEConfig) -> slice:
        """The place of this stage's MoE layers among all of the model's."""
        own = layers_of_part(config.num_layers, self.num_stages, self.index)
        before, within = (sum(map(config.is_moe_layer, layers)) for layers in (range(own.start), own))
        return slice(before, before + within)

    def evaluate(self, model: nn.Module, tokens_BS: Tensor, *inputs: Any, **options: Any) -> LossOutput:
        """The model's losses, in the last stage, and the routings of this stage's layers; without a backward pass."""
        handed = None
        if self.index > 0:
            received = [torch.empty(shape, device=self.device) for shape in self._shapes(tokens_BS)]
            for tensor in received:
                dist.recv(tensor, group=self.group, group_src=self.index - 1)
            handed = _as_handed(received)
        output = model(tokens_BS, *inputs, handed=handed, **options)
        if output.handed is not None:
            for tensor in self._tensors(output.handed):
                dist.send(tensor, group=self.group, group_dst=self.index + 1)
        return output

    def schedule(self, model: nn.Module, part: PartOfStep, num_micro_batches: int) -> "StepSchedule":
        """How this stage takes its part of steps of so many micro-batches."""
        return StepSchedule(self, model, part, num_micro_batches)

    def stage(self, model: nn.Module, part: PartOfStep, tokens_BS: Tensor) -> "_Stage":
        """torch's description of this stage, for micro-batches like this one."""
        travelling = [torch.empty(shape, device="meta", requires_grad=True) for shape in self._shapes(tokens_BS)]
        loss = torch.empty((), device="meta", requires_grad=True)
        given = (*travelling, loss) if self.index > 0 else ()
        passed_on = (*travelling, loss) if self.index < self.num_stages - 1 else (loss,)
        sizes = {"input_args": given, "output_args": passed_on}
        stage = _Stage(model, self.index, self.num_stages, self.device, group=self.group, **sizes)
        stage.part, stage.tensors = part, self._tensors
        return stage

    def _shapes(self, tokens_BS: Tensor) -> list[tuple[int, ...]]:
        """Of hidden states and, with recurrent routers, their state, for this stage's tokens of each sequence."""
        rows, own = len(tokens_BS), len(range(tokens_BS.shape[1])[self._columns(tokens_BS.shape[1])])
        return [(rows, own, self._widths[0]), *((rows * own, width) for width in self._widths[1:])]

    def _tensors(self, handed: Handed) -> list[Tensor]:
        """What is sent; a state of 0 where recurrent routers come only later."""
        tensors = [handed.hidden_BSH.contiguous()]
        for width in self._widths[1:]:
            state_TP = handed.state_TP
            if state_TP is None:
                state_TP = tensors[0].new_zeros(tensors[0].shape[:2].numel(), width)
            tensors.append(state_TP.contiguous())
        return tensors


class StepSchedule:
    """Forward and backward of all micro-batches of a step. The gradients are complete when `run` returns."""

    def __init__(self, pipeline: Pipeline, model: nn.Module, part: PartOfStep, num_micro_batches: int) -> None:
        self._pipeline, self._model, self._part = pipeline, model, part
        self._num_micro_batches = num_micro_batches
        self._schedule: Schedule1F1B | None = None

    def run(self, batch: Mapping[str, Tensor]) -> None:
        """Take this stage's part of a step on tensors [rows, ...], which are cut into micro-batches by rows."""
        if self._schedule is None:
            tokens_BS = batch["tokens_BS"][: len(batch["tokens_BS"]) // self._num_micro_batches]
            stage = self._pipeline.stage(self._model, self._part, tokens_BS)
            self._schedule = Schedule1F1B(stage, self._num_micro_batches, loss_fn=_as_it_is, scale_grads=False)
        inputs: dict[str, Any] = dict(batch)
        try:
            self._schedule.step(target=batch["tokens_BS"], return_outputs=False, **inputs)
        except RuntimeError as error:  # torch tells only that a stage failed; its cause tells why
            raise error.__cause__ or error from None


class _Stage(PipelineStage):
    """torch's stage, whose forward pass is more than its module's: the losses of the layers too. It knows the module
    for FSDP's sake.
    """

    part: PartOfStep
    tensors: Callable[[Handed], list[Tensor]]

    def forward_maybe_with_nosync(self, *given: Tensor, **batch: Tensor) -> Any:
        handed, loss = None, torch.zeros((), device=self.device)
        if given:
            *travelling, loss = _AllGraded.apply(*given)  # pyright: ignore[reportGeneralTypeIssues]
            handed = _as_handed(travelling)
        handed, loss = self.part(handed, loss, batch)
        return loss if handed is None else (*self.tensors(handed), loss)


class _AllGraded(torch.autograd.Function):
    """The tensors as they are. One that gets no gradient gets 0: stages of torch before 2.13 must send each of them."""

    @staticmethod
    def forward(ctx: Any, *tensors: Tensor) -> tuple[Tensor, ...]:
        return tuple(tensor.view_as(tensor) for tensor in tensors)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, ...]:  # pyright: ignore
        return grads


def _as_handed(tensors: list[Tensor]) -> Handed:
    hidden_BSH, *states_TP = tensors
    return Handed(hidden_BSH, states_TP[0] if states_TP else None)


def _as_it_is(loss: Tensor, target: Tensor) -> Tensor:
    """The last stage's output is the loss already."""
    return loss
