"""A folder in the navigation stands for its pages, so that a new page needs no line there."""

from pathlib import Path
from typing import Any

from reference import PAGES


def on_config(config: Any) -> Any:
    """Put a list of pages in place of each folder; pages that other hooks make are in the list too."""
    config.nav = [_with_pages(entry, Path(config.docs_dir)) for entry in config.nav]
    return config


def _with_pages(entry: Any, docs: Path) -> Any:
    if not isinstance(entry, dict):
        return entry
    ((title, target),) = entry.items()
    if not target.endswith("/"):
        return entry
    pages = {page.relative_to(docs).as_posix() for page in (docs / target).glob("*.md")}
    return {title: sorted(pages | {page for page in PAGES if page.startswith(target)})}
