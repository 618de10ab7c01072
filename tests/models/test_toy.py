from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from me_stats.models import MarkovModel, TableModel
from tests.strategies import prompts, seeds, table_models


def by_hand(model: TableModel, probs: np.ndarray, prefix: tuple[int, ...]) -> np.ndarray:
    """The law after `prefix`: the documented row of its last `order` tokens, found by the recursion."""
    row = 0
    for token in prefix[-model.order :] if model.order else ():
        row = model.vocabulary.size * row + 1 + token
    return probs[row]


@given(st.data())
def test_the_law_is_the_documented_row_of_the_last_tokens(data: st.DataObject) -> None:
    model = data.draw(table_models())
    prefixes = data.draw(st.lists(prompts(model.vocabulary.size, max_length=7), max_size=6))
    laws = model.log_probs(prefixes)
    assert laws.dtype == torch.float64
    assert laws.shape == (len(prefixes), model.vocabulary.size)
    table = model.log_table.numpy()
    for law, prefix in zip(laws.numpy(), prefixes, strict=True):
        assert (law == by_hand(model, table, prefix)).all()


@given(st.data())
def test_states_advance_as_prefixes_grow(data: st.DataObject) -> None:
    model = data.draw(table_models())
    prefix = data.draw(prompts(model.vocabulary.size, max_length=8))
    states = model.states_of([()])
    for length, token in enumerate(prefix, start=1):
        states = model.next_states(states, np.array([token]))
        assert states.tolist() == model.states_of([prefix[:length]]).tolist()


@given(table_models(max_order=2), st.integers(0, 2), st.data())
def test_a_higher_order_table_is_the_same_law(model: TableModel, more: int, data: st.DataObject) -> None:
    taller = model.at_order(model.order + more)
    assert taller.vocabulary == model.vocabulary
    prefixes = data.draw(st.lists(prompts(model.vocabulary.size, max_length=6), min_size=1, max_size=5))
    assert torch.equal(taller.log_probs(prefixes), model.log_probs(prefixes))


def test_a_lower_order_is_refused() -> None:
    with pytest.raises(ValueError, match="order must be at least the model's own, 2, got 1"):
        TableModel.random(2, seed=0, order=2).at_order(1)


def test_a_chain_reads_its_last_token_only() -> None:
    chain = MarkovModel([0.5, 0.5], [[0.9, 0.1], [0.2, 0.8]], eos=(1,))
    assert chain.order == 1
    assert chain.vocabulary.eos == (1,)
    laws = chain.log_probs([(), (0,), (1, 1, 0), (0, 1)]).exp()
    assert torch.allclose(laws, torch.tensor([[0.5, 0.5], [0.9, 0.1], [0.9, 0.1], [0.2, 0.8]], dtype=torch.float64))


@given(seeds, st.integers(1, 5), st.integers(0, 3))
def test_random_toys_follow_from_their_seed(seed: int, size: int, order: int) -> None:
    model = TableModel.random(size, seed=seed, order=order)
    assert torch.equal(model.log_table, TableModel.random(size, seed=seed, order=order).log_table)
    assert len(model.log_table) == sum(size**depth for depth in range(order + 1))
    assert torch.allclose(model.log_table.logsumexp(-1), torch.zeros(1, dtype=torch.float64), atol=1e-12)
    if size > 1:
        assert not torch.equal(model.log_table, TableModel.random(size, seed=seed + 1, order=order).log_table)


def test_random_keeps_the_class() -> None:
    assert type(MarkovModel.random(3, seed=0)) is MarkovModel
    assert type(TableModel.random(3, seed=0)) is TableModel
    with pytest.raises(ValueError, match="a MarkovModel has order 1"):
        MarkovModel.random(3, seed=0, order=2)


@pytest.mark.parametrize(
    ("probs", "order", "message"),
    [
        ([0.5, 0.5], 0, r"probs must be \(S, V\)"),
        ([[0.5, 0.5]], -1, r"probs must be \(S, V\)"),
        ([[0.5, 0.5]], 1, "probs has 1 rows; order 1 over V=2 tokens needs 3 histories"),
        ([[0.5, 0.4]], 0, "every row of probs must be non-negative and sum to 1"),
        ([[1.5, -0.5]], 0, "every row of probs must be non-negative and sum to 1"),
        ([[float("nan"), 1.0]], 0, "every row of probs must be non-negative and sum to 1"),
    ],
)
def test_tables_that_are_no_laws_are_refused(probs: list[list[float]], order: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TableModel(probs, order=order)


@pytest.mark.parametrize("prefix", [(2,), (-1,), (0, 5)])
def test_ids_outside_the_vocabulary_are_refused(prefix: tuple[int, ...]) -> None:
    # Silently, such an id would be another history's row.
    with pytest.raises(ValueError, match=r"token id outside the vocabulary 0\.\.1"):
        TableModel.random(2, seed=0, order=2).log_probs([prefix])


def test_a_float32_table_is_kept_in_float64() -> None:
    half = torch.full((1, 2), 0.5).log()
    assert TableModel.from_log_table(half, order=0).log_table.dtype == torch.float64
