"""The one place where a mistake becomes one line on standard error and an exit code."""

import errno
import os
import signal
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import typer

from remoe.distributed.world import is_first
from remoe.errors import NoRoomError, OneRankError, OutOfMemoryError, RemoeError, RemoeWarning, nearest

# typer brings its own copy of click or uses the installed one, depending on its version
ClickException: Any = next(cls for cls in typer.BadParameter.__mro__ if cls.__name__ == "ClickException")
INTERRUPTED = 128 + signal.SIGINT
FOR_THE_FIRST = 5.0
"""Seconds that a process of several waits before it ends in silence: torchrun then stops the one that speaks, too."""
NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EPERM, errno.EROFS)
NO_PATH = (errno.ENAMETOOLONG, errno.ENOTDIR, errno.EISDIR, errno.ELOOP, errno.EEXIST)
MUST_BE = {
    "int_parsing": "a whole number", "int_parsing_size": "a whole number", "float_parsing": "a number",
    "greater_than_equal": "at least {ge}", "less_than_equal": "at most {le}",
}  # fmt: skip
"""Of a value that typer has pydantic read, by the kind of its error."""


def exit_code_of(command: Callable[[], object]) -> int:
    """Run a command: 0 where it succeeds, 2 for a user's mistake, 1 for a fault; no traceback for what is foreseen."""
    try:
        with _plain_warnings():
            result = command()
        sys.stdout.flush()
        code = result if isinstance(result, int) else 0
        return _say("interrupted", code) if code == INTERRUPTED else code  # newer typer returns it
    except (typer.Abort, KeyboardInterrupt):  # older typer turns the second into the first
        return _say("interrupted", INTERRUPTED)
    except BrokenPipeError:  # the reader, such as `head`, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except RemoeError as error:
        if is_first() or isinstance(error, OneRankError):
            return _say(str(error), error.exit_code)
        time.sleep(FOR_THE_FIRST)
        return error.exit_code
    except ClickException as error:
        return _usage(error)
    except (RuntimeError, MemoryError) as error:
        from remoe.training.memory import described, is_out_of_memory

        if not is_out_of_memory(error):
            raise
        fix = "give it less at a time (--batch-size, --sequence-length), or a larger device"
        return _say(described(error, "this command", fix), OutOfMemoryError.exit_code)
    except OSError as error:
        if error.errno not in NO_ROOM + NO_PATH:
            raise
        place = f"{error.filename}: " if error.filename else ""
        is_there = bool(error.filename) and os.path.exists(error.filename)  # Path.exists may itself be refused
        if error.errno in (errno.EACCES, errno.EPERM) and is_there and not os.access(error.filename, os.R_OK):
            return _say(f"{place}{error.strerror}; must be readable: give yourself access, or name another", 2)
        return _say(f"{place}{error.strerror}; name a place that can be written, with room", NoRoomError.exit_code)


@contextmanager
def _plain_warnings() -> Iterator[None]:
    """Our warnings in one line, each once; those of libraries stay as they are."""
    with warnings.catch_warnings():
        others = warnings.showwarning

        def show(message: Any, category: type[Warning], *place: Any, **more: Any) -> None:
            if issubclass(category, RemoeWarning):
                _say(f"warning: {message}", 0)
            else:
                others(message, category, *place, **more)

        warnings.showwarning = show
        yield


def _usage(error: Any) -> int:
    """One line about a wrong command line. Without a command, help is no mistake worth a message."""
    if type(error).__name__ == "NoArgsIsHelpError":
        print(error.format_message())
        return 2
    context = getattr(error, "ctx", None)
    path = context.command_path if context is not None else "remoe"
    return _say(f"{_explain(error)}; see `{path} --help`", 2)


def _explain(error: Any) -> str:
    option = getattr(error, "option_name", None)
    possibilities = getattr(error, "possibilities", None)
    if type(error).__name__ == "NoSuchOption" and option:
        names = [
            name for parameter in error.ctx.command.params for name in (*parameter.opts, *parameter.secondary_opts)
        ]
        allowed = possibilities or [name for name in (*names, "--help") if name.startswith("-")]  # others: arguments
        return f"there is no option {option}; {nearest(option, allowed)}"
    if hasattr(error.__cause__, "errors"):
        found = error.__cause__.errors()[0]
        if found["type"] in MUST_BE:
            allowed = MUST_BE[found["type"]].format(**found.get("ctx", {}))
            return f"{error.param.opts[0]} is {found['input']}, must be {allowed}"
    message = error.format_message().rstrip(".")
    if message.startswith("No such command"):
        name = message.split("'")[1]
        return f"there is no command {name!r}; {_instead_of(name, error.ctx)}"
    return message[:1].lower() + message[1:]


def _instead_of(name: str, context: Any) -> str:
    from remoe.recipes import names

    if context.info_name == "recipes" and name in names():
        return f"try: {context.command_path} show {name}"
    return nearest(name, context.command.commands)


def _say(message: str, code: int) -> int:
    print(f"remoe: {' '.join(message.split())}", file=sys.stderr)
    return code


def spread_overrides(arguments: Sequence[str]) -> Iterator[str]:
    """Read `--set a=1 b=2` as `--set a=1 --set b=2`."""
    follows_set = False
    for position, argument in enumerate(arguments):
        is_value = position > 0 and arguments[position - 1] == "--set"
        if follows_set and not is_value and "=" in argument and not argument.startswith("-"):
            yield "--set"
        follows_set = is_value or argument == "--set" or (follows_set and "=" in argument and argument[0] != "-")
        yield argument
