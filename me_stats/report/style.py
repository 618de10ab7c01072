"""One look for every figure: two widths, 8 points, colours with fixed meanings, the same bytes on every run.

Colours are those of Okabe and Ito (2008), which people with any common colour vision can tell apart. The font comes
with matplotlib, so a figure does not depend on what a machine has installed.
"""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import matplotlib
from cycler import cycler
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from me_stats.record import plain, write_atomically

WIDTHS = {1: 3.25, 2: 6.75}
"""Figure widths in inches, by the number of columns that the figure spans."""

COLORS = {
    "CE": "#0072B2",
    "ME": "#D55E00",
    "control": "#CC79A7",
    "floor": "#7F7F7F",
    "component 1": "#009E73",
    "component 2": "#E69F00",
    "component 3": "#56B4E9",
}
"""What each colour means. Grey, for the floor, is ours; Okabe and Ito leave it out."""

MARKERS = {"CE": "o", "ME": "s", "control": "X", "component 1": "^", "component 2": "v", "component 3": "D"}
"""The same meanings without colour."""

PAPER_DPI = 300
SCREEN_DPI = 216
"""Twice 108 pixels an inch, at which 8 points are 12 pixels: a page shows the PNG at half its size."""

STYLE: dict[str, Any] = {
    "font.family": "DejaVu Sans",
    "mathtext.fontset": "dejavusans",
    "text.usetex": False,
    "font.size": 8,
    "axes.titlesize": 8,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.labelsize": 8,
    "xtick.labelsize": 7,
    "ytick.labelsize": 7,
    "legend.fontsize": 7,
    "legend.frameon": False,
    "legend.handlelength": 1.6,
    "figure.titlesize": 8,
    "axes.prop_cycle": cycler(color=[color for name, color in COLORS.items() if name != "floor"]),
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.linewidth": 0.6,
    "axes.edgecolor": "0.3",
    "xtick.color": "0.3",
    "ytick.color": "0.3",
    "xtick.labelcolor": "0.15",
    "ytick.labelcolor": "0.15",
    "xtick.major.width": 0.6,
    "ytick.major.width": 0.6,
    "xtick.minor.width": 0.4,
    "ytick.minor.width": 0.4,
    "axes.grid": True,
    "axes.grid.which": "major",
    "axes.axisbelow": True,
    "grid.color": "0.9",
    "grid.linewidth": 0.5,
    "lines.linewidth": 1.2,
    "lines.markersize": 3.5,
    "errorbar.capsize": 2,
    "patch.linewidth": 0.6,
    "hatch.linewidth": 0.6,
    "figure.constrained_layout.use": True,
    "figure.facecolor": "white",
    "savefig.facecolor": "white",
    "pdf.fonttype": 42,
    "ps.fonttype": 42,
    "svg.hashsalt": "me_stats",
}


def figure(columns: int = 1, height: float | None = None, **subplots: Any) -> tuple[Figure, Any]:
    """A figure one or two columns wide in this style, and its axes.

    Sets matplotlib's rcParams, which later calls such as ``ax.legend`` read, after putting aside what the machine's
    own settings say. The figure belongs to no window and no pyplot state, so it needs no display.

    Parameters
    ----------
    columns
        1 (3.25 in) or 2 (6.75 in).
    height
        Inches; by default 2.2 for one column and 2.4 for two.
    subplots
        Passed on to `matplotlib.figure.Figure.subplots`: ``nrows``, ``ncols``, ``sharex``, ``width_ratios``, ...

    >>> fig, axes = figure(columns=2, ncols=2)
    >>> fig.get_size_inches().tolist(), axes.shape
    ([6.75, 2.4], (2,))
    """
    if columns not in WIDTHS:
        raise ValueError(f"columns must be one of {tuple(WIDTHS)}, got {columns!r}")
    if height is None:
        height = {1: 2.2, 2: 2.4}[columns]
    if not 0 < height < 12:
        raise ValueError(f"height must lie between 0 and 12 inches, got {height!r}")
    matplotlib.rcdefaults()
    matplotlib.rcParams.update(STYLE)
    fig = Figure(figsize=(WIDTHS[columns], height), layout="constrained")
    FigureCanvasAgg(fig)
    return fig, fig.subplots(**subplots)


def save(fig: Figure, stem: Path, data: dict[str, Any] | None = None) -> list[Path]:
    """Write ``stem.pdf`` for paper and ``stem.png`` for screens, close the figure, and return both paths.

    `data` travels inside both files, where `read_data` finds it: ``caption`` is the text that a report puts under the
    figure, the rest (the record's name and key, say) tells what was drawn. Equal figures give equal bytes.
    """
    stem = Path(stem)
    about = dict(data or {})
    caption = str(about.pop("caption", ""))
    source = json.dumps(plain(about), sort_keys=True, ensure_ascii=False, allow_nan=False) if about else None
    # Dates and version strings would make two runs differ.
    metadata: dict[str, dict[str, str | None]] = {
        "pdf": {"CreationDate": None, "Creator": "me_stats", "Producer": None, "Subject": caption or None},
        "png": {"Software": None, "Description": caption or None},
    }
    metadata["pdf"]["Keywords"] = source
    metadata["png"]["Comment"] = source
    contents = {}
    with matplotlib.rc_context(STYLE):
        for kind, dpi in (("pdf", PAPER_DPI), ("png", SCREEN_DPI)):
            buffer = io.BytesIO()
            known = {key: value for key, value in metadata[kind].items() if value is not None or key in _SILENCED}
            fig.savefig(buffer, format=kind, dpi=dpi, metadata=known)
            contents[kind] = buffer.getvalue() if kind == "pdf" else _indexed(buffer, metadata["png"])
    paths = []
    for kind, content in contents.items():
        path = stem.with_name(f"{stem.name}.{kind}")  # with_suffix would cut a name such as "floor-1.5b"
        write_atomically(path, content)
        paths.append(path)
    fig.clear()
    return paths


def _indexed(png: io.BytesIO, metadata: dict[str, str | None]) -> bytes:
    """The same picture in at most 256 colours, which flat figures hardly need: a third of the bytes.

    Colours are those that cover the picture best, so that a thin line keeps its own; none is far off.
    """
    from PIL import Image, PngImagePlugin

    known = PngImagePlugin.PngInfo()
    for key, value in metadata.items():
        if value is not None:
            known.add_text(key, value)
    with Image.open(png) as image:
        dpi = image.info.get("dpi")
        few = image.convert("RGB").quantize(256, method=Image.Quantize.MAXCOVERAGE, dither=Image.Dither.NONE)
    buffer = io.BytesIO()
    few.save(buffer, format="png", optimize=True, pnginfo=known, dpi=dpi)
    return buffer.getvalue()


def read_data(path: Path) -> dict[str, Any]:
    """The `data` that `save` put in a PNG file; empty for a PNG from elsewhere."""
    from PIL import Image

    with Image.open(path) as image:
        image.load()
        text = {key: str(value) for key, value in image.info.items() if isinstance(value, str)}
    data: dict[str, Any] = {"caption": text["Description"]} if "Description" in text else {}
    try:
        about = json.loads(text.get("Comment", "{}"))
    except json.JSONDecodeError:
        return data
    return {**about, **data} if isinstance(about, dict) else data


_SILENCED = {"CreationDate", "Producer", "Software"}  # None tells matplotlib to leave these out
