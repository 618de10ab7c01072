"""`me-stats long`: long continuations by CE and ME, compared row by row, in one table, one record and one figure."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich import box
from rich.console import Console
from rich.table import Table

from me_stats import cli_executor
from me_stats.cli_options import Device, Dtype, Models, Precision, check_out, parsed_weights, prepare_models, say

if TYPE_CHECKING:
    from me_stats.record import Record


def long(
    models: Models,
    prompt: Annotated[
        list[str] | None,
        typer.Option(metavar="TEXT ...", help="What to continue, in turn; default prompts that suit the models."),
    ] = None,
    weights: Annotated[
        str, typer.Option(metavar="λ,λ,...", help="Mixing weights; default 0.6,0.4 or equal ones.")
    ] = "",
    rows: Annotated[int, typer.Option(min=8, help="Continuations by ME, and as many by CE.")] = 256,
    steps: Annotated[
        int, typer.Option(min=4, help="Tokens of each; what follows an end of sequence is read on.")
    ] = 1024,
    batch: Annotated[
        int, typer.Option(min=1, help="Rows in memory together, and what an interruption loses of each process.")
    ] = 64,
    blocks: Annotated[int, typer.Option(min=2, help="Blocks of a row whose means are kept; must divide --steps.")] = 16,
    window: Annotated[
        int | None,
        typer.Option(min=2, help="Newest tokens that a model reads; default all, which must fit its context."),
    ] = None,
    hop: Annotated[
        int | None, typer.Option(min=1, help="Tokens that leave the window together; default half of it.")
    ] = None,
    scored: Annotated[
        int | None, typer.Option(min=0, help="Rows scored for log-probability and entropy; default all.")
    ] = None,
    paired: Annotated[
        int | None, typer.Option(min=0, help="Rows run again on the same component path; default a quarter of --rows.")
    ] = None,
    control: Annotated[
        int, typer.Option(min=0, help="Rows with one component per sequence, to see what the tests find; 0 for none.")
    ] = 64,
    workers: Annotated[
        int | None, typer.Option(min=1, help="Processes; default one per core for bundled models, else one.")
    ] = None,
    executor: cli_executor.Kind = cli_executor.Executor.here,
    threads: cli_executor.Threads = None,
    gpus_per_worker: cli_executor.Gpus = 0.0,
    executor_option: cli_executor.Options = None,
    seed: Annotated[int, typer.Option(min=0, help="Keys every random number of the run.")] = 0,
    device: Device = "cpu",
    dtype: Precision = Dtype.float32,
    out: Annotated[Path, typer.Option(help="Folder for the record, the figure and the finished parts.")] = Path("long"),
) -> None:
    """Long continuations by CE and ME: variance, drift, ends, lags, and what the component path decides.

    Each statistic is compared by one value per row, and says the smallest difference it could have seen. Memory does
    not grow with --rows. Finished parts are kept: run the same command again after an interruption and it goes on
    where it stopped, to the same numbers.

    Exit code: 0 CE and ME do not differ, 1 a check failed, 2 bad usage or missing models, 130 interrupted.

    \b
    Examples:
      me-stats long --models bundled:prose bundled:code --rows 128 --steps 512 --window 128
      me-stats long --models smollm2-135m --prompt "Why is the sky blue?" --rows 64 --dtype bfloat16
    """
    console = Console(stderr=True)
    check_out(out, "")
    law = parsed_weights(weights, "--weights")
    here = executor == cli_executor.Executor.here  # whose processes --workers counts, too
    workplace = cli_executor.opened(
        executor, 1 if here or workers is None else workers, threads, gpus_per_worker, executor_option or ()
    )
    prepare_models(models, device=device, say=lambda line: say(console, line))
    from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn

    from me_stats import scripts

    experiment = scripts.load("experiments", "long")
    config = experiment.Config(
        models=tuple(models), prompts=tuple(prompt) if prompt else None, weights=law, dtype=dtype.value, device=device,
        rows=rows, steps=steps, batch=min(batch, rows), blocks=blocks, window=window, hop=hop,
        scored=rows if scored is None else scored, paired=rows // 4 if paired is None else paired, control=control,
        seed=seed,
    )  # fmt: skip
    columns = (SpinnerColumn(), TextColumn("{task.description}"), BarColumn(bar_width=24), TimeElapsedColumn(),
               TimeRemainingColumn())  # fmt: skip
    with Progress(*columns, console=console, disable=not console.is_terminal) as bar:
        task = bar.add_task("opening the models", total=1.0)

        def show(fraction: float, note: str) -> None:
            bar.update(task, completed=fraction, description=note)

        try:
            with workplace as pool:
                counted = workers if here else None
                record: Record = experiment.run(config, show, work=out / "parts", workers=counted, executor=pool)
        except KeyboardInterrupt:
            bar.stop()
            say(
                console,
                f"\ninterrupted: finished parts are kept in {out / 'parts'}; the same command goes on from there",
            )
            raise
    record = dataclasses.replace(record, name="long")
    record.save(out / "long.json")
    figure = scripts.load("figures", "long").draw(record, out)
    Console().print(table(record))
    for finding in record.findings:
        mark = "held" if finding.held else "FAILED"
        say(console, f"{mark}: {finding.statement}: {finding.statistic}; {finding.caveat}")
    failed = [name for name, held in record.checks.items() if not held]
    say(console, f"{len(record.checks) - len(failed)} of {len(record.checks)} checks held. Record and figure: {out}, "
                 f"{figure.paths[-1].name}")  # fmt: skip
    if failed:
        raise typer.Exit(1)


def table(record: Record) -> Table:
    """One row per statistic: variance ratio between rows and between blocks, difference, share of the path, R-hat."""
    out = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False)
    for name in (
        "statistic",
        "Var ME/CE\nrows",
        "sees",
        "Var ME/CE\nblocks",
        "sees",
        "mean ME-CE\nin SDs",
        "path's share",
    ):
        out.add_column(name, justify="left" if name == "statistic" else "right", no_wrap=True)
    for row in record.results["comparisons"]:
        share = record.results["shares"].get(row["name"])
        out.add_row(
            row["name"], _interval(row["ratio"]), f"{row['seen']:.2f}", _interval(row["block_ratio"]),
            f"{row['block_seen']:.2f}", f"{row['difference']['value'] / row['sd']:+.2f}",
            _interval(share) if share else "",
        )  # fmt: skip
    out.caption = "95% intervals, one by one. 'sees': smallest ratio told from 1 with power 0.8 at level .05."
    return out


def _interval(estimate: dict[str, Any]) -> str:
    low, high = estimate["interval"]
    return f"{estimate['value']:.2f} [{low:.2f}, {high:.2f}]"
