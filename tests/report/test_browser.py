"""The page in a browser: quiet, without network, no wider than a phone, found by address and by words."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from me_stats import reproduce as job
from me_stats.claims import CLAIMS
from me_stats.record import Record
from me_stats.report import sections
from me_stats.report.html import write_html
from tests.report import browser as chromium

ROOT = Path(__file__).parents[2]
WIDTHS = {"desktop": 1280, "phone": 390}


def committed() -> list[Record]:
    """The records of the repository; one, which has no finding, with a check that failed."""
    records = [Record.load(path) for path in (ROOT / "experiments" / "results").glob("*.json")]
    records = sorted(records, key=lambda record: (job.rank(record.name), record.name))
    return [replace(r, checks={**r.checks, "planted failure": r.name != "calibration"}) for r in records]


@pytest.fixture(scope="module")
def records() -> list[Record]:
    return committed()


@pytest.fixture(scope="module")
def page(records: list[Record], tmp_path_factory: pytest.TempPathFactory) -> str:
    figures = {r.name: [ROOT / "figures" / f"{r.name}.png"] for r in records}
    drawn = {name: paths for name, paths in figures.items() if paths[0].exists()}
    return write_html(records, drawn, tmp_path_factory.mktemp("report") / "index.html").as_uri()


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[chromium.Browser]:
    program = chromium.find()
    if program is None:
        pytest.skip("no Chromium or Chrome on this machine")
    with chromium.Browser(program, tmp_path_factory.mktemp("profile")) as running:
        yield running


def visible(browser: chromium.Browser, name: str) -> bool:
    """Whether the element with this id is rendered, and its top within the window."""
    script = f"""(() => {{
      const element = document.getElementById({name!r}), box = element.getBoundingClientRect();
      return element.checkVisibility() && box.height > 0 && box.top > -2 && box.top < innerHeight;
    }})()"""
    return bool(browser.evaluate(script))


def search(browser: chromium.Browser, words: str) -> str:
    """Type into the search field; what it says then."""
    browser.evaluate(f"""(() => {{
      const field = document.getElementById("page-filter");
      field.value = {words!r};
      field.dispatchEvent(new Event("input", {{bubbles: true}}));
    }})()""")
    return str(browser.evaluate('document.getElementById("page-shown").textContent'))


def rows(browser: chromium.Browser) -> list[str]:
    """The ids of the rows that are shown."""
    script = '[...document.querySelectorAll(".claims > li")].filter(row => row.checkVisibility()).map(row => row.id)'
    found: list[str] = browser.evaluate(script)
    return found


# What reaches beyond the screen though no box around it scrolls. A phone widens innerWidth to what a page asks for.
WIDE = """[...document.querySelectorAll("body *")].filter(element =>
  element.checkVisibility() && element.getBoundingClientRect().right > screen.width + 1
  && !element.closest(".wide, .paper, pre, .sr, thead")).map(element => element.outerHTML.slice(0, 80)).slice(0, 5)"""
# Whatever a finger must hit, links within sentences and labels aside.
SMALL = """[...document.querySelectorAll("summary, button, input, .run a, .stop, .alarm a")]
  .filter(element => element.checkVisibility() && element.getBoundingClientRect().height < 39.5)
  .map(element => element.outerHTML.slice(0, 80))"""


@pytest.mark.parametrize(("size", "dark"), [("desktop", False), ("phone", True)])
def test_no_message_no_request_no_sideways_scroll(browser: chromium.Browser, page: str, size: str, dark: bool) -> None:
    browser.screen(WIDTHS[size], touch=size == "phone", dark=dark)
    browser.open(page)
    fits = f"document.documentElement.scrollWidth <= {WIDTHS[size]}"
    assert browser.evaluate(fits)
    browser.evaluate('document.getElementById("page-all").click()')
    assert browser.evaluate('document.querySelectorAll("details:not(.more):not([open])").length') == 0
    browser.evaluate('document.querySelectorAll(".more").forEach(fold => { fold.open = true; })')
    browser.evaluate("new Promise(done => requestAnimationFrame(() => requestAnimationFrame(done)))")
    assert browser.evaluate(fits)
    assert browser.evaluate(WIDE) == []
    if size == "phone":
        assert browser.evaluate(SMALL) == []
    assert browser.complaints() == []
    assert browser.requests() == []
    browser.evaluate('document.querySelector("main").insertAdjacentHTML("beforeend", "<p style=width:2000px>x</p>")')
    assert not browser.evaluate(fits)  # the control
    assert browser.evaluate(WIDE)


def test_a_request_would_be_seen(browser: chromium.Browser, tmp_path: Path) -> None:
    """The control: a page that asks for something and writes to the console."""
    bad = tmp_path / "bad.html"
    bad.write_text('<img src="https://example.invalid/a.png"><script>console.warn("x"); nothing.here</script>')
    browser.open(bad.as_uri())
    assert browser.requests() == ["https://example.invalid/a.png"]
    assert len(browser.complaints()) >= 2


@pytest.mark.parametrize("size", WIDTHS)
def test_addresses_lead_into_closed_rows(
    browser: chromium.Browser, page: str, records: list[Record], size: str
) -> None:
    browser.screen(WIDTHS[size], touch=size == "phone")
    record = next(record for record in records if record.name == "transform_order-siblings-mixed")
    finding = f"{record.name}-{record.findings[0].claim}-1"
    names = ("C9", record.name, finding, "power", "C9-transform_order-siblings-mixed")
    for name in names if size == "desktop" else (finding, "C9-transform_order-siblings-mixed"):
        browser.open(f"{page}#{name}")
        assert visible(browser, name), name
        assert browser.evaluate(f"document.getElementById({name!r}).querySelector(':scope > details')?.open ?? true"), (
            name
        )
        assert browser.complaints() == []
    assert browser.evaluate('document.querySelectorAll("#C9 .experiment figure.copied").length > 0')
    browser.open(f"{page}#C9")
    browser.evaluate(f'document.querySelector("a[href=\\"#{finding}\\"]").click()')
    browser.evaluate("new Promise(done => setTimeout(done, 100))")
    assert visible(browser, finding)
    browser.evaluate("history.back(), new Promise(done => setTimeout(done, 300))")
    assert browser.evaluate("location.hash") == "#C9"
    assert visible(browser, "C9")
    for nowhere in ("%", "nowhere", "%E0%A4%A"):
        browser.evaluate(f"location.hash = {nowhere!r}")
    assert browser.complaints() == []


def test_search_counts_remembers_and_clears(browser: chromium.Browser, page: str, records: list[Record]) -> None:
    browser.screen(WIDTHS["desktop"])
    browser.open(page)
    everything = rows(browser)
    others = sum(len(part) for _, part in sections(records))
    assert len(everything) == len(CLAIMS) + others
    browser.press("/")
    assert browser.evaluate("document.activeElement.id") == "page-filter"
    assert (
        search(browser, "refuted stated")
        == f"{len(rows(browser))} of {len(CLAIMS)} claims, 0 of {others} other experiments"
    )
    assert "C9" in rows(browser)
    assert "C3" not in rows(browser)
    search(browser, "accuracies may still agree")  # a caveat
    assert "C9" in rows(browser)
    search(browser, "variance_reduction-SIBLINGS")  # an experiment
    assert rows(browser) == ["C14"]
    search(browser, "power_one_step")
    assert rows(browser) == ["power_one_step"]
    assert search(browser, "no such word") == f"0 of {len(CLAIMS)} claims, 0 of {others} other experiments"
    assert browser.evaluate('document.getElementById("page-nothing").checkVisibility()')
    browser.press("Escape")
    assert rows(browser) == everything
    assert browser.evaluate("location.hash") == ""
    search(browser, "bfloat16 λ")
    kept = rows(browser)
    address = browser.evaluate("location.href")
    browser.open(address)
    assert rows(browser) == kept != everything
    browser.evaluate('location.hash = "C3"')  # a row that the search hides
    browser.evaluate("new Promise(done => setTimeout(done, 100))")
    assert visible(browser, "C3")
    assert browser.complaints() == []


def test_a_failed_check_leads_to_its_experiment(browser: chromium.Browser, page: str) -> None:
    browser.screen(WIDTHS["phone"], touch=True)
    browser.open(page)
    assert visible(browser, "page-failed") or browser.evaluate(
        'document.getElementById("page-failed").checkVisibility()'
    )
    assert "planted failure" in browser.evaluate('document.querySelector(".alarm").textContent')
    browser.evaluate('document.querySelector(".alarm a").click(), new Promise(done => setTimeout(done, 100))')
    assert visible(browser, "calibration")
    assert browser.evaluate('document.querySelector("#calibration .checks .failed").checkVisibility()')


def test_everything_is_there_without_scripts_and_on_paper(browser: chromium.Browser, page: str) -> None:
    browser.send("Emulation.setScriptExecutionDisabled", value=True)
    try:
        browser.open(page)
        assert browser.evaluate('document.getElementById("page-filter").checkVisibility()') is False
        assert len(rows(browser)) >= len(CLAIMS)
        browser.evaluate('document.querySelector("#C9 > details > summary").click()')
        assert browser.evaluate('document.querySelector("#C9 table").checkVisibility()')
    finally:
        browser.send("Emulation.setScriptExecutionDisabled", value=False)
    browser.open(page)
    browser.send("Emulation.setEmulatedMedia", media="print")
    browser.evaluate('dispatchEvent(new Event("beforeprint"))')
    assert browser.evaluate('[...document.querySelectorAll("figure, table")].every(part => part.checkVisibility())')
    browser.send("Emulation.setEmulatedMedia", media="")


def test_pictures_can_be_decoded(browser: chromium.Browser, page: str) -> None:
    browser.screen(WIDTHS["phone"], touch=True)
    browser.open(f"{page}#C4")
    script = '(async image => { await image.decode(); return image.naturalWidth; })(document.querySelector("#C4 img"))'
    assert browser.evaluate(script) > 0
