"""YAML files and --set keys to frozen dataclasses and back; one message for whatever does not fit."""

import dataclasses
import functools
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar, dataclass_transform, get_type_hints

from remoe.errors import ConfigError, nearest, one_of

if TYPE_CHECKING:
    from pydantic import TypeAdapter

Config = TypeVar("Config")

MOST_VALUES = 100_000
"""In one config; lists of layers are the longest things in it."""
LARGEST_SIZE = 10**6
"""Of a width or a number of layers, heads, experts, …: beyond any model, and the products of three still fit int64."""


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
        return {}
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
    except ValidationError as error:
        raise ConfigError(_misfit(key, error.errors()[0])) from None


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
        if left < 0:
            raise ConfigError(f"{what} unfolds to more than {MOST_VALUES} values; write out what its aliases stand for")
        waiting.extend(value.values() if isinstance(value, dict) else value if isinstance(value, list) else ())


def _number_or_text(text: str) -> float | str:
    try:  # YAML 1.1 reads 1e-3 (no dot) as text
        return float(text) if text[:1] in "+-.0123456789" else text
    except ValueError:
        return text


def _explain(cls: type, error: Any) -> str:
    """One line from pydantic's first finding: dotted key, what is wrong, what is allowed."""
    cause = error.get("ctx", {}).get("error")
    if isinstance(cause, ConfigError):
        return str(cause)
    sections, path = _locate(cls, error["loc"])
    key = ".".join(path)
    if error["type"] in ("unexpected_keyword_argument", "extra_forbidden"):
        allowed = [field.name for field in dataclasses.fields(sections[-1])]
        return f"unknown key {key!r}; {_of_another_section(cls, path[-1]) or nearest(path[-1], allowed)}"
    return _misfit(key, error)


def _of_another_section(cls: type, name: str) -> str:
    """A hint for a key whose section was forgotten or is another one."""
    found = [repr(key) for key, _, _ in describe_keys(cls) if key.rpartition(".")[2] == name]
    return f"did you mean {' or '.join(found)}?" if found else ""


def _misfit(key: str, error: Any) -> str:
    return f"{key} is {error['input']!r}: {error['msg'][0].lower()}{error['msg'][1:]}"


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
