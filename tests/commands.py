"""What a command of me-stats leaves behind, and records for it to read."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from tests import tiny


@dataclass
class Result:
    """What a command left on the terminal."""

    code: int
    out: str
    err: str

    @property
    def line(self) -> str:
        """The one line that an early mistake prints."""
        assert self.out == ""
        (line,) = self.err.splitlines()
        assert line.startswith("me-stats: ")
        return line


Run = Callable[..., Result]


def save_records(folder: Path) -> Path:
    """Two records of two sets of models, in a folder."""
    for name in ("toy_equivalence", "generation"):
        tiny.record(name).save(folder / f"{name}.json")
    return folder
