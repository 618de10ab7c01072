"""Two tokenizers writing one text: which component wrote what, and how far the laws it was drawn from are off."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from matplotlib.patches import Rectangle

from me_stats.record import Record
from me_stats.report import Figure
from me_stats.report.style import COLORS, figure, save

_COLUMNS, _LINES = 50, 8
_SHADES = ("component 1", "component 2")


def draw(record: Record, folder: Path) -> Figure:
    """Distances of each component on a log axis, beside a text in the colours of who wrote it."""
    results = record.results
    names, components = results["names"], results["components"]
    fig, (left, right) = figure(columns=2, height=1.9, ncols=2, width_ratios=[1, 1.35])
    measures = [
        ("session, mean", lambda row: row["floor"]["mean"]),
        ("session, largest", lambda row: row["floor"]["max"]),
        ("mass without a string", lambda row: row["dropped"]["mean"]),
        ("read string by string", lambda row: row["piecewise"]["tv"]),
    ]
    for number, (name, row) in enumerate(zip(names, components, strict=True)):
        values = [max(value(row), 1e-9) for _, value in measures]
        places = [place + 0.16 * (2 * number - 1) for place in range(len(measures))]
        left.plot(values, places, "os"[number % 2], color=COLORS[_SHADES[number % 2]], markersize=4.5, label=name)
    left.set_yticks(range(len(measures)), [name for name, _ in measures])
    left.set(xscale="log", xlim=(3e-10, 3), ylim=(len(measures) - 0.5, -0.5), xlabel="TV from the law by definition")
    # A logarithmic axis has no zero; what is exactly 0 stands at its foot.
    left.set_xticks([1e-9, 1e-6, 1e-3, 1], ["0", "$10^{-6}$", "$10^{-3}$", "1"])
    fig.legend(*left.get_legend_handles_labels(), loc="outside upper center", ncols=len(names))
    _text(right, results["text"]["sample"])
    upper = max(row["floor"]["max"] for row in components)
    anew = sum(row["split_anew"]["steps"] for row in components)
    apart = max(components, key=lambda row: row["piecewise"]["tv"])["piecewise"]
    caption = (
        f"{' and '.join(names)} write together over {results['strings']:,} byte strings ({results['rows']} rows, "
        f"{results['tokens']:,} tokens). Left: every law of a session is within TV {upper:.0e} of a fresh reading of "
        f"the same bytes, through {anew} steps in which the end of a history was split anew; a reading string by "
        f"string is {apart['tv']:.2f} away where it differs ({apart['apart']} of {apart['rows']} rows). Right: one "
        f"text by ME, each string in the colour of the model that wrote it; no other model ran for it.{_bytes(results)}"
    )
    return Figure(tuple(save(fig, folder / record.name, {"caption": caption, "key": record.key})), caption)


def _bytes(results: dict[str, Any]) -> str:
    """The price of laws of single bytes, in a sentence for each model."""
    said = ""
    for found in results["next_byte"]:
        widest, *others = found["beams"]
        parts = [f"{row['beam']} read {row['laws_per_byte']:.1f}, TV {row['tv_to_widest']:.1g} off" for row in others]
        said += (
            f" Next-byte laws of {found['model']} ({found['bytes']} bytes, {found['tokens']} tokens): {widest['beam']} "
            f"tokenisations read {widest['laws_per_byte']:.1f} token laws a byte"
            + (f"; {', '.join(parts)}." if parts else ".")
        )
    return said


def _text(ax: Any, sample: dict[str, Any]) -> None:
    """The prompt in grey and the pieces on coloured ground, in lines of `_COLUMNS` characters."""
    column = line = 0
    ax.set(xlim=(0, _COLUMNS), ylim=(_LINES, 0))
    ax.axis("off")
    for piece, component in [(sample["prompt"], None), *sample["pieces"]]:
        for part in _chunks(piece, _COLUMNS - column):
            if line >= _LINES:
                return
            shown = part.replace("\n", "\N{DOWNWARDS ARROW WITH CORNER LEFTWARDS}")
            if component is not None:
                shade = COLORS[_SHADES[component % 2]]
                ax.add_patch(Rectangle((column + 0.05, line + 0.08), len(shown) - 0.1, 0.84, color=shade, alpha=0.25))
            for place, character in enumerate(shown):
                ax.text(column + place + 0.5, line + 0.5, character, family="monospace", fontsize=6.2, ha="center",
                        va="center", color="0.35" if component is None else "0.0")  # fmt: skip
            column += len(shown)
            if part.endswith("\n") or column >= _COLUMNS:
                column, line = 0, line + 1


def _chunks(piece: str, room: int) -> list[str]:
    """`piece` cut behind line ends and at the right margin."""
    found, current = [], ""
    for character in piece:
        current += character
        if character == "\n" or len(current) == room:
            found.append(current)
            current, room = "", _COLUMNS
    return [*found, current] if current else found
