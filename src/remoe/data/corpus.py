"""From the `data:` section of a config to tokenised training and validation text."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from remoe.data.cache import open_text
from remoe.data.config import DataConfig, Source
from remoe.data.dataset import AnyDataset, BlendedDataset, TokenDataset
from remoe.data.embedded import embedded_corpus
from remoe.data.files import beside, file_hash
from remoe.data.instructions import InstructionDataset, Reading, hold_out_conversations, open_instructions
from remoe.data.named_tokenizer import load_saved_tokenizer, load_tokenizer
from remoe.data.prepared import open_prefix
from remoe.data.readers import check_file
from remoe.data.sampler import too_short
from remoe.data.split import hold_out
from remoe.data.tokenizer import Tokenizer
from remoe.errors import ConfigError, DataError, nearest

EMBEDDED = "embedded"


class Corpus(NamedTuple):
    """Training and validation text with one list of domains, the tokenizer, and what all of it was made from."""

    train: AnyDataset
    validation: AnyDataset
    tokenizer: Tokenizer
    manifest: dict[str, Any]


class HeldOutText(NamedTuple):
    """Validation text by itself, and its tokenizer."""

    validation: AnyDataset
    tokenizer: Tokenizer


def open_validation(config: DataConfig) -> HeldOutText:
    """The validation text that a config names; training text is touched only where validation is a part of it.

    Raises what open_corpus raises.
    """
    if config.validation is None:
        corpus = open_corpus(config)
        return HeldOutText(corpus.validation, corpus.tokenizer)
    files = _locate("data.validation", config.validation, config)
    needs_training_text = config.tokenizer == "characters"
    tokenizer = _open_tokenizer(config, _locate("data.train", config.train, config) if needs_training_text else files)
    datasets = _open_long_enough(files, tokenizer, config)
    return HeldOutText(_blend(datasets, [None] * len(datasets), _domains(datasets)), tokenizer)


def check_validation(config: DataConfig) -> None:
    """Raise what open_validation raises of a validation text that is not there or no text, without reading it."""
    if config.validation is not None:
        _locate("data.validation", config.validation, config)


def open_corpus(config: DataConfig) -> Corpus:
    """Open the text a config names; text files are tokenised once and cached.

    Without data.validation a part is held out of the training text, by a hash of each document: the same for each
    seed, so that losses compare. Raises DataError for text that is missing, damaged, too short, of another tokenizer,
    or the same for training and validation; ConfigError for a list that is no list of {path, weight}.
    """
    train_files = _locate("data.train", config.train, config)
    validation_files = [] if config.validation is None else _locate("data.validation", config.validation, config)
    _check_unweighted(validation_files)
    _check_different(train_files, validation_files)
    tokenizer = _open_tokenizer(config, train_files)
    trains = _open_long_enough(train_files, tokenizer, config)
    validations = _open_long_enough(validation_files, tokenizer, config)
    if not validations:
        minimum = config.sequence_length + 1
        pairs = [_hold_out(dataset, config.validation_fraction, minimum) for dataset in trains]
        trains, validations = [pair[0] for pair in pairs], [pair[1] for pair in pairs]
    names = _domains((*trains, *validations))
    train = _blend(trains, [file.weight for file in train_files], names)
    validation = _blend(validations, [None] * len(validations), names)
    return Corpus(train, validation, tokenizer, _manifest(train_files, train, validation, tokenizer))


class _File(NamedTuple):
    """One source as given, the file or prefix it stands for, and its weight in a blend."""

    given: str
    path: Path
    is_prefix: bool
    weight: float | None
    embedded: list[dict[str, Any]] | None = None


def _locate(key: str, source: Source, config: DataConfig) -> list[_File]:
    entries = [source] if isinstance(source, str) else source
    if not entries:
        raise ConfigError(f"{key} is an empty list, must name some text")
    return [_locate_one(key, entry, config) for entry in entries]


def _locate_one(key: str, entry: str | dict[str, Any], config: DataConfig) -> _File:
    given, weight = (entry, None) if isinstance(entry, str) else _weighted(key, entry)
    if given == EMBEDDED:
        path, manifest = embedded_corpus(config.cache)
        return _File(given, path, False, weight, manifest)
    path = Path(given).expanduser()
    if path.suffix in (".bin", ".idx"):
        return _File(given, path.with_suffix(""), True, weight)
    if path.name and not path.is_file() and any(beside(path, ending).exists() for ending in (".idx", ".bin")):
        return _File(given, path, True, weight)
    try:
        check_file(path, or_prefix=True)
    except DataError as error:
        raise DataError(f"{key}: {error}") from None
    return _File(given, path, False, weight)


def _weighted(key: str, entry: dict[str, Any]) -> tuple[str, float]:
    for name in entry:
        if name not in ("path", "weight"):
            raise ConfigError(f"{key} has the unknown key {name!r}; {nearest(str(name), ('path', 'weight'))}")
    path, weight = entry.get("path"), entry.get("weight", 1.0)
    if not isinstance(path, str):
        raise ConfigError(f"{key} has an entry without a path, must be a list of {{path, weight}}")
    if isinstance(weight, bool) or not isinstance(weight, int | float) or not 0 < weight < float("inf"):
        raise ConfigError(f"{key}: the weight of {path} is {weight!r}, must be a number above 0")
    return path, float(weight)


def _check_unweighted(files: Sequence[_File]) -> None:
    weighted = [file.given for file in files if file.weight is not None]
    if len(files) > 1 and weighted:
        raise ConfigError(
            f"data.validation gives {weighted[0]} a weight, must be a list of paths: each text counts by its tokens"
        )


def _check_different(train: Sequence[_File], validation: Sequence[_File]) -> None:
    for file in validation:
        twin = next((other for other in train if _is_same_text(_content(file), _content(other))), None)
        if twin is not None:
            raise DataError(
                f"data.validation {file.given} is the same text as data.train {twin.given}; give other text, or null "
                "to hold a part out"
            )


def _content(file: _File) -> Path:
    return beside(file.path, ".bin") if file.is_prefix else file.path


def _is_same_text(one: Path, other: Path) -> bool:
    """Whether two files have the same bytes; only files of one size are read, which may take minutes."""
    if not (one.is_file() and other.is_file()):
        return one.absolute() == other.absolute()
    return one.stat().st_size == other.stat().st_size and file_hash(one) == file_hash(other)


def _open_tokenizer(config: DataConfig, files: Sequence[_File]) -> Tokenizer:
    spec = config.tokenizer
    texts = [file.path for file in files if not file.is_prefix]
    if spec in ("characters", "words") and not texts and beside(files[0].path, ".tokenizer").is_dir():
        return load_saved_tokenizer(beside(files[0].path, ".tokenizer"))
    return load_tokenizer(spec, texts, config.text_field)


def _open_long_enough(files: Sequence[_File], tokenizer: Tokenizer, config: DataConfig) -> list[TokenDataset]:
    opened = _open_all(files, tokenizer, config)
    for dataset in opened:
        if dataset.num_tokens < config.sequence_length + 1 and not config.holds_instructions:
            raise too_short(dataset, config.sequence_length)
    return opened


def _open_all(files: Sequence[_File], tokenizer: Tokenizer, config: DataConfig) -> list[TokenDataset]:
    opened = []
    for file in files:
        domain = "text" if len(files) == 1 else file.path.name.partition(".")[0] or file.path.name
        if config.holds_instructions:
            opened.append(_open_instructions(file, tokenizer, config, domain))
        elif file.is_prefix:
            opened.append(open_prefix(file.path, tokenizer, domain))
        else:
            opened.append(open_text(file.path, tokenizer, config, domain))
    return opened


def _open_instructions(file: _File, tokenizer: Tokenizer, config: DataConfig, domain: str) -> TokenDataset:
    if file.is_prefix or file.embedded:
        raise DataError(
            f"data.format is instructions, but {file.given} is text; name a jsonl file of questions and answers"
        )
    reading = Reading(tokenizer, config.template, config.sequence_length, config.packing)
    return open_instructions(file.path, domain, reading)


def _hold_out(dataset: TokenDataset, fraction: float, minimum: int) -> tuple[TokenDataset, TokenDataset]:
    if isinstance(dataset, InstructionDataset):
        return hold_out_conversations(dataset, fraction)
    return hold_out(dataset, fraction, minimum)


def _domains(datasets: Sequence[TokenDataset]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(name for dataset in datasets for name in dataset.domains))


def _blend(datasets: Sequence[TokenDataset], weights: Sequence[float | None], names: tuple[str, ...]) -> AnyDataset:
    """One dataset of all; a source without a weight counts by its tokens."""
    shared = [dataset.with_domains(names) for dataset in datasets]
    if len(shared) == 1:
        return shared[0]
    by_tokens = [dataset.num_tokens for dataset in shared]
    chosen = [tokens if weight is None else weight for tokens, weight in zip(by_tokens, weights, strict=True)]
    return BlendedDataset(list(zip(shared, chosen, strict=True)))


def _manifest(
    files: Sequence[_File], train: AnyDataset, validation: AnyDataset, tokenizer: Tokenizer
) -> dict[str, Any]:
    counts = train.tokens_per_domain(), validation.tokens_per_domain()
    return {
        "tokenizer": {
            "name": tokenizer.name,
            "fingerprint": tokenizer.fingerprint,
            "vocab_size": tokenizer.vocab_size,
        },
        "train": {"documents": train.num_documents, "tokens": train.num_tokens},
        "validation": {"documents": validation.num_documents, "tokens": validation.num_tokens},
        "domains": {name: {"train": counts[0][name], "validation": counts[1][name]} for name in train.domains},
        "sources": [{"path": file.given, "weight": file.weight} for file in files],
        "embedded": next((file.embedded for file in files if file.embedded), None),
    }
