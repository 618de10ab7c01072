"""ME whose rows drift apart: the tokens of lockstep, in fewer forwards."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from me_stats.draws import RowStreams
from me_stats.mixing import ConstantMixing
from me_stats.models import Ensemble, MarkovModel, TableModel, TopK, Warped
from me_stats.presets import MIXED_SIBLINGS, SIBLINGS, open_setting
from me_stats.samplers import MESampler, SequenceMixtureSampler
from me_stats.schedule import Schedule, Serve, serves
from me_stats.trace import Trace
from tests.stand_ins import Ledger, Ungrouped
from tests.strategies import LastTokenMixing, OutsideModel, prompts, seeds, simplex

pytestmark = pytest.mark.usefixtures("tables_for_any_length")


def chains(k: int, *, ends: bool = True, size: int = 4) -> list[Any]:
    eos = (size - 1,) if ends else ()
    return [TableModel.random(size, seed=s, order=2, concentration=2.0, eos=eos) for s in range(k)]


LONG = Ensemble(chains(2, ends=False), ConstantMixing([0.5, 0.5]))


def both(ensemble: Ensemble, starts: Any, *, shared_rows: int = 1, **options: Any) -> tuple[Trace, Trace]:
    # A batch size keeps tables on the general loop.
    options.setdefault("batch_size", 10_000)
    lockstep = MESampler(ensemble, shared_rows=shared_rows, lockstep=True).sample(starts, **options)
    return MESampler(ensemble, shared_rows=shared_rows).sample(starts, **options), lockstep


def same(a: Trace, b: Trace) -> bool:
    assert a.components is not None
    assert b.components is not None
    grids = zip((a.tokens, a.lengths, a.components), (b.tokens, b.lengths, b.components), strict=True)
    return all(torch.equal(x, y) for x, y in grids)


@given(st.data(), seeds, st.integers(1, 4), st.integers(1, 9), st.integers(1, 40), st.booleans(), st.booleans())
def test_tokens_and_components_are_those_of_lockstep(
    data: st.DataObject, seed: int, k: int, n: int, steps: int, ends: bool, outside: bool
) -> None:
    parts = chains(k, ends=ends)
    mixing = ConstantMixing(data.draw(simplex(k)))  # zeros among them
    ensemble = Ensemble([OutsideModel(part) for part in parts] if outside else parts, mixing)
    starts = data.draw(st.lists(prompts(4), min_size=1, max_size=4))
    shared, batch_size = data.draw(st.integers(1, 5)), data.draw(st.sampled_from([1, 3, 10_000]))
    rows = np.random.default_rng(seed % 2**32).permutation(3 * n * len(starts))[: n * len(starts)]
    drift, lockstep = both(
        ensemble, starts, shared_rows=shared, n=n, seed=seed, max_new_tokens=steps, rows=rows, batch_size=batch_size
    )
    assert same(drift, lockstep)
    assert drift.cost.reads == lockstep.cost.reads


def test_rows_drift_and_forwards_are_those_of_the_schedule() -> None:
    for ends in (False, True):
        ensemble = Ensemble(chains(3, ends=ends), ConstantMixing([0.5, 0.3, 0.2]))
        drift, lockstep = both(ensemble, [[0], [1]], n=32, max_new_tokens=60)
        for trace, kept in ((drift, False), (lockstep, True)):
            assert trace.cost.forwards == len(list(serves(trace.components, lockstep=kept, horizon=60)))
        assert drift.cost.forwards < 0.85 * lockstep.cost.forwards


def test_components_of_any_make() -> None:
    inner = Ensemble(chains(2), ConstantMixing([0.4, 0.6]))
    routed = Ensemble(chains(2), LastTokenMixing(np.random.default_rng(0).dirichlet(np.ones(2), 5)))
    ensemble = Ensemble([Warped(inner, TopK(2)), routed, chains(1)[0]], ConstantMixing([0.3, 0.3, 0.4]))
    drift, lockstep = both(ensemble, [[0]], n=40, max_new_tokens=30)
    assert same(drift, lockstep)


def test_what_chooses_in_another_way_stays_in_lockstep(monkeypatch: pytest.MonkeyPatch) -> None:
    def never(self: Schedule) -> Serve | None:
        raise AssertionError("rows drift")

    monkeypatch.setattr(Schedule, "next", never)
    options: dict[str, Any] = {"n": 3, "max_new_tokens": 5, "batch_size": 3}
    for sampler in (SequenceMixtureSampler(LONG), Ungrouped(LONG), MESampler(LONG, lockstep=True)):
        sampler.sample([0], **options)
    routed = Ensemble(LONG.components, LastTokenMixing(np.full((5, 2), 0.5)))
    MESampler(routed).sample([0], **options)
    MESampler(LONG).sample([0], draw=Ledger(0), **options)
    MESampler(LONG).sample([0], n=1, max_new_tokens=5, batch_size=1)
    with pytest.raises(AssertionError, match="rows drift"):
        MESampler(LONG).sample([0], **options)


def test_a_sampler_in_lockstep_says_so() -> None:
    assert repr(MESampler(LONG, shared_rows=2, lockstep=True)).endswith("), shared_rows=2, lockstep=True)")
    assert repr(MESampler(LONG, lockstep=True)) == f"MESampler({LONG!r}, lockstep=True)"


class Elsewhere(torch.Tensor):
    """A tensor that says it lives on an accelerator."""

    is_cpu = property(lambda self: False)  # type: ignore[assignment]


def test_rows_that_are_dropped_late_write_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    ensemble = Ensemble(chains(2), ConstantMixing([0.3, 0.7]))
    options: dict[str, Any] = {"n": 10, "max_new_tokens": 200, "batch_size": 20}
    prompt = MESampler(ensemble).sample([[0], [1]], **options)
    drawn = RowStreams.__call__
    monkeypatch.setattr(
        RowStreams, "__call__", lambda self, *args, **given: drawn(self, *args, **given).as_subclass(Elsewhere)
    )
    heard: list[int] = []
    late = MESampler(ensemble).sample([[0], [1]], progress=heard.append, **options)
    assert same(late, prompt)
    # Dropped 16 tokens a row after their end at the latest, as near as rows drift.
    assert prompt.cost.reads < late.cost.reads < prompt.cost.reads + 20 * 40
    assert sum(heard) > int(late.lengths.sum())


# --- networks -------------------------------------------------------------------------------------------------


def test_bundled_siblings_write_the_same_tokens_in_fewer_forwards() -> None:
    setting = open_setting(SIBLINGS)
    for shared in (1, 4):
        drift, lockstep = both(setting.ensemble, setting.prompts[:2], n=8, max_new_tokens=40, shared_rows=shared)
        assert same(drift, lockstep)
        assert drift.cost.forwards < lockstep.cost.forwards
        assert drift.cost.tokens_forwarded == lockstep.cost.tokens_forwarded
        assert drift.cost.reads == lockstep.cost.reads


def test_siblings_of_two_vocabularies_write_the_same_tokens() -> None:
    setting = open_setting(MIXED_SIBLINGS)
    drift, lockstep = both(setting.ensemble, setting.prompts[:2], n=4, max_new_tokens=24)
    assert same(drift, lockstep)
    assert drift.cost.forwards < lockstep.cost.forwards


# --- planted bugs: a wrong serve is seen in the tokens or the components -----------------------------------------


def swapped(serve: Serve) -> Serve:
    return replace(serve, component=1 - serve.component) if serve.steps.max() == 7 else serve


def a_step_late(serve: Serve) -> Serve:
    return replace(serve, steps=np.minimum(serve.steps + 1, 19)) if serve.steps.max() == 7 else serve


def another_row(serve: Serve) -> Serve:
    return replace(serve, rows=serve.rows[::-1].copy()) if len(np.unique(serve.steps)) > 1 else serve


@pytest.mark.parametrize("bug", [swapped, a_step_late, another_row])
def test_planted_bugs_of_the_schedule_change_the_trace(bug: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    right = Schedule.next

    def wrong(self: Schedule) -> Serve | None:
        serve = right(self)
        return serve if serve is None else bug(serve)

    monkeypatch.setattr(Schedule, "next", wrong)
    drift, lockstep = both(LONG, [0], n=16, max_new_tokens=20)
    assert not same(drift, lockstep)


@pytest.mark.parametrize("chain", [MarkovModel.random(3, seed=0)])
def test_one_component_is_lockstep(chain: Any) -> None:
    drift, lockstep = both(Ensemble([chain], ConstantMixing([1.0])), [0], n=5, max_new_tokens=9)
    assert same(drift, lockstep)
    assert drift.cost == lockstep.cost
