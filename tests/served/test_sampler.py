"""ServedME against servers of known laws: exact, one request a run, and every planted bug found."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from scipy.stats import chi2

from me_stats import ConstantMixing, Ensemble, MESampler
from me_stats.mixing import Mixing
from me_stats.models import Aligned, Conditioned, MarkovModel
from me_stats.served import ServedME, expected_requests
from me_stats.served.arms import Arm
from me_stats.testing import SamplerRejected, check_sampler
from me_stats.trace import Trace
from me_stats.vocabulary_map import ByteStrings, TokenBytes
from tests.served.fake import Fake, direct, served

V, WEIGHTS, STEPS = 5, [0.6, 0.4], 60
CHAINS = [MarkovModel.random(V, seed=seed, concentration=3.0) for seed in (1, 2)]


@pytest.fixture(autouse=True)
def _no_proxy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")


def sampler_of(*fakes: Fake, weights: list[float] = WEIGHTS) -> ServedME:
    return ServedME(Ensemble([direct(fake) for fake in fakes], ConstantMixing(weights)))


def pvalue(trace: Trace, chains: list[MarkovModel] = CHAINS) -> float:
    """Chi-square of every token's law, given the component that wrote it and the token before."""
    tokens, components = trace.tokens.numpy(), trace.components.numpy()
    before = np.concatenate([np.array([[prompt[-1]] for prompt in trace.row_prompts()]), tokens[:, :-1]], axis=1)
    statistic = df = 0.0
    for component, chain in enumerate(chains):
        for state in range(V):
            drawn = tokens[(components == component) & (before == state) & (tokens >= 0)]
            law = chain.log_probs([(state,)])[0].exp().numpy()
            expected = law * len(drawn)
            if expected.min() < 5:
                continue
            statistic += float(((np.bincount(drawn, minlength=V) - expected) ** 2 / expected).sum())
            df += V - 1
    assert df >= V * (V - 1)
    return float(chi2.sf(statistic, df))


def test_tokens_follow_the_law_of_the_component_that_wrote_them() -> None:
    trace = sampler_of(*map(Fake, CHAINS)).sample([[0], [3]], n=100, max_new_tokens=STEPS, seed=5)
    assert pvalue(trace) > 1e-6
    assert trace.lengths.tolist() == [STEPS] * 200


def test_it_passes_the_sequence_tests() -> None:
    ours = sampler_of(*map(Fake, CHAINS))
    result = check_sampler(ours, Ensemble(CHAINS, ConstantMixing(WEIGHTS)), [0], max_new_tokens=12, n=600)
    assert result.passed
    wrong = sampler_of(*[Fake(chain, temperature=0.7, tells=False) for chain in CHAINS])
    with pytest.raises(SamplerRejected):
        check_sampler(wrong, Ensemble(CHAINS, ConstantMixing(WEIGHTS)), [0], max_new_tokens=12, n=600)


def test_false_alarms_are_rare() -> None:
    sampler = sampler_of(*map(Fake, CHAINS))
    found = [pvalue(sampler.sample([0], n=25, max_new_tokens=STEPS, seed=seed)) for seed in range(40)]
    # P(Binomial(40, 0.05) > 10) < 1e-5
    assert sum(value <= 0.05 for value in found) <= 10


def test_components_are_those_of_me_for_the_same_seed() -> None:
    mixing = ConstantMixing(WEIGHTS)
    ours = sampler_of(*map(Fake, CHAINS)).sample([0], n=20, max_new_tokens=STEPS, seed=11)
    plain = MESampler(Ensemble(CHAINS, mixing)).sample([0], n=20, max_new_tokens=STEPS, seed=11)
    assert bool((ours.components == plain.components).all())


class _Planted(Arm):
    """An arm with one of the bugs that the tests have to find."""

    def __init__(self, arm: Arm, bug: str) -> None:
        self.arm, self.bug, self.model = arm, bug, arm.model
        self.seeds: dict[int, Any] = {}

    def write(self, history: Any, count: int, seeds: Any, lane: int | None) -> list[int]:
        if self.bug == "a token lost at each join":
            return self.arm.write(history, count + 1, seeds, lane)[1:]
        if self.bug == "the newest token unread at each join":
            return self.arm.write(history[:-1], count, seeds, lane)
        # Rows share the noise of the first row that comes to the step.
        return self.arm.write(history, count, self.seeds.setdefault(len(history), seeds), lane)


@pytest.mark.parametrize("bug", ["a token lost at each join", "the newest token unread at each join"])
def test_a_bug_at_the_joins_is_found(bug: str) -> None:
    sampler = sampler_of(*map(Fake, CHAINS))
    sampler.arms = [_Planted(arm, bug) for arm in sampler.arms]
    assert pvalue(sampler.sample([1, 0], n=100, max_new_tokens=STEPS, seed=5)) < 1e-9


@pytest.mark.parametrize("bug", [{"temperature": 0.9, "tells": False}, {"stale": 1}])
def test_a_server_with_another_law_is_found(bug: dict[str, Any]) -> None:
    peaked = [MarkovModel.random(V, seed=seed, concentration=1.0) for seed in (1, 2)]
    right, wrong = (sampler_of(*[Fake(chain, **own) for chain in peaked]) for own in ({}, bug))
    assert pvalue(right.sample([1, 0], n=250, max_new_tokens=STEPS, seed=5), peaked) > 1e-6
    assert pvalue(wrong.sample([1, 0], n=250, max_new_tokens=STEPS, seed=5), peaked) < 1e-9


def test_a_server_that_admits_its_temperature_is_refused() -> None:
    with pytest.raises(ValueError, match=r"sampled with temperature=0.9 although it was asked for 1.0"):
        sampler_of(*[Fake(chain, temperature=0.9) for chain in CHAINS]).sample([0], max_new_tokens=3)


def joint_pvalue(trace: Trace) -> float:
    """Chi-square of the first tokens of rows 0, 1 | 2, 3 | ... as pairs: rows must not share their noise."""
    first = trace.tokens[:, 0].numpy()
    law = np.tensordot(WEIGHTS, [chain.log_probs([(0,)])[0].exp().numpy() for chain in CHAINS], 1)
    expected = np.outer(law, law).ravel() * (len(first) // 2)
    observed = np.bincount(first[0::2] * V + first[1::2], minlength=V * V)
    return float(chi2.sf(((observed - expected) ** 2 / expected).sum(), V * V - 1))


def test_a_seed_shared_by_rows_is_found() -> None:
    sampler = sampler_of(*map(Fake, CHAINS))
    assert joint_pvalue(sampler.sample([0], n=3000, max_new_tokens=1, seed=5)) > 1e-6
    sampler.arms = [_Planted(arm, "seed shared by rows") for arm in sampler.arms]
    assert joint_pvalue(sampler.sample([0], n=3000, max_new_tokens=1, seed=5)) < 1e-9


def test_requests_are_the_runs_of_the_path() -> None:
    fakes = [Fake(chain) for chain in CHAINS]
    trace = sampler_of(*fakes).sample([0], n=200, max_new_tokens=STEPS, seed=3)
    runs = 1 + (trace.components[:, 1:] != trace.components[:, :-1]).sum(1).numpy()
    assert trace.cost.requests == runs.sum()
    assert trace.cost.forwards == 200 * STEPS
    mean, deviation = expected_requests(WEIGHTS, STEPS)
    assert abs(runs.mean() - mean) < 4.5 * deviation / np.sqrt(200)
    assert 0.8 < runs.std() / deviation < 1.25
    written = [sent for fake in fakes for sent in fake.requests if not sent["n_probs"]]
    assert len({sent["seed"] for sent in written}) == len(written) == runs.sum()


def test_a_row_ends_at_its_end_and_at_a_stop_of_the_server_it_goes_on() -> None:
    ending = [MarkovModel.random(V, seed=seed, concentration=3.0, eos=(4,)) for seed in (1, 2)]
    trace = sampler_of(*[Fake(chain, stops=(2,)) for chain in ending]).sample([0], n=300, max_new_tokens=40, seed=5)
    rows = trace.sequences()
    assert all(4 not in row[:-1] and (row[-1] == 4 or len(row) == 40) for row in rows)
    assert any(2 in row[:-1] for row in rows)
    assert pvalue(trace, ending) > 1e-6


def test_a_row_does_not_depend_on_its_neighbours() -> None:
    sampler = sampler_of(*map(Fake, CHAINS))
    whole = sampler.sample([0], n=12, max_new_tokens=20, seed=2)
    part = sampler.sample([0], n=3, max_new_tokens=20, seed=2, rows=[9, 2, 4], batch_size=2)
    assert part.tokens.tolist() == [whole.tokens[row].tolist() for row in (9, 2, 4)]


def test_contexts_are_read_before_the_prompt_and_share_a_server() -> None:
    fake = Fake(MarkovModel.random(V, seed=4))
    with served(fake) as model:
        both = Ensemble([Conditioned(model, [1, 2]), Conditioned(model, [3])], ConstantMixing(WEIGHTS))
        ServedME(both).sample([0], n=6, max_new_tokens=20, seed=1)
    written = [sent for sent in fake.requests if not sent["n_probs"]]
    assert {tuple(sent["prompt"][:3]) for sent in written} >= {(1, 2, 0)}
    assert {sent["id_slot"] for sent in written} == {0, 1, 2, 3}
    assert {sent["id_slot"] % 2 for sent in written if sent["prompt"][0] == 3} == {1}
    assert fake.most_running <= 2


def test_byte_strings_are_drawn_by_the_servers_exactly() -> None:
    # Ends, a control that is drawn again, two ids of one string, and readings that change what was drawn.
    first = TokenBytes.greedy([b"a", b"b", b"ab", None, b"a"], eos=(3,))
    tables = [first, TokenBytes.greedy([b"b", None, b"a", b"ba", None, b"bab"], eos=(4,))]
    shared = ByteStrings(tables)
    chains = [MarkovModel.random(t.size, seed=seed, concentration=3.0, eos=t.eos) for seed, t in enumerate(tables)]
    weights = ConstantMixing([0.5, 0.5])
    start = shared.vocabulary.encode([0])

    def mixture(models: Any) -> Ensemble:
        return Ensemble([Aligned(m, shared, token_bytes=t) for m, t in zip(models, tables, strict=True)], weights)

    n, steps = 4000, 3
    fakes = [Fake(chain) for chain in chains]
    trace = ServedME(mixture([direct(fake) for fake in fakes])).sample([start], n=n, max_new_tokens=steps)
    seeds = [sent["seed"] for fake in fakes for sent in fake.requests if not sent["n_probs"]]
    assert len(set(seeds)) == len(seeds)
    law, statistic, df = mixture(chains), 0.0, 0
    for step in range(steps):
        prefixes: dict[tuple[int, ...], list[int]] = {}
        for row in (row for row in trace.sequences() if len(row) > step):
            prefixes.setdefault(tuple(row[:step]), []).append(row[step])
        for prefix, drawn in prefixes.items():
            expected = law.log_probs([(*start, *prefix)])[0].exp().numpy() * len(drawn)
            kept = expected > 5
            if kept.sum() < 2:
                continue
            observed = np.bincount(drawn, minlength=len(expected))
            statistic += float(((observed - expected)[kept] ** 2 / expected[kept]).sum())
            df += int(kept.sum())
    assert chi2.sf(statistic, df) > 1e-6


class _Router(Mixing):
    n_components = 2

    def log_weights(self, prefixes: Sequence[Sequence[int]]) -> torch.Tensor:
        return torch.tensor([[0.5, 0.5]]).log().expand(len(prefixes), -1)


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: ServedME(CHAINS[0]), "needs an Ensemble of served models"),
        (lambda: ServedME(Ensemble(CHAINS, ConstantMixing(WEIGHTS))), r"components\[0\] must be a ServedModel"),
        (lambda: ServedME(_routed()), "needs ConstantMixing, got _Router.*MESampler takes any mixing"),
        (lambda: sampler_of(Fake(CHAINS[0]), weights=[1.0]).sample([0], max_new_tokens=2, draw=max), "no `draw`"),
    ],
)
def test_what_no_server_can_draw_is_refused_by_type(make: Any, says: str) -> None:
    with pytest.raises(TypeError, match=says):
        make()


def _routed() -> Ensemble:
    return Ensemble([direct(Fake(chain)) for chain in CHAINS], _Router())
