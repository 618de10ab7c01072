"""The page: complete, escaped, deterministic, and loud about failures."""

from __future__ import annotations

import base64
import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pytest

from me_stats.claims import CLAIMS
from me_stats.record import Finding, Record
from me_stats.report import Figure, caveat, checks, decision, evidence, number, outcome, pretty, style
from me_stats.report.html import write_html

VOID = {"meta", "link", "img", "input", "br"}


def finding(claim: str = "C4", **changes: object) -> Finding:
    values: dict = {
        "claim": claim,
        "statement": "lazy against fresh",
        "models": "prose + code",
        "n": "300 laws",
        "statistic": "TV 3.1e-7",
        "tv_upper": 3.66e-7,
        "bound": "measured floor",
        "verdict": "reproduced at small scale",
        "held": True,
        "caveat": "",
    }
    return Finding(**(values | changes))


def record(name: str = "cache_floor", findings: tuple[Finding, ...] = (), **changes: object) -> Record:
    """Test data: no experiment produced it."""
    values: dict = {
        "name": name,
        "title": f"Title of {name}",
        "key": "0123456789abcdef",
        "config": {"n": 300},
        "findings": findings,
        "checks": {"a planted bug is rejected": True},
        "results": {},
        "models": ({"name": "prose", "dtype": "float32"},),
        "environment": {
            "python": "3.11.7",
            "versions": {"me-stats": "0.1.0", "torch": "2.9.0", "scipy": None},
            "git": {"revision": "abcdef0123456789", "dirty": True},
            "machine": "x86_64",
            "cpu_threads": 2,
            "accelerator": None,
        },
        "wall_s": 75.2,
        "finished": "2026-01-02T03:04:05+00:00",
    }
    return Record(**(values | changes))


class Page(HTMLParser):
    """Tags with attributes, and whether every element that was opened was closed in order."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def having(self, tag: str) -> list[dict[str, str | None]]:
        return [attrs for name, attrs in self.tags if name == tag]


def render(tmp_path: Path, records: list[Record], figures: dict | None = None, **options: object) -> str:
    path = write_html(records, figures or {}, tmp_path / "index.html", **options)  # type: ignore[arg-type]
    assert path == tmp_path / "index.html"
    return path.read_text(encoding="utf-8")


@pytest.fixture
def figure(tmp_path: Path) -> list[Path]:
    fig, axes = style.figure()
    axes.plot([1, 2])
    caption = 'The "floor" is 5e-7 (mean; 1 s. each). The rest is detail.'
    return style.save(fig, tmp_path / "figures" / "cache_floor", {"caption": caption})


def test_page_is_well_formed_and_self_contained(tmp_path: Path, figure: list[Path]) -> None:
    text = render(tmp_path, [record(findings=(finding(), finding("C1")))], {"cache_floor": figure})
    page = Page(text)
    assert page.open == []
    ids = [attrs["id"] for _, attrs in page.tags if "id" in attrs]
    assert len(ids) == len(set(ids))
    assert set(CLAIMS) <= set(ids)
    links = [str(attrs["href"]) for attrs in page.having("a") + page.having("link")]
    links += [str(attrs["src"]) for attrs in page.having("img") + page.having("script") if "src" in attrs]
    assert all(re.match(r"data:|#|records/", link) for link in links)
    assert "http:" not in text
    assert "https:" not in text
    assert "NaN" not in text


def test_row_shows_finding_figure_command_and_record(tmp_path: Path, figure: list[Path]) -> None:
    text = render(tmp_path, [record(findings=(finding(caveat="Only L ≤ 64."),))], {"cache_floor": figure})
    page = Page(text)
    assert "All 2 checks held: 1 of the paper’s 15 claims examined in 1 experiment" in text
    assert "3.1 × 10⁻⁷" in text
    assert "≤ 3.7 × 10⁻⁷" in text
    assert "Only L" in text
    assert "me-stats reproduce --only cache_floor" in text
    assert 'href="records/cache_floor.json"' in text
    assert "abcdef0123 with uncommitted changes" in text
    assert "1 min 15 s" in text
    (image,) = page.having("img")
    assert image["alt"] == 'The "floor" is 5e-7 (mean; 1 s. each).'
    assert image["width"] == "351"
    assert base64.b64decode(str(image["src"]).split(",")[1]) == figure[1].read_bytes()


def test_claims_without_findings_are_open_and_have_nothing_to_unfold(tmp_path: Path) -> None:
    text = render(tmp_path, [record(findings=(finding("C4"),))])
    rows = dict(re.findall(r'<li id="(C\d+)"(.*?)(?=<li id|</ol>)', text, flags=re.S))
    assert 'class="quiet"' in rows["C5"]
    assert "<details" not in rows["C5"]
    assert "<details" in rows["C4"]
    assert text.count('class="quiet"') == len(CLAIMS) - 1


def test_everything_is_escaped(tmp_path: Path) -> None:
    evil = "<script>alert(1)</script> & \"'"
    bad = finding(statement=evil, models=evil, n=evil, statistic=evil, bound=evil, caveat=evil)
    hostile = record("a b&c", (bad,), title=evil, checks={evil: False}, config={"x": evil}, models=({"name": evil},))
    text = render(tmp_path, [hostile], title=evil, commands={"a b&c": evil})
    page = Page(text)
    assert len(page.having("script")) == 1
    assert "<script>alert" not in text
    assert 'href="records/a%20b%26c.json"' in text


def test_failed_check_is_announced_first_and_its_row_is_open(tmp_path: Path) -> None:
    bad = record(findings=(finding("C4"),), checks={"good one": True, "session is exact": False})
    text = render(tmp_path, [bad, record("other", (finding("C1"),))])
    assert "1 of 5 checks failed" in text
    alarm, table = text.index('class="alarm"'), text.index('class="claims"')
    assert alarm < text.index("session is exact") < table
    assert '<a href="#cache_floor">cache_floor</a>' in text
    assert '<section class="experiment" id="cache_floor"' in text
    assert '<li id="C4"><details open>' in text
    assert '<li id="C1"><details>' in text
    assert "1 check failed" in text


def test_finding_that_did_not_hold_fails_even_if_the_checks_say_otherwise(tmp_path: Path) -> None:
    row = finding(held=False)
    name = f"{row.claim}: {row.statement} ({row.models})"
    text = render(tmp_path, [record(findings=(row,), checks={name: True})])
    assert "1 of 1 check failed" in text
    assert '<tr id="cache_floor-C4-1" class="failed">' in text


def test_failure_of_a_record_without_findings_is_linked(tmp_path: Path) -> None:
    text = render(tmp_path, [record("calibration", checks={"size is right": False})])
    assert '<a href="#calibration">calibration</a>' in text
    assert '<li id="calibration"><details open>' in text


def test_same_records_same_bytes(tmp_path: Path, figure: list[Path]) -> None:
    records = [record("b", (finding("C1"),)), record("cache_floor", (finding(), finding("C1"))), record("a")]
    figures = {"cache_floor": figure}
    text = render(tmp_path, records, figures)
    assert text == render(tmp_path, records, figures)
    assert text.index("Title of b") < text.index("Title of cache_floor")
    swapped = render(tmp_path, records[::-1], figures)
    assert swapped.index("Title of cache_floor") < swapped.index("Title of b")


def test_no_records(tmp_path: Path) -> None:
    text = render(tmp_path, [])
    assert "Nothing has been checked yet" in text
    assert Page(text).open == []


def test_sparse_environment_is_enough(tmp_path: Path) -> None:
    text = render(tmp_path, [record(findings=(finding(),), environment={"git": None}, models=(), checks={})])
    assert "The one check held" in text
    assert "None" not in text


def test_svg_figure(tmp_path: Path) -> None:
    path = tmp_path / "drawing.svg"
    path.write_text("<svg xmlns='http://www.w3.org/2000/svg'/>")
    text = render(tmp_path, [record(findings=(finding(),))], {"cache_floor": [Figure((path,), "")]})
    (image,) = Page(text).having("img")
    assert str(image["src"]).startswith("data:image/svg+xml;base64,")
    assert image["alt"] == "Figure: Title of cache_floor"


@pytest.mark.parametrize(
    ("records", "figures", "message"),
    [
        ([record(findings=(finding("C99"),))], {}, "C99"),
        ([record(), record()], {}, "two records"),
        ([record(findings=(finding(),))], {"cache_floor": [Path("only.pdf")]}, r"\.png or \.svg"),
        ([record(findings=(finding(tv_upper=float("nan")),))], {}, "NaN"),
    ],
)
def test_bad_input_leaves_no_page(tmp_path: Path, records: list[Record], figures: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        write_html(records, figures, tmp_path / "index.html")
    assert list(tmp_path.iterdir()) == []


def test_verdict_and_deciding_finding_are_the_most_doubtful() -> None:
    rows = (
        finding("C9", verdict="reproduced", tv_upper=0.9),
        finding("C9", verdict="refuted as stated", tv_upper=None, statistic="no bound"),
        finding("C9", verdict="refuted as stated", tv_upper=0.1),
    )
    row = evidence([record(findings=rows)])[8]
    assert (row.claim, row.verdict) == ("C9", "refuted as stated")
    assert row.deciding == rows[2]


def test_the_finding_that_answers_the_claim_decides() -> None:
    """The kind of finding that a claim's lead names, on the models that do worst; else the weakest bound."""
    kinds = (
        finding("C4", statement="lazy laws, float32", tv_upper=1e-6),
        finding("C4", statement="lazy laws, float32", tv_upper=8e-6, caveat="one token missing is far"),
        finding("C4", statement="lazy laws, bfloat16", tv_upper=0.1, bound="measured floor, bfloat16"),
    )
    row = evidence([record("cache_floor-a", kinds)])[3]
    assert row.deciding == kinds[1]
    assert decision(row) == "TV ≤ 8 × 10⁻⁶ (measured floor)"
    assert caveat(row) == "elsewhere TV ≤ 0.1 (measured floor, bfloat16)"
    assert evidence([record("else", kinds)])[3].deciding == kinds[2]
    broken = replace(kinds[0], held=False)
    assert evidence([record("cache_floor-a", (*kinds, broken))])[3].deciding == broken


def test_a_refuted_claim_shows_the_gap_and_the_clause_that_limits_it() -> None:
    gap = finding(
        "C9", statement="published CE against published ME, k = 5", verdict="refuted as stated", tv_upper=0.3,
        statistic="TV 0.27 a step", caveat="tokens (9%; or so) are excluded; accuracies may agree",
    )  # fmt: skip
    row = evidence([record("transform_order", (gap,))])[8]
    assert (decision(row), caveat(row)) == ("TV 0.27 a step", "accuracies may agree")
    alone = evidence([record(findings=(finding("C3"),))])[2]
    assert caveat(alone) == "on prose + code only"
    assert (decision(evidence([])[0]), caveat(evidence([])[0])) == ("", "")


def test_an_experiment_of_several_claims_holds_its_figure_once(tmp_path: Path, figure: list[Path]) -> None:
    text = render(tmp_path, [record(findings=(finding("C1"), finding("C4"), finding("C4")))], {"cache_floor": figure})
    page = Page(text)
    (image,) = page.having("img")
    assert (image["loading"], image["decoding"]) == ("lazy", "async")
    ids = {attrs["id"] for _, attrs in page.tags if "id" in attrs}
    assert {"cache_floor", "C4-cache_floor", "cache_floor-C1-1", "cache_floor-C4-1", "cache_floor-C4-2"} <= ids
    assert 'data-from="cache_floor"' in text
    assert all(str(a["href"])[1:] in ids for a in page.having("a") if str(a["href"]).startswith("#"))


def luminance(color: str) -> float:
    parts = [int(color[at : at + 2], 16) / 255 for at in (1, 3, 5)]
    red, green, blue = (c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in parts)
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


@pytest.mark.parametrize("theme", [0, 1])
def test_text_stands_out_from_its_ground(tmp_path: Path, theme: int) -> None:
    """WCAG 2 contrast of at least 4.5, light and dark."""
    block = re.findall(r"--page: .*?}", render(tmp_path, []), flags=re.S)[theme]
    colors = dict(re.findall(r"--(\w+): (#\w{6})", block))
    for ink in ("ink", "soft", "link", "good", "part", "gap", "none", "bad"):
        for ground in ("page", "card", "wash", "badwash"):
            low, high = sorted(luminance(colors[name]) for name in (ink, ground))
            assert (high + 0.05) / (low + 0.05) >= 4.5, (ink, ground)


def test_checks_of_two_findings_with_one_name_both_count() -> None:
    one = record(findings=(finding(held=False), finding()))
    assert checks(one)["C4: lazy against fresh (prose + code)"] is False
    assert outcome([one]).startswith("1 of 2 checks failed")
    assert outcome([replace(one, findings=(), checks={})]).startswith("No check was made")


def test_numbers() -> None:
    assert number(1e-3, up=True) == "0.001"
    assert number(0.0120001, up=True) == "0.013"
    assert number(9.96e-7, up=True) == "10⁻⁶"
    assert number(-1.5e-9) == "−1.5 × 10⁻⁹"
    assert [number(x) for x in (0.0, 0.5, 1.0, float("inf"))] == ["0", "0.5", "1", "∞"]
    assert (
        pretty("rev 7e21468, 1e-3, v1.2e3, x2e5, 4.8E+05 steps") == "rev 7e21468, 10⁻³, v1.2e3, x2e5, 4.8 × 10⁵ steps"
    )
