"""A sweep over λ as pictures: lines with bands for two components, a triangle for three."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.tri import Triangulation
from numpy.typing import ArrayLike, NDArray

from me_stats.report.style import COLORS, figure
from me_stats.sweep import Sweep

Floats = NDArray[np.float64]

LABELS = {
    "log_prob": "log-probability (nats a sequence)",
    "entropy_rate": "entropy rate (nats a token)",
    "length": "length (tokens)",
    "distinct": "different tokens (share)",
    "repetition": "repeated bigrams (share)",
    "tokens_per_forward": "tokens fed a forward, ME",
    "step_tv": "TV to the reference, a step",
    "sequence_tv": "TV to the reference, a sequence",
    "nll": "corpus (nats a token)",
    "task": "task score",
}
"""Axis labels of what every sweep estimates; a caller's statistic is labelled by its name."""

# Component 1 lower left, 2 lower right, 3 on top, on a triangle with sides of length 1.
CORNERS = np.array([[0.0, 0.0], [1.0, 0.0], [0.5, math.sqrt(0.75)]])


def draw_line(ax: Any, sweep: Sweep, name: str, *, components: Sequence[str] = ()) -> None:
    """One estimate against the weight of component 1, for K = 2, on a matplotlib axes.

    The band is the pointwise interval; filled squares are points where rows were drawn, small open circles points where
    a trace was re-weighted, the dashed line the reference λ. Raises ValueError for another K or an unknown name.
    """
    _require(sweep, 2)
    first = np.array([point.weights[0] for point in sweep.points])
    order = np.argsort(first)
    value, low, high = (column[order] for column in sweep.series(name))
    weight, drawn = first[order], np.array([point.drawn for point in sweep.points])[order]
    ax.axvline(sweep.reference[0], color=COLORS["floor"], linestyle="--", linewidth=0.8)
    ax.fill_between(weight, low, high, color=COLORS["CE"], alpha=0.18, linewidth=0)
    ax.plot(weight, value, color=COLORS["CE"])
    if name not in _FROM_ELSEWHERE:
        ax.plot(weight[~drawn], value[~drawn], "o", color=COLORS["CE"], markerfacecolor="white", markersize=3)
        ax.plot(weight[drawn], value[drawn], "s", color=COLORS["ME"], markersize=4)
    ax.set(xlim=(-0.02, 1.02), xlabel=f"weight of {components[0] if components else 'component 1'}")
    ax.set_title(LABELS.get(name, name))


def draw_ternary(
    ax: Any, sweep: Sweep, name: str, *, components: Sequence[str] = (), levels: int = 10, colorbar: bool = True
) -> None:
    """One estimate over the triangle of three weights, on a matplotlib axes.

    Bands of equal colour between the grid's points; squares where rows were drawn, a ring at the reference λ, weights
    ticked along the edges. Raises ValueError for another K, an unknown name, or a grid on one line.
    """
    _require(sweep, 3)
    weights = np.array([point.weights for point in sweep.points])
    place = barycentric(weights)
    value = sweep.series(name)[0]
    if len(place) < 3 or np.linalg.matrix_rank(place[1:] - place[0], tol=1e-9) < 2:
        raise ValueError("grid must hold three points that are not on one line; use simplex_grid(3, steps)")
    if not np.isfinite(value).all():
        raise ValueError(f"{name} is infinite at some λ: a ternary plot needs finite values")
    triangles = Triangulation(place[:, 0], place[:, 1])
    # Points along an edge of the lattice span slivers of no area, which would colour wrongly.
    triangles.set_mask(_areas(place, triangles.triangles) < 1e-9)
    flat = np.ptp(value) <= 1e-9 * max(1.0, float(np.abs(value).max()))  # rounding is no landscape
    if flat:
        ax.fill(*CORNERS.T, color="0.85", linewidth=0)
        ax.text(*(CORNERS.mean(0) - (0, 0.12)), f"{value.mean():.4g} everywhere", fontsize=7, ha="center", va="center")
    else:
        bands = ax.tricontourf(triangles, value, levels=levels, cmap="viridis")
        ax.tricontour(triangles, value, levels=bands.levels, colors="white", linewidths=0.3, alpha=0.6)
    _frame(ax, components)
    drawn = np.array([point.drawn for point in sweep.points])
    ax.plot(*place[drawn].T, "s", color="white", markeredgecolor="black", markeredgewidth=0.6, markersize=3.2)
    at = barycentric(np.array([sweep.reference]))[0]
    ax.plot(*at, "o", color="none", markeredgecolor="black", markeredgewidth=1.0, markersize=7.5)
    ax.set_title(LABELS.get(name, name), pad=10)
    if colorbar and not flat:
        bar = ax.figure.colorbar(bands, ax=ax, orientation="horizontal", shrink=0.7, aspect=24, pad=0.02)
        bar.outline.set_linewidth(0.4)
        bar.locator = _few_ticks()
        bar.update_ticks()


def barycentric(weights: ArrayLike) -> Floats:
    """Places (G, 2) of weights (G, 3) in the triangle with corners `CORNERS`.

    >>> barycentric([[1, 0, 0], [0, 0.5, 0.5]]).round(3).tolist()
    [[0.0, 0.0], [0.75, 0.433]]
    """
    return np.asarray(weights, dtype=np.float64) @ CORNERS


def sweep_figure(sweep: Sweep, names: Sequence[str] = (), *, components: Sequence[str] = ()) -> Figure:
    """All `names` (default: every finite estimate) on one page, three or four panels a row by K.

    Raises ValueError unless K is 2 or 3.
    """
    count = len(sweep.reference)
    if count not in (2, 3):
        raise ValueError(f"a sweep over {count} components has no picture here; draw two or three")
    finite = [name for name in sweep.names if np.isfinite(np.stack(sweep.series(name))).all()]
    chosen = list(names) or finite
    columns = 3
    rows = -(-len(chosen) // columns)
    fig, grid = figure(
        columns=2, height=min(11.5, rows * (1.75 if count == 2 else 2.75)), nrows=rows, ncols=columns, squeeze=False
    )
    axes = grid.reshape(-1)
    for place, (ax, name) in enumerate(zip(axes, chosen, strict=False)):
        if count == 2:
            draw_line(ax, sweep, name, components=components)
            if place + columns < len(chosen):
                ax.set_xlabel("")
        else:
            draw_ternary(ax, sweep, name, components=components)
    for ax in axes[len(chosen) :]:
        ax.set_axis_off()
    return fig


def _frame(ax: Any, components: Sequence[str]) -> None:
    """Edges, inner lines at fifths, ticks that say which weight they count, and named corners."""
    names = list(components) or ["component 1", "component 2", "component 3"]
    colors = [COLORS[f"component {i + 1}"] for i in range(3)]
    ax.set_axis_off()
    ax.set_aspect("equal")
    ax.plot(*np.vstack([CORNERS, CORNERS[:1]]).T, color="0.2", linewidth=0.8, solid_joinstyle="round")
    center = CORNERS.mean(0)
    for i in range(3):
        # Weight i is ticked along the edge from corner i + 1, where it is 0, to corner i; along a line it is constant.
        zero, other = (i + 1) % 3, (i + 2) % 3
        outward = (CORNERS[zero] + CORNERS[i]) / 2 - center
        outward /= np.linalg.norm(outward)
        for fifth in range(1, 5):
            share = fifth / 5
            start = share * CORNERS[i] + (1 - share) * CORNERS[zero]
            end = share * CORNERS[i] + (1 - share) * CORNERS[other]
            ax.plot(*np.stack([start, end], axis=1), color="white", linewidth=0.4, alpha=0.5)
            ax.plot(*np.stack([start, start + 0.018 * outward], axis=1), color=colors[i], linewidth=0.9)
            ax.text(*(start + 0.062 * outward), f".{2 * fifth}", fontsize=6, color=colors[i], ha="center", va="center")
        side = ("left", "right", "center")[i]
        shift = np.array([[-0.06, -0.075], [0.06, -0.075], [0.0, 0.055]])[i]
        ax.text(
            *(CORNERS[i] + shift), names[i], fontsize=7, color=colors[i], weight="bold", ha=side,
            va="bottom" if i == 2 else "top",
        )  # fmt: skip
    ax.set(xlim=(-0.14, 1.14), ylim=(-0.2, 1.02))


def _areas(place: Floats, triangles: Any) -> Floats:
    a, b, c = (place[triangles[:, corner]] for corner in range(3))
    return np.asarray(np.abs((b - a)[:, 0] * (c - a)[:, 1] - (b - a)[:, 1] * (c - a)[:, 0]) / 2)


def _few_ticks() -> Any:
    from matplotlib.ticker import MaxNLocator

    return MaxNLocator(4)


# The same rows serve every λ: those of the reference, or the corpus.
_FROM_ELSEWHERE = ("sequence_tv", "nll")


def _require(sweep: Sweep, count: int) -> None:
    if len(sweep.reference) != count:
        raise ValueError(f"the sweep has {len(sweep.reference)} components, this plot shows {count}")
