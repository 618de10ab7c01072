"""Draws against laws: false alarms as stated, and each way to bend a law found by its name."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import stats

from me_stats.leaks import Draws, Suspicion, check_law, named, suspects

V = 40
RNG = np.random.default_rng(5)
LAWS = [RNG.dirichlet(np.full(V, 0.5)) for _ in range(3)]
PREFIXES = [(3,), (7, 1), tuple(int(token) for token in np.argsort(-LAWS[2])[:2]) * 3]


def by_id(law: np.ndarray, top: int | None = None) -> dict[int, float]:
    return {int(token): math.log(law[token]) for token in np.argsort(-law)[:top]}


def drawn(laws: list[np.ndarray], n: int, seed: int, top: int | None = None) -> list[Draws]:
    """Draws from `laws`, held against `LAWS`."""
    rng = np.random.default_rng(seed)
    return [
        Draws.of(prefix, rng.choice(V, n, p=law / law.sum()).tolist(), by_id(true, top), V)
        for prefix, law, true in zip(PREFIXES, laws, LAWS, strict=True)
    ]


def truncated(law: np.ndarray, k: int = V, top_p: float = 1.0, min_p: float = 0.0) -> np.ndarray:
    order = np.argsort(-law)
    kept = np.zeros(V, dtype=bool)
    kept[order[:k]] = True
    kept[order] &= np.cumsum(law[order]) - law[order] < top_p
    return np.where(kept & (law >= min_p * law.max()), law, 0)


def penalised(law: np.ndarray, prefix: tuple[int, ...]) -> np.ndarray:
    return np.where(np.isin(np.arange(V), prefix), law / 4, law)


BENT = {
    "temperature": ([law ** (1 / 0.7) for law in LAWS], 0.7),
    "top_k": ([truncated(law, k=12) for law in LAWS], 12),
    "top_p": ([truncated(law, top_p=0.9) for law in LAWS], 0.9),
    "min_p": ([truncated(law, min_p=0.05) for law in LAWS], 0.05),
    "repetition penalty": ([penalised(*pair) for pair in zip(LAWS, PREFIXES, strict=True)], None),
}


@pytest.mark.parametrize("top", [None, 20])
def test_false_alarms_are_as_rare_as_stated(top: int | None) -> None:
    runs, level = 300, 0.05
    found = [check_law(drawn(LAWS, 60, seed, top), level=level) for seed in range(runs)]
    most = stats.binom.isf(1e-9, runs, level)
    assert sum(one.rejected for one in found) <= most
    gains: dict[str, list[float]] = {}
    for one in found:
        for suspicion in one.suspicions:
            gains.setdefault(suspicion.name, []).append(suspicion.gain)
    assert len(gains) == 5
    for name, values in gains.items():
        sides = 2 if name == "temperature" else 1
        assert sum(sides * math.exp(-gain) <= level for gain in values) <= most, name


@pytest.mark.parametrize("top", [None, 30])
@pytest.mark.parametrize("name", BENT)
def test_each_way_to_bend_a_law_is_found_by_its_name(name: str, top: int | None) -> None:
    laws, value = BENT[name]
    found = check_law(drawn(laws, 400, 1, top), level=1e-6)
    assert found.rejected
    assert found.suspicions[0].name == name
    assert name in named(found.suspicions)
    if value is not None:
        assert float(found.suspicions[0].value) == pytest.approx(value, rel=0.2)


def test_other_laws_and_shifted_ids_are_named() -> None:
    shifted = [np.roll(law, 1) for law in LAWS]
    assert named(suspects(drawn(shifted, 100, 1), {})) == "ids shifted by 1"
    others = [LAWS[1], LAWS[2], LAWS[0]]
    found = suspects(drawn(others, 100, 1, top=20), {"stale": [by_id(law, 20) for law in others]})
    assert named(found) == "stale"
    assert named(suspects(drawn(LAWS, 100, 1), {"stale": [by_id(law) for law in others]})) != "stale"


def test_what_cannot_be_told_apart_is_named_together() -> None:
    same = [Suspicion("top_k", "2", 9.0), Suspicion("top_p", "0.5", 9.0), Suspicion("min_p", "0.1", 3.0)]
    assert named(same) == "top_k 2 or top_p 0.5"
    assert named([Suspicion("top_k", "2", 0.5)]) == ""


def test_an_impossible_draw_is_enough() -> None:
    law = {0: math.log(0.5), 1: math.log(0.5), 2: -math.inf}
    assert not check_law([Draws.of([0], [0, 1] * 20, law, 3)]).rejected
    assert check_law([Draws.of([0], [0, 1] * 20 + [2], law, 3)]).pvalue == 0


def test_it_says_what_it_could_have_seen() -> None:
    few, many = (check_law(drawn(LAWS, n, 1)) for n in (50, 800))
    assert many.n == 2400
    assert many.least_tv < few.least_tv
    assert many.least_cut < 0.01 < few.least_cut


def test_bad_arguments_are_named() -> None:
    with pytest.raises(ValueError, match="at least one draw"):
        check_law([])
    with pytest.raises(ValueError, match="level"):
        check_law(drawn(LAWS, 10, 1), level=2)
