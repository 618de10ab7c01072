from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from torch import Tensor
from transformers import MinPLogitsWarper, TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from me_stats.models import Greedy, MinP, TableModel, Temperature, TopK, TopP, Warp, Warped
from tests.strategies import LAW_KINDS, law_rows, seeds, warps

dtypes = st.sampled_from([torch.float32, torch.float64])
sizes = st.sampled_from([1, 2, 3, 10, 100, 1000])


def law(*probs: float) -> Tensor:
    return torch.tensor([probs], dtype=torch.float64).log()


def warped(warp: Warp, *probs: float) -> list[float]:
    return warp(law(*probs)).exp()[0].tolist()


def random_laws(size: int, seed: int, dtype: torch.dtype, rows: int = 4) -> Tensor:
    """Tie-free laws, as a network gives them."""
    rng = np.random.Generator(np.random.Philox(seed))
    laws = torch.from_numpy(rng.normal(scale=3, size=(rows, size))).to(dtype).log_softmax(-1)
    assume(all(len(row.unique()) == size for row in laws))
    return laws


def assert_same_law(mine: Tensor, theirs: Tensor) -> None:
    assert torch.equal(mine == -torch.inf, theirs == -torch.inf)
    torch.testing.assert_close(mine.exp(), theirs.log_softmax(-1).exp(), rtol=0, atol=1e-6)
    assert mine.dtype == theirs.dtype


# --- the same laws as transformers, on laws without ties -----------------------------------------------


@given(sizes, seeds, dtypes, st.sampled_from([0.1, 0.5, 0.7, 1.0, 1.3, 5.0]))
def test_temperature_is_that_of_transformers(size: int, seed: int, dtype: torch.dtype, tau: float) -> None:
    laws = random_laws(size, seed, dtype)
    assert_same_law(Temperature(tau)(laws), TemperatureLogitsWarper(tau)(None, laws))


@given(sizes, seeds, dtypes, st.sampled_from([1, 2, 5, 50, 2000]))
def test_top_k_is_that_of_transformers(size: int, seed: int, dtype: torch.dtype, k: int) -> None:
    laws = random_laws(size, seed, dtype)
    assert_same_law(TopK(k)(laws), TopKLogitsWarper(k)(None, laws))


@given(sizes, seeds, dtypes, st.sampled_from([0.05, 0.3, 0.5, 0.9, 0.95, 0.99]))
def test_top_p_is_that_of_transformers(size: int, seed: int, dtype: torch.dtype, p: float) -> None:
    laws = random_laws(size, seed, dtype)
    # Transformers adds up in the laws' own precision; at an edge of the nucleus the sums may fall either way.
    gaps = laws.double().softmax(-1).sort(-1).values.cumsum(-1) - (1 - p)
    assume(bool((gaps.abs() > 1e-5).all()))
    assert_same_law(TopP(p)(laws), TopPLogitsWarper(p)(None, laws))


@given(sizes, seeds, dtypes, st.sampled_from([0.01, 0.1, 0.5, 0.9]))
def test_min_p_is_that_of_transformers(size: int, seed: int, dtype: torch.dtype, p: float) -> None:
    laws = random_laws(size, seed, dtype)
    ratios = (laws - laws.amax(-1, keepdim=True)).double().exp()
    assume(bool(((ratios - p).abs() > 1e-5).all()))
    assert_same_law(MinP(p)(laws), MinPLogitsWarper(p)(None, laws))


# --- what is documented beyond that --------------------------------------------------------------------


@pytest.mark.parametrize(
    ("warp", "before", "after"),
    [
        (Temperature(0), (0.4, 0.4, 0.2), (0.5, 0.5, 0.0)),  # the limit τ → 0 shares mass among ties
        (Temperature(0), (0.2, 0.5, 0.3), (0.0, 1.0, 0.0)),
        (Temperature(0.5), (0.6, 0.4), (0.36 / 0.52, 0.16 / 0.52)),
        (Temperature(1), (0.6, 0.4), (0.6, 0.4)),
        (Temperature(1e300), (0.6, 0.4, 0.0), (0.5, 0.5, 0.0)),
        (Temperature(1e-300), (0.6, 0.4), (1.0, 0.0)),
        (Greedy(), (0.4, 0.4, 0.2), (1.0, 0.0, 0.0)),  # an arg max names the first of ties
        (Greedy(), (0.2, 0.4, 0.4), (0.0, 1.0, 0.0)),
        (TopK(1), (0.5, 0.25, 0.25), (1.0, 0.0, 0.0)),
        (TopK(2), (0.5, 0.25, 0.25), (0.5, 0.25, 0.25)),  # ties with the k-th stay
        (TopK(1), (0.25, 0.25, 0.5), (0.0, 0.0, 1.0)),
        (TopK(3), (0.5, 0.5, 0.0, 0.0), (0.5, 0.5, 0.0, 0.0)),
        (TopK(9), (0.5, 0.3, 0.2), (0.5, 0.3, 0.2)),  # k ≥ V
        (TopP(0.5), (0.5, 0.25, 0.25), (1.0, 0.0, 0.0)),
        (TopP(0.6), (0.5, 0.25, 0.25), (0.5, 0.25, 0.25)),  # ties with the last one stay
        (TopP(1e-30), (0.2, 0.5, 0.3), (0.0, 1.0, 0.0)),
        (TopP(1), (0.5, 0.5, 0.0), (0.5, 0.5, 0.0)),
        (MinP(1), (0.4, 0.4, 0.2), (0.5, 0.5, 0.0)),
        (MinP(0.5), (0.5, 0.25, 0.125, 0.125), (2 / 3, 1 / 3, 0.0, 0.0)),  # at least, not above
        (MinP(0), (0.5, 0.5, 0.0), (0.5, 0.5, 0.0)),
    ],
)
def test_edges_are_as_documented(warp: Warp, before: tuple[float, ...], after: tuple[float, ...]) -> None:
    assert warped(warp, *before) == pytest.approx(after, abs=1e-12)


@given(warps, st.sampled_from(LAW_KINDS), st.integers(1, 9), seeds, dtypes)
def test_every_warp_gives_laws_and_revives_no_token(
    warp: Warp, kind: str, size: int, seed: int, dtype: torch.dtype
) -> None:
    laws = torch.from_numpy(law_rows(kind, 5, size, seed)).to(dtype).log()
    before = laws.clone()
    after = warp(laws)
    assert torch.equal(laws, before)
    assert after.dtype == dtype
    assert torch.allclose(after.logsumexp(-1), torch.zeros(5, dtype=dtype), atol=1e-5)
    assert bool((after[laws == -torch.inf] == -torch.inf).all())


@given(warps, st.sampled_from(LAW_KINDS), st.integers(1, 9), seeds, dtypes)
def test_one_token_has_its_place_in_the_law(warp: Warp, kind: str, size: int, seed: int, dtype: torch.dtype) -> None:
    laws = torch.from_numpy(law_rows(kind, 1, size, seed)).to(dtype).log().expand(size, -1)
    before, tokens = laws.clone(), torch.arange(size)
    torch.testing.assert_close(warp.at(laws, tokens), warp(laws).diagonal(), rtol=1e-5, atol=1e-5)
    assert torch.equal(laws, before)


@given(warps, st.sampled_from(LAW_KINDS), st.integers(1, 9), seeds, dtypes)
def test_token_numbers_do_not_matter(warp: Warp, kind: str, size: int, seed: int, dtype: torch.dtype) -> None:
    assume(not isinstance(warp, Greedy))  # which names the first of ties on purpose
    laws = torch.from_numpy(law_rows(kind, 5, size, seed)).to(dtype).log()
    order = torch.from_numpy(np.random.Generator(np.random.Philox(seed)).permutation(size))
    there, back = warp(laws[:, order]), warp(laws)[:, order]
    assert torch.equal(there == -torch.inf, back == -torch.inf)
    torch.testing.assert_close(there.exp(), back.exp(), rtol=0, atol=1e-6)


@given(
    st.one_of(st.integers(1, 6).map(TopK), st.just(Temperature(0)), st.just(Greedy())),
    st.sampled_from(LAW_KINDS),
    st.integers(1, 9),
    seeds,
)
def test_top_k_and_the_two_arg_maxes_are_idempotent(warp: Warp, kind: str, size: int, seed: int) -> None:
    once = warp(torch.from_numpy(law_rows(kind, 5, size, seed)).log())
    assert torch.equal(warp(once) == -torch.inf, once == -torch.inf)
    torch.testing.assert_close(warp(once).exp(), once.exp(), rtol=0, atol=1e-12)


@given(st.sampled_from([0.01, 0.1, 0.3, 0.7]), st.integers(1, 9), seeds)
def test_min_p_is_idempotent(p: float, size: int, seed: int) -> None:
    # Ratios to the top survive renormalisation; a ratio of exactly p may not, in floating point.
    laws = random_laws(size, seed, torch.float64)
    assume(bool(((laws - laws.amax(-1, keepdim=True) - np.log(p)).abs() > 1e-9).all()))
    once = MinP(p)(laws)
    torch.testing.assert_close(MinP(p)(once).exp(), once.exp(), rtol=0, atol=1e-12)


def test_top_p_is_not_idempotent() -> None:
    # 0.4 + 0.3 reaches p = 1/2 where 0.4 does not; renormalised, 4/7 alone does.
    once = TopP(0.5)(law(0.4, 0.3, 0.2, 0.1))
    assert once.exp()[0].tolist() == pytest.approx([4 / 7, 3 / 7, 0, 0])
    assert TopP(0.5)(once).exp()[0].tolist() == pytest.approx([1, 0, 0, 0])


@given(st.sampled_from([0.3, 0.7, 2.0]), st.sampled_from([0.5, 1.5]), seeds)
def test_temperatures_multiply(first: float, second: float, seed: int) -> None:
    laws = random_laws(10, seed, torch.float64)
    twice = Temperature(second)(Temperature(first)(laws))
    torch.testing.assert_close(twice, Temperature(first * second)(laws), rtol=0, atol=1e-9)


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: Temperature(-0.1), "Temperature must be finite and at least 0, got -0.1"),
        (lambda: Temperature(float("nan")), "Temperature must be finite"),
        (lambda: Temperature(float("inf")), "Temperature must be finite"),
        (lambda: TopK(0), "TopK needs an integer k of at least 1, got 0"),
        (lambda: TopK(2.5), "TopK needs an integer k"),  # type: ignore[arg-type]
        (lambda: TopK(float("inf")), "TopK needs an integer k"),  # type: ignore[arg-type]
        (lambda: TopP(0), "TopP needs 0 < p ≤ 1, got 0"),
        (lambda: TopP(1.1), "TopP needs 0 < p ≤ 1"),
        (lambda: TopP(float("nan")), "TopP needs 0 < p ≤ 1"),
        (lambda: MinP(-0.1), "MinP needs 0 ≤ p ≤ 1"),
        (lambda: MinP(1.1), "MinP needs 0 ≤ p ≤ 1"),
    ],
)
def test_settings_out_of_range_are_refused(build: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build()  # type: ignore[operator]


# --- the model ------------------------------------------------------------------------------------------


def test_warps_apply_left_to_right() -> None:
    model = TableModel([[0.5, 0.3, 0.2]], order=0)
    cold_then_nucleus = Warped(model, Temperature(0.5), TopP(0.6)).log_probs([()]).exp()[0].tolist()
    nucleus_then_cold = Warped(model, TopP(0.6), Temperature(0.5)).log_probs([()]).exp()[0].tolist()
    assert cold_then_nucleus == pytest.approx([1, 0, 0])  # 25/38 alone reaches 0.6
    assert nucleus_then_cold == pytest.approx([25 / 34, 9 / 34, 0])  # 0.5 alone does not


def test_no_warps_change_nothing() -> None:
    model = TableModel.random(3, seed=0)
    assert torch.equal(Warped(model).log_probs([(1,)]), model.log_probs([(1,)]))


def test_what_is_no_warp_is_refused() -> None:
    with pytest.raises(TypeError, match="warps must be Warp objects such as TopK"):
        Warped(TableModel.random(3, seed=0), 5)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="warps must be Warp objects"):
        Warped(TableModel.random(3, seed=0), TopK)  # type: ignore[arg-type]


class Forgetful(Warp):
    """A transform that drops tokens and does not renormalise."""

    def __call__(self, log_probs: Tensor) -> Tensor:
        return log_probs.masked_fill(log_probs < log_probs.amax(-1, keepdim=True), -torch.inf)


def test_a_warp_that_forgets_to_renormalise_is_refused() -> None:
    # CE would mix the unnormalised law as it is, ME would draw from it renormalised: two different laws.
    model = Warped(TableModel.random(3, seed=0), Forgetful())
    for use in (
        lambda: model.log_probs([()]),
        lambda: model.session([()]).log_probs(np.array([0])),
        lambda: list(model.path_log_probs([()], [(0,)])),
    ):
        with pytest.raises(ValueError, match=r"Warped\.log_probs is not normalised"):
            use()


def test_the_name_tells_the_whole_chain() -> None:
    model = Warped(TableModel.random(3, seed=0), Temperature(0.7), TopK(5))
    assert repr(model) == "Warped(TableModel(V=3, order=1), Temperature(tau=0.7), TopK(k=5))"
