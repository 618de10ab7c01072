"""The report as one HTML file that needs nothing else: no network, no fonts, figures inside."""

from __future__ import annotations

import base64
import json
import re
from collections.abc import Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any
from urllib.parse import quote

import jinja2
from markupsafe import Markup

from me_stats import report
from me_stats.claims import PAPER
from me_stats.record import Finding, Record, plain, write_atomically
from me_stats.report.style import SCREEN_DPI

_MARKS = {
    "reproduced": "●",
    "reproduced at small scale": "◐",
    "refuted as stated": "◆",
    "not testable here": "–",
    "open": "○",
}
_CSS_DPI = 108  # 8 points at 12 pixels; the PNG has twice as many for dense screens


def write_html(
    records: Sequence[Record],
    figures: report.Figures,
    out: Path,
    *,
    title: str = "me_stats report",
    commands: Mapping[str, str] | None = None,
) -> Path:
    """Write the report on `records` to `out`, whole or not at all, and return `out`.

    Parameters
    ----------
    records
        In the order in which the page shows them under a claim.
    figures
        Figures by record name; a record may have none.
    out
        The page. It links to ``records/NAME.json`` beside it.
    title
        Name of the page.
    commands
        The command that makes a record again, by record name; by default ``me-stats reproduce --only NAME``.

    ValueError if a record has a finding on an unlisted claim, two records share a name, or a figure has no image.
    """
    out = Path(out)
    records = report.distinct(records)
    rows = report.evidence(records)
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters |= {
        "pretty": _pretty,
        "slug": lambda text: re.sub(r"\W+", "-", text).strip("-").lower(),
        "anchor": _anchor,
        "brief": report.brief,
        "mark": _MARKS.__getitem__,
        "bound": lambda finding: _pretty(report.upper_bound(finding)),
        "json": lambda value: json.dumps(plain(value), indent=1, ensure_ascii=False),
        "count": report.count,
        "url": quote,
        "alt": _alt,
    }
    page = environment.from_string(_part("template.html.j2")).render(
        title=title,
        outcome=report.outcome(records),
        paper=PAPER,
        tally=report.tally(records),
        rows=rows,
        sections=report.sections(records),
        failures=report.failures(records),
        home={record.name: row.claim for row in reversed(rows) for record in row.records},
        decision=report.decision,
        caveat=report.caveat,
        found=_found,
        place=_place,
        style=Markup(_part("page.css")),
        script=Markup(_part("page.js")),
        checks=report.checks,
        provenance=report.provenance,
        failed={record.name: len(report.failures([record])) for record in records},
        command={record.name: report.command(record, commands) for record in records},
        images={record.name: [_image(f) for f in report.figures_of(record, figures)] for record in records},
        facts=_facts(records),
    )
    write_atomically(out, page if page.endswith("\n") else page + "\n")
    return out


def _part(name: str) -> str:
    return resources.files("me_stats.report").joinpath(name).read_text(encoding="utf-8")


def _anchor(name: str) -> str:
    """A name as an id: the same, without spaces and quotes."""
    return re.sub(r"[^\w.+-]+", "-", name)


def _found(record: Record, claim: str) -> list[tuple[str, Finding]]:
    """(id, finding) of what a record says on one claim."""
    own = [finding for finding in record.findings if finding.claim == claim]
    return [(f"{_anchor(record.name)}-{claim}-{place}", finding) for place, finding in enumerate(own, 1)]


def _place(row: report.Evidence) -> str:
    """The id of the finding that decides."""
    return next(id for record in row.records for id, finding in _found(record, row.claim) if finding is row.deciding)


def _facts(records: Sequence[Record]) -> list[str]:
    """What the whole page rests on, for the line under the heading."""
    models = {str(model.get("name")) for record in records for model in record.models}
    revisions = sorted({text for text in map(report.revision, records) if text})
    versions = sorted({(r.environment.get("versions") or {}).get("me-stats") or "" for r in records} - {""})
    finished = max((record.finished for record in records), default="")
    facts = [
        report.count(len(models), "model") if models else "",
        "me_stats " + ", ".join(versions) if versions else "",
        f"revision {revisions[0]}" if len(revisions) == 1 else f"{len(revisions)} revisions" if revisions else "",
        f"last finished {finished[:10]}" if finished else "",
    ]
    return [fact for fact in facts if fact]


def _image(figure: report.Figure) -> dict[str, Any]:
    content = figure.image.read_bytes()
    kind = "svg+xml" if figure.image.suffix == ".svg" else "png"
    image: dict[str, Any] = {
        "source": f"data:image/{kind};base64,{base64.b64encode(content).decode()}",
        "caption": figure.caption,
        "size": None,
    }
    if kind == "png":  # width and height stand at a fixed place in the header
        width, height = (int.from_bytes(content[at : at + 4], "big") for at in (16, 20))
        image["size"] = tuple(round(pixels * _CSS_DPI / SCREEN_DPI) for pixels in (width, height))
    return image


def _alt(caption: str, record: Record) -> str:
    """The first sentence of the caption; the record's title where there is none."""
    first = re.split(r"(?<=[.;])\s(?![^()]*\))", caption.strip(), maxsplit=1)[0].rstrip(";")
    return first or f"Figure: {record.title}"


def _pretty(text: str) -> Markup:
    """Numbers spelled out in boxes that do not break across lines."""
    escaped = str(Markup.escape(report.pretty(str(text))))
    return Markup(
        re.sub(r"(?:[≤≥=<>]\s)?[−-]?[\d.]+ × 10[⁻⁰-⁹¹²³]+|≤ [\d.]+", r'<span class="n">\g<0></span>', escaped)
    )
