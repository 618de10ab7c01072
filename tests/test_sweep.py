"""Sweeps over λ: right at every point, drawn again where a trace does not reach, the same after an interruption."""

from __future__ import annotations

import json
from functools import cache

import numpy as np
import pytest

from me_stats.exact import sequence_law
from me_stats.mixing import ConstantMixing
from me_stats.models import Ensemble, TableModel
from me_stats.record import plain
from me_stats.sensitivity import ExpectationPolynomial
from me_stats.sweep import Sweep, SweepPoint, simplex_grid, sweep
from tests.strategies import LastTokenMixing

STEPS = 4


@cache
def toys(count: int) -> tuple[TableModel, ...]:
    return tuple(TableModel.random(3, seed=seed + 5, order=1, eos=(2,)) for seed in range(count))


def mixture(weights: tuple[float, ...]) -> Ensemble:
    return Ensemble(toys(len(weights)), ConstantMixing(weights))


def run(weights: tuple[float, ...], grid: object, n: int = 4000, **options: object) -> Sweep:
    options = {"max_new_tokens": STEPS, "statistics": {"total": sum}, **options}
    return sweep(mixture(weights), [0], grid, n=n, **options)  # type: ignore[arg-type]


@pytest.mark.parametrize(("count", "steps"), [(2, 6), (3, 4)])
def test_every_point_is_right(count: int, steps: int) -> None:
    reference = (1 / count,) * count
    found = run(reference, simplex_grid(count, steps))
    polynomials = {
        name: ExpectationPolynomial.enumerate(toys(count), [0], f, max_new_tokens=STEPS)
        for name, f in (("total", sum), ("length", len))
    }
    law = sequence_law(mixture(reference), [0], max_new_tokens=STEPS)
    hits = []
    for point in found.points:
        own = sequence_law(mixture(point.weights), [0], max_new_tokens=STEPS)
        entropy = -float(np.exp(own.log_probs) @ own.log_probs)
        length = polynomials["length"].value(point.weights)
        exact = {
            "total": polynomials["total"].value(point.weights),
            "length": length,
            "log_prob": -entropy,
            "entropy_rate": entropy / length,
            "sequence_tv": own.tv_distance(law),
        }
        for name, value in exact.items():
            estimate = point.estimates[name]
            assert abs(estimate.value - value) <= 5 * estimate.stderr + 1e-9, (name, point.weights)
            hits.append(estimate.interval[0] - 1e-9 <= value <= estimate.interval[1] + 1e-9)
        for name, polynomial in polynomials.items():
            for slope, value in zip(point.gradients[name], polynomial.gradient(point.weights), strict=True):
                assert slope is None or abs(slope.value - value) <= 5 * slope.stderr + 1e-9
    assert np.mean(hits) > 0.85  # intervals at nominal 0.95; points share rows


def test_step_tv_of_two_components_is_a_multiple_of_theirs() -> None:
    found = run((0.5, 0.5), simplex_grid(2, 4))
    for point in found.points:
        prefixes: dict[tuple[int, ...], float] = {}
        law = sequence_law(mixture(point.weights), [0], max_new_tokens=STEPS)
        for row, mass in zip(law.sequences.tolist(), np.exp(law.log_probs), strict=True):
            tokens = [token for token in row if token >= 0]
            for step in range(len(tokens)):
                key = (0, *tokens[:step])
                prefixes[key] = prefixes.get(key, 0.0) + mass
        a, b = (toy.log_probs(list(prefixes)).exp().numpy() for toy in toys(2))
        mass = np.array(list(prefixes.values()))
        apart = float(mass @ (np.abs(a - b).sum(1) / 2) / mass.sum())
        estimate = point.estimates["step_tv"]
        assert abs(estimate.value - abs(point.weights[0] - 0.5) * apart) <= 4 * estimate.stderr + 1e-12


def test_redraws_where_the_rows_do_not_reach() -> None:
    grid = simplex_grid(2, 10)
    for options, expected in (({"maximum_tv": 1.0}, 1), ({"maximum_tv": 0.0}, 11), ({"minimum_ess": 0.97}, 3)):
        found = run((0.5, 0.5), grid, n=400, **options)
        drawn = [point for point in found.points if point.drawn]
        assert all(point.effective_sample_size == pytest.approx(400) for point in drawn)
        moved = [point for point in found.points if not point.drawn]
        floor = found.minimum_ess * 400
        assert all(point.effective_sample_size > floor for point in moved)
        assert len(drawn) == expected, options
        for point in moved:
            assert "re-weighted from λ=(" in point.estimates["length"].method
            assert "forwards_per_token_measured" not in point.cost
        for point in drawn:
            assert point.estimates["length"].method == "drawn"
            forecast, measured = point.cost["forwards_per_token"], point.cost["forwards_per_token_measured"]
            assert measured == pytest.approx(forecast, rel=0.3)


def test_a_reference_in_a_corner_is_left_by_drawing() -> None:
    found = run((1.0, 0.0), simplex_grid(2, 4), n=200)
    away = [point for point in found.points if point.weights != (1.0, 0.0)]
    assert all(point.source != (1.0, 0.0) for point in away)
    corner = found.points[-1]
    assert corner.gradients["length"][1] is None
    assert corner.gradients["length"][0] is not None


def test_one_component() -> None:
    (point,) = run((1.0,), simplex_grid(1, 3), n=50).points
    assert point.drawn
    assert point.estimates["step_tv"].value == point.estimates["sequence_tv"].value == 0.0
    assert point.cost["switches_per_token"] == 0.0
    assert point.estimates["tokens_per_forward"].value == pytest.approx(1.0)


def test_interrupted_and_resumed_gives_the_same_sweep() -> None:
    grid = simplex_grid(3, 4)
    options = {"n": 300, "corpus": np.log(np.random.default_rng(0).uniform(0.1, 0.9, size=(50, 3)))}
    whole = run((0.2, 0.3, 0.5), grid, **options)  # type: ignore[arg-type]
    kept: list[SweepPoint] = []

    def stop(point: SweepPoint) -> None:
        kept.append(point)
        if len(kept) == 7:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run((0.2, 0.3, 0.5), grid, on_point=stop, **options)  # type: ignore[arg-type]
    back = [SweepPoint.from_json(json.loads(json.dumps(plain(point)))) for point in kept]
    assert back == kept
    fresh: list[SweepPoint] = []
    resumed = run((0.2, 0.3, 0.5), grid, done=back, on_point=fresh.append, **options)  # type: ignore[arg-type]
    assert len(fresh) == len(grid) - 7
    assert resumed == whole


def test_infinities_survive_json() -> None:
    corpus = np.array([[-1.0, -np.inf], [-2.0, -0.5]])
    found = run((0.5, 0.5), simplex_grid(2, 2), n=100, corpus=corpus)
    ends = [point.estimates["nll"].value for point in found.points]
    assert ends[0] == np.inf
    assert np.isfinite(ends[1:]).all()
    assert [SweepPoint.from_json(json.loads(json.dumps(plain(p)))) for p in found.points] == list(found.points)


def test_task_reads_text() -> None:
    found = run((0.5, 0.5), [(0.5, 0.5)], n=50, task=lambda text: float(text.startswith("1")))
    share = found.points[0].estimates["task"].value
    assert 0 < share < 1
    assert "task" in found.names
    assert found.series("task")[0].tolist() == [share]


def test_grids() -> None:
    assert simplex_grid(1, 5) == [(1.0,)]
    for count, steps in ((2, 10), (3, 7), (4, 3)):
        grid = simplex_grid(count, steps)
        assert len(grid) == len(set(grid))
        for weights in grid:
            ConstantMixing(weights)
    with pytest.raises(ValueError, match="at least 1"):
        simplex_grid(2, 0)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"grid": [(0.5, 0.6)]}, "grid: weights must sum to 1"),
        ({"grid": []}, "grid must hold distinct weights"),
        ({"grid": [(0.5, 0.5), (0.5, 0.5)]}, "grid must hold distinct weights"),
        ({"grid": [(1.0,)]}, "grid has weights of 1 entries for 2"),
        ({"reference": (0.5, 0.4)}, "reference: weights must sum to 1"),
        ({"n": 1}, "n must be at least 2"),
        ({"minimum_ess": 0.0}, "minimum_ess"),
        ({"maximum_tv": 1.5}, "maximum_tv"),
        ({"statistics": {"length": len}}, "statistics may not use the names"),
        ({"corpus": np.zeros((5, 3))}, "corpus must be"),
        ({"max_new_tokens": 0}, "max_new_tokens"),
    ],
)
def test_bad_input_names_the_argument(changes: dict[str, object], message: str) -> None:
    options: dict[str, object] = {"grid": [(0.5, 0.5)], "n": 4, **changes}
    with pytest.raises(ValueError, match=message):
        run((0.5, 0.5), options.pop("grid"), options.pop("n"), **options)  # type: ignore[arg-type]


def test_a_router_needs_a_reference() -> None:
    routed = Ensemble(toys(2), LastTokenMixing(np.full((4, 2), 0.5)))
    with pytest.raises(ValueError, match="give a reference"):
        sweep(routed, [0], [(0.5, 0.5)], n=4, max_new_tokens=2)
    found = run((0.5, 0.5), [(0.5, 0.5)], n=4)
    with pytest.raises(ValueError, match="name must be one of"):
        found.series("perplexity")
