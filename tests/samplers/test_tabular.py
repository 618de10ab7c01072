"""The fast path of tables against the general loop in lockstep: the same tokens, components and cost."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from me_stats.draws import BLOCK, RowStreams, inverse_cdf
from me_stats.mixing import ConstantMixing
from me_stats.models import Conditioned, Ensemble, MarkovModel, TableModel, TopK, Warped
from me_stats.samplers import CESampler, MESampler, Sampler, SequenceMixtureSampler, tabular
from me_stats.samplers.tabular import Plan, tabulate
from tests.strategies import LAW_KINDS, LastTokenMixing, OutsideModel, ensembles, law_rows, prompts, seeds, warps

pytestmark = pytest.mark.usefixtures("tables_for_any_length")

SAMPLERS: dict[str, Callable[[Any], Sampler]] = {
    "CE": CESampler,
    "CE of mix-then-transform": lambda ensemble: CESampler(Warped(ensemble, TopK(2))),
    "CE of one component": lambda ensemble: CESampler(ensemble.components[0]),
    "CE latent": lambda ensemble: CESampler(ensemble, latent=True),
    "ME": lambda ensemble: MESampler(ensemble, lockstep=True),
    "one component per sequence": SequenceMixtureSampler,
    "ME with shared draws": lambda ensemble: MESampler(ensemble, shared_rows=3, lockstep=True),
    "one component per sequence and group": lambda ensemble: SequenceMixtureSampler(ensemble, shared_rows=5),
}
every_sampler = pytest.mark.parametrize("build", SAMPLERS.values(), ids=SAMPLERS.keys())


def assert_same_on_both_paths(sampler: Sampler, starts: Any, **options: Any) -> None:
    assert sampler._plan() is not None
    count = len(starts) * options.get("n", 1)
    fast = sampler.sample(starts, **options)
    general = sampler.sample(starts, **options, batch_size=count)
    assert torch.equal(fast.tokens, general.tokens)
    assert torch.equal(fast.lengths, general.lengths)
    assert (fast.components is None) == (general.components is None)
    if fast.components is not None:
        assert torch.equal(fast.components, general.components)
    assert fast.cost == general.cost


@every_sampler
@given(data=st.data(), seed=seeds, n=st.integers(1, 20), steps=st.integers(1, 40))
def test_tokens_are_those_of_the_general_path(build: Any, data: st.DataObject, seed: int, n: int, steps: int) -> None:
    ensemble = data.draw(ensembles())
    starts = data.draw(st.lists(prompts(ensemble.vocabulary.size), min_size=1, max_size=4))
    count = len(starts) * n
    numbers = np.random.Generator(np.random.Philox(seed)).choice(3 * count, count, replace=False)
    rows = data.draw(st.sampled_from([None, numbers, np.sort(numbers) * 1000]))
    assert_same_on_both_paths(build(ensemble), starts, n=n, max_new_tokens=steps, seed=seed, rows=rows)


@every_sampler
@pytest.mark.parametrize("size", [1, 2, 7, 64, 300])
def test_wide_laws_and_many_rows(build: Any, size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tabular, "_CHUNK", 96)  # several chunks
    parts = [
        MarkovModel.random(size, seed=s, concentration=0.05 if s else 1.0, eos=(size - 1,) if size > 2 else ())
        for s in range(3)
    ]
    ensemble = Ensemble(parts, ConstantMixing([0.5, 0.0, 0.5]))
    assert_same_on_both_paths(build(ensemble), [[0]], n=250, max_new_tokens=35, seed=size)


def test_nested_ensembles_count_every_table() -> None:
    inner = Ensemble([MarkovModel.random(3, seed=s) for s in (0, 1)], ConstantMixing([0.5, 0.5]))
    outer = Ensemble([Warped(inner, TopK(2)), MarkovModel.random(3, seed=2)], ConstantMixing([0.5, 0.5]))
    for sampler in (CESampler(outer), MESampler(outer, lockstep=True), CESampler(outer, latent=True)):
        assert_same_on_both_paths(sampler, [[0]], n=5, max_new_tokens=4)
    assert CESampler(outer).sample([0], max_new_tokens=4).cost.forwards == 12


# --- tables of models ------------------------------------------------------------------------------------


@given(st.data())
def test_the_table_of_a_model_is_the_model(data: st.DataObject) -> None:
    ensemble = data.draw(ensembles())
    model = data.draw(st.sampled_from([ensemble, Warped(ensemble, data.draw(warps)), *ensemble.components]))
    table = tabulate(model)
    assert table is not None
    assert table.vocabulary == model.vocabulary
    prefixes = data.draw(st.lists(prompts(model.vocabulary.size, max_length=6), min_size=1, max_size=5))
    assert torch.equal(table.log_probs(prefixes), model.log_probs(prefixes))


class Uniform(TableModel):
    """A subclass with a law of its own, which its table does not know."""

    def log_probs(self, prefixes: Any) -> torch.Tensor:
        return torch.full((len(prefixes), self.vocabulary.size), 1 / self.vocabulary.size).double().log()


def test_what_is_more_than_tables_runs_on_the_general_path() -> None:
    table = MarkovModel.random(3, seed=0)
    half = ConstantMixing([0.5, 0.5])
    others = [
        OutsideModel(table),
        Conditioned(table, [0]),
        Warped(OutsideModel(table), TopK(2)),
        Ensemble([table, OutsideModel(table)], half),
        Ensemble([table, table], LastTokenMixing(np.full((4, 2), 0.5))),
        Uniform.random(3, seed=0),
    ]
    for model in others:
        assert tabulate(model) is None
        assert CESampler(model)._plan() is None
    for ensemble in others[3:5]:
        assert Plan.ancestral(ensemble) is None  # type: ignore[arg-type]


def test_tables_that_would_leave_the_caches_run_on_the_general_path() -> None:
    wide = TableModel.random(1100, seed=0, order=1)
    sampler = CESampler(wide)
    assert sampler._plan() is None
    assert sampler.sample([5], n=3, max_new_tokens=2).tokens.shape == (3, 2)


@pytest.mark.parametrize(("n", "planned"), [(255, False), (256, True)])
def test_a_guide_is_built_only_where_it_pays(n: int, planned: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    used: list[Plan] = []
    monkeypatch.setattr(tabular, "MIN_TOKENS", 256)
    monkeypatch.setattr(Plan, "run", lambda self, *args, run=Plan.run: (used.append(self), run(self, *args))[1])
    CESampler(MarkovModel.random(3, seed=0)).sample([0], n=n, max_new_tokens=1)
    assert bool(used) == planned


# --- the guide table -----------------------------------------------------------------------------------------


@given(
    kind=st.sampled_from(LAW_KINDS),
    rows=st.integers(1, 4),
    size=st.integers(1, 9),
    seed=seeds,
    work=st.sampled_from([1, 10**6]),
    shift=st.sampled_from([0.0, 3e-7, -1e-4]),
)
def test_the_guide_finds_what_the_inverse_cdf_finds(
    kind: str, rows: int, size: int, seed: int, work: int, shift: float
) -> None:
    # Float32 laws do not sum to 1 exactly, and then edges round to the integer above or below.
    log_laws = torch.from_numpy(law_rows(kind, rows, size, seed)).log() + shift
    guide = tabular._Guide(log_laws, work)
    cdf = log_laws.exp().cumsum(-1).numpy()
    rng = np.random.Generator(np.random.Philox(seed))
    # Every integer around every edge of a law and of a cell, both ends, and some between.
    edges = np.concatenate([(cdf / cdf[:, -1:]).ravel() * 2.0**53, np.arange(guide.cells) * 2.0**guide.shift])
    near = (np.floor(edges)[:, None] + np.arange(-3, 4)).ravel()
    integers = np.concatenate([near, rng.integers(0, 2**53, 50)]).clip(0, 2**53 - 1).astype(np.int64)
    for law in range(rows):
        found = guide.find(law * guide.cells + (integers >> guide.shift), integers) - law * size
        uniforms = torch.from_numpy(integers * 2.0**-53)
        expected = inverse_cdf(log_laws[law : law + 1], uniforms, index=torch.zeros(len(integers), dtype=torch.long))
        assert (found == expected.numpy()).all()


@pytest.mark.parametrize(("work", "cells"), [(1, 4096), (10**5, 65536), (10**9, 65536)])
def test_a_guide_is_no_larger_than_its_use(work: int, cells: int) -> None:
    assert tabular._Guide(torch.full((1, 4096), -np.log(4096)).double(), work).cells == cells


# --- speed -----------------------------------------------------------------------------------------------------


def fastest(run: Callable[[], object], repeats: int = 5) -> float:
    times = []
    for _ in range(repeats):
        start = time.process_time()
        run()
        times.append(time.process_time() - start)
    return min(times)


def test_toys_run_at_the_speed_of_their_random_numbers() -> None:
    # A ratio, not seconds: both sides slow down together on a busy machine. Measured at 3 to 4.
    n, steps = 8192, 128
    ensemble = Ensemble([MarkovModel.random(64, seed=s) for s in (0, 1)], ConstantMixing([0.3, 0.7]))

    def numbers_alone() -> None:
        streams = RowStreams(0)
        for block in range(steps // BLOCK):
            for stream in ("component", "token"):
                streams.integers(np.arange(n), block, stream=stream)  # type: ignore[arg-type]

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        sampler = MESampler(ensemble)
        ratio = fastest(lambda: sampler.sample([0], n=n, max_new_tokens=steps)) / fastest(numbers_alone)
    finally:
        torch.set_num_threads(threads)
    assert ratio < 12
