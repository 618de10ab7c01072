from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from me_stats import exact
from me_stats.mixing import ConstantMixing
from me_stats.models import (
    Conditioned,
    Cost,
    Endless,
    Ensemble,
    LanguageModel,
    MarkovModel,
    Session,
    TableModel,
    TopK,
    Warped,
    Windowed,
)
from me_stats.models.base import PrefixSession, checked_laws, open_session, path_log_probs, require_language_model
from me_stats.samplers import CESampler, MESampler
from me_stats.trace import score
from me_stats.vocabulary import Vocabulary
from tests.strategies import LastTokenMixing, OutsideModel

V = 3


def tables(count: int, order: int = 2) -> list[TableModel]:
    return [TableModel.random(V, seed=seed, order=order) for seed in range(count)]


def router() -> LastTokenMixing:
    return LastTokenMixing(np.random.Generator(np.random.Philox(5)).dirichlet(np.ones(2), V + 1))


# Every member of the algebra, and every way to nest them.
MODELS: dict[str, Callable[[], Any]] = {
    "table": lambda: tables(1)[0],
    "markov": lambda: MarkovModel.random(V, seed=1),
    "outside": lambda: OutsideModel(tables(1)[0]),
    "warped": lambda: Warped(tables(1)[0], TopK(2)),
    "conditioned": lambda: Conditioned(tables(1)[0], [2, 1]),
    "ensemble": lambda: Ensemble(tables(2), ConstantMixing([0.3, 0.7])),
    "routed": lambda: Ensemble(tables(2), router()),
    "mix-then-transform": lambda: Warped(Ensemble(tables(2), ConstantMixing([0.3, 0.7])), TopK(2)),
    "outside components": lambda: Ensemble(
        [OutsideModel(tables(1)[0]), Warped(OutsideModel(tables(2)[1]), TopK(2))], ConstantMixing([0.3, 0.7])
    ),
    "prompt ensemble": lambda: Ensemble(
        [Conditioned(OutsideModel(tables(1)[0]), [token]) for token in (0, 1)], ConstantMixing([0.3, 0.7])
    ),
    "windowed": lambda: Windowed(TableModel.random(V, seed=0, order=4), 4),
    "short window": lambda: Windowed(OutsideModel(TableModel.random(V, seed=0, order=4)), 2, hop=1),
    "window that empties": lambda: Windowed(TableModel.random(V, seed=0, order=4), 3, hop=3),
    "windowed prompts": lambda: Ensemble(
        [Windowed(Conditioned(TableModel.random(V, seed=0, order=4), [token]), 3) for token in (0, 1)],
        ConstantMixing([0.3, 0.7]),
    ),
    "window over a mixture": lambda: Windowed(Ensemble(tables(2, order=4), router()), 3, hop=2),
    "endless": lambda: Endless(TableModel.random(V, seed=0, order=2, eos=(2,))),
    "nested": lambda: Ensemble([Ensemble(tables(2), router()), tables(3)[2]], ConstantMixing([0.3, 0.7])),
}
every_model = pytest.mark.parametrize("build", MODELS.values(), ids=MODELS.keys())


@every_model
@given(
    moves=st.lists(st.tuples(st.integers(0, 2), st.integers(0, V - 1)), max_size=10),
    asked=st.lists(st.permutations([0, 1, 2]), min_size=1, max_size=4),
)
def test_session_equals_definition(
    build: Callable[[], Any], moves: list[tuple[int, int]], asked: list[list[int]]
) -> None:
    model = build()
    prefixes: list[tuple[int, ...]] = [(), (2,), (0, 1, 2)]
    session = open_session(model, prefixes, max_new_tokens=10)
    assert isinstance(session, Session)
    for i, (row, token) in enumerate(moves):
        session.append(np.array([row]), torch.tensor([token]))
        prefixes[row] = (*prefixes[row], token)
        rows = asked[i % len(asked)][: 1 + i % 3]  # some rows are read, the others lag
        expected = torch.as_tensor(model.log_probs([prefixes[row] for row in rows]))
        torch.testing.assert_close(session.log_probs(np.array(rows)), expected, rtol=0, atol=1e-12)


@every_model
@given(
    prompts=st.lists(st.lists(st.integers(0, V - 1), max_size=3), min_size=1, max_size=3),
    paths=st.lists(st.lists(st.integers(0, V - 1), max_size=4), min_size=3, max_size=3),
)
def test_path_laws_are_those_of_every_prefix(
    build: Callable[[], Any], prompts: list[list[int]], paths: list[list[int]]
) -> None:
    model = build()
    paths = paths[: len(prompts)]
    laws = list(path_log_probs(model, prompts, paths))
    assert [law.shape for law in laws] == [(len(path), V) for path in paths]
    for prompt, path, law in zip(prompts, paths, laws, strict=True):
        for step in range(len(path)):
            expected = torch.as_tensor(model.log_probs([(*prompt, *path[:step])]))
            torch.testing.assert_close(law[step : step + 1], expected, rtol=0, atol=1e-12)


@every_model
def test_laws_are_normalised_tensors(build: Callable[[], Any]) -> None:
    laws = torch.as_tensor(build().log_probs([(), (0,), (1, 1, 2)]))
    assert torch.allclose(laws.logsumexp(-1), torch.zeros(3, dtype=laws.dtype), atol=1e-12)


# --- a model by someone else -------------------------------------------------------------------------


def test_a_plain_class_works_everywhere() -> None:
    inside, outside = tables(2), [OutsideModel(table) for table in tables(2)]
    mixing = ConstantMixing([0.25, 0.75])

    def build(parts: Sequence[Any]) -> Ensemble:
        return Ensemble([Warped(parts[0], TopK(2)), Conditioned(parts[1], [1])], mixing)

    law = exact.sequence_law(build(inside), [0], max_new_tokens=3)
    assert exact.sequence_law(build(outside), [0], max_new_tokens=3).tv_distance(law) < 1e-12
    for sampler in (MESampler, CESampler):
        assert exact.sampler_law(sampler(build(outside)), [0], max_new_tokens=3).tv_distance(law) < 1e-12
        trace = sampler(build(outside)).sample([0], n=5, max_new_tokens=4, seed=3)
        assert torch.equal(trace.tokens, sampler(build(inside)).sample([0], n=5, max_new_tokens=4, seed=3).tokens)
        assert torch.allclose(trace.log_probs, score(build(inside), [0], trace.tokens).log_probs)
    alone = exact.sampler_law(CESampler(outside[0]), [0], max_new_tokens=2)
    assert alone.tv_distance(exact.sequence_law(inside[0], [0], max_new_tokens=2)) < 1e-12


def test_attributes_that_merely_share_a_name_are_no_fast_path() -> None:
    model = OutsideModel(tables(1)[0])
    model.session = object()  # type: ignore[attr-defined]
    model.path_log_probs = None  # type: ignore[attr-defined]
    assert isinstance(open_session(model, [(0,)]), PrefixSession)
    assert len(list(path_log_probs(model, [(0,)], [(1, 2)]))) == 1
    assert CESampler(model).sample([0], max_new_tokens=2).tokens.shape == (1, 2)


@pytest.mark.parametrize("thing", [object(), "gpt2", lambda prefixes: None, type("M", (), {"vocabulary": 50})()])
def test_what_is_no_language_model_is_refused_by_name(thing: object) -> None:
    for use in (
        lambda: require_language_model(thing),
        lambda: open_session(thing, [()]),
        lambda: path_log_probs(thing, [()], [(0,)]),
        lambda: CESampler(thing),
        lambda: Warped(thing),
        lambda: Conditioned(thing, [0]),
    ):
        with pytest.raises(TypeError, match="model must be a LanguageModel: `vocabulary`"):
            use()
    with pytest.raises(TypeError, match=r"components\[1\] must be a LanguageModel"):
        Ensemble([tables(1)[0], thing], ConstantMixing([0.5, 0.5]))


class Returns:
    """Gives the same answer whatever is asked."""

    def __init__(self, answer: object) -> None:
        self.vocabulary, self.answer = Vocabulary(2), answer

    def log_probs(self, prefixes: Sequence[Sequence[int]]) -> object:
        return self.answer


HALF = float(np.log(0.5))
BAD_LAWS: list[tuple[object, str]] = [
    (np.array([[2.0, 1.0]]), "is not normalised .* return log_softmax"),
    (np.array([[0.5, 0.5]]), "is not normalised"),
    (np.array([[-np.inf, -np.inf]]), "is not normalised"),
    (np.array([[np.nan, 0.0]]), "Returns.log_probs returned NaN"),
    (np.array([[HALF, HALF, HALF]]), r"returned shape \(1, 3\), expected \(1, 2\)"),
    (np.array([HALF, HALF]), r"returned shape \(2,\), expected \(1, 2\)"),
    (np.array([[HALF, HALF]] * 2), r"returned shape \(2, 2\), expected \(1, 2\)"),
    (np.array([[0, 0]]), "returned torch.int64, expected floating-point"),
]


@pytest.mark.parametrize(("answer", "message"), BAD_LAWS)
def test_bad_laws_are_refused_wherever_they_enter(answer: object, message: str) -> None:
    bad = Returns(answer)
    good = OutsideModel(TableModel([[0.5, 0.5]], order=0))
    ensemble = Ensemble([bad, good], ConstantMixing([0.5, 0.5]))
    for use in (
        lambda: checked_laws(bad, bad.log_probs([()]), 1),
        lambda: open_session(bad, [()]).log_probs(np.array([0])),
        lambda: list(path_log_probs(bad, [()], [(0,)])),
        lambda: CESampler(bad).sample([0], max_new_tokens=1),
        lambda: CESampler(ensemble).sample([0], max_new_tokens=1),
        lambda: [MESampler(ensemble).sample([0], max_new_tokens=1, seed=seed) for seed in range(9)],
        lambda: ensemble.log_probs([()]),
        lambda: Warped(bad, TopK(1)).log_probs([()]),
        lambda: Conditioned(bad, [0]).log_probs([()]),
        lambda: score(bad, [0], [[1]]),
        lambda: score(ensemble, [0], [[1]]),
        lambda: exact.sequence_law(bad, [0], max_new_tokens=1),
    ):
        with pytest.raises(ValueError, match=message):
            use()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_good_laws_pass_in_every_precision(dtype: torch.dtype) -> None:
    laws = torch.tensor([[0.5, 0.5], [1.0, 0.0]], dtype=dtype).log()
    assert torch.equal(checked_laws(Returns(None), laws, 2), laws)


# --- the session of a bare definition, and its cost ---------------------------------------------------


def test_a_prefix_session_asks_once_for_each_distinct_prefix() -> None:
    model = OutsideModel(tables(1)[0])
    session = open_session(model, [(0,), (0,), (1, 2)])
    laws = session.log_probs(np.array([2, 0, 1]))
    assert (model.calls, session.cost) == (1, Cost(forwards=1, tokens_forwarded=3, reads=3))
    assert torch.equal(laws[1], laws[2])
    session.append(np.array([1]), torch.tensor([2]))
    assert model.calls == 1
    session.log_probs(np.array([1]))
    assert session.cost == Cost(forwards=2, tokens_forwarded=5, reads=4)


def test_costs_add_up() -> None:
    assert Cost(1, 2, 3) + Cost(10, 20, 30) == Cost(11, 22, 33)
    assert sum([Cost(1, 2, 3)], Cost()) == Cost(1, 2, 3)


def test_a_subclass_needs_only_the_definition() -> None:
    class Uniform(LanguageModel):
        vocabulary = Vocabulary(4)

        def log_probs(self, prefixes: Sequence[Sequence[int]]) -> torch.Tensor:
            return torch.full((len(prefixes), 4), -float(np.log(4)))

    law = exact.sequence_law(Uniform(), [], max_new_tokens=2)
    assert len(law.sequences) == 16
    assert CESampler(Uniform()).sample([[1], [2]], n=3, max_new_tokens=5).tokens.shape == (6, 5)
