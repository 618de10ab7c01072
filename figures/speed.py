"""Speed of ME: spans, components, batches, and a cost model against what was measured."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, LogLocator

from me_stats.record import Record
from me_stats.report import Figure
from me_stats.report.style import COLORS, MARKERS, figure, save

_ARMS = {
    "single": (COLORS["floor"], "P"),
    "CE": (COLORS["CE"], MARKERS["CE"]),
    "CE parallel": (COLORS["component 3"], "D"),
    "ME": (COLORS["ME"], MARKERS["ME"]),
    "ME lockstep": (COLORS["component 2"], "v"),
    "ME shared": (COLORS["component 1"], "^"),
    "speculative": (COLORS["control"], MARKERS["control"]),
    "CE top-k": (COLORS["CE"], "x"),
}
_NAMES = {"speculative": "ME drafts, verified (top-10)", "CE top-k": "CE (top-10)", "ME shared": "ME, shared draws"}
_DTYPES = (COLORS["component 1"], COLORS["component 2"], COLORS["component 3"])
_BAND = 0.15


def draw(record: Record, folder: Path) -> Figure:
    """Spans by dtype, arms over K, ME/CE over batches, predicted against measured."""
    found = record.results
    fig, ((spans, components), (batches, predicted)) = figure(columns=2, height=4.9, nrows=2, ncols=2)
    _spans(spans, found["curves"])
    _components(components, found["by_k"])
    _batches(batches, found)
    _predicted(predicted, found["cells"])
    caption = _caption(record)
    return Figure(tuple(save(fig, folder / record.name, {"caption": caption, "key": record.key})), caption)


def _spans(ax: Any, curves: list[dict[str, Any]]) -> None:
    """Milliseconds of one row's forward over its span, the first model in each dtype, shortest context."""
    first = curves[0]["model"]
    for curve, color in zip([c for c in curves if c["model"] == first], _DTYPES, strict=False):
        context = min(point["context"] for point in curve["points"])
        own = [p for p in curve["points"] if p["rows"] == 1 and p["context"] == context]
        lengths = [point["span"] for point in own]
        middle = 1000 * np.array([point["seconds"] for point in own])
        error = np.abs(1000 * np.array([point["spread"] for point in own]).T - middle)
        ax.errorbar(lengths, middle, yerr=error, color=color, marker="o", linestyle="", label=curve["dtype"])
        ax.plot(lengths, [1000 * point["fitted"] for point in own], color=color, linewidth=0.9)
        ax.axhline(middle[0], color=color, linestyle=":", linewidth=0.8)
    handles, labels = ax.get_legend_handles_labels()
    handles.append(Line2D([], [], color="0.35", linestyle=":", linewidth=0.8))
    ax.legend(handles, [*labels, "one decode step"], loc="upper left")
    ax.set(xscale="log", xlabel="tokens in the span", ylabel="ms", title="One forward, one row")
    ax.set_xticks(lengths, [str(length) if length != 3 else "" for length in lengths])
    low, high = ax.get_ylim()
    if high > 5 * max(low, 1e-9):
        ax.set(yscale="log", ylim=(low, 2 * high))
        _plain_ticks(ax.yaxis)
    else:
        ax.set(ylim=(0, 1.3 * high))
    ax.minorticks_off()


def _plain_ticks(axis: Any) -> None:
    """1, 2, 5, 10, ... written out, on a logarithmic axis."""
    axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))


def _components(ax: Any, rows: list[dict[str, Any]]) -> None:
    """Speed of each arm at batch 1 by K, one model alone = 1."""
    ks = sorted({row["k"] for row in rows})
    ax.axhline(1, color=COLORS["floor"], linewidth=0.9, label="one model alone")
    ax.plot(ks, [1 / k for k in ks], color=COLORS["CE"], linestyle=":", linewidth=0.9, label="1/K")
    for arm, (color, marker) in _ARMS.items():
        own = sorted((row for row in rows if row["arm"] == arm and arm != "single"), key=lambda row: int(row["k"]))
        if own and arm != "CE top-k":
            _points(
                ax, [row["k"] for row in own], [row["of_single"] for row in own], color, marker, _NAMES.get(arm, arm)
            )
    ax.set(xlabel="K, components", ylim=(0, None), title="Tokens a second at batch 1, one model = 1")
    ax.set_xticks(ks, [str(k) for k in ks])
    ax.set_ylim(0, 1.62 * ax.get_ylim()[1])
    ax.legend(loc="upper right", ncols=2, columnspacing=1.0)


def _batches(ax: Any, found: dict[str, Any]) -> None:
    """ME over CE by batch: measured with intervals, predicted as lines."""
    curves = [entry for entry in found["by_batch"] if entry["points"]]
    dashes = ("-", "--", "-.", ":")
    seen: dict[str, int] = {}
    places: set[int] = set()
    for entry in curves:
        arm, weights = entry["arm"], "/".join(f"{weight:.2g}" for weight in entry["weights"])
        number = seen[arm] = seen.get(arm, -1) + 1
        points = [point for point in entry["points"] if point["of_ce"] is not None]
        where = [point["batch"] for point in points]
        places |= set(where)
        color, marker = _ARMS[arm]
        fill = color if number == 0 else "white"
        _points(ax, where, [point["of_ce"] for point in points], color, marker, f"{_NAMES.get(arm, arm)}, λ {weights}",
                markerfacecolor=fill, linestyle="")  # fmt: skip
        ax.plot(where, [point["ideal"] for point in points], color=color, linestyle=dashes[number % 4], linewidth=0.9)
    ax.axhline(1, color="0.15", linewidth=0.7)
    crossing = next((entry["measured"] for entry in found["crossover"][:1]), None)
    if crossing is not None:  # as high as the points go; the legend is above
        ax.axvline(crossing, 0, 0.6, color="0.35", linestyle=":", linewidth=0.9, label="gain under 5%")
    ticks = sorted(places)
    ax.set(xscale="log", xlabel="rows in a batch", title="Times as fast as CE; lines: predicted")
    ax.set_xticks(ticks, [str(tick) for tick in ticks])
    ax.minorticks_off()
    low, high = ax.get_ylim()
    ax.set_ylim(min(0.9, low), high + (0.45 if crossing is None else 0.7) * (high - min(0.9, low)))
    ax.legend(loc="upper right", ncols=1 if len(curves) < 4 else 2, columnspacing=1.0)


def _predicted(ax: Any, cells: list[dict[str, Any]]) -> None:
    """Milliseconds a step of all rows, as predicted and as measured; hollow: used to calibrate."""
    known = [cell for cell in cells if cell["predicted"] is not None]
    scale = [1000 / cell["steps"] for cell in known]
    measured = np.array([np.median(cell["seconds"]) * unit for cell, unit in zip(known, scale, strict=True)])
    forecast = np.array([cell["predicted"] * unit for cell, unit in zip(known, scale, strict=True)])
    line = np.geomspace(0.8 * min(measured.min(), forecast.min()), 1.25 * max(measured.max(), forecast.max()), 20)
    ax.fill_between(line, (1 - _BAND) * line, (1 + _BAND) * line, color="0.15", alpha=0.1, linewidth=0)
    ax.plot(line, line, color="0.15", linewidth=0.7)
    for arm, (color, marker) in _ARMS.items():
        for calibrates in (False, True):
            own = [i for i, cell in enumerate(known) if cell["arm"] == arm and cell["calibrates"] is calibrates]
            ax.plot(measured[own], forecast[own], marker, color=color, markerfacecolor="white" if calibrates else color,
                    label=_NAMES.get(arm, arm) if own and not calibrates else None)  # fmt: skip
    ax.set(xscale="log", yscale="log", xlabel="measured, ms a step", ylabel="predicted, ms a step",
           title="Cost model, band ±15%")  # fmt: skip
    ax.minorticks_off()
    for axis in (ax.xaxis, ax.yaxis):
        _plain_ticks(axis)
    ax.legend(loc="upper left")


def _points(
    ax: Any, x: list[int], ratios: list[dict[str, Any]], color: str, marker: str, label: str, **options: Any
) -> None:
    middle = np.array([found["value"] for found in ratios])
    error = np.abs(np.array([found["interval"] for found in ratios]).T - middle)
    ax.errorbar(x, middle, yerr=error, color=color, marker=marker, label=label, **({"linestyle": "-"} | options))


def _caption(record: Record) -> str:
    found = record.results
    me = sorted((row for row in found["by_k"] if row["arm"] == "ME" and row["of_ce"]), key=lambda row: int(row["k"]))
    errors = [abs(cell["error"]) for cell in found["cells"] if cell["error"] is not None and not cell["calibrates"]]
    near = sum(error <= _BAND for error in errors)
    crossing = found["crossover"][0] if found["crossover"] else None
    tail = ""
    if crossing is not None:
        predicted = f"from {crossing['predicted']}" if crossing["predicted"] else f"beyond {4 * crossing['largest']}"
        if crossing["measured"] is not None:
            tail = f" It gains under 5% from batch {crossing['measured']:.0f} on (predicted: {predicted})."
        else:
            tail = f" It gains 5% or more up to batch {crossing['largest']} (predicted: under 5% {predicted})."
    ratios = ", ".join(f"{row['of_ce']['value']:.2f}" for row in me)
    return (
        f"ME is {ratios} times as fast as CE at batch 1, K = {', '.join(str(row['k']) for row in me)}.{tail} The cost "
        f"model predicts {near} of {len(errors)} other runs within 15%, calibrated on forwards (top left, lines) and "
        f"three runs (hollow). {found['label']}, "
        f"{record.config['dtype']}, {found['machine']}; medians of {record.config['rounds']} interleaved rounds, bars: "
        "intervals of medians (top left: range)."
    )
