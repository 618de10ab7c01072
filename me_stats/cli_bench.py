"""`me-stats bench`: how fast ME is on this machine with your models, and from which batch on it stops paying."""

from __future__ import annotations

import dataclasses
import shlex
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from me_stats.cli_options import Device, Dtype, Precision, check_device, check_out, parsed_weights, prepare_models, say

if TYPE_CHECKING:
    from me_stats.record import Record

NAME = "bench"
RECORD = "speed-bench"  # the experiment's, and a name that the main job does not give


def bench(
    models: Annotated[
        list[str],
        typer.Option(
            "--models",
            metavar="A B ...",
            help="Catalog names, folders or hub ids over one vocabulary, or random:SHAPE (a published size without its "
            "weights, such as random:qwen2.5-3b); a single model is copied, under a system prompt each.",
        ),
    ],
    components: Annotated[
        int | None,
        typer.Option(min=2, help="Largest K; default as many as models, at least 2. Models are taken in turn."),
    ] = None,
    batch: Annotated[list[int] | None, typer.Option(metavar="B ...", help="Rows in a batch; default 1 8 64.")] = None,
    weights: Annotated[
        list[str] | None,
        typer.Option(metavar="λ,λ,... ...", help="Mixing weights to time over the batches; default 0.5,0.5."),
    ] = None,
    steps: Annotated[int, typer.Option(min=2, help="Tokens that each row writes.")] = 32,
    prompt_length: Annotated[int, typer.Option(min=1, help="Tokens of the prompt.")] = 32,
    arms: Annotated[
        list[str] | None,
        typer.Option(metavar="ARM ...", help="Besides single, CE and ME: parallel, lockstep, shared, speculative."),
    ] = None,
    rounds: Annotated[int, typer.Option(min=2, help="Times that everything is run, interleaved.")] = 5,
    device: Device = "cpu",
    dtype: Precision = Dtype.float32,
    seed: Annotated[int, typer.Option(min=0, help="Keys the tokens and the order of the runs.")] = 0,
    out: Annotated[Path, typer.Option(help="Folder for the record, the figure and finished rounds.")] = Path("bench"),
    fresh: Annotated[bool, typer.Option("--fresh", help="Time everything again, also finished rounds.")] = False,
) -> None:
    """How many times as fast as CE is ME here, at which batch sizes, and what does a cost model predict?

    Every round runs each cell once in a shuffled order, so that ratios are of neighbours in time. Single forwards are
    timed in the same rounds and calibrate the cost model, which then predicts the cells. No row ends early. Finished
    rounds are kept: run the same command again after an interruption and it goes on where it stopped.

    ARM: parallel runs CE's components at once (a process each on a CPU, a stream each on CUDA); lockstep keeps ME's
    rows on one step; shared lets them share component draws too; speculative draws from the 10 likeliest tokens of the
    mixture by checked ME drafts. Use an idle machine: a busy one adds noise, which the intervals show.

    Exit code: 0 done, 2 bad usage or missing models, 130 interrupted.

    \b
    Examples:
      me-stats bench --models smollm2-135m --dtype bfloat16
      me-stats bench --models smollm2-135m --components 4 --batch 1 --arms parallel
      me-stats bench --models a b --weights .5,.5 .8,.2 --batch 1 4 16 64 --arms shared
      me-stats bench --models random:qwen2.5-3b random:qwen2.5-math-1.5b --device cuda --dtype bfloat16
    """
    console = Console(stderr=True)
    options = _options(models, components, batch, weights, arms)
    check_out(out, "")
    _prepare(models, device, console)
    from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn

    from me_stats import scripts
    from me_stats.record import config_key

    script = scripts.load("experiments", "speed")
    config = script.Config(
        models=tuple(models), dtype=dtype.value, device=device, steps=steps, batch_steps=steps,
        prompt_length=prompt_length, rounds=rounds, curve_dtypes=(), seed=seed, **options,
    )  # fmt: skip
    work = out / "rounds"
    if fresh:
        shutil.rmtree(work / config_key("speed", config), ignore_errors=True)
    columns = (SpinnerColumn(), BarColumn(bar_width=24), TimeElapsedColumn(), TimeRemainingColumn(),
               TextColumn("{task.description}"))  # fmt: skip
    with Progress(*columns, console=console, disable=not console.is_terminal) as bar:
        task = bar.add_task("opening the models", total=1.0)
        try:
            record: Record = script.run(
                config, lambda done, note: bar.update(task, completed=done, description=note), work=work
            )
        except KeyboardInterrupt:
            bar.stop()
            kept = len(list((work / config_key("speed", config)).glob("round-*.npz")))
            say(console, f"\ninterrupted: {kept} of {rounds} rounds are kept in {work}; the same command goes on there")
            raise
    record = dataclasses.replace(record, name=RECORD)
    record.save(out / f"{RECORD}.json")
    figure = scripts.load("figures", "speed").draw(record, out)
    show(record, Console())
    say(console, f"Record and figure: {out}, {figure.paths[-1].name}")


_EXTRA = {"parallel": ("CE parallel",), "lockstep": ("ME lockstep",), "shared": ("ME shared",),
          "speculative": ("CE top-k", "speculative")}  # fmt: skip
_BATCHES = (1, 8, 64)


def _options(
    models: list[str], components: int | None, batch: list[int] | None, weights: list[str] | None,
    arms: list[str] | None,
) -> dict[str, Any]:  # fmt: skip
    """What the experiment's Config takes, from options as they were typed."""
    unknown = sorted(set(arms or ()) - set(_EXTRA))
    if unknown:
        raise ValueError(f"--arms {' '.join(unknown)}: no such arm; there are {', '.join(_EXTRA)}")
    if any(size < 1 for size in batch or ()):
        raise ValueError(f"--batch must name positive numbers of rows, got {' '.join(map(str, batch or ()))}")
    given = [parsed_weights(text, "--weights") or () for text in weights or ["0.5,0.5"]]
    largest = components or max(2, len(models), *map(len, given))
    for law in given:
        if not 2 <= len(law) <= largest:
            raise ValueError(f"--weights {','.join(f'{w:g}' for w in law)}: give 2 to {largest} weights (--components)")
    return {
        "components": tuple(range(1, largest + 1)),
        "batches": tuple(sorted(set(batch or _BATCHES))),
        "weights": tuple(dict.fromkeys(given)),
        "arms": ("single", "CE", "ME", *(arm for name in dict.fromkeys(arms or ()) for arm in _EXTRA[name])),
    }


def _prepare(models: list[str], device: str, console: Console) -> None:
    """Check names and device before any work, and pull what is missing."""
    from me_stats.bench_models import RANDOM
    from me_stats.models.shapes import published_config

    check_device(device)
    for name in models:
        if name.startswith(RANDOM):
            published_config(name.removeprefix(RANDOM))
    real = [name for name in models if not name.startswith(RANDOM)]
    if real:
        prepare_models(real, device=device, say=lambda line: say(console, line))


def command(record: Record) -> str:
    """The command that makes a record of this kind again."""
    config = record.config
    words = ["me-stats", NAME, "--models", *config["models"], "--components", str(max(config["components"]))]
    words += ["--batch", *map(str, config["batches"]), "--weights"]
    words += [",".join(f"{weight!r}" for weight in law) for law in config["weights"]]
    extra = [name for name, arms in _EXTRA.items() if set(arms) <= set(config["arms"])]
    words += ["--arms", *extra] if extra else []
    usual = {"steps": 32, "prompt_length": 32, "rounds": 5, "dtype": "float32", "device": "cpu", "seed": 0}
    for name, value in usual.items():
        if config[name] != value:
            words += [f"--{name.replace('_', '-')}", str(config[name])]
    return shlex.join(words)


def show(record: Record, console: Console) -> None:
    """Print what a record of this command holds, for people."""
    found = record.results
    console.print(Text(f"{found['label']}, {record.config['dtype']}, on {found['machine']}"))
    console.print(Text(f"{record.config['steps']} tokens a row after a prompt of {record.config['prompt_length']}; "
                       f"medians of {record.config['rounds']} rounds"))  # fmt: skip
    console.print(speeds(record))
    console.print(Text(conclusion(record), style="bold"))


def speeds(record: Record) -> Table:
    """One row a cell."""
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False)
    for name in ("arm", "λ", "batch", "tokens/s", "× CE", "interval", "runs", "fed", "GB", "model"):
        table.add_column(name, justify="left" if name in ("arm", "λ") else "right", no_wrap=True)
    cells = sorted(record.results["cells"], key=lambda cell: (cell["batch"], cell["k"], cell["arm"] != "single"))
    for cell in cells:
        base = cell["of_ce"]
        low, high = base["interval"] if base else (0.0, 0.0)
        predicted = "" if cell["predicted"] is None else _speed(cell["tokens"] / cell["predicted"])
        equal = len(set(cell["weights"])) == 1 and cell["k"] > 2
        weights = f"1/{cell['k']}" if equal else ",".join(f"{weight:.3g}" for weight in cell["weights"])
        table.add_row(
            cell["arm"], "" if cell["arm"] == "single" else weights, str(cell["batch"]),
            _speed(cell["tokens_per_second"]), f"{base['value']:.2f}" if base else "",
            f"{low:.2f}-{high:.2f}" if base else "", f"{cell['forwards_per_token']:.2f}",
            f"{cell['fed_per_token']:.1f}", f"{cell['gb_per_token']:.2g}", predicted + "*" * cell["calibrates"],
        )  # fmt: skip
    coverage = next((cell["of_ce"]["coverage"] for cell in cells if cell["of_ce"]), 0.0)
    table.caption = (
        f"Intervals hold the median ratio with chance {coverage:.1%}. A token: runs of a model, tokens fed, GB moved. "
        "model: tokens/s as a cost model predicts; * used to calibrate it."
    )
    table.caption_justify = "left"
    return table


def _speed(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.1f}"


def conclusion(record: Record) -> str:
    """What it means, in one sentence."""
    entries = [entry for entry in record.results["by_batch"] if entry["arm"] == "ME"]
    entry = entries[0]
    points = [point for point in entry["points"] if point["of_ce"] is not None]
    gains = [f"{points[0]['of_ce']['value']:.2f} × CE at batch {points[0]['batch']}"]
    if len(points) > 1:
        gains.append(f"{points[-1]['of_ce']['value']:.2f} × at batch {points[-1]['batch']}")
    text = f"With λ {','.join(f'{weight:g}' for weight in entry['weights'])} ME is {' and '.join(gains)}"
    crossing = next((c for c in record.results["crossover"] if c["weights"] == entry["weights"]), None)
    if crossing is None:
        return f"{text}."
    if crossing["measured"] is not None:
        return f"{text}; from batch {crossing['measured']:.0f} on it gains under 5%."
    predicted = crossing["predicted"]
    ahead = f"beyond {4 * crossing['largest']}" if predicted is None else f"from {predicted} on"
    return f"{text}; it gains 5% or more at every batch tested, and under 5% {ahead} by the cost model."
