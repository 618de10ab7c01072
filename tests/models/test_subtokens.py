from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from me_stats import exact
from me_stats.divergence import tv_distance
from me_stats.mixing import ConstantMixing
from me_stats.models import (
    Aligned,
    Ensemble,
    FirstSubtoken,
    PublishedCE,
    TableModel,
    Temperature,
    TopK,
    UnionTopK,
    Warped,
    published_me,
)
from me_stats.samplers import CESampler, MESampler, SpeculativeSampler
from me_stats.testing import check_language_model, check_session
from me_stats.vocabulary_map import ByteStrings, TokenBytes
from tests.strategies import seeds

# A byte-level vocabulary, and one with longer strings that begin alike; a control, doubles, an end in the first alone.
FIRST = TokenBytes.greedy([b"a", b"b", b"ab", None, None, b"a"], eos=(3,))
SECOND = TokenBytes.greedy([b"aa", b"aab", b"aba", b"b", b"a", b"ba"])
TABLES = (FIRST, SECOND)
SHARED = ByteStrings(TABLES)
MIXING = ConstantMixing([0.6, 0.4])
END = SHARED.vocabulary.eos[0]


def aligned(rows: Sequence[Sequence[float]], tables: Sequence[TokenBytes] = TABLES) -> list[Aligned]:
    shared = ByteStrings(tables)
    return [
        Aligned(TableModel([row], order=0, eos=table.eos), shared, token_bytes=table)
        for row, table in zip(rows, tables, strict=True)
    ]


def random_pair(seed: int, *, order: int = 1) -> list[Aligned]:
    return [
        Aligned(
            TableModel.random(table.size, seed=2 * seed + i, order=order, eos=table.eos, concentration=0.7),
            SHARED,
            token_bytes=table,
        )
        for i, table in enumerate(TABLES)
    ]


def by_hand(
    laws: Sequence[dict[bytes | None, float]],
    tables: Sequence[TokenBytes],
    weights: Sequence[float],
    k: int,
    *,
    renormalise: str,
    score: str = "first_subtoken",
) -> tuple[dict[bytes | None, float], list[float]]:
    """The union scored string by string in plain Python; None is the end. Also each component's sum of scores."""
    union: set[bytes | None] = set()
    for law in laws:
        ranked = sorted(law.values(), reverse=True)
        union |= {s for s, p in law.items() if p > 0 and p >= (ranked[k - 1] if k <= len(ranked) else 0)}
    scored = []
    for law, table in zip(laws, tables, strict=True):
        own = {string for string in table.strings if string is not None}
        scores = {}
        for string in union:
            if string is None or string in own or score == "own":
                scores[string] = law.get(string, 0.0)
            else:
                read = table.encode_within(string)
                scores[string] = law.get(table.strings[read[0]], 0.0) if read else 0.0
        scored.append(scores)
    sums = [sum(scores.values()) for scores in scored]
    if renormalise == "component":
        scored = [{s: p / total for s, p in scores.items()} for scores, total in zip(scored, sums, strict=True)]
    mixed = {s: sum(w * scores[s] for w, scores in zip(weights, scored, strict=True)) for s in union}
    total = sum(mixed.values())
    return {s: p / total for s, p in mixed.items()}, sums


def as_dictionary(law: torch.Tensor, shared: ByteStrings) -> dict[bytes | None, float]:
    keys: list[bytes | None] = [*shared.strings, *(None for _ in shared.vocabulary.eos)]
    return dict(zip(keys, law.exp().tolist(), strict=True))


# --- the rule -------------------------------------------------------------------------------------------


def test_a_string_stands_for_itself_or_is_scored_by_its_first_subtoken() -> None:
    names = {string: number for number, string in enumerate(SHARED.strings)}
    rule = FirstSubtoken(FIRST, SHARED)
    found = {SHARED.strings[i]: SHARED.strings[j] for i, j in enumerate(rule(np.arange(len(SHARED.strings))))}
    assert found == {
        b"a": b"a", b"b": b"b", b"ab": b"ab", b"aa": b"a", b"ba": b"b", b"aab": b"a", b"aba": b"ab",
    }  # fmt: skip
    assert FirstSubtoken(SECOND, SHARED)(np.array([names[b"ab"]])).tolist() == [names[b"a"]]
    # The end is an end, and nothing that is spelled.
    assert FirstSubtoken(SECOND, SHARED)(np.array([END])).tolist() == [END]


def test_a_string_is_read_once_and_within_a_text() -> None:
    calls: list[bytes] = []

    def tokenize(data: bytes) -> list[int]:
        calls.append(data)
        return list(SECOND.encode_within(data))

    spaced = TokenBytes((*SECOND.strings, b" "), prefix=b" ", tokenize=tokenize)
    shared = ByteStrings([FIRST, spaced])
    rule = FirstSubtoken(spaced, shared)
    foreign = shared.strings.index(b"ab")
    for _ in range(3):
        rule(np.array([foreign, foreign, 0]))
    assert calls == [b"ab"]  # no space in front, and b"a" is its own


def test_a_string_that_cannot_be_read_has_no_score() -> None:
    shared = ByteStrings([FIRST, TokenBytes.greedy([b"x", b"a"])])
    assert FirstSubtoken(FIRST, shared)(np.array([shared.strings.index(b"x")])).tolist() == [-1]
    parts = aligned([[0.2, 0.2, 0.2, 0.2, 0.1, 0.1], [0.9, 0.1]], (FIRST, TokenBytes.greedy([b"x", b"a"])))
    model = UnionTopK(parts, MIXING, 1, renormalise="component", score="first_subtoken")
    law = as_dictionary(model.log_probs([()])[0], parts[0].shared)
    assert law[b"x"] == pytest.approx(0.4 * 0.9)  # the second's alone; the first gives all it has to "a"
    assert law[b"a"] == pytest.approx(0.6 + 0.4 * 0.1)


# --- the law --------------------------------------------------------------------------------------------

PIECES = st.lists(st.sampled_from([b"a", b"b", b"ab", b"ba", b"aa", b"bab", b"c", None]), max_size=5)


@settings(max_examples=60)
@given(PIECES, PIECES, st.booleans(), st.integers(1, 4), st.sampled_from(["joint", "component"]), st.booleans(), seeds)
def test_the_union_is_what_its_definition_says_string_by_string(
    one: list[Any], other: list[Any], ends: bool, k: int, renormalise: Any, first: bool, seed: int
) -> None:
    tables = [
        TokenBytes.greedy([*one, b"b", b"a", *([None] if ends else [])], eos=(len(one) + 2,) if ends else ()),
        TokenBytes.greedy([*other, b"a", b"b"]),
    ]
    rng = np.random.default_rng(seed)
    parts = aligned([rng.dirichlet(np.ones(table.size)).tolist() for table in tables], tables)
    score: Any = "first_subtoken" if first else "own"
    model = UnionTopK(parts, MIXING, k, renormalise=renormalise, score=score)
    raw = [part.log_probs([()]) for part in parts]
    laws = [as_dictionary(law[0], parts[0].shared) for law in raw]
    expected, sums = by_hand(laws, tables, [0.6, 0.4], k, renormalise=renormalise, score=score)
    found = as_dictionary(model.log_probs([()])[0], parts[0].shared)
    for string, p in found.items():
        assert p == pytest.approx(expected.get(string, 0.0), abs=1e-12)
    np.testing.assert_allclose(model.score_sums(raw)[0].numpy(), sums, rtol=0, atol=1e-12)


def test_scores_of_strings_that_begin_alike_sum_above_one() -> None:
    # k = 2: {a, b} and {aab, aa}; the first reads both as "a".
    parts = aligned([[0.5, 0.3, 0.2, 0, 0, 0], [0.4, 0.5, 0.1, 0, 0, 0]])
    model = UnionTopK(parts, MIXING, 2, renormalise="component", score="first_subtoken")
    assert model.score_sums([part.log_probs([()]) for part in parts])[0].tolist() == pytest.approx([1.8, 0.9])
    law = as_dictionary(model.log_probs([()])[0], SHARED)
    assert law[b"aa"] == pytest.approx(0.6 * 0.5 / 1.8 + 0.4 * 0.4 / 0.9)
    assert law[b"b"] == pytest.approx(0.6 * 0.3 / 1.8)
    own = UnionTopK(parts, MIXING, 2, renormalise="component")
    assert own.score_sums([part.log_probs([()]) for part in parts])[0].tolist() == pytest.approx([0.8, 0.9])
    apart = tv_distance(own.log_probs([()])[0], model.log_probs([()])[0])
    # "a" and "b" lose what "aa" and "aab" are given a second time.
    assert apart == pytest.approx(0.6 * (1 - 0.8 / 1.8))
    # Joint: 1.8 is mass as any other, and tilts the weights further.
    joint = UnionTopK(parts, MIXING, 2, score="first_subtoken").log_probs([()])[0]
    assert as_dictionary(joint, SHARED)[b"b"] == pytest.approx(0.6 * 0.3 / (0.6 * 1.8 + 0.4 * 0.9))


def last_subtoken(self: FirstSubtoken, ids: np.ndarray) -> np.ndarray:
    """The string of the last id stands in."""
    return np.array([self._targets[self._table.encode_within(SHARED.strings[i])[-1]] for i in ids])


def every_string_read(self: FirstSubtoken, ids: np.ndarray) -> np.ndarray:
    """A string is spelled with shorter ones even where the vocabulary has it."""
    shorter = [self._table.encode_within(SHARED.strings[i][:-1] or SHARED.strings[i])[0] for i in ids]
    return np.array([self._targets[token] for token in shorter])


@pytest.mark.parametrize("plant", [last_subtoken, every_string_read])
def test_the_definition_rejects_a_planted_bug(plant: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    parts = aligned([[0.3, 0.2, 0.5, 0, 0, 0], [0.4, 0.3, 0.2, 0.05, 0.05, 0]])
    model = UnionTopK(parts, MIXING, 3, renormalise="component", score="first_subtoken")
    laws = [as_dictionary(part.log_probs([()])[0], SHARED) for part in parts]
    expected, _ = by_hand(laws, TABLES, [0.6, 0.4], 3, renormalise="component")

    def gap() -> float:
        found = as_dictionary(model.log_probs([()])[0], SHARED)
        return sum(abs(p - expected.get(string, 0.0)) for string, p in found.items()) / 2

    assert gap() < 1e-12
    monkeypatch.setattr(FirstSubtoken, "__call__", plant)
    assert gap() > 0.02


@given(seeds, st.integers(1, 4))
def test_rows_of_a_batch_do_not_see_each_other(seed: int, k: int) -> None:
    model = UnionTopK(random_pair(seed), MIXING, k, renormalise="component", score="first_subtoken")
    prefixes = [(), (0,), (1, 2), (3,), (5,)]
    one_by_one = torch.cat([model.log_probs([prefix]) for prefix in prefixes])
    assert torch.equal(model.log_probs(prefixes), one_by_one)
    laws = [part.log_probs(prefixes) for part in model.components]
    before = [law.clone() for law in laws]
    model.combine(laws, MIXING.log_weights(prefixes))
    assert all(torch.equal(law, copy) for law, copy in zip(laws, before, strict=True))  # laws are not written to


@pytest.mark.parametrize("renormalise", ["joint", "component"])
def test_sampler_session_and_law_agree_exactly(renormalise: Any) -> None:
    model = UnionTopK(random_pair(3, order=2), MIXING, 2, renormalise=renormalise, score="first_subtoken")
    check_language_model(model)
    check_session(model, seed=1)
    law = exact.sequence_law(model, [0], max_new_tokens=2)
    assert law.total == pytest.approx(1, abs=1e-12)
    assert exact.sampler_law(CESampler(model), [0], max_new_tokens=2).tv_distance(law) < 1e-12
    draft = Ensemble([Warped(part, TopK(2)) for part in model.components], MIXING)
    speculative = SpeculativeSampler(model, draft)
    assert exact.sampler_law(speculative, [0], max_new_tokens=2).tv_distance(law) < 1e-12
    me = exact.sampler_law(MESampler(draft), [0], max_new_tokens=2)
    assert me.tv_distance(law) > 0.05  # the alternative: what ME samples is another law


def test_teacher_forced_laws_and_their_sums_along_a_path() -> None:
    model = UnionTopK(random_pair(1), MIXING, 2, renormalise="component", score="first_subtoken")
    path = [0, 3, 1]
    [(laws, log_weights)] = model.component_paths([(1,)], [path])
    prefixes = [(1,), (1, 0), (1, 0, 3)]
    assert torch.allclose(model.combine(laws, log_weights), model.log_probs(prefixes))
    own = [part.log_probs(prefixes) for part in model.components]
    assert torch.allclose(model.score_sums(laws), model.score_sums(own))


# --- the cause in PublishedCE ---------------------------------------------------------------------------


@given(seeds, st.integers(1, 3))
def test_the_published_mixed_ce_is_the_scored_union(seed: int, k: int) -> None:
    parts = random_pair(seed)
    published = PublishedCE(parts, MIXING, top_k=k)
    assert published.active == ("union", "first_subtoken", "joint", "top_k_again")
    for joint, renormalise in ((False, "component"), (True, "joint")):
        union = UnionTopK(parts, MIXING, k, renormalise=renormalise, score="first_subtoken")  # type: ignore[arg-type]
        causes: Any = ("union", "first_subtoken", *(["joint"] if joint else []))
        assert torch.allclose(published.with_causes(*causes).log_probs([(0,)]), union.log_probs([(0,)]), atol=1e-12)
        again = published.with_causes(*causes, "top_k_again")
        assert torch.allclose(again.log_probs([(0,)]), Warped(union, TopK(k)).log_probs([(0,)]), atol=1e-12)
    plain = UnionTopK(parts, MIXING, k, renormalise="component")
    assert torch.equal(published.with_causes("union").log_probs([(0,)]), plain.log_probs([(0,)]))


@given(seeds, st.integers(1, 3))
def test_without_the_union_the_cause_changes_nothing(seed: int, k: int) -> None:
    published = PublishedCE(random_pair(seed), MIXING, top_k=k, temperature=0.7)
    for others in ((), ("joint",), ("temperature", "top_k_again")):
        with_it, without = published.with_causes("first_subtoken", *others), published.with_causes(*others)
        assert torch.equal(with_it.log_probs([(0,)]), without.log_probs([(0,)]))


def test_it_is_inert_without_a_cut_and_without_strings() -> None:
    parts = random_pair(0)
    assert PublishedCE(parts, MIXING, top_k=None).active == ()
    assert "first_subtoken" not in PublishedCE([*parts[:1], Anonymous(parts[1])], MIXING, top_k=2).active
    # Warps around an alignment leave the strings what they are.
    hot = [Warped(part, Temperature(2.0)) for part in parts]
    assert "first_subtoken" in PublishedCE(hot, MIXING, top_k=2).active


class Anonymous:
    """A model over the shared strings by someone else, whose reading of them nobody knows."""

    def __init__(self, model: Aligned) -> None:
        self.vocabulary, self.log_probs = model.vocabulary, model.log_probs


def test_models_without_strings_are_refused() -> None:
    toys = [TableModel([[0.5, 0.5]], order=0)] * 2
    with pytest.raises(ValueError, match="need components that are Aligned"):
        UnionTopK(toys, MIXING, 1, score="first_subtoken")
    with pytest.raises(ValueError, match="need components that are Aligned"):
        UnionTopK([*random_pair(0)[:1], Anonymous(random_pair(0)[1])], MIXING, 1, score="first_subtoken")
    with pytest.raises(ValueError, match="score must be 'own' or 'first_subtoken'"):
        UnionTopK(toys, MIXING, 1, score="first")  # type: ignore[arg-type]


# --- what the published ME samples ----------------------------------------------------------------------


@pytest.mark.parametrize("own_ids", [True, False])
def test_published_me_is_exact_in_both_places(own_ids: bool) -> None:
    me = published_me(random_pair(2), MIXING, temperature=0.7, top_k=2, own_ids=own_ids)
    law = exact.sequence_law(me, [0], max_new_tokens=2)
    for sampler in (CESampler(me), MESampler(me)):
        assert exact.sampler_law(sampler, [0], max_new_tokens=2).tv_distance(law) < 1e-12


def test_transforms_go_inside_the_alignment() -> None:
    parts = random_pair(2)
    me = published_me(parts, MIXING, temperature=0.7, top_k=2)
    for component, part in zip(me.components, parts, strict=True):
        own = Warped(part.model, Temperature(0.7), TopK(2)).log_probs([part.read(b"a")])
        assert torch.equal(component.log_probs([(0,)]), part.push(own))
    # The model's own draws, converted afterwards: the same law string by string.
    outside = published_me(parts, MIXING, temperature=0.7, top_k=2, own_ids=False)
    bare = PublishedCE(parts, MIXING, temperature=0.7, top_k=2, causes=())
    assert torch.allclose(outside.log_probs([(0,)]), bare.log_probs([(0,)]), atol=1e-12)
    assert published_me(parts, MIXING, top_k=None).components[0].model is parts[0]  # nothing to put inside


def test_the_two_places_differ_by_equal_bytes_and_controls_alone() -> None:
    def gap(table: TokenBytes, row: list[float], **options: Any) -> float:
        parts = aligned([row], (table,))
        one = ConstantMixing([1.0])
        laws = [published_me(parts, one, own_ids=own, **options).log_probs([()])[0] for own in (True, False)]
        return float(tv_distance(laws[0], laws[1]))

    plain = TokenBytes.greedy([b"a", b"b", b"c", b"d"])
    doubles = TokenBytes.greedy([b"a", b"b", b"c", b"c"])
    control = TokenBytes.greedy([b"a", b"b", b"c", None])
    row = [0.35, 0.2, 0.15, 0.3]
    for options in ({"top_k": 2}, {"top_k": None, "temperature": 0.5}, {"top_k": 3, "temperature": 2.0}):
        assert gap(plain, row, **options) < 1e-15
    # Top 2 of the ids: a .35 and one c .30. Of the strings: c .45 and a .35.
    assert gap(doubles, row, top_k=2) == pytest.approx(0.35 / 0.65 - 0.35 / 0.80)
    # The control is one of the two kept ids, and then dropped: a alone. Of the strings: a and b.
    assert gap(control, row, top_k=2) == pytest.approx(0.2 / 0.55)
    # Tempering commutes with dropping a control, and not with adding up.
    assert gap(control, row, top_k=None, temperature=0.5) < 1e-15
    assert gap(doubles, row, top_k=None, temperature=0.5) > 0.05


@given(seeds, st.integers(1, 6), st.sampled_from([0.5, 1.0, 2.0]))
def test_without_them_the_place_does_not_matter(seed: int, k: int, temperature: float) -> None:
    table = TokenBytes.greedy([b"a", b"b", b"ab", None, b"ba"], eos=(3,))
    model = TableModel.random(table.size, seed=seed, order=1, eos=table.eos)
    part = Aligned(model, ByteStrings([table, SECOND]), token_bytes=table)
    one, options = ConstantMixing([1.0]), {"top_k": k, "temperature": temperature}
    laws = [published_me([part], one, own_ids=own, **options).log_probs([(0,)])[0] for own in (True, False)]  # type: ignore[arg-type]
    assert tv_distance(laws[0], laws[1]) < 1e-12
