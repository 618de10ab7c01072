"""The ``me-stats`` command."""

from __future__ import annotations

import errno
import os
import shlex
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, get_args

import typer
from rich.console import Console
from rich.markup import escape

from me_stats import (
    __version__,
    cli_audit,
    cli_bench,
    cli_compare,
    cli_long,
    cli_models,
    cli_router,
    cli_sweep,
    cli_tokenizers,
    cli_weights,
)
from me_stats.cli_options import Device, Dtype, Precision, check_device, check_out, say

if TYPE_CHECKING:
    from me_stats.plans import Part
    from me_stats.record import Record
    from me_stats.report import Figures

app = typer.Typer(
    help="Does sampling one model per token (ME) follow the ensemble's law (CE)? Exact proofs on toys, bounds on "
    "real models.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
)
app.add_typer(cli_models.app, name="models")
app.command(cli_weights.NAME)(cli_weights.fit_lambda)
app.command()(cli_sweep.sweep)
app.command()(cli_long.long)
app.command()(cli_compare.compare)
app.command()(cli_bench.bench)
app.command()(cli_tokenizers.tokenizers)
app.command()(cli_audit.audit_table)
app.command(cli_router.NAME)(cli_router.train_router)

# Options that take several values after one name.
_REPEATED = ("--models", "--only", "--text", "--domain", "--prompt", "--against", "--batch", "--weights", "--arms",
             "--items")  # fmt: skip
OK, CHECK_FAILED, BAD_USAGE, INTERRUPTED = 0, 1, 2, 130
# RuntimeErrors that say what to do; any other is a bug and keeps its traceback.
_EXPECTED = (("me_stats.models.catalog", "CatalogError"), ("me_stats.parts", "WorkerDied"))

# Usage errors of the click that typer carries within it or, in older versions, stands on.
_UsageError: Any = typer.BadParameter.__base__


def _version(value: bool) -> None:
    if value:
        typer.echo(f"me-stats {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    pass


@app.command()
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
    only: Annotated[
        list[str] | None, typer.Option(metavar="PART ...", help="Only these parts (names as in the report).")
    ] = None,
    device: Device = "cpu",
    dtype: Precision = Dtype.float32,
    seed: Annotated[int, typer.Option(min=0, help="Keys every random number of the run.")] = 0,
    out: Annotated[Path, typer.Option(help="Folder for the records, figures and the report.")] = Path("report"),
    fresh: Annotated[bool, typer.Option("--fresh", help="Do all parts again, also finished ones.")] = False,
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
      me-stats reproduce --full --models Qwen/Qwen2.5-3B-Instruct Qwen/Qwen2.5-Math-1.5B-Instruct --device cuda
    """
    from me_stats import plans

    console = Console(stderr=True)
    check_out(out)
    check_device(device)
    if quick and full:
        raise ValueError("give --quick or --full, not both")
    size: plans.Size = "quick" if quick else "full" if full else "laptop"
    parts = plans.plan(size=size, models=models, dtype=dtype.value, device=device, seed=seed)
    if only:
        unknown = sorted(set(only) - {part.name for part in parts})
        if unknown:
            known = ", ".join(part.name for part in parts)
            raise ValueError(f"--only {' '.join(unknown)}: no such part; this run has {known}")
        parts = [part for part in parts if part.name in only]
    _pull_missing(parts, console)
    records = _run(parts, out / "records", fresh, console)
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


@app.command()
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


def _run(parts: Sequence[Part], folder: Path, fresh: bool, console: Console) -> list[Record]:
    from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

    from me_stats import reproduce as job

    done: list[Record] = []
    columns = (
        SpinnerColumn(),
        TextColumn("{task.fields[part]}"),
        BarColumn(bar_width=24),
        TextColumn("{task.percentage:>3.0f}%"),
        TimeElapsedColumn(),
        TextColumn("{task.fields[note]}"),
    )
    with Progress(*columns, console=console, disable=not console.is_terminal) as bar:
        task = bar.add_task("", total=len(parts), part="", note="")
        for i, part in enumerate(parts):
            record = None if fresh else job.finished(part, folder)
            bar.update(task, completed=i, part=f"{i + 1}/{len(parts)} {part.name}", note="")
            if record is None:
                if not console.is_terminal:
                    say(console, f"{i + 1}/{len(parts)} {part.name} ...")
                try:
                    record = job.run_part(part, folder, _reporter(bar.update, task, i))
                except KeyboardInterrupt:
                    bar.stop()
                    say(
                        console,
                        f"\ninterrupted: {len(done)} finished parts are kept in {folder}; "
                        "the same command goes on from there",
                    )
                    raise
                mark = "[green]✓[/]" if record.held else "[red]✗[/]"
                console.print(f"{mark} {escape(part.name)}  {record.wall_s:.0f} s", highlight=False, soft_wrap=True)
            else:
                console.print(f"[green]✓[/] {escape(part.name)}  done before", highlight=False, soft_wrap=True)
            done.append(record)
    return done


def _reporter(update: Callable[..., None], task: object, base: int) -> Callable[[float, str], None]:
    def report_progress(fraction: float, note: str) -> None:
        update(task, completed=base + fraction, note=note)

    return report_progress


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
    from me_stats import plans

    sizes = get_args(plans.Size)
    default = {part.name for size in sizes for part in plans.plan(size=size)}
    usual = {"device": "cpu", "dtype": "float32", "seed": 0}
    commands = {}
    for record in records:
        if _is_comparison(record):
            commands[record.name] = cli_compare.command(record)
            continue
        if record.name.startswith(cli_bench.RECORD):
            commands[record.name] = cli_bench.command(record)
            continue
        config = record.config
        options = {name: config[name] for name in usual if config.get(name, usual[name]) != usual[name]}
        if record.name not in default and "models" in config:
            options["models"] = config["models"]
        planned = {size: {part.key for part in plans.plan(**options, size=size)} for size in sizes}
        # A record of another version fits none of the sizes: those that we keep are of full runs.
        size = next((size for size in ("laptop", "quick") if record.key in planned[size]), "full")
        words = ["me-stats", "reproduce"] + [f"--{size}"] * (size != "laptop")
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


def _spread(arguments: Sequence[str], options: Sequence[str]) -> list[str]:
    """``--models A B`` as ``--models A --models B``, which is how the parser wants repeated values.

    >>> _spread(["reproduce", "--models", "a", "b", "--quick"], ["--models"])
    ['reproduce', '--models', 'a', '--models', 'b', '--quick']
    """
    out: list[str] = []
    current: str | None = None
    for argument in arguments:
        if argument.startswith("-"):
            current = argument if argument in options else None
        elif current is not None and out[-1] != current:
            out.append(current)
        out.append(argument)
    return out


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line; bad input ends in one line and exit code 2, never in a traceback."""
    given = _spread(list(sys.argv[1:] if arguments is None else arguments), _REPEATED)
    # Loading bars of transformers would be drawn into our own; tqdm reads this when it is first imported.
    os.environ.setdefault("TQDM_DISABLE", "1")
    try:
        code = app(given, standalone_mode=False, prog_name="me-stats")
    except _UsageError as error:
        message = error.format_message()  # empty where the help has just been printed
        code = _fail(f"{message.rstrip('.')}; see '{error.ctx.command_path} --help'") if message else BAD_USAGE
    except (KeyboardInterrupt, typer.Abort):
        code = INTERRUPTED
    except OSError as error:
        code = _fail(_explain(error))
    except (ValueError, TypeError, RuntimeError) as error:
        # Loading these modules loads torch, which --help and --version can do without.
        loaded = [(sys.modules.get(module), name) for module, name in _EXPECTED]
        known = tuple(getattr(module, name) for module, name in loaded if module is not None)
        if isinstance(error, RuntimeError) and not isinstance(error, known):
            raise
        code = _fail(str(error))
    sys.exit(code or OK)


def _explain(error: OSError) -> str:
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return "the disk is full: free some space and run the same command again; what is finished is kept"
    where = f"{error.filename}: " if error.filename else ""
    return f"{where}{error.strerror}" if error.strerror else str(error)


def _fail(message: str) -> int:
    if os.environ.get("ME_STATS_TRACEBACK"):
        raise
    typer.echo(f"me-stats: {' '.join(message.split())}", err=True)
    return BAD_USAGE
