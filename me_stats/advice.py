"""What to do about two laws that differ: which sampler draws each of them exactly, and what it costs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

from me_stats.comparison import CauseGap, Comparison
from me_stats.mixing import ConstantMixing
from me_stats.models.ensemble import Ensemble
from me_stats.models.joint import Allowed, Restricted
from me_stats.models.shared import networks
from me_stats.models.warped import Warped
from me_stats.orders import OrderedLaw, Transforms

_ROUNDING = 1e-5  # TV a step that float32 networks show between two computations of one law
_FAR = 0.5  # TV of whole texts that is worth a word


@dataclass(frozen=True)
class Advice:
    """A sentence, and the sampler that it names as Python over the laws `p` and `q`; empty where it names none."""

    statement: str
    code: str = ""


def advise(p: Any, q: Any, found: Comparison, *, causes: Sequence[CauseGap] = ()) -> tuple[Advice, ...]:
    """Exact samplers for p and q, the cheapest first, and what their distance means.

    Parameters
    ----------
    p, q
        The laws that were compared, p the one whose draws were looked at.
    found
        What `compare_laws` says of them.
    causes
        What `cause_gaps` says, where the way from p to q is known.

    Examples
    --------
    >>> from me_stats.comparison import compare_laws
    >>> from me_stats.models import MarkovModel, TopK
    >>> from me_stats.samplers import MESampler
    >>> toys, mixing = [MarkovModel.random(9, seed=s) for s in (0, 1, 2)], ConstantMixing([0.4, 0.3, 0.3])
    >>> inside, after = Ensemble([Warped(t, TopK(8)) for t in toys], mixing), Warped(Ensemble(toys, mixing), TopK(8))
    >>> trace = MESampler(inside).sample([0], n=50, max_new_tokens=8)
    >>> found = compare_laws(inside, after, trace.row_prompts(), trace.sequences())
    >>> [advice.code for advice in advise(inside, after, found) if advice.code]
    ['MESampler(p)', 'SpeculativeSampler(q, p, chunk=8)']
    """
    if found.step.value <= max(_ROUNDING, found.floor):
        return (_one_law(p, q, found),)
    given = []
    for name, law in (("p", p), ("q", q)):
        if isinstance(law, Ensemble):
            given.append(_ancestral(name, law))
    for (name, law), (draft_name, draft) in ((("p", p), ("q", q)), (("q", q), ("p", p))):
        if not isinstance(law, Ensemble):
            given.append(_repair(name, law, draft_name, draft, found))
    return (*given, *_meaning(found), *_blame(found, causes))


def _one_law(p: Any, q: Any, found: Comparison) -> Advice:
    same = f"p and q are one law up to rounding here (TV {found.step.value:.1g} a step): nothing to repair"
    for name, law in (("p", p), ("q", q)):
        if _is_constant(law):
            return Advice(f"{same}. ME samples both, at one network run a token", f"MESampler({name})")
    return Advice(same, "CESampler(p)")


def _ancestral(name: str, law: Ensemble) -> Advice:
    if _is_constant(law):
        return Advice(
            f"Declare {name} the target: its transforms stand inside the components, so ME samples it exactly, at one "
            f"network run a token where CE needs {len(networks(law))}",
            f"MESampler({name})",
        )
    return Advice(
        f"ME samples {name} exactly: its weights read the prefix alone. Weights that score the prefix under every "
        "component, such as those of a BayesRouter for the mixture of whole sequences, need all of them at every token "
        "and save nothing",
        f"MESampler({name})",
    )


def _repair(name: str, law: Any, draft_name: str, draft: Any, found: Comparison) -> Advice:
    if (code := _fixed_mask(name, law)) is not None:
        return Advice(
            f"{name} keeps one fixed set of tokens: redraw component and token together until the token is in it, "
            "which is exact and needs no second law",
            code,
        )
    runs, forecast = len(networks(law)), found.forecast
    if not isinstance(draft, Ensemble):
        return Advice(
            f"{name} needs all {runs} networks at every token. An ME draft would save some: compare it with "
            "transform-then-mix",
            f"CESampler({name})",
        )
    cost = f"{forecast.forwards_per_token:.2f} network runs a token at acceptance {forecast.acceptance.value:.2f}"
    if forecast.forwards_per_token < runs:
        return Advice(
            f"If {name} itself is wanted, draft with {draft_name} and verify: exact, about {cost}; CE needs {runs}",
            f"SpeculativeSampler({name}, {draft_name}, chunk={forecast.chunk})",
        )
    return Advice(
        f"If {name} itself is wanted, CE is the cheapest exact way: {runs} network runs a token, where drafting with "
        f"{draft_name} and verifying would take about {cost}",
        f"CESampler({name})",
    )


def _fixed_mask(name: str, law: Any) -> str | None:
    if isinstance(law, Restricted):
        return f"FixedMaskSampler({name})"
    inside = law.model if isinstance(law, Warped) and len(law.warps) == 1 else None
    if isinstance(inside, Ensemble) and isinstance(law.warps[0], Allowed):
        model = f"{name}.model"
        return f"FixedMaskSampler(Restricted({model}.components, {model}.mixing, {name}.warps[0].tokens))"
    return None


def _meaning(found: Comparison) -> list[Advice]:
    """What the distance of a step comes to over whole texts."""
    said = []
    longest = found.lengths[-1]
    if longest.outside.lower > 0:
        said.append(
            Advice(
                f"q cannot write at least {longest.outside.lower:.0%} of p's texts of up to {_tokens(longest.length)}: "
                f"{found.outside.value:.2g} of p's mass a token lies outside q's support"
            )
        )
    far = [gap for gap in found.lengths if gap.tv.interval[0] > _FAR]
    if far:
        said.append(
            Advice(
                f"Who knows both laws can tell from one text of {_tokens(far[0].length)} which of them wrote it: right "
                f"with probability {(1 + far[0].tv.interval[0]) / 2:.2f} or more. Equal scores on a benchmark do not "
                "make them one law"
            )
        )
    return said


def _blame(found: Comparison, causes: Sequence[CauseGap]) -> list[Advice]:
    alone = [(cause.alone.value, cause.name) for cause in causes if cause.alone is not None]
    if len(alone) < 2:
        return []
    most, name = max(alone)
    return [
        Advice(
            f"The largest single cause is {name}: TV {most:.2g} a step alone, where all together make "
            f"{found.step.value:.2g}. Causes do not add up: they can mask or feed each other"
        )
    ]


def _is_constant(law: Any) -> bool:
    return isinstance(law, Ensemble) and type(law.mixing) is ConstantMixing


def _tokens(count: int) -> str:
    return f"{count} token" + ("" if count == 1 else "s")


def describe(law: OrderedLaw) -> str:
    """An ordered law in words.

    >>> describe(OrderedLaw("transform-then-mix", Transforms(temperature=0.7, top_k=10), (0.6, 0.4)))
    'transform-then-mix, temperature 0.7, top-k 10, λ = 0.6, 0.4'
    """
    settings = [
        name.replace("_", "-") + ("" if value is True else f" {value:g}") for name, value in _changed(law).items()
    ]
    weights = ", ".join(f"{weight:.3g}" for weight in law.weights)
    return ", ".join([law.order, *(settings or ["no transform"]), f"λ = {weights}"])


def code_of(law: OrderedLaw) -> str:
    """The Python that makes an ordered law over `components`.

    >>> code_of(OrderedLaw("published-ce", Transforms(top_k=5), (0.5, 0.5)))
    "OrderedLaw('published-ce', Transforms(top_k=5), (0.5, 0.5)).over(components)"
    """
    settings = ", ".join(f"{name}={value!r}" for name, value in _changed(law).items())
    return f"OrderedLaw({law.order!r}, Transforms({settings}), {law.weights!r}).over(components)"


def program(models: Sequence[str], p: OrderedLaw, q: OrderedLaw, advice: Sequence[Advice]) -> str:
    """Python that opens the models, makes both laws, and each sampler that is advised.

    >>> advice = [Advice("", "MESampler(p)"), Advice("", "SpeculativeSampler(q, p, chunk=4)")]
    >>> first, second = (OrderedLaw(o, Transforms(top_k=5), (0.5, 0.5)) for o in ("transform-then-mix", "published-ce"))
    >>> print(program(["bundled:prose", "bundled:code"], first, second, advice))
    from me_stats.orders import OrderedLaw, Transforms
    from me_stats.presets import open_setting
    from me_stats.samplers import MESampler, SpeculativeSampler
    <BLANKLINE>
    components = open_setting(['bundled:prose', 'bundled:code']).ensemble.components
    p = OrderedLaw('transform-then-mix', Transforms(top_k=5), (0.5, 0.5)).over(components)
    q = OrderedLaw('published-ce', Transforms(top_k=5), (0.5, 0.5)).over(components)
    MESampler(p)
    SpeculativeSampler(q, p, chunk=4)
    """
    codes = [entry.code for entry in advice if entry.code]
    lines = [
        "from me_stats.orders import OrderedLaw, Transforms",
        "from me_stats.presets import open_setting",
        f"from me_stats.samplers import {', '.join(sorted({code.partition('(')[0] for code in codes}))}",
        "",
        f"components = open_setting({list(models)!r}).ensemble.components",
        f"p = {code_of(p)}",
        f"q = {code_of(q)}",
    ]
    return "\n".join([*lines, *codes])


def _changed(law: OrderedLaw) -> dict[str, Any]:
    """The transforms of a law that are not at their defaults."""
    usual = {field.name: field.default for field in fields(Transforms)}
    return {name: value for name, value in vars(law.transforms).items() if value != usual[name]}
