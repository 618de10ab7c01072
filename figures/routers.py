"""What routers save on held-out text, what Bayes' rule makes of it, and one document coloured by who may speak."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.patches import Rectangle

from me_stats.record import Record
from me_stats.report import Figure
from me_stats.report.style import COLORS, MARKERS, figure, save

PROSE, CODE = COLORS["component 1"], COLORS["component 2"]
# Light enough in the middle and at both ends for black letters.
_SHADES = LinearSegmentedColormap.from_list("prose to code", [PROSE, "#CDEBE1", "#FFFFFF", "#FBE8C3", CODE])
_DOMAINS = {"prose": (PROSE, MARKERS["component 1"]), "code": (CODE, MARKERS["component 2"]), "mixed": ("#333333", "o")}
_COLUMNS = 80


def draw(record: Record, folder: Path) -> Figure:
    """Above: gains by router and domain, and the Bayes axis; below: one mixed document, byte by byte."""
    results = record.results
    lines = _lines(results["picture"])
    page = 0.16 * len(lines) + 0.3
    fig, axes = figure(columns=2, height=2.35 + page, nrows=2, ncols=1, height_ratios=[2.35, page])
    top, text = axes
    grid = top.get_subplotspec().subgridspec(1, 3, width_ratios=[1.45, 1, 1])
    top.remove()
    gains, nll, diversity = (fig.add_subplot(cell) for cell in grid)
    _gains(gains, results)
    _bayes(nll, diversity, results)
    _routing(text, results["picture"], lines)
    caption = _caption(results)
    return Figure(tuple(save(fig, folder / record.name, {"caption": caption, "key": record.key})), caption)


def _gains(ax: Any, results: dict[str, Any]) -> None:
    """Nats a byte saved against the best constant λ, by router and domain."""
    rows = {(row["weights"], row["domain"]): row for row in results["held_out"]}
    names = [row["router"] for row in results["training"]]
    bayes = f"Bayes {results['beta']:g}"
    shown = {**{name: name for name in names}, bayes: f"Bayes, β = {results['beta']:g}"}
    shown["λ of its domain"] = "λ of its domain"
    for i, name in enumerate(shown):
        for j, (domain, (color, marker)) in enumerate(_DOMAINS.items()):
            row = rows[name, domain]
            sides = [[row["gain"] - row["low"]], [row["high"] - row["gain"]]]
            label = domain if i == 0 else None
            ax.errorbar(row["gain"], i + 0.22 * (j - 1), xerr=sides, fmt=marker, color=color, label=label, linewidth=1)
    ax.axvline(0, color=COLORS["floor"], linewidth=0.9)
    ax.set_yticks(range(len(shown)), list(shown.values()))
    ax.set_ylim(len(shown) - 0.5, -1.1)
    ax.set(xlabel="nats/byte saved", title="Against the best constant λ")
    ax.legend(loc="upper center", ncols=3, borderaxespad=0.1, handletextpad=0.3, columnspacing=1.2)


def _bayes(nll: Any, diversity: Any, results: dict[str, Any]) -> None:
    """From the constant mixture (β = 0) to one component per sequence (β = 1)."""
    rows = results["bayes"]
    place, ticks = np.arange(len(rows)), [f"{row['beta']:g}" for row in rows]
    for domain, (color, marker) in _DOMAINS.items():
        nll.plot(place, [row["nll"][domain] for row in rows], marker=marker, color=color, label=domain)
    nll.set(xlabel="β of Bayes' rule", ylabel="nats/byte, held out", title="Evidence as weights")
    diversity.errorbar(
        place, [row["entropy"] for row in rows], yerr=[1.96 * row["entropy_error"] for row in rows], fmt="o-",
        color=COLORS["CE"], label="entropy, nats/byte",
    )  # fmt: skip
    diversity.plot(place, [row["top_weight"] for row in rows], "s-", color=COLORS["ME"], label="largest weight, end")
    diversity.plot(
        place, [row["distinct"] for row in rows], "D-", color=COLORS["component 3"], label="distinct 3-grams"
    )
    diversity.set(xlabel="β of Bayes' rule", title="What it writes")
    diversity.set_ylim(0, 1.65 * max(row["entropy"] for row in rows))
    diversity.legend(loc="upper right", borderaxespad=0.1)
    for ax in (nll, diversity):
        ax.set_xticks(place, ticks)


def _lines(picture: dict[str, Any]) -> list[range]:
    """Places of the bytes of each printed line: broken where the text is, and at the edge."""
    lines, start = [], 0
    for place, sign in enumerate(picture["text"]):
        if sign == "\n" or place + 1 - start == _COLUMNS:
            lines.append(range(start, place + 1))
            start = place + 1
    if start < len(picture["text"]):
        lines.append(range(start, len(picture["text"])))
    return lines


def _routing(ax: Any, picture: dict[str, Any], lines: list[range]) -> None:
    """Each character on the router's weight before it, over a strip with what its arrival taught."""
    for y, line in enumerate(lines):
        for x, place in enumerate(line):
            weight, posterior = picture["weight"][place], picture["responsibility"][place]
            ax.add_patch(Rectangle((x, y), 1.02, 0.74, color=_SHADES(weight), linewidth=0))
            ax.add_patch(Rectangle((x, y + 0.76), 1.02, 0.15, color=_SHADES(posterior), linewidth=0))
            sign = "↵" if picture["text"][place] == "\n" else picture["text"][place]
            ax.text(
                x + 0.5, y + 0.4, sign, family="DejaVu Sans Mono", fontsize=8.5, ha="center", va="center",
                color="0.45" if sign == "↵" else "black", parse_math=False,
            )  # fmt: skip
            if place and picture["is_code"][place] != picture["is_code"][place - 1]:
                ax.plot([x, x], [y - 0.04, y + 0.93], color="black", linewidth=1.1, solid_capstyle="butt")
    ax.set(xlim=(-0.2, _COLUMNS + 0.2), ylim=(len(lines), -0.05))
    ax.grid(False)
    ax.set_axis_off()
    ax.set_title(f"Who may speak: weights of the {picture['router']} router, byte by byte", y=1.0, pad=4)
    scale = ax.inset_axes((0.70, 1.0 + 0.4 / len(lines), 0.22, 0.6 / len(lines)))
    scale.imshow(np.linspace(0, 1, 100)[None], aspect="auto", cmap=_SHADES)
    scale.set_axis_off()
    for x, name, side in ((-0.03, "prose", "right"), (1.03, "code", "left")):
        scale.text(x, 0.5, name, transform=scale.transAxes, ha=side, va="center", fontsize=7)


def _caption(results: dict[str, Any]) -> str:
    rows = {(row["weights"], row["domain"]): row for row in results["held_out"]}
    names = [row["router"] for row in results["training"]]
    best = max(names, key=lambda name: rows[name, "mixed"]["gain"])
    mixed, bayes = rows[best, "mixed"], rows[f"Bayes {results['beta']:g}", "mixed"]
    return (
        f"On documents that switch between prose and code the {best} router saves {mixed['gain']:.3f} nats/byte "
        f"({mixed['low']:.3f} to {mixed['high']:.3f}) against the best constant λ; Bayes' rule, which never forgets, "
        f"{'loses' if bayes['gain'] < 0 else 'saves'} {abs(bayes['gain']):.3f}. Left: 95% intervals, paired by "
        "document. Right: β = 1 ends with one component per sequence. Below: a test document; background, weight "
        "before a byte is read; strip, who wrote it, judged after; black bars, true switches."
    )
