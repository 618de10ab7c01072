"""Work for `tests/test_parts.py` and `tests/test_executors.py` that a spawned process can import."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

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


def late(seed: int, units: int, seconds: float, tick: Callable[[int], None]) -> dict[str, np.ndarray]:
    """`numbers`, after a while."""
    time.sleep(seconds)
    return numbers(seed, units, tick)


def killed(seed: int, units: int, traces: Path, times: int, tick: Callable[[int], None]) -> dict[str, np.ndarray]:
    """`numbers`, whose process is killed half-way the first `times` times; each leaves a file with its number."""
    begun = len(list(traces.iterdir()))
    (traces / f"{begun}-{os.getpid()}").touch()
    rng = np.random.default_rng(seed)
    for unit in range(units):
        if begun < times and unit == units // 2:
            os.kill(os.getpid(), signal.SIGKILL)
        rng.normal(size=3)
        tick(1)
    return numbers(seed, units, lambda _: None)


def waits(traces: Path, tick: Callable[[int], None]) -> dict[str, np.ndarray]:
    """Leaves a file with the number of its process, and does not end by itself."""
    (traces / str(os.getpid())).touch()
    time.sleep(600)
    return {}


def square(number: int) -> int:
    return number**2


class Odd(Exception):
    """An error that cannot be sent: pickle would call it with one argument."""

    def __init__(self, first: str, second: str) -> None:
        super().__init__(f"{first} {second}")


def odd() -> None:
    raise Odd("one", "two")


def coins(start: int, stop: int) -> tuple[Any, Any, Any]:
    """Tokens, component scores and weights of rows `start` to `stop` of a sampler that keeps its component."""
    import torch

    rows = [np.random.default_rng([7, row]) for row in range(start, stop)]
    once = np.array([rng.integers(2) for rng in rows])[:, None]
    tokens = np.where(np.array([rng.random(12) for rng in rows]) < 0.8, once, 1 - once)
    laws = np.array([[0.8, 0.2], [0.2, 0.8]])
    scores = torch.tensor(np.log(laws.T[tokens]))
    return scores, torch.log(torch.tensor([0.5, 0.5])), torch.tensor(tokens)


def evidence(start: int, stop: int, seconds: float, tick: Callable[[int], None]) -> dict[str, np.ndarray]:
    """The state of an e-process that was fed some rows, after a while."""
    from me_stats.eprocess import EProcess
    from me_stats.evidence import Evidence

    time.sleep(seconds)
    process = EProcess(2)
    process.update(Evidence.from_scores(*coins(start, stop)))
    return process.state_dict()


def quiet(units: int) -> None:
    pass


def swept(seed: int, rows: int, tick: Callable[[int], None]) -> dict[str, np.ndarray]:
    """A sweep over λ of two toys, which keeps one core busy."""
    import torch

    from me_stats.mixing import ConstantMixing
    from me_stats.models import Ensemble, MarkovModel
    from me_stats.sweep import simplex_grid, sweep

    torch.set_num_threads(1)
    models = [MarkovModel.random(20, seed=2 * seed + i) for i in range(2)]
    ensemble = Ensemble(models, ConstantMixing([0.5, 0.5]))
    found = sweep(ensemble, [(0,)], simplex_grid(2, 4), n=rows, max_new_tokens=24, seed=seed)
    tick(1)
    return {name: np.array(found.series(name)) for name in found.names}


def stalls_once(seed: int, units: int, traces: Path, tick: Callable[[int], None]) -> dict[str, np.ndarray]:
    """`waits` the first time, and then `numbers`."""
    if not list(traces.iterdir()):
        return waits(traces, tick)
    return numbers(seed, units, tick)
