"""Rows that share component draws: every row keeps its law, and nothing counts such rows as independent."""

from __future__ import annotations

import importlib
import inspect
import math
import pkgutil
import re
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats
from torch import Tensor

import me_stats
from me_stats import lags, reduction
from me_stats.draws import Draw
from me_stats.evidence import Evidence
from me_stats.exact import sampler_law, sequence_law
from me_stats.mixing import ConstantMixing
from me_stats.models import Ensemble, MarkovModel, TableModel
from me_stats.monitor import watch
from me_stats.samplers import CESampler, MESampler, SequenceMixtureSampler
from me_stats.sensitivity import common_random_number_difference, reweight, score_function_gradient
from me_stats.sensitivity.reweight import Reweighted
from me_stats.sweep import sweep
from me_stats.tasks.harness import HarnessLM
from me_stats.tasks.run import evaluate
from me_stats.testing import check_sampler, fuzz_sampler
from me_stats.testing.drawing import Source
from me_stats.trace import require_independent_rows
from tests.stand_ins import Ungrouped
from tests.strategies import LastTokenMixing, ensembles, horizons, prompts, seeds

pytestmark = pytest.mark.usefixtures("tables_for_any_length")

TOY = Ensemble([MarkovModel.random(3, seed=s, eos=(2,)) for s in (0, 1)], ConstantMixing([0.3, 0.7]))
WEIGHTS = [0.5, 0.3, 0.2]
LONG = Ensemble([MarkovModel.random(4, seed=s) for s in range(3)], ConstantMixing(WEIGHTS))


def router() -> Ensemble:
    weights = np.random.default_rng(0).dirichlet(np.ones(2), 4)
    return Ensemble(TOY.components, LastTokenMixing(weights))


class TokensToo(MESampler):
    """Planted bug: rows of a group share their token uniforms, too."""

    def _step(
        self, batch: Any, positions: np.ndarray, step: int, draw: Draw, memory: dict[str, Any]
    ) -> tuple[Tensor, np.ndarray | None]:
        def together(law: Tensor, rows: np.ndarray, step: int, *, stream: Any, index: Any = None) -> Tensor:
            return draw(
                law, rows if stream == "component" else rows // self.shared_rows, step, stream=stream, index=index
            )

        return super()._step(batch, positions, step, together, memory)


# --- laws --------------------------------------------------------------------------------------------------


@given(st.data(), st.integers(1, 9))
def test_every_row_keeps_its_law(data: st.DataObject, shared: int) -> None:
    ensemble = data.draw(ensembles())
    prompt = data.draw(prompts(ensemble.vocabulary.size))
    steps = data.draw(horizons(ensemble.vocabulary.size * len(ensemble.components)))
    law = sequence_law(ensemble, prompt, max_new_tokens=steps)
    assert sampler_law(MESampler(ensemble, shared_rows=shared), prompt, max_new_tokens=steps).tv_distance(law) < 1e-12


def test_routers_and_controls_keep_theirs() -> None:
    routed = router()
    law = sequence_law(routed, [0], max_new_tokens=3)
    assert sampler_law(MESampler(routed, shared_rows=4), [0], max_new_tokens=3).tv_distance(law) < 1e-12
    alone = sampler_law(SequenceMixtureSampler(TOY), [0], max_new_tokens=3)
    shared = sampler_law(SequenceMixtureSampler(TOY, shared_rows=4), [0], max_new_tokens=3)
    assert shared.tv_distance(alone) < 1e-12


class PairWalk:
    """Walks every path of two rows of one group: run g spells out the choices of rows 2g and 2g + 1."""

    def __init__(self, runs: int) -> None:
        self.remaining, self.radix = np.arange(runs), np.ones(runs)
        self.log_weight = np.zeros(runs)

    def __call__(
        self, log_law: Tensor, rows: np.ndarray, step: int, *, stream: Any, index: Tensor | None = None
    ) -> Tensor:
        laws = (log_law if index is None else log_law[index]).double().log_softmax(-1).numpy()
        chosen = np.empty(len(rows), dtype=np.int64)
        known: dict[int, int] = {}
        for place, (row, law) in enumerate(zip(rows.tolist(), laws, strict=True)):
            run = row if stream == "component" else row // 2
            if stream == "component" and run in known:
                chosen[place] = known[run]
                continue
            possible = np.flatnonzero(law > -np.inf)
            chosen[place] = known[run] = possible[self.remaining[run] % len(possible)]
            self.remaining[run] //= len(possible)
            self.radix[run] *= len(possible)
            self.log_weight[run] += law[chosen[place]]
        return torch.from_numpy(chosen)


Pair = tuple[tuple[int, ...], tuple[int, ...]]


def enumerated_pairs(sampler: MESampler, steps: int) -> dict[Pair, float]:
    runs = 1
    while True:
        walk = PairWalk(runs)
        rows = sampler.sample([0], n=2 * runs, max_new_tokens=steps, draw=walk).sequences()
        if walk.radix.max() <= runs:
            break
        runs = int(walk.radix.max())
    found: dict[Pair, float] = {}
    for run in np.flatnonzero(walk.remaining == 0):
        pair = tuple(rows[2 * run]), tuple(rows[2 * run + 1])
        found[pair] = found.get(pair, 0.0) + math.exp(walk.log_weight[run])
    return found


def expected_pairs(ensemble: Ensemble, steps: int, pair: Pair = ((), ())) -> Iterator[tuple[Pair, float]]:
    """Both rows take the same component at every step: sum_i w_i P_i(x | h) P_i(x' | h'); a row that ended waits."""
    eos = ensemble.vocabulary.eos
    ended = [len(row) == steps or (bool(row) and row[-1] in eos) for row in pair]
    if all(ended):
        yield pair, 1.0
        return
    laws = [[component.log_probs([(0, *row)])[0].exp().tolist() for component in ensemble.components] for row in pair]
    ids = range(ensemble.vocabulary.size)
    for x in [None] if ended[0] else ids:
        for y in [None] if ended[1] else ids:
            mass = sum(
                weight * (1 if x is None else laws[0][i][x]) * (1 if y is None else laws[1][i][y])
                for i, weight in enumerate(ensemble.mixing.weights.tolist())
            )
            longer = tuple(row if t is None else (*row, t) for row, t in zip(pair, (x, y), strict=True))
            for end, rest in expected_pairs(ensemble, steps, longer):  # type: ignore[arg-type]
                yield end, mass * rest


def test_two_rows_of_a_group_have_the_law_of_one_path() -> None:
    found, expected = enumerated_pairs(MESampler(TOY, shared_rows=2), 3), {}
    for pair, mass in expected_pairs(TOY, 3):
        expected[pair] = expected.get(pair, 0.0) + mass
    assert sum(found.values()) == pytest.approx(1, abs=1e-12)
    assert max(abs(found.get(pair, 0.0) - mass) for pair, mass in expected.items()) < 1e-12
    law = sequence_law(TOY, [0], max_new_tokens=3)
    own = dict(zip(map(tuple, law.rows), np.exp(law.log_probs), strict=True))
    apart = sum(abs(mass - own[a] * own[b]) for (a, b), mass in expected.items()) / 2
    assert apart > 0.01  # so the rows do depend on each other


# --- rows --------------------------------------------------------------------------------------------------


@given(seeds, st.integers(2, 7), st.booleans())
def test_a_row_depends_on_seed_number_and_prompt_alone(seed: int, shared: int, routed: bool) -> None:
    sampler = MESampler(router() if routed else TOY, shared_rows=shared)
    whole = sampler.sample([[0], [1]], n=11, max_new_tokens=20, seed=seed, batch_size=22)
    assert whole.components is not None
    for batch_size in (None, 1, 4):
        other = sampler.sample([[0], [1]], n=11, max_new_tokens=20, seed=seed, batch_size=batch_size)
        assert torch.equal(whole.tokens, other.tokens)
        assert torch.equal(whole.components, other.components)
    numbers = np.random.default_rng(seed % 2**32).permutation(11)[:5]
    some = sampler.sample([0], n=5, rows=numbers, max_new_tokens=20, seed=seed)
    assert some.sequences() == [whole.sequences()[row] for row in numbers]
    assert torch.equal(some.groups, torch.from_numpy(numbers // shared))


def test_a_group_has_one_path_and_tokens_of_its_own() -> None:
    trace = MESampler(LONG, shared_rows=8).sample([0], n=64, max_new_tokens=50, seed=5)
    assert trace.components is not None
    path = trace.components.reshape(8, 8, 50)
    assert bool((path == path[:, :1]).all())
    assert len(torch.unique(path[:, 0], dim=0)) == 8
    assert len(torch.unique(trace.tokens, dim=0)) == 64
    # Group g reads the component uniforms of row g, and every row its own token uniforms.
    alone = MESampler(LONG).sample([0], n=64, max_new_tokens=50, seed=5)
    assert alone.components is not None
    assert torch.equal(path[:, 0], alone.components[:8])
    assert torch.equal(trace.tokens[0], alone.tokens[0])


def test_a_group_that_is_one_batch_needs_one_forward_a_step() -> None:
    trace = MESampler(LONG, shared_rows=16).sample([0], n=64, max_new_tokens=50, batch_size=16)
    assert trace.cost.forwards == 4 * 50
    alone = MESampler(LONG, lockstep=True).sample([0], n=64, max_new_tokens=50, batch_size=16)
    expected = 50 * sum(1 - (1 - w) ** 16 for w in WEIGHTS)
    assert alone.cost.forwards == pytest.approx(4 * expected, rel=0.02)
    drifting = MESampler(LONG).sample([0], n=64, max_new_tokens=50, batch_size=16)
    assert trace.cost.forwards < drifting.cost.forwards < 0.8 * alone.cost.forwards


def test_shared_rows_are_said_and_checked() -> None:
    assert repr(MESampler(TOY)) == f"MESampler({TOY!r})"
    assert repr(SequenceMixtureSampler(TOY, shared_rows=3)) == f"SequenceMixtureSampler({TOY!r}, shared_rows=3)"
    for wrong in (0, -1, 2.0, "4", None):
        with pytest.raises(ValueError, match="shared_rows must be an integer of at least 1"):
            MESampler(TOY, shared_rows=wrong)  # type: ignore[arg-type]


def test_one_row_per_group_is_an_independent_sample() -> None:
    sampler = MESampler(TOY, shared_rows=3)
    trace = sampler.sample([[0], [1]], n=5, max_new_tokens=9, seed=1, rows=[7, 6, 2, 8, 11, 10, 9, 30, 1, 0])
    assert trace.groups.tolist() == [2, 2, 0, 2, 3, 3, 3, 10, 0, 0]
    single = trace.one_per_group()
    assert single.rows.tolist() == [6, 9, 30, 0]
    assert single.prompt_index.tolist() == [0, 1, 1, 1]
    assert single.sequences() == [trace.sequences()[place] for place in (1, 6, 7, 9)]
    assert single.tokens.shape[1] == int(single.lengths.max())
    assert single.components is not None
    assert single.components.shape == single.tokens.shape
    assert single.row_prompts() == [(0,), (1,), (1,), (1,)]
    assert single.log_probs.shape == single.tokens.shape
    require_independent_rows(single, "anything")
    alone = CESampler(TOY).sample([0], n=4, max_new_tokens=9)
    assert alone.shared_rows == 1
    assert torch.equal(alone.one_per_group().tokens, alone.tokens)
    with pytest.raises(ValueError, match=r"the 10 rows of this trace share .* of 4 groups \(shared_rows=3\)"):
        require_independent_rows(trace, "anything")


# --- who corrects, and who refuses --------------------------------------------------------------------------

SHARED = MESampler(LONG, shared_rows=4)
TRACE = SHARED.sample([0], n=32, max_new_tokens=8, seed=3)


def shared(ensemble: Ensemble) -> MESampler:
    return MESampler(ensemble, shared_rows=4)


REFUSES_TRACES: dict[str, Callable[[Any], Any]] = {
    "evidence.Evidence.from_trace": Evidence.from_trace,
    "sensitivity.reweight.reweight": lambda trace: reweight(trace, [0.2, 0.3, 0.5]).estimate(len),
    "sensitivity.reweight.Reweighted": lambda trace: Reweighted(trace, (1.0,), None, np.zeros(len(trace.rows)), True),
    "sensitivity.gradient.score_function_gradient": lambda trace: score_function_gradient(trace, sum),
    "reduction.component_sums": lambda trace: reduction.component_sums(trace, [0.0, 1.0, 2.0]),
    "reduction.token_sums": lambda trace: reduction.token_sums(trace, [0.0, 1.0, 2.0, 3.0]),
    "reduction.weight_controls": reduction.weight_controls,
    "reduction.law_controls": lambda trace: reduction.law_controls(trace, [0.0, 1.0, 2.0, 3.0]),
    "reduction.common_draws": lambda trace: reduction.common_draws(trace, trace, sum),
}
REFUSES_SAMPLERS: dict[str, Callable[[], Any]] = {
    "monitor.watch": lambda: watch(SHARED, [0], alpha=0.01, max_tokens=10, max_new_tokens=4, seed=0),
    "sweep.sweep": lambda: sweep(LONG, [0], [(0.5, 0.3, 0.2)], n=4, max_new_tokens=4, sampler=shared),
    "sensitivity.gradient.common_random_number_difference": lambda: common_random_number_difference(
        LONG.components, [0.4, 0.3, 0.3], [-1, 1, 0], 0.1, sum, prompts=[0], n=4, max_new_tokens=4, sampler=shared
    ),
    "testing.sampler_check.check_sampler": lambda: check_sampler(SHARED, LONG, [0], n=50),
    "testing.sampler_check.check_sampler against": lambda: check_sampler(MESampler(LONG), SHARED, [0], n=50),
    "testing.fuzz.fuzz_sampler": lambda: fuzz_sampler(shared, exact=False, draws=100, max_examples=2, seed=0),
    "testing.drawing.Source": lambda: Source(SHARED, [(0,)], 4, 0),
    "tasks.harness.HarnessLM": lambda: HarnessLM(SHARED),
    "tasks.run.evaluate": lambda: evaluate(SHARED, {"any": None}),
}
CORRECTS = {
    "exact.sampler_law": "test_every_row_keeps_its_law",
    "lags.lag_test": "test_lags_of_shared_paths_count_once",
    "lags.prefill_per_step": "test_intervals_of_the_prefill_count_groups",
}
# Numbers of each row, what holds a sampler and draws nothing, or draws with a sampler that shares nothing.
SAYS_NOTHING_OF_A_SAMPLE = {
    "sensitivity.readings.step_tv_sums", "sensitivity.readings.tokens_forwarded", "sensitivity.reweight.values_of",
    "routers.decoding.Decodings", "testing.mutants.Mutant", "testing.fuzz.FuzzRejected", "trace.Trace",
    "testing.session_fuzz.fuzz_session", "acceptance.Speculation", "acceptance.measure_acceptance",
    # Samples, in parts.
    "served.kept.sample_kept",
    # Laws and tokenizers by name.
    "cli_compare.compare", "cli_tokenizers.tokenizers", "tokenizer_survey.Survey",
}  # fmt: skip
_NAMES = {"sampler", "samplers", "trace", "traces", "build", "against"}


def callers() -> set[str]:
    """Public functions, classes and methods with a parameter that takes, or builds, a Trace or a Sampler."""
    found = set()
    for module in pkgutil.walk_packages(me_stats.__path__, "me_stats."):
        if any(part.startswith("_") for part in module.name.split(".")):
            continue
        for name, value in vars(importlib.import_module(module.name)).items():
            if name.startswith("_") or getattr(value, "__module__", None) != module.name:
                continue
            functions = {name: value.__init__} if inspect.isclass(value) else {name: value}
            if inspect.isclass(value):
                methods = {key: getattr(value, key) for key in vars(value) if not key.startswith("_")}
                functions |= {f"{name}.{key}": method for key, method in methods.items() if inspect.isroutine(method)}
            for label, function in functions.items():
                try:
                    parameters = inspect.signature(function).parameters.values()
                except (TypeError, ValueError):
                    continue
                words = [str(p.annotation) for p in parameters]
                if any(p.name in _NAMES for p in parameters) or any("Trace" in w or "Sampler" in w for w in words):
                    found.add(f"{module.name}.{label}".removeprefix("me_stats."))
    return found


def test_nobody_who_reads_a_trace_or_a_sampler_is_forgotten() -> None:
    refuses = {*REFUSES_TRACES, *(name.split()[0] for name in REFUSES_SAMPLERS)}
    assert callers() == refuses | set(CORRECTS) | SAYS_NOTHING_OF_A_SAMPLE
    assert set(CORRECTS.values()) <= set(globals())
    said = str(inspect.getmodule(require_independent_rows).__doc__)
    assert [name for name in refuses | set(CORRECTS) if not {*name.split(".")} & {*re.findall(r"\w+", said)}] == []


@pytest.mark.parametrize("name", REFUSES_TRACES)
def test_traces_with_shared_draws_are_refused_until_one_row_is_left_of_each_group(name: str) -> None:
    with pytest.raises(ValueError, match=r"one_per_group\(\)"):
        REFUSES_TRACES[name](TRACE)
    assert REFUSES_TRACES[name](TRACE.one_per_group()) is not None


@pytest.mark.parametrize("name", REFUSES_SAMPLERS)
def test_samplers_with_shared_draws_are_refused(name: str) -> None:
    with pytest.raises(ValueError, match=r"MESampler has shared_rows=4.*the sampler with shared_rows=1"):
        REFUSES_SAMPLERS[name]()


def test_fuzzing_walks_every_path_of_shared_draws() -> None:
    assert fuzz_sampler(shared, exact=True, max_examples=3, seed=0).passed


RUNS = 300


def shared_traces(shared_rows: int = 16, **options: Any) -> Iterator[Any]:
    toy = Ensemble([MarkovModel.random(4, seed=s, eos=(3,)) for s in range(3)], LONG.mixing)
    for seed in range(RUNS):
        yield MESampler(toy, shared_rows=shared_rows).sample([0], n=512, max_new_tokens=40, seed=seed, **options)


def test_lags_of_shared_paths_count_once() -> None:
    corrected = naive = 0
    for trace in shared_traces():
        corrected += lags.lag_test(trace, level=0.05, min_expected=10).rejected
        naive += lags.lag_test(trace.components, weights=WEIGHTS, level=0.05, min_expected=10).rejected
    assert corrected <= stats.binom.isf(1e-6, RUNS, 0.05)
    assert naive > 0.5 * RUNS
    wrong = lags.lag_test(trace, weights=[0.3, 0.5, 0.2], level=1e-6)
    assert wrong.rejected


def test_intervals_of_the_prefill_count_groups() -> None:
    toy = Ensemble([TableModel.random(3, seed=s, order=0) for s in range(3)], LONG.mixing)
    truth = lags.expected_prefill(WEIGHTS, 30, prompt_length=1)
    inside = naive = 0
    for seed in range(RUNS):
        trace = MESampler(toy, shared_rows=16).sample([0], n=1024, max_new_tokens=30, seed=seed)
        estimates = lags.prefill_per_step(trace), lags.prefill_per_step(replace(trace, shared_rows=1))
        covered = [low <= truth <= high for low, high in (estimate.interval for estimate in estimates)]
        inside, naive = inside + covered[0], naive + covered[1]
    assert stats.binom.ppf(1e-6, RUNS, 0.94) <= inside
    assert naive < 0.6 * RUNS
    with pytest.raises(ValueError, match="groups of them"):
        lags.prefill_per_step(MESampler(toy, shared_rows=16).sample([0], n=16, max_new_tokens=4))


# --- planted bugs in the sampler ----------------------------------------------------------------------------


COINS = Ensemble([TableModel([[1 - p, p]], order=0) for p in (0.1, 0.9)], ConstantMixing([0.5, 0.5]))


def pairs_fit(sampler: MESampler) -> bool:
    """Chi-square of 2000 pairs of rows against their exact joint law."""
    expected: dict[Pair, float] = {}
    for pair, mass in expected_pairs(COINS, 2):
        expected[pair] = expected.get(pair, 0.0) + mass
    rows = [tuple(row) for row in sampler.sample([0], n=4000, max_new_tokens=2, seed=0).sequences()]
    counts = dict.fromkeys(expected, 0)
    for pair in zip(rows[::2], rows[1::2], strict=True):
        counts[pair] += 1
    cells = 2000 * np.array(list(expected.values()))
    return bool(stats.chisquare(list(counts.values()), cells).pvalue > 1e-9)


def test_planted_bugs_change_the_joint_law() -> None:
    assert pairs_fit(MESampler(COINS, shared_rows=2))
    assert not pairs_fit(Ungrouped(COINS, shared_rows=2))
    assert not pairs_fit(TokensToo(COINS, shared_rows=2))
