"""The public strategies: every example is valid, and the edges that they promise do come up."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, Phase, find, given, settings
from hypothesis import strategies as st

from me_stats.exact import sequence_law
from me_stats.models import Ensemble, MarkovModel, TableModel, Warped
from me_stats.testing.strategies import (
    LAW_KINDS,
    Turn,
    ending_models,
    ensembles,
    horizons,
    law_rows,
    laws,
    markov_models,
    prompts,
    schedules,
    simplex,
    table_models,
)


def first(strategy: st.SearchStrategy[Any], condition: Callable[[Any], Any]) -> Any:
    """An example that satisfies `condition`, or an error if 2000 do not."""
    found = settings(
        max_examples=2000,
        derandomize=True,
        database=None,
        deadline=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    return find(strategy, condition, settings=found)


@given(st.integers(1, 6).flatmap(simplex))
def test_weights_are_a_law(weights: list[float]) -> None:
    assert min(weights) >= 0
    assert abs(sum(weights) - 1) < 1e-12


@given(st.integers(1, 6).flatmap(laws))
def test_laws_are_laws(law: np.ndarray) -> None:
    assert (law >= 0).all()
    assert abs(law.sum() - 1) < 1e-12


def test_laws_are_a_function_of_their_seed() -> None:
    for kind in LAW_KINDS:
        assert (law_rows(kind, 5, 4, seed=3) == law_rows(kind, 5, 4, seed=3)).all()
    with pytest.raises(ValueError, match="kind must be one of 'one-hot'"):
        law_rows("normal", 1, 2, seed=0)  # type: ignore[arg-type]


def test_near_ties_stand_at_every_edge() -> None:
    rows = np.sort(law_rows("near ties", 200, 4, seed=0), axis=1)
    gaps = np.diff(rows, axis=1)
    assert gaps.max() < 1e-11
    assert ((gaps > 0).any(0) & (gaps == 0).any(0)).all()  # at each k: broken by a rounding, and exactly tied


@given(table_models(size=2, min_order=2, max_order=3), markov_models(), ending_models())
def test_models_are_of_the_kind_that_was_asked_for(table: TableModel, chain: MarkovModel, ending: TableModel) -> None:
    assert 2 <= table.order <= 3
    assert isinstance(chain, MarkovModel)
    assert chain.order == 1
    law = sequence_law(ending, (), max_new_tokens=3)
    assert {len(row[row >= 0]) for row in law.sequences} == {1}
    assert set(law.sequences[:, 0].tolist()) <= set(ending.vocabulary.eos)


@given(st.data(), ensembles(min_vocabulary=2, max_vocabulary=3, max_components=2, max_order=1))
def test_ensembles_prompts_and_horizons_fit_together(data: st.DataObject, ensemble: Ensemble) -> None:
    size = ensemble.vocabulary.size
    assert 2 <= size <= 3
    assert len(ensemble.components) <= 2
    prompt = data.draw(prompts(size, min_length=1, max_length=2))
    steps = data.draw(horizons(size, budget=27))
    assert 1 <= len(prompt) <= 2
    assert size**steps <= 27
    assert abs(sequence_law(ensemble, prompt, max_new_tokens=steps).total - 1) < 1e-9


def one_token(ensemble: Ensemble) -> bool:
    return ensemble.vocabulary.size == 1


def one_component(ensemble: Ensemble) -> bool:
    return len(ensemble.components) == 1 and ensemble.vocabulary.size > 1


def zero_weight(ensemble: Ensemble) -> bool:
    return bool((ensemble.mixing.weights == 0).any())


def one_hot_weights(ensemble: Ensemble) -> bool:
    return len(ensemble.components) > 1 and bool((ensemble.mixing.weights == 1).any())


def identical(ensemble: Ensemble) -> bool:
    return len(ensemble.components) > 1 and ensemble.components[0] is ensemble.components[1]


def disjoint(ensemble: Ensemble) -> bool:
    supports = [set(np.flatnonzero(c.log_probs([()])[0].exp().numpy())) for c in ensemble.components]
    return len(supports) > 1 and not supports[0] & supports[1] and sum(map(len, supports)) > 2


def ends_at_once(ensemble: Ensemble) -> bool:
    law = sequence_law(ensemble, (), max_new_tokens=3)
    return ensemble.vocabulary.size > 1 and bool((law.sequences[:, 1] == -1).all())


def warped_component(ensemble: Ensemble) -> bool:
    return any(isinstance(c, Warped) for c in ensemble.components)


EDGES = [one_token, one_component, zero_weight, one_hot_weights, identical, disjoint, ends_at_once, warped_component]


@pytest.mark.parametrize("edge", EDGES, ids=lambda edge: edge.__name__)
def test_ensembles_reach_their_edges(edge: Callable[[Ensemble], bool]) -> None:
    assert edge(first(ensembles(), edge))


@given(ensembles(relations=("independent",), warped=False, eos=False))
def test_options_of_ensembles_narrow_them(ensemble: Ensemble) -> None:
    assert not identical(ensemble)
    assert not warped_component(ensemble)
    assert not ensemble.vocabulary.eos


SCHEDULES = schedules(3, 8, size=4, eos=(0,), readers=2)


@given(SCHEDULES)
def test_schedules_are_valid(schedule: tuple[Turn, ...]) -> None:
    for turn in schedule:
        assert turn.appended or turn.read
        assert len(turn.tokens) == len(turn.appended) == len(set(turn.appended))
        assert len(turn.read) == len(set(turn.read))
        assert {*turn.appended, *turn.read} <= set(range(3))
        assert set(turn.tokens) <= {1, 2, 3}
        assert turn.reader in (0, 1)
    assert sum(bool(turn.appended) for turn in schedule) <= 8
    assert schedule[-1].read == (0, 1, 2)


def unread(schedule: tuple[Turn, ...], row: int) -> int:
    """The longest lag of `row`: appends between two reads."""
    lag = longest = 0
    for turn in schedule:
        lag += row in turn.appended
        longest, lag = max(longest, lag), 0 if row in turn.read else lag
    return longest


def test_schedules_have_switches_lags_and_ragged_rows() -> None:
    first(SCHEDULES, lambda s: unread(s, 0) >= 5)
    first(SCHEDULES, lambda s: unread(s, 0) >= 4 and sum(1 in turn.read for turn in s) >= 4)
    first(SCHEDULES, lambda s: len({turn.reader for turn in s if turn.read}) == 2)
    first(SCHEDULES, lambda s: {sum(row in turn.appended for turn in s) for row in range(3)} >= {1, 3})
    first(SCHEDULES, lambda s: any(turn.read == (2, 0, 1) for turn in s))


def test_a_vocabulary_that_only_ends_still_has_schedules() -> None:
    assert first(schedules(1, 2, size=2, eos=(0, 1)), lambda s: s[0].tokens)
