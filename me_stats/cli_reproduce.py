"""The main job on the command line: `me-stats reproduce` and `me-stats report`."""

from __future__ import annotations

import os
import shlex
from collections.abc import Sequence
from functools import cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, get_args

import typer
from rich.console import Console
from rich.markup import escape

from me_stats import cli_bench, cli_compare, cli_executor
from me_stats.cli_options import Device, Dtype, check_device, check_out, say

if TYPE_CHECKING:
    from me_stats.plans import Part
    from me_stats.record import Record
    from me_stats.report import Figures

CHECK_FAILED = 1


def reproduce(
    quick: Annotated[
        bool, typer.Option("--quick", help="Toys and the bundled models only: no download, about five minutes.")
    ] = False,
    full: Annotated[
        bool, typer.Option("--full", help="Large samples and long generations: about three hours on two cores.")
    ] = False,
    models: Annotated[
        list[str] | None,
        typer.Option(
            "--models",
            metavar="A B ...",
            help="Run on these instead: catalog names, folders or hub ids over one vocabulary; a single model runs "
            "under two system prompts.",
        ),
    ] = None,
    preset: Annotated[
        str | None,
        typer.Option(
            metavar="GROUP",
            help="One of the paper's groups at full size (qwen, hermes2, hermes3, mixed), or the path of a group file; "
            "--models then names folders or other ids in place of the group's own, one by one.",
        ),
    ] = None,
    data: Annotated[
        Path | None,
        typer.Option(
            envvar="ME_STATS_DATA",
            metavar="FOLDER",
            help="Holds gsm8k, arc_challenge, bbh, mmlu as published: language models do these tasks, too.",
        ),
    ] = None,
    only: Annotated[
        list[str] | None, typer.Option(metavar="PART ...", help="Only these parts (names as in the report).")
    ] = None,
    device: Device = "cpu",
    dtype: Annotated[
        Dtype | None, typer.Option(help="Precision of the models' weights; default float32, or that of the preset.")
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="Keys every random number of the run.")] = 0,
    out: Annotated[Path, typer.Option(help="Folder for the records, figures and the report.")] = Path("report"),
    fresh: Annotated[bool, typer.Option("--fresh", help="Do all parts again, also finished ones.")] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Check models, memory, disk and packages, forecast times, and stop there.")
    ] = False,
    executor: cli_executor.Kind = cli_executor.Executor.here,
    workers: cli_executor.Workers = 1,
    threads: cli_executor.Threads = None,
    gpus_per_worker: cli_executor.Gpus = 0.0,
    executor_option: cli_executor.Options = None,
) -> None:
    """Check the paper's claims by experiment, and write a report with figures, bounds and verdicts.

    Toys are proved exactly, by walking every random path of the samplers. Transformers are enumerated where
    sequences are short, then sampled, tested and bounded. Without --quick or --full every claim is examined in about
    a quarter of an hour. Finished parts are kept: run the same command again after an interruption and it goes on
    where it stopped.

    Exit code: 0 all checks held, 1 a check failed, 2 bad usage or missing models, 130 interrupted.

    \b
    Examples:
      me-stats reproduce --quick
      me-stats reproduce
      me-stats reproduce --full
      me-stats reproduce --full --models org/a org/b --device cuda
      me-stats reproduce --preset qwen --device cuda --dry-run
      me-stats reproduce --preset qwen --device cuda
      me-stats reproduce --executor ray --workers 2 --threads 1
    """
    from me_stats import groups, plans, preflight
    from me_stats import reproduce as job

    console = Console(stderr=True)
    if not dry_run:
        check_out(out)
        if executor.is_this_machine:
            check_device(device)
    workplace = cli_executor.opened(executor, workers, threads, gpus_per_worker, executor_option or ())
    if quick and full:
        raise ValueError("give --quick or --full, not both")
    if data is not None:
        if not data.is_dir():
            raise ValueError(f"--data {data}: no such folder; it holds gsm8k, arc_challenge, bbh or mmlu")
        os.environ["ME_STATS_DATA"] = str(data.resolve())  # where experiments look, in other processes too
    group = None if preset is None else groups.resolve(preset, models, dtype and dtype.value)
    precision = (dtype or Dtype.float32).value if group is None else group.dtype
    size: plans.Size = "quick" if quick else "full" if full or group else "laptop"
    parts = plans.plan(
        size=size, models=models if group is None else group.models,
        several=None if group is None else group.vocabularies == "several", data=data is not None,
        dtype=precision, device=device, seed=seed,
    )  # fmt: skip
    if group is not None:
        parts = groups.parts(group, parts)
    if only:
        unknown = sorted(set(only) - {part.name for part in parts})
        if unknown:
            known = ", ".join(part.name for part in parts)
            raise ValueError(f"--only {' '.join(unknown)}: no such part; this run has {known}")
        parts = [part for part in parts if part.name in only]
    if not dry_run:
        _pull_missing(parts, console)
    waiting = [part for part in parts if fresh or job.finished(part, out / "records") is None]
    found = preflight.check(waiting, device=device, dtype=precision, out=out, group=group, data=data)
    if dry_run:
        Console().print(preflight.table(found.checks))
        Console().print(preflight.forecast_table(found))
        raise typer.Exit(0 if found.passed else CHECK_FAILED)
    if not found.passed:
        console.print(preflight.table(found.checks))
        if executor.is_this_machine:  # others have devices and memory of their own
            wrong = sum(check.status == "fail" for check in found.checks)
            counts = f"{wrong} of {len(found.checks)}"
            raise ValueError(f"{counts} checks failed before the first forward; remedies stand above")
    records = cli_executor.run(parts, out / "records", fresh, console, workplace)
    page, _ = _write(records, out)
    from me_stats.report import failures
    from me_stats.report.markdown import verdict_table

    Console().print(verdict_table(records))
    failed = failures(records)
    for name, check in failed:
        console.print(f"[bold red]check failed[/] {escape(f'{name}: {check}')}", highlight=False, soft_wrap=True)
    checks = sum(len(record.checks) for record in records)
    say(console, f"{checks - len(failed)} of {checks} checks held. Report: {page}")
    if failed:
        raise typer.Exit(CHECK_FAILED)


def report(
    records: Annotated[Path, typer.Argument(help="Folder with records (JSON) of earlier runs.")],
    out: Annotated[Path, typer.Option(help="Folder for the report.")] = Path("report"),
    figures: Annotated[Path | None, typer.Option(help="Folder for the figures; default OUT/figures.")] = None,
    paper: Annotated[
        Path | None, typer.Option(help="Also write the claim-by-claim table (paper_repro.md) to this file.")
    ] = None,
) -> None:
    """Draw the figures and write the report again from records, without running anything.

    Example:  me-stats report experiments/results --out report --paper paper_repro.md
    """
    from me_stats.record import Record, write_atomically
    from me_stats.report.markdown import paper_repro

    paths = sorted(records.glob("*.json"))
    if not paths:
        raise ValueError(f"{records} holds no records; run 'me-stats reproduce' first")
    loaded = _in_order([Record.load(path) for path in paths])
    check_out(out)
    for record in loaded:
        record.save(out / "records" / f"{record.name}.json")
    page, drawn = _write(loaded, out, figures)
    if paper is not None:
        text = paper_repro(loaded, figures=drawn, commands=_commands(loaded), generated_by="make figures")
        write_atomically(paper, text)
        typer.echo(paper)
    typer.echo(page)


def _write(records: Sequence[Record], out: Path, folder: Path | None = None) -> tuple[Path, Figures]:
    from me_stats import reproduce as job
    from me_stats.record import write_atomically
    from me_stats.report import comparison
    from me_stats.report.html import write_html
    from me_stats.report.markdown import report_markdown

    folder = folder or out / "figures"
    figures = job.draw_figures(records, folder)
    figures |= {record.name: [comparison.draw(record, folder)] for record in records if _is_comparison(record)}
    commands = _commands(records)
    write_atomically(out / "report.md", report_markdown(records, figures, commands=commands))
    return write_html(records, figures, out / "index.html", commands=commands), figures


def _commands(records: Sequence[Record]) -> dict[str, str]:
    """The command that makes each record again, with the options that are not the default."""
    from me_stats import groups, plans

    sizes = get_args(plans.Size)

    @cache  # most records come from a few sets of options
    def keys(size: plans.Size, given: tuple[tuple[str, Any], ...]) -> set[str]:
        return {part.key for part in plans.plan(**dict(given), size=size, data=True)}

    default = {part.name for size in sizes for part in plans.plan(size=size, data=True)}
    usual = {"device": "cpu", "dtype": "float32", "seed": 0}
    commands = {}
    for record in records:
        if _is_comparison(record):
            commands[record.name] = cli_compare.command(record)
            continue
        if record.name.startswith(cli_bench.RECORD):
            commands[record.name] = cli_bench.command(record)
            continue
        if (again := groups.command(record)) is not None:
            commands[record.name] = again
            continue
        config = record.config
        options = {name: config[name] for name in usual if config.get(name, usual[name]) != usual[name]}
        if record.name not in default and "models" in config:
            options["models"] = config["models"]
        given = tuple((name, tuple(value) if name == "models" else value) for name, value in options.items())
        # A record of another version fits none of the sizes: those that we keep are of full runs.
        size = next((size for size in ("laptop", "quick") if record.key in keys(size, given)), "full")
        words = ["me-stats", "reproduce"] + [f"--{size}"] * (size != "laptop")
        words += ["--data", "FOLDER"] * bool(record.results.get("files"))
        for name, value in options.items():
            words += [f"--{name}", *map(str, value if name == "models" else [value])]
        commands[record.name] = shlex.join([*words, "--only", record.name])
    return commands


def _is_comparison(record: Record) -> bool:
    """Whether `me-stats compare` left this record, which is no part of the main job."""
    from me_stats.record import experiment_of

    return experiment_of(record.name) == "compare"


def _in_order(records: list[Record]) -> list[Record]:
    from me_stats import reproduce as job

    return sorted(records, key=lambda record: (job.rank(record.name), record.name))


def _pull_missing(parts: Sequence[Part], console: Console) -> None:
    """Bring the catalog models that the parts need; refuse names that nothing can open before any work."""
    from me_stats.models import catalog

    for name in dict.fromkeys(name for part in parts for name in getattr(part.config, "models", ())):
        if name in catalog.CATALOG and not catalog.pulled(name):
            with console.status(f"pulling {name}"):
                catalog.pull(name, progress=partial(say, console))
        catalog.resolve(name)
