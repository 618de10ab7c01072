from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

from me_stats import exact
from me_stats.divergence import tv_distance
from me_stats.mixing import ConstantMixing
from me_stats.models import Conditioned, Endless, Ensemble, TableModel, TopK, TransformersModel, Warped
from me_stats.models.aligned import Aligned, AlignedSession, PushForward
from me_stats.models.base import PrefixSession
from me_stats.models.catalog import pulled
from me_stats.samplers import CESampler, MESampler
from me_stats.testing import ModelRejected, check_language_model, check_session
from me_stats.tokenizer_bytes import read_tokenizer
from me_stats.vocabulary import Vocabulary
from me_stats.vocabulary_map import ByteStrings, TokenBytes
from tests import stand_ins

# Overlapping strings, a string that two ids share, a control token, an end id of other number; "é" in halves and whole.
FIRST = TokenBytes.greedy([b"a", b"b", b"ab", None, b"a"], eos=(3,))
SECOND = TokenBytes.greedy([b"b", None, b"a", b"ba", None, b"bab"], eos=(4,))
SHARED = ByteStrings([FIRST, SECOND])
STRINGS = st.lists(st.integers(0, len(SHARED.strings) - 1), max_size=7)


def toy(table: TokenBytes, seed: int, *, order: int = 2, concentration: float = 1.0) -> TableModel:
    return TableModel.random(table.size, seed=seed, order=order, eos=table.eos, concentration=concentration)


def pair(*, top: int | None = None, order: int = 2) -> list[Aligned]:
    models: list[Any] = [toy(FIRST, 0, order=order), toy(SECOND, 1, order=order)]
    if top is not None:
        models = [Warped(model, TopK(top)) for model in models]
    return [Aligned(model, SHARED, token_bytes=table) for model, table in zip(models, (FIRST, SECOND), strict=True)]


def by_hand(model: Any, table: TokenBytes, history: bytes) -> dict[bytes | None, float]:
    """The definition with a dictionary; None is the end."""
    probs = model.log_probs([table.encode(history)]).exp()[0].tolist()
    law: dict[bytes | None, float] = {}
    for token, (string, p) in enumerate(zip(table.strings, probs, strict=True)):
        if string is not None or token in table.eos:
            law[string] = law.get(string, 0.0) + p
    total = sum(law.values())
    return {string: p / total for string, p in law.items()}


@given(STRINGS)
def test_the_law_is_the_sum_over_ids_with_the_same_bytes(prefix: list[int]) -> None:
    for aligned in pair():
        expected = by_hand(aligned.model, aligned.token_bytes, SHARED.bytes_of(prefix))
        law = aligned.log_probs([prefix])[0].exp()
        for number, string in enumerate((*SHARED.strings, None)):
            assert float(law[number]) == pytest.approx(expected.get(string, 0.0), abs=1e-12)


@given(STRINGS, st.randoms(use_true_random=False))
def test_every_spelling_of_a_history_has_one_law(prefix: list[int], random: Any) -> None:
    data = SHARED.bytes_of(prefix)
    other: list[int] = []
    while len(SHARED.bytes_of(other)) < len(data):
        rest = data[len(SHARED.bytes_of(other)) :]
        other.append(random.choice([i for i, s in enumerate(SHARED.strings) if rest.startswith(s)]))
    for aligned in pair():
        assert torch.equal(aligned.log_probs([prefix]), aligned.log_probs([other]))


@pytest.mark.parametrize("top", [None, 2])
def test_ce_and_me_are_equal_over_mixed_vocabularies(top: int | None) -> None:
    ensemble = Ensemble(pair(top=top), ConstantMixing([0.3, 0.7]))
    prompt = SHARED.encode("ba")
    law = exact.sequence_law(ensemble, prompt, max_new_tokens=3)
    assert law.total == pytest.approx(1, abs=1e-12)
    for sampler in (CESampler(ensemble), MESampler(ensemble)):
        assert exact.sampler_law(sampler, prompt, max_new_tokens=3).tv_distance(law) < 1e-12


PIECES = st.lists(st.sampled_from([b"a", b"b", b"ab", b"ba", b"aa", b"bab", None]), max_size=4)


@settings(max_examples=25)
@given(PIECES, PIECES, st.booleans(), st.booleans(), st.integers(0, 99))
def test_any_two_vocabularies(one: list[Any], other: list[Any], first_ends: bool, last_ends: bool, seed: int) -> None:
    # Bytes that both can read, and whatever else: doubles, controls, an end in one, in both or in none.
    tables = []
    for pieces, ends in ((one, first_ends), (other, last_ends)):
        strings = [*pieces, b"b", b"a", *([None] if ends else [])]
        tables.append(TokenBytes.greedy(strings, eos=(len(strings) - 1,) if ends else ()))
    shared = ByteStrings(tables)
    parts = [Aligned(toy(table, seed + i, order=1), shared, token_bytes=table) for i, table in enumerate(tables)]
    ensemble = Ensemble([parts[0], Warped(parts[1], TopK(3))], ConstantMixing([0.4, 0.6]))
    law = exact.sequence_law(ensemble, [0], max_new_tokens=2)
    for sampler in (CESampler(ensemble), MESampler(ensemble)):
        assert exact.sampler_law(sampler, [0], max_new_tokens=2).tv_distance(law) < 1e-12


def test_a_transform_after_the_mixture_is_another_law() -> None:
    inside = Ensemble(pair(top=2), ConstantMixing([0.3, 0.7]))
    outside = Warped(Ensemble(pair(), ConstantMixing([0.3, 0.7])), TopK(2))
    laws = [exact.sequence_law(model, [0], max_new_tokens=2) for model in (inside, outside)]
    assert laws[0].tv_distance(laws[1]) > 0.05


def test_the_end_is_shared_by_role_and_may_have_several_ids() -> None:
    table = TokenBytes.greedy([None, b"a", None], eos=(0, 2))
    shared = ByteStrings([table, TokenBytes.greedy([b"a", b"b"])])
    model = TableModel([[0.2, 0.5, 0.3]], order=0, eos=(0, 2))
    law = Aligned(model, shared, token_bytes=table).log_probs([()]).exp()[0]
    assert law.tolist() == pytest.approx([0.5, 0.0, 0.5])
    assert shared.vocabulary.eos == (2,)


def test_the_mass_of_controls_is_taken_out_and_reported() -> None:
    table = TokenBytes((b"a", None, b"b", None), unused=(3,), tokenize=TokenBytes.greedy([b"a", None, b"b"]).tokenize)
    shared = ByteStrings([table])
    aligned = Aligned(TableModel([[0.3, 0.2, 0.45, 0.05]], order=0), shared, token_bytes=table)
    assert aligned.dropped_mass([(), (0,)]).tolist() == pytest.approx([0.25, 0.25])
    assert aligned.log_probs([()]).exp()[0].tolist() == pytest.approx([0.4, 0.6])
    only = Aligned(TableModel([[0.0, 1.0, 0.0, 0.0]], order=0), shared, token_bytes=table)
    with pytest.raises(ValueError, match="all mass is on control tokens"):
        only.log_probs([()])


def test_small_probabilities_do_not_underflow_in_float32() -> None:
    push = PushForward(np.array([0, 1, 1, -1]), 2)
    law = torch.tensor([[0.0, -150.0, -150.0, -torch.inf]])
    assert push(law).tolist()[0] == pytest.approx([0.0, -150 + np.log(2)], abs=1e-4)
    assert push(law.double().expand(3, -1)).shape == (3, 2)


# --- sessions ----------------------------------------------------------------------------------------


class WithoutDrop:
    """A session of someone else, which cannot take tokens back."""

    def __init__(self, inner: Any) -> None:
        self.append, self.log_probs, self._inner = inner.append, inner.log_probs, inner

    @property
    def cost(self) -> Any:
        return self._inner.cost


class Foreign(TableModel):
    def session(self, prompts: Any, *, max_new_tokens: int | None = None) -> Any:
        return WithoutDrop(super().session(prompts))


class Plain(TableModel):
    def session(self, prompts: Any, *, max_new_tokens: int | None = None) -> Any:
        return PrefixSession(self, prompts)


@pytest.mark.parametrize("kind", [TableModel, Foreign, Plain])
@pytest.mark.parametrize("table", [FIRST, SECOND])
def test_sessions_agree_with_the_definition(kind: type[TableModel], table: TokenBytes) -> None:
    model = kind.random(table.size, seed=2, order=3, eos=table.eos)
    for inner in (model, Warped(model, TopK(2))):
        aligned = Aligned(inner, SHARED, token_bytes=table)
        check_language_model(aligned)
        check_session(aligned, seed=1)
        check_session(aligned, [[]], seed=2)
    check_session(Ensemble([aligned, *pair()], ConstantMixing([0.2, 0.3, 0.5])), seed=3)


def keeps_the_tail(patch: pytest.MonkeyPatch) -> None:
    """New tokens go behind a tail that no longer holds."""
    patch.setattr(PrefixSession, "drop", lambda self, rows, counts: None)


def reads_alone(patch: pytest.MonkeyPatch) -> None:
    """Each string is tokenised by itself, as token-by-token re-encoding does."""
    patch.setattr(AlignedSession, "_catch_up", stand_ins.reads_alone)


def overwrites(patch: pytest.MonkeyPatch) -> None:
    """Of ids with the same bytes the last one counts."""

    def call(self: Any, laws: torch.Tensor) -> torch.Tensor:
        pushed = laws.new_full((len(laws), self.size), -torch.inf)
        for to, own in self._rounds:
            pushed[:, to] = laws[:, own]
        return pushed.log_softmax(-1)

    patch.setattr(PushForward, "__call__", call)


@pytest.mark.parametrize("plant", [keeps_the_tail, reads_alone])
def test_the_session_check_rejects_a_planted_bug(plant: Callable[..., None], monkeypatch: pytest.MonkeyPatch) -> None:
    aligned = Aligned(Plain.random(FIRST.size, seed=2, order=3, eos=FIRST.eos), SHARED, token_bytes=FIRST)
    check_session(aligned, seed=1)
    plant(monkeypatch)
    with pytest.raises(ModelRejected, match="differs from log_probs"):
        check_session(aligned, seed=1)


def test_the_definition_rejects_overwritten_duplicates(monkeypatch: pytest.MonkeyPatch) -> None:
    overwrites(monkeypatch)
    aligned = pair()[0]
    expected = by_hand(aligned.model, FIRST, b"a")
    assert float(aligned.log_probs([(0,)])[0, 0].exp()) != pytest.approx(expected[b"a"], abs=1e-3)


def test_work_is_counted_and_a_changed_tail_is_read_again() -> None:
    aligned = Aligned(Plain.random(FIRST.size, seed=2, order=3, eos=FIRST.eos), SHARED, token_bytes=FIRST)
    session = aligned.session([SHARED.encode("ba")])
    row = np.array([0])
    session.log_probs(row)
    session.append(row, torch.tensor(SHARED.encode("b")))  # "ba" + "b" is read as b, ab
    assert torch.equal(session.log_probs(row), aligned.log_probs([SHARED.encode("bab")]))
    assert session._read[0] == (1, 2)
    assert (session.cost.forwards, session.cost.tokens_forwarded, session.cost.reads) == (2, 4, 2)


# --- refusals ----------------------------------------------------------------------------------------


def test_misuse_is_refused_with_the_remedy() -> None:
    model = toy(FIRST, 0)
    with pytest.raises(ValueError, match="not made from this model's vocabulary"):
        Aligned(model, SHARED)
    with pytest.raises(ValueError, match="has 6 ids, but"):
        Aligned(model, SHARED, token_bytes=SECOND)
    with pytest.raises(ValueError, match=r"ends at ids \(3,\), but .* ends at \(\)"):
        Aligned(Endless(model), SHARED, token_bytes=FIRST)
    with pytest.raises(ValueError, match="no reading rule"):
        Aligned(model, SHARED, token_bytes=TokenBytes(FIRST.strings, FIRST.eos))
    with pytest.raises(TypeError, match="shared must be a ByteStrings"):
        Aligned(model, SHARED.vocabulary)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="no end of sequence"):
        Aligned(model, SHARED, token_bytes=FIRST).log_probs([SHARED.vocabulary.eos])
    with pytest.raises(ValueError, match="different vocabularies"):
        Ensemble([*pair(), Aligned(model, ByteStrings([FIRST]), token_bytes=FIRST)], ConstantMixing([1 / 3] * 3))


SPARSE = TokenBytes.greedy([b"a", b"b", b"ab"])  # cannot read b"c" or b"\xff"
WIDE = TokenBytes.greedy([b"a", b"c", b"bc", b"\xff", None], eos=(4,))
WIDER = ByteStrings([SPARSE, WIDE])


def test_a_byte_that_a_model_cannot_read_is_left_out_and_reported_once() -> None:
    aligned = Aligned(toy(SPARSE, 0), WIDER, token_bytes=SPARSE)
    assert aligned.unread(b"ac\xffb") == b"c\xff"
    assert aligned.unread(b"ab") == b""
    with pytest.warns(UserWarning, match=r"no token for the bytes b'c\\xff' of a history") as caught:
        laws = aligned.log_probs([WIDER.encode(text) for text in (b"ac\xffb", b"c")])
    assert len(caught) == 1
    assert aligned.read(b"ac\xffbcab") == (0, 1, 2)
    assert torch.equal(laws[0], aligned.push(aligned.model.log_probs([(0, 1)]))[0])
    # A prompt is reported when a session opens.
    with pytest.warns(UserWarning, match="leave them out of the prompts"):
        Aligned(toy(SPARSE, 0), WIDER, token_bytes=SPARSE).session([WIDER.encode(b"c")])


@pytest.mark.filterwarnings("ignore:.*no token for the bytes")
@pytest.mark.parametrize("top", [None, 2])
def test_bytes_that_the_other_model_cannot_read_keep_ce_and_me_equal(top: int | None) -> None:
    """The second model writes "c", "bc" and a byte that is no text; the first goes on as if they were not there."""
    parts = []
    for seed, table in enumerate((SPARSE, WIDE)):
        own: Any = toy(table, seed, order=1)
        parts.append(Aligned(own if top is None else Warped(own, TopK(top)), WIDER, token_bytes=table))
        check_language_model(parts[-1])
    ensemble = Ensemble(parts, ConstantMixing([0.4, 0.6]))
    check_session(ensemble, seed=5)
    law = exact.sequence_law(ensemble, WIDER.encode("ac"), max_new_tokens=3)
    for sampler in (CESampler(ensemble), MESampler(ensemble)):
        assert exact.sampler_law(sampler, WIDER.encode("ac"), max_new_tokens=3).tv_distance(law) < 1e-12


def test_a_reading_rule_that_loses_or_changes_text_is_refused() -> None:
    strings = (b"a", b"A", b"b", None)
    for tokenize, back in (
        (lambda data: [2 if byte == 98 else 0 for byte in data], "ab"),  # lower case
        (lambda data: [2] * data.count(b"b"), "b"),  # drops what it can spell
        (lambda data: [3 if byte == 65 else 2 for byte in data], "b"),  # an unknown token
    ):
        table = TokenBytes(strings, tokenize=tokenize)
        aligned = Aligned(toy(table, 0), ByteStrings([table]), token_bytes=table)
        message = f"does not give back its history: b'Ab' returns as b'{back}'"
        prompt = aligned.shared.encode(b"Ab")
        with pytest.raises(ValueError, match=message):
            aligned.log_probs([prompt])
        with pytest.raises(ValueError, match=message):
            aligned.session([prompt])
        with pytest.raises(ValueError, match=message):
            next(aligned.path_log_probs([prompt], [(0,)]))


def test_a_draft_may_run_past_the_end() -> None:
    for aligned in pair():
        [laws] = aligned.path_log_probs([(0,)], [(1, SHARED.vocabulary.eos[0], 0)])
        assert torch.equal(laws[:2], aligned.log_probs([(0,), (0, 1)]))
        assert torch.equal(laws[2], laws[1])  # nobody reads it


def test_warps_inside_are_those_of_the_model() -> None:
    for aligned in pair():
        inside = Aligned(Warped(aligned.model, TopK(2)), SHARED, token_bytes=aligned.token_bytes)
        assert torch.equal(aligned.warped(TopK(2)).log_probs([(0,)]), inside.log_probs([(0,)]))


# --- transformers ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def siblings() -> list[TransformersModel]:
    return [TransformersModel(f"bundled:{name}") for name in ("prose", "code")]


def test_bytes_of_the_siblings_are_their_ids(siblings: list[TransformersModel]) -> None:
    shared = ByteStrings.of(siblings)
    assert len(shared.strings) == 255  # byte 0 is their end of sequence, by role
    aligned = Aligned(siblings[0], shared)
    own = siblings[0].log_probs([tuple(b"The names ")])[0]
    law = aligned.log_probs([shared.encode("The names ")])[0]
    assert torch.equal(law[:-1], own[1:])
    assert law[-1] == own[0]
    check_session(Ensemble([Aligned(m, shared) for m in siblings], ConstantMixing([0.5, 0.5])), ["An é", "x"], steps=6)


def test_a_transformer_takes_back_a_changed_tail(siblings: list[TransformersModel]) -> None:
    """The sibling under a tokenizer of our own that changes up to three tokens at the end of what it reads."""

    def tokenize(data: bytes) -> list[int]:
        # The last letters are read as other ids of the same bytes, until two more follow.
        settled = max(0, len(data) - 2 - len(data) % 3)
        return [*data[:settled], *(byte + 128 for byte in data[settled:])]

    strings = (None, *(bytes([value]) for value in range(1, 128))) * 2
    table = TokenBytes(strings, eos=(0,), tokenize=tokenize)
    shared = ByteStrings([table])
    for model in (siblings[0], Warped(Conditioned(siblings[0], "So "), TopK(7))):
        aligned = Aligned(model, shared, token_bytes=table)
        prompts = [shared.encode(text) for text in ("The names", "The names", "ab", "x", "The names")]
        check_session(aligned, prompts, steps=12, schedules=4, seed=4)
        check_language_model(aligned, prompts[:3], seed=4)


def test_a_real_model_reads_what_another_vocabulary_writes() -> None:
    folders = {name: pulled(name) for name in ("smollm2-135m", "gemma3-270m")}
    if not all(folders.values()):
        pytest.skip("smollm2-135m and gemma3-270m are not on this machine: me-stats models pull NAME")
    small = TransformersModel("smollm2-135m")
    tokenizer = AutoTokenizer.from_pretrained(next(iter(folders["gemma3-270m"].values())))
    tables = [
        read_tokenizer(small.vocabulary),
        read_tokenizer(Vocabulary(262_144, eos=(1,), tokenizer=tokenizer)),
    ]
    shared = ByteStrings(tables)
    assert [len(set(table.strings) - {None}) for table in tables] == [49_135, 262_027]
    assert len(shared.strings) == 265_017  # 46,145 strings are in both
    aligned = Aligned(Warped(small, TopK(50)), shared, token_bytes=tables[0])
    # "caf" and the first byte of "é", then its second: the half is taken back and the character read.
    written = [tables[1].bytes_of([token]) for token in tables[1].encode(" café 日".encode())]
    steps = [shared.encode(part)[0] for part in (*written[:1], b"\xc3", b"\xa9", *written[1:])]
    prompt = tuple(shared.encode("Natalia sold 48"))
    session, row = aligned.session([prompt]), np.array([0])
    laws = [session.log_probs(row)]
    for token in steps:
        session.append(row, torch.tensor([token]))
        laws.append(session.log_probs(row))
    prefixes = [(*prompt, *steps[:count]) for count in range(len(steps) + 1)]
    distances = tv_distance(torch.cat(laws), aligned.log_probs(prefixes), check=False)
    assert float(torch.as_tensor(distances).max()) < 1e-4
    assert float(aligned.dropped_mass([prompt])[0]) < 1e-3
