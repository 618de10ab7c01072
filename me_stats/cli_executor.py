"""``--executor`` and what belongs to it: the main job on several processes, a Ray cluster or Slurm."""

from __future__ import annotations

import json
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape

from me_stats.cli_options import say

if TYPE_CHECKING:
    from concurrent.futures import Executor as AnyExecutor

    from me_stats.plans import Part
    from me_stats.record import Record


class Executor(StrEnum):
    """Kinds of `executors.open_executor`."""

    here = "here"
    processes = "processes"
    ray = "ray"
    slurm = "slurm"

    @property
    def is_this_machine(self) -> bool:
        return self in (Executor.here, Executor.processes)


Kind = Annotated[Executor, typer.Option(help="What runs the parts; docs/executors.md tells how.")]
Workers = Annotated[int, typer.Option(min=1, help="Parts at a time, where --executor is not here.")]
Threads = Annotated[int | None, typer.Option(min=1, help="Threads of each worker; more than cores slow all down.")]
Gpus = Annotated[float, typer.Option(min=0.0, help="GPUs of each worker, of ray and slurm.")]
Options = Annotated[
    list[str] | None,
    typer.Option(metavar="NAME=VALUE ...", help="Options of ray.init or of submitit, such as slurm_partition=gpu."),
]


def opened(
    kind: Executor, workers: int, threads: int | None, gpus: float, options: Sequence[str]
) -> AbstractContextManager[AnyExecutor | None]:
    """The executor that the options ask for, to be entered; None for this process. ValueError for bad options."""
    from me_stats.executors import open_executor

    if kind == Executor.here:
        given = {
            "--workers": workers > 1,
            "--threads": threads,
            "--gpus-per-worker": gpus,
            "--executor-option": options,
        }
        if wrong := [name for name, value in given.items() if value]:
            raise ValueError(f"{wrong[0]} needs --executor processes, ray or slurm")
        return nullcontext()
    name: Any = kind.value  # one of the literals
    return open_executor(name, workers, threads=threads, gpus_per_worker=gpus, **parsed(options))


def parsed(options: Sequence[str]) -> dict[str, Any]:
    """Options by name, with numbers as numbers.

    >>> parsed(["slurm_partition=gpu", "timeout_min=240"])
    {'slurm_partition': 'gpu', 'timeout_min': 240}
    """
    found: dict[str, Any] = {}
    for option in options:
        name, given, text = option.partition("=")
        if not given or not name.isidentifier():
            raise ValueError(f"--executor-option {option}: give NAME=VALUE")
        try:
            found[name] = json.loads(text)
        except ValueError:
            found[name] = text
    return found


def run(
    parts: Sequence[Part], folder: Path, fresh: bool, console: Console,
    workplace: AbstractContextManager[AnyExecutor | None],
) -> list[Record]:  # fmt: skip
    """Records of the parts, in their order; those that `folder` holds are not made again."""
    from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

    from me_stats import reproduce as job

    found = {} if fresh else {part.name: record for part in parts if (record := job.finished(part, folder))}
    for name in found:
        console.print(f"[green]✓[/] {escape(name)}  done before", highlight=False, soft_wrap=True)
    missing, kept = [part for part in parts if part.name not in found], len(found)
    columns = (SpinnerColumn(), BarColumn(bar_width=24), TextColumn("{task.completed:.1f}/{task.total}"),
               TimeElapsedColumn(), TextColumn("{task.fields[note]}"))  # fmt: skip
    with Progress(*columns, console=console, disable=not console.is_terminal) as bar:
        task, said = bar.add_task("", total=len(parts), completed=kept, note=""), ""

        def show(done: float, note: str) -> None:
            nonlocal said
            bar.update(task, completed=kept + done, note=note)
            names = note.partition(": ")[0]
            if names and names != said and not console.is_terminal:
                say(console, f"{names} ...")
            said = names

        try:
            if missing:
                with workplace as executor:
                    for part, record in job.run_all(missing, folder, executor=executor, progress=show):
                        found[part.name] = record
                        mark = "[green]✓[/]" if record.held else "[red]✗[/]"
                        line = f"{mark} {escape(part.name)}  {record.wall_s:.0f} s"
                        console.print(line, highlight=False, soft_wrap=True)
        except KeyboardInterrupt:
            bar.stop()
            say(console, f"\ninterrupted: {len(found)} finished parts are kept in {folder}; "
                         "the same command goes on from there")  # fmt: skip
            raise
    return [found[part.name] for part in parts]
