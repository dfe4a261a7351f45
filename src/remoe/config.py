"""YAML files and --set keys to frozen dataclasses and back; one message for whatever does not fit."""

import dataclasses
import functools
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import UnionType
from typing import TYPE_CHECKING, Any, TypeVar, Union, dataclass_transform, get_args, get_origin, get_type_hints

from remoe.errors import ConfigError, nearest, one_of

if TYPE_CHECKING:
    from pydantic import TypeAdapter

Config = TypeVar("Config")

MOST_VALUES = 100_000
"""In one config; lists of layers are the longest things in it."""
MOST_BITS = 1024
"""Of a whole number in one: as large as a float's exponent allows; Python does not print numbers without bounds."""
LARGEST_SIZE = 10**6
"""Of a width or a number of layers, heads, experts, …: beyond any model, and the products of three still fit int64."""

LONGEST_VALUE = 80
"""Characters of a wrong value that a message repeats."""

_WORDS: dict[Any, tuple[str, str]] = {
    int: ("a whole number", "4"), float: ("a number", "0.1"), bool: ("true or false", "true"), str: ("text", "name"),
    dict: ("a mapping", "{key: value}"), Path: ("a path", "folder"), type(None): ("null", "null"),
}  # fmt: skip
_PLURALS = {"a whole number": "whole numbers", "a number": "numbers", "text": "texts", "a mapping": "mappings"}


def setting(default: Any, help: str) -> Any:
    """A field of a config class: its default and the line that `remoe train --keys` prints for it."""
    if callable(default):
        return dataclasses.field(default_factory=default, metadata={"help": help})
    return dataclasses.field(default=default, metadata={"help": help})


@dataclass_transform(kw_only_default=True, frozen_default=True)
def config_class(cls: type[Config]) -> type[Config]:
    """Make a frozen, keyword-only dataclass whose unknown keys are errors. `__post_init__` checks the values."""
    cls.__pydantic_config__ = {"extra": "forbid"}  # type: ignore[attr-defined]
    return dataclasses.dataclass(frozen=True, kw_only=True)(cls)


def read_yaml(path: Path) -> dict[str, Any]:
    """The mapping in a YAML file; ConfigError names file and line where it is not one."""
    import yaml

    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(f"config {path} does not exist; `remoe recipes` lists the ready ones") from None
    except IsADirectoryError:
        raise ConfigError(f"config {path} is a folder, must be a YAML file") from None
    except UnicodeDecodeError:
        raise ConfigError(f"config {path} is not UTF-8 text, must be a YAML file") from None
    except yaml.YAMLError as error:
        raise ConfigError(f"config {path} is not valid YAML: {' '.join(str(error).split())}") from None
    except (RecursionError, ValueError) as error:  # a date such as 2000-99-99 is a ValueError
        raise ConfigError(f"config {path} is not valid YAML: {error}") from None
    _check_bounded(f"config {path}", values)
    if values is None:
        raise ConfigError(f"config {path} is empty, must hold a key at least, e.g. `name: {path.stem}`")
    if not isinstance(values, dict):
        raise ConfigError(f"config {path} holds a {type(values).__name__}, must be a mapping of keys such as `model:`")
    return values


def apply_overrides(values: Mapping[str, Any], overrides: Sequence[str]) -> dict[str, Any]:
    """A copy of `values` with each `dotted.key=value` set; the value is read as YAML (1e-3 as a number too)."""
    result = _deep_copy(values)
    for override in overrides:
        key, equals, text = override.partition("=")
        if not equals or not key:
            raise ConfigError(f"--set {override!r} has no value, must be dotted.key=value, e.g. --set train.steps=100")
        *parents, last = key.strip().split(".")
        section = result
        for parent in parents:
            section = section.setdefault(parent, {})
            if not isinstance(section, dict):
                raise ConfigError(f"--set {override!r}: {parent!r} is a value, not a section with keys")
        section[last] = _parse_scalar(override, text)
    return result


def from_dict(cls: type[Config], values: Mapping[str, Any]) -> Config:
    """Build a config class from plain values, checking types, ranges and unknown keys (ConfigError)."""
    from pydantic import ValidationError

    try:
        return _adapter(cls).validate_python(dict(values))
    except ValidationError as error:
        raise ConfigError(_explain(cls, error.errors()[0])) from None


def to_dict(config: Any) -> dict[str, Any]:
    """Plain values (mappings, lists, scalars) from which `from_dict` builds an equal config."""
    return _plain(dataclasses.asdict(config))


def to_yaml(config: Any) -> str:
    """The config as YAML, in the order of its fields."""
    import yaml

    return yaml.safe_dump(to_dict(config), sort_keys=False, allow_unicode=True)


def describe_keys(cls: type, prefix: str = "") -> Iterator[tuple[str, Any, str]]:
    """Yield (dotted key, default, help) for every setting of a config class, sections opened."""
    hints = get_type_hints(cls)
    for field in dataclasses.fields(cls):
        section = hints[field.name]
        if dataclasses.is_dataclass(section):
            yield from describe_keys(section, f"{prefix}{field.name}.")  # type: ignore[arg-type]
            continue
        has_factory = field.default_factory is not dataclasses.MISSING
        default = field.default_factory() if has_factory else field.default  # type: ignore[misc]
        yield f"{prefix}{field.name}", default, field.metadata.get("help", "")


def check_type(key: str, value: Any, kind: Any) -> Any:
    """The value as the type asked for (a whole float as an int, say); ConfigError where it is not one."""
    from pydantic import ValidationError

    try:
        return _adapter(kind).validate_python(value)
    except ValidationError:
        raise ConfigError(f"{key} is {_short(value)}, {_must_be(kind)}") from None


def check_range(key: str, value: float, low: float, high: float = float("inf"), fix: str = "") -> None:
    """Raise ConfigError unless low <= value <= high; the message has key, value, range and fix."""
    if low <= value <= high and value != float("inf"):
        return
    allowed = f"at least {low}" if high == float("inf") else f"between {low} and {high}"
    raise ConfigError(f"{key} is {value}, must be {allowed}" + (f"; {fix}" if fix else ""))


def check_size(key: str, value: int) -> None:
    """Raise ConfigError unless 1 <= value <= LARGEST_SIZE."""
    check_range(key, value, 1)
    check_range(key, value, 1, LARGEST_SIZE)


def check_positive(key: str, value: float, fix: str = "") -> None:
    """Raise ConfigError unless value is a finite number above 0."""
    if not 0 < value < float("inf"):
        raise ConfigError(f"{key} is {value}, must be above 0" + (f"; {fix}" if fix else ""))


def check_choice(key: str, value: str, allowed: Sequence[str]) -> None:
    """Raise ConfigError unless the value is one of the allowed words; the message names the nearest."""
    if value not in allowed:
        raise ConfigError(f"{key} is {value!r}, {one_of(value, allowed)}")


@functools.cache
def _adapter(kind: Any) -> "TypeAdapter[Any]":
    """Building one takes longer than using it."""
    from pydantic import TypeAdapter

    return TypeAdapter(kind)


def _parse_scalar(override: str, text: str) -> Any:
    import yaml

    try:
        value = yaml.safe_load(text)
    except (yaml.YAMLError, RecursionError, ValueError):
        raise ConfigError(f"--set {override!r} cannot be read; quote the value, e.g. --set 'name=\"my run\"'") from None
    _check_bounded(f"--set {override.partition('=')[0]}", value)
    return _number_or_text(value) if isinstance(value, str) else value


def _check_bounded(what: str, values: Any) -> None:
    """Raise ConfigError where aliases (`*name`) unfold without end, or to more than any config holds."""
    waiting, left = [values], MOST_VALUES
    while waiting:
        value, left = waiting.pop(), left - 1
        if isinstance(value, int) and value.bit_length() > MOST_BITS:
            raise ConfigError(f"{what} holds a whole number of {value.bit_length()} bits, must be at most {MOST_BITS}")
        if left < 0:
            raise ConfigError(f"{what} unfolds to more than {MOST_VALUES} values; write out what its aliases stand for")
        waiting.extend(value.values() if isinstance(value, dict) else value if isinstance(value, list) else ())


def _number_or_text(text: str) -> float | str:
    try:  # YAML 1.1 reads 1e-3 (no dot) as text
        return float(text) if text[:1] in "+-.0123456789" else text
    except ValueError:
        return text


def _explain(cls: type, error: Any) -> str:
    """One line about pydantic's first finding: dotted key, what is wrong, what is allowed, what would fit."""
    cause = error.get("ctx", {}).get("error")
    if cause is not None:  # what a __post_init__ raised
        return str(cause)
    sections, path = _locate(cls, error["loc"])
    key, last, depth = ".".join(path), path[-1], len(path)
    if len(sections) > depth:
        return f"{key} is {_short(error['input'])}, must be a section of keys; e.g. {key}.{_first_key(sections[-1])}"
    fields = {field.name: field for field in dataclasses.fields(sections[-1])}
    if last not in fields:
        return f"unknown key {key!r}; {_of_another_section(cls, last) or nearest(last, fields)}"
    is_item = any(isinstance(part, int) for part in error["loc"][depth:])  # of a list
    allowed = _must_be(get_type_hints(sections[-1])[last], fields[last].default)
    return f"{key} {'holds' if is_item else 'is'} {_short(error['input'])}, {allowed}"


def _of_another_section(cls: type, name: str) -> str:
    """A hint for a key whose section was forgotten or is another one."""
    found = [repr(key) for key, _, _ in describe_keys(cls) if key.rpartition(".")[2] == name]
    return f"did you mean {' or '.join(found)}?" if found else ""


def _first_key(section: type) -> str:
    key, default, _ = next(entry for entry in describe_keys(section) if entry[1] is not None)
    return f"{key}={_as_yaml(default)}"


def _must_be(kind: Any, default: Any = None) -> str:
    """What values of a type are allowed, and one of them: the default where there is one to show."""
    kinds = get_args(kind) if get_origin(kind) in (Union, UnionType) else (kind,)
    words, examples = zip(*map(_described, kinds), strict=True)
    allowed = f"{', '.join(words[:-1])} or {words[-1]}" if words[1:] else words[0]
    shows_default = isinstance(default, (str, int, float)) and default != ""
    return f"must be {allowed}; e.g. {_as_yaml(default) if shows_default else examples[0]}"


def _described(kind: Any) -> tuple[str, str]:
    """What a type is called in messages, and an example of it."""
    if get_origin(kind) is list:
        word, example = _described(get_args(kind)[0])
        return f"a list of {_PLURALS.get(word, word)}", f"[{example}]"
    return _WORDS.get(get_origin(kind) or kind, (str(kind), "null"))


def _as_yaml(value: Any) -> str:
    return "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)


def _short(value: Any) -> str:
    text = _as_yaml(value) if value is None or isinstance(value, bool) else repr(value)
    return text if len(text) <= LONGEST_VALUE else f"{text[:LONGEST_VALUE]}…"


def _locate(cls: type, location: Sequence[Any]) -> tuple[list[type], list[str]]:
    """The config classes on the way to an error, and its key; pydantic also names the types it tried there."""
    sections, path = [cls], []
    for part in location:
        path.append(str(part))
        section = get_type_hints(sections[-1]).get(str(part))
        if not dataclasses.is_dataclass(section):
            break
        sections.append(section)  # type: ignore[arg-type]
    return sections, path


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return str(value) if isinstance(value, Path) else value


def _deep_copy(values: Mapping[str, Any]) -> dict[str, Any]:
    return {key: _deep_copy(item) if isinstance(item, Mapping) else item for key, item in values.items()}
