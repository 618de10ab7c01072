"""The audit of a table: the paper's numbers, its false alarms on equal laws, and what it finds where it is planted."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy.stats import binom, chi2, norm
from statsmodels.stats.multitest import multipletests

from me_stats.audit import Audit, Dispersion, audit_accuracies, gap_scores, holm
from me_stats.audit_table import parse_table, read_table

PAPER = Path(__file__).resolve().parents[1] / "experiments" / "data" / "paper_tables.csv"
ITEMS = {"GSM8K": 1319, "MMLU": 14042, "BBH": 6511, "ARC": 1172}
RISK = 1e-9


@pytest.fixture(scope="module")
def paper() -> Audit:
    return audit_accuracies(read_table(PAPER), items=ITEMS, runs=5)


def row(audit: Audit, block: Any, name: str) -> Dispersion:
    (found,) = (one for one in audit.by(block) if one.name == name)
    return found


def table(pairs: Sequence[tuple[float, float]], *, digits: int = 2, sets: Sequence[str] = ("A",)) -> Any:
    """A table of these pairs, whose cells take turns with the data sets."""
    lines = ["group,setting,k,dataset,accuracy"]
    for i, pair in enumerate(pairs):
        for setting, value in zip(("CE", "ME"), pair, strict=True):
            lines.append(f"a + b,{setting},{i},{sets[i % len(sets)]},{value:.{digits}f}")
    return parse_table("\n".join(lines))


# The paper's table


def test_the_scatter_of_the_paper(paper: Audit) -> None:
    found = paper.overall
    assert (found.df, len(paper.cells), paper.methods) == (32, 32, ("CE", "ME"))
    assert found.statistic == pytest.approx(58.95, abs=0.01)
    assert found.p_large == pytest.approx(0.0026, abs=5e-5)
    assert found.p_large + found.p_small == pytest.approx(1)
    assert paper.scattered
    assert not paper.regular
    assert found.noise == pytest.approx((1.19, 3.22), abs=0.01)
    assert found.mean == pytest.approx(0.002, abs=5e-4)
    assert (found.up, found.down) == (15, 17)
    assert found.sign_pvalue == pytest.approx(0.86, abs=0.01)
    assert paper.coarse == 0


def test_one_cell_stands_out(paper: Audit) -> None:
    (cell,) = paper.flagged
    assert cell.label == "MMLU, Qwen-3B + Qwen-Math-1.5B, k = 10"
    assert cell.printed == ("66.67", "67.90")
    assert cell.z == pytest.approx(4.91, abs=0.005)
    assert cell.holm == pytest.approx(32 * cell.pvalue)
    assert cell.lines == (19, 23)
    assert row(paper, "without", "MMLU").p_large > 0.5
    assert [one.name for one in paper.by("without") if one.p_large < 0.05] == ["GSM8K", "BBH", "ARC"]
    assert row(paper, "dataset", "MMLU").statistic + row(paper, "without", "MMLU").statistic == pytest.approx(
        paper.overall.statistic
    )


def test_gaps_that_the_paper_could_have_seen(paper: Audit) -> None:
    seen = {one.name: one.visible for one in paper.by("dataset")}
    assert seen == pytest.approx({"GSM8K": 2.2, "MMLU": 0.73, "BBH": 1.1, "ARC": 2.1}, abs=0.045)
    for one in paper.blocks:
        assert abs(one.mean) < one.margin < one.worst_margin
        assert one.visible_mean == pytest.approx(one.visible / np.sqrt(one.df))
    assert {one.name for one in paper.by("k")} == {"5", "10"}
    assert len(paper.by("group")) == 4


def test_slips_and_digits_of_the_paper(paper: Audit) -> None:
    (slip,) = paper.slips
    assert (slip.accuracy, slip.best, slip.printed, slip.computed) == (47.33, 46.72, 1.22, 0.61)
    assert (slip.line, slip.best_model, slip.implied, paper.checked) == (44, "Nous-Hermes", 47.94, 64)
    grains = {grain.dataset: grain for grain in paper.grains}
    assert {name: len(grain.unattainable) for name, grain in grains.items()} == {
        "GSM8K": 4, "MMLU": 0, "BBH": 0, "ARC": 11,
    }  # fmt: skip
    assert all(grain.unless_rounded == 0 for grain in paper.grains)
    assert [round(grain.chance, 2) for grain in paper.grains] == [0.34, 0, 0, 0.41]


def test_the_words_come_from_the_numbers(paper: Audit) -> None:
    text = paper.paragraph()
    for part in (
        "32 pairs of CE and ME on 4 data sets, 5 runs a number", "it is 58.95 (p = 0.0026", "1.19 to 3.22 times",
        "1 cell stands out", "66.67 against 67.90, z = +4.9",
        "Without MMLU, a choice after the fact, Σz² is 19.6 on 24", "15 up and 17 down",
        "2.2 points on GSM8K, 0.73 points on MMLU", "beyond 2.6 points in any cell",
        "1 of 64 printed differences does not follow", "printed +1.22 where 47.33 − 46.72 is +0.61",
        "4 of 24 values cannot be means of 5 runs over 1,319 GSM8K items, 0 if each run was rounded first",
        "For MMLU, BBH every printed value can be such a mean",
    ):  # fmt: skip
        assert part in text
    assert text.endswith("no agreement of accuracies can show that they are equal.")


# Scores


def test_scores_are_those_of_the_formula() -> None:
    difference, stderr = gap_scores([60, 50], [62, 49], [400, 900], [1, 5])
    assert difference.tolist() == [2, -1]
    assert stderr[0] == pytest.approx(100 * np.sqrt(2 * 0.61 * 0.39 / 400))
    assert stderr[1] == pytest.approx(100 * np.sqrt(2 * 0.495 * 0.505 / 4500))
    _, half = gap_scores([60, 50], [62, 49], [400, 900], [1, 5], noise=0.25)
    assert half == pytest.approx(stderr / 2)


@pytest.mark.parametrize("noise", [0.0, -1.0, 1.01, np.nan, np.inf])
def test_noise_beyond_independent_runs_is_refused(noise: float) -> None:
    with pytest.raises(ValueError, match=r"noise must lie in \(0, 1\]"):
        gap_scores(60, 62, 400, 1, noise=noise)


@pytest.mark.parametrize("value", [0.0, 100.0, 99.5])
def test_too_few_answers_of_a_kind_are_refused(value: float) -> None:
    with pytest.raises(ValueError, match="too few for a normal score, which needs 5"):
        gap_scores(value, value, 400, 1)


def test_holm_is_that_of_statsmodels() -> None:
    pvalues = np.random.default_rng(0).random((5, 7)) ** 3
    expected = np.array([multipletests(row, method="holm")[1] for row in pvalues])
    np.testing.assert_allclose(holm(pvalues), expected, rtol=1e-12)
    assert holm([0.2]).tolist() == [0.2]


def test_corrections_are_those_of_statsmodels(paper: Audit) -> None:
    pvalues = [cell.pvalue for cell in paper.cells]
    assert [cell.holm for cell in paper.cells] == pytest.approx(multipletests(pvalues, method="holm")[1])
    assert [cell.bh for cell in paper.cells] == pytest.approx(multipletests(pvalues, method="fdr_bh")[1])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, r"how many items has A\? Give A=COUNT or a column"),
        ({"items": {"A": 500}}, "how many runs is a number of table the mean of"),
        ({"items": {"A": 0}, "runs": 1}, "items of A: needs a whole count of at least 1, got 0"),
        ({"items": {"A": 1.5}, "runs": 1}, "got 1.5"),
        ({"items": {"A": 500}, "runs": True}, "runs: needs a whole count"),
        ({"items": {"A": 500, "B": 5}, "runs": 1}, "no data set 'B' in table; it has A"),
        ({"items": {"A": 500}, "runs": 1, "level": 0.0}, r"level must lie in \(0, 0.5\]"),
        ({"items": {"A": 500}, "runs": 1, "level": 0.9}, "level must lie"),
        ({"items": {"A": 500}, "runs": 1, "noise": 2.0}, "noise must lie"),
        ({"items": {"A": 9}, "runs": 1}, "leave the cell out"),
    ],
)
def test_bad_options(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        audit_accuracies(table([(60, 62)]), **options)


def test_counts_in_the_table_and_beside_it() -> None:
    text = "group,setting,dataset,accuracy,items,runs\ng,CE,A,60,500,2\ng,ME,A,62,{},2"
    found = audit_accuracies(parse_table(text.format(500)))
    assert (found.cells[0].items, found.cells[0].runs) == (500, 2)
    with pytest.raises(ValueError, match="line 2, column items: 500, and 400 is given"):
        audit_accuracies(parse_table(text.format(500)), items={"A": 400})
    with pytest.raises(ValueError, match="line 3: ME, g, A has not the counts of its pair"):
        audit_accuracies(parse_table(text.format(400)))


# Calibration: tables of equal laws


def simulated(
    shares: Sequence[float], items: Sequence[int], runs: int, tables: int, *, gap: float = 0.0, sure: float = 0.0
) -> np.ndarray:
    """(2, tables, cells) accuracies of binomial runs; a share `sure` of the items is right in every run."""
    rng = np.random.default_rng(1)
    fixed = np.rint(np.array(items) * sure).astype(int)
    rest = np.array(items) - fixed
    draws = [
        rng.binomial(runs * rest, np.array(shares) + sign * gap / 2, size=(tables, len(items))) + runs * fixed
        for sign in (-1, 1)
    ]
    return 100 * np.array(draws) / (runs * np.array(items))


def scores(drawn: np.ndarray, items: Sequence[int], runs: int, **options: Any) -> np.ndarray:
    difference, stderr = gap_scores(drawn[0], drawn[1], items, runs, **options)
    return difference / stderr


def band(level: float, tables: int) -> tuple[float, float]:
    low, high = (float(binom.ppf(q, tables, level)) / tables for q in (RISK / 2, 1 - RISK / 2))
    return low, high


TABLES = 20_000
SHAPES: list[tuple[Sequence[float], Sequence[int], int]] = [
    ([0.7, 0.6, 0.5, 0.8] * 8, [1319, 14042, 6511, 1172] * 8, 5),
    ([0.46, 0.3, 0.7], [164, 164, 500], 1),
]


@pytest.mark.parametrize(("shares", "items", "runs"), SHAPES, ids=["paper", "small"])
@pytest.mark.parametrize("level", [0.05, 0.01])
def test_equal_laws_raise_each_alarm_at_its_rate(
    shares: Sequence[float], items: Sequence[int], runs: int, level: float
) -> None:
    z = scores(simulated(shares, items, runs, TABLES), items, runs)
    statistic = (z**2).sum(-1)
    low, high = band(level, TABLES)
    assert low <= np.mean(chi2.sf(statistic, len(items)) < level) <= high
    assert low <= np.mean(chi2.cdf(statistic, len(items)) < level) <= high
    alarms = np.mean(holm(2 * norm.sf(np.abs(z))).min(-1) < level)
    assert alarms <= high
    assert alarms > 0.8 * level  # it is not silent for being blunt


def test_sure_items_are_no_alarm_and_their_share_restores_the_rate() -> None:
    shares, items, runs = SHAPES[0]
    drawn = simulated(shares, items, runs, TABLES, sure=0.5)
    careful = (scores(drawn, items, runs) ** 2).sum(-1)
    assert np.mean(chi2.sf(careful, 32) < 0.05) < 0.01
    p = np.array(shares)
    mean = 0.5 + p / 2
    ratio = p * (1 - p) / 2 / (mean * (1 - mean))
    exact = (scores(drawn, items, runs) ** 2 / ratio).sum(-1)
    low, high = band(0.05, TABLES)
    assert low <= np.mean(chi2.sf(exact, 32) < 0.05) <= high


def test_the_verdicts_of_an_audit_are_those_of_the_scores() -> None:
    shares, items, runs = [0.5, 0.4, 0.7], [400, 600, 800], 2
    drawn = simulated(shares, items, runs, 60)
    sets = dict(zip("ABC", items, strict=True))
    z = scores(np.round(drawn, 6), items, runs)
    corrected = holm(2 * norm.sf(np.abs(z)))
    for i in range(drawn.shape[1]):
        found = audit_accuracies(table(drawn[:, i].T.tolist(), digits=6, sets="ABC"), items=sets, runs=runs, level=0.2)
        assert found.overall.statistic == pytest.approx((z[i] ** 2).sum())
        assert found.scattered == (chi2.sf((z[i] ** 2).sum(), 3) < 0.2)
        assert found.regular == (chi2.cdf((z[i] ** 2).sum(), 3) < 0.2)
        assert len(found.flagged) == (corrected[i] < 0.2).sum()


@pytest.mark.parametrize("gap", [0.0, 0.02, -0.05])
def test_bounds_hold_at_their_confidence(gap: float) -> None:
    """The margins are no smaller than the true gap, and intervals hold it, in 80% of tables or more.

    Each data set of one long table is a table of four cells, and has a dispersion of its own.
    """
    names, n = [f"set {i}" for i in range(250)], 900
    values = simulated([0.6] * 4, [n] * 4, 1, len(names), gap=gap)
    lines = ["group,setting,k,dataset,accuracy"]
    for i, name in enumerate(names):
        for k in range(4):
            lines += [f"g,{setting},{k},{name},{values[j, i, k]:.6f}" for j, setting in enumerate(("CE", "ME"))]
    found = audit_accuracies(parse_table("\n".join(lines)), items=dict.fromkeys(names, n), runs=1, level=0.2)
    rows = found.by("dataset")
    assert len(rows) == len(names)
    low, high = band(0.2, len(names))
    missed = np.mean([one.margin < abs(100 * gap) for one in rows])
    assert missed <= high
    if gap:
        assert missed >= low  # a bound, and no wider than it must be
    assert np.mean([one.worst_margin < abs(100 * gap) for one in rows]) <= high
    inside = [one.interval[0] <= 100 * gap <= one.interval[1] for one in rows]
    assert low <= 1 - np.mean(inside) <= high


def test_the_interval_of_the_noise_holds_what_runs_have() -> None:
    shares, items, runs = SHAPES[0]
    statistic = (scores(simulated(shares, items, runs, TABLES), items, runs) ** 2).sum(-1)
    inside = (statistic / chi2.isf(0.025, 32) <= 1) & (statistic / chi2.ppf(0.025, 32) >= 1)
    low, high = band(0.05, TABLES)
    assert low <= 1 - inside.mean() <= high


def test_a_visible_gap_is_seen_four_times_in_five() -> None:
    found = audit_accuracies(table([(60, 60)]), items={"A": 1319}, runs=5).overall
    drawn = simulated([0.6], [1319], 5, TABLES, gap=found.visible / 100)
    seen = np.mean(2 * norm.sf(np.abs(scores(drawn, [1319], 5))) < 0.05)
    assert seen == pytest.approx(0.8, abs=0.02)


# Planted errors


def audited(drawn: np.ndarray, change: Callable[[np.ndarray], None] = lambda values: None) -> Audit:
    values = np.round(drawn[:, 0], 2)
    change(values)
    sets = dict(zip("ABCD", (1319, 14042, 6511, 1172), strict=True))
    return audit_accuracies(table(values.T.tolist(), sets="ABCD"), items=sets, runs=5)


@pytest.fixture(scope="module")
def fair() -> np.ndarray:
    shares, items, runs = SHAPES[0]
    return simulated(shares, items, runs, 1)


def test_a_fair_table_raises_no_alarm(fair: np.ndarray) -> None:
    found = audited(fair)
    assert not found.scattered
    assert not found.regular
    assert found.flagged == ()
    assert "Such a scatter is what equal accuracies give, and also what gaps below the bounds" in found.paragraph()
    assert "No cell stands out" in found.paragraph()


def test_a_cell_that_was_moved_is_found(fair: np.ndarray) -> None:
    def move(values: np.ndarray) -> None:
        values[1, 5] = values[0, 5] + 2

    found = audited(fair, move)
    assert [cell.k for cell in found.flagged] == ["5"]
    assert found.scattered
    assert found.overall.worst_margin > 2
    assert not row(found, "without", "B").p_large < 0.05


def test_a_copied_column_is_found(fair: np.ndarray) -> None:
    def copy(values: np.ndarray) -> None:
        values[1] = values[0]

    found = audited(fair, copy)
    assert found.regular
    assert found.overall.p_small < 1e-12
    assert (found.overall.up, found.overall.down, found.overall.sign_pvalue) == (0, 0, 1.0)
    text = found.paragraph()
    assert "closer together than that leaves them: runs shared draws or numbers" in text
    assert "0 up and 0 down, 32 equal" in text


def test_a_column_almost_copied_is_found_in_part(fair: np.ndarray) -> None:
    """Noise of a tenth of what runs leave is too close; what would make it so is said."""

    def near(values: np.ndarray) -> None:
        values[1] = values[0] + 0.1 * (values[1] - values[0])

    assert audited(fair, near).regular
    low, high = audited(fair, near).overall.noise
    assert 0 < low < 0.01 < high < 0.05


def test_a_constant_bias_shows_in_means_and_signs(fair: np.ndarray) -> None:
    def lift(values: np.ndarray) -> None:
        values[1] += 0.6

    found = audited(fair, lift).overall
    assert found.interval[0] > 0
    assert found.sign_pvalue < 0.05


def test_coarse_digits_are_named() -> None:
    found = audit_accuracies(table([(60, 61)], digits=0), items={"A": 100_000}, runs=5)
    assert found.coarse == 1
    assert "In 1 cell the rounding of the digits adds more than a tenth to the variance" in found.paragraph()


def test_words_for_less_noise_and_other_tables() -> None:
    made = parse_table(
        "group,setting,dataset,accuracy,items,runs\ng,X,A,60,500,1\ng,Y,A,70,500,1\nh,X,B,60,400,2\nh,Y,B,52,400,2"
    )
    text = audit_accuracies(made, noise=0.5).paragraph()
    assert text.startswith("2 pairs of X and Y on 2 data sets, 1 to 2 runs a number.")
    assert "independent runs of 0.5 of their largest noise" in text
    assert "2 cells stand out" in text
    assert "printed difference" not in text


def test_results_are_frozen(paper: Audit) -> None:
    for value in (paper, paper.cells[0], paper.overall, paper.slips[0], paper.grains[0]):
        with pytest.raises(dataclasses.FrozenInstanceError):
            value.level = 1  # type: ignore[misc,union-attr]
