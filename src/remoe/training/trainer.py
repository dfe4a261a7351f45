"""One run in progress: steps, and what happens between them."""

import math
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch

from remoe.config import to_dict
from remoe.data import Batch, Corpus, Sampler, validation_batches
from remoe.data.chat import load_template, save_template
from remoe.distributed.world import world_size
from remoe.training import checkpoint, router_hooks, run
from remoe.training.ahead import Launched, RunAhead, row_policy
from remoe.training.checkpoint import Checkpoint
from remoe.training.config import TrainConfig
from remoe.training.flips import CALIBRATION_SEQUENCES, FlipMeter
from remoe.training.memory import needed_for
from remoe.training.metrics import Metrics, MetricsFile, NoMetricsFile, cut_back
from remoe.training.micro_batch import Values
from remoe.training.pace import Pace
from remoe.training.prefetch import Prefetch
from remoe.training.progress import Reporter
from remoe.training.recorder import Recorder
from remoe.training.resume import check_corpus, random_state, set_random_state
from remoe.training.run import Run
from remoe.training.saving import CheckpointSaver, Kept
from remoe.training.schedule import learning_rate
from remoe.training.signals import RunStoppedError, StopRequest
from remoe.training.sinks import Sinks
from remoe.training.step import Stepper
from remoe.training.validation import evaluate

SAVE_FAILED = 1 << 20
"""Above all signals' numbers: a rank tells the others that the last checkpoint could not be written."""


class Due(NamedTuple):
    """What a step is followed by."""

    flips: bool
    validation: bool
    checkpoint: bool
    log: bool

    @property
    def halt(self) -> bool:
        """Whether the step must be known to count before the next one is launched."""
        return self.validation or self.checkpoint


class Trainer:
    """Moves a run from its first step, or a restored one, to its last."""

    def __init__(
        self, config: TrainConfig, path: Path, corpus: Corpus, stepper: Stepper, reporter: Reporter
    ) -> None:  # fmt: skip
        self.config = config
        self.path = path
        self.corpus = corpus
        self.stepper = stepper
        self.ranks = stepper.ranks
        self.reporter = reporter
        self.step = 0
        self.best: dict[str, Any] | None = None
        self.saved_step = 0
        loop, length = config.train, config.data.sequence_length
        self.sampler = Sampler(corpus.train, length, loop.batch_size, config.seed)
        self.flips = self._flip_meter()
        model: Any = stepper.model
        self.pace = Pace(model, stepper.device, stepper.has_graph) if world_size() > 1 else None
        if self.pace is not None and stepper.has_graph:
            stepper.around_backward = self.pace.span

    @property
    def checkpoints(self) -> Path:
        """The folder of the run's checkpoints."""
        return self.path / run.CHECKPOINTS

    def restore(self, start: Checkpoint) -> None:
        """Put everything back as it was when the checkpoint was written."""
        check_corpus(self.corpus.manifest, start)
        start.load(self.stepper.tensors())
        self.stepper.update_model()
        self.step = self.saved_step = start.step
        self.best = start.record["best"]
        before = start.record["config"].get("parallel", {}).get("sharded", self.config.parallel.sharded)
        if self.ranks.size > 1 and before != self.config.parallel.sharded:
            self.reporter.message(f"parallel.sharded was {before} so far and is {self.config.parallel.sharded} now")
        device = self.stepper.device
        if start.record["device"] == device.type:
            states = random_state(device)
            start.load(states)
            set_random_state(states, device)
        if device.type == "cpu" and start.record["threads"] != torch.get_num_threads():
            self.reporter.message(
                f"the run used {start.record['threads']} threads so far and now uses {torch.get_num_threads()}: "
                "losses will differ by rounding; set OMP_NUM_THREADS to keep them the same"
            )

    def prepare_routers(self) -> None:
        """Tell the routers of a fresh run how often each token occurs in its text, where they ask for it."""
        vocab_size = self.config.model.vocab_size
        assert vocab_size is not None, "a run's config is resolved"
        router_hooks.prepare(self.stepper.routers, self.corpus.train, vocab_size, self.stepper.own_layers.start)

    def prepare_folder(self, overwrite: bool) -> None:
        """Make the run's folder hold what belongs to the steps done so far, and nothing else of ours."""
        self.ranks.on_first(lambda: self._prepare_folder(overwrite))

    def _prepare_folder(self, overwrite: bool) -> None:
        if overwrite:
            run.clear(self.path)
        self.path.mkdir(parents=True, exist_ok=True)
        checkpoint.remove_partial(self.checkpoints)
        checkpoint.set_aside_newer(self.checkpoints, self.step)
        cut_back(self.path / run.METRICS, self.step)
        self.corpus.tokenizer.save(self.path / run.TOKENIZER)
        if self.config.data.holds_instructions:
            save_template(load_template(self.config.data.template), self.path / run.TOKENIZER)
        run.write_config(self.path, self.config)

    def train(self) -> None:
        """Take the remaining steps. Raises RunStoppedError, after a checkpoint, when a signal asked to stop."""
        sinks = Sinks(self.reporter.message)
        if self.ranks.is_first:
            sinks.open(self.config.train.sinks, self.path, to_dict(self.config), self.step)
        file = MetricsFile(self.path / run.METRICS) if self.ranks.is_first else NoMetricsFile()
        self.recorder = Recorder(self.config, file, sinks, self.reporter)
        self.reporter.start(self.config.name, self.config.train.steps, self.step)
        try:
            with StopRequest() as stop, CheckpointSaver(self.checkpoints, self.ranks, self.reporter.message) as saver:
                self.saver = saver
                self._take_steps(stop)
        finally:
            self.recorder.close()
            self.reporter.finish(Run(self.path, self.config))

    def _take_steps(self, stop: StopRequest) -> None:
        steps = range(self.step + 1, self.config.train.steps + 1)
        ahead = RunAhead(self.stepper, self._train_on, row_policy(self.stepper))
        with Prefetch(self._batch, steps, self.stepper.device) as batches:
            batches = self.pace.waiting_for(batches) if self.pace else batches
            for step, batch in zip(steps, batches, strict=True):
                finished = ahead.launch(batch, step)
                number = self.ranks.largest_number(SAVE_FAILED if self.saver.has_failed else stop.number or 0)
                halts = bool(number) or self._due(step).halt
                if halts:
                    finished += ahead.settle()
                if finished:
                    self.recorder.time_steps(len(finished), wait=halts)
                for launched in finished:
                    self._finish(launched)
                if number == SAVE_FAILED:
                    self.saver.wait()
                if number and self.step < self.config.train.steps:
                    self._stop(number)

    def _stop(self, number: int) -> None:
        self._save()
        self.saver.wait()
        raise RunStoppedError(
            f"{self.path} was stopped by {signal.Signals(number).name} after step {self.step}; "
            "--resume goes on from there",
            number,
        )

    def _batch(self, step: int) -> Batch:
        """This rank's rows of a step's batch."""
        parts = self.ranks.rows(self.config.train.batch_size, self.stepper.micro_batch)
        return self.sampler.rows(step - 1, parts)

    def _finish(self, launched: Launched) -> None:
        """Do what a step that counts is followed by."""
        self.step = launched.step
        self.recorder.count_step()
        due = self._due(self.step)
        measured = self._validate() if due.validation else {}
        if due.log:
            lr = learning_rate(self.config.optimizer, self.step, self.config.train.steps)
            self.recorder.log(self.step, launched.readout, lr, measured)
        if due.checkpoint or self._is_best(self.step):
            self._save()

    def _train_on(self, batch: Batch, step: int) -> Values:
        size = f"{self.stepper.micro_batch} x {self.config.data.sequence_length} tokens"
        with needed_for(f"step {step}, with micro-batches of {size}", self._needs_less()):
            return self._measured_step(batch, step)

    def _needs_less(self) -> str:
        """What to do where there is not enough memory."""
        begun = f"--resume goes on after step {self.saved_step}" if self.saved_step else "--resume starts again"
        less = []
        if self.stepper.micro_batch > 1:
            less.append(f"train.micro_batch_size below {self.stepper.micro_batch}")
        if self.config.train.activation_checkpointing not in (True, "full"):
            less.append("train.activation_checkpointing=full")
        ways = " or ".join(less) or "a smaller data.sequence_length or model"
        return f"set {ways} (`remoe plan` estimates what a config takes), {begun}"

    def _measured_step(self, batch: Batch, step: int) -> Values:
        due = self._due(step)
        if not due.flips or self.flips is None:
            return self._timed_step(batch, step) if due.log else self.stepper.run(batch, step)
        with self.recorder.paused():
            self.flips.before_step()
        values = self._timed_step(batch, step)
        with self.recorder.paused():
            return values | self.ranks.average(self.flips.after_step())

    def _timed_step(self, batch: Batch, step: int) -> Values:
        if self.pace is None:
            return self.stepper.run(batch, step)
        with self.pace.measured():
            values = self.stepper.run(batch, step)
        return values | {"rank_seconds": self.ranks.collect(self.pace.seconds, self.stepper.device)}

    def _due(self, step: int) -> Due:
        loop = self.config.train
        is_last = step == loop.steps
        flips = self.flips is not None and step % loop.flip_interval == 0
        validation = is_last or step % loop.validation_interval == 0
        saves = is_last or step % loop.checkpoint_interval == 0
        return Due(flips, validation, saves, flips or validation or step % loop.log_interval == 0)

    def _validate(self) -> Metrics:
        work = needed_for(f"the validation after step {self.step}", self._needs_less())
        with work, self.recorder.paused():
            result = evaluate(
                self.stepper.model,
                self._validation_batches(),
                self.corpus.validation.domains,
                document_mask=self.config.data.document_mask,
                precision=self.config.train.precision,
                ranks=self.ranks,
            )
        if math.isfinite(result["loss"]) and (self.best is None or result["loss"] < self.best["loss"]):
            self.best = {"step": self.step, "loss": result["loss"]}
        others = {f"valid_loss_{mode}": other["loss"] for mode, other in result["others"].items()}
        own = {"valid_loss": result["loss"], "valid_loss_per_domain": result["per_domain"]}
        return own | {"valid_active_experts": result["active_experts"]} | others

    def _validation_batches(self) -> Iterator[Batch]:
        """`validation_batches` batches of `batch_size` sequences, in pieces that one forward pass can hold."""
        loop, rows = self.config.train, self.stepper.micro_batch
        pieces = loop.validation_batches * (loop.batch_size // rows)
        return validation_batches(self.corpus.validation, self.config.data.sequence_length, rows, pieces)

    def _is_best(self, step: int) -> bool:
        return self.best is not None and self.best["step"] == step

    def _save(self) -> None:
        if self.saved_step == self.step:
            return
        with self.recorder.paused():
            self.recorder.flush()
            self.recorder.file.sync()
            tensors = self.stepper.tensors() | random_state(self.stepper.device)
            kept = Kept(self.config.train.keep_checkpoints, self.best["step"] if self.best else None)
            self.saver.save(tensors, self._record(), kept, wait=not self.config.train.async_checkpoint)
            self.saved_step = self.step

    def _record(self) -> dict[str, Any]:
        return {
            "step": self.step,
            "config": to_dict(self.config),
            "best": self.best,
            "corpus": self.corpus.manifest,
            "device": self.stepper.device.type,
            "ranks": self.ranks.size,
            "threads": torch.get_num_threads(),
            "torch": torch.__version__,
        }

    def _flip_meter(self) -> FlipMeter | None:
        if self.config.train.flip_interval == 0 or self.config.model.num_moe_layers == 0:
            return None
        batches = validation_batches(self.corpus.validation, self.config.data.sequence_length, CALIBRATION_SEQUENCES, 1)
        config = self.config
        return FlipMeter(
            self.stepper.model, next(batches), config.data.document_mask, config.train.precision, self.ranks
        )  # fmt: skip
