from __future__ import annotations

import math
from functools import cache

import numpy as np
import pytest
import torch

from me_stats.draws import inverse_cdf
from me_stats.eprocess import EProcess
from me_stats.evidence import collect
from me_stats.exact import sampler_law, sequence_law
from me_stats.families import ALL_FAMILIES
from me_stats.martingale import martingale_portfolio
from me_stats.mixing import ConstantMixing
from me_stats.models import Ensemble, LanguageModel, TableModel, Warped
from me_stats.models.base import open_session
from me_stats.repeats import RepeatProcess
from me_stats.samplers import CESampler, MESampler, Sampler
from me_stats.steps import collect_steps
from me_stats.testing import _faulty_samplers as faulty
from me_stats.testing import _faulty_sessions as sessions
from me_stats.testing.drawing import structural_faults
from me_stats.testing.mutants import MUTANTS, PROMPTS, Mutant, playground
from me_stats.trace import Trace, score

THRESHOLD = math.log(1e9)
SIZES = {"weights", "dependence", "cache", "transform", "draw", "structure"}
# Bugs that an enumeration cannot see: they sit in the random numbers themselves, or in the neighbours of a row.
BY_SEQUENCES = (
    "one number for component and token",
    "padding read as prompt",
    "random numbers reused",
    "generator seeded at every step",
    "wrong side at ties",
    "zero-probability token drawn",
    "half-precision sums",
)
BY_COPIES = ("rows share random numbers", "seed ignored")
BY_SHAPE = ("goes on after the end", "stops with the first row")
BY_LAW = tuple(name for name in MUTANTS if name not in BY_SEQUENCES + BY_COPIES + BY_SHAPE)
SESSIONS = tuple(name for name, mutant in MUTANTS.items() if mutant.model is not None)

every = pytest.mark.parametrize("name", MUTANTS)


@cache
def parts(name: str) -> tuple[Mutant, Ensemble, LanguageModel, Sampler, Sampler]:
    """The mutant, its playground, its claim, the wrong sampler and the right one."""
    mutant = MUTANTS[name]
    ensemble = mutant.ensemble()
    return mutant, ensemble, mutant.null(ensemble), mutant.sampler(ensemble), mutant.right_sampler(ensemble)


def draw(sampler: Sampler, seed: int, *, n: int = 100) -> Trace:
    return sampler.sample(PROMPTS, n=n, max_new_tokens=32, seed=seed)


def log_e(sampler: Sampler, null: LanguageModel, *, batches: int = 6) -> float:
    """Largest log E of an e-process over at most `batches` batches of 300 rows."""
    process = EProcess(len(getattr(null, "components", (null,))), families=ALL_FAMILIES)
    for batch in range(batches):
        trace = draw(sampler, seed=100 + batch)
        rng = np.random.default_rng(batch)
        process.update(collect(null, trace.row_prompts(), trace.tokens, families=process.families, rng=rng))
        if process.log_sup > THRESHOLD:
            break
    return process.log_sup


def log_e_of_copies(sampler: Sampler, null: LanguageModel) -> float:
    process = RepeatProcess()
    for batch in range(4):
        trace = draw(sampler, seed=batch, n=10)
        log_p = score(null, trace.row_prompts(), trace.tokens).log_probs.sum(1)
        process.update(trace.prompt_index.tolist(), trace.sequences(), log_p.numpy())
    return process.log_sup


def tv_of_law(sampler: Sampler, null: LanguageModel, *, steps: int = 3) -> float:
    law = sampler_law(sampler, PROMPTS[0], max_new_tokens=steps)
    return law.tv_distance(sequence_law(null, PROMPTS[0], max_new_tokens=steps))


# --- the table -----------------------------------------------------------------------------------------------------


@every
def test_each_mutant_says_what_it_is(name: str) -> None:
    mutant, ensemble, null, sampler, _ = parts(name)
    assert mutant.name == name
    assert mutant.size in SIZES
    assert mutant.bug[0].isupper()
    assert mutant.bug.endswith(".")
    assert null.vocabulary == ensemble.vocabulary
    assert isinstance(sampler, Sampler)
    assert (mutant.size == "cache") == (mutant.model is not None)


@every
def test_traces_are_well_formed_and_follow_from_the_seed(name: str) -> None:
    _, ensemble, null, sampler, _ = parts(name)
    trace, again, other = draw(sampler, 5, n=8), draw(sampler, 5, n=8), draw(sampler, 6, n=8)
    assert trace.model.vocabulary == null.vocabulary
    assert trace.seed == 5
    assert trace.tokens.shape == (24, int(trace.lengths.max()))
    assert trace.tokens.max() < ensemble.vocabulary.size
    assert torch.equal(trace.mask.sum(1), trace.lengths)
    assert trace.components is None or torch.equal(trace.components >= 0, trace.mask)
    assert torch.equal(trace.tokens, again.tokens)
    assert torch.equal(trace.tokens, other.tokens) == (name == "seed ignored")


@every
def test_the_trace_is_scored_under_the_claim(name: str) -> None:
    _, _, null, sampler, _ = parts(name)
    trace = draw(sampler, 5, n=2)
    claimed = score(null, trace.row_prompts(), trace.tokens).log_probs
    assert torch.allclose(trace.log_probs, claimed, atol=1e-12)


@pytest.mark.parametrize(
    "name", [name for name in MUTANTS if name not in (*BY_COPIES, "padding read as prompt", *BY_SHAPE)]
)
def test_a_row_does_not_depend_on_its_neighbours(name: str) -> None:
    _, _, _, sampler, _ = parts(name)
    together = sampler.sample(PROMPTS, n=4, max_new_tokens=12, seed=3).sequences()
    alone = sampler.sample(PROMPTS[1], n=4, max_new_tokens=12, seed=3, rows=range(4, 8)).sequences()
    assert alone == together[4:8]


# --- every mutant is a departure, and what it breaks is none -------------------------------------------------------


@pytest.mark.parametrize("name", BY_LAW)
def test_its_exact_law_departs(name: str) -> None:
    _, _, null, sampler, right = parts(name)
    assert tv_of_law(sampler, null) > 0.005
    assert tv_of_law(right, null) < 1e-12


@pytest.mark.parametrize("name", BY_SEQUENCES)
def test_an_e_process_rejects_its_sequences(name: str) -> None:
    _, _, null, sampler, right = parts(name)
    assert log_e(sampler, null) > THRESHOLD
    assert log_e(right, null, batches=2) < THRESHOLD


@pytest.mark.parametrize("name", BY_COPIES)
def test_its_rows_copy_each_other(name: str) -> None:
    _, _, null, sampler, right = parts(name)
    assert log_e_of_copies(sampler, null) > THRESHOLD
    assert log_e_of_copies(right, null) < THRESHOLD


@pytest.mark.parametrize("name", BY_SHAPE)
def test_no_law_writes_rows_of_its_shape(name: str) -> None:
    _, ensemble, _, sampler, right = parts(name)
    assert structural_faults(draw(sampler, 0).sequences(), ensemble.vocabulary, 32)
    assert not structural_faults(draw(right, 0).sequences(), ensemble.vocabulary, 32)


@pytest.mark.parametrize("name", BY_SEQUENCES + BY_COPIES)
def test_its_choices_are_right_where_the_numbers_are(name: str) -> None:
    _, _, null, sampler, _ = parts(name)
    assert tv_of_law(sampler, null, steps=2 if null.vocabulary.size < 20 else 1) < 1e-12


# --- sessions ------------------------------------------------------------------------------------------------------


def _tv(laws: torch.Tensor, others: torch.Tensor) -> float:
    return float((laws.exp() - others.exp()).abs().sum(-1).max() / 2)


def _worst_tv(model: LanguageModel, reference: LanguageModel) -> float:
    """Largest TV between a session read at random times and the law by definition."""
    rng = np.random.default_rng(0)
    prompts = list(PROMPTS) * 20
    session = open_session(model, prompts)
    every_row = np.arange(len(prompts))
    prefixes = [tuple(prompt) for prompt in prompts]
    worst = 0.0
    for _ in range(12):
        rows = every_row[rng.random(len(prompts)) < 0.5]
        if len(rows):
            worst = max(worst, _tv(session.log_probs(rows), reference.log_probs([prefixes[row] for row in rows])))
        tokens = torch.from_numpy(rng.integers(2, 9, len(prompts)))
        session.append(every_row, tokens)
        prefixes = [(*prefix, token) for prefix, token in zip(prefixes, tokens.tolist(), strict=True)]
    return worst


@pytest.mark.parametrize("name", SESSIONS)
def test_the_definition_is_right_and_the_session_wrong(name: str) -> None:
    mutant, ensemble, null, sampler, _ = parts(name)
    assert mutant.model is not None
    model = mutant.model(ensemble)
    prefixes = [(), (2,), (5, 3), (2, 5, 3, 8), (4, 4, 4, 4, 7)]
    assert torch.equal(model.log_probs(prefixes), null.log_probs(prefixes))
    assert all(
        torch.allclose(path, right)
        for path, right in zip(
            model.path_log_probs([(2,)], [(3, 4)]), null.path_log_probs([(2,)], [(3, 4)]), strict=True
        )
    )
    assert _worst_tv(model, null) > 0.05
    assert repr(sampler.model) == repr(model)


def test_a_session_without_a_bug_is_right() -> None:
    right = sessions.with_faulty_sessions(playground())
    assert _worst_tv(right, playground()) < 1e-12
    tokens = [draw(MESampler(model), 1).tokens for model in (right, playground())]
    assert torch.equal(*tokens)


@pytest.mark.parametrize(
    ("rule", "expected"),
    [
        (sessions.all_pending, (1, 2, 3, 4)),
        (sessions.newest_only, (1, 4)),
        (sessions.oldest_skipped, (1, 3, 4)),
        (sessions.newest_twice, (1, 2, 3, 4, 4)),
    ],
)
def test_what_a_row_reads_when_it_catches_up(rule: sessions.Rule, expected: tuple[int, ...]) -> None:
    model = TableModel.random(5, order=4, seed=0)
    session = sessions.FaultyModel(model, rule=rule).session([(1,)])
    row = np.array([0])
    session.log_probs(row)
    for token in (2, 3, 4):
        session.append(row, torch.tensor([token]))
    assert torch.equal(session.log_probs(row), model.log_probs([expected]))
    assert torch.equal(session.log_probs(row), model.log_probs([expected]))


def test_rules_leave_a_lag_of_one_alone() -> None:
    rules = (sessions.newest_only, sessions.sometimes_newest_only, sessions.oldest_skipped, sessions.newest_twice)
    assert [rule([1, 2], [3]) for rule in rules] == [[3]] * 4


def test_a_race_strikes_one_switch_in_twenty() -> None:
    rng = np.random.default_rng(0)
    struck = sum(len(sessions.sometimes_newest_only(rng.integers(2, 9, 8).tolist(), [2, 3])) == 1 for _ in range(4000))
    assert abs(struck / 4000 - 0.05) < 0.015


# --- single parts --------------------------------------------------------------------------------------------------


def test_warps_by_hand() -> None:
    law = torch.tensor([[0.5, 0.2, 0.3, 0.0], [0.0, 1.0, 0.0, 0.0]], dtype=torch.float64)
    assert faulty.Banned((0,))(law.log()).exp()[0].tolist() == pytest.approx([0, 0.4, 0.6, 0])
    dropped = faulty.LastDropped()(law.log()).exp()
    assert dropped[0].tolist() == pytest.approx([5 / 7, 2 / 7, 0, 0])
    assert dropped[1].tolist() == [0, 1, 0, 0]
    blended = faulty.Sometimes(faulty.Banned((0,)), 0.5)(law.log()).exp()
    assert blended[0].tolist() == pytest.approx([0.25, 0.3, 0.45, 0])


def test_the_repetition_penalty_by_hand_and_by_session() -> None:
    model = TableModel([[0.25, 0.5, 0.25]], order=0)
    penalised = faulty.RepetitionPenalised(model, 2.0)
    assert penalised.log_probs([(), (1,)]).exp()[1].tolist() == pytest.approx([1 / 3, 1 / 3, 1 / 3])
    table = playground().components[0]
    assert _worst_tv(faulty.RepetitionPenalised(table, 1.1), faulty.RepetitionPenalised(table, 1.1)) < 1e-12


def test_ties_go_to_the_token_below() -> None:
    law = torch.tensor([[0.0, 0.25, 0.75]], dtype=torch.float64).log().expand(256, -1)
    grid = torch.arange(256, dtype=torch.float64) / 256
    right = inverse_cdf(law, grid)
    wrong = faulty.TiesDraw(0, np.arange(1))._look_up(law, grid, None, "token")
    assert (right != wrong).nonzero()[:, 0].tolist() == [0, 64]
    assert wrong[[0, 64]].tolist() == [0, 1]


def test_the_right_inequality_on_the_same_grid_has_the_right_law() -> None:
    class Strict(faulty.TiesDraw):
        strict = True

    _, ensemble, null, _, _ = parts("wrong side at ties")
    right = faulty.FaultySampler(ensemble, MESampler(ensemble), draw=Strict)
    assert log_e(right, null) < THRESHOLD
    assert all(bool(((part.log_table.exp() * 256).frac().sub(0.5).abs() > 0.499).all()) for part in ensemble.components)


def test_rounding_up_writes_the_unused_id() -> None:
    _, _, _, sampler, right = parts("zero-probability token drawn")
    share = float((draw(sampler, 0, n=600).tokens == 9).sum() / draw(sampler, 0, n=600).mask.sum())
    assert share == pytest.approx(1 / 512, rel=0.5)
    assert not (draw(right, 0, n=600).tokens == 9).any()


def test_a_draw_from_outside_replaces_the_wrong_numbers() -> None:
    _, _, _, sampler, right = parts("half-precision sums")
    given = faulty.FaultyDraw(4, np.arange(1))
    trace = sampler.sample(PROMPTS, n=3, max_new_tokens=5, draw=given)
    assert trace.seed is None
    assert torch.equal(trace.tokens, right.sample(PROMPTS, n=3, max_new_tokens=5, seed=4).tokens)


def test_a_sampler_of_another_law_still_claims_its_own() -> None:
    ensemble = playground()
    sampler = faulty.FaultySampler(ensemble, CESampler(Warped(ensemble, faulty.Banned((2,)))))
    trace = draw(sampler, 0)
    assert trace.model is ensemble
    assert not (trace.tokens == 2).any()


def test_five_points_more() -> None:
    mutant = MUTANTS["weights off by five points"]
    toys = [TableModel([[1.0, 0.0]], order=0), TableModel([[0.0, 1.0]], order=0)]
    law = sampler_law(mutant.sampler(Ensemble(toys, ConstantMixing([0.3, 0.7]))), (), max_new_tokens=1)
    assert np.exp(law.log_probs).tolist() == pytest.approx([0.35, 0.65])


def test_sticky_by_hand() -> None:
    toys = [TableModel([[1.0, 0.0]], order=0), TableModel([[0.0, 1.0]], order=0)]
    sampler = MUTANTS["sticky component"].sampler(Ensemble(toys, ConstantMixing([0.5, 0.5])))
    law = sampler_law(sampler, (), max_new_tokens=2)
    assert np.exp(law.log_probs).tolist() == pytest.approx([0.375, 0.125, 0.125, 0.375])


def test_more_components_do() -> None:
    ensemble = playground(weights=(0.5, 0.3, 0.2))
    for name, mutant in MUTANTS.items():
        if mutant.ensemble is playground:
            trace = mutant.sampler(ensemble).sample(PROMPTS, n=2, max_new_tokens=4, seed=0)
            assert len(trace.tokens) == 6, name


def test_martingales_see_a_component_that_never_changes() -> None:
    _, _, null, sampler, right = parts("one component per sequence")
    for wrong, given in ((True, sampler), (False, right)):
        trace = draw(given, 0)
        steps = collect_steps(null, trace.row_prompts(), trace.sequences())
        assert martingale_portfolio(steps, np.random.default_rng(0), level=1e-9).rejected == wrong
