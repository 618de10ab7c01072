"""Planted bugs: samplers and sessions that are wrong as real ones go wrong, for tests to catch.

A test that has never rejected anything is no test. Each mutant says which law it claims to draw from, and breaks the
claim in one way. Property tests must reject all of them, power tables say after how many tokens, and examples show how
such bugs come about. Every mutant is a function of seed and row numbers alone.

The playgrounds are ensembles of two toys with weights .3 and .7 on which every bug is a real departure::

    playground           10 tokens: 0 (padding) and 9 (unused) are never written, 1 ends a sequence with probability
                         .02, 2 to 8 are text; the law remembers three tokens, the older the less
    even_playground      the same with weights .5 and .5
    grid_playground      the same with all probabilities on the grid of 1/256, so that uniforms of bfloat16 hit ties
    reject_playground    the same as playground, but the first component puts more on 3 and 5, which a filter rejects
    position_playground  the same tokens; the law reads the last token and the position modulo 4
    wide_playground      128 tokens in order of frequency, as tokenizers number them, all steps alike, no end

`PROMPTS` suit all of them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from me_stats.mixing import ConstantMixing
from me_stats.models.base import LanguageModel
from me_stats.models.ensemble import Ensemble
from me_stats.models.toy import TableModel
from me_stats.models.warped import Greedy, Temperature, TopK, TopP, Warp, Warped
from me_stats.routers.controls import StickySampler
from me_stats.samplers import CESampler, MESampler, Sampler, SequenceMixtureSampler
from me_stats.testing import _faulty_samplers as samplers
from me_stats.testing import _faulty_sessions as sessions

PROMPTS: tuple[tuple[int, ...], ...] = ((2, 5, 3), (4,), (3, 2))

_SIZE = 10
_END = 1
_TEXT = np.arange(2, _SIZE - 1)
_REJECTED = (3, 5)
_FADES = (1.0, 0.8, 0.6)  # how much each token of the memory counts, the newest first
_MEMORY = len(_FADES)


# --- playgrounds ---------------------------------------------------------------------------------------------------


def playground(*, weights: Sequence[float] = (0.3, 0.7), seed: int = 0) -> Ensemble:
    """Two toys of 10 tokens that remember three of them; one toy for each of the `weights`.

    >>> playground(seed=1)
    Ensemble([TableModel(V=10, order=3), TableModel(V=10, order=3)], ConstantMixing([0.3, 0.7]))
    """
    return Ensemble([_table(probs) for probs in _laws(len(weights), seed)], ConstantMixing(weights))


def even_playground() -> Ensemble:
    """`playground` with weights .5 and .5, which every rule that takes the components in turn keeps on average."""
    return playground(weights=(0.5, 0.5))


def grid_playground() -> Ensemble:
    """`playground` with probabilities rounded to multiples of 1/256, none to 0."""
    parts = []
    for probs in _laws(2, 0):
        counts = np.where(probs > 0, (probs * 256).round().clip(min=1), 0)
        counts[np.arange(len(counts)), counts.argmax(1)] += 256 - counts.sum(1)
        parts.append(_table(counts / 256))
    return Ensemble(parts, ConstantMixing([0.3, 0.7]))


def reject_playground() -> Ensemble:
    """`playground` with a first component that writes the rejected tokens five times as readily."""
    first, second = _laws(2, 0)
    first[:, _REJECTED] *= 5
    first[:, _TEXT] *= 0.98 / first[:, _TEXT].sum(1, keepdims=True)
    return Ensemble([_table(first), _table(second)], ConstantMixing([0.3, 0.7]))


def position_playground() -> Ensemble:
    """Two toys whose law reads the last token and the position modulo 4."""
    rng = np.random.default_rng(0)
    shared = rng.normal(size=(4, _SIZE + 1, len(_TEXT)))
    laws = [_spread(shared + 0.6 * rng.normal(size=shared.shape)) for _ in range(2)]
    return Ensemble([sessions.PositionalModel(law, eos=(_END,)) for law in laws], ConstantMixing([0.3, 0.7]))


def wide_playground() -> Ensemble:
    """Two laws over 128 tokens in order of frequency, at every step the same."""
    rng = np.random.default_rng(0)
    laws = np.exp(0.5 * rng.normal(size=(2, 128))) / np.arange(1, 129) ** 1.1
    return Ensemble([TableModel(law[None] / law.sum(), order=0) for law in laws], ConstantMixing([0.3, 0.7]))


def _laws(components: int, seed: int) -> list[np.ndarray]:
    """Probabilities (S, V) of `TableModel`s: log-linear in the last three tokens."""
    rng = np.random.default_rng(seed)
    histories = [np.zeros((1, 0), dtype=np.int64)]
    for _ in range(_MEMORY):
        last = histories[-1]
        histories.append(np.column_stack([np.repeat(last, _SIZE, axis=0), np.tile(np.arange(_SIZE), len(last))]))
    shape = (_MEMORY, _SIZE, len(_TEXT))
    shared = rng.normal(size=shape)
    laws = []
    for _ in range(components):
        base, effects = rng.normal(size=len(_TEXT)) / 2, 0.6 * shared + 0.8 * rng.normal(size=shape)
        levels = []
        for known in histories:
            logits = np.tile(base, (len(known), 1))
            for back in range(known.shape[1]):
                logits += _FADES[back] * effects[back, known[:, -1 - back]]
            levels.append(_spread(logits))
        laws.append(np.concatenate(levels))
    return laws


def _spread(logits: np.ndarray) -> np.ndarray:
    """Laws (..., V) from logits of the text tokens: an end with probability .02, and two ids that are never written."""
    mass = np.exp(logits)
    probs = np.zeros((*logits.shape[:-1], _SIZE))
    probs[..., _TEXT] = 0.98 * mass / mass.sum(-1, keepdims=True)
    probs[..., _END] = 0.02
    return probs


def _table(probs: np.ndarray) -> TableModel:
    return TableModel(probs, order=_MEMORY, eos=(_END,))


# --- mutants -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Mutant:
    """A sampler with one planted bug.

    Attributes
    ----------
    name
        A few plain words; the key in `MUTANTS`.
    bug
        What the code does wrong, and how that happens in practice.
    size
        Where the bug shows: "weights", "dependence", "cache", "transform", "draw" or "structure".
    null
        The law that the sampler claims to draw from, for an ensemble.
    sampler
        The wrong sampler of that claim; `right_sampler` is the right one.
    model
        For bugs of a session: the same law by ``log_probs``, wrong by ``session``. None otherwise.
    ensemble
        The playground on which the bug is a real departure.

    Examples
    --------
    >>> mutant = MUTANTS["one component per sequence"]
    >>> toy = mutant.ensemble()
    >>> trace = mutant.sampler(toy).sample(PROMPTS, max_new_tokens=8, n=2, seed=0)
    >>> all(len(set(row[:length])) == 1 for row, length in zip(trace.components.tolist(), trace.lengths.tolist()))
    True
    """

    name: str
    bug: str
    size: str
    null: Callable[[Ensemble], LanguageModel]
    sampler: Callable[[Ensemble], Sampler]
    model: Callable[[Ensemble], LanguageModel] | None = None
    ensemble: Callable[[], Ensemble] = playground

    def right_sampler(self, ensemble: Ensemble) -> Sampler:
        """ME where the claim is an Ensemble, CE otherwise."""
        null = self.null(ensemble)
        return MESampler(null) if isinstance(null, Ensemble) else CESampler(null)


def _itself(ensemble: Ensemble) -> Ensemble:
    return ensemble


def _each(ensemble: Ensemble, *warps: Warp) -> Ensemble:
    """Transform-then-mix."""
    return Ensemble([Warped(part, *warps) for part in ensemble.components], ensemble.mixing)


def _reweighted(ensemble: Ensemble, change: Callable[[np.ndarray], np.ndarray]) -> Ensemble:
    assert isinstance(ensemble.mixing, ConstantMixing)
    return Ensemble(ensemble.components, ConstantMixing(change(ensemble.mixing.weights.numpy())))


def _five_points_more(weights: np.ndarray) -> np.ndarray:
    """The first weight .05 larger, at the cost of the last."""
    changed = weights.copy()
    changed[0] += 0.05
    changed[-1] -= 0.05
    return changed


def _last_tempered(ensemble: Ensemble) -> Ensemble:
    *others, last = ensemble.components
    return Ensemble([*others, Warped(last, Temperature(1.1))], ensemble.mixing)


def _law(name: str, bug: str, size: str, wrong: Callable[[Ensemble], LanguageModel], **options: Any) -> Mutant:
    """A right sampler of the law `wrong`."""

    def sampler(ensemble: Ensemble) -> Sampler:
        model = wrong(ensemble)
        inner = MESampler(model) if isinstance(model, Ensemble) else CESampler(model)
        return samplers.FaultySampler(null(ensemble), inner)

    null = options.pop("null", _itself)
    return Mutant(name, bug, size, null, sampler, **options)


def _cache(name: str, bug: str, *, ensemble: Callable[[], Ensemble] = playground, **wrong: Any) -> Mutant:
    """ME over sessions that go wrong."""

    def model(given: Ensemble) -> Ensemble:
        return sessions.with_faulty_sessions(given, **wrong)

    return Mutant(name, bug, "cache", _itself, lambda given: MESampler(model(given)), model, ensemble)


def _numbers(
    name: str,
    bug: str,
    draw: type[samplers.FaultyDraw],
    *,
    size: str = "draw",
    ensemble: Callable[[], Ensemble] = playground,
) -> Mutant:
    """ME with wrong random numbers."""

    def sampler(given: Ensemble) -> Sampler:
        return samplers.FaultySampler(given, MESampler(given), draw=draw)

    return Mutant(name, bug, size, _itself, sampler, ensemble=ensemble)


def _goes_on(ensemble: Ensemble) -> Sampler:
    endless = Ensemble([samplers.Endless(part) for part in ensemble.components], ensemble.mixing)
    return samplers.FaultySampler(ensemble, MESampler(endless), finish=samplers.ended_unless_switched)


def _stops_early(ensemble: Ensemble) -> Sampler:
    return samplers.FaultySampler(ensemble, MESampler(ensemble), finish=samplers.ended_with_the_first)


_ALL = (
    _law(
        "weights off by five points",
        "The first component is drawn with λ + .05: weights rounded in a file, or fitted on other data.",
        "weights",
        lambda e: _reweighted(e, _five_points_more),
    ),
    _law(
        "weights swapped",
        "Weights and components are listed in different orders, as when models are sorted by name.",
        "weights",
        lambda e: _reweighted(e, lambda weights: weights[::-1].copy()),
    ),
    Mutant(
        "one component per sequence",
        "The component is drawn when a sequence starts and kept: a router that is called once per request.",
        "dependence",
        _itself,
        SequenceMixtureSampler,
    ),
    Mutant(
        "sticky component",
        "The last component is kept with probability 1/2, to save switches of the cache.",
        "dependence",
        _itself,
        StickySampler,
    ),
    Mutant(
        "components in turn",
        "Components take turns after a random start: a load balancer instead of a draw.",
        "dependence",
        _itself,
        samplers.RoundRobinSampler,
        ensemble=even_playground,
    ),
    _numbers(
        "one number for component and token",
        "One uniform chooses the component and then its token: both draws read one stream at the same counter.",
        samplers.OneNumberDraw,
        size="dependence",
    ),
    _cache(
        "stale cache",
        "A component that is drawn again ingests the newest token only; what others wrote in between never reaches it.",
        rule=sessions.newest_only,
    ),
    _cache(
        "stale cache at 5% of switches",
        "As a stale cache, at one switch in twenty: a race between the copy of tokens and the forward.",
        rule=sessions.sometimes_newest_only,
    ),
    _cache(
        "catch-up skips a token",
        "A component that is several tokens behind skips the oldest of them: a slice that starts one too late.",
        rule=sessions.oldest_skipped,
    ),
    _cache(
        "newest token fed twice",
        "The newest token is in the catch-up and is fed again as the next input.",
        rule=sessions.newest_twice,
    ),
    _cache(
        "positions not advanced",
        "A catch-up of several tokens moves the position by one, so that later tokens sit at wrong positions.",
        rule=sessions.newest_only,
        ensemble=position_playground,
    ),
    _cache(
        "prompt's last token dropped",
        "The prompt's last token is held back as the first input and never fed.",
        start=sessions.prompts_cut,
    ),
    _cache(
        "padding read as prompt",
        "Short prompts are padded to the longest of the batch and no mask hides it: rows depend on neighbours.",
        start=sessions.prompts_padded,
    ),
    _law(
        "top-k after mixing",
        "Top-3 of the mixture in place of the mixture of top-3 laws: the transform stands after the sum.",
        "transform",
        lambda e: Warped(e, TopK(3)),
        null=lambda e: _each(e, TopK(3)),
    ),
    _law(
        "only the token redrawn",
        "A forbidden token is rejected and drawn anew from the same component; the component must be drawn anew too.",
        "transform",
        lambda e: _each(e, samplers.Banned(_REJECTED)),
        null=lambda e: Warped(e, samplers.Banned(_REJECTED)),
        ensemble=reject_playground,
    ),
    _law(
        "temperature 1.05",
        "The mixture is tempered by 1.05: a default of the engine that nobody set.",
        "transform",
        lambda e: Warped(e, Temperature(1.05)),
    ),
    _law(
        "temperature on one component",
        "The last component alone has temperature 1.1, from its own generation config.",
        "transform",
        _last_tempered,
    ),
    _law(
        "nucleus left on",
        "Top-p of .95 is applied to every component: a default of the generation config.",
        "transform",
        lambda e: _each(e, TopP(0.95)),
    ),
    _law(
        "repetition penalty left on",
        "Tokens of the prefix are penalised by 1.1: a default of the generation config.",
        "transform",
        lambda e: samplers.RepetitionPenalised(e, 1.1),
    ),
    _law(
        "end of sequence suppressed",
        "No sequence ends: ignore-eos, set for a benchmark, was left on.",
        "transform",
        lambda e: Warped(e, samplers.Banned(e.vocabulary.eos)),
    ),
    _law(
        "last token dropped",
        "The possible token of the highest id is never drawn: a range that ends one too early.",
        "transform",
        lambda e: Warped(e, samplers.LastDropped()),
    ),
    _law(
        "greedy on one step in ten",
        "One step in ten takes the most probable token: a fallback for slow or failed draws.",
        "transform",
        lambda e: Warped(e, samplers.Sometimes(Greedy(), 0.1)),
    ),
    _numbers(
        "random numbers reused",
        "Every second token is chosen by the number of the one before: the counter advances once in two steps.",
        samplers.ReusedDraw,
    ),
    _numbers(
        "generator seeded at every step",
        "The generator is built anew from the seed at each step, so that one number chooses all tokens of a row.",
        samplers.ReseededDraw,
    ),
    _numbers(
        "rows share random numbers",
        "All rows of a batch read one stream: each row has the right law, but rows are not independent.",
        samplers.SharedDraw,
    ),
    _numbers(
        "seed ignored",
        "A second run repeats the first, whatever its seed and rows: the generator is built from a constant.",
        samplers.SeedIgnoredDraw,
    ),
    _numbers(
        "wrong side at ties",
        "The inverse CDF uses the wrong inequality: where a uniform equals a boundary it returns the token below, and "
        "at 0 the first id whatever its mass. Uniforms of bfloat16 hit boundaries all the time.",
        samplers.TiesDraw,
        ensemble=grid_playground,
    ),
    _numbers(
        "zero-probability token drawn",
        "Uniforms cast to bfloat16 round up to 1 once in 512 draws, and the search runs off the end to the last id.",
        samplers.RoundedUpDraw,
    ),
    _numbers(
        "half-precision sums",
        "Probabilities are added up in bfloat16, where the tail of a large vocabulary rounds away.",
        samplers.HalfPrecisionDraw,
        ensemble=wide_playground,
    ),
    Mutant(
        "goes on after the end",
        "An end-of-sequence token is forgotten when another component writes the next token: the finished row is not "
        "in the catch-up of that component.",
        "structure",
        _itself,
        _goes_on,
    ),
    Mutant(
        "stops with the first row",
        "A batch of eight rows stops when the first of them ends: every token has the right law, lengths have not.",
        "structure",
        _itself,
        _stops_early,
    ),
)

MUTANTS: dict[str, Mutant] = {mutant.name: mutant for mutant in _ALL}
