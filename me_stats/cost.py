"""What a run costs: its forwards counted without a clock, and their time from a few measured ones.

A forward reads all weights once, whatever it is fed; it multiplies the body with every token fed, and the output layer
for every law asked for; and it looks at the keys and values of every row once. CE and ME feed the same tokens: each
component ingests each token. So ME does not save the multiplications of the body. It saves *passes* over the weights, K
to 1 for a row alone; output layers, K laws to 1; and passes over keys, K to 1. The last two stay at any batch.

`me_work` and `ce_work` count a run exactly as the sessions do (`Cost`); a `ForwardTime`, which `calibrate` gets from a
few measured forwards and `me_stats.hardware` from a data sheet, turns the count into seconds; `speed_up` compares the
two arms.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.optimize import nnls

from me_stats.forward_time import Measured, Span, calibrate
from me_stats.models.base import Cost
from me_stats.schedule import serves

__all__ = [
    "ForwardTime", "Measured", "Outside", "Span", "SpeedUp", "Work", "calibrate", "calibrate_outside", "ce_work",
    "crossover_batch", "forward_seconds", "me_work", "predicted_seconds", "speed_up",
]  # fmt: skip

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]

_PATH_TOKENS = 2048  # of the paths behind a forecast, which leave a percent or so to chance


@dataclass(frozen=True, eq=False)
class Work:
    """The F forwards of a run, in order, and what happens between them.

    Attributes
    ----------
    component
        (F,) whose forward it is.
    rows
        (F,) laws read.
    fed
        (F,) tokens fed.
    context
        (F,) keys that the rows look at: the sum of their lengths, the tokens that are fed included.
    tokens
        Tokens written by the run.
    draws
        Times that a batch of tokens is drawn: once a forward for ME, once a step for CE.
    mixed
        Laws that are added to others: K - 1 for each law of the mixture, none for ME.
    """

    component: Ints
    rows: Ints
    fed: Ints
    context: Ints
    tokens: int
    draws: int
    mixed: int = 0

    @property
    def cost(self) -> Cost:
        """The counts as a trace has them."""
        return Cost(len(self.rows), int(self.fed.sum()), int(self.rows.sum()))


def me_work(
    path: ArrayLike,
    *,
    prompt_length: int | ArrayLike,
    prompt_index: ArrayLike | None = None,
    lockstep: bool = False,
    horizon: int | None = None,
) -> Work:
    """Work of ME along the component path (N, T), -1 after the end of a row; the rows run as one batch.

    A component feeds a row the tokens written since its last turn, and the prompt at the first turn of the first row of
    a prompt: other rows copy its keys and values, in a forward of their own where they are read together with it.

    Parameters
    ----------
    prompt_length
        Tokens of the prompt; one for each prompt with `prompt_index`.
    prompt_index
        (N,) the prompt of each row; by default all rows continue one.
    lockstep
        Every row at the same step, as under a router; else rows drift apart (`me_stats.schedule`).
    horizon
        Tokens that each row might have had, if no row came so far; default T.

    Raises ValueError for a path that is no path, and for prompts without tokens or of another number.

    >>> me_work([[0, 1, 1, 0]], prompt_length=5).fed.tolist()  # a prompt, a prompt and 1 token, 1 token, 3 tokens
    [5, 6, 1, 3]
    """
    grid = np.asarray(path)
    if grid.ndim != 2 or not np.issubdtype(grid.dtype, np.integer) or not grid.size or (grid[:, 0] < 0).any():
        raise ValueError(f"path must be (N, T) integers, -1 only after the end of a row, got {grid.dtype} {grid.shape}")
    own, lengths = _prompts(len(grid), prompt_length, prompt_index)
    # Reading a prompt's law counts as a turn of all its rows: those that did not compute it copy it.
    last = np.zeros((int(grid.max()) + 1, len(grid)), dtype=np.int64)
    stored = np.zeros((len(last), len(lengths)), dtype=bool)
    forwards: list[tuple[int, int, int, int]] = []
    draws = 0
    for serve in serves(grid, lockstep=lockstep, horizon=horizon):
        i, rows, prompts = serve.component, serve.rows, own[serve.rows]
        draws += 1
        if serve.steps[0] == 0:
            distinct = np.unique(prompts)
            stored[i, distinct] = True
            fed = int(lengths[distinct].sum())
            forwards.append((i, len(distinct), fed, fed))
            continue
        span, known = serve.steps - last[i, rows], lengths[prompts] + serve.steps
        late = np.flatnonzero(~stored[i, prompts])
        first = late[np.unique(prompts[late], return_index=True)[1]]
        span[first] += lengths[prompts[first]]
        copying = np.zeros(len(rows), dtype=bool)
        copying[late] = True
        copying[first] = False
        forwards += [
            (i, int(part.sum()), int(span[part].sum()), int(known[part].sum()))
            for part in (~copying, copying)
            if part.any()
        ]
        stored[i, prompts] = True
        last[i, rows] = serve.steps
    return _work(forwards, tokens=int((grid >= 0).sum()), draws=draws)


def ce_work(
    n_rows: int,
    steps: int,
    k: int,
    *,
    prompt_length: int | ArrayLike,
    prompt_index: ArrayLike | None = None,
    lengths: ArrayLike | None = None,
) -> Work:
    """Work of CE with `k` components over `n_rows` rows of `steps` tokens; with k = 1, of one model alone.

    Every step runs all components on all rows that go on, `lengths` (N,) tokens each if given. Other arguments and
    errors as of `me_work`.

    >>> work = ce_work(2, 3, 2, prompt_length=5)
    >>> work.fed.tolist(), work.rows.tolist()
    ([5, 5, 2, 2, 2, 2], [1, 1, 2, 2, 2, 2])
    """
    if min(n_rows, steps, k) < 1:
        raise ValueError(f"n_rows, steps and k must be at least 1, got {n_rows}, {steps} and {k}")
    own, prompts = _prompts(n_rows, prompt_length, prompt_index)
    ends = np.full(n_rows, steps) if lengths is None else np.minimum(np.asarray(lengths), steps)
    if ends.shape != (n_rows,) or (ends < 1).any():
        raise ValueError(f"lengths must be {n_rows} numbers of at least 1, one for each row")
    distinct = np.unique(own)
    fed = int(prompts[distinct].sum())
    forwards = [(i, len(distinct), fed, fed) for i in range(k)]
    draws = int(ends.max())
    for step in range(1, draws):
        going = ends > step
        n, keys = int(going.sum()), int((prompts[own[going]] + step).sum())
        forwards += [(i, n, n, keys) for i in range(k)]
    laws = sum(rows for _, rows, _, _ in forwards) // k
    return _work(forwards, tokens=int(ends.sum()), draws=draws, mixed=(k - 1) * laws)


def _prompts(n_rows: int, prompt_length: int | ArrayLike, index: ArrayLike | None) -> tuple[Ints, Ints]:
    """Prompt (N,) of each row, and length (P,) of each prompt."""
    if index is None and np.ndim(prompt_length):
        raise ValueError("prompt_length must be one number; give prompt_index too for rows of several prompts")
    own = np.zeros(n_rows, dtype=np.int64) if index is None else np.asarray(index, dtype=np.int64)
    if own.shape != (n_rows,) or (own < 0).any():
        raise ValueError(f"prompt_index must be {n_rows} numbers of at least 0, one for each row")
    lengths = np.asarray(prompt_length, dtype=np.int64)
    if lengths.ndim == 0:
        lengths = np.full(int(own.max()) + 1, lengths)
    if lengths.ndim != 1 or len(lengths) <= own.max() or (lengths < 1).any():
        raise ValueError("prompt_length must be at least 1, and one number for each prompt that prompt_index names")
    return own, lengths


def _work(forwards: list[tuple[int, int, int, int]], *, tokens: int, draws: int, mixed: int = 0) -> Work:
    component, rows, fed, context = np.array(forwards, dtype=np.int64).T
    return Work(component, rows, fed, context, tokens, draws, mixed)


class ForwardTime(Protocol):
    """How long a forward takes; arguments as the arrays of `Work`."""

    def seconds(self, rows: ArrayLike, fed: ArrayLike, context: ArrayLike) -> Floats:
        """Seconds (F,) of forwards that read `rows` laws, are fed `fed` tokens and look at `context` keys."""
        ...


@dataclass(frozen=True)
class Outside:
    """Seconds that a run spends outside its forwards: each draw of a batch, each token, each law that is mixed in."""

    per_draw: float = 0.0
    per_token: float = 0.0
    per_mixed: float = 0.0

    def seconds(self, work: Work) -> float:
        """Seconds outside the forwards of a run."""
        return self.per_draw * work.draws + self.per_token * work.tokens + self.per_mixed * work.mixed


def forward_seconds(work: Work, times: Sequence[ForwardTime]) -> Floats:
    """Seconds (F,) of each forward of a run, by the `times` of its components.

    Raises ValueError where a component has no time.
    """
    if int(work.component.max()) >= len(times):
        raise ValueError(
            f"times must hold one for each of {int(work.component.max()) + 1} components, got {len(times)}"
        )
    seconds = np.zeros(len(work.rows))
    for i, time in enumerate(times):
        own = work.component == i
        if own.any():
            seconds[own] = time.seconds(work.rows[own], work.fed[own], work.context[own])
    return seconds


def predicted_seconds(work: Work, times: Sequence[ForwardTime], *, outside: Outside | None = None) -> float:
    """Seconds of a run: its forwards one after the other, and what `outside` says (default: nothing).

    >>> class Flat:
    ...     def seconds(self, rows, fed, context):
    ...         return np.full(len(rows), 0.5)
    >>> predicted_seconds(ce_work(4, 10, 2, prompt_length=3), [Flat(), Flat()])
    10.0
    """
    total = float(forward_seconds(work, times).sum())
    return total if outside is None else total + outside.seconds(work)


def calibrate_outside(runs: Sequence[tuple[Work, float]], times: Sequence[Sequence[ForwardTime]]) -> Outside:
    """The time outside the forwards, from whole runs (work, seconds) and the `times` of the components of each.

    Non-negative least squares on relative errors. Runs that have no draws, tokens or mixed laws in some proportion of
    their own leave that term at 0: give decoding of one model at two batches, and one run of CE.

    Raises ValueError for no runs, or seconds that are not positive.
    """
    if not runs or len(runs) != len(times):
        raise ValueError(f"runs must be (work, seconds) with times for each, got {len(runs)} and {len(times)}")
    seconds = _positive("runs", [second for _, second in runs])
    inside = np.array([predicted_seconds(work, own) for (work, _), own in zip(runs, times, strict=True)])
    design = np.array([[work.draws, work.tokens, work.mixed] for work, _ in runs], dtype=np.float64)
    # What forwards do not explain may be negative by their error; it then counts as none.
    found = nnls(design / seconds[:, None], np.maximum(seconds - inside, 0) / seconds)[0]
    return Outside(*found.tolist())


def _positive(name: str, values: Sequence[float]) -> Floats:
    seconds = np.asarray(values, dtype=np.float64)
    if not (np.isfinite(seconds).all() and (seconds > 0).all()):
        raise ValueError(f"{name} must have finite positive seconds; measure them again")
    return seconds


@dataclass(frozen=True)
class SpeedUp:
    """Forecast of one ensemble at one batch.

    Attributes
    ----------
    ce_seconds, me_seconds
        Of the same number of tokens.
    tokens
        Tokens that each writes.
    ce_forwards, me_forwards
        Passes over the weights of some component, per step of the batch.
    """

    ce_seconds: float
    me_seconds: float
    tokens: int
    ce_forwards: float
    me_forwards: float

    @property
    def ratio(self) -> float:
        """How many times faster ME is."""
        return self.ce_seconds / self.me_seconds

    @property
    def ce_speed(self) -> float:
        """Tokens a second of CE."""
        return self.tokens / self.ce_seconds

    @property
    def me_speed(self) -> float:
        """Tokens a second of ME."""
        return self.tokens / self.me_seconds


def speed_up(
    times: Sequence[ForwardTime],
    weights: ArrayLike,
    *,
    batch: int = 1,
    steps: int = 256,
    prompt_length: int = 100,
    lockstep: bool = False,
    outside: Outside | None = None,
    seed: int = 0,
) -> SpeedUp:
    """ME against CE for `batch` rows of one prompt, by component paths (batch, steps) drawn from `weights` (K,).

    Few tokens have few draws of components, so the mean over as many paths is taken as have 2,048 tokens: where sizes
    differ, the ratio moves with `seed` by about a percent.

    Raises ValueError if `weights` is not a law over `times`.

    >>> class Passes:
    ...     def seconds(self, rows, fed, context):
    ...         return np.ones(len(rows))
    >>> speed_up([Passes(), Passes()], [0.5, 0.5], steps=50).ratio
    2.0
    """
    law = np.asarray(weights, dtype=np.float64)
    if law.shape != (len(times),) or (law < 0).any() or abs(law.sum() - 1) > 1e-6:
        raise ValueError(f"weights must be {len(times)} numbers of at least 0 that sum to 1, one for each of times")
    if batch < 1 or steps < 1:
        raise ValueError(f"batch and steps must be at least 1, got {batch} and {steps}")
    runs = max(1, _PATH_TOKENS // (batch * steps))
    paths = np.random.default_rng(seed).choice(len(law), size=(runs, batch, steps), p=law / law.sum())
    works = [me_work(path, prompt_length=prompt_length, lockstep=lockstep) for path in paths]
    ce = ce_work(batch, steps, len(law), prompt_length=prompt_length)
    return SpeedUp(
        predicted_seconds(ce, times, outside=outside),
        sum(predicted_seconds(work, times, outside=outside) for work in works) / runs,
        ce.tokens,
        ce.cost.forwards / steps,
        sum(work.cost.forwards for work in works) / (runs * steps),
    )


def crossover_batch(
    times: Sequence[ForwardTime],
    weights: ArrayLike,
    *,
    factor: float = 1.05,
    largest: int = 4096,
    steps: int = 128,
    prompt_length: int = 100,
    lockstep: bool = False,
    outside: Outside | None = None,
    seed: int = 0,
) -> int | None:
    """Smallest batch at which ME is less than `factor` times as fast as CE; None if it is more at all up to `largest`.

    ``factor=1`` asks where ME stops paying. Batches double until the ratio falls under `factor`, and are then halved
    in between, which takes the ratio as falling there. It may rise again at larger batches, where keys outweigh the
    weights. Other arguments as of `speed_up`.
    """
    if factor <= 0 or largest < 1:
        raise ValueError(f"factor must be positive and largest at least 1, got {factor} and {largest}")

    def under(batch: int) -> bool:
        found = speed_up(
            times, weights, batch=batch, steps=steps, prompt_length=prompt_length, lockstep=lockstep,
            outside=outside, seed=seed,
        )  # fmt: skip
        return found.ratio < factor

    low, high = 0, 1
    while not under(high):
        if high == largest:
            return None
        low, high = high, min(2 * high, largest)
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if under(middle) else (middle, high)
    return high
