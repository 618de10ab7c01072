"""Records: whole or absent, readable again, and silent about the machine that made them."""

from __future__ import annotations

import builtins
import errno
import json
import math
import os
import platform
import re
import subprocess
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
import torch

from me_stats import record as module
from me_stats.record import (
    Finding,
    Record,
    Recorder,
    Verdict,
    config_key,
    load_records,
    plain,
    write_atomically,
)
from tests import tiny

FINDING: dict[str, Any] = {
    "claim": "C1",
    "statement": "one step",
    "models": "toys",
    "n": "42 laws",
    "statistic": "TV 1e-16",
    "tv_upper": 1e-16,
    "bound": "exact",
    "verdict": "reproduced",
    "held": True,
}


@dataclass(frozen=True)
class Config:
    """A configuration with the shapes that experiments use."""

    shapes: tuple[tuple[int, int], ...] = ((2, 3),)
    seed: int = 0


def finished(results: dict[str, Any] | None = None, **changes: Any) -> Record:
    """A record as an experiment would leave it."""
    recorder = Recorder("demo", "A demonstration", Config(**changes))
    recorder.find(**FINDING)
    recorder.check("a planted bug is rejected", True)
    return recorder.finish({"value": 0.5} if results is None else results)


class _Breaking:
    """A file that takes half of what it is given and then fails."""

    def __init__(self, file: Any, error: BaseException) -> None:
        self.file, self.error = file, error

    def __enter__(self) -> _Breaking:
        return self

    def __exit__(self, *_: object) -> None:
        self.file.close()

    def write(self, data: bytes) -> int:
        self.file.write(data[: len(data) // 2])
        self.file.flush()
        raise self.error


def break_writes(monkeypatch: pytest.MonkeyPatch, error: BaseException) -> None:
    fdopen = os.fdopen
    monkeypatch.setattr(module.os, "fdopen", lambda *args, **options: _Breaking(fdopen(*args, **options), error))


# Writing


@pytest.mark.parametrize(
    "error", [OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)), KeyboardInterrupt(), MemoryError()], ids=repr
)
@pytest.mark.parametrize("existing", [True, False])
def test_a_failing_write_keeps_the_old_file_and_no_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: BaseException, existing: bool
) -> None:
    path = tmp_path / "records" / "demo.json"
    if existing:
        finished({"value": 1}).save(path)
    before = path.read_bytes() if existing else None
    break_writes(monkeypatch, error)
    with pytest.raises(type(error)):
        finished({"value": 2}).save(path)
    monkeypatch.undo()
    assert [file.name for file in path.parent.iterdir()] == (["demo.json"] if existing else [])
    if existing:
        assert path.read_bytes() == before
        assert Record.load(path).results == {"value": 1}


def test_a_write_that_stops_before_the_rename_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(self: Path, target: Path) -> Path:
        raise KeyboardInterrupt

    monkeypatch.setattr(Path, "replace", interrupted)
    with pytest.raises(KeyboardInterrupt):
        write_atomically(tmp_path / "a.txt", "text")
    assert list(tmp_path.iterdir()) == []


def test_a_naive_write_would_lose_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The control: without the temporary file the same failure leaves half a record."""
    path = tmp_path / "demo.json"
    finished({"value": 1}).save(path)
    before = path.read_bytes()
    opened = builtins.open

    def naive(target: Path, content: str) -> None:
        with _Breaking(opened(target, "wb"), OSError(errno.ENOSPC, "full")) as file:
            file.write(content.encode())

    monkeypatch.setattr(module, "write_atomically", naive)
    with pytest.raises(OSError, match="full"):
        finished({"value": 2}).save(path)
    assert path.read_bytes() != before
    with pytest.raises(ValueError, match="not a me_stats record"):
        Record.load(path)


def test_files_are_readable_as_the_umask_says(tmp_path: Path) -> None:
    old = os.umask(0o027)
    try:
        write_atomically(tmp_path / "a" / "b.txt", "x")
    finally:
        os.umask(old)
    assert (tmp_path / "a" / "b.txt").stat().st_mode & 0o777 == 0o640


# Round trip


def test_round_trip(tmp_path: Path) -> None:
    record = finished({"tensor": torch.tensor([0.5, 1.0]), "array": np.arange(3), "λ": {"nested": (1, None, True)}})
    record.save(tmp_path / "demo.json")
    again = Record.load(tmp_path / "demo.json")
    assert again == record
    assert again.results == {"tensor": [0.5, 1.0], "array": [0, 1, 2], "λ": {"nested": [1, None, True]}}
    assert again.config == {"shapes": [[2, 3]], "seed": 0}
    assert again.findings == (Finding(**FINDING),)
    assert again.held
    again.save(tmp_path / "again.json")
    assert (tmp_path / "again.json").read_bytes() == (tmp_path / "demo.json").read_bytes()
    assert load_records([tmp_path / "demo.json"]) == {"demo": record}


@pytest.mark.parametrize("value", [math.nan, np.float64("nan"), np.array([0.0, np.nan]), torch.tensor(math.nan)])
def test_nan_is_refused(value: Any) -> None:
    with pytest.raises(ValueError, match="NaN"):
        finished({"deep": [{"value": value}]})


def test_nan_in_a_finding_is_refused(tmp_path: Path) -> None:
    recorder = Recorder("demo", "A demonstration", {})
    recorder.find(**(FINDING | {"tv_upper": math.nan}))
    with pytest.raises(ValueError, match="NaN"):
        recorder.finish({}).save(tmp_path / "demo.json")
    assert list(tmp_path.iterdir()) == []


def test_infinities_become_text_that_every_json_reader_takes(tmp_path: Path) -> None:
    record = finished({"high": math.inf, "low": [np.float32("-inf")], "tensor": torch.tensor([math.inf])})
    assert record.results == {"high": "inf", "low": ["-inf"], "tensor": ["inf"]}
    record.save(tmp_path / "demo.json")

    def refuse(constant: str) -> float:
        raise AssertionError(constant)

    read = json.loads((tmp_path / "demo.json").read_text(encoding="utf-8"), parse_constant=refuse)
    assert float(read["results"]["low"][0]) == -math.inf


def test_plain_keeps_json_types_and_names_of_paths() -> None:
    assert plain({1: Path("/somewhere/private/model"), "b": (True, None, "x")}) == {
        "1": "model",
        "b": [True, None, "x"],
    }
    assert type(plain(np.float32(0.5))) is float
    assert type(plain(np.bool_(True))) is bool
    assert type(plain(np.int64(3))) is int


# Keys


def test_key_changes_with_name_config_seed_schema_and_version(monkeypatch: pytest.MonkeyPatch) -> None:
    keys = [
        config_key("demo", Config()),
        config_key("other", Config()),
        config_key("demo", Config(seed=1)),
        config_key("demo", Config(shapes=((2, 4),))),
    ]
    monkeypatch.setattr("me_stats.__version__", "0.0.0")
    keys.append(config_key("demo", Config()))
    monkeypatch.undo()
    monkeypatch.setattr(module, "SCHEMA", 0)
    keys.append(config_key("demo", Config()))
    assert len(set(keys)) == len(keys)


def test_key_is_the_same_from_a_config_and_from_its_record(tmp_path: Path) -> None:
    record = finished(seed=3)
    record.save(tmp_path / "demo.json")
    again = Record.load(tmp_path / "demo.json")
    assert record.key == config_key("demo", Config(seed=3)) == config_key("demo", again.config)


# Loading


def damaged(**changes: Any) -> str:
    return json.dumps(plain(finished()) | changes)


GARBAGE: dict[str, str | bytes] = {
    "empty": "",
    "no json": "me_stats",
    "half a file": damaged()[:-40],
    "a list": "[]",
    "a number": "3",
    "null": "null",
    "a string": '"record"',
    "another object": '{"name": "demo"}',
    "not utf-8": b"\xff\xfe\x00",
    "deeply nested": "[" * 200_000,
    "findings null": damaged(findings=None),
    "findings of numbers": damaged(findings=[1]),
    "findings with an unknown field": damaged(findings=[FINDING | {"colour": "red"}]),
    "findings with an unknown verdict": damaged(findings=[FINDING | {"verdict": "proved"}]),
    "checks a list": damaged(checks=[True]),
    "results null": damaged(results=None),
    "models null": damaged(models=None),
    "wall time text": damaged(wall_s="long"),
    "another schema": damaged(schema=module.SCHEMA + 1),
}


@pytest.mark.parametrize("content", GARBAGE.values(), ids=GARBAGE.keys())
def test_garbage_is_a_value_error_that_names_the_file(tmp_path: Path, content: str | bytes) -> None:
    path = tmp_path / "broken.json"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ValueError, match=r"broken\.json is not a me_stats record"):
        Record.load(path)


def test_a_missing_file_is_an_os_error(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        Record.load(tmp_path / "absent.json")


# Checks and findings


@pytest.mark.parametrize("verdict", get_args(Verdict))
def test_the_four_verdicts_are_taken(verdict: Any) -> None:
    assert Finding(**(FINDING | {"verdict": verdict})).verdict == verdict


@pytest.mark.parametrize("verdict", ["", "Reproduced", "proved", "open", None])
def test_other_verdicts_are_refused(verdict: Any) -> None:
    with pytest.raises(ValueError, match="verdict must be one of"):
        Finding(**(FINDING | {"verdict": verdict}))


def test_a_finding_is_a_check_and_one_failure_fails_the_record() -> None:
    recorder = Recorder("demo", "A demonstration", {})
    recorder.find(**FINDING)
    assert recorder.finish({}).held
    recorder.find(**(FINDING | {"held": False, "statement": "two steps"}))
    record = recorder.finish({})
    assert record.checks == {"C1: one step (toys)": True, "C1: two steps (toys)": False}
    assert not record.held


def test_a_later_success_hides_no_failure() -> None:
    recorder = Recorder("demo", "A demonstration", {})
    assert recorder.check("same name", False) is False
    assert recorder.check("same name", True) is True
    assert not recorder.finish({}).held


def test_a_comparison_with_nan_does_not_hold() -> None:
    recorder = Recorder("demo", "A demonstration", {})
    recorder.check("nan", float("nan") < 1)
    assert recorder.finish({}).checks == {"nan": False}


def test_a_record_is_frozen() -> None:
    with pytest.raises(AttributeError):
        finished().checks = {}  # type: ignore[misc]
    assert replace(finished(), name="other").name == "other"


# Provenance


@pytest.mark.parametrize("name", ["toy_equivalence", "transform_order"])
def test_a_record_of_a_real_run_names_no_path_and_no_host(tmp_path: Path, name: str) -> None:
    tiny.record(name).save(tmp_path / "record.json")
    text = (tmp_path / "record.json").read_text(encoding="utf-8")
    secrets = (str(Path.home()), str(Path.cwd()), platform.node(), str(tmp_path))
    for secret in secrets:
        if len(secret) > 3:  # a shorter one, such as "/" or "vm", turns up by chance
            assert not re.search(rf"(?<!\w){re.escape(secret)}(?!\w)", text), secret
    assert tiny.record(name).environment["versions"]["me-stats"] is not None
    assert tiny.record(name).environment["versions"]["torch"]


def test_models_are_identified() -> None:
    models = tiny.record("transform_order").models
    assert [model["name"] for model in models] == ["bundled:prose", "bundled:code"]
    assert all(re.fullmatch(r"[0-9a-f ]{64,}", model["source"]["sha256"]) for model in models)
    assert models[0]["source"] != models[1]["source"]
    assert models[0]["vocabulary"] == models[1]["vocabulary"]
    assert all(model["dtype"] == "float32" and model["parameters"] > 0 for model in models)


@pytest.fixture
def repository(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., str]:
    """A git repository of somebody else, with me_stats' record.py lying in it."""
    folder = tmp_path / "project"
    (folder / "site-packages" / "me_stats").mkdir(parents=True)
    for name in ("GIT_DIR", "GIT_WORK_TREE", "GIT_INDEX_FILE"):
        monkeypatch.delenv(name, raising=False)

    def git(*arguments: str) -> str:
        who = ["-c", "user.name=a", "-c", "user.email=a@example.org", "-c", "commit.gpgsign=false"]
        run = subprocess.run(
            ["git", "-C", str(folder), *who, *arguments], capture_output=True, text=True, check=True, timeout=60
        )
        return run.stdout.strip()

    try:
        git("init", "--quiet")
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("git is not installed")
    place = folder / "site-packages" / "me_stats" / "record.py"
    place.write_text("installed\n", encoding="utf-8")
    (folder / "other.txt").write_text("theirs\n", encoding="utf-8")
    git("add", "other.txt")
    git("commit", "--quiet", "-m", "theirs")
    monkeypatch.setattr(module, "__file__", str(place))
    return git


def test_the_revision_of_a_project_that_me_stats_is_installed_in_is_not_ours(repository: Callable[..., str]) -> None:
    assert module._git() is None


def test_revision_and_dirty_flag(repository: Callable[..., str]) -> None:
    repository("add", ".")
    repository("commit", "--quiet", "-m", "ours")
    assert module._git() == {"revision": repository("rev-parse", "HEAD"), "dirty": False}
    Path(str(module.__file__)).write_text("changed\n", encoding="utf-8")
    assert module._git() == {"revision": repository("rev-parse", "HEAD"), "dirty": True}


def test_without_git_a_record_has_no_revision(monkeypatch: pytest.MonkeyPatch) -> None:
    def absent(*_: Any, **__: Any) -> None:
        raise FileNotFoundError("git")

    monkeypatch.setattr(module.subprocess, "run", absent)
    assert module.environment()["git"] is None
