"""Exact repairs: how often drafts are accepted, and what a repaired token costs beside CE and ME."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from matplotlib.lines import Line2D

from me_stats.record import Record
from me_stats.report import Figure
from me_stats.report.style import COLORS, figure, save

_MARKERS = ("o", "s", "D", "^", "v", "X")
_BATCHES = (COLORS["component 1"], COLORS["component 2"], COLORS["component 3"])


def draw(record: Record, folder: Path) -> Figure:
    """Left: acceptance against 1 - TV. Middle: forwards per token by chunk. Right: speed against CE by chunk."""
    targets, timed = record.results["targets"], record.results["timed"]
    name = timed[0]["transform"]
    rows = [row for row in timed if row["transform"] == name]
    fig, (accepted, forwards, speed) = figure(columns=2, height=2.6, ncols=3, width_ratios=[1.15, 1, 1])
    handles = _acceptance(accepted, targets)
    alone = [row for row in rows if row["batch"] == 1 and row["chunk"]]
    chunks = [row["chunk"] for row in alone]
    forwards.plot(chunks, [row["forecast"] for row in alone], "--", color="0.3", linewidth=0.9)
    forwards.plot(chunks, [row["forwards_per_token"] for row in alone], "o", color=_BATCHES[0])
    for row in rows:
        if row["batch"] == 1 and not row["chunk"]:
            forwards.axhline(row["forwards_per_token"], color=COLORS[row["sampler"]], linewidth=0.9)
    forwards.set(xscale="log", xlabel="drafts a round", ylabel="forwards per token", ylim=(0, None))
    forwards.set_title(f"{name}, batch 1")
    for batch, color in zip(dict.fromkeys(row["batch"] for row in rows), _BATCHES, strict=False):
        own = [row for row in rows if row["batch"] == batch and row["chunk"]]
        speed.plot(chunks, [row["speed_of_ce"] for row in own], "o-", color=color, label=f"batch {batch}")
        speed.vlines(chunks, *zip(*(row["spread"] for row in own), strict=True), color=color, linewidth=0.9)
        (me,) = (row for row in rows if row["batch"] == batch and row["sampler"] == "ME")
        speed.axhline(me["speed_of_ce"], color=color, linestyle=":", linewidth=0.9)
    speed.axhline(1.0, color=COLORS["CE"], linewidth=0.9)
    speed.set(xscale="log", xlabel="drafts a round", ylabel="speed, in units of CE", ylim=(0, None))
    speed.set_title(f"{name}, wall time")
    for axis in (forwards, speed):
        axis.set_xticks(chunks, [str(chunk) for chunk in chunks])
        axis.minorticks_off()
    handles += [
        Line2D([], [], color=COLORS["CE"], linewidth=0.9, label="CE"),
        Line2D([], [], color=COLORS["ME"], linewidth=0.9, label="ME"),
        Line2D([], [], color="0.3", linestyle="--", linewidth=0.9, label="forecast"),
        *speed.get_legend_handles_labels()[0],
        Line2D([], [], color="0.3", linestyle=":", linewidth=0.9, label="ME, same batch"),
    ]
    fig.legend(handles=handles, loc="outside lower center", ncols=6, columnspacing=1.2)
    caption = _caption(record, name, rows)
    return Figure(tuple(save(fig, folder / record.name, {"caption": caption, "key": record.key})), caption)


def _acceptance(ax: Any, targets: dict[str, Any]) -> list[Line2D]:
    lowest, handles = 1.0, []
    for (name, row), marker in zip(targets.items(), _MARKERS, strict=False):
        x, y, (low, high) = row["expected"]["value"], row["acceptance"]["value"], row["acceptance"]["interval"]
        ax.vlines(x, low, high, color=COLORS["component 1"], linewidth=0.9)
        ax.plot(x, y, marker, color=COLORS["component 1"], markersize=4)
        handles.append(Line2D([], [], marker=marker, linestyle="", color=COLORS["component 1"], label=name))
        lowest = min(lowest, x, low)
    start = lowest - 0.1 * (1 - lowest)
    ax.plot([start, 1], [start, 1], color="0.3", linestyle="--", linewidth=0.9, zorder=0)
    ax.set(xlabel="1 − TV(draft, target) a step", ylabel="drafts accepted", title="Acceptance")
    return handles


def _caption(record: Record, name: str, rows: list[dict[str, Any]]) -> str:
    results = record.results
    failed = sum(not held for held in record.checks.values())
    walked = max((case["tv"] for case in results["walked"]), default=None)
    shares = [row["acceptance"]["value"] for row in results["targets"].values()]
    best = min((row for row in rows if row["batch"] == 1 and row["chunk"]), key=lambda row: row["forwards_per_token"])
    speeds = ", ".join(
        f"{row['speed_of_ce']:.2f} at batch {row['batch']}" for row in rows if row["chunk"] == best["chunk"]
    )
    exactly = "" if walked is None else f" (largest TV {walked:.0e} where every path was walked)"
    held = "Checked ME drafts have the law of mix-then-transform" if not failed else f"{failed} checks failed"
    return (
        f"{held}{exactly}, and a draft is accepted with probability 1 − TV: {min(shares):.1%} to {max(shares):.1%} "
        f"({results['label']}; bars: 95% intervals). {name.capitalize()} costs {best['forwards_per_token']:.2f} "
        f"forwards a token with {best['chunk']} drafts a round, forecast {best['forecast']:.2f}; its speed is that "
        f"of CE times {speeds} (medians; bars: range of {record.config['repeats']} runs)."
    )
