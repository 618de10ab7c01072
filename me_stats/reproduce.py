"""The main job: run the experiments part by part, keep what is finished, draw.

A part (`me_stats.plans`) is one experiment on one set of models. Its record is written when it is complete, and a run
that finds a record of the same configuration does not do the part again.
"""

from __future__ import annotations

import contextlib
import dataclasses
import inspect
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

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


def run_part(part: Part, records: Path, progress: Progress) -> Record:
    """Run a part and write its record."""
    run = load("experiments", part.experiment).run
    # Long parts keep what they have done in a folder of their own.
    resumable = {"work": records.parent / "work"} if "work" in inspect.signature(run).parameters else {}
    with _threads(part):
        record: Record = run(part.config, progress, **resumable)
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
