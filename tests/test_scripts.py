"""Scripts of the repository are found in a clone and in an installed package."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from me_stats import reproduce as job
from me_stats import scripts


def test_experiments_and_figures_of_the_clone_are_found() -> None:
    for name in job.ORDER:
        module = scripts.load("experiments", name)
        assert name == module.NAME
        assert module.TITLE
        assert scripts.load("experiments", name) is module
        assert callable(scripts.load("figures", name).draw)


def test_a_missing_script_is_named() -> None:
    with pytest.raises(FileNotFoundError, match=r"experiments/absent\.py .* reinstall me_stats"):
        scripts.load("experiments", "absent")


@pytest.fixture
def shipped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An installed package: its scripts lie inside it."""
    package = tmp_path / "me_stats"
    monkeypatch.setattr(scripts, "__file__", str(package / "scripts.py"))
    folder = package / "_shipped" / "experiments"
    folder.mkdir(parents=True)
    return folder


def test_scripts_of_an_installed_package_are_found(shipped: Path) -> None:
    (shipped / "only_shipped.py").write_text("VALUE = 3\n", encoding="utf-8")
    try:
        assert scripts.load("experiments", "only_shipped").VALUE == 3
    finally:
        sys.modules.pop("me_stats_experiments.only_shipped", None)


def test_a_script_that_fails_to_load_is_loaded_anew(shipped: Path) -> None:
    script = shipped / "half_written.py"
    script.write_text("VALUE = 3\nraise RuntimeError('half')\n", encoding="utf-8")
    with pytest.raises(RuntimeError, match="half"):
        scripts.load("experiments", "half_written")
    script.write_text("VALUE = 4  # whole now\n", encoding="utf-8")
    try:
        assert scripts.load("experiments", "half_written").VALUE == 4
    finally:
        sys.modules.pop("me_stats_experiments.half_written", None)
