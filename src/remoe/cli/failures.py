"""The one place where a mistake becomes one line on standard error and an exit code."""

import errno
import os
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import typer

from remoe.distributed.world import is_first
from remoe.errors import NoRoomError, OneRankError, RemoeError, nearest

# typer brings its own copy of click or uses the installed one, depending on its version
ClickException: Any = next(cls for cls in typer.BadParameter.__mro__ if cls.__name__ == "ClickException")
INTERRUPTED = 128 + signal.SIGINT
NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EPERM, errno.EROFS)
NO_PATH = (errno.ENAMETOOLONG, errno.ENOTDIR, errno.EISDIR, errno.ELOOP)


def exit_code_of(command: Callable[[], object]) -> int:
    """Run a command: 0 where it succeeds, 2 for a user's mistake, 1 for a fault; no traceback for what is foreseen."""
    try:
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
        speaks = is_first() or isinstance(error, OneRankError)
        return _say(str(error), error.exit_code) if speaks else error.exit_code
    except ClickException as error:
        return _usage(error)
    except OSError as error:
        if error.errno not in NO_ROOM + NO_PATH:
            raise
        place = f"{error.filename}: " if error.filename else ""
        return _say(f"{place}{error.strerror}; name a place that can be written, with room", NoRoomError.exit_code)


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
        allowed = possibilities or [name for parameter in error.ctx.command.params for name in parameter.opts]
        return f"there is no option {option}; {nearest(option, allowed)}"
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
