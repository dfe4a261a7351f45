"""A step whose layers are shared by the stages of a pipeline: forward and backward of all its micro-batches."""

from collections.abc import Mapping
from functools import reduce

import torch
from torch import Tensor

from remoe.data import Batch
from remoe.distributed.pipeline import Pipeline
from remoe.distributed.sums import total_over
from remoe.model.decoder import Handed
from remoe.training.counts import RoutingCounts
from remoe.training.micro_batch import Measured, MicroBatchLoss, Weighing


class PipelinedStep:
    """Takes this stage's part of a step, and puts together what all stages measured: values of layers elsewhere are 0,
    so that sums over ranks are right; counts are those of all layers.

    `layers` is the place of this stage's MoE layers among all.
    """

    def __init__(self, loss: MicroBatchLoss, pipeline: Pipeline, num_micro_batches: int, layers: slice) -> None:
        self._loss, self._pipeline, self._layers = loss, pipeline, layers
        model = loss.config.model
        self._num_layers, self._num_experts = model.num_moe_layers, model.moe.routed_experts
        self._schedule = pipeline.schedule(loss.model, self._part, num_micro_batches)
        self._names: list[str] | None = None

    def __call__(self, batch: Batch, weighing: Weighing) -> Measured:
        """Run this rank's rows, all on the device, and return what they came to."""
        self._weighing = self._of_own_layers(weighing)
        self._measured: list[Measured] = []
        self._schedule.run(batch._asdict())
        return self._of_all_layers(reduce(Measured.plus, self._measured))

    def _part(
        self, handed: Handed | None, loss: Tensor, batch: Mapping[str, Tensor]
    ) -> tuple[Handed | None, Tensor]:  # fmt: skip
        output = self._loss.forward(Batch(**batch), handed)
        measured = self._loss.measure(output, self._weighing)
        self._measured.append(measured.detached())
        return output.handed, loss + measured.values["loss"]

    def _of_own_layers(self, weighing: Weighing) -> Weighing:
        coef, loads_LE = weighing.coef, weighing.loads_LE
        return weighing._replace(
            coef=coef[self._layers] if coef is not None and coef.ndim else coef,
            loads_LE=None if loads_LE is None else loads_LE[self._layers],
        )

    def _of_all_layers(self, measured: Measured) -> Measured:
        if self._num_layers == 0:
            return measured
        counts = measured.counts or self._no_counts()
        spread = {name: self._spread(values) for name, values in counts._asdict().items()}
        nothing = measured.values["loss"].new_zeros(0)
        scalars = {name: measured.values[name] for name in ("loss", "lm_loss")}
        terms = {name: self._spread(measured.values.get(name, nothing)) for name in self._term_names(measured)}
        return measured._replace(
            values=scalars | terms,
            counts=RoutingCounts(**total_over(spread, self._pipeline.group)),
            needs_C=counts.active_L if measured.needs_C is None else measured.needs_C,
        )

    def _spread(self, values: Tensor) -> Tensor:
        """Values of own layers in their place among those of all."""
        whole = values.new_zeros(self._num_layers, *values.shape[1:])
        whole[self._layers] = values
        return whole

    def _no_counts(self) -> RoutingCounts:
        """Of a stage without MoE layers."""
        options = {"dtype": torch.int64, "device": self._loss.device}
        return RoutingCounts(
            torch.zeros(0, self._num_experts, **options), torch.zeros(0, **options), torch.zeros(0, **options)
        )

    def _term_names(self, measured: Measured) -> list[str]:
        """The terms of all stages, in one order; asked for once, as a stage without MoE layers does not know them."""
        if self._names is None:
            everyone = self._loss.ranks.gather([name for name, value in measured.values.items() if value.ndim])
            self._names = sorted({name for names in everyone for name in names})
        return self._names
