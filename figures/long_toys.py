"""Long rows of toys: variance per token against closed forms, and the longest wait of a component against its law."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.lines import Line2D
from matplotlib.ticker import NullFormatter

from me_stats.record import Record
from me_stats.report import Figure
from me_stats.report.style import COLORS, MARKERS, figure, save


def draw(record: Record, folder: Path) -> Figure:
    """Left and middle: Var S_t/t of each toy, for CE, ME and the control. Right: longest waits against T."""
    results = record.results
    names = list(dict.fromkeys(row["toy"] for row in results["moments"]))
    fig, axes = figure(columns=2, height=2.7, ncols=3)
    for ax, name in zip(axes, names, strict=False):
        own = [row for row in results["moments"] if row["toy"] == name and row["statistic"] == "token"]
        long = [row for row in results["long"] if row["toy"] == name and row["statistic"] == "token"]
        _growth(ax, own, long, record.config["window"])
        ax.set(title=f"Var $S_t$ / $t$, {name}", xlabel="tokens t")
    _waits(axes[-1], results["waits"])
    handles = [
        Line2D([], [], marker=MARKERS[name], linestyle="", color=COLORS[name], label=label)
        for name, label in (("CE", "CE"), ("ME", "ME"), ("control", "one component per sequence"))
    ]
    handles += [
        Line2D([], [], color="0.15", label="closed form"),
        Line2D([], [], color="0.6", linewidth=4, alpha=0.5, label="1% to 99% of the exact law"),
    ]
    fig.legend(handles=handles, loc="outside lower center", ncols=5, columnspacing=1.2)
    caption = _caption(record)
    return Figure(tuple(save(fig, folder / record.name, {"caption": caption, "key": record.key})), caption)


def _growth(ax: Any, rows: list[dict[str, Any]], long: list[dict[str, Any]], window: int) -> None:
    for row in rows:
        t, name = np.array(row["t"]), row["sampler"]
        ax.plot(t, np.array(row["variance"]) / t, MARKERS[name], color=COLORS[name], fillstyle="none", clip_on=False)
        line = "--" if name == "control" else "-"
        ax.plot(t, np.array(row["exact"]) / t, line, color="0.15", linewidth=0.8, zorder=1)
    for row in long:
        name = row["sampler"]
        ax.plot(window, row["per_token"], MARKERS[name], color=COLORS[name], fillstyle="none")
    last = max(row["t"][-1] for row in rows)
    ax.plot([last, window], [long[0]["limit"]] * 2, color="0.15", linewidth=0.8, zorder=1)
    ax.set(xscale="log", yscale="log")
    ax.yaxis.set_minor_formatter(NullFormatter())


def _waits(ax: Any, rows: list[dict[str, Any]]) -> None:
    """The smallest, a middle and the largest weight of both toys: more would lie on each other."""
    weights = sorted({row["weight"] for row in rows})
    shown = sorted({weights[0], weights[len(weights) // 2], weights[-1]})
    colors = [COLORS[f"component {i}"] for i in (1, 2, 3)]
    for weight, color in zip(shown, colors, strict=False):
        own = sorted((row for row in rows if row["weight"] == weight), key=lambda row: row["steps"])
        steps = [row["steps"] for row in own]
        ax.fill_between(
            steps, [row["low"] for row in own], [row["high"] for row in own], color=color, alpha=0.25, linewidth=0
        )
        ax.plot(steps, [row["exact"] for row in own], color=color, linewidth=0.8)
        ax.plot(steps, [row["mean"] for row in own], MARKERS["ME"], color=color, fillstyle="none")
        ax.annotate(f"λ = {weight:g}", (steps[-1], own[-1]["exact"]), (-6, 5), textcoords="offset points", ha="right")
    ax.set(xscale="log", ylim=(0, None), xlabel="tokens a row T", title="longest wait (steps)")


def _caption(record: Record) -> str:
    results, config = record.results, record.config
    drawn = [row for row in results["moments"] if row["sampler"] != "control"]
    once = [row for row in results["moments"] if row["sampler"] == "control"]
    waits = [row for row in results["waits"] if row["steps"] == max(config["waits"])]
    timed = [row for row in results["long"] if "tau" in row]
    right = record.held
    lead = "Long rows keep to their closed forms" if right else "Some long rows depart from their closed forms"
    return (
        f"{lead}: variances of sums lie within {max(row['error'] for row in drawn):.0%} of them for CE and ME up to "
        f"{config['steps']:,} tokens ({config['rows']:,} rows), and in windows of {config['window']:,} of rows of "
        f"{config['long_steps']:,} (last marks). One component per sequence grows with slope "
        f"{max(row['rate'] for row in once):.2f} on its way to 2. Autocorrelation times are within "
        f"{max(abs(row['tau'] / row['exact_tau'] - 1) for row in timed):.1%}. Longest waits grow like log T, to at "
        f"most {max(row['most'] for row in waits)} in {max(config['waits']):,} tokens (squares: means of rows)."
    )
