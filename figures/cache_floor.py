"""Lazy cache against a fresh prefill by dtype and lag, with the model's own cache as the yardstick."""

from __future__ import annotations

from pathlib import Path

from me_stats.record import Record
from me_stats.report import Figure
from me_stats.report.style import COLORS, figure, save

_COLORS = {"float32": COLORS["CE"], "float16": COLORS["component 1"], "bfloat16": COLORS["ME"]}
_MARKERS = {"float32": "o", "float16": "^", "bfloat16": "s"}


def draw(record: Record, folder: Path) -> Figure:
    """One panel per model: TV of the laws read, mean and largest, against the span caught up at once."""
    rows = record.results["rows"]
    models = list(dict.fromkeys(row["model"] for row in rows))
    narrow = len(models) == 1
    fig, grid = figure(columns=1 if narrow else 2, height=2.7, ncols=len(models), sharey=True, squeeze=False)
    axes = grid[0]
    for ax, model in zip(axes, models, strict=False):
        for row in (row for row in rows if row["model"] == model):
            lags = [int(lag) for lag in row["lags"]]
            mean = [cell["mean"] for cell in row["lags"].values()]
            largest = [cell["max"] for cell in row["lags"].values()]
            color, marker = _COLORS[row["dtype"]], _MARKERS[row["dtype"]]
            ax.plot(lags, mean, marker, color=color, linestyle="-", label=f"{row['dtype']}, mean")
            ax.plot(lags, largest, marker, color=color, linestyle=":", markerfacecolor="none", label="largest")
            ax.axhline(row["own_cache"]["mean"], color=color, linewidth=2.5, alpha=0.25)
        stale = [row["stale_by_one"]["mean"] for row in rows if row["model"] == model]
        ax.axhline(stale[0], color=COLORS["control"], linestyle="--", linewidth=0.9)
        ax.text(lags[-1], stale[0] * 1.5, "one token missing", color=COLORS["control"], fontsize=7, ha="right",
                va="bottom")  # fmt: skip
        ax.set(xscale="log", yscale="log", title=model, xlabel="tokens caught up in one forward")
        ax.set_xticks(lags, [str(lag) for lag in lags])
        ax.minorticks_off()
        ax.set_ylim(top=20)
    axes[0].set_ylabel("TV from a fresh prefill")
    handles, labels = axes[0].get_legend_handles_labels()
    kept = [i for i, label in enumerate(labels) if label != "largest"] + [labels.index("largest")]
    fig.legend(
        [handles[i] for i in kept],
        [labels[i] for i in kept],
        loc="outside lower center",
        ncols=2 if narrow else len(kept),
    )
    worst = {row["dtype"]: max(c["max"] for c in row["lags"].values()) for row in rows}
    floors = ", ".join(f"{dtype} {value:.1e}" for dtype, value in worst.items())
    unusable = [f"{cell['model']} overflows in {cell['dtype']}" for cell in record.results.get("unusable", ())]
    caption = (
        "Lazy key-value synchronisation stays at the numerical floor of the model: the wide pale lines are "
        f"transformers' own cache, fed one token at a time. Largest TV of a law: {floors}. A cache that misses "
        "one token (dashed) is orders of magnitude away." + "".join(f" {text}." for text in unusable)
    )
    return Figure(tuple(save(fig, folder / record.name, {"caption": caption, "key": record.key})), caption)
