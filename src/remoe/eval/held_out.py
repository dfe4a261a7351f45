"""Loss, bits per byte and character, and perplexity of a checkpoint on held-out text, per domain."""

import dataclasses
import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from remoe.data import Batch, Corpus, DataConfig, HeldOutText, open_corpus, open_validation, validation_batches
from remoe.data.tokenizer import check_vocabulary
from remoe.errors import CheckpointError, ConfigError
from remoe.eval.text_size import TextSize, sizes_by_domain
from remoe.model.thresholds import set_thresholds
from remoe.training.config import TrainConfig
from remoe.training.loading import config_of, find_checkpoint, is_export, load, load_checkpoint
from remoe.training.run import TOKENIZER
from remoe.training.saved import run_of, tokenizer_beside
from remoe.training.setup import pick_device
from remoe.training.validation import evaluate

AnyText = Corpus | HeldOutText
Load = Callable[[Path], Any]
"""What makes a model of a folder that is no run or checkpoint: `load`, or one that knows more kinds of folder. The
model is called as one of ours is.
"""


@dataclass(frozen=True, kw_only=True)
class Score:
    """How well a text is predicted. `loss` is in nats per token; bits count the text that the tokens stand for."""

    loss: float
    perplexity: float
    bits_per_byte: float
    bits_per_character: float
    tokens: int


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """Scores of one model: of all text together and of each domain; experts per token (None: a dense model).

    `others` holds the same for the other ways in which its routers can be evaluated, by name; mostly none.
    """

    total: Score
    per_domain: dict[str, Score]
    active_experts: float | None
    others: dict[str, "Evaluation"] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return dataclasses.asdict(self)


def evaluate_checkpoint(
    path: Path | str,
    data: DataConfig | None = None,
    *,
    num_sequences: int | None = None,
    batch_size: int = 16,
    device: str = "auto",
    threshold: float | None = None,
    load: Load = load,
) -> Evaluation:
    """Score a run, a checkpoint or an export on the validation part of its own data, or of `data`.

    `num_sequences` defaults to what the run's validations use; an export needs `data`. The text is tokenised with the
    run's own tokenizer; of `data` with a validation text nothing else is read. `threshold` is the density dial, for all
    layers in place of the saved ones. Raises ConfigError, DataError or CheckpointError for what does not fit together.
    """
    opened = open_model_and_text(Path(path), data, device, load)
    if threshold is not None:
        set_thresholds(opened.model, threshold)
    batches = list(opened.sequences(num_sequences, batch_size))
    return summarise(opened.evaluate(batches), _text_sizes(batches, opened.corpus))


class Opened(NamedTuple):
    """A saved model on its device, the settings to evaluate it with, and the text to do it on."""

    model: Any
    """Ours, or what is called as ours is."""
    config: TrainConfig
    corpus: AnyText

    def sequences(self, count: int | None, batch_size: int) -> Iterator[Batch]:
        """The first `count` sequences of validation text (one a domain at least), or as many as the run validates on.

        There are fewer where the text runs out; the batch size changes nothing else.
        """
        count = count or self.config.train.validation_batches * self.config.train.batch_size
        yield from _first_sequences(self.corpus, self.config.data.sequence_length, batch_size, count)

    def evaluate(self, batches: Iterable[Batch]) -> dict[str, Any]:
        """Mean losses and active experts as `training.validation.evaluate` gives them."""
        is_on_gpu = next(self.model.parameters()).is_cuda
        return evaluate(
            self.model,
            batches,
            self.corpus.validation.domains,
            document_mask=self.config.data.document_mask,
            precision=self.config.train.precision if is_on_gpu else "fp32",
        )


def open_model_and_text(path: Path, data: DataConfig | None, device: str, load: Load = load) -> Opened:
    """What `evaluate_checkpoint` scores, with its errors."""
    target = pick_device(device)
    model, config = _open(path, data, load)
    corpus = open_corpus(config.data) if data is None else open_validation(config.data)
    fix = f"name the tokenizer that {path} was trained with in data.tokenizer"
    check_vocabulary(corpus.tokenizer, model.config.vocab_size, fix)
    return Opened(model.to(target), config, corpus)


def text_beside(
    path: Path, text: str, sequence_length: int | None = None, tokenizer: str | None = None
) -> DataConfig:  # fmt: skip
    """The data settings of saved weights with `text` as validation text.

    `tokenizer` is a setting; None: the run's own, or the one that is in an export, CheckpointError where there is none.
    """
    run = run_of(path)
    own = run.config.data if run else DataConfig()
    tokenizer = tokenizer or (own.tokenizer if run else tokenizer_beside(path))
    if tokenizer is None:
        raise CheckpointError(f"{path} holds no tokenizer; put the model's tokenizer.json into it")
    return dataclasses.replace(
        own, validation=text, sequence_length=sequence_length or own.sequence_length, tokenizer=tokenizer
    )


def summarise(result: dict[str, Any], sizes: dict[str, TextSize]) -> Evaluation:
    """Scores from the mean losses and label counts of `training.validation.evaluate` and the sizes of the text."""
    per_domain = {
        name: _score(loss * result["labels"][name], result["labels"][name], sizes[name])
        for name, loss in result["per_domain"].items()
    }
    nats = sum(score.loss * score.tokens for score in per_domain.values())
    whole = TextSize(*(sum(column) for column in zip(*sizes.values(), strict=True)))
    total = _score(nats, sum(result["labels"].values()), whole)
    others = {way: summarise(other, sizes) for way, other in result.get("others", {}).items()}
    return Evaluation(total=total, per_domain=per_domain, active_experts=result["active_experts"], others=others)


def _score(nats: float, tokens: int, size: TextSize) -> Score:
    bits = nats / math.log(2)
    return Score(
        loss=nats / tokens,
        perplexity=math.exp(min(nats / tokens, 700.0)),  # above that a float overflows
        bits_per_byte=bits / max(1, size.num_bytes),
        bits_per_character=bits / max(1, size.num_characters),
        tokens=tokens,
    )


def _open(path: Path, data: DataConfig | None, load: Load) -> tuple[Any, TrainConfig]:
    """The model, and the config to evaluate it with."""
    if is_export(path):
        if data is None:
            raise ConfigError(f"{path} is an export and does not know its text; give the data to evaluate on")
        return load(path), TrainConfig(data=data)
    found = find_checkpoint(path)
    config = config_of(found)
    if data is not None:
        config = dataclasses.replace(config, data=_with_tokenizer(data, found.path.parent.parent / TOKENIZER))
    return load_checkpoint(found), config


def _first_sequences(corpus: AnyText, sequence_length: int, batch_size: int, sequences: int) -> Iterator[Batch]:
    """Exactly `sequences` (one a domain at least, or all there are), whatever the batch size."""
    left = max(sequences, len(corpus.validation.domains))
    for batch in validation_batches(corpus.validation, sequence_length, batch_size, math.ceil(left / batch_size)):
        yield Batch(*(values[:left] for values in batch))
        left -= len(batch.tokens_BS)


def _with_tokenizer(data: DataConfig, folder: Path) -> DataConfig:
    return dataclasses.replace(data, tokenizer=str(folder)) if folder.is_dir() else data


def _text_sizes(batches: list[Batch], corpus: AnyText) -> dict[str, TextSize]:
    sizes: dict[str, TextSize] = {}
    for name, size in _all_sizes(batches, corpus):
        sizes[name] = sizes.get(name, TextSize()).plus(size)
    return sizes


def _all_sizes(batches: list[Batch], corpus: AnyText) -> Iterator[tuple[str, TextSize]]:
    for batch in batches:
        yield from sizes_by_domain(batch, corpus.validation.domains, corpus.tokenizer).items()
