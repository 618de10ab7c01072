"""Where an executor's work goes: a process, a Ray actor, or Slurm jobs one after the other.

A lane does one request at a time. Requests and answers are bytes, so that all lanes carry the same work, and an error
of the work arrives as what it was.
"""

from __future__ import annotations

import io
import multiprocessing
import pickle
import signal
import sys
import threading
import time
import traceback
from collections.abc import Sequence
from contextlib import suppress
from multiprocessing.connection import Connection, wait
from types import FunctionType
from typing import Any, Protocol

from me_stats.scripts import load

_PATIENCE = 5.0  # seconds that what was told to end is given
_SCRIPTS = "me_stats_"  # how the modules of scripts are named


class LaneDied(Exception):
    """What a lane ran on ended without an answer."""


class Lane(Protocol):
    """`call` answers a request; `units` counts what the request under way has ticked; `close` ends all at once."""

    @property
    def units(self) -> int: ...

    def call(self, request: bytes) -> bytes: ...

    def close(self) -> None: ...


# --- requests and answers ------------------------------------------------------------------------------------------


def packed(value: Any) -> bytes:
    """`value` pickled; classes and functions of experiments too, which no import statement finds.

    Raises TypeError for what cannot be sent, such as a lambda.
    """
    buffer = io.BytesIO()
    try:
        _Pickler(buffer, protocol=pickle.HIGHEST_PROTOCOL).dump(value)
    except (pickle.PicklingError, AttributeError, TypeError) as error:
        raise TypeError(
            f"work for other processes must be a module's function, or a functools.partial of one: {error}"
        ) from error
    return buffer.getvalue()


class _Pickler(pickle.Pickler):
    def reducer_override(self, obj: Any) -> Any:
        module = getattr(obj, "__module__", None)
        if isinstance(obj, (type, FunctionType)) and isinstance(module, str) and module.startswith(_SCRIPTS):
            folder, _, name = module.removeprefix(_SCRIPTS).partition(".")
            return _of_script, (folder, name, obj.__qualname__)
        return NotImplemented


def _of_script(folder: str, name: str, qualified: str) -> Any:
    found: Any = load(folder, name)
    for part in qualified.split("."):
        found = getattr(found, part)
    return found


class _Elsewhere(Exception):
    """The traceback of an error in another process, as its cause."""

    def __str__(self) -> str:
        return f"\n{self.args[0]}"


def answer(request: bytes, path: Sequence[str] = ()) -> bytes:
    """Do a request of `packed` work; the answer holds its value or its error. Modules are looked for along `path`."""
    sys.path += [place for place in path if place not in sys.path]
    try:
        return packed((None, "", pickle.loads(request)()))
    except Exception as error:
        return packed((_sendable(error), traceback.format_exc(), None))


def unpacked(answered: bytes) -> Any:
    """The value of an answer; its error is raised."""
    error, where, value = pickle.loads(answered)
    if error is not None:
        raise error from _Elsewhere(where)
    return value


def _sendable(error: Exception) -> Exception:
    try:
        pickle.loads(packed(error))
    except Exception:
        return RuntimeError(f"{type(error).__name__}: {error}")
    return error


_counter: Any = None  # of this process, if it serves a lane


def tick(units: int) -> None:
    """Tell whoever waits for this work that units of it are done; nothing, where no one can be told."""
    if _counter is not None:
        _counter.value += units


def _begin(threads: int | None) -> None:
    if threads is not None:
        import torch

        torch.set_num_threads(threads)


# --- a process of this machine -------------------------------------------------------------------------------------


class ProcessLane:
    """A process that is started afresh. It ends with this one, after the request under way if this one was killed."""

    def __init__(self, threads: int | None) -> None:
        context = multiprocessing.get_context("spawn")
        self._counter = context.RawValue("q", 0)  # one writer: no lock that a killed process could keep
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(theirs, self._counter, threads))
        self._process.start()
        theirs.close()

    @property
    def units(self) -> int:
        return int(self._counter.value)

    def call(self, request: bytes) -> bytes:
        try:
            self._pipe.send_bytes(request)
            if self._pipe not in wait([self._pipe, self._process.sentinel]):
                raise EOFError
            return self._pipe.recv_bytes()
        except (EOFError, OSError) as error:
            self._process.join(timeout=_PATIENCE)
            raise LaneDied(f"exit code {self._process.exitcode}") from error
        finally:
            self._counter.value = 0

    def close(self) -> None:
        # Its end of the pipe stays open for a thread that may be reading it.
        self._process.terminate()
        self._process.join(timeout=_PATIENCE)
        if self._process.is_alive():
            self._process.kill()
            self._process.join(timeout=_PATIENCE)


def _serve(pipe: Connection, counter: Any, threads: int | None) -> None:
    global _counter
    _counter = counter
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent decides what an interruption ends
    _begin(threads)
    with suppress(EOFError, OSError):  # the parent is gone
        while True:
            pipe.send_bytes(answer(pipe.recv_bytes()))


# --- an actor of a Ray cluster -------------------------------------------------------------------------------------


class RayLane:
    """An actor that keeps its models from one request to the next."""

    units = 0

    def __init__(self, threads: int | None, cpus: float, gpus: float) -> None:
        import ray

        actor: Any = ray.remote(num_cpus=cpus, num_gpus=gpus, max_restarts=0)(_Actor)
        self._actor = actor.remote(sys.path, threads)

    def call(self, request: bytes) -> bytes:
        import ray
        from ray import exceptions

        lost = (exceptions.RayActorError, exceptions.WorkerCrashedError, exceptions.ObjectLostError,
                exceptions.OutOfMemoryError, exceptions.NodeDiedError)  # fmt: skip
        try:
            found: Any = ray.get(self._actor.answer.remote(request))
        except lost as error:
            raise LaneDied(str(error).splitlines()[0]) from error
        return bytes(found)

    def close(self) -> None:
        import ray

        if ray.is_initialized():
            ray.kill(self._actor)


class _Actor:
    def __init__(self, path: Sequence[str], threads: int | None) -> None:
        self._path = path
        _begin(threads)

    def answer(self, request: bytes) -> bytes:
        return answer(request, self._path)


# --- jobs of Slurm -------------------------------------------------------------------------------------------------


class SlurmLane:
    """One job after the other, by submitit's `executor`; `lock` keeps lanes from asking it at once."""

    units = 0

    def __init__(self, executor: Any, lock: threading.Lock, threads: int | None, poll: float) -> None:
        self._executor, self._lock, self._threads, self._poll = executor, lock, threads, poll
        self._job: Any = None
        self._closed = threading.Event()

    def call(self, request: bytes) -> bytes:
        from submitit.core.utils import FailedJobError, UncompletedJobError

        with self._lock:
            if self._closed.is_set():
                raise LaneDied("the run ended")
            self._job = self._executor.submit(_job, request, sys.path, self._threads)
        while not self._done():
            if self._closed.wait(self._poll):
                raise LaneDied("the run ended")
        try:
            found: bytes = self._job.result()
        except (UncompletedJobError, FailedJobError) as error:
            raise LaneDied(" ".join(str(error).splitlines()[:2])) from error
        return found

    def close(self) -> None:
        with self._lock:
            again, job = self._closed.is_set(), self._job
            self._closed.set()
            # Told twice, a local job would stop ending what it started.
            if not again and job is not None and not job.done():
                job.cancel(check=False)
        end = time.monotonic() + _PATIENCE
        while job is not None and not self._done() and time.monotonic() < end:
            time.sleep(0.1)

    def _done(self) -> bool:
        with self._lock:
            return bool(self._job.done())


def _job(request: bytes, path: Sequence[str], threads: int | None) -> bytes:
    _begin(threads)
    return answer(request, path)
