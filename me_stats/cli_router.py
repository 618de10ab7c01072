"""``me-stats train-router``: weights that read the prefix, learned from a text and judged on documents held out."""

from __future__ import annotations

import json
from collections.abc import Sequence
from enum import StrEnum
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from me_stats.cli_options import Device, Dtype, Models, Precision, Window, open_models, say
from me_stats.cli_text import Split, component_labels, identity, score_sources, sources_of

if TYPE_CHECKING:
    from me_stats.corpus import CorpusScores
    from me_stats.presets import Setting
    from me_stats.routers import Epoch, Router, RouterFit

NAME = "train-router"
_FEWEST = 3  # documents of each part: fewer say nothing about other documents


class Kind(StrEnum):
    """What a router reads."""

    ngram = "ngram"
    recurrent = "recurrent"
    hidden = "hidden"


def train_router(
    models: Models,
    text: Annotated[
        list[Path] | None,
        typer.Option("--text", metavar="FILE ...", help="UTF-8 text or .jsonl files to learn from and judge on."),
    ] = None,
    kind: Annotated[
        Kind, typer.Option(help="What it reads: last tokens, the prefix by a recurrent net, the first model's state.")
    ] = Kind.ngram,
    split: Annotated[Split, typer.Option(help="What ends a document in a text file.")] = Split.blank_lines,
    out: Annotated[Path, typer.Option(help="Folder for the scores, the router and its history.")] = Path(NAME),
    validation: Annotated[
        float, typer.Option(help="Share of the documents that stop training; as many others judge the result.")
    ] = 0.2,
    epochs: Annotated[
        int, typer.Option(min=1, help="Most passes over the text; training stops when it stops helping.")
    ] = 30,
    window: Window = None,
    seed: Annotated[int, typer.Option(min=0, help="Keys the split of the documents and the training.")] = 0,
    device: Device = "cpu",
    dtype: Precision = Dtype.float32,
) -> None:
    """Train a router: mixing weights that depend on what has been written, for ME to draw from and CE to sum.

    Each model scores every token of the text once; training reads these scores alone. The scores are kept in
    OUT/scores: run the same command again after an interruption and it goes on where it stopped.

    Exit code: 0 done, 2 bad usage or missing models, 130 interrupted.

    \b
    Examples:
      me-stats train-router --models bundled:prose bundled:code --text notes.txt main.py
      me-stats train-router --models bundled:prose bundled:code --text notes.txt main.py --kind recurrent --out router
    """
    from me_stats.record import environment, plain, write_atomically
    from me_stats.routers import save_router

    console = Console(stderr=True)
    if not 0 < validation < 0.5:
        raise ValueError(f"--validation must lie between 0 and 0.5, got {validation:g}: it is held out twice")
    sources = sources_of(text or [], [])
    out.mkdir(parents=True, exist_ok=True)
    setting = open_models(models, device=device, dtype=dtype, say=partial(say, console))
    labels = component_labels(setting)
    router = _new(kind, setting, seed)
    scores = score_sources(setting, sources, split, window, out / "scores", console)
    parts = _parts(scores, validation, seed)
    fit = _train(router, scores, parts, epochs, seed, console, out / "scores")
    judged = _judge(fit, scores.subset(parts["test"]), labels)
    training = {
        "models": [identity(name, model) for name, model in setting.models],
        "components": labels,
        "config": {
            "sources": sources, "kind": kind.value, "split": split.value, "validation": validation, "seed": seed,
            **fit.options, **scores.settings,
        },
        "documents": {part: len(numbers) for part, numbers in parts.items()},
        "constant_weights": fit.constant_weights,
        "best_epoch": fit.best_epoch,
        "history": fit.history,
        "temperature": fit.temperature,
        "parameters": fit.n_parameters,
        "train_tokens": fit.train_tokens,
        "seconds": fit.seconds,
        "test": judged,
        "environment": environment(),
    }  # fmt: skip
    saved = out / "router.safetensors"
    # The file is complete under another name first, as all results are.
    save_router(fit.router, unfinished := out / ".router.safetensors", vocabulary=setting.ensemble.vocabulary,
                training={"components": labels, "options": fit.options, "test": plain(judged)})  # fmt: skip
    unfinished.replace(saved)
    write_atomically(
        out / "training.json", json.dumps(plain(training), indent=1, ensure_ascii=False, allow_nan=False) + "\n"
    )
    drawn = draw(fit, out / "training")
    _show(fit, judged, kind)
    say(console, f"Results: {saved}, {out / 'training.json'}, {drawn[-1]}")
    say(Console(), "\n" + _recipe(models, saved, kind))


def _new(kind: Kind, setting: Setting, seed: int) -> Router:
    from me_stats.routers import HiddenStateRouter, NgramRouter, RecurrentRouter

    k = len(setting.ensemble.components)
    if kind is Kind.ngram:
        return NgramRouter(k)
    if kind is Kind.recurrent:
        return RecurrentRouter(k, setting.ensemble.vocabulary.size, seed=seed)
    return HiddenStateRouter(setting.models[0][1], k, seed=seed)


def _parts(scores: CorpusScores, validation: float, seed: int) -> dict[str, list[int]]:
    """Numbers of the documents of each part."""
    import numpy as np

    usable = np.flatnonzero(scores.lengths > 0)
    order = np.random.default_rng([seed, 2]).permutation(usable).tolist()
    held = max(_FEWEST, round(validation * len(order)))
    if len(order) < 2 * held + _FEWEST:
        raise ValueError(
            f"{len(order)} documents with scored tokens are too few: {held} stop training, {held} judge the result, "
            f"and at least {_FEWEST} train; give more text, or --split lines for shorter documents"
        )
    return {"train": order[2 * held :], "validation": order[held : 2 * held], "test": order[:held]}


def _train(
    router: Router,
    scores: CorpusScores,
    parts: dict[str, list[int]],
    epochs: int,
    seed: int,
    console: Console,
    folder: Path,
) -> RouterFit:
    from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

    from me_stats import routers

    columns = (SpinnerColumn(), TextColumn("training"), BarColumn(bar_width=24), TimeElapsedColumn(),
               TextColumn("{task.fields[note]}"))  # fmt: skip
    if not console.is_terminal:
        say(console, f"training {type(router).__name__} ({router.n_parameters:,} parameters) ...")
    with Progress(*columns, console=console, disable=not console.is_terminal) as bar:
        task = bar.add_task("", total=epochs, note="")

        def report(epoch: Epoch) -> None:
            bar.update(task, completed=epoch.number, note=f"epoch {epoch.number}, held out {epoch.validation:.4f} nats")

        train, held = (routers.scored_sequences(scores.subset(parts[part])) for part in ("train", "validation"))
        try:
            return routers.train_router(router, *train, validation=held, epochs=epochs, seed=seed, progress=report)
        except KeyboardInterrupt:
            bar.stop()
            say(console, f"\ninterrupted: the scores are kept in {folder}; the same command trains again from there")
            raise


def _judge(fit: RouterFit, test: CorpusScores, labels: Sequence[str]) -> list[dict[str, Any]]:
    """Loss of the router and of its rivals on documents that training never saw, and what the router saves."""
    import numpy as np

    from me_stats.routers import RouterMixing, document_nll, scored_sequences
    from me_stats.transfer import document_nll as constant_nll
    from me_stats.transfer import paired_difference

    own = document_nll(RouterMixing(fit.router), *scored_sequences(test))[0]
    constant = np.array(fit.constant_weights)
    rivals = {"best constant λ": constant / constant.sum()}
    rivals |= {f"{label} alone": np.eye(len(labels))[i] for i, label in enumerate(labels)}
    n_bytes = int(test.bytes.sum(dtype=np.int64))
    rows = [{"weights": "router", **_loss(own, test.n, n_bytes)}]
    for name, weights in rivals.items():
        losses = constant_nll(test, weights)
        difference, low, high = paired_difference(losses, own, test.lengths, 0.95)
        loss = _loss(losses, test.n, n_bytes)
        rows.append({"weights": name, **loss, "more_than_router": difference, "interval": (low, high)})
    return rows


def _loss(losses: Any, n: int, n_bytes: int) -> dict[str, Any]:
    import math

    total = float(losses.sum())
    return {"nll": total / n, "bits_per_byte": total / n_bytes / math.log(2) if n_bytes else None}


def _show(fit: RouterFit, judged: Sequence[dict[str, Any]], kind: Kind) -> None:
    console = Console()
    table = Table("held out", "nats/token", "bits/byte", "more than the router", box=None, pad_edge=False)
    for row in judged:
        bits = "" if row["bits_per_byte"] is None else f"{row['bits_per_byte']:.4f}"
        more = ""
        if "interval" in row:
            low, high = row["interval"]
            more = f"{row['more_than_router']:+.4f} ({low:+.4f} to {high:+.4f})"
        name = f"{kind.value} router" if row["weights"] == "router" else row["weights"]
        table.add_row(escape(name), f"{row['nll']:.4f}", bits, more)
    console.print(
        f"{fit.n_parameters:,} parameters, {fit.train_tokens:,} tokens, best epoch {fit.best_epoch} of "
        f"{fit.history[-1].number}, {fit.seconds:.1f} s; 95% intervals, paired by document",
        highlight=False, soft_wrap=True,
    )  # fmt: skip
    console.print(table)
    if judged[1]["interval"][0] <= 0:
        console.print("No gain over the best constant λ is shown on this text.", highlight=False)


def _recipe(models: Sequence[str], saved: Path, kind: Kind) -> str:
    """Python that samples with the router."""
    network = ", model=e.components[0]" if kind is Kind.hidden else ""
    if len(models) == 1 and network:
        network = ", model=e.components[0].model"
    return (
        "from me_stats import Ensemble, MESampler, presets, routers\n"
        f"e = presets.open_setting({list(models)!r}).ensemble\n"
        f"router = routers.load_router({str(saved)!r}, e.vocabulary{network})\n"
        "routed = MESampler(Ensemble(e.components, routers.RouterMixing(router)))"
    )


def draw(fit: RouterFit, stem: Path) -> list[Path]:
    """Loss by epoch on the training and validation documents, against the best constant λ; returns the files."""
    from me_stats.report.style import COLORS, figure, save

    fig, ax = figure(columns=1)
    number = [epoch.number for epoch in fit.history]
    for part, color, mark in (("train", COLORS["CE"], "o"), ("validation", COLORS["ME"], "s")):
        ax.plot(number, [getattr(epoch, part) for epoch in fit.history], marker=mark, color=color, label=part)
    ax.axhline(fit.constant_nll_validation, color=COLORS["floor"], linestyle="--", label="best constant λ, validation")
    ax.axvline(fit.best_epoch, color=COLORS["floor"], linewidth=0.8)
    ax.set(xlabel="epoch", ylabel="nats/token")
    ax.legend()
    caption = (
        f"Training of a {type(fit.router).__name__}: epoch {fit.best_epoch} is kept, with {fit.nll_validation:.4f} "
        f"nats a token on the validation documents after calibration, against {fit.constant_nll_validation:.4f} of the "
        "best constant λ."
    )
    return save(fig, stem, {"caption": caption})
