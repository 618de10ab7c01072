"""ME over servers: the components are drawn first, and each run of one component is one request."""

from __future__ import annotations

import math
import queue
import threading
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor, as_completed

import numpy as np
import torch
from torch import Tensor

from me_stats.draws import RowStreams
from me_stats.mixing import ConstantMixing
from me_stats.models.base import Cost
from me_stats.models.ensemble import Ensemble
from me_stats.samplers.base import Run, Sampler
from me_stats.served.arms import open_arm
from me_stats.served.model import ServedCost, ServedModel
from me_stats.served.seeds import request_seed


class ServedME(Sampler):
    r"""Ancestral sampling of an ensemble whose components are served, with tokens drawn by the servers.

    With constant weights the component path of a row is drawn before its first token (the path that `MESampler` draws
    for the same seed and row), so a run of one component is one request with ``max_tokens`` = its length:
    :math:`1/(1-λ_i)` tokens a request of component i on average. Given the path, the tokens are the same product of
    component laws as one by one: exact.

    Rows run side by side, each on its own; a request has a seed of its own, made of the seed of the run, the row and
    the step. The tokens of a row therefore do not depend on its neighbours, on the order, or on requests that had to
    be repeated, as far as the servers repeat themselves: with batches a server's rounding may differ, the law does not.

    Parameters
    ----------
    ensemble
        An Ensemble of `ServedModel`, ``Conditioned(ServedModel, context)`` or ``Aligned`` over either, with
        ConstantMixing.
    rows_at_once
        Rows that are written side by side. Default: as many as have a prefix cache of their own on the servers, where
        these say how many there are, else the models' `concurrency`.

    Notes
    -----
    ``trace.cost`` is a `ServedCost`, which counts requests. `sample_kept` keeps finished rows on disk. CE needs laws:
    `CESampler` of the same ensemble draws here from the laws that the servers return.

    Raises
    ------
    TypeError
        For components that no server draws from, and for weights that depend on the prefix: a router has to see each
        token before the next component is known.
    ServerChanged
        When used: if a server came back with another model.
    """

    def __init__(self, ensemble: Ensemble, *, rows_at_once: int | None = None) -> None:
        if not isinstance(ensemble, Ensemble):
            raise TypeError(f"ServedME needs an Ensemble of served models, got {type(ensemble).__name__}")
        if type(ensemble.mixing) is not ConstantMixing:
            raise TypeError(
                f"ServedME needs ConstantMixing, got {type(ensemble.mixing).__name__}: its weights may depend on the "
                "prefix, so the next component is not known before the last token; MESampler takes any mixing, a "
                "token a request"
            )
        if rows_at_once is not None and rows_at_once < 1:
            raise ValueError(f"rows_at_once must be at least 1, got {rows_at_once}")
        super().__init__(ensemble)
        self.arms = [open_arm(component, f"components[{i}]") for i, component in enumerate(ensemble.components)]
        self.rows_at_once = rows_at_once

    @property
    def servers(self) -> list[ServedModel]:
        """The distinct served models."""
        return list({id(arm.model): arm.model for arm in self.arms}.values())

    def _run_batch(self, run: Run) -> tuple[Tensor, Tensor | None, Cost]:
        if type(run.draw) is not RowStreams:
            raise TypeError("ServedME takes no `draw`: the servers draw the tokens, and `seed` keys their seeds")
        before = [server.cost for server in self.servers]
        writing = _Writing(self, run, run.draw.seed)
        writing.run(self._width())
        for server in self.servers:
            server.verify()
        costs = [server.cost.since(start) for server, start in zip(self.servers, before, strict=True)]
        return writing.tokens, torch.from_numpy(writing.components), sum(costs, ServedCost())

    def _width(self) -> int:
        """Rows that run side by side."""
        if self.rows_at_once is not None:
            return self.rows_at_once
        widths = []
        for server in self.servers:
            uses = sum(arm.model is server for arm in self.arms)
            lanes = server.lanes
            widths.append(server.client.concurrency if lanes is None else max(1, lanes // uses))
        return min(widths)


class _Writing:
    """The rows of a batch while they are written."""

    def __init__(self, sampler: ServedME, run: Run, seed: int) -> None:
        self.sampler, self.batch, self.seed = sampler, run, seed
        self.arms, self.eos = sampler.arms, frozenset(sampler.model.vocabulary.eos)
        self.paths = component_paths(sampler.model.mixing, run)
        self.components = np.full(self.paths.shape, -1, dtype=np.int64)
        self.tokens = torch.full(self.paths.shape, -1, dtype=torch.int64)
        self.stopped = threading.Event()
        # Where each component's prefixes lie in its server's caches, beside those of the others.
        self.places = [sum(arm.model is other.model for other in self.arms[:i]) for i, arm in enumerate(self.arms)]
        self.uses = [sum(arm.model is other.model for other in self.arms) for arm in self.arms]
        self.lanes: queue.SimpleQueue[int] = queue.SimpleQueue()

    def run(self, width: int) -> None:
        """Write all rows, at most `width` at a time; the first failure, or an interruption, ends all."""
        width = min(width, len(self.paths))
        for lane in range(width):
            self.lanes.put(lane)
        with ThreadPoolExecutor(max_workers=max(1, width)) as pool:
            waiting: list[Future[int]] = [pool.submit(self._row, row) for row in range(len(self.paths))]
            try:
                for done in as_completed(waiting):
                    self.batch.note(done.result())
            except BaseException:
                self.stopped.set()
                pool.shutdown(wait=False, cancel_futures=True)
                raise

    def _row(self, row: int) -> int:
        lane = self.lanes.get()
        try:
            written = self._written(row, lane)
        finally:
            self.lanes.put(lane)
        self.tokens[row, : len(written)] = torch.tensor(written, dtype=torch.int64)
        self.components[row, : len(written)] = self.paths[row, : len(written)]
        return len(written)

    def _written(self, row: int, lane: int) -> list[int]:
        path, number = self.paths[row], int(self.batch.numbers[row])
        prompt = self.batch.prompts[self.batch.prompt_index[row]]
        starts = np.flatnonzero(np.diff(path, prepend=-1)).tolist()
        written: list[int] = []
        for start, end in zip(starts, [*starts[1:], len(path)], strict=True):
            if self.stopped.is_set():
                break
            component = int(path[start])

            def seeds(offset: int, bits: int, start: int = start) -> int:
                return request_seed(self.seed, number, start + offset, arm="served ME", bits=bits)

            cache = lane * self.uses[component] + self.places[component]
            written += self.arms[component].write((*prompt, *written), end - start, seeds, cache)
            if len(written) < end or written[-1] in self.eos:
                break
            if self.batch.stops is not None and self.batch.stops.first(written, after=start) is not None:
                break
        return written


def component_paths(mixing: ConstantMixing, run: Run) -> np.ndarray:
    """Components (N, T) of all rows, as `MESampler` draws them for the same seed."""
    shape = (len(run.numbers), run.max_new_tokens)
    rows, steps = np.repeat(run.numbers, shape[1]), np.tile(np.arange(shape[1]), shape[0])
    assert isinstance(run.draw, RowStreams)
    index = torch.zeros(len(rows), dtype=torch.int64)
    drawn = run.draw(mixing.log_weights([()]), rows, steps, stream="component", index=index)
    return drawn.numpy().reshape(shape)


def expected_requests(weights: Sequence[float], steps: int) -> tuple[float, float]:
    r"""Mean and standard deviation of the requests that one row of `steps` tokens takes.

    A path has one run more than it has switches: :math:`1 + (T-1)(1 - \sum_i λ_i^2)` on average.

    >>> mean, deviation = expected_requests([0.6, 0.4], 100)
    >>> round(mean, 2), round(deviation, 2)
    (48.52, 5.16)
    """
    shares = ConstantMixing(weights).weights.numpy()
    if steps < 1:
        raise ValueError(f"steps must be at least 1, got {steps}")
    switch = 1 - float((shares**2).sum())
    both = float((shares * (1 - shares) ** 2).sum())  # two switches in a row
    variance = (steps - 1) * switch * (1 - switch) + 2 * max(0, steps - 2) * (both - switch**2)
    return 1 + (steps - 1) * switch, math.sqrt(max(0.0, variance))
