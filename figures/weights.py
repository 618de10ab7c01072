"""The weights that explain each domain, what they cost on the others, and how often their intervals hold."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from me_stats.record import Record
from me_stats.report import Figure
from me_stats.report.style import COLORS, MARKERS, figure, save

_COLORS = {"prose": COLORS["component 1"], "code": COLORS["component 2"], "mixed": COLORS["component 3"]}
_MARKERS = {"prose": MARKERS["component 1"], "code": MARKERS["component 2"], "mixed": MARKERS["component 3"]}

_PALE = 0.05
"""Nats a token below which a loss is no dark cell, though it were the largest."""


def draw(record: Record, folder: Path) -> Figure:
    """Left: loss over λ and λ̂ by domain. Middle: loss at other domains' λ̂. Right: coverage of simulated intervals."""
    results = record.results
    simulated = "coverage" in results
    ratios = [1.15, 1, 1] if simulated else [1.15, 1]
    fig, axes = figure(columns=2, height=2.6, ncols=len(ratios), width_ratios=ratios)
    (_lines if results["curves"]["prose"] else _dots)(axes[0], results)
    _transfer(axes[1], results)
    if simulated:
        _coverage(axes[2], results["coverage"], record.config["confidence"])
    caption = _caption(record)
    return Figure(tuple(save(fig, folder / record.name, {"caption": caption, "key": record.key})), caption)


def _lines(ax: Any, results: dict[str, Any]) -> None:
    """Curves above 0, and below it λ̂ with its interval, one row a domain."""
    top = 1.05 * max(max(curve["excess"]) for curve in results["curves"].values())
    for place, (name, curve) in enumerate(results["curves"].items()):
        fit, color = results["fits"][name], _COLORS[name]
        ax.plot(curve["weight"], curve["excess"], color=color)
        y = -top * (0.07 + 0.07 * place)
        value, (low, high) = fit["weights"][0], fit["intervals"][0]
        ax.errorbar(
            value, y, xerr=[[max(value - low, 0)], [max(high - value, 0)]], fmt=_MARKERS[name], color=color, label=name
        )
    ax.axhline(0, color="0.3", linewidth=0.6)
    ax.set(xlim=(-0.02, 1.02), ylim=(-0.3 * top, top), xlabel=f"weight of {results['components'][0]}")
    ax.set(ylabel="loss above its least (nats/token)")
    ax.set_yticks([tick for tick in ax.get_yticks() if 0 <= tick <= top])
    ax.legend(loc="upper center", title="text", title_fontsize=7)
    ax.set_title("λ̂ with 95% intervals")


def _dots(ax: Any, results: dict[str, Any]) -> None:
    """More than two components: their weights, one row a domain."""
    names = results["components"]
    for i, component in enumerate(names):
        kind = f"component {i % 3 + 1}"
        for place, fit in enumerate(results["fits"].values()):
            value, (low, high) = fit["weights"][i], fit["intervals"][i]
            ax.errorbar(
                value, place + 0.18 * (i - (len(names) - 1) / 2),
                xerr=[[max(value - low, 0)], [max(high - value, 0)]], fmt=MARKERS[kind], color=COLORS[kind],
                label=component if place == 0 else None,
            )  # fmt: skip
    ax.set_yticks(range(len(results["fits"])), list(results["fits"]))
    ax.set(xlim=(-0.02, 1.02), ylim=(len(results["fits"]) - 0.5, -0.5), xlabel="weight", title="λ̂ with 95% intervals")
    ax.legend(loc="best")


def _transfer(ax: Any, results: dict[str, Any]) -> None:
    names, excess = list(results["fits"]), np.array(results["transfer"]["excess"])
    intervals = np.array(results["transfer"]["intervals"])
    ax.imshow(excess, cmap="Blues", vmin=0, vmax=max(1.3 * excess.max(), _PALE))
    digits = 3 if excess.max() >= 0.005 else 4
    for (i, j), value in np.ndenumerate(excess):
        dark = value > 0.65 * max(1.3 * excess.max(), _PALE)
        half = intervals[i, j, 1] - value
        text = "0" if i == j else f"{value:.{digits}f}\n±{half:.{digits}f}"
        ax.text(j, i, text, ha="center", va="center", fontsize=7, color="white" if dark else "0.15")
    ax.set_xticks(range(len(names)), names)
    ax.set_yticks(range(len(names)), names, rotation=90, va="center")
    ax.set(xlabel="text", ylabel="λ̂ fitted on", title="Loss added (nats/token)")
    ax.grid(visible=False)
    ax.tick_params(length=0)
    ax.spines[:].set_visible(False)


def _coverage(ax: Any, rows: list[dict[str, Any]], confidence: float) -> None:
    labels = []
    for place, row in enumerate(rows):
        share = row["covered"] / row["runs"]
        color = COLORS["CE"] if row["unit"] == "tokens" else COLORS["ME"]
        ax.plot([row["low"], row["high"]], [place, place], color=color, linewidth=1.2)
        ax.plot(share, place, "o" if row["unit"] == "tokens" else "s", color=color)
        others = ", ".join(f"{weight:g}" for weight in row["weights"])
        of = "documents" if row["unit"] == "documents" else f"of ({others})"
        labels.append(f"{row['truth']:g} {of}")
    ax.axvline(confidence, color="0.15", linestyle="--", linewidth=0.9)
    ax.set_yticks(range(len(rows)), labels, fontsize=6.2)
    lowest = min(row["low"] for row in rows)
    ax.set(xlim=(min(0.9, lowest - 0.01), 1.0), ylim=(len(rows) - 0.5, -0.5), xlabel="share of runs")
    if lowest > 0.9:
        ax.set_xticks([0.9, 0.95, 1.0])
    ax.set_title("Coverage, simulated")
    ax.grid(axis="y", visible=False)


def _caption(record: Record) -> str:
    results = record.results
    first, fits = results["components"][0], results["fits"]
    prose, code = (fits[name]["intervals"][0] for name in ("prose", "code"))
    apart = (prose[0] > code[1] or code[0] > prose[1]) and fits["prose"]["identified"] and fits["code"]["identified"]
    moves = "The best λ moves with the domain" if apart else "The best λ is not seen to move with the domain"
    spans = " and ".join(
        f"{fits[name]['weights'][0]:.2f} ({fits[name]['intervals'][0][0]:.2f} to {fits[name]['intervals'][0][1]:.2f}) "
        f"on {name}"
        for name in ("prose", "code")
    )
    gain = results["validated"]["mixed"]["best_single"]
    text = (
        f"{moves}: {first} has weight {spans} of {results['label']} (left; held-out text, 95% intervals robust by "
        f"document). On unseen mixed documents λ̂ gains {gain['difference']:.3f} nats a token on the better component "
        f"alone ({gain['interval'][0]:.3f} to {gain['interval'][1]:.3f})."
    )
    if "coverage" in results:
        low, high = (f(row["covered"] / row["runs"] for row in results["coverage"]) for f in (min, max))
        ignoring = next(row for row in results["coverage"] if row["ignoring"] is not None)
        naive = ignoring["ignoring"] / ignoring["runs"]
        text += (
            f" Simulated 95% intervals hold in {low:.1%} to {high:.1%} of {ignoring['runs']:,} runs a case; where each "
            f"document has one component, intervals that ignore documents hold in {naive:.0%}."
        )
    return text
