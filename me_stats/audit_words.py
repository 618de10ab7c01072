"""The audit of a table in plain words, from its numbers alone."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from me_stats.audit import Audit

_NAMED = 3  # cells, slips or data sets that are named before "and more"


def paragraph(audit: Audit) -> str:
    """What the table shows, how sure that is, and what it cannot show."""
    parts = (_scatter, _outliers, _means, _bounds, _arithmetic, _digits)
    sentences = [sentence for part in parts for sentence in part(audit)]
    sentences.append(
        "A gap in accuracy is at most the total variation distance of the two laws of an answer: it can show that they "
        "differ, and no agreement of accuracies can show that they are equal."
    )
    return " ".join(sentences)


def _scatter(audit: Audit) -> list[str]:
    found = audit.overall
    first, second = audit.methods
    sets = len({cell.dataset for cell in audit.cells})
    least, most = (pick(cell.runs for cell in audit.cells) for pick in (min, max))
    runs = counted(least, "run") if least == most else f"{least} to {most} runs"
    noise = "the largest noise that they can have" if audit.noise == 1 else f"{audit.noise:g} of their largest noise"
    out = [
        f"{counted(found.df, 'pair')} of {first} and {second} on {counted(sets, 'data set')}, {runs} a number.",
        f"With equal accuracies and independent runs of {noise}, Σz² would be about {found.df}; it is "
        f"{found.statistic:.2f} (p = {p_text(found.p_large)} for as much, {p_text(found.p_small)} for as little).",
    ]
    low, high = found.noise
    if audit.scattered:
        out.append(
            f"The numbers lie farther apart than that allows: equal accuracies would need {low:.2f} to {high:.2f} "
            "times the largest noise. Accuracies differ in some cell, or something other than the draws of a run does."
        )
    elif audit.regular:
        out.append(
            "The numbers lie closer together than that leaves them: runs shared draws or numbers, or answers hang on "
            f"the draws little ({low:.2g} to {high:.2g} times the largest noise would do)."
        )
    else:
        out.append("Such a scatter is what equal accuracies give, and also what gaps below the bounds here give.")
    return out


def _outliers(audit: Audit) -> list[str]:
    flagged = audit.flagged
    if not flagged:
        return [f"No cell stands out after Holm's correction for {counted(len(audit.cells), 'cell')}."]
    named = "; ".join(
        f"{cell.label} ({' against '.join(cell.printed)}, z = {cell.z:+.1f}, corrected p = {p_text(cell.holm)})"
        for cell in flagged[:_NAMED]
    )
    more = f" and {len(flagged) - _NAMED} more" if len(flagged) > _NAMED else ""
    stand = "stands" if len(flagged) == 1 else "stand"
    out = [f"{counted(len(flagged), 'cell')} {stand} out after Holm's correction: {named}{more}."]
    named_sets = {cell.dataset for cell in flagged}
    for row in audit.without:
        if named_sets == {row.name}:
            rest = f"Σz² is {row.statistic:.1f} on {row.df} (p = {p_text(row.p_large)})"
            out.append(f"Without {row.name}, a choice after the fact, {rest}.")
    return out


def _means(audit: Audit) -> list[str]:
    found, (first, second) = audit.overall, audit.methods
    low, high = found.interval
    ties = found.df - found.up - found.down
    equal = f", {ties} equal" if ties else ""
    return [
        f"On average {second} lies {found.mean:+.3f} points from {first} ({1 - audit.level:.0%} interval {low:+.2f} to "
        f"{high:+.2f}), {found.up} up and {found.down} down{equal} (sign test p = {p_text(found.sign_pvalue)})."
    ]


def _bounds(audit: Audit) -> list[str]:
    rows = audit.by("dataset") or audit.blocks[:1]
    sets = {row.name: row for row in rows}
    if len(rows) == 1:
        sets = {audit.cells[0].dataset: rows[0]}
    seen = ", ".join(f"{row.visible:.2g} points on {name}" for name, row in sets.items())
    means = ", ".join(f"{row.margin:.2g} on {name}" for name, row in sets.items())
    sure = f"{1 - audit.level:.0%}"
    return [
        f"One cell finds a gap of {seen} with power 0.8; smaller ones mostly pass.",
        f"Two one-sided tests exclude ({sure} confidence) a mean gap beyond {means}, and a gap beyond "
        f"{audit.overall.worst_margin:.2g} points in any cell: that is all the equality that the table shows.",
    ]


def _arithmetic(audit: Audit) -> list[str]:
    if not audit.checked:
        return []
    if not audit.slips:
        return [f"All {counted(audit.checked, 'printed difference')} follow from the accuracies."]
    named = "; ".join(
        f"{slip.label}, printed {slip.printed:+g} where {slip.accuracy:g} − {slip.best:g} is {slip.computed:+g}"
        for slip in audit.slips[:_NAMED]
    )
    more = f" and {len(audit.slips) - _NAMED} more" if len(audit.slips) > _NAMED else ""
    verb = "does" if len(audit.slips) == 1 else "do"
    of = counted(audit.checked, "printed difference")
    return [f"{len(audit.slips)} of {of} {verb} not follow from the accuracies: {named}{more}."]


def _digits(audit: Audit) -> list[str]:
    telling = [grain for grain in audit.grains if grain.chance > 0]
    out = []
    for grain in telling:
        what = f"means of {counted(grain.runs, 'run')} over {grain.items:,} {grain.dataset} items"
        off = len(grain.unattainable)
        if off:
            rounded = f", {grain.unless_rounded} if each run was rounded first" if grain.unless_rounded < off else ""
            out.append(
                f"{off} of {counted(grain.values, 'value')} cannot be {what}{rounded} (of arbitrary digits "
                f"{grain.chance:.0%} could not)."
            )
        else:
            all_values = f"All {counted(grain.values, 'value')}"
            out.append(f"{all_values} can be {what} (of arbitrary digits {grain.chance:.0%} could not).")
    silent = [grain.dataset for grain in audit.grains if grain.chance == 0]
    if silent:
        out.append(
            f"For {', '.join(dict.fromkeys(silent))} every printed value can be such a mean, so digits say nothing."
        )
    if audit.coarse:
        out.append(
            f"In {counted(audit.coarse, 'cell')} the rounding of the digits adds more than a tenth to the variance."
        )
    return out


def p_text(value: float) -> str:
    """A p-value as text: two digits, three where it is close to 1, never 0.

    >>> p_text(0.00258), p_text(0.9974), p_text(0.0)
    ('0.0026', '0.997', 'below 1e-99')
    """
    return "below 1e-99" if value < 1e-99 else f"{value:.2g}" if value < 0.95 else f"{value:.3f}"


def counted(n: int, noun: str) -> str:
    """``"1 cell"``, ``"2 cells"``."""
    return f"{n:,} {noun}{'' if n == 1 else 's'}"
