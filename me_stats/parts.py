"""Work in parts that are kept as soon as they are done: resumable, in one process or several.

A part is a function of its arguments alone, seeded by what it is and not by when it runs, so a run that was killed and
goes on leaves the same files as one that was not.
"""

from __future__ import annotations

import io
import os
import time
import zipfile
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, BrokenExecutor, Executor, wait
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from me_stats.executors import Here, WorkerDied, Workers, open_executor
from me_stats.lanes import tick as tell
from me_stats.record import write_atomically

Tick = Callable[[int], None]
Arrays = dict[str, np.ndarray]
# What numpy and zipfile raise for a damaged file: a flipped bit may ask for a password or for terabytes.
_UNREADABLE = (OSError, ValueError, EOFError, KeyError, TypeError, zipfile.BadZipFile, RuntimeError, MemoryError)

_PATIENCE = 90.0  # seconds after which a network's disk shows what another machine wrote


@dataclass(frozen=True)
class PartOfWork:
    """``work(tick)`` returns arrays by name and calls `tick` with units done, `units` in all. `name` is its file's.

    `work` must be picklable where several processes run: a module's function, or a `functools.partial` of one.
    """

    name: str
    units: int
    work: Callable[[Tick], Arrays]


def run_parts(
    parts: Sequence[PartOfWork],
    folder: Path,
    *,
    workers: int = 1,
    threads: int | None = None,
    executor: Executor | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> list[Path]:
    """Run what `folder` does not hold yet and return the file of each part, in order.

    Parameters
    ----------
    folder
        Holds one ``<name>.npz`` a part, written atomically by whoever computed it. A damaged file is computed again.
    workers
        Processes. 1 runs here; more are started afresh and end with the run.
    threads
        Threads of each further process; None leaves torch's choice.
    executor
        Runs the parts instead, in any order: `executors.open_executor`, or another whose workers see `folder`.
    progress
        Called with units done, those of kept parts included, and units in all, about twice a second. Of an `executor`
        on other machines only finished parts are known.

    Raises
    ------
    WorkerDied
        A RuntimeError, if what a part ran on died time and again, such as for want of memory: what others finished is
        kept.
    Exception
        That of a part, with a note that names it. Parts that wait are dropped.
    """
    if workers < 1:
        raise ValueError(f"workers must be at least 1, got {workers}")
    if executor is not None and (workers > 1 or threads is not None):
        raise ValueError("give workers and threads to open_executor, not beside an executor")
    if len({part.name for part in parts}) < len(parts):
        raise ValueError("parts must have distinct names")
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / f"{part.name}.npz" for part in parts]
    missing = [part for part, path in zip(parts, paths, strict=True) if load_part(path) is None]
    total = sum(part.units for part in parts)
    kept = total - sum(part.units for part in missing)
    progress(kept, total)
    if isinstance(executor, Here) or (executor is None and (workers == 1 or len(missing) < 2)):
        done = kept

        def tick(units: int) -> None:
            nonlocal done
            done += units
            progress(min(done, total), total)

        for part in missing:
            with _named(part):
                _finish(part, folder, tick)
    elif executor is not None:
        _submit(missing, folder, executor, lambda new: progress(kept + new, total))
    else:
        with open_executor("processes", min(workers, len(missing)), threads=threads) as own:
            _submit(missing, folder, own, lambda new: progress(kept + new, total))
    progress(total, total)
    return paths


@contextmanager
def open_part(path: Path) -> Iterator[Any]:
    """The file of a finished part, whose arrays are read when they are asked for; ValueError for a damaged one."""
    try:
        # Opened here: of a damaged file numpy would leave its own handle open.
        with path.open("rb") as file, np.load(file, allow_pickle=False) as part:
            yield part
    except _UNREADABLE as error:
        raise ValueError(f"{path.name} is missing or damaged ({error}); run again to compute it") from error


def load_part(path: Path) -> Arrays | None:
    """The arrays of a finished part; None where there is none, or a damaged one."""
    try:
        with open_part(path) as part:
            return {name: part[name] for name in part.files}
    except ValueError:
        return None


def _finish(part: PartOfWork, folder: Path, tick: Tick) -> None:
    buffer = io.BytesIO()
    np.savez(buffer, allow_pickle=False, **part.work(tick))
    write_atomically(folder / f"{part.name}.npz", buffer.getvalue())


def _submit(parts: Sequence[PartOfWork], folder: Path, executor: Executor, report: Callable[[int], None]) -> None:
    folder = folder.resolve()  # workers may stand elsewhere
    waiting = {}
    done = seen = 0
    try:
        for part in parts:
            with _named(part):
                waiting[executor.submit(_work, part, folder)] = part
        while waiting:
            for future in wait(waiting, timeout=0.5, return_when=FIRST_COMPLETED).done:
                part = waiting.pop(future)
                with _named(part):
                    future.result()
                    _await(folder / f"{part.name}.npz")
                done += part.units
            running = executor.units if isinstance(executor, Workers) else 0
            # A part that a worker took with it begins again.
            seen = max(seen, min(done + running, sum(part.units for part in parts)))
            report(seen)
    except BaseException:
        for future in waiting:
            future.cancel()
        raise


@contextmanager
def _named(part: PartOfWork) -> Iterator[None]:
    try:
        yield
    except BrokenExecutor as error:
        raise WorkerDied(
            f"a worker of the run died in {part.name} or beside it, perhaps for want of memory; finished parts are "
            "kept: run again with fewer workers or a smaller batch"
        ) from error
    except Exception as error:
        error.add_note(f"in part {part.name}")
        raise


def _await(path: Path) -> None:
    """Wait until a file that a worker wrote is seen here; FileNotFoundError if it is on another disk."""
    end = time.monotonic() + _PATIENCE
    while not path.exists():
        if time.monotonic() > end:
            raise FileNotFoundError(
                f"{path.name} was written where this machine does not see it: choose an output folder on a disk that "
                "all workers share"
            )
        os.listdir(path.parent)  # which asks a network's disk again
        time.sleep(0.2)


def _work(part: PartOfWork, folder: Path) -> None:
    _finish(part, folder, tell)
