"""A report of really trained runs, opened in a headless Chromium: drawn, silent, offline, dark, and on a phone."""

import base64

import browser
import pytest
import screenshots

from remoe.analysis import write_report

pytestmark = [pytest.mark.browser, pytest.mark.xdist_group("report")]

DRAWN = """Object.fromEntries([...document.querySelectorAll("section.figure:not(#settings)")].map(section => [
  section.id, [...section.querySelectorAll(".body")].map(body => {
    const box = (body.querySelector("svg") ?? body.firstElementChild).getBoundingClientRect();
    return [box.width, box.height, body.querySelectorAll("path, span, td, li, h4").length];
  })]))"""

EXPECTED = [
    "summary", "loss-curves", "stages", "layer-sparsity", "load-map", "domain-share", "domain-activity",
    "token-frequency", "expert-tokens", "flips", "text-sample", "generated",
]  # fmt: skip


@pytest.fixture(scope="module")
def report(trained_runs, tmp_path_factory):
    return write_report(trained_runs, tmp_path_factory.mktemp("report") / "report.html")


@pytest.fixture(scope="module")
def tab():
    program = browser.find()
    if program is None:
        pytest.skip("no Chromium on this machine: install one, or name its program in $CHROMIUM")
    with browser.browse(program) as page:
        yield page


def test_every_figure_is_drawn_without_an_error_or_a_request(tab, report):
    tab.show(width=1240)
    tab.open(report.as_uri())
    drawn = tab.evaluate(DRAWN)
    assert list(drawn) == EXPECTED
    for key, charts in drawn.items():
        assert charts, key
        assert all(width > 100 and height > 30 and marks > 0 for width, height, marks in charts), (key, charts)
    assert tab.errors == []
    assert tab.requests == [report.as_uri()]


@pytest.mark.parametrize("width", [390, 768, 1240])
@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
def test_the_page_fits_its_window(tab, report, width, dark):
    tab.show(width=width, dark=dark)
    tab.open(report.as_uri())
    assert tab.evaluate("document.documentElement.scrollWidth") <= width
    wider = tab.evaluate(
        "[...document.querySelectorAll('main svg, main h2, main p, main .legend, .tile')]"
        f".filter(e => e.getBoundingClientRect().right > {width}).map(e => e.outerHTML.slice(0, 80))"
    )
    assert wider == []


def test_text_in_the_charts_is_readable_on_a_phone(tab, report):
    tab.show(width=390)
    tab.open(report.as_uri())
    smallest = tab.evaluate(
        "Math.min(...[...document.querySelectorAll('svg text')].map(t => "
        "parseFloat(getComputedStyle(t).fontSize) * t.ownerSVGElement.getScreenCTM().a))"
    )
    assert smallest >= 8


def test_dark_follows_the_system_and_the_switch_overrules_it(tab, report):
    background = "getComputedStyle(document.body).backgroundColor"
    ink = "getComputedStyle(document.querySelector('svg text')).fill"
    tab.show(width=1240, dark=True)
    tab.open(report.as_uri())
    assert tab.evaluate(background) == "rgb(14, 17, 22)"
    assert tab.evaluate(ink) == "rgb(231, 234, 239)"
    tab.evaluate("document.querySelector('.theme').click()")
    assert tab.evaluate(background) == "rgb(244, 245, 247)"
    assert tab.evaluate(ink) == "rgb(26, 30, 36)"
    tab.evaluate("document.querySelector('.theme').click()")
    tab.evaluate("document.querySelector('.theme').click()")
    assert tab.evaluate("'theme' in document.documentElement.dataset") is False


def test_a_csv_link_holds_the_rows_that_its_table_shows(tab, report):
    tab.show(width=1240)
    tab.open(report.as_uri())
    link = "document.querySelector('#load-map a.csv')"
    lines = base64.b64decode(tab.evaluate(f"{link}.href").split(",", 1)[1]).decode().splitlines()
    assert tab.evaluate(f"{link}.download") == "load-map.csv"
    assert lines[0] == "run,layer,expert,share_of_tokens"
    assert len(lines) - 1 == tab.evaluate("document.querySelectorAll('#load-map tbody tr').length") == 2 * 3 * 4


def test_numbers_are_folded_away_until_they_are_wanted(tab, report):
    tab.show(width=390)
    tab.open(report.as_uri())
    assert tab.evaluate("[...document.querySelectorAll('.numbers details')].every(d => !d.open)")
    tab.evaluate("document.querySelectorAll('details').forEach(d => d.open = true)")
    assert tab.evaluate("document.documentElement.scrollWidth") <= 390


def test_readmes_pictures_are_taken(tab, report, tmp_path):
    taken = screenshots.take(tab, report, tmp_path)
    assert {"report-light.png", "report-dark.png", "report-phone.png", "stages-dark.png"} <= {p.name for p in taken}
    assert all(path.read_bytes().startswith(b"\x89PNG") and path.stat().st_size > 5000 for path in taken)
