"""What the digits of a printed table say: differences that do not follow, means that no count of answers gives."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from decimal import Decimal
from fractions import Fraction

from me_stats.audit_table import Entry, PairedTable, unit


@dataclass(frozen=True)
class Slip:
    """A printed difference that does not follow from the printed accuracies.

    `best` is the accuracy of the best model alone, `computed` = accuracy − best, and `implied` the accuracy that the
    `printed` difference would need. One of the three numbers is wrong; which one, the table does not say.
    """

    line: int
    label: str
    accuracy: float
    best: float
    best_model: str
    printed: float
    computed: float
    implied: float


@dataclass(frozen=True)
class Grain:
    """Which printed values of a data set are means of R runs of whole counts over n items.

    Such means are multiples of `step` = 100/(R n) points, so a value printed to `unit` is unattainable if no multiple
    rounds to it. `chance` is the share of arbitrary values that would be unattainable; where it is 0 the check says
    nothing. `unattainable` lists the values, `unless_rounded` counts those that stay so if each run was rounded to
    `unit` before the mean was taken. Means over tasks of unequal size lie on a finer lattice than this one.
    """

    dataset: str
    items: int
    runs: int
    step: float
    unit: float
    values: int
    chance: float
    unattainable: tuple[str, ...]
    unless_rounded: int


def find_slips(table: PairedTable) -> tuple[tuple[Slip, ...], int]:
    """Printed differences that do not follow, and the number of those that were checked.

    A difference is that of an ensemble to the best of its models (``"A + B"`` names two), all of which must stand alone
    in the same part of the table. Each of the three numbers may be off by half a unit of its last digit.

    >>> from me_stats.audit_table import parse_table
    >>> table = parse_table('''group,setting,model,dataset,accuracy,printed_delta
    ... ,single,A,BBH,46.72,
    ... ,single,B,BBH,44.85,
    ... A + B,CE,,BBH,48.12,+1.40
    ... A + B,ME,,BBH,47.33,+1.22
    ... ''')
    >>> (slip,), checked = find_slips(table)
    >>> checked, slip.label, slip.computed, slip.implied
    (2, 'ME, A + B, BBH', 0.61, 47.94)
    """
    alone = {(entry.table, entry.model, entry.dataset): entry for entry in table.singles}
    slips, checked = [], 0
    for entry in sorted((entry for pair in table.pairs for entry in pair), key=lambda entry: entry.line):
        own = [alone.get((entry.table, name.strip(), entry.dataset)) for name in entry.group.split(" + ")]
        known = [single for single in own if single is not None]
        if entry.printed_delta is None or len(known) < len(own):
            continue
        checked += 1
        best = max(known, key=lambda single: single.accuracy)
        computed = entry.accuracy - best.accuracy
        slack = (entry.unit + best.unit + unit(entry.printed_delta)) / 2
        if abs(entry.printed_delta - computed) > slack:
            slips.append(
                Slip(
                    line=entry.line,
                    label=entry.label,
                    accuracy=float(entry.accuracy),
                    best=float(best.accuracy),
                    best_model=best.model,
                    printed=float(entry.printed_delta),
                    computed=float(computed),
                    implied=float(best.accuracy + entry.printed_delta),
                )
            )
    return tuple(slips), checked


def attainable(value: Decimal, total: int, *, slack: Decimal) -> bool:
    """Whether 100 c / `total` lies within `slack` of `value` for some whole count c in 0..total, in exact arithmetic.

    >>> attainable(Decimal("45.1"), 164, slack=Decimal("0.05")), attainable(Decimal("45.4"), 164, slack=Decimal("0.05"))
    (True, False)
    """
    low, high = (Fraction(value + sign * slack) * total / 100 for sign in (-1, 1))
    least = max(0, -(-low.numerator // low.denominator))
    return least <= min(total, high.numerator // high.denominator)


def find_grains(entries: Sequence[Entry], size: Callable[[Entry], tuple[int, int] | None]) -> tuple[Grain, ...]:
    """One `Grain` for the values of each data set that share counts and digits; `size` gives (items, runs) or None."""
    alike: dict[tuple[str, int, int, Decimal], list[Entry]] = {}
    for entry in entries:
        counts = size(entry)
        if counts is not None:
            alike.setdefault((entry.dataset, *counts, entry.unit), []).append(entry)
    grains = []
    for (dataset, items, runs, digit), own in alike.items():
        total, half = items * runs, digit / 2
        off = [entry for entry in own if not attainable(entry.accuracy, total, slack=half)]
        # A mean of rounded runs may lie half a unit off, and is rounded once more.
        twice = digit if runs > 1 else half
        grains.append(
            Grain(
                dataset=dataset,
                items=items,
                runs=runs,
                step=100 / total,
                unit=float(digit),
                values=len(own),
                chance=max(0.0, 1 - float(digit) * total / 100),
                unattainable=tuple(f"{entry.label}: {entry.accuracy}" for entry in off),
                unless_rounded=sum(not attainable(entry.accuracy, total, slack=twice) for entry in off),
            )
        )
    return tuple(grains)
