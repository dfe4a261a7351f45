"""Makes pages that are written for the repository readable as a site: what lies outside docs/ is named, not linked."""

import re
from pathlib import PurePosixPath
from posixpath import normpath
from typing import Any

LINK = re.compile(r"(?<!!)\[([^\]]+)\]\(((?:\.\./)+[^)#]+)(#[^)]*)?\)")
COMMENT = re.compile(r"^<!--.*?-->\n", re.MULTILINE)


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Replace links to files of the repository by their path, and drop marks that fill tables in."""
    folder = PurePosixPath("docs") / PurePosixPath(page.file.src_uri).parent

    def named(link: re.Match[str]) -> str:
        target = normpath(str(folder / link[2]))
        if target.startswith("docs/"):
            return link[0]
        return link[1] if link[1].strip("`") == target else f"{link[1]} (`{target}`)"

    return LINK.sub(named, COMMENT.sub("", markdown))
