from __future__ import annotations

from typing import Any

import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from me_stats.mixing import ConstantMixing
from me_stats.models import Conditioned, Ensemble, TableModel, Temperature, TopK, Warped
from me_stats.models.base import PrefixSession
from me_stats.models.joint import PublishedCE, UnionTopK, published_me
from me_stats.models.shared import PrefixLookback, SharedSession, networks, open_lookback
from tests.strategies import LastTokenMixing, ensembles, prompts

A, B = (TableModel.random(4, seed=seed, order=2) for seed in (0, 1))
MIXING = ConstantMixing([0.6, 0.4])


class Louder(Warped):
    """A subclass may change what the law is, so it counts as a network of its own."""


def test_networks_are_counted_once() -> None:
    both = Ensemble([A, B], MIXING)
    published = PublishedCE([A, B], MIXING, temperature=0.7)
    assert networks(published, published_me([A, B], MIXING, temperature=0.7), Warped(both, TopK(2)), A) == [A, B]
    assert networks(Conditioned(A, [1]), A, Louder(A))[1] is A
    assert len(networks(Conditioned(A, [1]), A, Louder(A))) == 3


@given(st.data())
def test_what_is_read_along_is_the_definition(data: st.DataObject) -> None:
    ensemble = data.draw(ensembles())
    size = ensemble.vocabulary.size
    starts = data.draw(st.lists(prompts(size), min_size=1, max_size=3))
    session = open_lookback(ensemble, starts)
    prefixes = list(starts)
    rows = np.arange(len(starts))
    for _ in range(data.draw(st.integers(0, 4))):
        tokens = data.draw(st.lists(st.integers(0, size - 1), min_size=len(rows), max_size=len(rows)))
        session.append(rows, torch.tensor(tokens))
        prefixes = [(*prefix, token) for prefix, token in zip(prefixes, tokens, strict=True)]
    grown = [len(prefix) - len(start) for prefix, start in zip(prefixes, starts, strict=True)]
    counts = np.array([data.draw(st.integers(0, most)) for most in grown])
    asked = [
        prefix[: len(prefix) - back] for prefix, n in zip(prefixes, counts, strict=True) for back in range(n, -1, -1)
    ]
    assert torch.equal(session.log_probs_along(rows, counts), ensemble.log_probs(asked))
    session.drop(rows, counts)
    left = [prefix[: len(prefix) - count] for prefix, count in zip(prefixes, counts, strict=True)]
    assert torch.equal(session.log_probs(rows), ensemble.log_probs(left))


def test_rows_read_along_cost_one_forward() -> None:
    session = PrefixLookback(A, [(1, 2), (1, 2)])
    for _ in range(3):
        session.append(np.arange(2), torch.tensor([0, 0]))
    session.log_probs_along(np.arange(2), np.array([3, 3]))
    # The two rows are one path of five tokens.
    assert (session.cost.forwards, session.cost.tokens_forwarded, session.cost.reads) == (1, 5, 8)


class OwnLookback(PrefixLookback):
    """A session that can go back by itself, as one with a cache would."""


class Cached(TableModel):
    def session(self, prompts: Any, *, max_new_tokens: int | None = None) -> Any:
        return OwnLookback(self, prompts)


def test_a_session_that_can_go_back_is_used() -> None:
    model = Cached.random(3, seed=0)
    assert type(open_lookback(model, [(0,)])) is OwnLookback
    assert type(open_lookback(A, [(0,)])) is PrefixLookback


class Counting(TableModel):
    def log_probs(self, prefixes: Any) -> Tensor:
        self.calls = getattr(self, "calls", 0) + 1
        return super().log_probs(prefixes)

    def session(self, prompts: Any, *, max_new_tokens: int | None = None) -> Any:
        return PrefixSession(self, prompts)


def test_a_network_runs_once_for_all_models_and_only_when_it_is_asked_for() -> None:
    a, b = Counting.random(4, seed=0), Counting.random(4, seed=1)
    router = LastTokenMixing(np.random.default_rng(0).dirichlet(np.ones(2), 5))
    target = UnionTopK([a, b], router, 2)
    draft = Ensemble([Warped(a, Temperature(0.5)), Warped(b, Temperature(0.5))], router)
    session = SharedSession((target, draft), [(0,), (3, 1)])
    a.calls = b.calls = 0
    now = session.now(np.arange(2))
    drawn = now.at(np.array([1])).law(draft.components[0])
    assert (a.calls, b.calls) == (1, 0)
    assert torch.equal(drawn, draft.components[0].log_probs([(3, 1)]))
    assert (session.cost.forwards, session.cost.reads) == (1, 1)
    session.append(np.arange(2), np.array([2, 2]))
    session.drop(np.arange(2), np.array([1, 0]))
    reading = session.along(np.arange(2), np.array([0, 1]))
    asked = [(0,), (3, 1), (3, 1, 2)]
    for model in (target, draft, Warped(target, TopK(1)), a):
        assert torch.allclose(reading.law(model).exp(), model.log_probs(asked).exp(), rtol=0, atol=1e-15)
    picked = reading.at(np.array([2, 0]))
    assert torch.equal(picked.law(target), reading.law(target)[[2, 0]])
    assert session.cost.forwards == 3


def test_constant_weights_keep_no_prefixes() -> None:
    session = SharedSession((Ensemble([A, B], MIXING),), [(0, 1, 2)])
    assert session.now(np.array([0])).prefixes == [()]
