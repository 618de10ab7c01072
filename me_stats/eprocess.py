r"""E-processes: tests of a running sampler that may be looked at, and stopped, at any time.

For any predictable alternative q, ``E_n = prod_t q_t(x_t)/p_t(x_t)`` is a non-negative martingale when the tokens
follow p, the exact CE conditional ``sum_i w_i P_i``. Ville's inequality then bounds all looks together::

    P(sup_n E_n >= 1/α) <= α        at any n, any stopping time, any number of looks

Wealth is multiplied over tokens and over independent sequences, separately for every member of every family, and only
then averaged: equal weights over the members of a family, equal weights over families. An average of e-processes is
one, whatever weights are fixed before the data, and these cost at most log(families x members) nats.

The null is the law of every row given its own past *and* independence of rows. A sampler whose rows share random
numbers breaks the second part and is rejected, or accused, for that. A floating-point law that is off by δ a token
is another law: E finds it after about δ^-2 tokens.

Source: Ville (1939); Ramdas, Grünwald, Vovk and Shafer (2023), Game-theoretic statistics and safe anytime-valid
inference, Statistical Science 38(4).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Self

import numpy as np

from me_stats.evidence import Evidence
from me_stats.families import SCORE_FAMILIES, Bools, Family, Floats, Step


@dataclass(frozen=True, eq=False)
class Looks:
    """log E (nats) at each look, for plots and stopping times: L looks, F families.

    `tokens` (L,) counts the tokens before the look, `log_e` (L,) is the average over families and `by_family` (L, F)
    the average within each. From the first token of probability zero on `log_e` is infinite.
    """

    tokens: np.ndarray
    log_e: Floats
    by_family: Floats
    families: tuple[str, ...]

    def tokens_to(self, alpha: float) -> int | None:
        """Tokens at the first look with E >= 1/alpha; None if there is none."""
        reached = np.flatnonzero(self.log_e >= log_threshold(alpha))
        return int(self.tokens[reached[0]]) if len(reached) else None


class EProcess:
    """Evidence against ``x_t ~ p_t``, resumable and mergeable; its whole state is a few small arrays.

    Feed whole sequences with `update`, which looks at E after each of them in row order, or all sequences token by
    token with `step`, which looks after each token of all. A state that was saved and loaded continues bit for bit.

    Parameters
    ----------
    n_components
        K.
    families
        Alternatives with equal weights. `SCORE_FAMILIES` need the scores of `Trace` alone, `ALL_FAMILIES` full laws.

    Examples
    --------
    >>> import torch
    >>> rng = np.random.default_rng(0)
    >>> laws = np.array([[0.9, 0.1], [0.1, 0.9]])
    >>> once = rng.integers(2, size=(30, 1))  # the bug: one component for the whole sequence
    >>> tokens = np.where(rng.random((30, 16)) < 0.9, once, 1 - once)
    >>> scores = torch.tensor(np.log(laws.T[tokens]))
    >>> process = EProcess(2)
    >>> evidence = Evidence.from_scores(scores, torch.log(torch.tensor([0.5, 0.5])), torch.tensor(tokens))
    >>> process.update(evidence) > math.log(1e6), process.rejects(1e-6), process.worst
    (True, True, 'hidden Markov')
    """

    def __init__(self, n_components: int, *, families: Sequence[Family] = SCORE_FAMILIES) -> None:
        if n_components < 1:
            raise ValueError(f"n_components must be at least 1, got {n_components}")
        names = [family.name for family in families]
        if not names or len(set(names)) < len(names):
            raise ValueError(f"families must be one or more with distinct names, got {names}")
        self.n_components = n_components
        self.families = tuple(families)
        self.tokens = self.sequences = self.impossible = 0
        self.log_sup = 0.0
        self._totals = {f.name: np.zeros(f.n_totals(n_components)) for f in families}
        self._states: dict[str, Floats] | None = None
        self._looks: list[Floats] = []

    @property
    def needs_laws(self) -> bool:
        """Whether some family reads full laws."""
        return any(family.needs_laws for family in self.families)

    # --- feeding ---------------------------------------------------------------------------------------------------

    def update(self, evidence: Evidence) -> float:
        """Feed N independent whole sequences (N, T), look after each, and return log E (nats)."""
        self._check(evidence, axes=2)
        n, states = len(evidence.live), _fresh(self.families)
        gained = {name: np.zeros((len(total), n)) for name, total in self._totals.items()}
        for step, live in _columns(evidence):
            for name, gains in _advance(self.families, states, step, live).items():
                gained[name] += gains
        running = {name: total[:, None] + gained[name].cumsum(1) for name, total in self._totals.items()}
        if n:
            self._totals = {name: totals[:, -1].copy() for name, totals in running.items()}
        written = (evidence.live | evidence.impossible).sum(1).cumsum()
        self._look(running, self.tokens + written, self.impossible + evidence.impossible.sum(1).cumsum())
        self.sequences += n
        return self.log_e

    def step(self, evidence: Evidence) -> float:
        """Feed one token of each of N sequences (N,), look, and return log E (nats).

        The first call after construction or `end` starts N new sequences; rows that have ended stay, with token -1.
        """
        self._check(evidence, axes=1)
        n = len(evidence.live)
        if self._states is None:
            self._states = _fresh(self.families)
            self._open = n
            self.sequences += n
        if n != self._open:
            raise ValueError(f"evidence has {n} rows for {self._open} open sequences; call end() to start others")
        one = Step(evidence.ratios.T, evidence.weights.T, {name: r.T for name, r in evidence.readings.items()})
        for name, gains in _advance(self.families, self._states, one, evidence.live).items():
            self._totals[name] = self._totals[name] + gains.sum(1)
        tokens = self.tokens + int((evidence.live | evidence.impossible).sum())
        impossible = self.impossible + int(evidence.impossible.sum())
        after = {name: total[:, None] for name, total in self._totals.items()}
        self._look(after, np.array([tokens]), np.array([impossible]))
        return self.log_e

    def end(self) -> None:
        """Close the sequences that `step` has open."""
        self._states = None

    def paths(self, evidence: Evidence) -> Floats:
        """log E (N, T) of each sequence alone after each token; nothing is fed.

        Infinite from a token of probability zero on; constant after the end.
        """
        self._check(evidence, axes=2)
        states = _fresh(self.families)
        totals = {f.name: np.zeros((f.n_totals(self.n_components), len(evidence.live))) for f in self.families}
        log_e = np.empty(evidence.live.shape)
        for t, (step, live) in enumerate(_columns(evidence)):
            for name, gains in _advance(self.families, states, step, live).items():
                totals[name] += gains
            log_e[:, t] = _log_mean(self._by_family(totals))
        return np.where(evidence.impossible.cumsum(1) > 0, np.inf, log_e)

    # --- reading ---------------------------------------------------------------------------------------------------

    @property
    def log_e(self) -> float:
        """log E now (nats): the average over families; infinite after a token of probability zero."""
        return float(self._last_look()[1])

    @property
    def by_family(self) -> dict[str, float]:
        """log E of each family (nats), without the tokens of probability zero."""
        values = self._last_look()[2:].tolist()
        return {family.name: value for family, value in zip(self.families, values, strict=True)}

    @property
    def by_member(self) -> dict[str, dict[str, float]]:
        """log E of each member of each family (nats)."""
        return {
            f.name: dict(zip(f.members(self.n_components), f.log_wealth(self._totals[f.name]).tolist(), strict=True))
            for f in self.families
        }

    @property
    def worst(self) -> str:
        """The family with the largest E now."""
        return max(self.by_family.items(), key=lambda item: item[1])[0]

    @property
    def pvalue(self) -> float:
        """Anytime-valid p-value ``min(1, 1/sup E)`` over all looks."""
        return math.exp(-self.log_sup)

    @property
    def looks(self) -> Looks:
        """log E after every look so far."""
        table = np.concatenate(self._looks) if self._looks else np.empty((0, 2 + len(self.families)))
        names = tuple(family.name for family in self.families)
        return Looks(table[:, 0].astype(np.int64), table[:, 1], table[:, 2:], names)

    def rejects(self, alpha: float) -> bool:
        """Whether E reached 1/alpha at some look: false with probability at most alpha for a right sampler."""
        return self.log_sup >= log_threshold(alpha)

    # --- merging and resuming --------------------------------------------------------------------------------------

    def merge(self, other: EProcess) -> EProcess:
        """Both runs as one: wealth is multiplied member by member, and then averaged.

        The runs must be independent. E is that of one run over all sequences. The looks are those of `self` and one at
        the union: which run comes first must not depend on the data.
        """
        if self.n_components != other.n_components or self.families != other.families:
            raise ValueError("other must have the same n_components and families")
        if self._states is not None or other._states is not None:
            raise ValueError("neither process may have open sequences; call end() before merge")
        both = EProcess(self.n_components, families=self.families)
        both._totals = {name: total + other._totals[name] for name, total in self._totals.items()}
        both.sequences = self.sequences + other.sequences
        both._looks, both.log_sup = list(self._looks), self.log_sup
        both._look(
            {name: total[:, None] for name, total in both._totals.items()},
            np.array([self.tokens + other.tokens]),
            np.array([self.impossible + other.impossible]),
        )
        return both

    def state_dict(self) -> dict[str, np.ndarray]:
        """Everything as plain arrays, fit for ``numpy.savez``."""
        looks = self.looks
        state = {
            "process": np.array(self._signature()),
            "counts": np.array([self.tokens, self.sequences, self.impossible]),
            "log_sup": np.array(self.log_sup),
            "looks": np.column_stack([looks.tokens, looks.log_e, looks.by_family]),
        }
        state |= {f"totals of {name}": total.copy() for name, total in self._totals.items()}
        if self._states is not None:
            state["open"] = np.array(self._open)
            state |= {f"state of {name}": value.copy() for name, value in self._states.items()}
        return state

    def load_state_dict(self, state: Mapping[str, np.ndarray]) -> Self:
        """Continue where `state_dict` was taken. Raises ValueError unless families and components are the same."""
        if str(state["process"]) != self._signature():
            raise ValueError(f"state must be of {self._signature():.200}, got {state['process']!s:.200}")
        self.tokens, self.sequences, self.impossible = (int(count) for count in state["counts"])
        self.log_sup = float(state["log_sup"])
        self._looks = [np.array(state["looks"])]
        self._totals = {name: np.array(state[f"totals of {name}"]) for name in self._totals}
        self._states = None
        if "open" in state:
            self._open = int(state["open"])
            self._states = {name: np.array(state[f"state of {name}"]) for name in self._totals}
        return self

    # --- inside ----------------------------------------------------------------------------------------------------

    def _last_look(self) -> Floats:
        """A row of `_looks`: tokens, log E, and log E by family."""
        known = bool(self._looks) and len(self._looks[-1]) > 0
        return self._looks[-1][-1] if known else np.zeros(2 + len(self.families))

    def _signature(self) -> str:
        return f"{self.n_components} components, {self.families!r}"

    def _by_family(self, totals: Mapping[str, Floats]) -> Floats:
        return np.stack([_log_mean(family.log_wealth(totals[family.name])) for family in self.families])

    def _look(self, totals: Mapping[str, Floats], tokens: np.ndarray, impossible: np.ndarray) -> None:
        """Record totals (S, L) after `tokens` (L,) of which `impossible` (L,) had probability zero."""
        if not len(tokens):
            return
        by_family = self._by_family(totals)
        log_e = np.where(impossible > 0, np.inf, _log_mean(by_family))
        self._looks.append(np.column_stack([tokens, log_e, by_family.T]))
        self.tokens, self.impossible = int(tokens[-1]), int(impossible[-1])
        self.log_sup = max(self.log_sup, float(log_e.max()))

    def _check(self, evidence: Evidence, *, axes: int) -> None:
        shape = evidence.ratios.shape
        if len(shape) != axes + 1 or shape[-1] != self.n_components:
            raise ValueError(
                f"evidence must have axes {'(N, T)' if axes == 2 else '(N,)'} and K={self.n_components} components, "
                f"got {shape[:-1]} and K={shape[-1]}"
            )
        missing = [f.name for f in self.families if f.needs_laws and f.name not in evidence.readings]
        if missing:
            raise ValueError(f"evidence has no readings for {missing}; use Evidence.from_laws with these families")


def _fresh(families: Sequence[Family]) -> dict[str, Floats]:
    return {family.name: np.empty(0) for family in families}


def _advance(families: Sequence[Family], states: dict[str, Floats], step: Step, live: Bools) -> dict[str, Floats]:
    """Move every family on by one token, in place of its state; what it adds to the totals (S, N) of each row."""
    added, ended = {}, None if live.all() else ~live
    for family in families:
        states[family.name], gains = family.advance(states[family.name], step)
        if ended is not None:
            gains = np.where(ended, 0.0, gains)
        added[family.name] = gains
    return added


def _columns(evidence: Evidence) -> Iterator[tuple[Step, Bools]]:
    """The steps of evidence (N, T), with rows on the last axis, where whole columns are contiguous."""

    def columns(array: Floats) -> Floats:
        return np.ascontiguousarray(array.transpose(1, 2, 0))

    ratios, weights = columns(evidence.ratios), columns(evidence.weights)
    readings = {name: columns(reading) for name, reading in evidence.readings.items()}
    for t in range(evidence.live.shape[1]):
        yield Step(ratios[t], weights[t], {name: r[t] for name, r in readings.items()}), evidence.live[:, t]


def _log_mean(log_values: Floats) -> Floats:
    """log of the mean of exp over the first axis; -inf where all are."""
    top = log_values.max(0)
    top = np.where(top > -np.inf, top, 0.0)
    with np.errstate(divide="ignore"):
        return np.log(np.exp(log_values - top).mean(0)) + top


def log_threshold(alpha: float) -> float:
    """log(1/alpha), which log E must reach for a rejection at level `alpha`."""
    if not 0 < alpha < 1:
        raise ValueError(f"alpha must lie strictly between 0 and 1, got {alpha}")
    return -math.log(alpha)
