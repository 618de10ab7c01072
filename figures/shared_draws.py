"""Component draws that a batch shares: how much they correlate its rows, and which tests that fools."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.lines import Line2D

from me_stats.record import Record
from me_stats.report import Figure
from me_stats.report.style import COLORS, figure, save

_PALETTE = [COLORS[name] for name in ("CE", "component 3", "component 1", "component 2", "control")]
_MARKERS = ("o", "s", "D", "^", "v")


def draw(record: Record, folder: Path) -> Figure:
    """Left: design effects over the batch, and their closed form. Right: false alarms by test, two right samplers."""
    effects, alarms = record.results["effects"], record.results["alarms"]
    siblings, level = record.results["siblings"], record.config["level"]
    fig, (left, right) = figure(columns=2, height=2.9, ncols=2, width_ratios=[1, 1.1])
    _effects(left, effects, siblings)
    _alarms(right, alarms, level)
    corrected = [row for row in alarms if row["corrected"]]
    naive = [row for row in alarms if not row["corrected"]]
    above = sum(row["above"] for row in corrected)
    worst, fooled = (max(row["alarms"] / row["runs"] for row in rows) for rows in (corrected, naive))
    short = sum(row["short"] for row in effects)
    form = "the closed form" if not short else f"the closed form, save in {short} of {len(effects)} cases"
    held = "Tests that count batches hold their level" if not above else "Not all tests that count batches hold"
    largest = max(siblings["effects"], key=lambda row: row["value"])
    caption = (
        f"{held} when a batch shares its component draws: at most {worst:.1%} false alarms at level {level:g}, where "
        f"tests that count rows raise up to {fooled:.0%} ({corrected[0]['runs']:,} runs, bars: 95% intervals). Design "
        f"effects follow {form} 1 + (B−1) S (lines; bars: 95% of runs). {siblings['label'].capitalize()} at B = "
        f"{siblings['B']}: at most {largest['value']:.1f} ({largest['statistic']}), for "
        f"{siblings['forwards'] / siblings['steps']:.2f} instead of {siblings['forwards_per_step_alone']:.2f} "
        "forwards a step."
    )
    return Figure(tuple(save(fig, folder / record.name, {"caption": caption, "key": record.key})), caption)


def _effects(ax: Any, effects: list[dict[str, Any]], siblings: dict[str, Any]) -> None:
    names = list(dict.fromkeys(row["toy"] for row in effects))
    sizes = np.geomspace(1, max([siblings["B"], *(row["B"] for row in effects)]) * 1.15, 60)
    for i, (name, color, marker) in enumerate(zip(names, _PALETTE, _MARKERS, strict=False)):
        own = sorted((row for row in effects if row["toy"] == name), key=lambda row: row["B"])
        ax.plot(sizes, 1 + (sizes - 1) * own[0]["share"], color=color, linewidth=0.9)
        middle = np.array([row["median"] for row in own])
        error = np.abs(np.array([row["spread"] for row in own]).T - middle)
        places = np.array([row["B"] for row in own]) * 1.05 ** (i - (len(names) - 1) / 2)
        ax.errorbar(places, middle, yerr=error, color=color, marker=marker, linestyle="", label=name)
    for shift, row in zip(np.linspace(-0.06, 0.06, len(siblings["effects"])), siblings["effects"], strict=True):
        error = np.abs(np.array(row["interval"])[:, None] - row["value"])
        label = siblings["label"] if shift == -0.06 or len(siblings["effects"]) == 1 else None
        ax.errorbar(
            siblings["B"] * (1 + shift), row["value"], yerr=error, color=COLORS["ME"], marker="X", linestyle="",
            label=label,
        )  # fmt: skip
    ax.set(xscale="log", yscale="log", xlabel="B, rows that share draws", ylabel="design effect", title="Dependence")
    ticks = sorted({1, siblings["B"], *(row["B"] for row in effects)})
    ax.set_xticks(ticks, [str(tick) for tick in ticks])
    ax.set_yticks([1, 2, 5, 10, 20], ["1", "2", "5", "10", "20"])
    ax.minorticks_off()
    ax.legend(loc="upper left", handlelength=1.0)


def _alarms(ax: Any, alarms: list[dict[str, Any]], level: float) -> None:
    """One row a test, those that count rows above; one mark a world."""
    tests = sorted(dict.fromkeys(row["test"] for row in alarms), key=lambda test: _corrected(alarms, test))
    worlds = list(dict.fromkeys(row["world"] for row in alarms))
    shifts = np.linspace(-0.22, 0.22, len(worlds)) if len(worlds) > 1 else np.zeros(1)
    for row in alarms:
        world = worlds.index(row["world"])
        color = COLORS["ME"] if row["corrected"] else COLORS["control"]
        rate, place = row["alarms"] / row["runs"], tests.index(row["test"]) + shifts[world]
        ax.plot(row["interval"], [place, place], color=color, linewidth=1.0)
        ax.plot(rate, place, _MARKERS[world], color=color)
    ax.axvline(level, color="0.15", linestyle="--", linewidth=0.9)
    ax.set_yticks(np.arange(len(tests)), tests)
    ax.set_ylim(len(tests) - 0.5, -0.5)
    ax.set(xlim=(0, None), xlabel="share of runs that reject two right samplers", title="False alarms")
    ax.grid(axis="y", visible=False)
    handles = [
        Line2D([], [], marker=marker, linestyle="", color="0.35", label=world)
        for world, marker in zip(worlds, _MARKERS, strict=False)
    ]
    handles.append(Line2D([], [], color="0.15", linestyle="--", linewidth=0.9, label=f"level {level:g}"))
    ax.legend(handles=handles, loc="lower right")


def _corrected(alarms: list[dict[str, Any]], test: str) -> bool:
    return any(row["corrected"] for row in alarms if row["test"] == test)
