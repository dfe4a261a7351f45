"""Pages made from the code: the command line, the keys of a config, the recipes; and the changelog as it is."""

import importlib
import re
from collections.abc import Callable, Iterable, Iterator
from itertools import groupby
from pathlib import Path
from typing import Any


def on_files(files: Any, config: Any) -> Any:
    """Add the generated pages to those in docs/."""
    from mkdocs.structure.files import File

    root = Path(config.config_file_path).parent
    for path, page in PAGES.items():
        files.append(File.generated(config, path, content=page()))
    changes = (root / "CHANGELOG.md").read_text(encoding="utf-8")
    files.append(File.generated(config, "changelog.md", content=changes.replace("](docs/", "](")))
    return files


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Replace `<!-- keys MODULE.CLASS -->` by a table of that config class's fields."""
    return FIELDS.sub(lambda mark: _table_of(mark[1]), markdown)


def command_line() -> str:
    """Every command with its arguments, options and example, as typer knows them."""
    import typer
    from typer.cli import get_docs_for_click

    from remoe.cli import app

    command = typer.main.get_command(app)
    return get_docs_for_click(obj=command, ctx=typer.Context(command), name="remoe", title="Command line")


def config_keys() -> str:
    """Every key of a run's config with its default and meaning, a table a section."""
    from remoe.config import describe_keys
    from remoe.training.config import TrainConfig

    return "\n".join(["# Config keys", "", KEYS, "", *_sections(list(describe_keys(TrainConfig)))])


def recipes() -> str:
    """Every recipe and where its numbers come from."""
    from remoe.recipes import about, names

    rows = (f"| `{name}` | {about(name)} |" for name in names())
    return "\n".join(["# Recipes", "", RECIPES, "", "| recipe | what it is |", "|---|---|", *rows, ""])


def routers() -> str:
    """The class of every registered router, with its docstring and options."""
    from remoe.moe.routers import ROUTERS

    return "\n".join(["# Routers", "", ROUTERS_INTRODUCTION, "", *map(_router, ROUTERS.items())])


FIELDS = re.compile(r"^<!-- keys ([\w.]+) -->$", re.MULTILINE)
KEYS = (
    "A run is one YAML file with these sections; `--set section.key=value` overrides any of them, and\n"
    "`remoe train --keys` prints this list."
)
RECIPES = (
    "A recipe's name stands wherever a command takes a config. `remoe recipes show NAME > mine.yaml` writes it out,\n"
    "every default included."
)
ROUTERS_INTRODUCTION = (
    "`router: NAME`, or `router: {name: NAME, option: value}` in a config; `remoe.build_router(NAME, …)` in Python.\n"
    "Options are the keyword-only arguments. `init_std` and `vocab_size` are filled in by the layer."
)
PAGES: dict[str, Callable[[], str]] = {
    "reference/command-line.md": command_line,
    "reference/config.md": config_keys,
    "reference/recipes.md": recipes,
    "reference/routers.md": routers,
}


def _router(registered: tuple[str, str]) -> str:
    from remoe.moe.routers import router_class

    name, target = registered
    many = getattr(router_class(name), "options", None)
    keys = "" if many is None else f"\n<!-- keys {many.__module__}.{many.__name__} -->\n"
    return f"## {name}\n\n::: {target.replace(':', '.')}\n    options:\n      members: false\n{keys}"


def _sections(keys: list[tuple[str, Any, str]]) -> Iterator[str]:
    for section, rows in groupby(keys, key=lambda row: row[0].rpartition(".")[0]):
        yield f"## {section or 'run'}\n\n{_table(rows)}\n"


def _table_of(name: str) -> str:
    from remoe.config import describe_keys

    module, _, cls = name.rpartition(".")
    return _table(describe_keys(getattr(importlib.import_module(module), cls)))


def _table(keys: Iterable[tuple[str, Any, str]]) -> str:
    rows = (f"| `{key}` | `{_as_yaml(default)}` | {_cell(help)} |" for key, default, help in keys)
    return "\n".join(["| key | default | meaning |", "|---|---|---|", *rows])


def _as_yaml(value: Any) -> str:
    import yaml

    return yaml.safe_dump(str(value) if isinstance(value, Path) else value).removesuffix("...\n").strip()


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("<", "&lt;")
