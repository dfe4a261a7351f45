"""The training loop: claim a folder, build or restore, then step, measure, log and save until done or told to stop.

On a CPU a run and its resumed copy agree bit for bit as long as both use the same number of threads: sums over
threads round differently. The caller's random state and signal handlers are left as they were.
"""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from pathlib import Path
from typing import NamedTuple

import torch

from remoe.data import open_corpus
from remoe.distributed import launch
from remoe.distributed.ranks import Ranks
from remoe.distributed.world import world_size
from remoe.errors import CheckpointError
from remoe.training import init_from, lock, run
from remoe.training.checkpoint import Checkpoint, NewerSchemaError, newest
from remoe.training.config import TrainConfig
from remoe.training.deterministic import same_bits
from remoe.training.frozen import freeze_routers
from remoe.training.memory import needed_for
from remoe.training.progress import LogReporter, Reporter, SilentReporter
from remoe.training.resume import check_resume
from remoe.training.run import Run
from remoe.training.setup import pick_device, resolve, resolve_ranks
from remoe.training.sinks import check_sinks
from remoe.training.step import Stepper
from remoe.training.trainer import Trainer


def train(
    config: TrainConfig,
    *,
    resume: bool = False,
    overwrite: bool = False,
    root: Path | str = Path("runs"),
    reporter: Reporter | None = None,
) -> Run:
    """Train the model that `config` describes in the folder `root`/`config.name`.

    `resume` goes on from the newest whole checkpoint (or starts, if there is none); `overwrite` begins an existing run
    anew. One process at a time trains in a folder. Raises ConfigError, DataError or CheckpointError before anything is
    written; TrainingError for a run that cannot go on; RunStoppedError after SIGINT or SIGTERM, once the step and a
    checkpoint are written. Started by torchrun, all processes call this and train together.
    """
    path = Path(root) / config.name
    config = init_from.with_origin(config, path if resume else None)
    parallel = resolve_ranks(config, world_size())
    device = launch.local_device(pick_device(config.train.device))
    with same_bits(config.train), launch.process_group(device, parallel.timeout), ExitStack() as stack:
        ranks = launch.join(parallel, device)
        ranks.on_first(lambda: _claim(path, resume, overwrite, stack))
        reporter = (reporter or LogReporter()) if ranks.is_first else SilentReporter()
        return _train_in(Call(path, device, resume, overwrite), config, ranks, reporter)


class Call(NamedTuple):
    """Where and how one call trains."""

    path: Path
    device: torch.device
    resume: bool
    overwrite: bool


def _claim(path: Path, resume: bool, overwrite: bool, stack: ExitStack) -> None:
    """Hold the run's folder until the stack is left."""
    run.check_request(path, resume, overwrite)
    stack.enter_context(lock.hold(path))
    run.check_claim(path, resume or overwrite)


def _train_in(call: Call, config: TrainConfig, ranks: Ranks, reporter: Reporter) -> Run:
    check_sinks(config.train.sinks)
    path, device = call.path, call.device
    start = ranks.on_first(lambda: find_start(path, config, reporter)) if call.resume else None
    corpus = ranks.in_turn(lambda: open_corpus(config.data))
    init_from.check_tokenizer(config, corpus.tokenizer)
    config = resolve(config, corpus.tokenizer)
    with own_random_state(config.seed, device):
        with needed_for("building the model", "make it smaller; `remoe plan` estimates what a config takes"):
            model = init_from.initial_model(config, will_be_restored=start is not None)
            freeze_routers(model, config.train.freeze_router)
            trainer = Trainer(config, path, corpus, Stepper(config, model, device, ranks), reporter)
        if start is not None:
            trainer.restore(start)
        elif config.train.init_from is None:
            trainer.prepare_routers()
        else:
            init_from.take_over_coefficient(config, trainer.stepper.controller)
        trainer.prepare_folder(call.overwrite)
        trainer.train()
    return Run(path, config)


def find_start(path: Path, config: TrainConfig, reporter: Reporter) -> Checkpoint | None:
    """The checkpoint that a resumed run goes on from; says which newer ones are damaged."""
    try:
        start, damaged = newest(path / run.CHECKPOINTS)
    except NewerSchemaError:
        raise
    except CheckpointError as error:
        raise CheckpointError(f"{error}; --overwrite begins the run anew") from error
    if start is None:
        return None
    for error in damaged:
        reporter.message(f"{error}; going on from {start.path.name}")
    check_resume(config, start)
    return start


@contextmanager
def own_random_state(seed: int, device: torch.device) -> Iterator[None]:
    """Seed torch's generators inside; the caller's states come back on leaving, and its current GPU."""
    devices = [device] if device.type == "cuda" else []
    current = torch.cuda.device(device) if devices else nullcontext()
    with current, torch.random.fork_rng(devices=devices):
        torch.manual_seed(seed)
        yield
