"""Laws over 262,144 tokens against reading them once: 1 is memory bandwidth."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor

from me_stats.divergence import kl_divergence, tv_distance
from me_stats.draws import inverse_cdf
from me_stats.martingale import martingale_portfolio
from me_stats.steps import concatenate_rows, step_scores

V, PREFIXES = 262_144, 64


@pytest.fixture(scope="module")
def laws() -> Tensor:
    """Two laws at each prefix (N, 2, V)."""
    generator = torch.Generator().manual_seed(0)
    return torch.randn(PREFIXES, 2, V, generator=generator).mul_(3).log_softmax(-1)


@pytest.fixture
def read(laws: Tensor) -> Callable[[], object]:
    """Adding up all laws, which is as fast as memory gives them."""
    return lambda: laws.sum(-1)


def test_tv_over_reading(ratio: Callable[..., float], laws: Tensor, read: Callable[[], object]) -> None:
    assert ratio(lambda: tv_distance(laws[:, 0], laws[:, 1]), read) > 1


def test_kl_over_reading(ratio: Callable[..., float], laws: Tensor, read: Callable[[], object]) -> None:
    assert ratio(lambda: kl_divergence(laws[:, 0], laws[:, 1]), read) > 1


def test_kl_of_close_laws_over_reading(ratio: Callable[..., float], laws: Tensor, read: Callable[[], object]) -> None:
    close = laws.clone()
    close[:, 1] = close[:, 0] * (1 + 1e-7)
    assert ratio(lambda: kl_divergence(close[:, 0], close[:, 1]), read, rounds=5) > 1


def test_portfolio_over_reading(ratio: Callable[..., float], laws: Tensor, read: Callable[[], object]) -> None:
    log_weights = torch.tensor([0.5, 0.5]).log()
    tokens = torch.multinomial(laws[:, 0].exp(), 1, generator=torch.Generator().manual_seed(1))[:, 0]

    def portfolio() -> object:
        steps = concatenate_rows([step_scores(laws[None], log_weights, tokens[None])])
        return martingale_portfolio(steps, np.random.default_rng(0))

    assert ratio(portfolio, read, rounds=5) > 1


def test_inverse_cdf_over_reading(ratio: Callable[..., float], laws: Tensor) -> None:
    first = laws[:, 0].contiguous()
    uniforms = torch.rand(len(first), dtype=torch.float64)
    assert ratio(lambda: inverse_cdf(first, uniforms), lambda: first.sum(-1)) > 1


def test_inverse_cdf_over_multinomial(ratio: Callable[..., float], laws: Tensor) -> None:
    first = laws[:, 0].contiguous()
    uniforms = torch.rand(len(first), dtype=torch.float64)
    assert ratio(lambda: inverse_cdf(first, uniforms), lambda: torch.multinomial(first.exp(), 1), rounds=5) > 0
