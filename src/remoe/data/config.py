"""Settings of the text a run reads: the `data:` section of a run's config."""

from pathlib import Path
from typing import Any

from remoe.config import check_choice, check_range, config_class, setting
from remoe.errors import ConfigError

Source = str | list[str] | list[dict[str, Any]]


@config_class
class DataConfig:
    """Where text comes from, how it becomes tokens, and how tokens become sequences."""

    train: Source = setting(
        "embedded", "a text, jsonl or parquet file, a .bin/.idx prefix, `embedded`, or a list of {path, weight}"
    )
    validation: Source | None = setting(None, "the same for validation; null: a part held out of train")
    validation_fraction: float = setting(0.05, "share of the documents held out when validation is null")
    format: str = setting("text", "text, or instructions: jsonl of questions and answers; only answers are learned")
    template: str = setting("alpaca", "instructions: alpaca, chat, plain, or a file with a chat template (Jinja)")
    packing: bool = setting(False, "instructions: as many a row as fit, not one; needs document_mask")
    tokenizer: str = setting(
        "bytes", "bytes, characters, words, gpt2:FOLDER (vocab.json, merges.txt), or a tokenizer.json"
    )
    sequence_length: int = setting(256, "tokens S a sequence")
    document_mask: bool = setting(False, "attention stays inside each packed document")
    text_field: str = setting("text", "key of a jsonl or parquet row's text")
    domain_field: str | None = setting(None, "key of a jsonl row's domain, dotted; null: meta.pile_set_name if there")
    on_bad_line: str = setting("refuse", "refuse or skip a line that is not valid (skipped ones are counted)")
    cache: Path = setting(Path(".cache/remoe"), "folder for tokenised text files, keyed by their content")

    def __post_init__(self) -> None:
        check_range("data.sequence_length", self.sequence_length, 2)
        check_choice("data.format", self.format, ("text", "instructions"))
        if self.packing and not (self.holds_instructions and self.document_mask):
            raise ConfigError(
                "data.packing is true, needs data.format: instructions and data.document_mask: true; without the mask "
                "a conversation would see its neighbours"
            )
        check_choice("data.on_bad_line", self.on_bad_line, ("refuse", "skip"))
        if not 0 < self.validation_fraction < 1:
            raise ConfigError(f"data.validation_fraction is {self.validation_fraction}, must be between 0 and 1")

    @property
    def holds_instructions(self) -> bool:
        """Whether the data are conversations, whose rows are padded, rather than running text."""
        return self.format == "instructions"
