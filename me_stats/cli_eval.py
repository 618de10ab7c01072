"""`me-stats eval`: accuracies of CE, ME and single models on the paper's tasks, and how far apart they can be."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from me_stats.cli_options import (
    Device,
    Dtype,
    Precision,
    check_device,
    check_out,
    numbers_table,
    parsed_weights,
    prepare_models,
    say,
)

if TYPE_CHECKING:
    from me_stats.record import Record

NAME = "eval"


def evaluate(
    models: Annotated[
        list[str],
        typer.Option("--models", metavar="A B ...", help="Catalog names, folders or hub ids; one with --arms single."),
    ],
    tasks: Annotated[
        list[str],
        typer.Option(
            "--tasks",
            metavar="T ...",
            help="gsm8k, mmlu, bbh, arc_challenge; one of a group as bbh:navigate; closing_brackets, indentation, "
            "stdlib_bpb, which need no data; a task of lm-eval or a YAML file.",
        ),
    ],
    data: Annotated[
        Path | None,
        typer.Option(
            metavar="FOLDER", help="Holds gsm8k, arc_challenge, bbh, mmlu as published; default datasets of the hub."
        ),
    ] = None,
    arms: Annotated[
        list[str] | None, typer.Option("--arms", metavar="CE ME single", help="What to run; default CE ME.")
    ] = None,
    weights: Annotated[
        str, typer.Option(metavar="λ,λ,...", help="Mixing weights; default 0.6,0.4 or equal ones.")
    ] = "",
    temperature: Annotated[float, typer.Option(help="Of each model, before the mixture, as all of these.")] = 1.0,
    top_k: Annotated[int | None, typer.Option(help="Default all tokens.")] = None,
    top_p: Annotated[float, typer.Option(help="Of each model.")] = 1.0,
    min_p: Annotated[float, typer.Option(help="Of each model.")] = 0.0,
    greedy: Annotated[bool, typer.Option("--greedy", help="An arg max in each model.")] = False,
    limit: Annotated[int | None, typer.Option(min=1, help="Items of each task, evenly spaced; default all.")] = None,
    fewshot: Annotated[
        int | None, typer.Option(min=0, help="Answered questions before each; default 8 (gsm8k), 3 (bbh), else 5.")
    ] = None,
    seeds: Annotated[int, typer.Option(min=1, help="Runs of every item.")] = 1,
    max_new_tokens: Annotated[
        int | None, typer.Option(min=1, help="Tokens at which an answer ends; default as the task says.")
    ] = None,
    chat: Annotated[
        bool, typer.Option("--chat/--no-chat", help="Prompts as turns of the models' chat format.")
    ] = False,
    batch: Annotated[
        int | None, typer.Option(min=1, help="Answers written together; default as many as fit, 256 at most.")
    ] = None,
    margin: Annotated[
        float, typer.Option(metavar="POINTS", help="Difference of accuracies, in points of 100, that counts as none.")
    ] = 2.0,
    device: Device = "cpu",
    dtype: Precision = Dtype.float32,
    seed: Annotated[int, typer.Option(min=0, help="Of the first run; the others count up from it.")] = 0,
    out: Annotated[Path, typer.Option(help="Folder for the record and the texts.")] = Path("eval"),
) -> None:
    """How accurate are CE and ME on the tasks of the paper, and can they differ by more than a margin?

    Both arms mix the models' laws after the transforms: one law, so a difference is chance. Each item is asked once a
    seed. Differences come item by item, for these items (the runs are random) and for items like these. Texts are
    kept as they are written: run the same command again after an interruption, or with more seeds, tasks or items.

    Needs the extra lm-eval. Exit code: 0 done (a difference is a result, not a failure), 2 bad usage, missing data or
    models, 130 interrupted.

    \b
    Examples:
      me-stats eval --models bundled:prose bundled:code --tasks closing_brackets --limit 64 --seeds 3
      me-stats eval --models smollm2-135m --arms single --tasks gsm8k --data data --limit 8
      me-stats eval --models a b --tasks gsm8k bbh:navigate --data data --top-k 10 --seeds 5
      me-stats eval --models a b --tasks arc_challenge --data data --arms CE ME single --chat
    """
    from me_stats.orders import Transforms

    console = Console(stderr=True)
    shared = parsed_weights(weights, "--weights")
    chosen = tuple(arms or (("CE", "ME") if len(models) > 1 else ("single",)))
    if len(models) > 1 and shared is None:
        shared = (0.6, 0.4) if len(models) == 2 else (1 / len(models),) * len(models)
    if len(models) == 1 and shared is not None:
        raise ValueError("--weights mix several models, and --models names one")
    if not 0 < margin < 100:
        raise ValueError(f"--margin {margin}: points of 100, such as 2")
    if data is not None and not data.is_dir():
        raise ValueError(f"--data {data}: no such folder; it holds gsm8k, arc_challenge, bbh or mmlu")
    check_device(device)
    from me_stats.tasks import arms as job

    plan = job.EvalPlan(
        tuple(models), tuple(tasks), data, chosen, Transforms(temperature, top_k, top_p, min_p, greedy), shared or (),
        fewshot=fewshot, limit=limit, seed=seed, seeds=seeds, max_new_tokens=max_new_tokens, batch=batch, chat=chat,
        margin=margin / 100, dtype=dtype.value, device=device,
    )  # fmt: skip
    if not console.is_terminal:
        say(console, f"opening {', '.join(tasks)} ...")
    opened = plan.open_tasks()
    check_out(out, "")
    prepare_models(models, device=device, say=lambda line: say(console, line))
    work = out / "texts"
    record = _run(plan, opened, work, console)
    record.save(out / f"{NAME}.json")
    show(record, Console())
    say(console, f"Record: {out / f'{NAME}.json'}. Texts: {job.text_folder(plan, work)}")


def _run(plan: Any, tasks: dict[str, Any], work: Path, console: Console) -> Record:
    from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn

    from me_stats.tasks import arms as job

    columns = (SpinnerColumn(), TextColumn("{task.description}"), BarColumn(bar_width=24), TimeElapsedColumn(),
               TimeRemainingColumn())  # fmt: skip
    with Progress(*columns, console=console, disable=not console.is_terminal) as bar:
        shown = bar.add_task("opening the models", total=1.0)
        try:
            return job.run(plan, tasks, work, lambda done, note: bar.update(shown, completed=done, description=note))
        except KeyboardInterrupt:
            bar.stop()
            kept = sum(path.read_bytes().count(b"\n") for path in job.text_folder(plan, work).glob("*/*.jsonl"))
            say(console, f"\ninterrupted: {kept:,} answers are kept in {work}; the same command goes on from there")
            raise


def show(record: Record, console: Console) -> None:
    """Print what a record of this command holds, for people."""
    found = record.results
    console.print(accuracies(record))
    if found["differences"]:
        console.print(differences(record))
        margin = 100 * found["margin"]
        for entry in found["differences"]:
            console.print(Text(_verdict(entry, margin)))


def accuracies(record: Record) -> Table:
    """Mean scores of each task and arm: percent, or bits per byte; a group is its items taken as one set."""
    found = record.results
    table = numbers_table("task", "metric", "items", "runs", *found["arms"])
    for entry in found["tasks"]:
        share = entry["metric"] != "bits_per_byte"
        means = [f"{100 * mean:.1f}%" if share else f"{mean:.3f}" for mean in entry["mean"].values()]
        count, of = len(entry["items"]), entry["of"]
        items = f"{count:,}" if count == of else f"{count:,} of {of:,}"
        table.add_row(entry["task"], entry["metric"], items, str(entry["runs"]), *means)
    for entry in found["groups"]:
        means = [f"{100 * mean:.1f}%" for mean in entry["mean"].values()]
        table.add_row(f"{entry['task']}, all {entry['tasks']}", "", f"{entry['items']:,}", "", *means, style="bold")
    return table


def differences(record: Record) -> Table:
    """ME - CE in points, with 95% intervals of both readings."""
    table = numbers_table("ME - CE, points", "these items [95%]", "items like these [95%]", "smallest margin shown")
    for entry in record.results["differences"]:
        cells = [_interval(entry[reading]["estimate"]) for reading in ("these_items", "items_like_these")]
        table.add_row(entry["task"], *cells, f"{100 * entry['these_items']['smallest_margin']:.1f}")
    table.caption = "The smallest margin is that of these items."
    table.caption_justify = "left"
    return table


def _verdict(entry: dict[str, Any], margin: float) -> str:
    held = {"these items": entry["these_items"], "items like these": entry["items_like_these"]}
    shown = [name for name, reading in held.items() if reading["equivalence_pvalue"] <= reading["level"]]
    name = f"{entry['task']}: |ME - CE| < {margin:g} points"
    if not shown:
        return f"{name} is not shown: more items or seeds are needed"
    return f"{name} is shown for {' and for '.join(shown)}"


def _interval(estimate: dict[str, Any]) -> str:
    low, high = estimate["interval"]
    return f"{100 * estimate['value']:+.1f} [{100 * low:+.1f}, {100 * high:+.1f}]"
