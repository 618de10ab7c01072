"""``me-stats fit-lambda``: which mixing weights explain a text, how surely, and whether they pay on unseen text."""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from me_stats.cli_options import Device, Dtype, Models, Precision, Window, open_models, say
from me_stats.cli_text import Split, component_labels, identity, score_sources, sources_of

if TYPE_CHECKING:
    from me_stats.transfer import CrossValidation, DomainFits
    from me_stats.weights import WeightFit

NAME = "fit-lambda"


def fit_lambda(
    models: Models,
    text: Annotated[
        list[Path] | None,
        typer.Option("--text", metavar="FILE ...", help="UTF-8 text or .jsonl files; each is a domain by its name."),
    ] = None,
    domain: Annotated[
        list[str] | None,
        typer.Option("--domain", metavar="NAME=FILE ...", help="Files with the name of their domain."),
    ] = None,
    split: Annotated[Split, typer.Option(help="What ends a document in a text file.")] = Split.blank_lines,
    out: Annotated[Path, typer.Option(help="Folder for the scores, the results and the figure.")] = Path("fit-lambda"),
    weights_out: Annotated[
        Path | None, typer.Option("--weights-out", metavar="FILE", help="Also write λ̂ of all text to this JSON file.")
    ] = None,
    window: Window = None,
    folds: Annotated[int, typer.Option(min=2, help="Folds of the cross-validation, by document.")] = 5,
    device: Device = "cpu",
    dtype: Precision = Dtype.float32,
    seed: Annotated[int, typer.Option(min=0, help="Keys the assignment of documents to folds.")] = 0,
) -> None:
    """Estimate the mixing weights λ of an ensemble on a text, with intervals, and test them on held-out documents.

    Each model scores every token of the text. The scores are kept in OUT/scores: run the same command again after an
    interruption and it goes on where it stopped.

    Exit code: 0 done, 2 bad usage or missing models, 130 interrupted.

    \b
    Examples:
      me-stats fit-lambda --models bundled:prose bundled:code --text notes.txt
      me-stats fit-lambda --models bundled:prose bundled:code --domain prose=notes.txt code=main.py --out lambda
    """
    from me_stats.record import environment, plain, write_atomically
    from me_stats.transfer import cross_validate, fit_by_domain

    console = Console(stderr=True)
    sources = sources_of(text or [], domain or [])
    out.mkdir(parents=True, exist_ok=True)
    setting = open_models(models, device=device, dtype=dtype, say=partial(say, console))
    scores = score_sources(setting, sources, split, window, out / "scores", console)
    by_domain = fit_by_domain(scores)
    usable = int((scores.lengths > 0).sum())
    validation = cross_validate(scores, folds=folds, seed=seed) if usable >= folds else None
    if validation is None:
        say(console, f"no cross-validation: {usable} documents are fewer than --folds {folds}")
    labels = component_labels(setting)
    results = {
        "models": [identity(name, model) for name, model in setting.models],
        "components": labels,
        "config": {"sources": sources, "split": split.value, "seed": seed, "folds": folds, **scores.settings},
        "documents": scores.n_documents,
        "domains": by_domain,
        "cross_validation": validation,
        "environment": environment(),
    }
    page = out / f"{NAME}.json"
    write_atomically(page, json.dumps(plain(results), indent=1, ensure_ascii=False, allow_nan=False) + "\n")
    if weights_out is not None:
        chosen = {"components": labels, "weights": by_domain.pooled.weights}
        write_atomically(weights_out, json.dumps(plain(chosen), indent=1, ensure_ascii=False) + "\n")
    drawn = draw(by_domain, labels, out / NAME)
    _show(by_domain, validation, labels)
    for name, fit in (*by_domain.fits.items(), ("all text", by_domain.pooled)):
        if not fit.identified:
            say(console, f"{name}: λ is not identified, {fit.reason}")
    say(console, f"Results: {page}, {drawn[-1]}")


def _show(by_domain: DomainFits, validation: CrossValidation | None, labels: Sequence[str]) -> None:
    console = Console()
    table = Table("text", "tokens", *map(escape, labels), "nats/token", "bits/byte", box=None, pad_edge=False)
    for name, fit in (*by_domain.fits.items(), ("all text", by_domain.pooled)):
        bits = "" if fit.bits_per_byte is None else f"{fit.bits_per_byte:.4f}"
        table.add_row(escape(name), str(fit.n), *_spelled(fit), f"{fit.nll:.4f}", bits)
    console.print(f"λ̂ with {by_domain.pooled.confidence:.0%} intervals", highlight=False)
    console.print(table)
    if validation is None:
        return
    held = Table("held out, nats/token", "loss", "more than fitted λ̂", box=None, pad_edge=False)
    held.add_row("fitted λ̂", f"{validation.nll:.4f}", "")
    for row in validation.comparisons:
        low, high = row.interval
        name = row.alternative
        for i, label in enumerate(labels):
            name = name.replace(f"component {i} ", f"{label} ")
        held.add_row(escape(name), f"{row.nll:.4f}", f"{row.difference:+.4f} ({low:+.4f} to {high:+.4f})")
    console.print()
    console.print(held)


def _spelled(fit: WeightFit) -> list[str]:
    mark = "" if fit.identified else "?"
    return [f"{w:.3f}{mark} ({low:.3f}–{high:.3f})" for w, (low, high) in zip(fit.weights, fit.intervals, strict=True)]


def draw(by_domain: DomainFits, labels: Sequence[str], stem: Path) -> list[Path]:
    """λ̂ with intervals, one row for each domain and one for all text; returns the files."""
    from me_stats.report.style import COLORS, MARKERS, figure, save

    rows = [*by_domain.fits.items(), ("all text", by_domain.pooled)]
    fig, ax = figure(columns=1, height=min(11.0, 1.2 + 0.35 * len(rows)))
    k = len(labels)
    for i, label in enumerate(labels):
        key = f"component {i % 3 + 1}"
        shift = (i - (k - 1) / 2) * 0.5 / k
        weights = [fit.weights[i] for _, fit in rows]
        sides = [[abs(fit.weights[i] - fit.intervals[i, side]) for _, fit in rows] for side in (0, 1)]
        y = [row + shift for row in range(len(rows))]
        ax.errorbar(weights, y, xerr=sides, fmt=MARKERS[key], color=COLORS[key], label=label, linewidth=1)
    ax.set(xlim=(-0.03, 1.03), xlabel="mixing weight λ̂")
    ax.set_yticks(range(len(rows)), [name for name, _ in rows])
    ax.set_ylim(len(rows) - 0.5, -0.5)
    fig.legend(loc="outside upper center", ncols=min(k, 2))
    caption = (
        f"Mixing weights that maximise the likelihood of each text, with {by_domain.confidence:.0%} intervals that "
        "allow for tokens of one document going together."
    )
    return save(fig, stem, {"caption": caption})
