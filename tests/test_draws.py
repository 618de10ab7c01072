from __future__ import annotations

import math
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats
from torch import Tensor

from me_stats import draws
from me_stats.draws import BLOCK, PIECE, RowStreams, Stream, inverse_cdf, inverse_cdf_error
from me_stats.mixing import ConstantMixing
from me_stats.models import Ensemble, TableModel
from me_stats.samplers import CESampler, MESampler
from tests.strategies import LAW_KINDS, law_rows, seeds

ALMOST_ONE = 1 - 2**-53


@st.composite
def log_laws(draw: st.DrawFn) -> Tensor:
    """Laws (U, V) in float32 or float64, with leading, inner and trailing zeros."""
    rows, size = draw(st.integers(1, 4)), draw(st.integers(1, 9))
    law = law_rows(draw(st.sampled_from(LAW_KINDS)), rows, size, draw(seeds))
    return torch.from_numpy(law).to(draw(st.sampled_from([torch.float32, torch.float64]))).log()


def edges_of(log_law: Tensor) -> Tensor:
    return log_law.exp().cumsum(-1, dtype=torch.float64)


# --- inverse CDF -----------------------------------------------------------------------------------


@given(log_laws(), st.lists(st.floats(0, ALMOST_ONE), min_size=1, max_size=20))
def test_no_uniform_draws_an_impossible_token(log_law: Tensor, uniforms: list[float]) -> None:
    hard = [0.0, ALMOST_ONE, *edges_of(log_law).flatten().clamp(max=ALMOST_ONE).tolist(), *uniforms]
    u = torch.tensor(hard, dtype=torch.float64)
    for law in log_law:
        token = inverse_cdf(law.expand(len(u), -1), u)
        assert bool((law[token] > -torch.inf).all())


@given(log_laws(), st.lists(st.floats(0, ALMOST_ONE), min_size=1, max_size=20))
def test_it_is_the_smallest_token_whose_cdf_exceeds_u(log_law: Tensor, uniforms: list[float]) -> None:
    law = log_law[:1]
    cdf = edges_of(law)[0].numpy()
    for u in [0.0, ALMOST_ONE, *uniforms]:
        target = min(u * cdf[-1], np.nextafter(cdf[-1], 0))
        expected = next(x for x, edge in enumerate(cdf) if edge > target)
        assert int(inverse_cdf(law, torch.tensor([u], dtype=torch.float64))) == expected


@given(log_laws(), st.lists(st.floats(0, ALMOST_ONE), min_size=1, max_size=12), seeds)
def test_the_indexed_form_equals_the_row_form(log_law: Tensor, uniforms: list[float], seed: int) -> None:
    u = torch.tensor(uniforms, dtype=torch.float64)
    index = torch.from_numpy(np.random.Generator(np.random.Philox(seed)).integers(0, len(log_law), len(u)))
    assert torch.equal(inverse_cdf(log_law, u, index=index), inverse_cdf(log_law[index], u))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_intervals_are_half_open_at_exact_ties(dtype: torch.dtype) -> None:
    law = torch.tensor([[0.0, 0.25, 0.0, 0.25, 0.5, 0.0]], dtype=dtype).log()
    expected = {0.0: 1, 2**-53: 1, 0.25 - 2**-54: 1, 0.25: 3, 0.5 - 2**-53: 3, 0.5: 4, ALMOST_ONE: 4}
    u = torch.tensor(list(expected), dtype=torch.float64)
    assert inverse_cdf(law, u, index=torch.zeros(len(u), dtype=torch.long)).tolist() == list(expected.values())


@given(log_laws())
def test_its_error_bounds_what_it_really_draws(log_law: Tensor) -> None:
    for law, error in zip(log_law, inverse_cdf_error(log_law), strict=True):
        size = len(law)
        low, high = torch.zeros(size, dtype=torch.float64), torch.ones(size, dtype=torch.float64)
        for _ in range(60):  # where the drawn id first passes each token, by bisection
            middle = (low + high) / 2
            beyond = inverse_cdf(law.expand(size, -1), middle.clamp(max=ALMOST_ONE)) > torch.arange(size)
            low, high = torch.where(beyond, low, middle), torch.where(beyond, middle, high)
        widths = torch.diff(high, prepend=torch.zeros(1, dtype=torch.float64))
        assert float((widths - law.double().softmax(-1)).abs().sum()) / 2 <= float(error) + 1e-15
        assert float(error) < 1e-6


# --- long laws, searched piece by piece --------------------------------------------------------------


def long_laws(seed: int, size: int, *, holes: bool = True) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    logits = 4 * torch.randn(5, size, generator=generator)
    if holes:
        logits[1, 10:-10], logits[2, : size // 2], logits[3, PIECE - 1 :] = -torch.inf, -torch.inf, -torch.inf
        logits[4] = logits[4].masked_fill(torch.rand(size, generator=generator) < 0.9, -torch.inf)
    return logits.log_softmax(-1)


@pytest.mark.parametrize("size", [PIECE + 1, 3 * PIECE, 20_001])
def test_long_laws_are_drawn_as_by_one_sum_over_all(size: int) -> None:
    log_law = long_laws(size, size)
    cdf = edges_of(log_law)
    inner = cdf[:, :: max(1, size // 200)].reshape(-1)
    u = torch.cat([torch.rand(1000, dtype=torch.float64, generator=torch.Generator().manual_seed(1)), inner])
    u = torch.cat([u.clamp(max=ALMOST_ONE), torch.tensor([0.0, 2**-53, ALMOST_ONE])])
    index = torch.arange(len(u)) % len(cdf)
    token = inverse_cdf(log_law, u, index=index)
    assert bool((log_law[index, token] > -torch.inf).all())
    target = u * cdf[index, -1]
    low = torch.where(token > 0, cdf[index, (token - 1).clamp(min=0)], 0.0)
    slack = 2.0**-53 * size**0.5  # two orders of one sum
    assert bool(((low - slack <= target) & (target <= cdf[index, token] + slack)).all())
    clear = ((target - low > slack) & (cdf[index, token] - target > slack))[:1000]
    assert int(clear.sum()) > 990
    assert torch.equal(
        torch.searchsorted(cdf[index], target[:, None], right=True)[:1000, 0][clear], token[:1000][clear]
    )


def test_a_long_row_does_not_depend_on_the_rows_beside_it(monkeypatch: pytest.MonkeyPatch) -> None:
    log_law = long_laws(2, 20_001)
    index = torch.arange(2000) % len(log_law)
    u = torch.rand(2000, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    together = inverse_cdf(log_law, u, index=index)
    assert torch.equal(inverse_cdf(log_law[index[:50]], u[:50]), together[:50])
    monkeypatch.setattr(draws, "_SPACE", PIECE)
    assert torch.equal(inverse_cdf(log_law, u, index=index), together)


@pytest.mark.parametrize("size", [PIECE + 1, 4 * PIECE - 1])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_error_of_long_laws_bounds_what_is_really_drawn(size: int, dtype: torch.dtype) -> None:
    for law, error in zip(long_laws(4, size).to(dtype), inverse_cdf_error(long_laws(4, size).to(dtype)), strict=True):
        low, high = torch.zeros(size, dtype=torch.float64), torch.ones(size, dtype=torch.float64)
        everywhere = torch.zeros(size, dtype=torch.int64)
        for _ in range(55):
            middle = (low + high) / 2
            beyond = inverse_cdf(law[None], middle.clamp(max=ALMOST_ONE), index=everywhere) > torch.arange(size)
            low, high = torch.where(beyond, low, middle), torch.where(beyond, middle, high)
        widths = torch.diff(high, prepend=torch.zeros(1, dtype=torch.float64))
        assert float((widths - law.double().softmax(-1)).abs().sum()) / 2 <= float(error) + 1e-15
        assert float(error) < 1e-6


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_long_laws_that_cannot_be_drawn_from_are_refused(bad: float) -> None:
    log_law = long_laws(5, 2000)
    log_law[3, 700] = bad
    with pytest.raises(ValueError, match="has a NaN or no token with positive probability"):
        inverse_cdf(log_law, torch.zeros(5, dtype=torch.float64))
    with pytest.raises(ValueError, match="has a NaN or no token with positive probability"):
        inverse_cdf(torch.full((1, 2000), -math.inf), torch.zeros(1, dtype=torch.float64))


def test_a_law_of_the_smallest_float_is_still_drawn_from_its_support() -> None:
    # Here u · total rounds up to the total, and the search would run past the last token.
    law = torch.tensor([[-np.inf, -744.0, -np.inf]], dtype=torch.float64)
    assert 0 < float(law.exp().sum()) < 1e-322
    u = torch.tensor([0.0, ALMOST_ONE], dtype=torch.float64)
    assert inverse_cdf(law.expand(2, -1), u).tolist() == [1, 1]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an accelerator, whose scans round differently")
@given(log_laws(), seeds)
def test_an_accelerator_draws_the_same_tokens(log_law: Tensor, seed: int) -> None:
    rng = np.random.Generator(np.random.Philox(seed))
    edges = edges_of(log_law).flatten().clamp(max=ALMOST_ONE)
    u = torch.cat([torch.from_numpy(rng.random(500)), edges, torch.tensor([0.0, ALMOST_ONE])])
    index = torch.from_numpy(rng.integers(0, len(log_law), len(u)))
    there = inverse_cdf(log_law.cuda(), u.cuda(), index=index.cuda()).cpu()
    assert bool((log_law[index, there] > -torch.inf).all())
    assert torch.equal(there[:500], inverse_cdf(log_law, u[:500], index=index[:500]))


@pytest.mark.parametrize("law", [[float("nan"), 0.5], [0.0, 0.0]])
def test_laws_that_cannot_be_drawn_from_are_refused(law: list[float]) -> None:
    with pytest.raises(ValueError, match="has a NaN or no token with positive probability"):
        inverse_cdf(torch.tensor([[0.5, 0.5], law]).log(), torch.tensor([0.1, 0.1], dtype=torch.float64))


# --- the whole draw against exact laws, and planted bugs ---------------------------------------------


def drawn_law(inverse: object, law: list[Fraction], points: int) -> list[Fraction]:
    """The law that `inverse` realises on the lattice u = j/points, exact where `law` is a multiple of 1/points."""
    u = torch.arange(points, dtype=torch.float64) / points
    log_law = torch.tensor([[float(p) for p in law]], dtype=torch.float64).log()
    token = inverse(log_law, u, index=torch.zeros(points, dtype=torch.long))  # type: ignore[operator]
    return [Fraction(count, points) for count in np.bincount(token, minlength=len(law)).tolist()]


def closed_on_the_wrong_side(log_law: Tensor, u: Tensor, *, index: Tensor) -> Tensor:
    """Planted bug: the smallest x with cdf >= u, one comparison sign away."""
    return torch.searchsorted(edges_of(log_law)[0], u, right=False)


def beyond_by_one(log_law: Tensor, u: Tensor, *, index: Tensor) -> Tensor:
    """Planted bug: the token after the right one."""
    return (inverse_cdf(log_law, u, index=index) + 1).clamp(max=log_law.shape[1] - 1)


# Masses 1/4, 1/2 and 1, whose logarithms lose nothing on the way back.
LATTICE_LAWS = [
    [Fraction(n, 4) for n in law] for law in ([0, 1, 0, 2, 1], [4, 0, 0], [0, 0, 4], [1, 1, 2], [0, 2, 0, 2, 0])
]


@pytest.mark.parametrize("law", LATTICE_LAWS)
def test_the_draw_has_the_law_exactly(law: list[Fraction]) -> None:
    assert drawn_law(inverse_cdf, law, 16) == law


@pytest.mark.parametrize("mutant", [closed_on_the_wrong_side, beyond_by_one])
def test_a_shifted_inverse_cdf_is_caught_by_the_exact_law(mutant: object) -> None:
    assert any(drawn_law(mutant, law, 16) != law for law in LATTICE_LAWS)
    # The wrong comparison also draws a token of probability zero, at u = 0.
    if mutant is closed_on_the_wrong_side:
        assert drawn_law(mutant, LATTICE_LAWS[0], 16)[0] > 0


class LatticeDraw:
    """Row r = g·i + j uses u = i/g for its component and j/g for its token: every pair once, in g² rows."""

    def __init__(self, points: int, *, one_uniform: bool = False) -> None:
        self.points, self.one_uniform = points, one_uniform

    def __call__(
        self, log_law: Tensor, rows: np.ndarray, step: int, *, stream: Stream, index: Tensor | None = None
    ) -> Tensor:
        component, token = np.divmod(rows, self.points)
        place = component if stream == "component" or self.one_uniform else token
        return inverse_cdf(log_law, torch.from_numpy(place / self.points), index=index)


class OneUniform(RowStreams):
    """Planted bug: the component and its token read the same uniform."""

    def uniforms(self, rows: np.ndarray, step: int, *, stream: Stream) -> np.ndarray:
        return super().uniforms(rows, step, stream="token")


COIN_PAIR = Ensemble(
    [TableModel([[0.5, 0.25, 0.25]], order=0), TableModel([[0.25, 0.0, 0.75]], order=0)], ConstantMixing([0.25, 0.75])
)
COIN_LAW = [0.3125, 0.0625, 0.625]


def lattice_law(draw: LatticeDraw) -> list[float]:
    trace = MESampler(COIN_PAIR).sample([()], n=64, max_new_tokens=1, draw=draw)
    return (np.bincount(trace.tokens[:, 0], minlength=3) / 64).tolist()


def test_me_with_separate_uniforms_has_the_mixture_law_exactly() -> None:
    assert lattice_law(LatticeDraw(8)) == COIN_LAW


def test_one_uniform_for_component_and_token_is_caught_by_the_exact_law() -> None:
    # u < 1/4 picks the first component, whose first half then has token 0 alone: TV 1/8 from the mixture.
    assert lattice_law(LatticeDraw(8, one_uniform=True)) == [0.25, 0.0, 0.75]


@pytest.mark.parametrize(("streams", "accepted"), [(RowStreams, True), (OneUniform, False)])
def test_one_uniform_is_caught_by_samples_too(streams: type[RowStreams], accepted: bool) -> None:
    n = 20_000
    for sampler in (MESampler(COIN_PAIR), CESampler(COIN_PAIR, latent=True)):
        trace = sampler.sample([()], n=n, max_new_tokens=1, draw=streams(11))
        counts = np.bincount(trace.tokens[:, 0], minlength=3)
        assert (stats.chisquare(counts, n * np.array(COIN_LAW)).pvalue > 1e-6) == accepted


# --- streams -----------------------------------------------------------------------------------------


def by_definition(seed: int, row: int, step: int, stream: Stream) -> float:
    key = np.array([seed % 2**64, {"component": 0, "token": 1}[stream] + (seed // 2**64) * 256], dtype=np.uint64)
    counter = np.array([4 * row, step // BLOCK, 0, 0], dtype=np.uint64)
    return float(np.random.Generator(np.random.Philox(key=key, counter=counter)).random(BLOCK)[step % BLOCK])


@given(
    st.integers(0, 2**120 - 1),
    st.integers(0, 2**62 - 1),
    st.integers(0, 500),
    st.sampled_from(["component", "token"]),
)
def test_a_uniform_is_addressed_by_seed_stream_row_and_step(seed: int, row: int, step: int, stream: Stream) -> None:
    value = RowStreams(seed).uniforms(np.array([row]), step, stream=stream)[0]
    assert value == by_definition(seed, row, step, stream)
    assert 0 <= value < 1


@given(
    seeds,
    st.lists(
        st.tuples(
            st.lists(
                st.one_of(st.integers(0, 40), st.integers(0, 10**6)), min_size=1, max_size=8
            ),  # repeats: rows that share draws
            st.integers(0, 60),
            st.sampled_from(["component", "token"]),
        ),
        max_size=8,
    ),
)
def test_what_was_asked_before_and_beside_does_not_matter(
    seed: int, asked: list[tuple[list[int], int, Stream]]
) -> None:
    streams = RowStreams(seed)
    for rows, step, stream in asked:
        values = streams.uniforms(np.array(rows), step, stream=stream)
        assert values.tolist() == [by_definition(seed, row, step, stream) for row in rows]


@given(
    seeds,
    st.lists(
        st.tuples(
            st.lists(st.tuples(st.integers(0, 40), st.integers(0, 70)), min_size=1, max_size=12),
            st.one_of(st.none(), st.integers(0, 60)),
        ),
        max_size=8,
    ),
)
def test_a_step_for_each_row(seed: int, asked: list[tuple[list[tuple[int, int]], int | None]]) -> None:
    # Rows that stand at different steps, with calls of one step for all between them; rows may repeat.
    streams = RowStreams(seed)
    for addresses, together in asked:
        rows, steps = np.array(addresses).T
        if together is not None:
            steps = np.full(len(rows), together)
        values = streams.uniforms(rows, steps if together is None else together, stream="token")
        assert values.tolist() == [by_definition(seed, *address, "token") for address in zip(rows, steps, strict=True)]
    law = torch.tensor([[0.25, 0.25, 0.5]]).log().expand(3, -1)
    rows, steps = np.array([4, 1, 4]), np.array([3, 40, 17])
    one_by_one = [streams(law[:1], rows[i : i + 1], int(steps[i]), stream="token") for i in range(3)]
    assert torch.equal(streams(law, rows, steps, stream="token"), torch.cat(one_by_one))


def test_no_rows_no_numbers() -> None:
    assert RowStreams(0).uniforms(np.array([], dtype=np.int64), 0, stream="token").shape == (0,)


def grid(seed: int, stream: Stream, rows: int = 2000, steps: int = 64) -> np.ndarray:
    streams = RowStreams(seed)
    return np.stack([streams.uniforms(np.arange(rows), step, stream=stream) for step in range(steps)], axis=1)


def test_numbers_are_uniform_and_uncorrelated() -> None:
    token, component, other_seed = grid(3, "token"), grid(3, "component"), grid(4, "token")
    limit = 5 / np.sqrt(token.size)
    for numbers in (token, component, other_seed):
        assert stats.kstest(numbers.ravel(), "uniform").pvalue > 1e-6
        # Far bits matter too: the fractional part of 2³²·u is uniform as well.
        assert stats.kstest((numbers * 2.0**32 % 1).ravel(), "uniform").pvalue > 1e-6
    pairs = {
        "streams": (token, component),
        "seeds": (token, other_seed),
        "neighbouring rows": (token[1:], token[:-1]),
        "neighbouring steps": (token[:, 1:], token[:, :-1]),
        "rows a block apart": (token[:, BLOCK:], token[:, :-BLOCK]),
    }
    for name, (a, b) in pairs.items():
        assert abs(np.corrcoef(a.ravel(), b.ravel())[0, 1]) < limit, name
        assert not (a == b).any(), name


def test_big_seeds_differ() -> None:
    big = [0, 1, 2**63, 2**64, 2**64 + 1, 2**65, 2**100, 2**120 - 1]
    first = [RowStreams(seed).uniforms(np.arange(3), 0, stream="token").tolist() for seed in big]
    first += [RowStreams(seed).uniforms(np.arange(3), 0, stream="component").tolist() for seed in big]
    assert len({tuple(numbers) for numbers in first}) == len(first)


def test_a_numpy_seed_is_the_same_seed() -> None:
    assert RowStreams(np.int64(5)).seed == 5  # type: ignore[arg-type]
    assert type(RowStreams(np.uint64(5)).seed) is int  # type: ignore[arg-type]


@pytest.mark.parametrize("seed", [-1, 2**120])
def test_seeds_out_of_range_are_refused(seed: int) -> None:
    with pytest.raises(ValueError, match="seed must lie in"):
        RowStreams(seed)


@given(seeds, st.lists(st.integers(0, 300), min_size=1, max_size=40, unique=True), st.integers(0, 5))
def test_integers_are_the_uniforms_before_scaling(seed: int, rows: list[int], block: int) -> None:
    streams, ordered = RowStreams(seed), np.sort(np.array(rows))
    integers = streams.integers(ordered, block, stream="token")
    assert integers.shape == (len(rows), BLOCK)
    for offset in (0, BLOCK - 1):
        expected = streams.uniforms(ordered, block * BLOCK + offset, stream="token")
        assert (integers[:, offset] * 2.0**-53 == expected).all()
