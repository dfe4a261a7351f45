"""torchtitan's own Trainer on CPU processes: `torchrun --nproc-per-node N -m …trainer OUTPUT`; each writes what it saw.

torchtitan looks for an accelerator when it is imported; here it finds the CPU, whose module lacks figures of memory.
"""

import json
import os
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

torch._utils._get_available_device_type = lambda: "cpu"
NO_FIGURES = {
    "current_device": lambda: 0,
    "get_device_name": lambda *_: "cpu",
    "get_device_properties": lambda *_: SimpleNamespace(total_memory=2**30),
    "memory_stats": lambda *_: {},
    "reset_peak_memory_stats": lambda *_: None,
    "empty_cache": lambda: None,
}
if not hasattr(torch.distributed, "set_timeout"):  # torch 2.13 has it by another name: no Trainer gets past a step
    torch.distributed.set_timeout = torch.distributed.distributed_c10d._set_pg_timeout
for name, value in NO_FIGURES.items():
    setattr(torch.cpu, name, value)

from dataclasses import dataclass  # noqa: E402

from torch.distributed.fsdp import FSDPModule  # noqa: E402
from torchtitan.components.dataloader import BaseDataLoader  # noqa: E402
from torchtitan.components.tokenizer import BaseTokenizer  # noqa: E402
from torchtitan.models.qwen3.config_registry import qwen3_moe_debug  # noqa: E402

from remoe.distributed.adapters.torchtitan import with_relu_routing  # noqa: E402
from remoe.distributed.adapters.torchtitan.moe import ReLUMoE  # noqa: E402
from tests.distributed.adapters.torchtitan.models import VOCABULARY, small_spec  # noqa: E402

STEPS, ROWS, LENGTH = 4, 4, 32


class Rows(BaseDataLoader):
    """The same rows at each step, shared out over the data ranks."""

    @dataclass(kw_only=True, slots=True)
    class Config(BaseDataLoader.Config):
        """As its base's."""

    def __init__(self, config: Any, dp_world_size: int, dp_rank: int, **_: Any) -> None:
        tokens_BS = torch.randint(VOCABULARY, (ROWS, LENGTH + 1), generator=torch.Generator().manual_seed(1))
        self.tokens_BS = tokens_BS.chunk(dp_world_size)[dp_rank]

    def __iter__(self) -> Any:
        while True:
            yield {"input": self.tokens_BS[:, :-1]}, self.tokens_BS[:, 1:]

    def state_dict(self) -> dict[str, Any]:
        """Nothing moves."""
        return {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Nothing moves."""


class NoTokenizer(BaseTokenizer):
    """The rows are ids already."""

    @dataclass(kw_only=True, slots=True)
    class Config(BaseTokenizer.Config):
        """As its base's."""

    def __init__(self, config: Any, **_: Any) -> None:
        super().__init__()

    encode = decode = get_vocab_size = None  # never asked for


def config_for(folder: Path) -> Any:
    """The debug config of the page, small, with ReLU routing."""
    config = qwen3_moe_debug()
    processes = int(os.environ["WORLD_SIZE"])
    config.tokenizer, config.dataloader = NoTokenizer.Config(), Rows.Config()
    config.dump_folder = str(folder)
    config.training.local_batch_size, config.training.global_batch_size = ROWS // processes, ROWS
    config.training.seq_len, config.training.steps = LENGTH, STEPS
    config.training.disable_cuda_graphs = True
    if processes > 1:  # torch 2.13's FSDP does not take the plain parameters of the default
        config.parallelism.spmd_backend = "partial_dtensor"
    config.checkpoint.enable = False
    config.model_spec = with_relu_routing(small_spec(), ROWS * LENGTH, init=0.3)
    return config


def main(folder: Path) -> None:
    """Train, and write the losses and coefficients."""
    trainer = config_for(folder).build()
    for module in trainer.model_parts[0].modules():
        if isinstance(module, FSDPModule):
            module.set_force_sum_reduction_for_comms(True)  # gloo has no scaled sums
    log, found = trainer.metrics_processor.log, []
    trainer.metrics_processor.log = lambda step, loss, *rest, **more: (
        found.append(float(loss)), log(step, loss, *rest, **more)
    )  # fmt: skip
    trainer.train()
    layers = [module for part in trainer.model_parts for module in part.modules() if isinstance(module, ReLUMoE)]
    content = {"losses": found, "coefficients": [layer.log_coef.exp().item() for layer in layers]}
    (folder / f"{os.environ['RANK']}.json").write_text(json.dumps(content))
    trainer.close()
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
