"""Expected scores against sums by brute force and against samples, their bounds, and what is refused."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest

from me_stats.models import TableModel, TopK, TransformersModel, Warped
from me_stats.presets import SIBLINGS, open_setting
from me_stats.samplers import CESampler
from me_stats.tasks import expected
from me_stats.tasks.expected import expected_scores

pytest.importorskip("lm_eval")

from me_stats.tasks.definitions import task
from me_stats.tasks.run import evaluate

ITEMS = 3


@pytest.fixture(scope="module")
def indentation() -> Any:
    return task("indentation")["indentation"]


@pytest.fixture(scope="module")
def law() -> Any:
    code = TransformersModel(SIBLINGS[1])
    return Warped(code, TopK(2))


def settled(text: str) -> bool:
    return bool(text.strip())


def by_force(law: Any, found: Any, length: int) -> list[float]:
    """Every text of `length` tokens of the likely ones, scored and weighed on its own."""
    vocabulary, sums = law.vocabulary, []
    for item in expected._items(found, expected.spread(len(found.eval_docs), ITEMS), expected.Encoder(law), length):
        total = 0.0
        prefixes: list[tuple[tuple[int, ...], float]] = [((), 1.0)]
        for _ in range(length):
            laws = law.log_probs([(*item.prompt, *ids) for ids, _ in prefixes]).double().exp().numpy()
            prefixes = [
                ((*ids, int(token)), mass * float(probs[token]))
                for (ids, mass), probs in zip(prefixes, laws, strict=True)
                for token in np.flatnonzero(probs)
            ]
        for ids, mass in prefixes:
            whole = itertools.takewhile(lambda token: token not in vocabulary.eos, ids)
            text = vocabulary.decode(list(whole))
            total += mass * item.score(text.partition(item.until[0])[0])
        sums.append(total)
    return sums


@pytest.mark.parametrize("length", [1, 5])
def test_all_texts_are_summed(law: Any, indentation: Any, length: int) -> None:
    found = expected_scores(
        {"law": law}, "indentation", indentation, limit=ITEMS, max_new_tokens=length, negligible=0.0
    )["law"]
    np.testing.assert_allclose(found.scores, by_force(law, indentation, length), atol=1e-6)
    assert found.gap < 1e-9
    # A text that is decided needs no more tokens, whatever comes after it.
    early = expected_scores(
        {"law": law}, "indentation", indentation, limit=ITEMS, max_new_tokens=length, negligible=0.0, decided=settled
    )["law"]
    np.testing.assert_allclose(early.scores, found.scores, atol=1e-6)


def test_laws_that_share_networks_are_walked_together(indentation: Any) -> None:
    ensemble = open_setting(SIBLINGS).ensemble
    laws = {"plain": ensemble, "cut": Warped(ensemble, TopK(3)), "code": ensemble.components[1]}
    options: dict[str, Any] = {"limit": ITEMS, "max_new_tokens": 10, "decided": settled, "negligible": 1e-4}
    together = expected_scores(laws, "indentation", indentation, **options)
    for name, one in laws.items():
        alone = expected_scores({name: one}, "indentation", indentation, **options)[name]
        # A beginning is followed where any law makes it likely, so together bounds are no wider.
        assert together[name].gap <= alone.gap + 1e-9
        assert (together[name].lower >= alone.lower - 1e-5).all()
        assert (together[name].upper <= alone.upper + 1e-5).all()
    assert together["cut"].scores != pytest.approx(together["code"].scores, abs=1e-3)


def test_bounds_hold_what_is_left_out_and_close(law: Any, indentation: Any) -> None:
    options: dict[str, Any] = {"limit": ITEMS, "max_new_tokens": 12, "decided": settled}
    exact = expected_scores({"law": law}, "indentation", indentation, negligible=0.0, **options)["law"].scores
    gaps = []
    for negligible in (1e-1, 1e-2, 1e-4):
        found = expected_scores({"law": law}, "indentation", indentation, negligible=negligible, **options)["law"]
        assert (found.lower <= exact + 1e-6).all()
        assert (found.upper >= exact - 1e-6).all()
        gaps.append(found.gap)
    assert gaps == sorted(gaps, reverse=True)
    assert gaps[0] > 0.01 > gaps[2]


def test_samples_have_the_expected_scores_and_their_items(law: Any, indentation: Any) -> None:
    seen: list[tuple[int, int]] = []
    found = expected_scores(
        {"law": law}, "indentation", indentation, limit=ITEMS, decided=settled, batch_size=2,
        progress=lambda done, total: seen.append((done, total)),
    )["law"]  # fmt: skip
    assert seen == [(0, ITEMS), (2, ITEMS)]
    sampled = evaluate(CESampler(law), {"indentation": indentation}, seeds=range(6), limit=ITEMS)["indentation"]
    assert sampled.items == found.items
    spread = np.sqrt((found.scores * (1 - found.scores)).sum() / 6) / ITEMS
    assert abs(sampled.mean - found.scores.mean()) < 6 * spread + found.gap


def test_what_cannot_be_summed_is_refused(law: Any, indentation: Any) -> None:
    with pytest.raises(ValueError, match="laws must be at least one"):
        expected_scores({}, "indentation", indentation)
    with pytest.raises(ValueError, match="over one vocabulary"):
        expected_scores({"a": law, "b": TableModel([[0.5, 0.5]], order=0)}, "indentation", indentation)
    texts = task("stdlib_bpb:prose")["stdlib_bpb:prose"]
    with pytest.raises(ValueError, match="draws no texts"):
        expected_scores({"law": law}, "stdlib_bpb:prose", texts)
