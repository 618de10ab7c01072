"""Bounds on TV: how narrow they get with the number of draws, and how often they hold."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.lines import Line2D

from me_stats.equivalence import binomial_interval
from me_stats.record import Record
from me_stats.report import Figure
from me_stats.report.style import COLORS, figure, save

_PALETTE = (COLORS["CE"], COLORS["component 1"], COLORS["component 2"], COLORS["ME"])
_MARKERS = ("o", "s", "D")
_NAMES = {
    "upper, whole vocabulary": "upper bound,\nwhole vocabulary",
    "upper, 64 cells": "upper bound,\n64 cells",
    "lower, two halves": "lower bound,\ntwo halves",
    "sequences, betting": "sequences,\nbetting",
    "sequences, Hoeffding": "sequences,\nHoeffding",
}


def draw(record: Record, folder: Path) -> Figure:
    """Left: median upper bound against draws, by true TV. Right: coverage of each bound, all laws together."""
    rows, confidence = record.results["rows"], record.config["confidence"]
    cases = record.config["distances"]
    colors = dict(zip(cases, _PALETTE, strict=False))
    vocabulary = max(row["V"] for row in rows if row["V"])
    fig, (width, coverage) = figure(columns=2, height=3.1, ncols=2, width_ratios=[1.15, 1])
    chosen = [
        r for r in rows if r["V"] == vocabulary and r["law"] == "Zipf" and r["bound"] == "upper, whole vocabulary"
    ]
    for case in cases:
        own = sorted((row for row in chosen if row["case"] == case), key=lambda row: row["n"])
        n = [row["n"] for row in own]
        width.plot(n, [row["median"] for row in own], "o-", color=colors[case])
        if case:
            width.axhline(case, color=colors[case], linestyle=":", linewidth=0.9)
        else:
            width.plot(n, [row["plugin"] for row in own], "X--", color=COLORS["control"], markersize=5)
            width.plot(n, [row["null_value"] for row in own], "_", color=COLORS["floor"], markersize=14)
    width.set(xscale="log", yscale="log", xlabel="draws", ylabel="total variation")
    width.set_title(f"Zipf law over {vocabulary:,} tokens")
    _coverage(coverage, rows, colors)
    coverage.axvline(confidence, color="0.15", linestyle="--", linewidth=0.9)
    coverage.set(xlabel="share of runs in which the bound holds", title="Coverage")
    handles = [Line2D([], [], marker="o", color=color, label=f"true TV {case:g}") for case, color in colors.items()]
    handles += [
        Line2D([], [], marker="X", linestyle="--", color=COLORS["control"], label="plug-in estimate at TV 0"),
        Line2D([], [], marker="_", linestyle="", color=COLORS["floor"], markersize=10, label="bound at TV 0, expected"),
        Line2D([], [], color="0.15", linestyle="--", linewidth=0.9, label=f"stated: {confidence:g}"),
    ]
    sizes = sorted({row["V"] for row in rows if row["V"]})
    handles += [
        Line2D([], [], marker=marker, linestyle="", color="0.35", label=f"{size:,} tokens")
        for size, marker in zip(sizes, _MARKERS, strict=False)
    ]
    fig.legend(handles=handles, loc="outside lower center", ncols=5, columnspacing=1.2)
    perfect = [row for row in chosen if row["case"] == 0]
    most = max(perfect, key=lambda row: row["n"])
    short = sum(row["short"] for row in rows)
    upper = [row for row in rows if row["bound"] == "upper, whole vocabulary"]
    total = sum(row["covered"] for row in upper) / sum(row["runs"] for row in upper)
    held = "Not all bounds hold" if short else "The bounds hold"
    caption = (
        f"{held}: in {short or 'no'} case{'s' * (short > 1)} of {len(rows)} is coverage significantly below "
        f"{confidence:g}, and the upper bound over the whole vocabulary covers in {total:.1%} of its runs (uniform, "
        f"Zipf and peaked laws, {min(r['n'] for r in upper):,} to {most['n']:,} draws; bars: 95% intervals). With "
        f"{most['n']:,} draws of a right sampler it certifies TV {most['median']:.4f} over {vocabulary:,} Zipf tokens, "
        f"where the plug-in estimate says {most['plugin']:.3f}. Dotted: the true TV."
    )
    return Figure(tuple(save(fig, folder / record.name, {"caption": caption, "key": record.key})), caption)


def _coverage(ax: Any, rows: list[dict[str, Any]], colors: dict[float, str]) -> None:
    """One row a bound; one mark for each true TV and vocabulary, over all laws and numbers of draws."""
    names = [name for name in _NAMES if any(row["bound"] == name for row in rows)]
    sizes = sorted({row["V"] or 0 for row in rows if row["V"]})
    for place, name in enumerate(names):
        own = [row for row in rows if row["bound"] == name]
        groups = sorted({(row["V"] or 0, row["case"]) for row in own})
        for shift, (size, case) in zip(np.linspace(-0.34, 0.34, len(groups)), groups, strict=True):
            group = [row for row in own if (row["V"] or 0, row["case"]) == (size, case)]
            covered, runs = (sum(row[key] for row in group) for key in ("covered", "runs"))
            low, high = binomial_interval(covered, runs)
            marker = _MARKERS[sizes.index(size)] if size in sizes else "D"
            ax.plot([low, high], [place + shift] * 2, color=colors[case], linewidth=1.0)
            ax.plot(covered / runs, place + shift, marker, color=colors[case], markersize=3)
    ax.set_yticks(np.arange(len(names)), [_NAMES[name] for name in names])
    ax.set_ylim(len(names) - 0.5, -0.5)
    ax.grid(axis="y", visible=False)
