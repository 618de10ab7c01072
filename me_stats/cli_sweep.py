"""`me-stats sweep`: how an ensemble behaves at every λ, in one table, one record and one figure."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich import box
from rich.console import Console
from rich.table import Table

from me_stats.cli_options import Device, Dtype, Models, Precision, check_out, open_models, parsed_weights

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from me_stats.models import Ensemble
    from me_stats.sensitivity import Estimate
    from me_stats.sweep import Sweep, SweepPoint

_WINDOW = 256  # tokens of the text that are scored together; the first of a window is only read


def sweep(
    models: Models,
    prompt: Annotated[
        list[str] | None,
        typer.Option(metavar="TEXT ...", help="What to continue; default prompts that suit the models."),
    ] = None,
    text: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Also the log-likelihood of this text at every λ.")
    ] = None,
    grid: Annotated[int, typer.Option(min=2, help="Points along an edge: 11 makes weights 0, 0.1, ... 1.")] = 11,
    rows: Annotated[int, typer.Option(min=2, help="Continuations of each prompt in one draw.")] = 64,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Tokens at which a continuation ends.")] = 64,
    reference: Annotated[
        str, typer.Option(metavar="λ,λ,...", help="Weights that distances are measured from; default equal ones.")
    ] = "",
    seed: Annotated[int, typer.Option(min=0, help="Keys every random number of the run.")] = 0,
    device: Device = "cpu",
    dtype: Precision = Dtype.float32,
    out: Annotated[Path, typer.Option(help="Folder for the record and the figure.")] = Path("sweep"),
) -> None:
    """Walk over the mixing weights λ: entropy, length, repetition, distances, likelihood and ME's work at each.

    A draw is re-weighted to the neighbouring λ as far as it reaches, then repeated. Finished points are kept: run the
    same command again after an interruption and it goes on where it stopped.

    Exit code: 0 done, 2 bad usage or missing models, 130 interrupted.

    \b
    Examples:
      me-stats sweep --models bundled:prose bundled:code --grid 11 --rows 64 --text README.md
      me-stats sweep --models smollm2-135m --prompt "Why is the sky blue?" --reference .6,.4 --out sweep-smollm2
    """
    console = Console(stderr=True)
    content = None if text is None else _read(text)
    at = parsed_weights(reference, "--reference")
    check_out(out, "")
    ensemble, prompts, identities = _open(models, prompt, at, device, dtype)
    count = len(ensemble.components)
    at = at or (1 / count,) * count
    from me_stats.record import config_key, plain
    from me_stats.sweep import simplex_grid

    config = {
        "models": models, "prompts": list(prompts), "grid": grid, "rows": rows, "max_new_tokens": max_new_tokens,
        "reference": at, "seed": seed, "device": device, "dtype": dtype.value,
        "text": None if content is None else hashlib.sha256(content.encode()).hexdigest(),
    }  # fmt: skip
    key = config_key("sweep", config)
    path = out / "points.json"
    done = _load(path, key)
    lattice = simplex_grid(count, grid - 1)
    corpus = None if content is None else score_text(ensemble, content)
    options = {"n": rows, "max_new_tokens": max_new_tokens, "reference": at, "corpus": corpus, "seed": seed}
    found = _run(ensemble, prompts, lattice, options, done, path, key, console)

    from me_stats.record import Recorder

    recorder = Recorder("sweep", f"Sweep over λ: {', '.join(models)}", config)
    for name, model in identities:
        recorder.add_model(name, model)
    record = recorder.finish(plain(dataclasses.asdict(found)))
    record.save(out / "sweep.json")
    names = models if len(models) == count else [f"prompt {i + 1}" for i in range(count)]
    labels = [name.rsplit("/", 1)[-1].removeprefix("bundled:") for name in names]
    Console().print(table(found, labels))
    if count in (2, 3):
        from me_stats.report.simplex import sweep_figure
        from me_stats.report.style import save

        caption = _caption(found)
        save(sweep_figure(found, components=labels), out / "sweep", {"caption": caption, "key": record.key})
    drawn = sum(point.drawn for point in found.points)
    console.print(
        f"{len(found.points)} points from {drawn} draws on the grid. Record and figure: {out}",
        highlight=False, markup=False, soft_wrap=True,
    )  # fmt: skip


def score_text(ensemble: Ensemble, text: str) -> NDArray[Any]:
    """(n, K) component log-probabilities of a text's tokens in nats, in windows of 256 of which the first is context.

    Raises ValueError for a text of fewer than three tokens, and for components of different vocabularies.
    """
    import numpy as np

    from me_stats.trace import score
    from me_stats.vocabulary_map import require_one_spelling

    require_one_spelling(ensemble.vocabulary)
    ids = ensemble.vocabulary.encode(text)
    windows = [ids[start : start + _WINDOW] for start in range(0, len(ids), _WINDOW)]
    windows = [window for window in windows if len(window) > 1]
    if sum(len(window) - 1 for window in windows) < 2:
        raise ValueError(f"--text holds {len(ids)} tokens; give a longer text")
    scored = score(ensemble, [window[:1] for window in windows], [window[1:] for window in windows])
    parts = [scored.component_log_probs[row, : len(window) - 1] for row, window in enumerate(windows)]
    return np.concatenate([part.numpy() for part in parts])


def table(found: Sweep, components: Sequence[str]) -> Table:
    """One row per λ with the main estimates; the record and the figure have all of them."""
    shown = [name for name in _COLUMNS if name in found.names]
    out = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False)
    for name in components:
        out.add_column(name, justify="right", no_wrap=True)
    for name in shown:
        out.add_column(_COLUMNS[name], justify="right", no_wrap=True)
    out.add_column("rows", no_wrap=True)
    for point in found.points:
        cells = [_cell(point.estimates[name]) for name in shown]
        origin = "drawn" if point.drawn else f"ESS {point.effective_sample_size:.0f}"
        out.add_row(*(f"{weight:.3g}" for weight in point.weights), *cells, origin)
    out.caption = "Pointwise 95% intervals, nats, TV to the reference λ.\nESS: effective rows of a re-weighted draw."
    return out


_COLUMNS = {
    "entropy_rate": "entropy\na token", "length": "length", "step_tv": "TV\na step", "sequence_tv": "TV\na sequence",
    "nll": "text NLL\na token",
}  # fmt: skip


def _cell(estimate: Estimate) -> str:
    """Value ± half the interval's width, to the first digit of the latter."""
    half = (estimate.interval[1] - estimate.interval[0]) / 2
    if not math.isfinite(estimate.value) or half <= 1e-9 * max(1.0, abs(estimate.value)):  # or mere rounding
        return f"{round(estimate.value, 12):.3g}"
    digits = max(0, -math.floor(math.log10(half)))
    return f"{estimate.value:.{digits}f}±{half:.{digits}f}"


def _run(
    ensemble: Ensemble, prompts: Sequence[Any], lattice: Sequence[tuple[float, ...]], options: dict[str, Any],
    done: list[SweepPoint], path: Path, key: str, console: Console,
) -> Sweep:  # fmt: skip
    from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

    from me_stats.sweep import sweep as walk

    finished = list(done)
    columns = (
        SpinnerColumn(),
        TextColumn("λ grid"),
        BarColumn(bar_width=24),
        TextColumn("{task.completed}/{task.total}"),
        TimeElapsedColumn(),
    )
    with Progress(*columns, console=console, disable=not console.is_terminal) as bar:
        task = bar.add_task("", total=len(lattice), completed=len(finished))

        def keep(point: SweepPoint) -> None:
            finished.append(point)
            _save(path, key, finished)
            bar.advance(task)

        try:
            return walk(ensemble, prompts, lattice, done=done, on_point=keep, **options)
        except KeyboardInterrupt:
            bar.stop()
            console.print(
                f"\ninterrupted: {len(finished)} of {len(lattice)} points are kept in {path}; "
                "the same command goes on from there",
                highlight=False, markup=False, soft_wrap=True,
            )  # fmt: skip
            raise


def _save(path: Path, key: str, points: Sequence[SweepPoint]) -> None:
    from me_stats.record import plain, write_atomically

    write_atomically(
        path, json.dumps({"key": key, "points": plain(points)}, ensure_ascii=False, allow_nan=False) + "\n"
    )


def _load(path: Path, key: str) -> list[SweepPoint]:
    """Points of an earlier run of the same command; nothing from another run or a damaged file."""
    from me_stats.sweep import SweepPoint

    try:
        data = json.loads(path.read_text(encoding="utf-8"))
        return [SweepPoint.from_json(point) for point in data["points"]] if data["key"] == key else []
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return []


def _open(
    models: Sequence[str], prompts: Sequence[str] | None, weights: tuple[float, ...] | None, device: str, dtype: Dtype
) -> tuple[Ensemble, Sequence[Any], Sequence[tuple[str, Any]]]:
    count = max(2, len(models))
    if weights is not None and len(weights) != count:
        raise ValueError(f"--reference has {len(weights)} weights for {count} components; give one each")
    say = partial(print, file=sys.stderr)
    setting = open_models(models, weights=weights or (1 / count,) * count, device=device, dtype=dtype, say=say)
    return setting.ensemble, tuple(prompts) if prompts else setting.prompts, setting.models


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"--text {path} is not UTF-8 text: {error.reason} at byte {error.start}") from error


def _caption(found: Sweep) -> str:
    drawn = sum(point.drawn for point in found.points)
    return (
        f"{found.n} rows of up to {found.max_new_tokens} tokens a draw; squares: rows drawn at {drawn} of "
        f"{len(found.points)} λ, elsewhere the nearest draw re-weighted. Pointwise 95% intervals."
    )
