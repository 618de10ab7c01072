"""The process itself: merging, resuming, looks, false alarms, and how many tokens each planted sampler survives."""

from __future__ import annotations

import io
import math

import numpy as np
import pytest
import torch
from scipy import stats

from me_stats.eprocess import EProcess
from me_stats.evidence import Evidence
from me_stats.families import ALL_FAMILIES, SCORE_FAMILIES, Family, HiddenMarkov, TransformBins, WeightShifts
from tests.laws import EVEN, Floats, Ints, log, markov_pair, simulate


def evidence_of(laws: Floats, tokens: Ints, weights: Floats = EVEN, *, seed: int = 0) -> Evidence:
    return Evidence.from_laws(
        torch.tensor(log(laws)),
        torch.tensor(log(weights)),
        torch.tensor(tokens),
        families=ALL_FAMILIES,
        rng=np.random.default_rng(seed),
    )


def part(evidence: Evidence, index: object) -> Evidence:
    return Evidence(
        evidence.ratios[index],  # type: ignore[index]
        evidence.weights[index],  # type: ignore[index]
        evidence.live[index],  # type: ignore[index]
        evidence.impossible[index],  # type: ignore[index]
        {name: reading[index] for name, reading in evidence.readings.items()},  # type: ignore[index]
    )


def ragged(count: int = 2, *, sampler: str = "ancestral") -> Evidence:
    weights = np.full(count, 1 / count)
    laws, tokens = simulate(
        markov_pair(components=count), weights, 10, 12, np.random.default_rng(0), sampler=sampler, strength=0.5
    )
    for row, length in ((2, 5), (4, 1), (9, 11)):
        tokens[row, length:] = -1
    return evidence_of(laws, tokens, weights)


def fed(evidence: Evidence, families: tuple[Family, ...] = ALL_FAMILIES) -> EProcess:
    process = EProcess(evidence.ratios.shape[-1], families=families)
    process.update(evidence)
    return process


def members(process: EProcess) -> list[float]:
    return [value for family in process.by_member.values() for value in family.values()]


# --- one process, fed in any way ------------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [1, 2, 3])
def test_whole_sequences_steps_and_parts_agree(count: int) -> None:
    evidence = ragged(count)
    whole = fed(evidence)
    by_parts = EProcess(count, families=ALL_FAMILIES)
    for rows in (slice(0, 3), slice(3, 3), slice(3, 10)):
        by_parts.update(part(evidence, rows))
    by_steps = EProcess(count, families=ALL_FAMILIES)
    for t in range(12):
        by_steps.step(part(evidence, (slice(None), t)))
    for other in (by_parts, by_steps):
        assert members(other) == pytest.approx(members(whole), abs=1e-11)
        assert other.log_e == pytest.approx(whole.log_e, abs=1e-11)
        assert (other.tokens, other.sequences) == (whole.tokens, 10) == (120 - 7 - 11 - 1, 10)
    np.testing.assert_allclose(by_parts.looks.log_e, whole.looks.log_e, atol=1e-11)
    assert by_parts.looks.tokens.tolist() == whole.looks.tokens.tolist()
    assert len(by_steps.looks.tokens) == 12


def test_averages_are_over_members_and_then_over_families() -> None:
    process = fed(ragged(sampler="sticky"))
    inside = [np.exp(list(family.values())).mean() for family in process.by_member.values()]
    assert list(process.by_family.values()) == pytest.approx(np.log(inside))
    assert process.log_e == pytest.approx(math.log(np.mean(inside)))
    assert process.worst == list(process.by_family)[int(np.argmax(inside))]
    looks = process.looks
    assert looks.log_e[-1] == process.log_e
    assert looks.by_family[-1].tolist() == list(process.by_family.values())
    assert looks.families == tuple(process.by_family)
    assert process.log_sup == max(0.0, looks.log_e.max())
    assert process.pvalue == pytest.approx(math.exp(-process.log_sup))


def test_paths_are_those_of_sequences_alone() -> None:
    evidence = ragged()
    paths = EProcess(2, families=ALL_FAMILIES).paths(evidence)
    for row in range(10):
        process = EProcess(2, families=ALL_FAMILIES)
        for t in range(12):
            process.step(part(evidence, (slice(row, row + 1), t)))
        np.testing.assert_allclose(process.looks.log_e, paths[row], atol=1e-11)


@pytest.mark.parametrize("split", [1, 7, 11])
def test_a_saved_process_continues_bit_for_bit(split: int) -> None:
    evidence = ragged()
    through = EProcess(2, families=ALL_FAMILIES)
    through.update(evidence)
    stopped = EProcess(2, families=ALL_FAMILIES)
    stopped.update(evidence)
    for t in range(split):
        through.step(part(evidence, (slice(None), t)))
        stopped.step(part(evidence, (slice(None), t)))
    file = io.BytesIO()
    np.savez(file, **stopped.state_dict())  # type: ignore[arg-type]
    file.seek(0)
    resumed = EProcess(2, families=ALL_FAMILIES)
    resumed.step(part(evidence, (slice(0, 2), 0)))
    resumed.load_state_dict(np.load(file))
    stopped.step(part(evidence, (slice(None), split)))  # what happens to the original changes nothing
    for t in range(split, 12):
        through.step(part(evidence, (slice(None), t)))
        resumed.step(part(evidence, (slice(None), t)))
    for process in (through, resumed):
        process.end()
        process.update(part(evidence, slice(0, 4)))
    one, two = through.state_dict(), resumed.state_dict()
    assert "open" not in two
    resumed.step(part(evidence, (slice(None), 0)))
    assert "open" not in resumed.load_state_dict(two).state_dict()
    assert one.keys() == two.keys()
    for name, value in one.items():
        np.testing.assert_array_equal(value, two[name], err_msg=name)
    assert through.log_sup == resumed.log_sup


def test_evidence_once_seen_is_not_forgotten() -> None:
    wrong = fed(evidence_of(*simulate(markov_pair(), EVEN, 8, 16, np.random.default_rng(0), sampler="once")))
    log_sup = wrong.log_sup
    assert log_sup > 5
    wrong.update(evidence_of(*simulate(markov_pair(), EVEN, 20, 16, np.random.default_rng(1))))
    assert wrong.log_e < log_sup - 2
    assert wrong.log_sup == log_sup == wrong.looks.log_e.max()


def test_merging_is_one_run_over_all() -> None:
    # Long enough that averaging before multiplying would be far off.
    laws, tokens = simulate(markov_pair(), EVEN, 40, 20, np.random.default_rng(1), sampler="sticky", strength=0.5)
    evidence = evidence_of(laws, tokens)
    whole, one, two = (fed(part(evidence, rows)) for rows in (slice(None), slice(0, 15), slice(15, None)))
    for merged in (one.merge(two), two.merge(one)):
        assert members(merged) == pytest.approx(members(whole), abs=1e-9)
        assert merged.log_e == pytest.approx(whole.log_e, abs=1e-9)
        assert (merged.tokens, merged.sequences, merged.impossible) == (800, 40, 0)
    merged = one.merge(two)
    assert merged.looks.tokens.tolist() == [*one.looks.tokens, 800]
    assert merged.log_sup == max(one.log_sup, merged.log_e)
    assert merged.log_e > one.log_e + two.log_e + 1
    merged.update(evidence)
    assert merged.tokens == 1600
    assert (one.tokens, one.sequences) == (300, 15)


# --- edges ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["identical", "single"])
def test_components_that_cannot_differ_leave_one(kind: str) -> None:
    tables = markov_pair(components=3)
    tables = np.broadcast_to(tables[:1], tables.shape) if kind == "identical" else tables[:1]
    weights = np.full(len(tables), 1 / len(tables))
    laws, tokens = simulate(tables, weights, 30, 20, np.random.default_rng(0))
    process = fed(evidence_of(laws, tokens, weights), SCORE_FAMILIES)
    assert members(process) == pytest.approx([0.0] * len(members(process)), abs=1e-11)
    assert process.pvalue == pytest.approx(1)


def test_a_component_of_weight_zero_that_writes_is_found() -> None:
    weights = np.array([0.5, 0.5, 0.0])
    tables = markov_pair(components=3)
    right = fed(evidence_of(*simulate(tables, weights, 30, 20, np.random.default_rng(0)), weights))
    assert not right.rejects(1e-3)
    wrong = fed(evidence_of(*simulate(tables, np.array([0.4, 0.4, 0.2]), 100, 20, np.random.default_rng(0)), weights))
    assert wrong.rejects(1e-9)
    assert wrong.worst == "weights"
    assert max(wrong.by_member["weights"], key=wrong.by_member["weights"].__getitem__).endswith("component 2")


def test_a_router_is_tested_with_its_own_weights() -> None:
    # w(prefix) = (.9, .1) after even tokens and (.2, .8) after odd ones: right with the router, wrong with constants.
    rng = np.random.default_rng(2)
    tables, n, steps = markov_pair(), 150, 30
    tokens, laws = np.zeros((n, steps), dtype=np.int64), np.empty((n, steps, 2, 8))
    weights, previous = np.empty((n, steps, 2)), np.zeros(n, dtype=np.int64)
    for t in range(steps):
        laws[:, t] = tables[:, previous].transpose(1, 0, 2)
        weights[:, t] = np.where((previous % 2 == 0)[:, None], [0.9, 0.1], [0.2, 0.8])
        component = (rng.random(n) > weights[:, t, 0]).astype(int)
        cumulative = laws[np.arange(n), t, component].cumsum(1)
        previous = tokens[:, t] = (rng.random((n, 1)) * cumulative[:, -1:] > cumulative).sum(1).clip(max=7)
    assert not fed(evidence_of(laws, tokens, weights)).rejects(1e-3)
    assert fed(evidence_of(laws, tokens, weights.mean((0, 1)))).rejects(1e-9)


def test_an_impossible_token_rejects_alone() -> None:
    tables = markov_pair()
    tables[:, :, 7] = 0
    tables /= tables.sum(-1, keepdims=True)
    laws, tokens = simulate(tables, EVEN, 10, 10, np.random.default_rng(0))
    clean = fed(evidence_of(laws, tokens))
    assert not clean.rejects(1e-3)
    tokens[3, 6] = 7
    evidence = evidence_of(laws, tokens)
    dirty = fed(evidence)
    assert (dirty.log_e, dirty.pvalue, dirty.impossible, dirty.tokens) == (math.inf, 0.0, 1, 100)
    assert dirty.rejects(1e-300)
    assert np.isinf(dirty.looks.log_e).tolist() == [False] * 3 + [True] * 7
    assert np.isfinite(members(dirty)).all()
    assert dirty.looks.tokens_to(1e-9) == 40
    assert np.isinf(dirty.paths(evidence)).tolist() == [[row == 3 and t >= 6 for t in range(10)] for row in range(10)]
    assert clean.merge(dirty).log_e == math.inf
    by_steps = EProcess(2, families=ALL_FAMILIES)
    for t in range(10):
        by_steps.step(part(evidence, (slice(None), t)))
    assert by_steps.looks.tokens_to(1e-9) == 70
    assert by_steps.rejects(1e-300)


def test_a_new_process_has_seen_nothing() -> None:
    process = EProcess(2, families=ALL_FAMILIES)
    assert (process.log_e, process.pvalue, process.tokens, process.sequences) == (0.0, 1.0, 0, 0)
    assert process.looks.tokens_to(0.5) is None
    assert EProcess(2, families=ALL_FAMILIES).load_state_dict(process.state_dict()).log_e == 0.0


def test_bad_input() -> None:
    evidence = ragged()
    process = EProcess(2)
    with pytest.raises(ValueError, match="n_components"):
        EProcess(0)
    with pytest.raises(ValueError, match="distinct names"):
        EProcess(2, families=[WeightShifts(), WeightShifts((0.5,))])
    with pytest.raises(ValueError, match="distinct names"):
        EProcess(2, families=[])
    with pytest.raises(ValueError, match=r"axes \(N, T\)"):
        process.update(part(evidence, 0))
    with pytest.raises(ValueError, match=r"axes \(N,\)"):
        process.step(evidence)
    with pytest.raises(ValueError, match="K=3"):
        EProcess(3).update(evidence)
    bare = Evidence(evidence.ratios, evidence.weights, evidence.live, evidence.impossible, {})
    with pytest.raises(ValueError, match="no readings for"):
        EProcess(2, families=[TransformBins()]).update(bare)
    with pytest.raises(ValueError, match="alpha"):
        process.rejects(1.0)
    with pytest.raises(ValueError, match="same n_components and families"):
        process.merge(EProcess(2, families=[HiddenMarkov()]))
    with pytest.raises(ValueError, match="state must be of"):
        process.load_state_dict(EProcess(3).state_dict())
    process.step(part(evidence, (slice(None), 0)))
    with pytest.raises(ValueError, match="10 open sequences"):
        process.step(part(evidence, (slice(0, 4), 1)))
    with pytest.raises(ValueError, match="open sequences"):
        process.merge(EProcess(2))
    process.end()
    process.step(part(evidence, (slice(0, 4), 1)))
    assert process.sequences == 14


# --- false alarms ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("weights", "sampler"), [([0.5, 0.5], "ancestral"), ([0.5, 0.5], "marginal"), ([0.7, 0.25, 0.05], "ancestral")]
)
def test_right_samplers_rarely_reach_twenty(weights: list[float], sampler: str) -> None:
    w, runs, n = np.array(weights), 300, 8
    laws, tokens = simulate(markov_pair(components=len(w)), w, n * runs, 16, np.random.default_rng(0), sampler=sampler)
    evidence = evidence_of(laws, tokens, w)
    for families in (ALL_FAMILIES, *((family,) for family in ALL_FAMILIES)):
        found = sum(fed(part(evidence, slice(n * r, n * r + n)), families).rejects(0.05) for r in range(runs))
        assert found <= stats.binom.isf(1e-6, runs, 0.05), families


def test_a_law_that_is_not_the_samplers_is_rejected_far_more_often() -> None:
    # The same count with a planted bug: the bound above is one that a wrong null fails.
    laws, tokens = simulate(markov_pair(), EVEN, 800, 16, np.random.default_rng(0), sampler="once")
    evidence = evidence_of(laws, tokens)
    found = sum(fed(part(evidence, slice(8 * r, 8 * r + 8))).rejects(0.05) for r in range(100))
    assert found > 90


# --- planted samplers -----------------------------------------------------------------------------------------------


def stale(tables: Floats, n: int, steps: int, rng: np.random.Generator) -> tuple[Floats, Ints]:
    """A component that takes over has not seen the last token."""
    tokens, laws = np.zeros((n, steps), dtype=np.int64), np.empty((n, steps, 2, 8))
    before = previous = np.zeros(n, dtype=np.int64)
    last = np.full(n, -1)
    for t in range(steps):
        laws[:, t] = tables[:, previous].transpose(1, 0, 2)
        component = rng.integers(2, size=n)
        seen = np.where((component != last) & (t > 0), before, previous)
        cumulative = tables[component, seen].cumsum(1)
        before, last = previous, component
        previous = tokens[:, t] = (rng.random((n, 1)) * cumulative[:, -1:] > cumulative).sum(1).clip(max=7)
    return laws, tokens


PLANTED = [
    # sampler, strength, sequences of 32 tokens drawn, most median tokens to 1e9, families that may find it
    ("once", 0.0, 20, 200, {"hidden Markov"}),
    ("round robin", 0.0, 20, 200, {"hidden Markov"}),
    ("sticky", 0.5, 80, 1000, {"hidden Markov"}),
    ("sticky", 0.9, 40, 300, {"hidden Markov"}),
    ("stale", 0.0, 60, 600, {"tilts", "transform by rank", "transform by ratio"}),
    ("greedy", 0.1, 300, 5000, {"tilts"}),
    ("weights", 0.55, 700, 15_000, {"weights"}),
    ("temperature", 1.05, 2200, 60_000, {"tilts"}),
]


@pytest.mark.parametrize(("sampler", "strength", "n", "most", "finders"), PLANTED)
def test_planted_samplers_are_found_in_few_tokens(
    sampler: str, strength: float, n: int, most: int, finders: set[str]
) -> None:
    tables, tokens_to, worst = markov_pair(), [], []
    for run in range(5):
        rng = np.random.default_rng(run)
        if sampler == "stale":
            laws, tokens = stale(tables, n, 32, rng)
        else:
            weights = np.array([strength, 1 - strength]) if sampler == "weights" else EVEN
            laws, tokens = simulate(tables, weights, n, 32, rng, sampler=sampler, strength=strength)
        process = fed(evidence_of(laws, tokens, seed=run))
        found = process.looks.tokens_to(1e-9)
        tokens_to.append(math.inf if found is None else found)
        worst.append(process.worst)
    assert np.median(tokens_to) <= most, tokens_to
    assert set(worst) <= finders


@pytest.mark.parametrize("sampler", ["once", "round robin"])
def test_three_components_too(sampler: str) -> None:
    weights = np.full(3, 1 / 3)
    laws, tokens = simulate(markov_pair(components=3), weights, 40, 32, np.random.default_rng(0), sampler=sampler)
    process = fed(evidence_of(laws, tokens, weights), SCORE_FAMILIES)
    found = process.looks.tokens_to(1e-9)
    assert found is not None
    assert found <= 400
    assert process.worst == "hidden Markov"
