"""Printed differences beside the gaps that the table could show, and their scatter against that of independent runs."""

from __future__ import annotations

import textwrap
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator
from scipy.stats import chi2

from me_stats.record import Record
from me_stats.report import Figure
from me_stats.report.style import COLORS, figure, save

_COLORS = ("component 1", "component 3", "component 2", "control", "CE", "floor")
_MARKERS = ("o", "s", "^", "D", "v", "P")
_ALARM = COLORS["ME"]
_WIDTH = 24  # letters of a block's name before it is broken
_SHORT, _LONG = 36, 52  # letters of a group's name that fit into three columns of the legend, and into two
_TALLEST = 11.5
_LEAST = 0.02  # Σz² a cell below which a mark stands at the edge


def draw(record: Record, folder: Path) -> Figure:
    """Left: difference of each cell by data set, smallest visible gap in grey. Right: Σz² a cell, by block."""
    audit = record.results["audit"]
    cells = audit["cells"]
    blocks = [row for row in [*audit["blocks"], *audit["without"]] if row["block"] != "k" or row["name"]]
    lines = sum(len(_name(row).splitlines()) for row in blocks)
    height = min(_TALLEST, max(2.4, 1.35 + 0.105 * len(cells), 1.35 + 0.155 * lines))
    fig, (left, right) = figure(columns=2, height=height, ncols=2, width_ratios=[1.3, 1])
    groups = list(dict.fromkeys(cell["group"] for cell in cells))
    looks = {
        group: (COLORS[_COLORS[i % len(_COLORS)]], _MARKERS[(i + i // len(_COLORS)) % len(_MARKERS)])
        for i, group in enumerate(groups)
    }
    settings = list(dict.fromkeys(cell["k"] for cell in cells))
    _forest(left, audit, looks, settings)
    _scatter(right, audit, blocks)
    handles = [
        Line2D([], [], color=color, marker=marker, linestyle="", label=group)
        for group, (color, marker) in looks.items()
    ]
    if len(settings) == 2:
        handles += [
            Line2D([], [], color="0.3", marker="o", linestyle="", markerfacecolor=face, label=f"k = {k}")
            for k, face in zip(settings, ("0.3", "white"), strict=True)
        ]
    handles += [
        Patch(facecolor="0.9", label="gap seen with power < 0.8"),
        Patch(facecolor=COLORS["floor"], alpha=0.45, label=f"{1 - audit['level']:.0%} of equal accuracies"),
        Line2D([], [], color=_ALARM, marker="o", linestyle="", label="stands out"),
    ]
    columns = 3 if max(map(len, groups)) <= _SHORT else 2
    fig.legend(handles=handles, loc="outside lower center", ncols=columns, columnspacing=1.2)
    caption = _caption(audit)
    return Figure(tuple(save(fig, folder / record.name, {"caption": caption, "key": record.key})), caption)


def _short(name: str) -> str:
    return name if len(name) <= _LONG else f"{name[: _LONG - 1]}…"


def _forest(ax: Any, audit: dict[str, Any], looks: dict[str, Any], settings: list[str]) -> None:
    first, second = audit["methods"]
    place, ticks, names = 0.0, [], []
    sets = list(dict.fromkeys(cell["dataset"] for cell in audit["cells"]))
    order = list(looks)
    for dataset in sets:
        own = [cell for cell in audit["cells"] if cell["dataset"] == dataset]
        own.sort(key=lambda cell: (order.index(cell["group"]), settings.index(cell["k"])))
        start = place
        widths = [cell["visible"] for cell in own]
        ax.fill_betweenx(
            [start - 0.7, start + len(own) - 0.3], -np.mean(widths), np.mean(widths), color="0.9", linewidth=0, zorder=0
        )
        for cell in own:
            color, marker = looks[cell["group"]]
            out = cell["holm"] < audit["level"]
            shade = _ALARM if out else color
            face = "white" if settings.index(cell["k"]) % 2 else shade
            ax.plot(cell["interval"], [place, place], color=shade, linewidth=1.0)
            ax.plot(cell["difference"], place, marker, color=shade, markerfacecolor=face, markersize=4)
            if out:
                ax.annotate(f"z = {cell['z']:+.1f}", (cell["interval"][1], place), xytext=(4, 0), color=_ALARM,
                            textcoords="offset points", va="center", fontsize=7)  # fmt: skip
            place += 1
        ticks.append((start + place - 1) / 2)
        names.append(dataset)
        place += 0.9
    ax.axvline(0, color="0.15", linewidth=0.8)
    ax.set_yticks(ticks, names)
    ax.tick_params(axis="y", length=0)
    ax.set_ylim(place - 1.1, -1.0)
    ax.grid(axis="y", visible=False)
    largest = max(abs(edge) for cell in audit["cells"] for edge in (*cell["interval"], cell["visible"]))
    ax.set_xlim(-1.08 * largest, 1.08 * largest)
    ax.set(xlabel=f"{second} − {first}, points (bars: {1 - audit['level']:.0%} intervals)")
    ax.set_title("Cells of the table")


def _name(row: dict[str, Any]) -> str:
    if row["block"] == "all":
        return "all cells"
    prefix = {"k": "k = ", "without": "without "}.get(row["block"], "")
    return "\n".join(textwrap.wrap(prefix + row["name"], _WIDTH, break_on_hyphens=False))


def _scatter(ax: Any, audit: dict[str, Any], blocks: list[dict[str, Any]]) -> None:
    level, places, place, last = audit["level"], [], 0.0, ""
    for row in blocks:
        if last and row["block"] != last:
            place += 0.6
        place += 0.5 * (len(_name(row).splitlines()) - 1)
        places.append(place)
        place += 1 + 0.5 * (len(_name(row).splitlines()) - 1)
        last = row["block"]
    ratios = []
    for row, y in zip(blocks, places, strict=True):
        df = row["df"]
        low, high = (float(chi2.ppf(q, df)) / df for q in (level / 2, 1 - level / 2))
        ax.barh(y, high - low, left=low, height=0.62, color=COLORS["floor"], alpha=0.45, linewidth=0)
        ratio = max(row["statistic"] / df, _LEAST)
        out = not low <= ratio <= high
        ax.plot(ratio, y, "o", color=_ALARM if out else "0.15", markersize=4.5, zorder=3)
        ratios += [ratio, low, high]
    ax.axvline(1, color="0.15", linewidth=0.8, zorder=1)
    ax.set_xscale("log")
    low, high = max(min(ratios), _LEAST) / 1.25, max(ratios) * 1.25
    ax.set_xlim(low, high)
    steps = (0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 50) if high / low < 40 else (0.1, 1, 10, 100, 1000)
    ax.xaxis.set_major_locator(FixedLocator([step for step in steps if low <= step <= high]))
    ax.xaxis.set_minor_locator(NullLocator())
    ax.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    ax.set_yticks(places, [_name(row) for row in blocks])
    ax.tick_params(axis="y", length=0, labelsize=6.5)
    ax.set_ylim(place - 0.4, -0.7)
    ax.grid(axis="y", visible=False)
    ax.set(xlabel="Σz² a cell (1: equal accuracies)")
    ax.set_title("Scatter")


def _caption(audit: dict[str, Any]) -> str:
    found, cells, level = audit["blocks"][0], audit["cells"], audit["level"]
    first, second = audit["methods"]
    flagged = sorted((cell for cell in cells if cell["holm"] < level), key=lambda cell: -abs(cell["z"]))
    if found["p_large"] < level:
        lead = f"The printed accuracies of {first} and {second} scatter more than equal accuracies do"
    elif found["p_small"] < level:
        lead = f"The printed accuracies of {first} and {second} lie closer than independent runs leave them"
    else:
        lead = f"The printed accuracies of {first} and {second} scatter as equal accuracies do"
    p = found["p_large"] if found["p_large"] < 0.5 else found["p_small"]
    if flagged:
        names = flagged[0]["dataset"] + (f", k = {flagged[0]['k']}" if flagged[0]["k"] else "")
        more = f", of {len(flagged)} that do" if len(flagged) > 1 else ""
        outlier = f"One cell stands out ({names}, z = {flagged[0]['z']:+.1f}{more})"
    else:
        outlier = "No cell stands out"
    seen = [cell["visible"] for cell in cells]
    noise = "the largest" if audit["noise"] == 1 else f"{audit['noise']:g} of the largest"
    return (
        f"{lead}: Σz² = {found['statistic']:.2f} on {found['df']} cells, p = {p:.2g}. {outlier}. Grey on the left: "
        f"gaps that a cell finds with power below 0.8, up to {min(seen):.2g} to {max(seen):.2g} points; gaps of "
        f"{found['worst_margin']:.2g} points in a cell are not excluded. Noise is {noise} that independent runs can "
        "have. Equal accuracy bounds no distance between the laws."
    )
