"""Alternatives against brute force: every family is a martingale on every path, and its recursion is the plain sum."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from me_stats.eprocess import EProcess
from me_stats.evidence import Evidence, collect
from me_stats.families import ALL_FAMILIES, Family, HiddenMarkov, Laws, Step, Tilts, TransformBins, WeightShifts
from me_stats.mixing import ConstantMixing, Mixing
from me_stats.models import Ensemble, Greedy, TableModel, Temperature, TopK, TopP
from tests.strategies import LastTokenMixing, ensembles, seeds

RHOS = (-0.9, -0.05, 0.5, 0.999)

# One member each: an average of wrong members could be right by accident.
MEMBERS: tuple[Family, ...] = (
    *(WeightShifts((s,)) for s in (1 / 64, 15 / 16)),
    *(HiddenMarkov((rho,)) for rho in RHOS),
    *(Tilts(((warp, 1.0),)) for warp in (Temperature(0.5), Temperature(2.0))),
    *(Tilts(((warp, 0.25),)) for warp in (Greedy(), TopK(2), TopP(0.6), Temperature(8.0))),
)


def every_path(vocabulary: int, steps: int) -> torch.Tensor:
    return torch.tensor(list(itertools.product(range(vocabulary), repeat=steps)))


def toy_ensemble(count: int, mixing: str, seed: int = 0) -> Ensemble:
    parts = [TableModel.random(3, order=3, seed=seed + i, concentration=0.5) for i in range(count)]
    rng = np.random.default_rng(seed)
    if mixing == "router":
        rule: Mixing = LastTokenMixing(rng.dirichlet(np.ones(count), size=4))
    elif mixing == "zero weight":
        rule = ConstantMixing([0.0, *rng.dirichlet(np.ones(count - 1))])
    else:
        rule = ConstantMixing(rng.dirichlet(np.ones(count)))
    return Ensemble(parts, rule)


CASES = [(1, "constant"), (2, "constant"), (3, "constant"), (2, "router"), (3, "router"), (2, "zero weight")]


@pytest.mark.parametrize(("count", "mixing"), CASES)
@pytest.mark.parametrize("family", MEMBERS, ids=lambda f: f.members(1)[0])
def test_the_expected_wealth_is_one_at_every_time(family: Family, count: int, mixing: str) -> None:
    model, paths = toy_ensemble(count, mixing), every_path(3, 4)
    evidence = collect(model, [()] * len(paths), paths, families=[family])
    wealth = np.exp(EProcess(count, families=[family]).paths(evidence))
    laws = model.path_log_probs([()] * len(paths), paths.tolist())
    picked = torch.stack([law.gather(1, path[:, None])[:, 0] for law, path in zip(laws, paths, strict=True)])
    p = picked.sum(1).exp().numpy()
    assert p @ wealth == pytest.approx(np.ones(4), abs=1e-12)
    assert p @ np.abs(wealth[:, -1] - 1) > 1e-6 or count == 1 or mixing == "zero weight"


@settings(max_examples=40)
@given(st.data())
def test_wealth_is_never_expected_to_grow(data: st.DataObject) -> None:
    # Components of weight zero may write what the mixture cannot: their alternatives then waste wealth.
    model = data.draw(ensembles(max_order=2, eos=False))
    paths = every_path(model.vocabulary.size, 3)
    families = [*ALL_FAMILIES[:2], Tilts()]
    evidence = collect(model, [()] * len(paths), paths, families=families)
    process = EProcess(len(model.components), families=families)
    law = torch.stack(
        [
            rows.gather(1, path[:, None])[:, 0]
            for rows, path in zip(model.path_log_probs([()] * len(paths), paths.tolist()), paths, strict=True)
        ]
    )
    p = law.sum(1).exp().numpy()
    wealth = np.exp(process.paths(evidence)[:, -1])
    assert (np.isinf(wealth) == (p == 0)).all()
    assert p[p > 0] @ wealth[p > 0] <= 1 + 1e-9


@pytest.mark.parametrize("pairs", [False, True])
def test_transform_bins_are_a_martingale_for_uniform_transforms(pairs: bool) -> None:
    family = TransformBins("id", bins=3, pairs=pairs, concentrations=(0.5, 16.0))
    cells = np.array(list(itertools.product(range(3), repeat=5)))
    n = len(cells)
    even = np.ones((n, 5, 1))
    evidence = Evidence(
        even,
        even,
        np.ones((n, 5), dtype=bool),
        np.zeros((n, 5), dtype=bool),
        {family.name: (cells[..., None] + 0.5) / 3},
    )
    wealth = np.exp(EProcess(1, families=[family]).paths(evidence))
    assert wealth.mean(0) == pytest.approx(np.ones(5), abs=1e-12)
    # Fed one after the other, each sequence learns from those before it; E is B^n DirMult of all counts.
    process = EProcess(1, families=[family])
    process.update(Evidence(*(a[:7] for a in (even, even, evidence.live, evidence.impossible)), {
        family.name: evidence.readings[family.name][:7]
    }))  # fmt: skip
    by_hand = []
    for a in family.concentrations:
        counts: dict[int, np.ndarray] = {}
        total = 0.0
        for row in cells[:7]:
            context = -1
            for cell in row:
                seen = counts.setdefault(context, np.zeros(3))
                total += math.log(3 * (a + seen[cell]) / (3 * a + seen.sum()))
                seen[cell] += 1
                context = int(cell) if pairs else -1
        by_hand.append(total)
    assert list(process.by_member[family.name].values()) == pytest.approx(by_hand)


class Chosen:
    """In place of a Generator: every uniform is the given one."""

    def __init__(self, value: float) -> None:
        self.value = value

    def random(self, size: int) -> np.ndarray:
        return np.full(size, self.value)


@pytest.mark.parametrize("order", ["rank", "ratio", "id"])
@given(seed=seeds, size=st.integers(1, 6))
@settings(max_examples=30)
def test_transforms_tile_the_unit_interval_in_their_order(order: str, seed: int, size: int) -> None:
    rng = np.random.default_rng(seed)
    parts = rng.dirichlet(np.full(size, 0.7), size=2)
    parts[:, rng.random(size) < 0.3] = 0
    parts += np.eye(size)[0] * 0.1
    parts /= parts.sum(1, keepdims=True)
    p = parts.mean(0)
    possible = np.flatnonzero(p)
    with np.errstate(divide="ignore"):
        every = torch.tensor(np.log(parts)).expand(len(possible), 2, size)
        laws = Laws(every, torch.tensor(np.log(p)).expand(len(possible), size), torch.tensor(possible))
    low, high = (TransformBins(order).read(laws, Chosen(v))[:, 0].numpy() for v in (0.0, 1.0))  # type: ignore[arg-type]
    np.testing.assert_allclose(high - low, p[possible], atol=1e-12)
    sequence = np.argsort(low, kind="stable")
    np.testing.assert_allclose(low[sequence], np.concatenate([[0], np.cumsum(p[possible][sequence])[:-1]]), atol=1e-12)
    key = {"rank": -p, "ratio": np.divide(parts[0], p, out=np.zeros(size), where=p > 0), "id": np.arange(size)}[order]
    assert (np.diff(key[possible][sequence]) >= -1e-12).all()


@given(seed=seeds, count=st.integers(1, 3), steps=st.integers(1, 4), rho=st.sampled_from(RHOS))
@settings(max_examples=40)
def test_the_forward_recursion_is_the_sum_over_component_paths(seed: int, count: int, steps: int, rho: float) -> None:
    rng = np.random.default_rng(seed)
    parts, weights = rng.random((steps, count)), rng.dirichlet(np.ones(count), size=steps)
    mixed = (parts * weights).sum(1)
    total = 0.0
    for path in itertools.product(range(count), repeat=steps):
        mass = weights[0, path[0]] * parts[0, path[0]]
        for t in range(1, steps):
            follows = path[t] == (path[t - 1] + (rho < 0)) % count
            mass *= parts[t, path[t]] * ((1 - abs(rho)) * weights[t, path[t]] + abs(rho) * follows)
        total += mass
    family, state, log_e = HiddenMarkov((rho,)), np.empty(0), 0.0
    for t in range(steps):
        step = Step((parts[t] / mixed[t])[:, None], weights[t][:, None], {})
        state, gains = family.advance(state, step)
        log_e += gains[0, 0]
    assert log_e == pytest.approx(math.log(total / mixed.prod()), abs=1e-9)


def test_weight_shifts_are_likelihood_ratios_of_shifted_weights() -> None:
    rng = np.random.default_rng(0)
    parts, weights = rng.random((3, 5)), rng.dirichlet(np.ones(3), size=5).T
    mixed = (parts * weights).sum(0)
    family = WeightShifts((0.25, 0.5))
    _, gains = family.advance(np.empty(0), Step(parts / mixed, weights, {}))
    expected = [
        np.log((((1 - s) * weights + s * np.eye(3)[:, [i]]) * parts).sum(0) / mixed)
        for s in (0.25, 0.5)
        for i in range(3)
    ]
    np.testing.assert_allclose(gains, expected, atol=1e-12)
    assert family.members(3)[1] == "0.25 towards component 1"


def test_tilts_are_likelihood_ratios_of_transformed_mixtures() -> None:
    p = np.array([0.5, 0.3, 0.2])
    family = Tilts(((Temperature(0.5), 1.0), (TopK(2), 0.5), (Greedy(), 0.25)))
    every = torch.tensor(np.log(p)).expand(3, 3)
    read = family.read(Laws(every[:, None], every, torch.arange(3)), None).exp().numpy() * p[:, None]
    np.testing.assert_allclose(read[:, 0], p**2 / (p**2).sum())
    np.testing.assert_allclose(read[:, 1], 0.5 * p + 0.5 * np.array([0.625, 0.375, 0]))
    np.testing.assert_allclose(read[:, 2], 0.75 * p + 0.25 * np.array([1.0, 0, 0]))


@pytest.mark.parametrize("count", [1, 2, 4])
def test_members_have_labels_and_totals(count: int) -> None:
    assert len({family.name for family in ALL_FAMILIES}) == len(ALL_FAMILIES)
    for family in ALL_FAMILIES:
        labels = family.members(count)
        assert len(set(labels)) == len(labels)
        assert family.log_wealth(np.zeros(family.n_totals(count))).tolist() == [0.0] * len(labels)


def test_bad_grids() -> None:
    for build, message in (
        (lambda: WeightShifts(()), "strengths"),
        (lambda: WeightShifts((1.0,)), "strengths"),
        (lambda: HiddenMarkov((-1.0,)), "correlations"),
        (lambda: HiddenMarkov((math.nan,)), "correlations"),
        (lambda: Tilts(()), "tilts"),
        (lambda: Tilts(((Greedy(), 0.0),)), "share"),
        (lambda: TransformBins("size"), "order"),
        (lambda: TransformBins(bins=1), "bins"),
        (lambda: TransformBins(concentrations=(0.0,)), "concentrations"),
    ):
        with pytest.raises(ValueError, match=message):
            build()
