from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from me_stats.acceptance import measure_acceptance
from me_stats.divergence import tv_distance
from me_stats.exact import sampler_law, sequence_law
from me_stats.mixing import ConstantMixing
from me_stats.models import Ensemble, Greedy, MarkovModel, TableModel, Temperature, TopK, TopP, Warped
from me_stats.models.joint import PublishedCE, UnionTopK, published_me
from me_stats.samplers import MESampler, SpeculativeSampler
from me_stats.samplers.speculative import _Round
from me_stats.testing._faulty_repairs import (
    AcceptsAll,
    JudgesByTheOther,
    JudgesByTheWriter,
    RepairsForTheDraft,
    RepairsFromTarget,
)
from tests.stand_ins import Ledger
from tests.strategies import LastTokenMixing, OutsideModel, ensembles, seeds, warps

Orders = Callable[[list[TableModel], ConstantMixing], tuple[Any, Any]]


def both_orders(*transforms: Any) -> Orders:
    def build(toys: list[TableModel], mixing: ConstantMixing) -> tuple[Any, Any]:
        return Warped(Ensemble(toys, mixing), *transforms), Ensemble([Warped(t, *transforms) for t in toys], mixing)

    return build


def published(**options: Any) -> Orders:
    return lambda toys, mixing: (PublishedCE(toys, mixing, **options), published_me(toys, mixing, **options))


PAIRS: dict[str, Orders] = {
    "temperature": both_orders(Temperature(0.5)),
    "top-k": both_orders(TopK(2)),
    "top-p": both_orders(TopP(0.6)),
    "greedy": both_orders(Greedy()),
    "greedy, plain draft": lambda toys, mixing: (Warped(Ensemble(toys, mixing), Greedy()), Ensemble(toys, mixing)),
    "union": lambda toys, mixing: (UnionTopK(toys, mixing, 1), published_me(toys, mixing, top_k=1)),
    "published": published(temperature=0.6, top_k=2, top_p=0.9),
    "published, greedy": published(top_k=2, greedy=True),
    "a draft of one model": lambda toys, mixing: (Warped(Ensemble(toys, mixing), TopK(2)), toys[0]),
    "a target of one model": lambda toys, mixing: (toys[0], Warped(Ensemble(toys, mixing), Greedy())),
}


@pytest.mark.parametrize("name", PAIRS)
@pytest.mark.parametrize("weights", [[0.5, 0.5], [0.9, 0.1], [0.2, 0.3, 0.5]])
@pytest.mark.parametrize("eos", [(), (2,)])
def test_the_law_is_the_targets(name: str, weights: list[float], eos: tuple[int, ...]) -> None:
    toys = [TableModel.random(3, seed=seed, order=2, eos=eos) for seed in range(len(weights))]
    target, draft = PAIRS[name](toys, ConstantMixing(weights))
    for chunk, steps in ((2, 3),) if name.startswith(("greedy", "union", "published")) else ((1, 2), (2, 2)):
        law = sequence_law(target, [0], max_new_tokens=steps)
        sampled = sampler_law(SpeculativeSampler(target, draft, chunk=chunk), [0], max_new_tokens=steps)
        assert sampled.tv_distance(law) < 1e-12


@given(st.data())
def test_toys_and_transforms_of_any_kind(data: st.DataObject) -> None:
    ensemble = data.draw(ensembles(max_components=2, max_vocabulary=3, max_order=2))
    transforms = data.draw(st.lists(warps, min_size=1, max_size=2))
    draft = Ensemble([Warped(part, *transforms) for part in ensemble.components], ensemble.mixing)
    target = Warped(ensemble, *transforms)
    sampler = SpeculativeSampler(target, draft, chunk=data.draw(st.integers(1, 2)))
    law = sequence_law(target, [0], max_new_tokens=2)
    assert sampler_law(sampler, [0], max_new_tokens=2).tv_distance(law) < 1e-12


@pytest.mark.parametrize(("chunk", "eos"), [(2, (3,)), (5, ()), (5, (3,))])
@pytest.mark.parametrize("name", ["temperature", "greedy", "greedy, plain draft", "published", "a draft of one model"])
def test_the_chunk_changes_no_token(name: str, chunk: int, eos: tuple[int, ...]) -> None:
    # With a chunk of 1 no random number is used twice (the next test), so the streams are as good as the fresh choices
    # of the enumeration; equality carries that over to longer chunks.
    toys = [TableModel.random(5, seed=seed, order=2, eos=eos) for seed in (3, 4)]
    sampler = SpeculativeSampler(*PAIRS[name](toys, ConstantMixing([0.6, 0.4])), chunk=chunk)
    reference = SpeculativeSampler(sampler.model, sampler.draft, chunk=1)
    given_options: dict[str, Any] = {"n": 6, "max_new_tokens": 19, "seed": 5}
    trace = reference.sample([[0], [1, 2]], **given_options)
    assert torch.equal(sampler.sample([[0], [1, 2]], **given_options).tokens, trace.tokens)
    assert torch.equal(sampler.sample([[0], [1, 2]], **given_options, batch_size=5).tokens, trace.tokens)
    one = sampler.sample([[1, 2]], n=1, max_new_tokens=19, seed=5, rows=[9])
    width = one.tokens.shape[1]
    assert torch.equal(one.tokens[0], trace.tokens[9, :width])


@pytest.mark.parametrize("name", ["temperature", "greedy, plain draft"])
def test_with_a_chunk_of_one_no_random_number_is_used_twice(name: str) -> None:
    toys = [TableModel.random(5, seed=seed, order=2, eos=(4,)) for seed in (3, 4)]
    ledger = Ledger(1)
    sampler = SpeculativeSampler(*PAIRS[name](toys, ConstantMixing([0.6, 0.4])), chunk=1)
    sampler.sample([[0], [1, 2]], n=10, max_new_tokens=20, draw=ledger)
    assert len(ledger.asked) == len(set(ledger.asked)) > 100


@given(seeds, st.integers(1, 5))
@settings(max_examples=15)
def test_where_nothing_is_to_repair_it_writes_mes_tokens(seed: int, chunk: int) -> None:
    toys = [MarkovModel.random(4, seed=s, eos=(3,)) for s in (0, 1)]
    draft = Ensemble([Warped(toy, Temperature(0.7)) for toy in toys], ConstantMixing([0.3, 0.7]))
    own = SpeculativeSampler(draft, draft, chunk=chunk).sample([[0], [1]], n=6, max_new_tokens=17, seed=seed)
    me = MESampler(draft).sample([[0], [1]], n=6, max_new_tokens=17, seed=seed, batch_size=12)
    assert torch.equal(own.tokens, me.tokens)


def test_weights_may_come_from_a_router() -> None:
    router = LastTokenMixing(np.random.default_rng(1).dirichlet(np.ones(2), 4))
    toys = [TableModel.random(3, seed=seed, order=2) for seed in (0, 1)]
    target = Warped(Ensemble(toys, router), TopK(2))
    draft = Ensemble([Warped(toy, TopK(2)) for toy in toys], router)
    law = sequence_law(target, [1], max_new_tokens=3)
    assert sampler_law(SpeculativeSampler(target, draft, chunk=2), [1], max_new_tokens=3).tv_distance(law) < 1e-12


# --- the law that a draft is judged by ------------------------------------------------------------------


@pytest.mark.parametrize("name", ["temperature", "top-k", "greedy, plain draft", "published"])
def test_the_component_that_wrote_it_may_judge_a_draft_and_accepts_less(name: str) -> None:
    toys = [TableModel.random(3, seed=seed, order=2) for seed in (0, 1)]
    mixing = ConstantMixing([0.6, 0.4])
    target, draft = PAIRS[name](toys, mixing)
    for chunk in (1, 2):
        law = sequence_law(target, [0], max_new_tokens=2)
        sampler = JudgesByTheWriter(target, draft, chunk=chunk)
        assert sampler_law(sampler, [0], max_new_tokens=2).tv_distance(law) < 1e-12
    q, p = target.log_probs([(0,)])[0], draft.log_probs([(0,)])[0]
    apart = [tv_distance(part.log_probs([(0,)])[0], q) for part in draft.components]
    # TV is convex, and linear where the target is one token.
    gain = mixing.weights.numpy() @ apart - tv_distance(p, q)
    assert gain == pytest.approx(0, abs=1e-12) if name.startswith("greedy") else gain > 0.01
    whole = measure_acceptance(SpeculativeSampler(target, draft), [0], n=400, max_new_tokens=1)
    single = measure_acceptance(JudgesByTheWriter(target, draft), [0], n=400, max_new_tokens=1)
    assert whole.expected.value == pytest.approx(1 - tv_distance(p, q))
    # Two rates measured on 400 rows each; 4.9 standard errors of a difference is 1e-6.
    chance = 1 - mixing.weights.numpy() @ apart
    assert abs(single.acceptance.value - chance) < 4.9 * np.sqrt(chance * (1 - chance) / 400)


# --- planted bugs ---------------------------------------------------------------------------------------


class Careless(SpeculativeSampler):
    """Runs rounds of another kind."""

    kind: type[_Round]

    def _run_batch(self, *args: Any) -> Any:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("me_stats.samplers.speculative._Round", self.kind)
            return super()._run_batch(*args)


class KeepsRejectedTail(_Round):
    """Never takes back what was drafted behind a rejected token."""

    def write(self, eos: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        self.session.drop = lambda rows, counts: None  # type: ignore[method-assign]
        return super().write(eos)


def test_planted_bugs_are_told_from_the_sampler() -> None:
    toys = [TableModel.random(3, seed=seed, order=2) for seed in (0, 1)]
    target, draft = both_orders(Temperature(0.4))(toys, ConstantMixing([0.6, 0.4]))
    law = sequence_law(target, [1], max_new_tokens=2)

    def careless(round_kind: type[_Round]) -> SpeculativeSampler:
        sampler = Careless(target, draft, chunk=1)
        sampler.kind = round_kind
        return sampler

    distances = [
        sampler_law(sampler, [1], max_new_tokens=2).tv_distance(law)
        for sampler in (
            AcceptsAll(target, draft, chunk=1),
            JudgesByTheOther(target, draft, chunk=1),
            RepairsFromTarget(target, draft, chunk=1),
            RepairsForTheDraft(target, draft, chunk=1),
            careless(KeepsRejectedTail),
        )
    ]
    assert min(distances) > 0.01, distances
    assert sampler_law(careless(_Round), [1], max_new_tokens=2).tv_distance(law) < 1e-12


# --- cost -----------------------------------------------------------------------------------------------


def test_a_round_costs_its_drafts_and_one_pass_of_every_network() -> None:
    toys = [MarkovModel.random(6, seed=seed) for seed in (0, 1, 2)]
    ensemble = Ensemble(toys, ConstantMixing([0.5, 0.3, 0.2]))
    # Nothing to repair: rounds of 4 drafts and a fifth token, 10 of them.
    trace = SpeculativeSampler(Ensemble(toys, ensemble.mixing), ensemble, chunk=4).sample([0], max_new_tokens=50)
    assert trace.cost.forwards == 10 * (4 + 3)
    # The last round has room for one draft fewer than it may make.
    trace = SpeculativeSampler(Ensemble(toys, ensemble.mixing), ensemble, chunk=4).sample([0], max_new_tokens=49)
    assert trace.cost.forwards == 9 * (4 + 3) + 3 + 3


def test_rows_keep_to_the_memory_of_target_and_draft_even_for_one_token() -> None:
    # Unlike a step that reads the law of its prompt, a check keeps keys and values of every row.
    class Room(OutsideModel):
        room = 60

        def rows_that_fit(self, length: int) -> int:
            return self.room // length

    small, large = (Room(TableModel.random(3, seed=0, order=1)) for _ in range(2))
    large.room = 6000
    for pair in ((small, large), (large, small)):
        seen: list[int] = []
        sampler = SpeculativeSampler(*pair)
        sampler.sample([0], n=50, max_new_tokens=1, progress=seen.append)
        assert seen == [30, 20]


def test_what_cannot_be_drafted_is_refused() -> None:
    a, b = MarkovModel.random(3, seed=0), MarkovModel.random(4, seed=0)
    with pytest.raises(ValueError, match="target and draft have different vocabularies"):
        SpeculativeSampler(a, b)
    with pytest.raises(ValueError, match="chunk must be an integer of at least 1"):
        SpeculativeSampler(a, a, chunk=0)
    with pytest.raises(TypeError, match="draft must be a LanguageModel"):
        SpeculativeSampler(a, TopK(2))
    assert repr(SpeculativeSampler(a, a)).endswith("chunk=4)")
