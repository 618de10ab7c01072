from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.spatial.distance import jensenshannon
from scipy.stats import chisquare, entropy
from torch import Tensor

from me_stats import divergence
from me_stats.divergence import (
    chi_square_divergence,
    escaped_mass,
    hellinger_distance,
    js_divergence,
    kl_divergence,
    tv_distance,
)

ALL = [tv_distance, kl_divergence, chi_square_divergence, hellinger_distance, js_divergence, escaped_mass]
SYMMETRIC = [tv_distance, hellinger_distance, js_divergence]
INF = math.inf
Divergence = Callable[..., Tensor | float]


def dirichlet(seed: int, *shape: int, alpha: float = 1.0) -> Tensor:
    gamma = np.random.default_rng(seed).gamma(alpha, size=shape)
    return torch.from_numpy(gamma / gamma.sum(-1, keepdims=True)).log()


@st.composite
def law_pairs(draw: st.DrawFn) -> tuple[Tensor, Tensor]:
    """Two laws on the same symbols, with zeros, near-zeros and ties; the second may be the first."""
    size = draw(st.integers(1, 8))
    weight = st.one_of(st.just(0.0), st.just(1.0), st.floats(1e-12, 1.0), st.floats(0.1, 1.0))
    rows = []
    for _ in range(2):
        raw = draw(st.lists(weight, min_size=size, max_size=size).filter(lambda row: sum(row) > 1e-6))
        rows.append(torch.tensor(raw, dtype=torch.float64))
    log_p, log_q = ((row / row.sum()).log() for row in rows)
    return log_p, log_p.clone() if draw(st.booleans()) and draw(st.booleans()) else log_q


# --- oracles ---------------------------------------------------------------------------------------------


def test_against_scipy_and_the_formulas() -> None:
    log_p, log_q = dirichlet(1, 20, 30, alpha=0.3), dirichlet(2, 20, 30, alpha=0.3)
    p, q = log_p.exp().numpy(), log_q.exp().numpy()
    expected = {
        tv_distance: np.abs(p - q).sum(-1) / 2,
        kl_divergence: entropy(p, q, axis=-1),
        # Pearson's statistic of the "counts" p against the expected counts q is the divergence itself.
        chi_square_divergence: chisquare(p, q, axis=-1).statistic,
        hellinger_distance: np.sqrt(((np.sqrt(p) - np.sqrt(q)) ** 2).sum(-1) / 2),
        js_divergence: jensenshannon(p, q, axis=-1) ** 2,
        escaped_mass: np.zeros(20),
    }
    for function, values in expected.items():
        result = function(log_p, log_q)
        assert isinstance(result, Tensor)
        assert result.dtype == torch.float64
        np.testing.assert_allclose(result.numpy(), values, rtol=1e-9, atol=1e-14)


def test_closed_forms_on_two_symbols() -> None:
    log_p, log_q = torch.tensor([[0.9, 0.1], [0.4, 0.6]], dtype=torch.float64).log()
    assert tv_distance(log_p, log_q) == pytest.approx(0.5, rel=1e-14)
    assert kl_divergence(log_p, log_q) == pytest.approx(0.9 * math.log(9 / 4) + 0.1 * math.log(1 / 6), rel=1e-14)
    assert chi_square_divergence(log_p, log_q) == pytest.approx(0.25 / 0.4 + 0.25 / 0.6, rel=1e-14)
    assert hellinger_distance(log_p, log_q) == pytest.approx(math.sqrt(1 - math.sqrt(0.36) - math.sqrt(0.06)))


@pytest.mark.parametrize("seed", range(5))
def test_wrong_weights_move_a_pair_by_their_gap_times_the_component_gap(seed: int) -> None:
    """TV(P_λ, P_λ') = |λ − λ'| TV(P_1, P_2): the planted bug λ + .05 is seen exactly."""
    components = dirichlet(seed, 2, 50)
    weight = np.random.default_rng(seed).uniform(0.0, 0.95)

    def mixture(first: float) -> Tensor:
        return torch.logsumexp(components + torch.tensor([[first], [1 - first]], dtype=torch.float64).log(), 0)

    gap = tv_distance(mixture(weight), mixture(weight + 0.05))
    assert gap == pytest.approx(0.05 * tv_distance(components[0], components[1]), rel=1e-9)
    assert gap > 0.01


def test_disjoint_and_identical_laws() -> None:
    log_p, log_q = torch.tensor([0.0, -INF, -INF]), torch.tensor([-INF, -0.6931472, -0.6931472])
    assert [f(log_p, log_q) for f in ALL] == pytest.approx([1.0, INF, INF, 1.0, math.log(2), 1.0], abs=1e-7)
    assert [f(log_p, log_p) for f in ALL] == [0.0] * 6
    assert [f(log_q, log_q) for f in ALL] == [0.0] * 6


# --- zeros, infinities, rounding -----------------------------------------------------------------------------


def test_mass_outside_the_support_is_a_flagged_infinity_per_row() -> None:
    log_p = torch.tensor([[0.5, 0.5, 0.0], [0.5, 0.4, 0.1], [0.0, 0.5, 0.5]]).double().log()
    log_q = torch.tensor([[0.5, 0.3, 0.2], [0.5, 0.5, 0.0], [0.0, 0.5, 0.5]]).double().log()
    for function in (kl_divergence, chi_square_divergence):
        values = function(log_p, log_q).tolist()
        assert [math.isinf(value) for value in values] == [False, True, False]
        assert values[2] == 0.0
    np.testing.assert_allclose(escaped_mass(log_p, log_q), [0.0, 0.1, 0.0], atol=1e-15)


@pytest.mark.parametrize(
    ("tail_p", "tail_q", "kl", "chi_square"),
    [
        (-800.0, -INF, INF, INF),  # exp(-800) is 0 in float64, but p still escapes the support of q
        (-INF, -800.0, 0.0, 0.0),
        (-800.0, -900.0, 0.0, 0.0),
        (-900.0, -800.0, 0.0, 0.0),
        (-400.0, -800.0, 0.0, 1.0),
        (-5000.0, -2.0, None, None),
    ],
)
def test_probabilities_that_underflow_never_give_nan(
    tail_p: float, tail_q: float, kl: float | None, chi_square: float | None
) -> None:
    log_p, log_q = ([tail, math.log1p(-math.exp(tail))] for tail in (tail_p, tail_q))
    values = [f(log_p, log_q) for f in ALL]
    assert not any(math.isnan(value) for value in values)
    if kl is not None:
        assert values[1:3] == pytest.approx([kl, chi_square], abs=1e-12)


def test_float32_rounding_does_not_make_kl_negative_or_first_order() -> None:
    exact = dirichlet(3, 50, 1000)
    rounded = exact.float()
    assert (kl_divergence(rounded, exact) >= 0).all()
    # Second order in the 1e-7 of float32, where Σ p log p/q alone would show about 1e-8.
    assert kl_divergence(rounded, exact).max() < 1e-12
    assert tv_distance(rounded, exact).max() < 1e-6


# --- long float32 laws ---------------------------------------------------------------------------------------


def long_pair(seed: int, gap: float, *, spread: float = 3.0, size: int = 20_001) -> tuple[Tensor, Tensor]:
    """Float32 log-probabilities (4, V) of laws whose log-ratio has scale `gap`."""
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(4, size, generator=generator, dtype=torch.float64) * spread
    moved = logits + gap * torch.randn(4, size, generator=generator, dtype=torch.float64)
    return logits.log_softmax(-1).float(), moved.log_softmax(-1).float()


def extended(log_p: Tensor, log_q: Tensor) -> tuple[np.ndarray, np.ndarray]:
    """TV and KL from 64-bit mantissas, KL without cancellation: Σ p (r + expm1(−r))."""
    one, other = log_p.numpy().astype(np.longdouble), log_q.numpy().astype(np.longdouble)
    ratio = one - other
    series = ratio**2 / 2 - ratio**3 / 6 + ratio**4 / 24
    gap = np.where(np.abs(ratio) < 1e-4, series, ratio + np.expm1(-ratio))
    tv, kl = np.abs(np.exp(one) - np.exp(other)).sum(-1) / 2, (np.exp(one) * gap).sum(-1)
    return tv.astype(np.float64), kl.astype(np.float64)


@pytest.mark.parametrize("gap", [1e-6, 1e-4, 1e-2, 0.1, 0.3, 1.0, 3.0])
@pytest.mark.parametrize("spread", [0.0, 1.0, 3.0, 8.0])
def test_long_float32_laws_lose_nothing_that_their_rounding_left(gap: float, spread: float) -> None:
    log_p, log_q = long_pair(1, gap, spread=spread)
    tv, kl = extended(log_p, log_q)
    size = float((-log_p[log_p.exp() > 0] * log_p[log_p.exp() > 0].exp()).sum()) / 4  # E |log p|
    bound = 2.0**-23 * (size + 2)  # what rounding log p to float32 may have moved already
    np.testing.assert_allclose(tv_distance(log_p, log_q), tv, rtol=1e-9 if tv.max() < 5e-3 else 0.0, atol=bound)
    found = kl_divergence(log_p, log_q)
    if kl.max() < 5e-3:  # second order: all digits, down to gaps of one unit in the last place
        np.testing.assert_allclose(found, kl, rtol=1e-6, atol=1e-15)
    np.testing.assert_allclose(found, kl, rtol=0.0, atol=bound * (1 + 2 * math.sqrt(kl.max()) + kl.max()))
    assert np.asarray(found).min() >= 0


def test_close_laws_need_the_second_look(monkeypatch: pytest.MonkeyPatch) -> None:
    log_p, log_q = long_pair(2, 1e-6)
    kl = extended(log_p, log_q)[1]
    monkeypatch.setattr(divergence, "FLOOR", -INF)
    assert (np.abs(np.asarray(kl_divergence(log_p, log_q)) - kl) > 100 * kl).any()


def test_long_float32_laws_keep_their_infinities() -> None:
    log_p, log_q = long_pair(3, 1.0)
    log_p[0, :9000], log_q[1, 100:10_000] = -INF, -INF  # q may be larger, p escapes
    log_p[2, 5:], log_q[2, :5], log_q[2, 6:] = -INF, -INF, -INF  # disjoint
    log_p, log_q = log_p.log_softmax(-1), log_q.log_softmax(-1)
    tv, kl = tv_distance(log_p, log_q), kl_divergence(log_p, log_q)
    assert torch.equal(kl.isinf(), torch.tensor([False, True, True, False]))
    np.testing.assert_allclose(kl, kl_divergence(log_p.double(), log_q.double()), rtol=1e-5)
    np.testing.assert_allclose(tv, tv_distance(log_p.double(), log_q.double()), atol=1e-6)
    assert tv[2] == pytest.approx(1.0, abs=1e-6)
    assert tv_distance(log_p, log_p).tolist() == kl_divergence(log_q, log_q).tolist() == [0.0] * 4


@pytest.mark.parametrize("function", [tv_distance, kl_divergence])
def test_a_row_does_not_depend_on_the_rows_beside_it(function: Divergence, monkeypatch: pytest.MonkeyPatch) -> None:
    log_p, log_q = long_pair(4, 0.5)
    log_q[1] = log_p[1]
    whole = function(log_p, log_q)
    monkeypatch.setattr(divergence, "FLOAT32_BLOCK", 1)
    assert torch.equal(function(log_p, log_q), whole)
    assert torch.equal(function(log_p[1:3], log_q[1:3]), whole[1:3])
    assert torch.equal(function(log_p.T, log_q.T, axis=0), whole)
    assert whole[1] == 0.0


@pytest.mark.parametrize("function", [tv_distance, kl_divergence])
def test_long_float32_rows_that_are_no_laws_are_refused(function: Divergence) -> None:
    log_p, log_q = long_pair(5, 1.0)
    for bad in (log_q + 0.01, log_q.index_fill(1, torch.tensor([7]), math.nan)):
        with pytest.raises(ValueError, match="log_q is not a law"):
            function(log_p, bad)


# --- properties ------------------------------------------------------------------------------------------------


@given(law_pairs())
def test_ranges_and_inequalities(pair: tuple[Tensor, Tensor]) -> None:
    log_p, log_q = pair
    tv, kl, chi_square, hellinger, js, escaped = (f(log_p, log_q) for f in ALL)
    slack = 1e-9
    assert 0 <= tv <= 1
    assert 0 <= hellinger <= 1
    assert 0 <= js <= math.log(2)
    assert kl >= 0
    assert 0 <= escaped <= tv + slack
    assert math.isinf(kl) == math.isinf(chi_square) == bool(((log_p > -INF) & (log_q == -INF)).any())
    assert tv <= math.sqrt(kl / 2) + slack  # Pinsker
    assert tv <= math.sqrt(-math.expm1(-kl)) + slack  # Bretagnolle–Huber
    assert hellinger**2 <= tv + slack
    assert tv <= math.sqrt(2) * hellinger + slack
    assert 4 * tv**2 <= chi_square + slack
    assert kl <= math.log1p(chi_square) + slack
    assert js <= math.log(2) * tv + slack


@given(law_pairs())
def test_symmetry_and_relabelling(pair: tuple[Tensor, Tensor]) -> None:
    log_p, log_q = pair
    for function in SYMMETRIC:
        assert function(log_p, log_q) == pytest.approx(function(log_q, log_p), rel=1e-12, abs=1e-15)
    order = torch.from_numpy(np.random.default_rng(0).permutation(len(log_p)))
    for function in ALL:
        assert function(log_p[order], log_q[order]) == pytest.approx(function(log_p, log_q), rel=1e-9, abs=1e-15)


@given(law_pairs())
def test_merging_symbols_never_increases_a_divergence(pair: tuple[Tensor, Tensor]) -> None:
    def merged(log_law: Tensor) -> Tensor:
        return torch.cat([log_law[:2].logsumexp(0, keepdim=True), log_law[2:]])

    for function in ALL:
        fine, coarse = function(*pair), function(*map(merged, pair))
        # Escaped mass is not a divergence of the merged laws where only one of the two symbols is excluded.
        assert coarse <= fine * (1 + 1e-9) + 1e-9


@pytest.mark.parametrize("function", ALL)
@pytest.mark.parametrize("axis", [-1, 2, 1, 0, -3])
def test_axis_equals_a_loop(function: Divergence, axis: int) -> None:
    log_p, log_q = (dirichlet(seed, 3, 4, 5).movedim(-1, axis) for seed in (5, 6))
    result = function(log_p, log_q, axis=axis)
    rows_p, rows_q = (x.movedim(axis, -1).reshape(-1, 5) for x in (log_p, log_q))
    expected = [function(a, b) for a, b in zip(rows_p, rows_q, strict=True)]
    assert all(type(value) is float for value in expected)
    np.testing.assert_allclose(result.flatten(), expected, rtol=1e-12)
    assert result.shape == log_p.movedim(axis, -1).shape[:-1]


@pytest.mark.parametrize("function", ALL)
def test_blocks_do_not_change_the_answer_and_stay_small(function: Divergence, monkeypatch: pytest.MonkeyPatch) -> None:
    log_p, log_q = dirichlet(7, 11, 40).float(), dirichlet(8, 11, 40).float()
    whole = function(log_p, log_q)
    monkeypatch.setattr(divergence, "CPU_BLOCK", 100)
    largest = []
    check = divergence._check_law
    monkeypatch.setattr(divergence, "_check_law", lambda n, t, d: (largest.append(40 * len(t)), check(n, t, d))[1])
    np.testing.assert_allclose(function(log_p, log_q), whole, rtol=1e-12)
    assert max(largest) <= 100
    # A row longer than a block is still done, alone.
    monkeypatch.setattr(divergence, "CPU_BLOCK", 1)
    np.testing.assert_allclose(function(log_p, log_q), whole, rtol=1e-12)


# --- inputs ----------------------------------------------------------------------------------------------------


def test_every_input_type_gives_the_same_value() -> None:
    log_p, log_q = [math.log(0.75), math.log(0.25)], [math.log(0.5)] * 2
    frozen = np.array(log_p)
    frozen.flags.writeable = False
    tensor = torch.tensor(log_p, dtype=torch.float64)
    for p in (log_p, tuple(log_p), np.array(log_p), frozen, np.array(log_p[::-1])[::-1], tensor):
        assert tv_distance(p, log_q) == pytest.approx(0.25, rel=1e-14)
    assert tv_distance(tensor.requires_grad_(), log_q) == pytest.approx(0.25)
    assert tv_distance([0], [0]) == 0.0


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_uniform_laws_of_a_large_vocabulary_pass_in_every_dtype(dtype: torch.dtype) -> None:
    log_p = torch.randn(2, 262_144, generator=torch.Generator().manual_seed(0)).mul(3).log_softmax(-1).to(dtype)
    uniform = torch.full_like(log_p, -math.log(262_144))
    assert tv_distance(log_p, uniform).min() > 0.5
    assert tv_distance(uniform, uniform).tolist() == [0.0, 0.0]


def test_inputs_are_left_alone() -> None:
    log_p, log_q = dirichlet(9, 2, 6)
    before = log_p.clone(), log_q.clone()
    for function in ALL:
        function(log_p, log_q)
    assert torch.equal(log_p, before[0])
    assert torch.equal(log_q, before[1])


def test_no_rows_give_no_values() -> None:
    assert tv_distance(torch.empty(0, 3), torch.empty(0, 3)).shape == (0,)


@pytest.mark.parametrize(
    ("log_p", "log_q", "message"),
    [
        (torch.zeros(2, 1), torch.zeros(3, 1), r"log_p has shape \(2, 1\) and log_q \(3, 1\)"),
        (torch.tensor([0.0, math.nan]), torch.tensor([0.0, -INF]), "log_p is not a law: it contains NaN"),
        (torch.tensor([0.0, -INF]), torch.tensor([0.0, math.nan]), "log_q is not a law: it contains NaN"),
        (torch.tensor([1.0, 2.0]).log_softmax(0), torch.tensor([1.0, 2.0]), "log_q is not a law.*log_softmax"),
        (torch.tensor([0.75, 0.25]), torch.tensor([0.0, -INF]), "log_p is not a law"),
        (torch.tensor([-INF, -INF]), torch.tensor([0.0, -INF]), "log_p is not a law: a row.* 1 away"),
        (torch.tensor([[0.0, -INF], [INF, 0.0]]), torch.tensor([[0.0, -INF]] * 2), "log_p is not a law"),
        (torch.tensor(0.0), torch.tensor(0.0), "axis -1 does not exist"),
        (torch.empty(2, 0), torch.empty(2, 0), "no symbols"),
    ],
)
@pytest.mark.parametrize("function", ALL)
def test_bad_input_names_the_argument(function: Divergence, log_p: Tensor, log_q: Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        function(log_p, log_q)


@pytest.mark.parametrize("bad", [torch.tensor([0, 0]), torch.tensor([0j]), ["a", "b"], np.array([True])])
def test_types_that_hold_no_log_probabilities(bad: object) -> None:
    with pytest.raises(TypeError, match="log_p must hold real"):
        tv_distance(bad, torch.zeros(1))  # type: ignore[arg-type]


def test_check_can_be_switched_off() -> None:
    assert tv_distance(torch.tensor([-1.0]), torch.tensor([0.0]), check=False) == pytest.approx(0.316, abs=1e-3)
