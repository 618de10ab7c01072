"""The white-box certificate of an ME step: what its three terms come to, against a wrong cache."""

from __future__ import annotations

from pathlib import Path

from me_stats.record import Record
from me_stats.report import Figure
from me_stats.report.style import COLORS, figure, save


def draw(record: Record, folder: Path) -> Figure:
    """One row per term, on a log axis, with the margin."""
    results = record.results
    worst, quantiles = results["certificate"]["worst"], results["certificate"]["quantiles"]
    rows = [
        ("weights", worst["weight_term"], COLORS["ME"], "s"),
        ("caches", worst["cache_term"], COLORS["ME"], "s"),
        ("token draw", results["draw_tv"], COLORS["ME"], "s"),
        ("largest sum", quantiles[-1], COLORS["CE"], "o"),
        ("one token missing", results["stale"], COLORS["control"], "X"),
    ]
    fig, ax = figure(columns=1, height=1.9)
    for place, (_, value, color, marker) in enumerate(rows):
        ax.plot(max(value, 1e-12), place, marker, color=color, markersize=5)
    ax.axvline(record.config["margin"], color=COLORS["floor"], linestyle="--", linewidth=0.9)
    ax.text(record.config["margin"] * 1.3, -0.25, "margin", color="0.35", fontsize=7, va="center")
    ax.set_yticks(range(len(rows)), [name for name, *_ in rows])
    ax.set(xscale="log", xlim=(1e-10, 3), ylim=(len(rows) - 0.5, -0.5), xlabel="total variation of one ME step")
    ax.set_xticks([1e-9, 1e-6, 1e-3, 1])
    caption = (
        f"Each conditional ({record.findings[0].n}) on {results['label']} is certified to be within TV "
        f"{quantiles[-1]:.1e} of the CE law (median {quantiles[2]:.1e}), from the component frequencies, the caches "
        f"and the draw; a cache that misses one token is {results['stale']:.2f} away. Dashed: the margin."
    )
    return Figure(tuple(save(fig, folder / record.name, {"caption": caption, "key": record.key})), caption)
