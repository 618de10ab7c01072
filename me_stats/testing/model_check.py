"""Does a model keep its contract: laws that are pure functions of the prefix, and sessions that agree with them?"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from me_stats.divergence import tv_distance
from me_stats.models.base import checked_laws, open_session, path_log_probs, require_language_model
from me_stats.models.ensemble import Ensemble, EnsembleSession
from me_stats.testing.result import ConformanceResult, ModelRejected
from me_stats.vocabulary import Prompt, as_prompts

# Total variation that rounding may cause between two computations of one law, by dtype of the laws. Real networks
# differ by 1e-6 to 1e-5 in float32; a law of a wrong prefix is off by far more than any of these.
_TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-4, torch.bfloat16: 0.2, torch.float16: 0.02}


def check_language_model(
    model: Any,
    prompts: Prompt | Sequence[Prompt] | None = None,
    *,
    seed: int = 0,
    tolerance: float | None = None,
    on_fail: Literal["raise", "return"] = "raise",
) -> ConformanceResult:
    """Check that `model` is a law: normalised, and a pure function of the token ids of its prefix.

    Asks for laws of ragged prefixes alone, together, in another order, repeated and as lists and tuples, and along
    teacher-forced paths. All must agree within `tolerance` (total variation).

    Parameters
    ----------
    model
        Anything with `vocabulary` and ``log_probs(prefixes) -> (B, V)``.
    prompts
        Prefixes to start from; default six random ones of 1 to 6 tokens. They are extended by random tokens.
    seed
        Of those tokens.
    tolerance
        Default by dtype: 1e-9 for float64, 1e-4 for float32, .2 for bfloat16.
    on_fail
        "raise" a `ModelRejected`, or "return" the result.

    Examples
    --------
    >>> from me_stats.models import MarkovModel
    >>> check_language_model(MarkovModel.random(5, seed=0)).passed
    True
    >>> class Unnormalised(MarkovModel):
    ...     def log_probs(self, prefixes):
    ...         return super().log_probs(prefixes) + 0.1
    >>> check_language_model(Unnormalised.random(5, seed=0))
    Traceback (most recent call last):
    ...
    me_stats.testing.result.ModelRejected: model does not conform:
      - Unnormalised.log_probs is not normalised ...
    """
    require_language_model(model)
    rng = np.random.default_rng(seed)
    starts = _prefixes(model, prompts, rng)
    prefixes = [(*start, *_tokens(model, rng, int(rng.integers(0, 4)))) for start in starts for _ in range(2)]
    audit = _Audit(tolerance)
    together = audit.laws(model, prefixes, "all together")
    if together is not None:
        audit.compare(audit.laws(model, prefixes, "once more"), together, "changes from call to call")
    # A law that changes by itself would seem to depend on everything else too.
    if together is not None and not audit.faults:
        order = rng.permutation(len(prefixes))
        shuffled = audit.laws(model, [list(prefixes[i]) for i in order], "in another order, as lists")
        audit.compare(shuffled, together[order], "depends on the order of the prefixes or on their type")
        alone = [audit.laws(model, [prefix], "alone") for prefix in prefixes]
        known = [law for law in alone if law is not None]
        if len(known) == len(alone):
            audit.compare(torch.cat(known), together, "depends on which prefixes are asked for together")
        twice = audit.laws(model, [prefixes[0], *prefixes], "with a repetition")
        audit.compare(None if twice is None else twice[:1], together[:1], "depends on repetitions of a prefix")
        _audit_paths(audit, model, starts, rng)
    return audit.verdict(on_fail)


def check_session(
    model: Any,
    prompts: Prompt | Sequence[Prompt] | None = None,
    *,
    steps: int = 12,
    schedules: int = 8,
    seed: int = 0,
    tolerance: float | None = None,
    on_fail: Literal["raise", "return"] = "raise",
) -> ConformanceResult:
    """Check that ``model.session`` agrees with ``model.log_probs`` along random schedules.

    A schedule appends tokens to some rows and reads others: rows are ragged, fall behind by up to `steps` tokens and
    are read again without an append. Of an `Ensemble` single components are read, as ME does, so that they switch.

    Parameters
    ----------
    model, prompts, seed, tolerance, on_fail
        As in `check_language_model`.
    steps
        Appends in a schedule, and so the longest lag.
    schedules
        How many schedules, each with a fresh session.

    Examples
    --------
    >>> from me_stats.models import MarkovModel
    >>> check_session(MarkovModel.random(5, seed=0)).passed
    True
    """
    require_language_model(model)
    if steps < 1 or schedules < 1:
        raise ValueError(f"steps and schedules must be at least 1, got {steps} and {schedules}")
    rng = np.random.default_rng(seed)
    audit = _Audit(tolerance)
    starts = _prefixes(model, prompts, rng)
    for _ in range(schedules):
        if not audit.faults:
            _audit_schedule(audit, model, starts, rng, steps)
    return audit.verdict(on_fail)


class _Audit:
    """Faults found so far, and how far apart laws were that should be equal."""

    def __init__(self, tolerance: float | None) -> None:
        if tolerance is not None and not 0 <= tolerance < 1:
            raise ValueError(f"tolerance must be a total variation in [0, 1), got {tolerance}")
        self._given = tolerance
        self.tolerance = tolerance or 0.0
        self.faults: list[str] = []
        self.largest = 0.0
        self.compared = 0

    def laws(self, model: Any, prefixes: Sequence[Sequence[int]], how: str) -> Tensor | None:
        """Laws (B, V) of the definition, or None with a fault."""
        try:
            return self.checked(model, model.log_probs(prefixes), len(prefixes))
        except (ValueError, TypeError, IndexError, RuntimeError) as error:
            self.faults.append(f"{error} (prefixes asked for {how})")
            return None

    def checked(self, model: Any, laws: Any, rows: int) -> Tensor:
        """Laws as float64 on the host; ValueError if they are none."""
        tensor = checked_laws(model, laws, rows).cpu()
        # Kept apart from the model, which may write into the same memory at the next call.
        tensor = tensor.clone()
        if bool((tensor > 1e-3).any()):
            raise ValueError(f"{type(model).__name__} returned a positive log-probability")
        if self._given is None:
            self.tolerance = max(self.tolerance, _TOLERANCE.get(tensor.dtype, 1e-4))
        return tensor.double().log_softmax(-1)

    def compare(self, one: Tensor | None, other: Tensor, fault: str) -> None:
        """Note a fault unless two sets of laws (B, V) agree."""
        if one is None or not len(one):
            return
        distance = float(torch.as_tensor(tv_distance(one, other, check=False)).max())
        self.compared += len(one)
        self.largest = max(self.largest, distance)
        if not distance <= self.tolerance:
            self.faults.append(f"the law {fault}: total variation {distance:.3g}, allowed {self.tolerance:.1g}")

    def verdict(self, on_fail: str) -> ConformanceResult:
        """The result, raised or returned."""
        if on_fail not in ("raise", "return"):
            raise ValueError(f"on_fail must be 'raise' or 'return', got {on_fail!r}")
        faults = tuple(dict.fromkeys(self.faults))
        result = ConformanceResult(faults, self.largest, self.tolerance, self.compared)
        if faults and on_fail == "raise":
            raise ModelRejected(result)
        return result


def _audit_paths(audit: _Audit, model: Any, starts: list[tuple[int, ...]], rng: np.random.Generator) -> None:
    paths = [_tokens(model, rng, int(rng.integers(1, 6))) for _ in starts]
    for start, path, laws in zip(starts, paths, path_log_probs(model, starts, paths), strict=True):
        prefixes = [(*start, *path[:step]) for step in range(len(path))]
        defined = audit.laws(model, prefixes, "along a path")
        if defined is not None:
            audit.compare(audit.checked(model, laws, len(path)), defined, "of path_log_probs differs from log_probs")


def _audit_schedule(
    audit: _Audit, model: Any, starts: list[tuple[int, ...]], rng: np.random.Generator, steps: int
) -> None:
    prefixes = list(starts)
    session = open_session(model, starts, max_new_tokens=steps)
    for step in range(steps):
        _audit_read(audit, model, session, prefixes, rng, f"after {step} appends")
        moved = np.flatnonzero(rng.random(len(prefixes)) < 0.8)
        tokens = _tokens(model, rng, len(moved))
        session.append(moved, torch.tensor(tokens, dtype=torch.int64))
        for row, token in zip(moved.tolist(), tokens, strict=True):
            prefixes[row] = (*prefixes[row], token)
        if audit.faults:
            return
    _audit_read(audit, model, session, prefixes, rng, "at the end")
    _audit_read(audit, model, session, prefixes, rng, "read again")


def _audit_read(
    audit: _Audit, model: Any, session: Any, prefixes: list[tuple[int, ...]], rng: np.random.Generator, when: str
) -> None:
    readers = [("", model, session)]
    if isinstance(model, Ensemble) and isinstance(session, EnsembleSession):
        readers = [
            (f" of component {i}", component, own)
            for i, (component, own) in enumerate(zip(model.components, session.components, strict=True))
        ]
    rows = rng.permutation(len(prefixes))
    # Every row is read by one reader or by none, so that components and rows fall behind.
    chosen = rng.integers(-1, len(readers), len(rows))
    for number, (name, part, own) in enumerate(readers):
        mine = rows[chosen == number]
        if len(mine):
            defined = audit.laws(part, [prefixes[row] for row in mine], "by the session")
            if defined is not None:
                try:
                    read = audit.checked(part, own.log_probs(mine), len(mine))
                except (ValueError, RuntimeError) as error:
                    audit.faults.append(f"session{name} {when}: {error}")
                    return
                audit.compare(read, defined, f"of the session{name} {when} differs from log_probs")


def _prefixes(model: Any, prompts: Prompt | Sequence[Prompt] | None, rng: np.random.Generator) -> list[tuple[int, ...]]:
    if prompts is not None:
        return [tuple(model.vocabulary.encode(prompt)) for prompt in as_prompts(prompts)]
    return [tuple(_tokens(model, rng, length)) for length in range(1, 7)]


def _tokens(model: Any, rng: np.random.Generator, count: int) -> list[int]:
    """Random ids that do not end a sequence (any id, where all do)."""
    allowed = np.setdiff1d(np.arange(model.vocabulary.size), model.vocabulary.eos)
    return [int(token) for token in rng.choice(allowed if len(allowed) else model.vocabulary.size, count)]
