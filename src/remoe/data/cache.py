"""Text files tokenised once: the cache is keyed by a file's content and by all else that decides its tokens."""

import functools
import logging
import os
import shutil
import tempfile
from pathlib import Path

from remoe.data.config import DataConfig
from remoe.data.dataset import TokenDataset
from remoe.data.files import beside, file_hash, text_hash
from remoe.data.prepare import FORMAT, PrepareConfig, bad_lines, prepare
from remoe.data.prepared import open_prefix, read_manifest
from remoe.data.tokenizer import Tokenizer
from remoe.errors import DataError

logger = logging.getLogger(__name__)
SHOW_PROGRESS_BYTES = 20_000_000


def open_text(path: Path, tokenizer: Tokenizer, config: DataConfig, default_domain: str) -> TokenDataset:
    """The documents of a text, jsonl or parquet file, tokenised now if the cache does not have them.

    Raises DataError for a file that is not valid, or a cache folder that cannot be written.
    """
    prefix = cached_prefix(path, tokenizer, config, default_domain)
    if not beside(prefix, ".idx").is_file():
        _fill(prefix, path, tokenizer, config, default_domain)
    try:
        dataset = open_prefix(prefix, tokenizer)
    except DataError as error:
        logger.warning("%s; tokenising %s again", error, path)
        shutil.rmtree(prefix.parent)
        _fill(prefix, path, tokenizer, config, default_domain)
        dataset = open_prefix(prefix, tokenizer)
    skipped = read_manifest(prefix).get("skipped_lines", 0)
    if skipped:
        _tell_once(f"{path}: skipped {bad_lines(skipped)}, listed in {beside(prefix, '.skipped.txt')}")
    dataset.name = str(path)
    return dataset


@functools.cache
def _tell_once(message: str) -> None:
    """A command may open the same text several times."""
    logger.warning("%s", message)


def cached_prefix(path: Path, tokenizer: Tokenizer, config: DataConfig, default_domain: str) -> Path:
    """Where the cache keeps a file's tokens, there or not."""
    options = [str(config.domain_field), config.on_bad_line, default_domain]
    if config.text_field != "text":
        options.append(config.text_field)
    key = text_hash(FORMAT, file_hash(path), "".join(path.suffixes[-2:]), tokenizer.fingerprint, *options)
    return config.cache / "tokens" / key[:24] / "data"


def _fill(prefix: Path, path: Path, tokenizer: Tokenizer, config: DataConfig, default_domain: str) -> None:
    """Tokenise into a folder of its own and rename it: several runs may want the same text at once."""
    options = PrepareConfig(
        key=config.text_field,
        domain_field=config.domain_field,
        default_domain=default_domain,
        on_bad_line=config.on_bad_line,
        show_progress=path.stat().st_size > SHOW_PROGRESS_BYTES,
    )
    try:
        prefix.parent.parent.mkdir(parents=True, exist_ok=True)
        scratch = Path(tempfile.mkdtemp(prefix=".new-", dir=prefix.parent.parent))
    except OSError as error:
        raise DataError(f"data.cache is {config.cache}, must be a folder to write to: {error.strerror}") from None
    try:
        prepare([path], tokenizer, scratch / prefix.name, options)
        _rename_unless_there(scratch, prefix.parent)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def _rename_unless_there(scratch: Path, folder: Path) -> None:
    try:
        os.rename(scratch, folder)
    except OSError:
        if not folder.is_dir():
            raise
        logger.info("%s was filled by another run meanwhile", folder)
