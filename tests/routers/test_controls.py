from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
import pytest

from me_stats.exact import sampler_law, sequence_law
from me_stats.mixing import ConstantMixing
from me_stats.models import Ensemble
from me_stats.monitor import watch
from me_stats.routers import LastComponentSampler, NgramRouter, PeekingSampler, RouterMixing, StickySampler
from me_stats.samplers import MESampler
from me_stats.samplers.base import Sampler
from me_stats.testing import check_sampler
from tests.routers.toys import KINDS, routed, scrambled, tables

CONTROLS: dict[str, Any] = {
    "last component": LastComponentSampler,
    "sticky": StickySampler,
    "peeking": PeekingSampler,
}


@cache
def ensemble(router: bool = True) -> Ensemble:
    rule = scrambled(NgramRouter(2, order=2, buckets=64), seed=2)
    return Ensemble(tables(5, 2, seed=3), RouterMixing(rule) if router else ConstantMixing([0.4, 0.6]))


def checked(sampler: Sampler, seed: int = 0) -> Any:
    return check_sampler(sampler, sampler.model, [0], max_new_tokens=24, n=3000, seed=seed, on_fail="return")


@pytest.mark.parametrize("name", sorted(CONTROLS))
@pytest.mark.parametrize("router", [True, False])
def test_a_control_is_rejected(name: str, router: bool) -> None:
    result = checked(CONTROLS[name](ensemble(router)))
    assert not result.passed
    assert result.pvalue < 1e-6
    assert result.tokens < 40_000


@pytest.mark.parametrize("name", sorted(CONTROLS))
def test_a_watch_rejects_it_too(name: str) -> None:
    found = watch(CONTROLS[name](ensemble()), [0], alpha=1e-6, max_tokens=30_000, max_new_tokens=32, seed=1)
    assert found.rejected


def test_me_with_the_same_router_passes() -> None:
    for seed in range(3):
        assert checked(MESampler(ensemble()), seed).pvalue > 1e-6
    assert not watch(MESampler(ensemble()), [0], alpha=1e-6, max_tokens=30_000, max_new_tokens=32, seed=1).rejected


@pytest.mark.parametrize("kind", KINDS)
def test_me_with_every_kind_of_router_passes(kind: str) -> None:
    sampler = MESampler(routed(kind, 4, 3, seed=1))
    result = check_sampler(sampler, sampler.model, [1], max_new_tokens=12, n=200, on_fail="return")
    assert result.passed


@pytest.mark.parametrize("name", sorted(CONTROLS))
def test_its_law_is_another_one_exactly(name: str) -> None:
    parts = tables(3, 2, seed=3)
    mixture = Ensemble(parts, RouterMixing(scrambled(NgramRouter(2, order=1, buckets=64), seed=2)))
    law = sequence_law(mixture, [0], max_new_tokens=4)
    wrong = sampler_law(CONTROLS[name](mixture), [0], max_new_tokens=4)
    assert wrong.total == pytest.approx(1, abs=1e-9)
    assert wrong.tv_distance(law) > 0.01


@pytest.mark.parametrize("sampler", [LastComponentSampler, StickySampler])
def test_reading_the_past_component_leaves_the_first_token_right(sampler: Any) -> None:
    law = sequence_law(ensemble(), [0], max_new_tokens=1)
    assert sampler_law(sampler(ensemble()), [0], max_new_tokens=1).tv_distance(law) < 1e-12
    assert sampler_law(PeekingSampler(ensemble()), [0], max_new_tokens=1).tv_distance(law) > 0.005


def test_a_control_without_its_fault_is_me() -> None:
    law = sequence_law(ensemble(), [0], max_new_tokens=3)
    for sampler in (LastComponentSampler(ensemble(), boost=1.0), StickySampler(ensemble(), keep=0.0)):
        assert sampler_law(sampler, [0], max_new_tokens=3).tv_distance(law) < 1e-12
    alike = Ensemble([tables(4, 1)[0]] * 2, ConstantMixing([0.3, 0.7]))
    law = sequence_law(alike, [0], max_new_tokens=3)
    assert sampler_law(PeekingSampler(alike), [0], max_new_tokens=3).tv_distance(law) < 1e-12


def test_what_they_do_by_hand() -> None:
    always = StickySampler(ensemble(), keep=1.0).sample([0], n=50, max_new_tokens=10, seed=0).components
    assert always is not None
    assert (always == always[:, :1]).all()
    assert len(always[:, 0].unique()) == 2
    same = {}
    for boost in (0.01, 1.0, 100.0):
        drawn = LastComponentSampler(ensemble(False), boost=boost).sample([0], n=400, max_new_tokens=20, seed=0)
        assert drawn.components is not None
        same[boost] = float((drawn.components[:, 1:] == drawn.components[:, :-1]).double().mean())
    # Weights 0.4 and 0.6 repeat with probability 0.52.
    assert same[0.01] < 0.05
    assert same[1.0] == pytest.approx(0.52, abs=0.03)
    assert same[100.0] > 0.9


def test_peeking_by_hand() -> None:
    # P = (1/2, 1/2) and (1, 0), λ even: r = (1/3, 2/3) and (1, 0), so q is 1/6 + 2/3 = 5/6 against 1/2.
    from me_stats.models import TableModel

    pair = Ensemble(
        [TableModel([[0.5, 0.5, 0.0]], order=0), TableModel([[1.0, 0.0, 0.0]], order=0)], ConstantMixing([0.5, 0.5])
    )
    law = sampler_law(PeekingSampler(pair), [], max_new_tokens=1)
    assert law.sequences.tolist() == [[0], [1]]
    assert np.exp(law.log_probs).tolist() == pytest.approx([5 / 8, 3 / 8], abs=1e-12)


def test_options_are_checked() -> None:
    for boost in (0.0, -1.0, float("inf")):
        with pytest.raises(ValueError, match="boost must be finite and positive"):
            LastComponentSampler(ensemble(), boost=boost)
    for keep in (-0.1, 1.1, float("nan")):
        with pytest.raises(ValueError, match=r"keep must lie in 0\.\.1"):
            StickySampler(ensemble(), keep=keep)
