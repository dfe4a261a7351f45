"""The training loop: claim a folder, build or restore, then step, measure, log and save until done or told to stop.

On a CPU a run and its resumed copy agree bit for bit as long as both use the same number of threads: sums over
threads round differently. The caller's random state and signal handlers are left as they were.
"""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path

import torch

from remoe.data import open_corpus
from remoe.errors import CheckpointError
from remoe.model import ReMoEForCausalLM
from remoe.training import lock, run
from remoe.training.checkpoint import Checkpoint, NewerSchemaError, newest
from remoe.training.config import TrainConfig
from remoe.training.progress import LogReporter, Reporter
from remoe.training.resume import check_resume
from remoe.training.run import Run
from remoe.training.setup import pick_device, resolve
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
    checkpoint are written.
    """
    path = Path(root) / config.name
    run.check_request(path, resume, overwrite)
    with lock.hold(path):
        run.check_claim(path, resume or overwrite)
        return _train_in(path, config, resume, overwrite, reporter or LogReporter())


def _train_in(path: Path, config: TrainConfig, resume: bool, overwrite: bool, reporter: Reporter) -> Run:
    check_sinks(config.train.sinks)
    device = pick_device(config.train.device)
    start = find_start(path, config, reporter) if resume else None
    corpus = open_corpus(config.data)
    config = resolve(config, corpus.tokenizer)
    with own_random_state(config.seed, device):
        model = ReMoEForCausalLM(config.model, seed=config.seed)
        trainer = Trainer(config, path, corpus, Stepper(config, model, device), reporter)
        if start is not None:
            trainer.restore(start)
        else:
            trainer.prepare_routers()
        trainer.prepare_folder(overwrite)
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
