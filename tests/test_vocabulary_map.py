from __future__ import annotations

import subprocess
import sys
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from me_stats.corpus import Document, score_corpus
from me_stats.models import Aligned, MarkovModel, TableModel
from me_stats.vocabulary_map import ByteStrings, Role, TokenBytes

TABLE = TokenBytes.greedy([b"a", b"b", b"ab", None, b"a", None], eos=(3,))
OTHER = TokenBytes.greedy([b"b", b"ba", b"\xc3\xa9", b"\xc3"])


def test_roles_come_from_bytes_and_from_the_ends_not_from_spelling() -> None:
    table = TokenBytes((b"<eos>", None, None, None), eos=(2,), unused=(3,))
    assert table.roles == [Role.ORDINARY, Role.CONTROL, Role.END, Role.UNUSED]
    assert table.size == 4


@given(st.text("abx", max_size=12))
def test_a_greedy_reading_gives_back_the_bytes_that_it_knows(text: str) -> None:
    ids = TABLE.encode(text.encode())
    assert TABLE.bytes_of(ids) == text.replace("x", "").encode()
    assert 4 not in ids  # of ids with equal bytes the first is canonical


def test_bytes_that_no_token_spells_are_named() -> None:
    assert set(range(256)) - set(TABLE.unread_bytes) == {ord("a"), ord("b")}


def test_the_prefix_is_read_before_every_text() -> None:
    spaced = TokenBytes((b" ", b"a", b" a"), prefix=b" ", tokenize=TokenBytes.greedy([b" ", b"a", b" a"]).tokenize)
    assert spaced.encode(b"aa") == (2, 1)
    assert spaced.encode(b"") == (0,)


def test_equality_and_fingerprint_follow_bytes_roles_and_prefix() -> None:
    same = TokenBytes(TABLE.strings, TABLE.eos)
    assert same == TABLE
    assert same.fingerprint == TABLE.fingerprint
    others = [
        TokenBytes(TABLE.strings, (5,)),
        TokenBytes(TABLE.strings, TABLE.eos, unused=(5,)),
        TokenBytes(TABLE.strings, TABLE.eos, prefix=b" "),
        TokenBytes((b"ab", *TABLE.strings[1:]), TABLE.eos),
    ]
    assert len({table.fingerprint for table in (TABLE, *others)}) == 5


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"strings": (b"a",), "eos": (1,)}, r"eos ids must lie in 0..0, got \(1,\)"),
        ({"strings": (b"a",), "eos": (0,)}, "eos has id 0, which stands for b'a'; give None"),
        ({"strings": (b"a", b"b"), "unused": (1,)}, "unused has id 1"),
        ({"strings": (b"a", b"")}, "id 1 stands for no bytes at all"),
    ],
)
def test_bad_tables_are_refused(given: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TokenBytes(**given)


def test_a_table_without_a_reading_rule_says_so() -> None:
    with pytest.raises(ValueError, match="no reading rule"):
        TokenBytes((b"a",)).encode(b"a")


# --- shared strings ----------------------------------------------------------------------------------


def test_shared_strings_are_numbered_by_length_then_bytes_with_the_end_last() -> None:
    shared = ByteStrings([TABLE, OTHER])
    assert shared.strings == (b"a", b"b", b"\xc3", b"ab", b"ba", b"\xc3\xa9")
    assert shared.vocabulary.eos == (6,)
    assert shared.vocabulary == ByteStrings([OTHER, TABLE, TABLE]).vocabulary
    assert shared.targets(TABLE).tolist() == [0, 1, 3, 6, 0, -1]
    assert shared.targets(OTHER).tolist() == [1, 4, 5, 2]


def test_without_an_end_anywhere_there_is_none() -> None:
    assert ByteStrings([OTHER]).vocabulary.eos == ()


def test_numbers_do_not_depend_on_the_hash_seed() -> None:
    code = (
        "from me_stats.vocabulary_map import *; import random; random.seed(0)\n"
        "table = TokenBytes(tuple({bytes([i % 256, i // 256]) for i in range(999)}))\n"
        "print(ByteStrings([table]).vocabulary.fingerprint)"
    )
    prints = {
        subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, check=True, env={"PYTHONHASHSEED": seed}
        ).stdout
        for seed in ("1", "2")
    }
    assert len(prints) == 1


@given(st.text("abé", max_size=12))
def test_texts_are_spelled_and_spelled_back(text: str) -> None:
    shared = ByteStrings([TABLE, OTHER])
    ids = shared.vocabulary.encode(text)
    assert shared.bytes_of(ids) == text.encode()
    assert shared.vocabulary.decode([*ids, 6]) == text


def test_what_cannot_be_spelled_is_refused() -> None:
    shared = ByteStrings([TABLE, OTHER])
    with pytest.raises(ValueError, match=r"cannot spell 'abc' \(bytes without a string: \[99\]\)"):
        shared.encode("abc")
    with pytest.raises(ValueError, match="id 6 is not a byte string: a history has no end"):
        shared.bytes_of([0, 6])
    with pytest.raises(ValueError, match=r"lack b'ba'"):
        ByteStrings([TABLE]).targets(OTHER)
    with pytest.raises(ValueError, match="have no end of sequence"):
        ByteStrings([TokenBytes((b"a", b"b", b"ab"))]).targets(TABLE)
    with pytest.raises(ValueError, match="at least one"):
        ByteStrings([])
    with pytest.raises(ValueError, match="no table has an id that stands for bytes"):
        ByteStrings([TokenBytes((None,))])


# --- names -------------------------------------------------------------------------------------------


def test_with_names_equal_bytes_under_other_names_are_apart() -> None:
    one = TokenBytes.greedy([b"a", b" a", b".", None], eos=(3,)).named(["a", " a", "<0x2E>", None])
    other = TokenBytes.greedy([b".", b".", b" a", b"a"]).named([".", "<0x2E>", " a", "A"])
    shared = ByteStrings([one, other])
    assert shared.strings == (b".", b".", b"a", b"a", b" a")
    assert shared.names == (".", "<0x2E>", "A", "a", " a")
    assert shared.targets(one).tolist() == [3, 4, 1, 5]
    assert shared.targets(other).tolist() == [0, 1, 4, 2]
    # A history is its bytes, so any of the entries spells it.
    assert shared.encode(" a.") == [4, 0]
    assert shared.decode([4, 0]) == shared.decode([4, 1]) == " a."
    assert ByteStrings([other, one]).vocabulary == shared.vocabulary
    plain = ByteStrings([TokenBytes.greedy(table.strings, eos=table.eos) for table in (one, other)])
    assert plain.vocabulary != shared.vocabulary
    assert plain.targets(shared.table()).tolist() == [0, 0, 1, 1, 2, 3]


@given(st.text("abé", max_size=12))
def test_one_name_for_all_is_no_names(text: str) -> None:
    plain = ByteStrings([TABLE, OTHER])
    named = ByteStrings([table.named(["x"] * table.size) for table in (TABLE, OTHER)])
    assert named.strings == plain.strings
    assert named.encode(text) == plain.encode(text) == list(plain.table().encode(text.encode()))


def test_names_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ValueError, match="names has 1 entries for 6 ids"):
        TABLE.named(["a"])
    with pytest.raises(ValueError, match="id 1 stands for b'b' and has no name"):
        TABLE.named(["a", None, "c", None, "d", None])
    named = TABLE.named(["a", "b", "c", None, "d", None])
    assert named != TABLE
    assert named.fingerprint != TABLE.fingerprint
    assert named == TABLE.named(["a", "b", "c", None, "d", None])
    with pytest.raises(ValueError, match="some tables have names and some have none"):
        ByteStrings([named, OTHER])
    with pytest.raises(ValueError, match="lack b'b' named 'B'"):
        ByteStrings([named]).targets(TABLE.named(["a", "B", "c", None, "d", None]))


def test_models_without_a_fast_tokenizer_are_refused() -> None:
    with pytest.raises(ValueError, match="fast tokenizer only, got NoneType"):
        ByteStrings.of([MarkovModel.random(3, seed=0)])
    assert np.all(ByteStrings([TABLE]).targets(TABLE) >= -1)


def test_a_given_text_has_no_one_probability_over_byte_strings() -> None:
    tables = [TokenBytes.greedy([b"a", b"b", b"ab"]), TokenBytes.greedy([b"a", b"b"])]
    shared = ByteStrings(tables)
    parts = [Aligned(TableModel.random(t.size, seed=0, order=0), shared, token_bytes=t) for t in tables]
    with pytest.raises(ValueError, match="many spellings"):
        score_corpus(parts, [Document("toy", "abba")])
