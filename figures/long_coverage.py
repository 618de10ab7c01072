"""Coverage of the intervals for long generations, beside the band of 93 to 97%."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from matplotlib.lines import Line2D

from me_stats.record import Record
from me_stats.report import Figure
from me_stats.report.style import COLORS, figure, save

_LOOKS = {
    "long memory": (COLORS["component 1"], "o"),
    "short memory": (COLORS["component 2"], "s"),
    "paths": (COLORS["component 3"], "^"),
    "ends": (COLORS["floor"], "D"),
}


def draw(record: Record, folder: Path) -> Figure:
    """One row an estimator, one mark a toy, with the 95% interval of the share itself."""
    low, high = record.results["band"]
    rows = [row for row in record.results["rows"] if row["band"] == [low, high]]
    names = list(dict.fromkeys(row["estimator"] for row in rows))
    fig, ax = figure(columns=2, height=4.2)
    ax.axvspan(low, high, color="0.9", linewidth=0, zorder=0)
    ax.axvline(0.95, color="0.15", linestyle="--", linewidth=0.9)
    for place, name in enumerate(names):
        own = [row for row in rows if row["estimator"] == name]
        for shift, row in zip(np.linspace(-0.18, 0.18, len(own)) if len(own) > 1 else [0.0], own, strict=True):
            color, marker = _LOOKS[row["toy"]]
            ax.plot(row["interval"], [place + shift] * 2, color=color, linewidth=1.0)
            face = "white" if row["safe"] else color
            ax.plot(row["share"], place + shift, marker, color=color, markerfacecolor=face)
    ax.set_yticks(np.arange(len(names)), names)
    ax.set_ylim(len(names) - 0.5, -0.5)
    ax.grid(axis="y", visible=False)
    ax.set(xlabel=f"share of {record.config['repeats']:,} runs in which a 95% interval holds the truth")
    handles = [
        Line2D([], [], marker=marker, linestyle="", color=color, label=name) for name, (color, marker) in _LOOKS.items()
    ]
    handles.append(
        Line2D([], [], marker="o", linestyle="", color="0.3", markerfacecolor="white", label="wide by design")
    )
    fig.legend(handles=handles, loc="outside lower center", ncols=5)
    exact = [row["share"] for row in rows if not row["safe"]]
    off = sum(row["off"] for row in record.results["rows"])
    lead = f"Not all intervals cover ({off} of {len(rows)} cases are off)" if off else "The intervals cover"
    caption = (
        f"{lead}: in {min(exact):.1%} to {max(exact):.1%} of {record.config['repeats']:,} runs, mostly of "
        f"{record.config['rows']} rows of {record.config['steps']} tokens (grey: 93 to 97%; bars: 95% intervals of the "
        f"share). Those that hold for many positions together, or for every law, are wide by design. Truths are closed "
        f"forms of Markov toys."
    )
    return Figure(tuple(save(fig, folder / record.name, {"caption": caption, "key": record.key})), caption)
