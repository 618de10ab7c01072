"""Every experiment holds on correct code, says how far to trust it, and fails when a bug is planted."""

from __future__ import annotations

import dataclasses
import json
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from me_stats import draws
from me_stats.claims import CLAIMS
from me_stats.models import ensemble as ensemble_module
from me_stats.models import ragged
from me_stats.record import Record, config_key, plain
from me_stats.samplers import CESampler, MESampler, SequenceMixtureSampler
from tests import tiny
from tests.stand_ins import past_the_gate, stale_cache, toothless_transform

NAMES = list(tiny.OPTIONS)


def failed(record: Record) -> list[str]:
    return [name for name, held in record.checks.items() if not held]


# On correct code


@pytest.mark.parametrize("name", NAMES)
def test_every_check_holds(name: str) -> None:
    record = tiny.record(name)
    assert failed(record) == []
    assert record.held
    assert record.checks
    assert record.name == name
    assert record.key == config_key(name, tiny.config(name))
    assert record.config == plain(tiny.config(name))
    assert record.wall_s > 0


@pytest.mark.parametrize("name", NAMES)
def test_results_are_plain_json_and_survive_a_file(name: str, tmp_path: Path) -> None:
    record = tiny.record(name)
    assert json.loads(json.dumps(record.results, allow_nan=False)) == record.results
    record.save(tmp_path / "record.json")
    assert Record.load(tmp_path / "record.json") == record


@pytest.mark.parametrize("name", NAMES)
def test_findings_say_how_far_to_trust_them(name: str) -> None:
    record = tiny.record(name)
    for finding in record.findings:
        assert finding.claim in CLAIMS
        assert re.search(r"\d", finding.n), finding
        assert re.search(r"\d", finding.statistic), finding
        assert finding.bound
        if finding.tv_upper is None:
            if finding.claim in ("C14", "C15"):  # of many statistics, each with what it could have seen in its own unit
                assert finding.caveat
            else:
                assert "power 0.8" in finding.caveat
                assert re.search(r"effect of \d", finding.caveat)
        else:
            assert 0 <= finding.tv_upper < 1
        if finding.verdict == "reproduced":
            assert finding.bound == "exact"
            assert finding.models == "toys"  # nothing else can be settled for good
    without = (
        "generation",
        "tokenizer_audit",
        "sensitivity",
        "speed_forecast",
        "generate_judged",
        "calibration",
        "tv_bounds",
        "power",
        "power_one_step",
    )
    assert bool(record.findings) == (name not in without)


@pytest.mark.parametrize("name", NAMES)
def test_config_is_frozen_and_its_defaults_are_json(name: str) -> None:
    config: Any = tiny.experiment(name).Config()
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.seed = 1
    assert config.seed == 0
    assert hash(config) == hash(tiny.experiment(name).Config())
    assert json.loads(json.dumps(plain(config)))


@pytest.mark.parametrize("name", [name for name in NAMES if name not in tiny.APART])
def test_progress_goes_forward(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[float, str]] = []
    quick: dict[str, dict[str, Any]] = {
        "per_step": {"draws": 200},
        "sequences": {"exact_cases": ((2, 2),), "rows": 4, "steps": 8},
        "cache_floor": {"dtypes": ("float32",), "steps": 4},
        "generation": {"batches": (1, 16), "steps": 4},
        "toy_equivalence": {"shapes": ((2, 2, 2),)},
    }
    config = tiny.config(name, **quick[name])
    tiny.experiment(name).run(config, lambda fraction, note: seen.append((fraction, note)))
    fractions = [fraction for fraction, _ in seen]
    assert len(seen) >= 2
    assert fractions == sorted(fractions)
    assert fractions[0] >= 0
    assert fractions[-1] <= 1
    assert all(note for _, note in seen)


@pytest.mark.parametrize("name", ["toy_equivalence", "per_step", "transform_order"])
def test_a_seed_makes_the_same_results_again(name: str) -> None:
    first = tiny.record(name)
    assert tiny.experiment(name).run(tiny.config(name)).results == first.results
    other = tiny.experiment(name).run(tiny.config(name, seed=1))
    assert other.results != first.results
    assert other.key != first.key


@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        ("per_step", "float16"),
        ("sequences", "bfloat16"),
        ("transform_order", "bfloat16"),
        ("transform_order", "float16"),
        ("generation", "bfloat16"),
    ],
)
def test_half_precision_is_no_failure(name: str, dtype: str) -> None:
    record = tiny.experiment(name).run(tiny.config(name, dtype=dtype))
    assert failed(record) == []
    assert {model["dtype"] for model in record.models} == {dtype}
    # Its rounding changes tokens, so equality of tokens is nothing to ask of it.
    assert not any("same tokens" in check for check in record.checks)


def test_coupled_rows_are_equal_in_float32() -> None:
    record = tiny.record("sequences")
    coupled = record.results["coupled"]
    assert set(coupled["latent"]) | set(coupled["alone"]) <= {"equal", "tie"}
    assert "equal" in coupled["latent"]
    assert sum("same tokens" in check or "do not depend on batch" in check for check in record.checks) == 2


def test_each_claim_of_the_toys_is_settled_exactly() -> None:
    record = tiny.record("toy_equivalence")
    assert [finding.claim for finding in record.findings] == ["C1", "C2", "C3"]
    assert all(finding.tv_upper is not None and finding.tv_upper < 1e-14 for finding in record.findings)
    assert "T = 2..5" in record.findings[1].statement
    assert "K = 2..3" in record.findings[2].statement
    rows = record.results["rows"]
    assert {row["transform"] for row in rows} == set(tiny.experiment("toy_equivalence").TRANSFORMS)
    assert max(row["tv_mix_then_transform"] for row in rows) > 0.1


def test_bounds_of_one_step_are_worse_than_those_of_a_perfect_sampler() -> None:
    row = tiny.record("per_step").results["rows"][0]
    for name in ("ME", "CE"):
        assert 0 < row[name]["tv_null_value"] < 2 * row[name]["tv_upper"]
        assert row[name]["pvalue"] > 1e-6
    assert row["planted"]["pvalue"] < 1e-6
    shifted = tiny.OPTIONS["per_step"]["shift"] * row["component_tv"]
    assert row["planted"]["min_detectable_tv"] < shifted  # the planted error was in sight
    frequencies, weights = row["components"]["frequencies"], row["components"]["weights"]
    assert weights == [0.6, 0.4]
    assert abs(frequencies[0] - 0.6) < 0.02


def test_more_draws_give_a_smaller_bound() -> None:
    few, many = (tiny.experiment("per_step").run(tiny.config("per_step", draws=n)) for n in (2_000, 200_000))
    upper = [record.results["rows"][0]["ME"]["tv_upper"] for record in (few, many)]
    assert upper[1] < upper[0] / 3


def test_cost_of_generations() -> None:
    rows = {(row["sampler"], row["batch"]): row for row in tiny.record("generation").results["rows"]}
    assert rows["ME", 1]["forwards"] == rows["ME", 1]["steps"]
    assert rows["CE", 1]["forwards"] == 2 * rows["CE", 1]["steps"]
    for row in rows.values():
        assert row["spread"][0] <= row["tokens_per_second"] <= row["spread"][1]


def test_a_required_gain_is_a_check_and_nothing_else_depends_on_a_clock(monkeypatch: pytest.MonkeyPatch) -> None:
    module = tiny.experiment("generation")
    record = module.run(tiny.config("generation", batches=(1, 16), steps=4, required=1e9))
    (name,) = failed(record)
    assert "tokens a second" in name
    # A clock that runs backwards changes speeds and no check.
    ticks = iter(range(10_000, 0, -1))
    monkeypatch.setattr(module.time, "perf_counter", lambda: float(next(ticks)))
    assert failed(module.run(tiny.config("generation", batches=(1, 16), steps=4))) == []


def test_one_batch_has_no_gain() -> None:
    record = tiny.experiment("generation").run(tiny.config("generation", batches=(16,), steps=4))
    assert record.results["batch_gain"] is None
    assert failed(record) == []


# Planted bugs


Plant = Callable[[pytest.MonkeyPatch], None]


def uniform_components(patch: pytest.MonkeyPatch) -> None:
    """ME forgets λ."""

    def components(self: Any, log_weights: Tensor, rows: Any, positions: Any, step: int, draw: Any, _: Any) -> Any:
        forgotten = torch.zeros_like(log_weights).log_softmax(-1)
        forgotten[log_weights == -torch.inf] = -torch.inf
        return draw(forgotten, rows, step, stream="component").numpy()

    patch.setattr(MESampler, "_components", components)
    patch.setattr(MESampler, "_plan", lambda self: None)


def unweighted_mixture(patch: pytest.MonkeyPatch) -> None:
    """CE's session forgets λ."""
    mix = ensemble_module.mix
    patch.setattr(
        ensemble_module.EnsembleSession,
        "log_probs",
        lambda self, rows: mix(
            [session.log_probs(rows) for session in self.components],
            torch.zeros((len(rows), len(self.components)), dtype=torch.float64).log_softmax(-1),
        ),
    )


def lost_span(patch: pytest.MonkeyPatch) -> None:
    """A session that forwards the newest token only, however many are missing."""
    run = ragged.RaggedSession._run

    def hasty(self: Any, rows: np.ndarray, starts: np.ndarray, stops: np.ndarray, reads: np.ndarray) -> Any:
        late = starts >= self._prompt_length[rows]
        return run(self, rows, np.where(late, stops - reads, starts), stops, reads)

    patch.setattr(ragged.RaggedSession, "_run", hasty)
    past_the_gate(patch)


def off_by_one(patch: pytest.MonkeyPatch) -> None:
    """An inverse CDF that returns the outcome after the one drawn."""
    original = draws.inverse_cdf

    def shifted(log_law: Tensor, uniforms: Tensor, *, index: Tensor | None = None) -> Tensor:
        return (original(log_law, uniforms, index=index) + 1) % log_law.shape[1]

    patch.setattr(draws, "inverse_cdf", shifted)


def toothless_control(patch: pytest.MonkeyPatch) -> None:
    """The control samples ME's law, so that it proves nothing."""
    patch.setattr(SequenceMixtureSampler, "_components", MESampler._components)


def spendthrift(patch: pytest.MonkeyPatch) -> None:
    """ME that runs every component, as CE does."""
    patch.setattr(MESampler, "latent", True, raising=False)
    patch.setattr(MESampler, "_step", CESampler._step)


CAUGHT: dict[tuple[str, Plant], tuple[tuple[str, ...], tuple[str, ...]]] = {
    # (experiment, bug): what must fail, and what must not, by the start of the check's name
    ("toy_equivalence", uniform_components): (("C1: ", "C2: ", "C3: "), ("mix-then-transform differs",)),
    ("toy_equivalence", unweighted_mixture): (("C1: ", "C2: ", "C3: "), ()),
    ("toy_equivalence", toothless_control): (("one component per sequence differs",), ("C1: ", "C2: ", "C3: ")),
    ("toy_equivalence", toothless_transform): (("mix-then-transform differs: top-k 2",), ("C1: ", "C2: ")),
    ("per_step", uniform_components): (("C1: ME", "component frequencies"), ("C1: CE",)),
    ("per_step", unweighted_mixture): (("C1: CE",), ("C1: ME", "component frequencies")),
    ("per_step", off_by_one): (("C1: ME", "C1: CE", "component frequencies"), ()),
    ("sequences", uniform_components): (("C2: ME: law", "CE in latent form"), ("C2: CE",)),
    ("sequences", unweighted_mixture): (("C2: CE: generations",), ("C2: ME: generations",)),
    ("sequences", off_by_one): (("C2: ME: generations", "C2: CE: generations"), ("C2: ME: law", "C2: CE: law")),
    ("sequences", stale_cache): (("C2: ME: generations", "C2: CE: generations"), ()),
    ("sequences", toothless_control): (("one component per sequence ",), ("C2: ",)),
    ("cache_floor", stale_cache): (("C4: lazy laws against a fresh prefill, float32",), ()),
    ("cache_floor", lost_span): (("C4: lazy laws against a fresh prefill, float32",), ()),
    ("generation", uniform_components): (("component frequencies",), ("ME reads", "CE reads")),
    ("generation", spendthrift): (("ME reads one law", "at batch 1 ME runs 1"), ("CE reads", "component frequencies")),
}  # fmt: skip


@pytest.mark.parametrize(("name", "plant"), CAUGHT, ids=lambda value: getattr(value, "__name__", value))
def test_a_planted_bug_fails_the_right_checks(name: str, plant: Plant, monkeypatch: pytest.MonkeyPatch) -> None:
    must_fail, must_hold = CAUGHT[name, plant]
    smaller: dict[str, Any] = {"cache_floor": {"dtypes": ("float32",)}}.get(name, {})
    plant(monkeypatch)
    record = tiny.experiment(name).run(tiny.config(name, **smaller))
    monkeypatch.undo()
    assert not record.held
    for start in must_fail:
        chosen = [check for check in record.checks if check.startswith(start)]
        assert chosen, start
        assert not any(record.checks[check] for check in chosen), (start, failed(record))
    for start in must_hold:
        chosen = [check for check in record.checks if check.startswith(start)]
        assert chosen, start
        assert all(record.checks[check] for check in chosen), (start, failed(record))
    for finding in record.findings:
        assert finding.held == (finding.verdict != "refuted as stated")


def test_every_experiment_has_a_planted_bug() -> None:
    assert {name for name, _ in CAUGHT} == set(NAMES) - set(tiny.APART)
    assert all(Path(__file__).with_name(file).is_file() for file in tiny.APART.values())


def test_a_dtype_that_overflows_is_named_and_the_others_are_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    module = tiny.experiment("cache_floor")
    measure = module._measure

    def overflowing(model: Any, name: str, dtype: str, config: Any) -> dict[str, Any]:
        if dtype == "float16":
            next(model.network.parameters()).data.fill_(math.nan)
        return measure(model, name, dtype, config)  # type: ignore[no-any-return]

    monkeypatch.setattr(module, "_measure", overflowing)
    record = module.run(tiny.config("cache_floor", models=("bundled:prose",), dtypes=("float32", "float16")))
    assert record.held
    assert [row["dtype"] for row in record.results["rows"]] == ["float32"]
    assert [cell["dtype"] for cell in record.results["unusable"]] == ["float16"]
    with pytest.raises(ValueError, match="no dtype of bundled:prose"):
        module.run(tiny.config("cache_floor", models=("bundled:prose",), dtypes=("float16",)))
