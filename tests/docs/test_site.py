"""The site builds strictly, without a network, and its reference leaves nothing out."""

import os
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest

import remoe
from remoe.config import describe_keys
from remoe.moe.routers import ROUTERS, option_names
from remoe.recipes import names
from remoe.training.config import TrainConfig
from tests.docs.conftest import DOCS

pytestmark = [pytest.mark.heavy, pytest.mark.xdist_group("site")]  # built once


@pytest.fixture(scope="module", name="site")
def _site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("mkdocstrings", reason="needs the extra docs")
    folder = tmp_path_factory.mktemp("site")
    finished = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(folder)],
        cwd=DOCS.parent,
        env=os.environ | {"NO_MKDOCS_2_WARNING": "1", "HTTPS_PROXY": "http://127.0.0.1:9"},  # nothing answers there
        capture_output=True,
        text=True,
        timeout=280,
        check=False,
    )
    assert finished.returncode == 0, finished.stderr[-3000:]
    return folder


class Needs(HTMLParser):
    """What a page asks for when it is opened."""

    def __init__(self, page: Path) -> None:
        super().__init__()
        self.addresses: list[str] = []
        self.feed(page.read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = dict(attrs)
        loads = {"script": "src", "img": "src", "iframe": "src", "link": "href"}
        if values.get("rel") != "canonical" and (address := values.get(loads.get(tag, ""))):
            self.addresses.append(address)


def text_of(page: Path) -> str:
    """A page's article without its tags."""
    article = re.search(r"<article.*?</article>", page.read_text(encoding="utf-8"), flags=re.DOTALL)
    assert article
    return re.sub(r"<[^>]+>", "", article[0])


def test_every_page_of_the_folder_is_built_and_asks_nobody_for_anything(site: Path):
    pages = {page.relative_to(DOCS).with_suffix(".html") for page in DOCS.rglob("*.md")}
    assert pages <= {page.relative_to(site) for page in site.rglob("*.html")}
    for page in site.rglob("*.html"):
        outside = [address for address in Needs(page).addresses if re.match(r"(https?:)?//", address)]
        assert outside == [], page


def test_the_hooks_themselves_are_not_published(site: Path):
    assert not (site / "hooks").exists()


def test_the_reference_names_every_public_name(site: Path):
    page = (site / "reference" / "python.html").read_text(encoding="utf-8")
    missing = [name for name in remoe.__all__ if f"remoe.{name}" not in page]
    assert missing == []


def test_the_reference_has_every_key_with_its_meaning(site: Path):
    text = " ".join(text_of(site / "reference" / "config.html").split())
    assert [key for key, _, _ in describe_keys(TrainConfig) if key not in text] == []
    assert "router name, or {name: NAME, option: value, ...}" in text
    assert "G: E*G experts of width F/G, k*G active" in text


def test_the_reference_has_every_command_and_recipe(site: Path):
    from typer.main import get_command

    from remoe.cli import app

    text = text_of(site / "reference" / "command-line.html")
    commands = get_command(app).commands  # type: ignore[attr-defined]
    assert [name for name in commands if f"remoe {name}" not in text] == []
    recipes = text_of(site / "reference" / "recipes.html")
    assert [name for name in names() if name not in recipes] == []


@pytest.mark.parametrize("router", ROUTERS)
def test_the_reference_has_every_option_of_each_router(site: Path, router: str):
    page = (site / "reference" / "routers.html").read_text(encoding="utf-8")
    section = re.search(rf'<h2 id="{router}".*?(?=<h2 |</article>)', page, flags=re.DOTALL)
    assert section
    text = re.sub(r"<[^>]+>", "", section[0])
    assert [option for option in option_names(router) if option not in text] == []
