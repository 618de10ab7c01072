"""Exact TV on toys: ME and CE against the law of the ensemble, beside the laws that must differ."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from me_stats.record import Record
from me_stats.report import Figure
from me_stats.report.style import COLORS, MARKERS, figure, save

_FLOOR = 1e-17  # an exact zero is drawn here


def draw(record: Record, folder: Path) -> Figure:
    """One row per transform, one mark per toy."""
    rows = record.results["rows"]
    transforms = list(dict.fromkeys(row["transform"] for row in rows))
    series = [
        ("tv_me", "ME against the law", COLORS["ME"], MARKERS["ME"], -0.24),
        ("tv_ce", "CE against the law", COLORS["CE"], MARKERS["CE"], -0.08),
        ("tv_mix_then_transform", "mix-then-transform", COLORS["component 1"], "D", 0.08),
        ("tv_sequence_mixture", "one component per sequence", COLORS["control"], MARKERS["control"], 0.24),
    ]
    fig, ax = figure(columns=2, height=2.7)
    for key, label, color, marker, shift in series:
        x = [max(row[key], _FLOOR) for row in rows]
        y = [transforms.index(row["transform"]) + shift for row in rows]
        ax.plot(x, y, marker, color=color, label=label, alpha=0.75, markersize=3.5, markeredgewidth=0)
    tolerance = record.config["tolerance"]
    ax.axvline(tolerance, color=COLORS["floor"], linestyle="--", linewidth=0.9)
    ax.text(tolerance * 1.6, -0.45, "required of ME and CE", color="0.35", fontsize=7, va="center")
    ax.set(xscale="log", xlim=(_FLOOR / 2, 2), xlabel="total variation over whole sequences (exact zero at 10⁻¹⁷)")
    ax.set_yticks(np.arange(len(transforms)), transforms)
    ax.set_ylim(len(transforms) - 0.5, -0.7)
    fig.legend(loc="outside upper center", ncols=4)
    worst = max(max(row["tv_me"], row["tv_ce"]) for row in rows)
    caption = (
        f"With the transform inside the mixture, ME and CE are off by at most {worst:.1e}: every random path of the "
        f"real samplers on {len({row['toy'] for row in rows})} toy ensembles. The same transform after mixing, and "
        "drawing one component per sequence, give other laws."
    )
    return Figure(tuple(save(fig, folder / record.name, {"caption": caption, "key": record.key})), caption)
