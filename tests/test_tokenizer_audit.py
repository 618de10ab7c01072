from __future__ import annotations

import dataclasses
from typing import Any

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from me_stats.models import TableModel
from me_stats.models.aligned import Aligned
from me_stats.tokenizer_audit import (
    audit_table,
    audit_tokenizer,
    canonical_runs,
    compare_strings,
    exchange_losses,
    exchange_text,
    mass_at_stake,
)
from me_stats.tokenizer_bytes import byte_alphabet, read_tokenizer
from me_stats.vocabulary import Vocabulary
from me_stats.vocabulary_map import ByteStrings, TokenBytes
from me_stats.vocabulary_names import exchange_names, is_byte_level, spellings_of


def backend() -> Tokenizer:
    """Byte-level, with a merge that nothing reaches and three controls."""
    pieces = [*byte_alphabet(), "th", "the", "Ġth", "Ã©", "unmerged"]
    merges = [("t", "h"), ("th", "e"), ("Ġ", "th"), ("Ã", "©")]
    made = Tokenizer(models.BPE({piece: n for n, piece in enumerate(pieces)}, merges))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    made.add_special_tokens(["<eos>", "<|end_of_turn|>", "<bos>"])
    return made


def fast(own: Tokenizer) -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast(tokenizer_object=own, clean_up_tokenization_spaces=False)


def audited() -> tuple[Any, Any, Any]:
    own = backend()
    vocabulary = Vocabulary(own.get_vocab_size() + 3, eos=(own.token_to_id("<eos>"),), tokenizer=fast(own))
    table = read_tokenizer(vocabulary)
    return own, table, audit_tokenizer(vocabulary, table)


def test_an_audit_counts_each_kind_of_trouble() -> None:
    own, table, audit = audited()
    assert audit.roles == {"ORDINARY": 261, "END": 1, "CONTROL": 2, "UNUSED": 3}
    assert audit.ends == ((own.token_to_id("<eos>"), "<eos>"),)
    assert audit.end_like == ((own.token_to_id("<|end_of_turn|>"), "<|end_of_turn|>"),)
    assert audit.unused == tuple(range(own.get_vocab_size(), table.size))
    assert [table.strings[token] for token in audit.changed] == [b"unmerged"]
    # The 128 bytes above ASCII are no text alone.
    assert {table.strings[token] for token in audit.mis_decoded} == {bytes([value]) for value in range(128, 256)}
    assert set(audit.lost) == {*audit.mis_decoded, *audit.changed}
    assert audit.same_bytes == ()
    assert audit.shares()["mis_decoded"] == pytest.approx(128 / 261)


def test_equal_bytes_are_counted_on_both_sides() -> None:
    own = backend()
    own.add_tokens(["é"])
    vocabulary = Vocabulary(own.get_vocab_size(), tokenizer=fast(own))
    audit = audit_tokenizer(vocabulary, read_tokenizer(vocabulary))
    assert set(audit.same_bytes) == {own.token_to_id("é"), own.token_to_id("Ã©")}
    assert own.token_to_id("Ã©") in audit.changed  # the added token takes all of its texts


def test_an_audit_needs_the_table_of_its_vocabulary() -> None:
    own = backend()
    with pytest.raises(ValueError, match="the table has 1 ids"):
        audit_tokenizer(Vocabulary(3, tokenizer=fast(own)), TokenBytes((b"a",)))
    with pytest.raises(ValueError, match="no reading rule"):
        audit_tokenizer(Vocabulary(1, tokenizer=fast(own)), TokenBytes((b"a",)))


def test_ids_whose_bytes_come_back_changed_are_found() -> None:
    own = backend()
    vocabulary = Vocabulary(own.get_vocab_size(), tokenizer=fast(own))
    sound = read_tokenizer(vocabulary)
    assert audit_tokenizer(vocabulary, sound).unkept == ()
    # A reader that loses capitals, as one that folds its text would.
    lossy = dataclasses.replace(sound, tokenize=lambda data: sound.tokenize(data.lower()) if sound.tokenize else ())
    unkept = audit_tokenizer(vocabulary, lossy).unkept
    assert unkept is not None
    strings = [sound.strings[token] or b"" for token in unkept]
    assert sorted(strings) == [bytes([value]) for value in range(65, 91)]


def test_a_table_alone_tells_no_round_trips() -> None:
    own, table, audit = audited()
    bare = audit_table(dataclasses.replace(table, tokenize=None), spellings_of(fast(own), table.size))
    assert bare == dataclasses.replace(audit, changed=None, unkept=None, mis_decoded=None, lost=None)
    assert bare.counts() == {"same_bytes": 0, "changed": None, "mis_decoded": None, "lost": None}
    assert bare.shares() == {"same_bytes": 0.0}
    # A file that names none of its rows still has ends and controls.
    assert audit_table(table, [None] * table.size).ends == ((table.eos[0], f"id {table.eos[0]}"),)
    with pytest.raises(ValueError, match="one entry for each of 267 ids, got 3"):
        audit_table(table, ["a", "b", "c"])


def test_an_exchange_by_names_loses_what_is_not_plain_ascii() -> None:
    own, table, _ = audited()
    spellings = spellings_of(own, table.size)
    names = exchange_names(table, spellings)
    tokenizer = fast(own)
    lost = exchange_losses(table, names, lambda text: tokenizer.encode(text, add_special_tokens=False))
    strings = {table.strings[token] for token in lost}
    assert {"é".encode(), b"unmerged"} <= strings  # "é" comes back as the two characters that spell its bytes
    assert not strings & {b"the", b" th", b".", b"\n", b" "}
    assert exchange_text(names[own.token_to_id("Ċ")] or "") == "\n"


def test_the_two_kinds_of_spelling_are_told_apart() -> None:
    own, table, _ = audited()
    assert is_byte_level(table, spellings_of(own, table.size))
    pieces = TokenBytes((b" a", b"."))
    assert not is_byte_level(pieces, ["▁a", "."])
    assert exchange_names(pieces, ["▁a", "."]) == (" a", ".")


def test_a_byte_token_that_no_text_holds_is_no_way_to_write() -> None:
    plain = TokenBytes((b".", b"a"))
    pieces = TokenBytes((b".", b".", b"a", b"b"))  # "<0x2E>" is for text that has no piece
    symbols: dict[str, list[str | None]] = {"byte-level": ["<0x2E>", "a"], "pieces": ["<0x2E>", ".", "a", "<0x62>"]}
    found = compare_strings({"byte-level": plain, "pieces": pieces}, symbols=symbols)
    assert found.split == {("byte-level", "pieces"): (0,), ("pieces", "byte-level"): (1,)}
    alone = compare_strings({"a": TokenBytes((b"b",)), "b": pieces}, symbols={"a": ["<0x62>"], "b": symbols["pieces"]})
    assert alone.split["a", "b"] == ()  # the byte token is the one way to write this byte


A = TokenBytes.greedy([b" a", b"b", b"\n", None, b"\n"], eos=(3,))
B = TokenBytes.greedy([b"b", b" a", b"\n", b"c"])
C = TokenBytes.greedy([b"b"])


def test_strings_of_several_vocabularies() -> None:
    symbols: dict[str, list[str | None]] = {
        "a": ["Ġa", "b", "Ċ", "<eos>", "<0x0A>"],
        "b": ["b", "▁a", "<0x0A>", "c"],
        "c": ["b"],
    }
    found = compare_strings({"a": A, "b": B, "c": C}, symbols=symbols)
    assert found.strings == {"a": 3, "b": 4, "c": 1}
    assert found.shared == {("a", "b"): 3, ("a", "c"): 1, ("b", "c"): 1}
    assert (found.everywhere, found.union) == (1, 4)
    # Two ids of "a" have a newline's bytes. It writes the first alone, and not under the name that "b" has for it.
    assert {pair: ids for pair, ids in found.split.items() if ids} == {("a", "b"): (0, 2), ("b", "a"): (1, 2)}
    assert len(found.split) == 6
    assert compare_strings({"a": A, "b": B}).split == {}
    with pytest.raises(ValueError, match=r"symbols\['a'\] has 1 names for 5 ids"):
        compare_strings({"a": A}, symbols={"a": ["x"]})
    with pytest.raises(ValueError, match="at least one"):
        compare_strings({})


def test_mass_at_stake_is_the_mean_over_the_laws_of_a_text() -> None:
    model = TableModel.random(5, seed=0, order=1, eos=(3,))
    prompts, paths = [(0,), (1, 2)], [(1, 2, 0), (4,)]
    controls, none = mass_at_stake(model, prompts, paths, {"controls": [3, 4, 3], "none": []})
    prefixes = [(0,), (0, 1), (0, 1, 2), (1, 2)]
    masses = model.log_probs(prefixes).exp()[:, [3, 4]].sum(1)
    assert controls.mean == pytest.approx(float(masses.mean()))
    assert controls.largest == pytest.approx(float(masses.max()))
    assert (controls.n, controls.ids) == (4, 2)
    assert (none.mean, none.ids) == (0.0, 0)
    with pytest.raises(ValueError, match=r"ids\['x'\] must lie in 0..4, got 5..5"):
        mass_at_stake(model, prompts, paths, {"x": [5]})
    with pytest.raises(ValueError, match="at least one token"):
        mass_at_stake(model, [(0,)], [()], {"x": [0]})


def test_mass_that_only_one_vocabulary_can_write() -> None:
    shared = ByteStrings([A, B])
    aligned = Aligned(TableModel.random(4, seed=1, order=1), shared, token_bytes=B)
    alone = [number for number, string in enumerate(shared.strings) if string not in A.strings]
    [stake] = mass_at_stake(aligned, [shared.encode("b")], [shared.encode("b\nb")], {"b alone": alone})
    assert stake.n == 3
    assert 0 < stake.mean < stake.largest < 1


def test_runs_that_are_not_the_tokenisation_of_their_text() -> None:
    table = TokenBytes((b" ", b"a", b"ab", b"b", None), eos=(4,), prefix=b" ", tokenize=_greedy())
    runs = canonical_runs(table, [(2, 2, 4), (2, 1, 3, 4), (1,), (3, 1, 2), ()])
    assert runs.departures == (-1, 1, -1, -1, -1)
    assert (runs.runs, runs.canonical) == (5, 4)
    assert runs.non_canonical_rate == pytest.approx(0.2)
    with pytest.raises(ValueError, match="at least one row"):
        canonical_runs(table, [])


def _greedy() -> Any:
    return TokenBytes.greedy([b" ", b"a", b"ab", b"b"]).tokenize
