"""Speed of ME over CE by batch, and by the time that a token takes outside the forwards: a forecast."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from matplotlib.lines import Line2D
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

from me_stats.models.shapes import PAPER_GROUPS
from me_stats.record import Record
from me_stats.report import Figure
from me_stats.report.style import COLORS, figure, save

_COLORS = {
    "qwen": COLORS["CE"],
    "hermes2": COLORS["component 3"],
    "hermes3": COLORS["component 2"],
    "mixed": COLORS["ME"],
}
_LABELS = {
    "qwen": "Qwen 3B + Math 1.5B",
    "hermes2": "2 models of 7B",
    "hermes3": "3 models of 7B",
    "mixed": "3 models of 7B, one without grouped keys",
}


def draw(record: Record, folder: Path) -> Figure:
    """Left: the ratio by batch, rows drifting apart or in lockstep. Right: one row, by time outside the forwards."""
    results = record.results
    fig, (left, right) = figure(columns=2, height=2.9, ncols=2, width_ratios=[1.25, 1])
    equal = [row for row in results["rows"] if row["equal"]]
    for row in equal:
        _by_batch(left, row, record.config["factor"])
    left.axhline(1, color="0.15", linewidth=0.8)
    batches = sorted({cell["batch"] for row in equal for cell in row["cells"]})
    left.set_xscale("log", base=2)
    left.xaxis.set_major_locator(FixedLocator(batches[::2]))
    left.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
    left.xaxis.set_minor_locator(NullLocator())
    left.set(xlabel="rows of a batch", ylabel="speed of ME / speed of CE", ylim=(0.85, None))
    left.set_title(f"{results['machine']}, {record.config['dtype']}, bound")
    low, high = results["printed"]
    right.axhspan(low, high, color="0.92", zorder=0)
    right.text(0.98, (low + high) / 2, "printed in\nthe paper", transform=right.get_yaxis_transform(), ha="right",
               va="center", fontsize=7, color="0.35")  # fmt: skip
    for row in results["alone"]:
        x, y = ([point[key] for point in row["curve"]] for key in ("overhead", "ratio"))
        # Groups of equally many models lie on each other.
        right.plot(x, y, color=_COLORS[row["group"]], linestyle="-" if row["group"] in ("qwen", "hermes3") else "--")
        right.plot(row["needed"], row["printed"], "o", color=_COLORS[row["group"]])
    right.axhline(1, color="0.15", linewidth=0.8)
    right.set_xscale("log")
    right.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    right.set(xlabel="time outside forwards, in forwards a token", ylim=(0.85, None))
    right.set_title("One row")
    handles = [
        Line2D([], [], color=_COLORS[row["group"]], label=_LABELS[row["group"]])
        for row in sorted(equal, key=lambda row: list(PAPER_GROUPS).index(row["group"]))
    ]
    handles += [
        Line2D([], [], color="0.35", label="rows drift apart (left)"),
        Line2D([], [], color="0.35", linestyle=":", label="rows in lockstep (left)"),
        Line2D([], [], color="0.35", marker="X", linestyle="", label=f"under {record.config['factor']:g} (left)"),
    ]
    fig.legend(handles=handles, loc="outside lower center", ncols=3, columnspacing=1.2)
    caption = _caption(record, equal)
    return Figure(tuple(save(fig, folder / record.name, {"caption": caption, "key": record.key})), caption)


def _by_batch(ax: Any, row: dict[str, Any], factor: float) -> None:
    color = _COLORS[row["group"]]
    for way, line in (("drifting", "-"), ("lockstep", ":")):
        cells = [cell for cell in row["cells"] if cell["way"] == way]
        ax.plot([cell["batch"] for cell in cells], [cell["ratio"] for cell in cells], line, color=color)
        if row["crossover"][way] is not None:
            ax.plot(row["crossover"][way], factor, "X", color=color)


def _caption(record: Record, equal: list[dict[str, Any]]) -> str:
    results = record.results
    largest = max(cell["batch"] for row in equal for cell in row["cells"])
    ends = [
        cell["ratio"]
        for row in equal
        for cell in row["cells"]
        if cell["batch"] == largest and cell["way"] == "drifting"
    ]
    first = sorted({round(row["cells"][0]["ratio"], 2) for row in equal})
    crossed = [row["crossover"]["lockstep"] for row in equal if row["crossover"]["lockstep"] is not None]
    where = f"from {min(crossed)} to {max(crossed)} rows on" if crossed else "nowhere"
    need = [row["needed"] for row in results["alone"]]
    factor = record.config["factor"] - 1
    return (
        f"Forecast from shapes and a data sheet, nothing measured: ME is {first[0]:.2f} to {first[-1]:.2f} times as "
        f"fast as CE at one row and {min(ends):.2f} to {max(ends):.2f} times at {largest:,}, where it saves keys and "
        f"output layers. In lockstep it gains less than {factor:.0%} {where}, until keys count. The printed "
        f"{results['printed'][0]} (two models) and {results['printed'][1]} (three; our reading) would ask for "
        f"{min(need):.2f} to {max(need):.2f} of a forward outside the forwards for each token (dots)."
    )
