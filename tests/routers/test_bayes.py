from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from me_stats.exact import sampler_law, sequence_law
from me_stats.mixing import ConstantMixing
from me_stats.models import Cost, Ensemble, TableModel
from me_stats.routers import BayesRouter
from me_stats.samplers import CESampler, MESampler, SequenceMixtureSampler
from tests.routers.toys import tables


@given(st.integers(0, 50), st.sampled_from([(2, 2, 4), (3, 2, 3), (2, 4, 3), (4, 3, 2)]), st.integers(0, 2))
def test_with_beta_one_it_is_the_sequence_mixture(seed: int, shape: tuple[int, int, int], given_tokens: int) -> None:
    size, count, steps = shape
    parts = tables(size, count, seed=seed, order=2, eos=(size - 1,) if seed % 2 else ())
    prior = np.random.default_rng(seed).dirichlet(np.ones(count))
    prompt = [token % (size - 1) for token in range(given_tokens)]
    mixture = sampler_law(SequenceMixtureSampler(Ensemble(parts, ConstantMixing(prior))), prompt, max_new_tokens=steps)
    ensemble = Ensemble(parts, BayesRouter(parts, prior, beta=1, given=len(prompt)))
    for law in (
        sequence_law(ensemble, prompt, max_new_tokens=steps),
        sampler_law(CESampler(ensemble), prompt, max_new_tokens=steps),
        sampler_law(MESampler(ensemble), prompt, max_new_tokens=steps),
    ):
        assert law.tv_distance(mixture) < 1e-12
    # The check can fail: half the exponent, and a prompt that counts as evidence, are other laws.
    if steps > 2 and size == 3:
        half = Ensemble(parts, BayesRouter(parts, prior, beta=0.5, given=len(prompt)))
        assert sequence_law(half, prompt, max_new_tokens=steps).tv_distance(mixture) > 1e-6


def test_with_beta_zero_it_is_the_constant_mixture() -> None:
    parts = tables(3, 2)
    router = BayesRouter(parts, [0.3, 0.7], beta=0, given=0)
    constant = ConstantMixing([0.3, 0.7])
    assert torch.equal(router.log_weights([(), (1, 2)]), constant.log_weights([(), (1, 2)]))
    law = sampler_law(MESampler(Ensemble(parts, router)), [0], max_new_tokens=3)
    assert law.tv_distance(sequence_law(Ensemble(parts, constant), [0], max_new_tokens=3)) < 1e-12
    session = Ensemble(parts, router).session([(0,)])
    session.append(np.array([0]), torch.tensor([1]))
    assert session.cost == Cost()


def test_weights_by_hand() -> None:
    coins = [TableModel([[0.8, 0.2]], order=0), TableModel([[0.4, 0.6]], order=0)]
    # P(11) is 1/25 and 9/25; to the power 1/2, 1/5 and 3/5.
    assert BayesRouter(coins, [0.5, 0.5], given=0).log_weights([(1, 1)]).exp()[0, 0].item() == pytest.approx(0.1)
    router = BayesRouter(coins, [0.5, 0.5], beta=0.5, given=0)
    assert router.log_weights([(1, 1)]).exp()[0].tolist() == pytest.approx([0.25, 0.75])
    # Two given tokens say nothing; the third does.
    router = BayesRouter(coins, [0.5, 0.5], given=2)
    found = router.log_weights([(), (1,), (1, 1), (1, 1, 1)]).exp()[:, 0]
    assert found.tolist() == pytest.approx([0.5, 0.5, 0.5, 0.25])


def test_a_prefix_that_nobody_can_have_written_has_the_weights_of_the_prior() -> None:
    sure = [TableModel([[1.0, 0.0, 0.0]], order=0), TableModel([[0.0, 1.0, 0.0]], order=0)]
    router = BayesRouter(sure, [0.25, 0.75], given=0)
    found = router.log_weights([(0,), (1,), (2,), (0, 1)]).exp()[:, 0]
    assert found.tolist() == pytest.approx([1.0, 0.0, 0.25, 0.25], abs=1e-15)
    # A component of prior zero stays out, whatever it predicted.
    assert BayesRouter(sure, [0.0, 1.0], given=0).log_weights([(0,)]).exp().tolist() == [[0.0, 1.0]]


def test_its_reads_are_in_the_cost_of_the_ensemble() -> None:
    parts = tables(4, 3)
    steps, rows = 6, 5
    trace = MESampler(Ensemble(parts, BayesRouter(parts, [0.2, 0.3, 0.5], given=1))).sample(
        [0], n=rows, max_new_tokens=steps
    )
    # ME reads one law a token (the first is shared); the router all three of every token but the last.
    own = rows * (steps - 1) + len(set(trace.components[:, 0].tolist()))
    assert trace.cost.reads == own + 3 * rows * (steps - 1)


def test_long_prompts_are_evidence_and_are_counted() -> None:
    parts = tables(4, 2)
    router = BayesRouter(parts, [0.5, 0.5], given=1)
    session = router.session([(0, 1, 2), (0, 1, 2), (3,)])
    assert session.cost == Cost(2, 4, 4)  # type: ignore[attr-defined]
    found = session.log_weights(np.array([0, 2])).exp()
    expected = [model.log_probs([(0,), (0, 1)]) for model in parts]
    joint = torch.stack([law[0, 1] + law[1, 2] for law in expected]).softmax(0)
    assert found[0].tolist() == pytest.approx(joint.tolist(), abs=1e-12)
    assert found[1].tolist() == pytest.approx([0.5, 0.5], abs=1e-12)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"beta": -1.0}, "beta must be finite and at least 0"),
        ({"beta": float("nan")}, "beta must be finite"),
        ({"given": -1}, "given must be an integer of at least 0"),
        ({"prior": [1.0]}, "prior has 1 weights for 2 components"),
        ({"prior": [0.5, 0.4]}, "weights must sum to 1"),
    ],
)
def test_options_are_checked(options: dict[str, object], message: str) -> None:
    merged = {"prior": [0.5, 0.5], "given": 0} | options
    with pytest.raises(ValueError, match=message):
        BayesRouter(tables(3, 2), **merged)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"components\[0\] must be a LanguageModel"):
        BayesRouter([object()], [1.0], given=0)
