"""What the doctor says of a machine: what is old, absent, full or forbidden, and what mends it."""

from __future__ import annotations

import importlib.metadata
from collections.abc import Callable
from pathlib import Path

import pytest

from me_stats import doctor

MODEL = "smollm2-135m"


def test_this_machine_is_ready() -> None:
    checks = doctor.look()
    assert all(check.status != "fail" for check in checks)
    names = [check.name for check in checks]
    assert len(set(names)) == len(names)
    assert {"python", "packages", "extras", "threads", "memory", "dtypes on cpu", "models", "disk", "revision"} <= set(
        names
    )


def versions(**other: str | None) -> Callable[[str], str]:
    def version(name: str) -> str:
        found = other.get(name, importlib.metadata.version(name)) if name in other else importlib.metadata.version(name)
        if found is None:
            raise importlib.metadata.PackageNotFoundError(name)
        return found

    return version


def test_packages_that_are_old_or_absent_fail_with_the_command() -> None:
    first, *others = doctor.packages(versions(torch="1.0", typer=None))
    assert first.status == "ok"
    assert "torch" not in first.detail
    found = {check.name: check for check in others}
    assert found["package torch"].detail.startswith("torch 1.0, >=")
    assert found["package torch"].remedy.startswith('pip install "torch>=')
    assert found["package typer"].detail == "typer is not installed"
    assert {check.status for check in others} == {"fail"}


def test_extras_are_named_with_what_they_are_for() -> None:
    absent = doctor.extras(versions(gguf=None))
    assert absent.status == "ok"
    assert "gguf (me-stats models pull)" in absent.detail
    assert 'pip install "me-stats[gguf' in absent.remedy
    old = doctor.extras(versions(gguf="0.1"))
    assert old.status == "warn"
    assert "gguf 0.1, >=" in old.detail


def test_threads_memory_and_folder_warn(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(doctor, "_cores", lambda: 1)
    monkeypatch.setattr("torch.get_num_threads", lambda: 8)
    assert doctor.threads().remedy == "set OMP_NUM_THREADS=1"
    assert doctor.host_memory(lambda device: None).status == "warn"
    assert doctor.host_memory(lambda device: 1 << 20).status == "warn"
    assert doctor.host_memory(lambda device: 1 << 40).status == "ok"
    monkeypatch.setenv("ME_STATS_CACHE", str(tmp_path / "cache"))
    found = {check.name: check for check in doctor.models()}
    assert f"not here: {MODEL}" in found["models"].detail
    assert found["models"].remedy.startswith(f"where needed: me-stats models pull {MODEL}")
    assert not (tmp_path / "cache").exists()

    def refuse(**_: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(doctor.tempfile, "TemporaryFile", refuse)
    check = next(check for check in doctor.models() if check.name == "model folder")
    assert (check.status, "ME_STATS_CACHE" in check.remedy) == ("warn", True)
