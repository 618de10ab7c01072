"""Shapes count what networks hold, and a roofline is the larger of moving and multiplying, part by part."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import pytest
import torch

from me_stats.cost import speed_up
from me_stats.forward_time import Measured
from me_stats.hardware import HARDWARE, Hardware, ModelShape, Roofline, limits, reached
from tests.networks import FAMILIES, SHAPE, V, network

SMALL = ModelShape(layers=2, body=1000, head=400, cache_width=8, query_width=4, vocabulary=100)
TOY = Hardware("toy", 1e3, {"float32": 1e6, "bfloat16": 2e6})


def weights_in_products(net: Any) -> int:
    """Parameters of every layer that multiplies or normalises, found by walking the modules."""
    looked_up = {id(m.weight) for m in net.modules() if isinstance(m, torch.nn.Embedding)} - {id(net.lm_head.weight)}
    return sum(p.numel() for p in {id(p): p for p in net.parameters() if id(p) not in looked_up}.values())


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3", "mistral", "gemma3", "gemma2"])
@pytest.mark.parametrize("tied", [True, False])
def test_shapes_count_parameters(family: str, tied: bool) -> None:
    config = FAMILIES[family]()
    config.tie_word_embeddings = tied
    net = network(config)
    shape = ModelShape.of(net)
    assert shape.head == V * SHAPE["hidden_size"]
    assert shape.body + shape.head == weights_in_products(net)
    assert shape.vocabulary == V
    assert shape.layers == 2
    assert shape.query_width == 32
    assert shape.cache_width == 2 * 2 * 2 * 8
    assert shape.dtype == "float32"
    assert shape.head_share == shape.head / weights_in_products(net)
    # A config is counted without its weights.
    assert dataclasses.replace(ModelShape.of(config), dtype="float32") == shape
    assert dataclasses.replace(ModelShape.of(config.to_dict()), dtype="float32") == shape


def test_keys_and_values_are_those_of_the_cache() -> None:
    from me_stats.models import TransformersModel

    model = TransformersModel(network(FAMILIES["llama"]()))
    assert ModelShape.of(model.network).cache_width * 4 == model.cache_bytes_per_token()


def test_what_has_no_shape_is_refused() -> None:
    with pytest.raises(ValueError, match="model_type"):
        ModelShape.of({"hidden_size": 4})
    body = network(FAMILIES["llama"]()).model
    with pytest.raises(ValueError, match="no output layer"):
        ModelShape.of(body)


def test_a_part_takes_what_is_slower_of_moving_and_multiplying() -> None:
    time = Roofline(SMALL, TOY)
    moved = (1000 + 400) * 4 / 1e3
    law = 20 * 100 / 1e3
    assert time.seconds(1, 1, 0) == pytest.approx(moved + law)
    # 2000 tokens multiply for 4 s, as long as the body takes to move; 4000 for twice as long.
    assert time.seconds(1, 2000, 0) == pytest.approx(moved + law)
    assert time.seconds(1, 4000, 0) == pytest.approx(moved + 4 + law)
    # Keys of 8 values: 32 bytes each.
    assert time.seconds(1, 1, 500) == pytest.approx(moved + law + 500 * 32 / 1e3)
    half = Roofline(SMALL, TOY, dtype="bfloat16")
    assert half.seconds(1, 1, 0) == pytest.approx(moved / 2 + 16 * 100 / 1e3)


def test_efficiency_and_launches_are_stated_not_hidden() -> None:
    ideal = Roofline(SMALL, TOY).seconds(1, 1, 100)
    slow = dataclasses.replace(TOY, memory_efficiency=0.5, launch_per_layer=0.25, launch_per_forward=1.0)
    assert Roofline(SMALL, slow).seconds(1, 1, 100) == pytest.approx(2 * ideal + 1.5)
    busy = dataclasses.replace(TOY, compute_efficiency=0.5)
    assert Roofline(SMALL, busy).seconds(1, 4000, 0) - Roofline(SMALL, TOY).seconds(1, 4000, 0) == pytest.approx(8)


@pytest.mark.parametrize(
    "change",
    [
        {"bandwidth": 0.0},
        {"peak": {"float32": 0.0}},
        {"memory_efficiency": 0.0},
        {"compute_efficiency": 1.5},
        {"launch_per_layer": -1.0},
    ],
)
def test_impossible_hardware_is_refused(change: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"must"):
        dataclasses.replace(TOY, **change)


def test_a_dtype_without_a_peak_is_refused() -> None:
    for dtype in ("float16", "int4"):
        with pytest.raises(ValueError, match="float32, bfloat16"):
            Roofline(SMALL, TOY, dtype=dtype)


def test_rates_of_a_measurement() -> None:
    flat = Measured((1, 2), (1.0, 1.0), (1, 2), (0.0, 0.0), 0.0, 0.0)
    assert reached(flat, SMALL).bandwidth == 5600
    assert math.isinf(reached(flat, SMALL).operations)


def test_forecasts_stay_between_their_limits() -> None:
    shapes = [dataclasses.replace(SMALL, body=10**6 * b, head=10**6, dtype="bfloat16") for b in (3, 5)]
    times = [Roofline(shape, HARDWARE["h100"]) for shape in shapes]
    bound = limits(shapes, [0.7, 0.3])
    assert bound.passes == pytest.approx(10 / (0.7 * 4 + 0.3 * 6))
    assert bound.arithmetic == pytest.approx(10 / (8 + 1))
    assert bound.keys == pytest.approx(2)
    one = speed_up(times, [0.7, 0.3], batch=1, steps=1000, prompt_length=1)
    assert one.ratio == pytest.approx(bound.passes, rel=0.02)
    many = speed_up(times, [0.7, 0.3], batch=100_000, steps=8, prompt_length=1, lockstep=True)
    assert 1 < many.ratio < bound.passes
    # Little but keys: a long prompt behind many rows.
    keys = speed_up(times, [0.7, 0.3], batch=10_000, steps=8, prompt_length=50_000, lockstep=True)
    assert many.ratio < keys.ratio < bound.keys
    equal = limits([SMALL] * 3, [1 / 3] * 3)
    assert equal.passes == pytest.approx(3)
    with pytest.raises(ValueError, match="weights"):
        limits([SMALL] * 2, [1.0])
