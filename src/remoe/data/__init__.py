"""Text in, token batches out: tokenizers, files of tokens, domains, and sample order as a function of (seed, step)."""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from remoe.data.config import DataConfig
    from remoe.data.corpus import Corpus, HeldOutText, check_validation, open_corpus, open_validation
    from remoe.data.dataset import BlendedDataset, TokenDataset
    from remoe.data.indexed import IndexedFile, IndexedWriter
    from remoe.data.named_tokenizer import load_saved_tokenizer, load_tokenizer
    from remoe.data.sampler import Batch, Sampler, validation_batches
    from remoe.data.tokenizer import Tokenizer

# on first use: the worker processes of `prepare` never need torch
_HOME = {
    "DataConfig": "config",
    **dict.fromkeys(("Corpus", "HeldOutText", "check_validation", "open_corpus", "open_validation"), "corpus"),
    **dict.fromkeys(("BlendedDataset", "TokenDataset"), "dataset"),
    **dict.fromkeys(("IndexedFile", "IndexedWriter"), "indexed"),
    **dict.fromkeys(("load_saved_tokenizer", "load_tokenizer"), "named_tokenizer"),
    **dict.fromkeys(("Batch", "Sampler", "validation_batches"), "sampler"),
    "Tokenizer": "tokenizer",
}

__all__ = [
    "Batch", "BlendedDataset", "Corpus", "DataConfig", "HeldOutText", "IndexedFile", "IndexedWriter", "Sampler",
    "TokenDataset", "Tokenizer", "check_validation", "load_saved_tokenizer", "load_tokenizer", "open_corpus",
    "open_validation", "validation_batches",
]  # fmt: skip


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'remoe.data' has no attribute {name!r}")
    return getattr(importlib.import_module(f"remoe.data.{_HOME[name]}"), name)
