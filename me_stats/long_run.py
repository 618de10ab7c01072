"""Long continuations by CE, ME and a control: generated in parts, and kept as block means of each row.

Memory is that of one part, however many rows there are. Four arms, on rows of their own random numbers:

- ``ME`` and ``CE``, which have one law;
- ``same path``: the first rows of ME again, with the same components drawn and other token draws (pick-freeze);
- ``control``: one component per sequence, whose every first token has the law of CE and whose rows have not.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from me_stats.dependence import autocorrelation_time
from me_stats.lags import longest_waits, prefilled_tokens, turn_ages
from me_stats.models import Endless, Ensemble, Windowed
from me_stats.models.windowed import context_length
from me_stats.parts import Arrays, PartOfWork, Tick, open_part, run_parts
from me_stats.presets import Setting, open_setting
from me_stats.record import write_atomically
from me_stats.row_statistics import block_means, first_end, scored_tokens, token_features, token_statistics
from me_stats.samplers import CESampler, MESampler, Sampler, SequenceMixtureSampler
from me_stats.variance import FrozenDraw

Arm = Literal["ME", "CE", "same path", "control"]
SCORED = ("log_prob", "entropy", "responsibility", "disagreement")
_SECONDS = "seconds.json"
_STEP_SEEDS = 2**40  # between the arms' seeds: no user's second run has them by chance


@dataclass(frozen=True)
class LongPlan:
    """What to generate; everything that decides a number in the result.

    Attributes
    ----------
    models, prompts, weights, dtype, device
        As in `presets.open_setting`; prompts None: those that suit the models. Rows take the prompts in turn.
    rows, steps
        N rows of T tokens each by ME and by CE; an end of sequence is written and read on after (`Endless`).
    batch
        Rows of one part: what is in memory together, and what an interruption loses.
    blocks
        G blocks of equal length, whose means are kept.
    window, hop
        Context rule for the models (`Windowed`), None: their whole context, which T and the prompt must fit.
    scored
        Rows of ME and CE that are scored for the statistics that need laws, one pass per component.
    paired, control
        Rows of the other two arms, 0 for none.
    """

    models: tuple[str, ...]
    prompts: tuple[str, ...] | None
    weights: tuple[float, ...] | None
    dtype: Literal["float32", "bfloat16", "float16"]
    device: str
    rows: int
    steps: int
    batch: int
    blocks: int
    window: int | None
    hop: int | None
    scored: int
    paired: int
    control: int
    seed: int

    def __post_init__(self) -> None:
        for name, least in (("rows", 8), ("steps", 4), ("batch", 1), ("blocks", 2), ("scored", 0)):
            if getattr(self, name) < least:
                raise ValueError(f"{name} must be at least {least}, got {getattr(self, name)}")
        if self.steps % self.blocks or self.steps // self.blocks < 2:
            raise ValueError(f"blocks must divide steps into blocks of two tokens or more, got {self.blocks} blocks of "
                             f"{self.steps} tokens")  # fmt: skip
        for name in ("scored", "paired"):
            if not 0 <= getattr(self, name) <= self.rows:
                raise ValueError(f"{name} must lie in 0..{self.rows} (rows), got {getattr(self, name)}")
        if self.control != 0 and self.control < 8:
            raise ValueError(f"control must be 0 (none) or at least 8 rows, got {self.control}")
        if self.hop is not None and self.window is None:
            raise ValueError("hop is how far a window moves, and there is none; give window too")

    def rows_of(self, arm: Arm) -> int:
        """Rows of an arm."""
        return {"ME": self.rows, "CE": self.rows, "same path": self.paired, "control": self.control}[arm]


ARMS: tuple[Arm, ...] = ("ME", "CE", "same path", "control")


def open_plan(plan: LongPlan) -> tuple[Ensemble, tuple[Any, ...], Setting]:
    """The ensemble that a plan runs, its prompts, and the setting behind it."""
    setting = open_setting(plan.models, weights=plan.weights, dtype=plan.dtype, device=plan.device)
    prompts = plan.prompts or setting.prompts
    if plan.rows < 2 * len(prompts):
        raise ValueError(f"rows must be at least two for each of {len(prompts)} prompts, got {plan.rows}")
    parts: list[Any] = list(setting.ensemble.components)
    if plan.window is not None:
        parts = [Windowed(part, plan.window, hop=plan.hop) for part in parts]
    ensemble = Ensemble([Endless(part) for part in parts], setting.ensemble.mixing)
    limit = context_length(ensemble)
    longest = max(len(ensemble.vocabulary.encode(prompt)) for prompt in prompts)
    if limit is not None and longest + plan.steps > limit:
        raise ValueError(
            f"steps: a prompt of {longest} tokens and {plan.steps:,} new ones exceed the {limit:,} that models read; "
            f"give a window of at most {limit:,} tokens, or fewer steps"
        )
    return ensemble, prompts, setting


def generate(
    plan: LongPlan, folder: Path, *, workers: int = 1, executor: Executor | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> dict[Arm, list[Path]]:  # fmt: skip
    """Run the plan's parts that `folder` does not hold yet; files of each arm, in the order of rows.

    `progress` gets tokens done and in all, a scored token counting as another one. See `parts.run_parts` for
    `workers` and `executor`; parts and their numbers do not depend on them.
    """
    work: list[PartOfWork] = []
    arms: dict[Arm, list[str]] = {arm: [] for arm in ARMS}
    # The same rows of all arms, then the next: what an interrupted run holds can be compared.
    for start in range(0, max(plan.rows, plan.control), plan.batch):
        for arm in ARMS:
            stop = min(start + plan.batch, plan.rows_of(arm))
            if start < stop:
                name = f"{arm.replace(' ', '-')}-{start:06d}"
                units = (stop - start + len(_scored(plan, arm, start, stop))) * plan.steps
                work.append(PartOfWork(name, units, partial(_part, plan, arm, start, stop)))
                arms[arm].append(name)
    started, before = time.perf_counter(), seconds_spent(folder)
    try:
        threads = 1 if workers > 1 else None
        run_parts(work, folder, workers=workers, threads=threads, executor=executor, progress=progress)
    finally:
        # Beside the parts, which hold what they hold however long it took.
        spent = before + time.perf_counter() - started
        write_atomically(folder / _SECONDS, json.dumps({"seconds": round(spent, 1)}) + "\n")
    return {arm: [folder / f"{name}.npz" for name in names] for arm, names in arms.items()}


def seconds_spent(folder: Path) -> float:
    """Wall time that earlier runs of `generate` spent on this folder, in seconds."""
    try:
        return float(json.loads((folder / _SECONDS).read_text(encoding="utf-8"))["seconds"])
    except (OSError, ValueError, KeyError, TypeError):
        return 0.0


def column(files: Sequence[Path], name: str) -> NDArray[Any]:
    """One statistic of all rows of an arm, (N, ...), in the order of rows; parts without it are left out."""
    found = []
    for path in files:
        with open_part(path) as part:
            if name in part.files:
                found.append(part[name])
    if not found:
        raise KeyError(f"no part holds {name!r}")
    return np.concatenate(found)


def names_of(files: Sequence[Path]) -> tuple[str, ...]:
    """What the first part of an arm holds; nothing, if it has no part."""
    if not files:
        return ()
    with open_part(files[0]) as part:
        return tuple(part.files)


def _scored(plan: LongPlan, arm: Arm, start: int, stop: int) -> range:
    """Rows of a part that are scored."""
    return range(start, min(stop, plan.scored)) if arm in ("ME", "CE") else range(0)


@cache
def _opened(plan: LongPlan) -> tuple[Ensemble, tuple[Any, ...], dict[str, NDArray[np.float64]], tuple[int, ...]]:
    ensemble, prompts, setting = open_plan(plan)
    eos = setting.ensemble.vocabulary.eos
    return ensemble, tuple(map(ensemble.vocabulary.encode, prompts)), token_features(ensemble.vocabulary), eos


def _part(plan: LongPlan, arm: Arm, start: int, stop: int, tick: Tick) -> Arrays:
    ensemble, prompts, features, eos = _opened(plan)
    numbers = np.arange(start, stop)
    kinds: dict[Arm, type[Sampler]] = {"CE": CESampler, "control": SequenceMixtureSampler}
    sampler = kinds.get(arm, MESampler)(ensemble)
    seed = plan.seed + _STEP_SEEDS * {"ME": 0, "same path": 0, "CE": 1, "control": 2}[arm]
    other = FrozenDraw(component_seed=seed, token_seed=seed + 3 * _STEP_SEEDS) if arm == "same path" else None
    which = numbers % len(prompts)
    trace = sampler.sample(
        [prompts[p] for p in which], rows=numbers, max_new_tokens=plan.steps, seed=seed, draw=other, progress=tick,
        batch_size=len(numbers),
    )  # fmt: skip
    tokens = trace.tokens.numpy()
    found: Arrays = {"prompt": which, "end": first_end(tokens, eos)}
    found |= token_statistics(tokens, features, blocks=plan.blocks)
    rows = _scored(plan, arm, start, stop)
    if rows:
        kept = slice(0, len(rows))
        scores = scored_tokens(ensemble, trace.row_prompts()[kept], tokens[kept], tick)
        found |= {name: block_means(values, plan.blocks) for name, values in scores.items()}
        found["scored rows"] = numbers[kept]
        if len(rows) >= 3:
            for name in ("log_prob", "entropy"):
                tau = autocorrelation_time(scores[name])
                found[f"{name} time"] = tau.rows
                found[f"{name} pooled time"] = np.array([[tau.pooled.value, *tau.pooled.interval, tau.pooled.n]])
    if trace.components is not None and arm == "ME":
        lengths = np.array([len(prompts[p]) for p in which])
        found |= _paths(trace.components.numpy(), lengths, ensemble, plan.blocks)
    if start == 0:
        found["first tokens"] = tokens[:1, :200]
        if trace.components is not None:
            found["first path"] = trace.components.numpy().astype(np.int16)
    return found


def _paths(path: NDArray[np.int64], prompt_lengths: NDArray[np.int64], ensemble: Ensemble, blocks: int) -> Arrays:
    """What the drawn components say: shares, catching up, waits, and tokens whose keys and values are held."""
    count, steps = len(ensemble.components), path.shape[1]
    ends = (np.arange(blocks) + 1) * steps // blocks - 1
    held = np.zeros((len(path), blocks))
    known = prompt_lengths[:, None] + ends  # tokens in front of the last one of each block
    for i, component in enumerate(ensemble.components):
        # A component holds what stood there at its last turn, its own law's token excepted; before its first, nothing.
        last = np.where(path == i, np.arange(steps), np.arange(steps) - turn_ages(path, i))[:, ends]
        read = prompt_lengths[:, None] + last
        inner = component.model  # of Endless
        first, still = (inner.start(read), inner.start(known)) if isinstance(inner, Windowed) else (0, 0)
        held += np.where((last >= 0) & (first == still), read - first, 0)
    return {
        "component share": block_means(path == 0, blocks),
        "prefilled": prefilled_tokens(path, prompt_length=prompt_lengths).mean(1),
        "longest wait": longest_waits(path, count),
        "held tokens": held,
    }
