"""Text for a conversion: its first sequences fit gates, the others compare models."""

from pathlib import Path
from typing import NamedTuple

from remoe.data import Batch, DataConfig, open_validation, validation_batches
from remoe.data.sampler import NO_LABEL, joined
from remoe.data.tokenizer import check_vocabulary
from remoe.errors import ConfigError, DataError
from remoe.training.saved import tokenizer_beside


class ConversionText(NamedTuple):
    """Whole sequences, without padding."""

    calibration: Batch
    batches: list[Batch]


class TextSizes(NamedTuple):
    """How many sequences fit gates, how many others compare models, and how many go through a model at once."""

    calibration_sequences: int = 32
    sequences: int = 32
    batch_size: int = 8


def read_text(data: DataConfig, sizes: TextSizes, vocab_size: int) -> ConversionText:
    """Tokenise validation text. DataError for too short a text, ConfigError for a tokenizer with too many ids."""
    text = open_validation(data)
    check_vocabulary(text.tokenizer, vocab_size, fix="name the model's own with --tokenizer")
    wanted = sizes.calibration_sequences + sizes.sequences
    read = validation_batches(text.validation, data.sequence_length, 1, wanted)
    return split_text([batch for batch in read if (batch.labels_BS != NO_LABEL).all()], sizes)


def split_text(sequences: list[Batch], sizes: TextSizes) -> ConversionText:
    """The first sequences to fit on, the rest to compare on; DataError where there is no rest."""
    if len(sequences) <= sizes.calibration_sequences:
        raise DataError(
            f"the text has {len(sequences)} whole sequences, must have more than the {sizes.calibration_sequences} "
            "that fit gates; give more text, or lower --calibration-sequences or --sequence-length"
        )
    first, rest = sequences[: sizes.calibration_sequences], sequences[sizes.calibration_sequences :]
    starts = range(0, len(rest), sizes.batch_size)
    return ConversionText(joined(first), [joined(rest[start : start + sizes.batch_size]) for start in starts])


def tokenizer_for(source: Path, given: str | None) -> str:
    """The setting of the tokenizer that belongs to a model: the one that was given, or the one saved with it.

    Raises ConfigError where there is none.
    """
    found = tokenizer_beside(source) if given is None else given
    if found is None:
        raise ConfigError(f"{source} holds no tokenizer; name the model's with --tokenizer")
    return found
