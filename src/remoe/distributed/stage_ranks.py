"""The answers of one process of many, which share the layers of the model too: pipeline parallelism."""

from collections.abc import Iterable, Mapping
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from remoe.distributed.config import ParallelConfig
from remoe.distributed.data_ranks import DataRanks
from remoe.distributed.gradients import clip_shared_gradients
from remoe.distributed.pipeline import Pipeline
from remoe.distributed.ranks import Key
from remoe.distributed.shared_parameters import Holders, counted_elsewhere, sum_shared_gradients
from remoe.distributed.sums import largest_over, total_over
from remoe.model.part import shared_by_parts


class StageRanks(DataRanks):
    """One of the processes of one stage. Those of a stage come one after the other; they share rows and parameters as
    processes without a pipeline do.
    """

    def __init__(self, parallel: ParallelConfig, device: torch.device) -> None:
        super().__init__(parallel, device)
        stages = self.meshes.stages
        assert stages is not None, "the section asks for a pipeline"
        self.stages = stages
        self.within = stages["within"].get_group()
        self.pipeline = self._stage = Pipeline(stages["stage"].get_group(), device, self.columns)
        self.size *= parallel.pipeline
        self.same_rows *= parallel.pipeline
        self.shared: list[Holders] = []

    def place(self, model: Any, device: torch.device, param_dtype: torch.dtype | None) -> None:
        self._stage.place(model)
        super().place(model, device, param_dtype)
        self.shared = []
        if parameters := shared_by_parts(model):
            self.shared.append(Holders(parameters, self._stage.group))
        if model.config.tie_embeddings:
            group = self._ends()
            if model.model.embed_tokens is not None and model.model.embed_tokens.weight.requires_grad:
                self.shared.append(Holders([model.model.embed_tokens.weight], group))

    def total_of_layers(self, values: Mapping[Key, Tensor]) -> dict[Key, Tensor]:
        return total_over(values, self.within)

    def largest_of_layers(self, values: Tensor) -> Tensor:
        return largest_over(values, self.within)

    def average(self, values: Mapping[Key, Tensor]) -> dict[Key, Tensor]:
        return self.total({name: value / self.within.size() for name, value in values.items()})

    def evaluate(self, model: nn.Module, tokens_BS: Tensor, *inputs: Any, **options: Any) -> Any:
        return self._stage.evaluate(model, tokens_BS, *inputs, **options)

    def complete_gradients(self) -> None:
        sum_shared_gradients(self.shared)

    def clip_gradients(self, parameters: Iterable[nn.Parameter], max_norm: float) -> Tensor:
        elsewhere = counted_elsewhere(self.shared)
        return clip_shared_gradients(parameters, max_norm, self.parallel.data_replicate, elsewhere)

    def _ends(self) -> Any:
        """The first and the last of this rank's stages, which both have a tied embedding. All ranks must call this."""
        first, last = self.stages.mesh[0].tolist(), self.stages.mesh[-1].tolist()
        timeout = timedelta(seconds=self.parallel.timeout)
        group, _ = dist.new_subgroups_by_enumeration(list(zip(first, last, strict=True)), timeout=timeout)
        return group
