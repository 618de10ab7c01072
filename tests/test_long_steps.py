"""Long float32 steps against float64: the same sums, the same order of tokens, the same refusals."""

from __future__ import annotations

import math
from dataclasses import fields

import numpy as np
import pytest
import torch
from torch import Tensor

from me_stats import long_steps
from me_stats.divergence import LONG
from me_stats.martingale import martingale_portfolio
from me_stats.steps import StepScores, step_scores


def laws(seed: int, components: int, *, gap: float = 1.0, spread: float = 3.0, steps: int = 5) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    shared = spread * torch.randn(steps, 1, LONG + 77, generator=generator)
    return (shared + gap * torch.randn(steps, components, LONG + 77, generator=generator)).log_softmax(-1)


def drawn(log_p: Tensor, seed: int) -> Tensor:
    return torch.multinomial(log_p.exp(), 1, generator=torch.Generator().manual_seed(seed))[:, 0]


def assert_close(found: StepScores, exact: StepScores, tolerance: float = 5e-6) -> None:
    for entry in fields(StepScores):
        one, other = getattr(found, entry.name), getattr(exact, entry.name)
        assert one.shape == other.shape
        assert one.dtype == other.dtype
        np.testing.assert_allclose(one, other, rtol=tolerance, atol=tolerance, err_msg=entry.name)


@pytest.mark.parametrize("components", [1, 2, 3, 5])
@pytest.mark.parametrize(("gap", "spread"), [(1.0, 3.0), (0.05, 3.0), (3.0, 8.0), (1.0, 0.0)])
def test_float32_sums_are_those_of_float64(components: int, gap: float, spread: float) -> None:
    law = laws(components, components, gap=gap, spread=spread)
    log_weights = torch.linspace(-1.0, 1.0, components).log_softmax(-1)
    tokens = drawn(law[:, 0], 1)
    found = step_scores(law, log_weights, tokens)
    assert_close(found, step_scores(law.double(), log_weights, tokens))
    # The information is singular along the root of the weights, to float64: no direction is made up.
    np.testing.assert_allclose(found.information @ log_weights.double().div(2).exp().numpy(), 0.0, atol=1e-12)


def test_zeros_weights_of_zero_and_steps_after_the_end() -> None:
    law = laws(7, 3)
    law[0, 0, :4000], law[1, :, 10:5000], law[2, 1, 3:] = -math.inf, -math.inf, -math.inf
    law = law.log_softmax(-1)
    weights = torch.tensor([[0.5, 0.0, 0.5], [0.2, 0.3, 0.5], [0.4, 0.6, 0.0], [1.0, 0.0, 0.0], [0.1, 0.8, 0.1]])
    tokens = torch.tensor([4001, 11, 2, 100, -1])  # the second is impossible
    law[4], weights[4] = math.nan, 7.0
    found = step_scores(law, weights.log(), tokens)
    assert found.impossible.tolist() == [False, True, False, False, False]
    assert found.mask.tolist() == [True, False, True, True, False]
    assert_close(found, step_scores(law.double(), weights.log(), tokens))
    axes = step_scores(law.reshape(5, 1, *law.shape[1:]), weights.log()[:, None], tokens[:, None])
    for entry in fields(StepScores):
        np.testing.assert_array_equal(getattr(axes, entry.name)[:, 0], getattr(found, entry.name))


def test_ties_go_by_id() -> None:
    law = torch.full((4, 2, LONG), -math.log(LONG))
    law[:, 1, : LONG // 2], law[:, 1, LONG // 2 :] = math.log(1.5 / LONG), math.log(0.5 / LONG)
    tokens = torch.tensor([0, 5, LONG // 2, LONG - 1])
    exact = step_scores(law.double(), torch.tensor([0.5, 0.5]).log(), tokens)
    assert_close(step_scores(law, torch.tensor([0.5, 0.5]).log(), tokens), exact)


@pytest.mark.parametrize("gap", [0.0, 1e-7, 1e-5, 1e-3])
def test_components_too_close_for_float32_are_left_to_float64(gap: float, monkeypatch: pytest.MonkeyPatch) -> None:
    law, log_weights = laws(3, 2, gap=gap), torch.tensor([0.5, 0.5]).log()
    tokens = drawn(law[:, 0], 2)
    exact = step_scores(law.double(), log_weights, tokens)
    assert_close(step_scores(law, log_weights, tokens), exact, 0.0)
    if 0 < gap < 1e-4:  # without that, rounding passes for information
        monkeypatch.setattr(long_steps, "_CLOSE", -math.inf)
        made_up = step_scores(law, log_weights, tokens).information
        assert not np.allclose(made_up, exact.information, rtol=1e-4, atol=0.0)


@pytest.mark.parametrize("bad", [0.01, math.nan])
def test_rows_that_are_no_laws_are_refused(bad: float) -> None:
    law = laws(4, 2)
    law[3, 1] += bad
    with pytest.raises(ValueError, match="component_log_probs must be normalised"):
        step_scores(law, torch.tensor([0.5, 0.5]).log(), torch.zeros(5, dtype=torch.int64))


def test_the_portfolio_passes_fair_draws_and_finds_wrong_weights() -> None:
    law = laws(5, 2, steps=400)
    log_weights = torch.tensor([0.5, 0.5]).log()
    wrong = torch.tensor([0.9, 0.1]).log()
    for weights, rejected in ((log_weights, False), (wrong, True)):
        tokens = drawn(torch.logsumexp(law + weights[:, None], 1), 3)
        steps = step_scores(law[None], log_weights, tokens[None])
        assert martingale_portfolio(steps, np.random.default_rng(0), level=1e-6).rejected is rejected
