"""What a user can get wrong, each with one message: what is wrong, what is allowed, how to fix it."""

import difflib
from collections.abc import Iterable, Sequence


class RemoeError(Exception):
    """A user's mistake or a fault outside this program; the command line prints its message without a traceback."""

    exit_code = 2


class ConfigError(RemoeError, ValueError):
    """A setting that is unknown, of the wrong type, out of range, or at odds with another one."""


class DataError(RemoeError, ValueError):
    """A corpus, dataset or tokenizer that cannot be used as it is."""


class CheckpointError(RemoeError):
    """A checkpoint or run folder that is missing, damaged, or belongs to another model."""


class TrainingError(RemoeError):
    """A run that cannot go on: too many steps in a row without a finite loss, or a device that ran out of room."""

    exit_code = 1


class NoRoomError(TrainingError):
    """A full or read-only disk: the user can make room; what was written before is whole."""

    exit_code = 2


class OneRankError(TrainingError):
    """What went wrong in one process of several; all other errors are the same in all, and the first one says them."""


class OutOfMemoryError(OneRankError):
    """A device without room for what is asked of it; what a run had saved before is whole."""


class MissingExtraError(RemoeError, ImportError):
    """An optional library that the called feature needs and that is not installed."""

    def __init__(self, library: str, extra: str) -> None:
        super().__init__(f"{library} is not installed; it comes with: pip install 'remoe[{extra}]'")


class RemoeWarning(UserWarning):
    """What went well in another way than was asked for; the command line prints its message in one line."""


def nearest(word: str, allowed: Iterable[str], otherwise: str | None = None) -> str:
    """A ready hint that ends an error message: the nearest allowed word if there is one, else all of them.

    `otherwise` replaces the list of all, where that is long or was said before.
    """
    names = sorted(allowed)
    close = difflib.get_close_matches(word, names, n=1, cutoff=0.6)
    if close:
        return f"did you mean {close[0]!r}?"
    return f"allowed: {', '.join(names)}" if otherwise is None else otherwise


def one_of(word: str, allowed: Sequence[str]) -> str:
    """The end of an error message about a choice: all allowed words, then the nearest one if there is one."""
    hint = nearest(word, allowed, otherwise="")
    return f"must be one of {', '.join(allowed)}" + (f"; {hint}" if hint else "")
