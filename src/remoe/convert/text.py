"""Text for a conversion: its first sequences fit gates, the others compare models."""

from pathlib import Path
from typing import NamedTuple

import torch

from remoe.data import Batch, DataConfig, open_validation, validation_batches
from remoe.data.sampler import NO_LABEL
from remoe.errors import ConfigError, DataError


class ConversionText(NamedTuple):
    """Whole sequences, without padding."""

    calibration: Batch
    batches: list[Batch]


class TextConfig(NamedTuple):
    """How much text, and how it is cut."""

    path: str
    tokenizer: str
    sequence_length: int = 256
    calibration_sequences: int = 32
    sequences: int = 32
    batch_size: int = 8


def read_text(config: TextConfig, vocab_size: int) -> ConversionText:
    """Tokenise a text file. DataError for too short a text or a tokenizer with more ids than the model."""
    data = DataConfig(validation=config.path, tokenizer=config.tokenizer, sequence_length=config.sequence_length)
    text = open_validation(data)
    if text.tokenizer.vocab_size > vocab_size:
        raise DataError(
            f"tokenizer {config.tokenizer} has {text.tokenizer.vocab_size} ids, the model {vocab_size}; name the "
            "model's own with --tokenizer"
        )
    wanted = config.calibration_sequences + config.sequences
    read = list(validation_batches(text.validation, config.sequence_length, 1, wanted))
    return split_text([batch for batch in read if (batch.labels_BS != NO_LABEL).all()], config)


def split_text(sequences: list[Batch], config: TextConfig) -> ConversionText:
    """The first sequences to fit on, the rest to compare on; DataError where there is no rest."""
    if len(sequences) <= config.calibration_sequences:
        raise DataError(
            f"{config.path} has {len(sequences)} sequences of {config.sequence_length} tokens, must have more than the "
            f"{config.calibration_sequences} that fit gates; give more text or lower --calibration-sequences"
        )
    first, rest = sequences[: config.calibration_sequences], sequences[config.calibration_sequences :]
    starts = range(0, len(rest), config.batch_size)
    return ConversionText(_joined(first), [_joined(rest[start : start + config.batch_size]) for start in starts])


def tokenizer_beside(source: Path, given: str | None) -> str:
    """The tokenizer to read text with: the one that was named, or the source's; ConfigError where there is none."""
    if given is not None:
        return given
    if not (source / "tokenizer.json").is_file():
        raise ConfigError(f"{source} holds no tokenizer.json; name the model's tokenizer with --tokenizer")
    return str(source / "tokenizer.json")


def _joined(batches: list[Batch]) -> Batch:
    return Batch(*(torch.cat(parts) for parts in zip(*batches, strict=True)))
