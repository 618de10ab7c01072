"""`me-stats compare`: how far two orders of the same transforms are apart on given prompts, and what to do about it."""

from __future__ import annotations

import dataclasses
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from me_stats.cli_options import Device, Dtype, Precision, check_out, numbers_table, parsed_weights, prepare_models, say

if TYPE_CHECKING:
    from me_stats.orders import OrderedLaw, Transforms
    from me_stats.record import Record

_TAIL = 90  # characters of a prefix that are shown


def compare(
    models: Annotated[
        list[str],
        typer.Option(
            "--models",
            metavar="A B ...",
            help="Catalog names, folders or hub ids, also of different vocabularies; a single model runs under two "
            "system prompts.",
        ),
    ],
    weights: Annotated[
        str, typer.Option(metavar="λ,λ,...", help="Mixing weights; default 0.6,0.4 or equal ones.")
    ] = "",
    temperature: Annotated[float, typer.Option(help="Of both laws.")] = 1.0,
    top_k: Annotated[int | None, typer.Option(help="Of both laws; default all tokens.")] = None,
    top_p: Annotated[float, typer.Option(help="Of both laws.")] = 1.0,
    min_p: Annotated[float, typer.Option(help="Of both laws.")] = 0.0,
    greedy: Annotated[bool, typer.Option("--greedy", help="An arg max in both laws.")] = False,
    law: Annotated[
        str,
        typer.Option(metavar="ORDER[:KEY=VALUE,...]", help="p, which continuations are drawn from: what ME samples."),
    ] = "transform-then-mix",
    against: Annotated[
        str, typer.Option(metavar="ORDER[:KEY=VALUE,...]", help="q, which p is compared with.")
    ] = "published-ce",
    prompts: Annotated[
        str | None,
        typer.Option(
            metavar="SOURCE",
            help="A .jsonl, .txt (one prompt a line) or .parquet file, or a dataset of the hub, "
            "org/name[:config][:split].",
        ),
    ] = None,
    field: Annotated[str | None, typer.Option(help="The field of a row that is the prompt.")] = None,
    template: Annotated[
        str | None,
        typer.Option(metavar="TEXT", help=r"A prompt with {field} in it, filled from each row; \n ends a line there."),
    ] = None,
    prompt: Annotated[
        list[str] | None,
        typer.Option(metavar="TEXT ...", help="Prompts themselves; default some that suit the models."),
    ] = None,
    n_prompts: Annotated[
        int | None, typer.Option(min=1, help="Take the first so many prompts; default as many as rows.")
    ] = None,
    rows: Annotated[int, typer.Option(min=2, help="Continuations in all; they take the prompts in turn.")] = 64,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Tokens at which a continuation ends.")] = 64,
    batch: Annotated[int, typer.Option(min=1, help="Rows in memory together, and what an interruption loses.")] = 8,
    worst: Annotated[int, typer.Option(min=0, help="Prefixes to show where the laws differ most.")] = 4,
    seed: Annotated[int, typer.Option(min=0, help="Keys every random number of the run.")] = 0,
    device: Device = "cpu",
    dtype: Precision = Dtype.float32,
    out: Annotated[Path, typer.Option(help="Folder for the record, the figure and the finished parts.")] = Path(
        "compare"
    ),
) -> None:
    """How far is ME's law from CE's under your transforms and prompts, why, and what is the exact repair?

    ORDER is one of transform-then-mix (what ME samples), mix-then-transform, union-joint, union-component and
    published-ce. Keys override the options for one law: weights=.5/.5, temperature, top-k, top-p, min-p, greedy.
    Distances of a step are exact at each prefix; prefixes are those of rows drawn from --law. Finished rows are kept:
    run the same command again after an interruption and it goes on where it stopped.

    Exit code: 0 done (a distance is a result, not a failure), 2 bad usage or missing models, 130 interrupted.

    \b
    Examples:
      me-stats compare --models bundled:prose bundled:code --top-k 10 --rows 32
      me-stats compare --models smollm2-135m gemma3-270m --top-k 5 --prompts a.txt
      me-stats compare --models a b --prompts a.jsonl --template 'Q: {question}\\nA:' --greedy
      me-stats compare --models a b --against transform-then-mix:weights=.5/.5
    """
    console = Console(stderr=True)
    first, second = _laws(models, weights, law, against, (temperature, top_k, top_p, min_p, greedy))
    texts = _texts(prompts, prompt, field, template, min(rows, n_prompts or rows))
    check_out(out, "")
    prepare_models(models, device=device, say=lambda line: say(console, line))
    from me_stats.comparison_run import NAME, ComparePlan, rows_kept, run
    from me_stats.report.comparison import draw

    plan = ComparePlan(
        tuple(models), texts, first, second, dtype=dtype.value, device=device, rows=rows, max_new_tokens=max_new_tokens,
        batch=min(batch, rows), worst=worst, seed=seed,
    )  # fmt: skip
    work = out / "parts"
    from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn

    columns = (SpinnerColumn(), TextColumn("{task.description}"), BarColumn(bar_width=24), TimeElapsedColumn(),
               TimeRemainingColumn())  # fmt: skip
    with Progress(*columns, console=console, disable=not console.is_terminal) as bar:
        task = bar.add_task("opening the models", total=1.0)
        try:
            record = run(plan, work, lambda done, note: bar.update(task, completed=done, description=note))
        except KeyboardInterrupt:
            bar.stop()
            kept = rows_kept(plan, work)
            say(
                console, f"\ninterrupted: {kept} of {rows} rows are kept in {work}; the same command goes on from there"
            )
            raise
    source = {"prompts": Path(prompts).name if Path(prompts).exists() else prompts} if prompts else {}
    source |= {name: value for name, value in (("field", field), ("template", template)) if value is not None}
    record = dataclasses.replace(record, results=record.results | {"source": source})
    record.save(out / f"{NAME}.json")
    figure = draw(record, out)
    show(record, Console())
    say(console, f"Record and figure: {out}, {figure.paths[-1].name}")


def command(record: Record) -> str:
    """The command that makes a record of this kind again; a file of prompts is named without its folder."""
    config = record.config
    words = ["me-stats", "compare", "--models", *config["models"]]
    for option, name in (("--law", "first"), ("--against", "second")):
        words += [option, _spelled(config[name])]
    source = record.results["source"]
    if "prompts" in source:
        words += [word for name, value in source.items() for word in (f"--{name}", value)]
        words += ["--n-prompts", str(len(config["prompts"]))] if len(config["prompts"]) < config["rows"] else []
    elif config["prompts"] is not None:
        words += ["--prompt", *config["prompts"]]  # with the template in them
    usual = {"dtype": "float32", "device": "cpu", "rows": 64, "max_new_tokens": 64, "batch": 8, "worst": 4, "seed": 0}
    for name, value in usual.items():
        if config[name] != value:
            words += [f"--{name.replace('_', '-')}", str(config[name])]
    return shlex.join(words)


def _spelled(law: dict[str, Any]) -> str:
    """An ordered law of a record as ``--law`` takes it."""
    from me_stats.orders import Transforms

    usual = vars(Transforms())
    keys = {"weights": "/".join(map(str, law["weights"]))}
    keys |= {name: value for name, value in law["transforms"].items() if value != usual[name]}
    return (
        law["order"]
        + ":"
        + ",".join(name.replace("_", "-") + ("" if value is True else f"={value}") for name, value in keys.items())
    )


def _laws(
    models: Sequence[str], weights: str, law: str, against: str, settings: tuple[float, int | None, float, float, bool]
) -> tuple[OrderedLaw, OrderedLaw]:
    """Both laws, or a ValueError that names the option, before a model is opened."""
    from me_stats.models import TableModel
    from me_stats.orders import Transforms

    count = max(2, len(models))
    shared = parsed_weights(weights, "--weights") or ((0.6, 0.4) if count == 2 else (1 / count,) * count)
    if len(shared) != count:
        raise ValueError(f"--weights has {len(shared)} weights for {count} components; give one each")
    transforms = Transforms(*settings)
    found = []
    toys = [TableModel.random(3, seed=seed, order=0) for seed in range(count)]
    for option, text in (("--law", law), ("--against", against)):
        try:
            ordered = parsed_law(text, shared, transforms)
            if len(ordered.weights) != count:
                raise ValueError(f"weights has {len(ordered.weights)} values for {count} components; give one each")
            ordered.over(toys)  # what the settings of an order exclude shows here
        except ValueError as error:
            raise ValueError(f"{option} {text}: {error}") from error
        found.append(ordered)
    return found[0], found[1]


def parsed_law(text: str, weights: Sequence[float], transforms: Transforms) -> OrderedLaw:
    """``ORDER[:key=value,...]`` as a law whose other settings are those given; ValueError for what is no such text.

    >>> from me_stats.orders import Transforms
    >>> law = parsed_law("published-ce:weights=.5/.5,top-k=none,greedy", (0.6, 0.4), Transforms(top_k=10, top_p=0.9))
    >>> law.order, law.transforms, law.weights
    ('published-ce', Transforms(temperature=1.0, top_k=None, top_p=0.9, min_p=0.0, greedy=True), (0.5, 0.5))
    """
    from me_stats.orders import OrderedLaw

    order, _, keys = text.partition(":")
    changes: dict[str, Any] = {}
    for entry in filter(None, keys.split(",")):
        key, equals, value = entry.partition("=")
        name = key.strip().replace("-", "_")
        if name == "weights":
            weights = parsed_weights(value.replace("/", ",").replace(";", ","), key) or ()
        elif name in _KEYS:
            try:
                changes[name] = _KEYS[name](value.strip() if equals else "true")
            except (ValueError, KeyError) as error:
                raise ValueError(f"{entry}: no value for {key}; such as {_SUCH_AS[name]}") from error
        else:
            known = ", ".join(["weights", *(name.replace("_", "-") for name in _KEYS)])
            raise ValueError(f"{key} is no setting of a law; there are {known}")
    return OrderedLaw(order, dataclasses.replace(transforms, **changes), tuple(weights))  # type: ignore[arg-type]


def _no_or_integer(text: str) -> int | None:
    return None if text == "none" else int(text)


_KEYS: dict[str, Any] = {
    "temperature": float, "top_k": _no_or_integer, "top_p": float, "min_p": float,
    "greedy": {"true": True, "false": False}.__getitem__,
}  # fmt: skip
_SUCH_AS = {"temperature": "temperature=.7", "top_k": "top-k=10 or top-k=none", "top_p": "top-p=.9",
            "min_p": "min-p=.1", "greedy": "greedy or greedy=false"}  # fmt: skip


def _texts(
    source: str | None, given: Sequence[str] | None, field: str | None, template: str | None, count: int
) -> tuple[str, ...] | None:
    from me_stats.cli_prompts import filled, read_prompts

    if source is not None and given:
        raise ValueError("--prompts names a source and --prompt gives texts; take one of them")
    if source is None and field is not None:
        raise ValueError("--field names a field of --prompts, and there is no such source")
    if field is not None and template is not None:
        raise ValueError("--template names its fields itself; leave out --field")
    if source is not None:
        return read_prompts(source, field=field, template=template, count=count)
    if template is not None and not given:
        raise ValueError("--template is filled from --prompts or --prompt, and there is neither")
    return filled(given[:count], template) if given else None


def show(record: Record, console: Console) -> None:
    """Print what a record of this command holds, for people."""
    found = record.results
    lines = [
        f"p   {found['p']}",
        f"q   {found['q']}",
        f"on  {found['label']}; {len(found['comparison']['row_tv'])} rows drawn from p by {found['drawn_by']}, "
        f"{found['comparison']['prefixes']:,} prefixes; rounding {found['comparison']['floor']:.1g} a step",
    ]
    if found["vocabularies"] is not None:
        lines.append(_alignment(found["vocabularies"]))
    for line in lines:
        console.print(Text(line))
    for part in (distances(record), causes(record), texts(record), speed(record)):
        if part is not None:
            console.print(part)
    _show_worst(found["worst"], console)
    console.print(Text("\nWhat to do", style="bold"))
    for entry in found["advice"]:
        code = f"\n  {entry['code']}" if entry["code"] else ""
        console.print(Text(f"- {entry['statement']}{'.' if not code else ':'}{code}"))
    console.print(Text("\nIn Python", style="bold"))
    say(console, found["program"])


def _alignment(known: dict[str, Any]) -> str:
    ids = ", ".join(f"{name} {size:,} ids" for name, size in known["ids"].items())
    lost = ", ".join(f"{name} {_percent(mass['mean'])}" for name, mass in known["dropped"].items())
    return (
        f"The vocabularies differ ({ids}): laws are over {known['strings']:,} byte strings. Each model reads the text "
        "in its own tokens, and its law is carried along 'id to its bytes'. Control tokens have no bytes; their mass "
        f"is dropped: {lost} a step on average over {known['prefixes']} prefixes."
    )


def distances(record: Record) -> Table:
    """TV a step, over prefixes, and the masses outside supports."""
    found = record.results["comparison"]
    shares = ", ".join(f"{float(level):.0%}" for level in found["quantiles"])
    quantiles = ", ".join(f"{value:.2g}" for value in found["quantiles"].values())
    table = numbers_table("a step", "")
    table.add_row("mean TV [95%]", _interval(found["step"]))
    table.add_row(f"TV at {shares} of prefixes", quantiles)
    table.add_row("largest TV", f"{found['largest']:.2g}")
    table.add_row("p's mass that q excludes [95%]", _interval(found["outside"]))
    table.add_row("q's mass that p excludes [95%]", _interval(found["missing"]))
    return table


def causes(record: Record) -> Table | None:
    """TV a step of each cause alone, and together with those above it."""
    if not record.results["causes"]:
        return None
    table = numbers_table("cause", "TV alone", "with those above")
    for cause in record.results["causes"]:
        alone = _interval(cause["alone"]) if cause["alone"] is not None else ""
        table.add_row(cause["name"].replace("_", "-"), alone, _interval(cause["cumulative"]))
    return table


def texts(record: Record) -> Table:
    """TV of whole texts by length."""
    table = numbers_table("tokens", "TV of whole texts [95%]", "q cannot write (97.5%)")
    for gap in record.results["comparison"]["lengths"]:
        table.add_row(str(gap["length"]), _interval(gap["tv"]), f">= {_percent(gap['outside']['lower'])}")
    table.caption = "The right column bounds the same TV from below."
    table.caption_justify = "left"
    return table


def speed(record: Record) -> Table:
    """Network runs a token of each exact way."""
    found = record.results
    forwards, acceptance = found["forwards"], found["comparison"]["forecast"]["acceptance"]
    table = numbers_table("law", "runs a token", "exact by")
    if found["drawn_by"] == "MESampler":
        table.add_row("p", str(forwards["ME"]), "ME")
    table.add_row("q", str(forwards["CE"]), "CE")
    drafted = f"drafts of {forwards['chunk']} by p, verified: {acceptance['value']:.1%} accepted"
    table.add_row("q", f"{forwards['repair']:.2f}", drafted)
    table.columns[2].justify = "left"
    return table


def _show_worst(worst: Sequence[dict[str, Any]], console: Console) -> None:
    if worst:
        console.print(Text("\nWhere they differ most", style="bold"))
    for prefix in worst:
        tail = prefix["text"][-_TAIL:]
        shown = ("..." if len(tail) < len(prefix["text"]) else "") + repr(tail)[1:-1]
        console.print(Text(f"row {prefix['row']}, step {prefix['step']}: TV {prefix['tv']:.2g} after {shown}"))
        tokens = [f"{entry['token']} p {entry['p']:.2g} q {entry['q']:.2g}" for entry in prefix["tokens"]]
        console.print(Text(f"  {'; '.join(tokens)}"))


def _interval(estimate: dict[str, Any]) -> str:
    low, high = estimate["interval"]
    value = estimate["value"]
    if value < 1e-4 and high < 1e-4:
        return f"{value:.1g}"
    return f"{value:.3f} [{max(0.0, low):.3f}, {high:.3f}]"


def _percent(share: float) -> str:
    return f"{share:.1%}" if share >= 1e-3 or share == 0 else f"{share:.1e}"
