"""Long generations: variances of ME over CE, growth, drift, the path's share, memory held, and ends."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.lines import Line2D

from me_stats.record import Record
from me_stats.report import Figure
from me_stats.report.style import COLORS, MARKERS, figure, save

_NAMES = {"log_prob": "log-probability"}
_FIRST = ("entropy", "log_prob", "repetition")  # what growth and drift show, the first that there is


def draw(record: Record, folder: Path) -> Figure:
    """Six panels from one run; bars are the record's intervals."""
    found, config = record.results, record.config
    fig, grid = figure(columns=2, height=4.6, nrows=2, ncols=3)
    ratios, growth, drifts, shares, memory, ends = grid.flat
    _ratios(ratios, found)
    shown = next((name for name in _FIRST if name in found["growth"]), next(iter(found["growth"] or found["drifts"])))
    _growth(growth, found["growth"].get(shown), shown, config)
    _drift(drifts, found["drifts"][shown], shown, config)
    _shares(shares, found)
    _memory(memory, found["lags"], config)
    _ends(ends, found, config)
    handles = [Line2D([], [], color=COLORS[arm], marker=MARKERS[arm], label=arm) for arm in ("ME", "CE")]
    handles += [
        Line2D([], [], color=COLORS["component 1"], marker=MARKERS["component 1"], label="blocks of ME's rows"),
        Line2D([], [], color=COLORS["control"], marker="X", linestyle="", label="one component per sequence"),
    ]
    fig.legend(handles=handles, loc="outside lower center", ncols=4)
    caption = _caption(record)
    return Figure(tuple(save(fig, folder / record.name, {"caption": caption, "key": record.key})), caption)


def _ratios(ax: Any, found: dict[str, Any]) -> None:
    rows = found["comparisons"]
    for place, row in enumerate(rows):
        for key, shift, color, marker in (
            ("ratio", -0.15, COLORS["ME"], MARKERS["ME"]),
            ("block_ratio", 0.15, COLORS["component 1"], MARKERS["component 1"]),
        ):
            ax.plot(row[key]["interval"], [place + shift] * 2, color=color, linewidth=1.0)
            ax.plot(row[key]["value"], place + shift, marker, color=color)
        control = found["control"].get(row["name"])
        if control is not None:
            ax.plot(control["interval"], [place] * 2, color=COLORS["control"], linewidth=0.6)
            ax.plot(control["value"], place, MARKERS["control"], color=COLORS["control"], markersize=4.5)
    ax.axvline(1, color="0.15", linestyle="--", linewidth=0.9)
    ax.set_yticks(np.arange(len(rows)), [_NAMES.get(row["name"], row["name"]) for row in rows])
    ax.set(xscale="log", title="Variance ratio to CE", ylim=(len(rows) - 0.5, -0.5))
    ticks = [tick for tick in (0.25, 0.5, 1, 2, 4, 8, 16, 32, 64) if ax.get_xlim()[0] <= tick <= ax.get_xlim()[1]]
    ax.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
    ax.minorticks_off()
    ax.grid(axis="y", visible=False)


def _growth(ax: Any, arms: dict[str, Any] | None, name: str, config: dict[str, Any]) -> None:
    if arms is None:
        ax.text(0.5, 0.5, "some block does not vary", transform=ax.transAxes, ha="center", color="0.35")
        ax.set_axis_off()
        return
    t = (np.arange(config["blocks"]) + 1) * config["steps"] / config["blocks"]
    scale = config["steps"] / config["blocks"]  # sums of block means become sums of tokens
    for arm in ("CE", "ME"):
        values = [np.array(arms[arm][key]) * scale**2 / t for key in ("variance", "lower", "upper")]
        ax.plot(t, values[0], color=COLORS[arm], marker=MARKERS[arm])
        ax.fill_between(t, values[1], values[2], color=COLORS[arm], alpha=0.15, linewidth=0)
    ax.set(xlabel="tokens t", title=f"Var of {_NAMES.get(name, name)} / t", ylim=(0, None))


def _drift(ax: Any, arms: dict[str, Any], name: str, config: dict[str, Any]) -> None:
    size = config["steps"] / config["blocks"]
    for arm, shift in (("CE", -0.1), ("ME", 0.1)):
        at = (np.array(arms[arm]["starts"]) + 0.5 + shift) * size
        ax.plot(at, arms[arm]["means"], color=COLORS[arm], marker=MARKERS[arm])
        ax.vlines(at, arms[arm]["lower"], arms[arm]["upper"], color=COLORS[arm], linewidth=0.9)
    ax.set(xlabel="tokens", title=f"Mean {_NAMES.get(name, name)}")


def _shares(ax: Any, found: dict[str, Any]) -> None:
    ax.set_title("Share of the path")
    if not found["shares"]:
        ax.text(0.5, 0.5, "not measured", transform=ax.transAxes, ha="center", color="0.35")
        ax.set_axis_off()
        return
    names = list(found["shares"])
    for place, name in enumerate(names):
        row = found["shares"][name]
        ax.plot(row["interval"], [place - 0.15] * 2, color=COLORS["ME"], linewidth=1.0)
        ax.plot(row["value"], place - 0.15, MARKERS["ME"], color=COLORS["ME"])
        blocks, pooled = found["block_shares"].get(name), found["pooled_shares"].get(name)
        if blocks is None:
            continue
        ax.plot(blocks["value"], [place + 0.2] * len(blocks["value"]), MARKERS["component 1"],
                color=COLORS["component 1"], markersize=2.5, alpha=0.6)  # fmt: skip
        ax.plot(pooled["interval"], [place + 0.2] * 2, color=COLORS["component 1"], linewidth=2.0)
    ax.axvline(0, color="0.15", linestyle="--", linewidth=0.9)
    ax.set_yticks(np.arange(len(names)), [_NAMES.get(name, name) for name in names])
    ax.set(xlabel="of the variance", ylim=(len(names) - 0.5, -0.5))
    ax.grid(axis="y", visible=False)


def _memory(ax: Any, lags: dict[str, Any], config: dict[str, Any]) -> None:
    t = (np.arange(config["blocks"]) + 1) * config["steps"] / config["blocks"]
    held, known = np.array(lags["held tokens"]), any(lags["held bytes"])
    values = np.array(lags["held bytes"]) / 1e6 if known else held
    ax.plot(t, values, color=COLORS["ME"], marker=MARKERS["ME"])
    ax.set(
        xlabel="tokens",
        title="Cache in use, MB a row" if known else "Tokens in caches, a row",
        ylim=(0, 1.2 * values.max()),
    )


def _ends(ax: Any, found: dict[str, Any], config: dict[str, Any]) -> None:
    ax.set_title("Rows before their first end")
    if found["log_rank"] is None:
        ax.text(0.5, 0.5, "fewer than 20 ends", transform=ax.transAxes, ha="center", color="0.35")
        ax.set_axis_off()
        return
    for arm in ("CE", "ME"):
        curve = found["survival"][arm]
        ax.plot(curve["t"], curve["alive"], color=COLORS[arm])
        ax.fill_between(curve["t"], curve["lower"], curve["upper"], color=COLORS[arm], alpha=0.15, linewidth=0)
    ax.set(xlabel="tokens", ylim=(0, 1))


def _caption(record: Record) -> str:
    found, config = record.results, record.config
    rows = found["comparisons"]
    widest = [row["ratio"]["interval"] for row in rows if row["n"] == max(row["n"] for row in rows)]
    low, high = min(interval[0] for interval in widest), max(interval[1] for interval in widest)
    agree = "do not differ" if record.held else "differ, or a control was missed"
    shares = found["shares"].values()
    path = ""
    if found["shares"]:
        most = max(estimate["interval"][1] for estimate in shares)
        path = f" The component path decides at most {min(1.0, most):.0%} of the variance of a row's mean."
    control = ""
    if found["control"]:
        worst = max(found["control"].values(), key=lambda estimate: estimate["value"])
        control = (
            f" One component per sequence ({config['control']} rows) is up to {worst['value']:.1f} times as variable."
        )
    return (
        f"ME and CE {agree} over {config['steps']:,} tokens ({found['label']}, {config['rows']:,} rows each). "
        f"Variance ratios of statistics of all rows: 95% intervals within [{low:.2f}, {high:.2f}].{control}"
        f"{path} Bars: 95% intervals; drift and ends: simultaneous."
    )
