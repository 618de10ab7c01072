"""Shares of the component path against enumeration, and growth of variances against closed forms."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch

from me_stats.dependence import design_effect
from me_stats.draws import inverse_cdf
from me_stats.mixing import ConstantMixing
from me_stats.models import Ensemble, MarkovModel, TableModel
from me_stats.samplers import CESampler, MESampler
from me_stats.variance import (
    FrozenDraw,
    exact_split,
    markov_moments,
    pick_freeze,
    shared_variance,
    variance_growth,
)
from tests.strategies import LastTokenMixing

CHAIN = MarkovModel([0.5, 0.5], [[0.9, 0.1], [0.3, 0.7]])


def toy(eos: tuple[int, ...] = (2,)) -> Ensemble:
    components = [MarkovModel.random(3, seed=seed, concentration=0.5, eos=eos) for seed in (0, 3)]
    return Ensemble(components, ConstantMixing([0.4, 0.6]))


def rough(row: object) -> float:
    """A function of the whole continuation, neither additive nor symmetric."""
    return float(sum((i + 1) ** 1.5 * token for i, token in enumerate(row)) - len(row) ** 2)  # type: ignore[arg-type, var-annotated]


def covers(truths: float, estimates: list[tuple[float, float]]) -> int:
    return sum(low <= truths <= high for low, high in estimates)


def test_enumeration_is_the_split_of_the_definition() -> None:
    ensemble, steps, weights = toy(), 3, (0.4, 0.6)
    laws = [component.log_table.exp().numpy() for component in ensemble.components]
    means, seconds, chances = [], [], []
    for path in itertools.product(range(2), repeat=steps):
        mean = second = 0.0
        for tokens in itertools.product(range(3), repeat=steps):
            chance, last, row = 1.0, 0, []
            for component, token in zip(path, tokens, strict=True):
                chance *= laws[component][1 + last, token]
                row.append(token)
                last = token
                if token == 2:
                    break
            # Each continuation that ends early is met once for every way to fill it up; count the first.
            if tokens[len(row) :] == (0,) * (steps - len(row)):
                mean, second = mean + chance * rough(row), second + chance * rough(row) ** 2
        means.append(mean)
        seconds.append(second)
        chances.append(np.prod([weights[component] for component in path]))
    chance, mean, second = np.array(chances), np.array(means), np.array(seconds)
    split = exact_split(ensemble, [0], rough, max_new_tokens=steps)
    assert split.paths == 8
    assert split.mean == pytest.approx(chance @ mean)
    assert split.within == pytest.approx(chance @ (second - mean**2))
    assert split.between == pytest.approx(chance @ mean**2 - (chance @ mean) ** 2)
    assert split.variance == pytest.approx(chance @ second - (chance @ mean) ** 2)


def token_share(ensemble: Ensemble, steps: int) -> float:
    """Var E(F | u)/Var F of two-token components, over the cells of every uniform and every path."""
    zeros = [component.log_table.exp()[:, 0].tolist() for component in ensemble.components]
    cuts = np.unique([0.0, 1.0, *itertools.chain(*zeros)])
    middle, width = (cuts[1:] + cuts[:-1]) / 2, np.diff(cuts)
    weights = ensemble.mixing.weights.tolist()
    moments = np.zeros(3)
    for cells in itertools.product(range(len(middle)), repeat=steps):
        mean = second = 0.0
        for path in itertools.product(range(2), repeat=steps):
            row: list[int] = []
            for component, cell in zip(path, cells, strict=True):
                law = ensemble.components[component].log_probs([(0, *row)])
                row.append(int(inverse_cdf(law, torch.tensor([middle[cell]]))))
            chance = np.prod([weights[component] for component in path])
            mean, second = mean + chance * rough(row), second + chance * rough(row) ** 2
        moments += np.prod(width[list(cells)]) * np.array([mean, mean**2, second])
    return float((moments[1] - moments[0] ** 2) / (moments[2] - moments[0] ** 2))


def test_pick_freeze_finds_what_enumeration_gives() -> None:
    pair = [MarkovModel([0.5, 0.5], [[0.9, 0.1], [0.3, 0.7]]), MarkovModel([0.5, 0.5], [[0.2, 0.8], [0.6, 0.4]])]
    ensemble = Ensemble(pair, ConstantMixing([0.4, 0.6]))
    exact, tokens = exact_split(ensemble, [0], rough, max_new_tokens=3), token_share(ensemble, 3)
    split = pick_freeze(ensemble, [0], rough, n=20_000, max_new_tokens=3, seed=1, confidence=1 - 1e-6)
    assert split.path.interval[0] < exact.share < split.path.interval[1]
    assert split.tokens.interval[0] < tokens < split.tokens.interval[1]
    assert split.path_total.interval[0] < 1 - tokens < split.path_total.interval[1]
    assert split.path_total.value > split.path.value + 0.05  # the path acts through interactions, too
    assert split.variance == pytest.approx(exact.variance, rel=0.05)
    assert split.within + split.between == pytest.approx(split.variance)
    assert 0.05 < exact.share < 0.95


def test_shares_are_covered_over_seeds_with_ends_and_several_prompts() -> None:
    ensemble = toy()
    truth = [exact_split(ensemble, prompt, rough, max_new_tokens=3) for prompt in ([0], [1])]
    share = sum(split.between for split in truth) / sum(split.variance for split in truth)
    runs = [
        pick_freeze(ensemble, [[0], [1]], rough, n=100, max_new_tokens=3, seed=seed).path.interval
        for seed in range(200)
    ]
    assert 181 <= covers(share, runs) <= 199  # 190 expected, standard deviation 3.1


@pytest.mark.parametrize("share", [0.0, 0.3, 0.9])
def test_the_interval_of_a_share_is_calibrated_without_normality(share: float) -> None:
    rng = np.random.default_rng(7)

    def interval() -> tuple[float, float]:
        common, x, y = rng.exponential(size=(3, 500)) - 1
        return shared_variance(*(np.sqrt(share) * common + np.sqrt(1 - share) * own for own in (x, y))).interval

    assert 930 <= covers(share, [interval() for _ in range(1000)]) <= 970


def test_the_interval_of_a_share_is_calibrated_with_few_pairs_and_within_groups() -> None:
    rng = np.random.default_rng(11)
    groups = np.repeat(np.arange(8), 8)
    apart, skewed = [], []
    for _ in range(1000):
        common, x, y = rng.normal(size=(3, 64))
        level = 5 * rng.normal(size=8)[groups]
        pair = (level + np.sqrt(0.6) * common + np.sqrt(0.4) * own for own in (x, y))
        apart.append(shared_variance(*pair, groups=groups).interval)
        # Squares have 0.25, and tails for which 64 pairs are few; the delta method covers in 83%.
        skewed.append(shared_variance(*((np.sqrt(0.5) * (common + own)) ** 2 for own in (x, y))).interval)
    assert 930 <= covers(0.6, apart) <= 975
    assert covers(0.25, skewed) >= 855
    assert shared_variance([1.0, 2.0], [1.0, 3.0]).interval == (-1.0, 1.0)
    low, high = shared_variance([1.0, 1.0, 1.0, 2.0], [1.0, 1.0, 1.0, 3.0]).interval
    assert -1 <= low < high <= 1


def test_the_same_component_draws_give_the_same_path_and_only_that() -> None:
    sampler = MESampler(toy(eos=()))
    runs = [
        sampler.sample(
            [0], n=50, max_new_tokens=20, draw=FrozenDraw(component_seed=5, token_seed=other), batch_size=size
        )
        for other, size in ((6, None), (7, None), (6, 7))
    ]
    paths = [run.components for run in runs]
    assert paths[0] is not None and paths[1] is not None  # noqa: PT018
    assert torch.equal(paths[0], paths[1])
    assert not torch.equal(runs[0].tokens, runs[1].tokens)
    assert torch.equal(runs[0].tokens, runs[2].tokens)
    plain = sampler.sample([0], n=50, max_new_tokens=20, draw=FrozenDraw(component_seed=5, token_seed=5))
    assert torch.equal(plain.tokens, sampler.sample([0], n=50, max_new_tokens=20, seed=5).tokens)


def test_shared_component_draws_inflate_a_mean_by_the_share() -> None:
    """Rows of a batch that share the path are what the design effect 1 + (B-1) S is about."""
    ensemble, size, batches = toy(eos=()), 5, 400
    share = exact_split(ensemble, [0], rough, max_new_tokens=4).share
    shared = [
        MESampler(ensemble).sample(
            [0], n=batches, max_new_tokens=4, draw=FrozenDraw(component_seed=1, token_seed=2 + b)
        )
        for b in range(size)
    ]
    values = [rough(row) for run in shared for row in run.sequences()]
    effect = design_effect(values, np.tile(np.arange(batches), size), confidence=0.999)
    assert effect.interval[0] < 1 + (size - 1) * share < effect.interval[1]
    assert effect.interval[0] > 1


def test_a_router_is_frozen_by_its_uniforms_and_has_no_exact_split() -> None:
    components = [TableModel([[0.9, 0.1]], order=0), TableModel([[0.1, 0.9]], order=0)]
    router = Ensemble(components, LastTokenMixing(np.array([[0.5, 0.5], [0.9, 0.1], [0.1, 0.9]])))
    split = pick_freeze(router, [()], sum, n=500, max_new_tokens=4, seed=0)
    assert split.path.interval[0] > 0.2
    with pytest.raises(TypeError, match="under a router"):
        exact_split(router, [], sum, max_new_tokens=2)


def test_components_that_agree_have_no_share() -> None:
    same = Ensemble([CHAIN, CHAIN], ConstantMixing([0.5, 0.5]))
    assert exact_split(same, [0], rough, max_new_tokens=4).share == pytest.approx(0, abs=1e-12)
    assert abs(pick_freeze(same, [0], rough, n=4000, max_new_tokens=4, seed=0).path.value) < 0.06
    sure = Ensemble([TableModel([[1.0, 0.0]], order=0), TableModel([[0.0, 1.0]], order=0)], ConstantMixing([0.5, 0.5]))
    split = pick_freeze(sure, [0], sum, n=100, max_new_tokens=4, seed=0)
    assert split.path.interval == (1.0, 1.0)
    assert exact_split(sure, [0], sum, max_new_tokens=4).share == 1.0
    assert exact_split(sure, [0], len, max_new_tokens=4).share == 0.0


def test_moments_of_a_chain_are_those_of_enumeration() -> None:
    f, values, chances = np.array([1.0, -2.0, 4.0]), [], []
    chain = MarkovModel.random(3, seed=4)
    table = chain.log_table.exp().numpy()
    for path in itertools.product(range(3), repeat=4):
        values.append(f[list(path)].cumsum())
        chances.append(np.prod([table[0 if t == 0 else 1 + path[t - 1], x] for t, x in enumerate(path)]))
    v, p = np.array(values), np.array(chances)
    moments = markov_moments(chain, f, steps=4)
    np.testing.assert_allclose(moments.mean, p @ v)
    np.testing.assert_allclose(moments.variance, p @ v**2 - (p @ v) ** 2)
    long = markov_moments(chain, f, steps=4000, prompt=[1])
    assert long.variance[-1] / 4000 == pytest.approx(long.asymptotic_variance, rel=1e-3)
    assert long.mean[-1] / 4000 == pytest.approx(long.stationary_mean, rel=1e-2)
    # A mixture of chains is the chain of the mixed tables, drawn from without knowing which.
    mixed = toy(eos=())
    tables = [component.log_table.exp() for component in mixed.components]
    whole = 0.4 * tables[0] + 0.6 * tables[1]
    expected = markov_moments(MarkovModel(whole[0], whole[1:]), f, steps=5)
    np.testing.assert_allclose(markov_moments(mixed, f, steps=5).variance, expected.variance)


def test_growth_covers_the_closed_form_and_tells_rate_one_from_two() -> None:
    steps = 40
    truth = markov_moments(CHAIN, [0.0, 1.0], steps=steps)
    log_t = np.log(np.arange(1, steps + 1)) - np.log(np.arange(1, steps + 1)).mean()
    rate = float(log_t @ np.log(truth.variance) / (log_t @ log_t))
    sampler, inside, rates = CESampler(CHAIN), np.zeros(steps), []
    for seed in range(400):
        tokens = sampler.sample((), n=150, max_new_tokens=steps, seed=seed).tokens.numpy()
        growth = variance_growth(tokens.cumsum(1))
        inside += (growth.lower <= truth.variance) & (truth.variance <= growth.upper)
        rates.append(growth.rate.interval)
    assert 365 <= covers(rate, rates) <= 393  # 380 expected, standard deviation 4.4
    assert (inside >= 360).all()
    assert 0.92 < inside.mean() / 400 < 0.98
    rng = np.random.default_rng(0)
    once = rng.normal(size=(300, 1)) * np.arange(1, steps + 1) + rng.normal(size=(300, steps)).cumsum(1) / 10
    assert variance_growth(once, start=5).rate.value == pytest.approx(2, abs=0.02)


def test_bad_input_names_the_argument() -> None:
    ensemble = toy()
    with pytest.raises(ValueError, match="n must be an integer of at least 2"):
        pick_freeze(ensemble, [0], rough, n=1, max_new_tokens=2, seed=0)
    with pytest.raises(ValueError, match="does not vary"):
        pick_freeze(ensemble, [0], lambda row: 1.0, n=9, max_new_tokens=2, seed=0)
    with pytest.raises(ValueError, match="f must be finite"):
        pick_freeze(ensemble, [0], lambda row: float("nan"), n=9, max_new_tokens=2, seed=0)
    with pytest.raises(ValueError, match="max_cells"):
        exact_split(ensemble, [0], rough, max_new_tokens=4, max_cells=10)
    with pytest.raises(ValueError, match="pairs of one length"):
        shared_variance([1.0, 2.0], [1.0, 2.0, 3.0])
    with pytest.raises(ValueError, match="groups must name one group per pair"):
        shared_variance([1.0, 2.0, 3.0], [1.0, 2.0, 3.0], groups=[0, 0, 1])
    for values, message in ((np.ones((5, 3)), "vary over sequences"), (np.ones(5), r"values must be \(N, T\)")):
        with pytest.raises(ValueError, match=message):
            variance_growth(values)
    with pytest.raises(ValueError, match="start must lie"):
        variance_growth(np.eye(4), start=4)
    with pytest.raises(TypeError, match="MarkovModel"):
        markov_moments(TableModel.random(2, seed=0, order=2), [0.0, 1.0], steps=2)
    with pytest.raises(ValueError, match="end-of-sequence"):
        markov_moments(ensemble, [0.0, 1.0, 2.0], steps=2)
    with pytest.raises(ValueError, match="recurrent class"):
        markov_moments(MarkovModel([0.5, 0.5], np.eye(2)), [0.0, 1.0], steps=2)
    with pytest.raises(ValueError, match="one number per token"):
        markov_moments(CHAIN, [0.0, 1.0, 2.0], steps=2)
