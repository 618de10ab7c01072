"""Work in parts: what is kept, what is computed again, and what an interruption or a dead process leaves."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from me_stats import parts as parts_module
from me_stats.parts import PartOfWork, Tick, WorkerDied, load_part, run_parts
from tests import part_work

UNITS = (3, 1, 4)


def counted(calls: list[int]) -> list[PartOfWork]:
    def work(i: int, tick: Tick) -> dict[str, np.ndarray]:
        calls.append(i)
        return part_work.numbers(i, UNITS[i], tick)

    return [PartOfWork(f"part-{i}", units, partial(work, i)) for i, units in enumerate(UNITS)]


def spawned() -> list[PartOfWork]:
    return [PartOfWork(f"part-{i}", units, partial(part_work.numbers, i, units)) for i, units in enumerate(UNITS)]


def read(path: Path) -> tuple[int, int, bytes]:
    found = path.stat()
    return found.st_mtime_ns, found.st_ino, path.read_bytes()


def test_finished_parts_are_kept_and_a_damaged_one_is_computed_again(tmp_path: Path) -> None:
    calls: list[int] = []
    folder = tmp_path / "not there" / "yet"
    paths = run_parts(counted(calls), folder)
    assert calls == [0, 1, 2]
    assert paths == [folder / f"part-{i}.npz" for i in range(3)]
    before = [read(path) for path in paths]
    for i, path in enumerate(paths):
        found = load_part(path)
        assert found is not None
        assert set(found) == {"drawn", "a name"}
        np.testing.assert_array_equal(found["drawn"], np.random.default_rng(i).normal(size=(UNITS[i], 3)))

    assert run_parts(counted(calls), folder) == paths
    assert calls == [0, 1, 2]
    paths[0].unlink()
    paths[2].write_bytes(before[2][2][:-30])
    run_parts(counted(calls), folder)
    assert calls == [0, 1, 2, 0, 2]
    assert read(paths[1]) == before[1]
    assert [path.read_bytes() for path in paths] == [content for _, _, content in before]
    assert sorted(path.name for path in folder.iterdir()) == [path.name for path in paths]  # nothing half-written


CONTENT = {"drawn": np.arange(12.0).reshape(4, 3), "a name": np.array([7])}


@given(data=st.data())
def test_a_damaged_file_is_no_part(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    folder = tmp_path_factory.mktemp("damaged")
    path = folder / "part.npz"
    (written,) = run_parts([PartOfWork("part", 1, lambda tick: CONTENT)], folder)
    assert written == path
    whole = path.read_bytes()
    damaged = bytearray(whole)
    if data.draw(st.booleans()):
        damaged[data.draw(st.integers(0, len(whole) - 1))] ^= 1 << data.draw(st.integers(0, 7))
    else:
        del damaged[data.draw(st.integers(0, len(whole) - 1)) :]
    path.write_bytes(bytes(damaged))
    found = load_part(path)
    if found is not None:  # a bit that says nothing about the arrays, such as one of a date
        assert {name: values.tolist() for name, values in found.items()} == {
            name: values.tolist() for name, values in CONTENT.items()
        }


def test_what_is_no_part_at_all(tmp_path: Path) -> None:
    assert load_part(tmp_path / "absent.npz") is None
    assert load_part(tmp_path) is None
    np.save(tmp_path / "array.npy", np.zeros(3))
    (tmp_path / "array.npy").rename(tmp_path / "array.npz")
    assert load_part(tmp_path / "array.npz") is None
    np.savez(tmp_path / "pickled.npz", value=np.array([{}], dtype=object))
    assert load_part(tmp_path / "pickled.npz") is None
    with pytest.raises(ValueError, match=r"[Oo]bject arrays"):  # and none can be written
        run_parts([PartOfWork("part", 1, lambda tick: {"value": np.array([{}], dtype=object)})], tmp_path)


@pytest.mark.parametrize("workers", [0, -1])
def test_workers_are_at_least_one(tmp_path: Path, workers: int) -> None:
    with pytest.raises(ValueError, match=f"workers must be at least 1, got {workers}"):
        run_parts(spawned(), tmp_path / "out", workers=workers)
    assert not (tmp_path / "out").exists()


def test_names_are_distinct(tmp_path: Path) -> None:
    calls: list[int] = []
    with pytest.raises(ValueError, match="parts must have distinct names"):
        run_parts([*counted(calls), *counted(calls)[:1]], tmp_path)
    assert calls == []


def test_nothing_to_do(tmp_path: Path) -> None:
    seen: list[tuple[int, int]] = []
    assert run_parts([], tmp_path, progress=lambda *given: seen.append(given)) == []
    assert seen == [(0, 0), (0, 0)]


def test_progress_goes_forward_to_the_end(tmp_path: Path) -> None:
    seen: list[tuple[int, int]] = []
    run_parts(counted([]), tmp_path, progress=lambda *given: seen.append(given))
    assert seen == [(done, 8) for done in (*range(9), 8)]
    (tmp_path / "part-2.npz").unlink()
    seen.clear()
    run_parts(counted([]), tmp_path, progress=lambda *given: seen.append(given))
    assert seen == [(done, 8) for done in (*range(4, 9), 8)]  # kept parts count from the start

    def eager(tick: Tick) -> dict[str, np.ndarray]:
        tick(50)
        return CONTENT

    seen.clear()
    run_parts([PartOfWork("eager", 2, eager), PartOfWork("lazy", 2, lambda tick: CONTENT)], tmp_path,
              progress=lambda *given: seen.append(given))  # fmt: skip
    assert seen == [(0, 4), (4, 4), (4, 4)]


@pytest.mark.parametrize("error", [ZeroDivisionError, KeyboardInterrupt, MemoryError])
def test_an_error_ends_the_run_and_keeps_what_was_finished(tmp_path: Path, error: type[BaseException]) -> None:
    calls: list[int] = []
    whole = counted(calls)

    def broken(tick: Tick) -> dict[str, np.ndarray]:
        tick(1)
        raise error("in the second part")

    with pytest.raises(error, match="in the second part"):
        run_parts([whole[0], PartOfWork("part-1", 1, broken), whole[2]], tmp_path)
    assert calls == [0]
    assert [path.name for path in tmp_path.iterdir()] == ["part-0.npz"]
    run_parts(whole, tmp_path)
    assert calls == [0, 1, 2]


def test_an_interruption_while_a_part_is_written_leaves_no_half(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(path: Path, content: bytes) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(parts_module, "write_atomically", interrupted)
        with pytest.raises(KeyboardInterrupt):
            run_parts(spawned(), tmp_path)
    assert list(tmp_path.iterdir()) == []


# Further processes, each of which takes a second to start


def test_several_processes_leave_the_same_files_and_the_progress_of_all(tmp_path: Path) -> None:
    seen: list[tuple[int, int]] = []
    alone = run_parts(spawned(), tmp_path / "one")
    thread = PartOfWork("threads", 1, part_work.threads)
    together = run_parts([*spawned(), thread], tmp_path / "two", workers=2, threads=1,
                         progress=lambda *given: seen.append(given))  # fmt: skip
    assert [path.read_bytes() for path in together[:3]] == [path.read_bytes() for path in alone]
    assert seen[0] == (0, 9)
    assert seen[-1] == (9, 9)
    assert seen == sorted(seen)
    found = load_part(together[3])
    assert found is not None
    assert found["threads"].tolist() == [1]
    assert {path.suffix for path in (tmp_path / "two").iterdir()} == {".npz"}


def ends(tmp_path: Path, work: Callable[..., dict[str, np.ndarray]], error: type[BaseException]) -> str:
    """What a run says whose second part waits for the first and then does `work`; the first is kept."""
    last = PartOfWork("bad", 1, partial(work, tmp_path / "part-0.npz"))
    with pytest.raises(error) as found:
        run_parts([spawned()[0], last], tmp_path, workers=2)
    assert [path.name for path in tmp_path.iterdir()] == ["part-0.npz"]
    assert load_part(tmp_path / "part-0.npz") is not None
    return str(found.value)


def test_a_process_that_dies_is_named_with_the_remedy(tmp_path: Path) -> None:
    assert issubclass(WorkerDied, RuntimeError)
    said = ends(tmp_path, part_work.dies, WorkerDied)
    assert "a worker of the run died" in said
    assert "finished parts are kept: run again with fewer workers or a smaller batch" in said


def test_an_error_of_a_part_in_another_process_is_the_error_of_the_run(tmp_path: Path) -> None:
    assert ends(tmp_path, part_work.fails, ZeroDivisionError) == "of this part"


def running(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def test_an_interruption_ends_the_processes(tmp_path: Path) -> None:
    import multiprocessing

    before = set(multiprocessing.active_children())

    def interrupt(done: int, total: int) -> None:
        if (tmp_path / "part-0.npz").exists():
            raise KeyboardInterrupt

    waits = PartOfWork("waits", 1, partial(part_work.fails, tmp_path / "never"))
    with pytest.raises(KeyboardInterrupt):
        run_parts([spawned()[0], waits], tmp_path, workers=2, progress=interrupt)
    # Who reaps a process first is a race that `is_alive` may lose, so the system is asked.
    left = {process.pid for process in set(multiprocessing.active_children()) - before}
    for _ in range(200):
        left = {pid for pid in left if pid is not None and running(pid)}
        if not left:
            break
        time.sleep(0.1)
    assert not left
    assert [path.name for path in tmp_path.iterdir()] == ["part-0.npz"]
