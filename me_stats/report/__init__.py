"""The report: figures, one HTML page, its Markdown twin and ``paper_repro.md``, all from records alone.

This module holds what the writers share: which records bear on which claim, which checks failed, and how numbers are
spelled. `html`, `markdown` and `style` write. Nothing here reads a clock, so the same records give the same bytes.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from decimal import ROUND_CEILING, ROUND_HALF_EVEN, Context, Decimal
from pathlib import Path

from me_stats.claims import CLAIMS, verdict
from me_stats.record import Finding, Record, experiment_of
from me_stats.report import deciding

_SUPERSCRIPTS = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")
# A number in scientific notation that stands alone, and too short to be a hash such as 7e21468.
_SCIENTIFIC = re.compile(r"(?<![\w.])(\d(?:\.\d+)?)[eE]([+-]?\d{1,3})(?!\w|\.\d)")
_IMAGES = (".png", ".svg")

ABOUT_TESTS = ("generate_judged", "calibration", "tv_bounds", "power", "power_one_step")
"""Experiments that say how far the tests can be trusted, in the order of the report."""


@dataclass(frozen=True)
class Figure:
    """One figure: its files, which share a stem, and the text under it; the first sentence also serves as alt text."""

    paths: tuple[Path, ...]
    caption: str = ""

    @property
    def stem(self) -> str:
        return self.image.stem

    @property
    def image(self) -> Path:
        """The file that a page can show; ValueError if there is none."""
        for suffix in _IMAGES:
            for path in self.paths:
                if path.suffix == suffix:
                    return path
        raise ValueError(f"a figure needs a .png or .svg file, got {[path.name for path in self.paths]}")


Figures = Mapping[str, Sequence[Path | Figure]]
"""Figures by record name, as `Figure` or as what `style.save` returned."""


@dataclass(frozen=True)
class Evidence:
    """What the records say about one claim: its findings, the records that hold them, and the verdict."""

    claim: str
    statement: str
    verdict: str
    findings: tuple[Finding, ...]
    records: tuple[Record, ...]

    @property
    def deciding(self) -> Finding | None:
        """The finding behind the verdict, as `me_stats.report.deciding` chooses it."""
        return deciding.choose(self.claim, self.verdict, self.named)

    @property
    def named(self) -> tuple[tuple[str, Finding], ...]:
        """(record, finding) for each finding."""
        return tuple((record.name, f) for record in self.records for f in record.findings if f.claim == self.claim)

    @property
    def failures(self) -> tuple[tuple[str, str], ...]:
        """(record, check) for each check that failed in a record behind this claim."""
        return failures(self.records)


def evidence(records: Iterable[Record]) -> tuple[Evidence, ...]:
    """One `Evidence` for each claim, C1 to C15; findings and records keep the order of `records`.

    ValueError if a finding is on a claim that `me_stats.claims` does not list: it would otherwise vanish.
    """
    records = distinct(records)
    for record in records:
        for finding in record.findings:
            if finding.claim not in CLAIMS:
                raise ValueError(f"record {record.name!r} has a finding on {finding.claim!r}, which is no listed claim")
    rows = []
    for claim, statement in CLAIMS.items():
        found = [(f, record) for record in records for f in record.findings if f.claim == claim]
        findings = tuple(finding for finding, _ in found)
        behind = {record.name: record for _, record in found}
        rows.append(Evidence(claim, statement, verdict(findings), findings, tuple(behind.values())))
    return tuple(rows)


def distinct(records: Iterable[Record]) -> tuple[Record, ...]:
    """The records in their order; ValueError if two share a name, because they would share a file."""
    kept = {}
    for record in records:
        if record.name in kept:
            raise ValueError(f"two records are called {record.name!r}: pass one of them")
        kept[record.name] = record
    return tuple(kept.values())


def checks(record: Record) -> dict[str, bool]:
    """The record's checks with those of its findings; a name that failed once has failed."""
    named = dict(record.checks)
    for finding in record.findings:
        name = f"{finding.claim}: {finding.statement} ({finding.models})"
        named[name] = named.get(name, True) and finding.held
    return named


def sections(records: Iterable[Record]) -> tuple[tuple[str, tuple[Record, ...]], ...]:
    """(heading, records) of the records that bear on no claim: measurements, then what shows how good our tests are."""
    others = [record for record in records if not record.findings]
    about_tests = tuple(record for record in others if experiment_of(record.name) in ABOUT_TESTS)
    parts = (
        ("Other experiments", tuple(record for record in others if record not in about_tests)),
        ("How far the tests can be trusted", about_tests),
    )
    return tuple(part for part in parts if part[1])


def failures(records: Iterable[Record]) -> tuple[tuple[str, str], ...]:
    """(record, check) for each check that failed."""
    return tuple((record.name, name) for record in records for name, held in checks(record).items() if not held)


def outcome(records: Sequence[Record]) -> str:
    """What was checked and how it went, in one sentence.

    >>> outcome([])
    'Nothing has been checked yet: there are no records'
    """
    if not records:
        return "Nothing has been checked yet: there are no records"
    touched = sum(bool(row.findings) for row in evidence(records))
    total, failed = sum(len(checks(record)) for record in records), len(failures(records))
    if failed:
        result = f"{failed} of {count(total, 'check')} failed"
    else:
        result = {0: "No check was made", 1: "The one check held"}.get(total, f"All {total} checks held")
    return f"{result}: {touched} of the paper’s {len(CLAIMS)} claims examined in {count(len(records), 'experiment')}"


def tally(records: Sequence[Record]) -> dict[str, int]:
    """How many claims carry each verdict, from the strongest support to open."""
    verdicts = [row.verdict for row in evidence(records)]
    order = ("reproduced", "reproduced at small scale", "refuted as stated", "not testable here", "open")
    return {name: verdicts.count(name) for name in order if name in verdicts}


def provenance(record: Record) -> dict[str, str]:
    """Where a record comes from, as label and text; what it does not say is left out."""
    env = record.environment
    versions = ", ".join(f"{name} {version}" for name, version in (env.get("versions") or {}).items() if version)
    threads = env.get("cpu_threads")
    hardware = [env.get("machine"), count(threads, "CPU thread") if threads else None, env.get("accelerator")]
    rows = {
        "Revision": revision(record),
        "Packages": versions,
        "Python": env.get("python") or "",
        "Hardware": ", ".join(part for part in hardware if part),
        "Wall time": duration(record.wall_s),
        "Finished": record.finished,
        "Key": record.key,
    }
    return {label: str(text) for label, text in rows.items() if text}


def revision(record: Record) -> str:
    """The git revision, shortened, with a word on uncommitted changes; empty if the record has none."""
    git = record.environment.get("git")
    if not git:
        return ""
    return str(git["revision"])[:10] + (" with uncommitted changes" if git.get("dirty") else "")


def command(record: Record, commands: Mapping[str, str] | None = None) -> str:
    """The shell command that makes this record again."""
    return (commands or {}).get(record.name, f"me-stats reproduce --only {record.name}")


def figures_of(record: Record, figures: Figures) -> tuple[Figure, ...]:
    """The record's figures; plain paths are gathered by stem and take the caption that `style.save` put in the PNG."""
    from me_stats.report.style import read_data

    entries = figures.get(record.name, ())
    stems: dict[Path, list[Path]] = {}
    for path in (Path(entry) for entry in entries if not isinstance(entry, Figure)):
        stems.setdefault(path.with_suffix(""), []).append(path)
    gathered = [entry for entry in entries if isinstance(entry, Figure)]
    for paths in stems.values():
        figure = Figure(tuple(paths))
        caption = read_data(figure.image).get("caption", "") if figure.image.suffix == ".png" else ""
        gathered.append(Figure(figure.paths, str(caption)))
    return tuple(gathered)


def upper_bound(finding: Finding) -> str:
    """The upper bound on TV, rounded up so that it stays one; a dash where the finding bounds something else."""
    return "–" if finding.tv_upper is None else f"≤ {number(finding.tv_upper, up=True)}"


def decision(row: Evidence) -> str:
    """The number behind the verdict of a claim: a bound on TV with its kind, else the statistic.

    A refuted claim shows the statistic: how large the gap is, and not what it stays below.
    """
    finding = row.deciding
    if finding is None:
        return ""
    if finding.tv_upper is None or finding.verdict == "refuted as stated":
        return pretty(finding.statistic)
    return _bounded(finding)


def caveat(row: Evidence) -> str:
    """What most limits the result that decides, in a few words: a weaker bound elsewhere, a caveat, or its models."""
    finding = row.deciding
    if finding is None:
        return ""
    weaker = deciding.elsewhere(finding, row.named)
    if weaker is not None:
        return f"elsewhere {_bounded(weaker)}"
    return pretty(deciding.clause(row.claim, finding.caveat)) or f"on {finding.models} only"


def brief(models: str) -> str:
    """Models of a finding, with a remark that all of them share said once.

    >>> brief("a (random weights) + b (random weights), bfloat16")
    'a + b (random weights), bfloat16'
    """
    remarks = re.findall(r" \([^()]*\)", models)
    if len(remarks) < 2 or len(set(remarks)) > 1 or len(remarks) != models.count(" + ") + 1:
        return models
    *parts, last = models.split(remarks[0])
    return "".join(parts) + remarks[0] + last


def _bounded(finding: Finding) -> str:
    return f"TV {upper_bound(finding)}" + (f" ({finding.bound})" if finding.bound else "")


def number(value: float, *, digits: int = 2, up: bool = False) -> str:
    """`value` to `digits` significant digits, as a person writes it; `up` rounds towards +inf.

    >>> number(3.66e-16), number(0.0124), number(0.0124, up=True), number(1e-4), number(24000)
    ('3.7 × 10⁻¹⁶', '0.012', '0.013', '10⁻⁴', '24000')

    ValueError for NaN.
    """
    value = float(value)
    if math.isnan(value):
        raise ValueError("value is NaN; a report shows numbers")
    if math.isinf(value):
        return "∞" if value > 0 else "−∞"
    if value == 0:
        return "0"
    rounding = ROUND_CEILING if up else ROUND_HALF_EVEN
    rounded = Context(prec=digits, rounding=rounding).create_decimal(Decimal(repr(value))).normalize()
    exponent = rounded.adjusted()
    if -4 < exponent < 6:
        return f"{rounded:f}".replace("-", "−")
    return _power(f"{rounded.scaleb(-exponent):f}".replace("-", "−"), exponent)


def pretty(text: str) -> str:
    """`text` with its numbers in scientific notation spelled out; words, hashes and versions stay.

    >>> pretty("TV 3.1e-16 at level 1e-06, model q4e5")
    'TV 3.1 × 10⁻¹⁶ at level 10⁻⁶, model q4e5'
    """
    return _SCIENTIFIC.sub(lambda found: _power(found[1], int(found[2])), text)


def duration(seconds: float) -> str:
    """A wall time for people.

    >>> duration(0.31), duration(42.04), duration(3725.0)
    ('0.31 s', '42 s', '1 h 2 min')
    """
    if seconds < 10:
        return f"{seconds:.2g} s"
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60} min"


def count(n: int, noun: str) -> str:
    """``"1 check"``, ``"2 checks"``."""
    return f"{n} {noun}" + ("" if n == 1 else "s")


def _power(mantissa: str, exponent: int) -> str:
    power = "10" + str(exponent).translate(_SUPERSCRIPTS)
    return power if mantissa in ("1", "1.0") else f"{mantissa} × {power}"
