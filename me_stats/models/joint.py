"""Laws that are made of all K laws of a step at once, and the published CE taken apart cause by cause.

A joint transform is a LanguageModel and no Ensemble: one component alone does not know what to keep. Exact ways to
sample one: `CESampler`, K runs a token; `SpeculativeSampler` with an ME draft; `FixedMaskSampler` for a fixed set.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from me_stats.mixing import Mixing
from me_stats.models.aligned import Aligned
from me_stats.models.ensemble import Combination, Ensemble, mix
from me_stats.models.subtokens import FirstSubtoken, first_subtokens
from me_stats.models.warped import Greedy, Temperature, TopK, TopP, Warp, Warped

Cause = Literal["temperature", "union", "first_subtoken", "joint", "top_k_again", "top_p", "greedy"]
CAUSES: tuple[Cause, ...] = get_args(Cause)


class JointTransform(Combination):
    """A `Combination` that needs all K laws at once: what every joint transform is, and no `Ensemble` is."""


class UnionTopK(JointTransform):
    r"""The mixture on the union of the components' top-k sets, :math:`A = \bigcup_i \mathrm{top}_k(P_i)`.

    ``"joint"`` mixes and then renormalises once, which is the mixture conditioned on A:

    .. math:: \frac{\sum_i λ_i P_i(x) 1_A(x)}{\sum_j λ_j P_j(A)} = \sum_i λ'_i P_i(x|A),
              \quad λ'_i = \frac{λ_i P_i(A)}{\sum_j λ_j P_j(A)}.

    ``"component"`` renormalises each component and then mixes, :math:`\sum_i λ_i P_i(x|A)`: the weights stay λ. So the
    two differ by the tilt from λ to λ' alone, and are one law where all :math:`P_i(A)` are equal.

    Parameters
    ----------
    components, mixing
        As of an `Ensemble`. A component of weight 0 still widens A.
    k
        At least 1. Tokens tied with a component's k-th belong to its set, as in `TopK`; impossible tokens do not.
    renormalise
        ``"joint"``, what the authors' code does with one vocabulary, or ``"component"``, as with several.
    score
        How a component that is `Aligned` scores a string of A outside its vocabulary: ``"own"``, by its law, so 0; or
        ``"first_subtoken"``, by the first token of its own reading (`FirstSubtoken`). Such scores stand in for
        :math:`P_i` in both formulas, and their sum over A, in place of :math:`P_i(A)`, can exceed 1: `score_sums`.

    Raises ValueError as an `Ensemble` does, and for first-subtoken scores of components that are not `Aligned`.

    Source: UniTE, arXiv 2410.12777 (the union of top-k sets, and scores by the first subtoken).

    Examples
    --------
    >>> from me_stats.mixing import ConstantMixing
    >>> from me_stats.models.toy import TableModel
    >>> toys = [TableModel([row], order=0) for row in ([0.8, 0.1, 0.06, 0.04], [0.3, 0.4, 0.2, 0.1])]
    >>> half = ConstantMixing([0.5, 0.5])
    >>> for way in ("joint", "component"):  # A = {0, 1}, of mass 0.9 and 0.7
    ...     print(UnionTopK(toys, half, 1, renormalise=way).log_probs([()]).exp().numpy().round(4))
    [[0.6875 0.3125 0.     0.    ]]
    [[0.6587 0.3413 0.     0.    ]]
    """

    def __init__(
        self,
        components: Sequence[Any],
        mixing: Mixing,
        k: int,
        *,
        renormalise: Literal["joint", "component"] = "joint",
        score: Literal["own", "first_subtoken"] = "own",
    ) -> None:
        super().__init__(components, mixing)
        if renormalise not in ("joint", "component"):
            raise ValueError(f"renormalise must be 'joint' or 'component', got {renormalise!r}")
        if score not in ("own", "first_subtoken"):
            raise ValueError(f"score must be 'own' or 'first_subtoken', got {score!r}")
        self.k, self.renormalise, self.score = TopK(k).k, renormalise, score
        self._rules = first_subtokens(self.components) if score == "first_subtoken" else ()
        if score == "first_subtoken" and not self._rules:
            raise ValueError("first-subtoken scores need components that are Aligned, which know how strings are read")

    def combine(self, laws: Sequence[Tensor], log_weights: Tensor) -> Tensor:
        scores, kept = self._scores(laws)
        if self.renormalise == "joint":
            return _restricted(mix(scores, log_weights), kept)[0]
        return mix([_restricted(score, kept)[0] for score in scores], log_weights)

    def score_sums(self, laws: Sequence[Tensor]) -> Tensor:
        """Σ_{x ∈ A} score_i(x) (B, K) from K component laws (B, V): P_i(A) at most 1, or a sum that may exceed it.

        >>> from me_stats.mixing import ConstantMixing
        >>> from me_stats.models.toy import TableModel
        >>> from me_stats.vocabulary_map import ByteStrings, TokenBytes
        >>> tables = [TokenBytes.greedy([b"a", b"b"]), TokenBytes.greedy([b"aa", b"ab", b"b", b"a"])]
        >>> toys = [TableModel([row], order=0) for row in ([0.9, 0.1], [0.4, 0.4, 0.1, 0.1])]
        >>> shared = ByteStrings(tables)
        >>> parts = [Aligned(toy, shared, token_bytes=table) for toy, table in zip(toys, tables)]
        >>> ce = UnionTopK(parts, ConstantMixing([0.5, 0.5]), 2, renormalise="component", score="first_subtoken")
        >>> ce.score_sums([part.log_probs([()]) for part in parts])  # "aa" and "ab" both begin with "a"
        tensor([[2.8000, 1.0000]], dtype=torch.float64)
        """
        scores, kept = self._scores(laws)
        return torch.cat([_restricted(score, kept)[1] for score in scores], -1).exp()

    def _scores(self, laws: Sequence[Tensor]) -> tuple[list[Tensor], Tensor]:
        """Log-scores K × (B, V) and the union (B, V)."""
        laws = [law.to(laws[0].device) for law in laws]
        kept = _union([_top(law, self.k) for law in laws])
        return _scored(laws, kept, self._rules), kept

    def __repr__(self) -> str:
        options = f"{self.k}, renormalise={self.renormalise!r}" + (f", score={self.score!r}" if self._rules else "")
        return f"UnionTopK({list(self.components)!r}, {self.mixing!r}, {options})"


class Allowed(Warp):
    """The law given that the token is one of `tokens`: masked and renormalised.

    Raises ValueError for no tokens, ids outside the vocabulary, or a law that gives the set no mass.

    >>> Allowed([0, 2])(torch.tensor([[0.5, 0.3, 0.2]]).log()).exp()
    tensor([[0.7143, 0.0000, 0.2857]])
    """

    def __init__(self, tokens: Iterable[int]) -> None:
        self.tokens = tuple(sorted({int(token) for token in tokens}))
        if not self.tokens or self.tokens[0] < 0:
            raise ValueError(f"Allowed needs at least one token id, none negative, got {list(self.tokens)[:8]}")

    def mask(self, size: int) -> Tensor:
        """(V,) True for the allowed tokens."""
        if self.tokens[-1] >= size:
            raise ValueError(f"Allowed has token id {self.tokens[-1]}, outside the vocabulary 0..{size - 1}")
        kept = torch.zeros(size, dtype=torch.bool)
        kept[list(self.tokens)] = True
        return kept

    def __call__(self, log_probs: Tensor) -> Tensor:
        law, log_mass = _restricted(log_probs, self.mask(log_probs.shape[-1]).to(log_probs.device))
        if bool((log_mass == -math.inf).any()):
            raise ValueError("a law gives no mass to the allowed tokens, so it cannot be conditioned on them")
        return law

    def __repr__(self) -> str:
        return f"Allowed({len(self.tokens)} tokens)"


class Restricted(JointTransform):
    r"""The mixture conditioned on a fixed token set A, :math:`\sum_i λ_i P_i(x) 1_A(x) / \sum_j λ_j P_j(A)`.

    The same law as ``Warped(Ensemble(components, mixing), Allowed(A))``, with the components in sight of
    `FixedMaskSampler`. Masks inside the components, ``Ensemble([Warped(m, Allowed(A)) ...])``, keep λ where this law
    has :math:`λ'_i \propto λ_i P_i(A)`. For K = 2 the two are
    :math:`|λ'_1 - λ_1| \, \mathrm{TV}(P_1(\cdot|A), P_2(\cdot|A))` apart.

    >>> from me_stats.mixing import ConstantMixing
    >>> from me_stats.models.toy import TableModel
    >>> toys = [TableModel([row], order=0) for row in ([0.5, 0.3, 0.2], [0.1, 0.1, 0.8])]
    >>> Restricted(toys, ConstantMixing([0.5, 0.5]), [0, 1]).log_probs([()]).exp().numpy().round(12)
    array([[0.6, 0.4, 0. ]])
    """

    def __init__(self, components: Sequence[Any], mixing: Mixing, allowed: Iterable[int]) -> None:
        super().__init__(components, mixing)
        self.allowed = Allowed(allowed)
        self.mask = self.allowed.mask(self.vocabulary.size)

    def combine(self, laws: Sequence[Tensor], log_weights: Tensor) -> Tensor:
        return self.allowed(mix(laws, log_weights))

    def __repr__(self) -> str:
        return f"Restricted({list(self.components)!r}, {self.mixing!r}, {self.allowed!r})"


class PublishedCE(JointTransform):
    """The conventional ensemble as the authors' code computes it, with each departure from ME on a switch.

    Every step runs: temperature, top-k, renormalisation, top-p and arg max of each component, the mixture, and then
    what `causes` moves behind it. With no causes this is `published_me` (over `Aligned` components with
    ``own_ids=False``), transform-then-mix, which ME samples; with all of them it is the published CE of one vocabulary;
    without ``"joint"`` the CE of several. Each cause alone prices itself.

    ====================  ============================================================================================
    cause                 what it does, and its TV a step alone: SmolLM2-135M under two prompts / SmolLM2 with Gemma 3
                          270M over byte strings (``experiments/results/transform_order-*.json``)
    ====================  ============================================================================================
    ``"temperature"``     tempers the mixture, not the components; at 0.7: .022 / .047
    ``"union"``           keeps the union of the components' top-k sets, a component alone its own; k = 10: .017 / .017
    ``"first_subtoken"``  scores a string of the union that a component has no id for by its first subtoken; changes
                          something with ``"union"`` and components that are `Aligned` only: from .017 to .026
    ``"joint"``           renormalises the kept mass once: weights become λ_i P_i(A_i) / Σ_j λ_j P_j(A_j); k = 10: .010
    ``"top_k_again"``     takes the top k of the mixture; k = 10: .023 / .040, k = 5: .036 / .063
    ``"top_p"``           cuts the nucleus of the mixture; p = .9: .014 / .017
    ``"greedy"``          arg max of the mixture; ME's is an arg max of a random component: .168 / .228
    ====================  ============================================================================================

    Parameters
    ----------
    components, mixing
        As of an `Ensemble`.
    temperature, top_k, top_p
        Of the published code; `top_k` None keeps every token.
    greedy
        An arg max at the end; it reads no temperature and no top-p.
    causes
        Which of `CAUSES` are on.

    Notes
    -----
    A_i is what component i keeps: the union where ``"union"`` is on, its own top-k set where not. Ties are kept, as in
    `TopK`. Two further causes have no switch here: half precision, and a clamp at 1e-12 before the power.

    Examples
    --------
    >>> from me_stats.divergence import tv_distance
    >>> from me_stats.mixing import ConstantMixing
    >>> from me_stats.models.toy import TableModel
    >>> toys, half = [TableModel.random(20, seed=s, order=0) for s in (0, 1)], ConstantMixing([0.5, 0.5])
    >>> published = PublishedCE(toys, half, temperature=0.7, top_k=3)
    >>> me = published_me(toys, half, temperature=0.7, top_k=3).log_probs([()])[0]
    >>> published.active
    ('temperature', 'union', 'joint', 'top_k_again')
    >>> for causes in ((), ("temperature",), ("union",), published.active):
    ...     print(round(tv_distance(published.with_causes(*causes).log_probs([()])[0], me), 3))
    0.0
    0.069
    0.062
    0.33
    """

    def __init__(
        self,
        components: Sequence[Any],
        mixing: Mixing,
        *,
        temperature: float = 1.0,
        top_k: int | None = 10,
        top_p: float = 1.0,
        greedy: bool = False,
        causes: Iterable[Cause] = CAUSES,
    ) -> None:
        super().__init__(components, mixing)
        _check_settings(temperature, top_p, greedy)
        self.causes = frozenset(causes)
        unknown = self.causes - set(CAUSES)
        if unknown:
            raise ValueError(f"causes must be among {', '.join(CAUSES)}, got {', '.join(sorted(map(str, unknown)))}")
        self.temperature, self.greedy = Temperature(temperature), greedy
        self.top_k = TopK(self.vocabulary.size if top_k is None else top_k)
        self.top_p = TopP(top_p)
        self._rules = first_subtokens(self.components)

    @property
    def active(self) -> tuple[Cause, ...]:
        """The causes that can change the law under these settings."""
        cut = self.top_k.k < self.vocabulary.size
        by_cause: dict[Cause, bool] = {
            "temperature": self.temperature.tau != 1, "union": cut, "first_subtoken": cut and bool(self._rules),
            "joint": cut, "top_k_again": cut, "top_p": self.top_p.p < 1, "greedy": self.greedy,
        }  # fmt: skip
        return tuple(cause for cause in CAUSES if by_cause[cause])

    def with_causes(self, *causes: Cause) -> PublishedCE:
        """The same settings with these causes on, and no others."""
        settings: dict[str, Any] = {
            "temperature": self.temperature.tau, "top_k": self.top_k.k, "top_p": self.top_p.p, "greedy": self.greedy,
        }  # fmt: skip
        return PublishedCE(self.components, self.mixing, causes=causes, **settings)

    def combine(self, laws: Sequence[Tensor], log_weights: Tensor) -> Tensor:
        on = self.causes
        laws = [law.to(laws[0].device) for law in laws]
        if "temperature" not in on:
            laws = [self.temperature(law) for law in laws]
        if self.top_k.k < self.vocabulary.size:
            kept = [_top(law, self.top_k.k) for law in laws]
            if "union" in on:
                kept = [_union(kept)] * len(laws)
                laws = _scored(laws, kept[0], self._rules if "first_subtoken" in on else ())
            parts = [_restricted(law, own) for law, own in zip(laws, kept, strict=True)]
            laws = [law for law, _ in parts]
            if "joint" in on:
                masses = torch.cat([log_mass for _, log_mass in parts], -1)
                log_weights = (log_weights.to(masses.device) + masses).log_softmax(-1)
        if "top_p" not in on:
            laws = [self.top_p(law) for law in laws]
        if self.greedy and "greedy" not in on:
            laws = [Greedy()(law) for law in laws]
        law = mix(laws, log_weights)
        if "temperature" in on:
            law = self.temperature(law)
        if "top_k_again" in on:
            law = self.top_k(law)
        if "top_p" in on:
            law = self.top_p(law)
        return Greedy()(law) if self.greedy and "greedy" in on else law

    def __repr__(self) -> str:
        own = (self.temperature, self.top_k, self.top_p, *([Greedy()] if self.greedy else []))
        causes = ", ".join(repr(cause) for cause in CAUSES if cause in self.causes)
        return f"PublishedCE({list(self.components)!r}, {self.mixing!r}, {', '.join(map(repr, own))}; causes {causes})"


def published_me(
    components: Sequence[Any],
    mixing: Mixing,
    *,
    temperature: float = 1.0,
    top_k: int | None = 10,
    top_p: float = 1.0,
    greedy: bool = False,
    own_ids: bool = True,
) -> Ensemble:
    """The ensemble that the published ME samples: transform-then-mix, with the settings of `PublishedCE`.

    The published ME draws from a model's own vocabulary and converts what it drew, so the transforms of an `Aligned`
    component go inside its alignment. With ``own_ids=False`` they see its law over the shared strings: `PublishedCE`
    without causes. The two differ only by ids with equal bytes, which count apart or together, and by control tokens,
    which are dropped after the transforms or before. A cut that keeps nothing but controls is refused at that prefix.

    >>> from me_stats.mixing import ConstantMixing
    >>> from me_stats.models.toy import MarkovModel
    >>> published_me([MarkovModel.random(20, seed=0)], ConstantMixing([1.0]), temperature=0.7).components
    (Warped(MarkovModel(V=20, order=1), Temperature(tau=0.7), TopK(k=10)),)
    """
    _check_settings(temperature, top_p, greedy)
    warps: list[Warp] = [Temperature(temperature)] if temperature != 1 else []
    warps += [TopK(top_k)] if top_k is not None else []
    warps += [TopP(top_p)] if top_p != 1 else []
    warps += [Greedy()] if greedy else []
    return Ensemble(
        [
            part.warped(*warps) if own_ids and warps and isinstance(part, Aligned) else Warped(part, *warps)
            for part in components
        ],
        mixing,
    )


def _check_settings(temperature: float, top_p: float, greedy: bool) -> None:
    if greedy and (temperature != 1 or top_p != 1):
        raise ValueError(
            f"greedy reads no temperature and no top-p, got temperature {temperature} and top_p {top_p}: "
            "leave both at 1, or set greedy=False"
        )


def _top(law: Tensor, k: int) -> Tensor:
    """(B, V) True for the tokens that `TopK` keeps and that are possible."""
    if k >= law.shape[-1]:
        return law > -math.inf
    # A law with fewer than k tokens has -inf as its k-th entry, and must not bring the whole vocabulary along.
    return (law >= law.topk(k, dim=-1).values[..., -1:]) & (law > -math.inf)


def _union(sets: Sequence[Tensor]) -> Tensor:
    return torch.stack(list(sets)).any(0)


def _scored(laws: Sequence[Tensor], kept: Tensor, rules: Sequence[FirstSubtoken]) -> list[Tensor]:
    """What each component says of the strings kept: its law, or a first-subtoken score by its rule."""
    return [rule.scores(law, kept) for rule, law in zip(rules, laws, strict=True)] if rules else list(laws)


def _restricted(law: Tensor, kept: Tensor) -> tuple[Tensor, Tensor]:
    """The law given `kept` (B, V), and the log of the mass kept (B, 1); NaN where that is -inf."""
    inside = law.masked_fill(~kept, -math.inf)
    log_mass = inside.logsumexp(-1, keepdim=True)
    return inside - log_mass, log_mass
