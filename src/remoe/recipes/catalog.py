"""The recipes: YAML tables beside this file, in which each one names its `base` and the few keys that differ."""

import functools
import textwrap
from collections.abc import Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any

from remoe.config import apply_overrides, from_dict, read_yaml, to_yaml
from remoe.errors import ConfigError, nearest

if TYPE_CHECKING:
    from remoe.training.config import TrainConfig


DATA_ENDINGS = (".txt", ".jsonl", ".ndjson", ".parquet", ".gz", ".xz", ".zst", ".bin", ".idx", ".csv", ".tsv")


def names() -> list[str]:
    """Every recipe, in the order of the tables."""
    return [name for name in _entries() if not name.startswith("_")]


def about(name: str) -> str:
    """Where a recipe's numbers come from, in a sentence or two."""
    return _entry(name)["about"]


def load(name: str) -> dict[str, Any]:
    """A recipe's settings as plain values, bases resolved; ConfigError names the nearest recipe if there is none."""
    values = _resolve(_entry(name))
    return {"name": name, **values}


def show(name: str) -> str:
    """A recipe as a complete YAML config, every default written out; a comment says its origin and what to set."""
    from remoe.training.config import TrainConfig

    notes = [about(name), _resolve(_entry(name), keep=("needs",)).get("needs", "")]
    comment = "\n".join(textwrap.fill(note, 100, initial_indent="# ", subsequent_indent="# ") for note in notes if note)
    return f"{comment}\n{to_yaml(from_dict(TrainConfig, load(name)))}"


def read_config(source: str, overrides: Sequence[str] = ()) -> "TrainConfig":
    """The run that a YAML file or a recipe's name describes, with `dotted.key=value` overrides."""
    from remoe.training.config import TrainConfig

    return from_dict(TrainConfig, apply_overrides(read_values(source), overrides))


def read_values(source: str) -> dict[str, Any]:
    """The plain values of a YAML file or a recipe; ConfigError says what was looked for."""
    path = Path(source)
    if source in names():
        return load(source)
    if path.suffix not in DATA_ENDINGS and (path.exists() or path.suffix in (".yaml", ".yml") or len(path.parts) != 1):
        return read_yaml(path)
    if path.suffix in DATA_ENDINGS or path.with_name(f"{path.name}.idx").exists():
        raise ConfigError(f"{source} is data, not a config; try: remoe train demo-relu --set data.train={source}")
    raise ConfigError(f"config {source!r} is neither a YAML file nor a recipe; {_nearest_recipe(source)}")


def merge(base: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """`base` with the keys of `changes` set, section by section; a router and its options are one value."""
    result = dict(base)
    for key, value in changes.items():
        section = result.get(key)
        if isinstance(section, dict) and isinstance(value, Mapping) and key != "router":
            value = merge(section, value)
        result[key] = value
    return result


def _resolve(entry: Mapping[str, Any], keep: Sequence[str] = ()) -> dict[str, Any]:
    """The entry on top of its bases, without what is said about it (`keep` some of that)."""
    own = {key: value for key, value in entry.items() if key in keep or key not in ("base", "about", "needs")}
    return merge(_resolve(_entries()[entry["base"]], keep), own) if "base" in entry else own


def _entry(name: str) -> dict[str, Any]:
    if name not in names():
        raise ConfigError(f"there is no recipe {name!r}; {_nearest_recipe(name)}")
    return _entries()[name]


def _nearest_recipe(name: str) -> str:
    return nearest(name, names(), otherwise="`remoe recipes` lists the ready ones")


@functools.cache
def _entries() -> dict[str, dict[str, Any]]:
    import yaml

    entries: dict[str, dict[str, Any]] = {}
    for table in ("small.yaml", "routers.yaml", "remoe.yaml", "rmoe.yaml", "sft.yaml"):
        entries |= yaml.safe_load(resources.files("remoe.recipes").joinpath(table).read_text(encoding="utf-8"))
    return entries
