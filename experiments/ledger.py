"""Prices of what separates the published CE from ME, law by law along given continuations.

Every price is a pair of laws over the same networks. All pairs are read in one pass, row by row, so memory is that of
a few laws of one row, whatever the number of pairs and the size of the vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from me_stats.dependence import clustered_mean
from me_stats.divergence import escaped_mass, tv_distance
from me_stats.mixing import ConstantMixing
from me_stats.models import Ensemble, Temperature, Warped
from me_stats.models.aligned import over_byte_strings
from me_stats.models.base import Prefix
from me_stats.models.joint import CAUSES, JointTransform, PublishedCE, UnionTopK, published_me
from me_stats.models.shared import readings_along
from me_stats.orders import OrderedLaw, Transforms, stages

Floats = NDArray[np.float64]
Key = tuple[Any, ...]

TRANSFORMS: dict[str, Transforms] = {
    "none": Transforms(),
    "temperature 0.7": Transforms(temperature=0.7),
    "top-k 50": Transforms(top_k=50),
    "top-k 10": Transforms(top_k=10),
    "top-k 5": Transforms(top_k=5),
    "top-p 0.9": Transforms(top_p=0.9),
    "min-p 0.1": Transforms(min_p=0.1),
    "greedy": Transforms(greedy=True),
}
CASES: dict[str, Transforms] = {
    "k = 10": Transforms(top_k=10),
    "k = 10, T = 0.7": Transforms(top_k=10, temperature=0.7),
    "k = 5": Transforms(top_k=5),
    "k = 50": Transforms(top_k=50),
    "T = 0.7": Transforms(temperature=0.7),
    "p = 0.9": Transforms(top_p=0.9),
    "greedy": Transforms(greedy=True),
}
CURVES: dict[str, tuple[float, ...]] = {
    "k": (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 10_000, 100_000),
    "T": (0.5, 0.7, 0.85, 1.0, 1.2, 1.5, 2.0),
    "p": (0.5, 0.7, 0.8, 0.9, 0.95, 0.99),
}
PUBLISHED = Transforms(top_k=10)
"""The published default."""


@dataclass(frozen=True)
class ClampedTemperature(Temperature):
    """Temperature as the published code has it: probabilities are raised to `least` before the power 1/T.

    N tokens that a truncation had excluded come back, each with :math:`10^{-12/T}` of what a sure token weighs.
    ``least=0`` is the ideal.
    """

    least: float = 1e-12

    def __call__(self, log_probs: Tensor) -> Tensor:
        # Thousands of equal terms: a float32 sum of them is no law any more.
        wide = log_probs.double()
        return super().__call__(wide.clamp(min=math.log(self.least)) if self.least else wide)


class HalfMixture(JointTransform):
    """The mixture computed in half precision: logits, probabilities, and their weighted sum, which is renormalised.

    Logits are known up to a constant. Log-probabilities stand in for them, and round more finely where the mass is.
    """

    def combine(self, laws: Sequence[Tensor], log_weights: Tensor) -> Tensor:
        weights = log_weights.exp().to(laws[0].device).half()
        parts = [law.half().float().softmax(-1).half() * weights[:, i : i + 1] for i, law in enumerate(laws)]
        total = torch.stack(parts).sum(0).float()
        return (total / total.sum(-1, keepdim=True)).log()


class WideMixture(JointTransform):
    """The mixture computed in float64, from the laws as they are: what rounding is measured against."""

    def combine(self, laws: Sequence[Tensor], log_weights: Tensor) -> Tensor:
        weights = log_weights.exp().to(laws[0].device)
        return torch.stack([law.double().exp() * weights[:, i : i + 1] for i, law in enumerate(laws)]).sum(0).log()


@dataclass(frozen=True)
class Gap:
    """TV a step (P,) of a pair and the mass (P,) of its first law outside the support of the second, with rows (P,)."""

    tv: Floats
    outside: Floats
    rows: NDArray[np.int64]

    def summary(self) -> dict[str, Any]:
        """Numbers for a record; standard errors and intervals count rows."""
        estimate, outside = clustered_mean(self.tv, self.rows), clustered_mean(self.outside, self.rows)
        return {
            "mean": estimate.value,
            "stderr": estimate.stderr,
            "interval": estimate.interval,
            "quantiles": np.quantile(self.tv, (0.1, 0.5, 0.9)),
            "max": float(self.tv.max()),
            "outside_support": outside.value,
            "outside_stderr": outside.stderr,
            "prefixes": len(self.tv),
        }


@dataclass
class Draws:
    """Whether the rows are draws of ME's law: sums over written tokens of two scores with mean 0, and their variances.

    The first is P_1/p - 1 with P_1 the first component as ME reads it, which wrong weights or a wrong component move;
    the second is 1 for a token outside the support of CE, less the mass that prices say p has there.
    """

    weights: list[tuple[float, float]] = field(default_factory=list)
    outside: list[tuple[float, float]] = field(default_factory=list)

    def add(self, path: Prefix, first: Tensor, p: Tensor, q: Tensor, mass: Floats) -> None:
        """Note the tokens of one row under the laws (T, V) of P_1, ME and CE, and the mass (T,) outside of CE."""
        ids = torch.tensor(path, dtype=torch.int64)[:, None]
        first, p, excluded = first.double().exp().cpu(), p.double().exp().cpu(), (q == -math.inf).cpu()
        ratio = torch.where(p > 0, first / p, 0.0) - 1
        # A token that p excludes has no score; compare_laws refuses rows with more of them than rounding explains.
        written = torch.where(p.gather(-1, ids) > 0, ratio.gather(-1, ids), 0.0)
        self.weights.append((float(written.sum()), float((p * ratio.square()).sum())))
        escaped = float(excluded.gather(-1, ids).sum())
        self.outside.append((escaped - float(mass.sum()), float((mass * (1 - mass)).sum())))

    def scores(self) -> dict[str, float]:
        """Both sums in standard errors; standard normal in the limit."""
        found = {}
        for name, parts in (("weights", self.weights), ("outside", self.outside)):
            total, variance = (sum(values) for values in zip(*parts, strict=True))
            found[name] = (
                total / math.sqrt(variance) if variance > 0 else math.copysign(math.inf, total) if total else 0.0
            )
        return found


def published_ce(components: Sequence[Any], mixing: ConstantMixing, transforms: Transforms) -> PublishedCE:
    """The published CE; over several vocabularies it renormalises each component for itself."""
    return PublishedCE(
        components, mixing, temperature=transforms.temperature, top_k=transforms.top_k, top_p=transforms.top_p,
        greedy=transforms.greedy, causes=[c for c in CAUSES if not (c == "joint" and over_byte_strings(components))],
    )  # fmt: skip


def asked(axis: str, point: float, *, published: bool = False) -> Transforms:
    """The transforms of one point of a curve: k, T or p alone, or beside the k = 10 of the published default."""
    base = PUBLISHED if published else Transforms()
    if axis == "k":
        return replace(base, top_k=int(point))
    return replace(base, temperature=point) if axis == "T" else replace(base, top_p=point)


def points(axis: str, size: int) -> tuple[float, ...]:
    """The points of a curve that mean something for a vocabulary of `size`."""
    return tuple(point for point in CURVES[axis] if axis != "k" or point <= size)


def pairs(ensemble: Ensemble, *, curves: bool) -> Iterator[tuple[Key, Any, Any]]:
    """(key, first law, second law) of every price; pairs that share a law stand together.

    =================================  =============================================================================
    key                                pair
    =================================  =============================================================================
    ``("order", t)``                   transform-then-mix and mix-then-transform with the `Transforms` t
    ``("published", t)``               ME and the published CE
    ``("alone", t, cause)``            ME and ME with this cause
    ``("cumulative", t, cause)``       ME and ME with all causes up to this one
    ``("added", t, cause)``            all causes before this one, and with it
    ``("rest", t)``                    all causes, and the published CE: one law
    ``("entry", name)``                single rows of the ledger
    =================================  =============================================================================
    """
    components, mixing = ensemble.components, ensemble.mixing
    assert isinstance(mixing, ConstantMixing)
    weights = tuple(mixing.weights.tolist())
    grid = [(axis, point) for axis in CURVES for point in points(axis, ensemble.vocabulary.size)] if curves else []
    orders = {*TRANSFORMS.values(), *(asked(*place) for place in grid)}
    settings = dict.fromkeys([*CASES.values(), *(asked(*place, published=True) for place in grid)])
    for transforms in dict.fromkeys([*settings, *TRANSFORMS.values(), *(asked(*place) for place in grid)]):
        inside = OrderedLaw("transform-then-mix", transforms, weights)
        me = inside.over(components)
        if transforms in orders:
            yield ("order", transforms), me, OrderedLaw("mix-then-transform", transforms, weights).over(components)
        if transforms not in settings:
            continue
        ce = published_ce(components, mixing, transforms)
        yield ("published", transforms), me, ce
        if transforms in CASES.values():
            before = me
            for stage in stages(inside, OrderedLaw("published-ce", transforms, weights), components):
                # The first cause is the same law alone and cumulative: it is computed once.
                after = stage.alone if before is me else stage.cumulative
                yield ("alone", transforms, stage.name), me, stage.alone
                yield ("cumulative", transforms, stage.name), me, after
                yield ("added", transforms, stage.name), before, after
                before = after
            yield ("rest", transforms), before, ce
    yield from _entries(components, mixing, weights)


def _entries(
    components: Sequence[Any], mixing: ConstantMixing, weights: tuple[float, ...]
) -> Iterator[tuple[Key, Any, Any]]:
    """Rows of the ledger that are no cause of `PublishedCE`."""
    plain = Transforms(top_k=None)
    yield ("entry", "no transform"), WideMixture(components, mixing), published_ce(components, mixing, plain)
    yield ("entry", "half precision"), Ensemble(components, mixing), HalfMixture(components, mixing)
    union = [OrderedLaw(order, PUBLISHED, weights).over(components) for order in ("union-component", "union-joint")]
    yield ("entry", "joint renormalisation"), *union
    for temperature in (2.0, 0.7):
        ideal, clamped = (Warped(union[0], ClampedTemperature(temperature, least)) for least in (0.0, 1e-12))
        yield ("entry", f"clamp, T = {temperature:g}"), ideal, clamped
    if over_byte_strings(components):
        shared, own = (published_me(components, mixing, own_ids=ids) for ids in (False, True))
        yield ("entry", "transforms before strings"), shared, own


@dataclass(frozen=True)
class Prices:
    """What `measure` found: gaps by key, the z-scores of the rows as draws of ME, and the largest sum of scores.

    `score_sums` are Σ score over the union of top-10 sets, None where nothing is scored by a first subtoken.
    """

    gaps: dict[Key, Gap]
    draws: dict[str, float]
    score_sums: tuple[float, float] | None


def measure(
    ensemble: Ensemble,
    prompts: Sequence[Prefix],
    rows: Sequence[Prefix],
    *,
    curves: bool,
    progress: Callable[[int], None] = lambda done: None,
) -> Prices:
    """All prices along continuations that ME drew with the published default; `progress` gets the rows done."""
    wanted = list(pairs(ensemble, curves=curves))
    found: dict[Key, list[tuple[Floats, Floats]]] = {key: [] for key, _, _ in wanted}
    me, ce = next((me, ce) for key, me, ce in wanted if key == ("published", PUBLISHED))
    scored = over_byte_strings(ensemble.components)
    union = UnionTopK(ensemble.components, ensemble.mixing, 10, score="first_subtoken" if scored else "own")
    drawn, sums = Draws(), []
    for number, reading in enumerate(readings_along([law for _, *both in wanted for law in both], prompts, rows)):
        # Neighbouring pairs share laws; a few are enough, and all of a row would fill the memory.
        law = lru_cache(maxsize=6)(reading.law)
        for key, one, other in wanted:
            found[key].append(_gap(law(one), law(other)))
        outside = found["published", PUBLISHED][-1][1]
        drawn.add(rows[number], law(me.components[0]), law(me), law(ce), outside)
        if scored:
            sums.append(union.score_sums([reading.law(part) for part in union.components]).flatten().cpu())
        progress(number + 1)
    place = np.repeat(np.arange(len(rows)), [len(row) for row in rows])
    joined = {key: [np.concatenate(part) for part in zip(*own, strict=True)] for key, own in found.items()}
    gaps = {key: Gap(tv, outside, place) for key, (tv, outside) in joined.items()}
    every = torch.cat(sums) if scored else None
    return Prices(gaps, drawn.scores(), None if every is None else (float(every.mean()), float(every.max())))


def _gap(one: Tensor, other: Tensor) -> tuple[Floats, Floats]:
    both = (tv_distance(one, other), escaped_mass(one, other))
    tv, outside = (torch.as_tensor(part, dtype=torch.float64).cpu().numpy() for part in both)
    return tv, outside


def tables(prices: Prices) -> dict[str, Any]:
    """Transforms in both orders, ME and CE by cause, single entries, and what the rows look like as draws."""
    gaps = prices.gaps
    return {
        "transforms": {name: gaps["order", transforms].summary() for name, transforms in TRANSFORMS.items()},
        "ledger": {name: _by_cause(gaps, transforms) for name, transforms in CASES.items()},
        "entries": {key[1]: gap.summary() for key, gap in gaps.items() if key[0] == "entry"},
        "draws": prices.draws,
        "score_sums": prices.score_sums,
    }


def _by_cause(gaps: dict[Key, Gap], transforms: Transforms) -> dict[str, Any]:
    names = [key[2] for key in gaps if key[:2] == ("alone", transforms)]
    ways = ("alone", "cumulative", "added")
    causes = [{"name": name} | {way: gaps[way, transforms, name].summary() for way in ways} for name in names]
    return {
        "total": gaps["published", transforms].summary(),
        "causes": causes,
        "sum_alone": float(sum(gaps["alone", transforms, name].tv.mean() for name in names)),
        "rest": float(gaps["rest", transforms].tv.max()),
    }


def curves(prices: Prices, size: int) -> dict[str, list[dict[str, Any]]]:
    """Points of each curve: mix-then-transform against transform-then-mix, and the published CE against ME."""
    return {
        axis: [
            {"at": point}
            | {
                kind: prices.gaps[kind, asked(axis, point, published=kind == "published")].summary()
                for kind in ("order", "published")
            }
            for point in points(axis, size)
        ]
        for axis in CURVES
    }
