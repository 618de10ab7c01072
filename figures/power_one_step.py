"""Shares of runs in which each test rejects: false alarms first, then planted bugs, ours above those in use."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.patches import Rectangle

from me_stats.equivalence import binomial_interval
from me_stats.record import Record
from me_stats.report import Figure
from me_stats.report.style import COLORS, figure, save

_NAMES = {
    "portfolio, 0.05": "ours, level .05",
    "portfolio, 1e-3": "ours, level 1e-3",
    "portfolio, 1e-6": "ours, level 1e-6",
    "all cells": "all cells, .01 (JAX)",
    "observed cells": "observed cells, 1e-3 (PyTorch)",
    "distance ratio": "distance ratio (vLLM)",
    "cosine": "cosine > .99 (FlashInfer)",
    "Hamming MMD": "Hamming MMD, .05",
    "two-sample portfolio": "nine two-sample tests, .05",
    "martingales, 1e-6": "our martingales, 1e-6",
    "e-process, 1e-6": "our e-process, 1e-6",
}
# Share of right samplers that a test may reject; 0 where it declares nothing.
_DECLARED = {
    "portfolio, 0.05": 0.05, "portfolio, 1e-3": 1e-3, "portfolio, 1e-6": 1e-6, "all cells": 0.01,
    "observed cells": 1e-3, "distance ratio": 0.0, "cosine": 0.0, "Hamming MMD": 0.05,
    "two-sample portfolio": 0.05, "martingales, 1e-6": 1e-6, "e-process, 1e-6": 1e-6,
}  # fmt: skip
_BROKEN = {
    "one component per sequence": "one component\nper sequence",
    "sticky component": "sticky\ncomponent",
    "temperature 1.05": "temperature\n1.05",
}
_FOUND = LinearSegmentedColormap.from_list("found", ["white", COLORS["component 1"]])
_ALARM = LinearSegmentedColormap.from_list("alarm", ["white", COLORS["ME"]])
_CONFIDENCE = 0.99  # that more right samplers are rejected than declared, for the colour that says so


def draw(record: Record, folder: Path) -> Figure:
    """One table for each size of vocabulary and sample, and one for sequences."""
    rows, sequences = record.results["rows"], record.results["sequences"]
    cases = list(dict.fromkeys((row["V"], row["n"]) for row in rows))
    heights = [len(rows[0]["rejected"])] * len(cases) + [len(sequences[0]["rejected"])]
    fig, axes = figure(
        columns=2, height=1.0 + 0.155 * (sum(heights) + 2.2 * len(heights)), nrows=len(heights), height_ratios=heights
    )
    bugs = list(dict.fromkeys(row["bug"] for row in rows))
    for ax, (vocabulary, n) in zip(axes[:-1], cases, strict=True):
        own = [row for row in rows if (row["V"], row["n"]) == (vocabulary, n)]
        _table(ax, own, len(bugs), f"One step: {vocabulary:,} tokens, {n:,} draws")
        if ax is axes[0]:
            _columns(ax, bugs)
    _table(axes[-1], sequences, len(bugs), _about_sequences(record))
    _columns(axes[-1], [_BROKEN.get(row["bug"], row["bug"]) for row in sequences])
    caption = _caption(record)
    return Figure(tuple(save(fig, folder / record.name, {"caption": caption, "key": record.key})), caption)


def _table(ax: Any, rows: list[dict[str, Any]], width: int, title: str) -> None:
    """Rows are tests, columns are bugs; the first column holds false alarms."""
    tests = list(rows[0]["rejected"])
    for x, row in enumerate(rows):
        for y, test in enumerate(tests):
            share, sparse = row["rejected"][test] / row["runs"], test == "observed cells" and row["too_sparse"]
            alarms = rows[0]["rejected"][test] / rows[0]["runs"]
            if sparse:
                color: Any = "0.88"
            elif x == 0:
                low, _ = binomial_interval(row["rejected"][test], row["runs"], confidence=_CONFIDENCE)
                color = _ALARM(0.25 + 0.55 * share) if low > _DECLARED[test] else "white"
            else:
                # A test that rejects everything has found nothing.
                color = _FOUND(0.75 * max(0.0, share - alarms))
            ax.add_patch(Rectangle((x - 0.5, y - 0.5), 1, 1, facecolor=color, edgecolor="0.75", linewidth=0.4))
            text = "too sparse" if sparse else _share(share)
            ax.text(x, y, text, ha="center", va="center", fontsize=6 if sparse else 6.5, color="0.1")
    ax.axvline(0.5, color="0.2", linewidth=1.0)
    ours = [y for y, test in enumerate(tests) if test.startswith("portfolio")]
    split = len(ours) - 0.5 if ours else 1.5
    ax.plot([-0.5, len(rows) - 0.5], [split, split], color="0.2", linewidth=1.0)
    ax.set(xlim=(-0.5, width - 0.5), ylim=(len(tests) - 0.5, -0.5), xticks=[])
    ax.set_yticks(np.arange(len(tests)), [_NAMES[test] for test in tests], fontsize=6.5)
    ax.tick_params(length=0)
    ax.grid(visible=False)
    for side in ("left", "bottom"):
        ax.spines[side].set_visible(False)
    ax.set_title(title, fontsize=7.5)


def _columns(ax: Any, names: list[str]) -> None:
    """Names of the columns above a table."""
    labels = ["right\n(false alarms)", *names[1:]]
    for x, label in enumerate(labels):
        ax.text(x, -0.75, label, ha="center", va="bottom", fontsize=6)
    ax.set_title(ax.get_title(loc="left"), fontsize=7.5, pad=23)


def _share(share: float) -> str:
    if 0 < share < 0.005:
        return "<.01"
    return {0.0: "0", 1.0: "1"}.get(share, f"{share:.2f}".lstrip("0"))


def _about_sequences(record: Record) -> str:
    config, row = record.config, record.results["sequences"][0]
    return f"Sequences: {config['rows']} of {config['steps']} tokens, components {row['component_tv']:.2f} apart"


def _caption(record: Record) -> str:
    rows, sequences = record.results["rows"], record.results["sequences"]
    worst = max(rows, key=lambda row: (row["V"], row["n"]))
    large = [row for row in rows if (row["V"], row["n"]) == (worst["V"], worst["n"])]
    alarms = {test: count / large[0]["runs"] for test, count in large[0]["rejected"].items()}
    nucleus = next(row for row in large if row["bug"] == "top-p 0.7")
    missed = [
        name
        for test, name in (("all cells", "all cells"), ("observed cells", "observed cells"), ("cosine", "the cosine"))
        if nucleus["rejected"][test] < nucleus["runs"] / 2
    ]
    wrong = sequences[1]
    ours, hamming = (wrong["rejected"][test] / wrong["runs"] for test in ("martingales, 1e-6", "Hamming MMD"))
    return (
        f"Share of runs in which each test rejects. A sampler that never draws the last {nucleus['tv']:.0%} of the "
        f"mass of {worst['V']:,} tokens passes {', '.join(missed) or 'no test'} at {worst['n']:,} draws; all cells "
        f"rejects {alarms['all cells']:.0%} of right samplers there at a level of 1%. One component per sequence is "
        f"found by our martingales in {ours:.0%} of runs at level 1e-6, by the Hamming kernel in {hamming:.0%} at .05. "
        "Orange: more false alarms than declared; green: rejected more often than right samplers are; grey: the test "
        "calls the sample too sparse, and fails."
    )
