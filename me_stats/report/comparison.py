"""The figure of `me-stats compare`: TV over prefixes, by cause, and of whole texts, from the record alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from me_stats.record import Record
from me_stats.report import Figure, number
from me_stats.report.style import COLORS, MARKERS, figure, save


def draw(record: Record, folder: Path) -> Figure:
    """Three panels: shares of prefixes below each TV, causes alone and together, texts by length."""
    found = record.results
    causes = found["causes"]
    fig, (prefixes, bars, texts) = figure(
        columns=2, height=2.5, ncols=3, width_ratios=(1, 0.6 + 0.12 * max(2, len(causes)), 1)
    )
    _prefixes(prefixes, found)
    _causes(bars, causes, found["comparison"]["step"])
    _texts(texts, found["comparison"]["lengths"])
    fig.legend(loc="outside lower center", ncols=4)
    caption = _caption(record)
    return Figure(tuple(save(fig, folder / record.name, {"caption": caption, "key": record.key})), caption)


def _prefixes(ax: Any, found: dict[str, Any]) -> None:
    curve = np.array(found["curve"])
    share = np.linspace(0, 1, len(curve))
    mean = found["comparison"]["step"]
    ax.plot(curve, share, color=COLORS["component 1"])
    ax.axvline(mean["value"], color="0.15", linestyle="--", linewidth=0.9)
    ax.axvspan(*np.clip(mean["interval"], 0, 1), color="0.15", alpha=0.12, linewidth=0)
    ax.text(mean["value"], 0.03, " mean", fontsize=7, color="0.3")
    ax.set(xlim=(0, max(1.05 * curve[-1], 1e-9)), ylim=(0, 1.02), xlabel="TV of the next token")
    ax.set_title("Share of prefixes below")


def _causes(ax: Any, causes: list[dict[str, Any]], step: dict[str, Any]) -> None:
    ax.set_title("TV a step by cause")
    if not causes:
        ax.text(0.5, 0.5, "no way of causes\nbetween these laws", transform=ax.transAxes, ha="center", color="0.35")
        ax.set_axis_off()
        return
    for place, cause in enumerate(causes):
        for key, shift, color in (("alone", -0.18, COLORS["component 2"]), ("cumulative", 0.18, COLORS["component 1"])):
            if cause[key] is not None:
                value, (low, high) = cause[key]["value"], cause[key]["interval"]
                ax.barh(place + shift, value, height=0.34, color=color, label=_LABELS[key] if place == 0 else None)
                ax.plot([max(0.0, low), high], [place + shift] * 2, color="0.15", linewidth=0.8)
    ax.set_yticks(np.arange(len(causes)), [cause["name"].replace("_", "-") for cause in causes])
    ax.set(ylim=(len(causes) - 0.5, -0.5), xlim=(0, None), xlabel="mean TV")
    ax.grid(axis="y", visible=False)


_LABELS = {"alone": "cause alone", "cumulative": "with those above"}


def _texts(ax: Any, lengths: list[dict[str, Any]]) -> None:
    t = [gap["length"] for gap in lengths]
    low, high = np.array([gap["tv"]["interval"] for gap in lengths]).T
    ax.fill_between(t, low, high, color=COLORS["ME"], alpha=0.15, linewidth=0)
    ax.plot(t, [gap["tv"]["value"] for gap in lengths], color=COLORS["ME"], marker=MARKERS["ME"], label="TV, 95% band")
    ax.plot(
        t, [gap["outside"]["lower"] for gap in lengths], color=COLORS["floor"], linestyle="--", marker="|",
        label="texts that q cannot write, at least",
    )  # fmt: skip
    ax.set(xscale="log" if t[-1] > 8 else "linear", ylim=(-0.02, 1.02), xlabel="tokens")
    shown = t if len(t) < 7 else t[::2]
    ax.set_xticks(shown, [str(tick) for tick in shown])
    ax.minorticks_off()
    ax.set_title("TV of whole texts")


def _caption(record: Record) -> str:
    found = record.results
    compared, forwards = found["comparison"], found["forwards"]
    last = compared["lengths"][-1]
    step, text = compared["step"], last["tv"]
    return (
        f"p ({found['p']}) and q ({found['q']}) are TV {number(step['value'])} a step apart on {found['label']}: "
        f"{compared['prefixes']:,} prefixes in {text['n']} rows drawn from p. Texts of up to {last['length']} tokens: "
        f"TV {number(text['value'])} [{number(text['interval'][0])}, {number(text['interval'][1])}]. Network runs a "
        f"token: ME 1 for p; for q, CE {forwards['CE']}, ME drafts verified {number(forwards['repair'], digits=3)}. "
        "Bars and bands: 95% intervals; dashed grey: a 97.5% lower bound."
    )
