"""Work for `tests/test_parts.py` that a spawned process can import."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np


def numbers(seed: int, units: int, tick: Callable[[int], None]) -> dict[str, np.ndarray]:
    """Numbers that the seed alone decides, unit by unit."""
    rng = np.random.default_rng(seed)
    drawn = []
    for _ in range(units):
        drawn.append(rng.normal(size=3))
        tick(1)
    return {"drawn": np.array(drawn), "a name": np.array([seed])}


def dies(after: Path, tick: Callable[[int], None]) -> dict[str, np.ndarray]:
    """A process that the system ends, once the file `after` is there."""
    _wait_for(after)
    os._exit(9)


def fails(after: Path, tick: Callable[[int], None]) -> dict[str, np.ndarray]:
    """An error of the part's own, once the file `after` is there."""
    _wait_for(after)
    raise ZeroDivisionError("of this part")


def threads(tick: Callable[[int], None]) -> dict[str, np.ndarray]:
    """How many threads torch has in this process."""
    import torch

    return {"threads": np.array([torch.get_num_threads()])}


def _wait_for(path: Path) -> None:
    end = time.monotonic() + 60
    while not path.exists() and time.monotonic() < end:
        time.sleep(0.01)
