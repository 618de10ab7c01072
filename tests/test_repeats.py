"""The bet on copies: a martingale under independence, and quick where rows are copied."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable

import numpy as np
import pytest

from me_stats.repeats import _SHARES, RepeatProcess

LAW = np.array([0.5, 0.3, 0.2])


def log_e(rows: list[tuple[int, ...]], groups: list[int] | None = None) -> float:
    process = RepeatProcess()
    return process.update(groups or [0] * len(rows), rows, [math.log(LAW[list(row)].prod()) for row in rows])


def test_it_has_mean_one_under_the_null_exactly() -> None:
    for groups in ([0, 0, 0, 0], [0, 1, 0, 1]):
        for cut in (4, 2):  # one batch, or two

            def wealth(tokens: tuple[int, ...], groups: list[int] = groups, cut: int = cut) -> float:
                process = RepeatProcess()
                for part in (slice(0, cut), slice(cut, 4)):
                    rows = [(token,) for token in tokens[part]]
                    process.update(groups[part], rows, np.log(LAW[list(tokens[part])]))
                return math.exp(process.log_e)

            mean = sum(LAW[list(t)].prod() * wealth(t) for t in itertools.product(range(3), repeat=4))
            assert mean == pytest.approx(1)


def test_it_exceeds_its_threshold_no_more_often_than_it_may() -> None:
    rng = np.random.default_rng(0)
    exceeded = 0
    for _ in range(400):
        process = RepeatProcess()
        rows = rng.choice(3, size=(50, 2), p=LAW)
        process.update([0] * 50, rows.tolist(), np.log(LAW[rows]).sum(1))
        exceeded += process.log_sup >= math.log(10)
    assert exceeded <= 65  # binomial(400, .1) passes 65 with probability 3e-5; the seed is fixed


@pytest.mark.parametrize(
    ("copied", "kind"),
    [
        (lambda b, j: (b, j - j % 8), "the row before"),
        (lambda b, j: (0, j), "the row at the same place of the batch before"),
        (lambda b, j: (0, (7 * b + 3 * j) % 16), "any earlier row of the prompt"),
    ],
)
def test_each_kind_of_copy_has_its_name(copied: Callable[[int, int], tuple[int, int]], kind: str) -> None:
    pool = np.random.default_rng(4).choice(3, size=(20, 16, 12), p=LAW)
    process = RepeatProcess()
    for b in range(20):
        rows = [pool[copied(b, j)].tolist() for j in range(16)]
        process.update([0] * 16, rows, [math.log(LAW[row].prod()) for row in rows])
    assert process.log_sup > 100
    assert process.worst == kind


def test_copies_are_found_at_once_and_only_within_their_prompt() -> None:
    row = tuple(np.random.default_rng(1).choice(3, size=32, p=LAW))
    assert log_e([row, row]) > 20
    assert log_e([row, row], [0, 1]) == pytest.approx(0)
    assert log_e([row] * 20) > 500


def test_a_stream_that_is_resumed_goes_on() -> None:
    rows = [tuple(row) for row in np.random.default_rng(2).choice(3, size=(30, 2), p=LAW)]
    log_p = [math.log(LAW[list(row)].prod()) for row in rows]
    parts = RepeatProcess()
    parts.update([0] * 10, rows[:10], log_p[:10])
    later = parts.update([0] * 20, rows[10:], log_p[10:])
    assert later == parts.log_e <= parts.log_sup
    assert parts.pvalue == pytest.approx(math.exp(-parts.log_sup))


def test_impossible_rows_are_left_to_others_and_bad_input_is_refused() -> None:
    process = RepeatProcess()
    assert process.update([0, 0], [(0,), (0,)], [-math.inf, -math.inf]) == pytest.approx(0)
    with pytest.raises(ValueError, match="one entry a row"):
        process.update([0], [(0,), (1,)], [0.0, 0.0])
    with pytest.raises(ValueError, match="without NaN"):
        process.update([0], [(0,)], [math.nan])
    assert ((_SHARES > 0) & (_SHARES < 1)).all()
