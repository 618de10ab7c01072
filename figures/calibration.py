"""How often each test rejects a right sampler, against its level: on or below the diagonal is right."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from scipy.stats import binom

from me_stats.record import Record
from me_stats.report import Figure
from me_stats.report.style import COLORS, figure, save

_KINDS = {
    "cells": ("chi-square of cells", COLORS["CE"]),
    "score": ("score", COLORS["component 1"]),
    "transform": ("probability transform", COLORS["component 3"]),
    "permutation": ("permutation", COLORS["component 2"]),
    "anytime": ("e-value or sequential", COLORS["ME"]),
    "combination": ("combination", "0.15"),
    "control": ("control, must be above", COLORS["control"]),
}


def draw(record: Record, folder: Path) -> Figure:
    """One panel a world; a curve ends where no run was rejected."""
    rows, exact = record.results["rows"], record.results["exact"]
    worlds = list(dict.fromkeys(row["world"] for row in rows))
    fig, grid = figure(columns=2, height=4.5, nrows=2, ncols=3)
    for ax, world in zip(grid.flat, worlds, strict=True):
        own = [row for row in rows if row["world"] == world]
        for row in sorted(own, key=lambda row: list(_KINDS).index(row["kind"])):
            levels, rates = _curve(row["levels"], np.array(row["alarms"]) / row["runs"])
            wide = row["kind"] in ("control", "combination")
            ax.plot(levels, rates, color=_KINDS[row["kind"]][1], linewidth=1.3 if wide else 0.8,
                    linestyle="--" if row["kind"] == "control" else "-")  # fmt: skip
        far = world == "far tail"
        if far:
            for row in exact:
                ax.plot(*_curve(row["levels"], np.array(row["rates"])), color=COLORS["floor"], linewidth=0.9)
        lowest = 1e-6 if far else 7e-4
        ax.plot([lowest, 0.1], [lowest, 0.1], color="0.15", linewidth=0.6, linestyle=":")
        _band(ax, [row for row in own if row["kind"] not in ("anytime", "control")], lowest)
        ax.set(xscale="log", yscale="log", xlim=(lowest, 0.14), ylim=(1e-7 if far else 1.2e-4, 1.0))
        tests = sum(row["kind"] != "control" for row in own)
        ax.set_title(world[0].upper() + world[1:])
        ax.text(0.03, 0.97, f"{tests} tests" + f" and {len(exact)} exact" * far, transform=ax.transAxes, va="top",
                fontsize=7, color="0.35")  # fmt: skip
    for ax in grid[:, 0]:
        ax.set_ylabel("share of runs that reject")
    for ax in grid[1]:
        ax.set_xlabel("level of the test")
    seen = {row["kind"] for row in rows}
    handles: list[Any] = [
        Line2D([], [], color=color, linestyle="--" if kind == "control" else "-", label=label)
        for kind, (label, color) in _KINDS.items()
        if kind in seen
    ]
    handles.append(Line2D([], [], color=COLORS["floor"], label="two cells, exact"))
    handles.append(Patch(facecolor="0.88", label="99% band of an exact test"))
    fig.legend(handles=handles, loc="outside lower center", ncols=4, columnspacing=1.6)
    tests = [row for row in rows if row["kind"] != "control" and row["world"] != "far tail"]
    above, runs = sum(bool(row["above"]) for row in tests), sum(row["runs"] for row in tests)
    at, controls = (
        [row["alarms"][row["levels"].index(0.05)] / row["runs"] for row in rows if (row["kind"] == "control") == control
         and 0.05 in row["levels"]]
        for control in (False, True)
    )  # fmt: skip
    caption = (
        f"{above or 'No'} test{'s' * (above > 1)} of {len(tests)} rejects a right sampler significantly more often "
        f"than its level ({runs:,} runs in all; transformers: {record.results['label']}). At level .05 the shares lie "
        f"between {min(at):.3f} and {max(at):.3f}; tests that hold at every look are conservative. Two usual mistakes, "
        f"as controls, reach {min(controls):.2f} and {max(controls):.2f}. The chi-square law is trusted only as far as "
        f"the expected counts allow: on two cells it reaches {max(row['worst'] for row in exact):.1f} times the level "
        "at most. Curves end where no run was rejected."
    )
    return Figure(tuple(save(fig, folder / record.name, {"caption": caption, "key": record.key})), caption)


def _curve(levels: Any, rates: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The part of a curve that a logarithmic axis can show."""
    order = np.argsort(levels)
    x, y = np.asarray(levels)[order], rates[order]
    return x[y > 0], y[y > 0]


def _band(ax: Any, rows: list[dict[str, Any]], lowest: float) -> None:
    """Where 99% of the curves of an exact test lie, for the fewest runs in the panel."""
    runs = min(row["runs"] for row in rows)
    levels = np.geomspace(lowest, 0.1, 60)
    low, high = (binom.ppf(q, runs, levels) / runs for q in (0.005, 0.995))
    ax.fill_between(levels, np.maximum(low, 1e-9), high, color="0.88", linewidth=0, zorder=0)
