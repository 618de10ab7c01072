"""Orders of transforms: the theorem for every transform, closed forms of the others, and the way between two."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from me_stats.divergence import tv_distance
from me_stats.exact import sampler_law, sequence_law
from me_stats.models import Aligned, Ensemble, TableModel
from me_stats.models.joint import CAUSES, PublishedCE
from me_stats.orders import ORDERS, Order, OrderedLaw, Transforms, stages
from me_stats.samplers import CESampler, MESampler
from me_stats.vocabulary_map import ByteStrings, TokenBytes
from tests.strategies import seeds

# Only published orders have no min-p, and an arg max there reads no temperature and no top-p.
SETTINGS = [
    Transforms(),
    Transforms(temperature=0.7),
    Transforms(temperature=2.0),
    Transforms(top_k=2),
    Transforms(top_p=0.6),
    Transforms(min_p=0.3),
    Transforms(greedy=True),
    Transforms(temperature=0.7, top_k=3, top_p=0.9, min_p=0.05),
]
FOR_ALL = [settings for settings in SETTINGS if settings.min_p == 0]


def random_rows(seed: int, count: int, size: int) -> np.ndarray:
    return np.random.default_rng(seed).dirichlet(np.ones(size), count)


def tables(rows: Any) -> list[TableModel]:
    return [TableModel(np.asarray(row)[None], order=0) for row in rows]


def random_weights(seed: int, count: int) -> tuple[float, ...]:
    weights = np.random.default_rng(seed + 1).dirichlet(np.ones(count))
    return (*weights[:-1].tolist(), 1 - float(weights[:-1].sum()))


def law(order: Order, settings: Transforms, weights: Any, toys: Any) -> Any:
    return OrderedLaw(order, settings, tuple(weights)).over(toys)


def gap(one: Any, other: Any) -> float:
    return float(tv_distance(one.log_probs([()])[0], other.log_probs([()])[0]))


# The theorem


@given(seeds, st.integers(1, 3), st.sampled_from(SETTINGS))
def test_me_is_ce_for_every_transform_that_stands_inside(seed: int, count: int, settings: Transforms) -> None:
    toys = [TableModel.random(4, seed=seed + i, order=1) for i in range(count)]
    model = law("transform-then-mix", settings, random_weights(seed, count), toys)
    assert isinstance(model, Ensemble)
    expected = sequence_law(model, [0], max_new_tokens=2)
    assert sampler_law(MESampler(model), [0], max_new_tokens=2).tv_distance(expected) < 1e-12
    assert sampler_law(CESampler(model), [0], max_new_tokens=2).tv_distance(expected) < 1e-12


@pytest.mark.parametrize("order", [order for order in ORDERS if order != "transform-then-mix"])
def test_me_refuses_the_other_orders(order: Order) -> None:
    with pytest.raises(TypeError, match="MESampler"):
        MESampler(law(order, Transforms(temperature=0.7, top_k=2), (0.5, 0.5), tables(random_rows(0, 2, 4))))


@given(seeds, st.sampled_from(FOR_ALL))
def test_one_component_has_no_order(seed: int, settings: Transforms) -> None:
    toys = tables(random_rows(seed, 1, 5))
    inside = law("transform-then-mix", settings, (1.0,), toys)
    for order in ("mix-then-transform", "published-ce"):
        assert gap(law(order, settings, (1.0,), toys), inside) < 1e-12


@given(seeds, st.integers(1, 3), st.sampled_from(ORDERS))
def test_what_changes_nothing_has_no_order(seed: int, count: int, order: Order) -> None:
    toys, weights = tables(random_rows(seed, count, 4)), random_weights(seed, count)
    settings = Transforms(top_k=4) if order.startswith("union") else Transforms()
    assert gap(law(order, settings, weights, toys), law("transform-then-mix", Transforms(), weights, toys)) < 1e-12


# Closed forms


@given(seeds, st.floats(0.05, 0.95))
def test_greedy_parts_by_the_weight_that_disagrees(seed: int, weight: float) -> None:
    rows, weights = random_rows(seed, 2, 4), (weight, 1 - weight)
    settings, toys = Transforms(greedy=True), tables(random_rows(seed, 2, 4))
    agrees = rows.argmax(1) == (np.array(weights) @ rows).argmax()
    expected = 1 - np.array(weights)[agrees].sum()
    inside = law("transform-then-mix", settings, weights, toys)
    assert gap(law("mix-then-transform", settings, weights, toys), inside) == pytest.approx(expected, abs=1e-12)
    assert gap(law("published-ce", settings, weights, toys), inside) == pytest.approx(expected, abs=1e-12)


def test_greedy_of_two_sure_components_keeps_the_heavier() -> None:
    toys = tables([[1.0, 0.0], [0.0, 1.0]])
    inside, after = (law(o, Transforms(greedy=True), (0.6, 0.4), toys) for o in ("transform-then-mix", ORDERS[1]))
    assert gap(inside, after) == pytest.approx(0.4)


@given(seeds, st.floats(0.05, 0.95), st.integers(1, 3))
def test_unions_part_by_the_tilt_of_the_weights(seed: int, weight: float, k: int) -> None:
    rows, weights = random_rows(seed, 2, 6), (weight, 1 - weight)
    kept = sorted({int(token) for row in rows for token in np.argsort(-row)[:k]})
    masses = rows[:, kept].sum(1)
    tilted = weight * masses[0] / (weight * masses[0] + (1 - weight) * masses[1])
    inside = rows[:, kept] / masses[:, None]
    expected = abs(tilted - weight) * np.abs(inside[0] - inside[1]).sum() / 2
    joint, component = (
        law(order, Transforms(top_k=k), weights, tables(rows)) for order in ("union-joint", "union-component")
    )
    assert gap(joint, component) == pytest.approx(expected, abs=1e-12)
    assert joint.log_probs([()]).exp().numpy()[0, kept] == pytest.approx(
        np.array(weights) @ rows[:, kept] / (np.array(weights) @ masses)
    )


# From one law to another


@given(seeds, st.sampled_from([Transforms(temperature=0.7, top_k=2), Transforms(top_k=3, top_p=0.8), SETTINGS[-1]]))
def test_stages_end_at_the_second_law(seed: int, settings: Transforms) -> None:
    toys = tables(random_rows(seed, 2, 5))
    first = OrderedLaw("transform-then-mix", settings, (0.6, 0.4))
    for order in ORDERS[1:]:
        if settings.min_p and order != "mix-then-transform":
            continue
        for weights in ((0.6, 0.4), (0.5, 0.5)):
            second = OrderedLaw(order, settings, weights)
            way = stages(first, second, toys)
            assert gap(way[-1].cumulative, second.over(toys)) < 1e-12
            assert (way[0].name == "weights") == (weights != first.weights)
            assert way[0].alone is not None
            assert gap(way[0].alone, way[0].cumulative) < 1e-12


def test_stages_name_what_differs() -> None:
    toys, settings = tables(random_rows(0, 2, 5)), Transforms(temperature=0.7, top_k=2, top_p=0.9)
    first = OrderedLaw("transform-then-mix", settings, (0.6, 0.4))

    def names(second: OrderedLaw) -> list[str]:
        return [stage.name for stage in stages(first, second, toys)]

    assert names(first) == []
    assert names(OrderedLaw("mix-then-transform", settings, (0.6, 0.4))) == ["temperature", "top_k", "top_p"]
    published = names(OrderedLaw("published-ce", settings, (0.6, 0.4)))
    assert published == [cause for cause in CAUSES if cause not in ("greedy", "first_subtoken")]
    assert names(OrderedLaw("union-component", settings, (0.6, 0.4))) == ["union"]
    assert names(OrderedLaw("union-joint", settings, (0.6, 0.4))) == ["union", "joint"]
    assert names(OrderedLaw("transform-then-mix", Transforms(), (0.5, 0.5))) == ["weights", "settings"]
    assert stages(OrderedLaw("mix-then-transform", settings, (0.6, 0.4)), first, toys) == ()


def test_several_vocabularies_renormalise_each_component() -> None:
    strings = ([b"a", b"b", b"ab"], [b"b", b"a", b"ba"])
    shared = ByteStrings([TokenBytes.greedy(own) for own in strings])
    parts = [
        Aligned(toy, shared, token_bytes=table)
        for toy, table in zip(tables(random_rows(1, 2, 3)), shared.tables, strict=True)
    ]
    model = law("published-ce", Transforms(top_k=2), (0.5, 0.5), parts)
    assert isinstance(model, PublishedCE)
    assert "joint" not in model.causes
    assert "joint" in law("published-ce", Transforms(top_k=2), (0.5, 0.5), tables(random_rows(1, 2, 3))).causes


@pytest.mark.parametrize(
    ("given_law", "message"),
    [
        (("mixed", Transforms(), (0.5, 0.5)), "order must be one of transform-then-mix, mix-then-transform, "),
        (("union-joint", Transforms(), (0.5, 0.5)), "union-joint is a union of top-k sets: set top_k"),
        (("published-ce", Transforms(min_p=0.1), (0.5, 0.5)), "published-ce has no min-p"),
        (("published-ce", Transforms(temperature=-1), (0.5, 0.5)), "Temperature must be finite and at least 0"),
        (("published-ce", Transforms(), (0.5, 0.6)), "weights must sum to 1"),
    ],
)
def test_refusals(given_law: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        OrderedLaw(*given_law)
