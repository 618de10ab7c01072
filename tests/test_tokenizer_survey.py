from __future__ import annotations

import dataclasses

import pytest

from me_stats.tokenizer_sources import OpenTokenizer, open_tokenizer
from me_stats.tokenizer_survey import Survey, windows
from me_stats.vocabulary_map import TokenBytes

A = OpenTokenizer("a", TokenBytes((b".", b" a", b"x", None), eos=(3,)), (".", "Ġa", "x", "</s>"))
B = OpenTokenizer("b", TokenBytes((b".", b".", b" a", b"y")), ("<0x2E>", ".", "▁a", "y"))
C = OpenTokenizer("c", TokenBytes((b"x",)), ("x",))


def test_pairs_and_ids_at_stake() -> None:
    survey = Survey([A, B, C])
    assert survey.pairs == [("a", "b"), ("a", "c"), ("b", "c")]
    first = survey.pair_rows()[0]
    assert first == {
        "a": "a", "b": "b", "shared": 2, "only_a": 1, "only_b": 1, "union": 4, "split_a": 1, "split_b": 1,
    }  # fmt: skip
    assert survey.stakes("a") == {
        "ends": (3,), "controls": (), "no such string in b": (2,), "another name in b": (0,),
        "no such string in c": (0, 1), "another name in c": (),
    }  # fmt: skip
    assert survey.union_row()["union"] == 4
    assert survey.union_row()["size"] == 5  # and one end
    assert survey.tokenizer_rows()["b"]["counts"] == {
        "same_bytes": 2, "changed": None, "mis_decoded": None, "lost": None, "exchange": None,
    }  # fmt: skip


def test_against_some_only() -> None:
    survey = Survey([A], [B, C])
    assert survey.pairs == [("a", "b"), ("a", "c")]
    assert list(survey.tokenizer_rows()) == ["a"]
    assert {row["shared"] for row in survey.pair_rows()} == {2, 1}
    # The other way round is the same pair.
    (turned,) = Survey([C], [A]).pair_rows()
    assert (turned["shared"], turned["only_a"], turned["only_b"]) == (1, 0, 2)


def test_one_and_none() -> None:
    assert Survey([A]).pair_rows() == []
    nothing = Survey([])
    assert (nothing.tokenizer_rows(), nothing.pair_rows(), nothing.union_row()) == ({}, [], {})


def test_two_of_one_name_are_refused() -> None:
    with pytest.raises(ValueError, match="two that are called 'a'"):
        Survey([A], [dataclasses.replace(B, name="a")])


def test_windows_start_afresh() -> None:
    opened = open_tokenizer("bundled:prose")
    assert opened.vocabulary is not None
    (end,) = opened.vocabulary.eos
    ids = tuple(opened.encode("abcde"))
    assert windows(opened, ["abcde"], tokens=3) == ([(end,), (end,)], [ids[:3], ids[3:]])
    with pytest.raises(ValueError, match="the text is empty for bundled:prose"):
        windows(opened, [""])
