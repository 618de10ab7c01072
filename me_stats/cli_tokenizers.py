"""``me-stats tokenizers``: what an exchange of tokens between models loses, and how much probability hangs on it."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from me_stats.cli_options import Device, Dtype, Precision, check_device, check_out, say

if TYPE_CHECKING:
    from me_stats.tokenizer_sources import OpenTokenizer

_COUNTS = {
    "same_bytes": "ids with equal bytes",
    "changed": "ids that bytes change",
    "mis_decoded": "ids mis-decoded",
    "lost": "ids lost by encode(decode)",
    "exchange": "ids lost by names",
}


def tokenizers(
    names: Annotated[list[str], typer.Argument(metavar="A B ...", help="Tokenizers to audit; see above.")],
    against: Annotated[
        list[str] | None,
        typer.Option("--against", metavar="C D ...", help="Compare A, B, ... with these only, which are not audited."),
    ] = None,
    text: Annotated[
        list[Path] | None,
        typer.Option("--text", metavar="FILE ...", help="UTF-8 text: measure the probability on ids in trouble."),
    ] = None,
    drop_normalizer: Annotated[
        bool, typer.Option("--drop-normalizer", help="Read texts as they stand where a tokenizer would change them.")
    ] = False,
    out: Annotated[Path | None, typer.Option(help="Folder for the record (JSON) and the figure.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the numbers as JSON instead of tables.")] = False,
    device: Device = "cpu",
    dtype: Precision = Dtype.float32,
) -> None:
    """Audit tokenizers id by id, and compare what they share, before their models are mixed.

    A tokenizer is a catalog name (me-stats models list), a hub id or folder, a vocabulary file (.tiktoken, .model,
    .gguf, tokenizer.json), or mistral-7b or qwen2.5: the paper's vocabularies, which come by pip. No weights are
    needed, except by --text. A vocabulary file can be counted and compared; it has no rule to read texts by.

    "By names" is the exchange of published code: tokens are matched by their spelling and re-encoded as text. An exact
    exchange matches bytes, and loses nothing where a tokenizer is read without complaint.

    Exit code: 0 done, 1 a tokenizer was refused (the others are done), 2 bad usage, 130 interrupted.

    \b
    Examples:
      me-stats tokenizers smollm2-135m gemma3-270m
      me-stats tokenizers smollm2-135m gemma3-270m --text notes.txt --out audit
      me-stats tokenizers my-folder --against mistral-7b qwen2.5 ggml-vocab-deepseek-llm.gguf --json
    """
    from me_stats import tokenizer_sources as sources
    from me_stats.record import Recorder, plain
    from me_stats.tokenizer_survey import Survey

    console = Console(stderr=True)
    others = [name for name in against or [] if name not in names]
    texts = {path.name: _read(path) for path in text or []}
    if len(texts) < len(text or []):
        raise ValueError("--text has two files of one name: rename one, or give it once")
    _check(names, others, texts, out, device)
    config = {
        "tokenizers": [sources.label_of(name) for name in names],
        "against": [sources.label_of(name) for name in others],
        "text": list(texts),
        "drop_normalizer": drop_normalizer,
        "dtype": dtype.value,
        "device": device,
    }
    refused: dict[str, str] = {}
    with _bar(console) as progress:
        recorder = Recorder("tokenizer_audit", "Tokenizers: what an exchange of tokens loses", config)
        opened = {
            name: _open(name, drop_normalizer, refused, progress, console) for name in dict.fromkeys([*names, *others])
        }
        audited, compared = ([one for name in group if (one := opened[name])] for group in (names, others))
        survey = Survey(audited, compared, progress=lambda part, note: progress(0.1 + 0.4 * part, note))
        results: dict[str, Any] = {
            "tokenizers": survey.tokenizer_rows(),
            "refused": refused,
            "pairs": survey.pair_rows(),
            "all": survey.union_row(),
            "mass": [],
        }
        for name in names if texts else []:
            one = opened[name]
            if one is not None and sources.is_model(name):
                progress(0.6, f"{one.name} along the text")
                results["mass"] += _mass(survey, one, name, recorder, list(texts.values()), device, dtype)
    if as_json:
        typer.echo(json.dumps(plain(results), indent=1, ensure_ascii=False))
    else:
        _show(results)
    if out is not None:
        _write(recorder, results, out, console)
    for name, reason in refused.items():
        say(console, f"refused: {name}: {reason}")
    if refused:
        raise typer.Exit(1)


def _check(
    names: Sequence[str], others: Sequence[str], texts: Mapping[str, str], out: Path | None, device: str
) -> None:
    """Everything that can be wrong before any work."""
    from me_stats import tokenizer_sources as sources

    for name in (*names, *others):
        sources.check_name(name)
    labels = [sources.label_of(name) for name in (*names, *others)]
    for label in labels:
        if labels.count(label) > 1:
            raise ValueError(f"two tokenizers are called {label!r}: give each once, or rename a file")
    for file, content in texts.items():
        if not content.strip():
            raise ValueError(f"--text {file}: the file is empty; give at least two words")
    if texts:
        check_device(device)
        if not any(map(sources.is_model, names)):
            raise ValueError(
                f"--text needs a model with weights (a catalog name, a hub id, a folder), and {', '.join(labels)} "
                f"ha{'s' if len(labels) == 1 else 've'} none: leave --text out"
            )
    if out is not None:
        check_out(out, "")


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"--text {path} is not UTF-8 ({error.reason} at byte {error.start}); convert it") from error


def _open(
    name: str,
    drop_normalizer: bool,
    refused: dict[str, str],
    progress: Callable[[float, str], None],
    console: Console,
) -> OpenTokenizer | None:
    from me_stats import tokenizer_sources as sources

    label = sources.label_of(name)
    progress(0.0, f"opening {label}")
    try:
        return sources.open_tokenizer(name, drop_normalizer=drop_normalizer, say=partial(say, console))
    except sources.RefusedTokenizer as error:
        refused[label] = str(error).replace("drop_normalizer=True", "--drop-normalizer")
        return None


def _mass(
    survey: Any, one: OpenTokenizer, name: str, recorder: Any, texts: list[str], device: str, dtype: Dtype
) -> list[dict[str, Any]]:
    from me_stats.models import TransformersModel

    model = TransformersModel(name, dtype=dtype.value, device=device)
    recorder.add_model(one.name, model)
    rows: list[dict[str, Any]] = survey.mass_rows(one.name, model, texts)
    return rows


@contextmanager
def _bar(console: Console) -> Iterator[Callable[[float, str], None]]:
    from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

    columns = (
        SpinnerColumn(),
        TextColumn("tokenizers"),
        BarColumn(bar_width=24),
        TextColumn("{task.percentage:>3.0f}%"),
        TimeElapsedColumn(),
        TextColumn("{task.fields[note]}"),
    )
    with Progress(*columns, console=console, disable=not console.is_terminal, transient=True) as bar:
        task = bar.add_task("", total=1.0, note="")

        def update(fraction: float, note: str) -> None:
            bar.update(task, completed=fraction, note=note)
            if not console.is_terminal:
                say(console, f"{note} ...")

        try:
            yield update
        except KeyboardInterrupt:
            bar.stop()
            say(console, "\ninterrupted: nothing was written")
            raise


def _show(results: dict[str, Any]) -> None:
    console = Console()
    rows, refused = results["tokenizers"], results["refused"]
    table = Table("", *map(escape, (*rows, *refused)), box=None, pad_edge=False)
    for label, cell in _LINES.items():
        cells = (escape(cell(row)) for row in rows.values())
        table.add_row(label, *cells, *("refused" if label == "ids" else "–" for _ in refused))
    console.print(table)
    if results["pairs"]:
        pairs = Table("pair", "shared", "first alone", "second alone", "split by name", box=None, pad_edge=False)
        for row in results["pairs"]:
            share = f"{row['shared']:,} ({row['shared'] / row['union']:.0%})"
            pair = escape(f"{row['a']}, {row['b']}")
            split = f"{row['split_a']:,} / {row['split_b']:,}"
            pairs.add_row(pair, share, f"{row['only_a']:,}", f"{row['only_b']:,}", split)
        console.print()
        console.print(pairs)
    if results["mass"]:
        mass = Table("model", "ids that are", "ids", "mean mass", "largest", box=None, pad_edge=False)
        for row in results["mass"]:
            share = f"{row['ids']:,} ({row['share']:.2%})"
            mass.add_row(escape(row["model"]), escape(row["set"]), share, f"{row['mean']:.3%}", f"{row['largest']:.1%}")
        console.print()
        console.print(mass)


def _share(row: dict[str, Any], kind: str) -> str:
    count = row["counts"][kind]
    return "not known" if count is None else f"{count:,} ({row['shares'][kind]:.2%})" if count else "0"


def _named(pairs: Sequence[Sequence[Any]], most: int = 3) -> str:
    listed = [str(name) for _, name in pairs[:most]]
    return ", ".join(listed + ["…"] * (len(pairs) > most)) or "none"


def _bytes(values: Sequence[int], most: int = 4) -> str:
    listed = " ".join(f"{value:02X}" for value in values[:most])
    return f"{len(values)} ({listed}{' …' if len(values) > most else ''})" if values else "0"


def _before(prefix: str | None) -> str:
    return "not known" if prefix is None else repr(prefix) if prefix else "nothing"


# What the table says of a tokenizer, line by line.
_LINES: dict[str, Callable[[dict[str, Any]], str]] = {
    "ids": lambda row: f"{row['size']:,}",
    "with bytes": lambda row: f"{row['roles']['ORDINARY']:,}",
    "ends": lambda row: _named(row["ends"]),
    "controls": lambda row: f"{row['roles']['CONTROL']:,}",
    "that say “end”": lambda row: _named(row["end_like"]),
    "unused rows": lambda row: f"{row['roles']['UNUSED'] + row['padded']:,}",
    **{label: partial(_share, kind=kind) for kind, label in _COUNTS.items()},
    "unread bytes": lambda row: _bytes(row["unread_bytes"]),
    "normaliser": lambda row: row["normaliser"].replace("unknown", "not known"),
    "before a text": lambda row: _before(row["prefix"]),
}


def _write(recorder: Any, results: dict[str, Any], out: Path, console: Console) -> None:
    from me_stats import scripts

    record = recorder.finish(results)
    record.save(out / "tokenizer_audit.json")
    drawn = scripts.load("figures", "tokenizer_audit").draw(record, out)
    say(console, f"Results: {out / 'tokenizer_audit.json'}, {drawn.image}")
