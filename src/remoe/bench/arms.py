"""Models in training that take optimizer steps in turn."""

# pyright: reportMissingImports=false
# (transformers is an extra)

import gc
import itertools
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from remoe.data import Batch
from remoe.model import ReMoEForCausalLM
from remoe.training.ahead import RunAhead, row_policy
from remoe.training.capacity import WINDOW
from remoe.training.config import TrainConfig
from remoe.training.counts import count
from remoe.training.master_weights import MasterWeights
from remoe.training.micro_batch import needs_of
from remoe.training.step import Stepper


class Arm(Protocol):
    """Something that trains."""

    name: str

    def step(self) -> dict[str, Any]:
        """Take one optimizer step; what the last step that is known to count measured, if anything."""
        ...


class OurArm:
    """A native model under the trainer's own steps, at a learning rate of 0: routing stays as it was set."""

    def __init__(self, name: str, stepper: Stepper, batches: Sequence[Batch]) -> None:
        self.name, self.stepper, self.batches = name, stepper, batches
        self._steps = 0
        self._cycle = itertools.cycle(batches)
        self._ahead = RunAhead(stepper, stepper.run, row_policy(stepper))

    def step(self) -> dict[str, Any]:
        """Launch one step on the next batch, as the trainer does."""
        self._steps += 1
        finished = self._ahead.launch(next(self._cycle), self._steps)
        return finished[-1].readout.read() if finished else {}

    def settle_rows(self) -> None:
        """Choose row capacities as after many steps of this routing; each batch once, then their counts again."""
        self._ahead.settle()
        capacity = row_policy(self.stepper)
        if capacity is not None:
            needs = [self._needs(batch) for batch in self.batches]
            for needs_C in itertools.islice(itertools.cycle(needs), WINDOW):
                capacity.see(needs_C)
        self._ahead = RunAhead(self.stepper, self.stepper.run, capacity)
        self.stepper.row_capacities = None if capacity is None else capacity.capacities

    def loss_on(self, batch: Batch) -> float:
        """The language-model loss of a step on a batch, with the row capacities in force."""
        self._steps += 1
        return float(self.stepper.run(batch, self._steps)["lm_loss"])

    def in_fp32(self) -> AbstractContextManager[None]:
        """Let the model hold its fp32 weights inside, where its matrices are in bf16 otherwise."""
        masters = self.stepper.masters
        if masters is None:
            return nullcontext()
        assert isinstance(masters, MasterWeights), "no rank holds all fp32 weights"
        return masters.in_fp32()

    @torch.no_grad()
    def _needs(self, batch: Batch) -> list[int]:
        """What row capacities must hold, from eager forward passes: a step would first compile."""
        device, is_bf16 = self.stepper.device, self.stepper.config.train.precision == "bf16"
        needs: list[Tensor] = []
        for part_BS in batch.tokens_BS.split(self.stepper.micro_batch):
            with torch.autocast(device.type, torch.bfloat16, enabled=is_bf16):
                routings = self.stepper.model(part_BS.to(device)).routings
            of_layers = [routing for routing in routings if routing is not None]
            counts = count(of_layers)
            assert counts is not None, "there is a layer that has capacities"
            needs.append(needs_of(of_layers, counts))
        return [int(need) for need in self.stepper.capacity_needs(torch.stack(needs).amax(0))]


def stepper_of(config: TrainConfig, model: ReMoEForCausalLM, device: torch.device) -> Stepper:
    """Model, optimizer and controller."""
    return Stepper(config, model, device)


def twin_stepper(config: TrainConfig, twin: ReMoEForCausalLM, first: Stepper) -> Stepper:
    """The step of a twin, which shares its parameters' AdamW state with the first model's too: twice would not fit."""
    shared = [parameter for parameter in first.model.parameters() if parameter.requires_grad]
    _require_grad(shared, False)
    stepper = Stepper(config, twin, first.device)
    _require_grad(shared, True)
    for group in stepper.optimizer.param_groups:
        first.optimizer.add_param_group(group)
    first.optimizer.state.update(stepper.optimizer.state)
    stepper.optimizer = first.optimizer
    if isinstance(first.masters, MasterWeights):
        stepper.masters, stepper.weights = first.masters, first.masters.named_parameters(twin)
        first.masters.join(twin)
    return stepper


class TransformersArm:
    """A Mixtral of the same sizes, compiled, trained as one would by hand: AdamW (fused), clipping, autocast.

    With `precision` bf16 it holds weights, gradients and moments in bf16: less memory and traffic than fp32 masters,
    and the only way that torch compiles grouped_mm.
    """

    def __init__(
        self, name: str, config: TrainConfig, batch: Batch, implementation: str | None, precision: str
    ) -> None:  # fmt: skip
        self.name, self.config, self.batch, self.precision = name, config, batch, precision
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.model: Any = mixtral(config, implementation, self.device)
        if precision == "bf16":
            self.model.to(torch.bfloat16)
        self.implementation = self.model.config._experts_implementation
        self.forward = torch.compile(self.model) if config.train.compile else self.model
        optimizer = config.optimizer
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=0.0, eps=optimizer.eps, fused=True)

    def step(self) -> dict[str, Any]:
        """One optimizer step with gradient accumulation."""
        parts = self.batch.tokens_BS.split(self.config.train.micro_batch)
        for part in parts:
            tokens_BS = part.to(self.device, non_blocking=True)
            with torch.autocast(self.device.type, torch.bfloat16, enabled=self.precision == "autocast"):
                loss = self.forward(input_ids=tokens_BS, labels=tokens_BS, use_cache=False).loss
            (loss / len(parts)).backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return {}


def mixtral(config: TrainConfig, implementation: str | None, device: torch.device) -> Any:
    """transformers' Mixtral with the sizes of a config; None: the library's own choice of experts implementation."""
    from transformers import MixtralConfig, MixtralForCausalLM

    model = config.model
    assert model.vocab_size is not None, "a benchmark's config is resolved"
    settings: dict[str, Any] = {} if implementation is None else {"experts_implementation": implementation}
    sizes = MixtralConfig(
        vocab_size=model.vocab_size,
        hidden_size=model.hidden_size,
        intermediate_size=model.moe.expert_size,
        num_hidden_layers=model.num_layers,
        num_attention_heads=model.num_heads,
        num_key_value_heads=model.kv_heads,
        head_dim=model.head_width,
        num_local_experts=model.moe.routed_experts,
        num_experts_per_tok=model.moe.routed_top_k,
        max_position_embeddings=max(4096, 2 * config.data.sequence_length),
        rms_norm_eps=model.norm_eps,
        tie_word_embeddings=model.tie_embeddings,
        **settings,
    )
    with device:
        return MixtralForCausalLM(sizes)


def _require_grad(parameters: Sequence[nn.Parameter], on: bool) -> None:
    for parameter in parameters:
        parameter.requires_grad_(on)


def collect_garbage() -> None:
    """Drop what compiled graphs and models still hold."""
    torch._dynamo.reset()
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
