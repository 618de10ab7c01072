"""Predictable alternatives q for `eprocess`: what a wrong sampler may look like, fixed before any data.

Each family is a grid of members. Member m multiplies its wealth by ``q_m(x_t)/p_t(x_t)`` at every token, where q_m may
read everything before the token. With ``R_i = P_i(x)/p(x)`` every alternative that re-weights the components costs K
floats a token, since ``q/p = sum_i v_i R_i`` for weights v. Grids are geometric and the same for every model: nothing
is tuned on data. Strengths, shares and correlations stay below 1, so that no member bets all it has on one token.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.special import gammaln
from torch import Tensor

from me_stats.models.warped import Greedy, Temperature, TopK, Warp

Floats = NDArray[np.float64]
Bools = NDArray[np.bool_]


@dataclass(frozen=True, eq=False)
class Laws:
    """Normalised laws at L realised tokens, in nats: `parts` (L, K, V), their `mixture` (L, V), `tokens` (L,)."""

    parts: Tensor
    mixture: Tensor
    tokens: Tensor

    @property
    def log_p(self) -> Tensor:
        """(L,) log-probability of the tokens under the mixture."""
        return self.mixture.gather(-1, self.tokens[:, None])[:, 0]


@dataclass(frozen=True, eq=False)
class Step:
    """One token of N sequences: `ratios` R_i and `weights` w_i (K, N), and what law families read, each (F, N)."""

    ratios: Floats
    weights: Floats
    readings: Mapping[str, Floats]


class Family(ABC):
    """A grid of M alternatives, averaged with equal weights.

    What a family keeps of the past has two parts: a *state* per open sequence, an array (..., N) that is empty before
    the first token, and *totals* (S,) that add up over tokens, sequences, runs and machines, from which the log
    wealth of the members follows.
    """

    needs_laws: ClassVar[bool] = False

    @property
    @abstractmethod
    def name(self) -> str:
        """Unique among the families of one process."""

    @abstractmethod
    def members(self, n_components: int) -> tuple[str, ...]:
        """A label for each of the M members."""

    @abstractmethod
    def advance(self, state: Floats, step: Step) -> tuple[Floats, Floats]:
        """The state after one token, and what that token adds to the totals (S, N)."""

    def n_totals(self, n_components: int) -> int:
        """S; by default the totals are the log wealths themselves."""
        return len(self.members(n_components))

    def log_wealth(self, totals: Floats) -> Floats:
        """log E (M, ...) of the members, from totals (S, ...)."""
        return totals

    def read(self, laws: Laws, rng: np.random.Generator | None) -> Tensor:
        """The F numbers (L, F) that this family keeps of the full laws."""
        return torch.zeros(len(laws.tokens), 0)


def _check_grid(name: str, values: tuple[float, ...], low: float) -> None:
    if not values or not all(low < value < 1 for value in values):
        raise ValueError(f"{name} must be one or more numbers strictly between {low:g} and 1, got {values}")


@dataclass(frozen=True)
class WeightShifts(Family):
    """Wrong mixing weights: w moved by a strength s towards each vertex, ``q/p = (1 - s) + s R_i``.

    For two components these are all λ' on a grid. For more, a shift in another direction is found by the vertices that
    gain from it. Relative to w, so that it holds for routers too. A component of weight zero is among the vertices.
    """

    strengths: tuple[float, ...] = (1 / 64, 1 / 32, 1 / 16, 1 / 8, 1 / 4, 1 / 2, 15 / 16)

    def __post_init__(self) -> None:
        _check_grid("strengths", self.strengths, 0.0)

    @property
    def name(self) -> str:
        return "weights"

    def members(self, n_components: int) -> tuple[str, ...]:
        return tuple(f"{s:.3g} towards component {i}" for s in self.strengths for i in range(n_components))

    def advance(self, state: Floats, step: Step) -> tuple[Floats, Floats]:
        s = np.repeat(self.strengths, len(step.ratios))[:, None]
        return state, np.log(s * np.tile(step.ratios, (len(self.strengths), 1)) + (1 - s))


@dataclass(frozen=True)
class HiddenMarkov(Family):
    """A component index that remembers itself: a hidden Markov chain over components, restarted with each sequence.

    With probability |ρ| the next component is the last one (ρ > 0, sticky) or its cyclic successor (ρ < 0, round
    robin), else it is drawn from w. ρ → 1 is the mixture of whole sequences. The forward recursion gives the predictive
    weights a of the index, and ``q/p = sum_i a_i R_i``, at least 1 - |ρ|.

    >>> one, two = (Step(np.array([[r], [2 - r]]), np.array([[0.5], [0.5]]), {}) for r in (1.8, 1.6))
    >>> family = HiddenMarkov((-0.5, 0.5))
    >>> state, first = family.advance(np.empty(0), one)
    >>> np.exp(first).ravel(), np.exp(family.advance(state, two)[1]).ravel()
    (array([1., 1.]), array([0.76, 1.24]))
    """

    correlations: tuple[float, ...] = (-0.9, -0.5, -0.2, -0.05, 0.05, 0.2, 0.5, 0.9, 0.99, 0.999)

    def __post_init__(self) -> None:
        _check_grid("correlations", self.correlations, -1.0)

    @property
    def name(self) -> str:
        return "hidden Markov"

    def members(self, n_components: int) -> tuple[str, ...]:
        return tuple(f"correlation {rho:g}" for rho in self.correlations)

    def advance(self, state: Floats, step: Step) -> tuple[Floats, Floats]:
        # The state (K, M, N) is the law of the next index if it follows the last one.
        rho = np.array(self.correlations)
        memory = np.abs(rho)[:, None]
        if state.size:
            predicted = step.weights[:, None, :] * (1 - memory)
            predicted += memory * state
        else:
            predicted = np.repeat(step.weights[:, None, :], len(rho), axis=1)
        predicted *= step.ratios[:, None, :]
        total = predicted.sum(0)
        predicted /= total
        cyclic = rho < 0
        predicted[:, cyclic] = np.roll(predicted[:, cyclic], 1, axis=0)
        return predicted, np.log(total)


_TEMPERATURES = tuple((Temperature(2.0**h), 1.0) for h in (-1, -1 / 4, -1 / 16, 1 / 16, 1 / 4, 1))
# A law that is flatter on a few tokens: what a stale or misplaced prefix writes is often unlikely after the right one.
_CONTAMINATIONS = tuple((Temperature(tau), 1 / 16) for tau in (2.0, 8.0))
_TRUNCATIONS = tuple((warp, s) for warp in (Greedy(), TopK(5), TopK(10), TopK(50)) for s in (1 / 16, 1 / 2, 15 / 16))


@dataclass(frozen=True)
class Tilts(Family):
    """A transform g of the mixture on a share ε of the tokens: ``q = (1 - ε) p + ε g(p)``. Needs full laws.

    `tilts` are pairs (warp, ε). A temperature keeps every possible token possible, so it may have ε = 1; a truncation
    with ε = 1 would be ruined by the first token outside its support.
    """

    tilts: tuple[tuple[Warp, float], ...] = _TEMPERATURES + _CONTAMINATIONS + _TRUNCATIONS

    needs_laws: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if not self.tilts or any(not (isinstance(w, Warp) and 0 < share <= 1) for w, share in self.tilts):
            raise ValueError(f"tilts must be pairs (Warp, share) with 0 < share ≤ 1, got {self.tilts!r:.80}")

    @property
    def name(self) -> str:
        return "tilts"

    def members(self, n_components: int) -> tuple[str, ...]:
        return tuple(f"{warp!r} on {share:.3g}" for warp, share in self.tilts)

    def read(self, laws: Laws, rng: np.random.Generator | None) -> Tensor:
        log_p, log_q = laws.log_p, {}
        for warp, _ in self.tilts:
            if warp not in log_q:
                log_q[warp] = warp.at(laws.mixture, laws.tokens) - log_p
        shares = torch.tensor([share for _, share in self.tilts], dtype=log_p.dtype, device=log_p.device)
        moved = torch.stack([log_q[warp] for warp, _ in self.tilts], dim=-1)
        return torch.logaddexp(torch.log1p(-shares).expand_as(moved), shares.log() + moved)

    def advance(self, state: Floats, step: Step) -> tuple[Floats, Floats]:
        return state, step.readings[self.name]


@dataclass(frozen=True)
class TransformBins(Family):
    """Anything else: ``U_t = F_t(x_t-) + v_t p_t(x_t)`` should be uniform, whatever was seen before. Needs full laws.

    Tokens are ordered by decreasing p ("rank"), by P_1/p ("ratio") or by "id"; v is uniform. A Dirichlet prior with
    each of `concentrations` per bin makes q the predictive law of the next bin; with `pairs`, given the bin before it.
    Totals are the counts, so runs that are merged learn from each other: ``E = B^n DirMult(counts)``.
    """

    order: str = "rank"
    bins: int = 16
    pairs: bool = False
    concentrations: tuple[float, ...] = (1.0, 16.0, 256.0)

    needs_laws: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if self.order not in ("rank", "ratio", "id"):
            raise ValueError(f"order must be 'rank', 'ratio' or 'id', got {self.order!r}")
        if not isinstance(self.bins, int) or self.bins < 2:
            raise ValueError(f"bins must be an integer of at least 2, got {self.bins!r}")
        if not self.concentrations or not all(0 < a < math.inf for a in self.concentrations):
            raise ValueError(f"concentrations must be positive and finite, got {self.concentrations}")

    @property
    def name(self) -> str:
        return f"transform by {self.order}{', pairs' * self.pairs}"

    def members(self, n_components: int) -> tuple[str, ...]:
        return tuple(f"concentration {a:g}" for a in self.concentrations)

    def n_totals(self, n_components: int) -> int:
        return self.bins * (self.bins + 1 if self.pairs else 1)

    def read(self, laws: Laws, rng: np.random.Generator | None) -> Tensor:
        if rng is None:
            raise ValueError(f"rng must be a numpy Generator: the family {self.name!r} randomises")
        p, index = laws.mixture.exp(), laws.tokens[:, None]
        ids = torch.arange(p.shape[-1], device=p.device)
        before = ids < index
        if self.order != "id":
            key = -p if self.order == "rank" else torch.where(p > 0, laws.parts[:, 0] - laws.mixture, math.inf)
            own = key.gather(-1, index)
            before = (key < own) | ((key == own) & before)
        v = torch.from_numpy(rng.random(len(index))).to(p.device)
        return ((p * before).sum(-1) + v * p.gather(-1, index)[:, 0])[:, None]

    def advance(self, state: Floats, step: Step) -> tuple[Floats, Floats]:
        bins = np.minimum((step.readings[self.name] * self.bins).astype(np.int64), self.bins - 1)
        cell = bins[0]
        if self.pairs and state.size:  # cells before `bins` are for the first token of a sequence
            cell = cell + self.bins * (1 + state[0].astype(np.int64))
        gains = np.zeros((self.n_totals(1), len(cell)))
        gains[cell, np.arange(len(cell))] = 1
        return bins.astype(np.float64), gains

    def log_wealth(self, totals: Floats) -> Floats:
        counts = totals.reshape(-1, self.bins, *totals.shape[1:])
        n = counts.sum(1)
        return np.stack(
            [
                (gammaln(a * self.bins) - gammaln(a * self.bins + n) + n * math.log(self.bins)).sum(0)
                + (gammaln(a + counts) - gammaln(a)).sum((0, 1))
                for a in self.concentrations
            ]
        )


SCORE_FAMILIES: tuple[Family, ...] = (WeightShifts(), HiddenMarkov())
LAW_FAMILIES: tuple[Family, ...] = (
    Tilts(),
    TransformBins("rank"),
    TransformBins("ratio"),
    TransformBins("id", bins=8, pairs=True),
)
ALL_FAMILIES: tuple[Family, ...] = SCORE_FAMILIES + LAW_FAMILIES
