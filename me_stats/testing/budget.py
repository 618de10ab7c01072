"""How often a whole test run may fail with right samplers only, and what each of its checks may spend of that.

A run gets one probability, the budget. It is shared equally by the tests that ask for a level, and inside a test by
the checks that it declares. False alarms add up at most (union bound), so a run of right samplers fails with
probability at most the budget: by arithmetic, in any order, however the tests are spread over processes. A part of the
run has fewer tests and so larger levels, which is why a p-value that fails in the whole run also fails alone.

No pytest, numpy or torch here: the plugin loads this file in every test run.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


def divide(level: float, parts: int, *, name: str = "parts") -> float:
    """The largest level that `parts` checks may have each, rounded so that they add up to no more than `level`.

    >>> divide(1e-6, 1), divide(1e-6, 3) * 3 <= 1e-6
    (1e-06, True)
    """
    if not isinstance(parts, int) or isinstance(parts, bool) or parts < 1:
        raise ValueError(f"{name} must be an integer of at least 1, got {parts!r}")
    # Rounding to nearest could add up to one unit in the last place too much.
    return level if parts == 1 else math.nextafter(level / parts, 0.0)


def parse_budget(text: str | float, *, name: str = "budget") -> float:
    """A probability strictly between 0 and 1, or a ValueError that names the option.

    >>> parse_budget("1e-6")
    1e-06
    """
    try:
        budget = float(text)
    except ValueError:
        budget = math.nan
    if not 0 < budget < 1:
        raise ValueError(f"{name} must be a probability strictly between 0 and 1, such as 1e-6; got {text!r}")
    return budget


class Allowance:
    """What one test may spend: `total` in all, `level` for each check.

    Parameters
    ----------
    total
        Probability that any check of this test rejects a right sampler.
    checks, examples
        ``level = total / (checks · examples)``: checks of the test, and calls of a property test at most, those of
        shrinking included.

    Examples
    --------
    >>> allowance = Allowance(6e-7, checks=3)
    >>> f"{allowance.level:.1e}", f"{allowance.share(2):.1e}"
    ('2.0e-07', '1.0e-07')
    >>> Allowance(6e-7).spend(2e-6)
    Traceback (most recent call last):
    ...
    ValueError: this test may spend 6e-07 and its check 1 brings it to 2e-06; declare the checks with ...
    """

    def __init__(self, total: float, *, checks: int = 1, examples: int = 1) -> None:
        self.total = total
        self._level = divide(divide(total, checks, name="checks"), examples, name="examples")
        self._handed_out = False
        self._checked = 0.0
        self._checks = 0
        self._missed = 0.0

    @property
    def level(self) -> float:
        """Level of one check, for a test that spends it itself."""
        self._handed_out = True
        return self._level

    def share(self, n: int) -> float:
        """Level of each of `n` checks that share one `level`."""
        return divide(self.level, n, name="n")

    @property
    def spent(self) -> float:
        """Upper bound on what the test spent: everything, once it has seen a level, else the sum of its checks."""
        return self.total if self._handed_out else self._checked

    def spend(self, level: float | None = None) -> float:
        """Enter one check at `level` (default: the level of one check), and return that level.

        Raises
        ------
        ValueError
            Where the checks of the test would add up to more than `total`.
        """
        level = self._level if level is None else parse_budget(level, name="level")
        checked = self._checked + level
        # The slack is for the rounding of a million sums.
        if checked > self.total * (1 + 1e-9):
            raise ValueError(
                f"this test may spend {self.total:.3g} and its check {self._checks + 1} brings it to {checked:.3g}; "
                "declare the checks with @pytest.mark.me_stats(checks=...), the calls of a property with examples=..., "
                "or raise --me-stats-budget"
            )
        self._checked, self._checks = checked, self._checks + 1
        return level

    def note(self, result: Any) -> None:
        """Keep what a check that passed could have missed, for the summary of the run."""
        if result.passed:
            self._missed = max(self._missed, result.min_detectable_tv)

    def record(self) -> dict[str, float]:
        """Plain numbers that travel from a worker to the process that reports."""
        return {"checks": self._checks, "spent": self.spent, "missed": self._missed}


@dataclass
class RunBudget:
    """The budget of a run over `tests` tests, and what they have spent.

    >>> run = RunBudget(1e-6)
    >>> run.tests = 4
    >>> f"{run.allowance(checks=5).level:.1e}"
    '5.0e-08'
    """

    alpha: float
    tests: int = 0
    records: dict[str, Mapping[str, float]] = field(default_factory=dict)

    def allowance(self, *, checks: int = 1, examples: int = 1) -> Allowance:
        """What one of the tests may spend."""
        return Allowance(divide(self.alpha, self.tests, name="tests"), checks=checks, examples=examples)

    def summary(self) -> list[str]:
        """Lines for the end of the run; none where no test asked for a level."""
        if not self.records:
            return []
        records = self.records.values()
        checks, spent = int(sum(r["checks"] for r in records)), math.fsum(r["spent"] for r in records)
        missed = max(r["missed"] for r in records)
        lines = [
            f"budget {self.alpha:.3g} for false alarms of the run: {_count(checks, 'check')} in "
            f"{_count(len(self.records), 'test')} spent {spent:.3g}"
        ]
        if 0 < missed < math.inf:
            lines.append(f"checks that passed find a departure of TV {missed:.3g} in one step with power 0.8")
        elif missed:
            lines.append("at least one check that passed states no departure that it would find")
        return lines


def _count(n: int, what: str) -> str:
    return f"{n:,} {what}" if n == 1 else f"{n:,} {what}s"
