"""Shares of the component path along the row, by two designs, and what each estimator saves."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from me_stats.record import Record
from me_stats.report import Figure
from me_stats.report.style import COLORS, MARKERS, figure, save

_DESIGNS = {"pairs": ("pairs of runs", "CE"), "nested": ("rows on one path", "ME")}
_SHOWN = ("log-probability", "log-ratio of models")
_METHODS = {
    "common random numbers": (COLORS["component 3"], "D"),
    "controls from laws": (COLORS["component 1"], "^"),
    "controls from the trace": (COLORS["component 2"], "v"),
    "mean given the prefix": (COLORS["control"], "X"),
    "mean over components": (COLORS["CE"], "o"),
}


def draw(record: Record, folder: Path) -> Figure:
    """Left and middle: share per step and cumulative, for two statistics. Right: factors gained by each method."""
    shares, gains = record.results["shares"], record.results["gains"]
    names = [name for name in _SHOWN if name in shares]
    fig, axes = figure(columns=2, height=3.6, ncols=len(names) + 1, width_ratios=[1] * len(names) + [1.15])
    for ax, name in zip(axes, names, strict=False):
        _shares(ax, shares[name], shares["steps"])
        ax.set(title=name, xlabel="tokens")
    # The first steps have bands that would leave no room for the rest.
    late = [
        one[key][shares["steps"] // 8 :]
        for name in names
        for one in _curves(shares[name])
        for key in ("lower", "upper")
    ]
    for ax in axes[:-1]:
        ax.set_ylim(min(map(min, late)) - 0.05, max(map(max, late)) + 0.05)
    axes[0].set_ylabel("share of the component path")
    _gains(axes[-1], gains)
    handles = {label: h for ax in axes for h, label in zip(*ax.get_legend_handles_labels(), strict=True)}
    fig.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=4, columnspacing=1.2)
    caption = _caption(record)
    return Figure(tuple(save(fig, folder / record.name, {"caption": caption, "key": record.key})), caption)


def _curves(shares: dict[str, Any]) -> list[dict[str, Any]]:
    return [shares[kind][design] for kind in shares for design in _DESIGNS]


def _shares(ax: Any, shares: dict[str, Any], steps: int) -> None:
    """Bands: running sums. Bars: single steps, a few of them."""
    position = np.arange(1, steps + 1)
    few = np.unique(np.linspace(0, steps - 1, min(steps, 12)).astype(int))
    for design, (label, role) in _DESIGNS.items():
        color, one = COLORS[role], shares["cumulative"][design]
        ax.fill_between(position, one["lower"], one["upper"], color=color, alpha=0.18, linewidth=0)
        ax.plot(position, one["value"], color=color, label=f"running sum, {label}")
        step = {key: np.asarray(shares["step"][design][key])[few] for key in ("value", "lower", "upper")}
        offset = {"pairs": -1, "nested": 1}[design] * steps / 150
        ax.errorbar(
            position[few] + offset, step["value"],
            yerr=[step["value"] - step["lower"], step["upper"] - step["value"]],
            fmt=MARKERS[role], color=color, markersize=2.2, linewidth=0.6, capsize=0, alpha=0.8,
            label=f"one step, {label}",
        )  # fmt: skip
    ax.axhline(0, color="0.15", linewidth=0.7)


def _gains(ax: Any, gains: list[dict[str, Any]]) -> None:
    """One row a statistic; factors on a log scale, 1 is no gain."""
    statistics = list(dict.fromkeys(row["statistic"] for row in gains))
    labelled: set[str] = set()
    for place, statistic in enumerate(statistics):
        own = [row for row in gains if row["statistic"] == statistic]
        for shift, row in zip(np.linspace(-0.27, 0.27, len(own)) if len(own) > 1 else [0.0], own, strict=True):
            color, marker = _METHODS[row["method"]]
            value, (low, high) = (row["factor"][key] for key in ("value", "interval"))
            if not all(isinstance(one, float) and one > 0 for one in (value, low, high)):
                continue  # infinite: no place on this axis
            label = None if row["method"] in labelled else row["method"]
            labelled.add(row["method"])
            ax.plot([low, high], [place + shift] * 2, color=color, linewidth=1.0)
            ax.plot(value, place + shift, marker, color=color, markersize=3.5, linestyle="", label=label)
    ax.axvline(1, color="0.15", linestyle="--", linewidth=0.9)
    ax.set_yticks(np.arange(len(statistics)), [_short(name) for name in statistics])
    ax.set_ylim(len(statistics) - 0.5, -0.5)
    ax.grid(axis="y", visible=False)
    ax.set(xscale="log", xlabel="Var plain/Var reduced", title="rows saved")
    # Plain numbers: a range of less than a decade has no tick labels otherwise.
    low, high = ax.get_xlim()
    ticks = [tick for tick in (0.1, 0.2, 0.5, 1, 1.5, 2, 3, 5, 10, 20, 50, 100) if low <= tick <= high]
    ax.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
    ax.minorticks_off()


def _short(name: str) -> str:
    return name.replace(" by the last model", "\nby the last model").replace(" of models", "\nof models")


def _caption(record: Record) -> str:
    shares, gains = record.results["shares"], record.results["gains"]
    ends = []
    for name in _SHOWN:
        one = shares[name]["cumulative"]["nested"]
        ends.append(f"{one['value'][-1]:.0%} ({one['lower'][-1]:.0%} to {one['upper'][-1]:.0%}) for {name}")
    gained = [row for row in gains if row["factor"]["interval"][0] != "inf" and row["factor"]["interval"][0] > 1]
    best: dict[str, float] = {}
    for row in gained:
        value = row["factor"]["value"]
        if isinstance(value, float) and value > best.get(row["method"], 0.0):
            best[row["method"]] = value
    said = ", ".join(f"{name} up to {value:.1f}" for name, value in sorted(best.items(), key=lambda item: -item[1]))
    none = sorted({row["method"] for row in gains} - set(best))
    agree = "agree" if shares["largest_z"] <= shares["limit"] else "do not agree"
    unbiased = all(ok for name, ok in record.checks.items() if "unbiased" in name or "intervals cover" in name)
    return (
        f"Which model wrote which token explains {' and '.join(ends)} of the variance over "
        f"continuations of {shares['steps']} tokens ({record.results['label']}; bands and bars: 95% intervals; the two "
        f"designs {agree}). "
        f"Factors in variance: {said or 'none above 1'}{'; no gain: ' + ', '.join(none) if none else ''}. "
        f"On toys all estimators {'keep' if unbiased else 'do not keep'} the exact value."
    )
