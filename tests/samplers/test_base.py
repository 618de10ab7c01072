"""What holds for every sampler: arguments, random numbers by row, stopping, and counted work."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from me_stats.draws import RowStreams
from me_stats.mixing import ConstantMixing
from me_stats.models import Conditioned, Cost, Ensemble, MarkovModel, TableModel, Temperature, TopK, Warped
from me_stats.models.joint import Restricted
from me_stats.samplers import (
    CESampler,
    FixedMaskSampler,
    MESampler,
    Sampler,
    SequenceMixtureSampler,
    SpeculativeSampler,
)
from me_stats.samplers.base import rows_that_fit
from me_stats.schedule import serves
from me_stats.trace import Trace
from tests.strategies import LastTokenMixing, OutsideModel, ensembles, prompts, seeds

pytestmark = pytest.mark.usefixtures("tables_for_any_length")

# One law a row, and a component's for every token that is written.
PLAIN: dict[str, Callable[[Ensemble], Sampler]] = {
    "CE": CESampler,
    "CE latent": lambda ensemble: CESampler(ensemble, latent=True),
    "ME": MESampler,
    "ME in lockstep": lambda ensemble: MESampler(ensemble, lockstep=True),
    "one component per sequence": SequenceMixtureSampler,
}


def speculative(ensemble: Ensemble) -> Sampler:
    return SpeculativeSampler(Warped(ensemble, Temperature(0.5)), ensemble, chunk=3)


def fixed_mask(attempts: int) -> Callable[[Ensemble], Sampler]:
    """Of all tokens, which any mixture can write: each first pair is accepted, or each token takes the fall-back."""

    def build(ensemble: Ensemble) -> Sampler:
        everything = range(ensemble.vocabulary.size)
        return FixedMaskSampler(Restricted(ensemble.components, ensemble.mixing, everything), attempts=attempts)

    return build


SAMPLERS = PLAIN | {"speculative": speculative, "fixed mask": fixed_mask(4), "fixed mask, tilted": fixed_mask(0)}
plain_sampler = pytest.mark.parametrize("build", PLAIN.values(), ids=PLAIN.keys())
# Eight samplers a property: half as many examples of each.
half = settings(max_examples=settings.default.max_examples // 2)  # type: ignore[union-attr]
every_sampler = pytest.mark.parametrize("build", SAMPLERS.values(), ids=SAMPLERS.keys())


def pair(*, eos: tuple[int, ...] = (), outside: bool = False) -> Ensemble:
    parts: list[Any] = [MarkovModel.random(4, seed=s, eos=eos) for s in (0, 1)]
    return Ensemble([OutsideModel(part) for part in parts] if outside else parts, ConstantMixing([0.3, 0.7]))


def same(a: Trace, b: Trace) -> bool:
    equal = torch.equal(a.tokens, b.tokens) and torch.equal(a.lengths, b.lengths)
    if a.components is None or b.components is None:
        return equal and a.components is b.components
    return equal and torch.equal(a.components, b.components)


# --- arguments ------------------------------------------------------------------------------------------


@every_sampler
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"n": 0}, "n must be an integer of at least 1, got 0"),
        ({"n": 1.5}, "n must be an integer of at least 1, got 1.5"),
        ({"max_new_tokens": 0}, "max_new_tokens must be an integer of at least 1, got 0"),
        ({"max_new_tokens": -2}, "max_new_tokens must be an integer"),
        ({"batch_size": 0}, "batch_size must be an integer of at least 1, got 0"),
        ({"n": 2, "rows": [3, 3]}, "rows must be 2 distinct integers"),
        ({"n": 2, "rows": [1]}, "rows must be 2 distinct integers"),
        ({"n": 2, "rows": [-1, 0]}, "rows must be 2 distinct integers"),
        ({"n": 2, "rows": [0, 2**62]}, "rows must be 2 distinct integers"),
        ({"n": 2, "rows": [0.5, 1.5]}, "rows must be 2 distinct integers"),
        ({"prompts": [0, 4]}, r"prompt has token id 4, outside the vocabulary 0\.\.3"),
        ({"prompts": [[0], [-1]]}, "prompt has token id -1, outside the vocabulary"),
        ({"seed": -1}, "seed must lie in"),
        ({"seed": 2**120}, "seed must lie in"),
    ],
)
def test_bad_arguments_are_refused_by_name(build: Any, options: dict[str, Any], message: str) -> None:
    arguments = {"prompts": [0], "max_new_tokens": 3, **options}
    for extra in ({}, {"batch_size": 4}):
        with pytest.raises(ValueError, match=message):
            build(pair()).sample(**{**extra, **arguments})


def test_text_needs_a_tokenizer() -> None:
    with pytest.raises(TypeError, match="this vocabulary has no tokenizer"):
        CESampler(pair()).sample("a prompt", max_new_tokens=1)


def test_names() -> None:
    assert repr(CESampler(MarkovModel.random(3, seed=0))) == "CESampler(MarkovModel(V=3, order=1))"
    assert repr(MESampler(pair())).startswith("MESampler(Ensemble([MarkovModel(V=4, order=1), ")


# --- a row depends on its seed, its number and its prompt -------------------------------------------------


@every_sampler
@half
@given(data=st.data(), seed=seeds, steps=st.integers(1, 20))
def test_neighbours_order_and_batches_do_not_matter(build: Any, data: st.DataObject, seed: int, steps: int) -> None:
    ensemble = data.draw(ensembles())
    sampler = build(ensemble)
    starts = data.draw(st.lists(prompts(ensemble.vocabulary.size), min_size=1, max_size=4))
    rows = data.draw(
        st.lists(
            st.one_of(st.integers(0, 9), st.integers(0, 10**6)),
            min_size=len(starts),
            max_size=len(starts),
            unique=True,
        )
    )
    together = sampler.sample(starts, max_new_tokens=steps, seed=seed, rows=rows)
    for size in (1, 2, len(rows)):
        assert same(together, sampler.sample(starts, max_new_tokens=steps, seed=seed, rows=rows, batch_size=size))
    order = data.draw(st.permutations(range(len(rows))))
    shuffled = sampler.sample(
        [starts[i] for i in order], max_new_tokens=steps, seed=seed, rows=[rows[i] for i in order], batch_size=3
    )
    assert torch.equal(shuffled.tokens, together.tokens[list(order)])
    for i, (start, row) in enumerate(zip(starts, rows, strict=True)):
        alone = sampler.sample([start], max_new_tokens=steps, seed=seed, rows=[row])
        length = int(alone.lengths[0])
        assert length == int(together.lengths[i])
        assert torch.equal(alone.tokens[0], together.tokens[i, :length])


@every_sampler
def test_a_longer_run_begins_with_the_shorter_one(build: Any) -> None:
    short = build(pair()).sample([0], n=7, max_new_tokens=11, seed=5)
    long = build(pair()).sample([0], n=9, max_new_tokens=40, seed=5)
    assert torch.equal(long.tokens[:7, :11], short.tokens)


@every_sampler
def test_runs_can_be_extended_by_fresh_rows(build: Any) -> None:
    whole = build(pair()).sample([0], n=10, max_new_tokens=6, seed=1)
    parts = [
        build(pair()).sample([0], n=5, max_new_tokens=6, seed=1, rows=np.arange(start, start + 5)) for start in (0, 5)
    ]
    assert torch.equal(torch.cat([part.tokens for part in parts]), whole.tokens)


@every_sampler
def test_seeds_differ_whatever_their_size(build: Any) -> None:
    seeds_ = (0, 1, 2**64, 2**64 + 1, 2**100)
    tokens = [build(pair()).sample([0], n=4, max_new_tokens=20, seed=seed).tokens for seed in seeds_]
    assert len({tuple(grid.flatten().tolist()) for grid in tokens}) == len(seeds_)


@every_sampler
def test_a_row_never_repeats_its_numbers(build: Any) -> None:
    # 40 tokens span three blocks of random numbers; a block read twice would repeat its tokens.
    uniform = TableModel([[1 / 4] * 4], order=0)
    for batch_size in (None, 8):
        sampler = build(Ensemble([uniform, uniform], ConstantMixing([0.5, 0.5])))
        tokens = sampler.sample([()], n=8, max_new_tokens=48, seed=2, batch_size=batch_size).tokens
        blocks = {tuple(row) for row in tokens.reshape(-1, 16).tolist()}
        assert len(blocks) == 24


def test_an_injected_draw_replaces_the_seed() -> None:
    trace = MESampler(pair()).sample([0], n=5, max_new_tokens=4, draw=RowStreams(3))
    assert trace.seed is None
    assert same(trace, MESampler(pair()).sample([0], n=5, max_new_tokens=4, seed=3))


# --- prompts --------------------------------------------------------------------------------------------


@every_sampler
def test_each_prompt_is_continued_n_times(build: Any) -> None:
    # From token t the chain can only write t: rows show which prompt they continue.
    echo = MarkovModel([1, 0, 0], np.eye(3))
    ensemble = Ensemble([echo, echo], ConstantMixing([0.5, 0.5]))
    for batch_size in (None, 2):
        trace = build(ensemble).sample([[2], [0, 1], []], n=2, max_new_tokens=3, batch_size=batch_size)
        assert trace.tokens.tolist() == [[2] * 3, [2] * 3, [1] * 3, [1] * 3, [0] * 3, [0] * 3]
        assert trace.prompts == ((2,), (0, 1), ())


@every_sampler
def test_prompts_come_in_any_form(build: Any) -> None:
    sampler = build(pair())
    many = sampler.sample([[1, 2], [3]], max_new_tokens=5)
    assert same(many, sampler.sample([np.array([1, 2]), torch.tensor([3])], max_new_tokens=5))
    one = sampler.sample([1, 2], max_new_tokens=5)
    assert torch.equal(one.tokens, many.tokens[:1])
    assert same(one, sampler.sample(torch.tensor([1, 2]), max_new_tokens=5))


# --- work, counted ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("outside", [False, True])
@pytest.mark.parametrize("batch_size", [None, 1])
def test_one_row_costs_me_one_run_a_token_and_ce_one_for_each_component(outside: bool, batch_size: int | None) -> None:
    steps, expected = 12, {"ME": 12, "CE": 24, "CE latent": 24, "one component per sequence": 12}
    for name, forwards in expected.items():
        ensemble = pair(outside=outside)
        trace = SAMPLERS[name](ensemble).sample([0], max_new_tokens=steps, batch_size=batch_size)
        assert (trace.cost.forwards, trace.cost.reads) == (forwards, forwards), name
        if outside:
            assert sum(component.calls for component in ensemble.components) == forwards, name


@plain_sampler
@given(
    data=st.data(),
    seed=seeds,
    n=st.integers(1, 12),
    steps=st.integers(1, 20),
    outside=st.booleans(),
)
def test_work_is_counted_from_what_was_written(
    build: Any, data: st.DataObject, seed: int, n: int, steps: int, outside: bool
) -> None:
    ensemble = data.draw(ensembles(warped=False))
    starts = data.draw(st.lists(prompts(ensemble.vocabulary.size), min_size=1, max_size=3))
    if outside:
        ensemble = Ensemble([OutsideModel(part) for part in ensemble.components], ensemble.mixing)
    sampler = build(ensemble)
    trace = sampler.sample(starts, n=n, max_new_tokens=steps, seed=seed)
    reads = forwards = 0
    for step in range(trace.tokens.shape[1]):
        for i in range(len(ensemble.components)):
            if isinstance(sampler, CESampler):
                reading = trace.mask[:, step]
            else:
                reading = trace.components[:, step] == i
            # Rows of one prompt share the law of the first token.
            shared = len(trace.prompt_index[reading].unique())
            reads += shared if step == 0 else int(reading.sum())
            forwards += bool(reading.any())
    if isinstance(sampler, MESampler) and outside and len(trace.tokens) > 1 and sampler._drifts():
        forwards = len(list(serves(trace.components, horizon=steps)))
    assert (trace.cost.reads, trace.cost.forwards) == (reads, forwards)
    if outside:
        assert sum(component.calls for component in ensemble.components) == forwards
        assert trace.cost.tokens_forwarded >= forwards * min(map(len, starts))


def test_rows_that_ended_are_read_no_more() -> None:
    # The chain ends at its second token; eight more steps were allowed.
    ending = MarkovModel([0, 1, 0], [[0, 1, 0], [0, 0, 1], [1, 0, 0]], eos=(2,))
    for batch_size in (None, 4):
        trace = CESampler(ending).sample([0], n=4, max_new_tokens=10, batch_size=batch_size)
        assert trace.tokens.tolist() == [[1, 2]] * 4
        assert trace.cost == Cost(forwards=2, tokens_forwarded=5, reads=5)


class Elsewhere(torch.Tensor):
    """A tensor that says it lives on an accelerator."""

    is_cpu = property(lambda self: False)  # type: ignore[assignment]


class ElsewhereStreams(RowStreams):
    def __call__(self, *args: Any, **options: Any) -> torch.Tensor:
        return super().__call__(*args, **options).as_subclass(Elsewhere)  # type: ignore[arg-type]


@every_sampler
@half
@given(seed=seeds, steps=st.integers(1, 40))
def test_rows_that_are_dropped_late_write_the_same(build: Any, seed: int, steps: int) -> None:
    # An accelerator's queue is not stalled for every token: rows run on past their end, and are cut after.
    ensemble = Ensemble(
        [TableModel.random(4, seed=s, concentration=2.0, eos=(3,)) for s in (0, 1)], ConstantMixing([0.3, 0.7])
    )
    late = build(ensemble).sample([[0], [1]], n=4, max_new_tokens=steps, draw=ElsewhereStreams(seed))
    prompt = build(ensemble).sample([[0], [1]], n=4, max_new_tokens=steps, draw=RowStreams(seed))
    assert same(late, prompt)
    assert late.cost.reads >= prompt.cost.reads


@every_sampler
@pytest.mark.parametrize("batch_size", [None, 3])
def test_progress_counts_every_token(build: Any, batch_size: int | None) -> None:
    heard: list[int] = []
    trace = build(pair()).sample([0], n=7, max_new_tokens=33, batch_size=batch_size, progress=heard.append)
    assert sum(heard) == trace.tokens.numel() == 7 * 33


# --- rows that fit ------------------------------------------------------------------------------------------


class Network(OutsideModel):
    """A model with room for so many tokens."""

    room = 1000

    def rows_that_fit(self, length: int) -> int:
        return self.room // length


def test_the_smallest_network_limits_the_batch() -> None:
    def network(room: int) -> Network:
        model = Network(MarkovModel.random(3, seed=0))
        model.room = room
        return model

    small, large = network(100), network(1000)
    assert rows_that_fit(large, 10) == 100
    assert rows_that_fit(network(5), 10) == 1
    assert rows_that_fit(Warped(large, TopK(2)), 10) == 100
    assert rows_that_fit(Ensemble([small, large], ConstantMixing([0.5, 0.5])), 10) == 10
    assert rows_that_fit(Conditioned(small, [0] * 10), 10) == 5
    assert rows_that_fit(MarkovModel.random(3, seed=0), 10, default=77) == 77
    ensemble = Ensemble([small, large], ConstantMixing([0.5, 0.5]))
    trace = MESampler(ensemble).sample([0, 1], n=30, max_new_tokens=8, seed=4)
    assert same(trace, MESampler(ensemble).sample([0, 1], n=30, max_new_tokens=8, seed=4, batch_size=30))


def test_an_attribute_named_context_is_the_models_own_business() -> None:
    model = OutsideModel(MarkovModel.random(3, seed=0))
    model.context = 2048  # type: ignore[attr-defined]
    assert CESampler(model).sample([0], max_new_tokens=2).tokens.shape == (1, 2)


# --- routers run on the general path ------------------------------------------------------------------------


def test_routed_rows_do_not_depend_on_batches_either() -> None:
    router = LastTokenMixing(np.random.Generator(np.random.Philox(1)).dirichlet(np.ones(2), 5))
    ensemble = Ensemble([MarkovModel.random(4, seed=s, eos=(3,)) for s in (0, 1)], router)
    for build in SAMPLERS.values():
        together = build(ensemble).sample([[0], [1, 2]], n=6, max_new_tokens=20, seed=8)
        for size in (1, 5):
            again = build(ensemble).sample([[0], [1, 2]], n=6, max_new_tokens=20, seed=8, batch_size=size)
            assert same(together, again)
