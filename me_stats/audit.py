"""What a published table of paired accuracies shows of two methods, and what it cannot show.

Accuracies are in percent, differences in points: second method minus first. Each number is the mean of R independent
runs over n items, the same for both methods. Given the items, its variance is Σ p_i (1 − p_i)/(R n²) for answers that
are right with probability p_i, and at most a (1 − a)/(R n) with a the mean of the p_i. ``noise`` is the ratio ρ of the
two: ρ = 1, every item alike, is the largest noise that independent runs can have; ρ < 1 where items are surely right or
surely wrong. The same bound holds for any score between 0 and 1, so ρ = 1 makes every "too far apart" careful.

Two ways of sampling with one law have equal accuracy. The converse fails: a gap in accuracy is at most the total
variation distance of the laws of an answer, so accuracies can show that two laws differ, never that they are equal.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.stats import binomtest, chi2, false_discovery_control, norm

from me_stats.audit_digits import Grain, Slip, find_grains, find_slips
from me_stats.audit_table import PairedTable, counts_of

Floats = NDArray[np.float64]
Block = Literal["all", "dataset", "group", "k", "without"]

POWER = 0.8
"""Power of the smallest visible gaps."""
_LEAST_COUNT = 5  # right and wrong answers of a method below which a normal score is no approximation
_COARSE = 0.1  # share of a cell's variance from which on the rounding of its digits is worth a word


@dataclass(frozen=True)
class AuditCell:
    """One pair of printed accuracies.

    z = `difference`/`stderr` is standard normal if both methods have one accuracy; `pvalue` is two-sided, `holm` and
    `bh` are corrected for all cells of the table (chance of any false alarm; share of false alarms). `interval` holds
    the difference at confidence 1 − level, `visible` is the smallest difference that this cell finds with power 0.8.
    `printed` and `lines` tell where the numbers come from.
    """

    group: str
    k: str
    dataset: str
    first: float
    second: float
    printed: tuple[str, str]
    items: int
    runs: int
    difference: float
    stderr: float
    z: float
    pvalue: float
    holm: float
    bh: float
    interval: tuple[float, float]
    visible: float
    lines: tuple[int, int]

    @property
    def label(self) -> str:
        return ", ".join([self.dataset, self.group, *([f"k = {self.k}"] if self.k else [])])


@dataclass(frozen=True)
class Dispersion:
    """Cells taken together: whether their differences scatter as independent runs of equal accuracy do.

    `statistic` Σz² is chi-square on `df` cells; `p_large` is the chance of as much (unequal accuracies, or noise beyond
    that of runs) and `p_small` of as little (runs that share draws or numbers, or ρ below the assumed one). `noise` is
    the interval of the ρ that equal accuracies need; above 1 no independent runs have it. `mean` is the plain mean of
    the differences with its `interval`; `margin` and `worst_margin` are the smallest margins within which two one-sided
    tests at the level put that mean, and every single cell; `visible` is the smallest gap that a typical cell finds
    with power 0.8, `visible_mean` the smallest common to all cells that their mean does.
    """

    block: Block
    name: str
    df: int
    statistic: float
    p_large: float
    p_small: float
    noise: tuple[float, float]
    mean: float
    interval: tuple[float, float]
    margin: float
    worst_margin: float
    visible: float
    visible_mean: float
    up: int
    down: int
    sign_pvalue: float


@dataclass(frozen=True)
class Audit:
    """All that `audit_accuracies` finds. Each verdict has a false-alarm rate of `level` on its own.

    `coarse` counts cells in which the rounding of the printed digits adds more than a tenth to the variance, which the
    scores leave out; `checked` counts printed differences that could be recomputed.
    """

    source: str
    methods: tuple[str, str]
    noise: float
    level: float
    cells: tuple[AuditCell, ...]
    blocks: tuple[Dispersion, ...]
    without: tuple[Dispersion, ...]
    slips: tuple[Slip, ...]
    checked: int
    grains: tuple[Grain, ...]
    coarse: int

    @property
    def overall(self) -> Dispersion:
        return self.blocks[0]

    @property
    def scattered(self) -> bool:
        """Whether differences are larger than equal accuracies and independent runs allow."""
        return self.overall.p_large < self.level

    @property
    def regular(self) -> bool:
        """Whether differences are smaller than independent runs leave them, if `noise` is what they have."""
        return self.overall.p_small < self.level

    @property
    def flagged(self) -> tuple[AuditCell, ...]:
        """Cells that stand out after Holm's correction, the farthest first."""
        out = [cell for cell in self.cells if cell.holm < self.level]
        return tuple(sorted(out, key=lambda cell: -abs(cell.z)))

    def by(self, block: Block) -> tuple[Dispersion, ...]:
        """Dispersions of one kind of block."""
        return tuple(row for row in (*self.blocks, *self.without) if row.block == block)

    def paragraph(self) -> str:
        """The audit in plain words, made from its numbers alone."""
        from me_stats.audit_words import paragraph

        return paragraph(self)


def gap_scores(
    first: ArrayLike, second: ArrayLike, items: ArrayLike, runs: ArrayLike, *, noise: float = 1.0
) -> tuple[Floats, Floats]:
    """Difference and standard error of paired accuracies, in points: z is their ratio.

        z = (second − first)/√(2 ρ a (1 − a)/(R n)),    a the mean of both

    Arrays broadcast, so that whole batches of simulated tables are scored at once.

    Raises
    ------
    ValueError
        `noise` outside (0, 1], or a cell with fewer than 5 right or 5 wrong answers, where no normal score holds.

    >>> difference, stderr = gap_scores(66.67, 67.90, 14042, 5)
    >>> round(float(difference / stderr), 2)
    4.91
    """
    if not 0 < noise <= 1:
        raise ValueError(f"noise must lie in (0, 1], 1 being the largest that independent runs can have, got {noise}")
    one, two = np.asarray(first, dtype=np.float64), np.asarray(second, dtype=np.float64)
    total = np.asarray(runs, dtype=np.float64) * np.asarray(items, dtype=np.float64)
    mean = (one + two) / 200
    rare = np.minimum(mean, 1 - mean) * total
    if not np.all(rare >= _LEAST_COUNT):
        raise ValueError(
            f"a cell has about {max(0.0, float(np.min(rare))):.0f} right or wrong answers a method, too few for a "
            f"normal score, which needs {_LEAST_COUNT}; leave the cell out of the table"
        )
    return two - one, 100 * np.sqrt(2 * noise * mean * (1 - mean) / total)


def holm(pvalues: ArrayLike) -> Floats:
    """Holm's corrected p-values along the last axis; those below α hold the chance of any false alarm to α.

    Source: Holm (1979), A simple sequentially rejective multiple test procedure.

    >>> holm([0.01, 0.04, 0.03]).tolist()
    [0.03, 0.06, 0.06]
    """
    values = np.asarray(pvalues, dtype=np.float64)
    order = np.argsort(values, axis=-1)
    ranked = np.take_along_axis(values, order, axis=-1) * np.arange(values.shape[-1], 0, -1)
    corrected = np.empty_like(values)
    np.put_along_axis(corrected, order, np.minimum(1.0, np.maximum.accumulate(ranked, axis=-1)), axis=-1)
    return corrected


def audit_accuracies(
    table: PairedTable,
    *,
    items: Mapping[str, int] | None = None,
    runs: int | None = None,
    noise: float = 1.0,
    level: float = 0.05,
) -> Audit:
    """Audit a published table: scatter, outliers, bounds, arithmetic and digits.

    Parameters
    ----------
    table
        From `me_stats.audit_table.read_table`.
    items, runs
        Items of each data set and runs behind each number, for tables that have no such column.
    noise
        ρ of the module's first lines. With 1 (the default), p-values for too much scatter are upper bounds, those for
        too little are not: items that are surely right or wrong lower the scatter too.
    level
        False-alarm rate of each verdict; intervals have confidence 1 − level.

    Raises
    ------
    ValueError
        Counts that are missing, contradict the table or name no data set of it; `noise` or `level` out of range; cells
        without enough answers for a normal score.

    >>> from me_stats.audit_table import parse_table
    >>> table = parse_table("group,setting,dataset,accuracy\\nA + B,CE,MMLU,66.67\\nA + B,ME,MMLU,67.90\\n")
    >>> found = audit_accuracies(table, items={"MMLU": 14042}, runs=5)
    >>> round(found.cells[0].z, 2), found.scattered, round(found.overall.visible, 2)
    (4.91, True, 0.7)
    """
    if not 0 < level <= 0.5:
        raise ValueError(f"level must lie in (0, 0.5], got {level}")
    size = counts_of(table, items or {}, runs)
    counts = np.array([size(first) for first, _ in table.pairs], dtype=np.int64)
    values = np.array([[float(entry.accuracy) for entry in pair] for pair in table.pairs])
    difference, stderr = gap_scores(values[:, 0], values[:, 1], counts[:, 0], counts[:, 1], noise=noise)
    cells = _cells(table, values, counts, difference, stderr, level)
    kinds: dict[Block, list[str]] = {
        "all": ["all"] * len(cells),
        "dataset": [cell.dataset for cell in cells],
        "group": [cell.group for cell in cells],
        "k": [cell.k for cell in cells],
    }
    blocks: list[Dispersion] = []
    for kind, names in kinds.items():
        distinct = list(dict.fromkeys(names))
        if kind == "all" or len(distinct) > 1:
            blocks += [
                _dispersion(kind, name, cells, np.array(names) == name, noise=noise, level=level) for name in distinct
            ]
    datasets = np.array(kinds["dataset"])
    without = [
        _dispersion("without", name, cells, datasets != name, noise=noise, level=level)
        for name in (table.datasets if len(table.datasets) > 2 else ())  # of two, the other stands there already
    ]
    slips, checked = find_slips(table)
    rounding = np.array([sum(float(entry.unit) ** 2 / 12 for entry in pair) for pair in table.pairs])
    return Audit(
        source=table.source,
        methods=table.methods,
        noise=noise,
        level=level,
        cells=cells,
        blocks=tuple(blocks),
        without=tuple(without),
        slips=slips,
        checked=checked,
        grains=find_grains(table.entries, size),
        coarse=int(np.sum(rounding > _COARSE * stderr**2)),
    )


def _cells(
    table: PairedTable, values: Floats, counts: NDArray[np.int64], difference: Floats, stderr: Floats, level: float
) -> tuple[AuditCell, ...]:
    z = difference / stderr
    pvalues = 2 * norm.sf(np.abs(z))
    corrected, discovered = holm(pvalues), false_discovery_control(pvalues)
    half = norm.isf(level / 2) * stderr
    visible = _visible(stderr, level)
    return tuple(
        AuditCell(
            group=one.group,
            k=one.k,
            dataset=one.dataset,
            first=float(values[i, 0]),
            second=float(values[i, 1]),
            printed=(str(one.accuracy), str(two.accuracy)),
            items=int(counts[i, 0]),
            runs=int(counts[i, 1]),
            difference=float(difference[i]),
            stderr=float(stderr[i]),
            z=float(z[i]),
            pvalue=float(pvalues[i]),
            holm=float(corrected[i]),
            bh=float(discovered[i]),
            interval=(float(difference[i] - half[i]), float(difference[i] + half[i])),
            visible=float(visible[i]),
            lines=(one.line, two.line),
        )
        for i, (one, two) in enumerate(table.pairs)
    )


def _dispersion(
    block: Block, name: str, cells: Sequence[AuditCell], chosen: NDArray[Any], *, noise: float, level: float
) -> Dispersion:
    own = [cell for cell, inside in zip(cells, chosen, strict=True) if inside]
    difference, stderr = (np.array([getattr(cell, what) for cell in own]) for what in ("difference", "stderr"))
    df, statistic = len(own), float(np.sum((difference / stderr) ** 2))
    mean, spread = float(difference.mean()), float(np.sqrt(np.sum(stderr**2))) / df
    side, both = float(norm.isf(level)), float(norm.isf(level / 2))
    up, down = int(np.sum(difference > 0)), int(np.sum(difference < 0))
    return Dispersion(
        block=block,
        name=name,
        df=df,
        statistic=statistic,
        p_large=float(chi2.sf(statistic, df)),
        p_small=float(chi2.cdf(statistic, df)),
        noise=(noise * statistic / float(chi2.isf(level / 2, df)), noise * statistic / float(chi2.ppf(level / 2, df))),
        mean=mean,
        interval=(mean - both * spread, mean + both * spread),
        margin=abs(mean) + side * spread,
        worst_margin=float(np.max(np.abs(difference) + side * stderr)),
        visible=float(_visible(np.sqrt(np.mean(stderr**2)), level)),
        visible_mean=float(_visible(spread, level)),
        up=up,
        down=down,
        sign_pvalue=float(binomtest(up, up + down).pvalue) if up + down else 1.0,
    )


def _visible(stderr: Any, level: float) -> Any:
    """The smallest gap that a two-sided test at `level` finds with power 0.8."""
    return (norm.isf(level / 2) + norm.ppf(POWER)) * stderr
