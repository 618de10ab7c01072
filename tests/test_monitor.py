"""Watching samplers that run: right ones, controls, other laws, and runs that are cut in two."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest

from me_stats.eprocess import EProcess
from me_stats.families import ALL_FAMILIES, SCORE_FAMILIES
from me_stats.mixing import ConstantMixing
from me_stats.models import Ensemble, MarkovModel, Temperature, TopK, Warped
from me_stats.monitor import watch
from me_stats.samplers import CESampler, MESampler, SequenceMixtureSampler
from me_stats.trace import Trace
from tests.strategies import LastTokenMixing


def toy(count: int = 2, *, eos: tuple[int, ...] = ()) -> Ensemble:
    parts = [MarkovModel.random(6, seed=s, concentration=0.5, eos=eos) for s in range(count)]
    return Ensemble(parts, ConstantMixing([1 / count] * count))


GIVEN: dict[str, Any] = {"alpha": 1e-6, "max_tokens": 4000, "max_new_tokens": 24, "seed": 0}


@pytest.mark.parametrize("families", [SCORE_FAMILIES, ALL_FAMILIES])
@pytest.mark.parametrize("count", [1, 2, 3])
def test_right_samplers_are_left_alone(families: tuple[Any, ...], count: int) -> None:
    for sampler in (MESampler(toy(count)), CESampler(toy(count)), MESampler(toy(count, eos=(5,)))):
        result = watch(sampler, [[0], [3]], families=families, **GIVEN)
        assert not result.rejected
        assert result.tokens_to_reject is None
        assert 4000 <= result.tokens < 4000 + 2 * 16 * 24
        assert result.pvalue > 1e-3
        assert result.impossible == 0
        assert result.sequences % 32 == 0


def test_a_router_is_watched_with_its_own_weights() -> None:
    router = LastTokenMixing(np.random.default_rng(0).dirichlet(np.ones(2), size=7))
    model = Ensemble(toy().components, router)
    assert not watch(MESampler(model), [0], families=ALL_FAMILIES, **GIVEN).rejected
    assert watch(MESampler(model), [0], model=toy(), **GIVEN).rejected


def test_one_component_per_sequence_is_stopped_early() -> None:
    result = watch(SequenceMixtureSampler(toy()), [0], batch=4, **GIVEN)
    assert result.rejected
    assert result.worst == "hidden Markov"
    assert result.member.startswith("correlation 0.9")
    assert result.tokens_to_reject is not None
    assert result.tokens_to_reject <= result.tokens < 1000
    assert result.pvalue <= 1e-6
    assert result.log_e <= result.log_sup
    assert result.process.sequences == result.sequences


def test_a_law_that_is_not_the_reference_is_found_and_its_transform_named() -> None:
    sampler = CESampler(Warped(toy(), Temperature(1.3)))
    assert not watch(sampler, [0], families=ALL_FAMILIES, **GIVEN).rejected
    result = watch(sampler, [0], model=toy(), families=ALL_FAMILIES, **GIVEN)
    assert result.rejected
    assert result.worst == "tilts"
    assert "Temperature" in result.member


def test_writing_outside_the_support_is_found_at_once() -> None:
    reference = Ensemble([Warped(part, TopK(1)) for part in toy().components], ConstantMixing([0.5, 0.5]))
    for families in (SCORE_FAMILIES, ALL_FAMILIES):
        result = watch(MESampler(toy()), [0], model=reference, families=families, **GIVEN)
        assert result.rejected
        assert result.log_e == math.inf
        assert result.pvalue == 0
        assert result.impossible > 0
        assert result.sequences == 16


@pytest.mark.parametrize("families", [SCORE_FAMILIES, ALL_FAMILIES])
def test_a_run_in_two_parts_is_one_run(families: tuple[Any, ...]) -> None:
    sampler, limits = MESampler(toy()), {**GIVEN, "batch": 8, "families": families}
    whole = watch(sampler, [0], **limits).process.state_dict()
    first = watch(sampler, [0], **{**limits, "max_tokens": 1000}).process
    again = EProcess(2, families=families).load_state_dict(first.state_dict())
    both = watch(sampler, [0], process=again, **limits).process.state_dict()
    for name, value in whole.items():
        np.testing.assert_array_equal(value, both[name], err_msg=name)


class Recording(MESampler):
    """Keeps the row numbers that were asked for."""

    asked: list[int]

    def sample(self, *args: Any, **options: Any) -> Trace:
        self.asked = [*getattr(self, "asked", []), *options["rows"].tolist()]
        return super().sample(*args, **options)


def test_every_batch_has_fresh_rows() -> None:
    sampler = Recording(toy())
    result = watch(sampler, [[0], [1], [2]], batch=5, **GIVEN)
    assert sampler.asked == list(range(result.sequences))
    assert result.sequences > 30


def test_bad_input() -> None:
    for change, message in (({"alpha": 0.0}, "alpha"), ({"max_tokens": 0}, "max_tokens"), ({"batch": 0}, "batch")):
        with pytest.raises(ValueError, match=message):
            watch(MESampler(toy()), [0], **{**GIVEN, **change})
