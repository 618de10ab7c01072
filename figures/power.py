"""Tokens until each planted bug is found, and how the evidence grows."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.lines import Line2D

from me_stats.record import Record
from me_stats.report import Figure
from me_stats.report.style import COLORS, figure, save

_COLORS = {
    "weights": COLORS["component 2"],
    "dependence": COLORS["ME"],
    "cache": COLORS["CE"],
    "transform": COLORS["component 1"],
    "draw": COLORS["control"],
    "structure": "0.35",
}
_PATHS: dict[str, tuple[str, str]] = {
    "one component per sequence": (COLORS["ME"], "-"),
    "components in turn": (COLORS["ME"], "--"),
    "sticky component": (COLORS["ME"], ":"),
    "stale cache": (COLORS["CE"], "-"),
    "weights off by five points": (COLORS["component 2"], "-"),
    "temperature 1.05": (COLORS["component 1"], "-"),
    "right ME": ("0.15", "-"),
    "right CE": ("0.15", ":"),
}
_FOUND_BY = {
    "hidden Markov": "hidden Markov",
    "weights": "weights",
    "tilts": "tilts",
    "transform by id, pairs": "pairs of ids",
    "transform by rank": "ranks",
    "support": "probability zero",
}


def draw(record: Record, folder: Path) -> Figure:
    """Left: median and quartiles of tokens to E >= 1e9 by bug. Right: log E over tokens of some bugs."""
    cap, threshold = record.config["cap"], -math.log10(record.config["alpha"])
    rows = sorted(record.results["mutants"], key=lambda row: (row["median"] or math.inf, row["name"]))
    height = max(3.0, 1.4 + 0.125 * len(rows))
    fig, (dots, paths) = figure(columns=2, height=height, ncols=2, width_ratios=[1.15, 1])
    on_models = {row["name"]: row for row in record.results["siblings"] if row["target"]}
    for place, row in enumerate(rows):
        _row(dots, place, row, cap, on_models.get(row["name"]))
    dots.set(xscale="log", xlim=(30, 12 * cap), xlabel=f"tokens until E ≥ $10^{{{threshold:.0f}}}$")
    dots.set_xticks([100, 1000, 10_000, 100_000], ["100", "1k", "10k", "100k"])
    dots.minorticks_off()
    dots.set_yticks(np.arange(len(rows)), [row["name"] for row in rows], fontsize=6.2)
    dots.set_ylim(len(rows) - 0.4, -0.6)
    dots.set_title("Tokens until a bug is found")
    _evidence(paths, record, threshold, height)
    kinds = [kind for kind in _COLORS if any(row["size"] == kind for row in rows)]
    handles = [Line2D([], [], marker="o", linestyle="", color=_COLORS[kind], label=kind) for kind in kinds]
    handles.append(
        Line2D([], [], marker="D", linestyle="", markerfacecolor="none", color="0.2", label="on transformers")
    )
    fig.legend(handles=handles, loc="outside lower center", ncols=len(handles), columnspacing=1.2)
    caption = _caption(record, rows, cap, threshold)
    return Figure(tuple(save(fig, folder / record.name, {"caption": caption, "key": record.key})), caption)


def _row(ax: Any, place: int, row: dict[str, Any], cap: int, on_model: dict[str, Any] | None) -> None:
    color = _COLORS[row["size"]]
    low, high = (row[key] or cap for key in ("low", "high"))
    if row["median"]:
        ax.plot([low, high], [place, place], color=color, linewidth=1.6, solid_capstyle="butt")
        ax.plot(row["median"], place, "o", color=color)
        found = _FOUND_BY.get(row["family"], row["family"])
    else:
        ax.plot(cap, place, ">", color=color, markersize=4)
        check = f"check: {row['check']['worst']}" if row["check"]["rejected"] else "missed"
        found = f"> {cap // 1000}k; {'check_session' if row['session_rejected'] else check}"
    if on_model and on_model["median"]:
        ax.plot(on_model["median"], place, "D", color="0.2", markerfacecolor="none", markeredgewidth=0.8)
    # Beside the mark: to its right, or to its left where it stands at the cap.
    end = max(high, (on_model or {}).get("median") or 0) if row["median"] else cap
    side: dict[str, Any] = {"xytext": (5, 0), "ha": "left"} if row["median"] else {"xytext": (-5, 0), "ha": "right"}
    ax.annotate(found, (end, place), textcoords="offset points", va="center", fontsize=6, color="0.35", **side)


def _evidence(ax: Any, record: Record, threshold: float, height: float) -> None:
    top, lowest = threshold + 5, -2.0
    # Room for the legend, which is about an inch high, below all paths.
    share = 1.0 / (height - 1.0)
    bottom = -(top * share - lowest) / (1 - share)
    for name, (color, line) in _PATHS.items():
        if name in record.results["paths"]:
            path = record.results["paths"][name]
            values = np.array(path["log10_e"], dtype=float)
            right = name.startswith("right")
            ax.plot(path["tokens"], values, line, color=color, linewidth=1.0, label=name, zorder=2 if right else 3)
    ax.axhline(threshold, color=COLORS["floor"], linestyle="--", linewidth=0.9)
    ax.text(27, threshold + 0.2, "rejected", fontsize=6, color="0.35")
    ax.set(xscale="log", xlim=(25, 1.2 * record.config["cap"]), ylim=(bottom, top), xlabel="tokens")
    ax.set(ylabel="$\\log_{10} E$", title="Evidence as it comes in")
    ax.set_xticks([100, 1000, 10_000, 100_000], ["100", "1k", "10k", "100k"])
    ax.set_yticks([0, threshold / 3, 2 * threshold / 3, threshold])
    ax.minorticks_off()
    ax.legend(loc="lower left", fontsize=6.2, ncols=1, labelspacing=0.25, borderaxespad=0.2)


def _caption(record: Record, rows: list[dict[str, Any]], cap: int, threshold: float) -> str:
    found = [row for row in rows if row["median"]]
    soon = sum(row["median"] <= 5000 for row in found)
    missed = [row for row in rows if not (row["check"]["rejected"] or row["session_rejected"])]
    largest = max(claim["sup_log10_e"] for claim in record.results["right"])
    checks = "every bug is rejected by a check" if not missed else f"{len(missed)} bugs are missed by every check"
    on_models = ", ".join(
        f"{row['name']} {row['median']:,}" for row in record.results["siblings"] if row["target"] and row["median"]
    )
    return (
        f"{soon} of {len(rows)} planted bugs are found within 5,000 tokens and {len(found)} within {cap:,} at "
        f"E ≥ 1e{threshold:.0f} (left: median and quartiles; the label names the alternative that found it); {checks}. "
        f"Bets do not look at the shape of rows. The largest E of right samplers is 10^{largest:.1f} (right: one run "
        f"each). Medians on the {record.results['label']}: {on_models} tokens."
    )
