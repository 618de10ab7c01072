"""Work in parts that are kept as soon as they are done: resumable, in one process or several.

A part is a function of its arguments alone, seeded by what it is and not by when it runs, so a run that was killed and
goes on leaves the same files as one that was not.
"""

from __future__ import annotations

import io
import multiprocessing
import signal
import zipfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from me_stats.record import write_atomically

Tick = Callable[[int], None]
Arrays = dict[str, np.ndarray]
# What numpy and zipfile raise for a damaged file: a flipped bit may ask for a password or for terabytes.
_UNREADABLE = (OSError, ValueError, EOFError, KeyError, TypeError, zipfile.BadZipFile, RuntimeError, MemoryError)


class WorkerDied(RuntimeError):
    """A process of the run ended without a word, such as for want of memory."""


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
    progress
        Called with units done, those of kept parts included, and units in all, about twice a second.

    Raises
    ------
    WorkerDied
        A RuntimeError, if a process died, such as for want of memory: what others finished is kept.
    """
    if workers < 1:
        raise ValueError(f"workers must be at least 1, got {workers}")
    if len({part.name for part in parts}) < len(parts):
        raise ValueError("parts must have distinct names")
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / f"{part.name}.npz" for part in parts]
    missing = [part for part, path in zip(parts, paths, strict=True) if load_part(path) is None]
    total = sum(part.units for part in parts)
    kept = total - sum(part.units for part in missing)
    progress(kept, total)
    if workers == 1 or len(missing) < 2:
        done = kept

        def tick(units: int) -> None:
            nonlocal done
            done += units
            progress(min(done, total), total)

        for part in missing:
            _finish(part, folder, tick)
    else:
        _in_processes(missing, folder, min(workers, len(missing)), threads, lambda new: progress(kept + new, total))
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


def _in_processes(
    parts: Sequence[PartOfWork], folder: Path, workers: int, threads: int | None, report: Callable[[int], None]
) -> None:
    context = multiprocessing.get_context("spawn")
    counter = context.Value("q", 0)
    strangers = set(multiprocessing.active_children())
    executor = ProcessPoolExecutor(workers, mp_context=context, initializer=_begin, initargs=(counter, threads))
    try:
        waiting: set[Future[None]] = {executor.submit(_work, part, folder) for part in parts}
        while waiting:
            finished, waiting = wait(waiting, timeout=0.5, return_when=FIRST_COMPLETED)
            _raise_first(finished)
            report(min(counter.value, sum(part.units for part in parts)))
        executor.shutdown()
    except BaseException as error:
        executor.shutdown(wait=False, cancel_futures=True)
        ours = set(multiprocessing.active_children()) - strangers
        for process in ours:
            process.terminate()
        for process in ours:
            process.join(timeout=5)
        if isinstance(error, BrokenProcessPool):
            raise WorkerDied(
                "a process of the run died, perhaps for want of memory; finished parts are kept: run again with fewer "
                "workers or a smaller batch"
            ) from error
        raise


def _raise_first(finished: Iterable[Future[None]]) -> None:
    for future in finished:
        future.result()


_counter: Any = None  # of this worker process


def _begin(counter: Any, threads: int | None) -> None:
    global _counter
    _counter = counter
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent decides what an interruption ends
    if threads is not None:
        import torch

        torch.set_num_threads(threads)


def _add(units: int) -> None:
    with _counter.get_lock():
        _counter.value += units


def _work(part: PartOfWork, folder: Path) -> None:
    _finish(part, folder, _add)
