"""What the main job plans to run, by size and models."""

from __future__ import annotations

import json
from typing import Any

import pytest

from me_stats import plans
from me_stats import reproduce as job
from me_stats.presets import MIXED_SIBLINGS, SIBLINGS
from me_stats.record import plain
from tests import tiny

EXPERIMENTS = list(tiny.OPTIONS)
# After the toys: what runs on any models, on models of several vocabularies, on the siblings alone, on our tests.
ON_MODELS, ON_SEVERAL, ON_SIBLINGS, ON_TESTS = EXPERIMENTS[1:9], EXPERIMENTS[9:11], EXPERIMENTS[11:18], EXPERIMENTS[18:]
# What runs on models of several vocabularies besides.
ON_STRINGS = ["per_step", "certificate", "sequences", "transform_order", *ON_SEVERAL]


def test_quick_plan_needs_no_download() -> None:
    parts = plans.plan(size="quick")
    assert list(job.ORDER) == EXPERIMENTS
    assert {part.experiment for part in parts} == set(EXPERIMENTS)
    siblings = [f"{name}-siblings" for name in (*ON_MODELS, *ON_SIBLINGS)]
    mixed = [f"{name}-siblings-mixed" for name in ON_STRINGS]
    assert [part.name for part in parts] == ["toy_equivalence", *siblings, *mixed, *ON_TESTS]
    assert {part.config.models for part in parts if hasattr(part.config, "models")} == {SIBLINGS, MIXED_SIBLINGS}


def test_full_plan_adds_the_language_models() -> None:
    parts = plans.plan(size="full")
    added = [part for part in parts if part.tag.startswith("smollm2-135m")]
    quick = [part.name for part in plans.plan(size="quick")]
    assert [part.name for part in parts if part not in added] == [name for name in quick if name != "speed-siblings"]
    alone = [part for part in added if part.config.models == plans.LANGUAGE_MODEL]
    assert sorted(part.experiment for part in alone) == sorted([*ON_MODELS, "weights", "long"])
    mixed = [part for part in added if part not in alone]
    assert [part.experiment for part in mixed] == ON_STRINGS
    assert {part.config.models for part in mixed} == {plans.MIXED_MODELS}


def test_default_plan_is_quick_and_takes_the_language_models_along() -> None:
    parts, quick = plans.plan(), plans.plan(size="quick")
    added = [part for part in parts if part.tag.startswith("smollm2-135m")]
    assert [part for part in parts if part not in added] == [part for part in quick if part.name != "speed-siblings"]
    assert {part.name for part in added} < {part.name for part in plans.plan(size="full")}
    assert {part.config.models for part in added} == {plans.LANGUAGE_MODEL, plans.MIXED_MODELS}
    assert {"speed", "per_step"} <= {part.experiment for part in added}


@pytest.mark.parametrize("size", ["quick", "laptop"])
def test_smaller_is_not_other(size: plans.Size) -> None:
    full = {part.name: part.config for models in (None, SIBLINGS) for part in plans.plan(size="full", models=models)}
    for part in plans.plan(size=size):
        assert part.config != full[part.name] or part.name in ("weights-smollm2-135m", "audit")  # seconds in any size
        for name in ("prompts", "draws", "rows", "coupled_rows", "steps", "repeats"):
            small, large = (getattr(config, name, 0) for config in (part.config, full[part.name]))
            assert small == large or small < large  # None for the prompts that suit the models
    assert len(full["toy_equivalence"].shapes) > len(plans.plan(size=size)[0].config.shapes)


def test_models_replace_the_default_sets() -> None:
    parts = plans.plan(models=["org/a", "org/b:c"], dtype="bfloat16", device="cuda:1", seed=7)
    assert parts[0].name == "toy_equivalence"
    assert {part.tag for part in parts[1:]} == {"org_a+org_b_c-cuda"}
    for part in parts[1:]:
        assert part.config.models == ("org/a", "org/b:c")
        assert part.config.device == "cuda:1"
        assert getattr(part.config, "dtype", "bfloat16") == "bfloat16"
    assert {part.config.seed for part in parts} == {7}
    by_name = {part.experiment: part.config for part in parts}
    assert not hasattr(by_name["cache_floor"], "dtype")  # it measures every dtype
    named = [part.key for part in plans.plan(models=list(SIBLINGS), size="quick")]
    quick = [part for part in plans.plan(size="quick") if part.tag != "siblings-mixed"]
    assert named == [part.key for part in quick if part.experiment not in ON_TESTS]


def test_models_of_several_vocabularies_have_parts_of_their_own() -> None:
    parts = plans.plan(models=list(MIXED_SIBLINGS))
    assert [part.experiment for part in parts] == ["toy_equivalence", *ON_STRINGS]
    assert {part.config.models for part in parts[1:]} == {MIXED_SIBLINGS}


@pytest.mark.parametrize("options", [{}, {"size": "quick"}, {"models": ["a"]}, {"models": ["a", "b", "c"]}])
def test_parts_have_names_of_files_and_keys_of_their_own(options: dict[str, Any]) -> None:
    parts = plans.plan(**options)
    assert len({part.name for part in parts}) == len({part.key for part in parts}) == len(parts)
    for part in parts:
        assert "/" not in part.name
        assert ":" not in part.name
        assert json.loads(json.dumps(plain(part.config)))


@pytest.mark.parametrize("change", [{"seed": 1}, {"dtype": "bfloat16"}, {"device": "cuda"}, {"models": ["other"]}])
def test_whatever_changes_the_run_changes_the_key(change: dict[str, Any]) -> None:
    before = {part.experiment: part.key for part in plans.plan(models=["some"])}
    after = {part.experiment: part.key for part in plans.plan(**({"models": ["some"]} | change))}
    same = {name for name in before if before[name] == after[name]}
    expected = {"seed": set(), "dtype": {"toy_equivalence", "cache_floor"}}
    assert same == expected.get(next(iter(change)), {"toy_equivalence"})
