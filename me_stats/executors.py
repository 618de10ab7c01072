"""Executors of `concurrent.futures`: this process, processes, a Ray cluster, Slurm.

Whatever a run is cut into, its parts are independent and seeded by what they are, so where and in which order they run
decides no number. Work goes to others as pickled functions of modules; work whose process, actor or job died is done
again.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, Literal, get_args

from me_stats.lanes import Lane, LaneDied, ProcessLane, RayLane, SlurmLane, packed, unpacked

Kind = Literal["here", "processes", "ray", "slurm"]
ATTEMPTS = 3  # the first of which may find a machine that is taken away
_RAY_STORE = 128 * 2**20  # bytes; what parts return is small
_INSTALL = "'{kind}' needs another package: pip install 'me-stats[{kind}]'"


class WorkerDied(RuntimeError):
    """What some work ran on ended without a word, time and again, such as for want of memory."""


@contextmanager
def open_executor(
    kind: Kind, workers: int = 1, *, threads: int | None = None, gpus_per_worker: float = 0, **options: Any
) -> Iterator[Executor]:
    """An executor that does `workers` pieces of work at once; leaving it by an error ends what still runs.

    Parameters
    ----------
    kind
        ``"here"`` does the work when it is submitted, one after the other. ``"processes"`` starts processes of this
        machine, ``"ray"`` actors of a Ray cluster, and ``"slurm"`` keeps so many jobs in Slurm's queue.
    threads
        Of torch, in each worker; None leaves the choice to torch, Ray or Slurm. Ray and Slurm reserve as many cores.
        Sums of many numbers may differ in their last bits between numbers of threads.
    gpus_per_worker
        Of Ray and Slurm, which show a worker no other GPU; below 1, workers of Ray share one.
    options
        Of ``ray.init``, such as ``address`` (default: $RAY_ADDRESS, else a cluster of this machine for this run). Of
        submitit's ``update_parameters``, such as ``slurm_partition`` and ``timeout_min``; and ``folder`` for its logs
        (default ``slurm``), ``cluster`` (``"local"`` to try it without Slurm), ``poll`` in seconds between looks.

    Raises
    ------
    ValueError
        An unknown kind, a missing extra, options that the kind does not take, or more than a Ray cluster has.
    WorkerDied
        A RuntimeError, from ``result()``: what the work ran on ended `ATTEMPTS` times.

    Examples
    --------
    >>> with open_executor("here") as executor:
    ...     list(executor.map(abs, [-1, 2]))
    [1, 2]
    """
    if kind not in get_args(Kind):
        raise ValueError(f"executor must be one of {get_args(Kind)}, got {kind!r}")
    if workers < 1:
        raise ValueError(f"workers must be at least 1, got {workers}")
    if threads is not None and threads < 1:
        raise ValueError(f"threads must be at least 1, got {threads}")
    if kind in ("here", "processes"):
        if gpus_per_worker or options:
            raise ValueError(f"'{kind}' takes neither gpus_per_worker nor {sorted(options) or 'other options'}; "
                             "'ray' and 'slurm' do")  # fmt: skip
        if kind == "here":
            if workers > 1 or threads is not None:
                raise ValueError("'here' is one worker, with the threads of this process; 'processes' has several")
            yield Here()
            return
        with _ending(Workers(workers, partial(ProcessLane, threads))) as executor:
            yield executor
    elif kind == "ray":
        cpus = threads or 1
        with _ray(workers, cpus, gpus_per_worker, options), \
             _ending(Workers(workers, partial(RayLane, threads, cpus, gpus_per_worker))) as executor:  # fmt: skip
            yield executor
    else:
        with _ending(Workers(workers, _slurm_lanes(threads, gpus_per_worker, options))) as executor:
            yield executor


class Here(Executor):
    """Does what is submitted at once, in this process."""

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        future: Future[Any] = Future()
        future.set_running_or_notify_cancel()
        try:
            future.set_result(fn(*args, **kwargs))
        except Exception as error:  # an interruption is nobody's result
            future.set_exception(error)
        return future


class Workers(ThreadPoolExecutor):
    """Lanes, each with a thread that waits for its answers and opens another when it dies."""

    def __init__(self, count: int, start: Callable[[], Lane]) -> None:
        super().__init__(count, thread_name_prefix="me-stats")
        self._start = start
        self._mine = threading.local()
        self._lanes: set[Lane] = set()
        self._guard = threading.Lock()
        self._ended = False

    @property
    def units(self) -> int:
        """What the work under way has ticked (`lanes.tick`), as far as that is known."""
        with self._guard:
            return sum(lane.units for lane in self._lanes)

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        return super().submit(self._call, packed(partial(fn, *args, **kwargs)))

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        super().shutdown(wait=wait, cancel_futures=cancel_futures)
        if wait:
            self._close()
        else:  # lanes are needed until the threads are through
            threading.Thread(target=self.shutdown).start()

    def end(self) -> None:
        """End everything that runs, and drop what waits."""
        super().shutdown(wait=False, cancel_futures=True)
        self._close()
        super().shutdown()

    def _close(self) -> None:
        with self._guard:
            self._ended = True
            lanes, self._lanes = self._lanes, set()
        for lane in lanes:
            lane.close()

    def _call(self, request: bytes) -> Any:
        for left in reversed(range(ATTEMPTS)):
            lane = self._lane()
            try:
                return unpacked(lane.call(request))
            except LaneDied as died:
                self._mine.lane = None
                with self._guard:
                    self._lanes.discard(lane)
                    ended = self._ended
                lane.close()
                if ended or not left:
                    raise WorkerDied(
                        f"a worker of the run died ({died}), perhaps for want of memory; finished parts are kept: run "
                        "again with fewer workers or a smaller batch"
                    ) from died
        raise AssertionError("unreachable")

    def _lane(self) -> Lane:
        """The lane of this thread."""
        lane: Lane | None = getattr(self._mine, "lane", None)
        if lane is None:
            with self._guard:
                if self._ended:
                    raise WorkerDied("the run ended before this work began")
                lane = self._mine.lane = self._start()
                self._lanes.add(lane)
        return lane


@contextmanager
def _ending(executor: Workers) -> Iterator[Workers]:
    try:
        yield executor
    except BaseException:
        executor.end()
        raise
    executor.shutdown()


@contextmanager
def _ray(workers: int, cpus: int, gpus: float, options: dict[str, Any]) -> Iterator[None]:
    """A Ray cluster: the one that this process is connected to, the one that is named, or one of this machine."""
    try:
        import ray
    except ModuleNotFoundError as error:
        raise ValueError(_INSTALL.format(kind="ray")) from error

    ours = not ray.is_initialized()
    if ours:
        address = options.pop("address", None) or os.environ.get("RAY_ADDRESS") or "local"
        quiet: dict[str, Any] = {"logging_level": "ERROR", "log_to_driver": False}
        if address == "local":
            # Ray would report home, let workers give way to all else on the machine, which distorts what they time, and
            # take a third of the memory for a store of large objects.
            os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
            os.environ.setdefault("RAY_worker_niceness", "0")
            quiet |= {"num_cpus": workers * cpus, "include_dashboard": False, "object_store_memory": _RAY_STORE}
        ray.init(address=address, **(quiet | options))
    elif options:
        raise ValueError(f"this process is connected to Ray already; {sorted(options)} would have no effect")
    try:
        there = ray.cluster_resources()
        wanted = {"CPU": workers * cpus, "GPU": workers * gpus}
        if any(there.get(name, 0) < amount for name, amount in wanted.items()):
            raise ValueError(
                f"{workers} workers want {wanted['CPU']:g} CPUs and {wanted['GPU']:g} GPUs, and the Ray cluster has "
                f"{there.get('CPU', 0):g} and {there.get('GPU', 0):g}; ask for fewer"
            )
        yield
    finally:
        if ours:
            ray.shutdown()


def _slurm_lanes(threads: int | None, gpus: float, options: dict[str, Any]) -> Callable[[], Lane]:
    try:
        import submitit
    except ModuleNotFoundError as error:
        raise ValueError(_INSTALL.format(kind="slurm")) from error

    if gpus != int(gpus):
        raise ValueError(f"Slurm gives whole GPUs, got gpus_per_worker={gpus}")
    folder = Path(options.pop("folder", "slurm")).resolve()
    poll = float(options.pop("poll", 1.0))
    try:
        executor = submitit.AutoExecutor(folder, cluster=options.pop("cluster", "slurm"))
        executor.update_parameters(
            **({"name": "me-stats", "cpus_per_task": threads or 1, "gpus_per_node": int(gpus)} | options)
        )
    except (RuntimeError, NameError) as error:  # no Slurm here; an option that submitit does not know
        raise ValueError(f"slurm: {error}") from error
    return partial(SlurmLane, executor, threading.Lock(), threads, poll)
