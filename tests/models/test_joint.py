from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from me_stats.divergence import tv_distance
from me_stats.mixing import ConstantMixing
from me_stats.models import Ensemble, MarkovModel, TableModel, Temperature, TopK, TopP, Warped
from me_stats.models.joint import CAUSES, Allowed, Cause, PublishedCE, Restricted, UnionTopK, published_me
from me_stats.samplers import CESampler, MESampler, SequenceMixtureSampler
from me_stats.testing import check_language_model, check_session, fuzz_session
from tests.strategies import LastTokenMixing, OutsideModel, ensembles, prompts, seeds

ROWS = ([0.40, 0.30, 0.15, 0.10, 0.05], [0.05, 0.15, 0.12, 0.22, 0.46])
TOYS = [TableModel([row], order=0) for row in ROWS]
MIXING = ConstantMixing([0.7, 0.3])


def law(model: Any) -> np.ndarray:
    return np.asarray(model.log_probs([()]).exp()[0])


def random_toys(seed: int, count: int = 2, size: int = 8) -> list[TableModel]:
    return [TableModel.random(size, seed=1000 * seed + i, order=0, concentration=0.7) for i in range(count)]


# --- UnionTopK ------------------------------------------------------------------------------------------


def by_definition(laws: np.ndarray, weights: np.ndarray, k: int, renormalise: str) -> np.ndarray:
    """UnionTopK in plain numpy: laws (K, V) and weights (K,)."""
    kept = np.zeros(laws.shape[1], dtype=bool)
    for row in laws:
        kept |= (row >= np.sort(row)[-min(k, len(row))]) & (row > 0)
    inside = laws * kept
    if renormalise == "component":
        inside = inside / inside.sum(1, keepdims=True)
    mixed = weights @ inside
    return np.asarray(mixed / mixed.sum())


@given(st.data(), st.integers(1, 5), st.sampled_from(["joint", "component"]))
def test_the_union_is_what_its_definition_says(data: st.DataObject, k: int, renormalise: Any) -> None:
    ensemble = data.draw(ensembles())
    prefix = data.draw(prompts(ensemble.vocabulary.size))
    laws = np.stack([component.log_probs([prefix])[0].exp().numpy() for component in ensemble.components])
    model = UnionTopK(ensemble.components, ensemble.mixing, k, renormalise=renormalise)
    expected = by_definition(laws, ensemble.mixing.weights.numpy(), k, renormalise)
    np.testing.assert_allclose(model.log_probs([prefix])[0].exp().numpy(), expected, rtol=0, atol=1e-12)


def test_the_two_ways_to_renormalise_differ_by_the_tilt_of_the_weights() -> None:
    # k = 1: A = {0, 4}, with masses .45 and .51.
    masses, weights = np.array([0.45, 0.51]), MIXING.weights.numpy()
    tilted = weights * masses / (weights @ masses)
    inside = [Warped(toy, Allowed([0, 4])) for toy in TOYS]
    joint, component = UnionTopK(TOYS, MIXING, 1), UnionTopK(TOYS, MIXING, 1, renormalise="component")
    assert law(joint) == pytest.approx(law(Ensemble(inside, ConstantMixing(tilted))))
    assert law(joint) == pytest.approx(law(Restricted(TOYS, MIXING, [0, 4])))
    assert law(joint) == pytest.approx(law(Warped(Ensemble(TOYS, MIXING), Allowed([0, 4]))))
    assert law(component) == pytest.approx(law(Ensemble(inside, MIXING)))
    apart = abs(tilted[0] - weights[0]) * tv_distance(inside[0].log_probs([()])[0], inside[1].log_probs([()])[0])
    assert tv_distance(joint.log_probs([()])[0], component.log_probs([()])[0]) == pytest.approx(apart)


def test_ties_are_kept_and_impossible_tokens_are_not() -> None:
    tied = TableModel([[0.3, 0.3, 0.3, 0.1, 0.0]], order=0)
    sure = TableModel([[0.0, 0.0, 0.0, 0.0, 1.0]], order=0)
    # The second entry of the sure law is 0, tied with every token that it cannot write.
    model = UnionTopK([tied, sure], ConstantMixing([0.5, 0.5]), 2)
    assert (law(model) > 0).tolist() == [True, True, True, False, True]
    # A component without weight widens the set all the same.
    assert (law(UnionTopK(TOYS, ConstantMixing([1.0, 0.0]), 1)) > 0).tolist() == [True, False, False, False, True]


@pytest.mark.parametrize(
    "build",
    [
        lambda e: UnionTopK(e.components, e.mixing, 2),
        lambda e: UnionTopK(e.components, e.mixing, 1, renormalise="component"),
        lambda e: PublishedCE(e.components, e.mixing, temperature=0.7, top_k=2, top_p=0.9),
        lambda e: Restricted(e.components, e.mixing, range(e.vocabulary.size)),
    ],
)
def test_sessions_agree_with_the_definition(build: Any) -> None:
    assert fuzz_session(build, max_examples=40).passed
    router = LastTokenMixing(np.random.default_rng(0).dirichlet(np.ones(3), 7))
    parts = [MarkovModel.random(6, seed=0), OutsideModel(MarkovModel.random(6, seed=1)), MarkovModel.random(6, seed=2)]
    model = build(Ensemble(parts, router))
    assert check_language_model(model).passed
    assert check_session(model).passed


# --- PublishedCE ----------------------------------------------------------------------------------------

settings = st.fixed_dictionaries(
    {
        "temperature": st.sampled_from([0.5, 1.0, 1.6]),
        "top_k": st.sampled_from([None, 1, 2, 4, 99]),
        "top_p": st.sampled_from([0.5, 0.9, 1.0]),
    }
) | st.fixed_dictionaries({"greedy": st.just(True), "top_k": st.sampled_from([None, 2, 4])})


@given(seeds, st.integers(1, 3), settings)
def test_without_causes_it_is_what_me_samples(seed: int, count: int, given_settings: dict[str, Any]) -> None:
    toys = random_toys(seed, count)
    mixing = ConstantMixing(np.random.default_rng(seed).dirichlet(np.ones(count)))
    bare = PublishedCE(toys, mixing, causes=(), **given_settings)
    assert law(bare) == pytest.approx(law(published_me(toys, mixing, **given_settings)), abs=1e-12)


@given(st.data(), settings)
def test_without_causes_ties_and_zeros_are_treated_alike(data: st.DataObject, given_settings: dict[str, Any]) -> None:
    ensemble = data.draw(ensembles())
    bare = PublishedCE(ensemble.components, ensemble.mixing, causes=(), **given_settings)
    me = published_me(ensemble.components, ensemble.mixing, **given_settings)
    for left, right in zip(bare.log_probs([(), (0,)]).exp(), me.log_probs([(), (0,)]).exp(), strict=True):
        np.testing.assert_allclose(left.numpy(), right.numpy(), rtol=0, atol=1e-12)


@given(seeds, settings)
def test_with_all_causes_it_is_the_warped_union(seed: int, given_settings: dict[str, Any]) -> None:
    toys = random_toys(seed)
    published = PublishedCE(toys, MIXING, **given_settings)
    own = {"temperature": 1.0, "top_k": None, "top_p": 1.0, "greedy": False} | given_settings
    k = own["top_k"] or 8
    warps = [published.temperature, TopK(k), published.top_p]
    expected = Warped(UnionTopK(toys, MIXING, k), *warps)
    if own["greedy"]:
        best = int(expected.log_probs([()]).argmax())
        assert law(published).tolist() == np.eye(8)[best].tolist()
    else:
        assert law(published) == pytest.approx(law(expected), abs=1e-12)


@given(seeds, settings, st.sets(st.sampled_from(CAUSES)))
def test_an_inert_cause_changes_nothing(seed: int, given_settings: dict[str, Any], causes: set[Cause]) -> None:
    published = PublishedCE(random_toys(seed), MIXING, causes=causes, **given_settings)
    active = published.with_causes(*(causes & set(published.active)))
    assert law(published) == pytest.approx(law(active), abs=1e-12)


@pytest.mark.parametrize("cause", [cause for cause in CAUSES if cause != "first_subtoken"])  # see test_subtokens.py
def test_each_cause_alone_is_what_its_name_says(cause: Cause) -> None:
    p, weights, tau, k, nucleus = np.array(ROWS), MIXING.weights.numpy(), 0.5, 3, 0.8

    def scale(rows: np.ndarray, power: float) -> np.ndarray:
        rows = rows**power
        return np.asarray(rows / rows.sum(-1, keepdims=True))

    def top(rows: np.ndarray, count: int) -> np.ndarray:
        return np.asarray(rows >= np.sort(rows)[..., -count, None])

    if cause in ("temperature", "union", "joint", "top_k_again"):
        given_settings: dict[str, Any] = {"temperature": tau, "top_k": k}
        hot = p if cause == "temperature" else scale(p, 1 / tau)
        kept = top(p, k)
        kept = kept.any(0)[None] if cause == "union" else kept
        inside = hot * kept
        if cause != "joint":
            inside = inside / inside.sum(1, keepdims=True)
        mixed = weights @ inside
        mixed = mixed / mixed.sum()
        if cause == "temperature":
            mixed = scale(mixed, 1 / tau)
        if cause == "top_k_again":
            mixed = scale(mixed * top(mixed, k), 1)
    elif cause == "top_p":
        given_settings = {"top_k": None, "top_p": nucleus}
        mixed = TopP(nucleus)(torch.tensor(weights @ p).log()[None]).exp()[0].numpy()
    else:
        given_settings = {"top_k": None, "greedy": True}
        mixed = np.eye(5)[(weights @ p).argmax()]
    published = PublishedCE(TOYS, MIXING, causes=(cause,), **given_settings)
    assert law(published) == pytest.approx(mixed, abs=1e-12)
    me = published.with_causes().log_probs([()])[0]
    assert tv_distance(published.log_probs([()])[0], me) > 0.001


def test_at_one_and_everything_kept_the_two_published_algorithms_are_one_law() -> None:
    toys = random_toys(3)
    plain = Ensemble(toys, MIXING).log_probs([()])[0]
    for model in (PublishedCE(toys, MIXING, top_k=None), published_me(toys, MIXING, top_k=None)):
        assert tv_distance(model.log_probs([()])[0], plain) < 1e-15
    assert PublishedCE(toys, MIXING, top_k=None).active == ()


# --- what is refused ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: UnionTopK(TOYS, MIXING, 0), "TopK needs an integer k of at least 1"),
        (lambda: UnionTopK(TOYS, MIXING, 2, renormalise="both"), "renormalise must be 'joint' or 'component'"),
        (lambda: UnionTopK(TOYS[:1], MIXING, 2), "mixing has 2 weights for 1 components"),
        (lambda: PublishedCE(TOYS, MIXING, causes=("top-k",)), "causes must be among temperature, union.* got top-k"),
        (lambda: PublishedCE(TOYS, MIXING, greedy=True, temperature=0.7), "greedy reads no temperature"),
        (lambda: published_me(TOYS, MIXING, greedy=True, top_p=0.9), "greedy reads no temperature and no top-p"),
        (lambda: Restricted(TOYS, MIXING, []), "Allowed needs at least one token id"),
        (lambda: Restricted(TOYS, MIXING, [1, 5]), r"token id 5, outside the vocabulary 0\.\.4"),
        (lambda: law(Warped(TableModel([[0, 1.0]], order=0), Allowed([0]))), "no mass to the allowed tokens"),
    ],
)
def test_bad_arguments_are_refused(build: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build()


@pytest.mark.parametrize("sampler", [MESampler, SequenceMixtureSampler])
@pytest.mark.parametrize(
    "model", [UnionTopK(TOYS, MIXING, 2), PublishedCE(TOYS, MIXING), Warped(UnionTopK(TOYS, MIXING, 2), Temperature(2))]
)
def test_me_refuses_a_joint_transform_and_names_the_repair(sampler: Any, model: Any) -> None:
    with pytest.raises(TypeError) as refusal:
        sampler(model)
    message = str(refusal.value)
    inner = getattr(model, "model", model)
    assert message.startswith(f"{sampler.__name__} cannot sample {type(inner).__name__}")
    assert ("under Temperature(tau=2)" in message) == isinstance(model, Warped)
    assert "joint transform of all K laws" in message
    assert "SpeculativeSampler with an ME draft, or CESampler of this model" in message
    assert CESampler(model).sample([()], max_new_tokens=3).tokens.shape == (1, 3)


def test_names_tell_what_a_model_is() -> None:
    assert repr(UnionTopK(TOYS, MIXING, 2)).endswith("2, renormalise='joint')")
    shown = repr(PublishedCE(TOYS, MIXING, temperature=0.7, causes=("joint", "union")))
    assert shown.endswith("Temperature(tau=0.7), TopK(k=10), TopP(p=1.0); causes 'union', 'joint')")
    assert repr(Restricted(TOYS, MIXING, [0])).endswith("Allowed(1 tokens))")
