"""A model as a folder that loads everywhere: with remoe, and in transformers where remoe is not installed."""

from remoe.export.folder import check_new, write_export, write_tokenizer
from remoe.export.transformers_files import missing_in_transformers

__all__ = ["check_new", "missing_in_transformers", "write_export", "write_tokenizer"]
