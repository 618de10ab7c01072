"""TV per step between transform-then-mix and mix-then-transform, with the numerical floor as a line."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from me_stats.record import Record
from me_stats.report import Figure
from me_stats.report.style import COLORS, figure, save


def draw(record: Record, folder: Path) -> Figure:
    """One row per transform: mean, the 10% to 90% range over prefixes, and the largest."""
    transforms = {name: row for name, row in record.results["transforms"].items() if name != "none"}
    floor = max(record.results["floor"], 1e-9)  # a logarithmic axis has no zero
    ordered = sorted(transforms, key=lambda name: transforms[name]["mean"])
    fig, ax = figure(columns=1, height=2.5)
    y = np.arange(len(ordered))
    low, _, high = np.array([transforms[name]["quantiles"] for name in ordered]).T
    smallest = floor / 3
    ax.hlines(y, np.maximum(low, smallest), high, color=COLORS["component 1"], linewidth=3, alpha=0.35)
    ax.plot([transforms[name]["mean"] for name in ordered], y, "D", color=COLORS["component 1"], label="mean")
    ax.plot([transforms[name]["max"] for name in ordered], y, "|", color="0.3", markersize=7, label="largest")
    ax.axvline(floor, color=COLORS["floor"], linestyle="--", linewidth=0.9, label="ME against CE, transform inside")
    ax.set(xscale="log", xlim=(smallest, 1.5), xlabel="TV per step between the two orders")
    ax.set_yticks(y, ordered)
    ax.set_ylim(-0.6, len(ordered) - 0.4)
    fig.legend(loc="outside upper center", ncols=3, columnspacing=1.0, handletextpad=0.4)
    ten = transforms["top-k 10"]
    caption = (
        f"Mix-then-transform is another law than transform-then-mix ({record.results['label']}, "
        f"{record.results['prefixes']:,} prefixes of ME generations; bars: 10% to 90% of prefixes). With top-k 10 the "
        f"mean is TV {ten['mean']:.3f} a step, and ME puts {ten['outside_support']:.1%} of its mass on tokens that "
        "mix-then-transform excludes. With the transform inside the mixture, the samplers' laws agree to "
        f"{floor:.0e} on average (dashed)."
    )
    return Figure(tuple(save(fig, folder / record.name, {"caption": caption, "key": record.key})), caption)
