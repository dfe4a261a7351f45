"""The checks that make a comparison fair: per seed, the same batches and the same shared initial values."""

import hashlib
from collections import defaultdict
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, NamedTuple

from remoe.errors import ConfigError
from remoe.recipes.plan import Trial, settings_of_batches

if TYPE_CHECKING:
    from remoe.model import ReMoEConfig


class Pairing(NamedTuple):
    """What was found equal: the number of parameter tensors that at least two runs of a seed share."""

    seeds: int
    shared_tensors: int

    def __str__(self) -> str:
        return (
            "paired: runs of one seed differ in model and losses only, so they see the same batches in the same order; "
            f"{self.shared_tensors} shared parameter tensors start with the same values, bit for bit "
            f"({self.seeds} {'seed' if self.seeds == 1 else 'seeds'})"
        )


def check_pairing(planned: Sequence[Trial], vocab_size: int) -> Pairing:
    """Check that the runs of each seed share batches and initial values; nothing is trained or kept in memory.

    Raises ConfigError for models whose common parameters start with other values.
    """
    by_seed: dict[int, list[Trial]] = defaultdict(list)
    for trial in planned:
        by_seed[trial.seed].append(trial)
    shared = [_check_seed(runs, vocab_size) for runs in by_seed.values()]
    return Pairing(len(shared), sum(shared))


def _check_seed(runs: Sequence[Trial], vocab_size: int) -> int:
    batches = [settings_of_batches(trial.config) for trial in runs]
    assert all(settings == batches[0] for settings in batches), f"seed {runs[0].seed}: runs do not share their batches"
    digests: dict[_Tensor, list[str]] = defaultdict(list)
    for trial in runs:
        for tensor, digest in _initial_values(trial.config.model, vocab_size, trial.seed):
            digests[tensor].append(digest)
    differing = [tensor.name for tensor, found in digests.items() if len(set(found)) > 1]
    if differing:
        raise ConfigError(
            f"the runs of seed {runs[0].seed} do not start with the same {differing[0]}, so they cannot be paired; "
            "compare models with equal model.num_layers and model.init_std"
        )
    return sum(len(found) > 1 for found in digests.values())


class _Tensor(NamedTuple):
    """What names a shared parameter: two routers' `weight` with different laws of their own are not the same one."""

    name: str
    shape: tuple[int, ...]
    law: str


def _initial_values(config: "ReMoEConfig", vocab_size: int, seed: int) -> Iterator[tuple[_Tensor, str]]:
    """Each parameter and the digest of its first values, drawn one at a time."""
    import dataclasses

    import torch

    from remoe.model import ReMoEForCausalLM
    from remoe.model.init import initial_values
    from remoe.moe.initial import stated_values

    config = dataclasses.replace(config, vocab_size=config.vocab_size or vocab_size)
    with torch.device("meta"):
        model = ReMoEForCausalLM(config, seed)
    stated = stated_values(model)
    for name, values in initial_values(model, config, seed):
        digest = hashlib.blake2b(values.numpy().data).hexdigest()
        yield _Tensor(name, tuple(values.shape), str(stated.get(name))), digest
