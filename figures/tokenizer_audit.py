"""Tokenizers: what pairs of vocabularies share, and the probability that hangs on ids which an exchange loses."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from matplotlib.lines import Line2D

from me_stats.record import Record
from me_stats.report import Figure
from me_stats.report.style import COLORS, MARKERS, figure, save

_LEAST = 1e-5  # sets with less mass are left out; shares below are drawn here


def draw(record: Record, folder: Path) -> Figure:
    """Left: strings of each pair, own and shared. Right: share of ids and mean mass of each set at stake, by model."""
    pairs, mass = record.results["pairs"], record.results["mass"]
    stakes = [row for row in mass if row["mean"] > _LEAST and row["ids"]]
    rows = max(2 * len(pairs), len(stakes), 6)
    fig, (left, right) = figure(
        columns=2, height=min(9.0, 1.2 + 0.16 * rows), ncols=2, width_ratios=[1, 1] if stakes else [1, 0.02]
    )
    _pairs(left, pairs)
    if stakes:
        _stakes(right, stakes)
    else:
        right.set_axis_off()
    caption = _caption(record, pairs, mass)
    return Figure(tuple(save(fig, folder / record.name, {"caption": caption, "key": record.key})), caption)


def _pairs(ax: Any, pairs: list[dict[str, Any]]) -> None:
    places = range(len(pairs))
    start = [0.0] * len(pairs)
    parts = (("only_a", "first alone", "CE"), ("shared", "both", "component 1"), ("only_b", "second alone", "ME"))
    for key, label, color in parts:
        width = [row[key] / row["union"] for row in pairs]
        ax.barh(places, width, left=start, height=0.7, color=COLORS[color], label=label)
        start = [a + b for a, b in zip(start, width, strict=True)]
    ax.set_yticks(places, [f"{_short(row['a'])}\n{_short(row['b'])}" for row in pairs])
    ax.set_ylim(len(pairs) - 0.4, -0.6)
    ax.set(xlim=(0, 1), xlabel="share of the pair's strings", title="Strings of pairs")
    ax.grid(axis="y", visible=False)
    if pairs:
        ax.figure.legend(*ax.get_legend_handles_labels(), loc="outside lower left", ncols=3)


def _stakes(ax: Any, stakes: list[dict[str, Any]]) -> None:
    names = list(dict.fromkeys(row["model"] for row in stakes))
    colors = dict(zip(names, ("component 1", "component 2", "component 3"), strict=False))
    for place, row in enumerate(stakes):
        color = COLORS[colors.get(row["model"], "control")]
        share, mean = (max(_LEAST, row[key]) for key in ("share", "mean"))
        ax.plot([share, mean], [place, place], color="0.8", linewidth=1, zorder=1)
        ax.plot(share, place, "o", color=color, markerfacecolor="white")
        ax.plot(mean, place, MARKERS["ME"], color=color)
    ax.set_yticks(range(len(stakes)), [_named(row["set"]) for row in stakes])
    ax.set_ylim(len(stakes) - 0.4, -0.6)
    ax.set(xscale="log", xlim=(_LEAST * 0.7, 1.3), xlabel="share (log scale)", title="Mass at stake")
    ax.grid(axis="y", visible=False)
    handles = [
        Line2D([], [], marker="o", linestyle="", color="0.3", markerfacecolor="white", label="share of ids"),
        Line2D([], [], marker=MARKERS["ME"], linestyle="", color="0.3", label="mean probability"),
        *(Line2D([], [], linewidth=3, color=COLORS[colors.get(name, "control")], label=name) for name in names),
    ]
    ax.figure.legend(handles=handles, loc="outside lower right", ncols=2)


def _caption(record: Record, pairs: list[dict[str, Any]], mass: list[dict[str, Any]]) -> str:
    sentences = []
    if pairs:
        least, most = (choose(pairs, key=lambda row: row["shared"] / row["union"]) for choose in (min, max))
        between = f"{least['shared'] / least['union']:.0%} of their strings ({least['a']}, {least['b']})"
        if least is not most:
            between += f" to {most['shared'] / most['union']:.0%} ({most['a']}, {most['b']})"
        sentences.append(f"Two vocabularies share {between}.")
    split = [row for row in mass if row["set"].startswith("another name") and row["mean"] > 0]
    if split:
        worst = max(split, key=lambda row: row["mean"])
        other = worst["set"].removeprefix("another name in ")
        sentences.append(
            f"An exchange by names takes {worst['mean']:.0%} of the probability of {worst['model']} for symbols that "
            f"{other} does not write, although it has the strings (mean over {worst['n']:,} steps)."
        )
    lost = [row for row in mass if row["set"] == "lost by the exchange of names" and row["ids"]]
    for row in lost:
        sentences.append(
            f"{row['share']:.1%} of the ids of {row['model']} do not return; they carry {row['mean']:.2%}."
        )
    written = record.results.get("contexts", ())
    if written:
        runs, canonical = (sum(row[key] for row in written) for key in ("runs", "canonical"))
        tokens = sum(row["tokens"] * row["runs"] for row in written) / runs
        sentences.append(
            f"{runs - canonical} of {runs} contexts written so, of {tokens:.0f} tokens on average, are not the "
            "tokenisation of their text."
        )
    refused = len(record.results["refused"])
    if refused:
        sentences.append(f"{refused} tokenizer{'s' * (refused > 1)} could not be read.")
    return " ".join(sentences) or "One tokenizer, with no other to compare it with."


def _short(name: str, most: int = 18) -> str:
    """A name that fits; of a long one the end tells more than the beginning."""
    return name if len(name) <= most else f"…{name[1 - most :]}"


def _named(kind: str) -> str:
    """A set of ids in a few words: what is wrong with them, and towards which other vocabulary."""
    for start, words in (("no such string in ", "absent"), ("another name in ", "renamed")):
        if kind.startswith(start):
            return f"{words}: {_short(kind.removeprefix(start))}"
    return {"lost by decode and encode": "lost by decoding", "lost by the exchange of names": "lost by names"}.get(
        kind, kind
    )
