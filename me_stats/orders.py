"""Where transforms stand, before or behind the mixture, as laws that can be compared and taken apart.

`OrderedLaw` names a law over given components by its order, transforms and weights; `stages` walks from one law to
another one cause at a time.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, get_args

from me_stats.mixing import ConstantMixing
from me_stats.models.aligned import over_byte_strings
from me_stats.models.ensemble import Ensemble
from me_stats.models.joint import CAUSES, PublishedCE
from me_stats.models.warped import Greedy, MinP, Temperature, TopK, TopP, Warp, Warped

Order = Literal["transform-then-mix", "mix-then-transform", "union-joint", "union-component", "published-ce"]
ORDERS: tuple[Order, ...] = get_args(Order)


@dataclass(frozen=True)
class Transforms:
    """Transforms of one step, in the order in which generation libraries apply them; the defaults change nothing.

    >>> Transforms(temperature=0.7, top_k=10).warps()
    (Temperature(tau=0.7), TopK(k=10))
    """

    temperature: float = 1.0
    top_k: int | None = None
    top_p: float = 1.0
    min_p: float = 0.0
    greedy: bool = False

    def warps(self) -> tuple[Warp, ...]:
        """The transforms that change something; ValueError for one out of range."""
        chosen: list[Warp] = [Temperature(self.temperature)] if self.temperature != 1 else []
        chosen += [TopK(self.top_k)] if self.top_k is not None else []
        chosen += [TopP(self.top_p)] if self.top_p != 1 else []
        chosen += [MinP(self.min_p)] if self.min_p != 0 else []
        chosen += [Greedy()] if self.greedy else []
        return tuple(chosen)


@dataclass(frozen=True)
class OrderedLaw:
    r"""A law over K components: weights, transforms, and where the transforms stand.

    =======================  =====================================================================================
    order                    law
    =======================  =====================================================================================
    ``transform-then-mix``   :math:`\sum_i λ_i g(P_i)`: an `Ensemble`, which ME samples exactly
    ``mix-then-transform``   :math:`g(\sum_i λ_i P_i)`
    ``union-joint``          the mixture on the union of top-k sets, renormalised once; temperature and top-p inside
    ``union-component``      the same, each component renormalised: λ stays λ
    ``published-ce``         the published CE, cause by cause the sum of all of these: `PublishedCE`
    =======================  =====================================================================================

    Examples
    --------
    >>> from me_stats.models import MarkovModel
    >>> law = OrderedLaw("mix-then-transform", Transforms(top_k=2), (0.5, 0.5))
    >>> toys = [MarkovModel.random(5, seed=s) for s in (0, 1)]
    >>> law.over(toys).log_probs([(0,)]).exp().numpy().round(3)
    array([[0.   , 0.615, 0.   , 0.   , 0.385]])

    Raises ValueError for an unknown order, and for transforms that an order does not have.
    """

    order: Order
    transforms: Transforms
    weights: tuple[float, ...]

    def __post_init__(self) -> None:
        if self.order not in ORDERS:
            raise ValueError(f"order must be one of {', '.join(ORDERS)}, got {self.order!r}")
        if self.order in ("union-joint", "union-component") and self.transforms.top_k is None:
            raise ValueError(f"{self.order} is a union of top-k sets: set top_k")
        if self.order not in ("transform-then-mix", "mix-then-transform") and self.transforms.min_p != 0:
            raise ValueError(f"{self.order} has no min-p: leave min_p at 0, or compare mix-then-transform")
        self.transforms.warps()
        ConstantMixing(self.weights)

    def over(self, components: Sequence[Any]) -> Any:
        """The LanguageModel over these components."""
        mixing, warps = ConstantMixing(self.weights), self.transforms.warps()
        if self.order == "transform-then-mix":
            return _moved(components, mixing, warps, behind=())
        if self.order == "mix-then-transform":
            return _moved(components, mixing, warps, behind=warps)
        settings = {
            name: getattr(self.transforms, name) for name in ("temperature", "top_k", "top_p", "greedy")
        }  # fmt: skip
        causes: dict[str, tuple[Any, ...]] = {"union-component": ("union",), "union-joint": ("union", "joint")}
        whole = PublishedCE(components, mixing, **settings)
        # Over several vocabularies the published code renormalises each component for itself.
        several = over_byte_strings(components)
        published = [cause for cause in whole.active if not (several and cause == "joint")]
        return whole.with_causes(*causes.get(self.order, published))


@dataclass(frozen=True)
class Stage:
    """A cause of the distance between two laws: the first law with this cause `alone`, and with all up to this one."""

    name: str
    alone: Any
    cumulative: Any


def stages(first: OrderedLaw, second: OrderedLaw, components: Sequence[Any]) -> tuple[Stage, ...]:
    """The way from a transform-then-mix law to `second`, one cause at a time; empty from any other order.

    Weights and transforms that differ come first, as ``"weights"`` and ``"settings"``; then, at the settings of
    `second`, what its order moves behind the mixture or computes jointly. `alone` applies one cause to `first`; None
    where it has no meaning without the settings of `second`.

    Examples
    --------
    >>> from me_stats.models import MarkovModel
    >>> transforms = Transforms(temperature=0.7, top_k=2)
    >>> laws = [OrderedLaw(order, transforms, (0.5, 0.5)) for order in ("transform-then-mix", "mix-then-transform")]
    >>> [stage.name for stage in stages(*laws, [MarkovModel.random(5, seed=s) for s in (0, 1)])]
    ['temperature', 'top_k']
    """
    if first.order != "transform-then-mix":
        return ()
    found, here = [], first
    changes: dict[str, dict[str, Any]] = {
        "weights": {"weights": second.weights},
        "settings": {"transforms": second.transforms},
    }
    for name, change in changes.items():
        here, before = replace(here, **change), here
        if here != before:
            only = replace(first, **change)
            found.append(Stage(name, only.over(components), here.over(components)))
    same = not found
    mixing, warps = ConstantMixing(second.weights), second.transforms.warps()
    if second.order == "mix-then-transform":
        for place, warp in enumerate(warps):
            moved = _moved(components, mixing, warps, behind=(warp,)) if same else None
            found.append(Stage(_name(warp), moved, _moved(components, mixing, warps, behind=warps[: place + 1])))
    elif second.order != "transform-then-mix":
        whole = second.over(components)
        causes = [cause for cause in CAUSES if cause in whole.causes and cause in whole.active]
        for place, cause in enumerate(causes):
            single = whole.with_causes(cause) if same else None
            found.append(Stage(cause, single, whole.with_causes(*causes[: place + 1])))
    return tuple(found)


def _moved(components: Sequence[Any], mixing: ConstantMixing, warps: Sequence[Warp], behind: Sequence[Warp]) -> Any:
    """The mixture with the warps of `behind` after it and the others inside."""
    inside = [warp for warp in warps if warp not in behind]
    after = [warp for warp in warps if warp in behind]
    mixture = Ensemble([Warped(c, *inside) if inside else c for c in components], mixing)
    return Warped(mixture, *after) if after else mixture


def _name(warp: Warp) -> str:
    names = {Temperature: "temperature", TopK: "top_k", TopP: "top_p", MinP: "min_p", Greedy: "greedy"}
    return names[type(warp)]
