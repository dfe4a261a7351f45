"""The page: complete, self-contained, the same bytes each time, and safe whatever the corpus holds."""

import base64
import csv
import dataclasses
import io
import re
from html.parser import HTMLParser

import pytest
from conftest import make_runs

from remoe.analysis.html import escape, visible
from remoe.analysis.page import render
from remoe.analysis.record import load_records
from remoe.analysis.report import draw_figures, draw_report, redraw_report, write_report
from remoe.analysis.table import Table
from remoe.errors import CheckpointError, ConfigError

pytestmark = pytest.mark.xdist_group("report")
HOSTILE = "<script>alert(1)</script><img src=x onerror=alert(1)>\"'&"


class Elements(HTMLParser):
    """Every element of a page with its attributes."""

    def __init__(self, text):
        super().__init__()
        self.found = []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.found.append((tag, dict(attrs)))

    def named(self, tag):
        return [attributes for name, attributes in self.found if name == tag]


@pytest.fixture(scope="module")
def figures(runs):
    return draw_figures(runs)


@pytest.fixture(scope="module")
def page(runs, figures):
    return render(runs, figures)


@pytest.fixture(scope="module")
def page_of_one(runs, tmp_path_factory):
    """The file of a report on one run, which is drawn sooner."""
    return draw_report(runs[:1], tmp_path_factory.mktemp("report") / "one")


def test_every_figure_is_there_with_its_source_and_numbers(page, figures):
    sections = [attributes["id"] for attributes in Elements(page).named("section")]
    assert sections == [*(figure.key for figure in figures), "settings"]
    assert len(figures) == 13
    assert all(figure.says.endswith(".") and figure.source and figure.table.rows for figure in figures)


def test_each_figures_csv_is_in_the_page_itself(page, figures):
    links = [attributes for attributes in Elements(page).named("a") if "download" in attributes]
    assert [link["download"] for link in links] == [f"{figure.key}.csv" for figure in figures]
    head, data = links[3]["href"].split(",", 1)
    assert head == "data:text/csv;charset=utf-8;base64"
    rows = list(csv.reader(io.StringIO(base64.b64decode(data).decode())))
    assert rows[0] == ["run", "step", "layer_0", "layer_1", "layer_2", "layer_3"]
    assert len(rows) == 1 + 2 * 300


def test_nothing_in_the_page_points_elsewhere(page):
    targets = [attrs[key] for _, attrs in Elements(page).found for key in ("src", "href", "xlink:href") if key in attrs]
    assert targets
    assert all(target.startswith(("#", "data:")) for target in targets)
    assert "@import" not in page
    assert not re.search(r"url\((?!#)", page)


def test_the_page_allows_no_network_and_no_script_but_its_own(page):
    policy = next(a["content"] for a in Elements(page).named("meta") if a.get("http-equiv"))
    assert policy.startswith("default-src 'none'; ")
    assert "connect-src" not in policy
    assert "script-src 'sha256-" in policy


def test_the_same_runs_give_the_same_bytes(page, tmp_path):
    assert draw_report(make_runs(), tmp_path / "again.html").read_text(encoding="utf-8") == page


def test_a_report_can_be_drawn_again_from_its_analysis_json(page_of_one, tmp_path):
    again = redraw_report(page_of_one.with_name("analysis.json"), tmp_path / "new" / "page.html")
    assert again.read_text(encoding="utf-8") == page_of_one.read_text(encoding="utf-8")


def test_hostile_names_and_texts_show_as_text(runs, tmp_path):
    run = runs[0]
    counts = dataclasses.replace(run.counts, domains=(HOSTILE, *run.counts.domains[1:]))
    texts = (HOSTILE,) * len(run.token_texts)
    passages = tuple(dataclasses.replace(p, domain=HOSTILE, tokens=(HOSTILE,) * len(p.tokens)) for p in run.passages)
    generations = tuple(dataclasses.replace(g, prompt=HOSTILE, continuation=HOSTILE) for g in run.generations)
    hostile = dataclasses.replace(
        run,
        name=HOSTILE,
        router=HOSTILE,
        corpus={HOSTILE: HOSTILE},
        config={**run.config, HOSTILE: HOSTILE},
        counts=counts,
        token_texts=texts,
        passages=passages,
        generations=generations,
    )
    elements = Elements(draw_report([hostile], tmp_path).read_text(encoding="utf-8"))
    assert len(elements.named("script")) == 1
    assert not elements.named("img")
    assert not [attrs for _, attrs in elements.found if any(key.startswith("on") for key in attrs)]


def test_control_and_direction_characters_are_made_visible():
    assert visible("a\nb\x00\u202ec d") == "a⏎b␀�c␣d"
    assert escape("<&\"'>") == "&lt;&amp;&quot;&#x27;&gt;"


def test_a_csv_cell_is_never_a_formula():
    table = Table(columns=("token", "share"), rows=(("=1+1", -0.5), ("@x", None), ('a"b,c', float("nan"))))
    assert table.to_csv() == 'token,share\n\'=1+1,-0.5\n\'@x,\n"a""b,c",\n'


def test_a_long_table_shows_its_ends_and_says_what_it_leaves_out():
    table = Table(columns=("n",), rows=tuple((n,) for n in range(1000)))
    assert "880 more rows in the CSV file" in table.to_html()
    assert table.to_html().count("<tr>") == 1 + 120 + 1
    assert table.to_csv().count("\n") == 1001


def test_a_folder_gets_report_html_and_analysis_json(page_of_one):
    assert page_of_one.name == "report.html"
    assert page_of_one.parent.name == "one"
    assert [run.name for run in load_records(page_of_one.with_name("analysis.json"))] == ["relu"]


def test_a_report_on_nothing_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="at least one folder"):
        write_report([], tmp_path)


def test_a_folder_that_is_no_run_is_refused_and_nothing_written(tmp_path):
    with pytest.raises(CheckpointError, match="is not a run"):
        write_report([tmp_path], tmp_path / "out" / "report.html")
    assert not (tmp_path / "out").exists()


def test_a_file_that_is_no_analysis_is_refused(tmp_path):
    (tmp_path / "analysis.json").write_text('{"schema": 1}')
    with pytest.raises(CheckpointError, match=r"not the analysis\.json"):
        redraw_report(tmp_path / "analysis.json", tmp_path)
    (tmp_path / "analysis.json").write_text('{"schema": 99, "runs": []}')
    with pytest.raises(CheckpointError, match="schema 99, must be 1"):
        redraw_report(tmp_path / "analysis.json", tmp_path)
