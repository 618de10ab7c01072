"""Times of samplers, side by side: every round runs every cell once, in an order of its own, so drift hits all alike.

Absolute speeds belong to a machine and an hour. What lasts are ratios of two cells within the rounds of one run, and
what was counted: forwards, tokens forwarded, laws read, bytes moved.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from statistics import median
from typing import Any, Literal, get_args

import numpy as np

from me_stats.bench_models import BenchModels
from me_stats.cost import Work, ce_work, me_work
from me_stats.draws import RowStreams
from me_stats.mixing import ConstantMixing
from me_stats.models import Ensemble, TopK, Warped
from me_stats.models.base import Cost
from me_stats.rounds import Note, Ratio, Sample, Task, middle, run_rounds
from me_stats.samplers import CESampler, MESampler, Sampler, SpeculativeSampler
from me_stats.stopwatch import Stopwatch

Arm = Literal["single", "CE", "CE parallel", "ME", "ME lockstep", "ME shared", "CE top-k", "speculative"]
ARMS: tuple[Arm, ...] = get_args(Arm)
TOP_K, CHUNK = 10, 8  # of the last two arms: a target that ME cannot sample, and its repair
_WARM_STEPS = 3


@dataclass(frozen=True)
class Cell:
    """One thing to time: an arm, λ (K,), rows in a batch, tokens that each row writes, tokens of its prompt.

    All rows continue one prompt. ``single`` is component 0 alone. ``CE parallel`` runs the components at once
    (`models.parallel`). ``ME lockstep`` keeps rows on one step, ``ME shared`` lets them share component draws too.
    ``CE top-k`` draws from the 10 likeliest tokens of the mixture, which ME cannot; ``speculative`` draws from the same
    law by ME drafts of 8 tokens that are checked.
    """

    arm: Arm
    weights: tuple[float, ...]
    batch: int = 1
    steps: int = 32
    prompt_length: int = 32

    def __post_init__(self) -> None:
        if self.arm not in ARMS:
            raise ValueError(f"arm must be one of {', '.join(ARMS)}; got {self.arm!r}")
        for name in ("batch", "steps", "prompt_length"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        ConstantMixing(self.weights)

    @property
    def k(self) -> int:
        return len(self.weights)

    @property
    def name(self) -> str:
        weights = "/".join(f"{weight:g}" for weight in self.weights)
        return f"{self.arm}, λ {weights}, batch {self.batch}, {self.prompt_length} + {self.steps} tokens"


@dataclass(frozen=True)
class Timing:
    """What one cell took.

    Attributes
    ----------
    seconds
        Of each round, prompt included.
    tokens
        Written in a round.
    cost
        Counted in a round; the same in all.
    bytes_moved
        Computed: the weights of every forward, and keys and values of every law read.
    peak_memory, memory
        Bytes, and how they were found: ``"measured"`` by the accelerator's allocator, or ``"computed"``, weights plus
        keys and values of all rows.
    joules
        Of each round, where the accelerator reports its energy.
    """

    cell: Cell
    seconds: tuple[float, ...]
    tokens: int
    cost: Cost
    bytes_moved: float
    peak_memory: int
    memory: Literal["measured", "computed"]
    joules: tuple[float, ...] | None

    @property
    def tokens_per_second(self) -> float:
        return self.tokens / median(self.seconds)


def ratio(a: Timing, b: Timing) -> Ratio:
    """How many times as fast `a` is as `b`, in tokens a second; both from the rounds of one `bench`.

    >>> cells = [Timing(Cell("ME", (1.0,)), seconds, 10, Cost(), 0, 0, "computed", None)
    ...          for seconds in ((1.0, 1.0, 1.1, 1.0, 0.9), (2.0, 2.1, 2.0, 1.9, 2.0))]
    >>> found = ratio(*cells)
    >>> found.value, [round(end, 3) for end in found.interval], found.coverage
    (2.0, [1.818, 2.222], 0.9375)
    """
    if len(a.seconds) != len(b.seconds):
        raise ValueError(f"timings of one run have as many rounds, got {len(a.seconds)} and {len(b.seconds)}")
    return middle([(a.tokens / x) / (b.tokens / y) for x, y in zip(a.seconds, b.seconds, strict=True)])


class Bench:
    """Cells and spans over one set of components, as tasks that can share rounds.

    Closes what it opened: processes of the parallel arm. Use it in a ``with`` statement.
    """

    def __init__(self, models: BenchModels, *, seed: int = 0) -> None:
        self.models, self.seed = models, seed
        self._watch = Stopwatch(models.device)

    def task(self, cell: Cell) -> Task:
        """`cell` as a task; ValueError if it has more components than there are."""
        if cell.k > len(self.models.components):
            raise ValueError(f"{cell.name} needs {cell.k} components, there are {len(self.models.components)}")
        steps = cell.steps if self._watch.is_cuda else _WARM_STEPS
        return Task(cell.name, partial(self._run, cell, cell.steps), partial(self._run, cell, steps))

    @property
    def warm_ups(self) -> int:
        """Passes over all tasks before the first round.

        On CUDA the first finds the size of storage, and shapes are captured when they come for the second time.
        """
        return 2 if self._watch.is_cuda else 1

    def timing(self, cell: Cell, samples: np.ndarray) -> Timing:
        """The timing of a cell from its samples (rounds, 7)."""
        runs = [Sample(*row) for row in samples.tolist()]
        first = runs[0]
        cost = Cost(int(first.forwards), int(first.tokens_forwarded), int(first.reads))
        measured = self._watch.is_cuda
        memory = max(run.memory for run in runs) if measured else self._memory(cell)
        joules = tuple(run.joules for run in runs)
        return Timing(
            cell, tuple(run.seconds for run in runs), int(first.tokens), cost, self._bytes_moved(cell, cost),
            int(memory), "measured" if measured else "computed", None if any(map(math.isnan, joules)) else joules,
        )  # fmt: skip

    def work(self, cell: Cell) -> Work | None:
        """The forwards of a cell for the cost model; None for arms that are more than one forward after another."""
        length = cell.prompt_length + round(np.mean(self.models.contexts[: cell.k]))
        if cell.arm in ("single", "CE"):
            k = 1 if cell.arm == "single" else cell.k
            return ce_work(cell.batch, cell.steps, k, prompt_length=length)
        if cell.arm in ("ME", "ME lockstep", "ME shared"):
            lockstep = cell.arm == "ME lockstep"
            return me_work(component_path(cell, self.seed), prompt_length=length, lockstep=lockstep)
        return None

    def close(self) -> None:
        if not self._watch.is_cuda and "_processes" in vars(self):
            for process in self._processes:
                process.close()

    def __enter__(self) -> Bench:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def sampler(self, cell: Cell) -> Sampler:
        """What writes the tokens of a cell."""
        parts, mixing = self.models.components[: cell.k], ConstantMixing(cell.weights)
        if cell.arm == "single":
            return CESampler(parts[0])
        if cell.arm == "CE parallel":
            from me_stats.models.parallel import ParallelEnsemble

            return CESampler(ParallelEnsemble(self._processes[: cell.k], mixing))
        ensemble = Ensemble(parts, mixing)
        if cell.arm in ("CE top-k", "speculative"):
            target = Warped(ensemble, TopK(TOP_K))
            draft = Ensemble([Warped(part, TopK(TOP_K)) for part in parts], mixing)
            return CESampler(target) if cell.arm == "CE top-k" else SpeculativeSampler(target, draft, chunk=CHUNK)
        if cell.arm == "CE":
            return CESampler(ensemble)
        shared = cell.batch if cell.arm == "ME shared" else 1
        return MESampler(ensemble, shared_rows=shared, lockstep=cell.arm == "ME lockstep")

    @cached_property
    def _processes(self) -> list[Any]:
        """Components that can run at once: on a CPU one process each, on CUDA those that are here."""
        if self._watch.is_cuda:
            return list(self.models.components)
        from me_stats.models.parallel import start_components

        return list(start_components(self.models.openers))

    def _run(self, cell: Cell, steps: int) -> Sample:
        sampler, prompt = self.sampler(cell), self.models.prompt(cell.prompt_length)
        options: dict[str, Any] = {"n": cell.batch, "max_new_tokens": steps, "batch_size": cell.batch}
        self._watch.start()
        trace = sampler.sample([prompt], seed=self.seed, **options)
        seconds, memory, joules = self._watch.stop()
        cost = trace.cost
        return Sample(
            seconds, int(trace.lengths.sum()), cost.forwards, cost.tokens_forwarded, cost.reads, memory, joules
        )

    def _bytes_moved(self, cell: Cell, cost: Cost) -> float:
        networks = self.models.networks[: cell.k]
        weights = np.array([network.weight_bytes for network in networks], dtype=float)
        per_key = np.array([network.cache_bytes_per_token() for network in networks], dtype=float)
        # Which network a forward ran: the path says so of ME, and the others run all alike.
        share = np.full(cell.k, 1 / cell.k) if cell.arm.startswith(("CE", "spec")) else np.array(cell.weights)
        share = np.eye(cell.k)[0] if cell.arm == "single" else share
        keys = cell.prompt_length + np.array(self.models.contexts[: cell.k]) + (cell.steps + 1) / 2
        return float(cost.forwards * (share @ weights) + cost.reads * (share @ (per_key * keys)))

    def _memory(self, cell: Cell) -> int:
        used = 1 if cell.arm == "single" else cell.k
        networks = self.models.networks[:used]
        length = cell.prompt_length + cell.steps
        keys = sum(
            cell.batch * (length + context) * network.cache_bytes_per_token()
            for network, context in zip(networks, self.models.contexts, strict=False)
        )
        return sum({id(network): network.weight_bytes for network in networks}.values()) + keys


def component_path(cell: Cell, seed: int) -> np.ndarray:
    """The components (N, T) that ME draws in a cell: its weights are constant, so they are known before any forward."""
    log_weights = ConstantMixing(cell.weights).log_weights([()] * cell.batch)
    rows = np.arange(cell.batch) // (cell.batch if cell.arm == "ME shared" else 1)
    draw = RowStreams(seed)
    return np.stack([draw(log_weights, rows, step, stream="component").numpy() for step in range(cell.steps)], axis=1)


def bench(
    models: BenchModels,
    cells: Sequence[Cell],
    *,
    repeats: int = 5,
    seed: int = 0,
    folder: Path | None = None,
    progress: Note = lambda fraction, note: None,
) -> list[Timing]:
    """Time `cells`: after a warm-up, `repeats` rounds that run each of them once, in a shuffled order.

    Parameters
    ----------
    models
        Components, see `bench_models.bench_components`.
    repeats
        Rounds. Every round draws the same tokens, so its spread is the machine's.
    seed
        Keys the tokens and the order.
    folder
        Keeps finished rounds; a run that stopped goes on from there. None keeps nothing.
    progress
        Called with the share that is done, and what runs.

    Raises
    ------
    ValueError
        If a cell names no arm, or more components than there are.
    """
    with Bench(models, seed=seed) as own:
        samples = run_rounds([own.task(cell) for cell in cells], repeats=repeats, warm_ups=own.warm_ups, seed=seed,
                             folder=folder, progress=progress)  # fmt: skip
        return [own.timing(cell, samples[:, i]) for i, cell in enumerate(cells)]
