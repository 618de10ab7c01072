"""The main job: run the experiments part by part, keep what is finished, draw.

A part (`me_stats.plans`) is one experiment on one set of models. Its record is written when it is complete, and a run
that finds a record of the same configuration does not do the part again.
"""

from __future__ import annotations

import contextlib
import dataclasses
import inspect
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Executor, wait
from pathlib import Path
from typing import Any

from me_stats.executors import Here
from me_stats.plans import Part
from me_stats.record import Record, experiment_of
from me_stats.report import ABOUT_TESTS
from me_stats.scripts import load

Progress = Callable[[float, str], None]


def finished(part: Part, records: Path) -> Record | None:
    """The part's record, if it was completed with this configuration and all its checks held."""
    path = records / f"{part.name}.json"
    try:
        record = Record.load(path)
    except (OSError, ValueError):
        return None
    return record if record.key == part.key and record.held else None


# Experiments that time something: beside others they would time those too.
TIMED = frozenset({"generation", "power", "repairs", "shared_draws", "speed", "weights"})


def run_all(
    parts: Sequence[Part], records: Path, *, executor: Executor | None = None,
    progress: Progress = lambda done, note: None,
) -> Iterator[tuple[Part, Record]]:  # fmt: skip
    """Run parts and yield each with its record as it ends; `progress` gets parts done, and what runs.

    `executor` runs them in any order, and those of `TIMED` last and one by one; without it they run here, in turn.
    A record does not depend on where it was made: only `wall_s`, `finished`, `environment` and measured times do.
    """
    if executor is None or isinstance(executor, Here):
        for i, part in enumerate(parts):
            progress(i, part.name)
            yield part, run_part(part, records, _within(i, part, progress))
        return
    records = records.resolve()  # workers may stand elsewhere
    together = [part for part in parts if part.experiment not in TIMED]
    rounds = [together, *([part] for part in parts if part.experiment in TIMED)]
    done = 0
    for group in rounds:
        waiting = {executor.submit(_run_elsewhere, part, records): part for part in group}
        try:
            while waiting:
                progress(done, ", ".join(part.name for future, part in waiting.items() if future.running()))
                for future in wait(waiting, timeout=0.5, return_when=FIRST_COMPLETED).done:
                    part = waiting.pop(future)
                    try:
                        record = future.result()
                    except Exception as error:
                        error.add_note(f"in part {part.name}")
                        raise
                    if finished(part, records) is None:  # the worker's disk is another
                        record.save(records / f"{part.name}.json")
                    done += 1
                    yield part, record
        except BaseException:
            for future in waiting:
                future.cancel()
            raise


def _within(done: int, part: Part, progress: Progress) -> Progress:
    return lambda fraction, note: progress(done + fraction, f"{part.name}: {note}")


def _run_elsewhere(part: Part, records: Path) -> Record:
    return run_part(part, records, lambda fraction, note: None, workers=1)


def run_part(part: Part, records: Path, progress: Progress, *, workers: int | None = None) -> Record:
    """Run a part and write its record; experiments that take `workers` get it."""
    run = load("experiments", part.experiment).run
    # Long parts keep what they have done in a folder of their own.
    given = {"work": records.parent / "work", "workers": workers}
    options = {name: given[name] for name in inspect.signature(run).parameters if given.get(name) is not None}
    with _threads(part):
        record: Record = run(part.config, progress, **options)
    record = dataclasses.replace(record, name=part.name)
    record.save(records / f"{part.name}.json")
    return record


@contextlib.contextmanager
def _threads(part: Part) -> Iterator[None]:
    """One thread for tiny models: several gain nothing there, and on a busy machine they wait for each other."""
    import torch

    before = torch.get_num_threads()
    if all(name.startswith("bundled:") for name in getattr(part.config, "models", ())):
        torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


# The order in which a report tells the story: the paper's claims, and then how far our tests can be trusted.
ORDER = (
    "toy_equivalence",
    "per_step",
    "certificate",
    "sequences",
    "cache_floor",
    "transform_order",
    "repairs",
    "generation",
    "speed",
    "mixed_vocabularies",
    "tokenizer_audit",
    "accuracy",
    "weights",
    "sensitivity",
    "routers",
    "long",
    "shared_draws",
    "variance_reduction",
    "audit",
    "long_toys",
    "long_coverage",
    "speed_forecast",
    *ABOUT_TESTS,
)


def rank(name: str) -> int:
    """Place of a record in the report."""
    experiment = experiment_of(name)
    return ORDER.index(experiment) if experiment in ORDER else len(ORDER)


def draw_figures(records: Sequence[Record], folder: Path) -> dict[str, list[Any]]:
    """Figures of each record by record name; an experiment without a figure script has none."""
    figures: dict[str, list[Any]] = {}
    for record in records:
        experiment = experiment_of(record.name)
        if experiment in ORDER:
            try:
                script = load("figures", experiment)
            except FileNotFoundError:
                continue
            figures[record.name] = [script.draw(record, folder)]
    return figures
