"""What a server does to the law that it should draw from, named from draws alone: temperature, top-k, penalties, ...

Each suspicion is a family of laws, and its `gain` is how much more likely its best member makes the draws than the law
does, in nats. For all families here but the temperature, draws from the law gain g nats with a chance of at most
exp(-g), and for the temperature, which is looked at on both sides, 2 exp(-g): truncations keep a set of mass m, and n
draws stay inside with chance m^n; the other two are exponential families in one statistic, where this is Chernoff's
bound. So a gain is a test as well as a name.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import minimize_scalar
from scipy.special import logsumexp

from me_stats.chi_square import check_level
from me_stats.goodness import bonferroni, portfolio

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]

_LEAST_MISSING = 1e-6  # mass of the tokens that a list leaves out; log-probabilities come as rounded float32
_TIE = 1e-9


@dataclass(frozen=True, eq=False)
class Draws:
    """Tokens drawn after one prefix, and the law that they should have.

    Attributes
    ----------
    prefix
        Ids before the token.
    tokens
        (n,) ids drawn, in any order.
    ids, log_p
        (m,) tokens of known log-probability, most probable first.
    size
        V; with m < V, `log_p` is a top list and what is missing lies elsewhere.
    """

    prefix: tuple[int, ...]
    tokens: Ints
    ids: Ints
    log_p: Floats
    size: int

    @classmethod
    def of(cls, prefix: Sequence[int], tokens: Sequence[int], law: dict[int, float], size: int) -> Draws:
        """From a law as log-probabilities by id."""
        listed = sorted(law, key=lambda token: (-law[token], token))
        values = np.array([law[token] for token in listed], dtype=np.float64)
        return cls(tuple(prefix), np.asarray(tokens, dtype=np.int64), np.array(listed, dtype=np.int64), values, size)

    @property
    def n(self) -> int:
        return len(self.tokens)

    @property
    def missing(self) -> float:
        """Mass outside the listed ids."""
        if len(self.ids) >= self.size:
            return 0.0
        return max(1 - float(np.exp(self.log_p).sum()), _LEAST_MISSING)

    @property
    def cells(self) -> Floats:
        """(m + 1,) probabilities of the listed ids and of all others together; they sum to 1."""
        mass = np.append(np.exp(self.log_p), self.missing)
        return mass / mass.sum()

    @property
    def ranks(self) -> Ints:
        """(n,) cell of each draw."""
        order = np.argsort(self.ids)
        place = np.minimum(np.searchsorted(self.ids[order], self.tokens), len(self.ids) - 1)
        found = order[place]
        return np.where(self.ids[found] == self.tokens, found, len(self.ids))


@dataclass(frozen=True)
class Suspicion:
    """What may have been done to the law, and the gain in nats; `value` is empty where there is no number."""

    name: str
    value: str
    gain: float


@dataclass(frozen=True)
class LawCheck:
    """Whether draws follow their laws: Bonferroni over a portfolio for each prefix and the suspicions.

    `least_tv` is the smallest total variation that the portfolio finds with power 0.8 on one of its partitions, and
    `least_cut` the smallest mass whose absence shows. `suspicions` come in the order of their gains.
    """

    pvalue: float
    level: float
    n: int
    least_tv: float
    least_cut: float
    suspicions: tuple[Suspicion, ...]

    @property
    def rejected(self) -> bool:
        return self.pvalue <= self.level


def check_law(draws: Sequence[Draws], *, level: float = 1e-6) -> LawCheck:
    """Test independent draws after each of several prefixes against their laws.

    False alarms at most `level` as far as those of `goodness.portfolio`; measured in the tests. Raises ValueError for
    no draws, and what `portfolio` refuses.

    >>> rng = np.random.default_rng(0)
    >>> law = {token: math.log(p) for token, p in enumerate([0.4, 0.3, 0.2, 0.1])}
    >>> fair, cut = rng.choice(4, 200, p=[0.4, 0.3, 0.2, 0.1]), rng.choice(2, 200, p=[4 / 7, 3 / 7])
    >>> check_law([Draws.of([0], fair, law, 4)]).rejected
    False
    >>> found = check_law([Draws.of([0], cut, law, 4)])
    >>> found.rejected, found.suspicions[0].name, found.suspicions[0].value
    (True, 'top_k', '2')
    """
    check_level(level)
    if not draws or min(one.n for one in draws) < 1:
        raise ValueError("draws must hold at least one draw after each of at least one prefix")
    families = _families(draws)
    share = level / (len(families) + 2)  # the portfolios, and the temperature once more
    results = []
    for one in draws:
        cells, counts = one.cells, np.bincount(one.ranks, minlength=len(one.ids) + 1)
        kept = slice(None) if one.missing else slice(-1)
        if counts[-1] and not one.missing:  # an id of probability zero
            cells, kept = one.cells, slice(None)
        with np.errstate(divide="ignore"):
            results.append(portfolio(counts[kept], np.log(cells[kept]), level=share / len(draws)))
    least = bonferroni([part for result in results for part in result.results], level=share, n=sum(d.n for d in draws))
    chances = [len(draws) * min(result.pvalue for result in results)]
    chances += [(2 if one.name == "temperature" else 1) * math.exp(-one.gain) for one in families]
    pvalue = min(1.0, (len(families) + 1) * min(chances))
    cut = -math.expm1(math.log(share) / least.n)
    return LawCheck(pvalue, level, least.n, least.min_detectable_tv, cut, _sorted(families))


def suspects(draws: Sequence[Draws], others: dict[str, Sequence[dict[int, float]]]) -> tuple[Suspicion, ...]:
    """The suspicions of `check_law`, shifted ids, and `others`: by name, another law for each prefix. Largest gain
    first; those of equal gain cannot be told apart."""
    swaps = dict(others)
    for shift in (-1, 1):
        swaps[f"ids shifted by {shift}"] = [
            {int(token + shift) % one.size: float(value) for token, value in zip(one.ids, one.log_p, strict=True)}
            for one in draws
        ]
    families = _families(draws)
    for name, laws in swaps.items():
        gain = sum(_swap_gain(one, law) for one, law in zip(draws, laws, strict=True))
        families.append(Suspicion(name, "", gain))
    return _sorted(families)


def named(suspicions: Sequence[Suspicion]) -> str:
    """The likeliest suspicion in words, with those that explain the draws as well; empty where none gains a nat.

    >>> named([Suspicion("top_k", "2", 30.0), Suspicion("top_p", "0.7", 30.0), Suspicion("temperature", "0.6", 9.0)])
    'top_k 2 or top_p 0.7'
    """
    best = [one for one in suspicions if one.gain > suspicions[0].gain - _TIE] if suspicions[0].gain > 1 else []
    return " or ".join(f"{one.name} {one.value}".strip() for one in best)


def _sorted(families: Sequence[Suspicion]) -> tuple[Suspicion, ...]:
    return tuple(sorted(families, key=lambda one: -one.gain))


def _families(draws: Sequence[Draws]) -> list[Suspicion]:
    return [_temperature(draws), _top_k(draws), _top_p(draws), _min_p(draws), _penalty(draws)]


def _kept_gain(draws: Sequence[Draws], kept: Callable[[Floats], NDArray[np.bool_]]) -> float:
    """Gain of the laws that keep these cells: -sum of n log mass."""
    # Sums that round above 1 would lose what no draw can lose.
    gains = (-one.n * math.log(min(1.0, float(one.cells[kept(one.cells)].sum()))) for one in draws)
    return max(0.0, sum(gains))


def _top_k(draws: Sequence[Draws]) -> Suspicion:
    k = 1 + max(int(one.ranks.max()) for one in draws)
    return Suspicion("top_k", str(k), _kept_gain(draws, lambda cells: np.arange(len(cells)) < k))


def _top_p(draws: Sequence[Draws]) -> Suspicion:
    least = max(float(_before(one.cells)[one.ranks].max()) for one in draws)

    def kept(cells: Floats) -> NDArray[np.bool_]:
        return _before(cells) <= least + _TIE

    # Any value from `least` to the smallest nucleus keeps the same tokens.
    most = min(float(one.cells[kept(one.cells)].sum()) for one in draws)
    return Suspicion("top_p", f"{(least + most) / 2:.2g}", _kept_gain(draws, kept))


def _min_p(draws: Sequence[Draws]) -> Suspicion:
    least = min(float((one.cells[one.ranks] / one.cells[0]).min()) for one in draws)
    # The others' mass says nothing about each of them.
    least = 0.0 if any((one.ranks == len(one.ids)).any() for one in draws) else least
    return Suspicion("min_p", f"{least:.2g}", _kept_gain(draws, lambda cells: cells >= (least - _TIE) * cells[0]))


def _before(cells: Floats) -> Floats:
    """Mass that comes before each cell."""
    return np.cumsum(cells) - cells


def _temperature(draws: Sequence[Draws]) -> Suspicion:
    parts = []
    for one in draws:
        possible = one.log_p[np.isfinite(one.log_p)]
        law = possible - logsumexp(possible)
        ranks = one.ranks
        parts.append((law, law[ranks[ranks < len(law)]]))

    def loss(beta: float) -> float:
        return -sum(beta * drawn.sum() - len(drawn) * logsumexp((1 + beta) * law) for law, drawn in parts)

    found = minimize_scalar(loss, bounds=(-0.95, 19.0), method="bounded")  # temperatures from 20 down to 0.05
    return Suspicion("temperature", f"{1 / (1 + found.x):.2g}", max(0.0, -float(found.fun)))


def _penalty(draws: Sequence[Draws]) -> Suspicion:
    """Tokens of the prefix drawn less often than they should be, whatever penalty does it."""
    seen = []
    for one in draws:
        inside = np.append(np.isin(one.ids, one.prefix), False)
        seen.append((one.n, int(inside[one.ranks].sum()), float(one.cells[inside].sum())))

    def loss(log_factor: float) -> float:
        return -sum(t * log_factor - n * math.log1p(q * math.expm1(log_factor)) for n, t, q in seen)

    found = minimize_scalar(loss, bounds=(-8.0, 0.0), method="bounded")
    gain = max(0.0, -float(found.fun))
    return Suspicion("repetition penalty", f"(prompt tokens x{math.exp(found.x):.2g})", gain)


def _swap_gain(one: Draws, law: dict[int, float]) -> float:
    """Log-likelihood ratio of another law, on the ids that both list and on all others together."""
    both = np.array([int(token) in law for token in one.ids])
    p = np.append(one.cells[:-1][both], 0.0)
    q = np.append(np.exp([law[int(token)] for token in one.ids[both]]), 0.0)
    p[-1], q[-1] = (max(1 - float(mass.sum()), _LEAST_MISSING) for mass in (p, q))
    cell = np.append(np.where(both, np.cumsum(both) - 1, both.sum()), both.sum())[one.ranks]
    with np.errstate(divide="ignore", invalid="ignore"):
        ratios = np.log(q[cell]) - np.log(p[cell])
    return float(ratios.sum()) if not np.isnan(ratios).any() else -math.inf
