"""Cells on the bundled siblings: every arm writes what it should, counts are exact, and a planted delay shows."""

from __future__ import annotations

import time
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch

from me_stats import bench_spans
from me_stats.bench import ARMS, Bench, Cell, Timing, bench, component_path, ratio
from me_stats.bench_models import BenchModels, bench_components
from me_stats.bench_spans import SpanRows, measure_spans
from me_stats.forward_time import calibrate
from me_stats.models import Conditioned, shapes
from me_stats.presets import SIBLINGS
from me_stats.samplers import CESampler, MESampler
from me_stats.stopwatch import Stopwatch, machine_name

SEQUENTIAL = tuple(arm for arm in ARMS if arm != "CE parallel")  # processes have tests of their own
EVEN = (0.5, 0.5)


pytestmark = pytest.mark.usefixtures("one_thread")


@cache
def models(k: int = 2) -> BenchModels:
    return bench_components(SIBLINGS, k)


def cell(arm: Any, *, batch: int = 3, weights: tuple[float, ...] = EVEN) -> Cell:
    return Cell(arm, weights if arm != "single" else (1.0,), batch=batch, steps=12, prompt_length=9)


def test_components_are_copies_that_never_end() -> None:
    three = models(3)
    assert three.names == (*SIBLINGS, SIBLINGS[0])
    assert all(part.vocabulary.eos == () for part in three.components)
    first, _, again = three.networks
    assert first.network is not again.network
    assert torch.equal(first.log_probs([(1, 2)]), again.log_probs([(1, 2)]))
    shared = bench_components(SIBLINGS, 3, copies=False)
    assert shared.networks[0] is shared.networks[2]
    assert three.prompt(7) == three.prompt(20)[:7]
    assert [opener().name for opener in three.openers] == list(three.names)


def test_one_model_stands_behind_several_prompts() -> None:
    four = bench_components(["bundled:code"], 4)
    assert all(isinstance(part, Conditioned) for part in four.components)
    assert len({part.context for part in four.components}) == 4
    assert min(four.contexts) > 0
    opened: Any = four.openers[2]()
    assert opened.context == four.components[2].context


def test_models_of_other_vocabularies_are_refused() -> None:
    with pytest.raises(ValueError, match="different vocabularies"):
        bench_components(["bundled:prose", "bundled:words"], 2)
    with pytest.raises(ValueError, match="at least one model"):
        bench_components([], 2)


def test_random_weights_are_said_to_be_random(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = shapes.random_network
    monkeypatch.setattr(shapes, "random_network", lambda name, **given: whole(name, **given, layers=1, shrink=32))
    names = ["random:qwen2.5-3b", "random:qwen2.5-math-1.5b"]
    made = bench_components(names, 3)
    assert made.names == (*names, names[0])
    assert made.label == "qwen2.5-3b (random weights) + qwen2.5-math-1.5b (random weights)"
    assert [network.name for network in made.networks] == list(made.names)
    (timing,) = bench(made, [Cell("ME", (0.2, 0.3, 0.5), batch=2, steps=3, prompt_length=4)], repeats=1)
    assert timing.tokens == 6
    assert made.prompt(4) == made.prompt(4)
    alone = bench_components(names[:1], 2)  # nothing reads a system prompt
    assert alone.contexts == (0, 0)
    assert alone.label == "qwen2.5-3b (random weights), 1 to 2 copies"


@pytest.mark.parametrize("arm", SEQUENTIAL)
def test_every_row_writes_exactly_its_steps(arm: Any) -> None:
    (timing,) = bench(models(), [cell(arm)], repeats=2)
    assert timing.tokens == 36
    assert len(timing.seconds) == 2
    assert min(timing.seconds) > 0
    assert timing.memory == "computed"
    assert timing.joules is None
    weights = sum(network.weight_bytes for network in models().networks[: 1 if arm == "single" else 2])
    assert weights < timing.peak_memory < 2 * weights
    assert timing.bytes_moved > timing.cost.forwards * 0.9 * min(n.weight_bytes for n in models().networks)


@pytest.mark.parametrize("arm", ["single", "CE", "ME", "ME lockstep", "ME shared"])
@pytest.mark.parametrize("batch", [1, 5])
def test_the_cost_model_counts_what_the_sampler_did(arm: Any, batch: int) -> None:
    asked = cell(arm, batch=batch)
    with Bench(models(), seed=4) as own:
        work = own.work(asked)
        trace = own.sampler(asked).sample([models().prompt(9)], n=batch, max_new_tokens=12, seed=4)
    assert work is not None
    assert work.cost == trace.cost
    assert own.work(cell("speculative")) is None
    if arm.startswith("ME"):
        assert trace.components is not None
        assert trace.components.tolist() == component_path(asked, 4).tolist()


def test_arms_are_what_their_names_say() -> None:
    with Bench(models()) as own:
        found = {arm: own.sampler(cell(arm, batch=4)) for arm in SEQUENTIAL}
    me = {arm: sampler for arm, sampler in found.items() if isinstance(sampler, MESampler)}
    assert {arm: (s.shared_rows, s.lockstep) for arm, s in me.items()} == {
        "ME": (1, False), "ME lockstep": (1, True), "ME shared": (4, False),
    }  # fmt: skip
    assert all(isinstance(found[arm], CESampler) for arm in ("single", "CE", "CE top-k"))
    assert found["single"].model is models().components[0]
    speculative: Any = found["speculative"]
    top: Any = found["CE top-k"]
    assert (speculative.chunk, speculative.model.warps) == (8, top.model.warps)


def test_a_planted_delay_shows_in_the_ratio(monkeypatch: pytest.MonkeyPatch) -> None:
    run = MESampler.sample

    def slow(self: Any, *args: Any, **options: Any) -> Any:
        time.sleep(0.3)
        return run(self, *args, **options)

    cells = [cell("CE", batch=1), cell("ME", batch=1)]
    ce, me = bench(models(), cells, repeats=3)
    honest = ratio(me, ce)
    monkeypatch.setattr(MESampler, "sample", slow)
    ce, me = bench(models(), cells, repeats=3)
    late = ratio(me, ce)
    assert late.interval[1] < 0.5 < honest.value
    assert late.coverage == 0.75


def test_ratios_are_of_one_run() -> None:
    (timing,) = bench(models(), [cell("ME")], repeats=1)
    longer = Timing(**(vars(timing) | {"seconds": (1.0, 1.0)}))
    assert ratio(timing, timing).value == 1
    with pytest.raises(ValueError, match="as many rounds"):
        ratio(timing, longer)


def test_bad_cells_are_refused() -> None:
    with pytest.raises(ValueError, match="arm must be one of"):
        cell("EM")
    with pytest.raises(ValueError, match="steps must be"):
        Cell("ME", EVEN, steps=0)
    with pytest.raises(ValueError, match="sum"):
        Cell("ME", (0.5, 0.6))
    with pytest.raises(ValueError, match="3 components, there are 2"):
        bench(models(), [cell("CE", weights=(0.2, 0.3, 0.5))], repeats=1)


def test_spans_feed_what_they_say_and_take_it_back() -> None:
    held = SpanRows(models().networks[0], context=11, rows=4, prompt=models().prompt(11))
    for rows, span in ((1, 1), (4, 3), (2, 5), (1, 1)):
        before = held._session.cost
        sample = held.task(rows, span).run()
        cost = held._session.cost
        repeats = bench_spans._REPEATS
        assert cost.tokens_forwarded - before.tokens_forwarded == repeats * rows * span
        assert cost.forwards - before.forwards == repeats
        assert sample.tokens == rows * span
    laws = held._session.log_probs(np.arange(4))
    # Nothing of the spans is left: the law is that of the context.
    assert float((laws - models().networks[0].log_probs([models().prompt(11)])).abs().max()) < 1e-4
    with pytest.raises(ValueError, match="must have 11 tokens"):
        SpanRows(models().networks[0], context=11, rows=1, prompt=(1, 2))


def test_measured_spans_calibrate_a_cost_model() -> None:
    spans = measure_spans(models(), spans=(1, 2, 4), batches=(1, 4), contexts=(8, 40), repeats=2)
    assert [(s.rows, s.span, s.context) for s in spans] == [
        (1, 1, 8), (1, 2, 8), (1, 4, 8), (4, 1, 8), (1, 1, 40), (1, 2, 40), (1, 4, 40), (4, 1, 40),
    ]  # fmt: skip
    assert float(calibrate(spans).seconds([1], [1], [9])[0]) > 0


def test_a_stopwatch_on_a_cpu_knows_time_alone() -> None:
    watch = Stopwatch("cpu")
    watch.start()
    time.sleep(0.02)
    seconds, memory, joules = watch.stop()
    assert 0.02 <= seconds < 2
    assert memory == 0
    assert np.isnan(joules)
    assert machine_name("cpu").endswith("1 thread")
