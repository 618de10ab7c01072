"""``me-stats audit-table``: what a published table of paired accuracies shows, and what it cannot show."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from me_stats.cli_options import check_out, say

if TYPE_CHECKING:
    from me_stats.audit import Audit, Block

_EXPERIMENT = "audit"


def audit_table(
    file: Annotated[Path, typer.Argument(help="CSV table, one printed accuracy a line; see above.")],
    items: Annotated[
        list[str] | None,
        typer.Option("--items", metavar="SET=N ...", help="Items of each data set, for a table without that column."),
    ] = None,
    runs: Annotated[
        int | None, typer.Option(min=1, help="Runs that each number is the mean of, for a table without that column.")
    ] = None,
    noise: Annotated[
        float, typer.Option(help="Noise of runs as a share ρ of the largest that independent runs can have.")
    ] = 1.0,
    level: Annotated[float, typer.Option(help="False-alarm rate of each verdict; intervals leave as much out.")] = 0.05,
    out: Annotated[Path | None, typer.Option(help="Folder for the record (JSON) and the figure.")] = None,
) -> None:
    """Audit a published table: do two methods have equal accuracy, and what gap could the table have shown?

    Columns of the file: group, setting, dataset, accuracy (percent, with all printed digits); and where there are such
    table, k, model, printed_delta, items, runs. The setting is the name of one of two methods, or "single" for a model
    alone, whose name stands in the column model. A group "A + B" is an ensemble of the models A and B.

    Scatter, single cells, means and their bounds are judged against independent runs of equal accuracy; printed
    differences are computed again; digits are compared with counts of answers. Accuracies can show that two laws
    differ, never that they are equal.

    Exit code: 0 done, whatever the table shows, 2 bad usage or a file that is no such table, 130 interrupted.

    \b
    Examples:
      me-stats audit-table table.csv --items GSM8K=1319 MMLU=14042 BBH=6511 ARC=1172 --runs 5
      me-stats audit-table table.csv --noise 0.5 --out audit
    """
    from me_stats.audit import audit_accuracies
    from me_stats.audit_table import read_table

    counts = _counts(items or [])
    found = audit_accuracies(read_table(file), items=counts, runs=runs, noise=noise, level=level)
    if out is not None:
        check_out(out, "")
    _show(found)
    if out is not None:
        _write(found, {"table": file, "items": counts, "runs": runs, "noise": noise, "level": level}, out)


def _counts(items: Sequence[str]) -> dict[str, int]:
    """Counts by data set from ``SET=N``."""
    counts: dict[str, int] = {}
    for item in items:
        name, equals, number = item.rpartition("=")
        if not (equals and name and number.isascii() and number.isdigit() and 0 < int(number) < 10**12):
            raise ValueError(f"--items {item}: give a data set and its number of items, such as GSM8K=1319")
        if name in counts:
            raise ValueError(f"--items {item}: {name} has a count already")
        counts[name] = int(number)
    return counts


def _show(audit: Audit) -> None:
    from me_stats.audit_words import p_text

    console = Console()
    first, second = audit.methods
    table = Table("cell", first, second, "difference", "z", "Holm p", "BH p", "visible", box=None, pad_edge=False)
    for cell in audit.cells:
        style = "bold" if cell.holm < audit.level else ""
        numbers = (f"{cell.difference:+.2f}", f"{cell.z:+.2f}", p_text(cell.holm), p_text(cell.bh))
        table.add_row(escape(cell.label), *map(escape, cell.printed), *numbers, f"{cell.visible:.2f}", style=style)
    console.print(table)
    blocks = Table(
        "block", "cells", "Σz²", "p large", "p small", "mean", "bound", "any cell", "up, down", box=None, pad_edge=False
    )
    for row in (*audit.blocks, *audit.without):
        if row.block == "k" and not row.name:
            continue
        numbers = (f"{row.df}", f"{row.statistic:.2f}", p_text(row.p_large), p_text(row.p_small))
        bounds = (f"{row.mean:+.3f}", f"{row.margin:.2f}", f"{row.worst_margin:.2f}", f"{row.up}, {row.down}")
        blocks.add_row(escape(_block(row.block, row.name)), *numbers, *bounds)
    console.print()
    console.print(blocks)
    console.print()
    console.print(audit.paragraph(), markup=False, highlight=False)


def _block(block: Block, name: str) -> str:
    return {"all": "all cells", "k": f"k = {name}", "without": f"without {name}"}.get(block, name)


def _write(audit: Audit, config: dict[str, Any], out: Path) -> None:
    from me_stats import scripts
    from me_stats.record import Recorder, plain

    file: Path = config["table"]
    content = hashlib.sha256(file.read_bytes()).hexdigest()
    recorder = Recorder(
        f"{_EXPERIMENT}-{file.stem}", "What a published table shows, and what it cannot", config | {"sha256": content}
    )
    record = recorder.finish({"audit": plain(audit), "paragraph": audit.paragraph()})
    path = out / f"{record.name}.json"
    record.save(path)
    drawn = scripts.load("figures", _EXPERIMENT).draw(record, out)
    say(Console(stderr=True), f"Results: {', '.join(str(path) for path in (path, *drawn.paths))}")
