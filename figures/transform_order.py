"""What separates the published CE from ME: TV a step by cause, against k, T and p, and over whole sequences."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.lines import Line2D
from matplotlib.ticker import NullFormatter

from me_stats.record import Record
from me_stats.report import Figure
from me_stats.report.style import COLORS, figure, save

_CAUSES = {
    "union": "union of top-k",
    "joint": "renormalised jointly",
    "top_k_again": "top-k of the mixture",
    "first_subtoken": "first-subtoken scores",
}
_AXES = {"k": "top-k: k", "T": "temperature T", "p": "top-p: p"}
_PUBLISHED, _ORDER, _ALONE = COLORS["CE"], COLORS["component 1"], COLORS["component 2"]
_HOLLOW: dict[str, Any] = {"marker": "^", "markerfacecolor": "white", "linestyle": "--", "linewidth": 0.9}


def draw(record: Record, folder: Path) -> Figure:
    """Causes and sequences above; below them, where the record has curves, TV a step against k, T and p."""
    found = record.results
    above = 0.6 + 0.155 * len(_lines(found["ledger"]))
    fig, frame = figure(columns=2, height=above + (1.95 if found["curves"] else 0.35))
    frame.remove()  # two panels above three fit no one grid
    grid = fig.add_gridspec(2 if found["curves"] else 1, 1, height_ratios=[above, 1.6][: 1 + bool(found["curves"])])
    upper = grid[0].subgridspec(1, 2, width_ratios=[1.45, 1])
    _ledger(fig.add_subplot(upper[0]), found)
    _sequences(fig.add_subplot(upper[1]), found["sequences"])
    handles = [
        Line2D([], [], color=_PUBLISHED, marker="D", label="published CE against ME"),
        Line2D([], [], color=_PUBLISHED, marker="o", markersize=2.5, linewidth=0.8, label="causes so far"),
        Line2D([], [], color=_ALONE, marker="o", markerfacecolor="white", linestyle="", label="cause alone"),
    ]
    if found["curves"]:
        _curves(grid[1].subgridspec(1, 3).subplots(sharey=True), found["curves"])
        handles.append(Line2D([], [], color=_ORDER, **_HOLLOW, label="transform after, not before mixing"))
    fig.legend(handles=handles, loc="outside upper center", ncols=4, columnspacing=1.4, handletextpad=0.5)
    caption = _caption(record)
    return Figure(tuple(save(fig, folder / record.name, {"caption": caption, "key": record.key})), caption)


def _lines(ledger: dict[str, Any]) -> list[tuple[str, dict[str, Any] | None]]:
    """Lines of the first panel: each setting, and below it its causes where it has several."""
    lines: list[tuple[str, dict[str, Any] | None]] = []
    for name in sorted(ledger, key=lambda name: (len(ledger[name]["causes"]) == 1, _largest_k(name))):
        causes = ledger[name]["causes"]
        lines += [(name, None), *((name, cause) for cause in causes if len(causes) > 1)]
    return lines


def _largest_k(name: str) -> tuple[int, str]:
    return (int(name.split(",")[0].removeprefix("k = ")) if name.startswith("k") else 0, name)


def _ledger(ax: Any, found: dict[str, Any]) -> None:
    lines, ledger = _lines(found["ledger"]), found["ledger"]
    # A setting with its causes stands a little apart from the one above.
    grouped = [len(ledger[name]["causes"]) > 1 for name, _ in lines]
    starts = [cause is None for _, cause in lines]
    apart = [start and (own or before) for start, own, before in zip(starts, grouped, [False, *grouped], strict=False)]
    places = np.arange(len(lines)) + 0.45 * np.cumsum(apart)
    means = [mean for case in ledger.values() for mean in (case["total"]["mean"], *_alone(case)) if mean > 1e-4]
    left = 10 ** np.floor(np.log10(min(means, default=1e-3)))
    steps: dict[str, list[tuple[float, float]]] = {}
    for place, (name, cause) in zip(places, lines, strict=True):
        if cause is None:
            total = ledger[name]["total"]
            low, _, high = np.maximum(total["quantiles"], left)
            ax.plot([low, high], [place] * 2, color=_PUBLISHED, linewidth=3, alpha=0.3)
            ax.plot(total["mean"], place, "D", color=_PUBLISHED, markersize=4, zorder=3)
            ax.text(2.1, place, f"{total['mean']:.3f}", va="center", ha="right", fontsize=6.5, color=_PUBLISHED)
            continue
        steps.setdefault(name, []).append((max(cause["cumulative"]["mean"], left), place))
        if cause["alone"]["mean"] > left:
            ax.plot(cause["alone"]["mean"], place, "o", color=_ALONE, markerfacecolor="white", markersize=4.5)
    for line in steps.values():
        x, y = zip(*line, strict=True)
        ax.step(x, y, where="pre", color=_PUBLISHED, linewidth=0.8)
        ax.plot(x, y, "o", color=_PUBLISHED, markersize=2.5)
    ax.set(xscale="log", xlim=(left, 2.2), ylim=(places[-1] + 0.6, places[0] - 0.6), xlabel="TV per step")
    ax.set_title("Settings, and their causes")
    ax.set_yticks(places, [name if cause is None else _name(cause) for name, cause in lines], fontsize=6.5)
    for label, (_, cause) in zip(ax.get_yticklabels(), lines, strict=True):
        label.set_fontweight("bold" if cause is None else "normal")
    ax.grid(axis="y", visible=False)
    ax.tick_params(axis="y", length=0)


def _alone(case: dict[str, Any]) -> list[float]:
    return [cause["alone"]["mean"] for cause in case["causes"]]


def _name(cause: dict[str, Any]) -> str:
    return _CAUSES.get(cause["name"], cause["name"].replace("_", "-"))


def _sequences(ax: Any, found: dict[str, Any]) -> None:
    lengths = [row["length"] for row in found["lengths"]]
    low, high = zip(*(row["interval"] for row in found["lengths"]), strict=True)
    ax.fill_between(lengths, low, high, color=_PUBLISHED, alpha=0.18, linewidth=0)
    ax.plot(lengths, [row["tv"] for row in found["lengths"]], "D-", color=_PUBLISHED, label="TV, 95% intervals")
    bound = [row["outside_lower"] for row in found["lengths"]]
    ax.plot(lengths, bound, "X--", color=COLORS["control"], label="tokens that CE excludes:\nlower bound, 97.5%")
    ax.set(xscale="log", ylim=(0, 1.02), xlabel="tokens", ylabel="TV of sequences", title="k = 10, whole sequences")
    ax.set_xticks([length for length in lengths if length & (length - 1) == 0])
    ax.set_xticklabels([f"{length}" for length in lengths if length & (length - 1) == 0])
    ax.xaxis.set_minor_formatter(NullFormatter())
    ax.minorticks_off()
    ax.legend(loc="best")


def _curves(axes: Any, curves: dict[str, list[dict[str, Any]]]) -> None:
    for ax, (axis, points) in zip(axes, curves.items(), strict=True):
        at = [point["at"] for point in points]
        for kind, color, look in (("published", _PUBLISHED, {"marker": "D"}), ("order", _ORDER, _HOLLOW)):
            low, high = zip(*(point[kind]["interval"] for point in points), strict=True)
            ax.fill_between(at, np.maximum(low, 0), high, color=color, alpha=0.18, linewidth=0)
            ax.plot(at, [point[kind]["mean"] for point in points], color=color, **look)
        ax.set(xlabel=_AXES[axis] + ("" if axis == "k" else " (published: k = 10)"), ylim=(0, None))
        if axis == "k":
            ax.set_xscale("log")
    axes[0].set_ylabel("TV per step")


def _caption(record: Record) -> str:
    found = record.results
    ten, sequences = found["ledger"]["k = 10"], found["sequences"]
    at = [row for row in sequences["lengths"] if row["length"] <= 100][-1]
    largest = max(ten["causes"], key=lambda cause: cause["alone"]["mean"])
    below = "; below, bands are 95% intervals of the mean" if found["curves"] else ""
    return (
        f"With k = 10 the published CE is TV {ten['total']['mean']:.3f} a step from ME, and {at['tv']:.2f} over "
        f"{at['length']} tokens ({found['label']}; {found['prefixes']:,} prefixes, {sequences['rows']:,} sequences). "
        f"Tokens that CE excludes get {ten['total']['outside_support']:.1%} of ME's mass; the largest single cause is "
        f"{_name(largest)}. Bars: 10% to 90% of prefixes{below}. With the transforms inside the components CE and ME "
        f"agree to {max(found['floor'], 1e-9):.0e} a step."
    )
