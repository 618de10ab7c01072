r"""Which component runs next, and for which rows: ME over rows that may drift apart.

With constant weights the component path of every row is known before its first forward, and rows do not depend on each
other. ME in lockstep runs every component that some row drew, at every step: all K of them in a large batch. Rows that
may stand at different steps wait instead, each for its own component, and a forward serves all that wait for it.

**Two components, λ = 1/2, B rows.** Let m rows wait for the fuller component. Serving them sends m/2 to the other one,
which then holds B - m/2: a stationary queue has m = B - m/2, so m = 2B/3, and one step of all rows takes 1.5 forwards,
not 2. For any λ, a component that runs at every p-th serve makes its rows wait (p + 1)/2 serves, so one step takes
:math:`\sum_i λ_i (p_i + 1)/2` forwards, and as :math:`\sum_i 1/p_i = 1` no periods do better than
:math:`p_i \propto λ_i^{-1/2}`:

.. math:: \tfrac12 \Bigl(1 + \bigl(\sum_i \sqrt{λ_i}\bigr)^2\Bigr)

(1.5, 2, 2.5 for 2, 3, 4 equal weights, 1.22 for (.95, .05); a large batch over many steps). Serving the fullest queue
makes all queues equally full when served, so p_i ∝ 1/λ_i and a step takes (K + 1)/2 forwards whatever λ is: more than
lockstep for skewed weights and few rows. Serving the queue that has waited longest in total gives the right periods:
λ_i p_i rows that wait p_i/2 each come to the same for all i when p_i ∝ λ_i^{-1/2}.

**The end.** A run takes as long as its slowest row, so rows count less the further they stand ahead of the slowest:
e^{-1} for each of τ steps, τ = 2, and less near the end (1/32 of the steps that are left). So no row waits for ever.

Sources: the square-root rule is that of broadcast schedules (Ammar and Wong, 1985); the sequence of serves is a common
supersequence of all rows' paths, whose shortest one is NP-hard to find, and serving the fullest queue is its "majority
merge". The discount is ours, chosen by simulation.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike

_DRIFT = 2.0  # steps ahead of the slowest row at which a row counts e times less
_TAIL = 1 / 32  # the same, as a share of the steps that are left


@dataclass(frozen=True, eq=False)
class Serve:
    """One forward of one component: the rows (R,) that it serves, ascending, and the step (R,) that each writes."""

    component: int
    rows: np.ndarray
    steps: np.ndarray


class Schedule:
    """Serves every row and step of a component path once, in the order of steps, by the component that was drawn.

    A serve takes all rows that wait for its component: the one whose rows have waited longest in total (see the
    module), of equals the lowest. Step 0 is served in lockstep, as rows of one prompt share their first law.

    Parameters
    ----------
    path
        (N, T) components; -1 from the end of a row on.
    lockstep
        All rows stand at the same step: one serve for each component that some row drew, in the order of components.
    horizon
        Steps of a whole run, if the path is not all known (see `extend`); default T.

    Raises
    ------
    ValueError
        For a path that is no grid of integers, that has an entry after a -1, or that is longer than the horizon.

    Examples
    --------
    >>> schedule = Schedule([[0, 0, 1], [1, 0, 1], [1, 1, 1]])
    >>> [(serve.component, serve.rows.tolist(), serve.steps.tolist()) for serve in iter(schedule.next, None)]
    [(0, [0], [0]), (1, [1, 2], [0, 0]), (0, [0, 1], [1, 1]), (1, [0, 1, 2], [2, 2, 1]), (1, [2], [2])]
    """

    def __init__(self, path: ArrayLike, *, lockstep: bool = False, horizon: int | None = None) -> None:
        self._path = _checked(path)
        self._horizon = self._path.shape[1] if horizon is None else horizon
        _require_room(self._path, self._horizon)
        self._lockstep = lockstep
        rows = len(self._path)
        self._step = np.zeros(rows, dtype=np.int64)
        self._since = np.zeros(rows, dtype=np.int64)  # serves that were made before a row began to wait
        self._served = 0
        self._ended = np.zeros(rows, dtype=bool)

    def extend(self, path: ArrayLike) -> None:
        """Append later steps (N, S) of the path. Rows that stand at its end are not served before they have some."""
        longer = _checked(np.concatenate([self._path, np.asarray(path, dtype=self._path.dtype)], axis=1))
        _require_room(longer, self._horizon)
        self._path = longer

    def next(self) -> Serve | None:
        """The next forward, whose rows count as one step further from now on; None if no row waits."""
        waiting = np.flatnonzero(~self._ended & (self._step < self._path.shape[1]))
        drawn = self._path[waiting, self._step[waiting]]
        if len(drawn) and drawn.min() < 0:
            waiting, drawn = waiting[drawn >= 0], drawn[drawn >= 0]
        if not len(waiting):
            return None
        ahead = self._step[waiting]
        slowest = int(ahead.min())
        ahead = ahead - slowest
        if self._lockstep or slowest == 0:
            waiting, drawn = waiting[ahead == 0], drawn[ahead == 0]
            component = int(drawn.min())
        else:
            scale = min(_DRIFT, (self._horizon - slowest) * _TAIL)
            waited = self._served - self._since[waiting] + 1
            component = int(np.bincount(drawn, weights=waited * np.exp(-ahead / scale)).argmax())
        rows = waiting[drawn == component]
        steps = self._step[rows]
        self._step[rows] += 1
        self._served += 1
        self._since[rows] = self._served
        return Serve(component, rows, steps)

    def end(self, rows: ArrayLike) -> None:
        """Take `rows` out: they are never served again."""
        self._ended[np.asarray(rows, dtype=np.int64)] = True


def serves(
    path: ArrayLike, *, lockstep: bool = False, lengths: ArrayLike | None = None, horizon: int | None = None
) -> Iterator[Serve]:
    """Every forward of a run over `path` (N, T), in order, as `Schedule` makes them.

    ``lengths`` (N,), if given, are the steps after which rows end. A run that was allowed more steps than its longest
    row took went by that `horizon`.

    >>> path = np.random.default_rng(0).choice(2, size=(64, 200))
    >>> [len(list(serves(path, lockstep=lockstep))) / 200 for lockstep in (True, False)]
    [2.0, 1.56]
    """
    grid = _checked(path)
    if lengths is not None:
        stops = np.asarray(lengths)
        if stops.shape != grid.shape[:1] or not np.issubdtype(stops.dtype, np.integer):
            raise ValueError(f"lengths must be {len(grid)} integers, one for each row of path, got {stops.shape}")
        grid = np.where(np.arange(grid.shape[1]) < stops[:, None], grid, -1)
    return iter(Schedule(grid, lockstep=lockstep, horizon=horizon).next, None)


def _checked(path: ArrayLike) -> np.ndarray:
    grid = np.asarray(path)
    if grid.ndim != 2 or not np.issubdtype(grid.dtype, np.integer) or grid.min(initial=0) < -1:
        raise ValueError(f"path must be (N, T) integers, -1 from the end of a row on, got {grid.dtype} {grid.shape}")
    if ((grid[:, :-1] < 0) & (grid[:, 1:] >= 0)).any():
        raise ValueError("path has an entry after a -1; -1 may only follow a row's end")
    return grid


def _require_room(path: np.ndarray, horizon: int) -> None:
    if path.shape[1] > horizon:
        raise ValueError(f"path has {path.shape[1]} steps, more than the horizon of {horizon}")
