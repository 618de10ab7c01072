"""Executors: the same files and records from all of them, whatever dies on the way, and nothing left behind."""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Executor, Future, ProcessPoolExecutor, ThreadPoolExecutor
from functools import partial, reduce
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from me_stats import lanes, parts, plans
from me_stats import reproduce as job
from me_stats.eprocess import EProcess
from me_stats.evidence import Evidence
from me_stats.executors import ATTEMPTS, Here, Kind, WorkerDied, Workers, open_executor
from me_stats.lanes import Lane, LaneDied
from me_stats.parts import PartOfWork, load_part, run_parts
from me_stats.record import Record, plain
from tests import part_work, tiny

UNITS = (3, 1, 4)
OTHERS: tuple[Kind, ...] = ("processes", "ray", "slurm")


def running(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def gone(pids: set[int], seconds: float = 20.0) -> bool:
    """Whether all of them end within some seconds."""
    end = time.monotonic() + seconds
    while any(map(running, pids)) and time.monotonic() < end:
        time.sleep(0.1)
    return not any(map(running, pids))


@pytest.fixture(scope="module")
def ray() -> Iterator[Any]:
    """A cluster of two cores on this machine, of which nothing is left."""
    ray = pytest.importorskip("ray", reason="needs the extra 'ray'")
    psutil = pytest.importorskip("psutil", reason="tells which processes a cluster has left")
    before = {child.pid for child in psutil.Process().children(recursive=True)}
    with open_executor("ray", 2):  # its own actors, which would hold cores, are never started
        started = {child.pid for child in psutil.Process().children(recursive=True)} - before
        assert len(started) >= 2  # what rules the cluster, and what rules the machine
        yield ray
    assert not ray.is_initialized()
    assert gone(started)


@pytest.fixture(scope="module")
def slurm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Any]]:
    """Options for submitit without Slurm, which forgets a job that left nothing after a second."""
    submitit = pytest.importorskip("submitit", reason="needs the extra 'slurm'")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(submitit.core.core.Job, "_results_timeout_s", 1)
        yield {"cluster": "local", "folder": tmp_path_factory.mktemp("slurm"), "poll": 0.1}


@pytest.fixture(params=OTHERS)
def opened(request: pytest.FixtureRequest) -> Callable[[], Any]:
    """Opens two workers of each kind."""
    options = {}
    if request.param == "ray":
        request.getfixturevalue("ray")
    if request.param == "slurm":
        options = request.getfixturevalue("slurm")
    return partial(open_executor, request.param, 2, threads=None, **options)


def work(name: str = "part") -> list[PartOfWork]:
    return [PartOfWork(f"{name}-{i}", n, partial(part_work.numbers, i, n)) for i, n in enumerate(UNITS)]


# Every kind of worker


def test_files_do_not_depend_on_where_they_are_made(
    opened: Callable[[], Any], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    alone = run_parts(work(), tmp_path / "alone")
    traces = tmp_path / "traces"
    traces.mkdir()
    dying = PartOfWork("part-2", UNITS[2], partial(part_work.killed, 2, UNITS[2], traces, 1))
    seen: list[tuple[int, int]] = []
    with opened() as executor:
        folder = tmp_path / "together"
        together = run_parts([*work()[:2], dying], folder, executor=executor, progress=lambda *now: seen.append(now))
        # An error is that of the part, which is named; what waits is dropped, and the workers go on.
        bad = PartOfWork("bad", 1, partial(part_work.fails, together[0]))
        with pytest.raises(ZeroDivisionError, match="of this part") as found:
            run_parts([bad], folder, executor=executor)
        assert found.value.__notes__ == ["in part bad"]
        assert "in fails" in str(found.value.__cause__)
        with pytest.raises(RuntimeError, match="Odd: one two"):
            executor.submit(part_work.odd).result()
        with pytest.raises(TypeError, match=r"module's function, or a functools\.partial"):
            executor.submit(lambda: 1)
    assert [path.read_bytes() for path in together] == [path.read_bytes() for path in alone]
    assert sorted(path.name for path in folder.iterdir()) == [path.name for path in together]
    assert len(list(traces.iterdir())) == 2  # killed half-way, and run again
    assert seen == sorted(seen)
    assert (seen[0], seen[-1]) == ((0, 8), (8, 8))
    capfd.readouterr()  # Ray tells that a worker died


def test_an_interruption_ends_what_runs(opened: Callable[[], Any], tmp_path: Path) -> None:
    traces = tmp_path / "traces"
    traces.mkdir()
    whole, stuck = work()[0], PartOfWork("stuck", 1, partial(part_work.waits, traces))

    def interrupt(done: int, total: int) -> None:
        if (tmp_path / "out" / "part-0.npz").exists() and list(traces.iterdir()):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt), opened() as executor:
        run_parts([whole, stuck, *work("later")], tmp_path / "out", executor=executor, progress=interrupt)
    assert gone({int(path.name) for path in traces.iterdir()})
    assert load_part(tmp_path / "out" / "part-0.npz") is not None
    assert not (tmp_path / "out" / "stuck.npz").exists()


def test_a_worker_that_someone_kills_loses_nothing(opened: Callable[[], Any], tmp_path: Path) -> None:
    """Its part alone begins again, and what others have finished is not touched."""
    alone = run_parts(work(), tmp_path / "alone")
    traces, folder = tmp_path / "traces", tmp_path / "out"
    traces.mkdir()
    killed: list[int] = []
    kept: dict[str, int] = {}

    def kill(done: int, total: int) -> None:
        first = folder / "part-0.npz"
        if not killed and first.exists() and list(traces.iterdir()):
            kept["inode"] = first.stat().st_ino
            killed.extend(int(path.name) for path in traces.iterdir())
            os.kill(killed[0], signal.SIGKILL)

    stalls = PartOfWork("part-1", 1, partial(part_work.stalls_once, 1, 1, traces))
    with opened() as executor:
        paths = run_parts([work()[0], stalls, work()[2]], folder, executor=executor, progress=kill)
    assert len(killed) == 1
    assert [path.read_bytes() for path in paths] == [path.read_bytes() for path in alone]
    assert paths[0].stat().st_ino == kept["inode"]


def test_what_dies_every_time_is_given_up(tmp_path: Path) -> None:
    traces = tmp_path / "traces"
    traces.mkdir()
    dying = PartOfWork("dies", 3, partial(part_work.killed, 0, 3, traces, ATTEMPTS))
    with open_executor("processes", 2) as executor:
        with pytest.raises(WorkerDied, match=r"died \(exit code -9\), perhaps for want of memory; finished parts"):
            run_parts([dying], tmp_path / "out", executor=executor)
        assert executor.submit(part_work.square, 4).result() == 16
    assert len(list(traces.iterdir())) == ATTEMPTS


# Records


def _tiny() -> list[plans.Part]:
    names = ("generation", "per_step", "toy_equivalence")
    return [plans.Part(name, "siblings" * (name != "toy_equivalence"), _config(name)) for name in names]


def _config(name: str) -> Any:
    return tiny.experiment(name).Config(**tiny.OPTIONS[name])


def lasting(record: Record) -> dict[str, Any]:
    """All of a record but when, for how long and on what it was made."""
    found: dict[str, Any] = plain(record)
    for name in ("wall_s", "finished", "environment"):
        del found[name]
    return found


def test_records_of_two_ray_workers_are_those_of_one_process(ray: Any, tmp_path: Path, one_thread: None) -> None:
    """Those that time something run last, and alone; their times differ, and what they counted does not."""
    order = []
    with open_executor("ray", 2, threads=1) as executor:
        apart = {}
        for part, record in job.run_all(_tiny(), tmp_path / "apart" / "records", executor=executor):
            order.append(part.experiment)
            apart[part.experiment] = record
    assert order[-1] == "generation"
    here = {}
    notes: list[tuple[float, str]] = []
    for part, record in job.run_all(_tiny(), tmp_path / "here" / "records", progress=lambda *now: notes.append(now)):
        here[part.experiment] = record
    assert list(here) == [part.experiment for part in _tiny()]
    assert 2 < max(done for done, _ in notes) <= 3
    for name in ("per_step", "toy_equivalence"):
        assert lasting(apart[name]) == lasting(here[name])
    for name in ("config", "key", "models", "title"):
        assert lasting(apart["generation"])[name] == lasting(here["generation"])[name]
    assert len(list((tmp_path / "apart" / "records").iterdir())) == 3


@pytest.mark.parametrize("kind", ["processes", "slurm"])
def test_records_of_other_workers_are_those_of_one_process(
    kind: Kind, request: pytest.FixtureRequest, tmp_path: Path, one_thread: None
) -> None:
    """Classes of experiments reach a worker that has not loaded them."""
    part = _tiny()[-1]
    with open_executor(kind, **(request.getfixturevalue("slurm") if kind == "slurm" else {})) as executor:
        ((same, record),) = job.run_all([part], tmp_path / "records", executor=executor)
    assert same is part
    assert job.finished(part, tmp_path / "records") == record
    assert lasting(record) == lasting(job.run_part(part, tmp_path / "here", lambda fraction, note: None))
    assert lanes.unpacked(lanes.answer(lanes.packed(partial(type, part.config)))) is type(part.config)


def test_an_error_in_an_experiment_names_its_part(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(config: Any, progress: Any) -> Record:
        raise ZeroDivisionError("in an experiment")

    monkeypatch.setattr(tiny.experiment("per_step"), "run", broken)
    with ThreadPoolExecutor(1) as executor, pytest.raises(ZeroDivisionError) as found:
        list(job.run_all(_tiny(), tmp_path, executor=executor))
    assert found.value.__notes__ == ["in part per_step-siblings"]
    assert not (tmp_path / "generation-siblings.json").exists()


def test_what_is_timed_runs_alone() -> None:
    planned = {part.experiment for part in plans.plan(size="full")}
    assert planned >= job.TIMED
    assert {"speed", "repairs", "generation"} <= job.TIMED


# Merging


def test_e_processes_and_estimates_of_parts_merge_to_those_of_one_run(tmp_path: Path) -> None:
    """In the order of parts, whichever ends first: the same bits. Against one run over all rows: rounding."""
    bounds = [(0, 7), (7, 8), (8, 20), (20, 33)]
    merged: list[dict[str, np.ndarray]] = []
    for waits in ((0.3, 0.2, 0.1, 0.0), (0.0, 0.1, 0.2, 0.3)):
        folder = tmp_path / str(waits[0])
        states = [
            PartOfWork(f"rows-{start:03d}", 1, partial(part_work.evidence, start, stop, wait))
            for (start, stop), wait in zip(bounds, waits, strict=True)
        ]
        with ThreadPoolExecutor(4) as executor:
            files = run_parts(states, folder, executor=executor)
        ended = sorted(range(4), key=lambda i: files[i].stat().st_mtime_ns)
        assert ended == ([3, 2, 1, 0] if waits[0] else [0, 1, 2, 3])
        merged.append(_merged(files).state_dict())
    for name, value in merged[0].items():
        np.testing.assert_array_equal(value, merged[1][name], strict=True)

    whole = EProcess(2)
    whole.update(Evidence.from_scores(*part_work.coins(0, 33)))
    both = _merged(files)
    assert (both.tokens, both.sequences, both.impossible) == (whole.tokens, whole.sequences, whole.impossible)
    assert both.tokens == 33 * 12
    assert both.log_e == pytest.approx(whole.log_e, rel=1e-14)
    for name, value in whole.state_dict().items():
        if name.startswith("totals"):
            np.testing.assert_allclose(both.state_dict()[name], value, rtol=1e-13, atol=1e-13)
    backwards = reduce(EProcess.merge, [_process(path) for path in reversed(files)])
    assert backwards.log_e == pytest.approx(both.log_e, rel=1e-14)
    # The running maximum is over looks, and their order is that of the parts: a planted bug takes what ended first.
    assert not np.array_equal(backwards.looks.tokens, both.looks.tokens)


def _process(path: Path) -> EProcess:
    state = load_part(path)
    assert state is not None
    return EProcess(2).load_state_dict(state)


def _merged(files: list[Path]) -> EProcess:
    return reduce(EProcess.merge, map(_process, files))


# Executors of one's own, and bad input


def test_here_does_the_work_when_it_is_submitted(tmp_path: Path) -> None:
    with open_executor("here") as executor:
        done: list[int] = []
        future = executor.submit(done.append, 1)
        assert (done, future.done()) == ([1], True)
        failed: Future[Any] = executor.submit(part_work.odd)
        assert isinstance(failed.exception(), part_work.Odd)

        def interrupted() -> None:
            raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            executor.submit(interrupted)
        seen: list[tuple[int, int]] = []
        run_parts(work(), tmp_path, executor=executor, progress=lambda *now: seen.append(now))
        assert seen == [(count, 8) for count in (*range(9), 8)]


def test_any_executor_will_do(tmp_path: Path) -> None:
    alone = run_parts(work(), tmp_path / "alone")
    with ProcessPoolExecutor(2, mp_context=get_context("spawn")) as executor:
        together = run_parts(work(), tmp_path / "out", executor=executor)
        assert [path.read_bytes() for path in together] == [path.read_bytes() for path in alone]
        dies = PartOfWork("dies", 1, partial(part_work.dies, together[0]))
        with pytest.raises(WorkerDied, match="died in dies or beside it"):
            run_parts([dies], tmp_path / "out", executor=executor)


def test_files_that_nobody_here_can_see(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parts, "_PATIENCE", 0.3)
    monkeypatch.setattr(parts, "_finish", lambda part, folder, tick: None)
    with ThreadPoolExecutor(1) as executor, pytest.raises(FileNotFoundError, match="a disk that all workers share"):
        run_parts(work(), tmp_path, executor=executor)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"kind": "dask"}, "executor must be one of .*'slurm'.*, got 'dask'"),
        ({"kind": "ray", "workers": 0}, "workers must be at least 1, got 0"),
        ({"kind": "processes", "threads": 0}, "threads must be at least 1, got 0"),
        ({"kind": "processes", "gpus_per_worker": 1}, "'processes' takes neither gpus_per_worker nor"),
        ({"kind": "here", "address": "auto"}, r"'here' takes neither gpus_per_worker nor \['address'\]"),
        ({"kind": "here", "workers": 2}, "'here' is one worker"),
        ({"kind": "slurm", "gpus_per_worker": 0.5}, r"Slurm gives whole GPUs, got gpus_per_worker=0\.5"),
    ],
)
def test_bad_input(given: dict[str, Any], message: str) -> None:
    if given["kind"] == "slurm":
        pytest.importorskip("submitit", reason="needs the extra 'slurm'")
    with pytest.raises(ValueError, match=message), open_executor(**given):
        pass


@pytest.mark.parametrize(("kind", "package"), [("ray", "ray"), ("slurm", "submitit")])
def test_a_missing_extra_is_named(kind: Kind, package: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ValueError, match=rf"pip install 'me-stats\[{kind}\]'"), open_executor(kind):
        pass


# Its log files are closed by nobody.
@pytest.mark.filterwarnings("ignore:Exception ignored in. <_io.FileIO:pytest.PytestUnraisableExceptionWarning")
def test_options_of_slurm_are_checked(slurm: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"slurm: .*queue"), open_executor("slurm", **slurm, queue="fast"):
        pass
    with pytest.raises(ValueError, match=r"slurm: .*srun"), open_executor("slurm", folder=tmp_path):
        pass
    with open_executor("slurm", **{**slurm, "cluster": "debug"}) as executor:
        assert executor.submit(part_work.square, 5).result() == 25


def test_more_than_a_ray_cluster_has_is_refused(ray: Any) -> None:
    with pytest.raises(ValueError, match=r"3 workers want 3 CPUs and 0 GPUs, and the Ray cluster has 2 and "), \
         open_executor("ray", 3):  # fmt: skip
        pass
    with pytest.raises(ValueError, match=r"want 1 CPUs and 99 GPUs"), open_executor("ray", gpus_per_worker=99):
        pass
    with pytest.raises(ValueError, match=r"connected to Ray already; \['address'\] would have no effect"), \
         open_executor("ray", address="auto"):  # fmt: skip
        pass


def test_beside_an_executor_there_are_no_workers(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="give workers and threads to open_executor"):
        run_parts(work(), tmp_path, workers=2, executor=Here())


class _Dead:
    units = 0

    def __init__(self) -> None:
        self.closed = 0

    def call(self, request: bytes) -> bytes:
        raise LaneDied("planted")

    def close(self) -> None:
        self.closed += 1


def test_lanes_that_died_are_closed() -> None:
    made: list[_Dead] = []

    def start() -> Lane:
        made.append(_Dead())
        return made[-1]

    workers = Workers(1, start)
    with pytest.raises(WorkerDied, match="planted"):
        workers.submit(part_work.square, 1).result()
    workers.shutdown(wait=False)
    assert [lane.closed for lane in made] == [1] * ATTEMPTS
    with pytest.raises(RuntimeError, match="after shutdown"):
        workers.submit(part_work.square, 1)


# Speed


@pytest.mark.slow
def test_two_ray_workers_are_nearly_twice_as_fast(ray: Any, tmp_path: Path, one_thread: None) -> None:
    """The best of five, since somebody else may use a core: at least 1.6 times one process."""

    def seconds(name: str, executor: Executor) -> float:
        points = [PartOfWork(f"point-{i}", 1, partial(part_work.swept, i, 500)) for i in range(12)]
        begin = time.perf_counter()
        run_parts(points, tmp_path / name, executor=executor)
        return time.perf_counter() - begin

    run_parts([PartOfWork("warm", 1, partial(part_work.swept, 0, 100))], tmp_path / "warm")
    ratios = []
    with open_executor("ray", 2, threads=1) as executor:
        for warm in [executor.submit(part_work.swept, i, 100, part_work.quiet) for i in range(2)]:
            warm.result()
        for attempt in range(5):
            alone, together = seconds(f"alone-{attempt}", Here()), seconds(f"ray-{attempt}", executor)
            ratios.append(alone / together)
            for path in (tmp_path / f"alone-{attempt}").iterdir():
                assert path.read_bytes() == (tmp_path / f"ray-{attempt}" / path.name).read_bytes()
    print([round(ratio, 2) for ratio in ratios], f"{alone:.1f} s against {together:.1f} s")
    assert max(ratios) >= 1.6
