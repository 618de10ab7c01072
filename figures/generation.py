"""Speed by batch size and model runs by sampler, as ratios within one run."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from me_stats.record import Record
from me_stats.report import Figure
from me_stats.report.style import COLORS, MARKERS, figure, save


def draw(record: Record, folder: Path) -> Figure:
    """Left: tokens a second over ME at the smallest batch. Right: laws computed per token."""
    rows = record.results["rows"]
    batches = sorted({row["batch"] for row in rows})
    unit = next(row["tokens_per_second"] for row in rows if row["sampler"] == "ME" and row["batch"] == batches[0])
    fig, (speed, reads) = figure(columns=2, height=2.2, ncols=2)
    for name in ("CE", "ME"):
        mine = sorted((row for row in rows if row["sampler"] == name), key=lambda row: row["batch"])
        middle = np.array([row["tokens_per_second"] for row in mine]) / unit
        spread = np.array([row["spread"] for row in mine]).T / unit
        error = np.abs(spread - middle)
        speed.errorbar(batches, middle, yerr=error, marker=MARKERS[name], color=COLORS[name], label=name)
        place = np.arange(len(batches)) + (0.2 if name == "ME" else -0.2)
        reads.bar(place, [row["reads"] / row["tokens"] for row in mine], width=0.36, color=COLORS[name], label=name)
    speed.set(xscale="log", yscale="log", xlabel="rows in a batch", ylabel="tokens/s, relative")
    speed.set_xticks(batches, [str(batch) for batch in batches])
    speed.minorticks_off()
    reads.set_xticks(np.arange(len(batches)), [str(batch) for batch in batches])
    reads.set(xlabel="rows in a batch", ylabel="laws computed per token")
    reads.grid(axis="x", visible=False)
    fig.legend(*speed.get_legend_handles_labels(), loc="outside upper center", ncols=2)
    gain = record.results["batch_gain"]
    finding = f"CE and ME at batch {batches[0]}"
    if gain is not None:
        finding = f"ME at batch {batches[-1]} writes {gain:.1f} times as many tokens a second as at batch {batches[0]}"
    caption = (
        f"{finding} ({record.results['label']}; medians and range of {record.config['repeats']} interleaved runs). "
        "ME computes one next-token law a token, CE one per component; rows of one prompt share their first. "
        f"Left: speed over that of ME at batch {batches[0]}."
    )
    return Figure(tuple(save(fig, folder / record.name, {"caption": caption, "key": record.key})), caption)
