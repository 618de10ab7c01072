"""Accuracy of CE, ME and the published CE by task, their differences against a margin, and what mixing gains."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import MaxNLocator

from me_stats.record import Record
from me_stats.report import Figure
from me_stats.report.style import COLORS, figure, save

_LOOKS: dict[str, dict[str, Any]] = {
    "CE": {"color": COLORS["CE"], "marker": "o", "markersize": 4},
    "ME": {"color": COLORS["ME"], "marker": "s", "markersize": 4},
    "published CE": {"color": COLORS["CE"], "marker": "D", "markerfacecolor": "white", "markersize": 4},
}
_EXACT: dict[str, Any] = {
    "color": "0.1", "marker": "|", "markersize": 9, "markeredgewidth": 1.3, "linestyle": "", "zorder": 4,
}  # fmt: skip
_SPACING = 0.24
_NAMES = {"closing_brackets": "closing\nbrackets", "arc_challenge": "ARC-\nChallenge", "gsm8k": "GSM8K"}


def draw(record: Record, folder: Path) -> Figure:
    """Left: accuracies by task. Middle: differences to ME. Right, where there are texts: bits per byte."""
    found = record.results
    rows, texts = found["rows"], found["texts"]
    kinds = [kind for kind, there in (("accuracies", rows), ("differences", rows), ("texts", texts)) if there]
    height = min(9.0, 1.25 + 0.55 * max(2, len(rows), len(texts)))
    fig, axes = figure(
        columns=2, height=height, ncols=len(kinds), squeeze=False, width_ratios=[1.2, 1.2, 1][: len(kinds)]
    )
    for kind, ax in zip(kinds, axes[0], strict=True):
        {"accuracies": _accuracies, "differences": _differences, "texts": _texts}[kind](ax, found)
    fig.legend(handles=_handles(found), loc="outside upper center", ncols=7, columnspacing=1.2, handletextpad=0.4)
    caption = _caption(record)
    return Figure(tuple(save(fig, folder / record.name, {"caption": caption, "key": record.key})), caption)


def _accuracies(ax: Any, found: dict[str, Any]) -> None:
    for place, row in enumerate(found["rows"]):
        for offset, (arm, look) in zip((-_SPACING, 0.0, _SPACING), _LOOKS.items(), strict=True):
            one = row["arms"][arm]
            ax.hlines(place + offset, *one["interval"], color=look["color"], linewidth=1.0)
            ax.plot(one["accuracy"], place + offset, linestyle="", **look)
            if row["exact"]:
                ax.plot(row["exact"]["arms"][arm]["accuracy"], place + offset, **_EXACT)
    _task_axis(ax, [row["task"] for row in found["rows"]])
    ax.set(xlabel="accuracy", title="Accuracy, 95% for these items")
    ax.set_xlim(max(0.0, ax.get_xlim()[0]), min(1.0, ax.get_xlim()[1]))
    ax.xaxis.set_major_locator(MaxNLocator(5))


def _differences(ax: Any, found: dict[str, Any]) -> None:
    margin = found["margin"]
    ax.axvspan(-margin, margin, color=COLORS["floor"], alpha=0.16, linewidth=0)
    ax.axvline(0, color="0.3", linewidth=0.6)
    for place, row in enumerate(found["rows"]):
        for offset, arm in ((-_SPACING / 1.5, "CE"), (_SPACING / 1.5, "published CE")):
            pair, look = row["pairs"][f"{arm} - ME"], _LOOKS[arm]
            ax.hlines(place + offset, *pair["items like these"]["interval"], color=look["color"], linewidth=0.7)
            ax.hlines(place + offset, *pair["these items"]["interval"], color=look["color"], linewidth=2.6, alpha=0.45)
            ax.plot(pair["difference"], place + offset, linestyle="", **look)
            if row["exact"]:
                exact = row["exact"]["difference"] if arm == "published CE" else 0.0
                ax.plot(exact, place + offset, **_EXACT)
    _task_axis(ax, [row["task"] for row in found["rows"]], labels=False)
    widest = max(1.15 * margin, *(abs(end) for end in ax.get_xlim()))
    ax.set(xlabel="accuracy − that of ME", title="Differences on the same items", xlim=(-widest, widest))
    ax.xaxis.set_major_locator(MaxNLocator(5, symmetric=True))


def _texts(ax: Any, found: dict[str, Any]) -> None:
    looks = {
        "mixture": {"color": COLORS["ME"], "marker": "s"},
        **{f"component {i}": {"color": COLORS[f"component {i}"], "marker": "^v<"[i - 1]} for i in (1, 2, 3)},
    }
    for place, row in enumerate(found["texts"]):
        arms = list(row["bits"])
        for offset, arm in enumerate(arms):
            at = place + _SPACING * (offset - (len(arms) - 1) / 2)
            look = looks.get(arm, {"color": COLORS["floor"], "marker": "o"})
            ax.hlines(at, *row["bits"][arm]["interval"], color=look["color"], linewidth=1.0)
            ax.plot(row["bits"][arm]["value"], at, linestyle="", markersize=4, **look)
    _task_axis(ax, [row["task"].partition(":")[2] or row["task"] for row in found["texts"]])
    ax.set(xlabel="bits per byte, no transforms", title="Unseen text")
    ax.xaxis.set_major_locator(MaxNLocator(4))


def _task_axis(ax: Any, names: list[str], *, labels: bool = True) -> None:
    ax.set_ylim(len(names) - 0.5, -0.5)
    ax.set_yticks(range(len(names)), [_name(name) for name in names] if labels else [""] * len(names))
    ax.tick_params(axis="y", length=0)
    ax.grid(axis="y", visible=False)
    for place in range(1, len(names)):
        ax.axhline(place - 0.5, color="0.85", linewidth=0.5, zorder=0)


def _name(name: str) -> str:
    plain = _NAMES.get(name, name.removeprefix("bbh:").replace("_", " "))
    words = plain.split(" ")
    return plain if len(plain) < 14 or len(words) == 1 else " ".join(words[:1]) + "\n" + " ".join(words[1:3])


def _handles(found: dict[str, Any]) -> list[Any]:
    handles: list[Any] = []
    if found["rows"]:
        names = {"ME": "ME, mixture"} if found["texts"] else {}
        handles += [Line2D([], [], linestyle="", label=names.get(arm, arm), **look) for arm, look in _LOOKS.items()]
        if any(row["exact"] for row in found["rows"]):
            handles.append(Line2D([], [], label="exact", **_EXACT))
        handles.append(Patch(color=COLORS["floor"], alpha=0.16, linewidth=0, label=f"margin ±{found['margin']:g}"))
    for row in found["texts"][:1]:
        for arm, marker in zip(list(row["bits"])[1:4], "^v<", strict=False):
            handles.append(Line2D([], [], linestyle="", color=COLORS[arm], marker=marker, label=arm, markersize=4))
        if not found["rows"]:
            handles.append(Line2D([], [], linestyle="", color=COLORS["ME"], marker="s", label="mixture", markersize=4))
    return handles


def _caption(record: Record) -> str:
    found = record.results
    rows, parts = found["rows"], []
    if rows:
        k = record.config["top_k"]
        compared = {"CE - ME": f"CE and ME (one law, k = {k})", "published CE - ME": "published CE and ME"}
        for pair, words in compared.items():
            largest = max(abs(row["pairs"][pair]["difference"]) for row in rows)
            shown = max(row["pairs"][pair]["these items"]["smallest_margin"] for row in rows)
            parts.append(f"{words} are at most {largest:.3f} apart, less than {shown:.3f} shown")
        text = f"On {len(rows)} task{'s' * (len(rows) > 1)} " + "; ".join(parts) + f" ({found['label']}"
        text += f", {sum(row['items'] for row in rows):,} items, {min(row['runs'] for row in rows)} runs, 95%)."
        text += " Thick bars: these items; thin: items like these."
        exact = [row for row in rows if row["exact"]]
        if exact:
            far = max(exact, key=lambda row: abs(row["exact"]["difference"]))
            text += (
                f" Summed over all texts the published CE moves the accuracy on {far['task']} by "
                f"{far['exact']['difference']:+.4f}, and that of single items by up to {far['exact']['largest']:.2f}."
            )
        parts = [text]
    for row in found["texts"][:2]:
        best = min(list(row["bits"])[1:], key=lambda arm: row["bits"][arm]["value"])
        parts.append(
            f"{row['task'].partition(':')[2].capitalize() or row['task']}: the mixture takes "
            f"{-row['gains'][best]['value']:+.3f} bits a byte beside its best component."
        )
    return " ".join(parts)
