"""Forecasts of parts against what records say that the parts took."""

from __future__ import annotations

import json
from pathlib import Path
from statistics import median
from typing import Any, get_args

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from me_stats import plans
from me_stats.cost import ce_work, me_work, predicted_seconds
from me_stats.hardware import HARDWARE, ModelShape, Roofline
from me_stats.models.shapes import published_config
from me_stats.part_cost import SLOWER, ModelSize, Run, forecast, machine_of, runs_of
from me_stats.plans import Part
from me_stats.record import Record
from me_stats.scripts import load

RESULTS = Path(__file__).parents[1] / "experiments" / "results"
SMOLLM = {
    "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30, "num_attention_heads": 9,
    "num_key_value_heads": 3, "vocab_size": 49152, "tie_word_embeddings": True,
}  # fmt: skip


def size_of(config: Any) -> ModelSize:
    with torch.device("meta"):
        return ModelSize.of(AutoModelForCausalLM.from_config(config))


@pytest.fixture(scope="module")
def smollm() -> ModelSize:
    return size_of(LlamaConfig(**SMOLLM))


def recorded(name: str) -> tuple[Part, Record]:
    record = Record.load(RESULTS / f"{name}.json")
    experiment = name.partition("-")[0]
    return Part(experiment, "", load("experiments", experiment).Config(**tupled(record.config))), record


def tupled(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: tupled(one) for key, one in value.items()}
    return tuple(map(tupled, value)) if isinstance(value, list) else value


@pytest.mark.parametrize("size", get_args(plans.Size))
def test_every_part_of_every_plan_can_be_told(size: Any, smollm: ModelSize) -> None:
    for models in (None, ("a",), ("a", "b"), ("a", "b", "c")):
        for part in plans.plan(size=size, models=models):
            names = getattr(part.config, "models", ())
            found = forecast(part, dict.fromkeys(names, smollm), HARDWARE["h100"], kind="cuda")
            if found.seconds is None:
                assert found.left_out.startswith("all of it")
            else:
                assert 0 < found.seconds[0] < found.seconds[1]
                assert found.tokens >= found.forwards > 0
                assert found.memory > smollm.parameters * 2
            assert found.name == part.name


@pytest.mark.parametrize(
    "experiment",
    ["certificate", "sequences", "cache_floor", "transform_order", "generation", "speed", "weights", "long"],
)
def test_what_two_cores_took_is_near_the_forecast(experiment: str, smollm: ModelSize) -> None:
    part, record = recorded(f"{experiment}-smollm2-135m")
    hardware, _ = machine_of("cpu")
    found = forecast(part, {"smollm2-135m": smollm}, hardware, kind="cpu")
    assert found.seconds is not None
    low, high = found.seconds
    assert low / 2 <= record.wall_s <= 2 * high  # when written, all lay within


@pytest.mark.parametrize("name", ["7b", "qwen"])
def test_times_of_an_h100_are_where_the_forecast_has_them(name: str) -> None:
    results = json.loads((RESULTS / f"speed-bench-h100-{name}.json").read_text(encoding="utf-8"))["results"]
    shapes = dict.fromkeys(curve["model"].removeprefix("random:") for curve in results["curves"])
    times = [Roofline(ModelShape.of(published_config(shape)), HARDWARE["h100"], "bfloat16") for shape in shapes]
    ratios = []
    for cell in results["cells"]:
        rows, k = (cell["batch"], cell["steps"]), cell["k"]
        if cell["arm"] == "ME":
            path = np.random.default_rng(0).choice(k, size=rows, p=np.array(cell["weights"]) / sum(cell["weights"]))
            work = me_work(path, prompt_length=cell["prompt_length"])
        elif cell["arm"] in ("single", "CE"):
            work = ce_work(*rows, k, prompt_length=cell["prompt_length"])
        else:
            continue
        ratios.append(median(cell["seconds"]) / predicted_seconds(work, times))
    low, high = SLOWER["cuda"]
    assert low <= min(ratios)
    assert max(ratios) <= 1.02 * high


@pytest.mark.parametrize("name", ["7b", "qwen"])
def test_memory_on_an_h100_is_no_more_than_told(name: str) -> None:
    part, record = recorded(f"speed-bench-h100-{name}")
    sizes = {model: size_of(published_config(model.removeprefix("random:"))) for model in part.config.models}
    found = forecast(part, sizes, HARDWARE["h100"], kind="cuda")
    peak = max(cell["peak_memory"] for cell in record.results["cells"])
    assert peak <= found.memory <= 1.4 * peak


def test_host_memory_is_that_of_the_largest_model(smollm: ModelSize) -> None:
    part = Part("certificate", "", load("experiments", "certificate").Config(models=("a", "b"), dtype="bfloat16"))
    sizes = {"a": smollm, "b": size_of(published_config("qwen2.5-3b", layers=1))}
    assert sizes["b"].parameters > smollm.parameters
    assert forecast(part, sizes, HARDWARE["h100"], kind="cuda").host == 2 * sizes["b"].parameters
    assert forecast(part, sizes, HARDWARE["cpu-2"], kind="cpu").host == 0


def test_longer_rows_cost_in_proportion(smollm: ModelSize) -> None:
    config = load("experiments", "certificate").Config
    sizes = {"a": smollm, "b": smollm}
    seconds = [
        forecast(Part("certificate", "", config(models=("a", "b"), steps=steps)), sizes, HARDWARE["h100"], kind="cuda")
        for steps in (128, 256)
    ]
    assert seconds[1].forwards == pytest.approx(2 * seconds[0].forwards, rel=0.1)


def test_what_is_not_known_is_left_out(smollm: ModelSize) -> None:
    part = Part("certificate", "", load("experiments", "certificate").Config(models=("a", "b")))
    assert forecast(part, {"a": smollm}, HARDWARE["h100"], kind="cuda").left_out == "all of it"
    assert runs_of(Part("sensitivity", "", None), 2) == ([], "all of it")
    assert runs_of(part, 2)[0][0] == Run("ME", 32, 64)
    assert machine_of("cpu")[1] == "rates of two CPU cores"
