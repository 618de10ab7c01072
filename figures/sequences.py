"""Whole sequences: exact TV where they can be enumerated, martingale tests where they cannot."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np

from me_stats.record import Record
from me_stats.report import Figure
from me_stats.report.style import COLORS, MARKERS, figure, save

_SMALLEST = 1e-40  # p-values below are drawn here


def draw(record: Record, folder: Path) -> Figure:
    """Left: exact TV by case. Right: p-value of each test for ME, CE and the control."""
    cases, tests = record.results["exact"], record.results["tests"]
    fig, (exact, pvalues) = figure(columns=2, height=2.6, ncols=2, width_ratios=[1, 1.25])
    place = np.arange(len(cases))
    for key, name in (("tv_ce", "CE"), ("tv_me", "ME"), ("tv_sequence_mixture", "control")):
        values = [max(case[key], 1e-17) for case in cases]
        exact.plot(place, values, MARKERS[name], color=COLORS[name], markersize=4.5)
    exact.axhline(record.config["floor"], color=COLORS["floor"], linestyle="--", linewidth=0.9)
    exact.set(yscale="log", ylim=(1e-9, 2), ylabel="total variation (exact)", title="Every path of the sampler")
    exact.set_xticks(place, [f"{'top ' + str(c['kept']) if c['kept'] else 'all tokens'}\nT = {c['T']}" for c in cases])
    exact.set_xlim(-0.5, len(cases) - 0.5)
    names = [result["name"] for result in tests["ME"]["results"]]
    for name, label, shift in (("CE", "CE", -0.18), ("ME", "ME", 0.0), ("control", "sequence mixture", 0.18)):
        results = tests["sequence mixture" if name == "control" else name]["results"]
        p = [max(result["pvalue"], _SMALLEST) for result in results]
        kind = MARKERS[name]
        pvalues.plot(p, np.arange(len(names)) + shift, kind, color=COLORS[name], label=label, markersize=4.5)
    level = record.config["level"] / len(names)
    pvalues.axvline(level, color=COLORS["floor"], linestyle="--", linewidth=0.9)
    pvalues.set(xscale="log", xlim=(_SMALLEST / 10, 10), xlabel="p-value", title="Martingale tests on generations")
    pvalues.set_yticks(np.arange(len(names)), names)
    pvalues.invert_yaxis()
    fig.legend(*pvalues.get_legend_handles_labels(), loc="outside lower center", ncols=3)
    worst = max(case["tv_me"] for case in cases)
    control = tests["sequence mixture"]
    exponent = math.floor(math.log10(max(control["pvalue"], 1e-300)))
    rejected = [name for name in ("CE", "ME") if tests[name]["pvalue"] <= record.config["level"]]
    outcome = f"the tests reject {' and '.join(rejected)}" if rejected else "no test rejects CE or ME"
    caption = (
        f"The law of the real ME sampler over whole sequences, enumerated path by path through the transformer, is "
        f"within TV {worst:.1e} of the CE law (left, {record.results['label']}; dashed: what is required). "
        f"Right: on {tests['ME']['tokens']:,} generated tokens {outcome} at the dashed level; drawing one component "
        f"per sequence has p below 1e{exponent + 1} ({control['worst']})."
    )
    return Figure(tuple(save(fig, folder / record.name, {"caption": caption, "key": record.key})), caption)
