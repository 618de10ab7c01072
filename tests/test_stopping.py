"""Rows that stop at a string: the tokens of a run that does not stop, cut at the first token that completes one."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from me_stats import stopping
from me_stats.draws import RowStreams
from me_stats.exact import sampler_law, sequence_law
from me_stats.mixing import ConstantMixing
from me_stats.models import Ensemble, TableModel, Temperature, TransformersModel, Warped
from me_stats.models.joint import Restricted
from me_stats.presets import MIXED_SIBLINGS, SIBLINGS, open_setting
from me_stats.samplers import (
    CESampler,
    FixedMaskSampler,
    MESampler,
    Sampler,
    SequenceMixtureSampler,
    SpeculativeSampler,
)
from me_stats.stopping import StopStrings, Watch, cut, lengths_of
from me_stats.trace import Trace
from me_stats.vocabulary import Vocabulary
from me_stats.vocabulary_map import ByteStrings, TokenBytes

pytestmark = pytest.mark.usefixtures("tables_for_any_length")


class Letters:
    """A tokenizer of someone else: one letter an id, and no more than `Vocabulary` asks for."""

    def encode(self, text: str, add_special_tokens: bool = False) -> list[int]:
        return [ord(letter) - ord("a") for letter in text]

    def decode(self, ids: Sequence[int]) -> str:
        return "".join(chr(ord("a") + token) for token in ids)


# Half an e with an acute accent is a token of its own, and so is the other half.
SPLIT = ByteStrings([TokenBytes.greedy([b"a", b"\xc3", b"\xa9", b"b"])])
LETTERS = Vocabulary(4, tokenizer=Letters())


def chains(vocabulary: Vocabulary = LETTERS) -> list[Any]:
    ends = vocabulary.eos
    models = [TableModel.random(vocabulary.size, seed=s, order=1, concentration=2.0, eos=ends) for s in (0, 1)]
    for model in models:
        model.vocabulary = vocabulary
    return models


def pair(vocabulary: Vocabulary = LETTERS) -> Ensemble:
    return Ensemble(chains(vocabulary), ConstantMixing([0.3, 0.7]))


ENDING = Vocabulary(4, eos=(3,), tokenizer=Letters())
SAMPLERS: dict[str, Callable[[Ensemble], Sampler]] = {
    "CE": CESampler,
    "CE latent": lambda ensemble: CESampler(ensemble, latent=True),
    "ME": MESampler,
    "ME in lockstep": lambda ensemble: MESampler(ensemble, lockstep=True),
    "one component per sequence": SequenceMixtureSampler,
    "speculative": lambda ensemble: SpeculativeSampler(Warped(ensemble, Temperature(0.5)), ensemble, chunk=3),
    "fixed mask": lambda ensemble: FixedMaskSampler(Restricted(ensemble.components, ensemble.mixing, range(4))),
}
every_sampler = pytest.mark.parametrize("build", SAMPLERS.values(), ids=SAMPLERS.keys())


def stopped(row: Sequence[int], vocabulary: Vocabulary, until: Sequence[str]) -> list[int]:
    """By the definition: the shortest beginning whose text contains a string, or all."""
    for count in range(len(row) + 1):
        if any(string in vocabulary.decode(row[:count]) for string in until):
            return list(row[:count])
    return list(row)


def right(trace: Trace, whole: Trace, until: Sequence[str]) -> bool:
    rows = [stopped(row, trace.model.vocabulary, until) for row in whole.sequences()]
    if trace.components is not None and whole.components is not None:
        kept = trace.components == whole.components[:, : trace.components.shape[1]]
        if not bool(kept[trace.mask].all()):
            return False
    return trace.sequences() == rows


# --- one sequence ------------------------------------------------------------------------------------------

PIECES = ["a", "ab", "ba", "é", "", "c", "caf"]
TABLE = [piece.encode() for piece in PIECES] + [b"\xc3", b"\xa9"]


def table_of(pieces: Sequence[bytes]) -> Vocabulary:
    """A vocabulary of byte strings with an id that is empty, which `ByteStrings` does not allow."""
    vocabulary = replace(SPLIT.vocabulary, size=len(pieces), fingerprint="pieces")
    stopping._tables.setdefault(vocabulary.tokenizer, {})[vocabulary] = list(pieces)
    return vocabulary


texts = st.lists(st.text(alphabet="abcé", min_size=1, max_size=4), min_size=1, max_size=3)


@given(ids=st.lists(st.integers(0, len(TABLE) - 1), max_size=12), until=texts, data=st.data())
def test_the_first_token_that_completes_a_string(ids: list[int], until: list[str], data: st.DataObject) -> None:
    stops = StopStrings(table_of(TABLE), until)
    found = [
        count
        for count in range(1, len(ids) + 1)
        if any(string.encode() in b"".join(TABLE[token] for token in ids[:count]) for string in until)
    ]
    first = min(found, default=None)
    assert stops.first(ids) == first
    after = data.draw(st.integers(0, (first or len(ids) + 1) - 1))
    assert stops.first(ids, after=after) == first


@given(
    ids=st.lists(st.integers(0, 3), max_size=40), until=st.lists(st.text("abcd", min_size=1, max_size=5), min_size=1)
)
def test_a_tokenizer_without_bytes_is_decoded(ids: list[int], until: list[str]) -> None:
    stops = StopStrings(LETTERS, until)
    assert stops._bytes is None
    expected = stopped(ids, LETTERS, until)
    found = stops.first(ids)
    assert ids[:found] == expected
    if found is not None:
        assert {stops.first(ids, after=after) for after in range(found)} == {found}


def test_a_string_and_a_character_may_straddle_tokens() -> None:
    a, b, half, other = SPLIT.encode(b"ab\xc3\xa9")
    stops = StopStrings(SPLIT.vocabulary, ["bé"])
    assert stops.first([a, b, half, other, a]) == 4
    assert stops.first([a, b, half, a, other]) is None
    assert stops.first([b, half, other], after=2) == 3


def test_bytes_of_fast_tokenizers() -> None:
    prose, words = (TransformersModel(name).vocabulary for name in ("bundled:prose", "bundled:words"))
    for vocabulary in (prose, words):
        ids = vocabulary.encode("a café, a house")
        for until in ("é", "fé,", ", a h", "use"):
            count = StopStrings(vocabulary, [until]).first(ids)
            assert count is not None
            assert until in vocabulary.decode(ids[:count])
            assert until not in vocabulary.decode(ids[: count - 1])
    # An id without bytes is found by its name.
    ids = (*words.encode("ab"), words.tokenizer.pad_token_id)
    assert StopStrings(words, ["<pad>"]).first(ids) == len(ids)
    assert StopStrings(words, ["b"])._bytes is StopStrings(words, ["c"])._bytes


def test_what_is_no_list_of_strings_is_refused() -> None:
    for wrong in ("ab", [""], [1], ["a", None]):
        with pytest.raises(ValueError, match="until must be a sequence of non-empty strings"):
            MESampler(pair()).sample([0], max_new_tokens=3, until=wrong)
    toy = Ensemble([TableModel.random(3, seed=0)], ConstantMixing([1.0]))
    with pytest.raises(ValueError, match=r"until=\['a'\] needs a vocabulary with a tokenizer"):
        CESampler(toy).sample([0], max_new_tokens=3, until=["a"])
    assert CESampler(toy).sample([0], max_new_tokens=3, until=[]).lengths.tolist() == [3]


def test_cut() -> None:
    assert [cut("abcabd", until) for until in ([], ["x"], ["b"], ["abd", "ca"], ["a"])] == [
        "abcabd", "abcabd", "a", "ab", "",
    ]  # fmt: skip


# --- samplers ----------------------------------------------------------------------------------------------


@every_sampler
@pytest.mark.parametrize("until", [["ab"], ["cba", "bb"], ["acb"], ["a", "bca"]])
def test_rows_are_those_of_an_endless_run_cut(build: Any, until: list[str]) -> None:
    for seed, vocabulary in enumerate((LETTERS, ENDING)):
        sampler = build(pair(vocabulary))
        given_: dict[str, Any] = {"n": 4, "max_new_tokens": 24, "seed": seed}
        whole = sampler.sample(["ab", "c"], **given_)
        for batch_size in (None, 1, 4):
            trace = sampler.sample(["ab", "c"], until=until, batch_size=batch_size, **given_)
            assert right(trace, whole, until)
            assert trace.until == tuple(until)


class Elsewhere(torch.Tensor):
    """A tensor that says it lives on an accelerator."""

    is_cpu = property(lambda self: False)  # type: ignore[assignment]


@pytest.mark.parametrize("every", [1, 7, 16, 1000])
@pytest.mark.parametrize("build", [CESampler, MESampler, SAMPLERS["ME in lockstep"]])
def test_how_often_ends_are_looked_for_changes_nothing(build: Any, every: int, monkeypatch: pytest.MonkeyPatch) -> None:
    sampler = build(pair(SPLIT.vocabulary))
    options: dict[str, Any] = {"n": 10, "max_new_tokens": 120, "batch_size": 20, "until": ["é", "aaa"]}
    prompt = sampler.sample([[0], [1]], **options)
    monkeypatch.setattr(stopping, "STEPS_BETWEEN_COMPACTIONS", every)
    drawn = RowStreams.__call__
    monkeypatch.setattr(
        RowStreams, "__call__", lambda self, *args, **given: drawn(self, *args, **given).as_subclass(Elsewhere)
    )
    late = sampler.sample([[0], [1]], **options)
    assert torch.equal(late.tokens, prompt.tokens)
    assert torch.equal(late.lengths, prompt.lengths)
    assert len(set(prompt.lengths.tolist())) > 3
    assert prompt.cost.reads <= late.cost.reads
    endless = sampler.sample([[0], [1]], **{**options, "until": ()})
    assert (late.cost.reads < endless.cost.reads) == (every < 1000)


def test_stop_reasons_and_different_steps() -> None:
    ensemble = pair(ENDING)
    trace = MESampler(ensemble).sample("a", n=200, max_new_tokens=9, until=["bb"], seed=1)
    texts = trace.texts()
    assert set(trace.stop_reason) == {"eos", "until", "length"}
    for text, reason, length in zip(texts, trace.stop_reason, trace.lengths.tolist(), strict=True):
        assert (reason == "until") == text.endswith("bb")
        assert (reason == "eos") == text.endswith("d")
        assert text.count("bb") == (reason == "until")
        assert len(text) == length
        assert length == 9 or reason != "length"
    assert len(set(trace.lengths.tolist())) > 4
    assert trace.log_probs.shape == trace.tokens.shape
    assert trace.one_per_group().stop_reason == trace.stop_reason
    free = MESampler(ensemble).sample("a", n=200, max_new_tokens=9, seed=1)
    assert "until" not in free.stop_reason


@every_sampler
def test_a_string_of_the_prompt_does_not_stop(build: Any) -> None:
    sampler = build(pair())
    whole = sampler.sample("abcb", n=8, max_new_tokens=6)
    # Neither what it contains, nor what its end and the first token make up.
    found = whole.texts()
    until = ["abc", "b" + found[0][0], "cb" + found[1][0]]
    trace = sampler.sample("abcb", n=8, max_new_tokens=6, until=until)
    assert right(trace, whole, until)
    assert int(trace.lengths[0]) > 1


class Stopped(MESampler):
    """ME with stop strings of its own, for `exact`."""

    def sample(self, *args: Any, **options: Any) -> Trace:
        return super().sample(*args, until=["ba", "cc"], **options)


def test_the_law_is_that_of_the_stopped_sequence() -> None:
    ensemble = pair(ENDING)
    law, expected = sampler_law(Stopped(ensemble), "a", max_new_tokens=4), {}
    free = sequence_law(ensemble, "a", max_new_tokens=4)
    for row, log_p in zip(free.rows, free.log_probs, strict=True):
        short = tuple(stopped(row, ENDING, ["ba", "cc"]))
        expected[short] = expected.get(short, 0.0) + float(np.exp(log_p))
    found = dict(zip(map(tuple, law.rows), np.exp(law.log_probs), strict=True))
    assert found.keys() == expected.keys()
    assert max(abs(found[row] - mass) for row, mass in expected.items()) < 1e-12
    assert len(found) < len(free.rows)


@pytest.mark.parametrize("names", [SIBLINGS, MIXED_SIBLINGS])
def test_bundled_siblings_stop_where_their_text_says(names: tuple[str, str]) -> None:
    setting, until = open_setting(names), ["\n", " the", "se"]
    given_: dict[str, Any] = {"n": 3, "max_new_tokens": 24, "seed": 3}
    sampler = MESampler(setting.ensemble)
    whole = sampler.sample(setting.prompts[:2], **given_)
    for other, batch_size in ((sampler, 4), (MESampler(setting.ensemble, lockstep=True), None)):
        trace = other.sample(setting.prompts[:2], until=until, batch_size=batch_size, **given_)
        assert right(trace, whole, until)
        assert trace.cost.reads < whole.cost.reads


# --- planted bugs: what a careless search would do -----------------------------------------------------------


def each_token_alone(self: StopStrings, ids: Sequence[int], *, after: int = 0) -> int | None:
    found = (place + 1 for place in range(after, len(ids)) if self._vocabulary.decode([ids[place]]) in self.until)
    return next(found, None)


def one_too_far(self: StopStrings, ids: Sequence[int], *, after: int = 0) -> int | None:
    found = RIGHT(self, ids, after=after)
    return None if found is None else min(found + 1, len(ids))


def one_too_short(self: StopStrings, ids: Sequence[int], *, after: int = 0) -> int | None:
    found = RIGHT(self, ids, after=after)
    return None if found is None else found - 1


def only_at_the_end(self: StopStrings, ids: Sequence[int], *, after: int = 0) -> int | None:
    return len(ids) if RIGHT(self, ids) is not None else None


def decoded_since_the_last_look(self: StopStrings, ids: Sequence[int], *, after: int = 0) -> int | None:
    found = RIGHT(self, ids[after:])
    return None if found is None else after + found


RIGHT = StopStrings.first


@pytest.mark.parametrize("bug", [None, each_token_alone, one_too_far, one_too_short, only_at_the_end])
@pytest.mark.parametrize("vocabulary", [LETTERS, SPLIT.vocabulary])
def test_planted_bugs_change_where_rows_end(bug: Any, vocabulary: Vocabulary, monkeypatch: pytest.MonkeyPatch) -> None:
    until = ["aba", "cb"] if vocabulary is LETTERS else ["é"]
    sampler = MESampler(pair(vocabulary))
    # On tables whole rows are written first: what a row has is what the search says.
    options: dict[str, Any] = {"n": 40, "max_new_tokens": 20}
    whole = sampler.sample([0], **options)
    if bug is not None:
        monkeypatch.setattr(StopStrings, "first", bug)
    assert right(sampler.sample([0], until=until, **options), whole, until) == (bug is None)


def test_a_watch_that_forgets_the_tail_wastes_work(monkeypatch: pytest.MonkeyPatch) -> None:
    # Tokens are right whatever the watch says; what it misses is paid for.
    ids = LETTERS.encode("abcabc")
    rows = np.zeros(1, dtype=np.int64)
    for bug, expected in ((None, [False, True]), (decoded_since_the_last_look, [False, False])):
        if bug is not None:
            monkeypatch.setattr(StopStrings, "first", bug)
        watch = Watch(LETTERS, StopStrings(LETTERS, ["ab"]), 1)
        assert [bool(len(watch.see(rows, torch.tensor([token])))) for token in ids[:2]] == expected
        assert bool(watch.alive[0]) == (bug is not None)


def test_a_watch_says_an_end_once() -> None:
    watch = Watch(ENDING, StopStrings(ENDING, ["ab"]), 3)
    rows = np.array([0, 1, 1, 2])
    assert watch.see(rows, torch.tensor([3, 0, 1, 0])).tolist() == [0, 1]
    assert watch.see(rows, torch.tensor([3, 0, 1, 3])).tolist() == [2]
    assert watch.alive.tolist() == [False] * 3
    free = Watch(LETTERS, None, 2)
    assert free.see(np.array([0, 1]), torch.tensor([1, 2])).tolist() == []


def test_lengths() -> None:
    grid = torch.tensor([[0, 1, 2, 3], [0, 3, 1, 1], [2, -1, -1, -1], [2, 2, 2, 2]])
    assert lengths_of(grid, (), None).tolist() == [4, 4, 1, 4]
    assert lengths_of(grid, (3,), None).tolist() == [4, 2, 1, 4]
    assert lengths_of(grid, (3,), StopStrings(LETTERS, ["b", "ccc"])).tolist() == [2, 2, 1, 3]
