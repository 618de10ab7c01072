"""How readings move with λ between two models, derivatives on toys against exact ones, and a triangle of weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from me_stats.record import Record
from me_stats.report import Figure
from me_stats.report.simplex import draw_line, draw_ternary
from me_stats.report.style import COLORS, MARKERS, figure, save
from me_stats.sweep import Sweep, SweepPoint


def draw(record: Record, folder: Path) -> Figure:
    """Above: entropy, text and distances over λ. Below: ME's work, derivatives on toys, NLL over three weights."""
    results = record.results
    line, triangle = _sweep(results["line"]), _sweep(results["triangle"]["sweep"])
    names = results["components"]
    fig, ((entropy, text, apart), (work, slopes, corner)) = figure(
        columns=2, height=4.1, nrows=2, ncols=3, height_ratios=[1, 1.1]
    )
    draw_line(entropy, line, "entropy_rate", components=names)
    draw_line(text, line, "nll", components=names)
    text.axvline(results["text"]["best"][0], color=COLORS["control"], linestyle=":", linewidth=1.0)
    text.set_title("mixed text (nats a token)")
    _distances(apart, line, results["step_tv"], names[0])
    draw_line(work, line, "tokens_per_forward", components=names)
    work.set_title("ME: tokens fed per token")
    _derivatives(slopes, results["derivatives"])
    draw_ternary(corner, triangle, "nll", components=("toy 1", "toy 2", "toy 3"))
    corner.set_title("text of three toys (nats)", pad=10)
    corner.set_anchor("S")
    caption = _caption(record, line, triangle)
    return Figure(tuple(save(fig, folder / record.name, {"caption": caption, "key": record.key})), caption)


def _sweep(data: dict[str, Any]) -> Sweep:
    points = tuple(SweepPoint.from_json(point) for point in data["points"])
    return Sweep(**{**data, "reference": tuple(map(float, data["reference"])), "points": points})


def _distances(ax: Any, line: Sweep, measured: list[dict[str, float]], first: str) -> None:
    weight = np.array([point.weights[0] for point in line.points])
    order = np.argsort(weight)
    for name, label, color in (
        ("sequence_tv", f"row of {line.max_new_tokens}", COLORS["ME"]),
        ("step_tv", "step", COLORS["CE"]),
    ):
        value, low, high = (column[order] for column in line.series(name))
        ax.fill_between(weight[order], low, high, color=color, alpha=0.18, linewidth=0)
        ax.plot(weight[order], value, color=color, label=label)
    ax.plot(
        [row["weight"] for row in measured], [row["measured"] for row in measured], "x", color="0.15", markersize=4,
        label="step, direct",
    )  # fmt: skip
    ax.axvline(line.reference[0], color=COLORS["floor"], linestyle="--", linewidth=0.8)
    ax.set(xlim=(-0.02, 1.02), ylim=(0, 1.05), xlabel=f"weight of {first}", title="TV to λ = ½")
    ax.set_yticks([0, 0.25, 0.5, 0.75, 1.0])
    box = {"frameon": True, "framealpha": 1.0, "edgecolor": "none"}  # over the line of the reference
    ax.legend(loc="upper center", handlelength=1.2, borderaxespad=0.1, **box)


def _derivatives(ax: Any, rows: list[dict[str, Any]]) -> None:
    """Estimate less exact derivative, with 95% intervals, beside the exact value."""
    for name, label, target, color, marker in (
        ("score", "score function", "exact", COLORS["CE"], MARKERS["CE"]),
        ("common", "common random numbers", "central", COLORS["ME"], MARKERS["ME"]),
    ):
        x = np.array([row["exact"] for row in rows])
        off = np.array([row[name]["value"] - row[target] for row in rows])
        low, high = (np.array([row[name]["interval"][end] - row[target] for row in rows]) for end in (0, 1))
        ax.errorbar(
            x, off, yerr=[off - low, high - off], fmt=marker, color=color, markersize=2.5, linewidth=0.8, capsize=1,
            label=label,
        )  # fmt: skip
    ax.axhline(0, color="0.15", linewidth=0.7)
    least, most = ax.get_ylim()
    ax.set(ylim=(least, most + 0.35 * (most - least)), xlabel="exact derivative (toys, K = 2 and 3)")
    ax.set_title("estimate − exact")
    ax.legend(loc="upper center", borderaxespad=0.1)


def _caption(record: Record, line: Sweep, triangle: Sweep) -> str:
    results = record.results
    rows = results["derivatives"]
    inside = sum(
        row[name]["interval"][0] <= row[target] <= row[name]["interval"][1]
        for row in rows
        for name, target in (("score", "exact"), ("common", "central"))
    )
    best, first = results["text"]["best"][0], results["components"][0]
    ends = [point for point in line.points if max(point.weights) == 1]
    step = max(point.estimates["step_tv"].value for point in ends)
    row = max(point.estimates["sequence_tv"].value for point in ends)
    reread = sum(not point.drawn for point in line.points)
    read = sum(not point.drawn for point in triangle.points)
    agree = "agree" if results["triangle"]["agree"] else "do not agree"
    return (
        f"Small steps, far sequences: from λ = ½ to one component alone a step moves by TV {step:.2f} and a row of "
        f"{line.max_new_tokens} tokens by {row:.2f} ({results['label']}; bands: 95% intervals; squares: drawn there, "
        f"circles: re-weighted, {reread} of {len(line.points)}). Mixed text is likeliest at weight {best:.2f} of "
        f"{first} (dotted). On toys {inside} of {2 * len(rows)} intervals of derivatives hold the exact value, and "
        f"the {len(triangle.points)} points of the triangle ({read} re-weighted) {agree} with exact expectations."
    )
