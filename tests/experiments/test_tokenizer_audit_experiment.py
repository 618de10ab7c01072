"""The audit counts what was planted, refuses what loses text, and its numbers depend on nothing but the tokenizers."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from tokenizers import normalizers

from me_stats import scripts, tokenizer_survey
from me_stats.models import TableModel
from me_stats.presets import SIBLINGS
from me_stats.record import Record, config_key
from me_stats.report.markdown import report_markdown
from me_stats.report.style import read_data
from me_stats.tokenizer_audit import canonical_runs
from me_stats.vocabulary_map import ByteStrings

tokenizers = scripts.load("experiments", "tokenizer_audit")
TINY: dict[str, Any] = {"models": SIBLINGS, "tokenizers": (), "files": (), "planted": True, "rows": 4, "steps": 12}
BARE: dict[str, Any] = TINY | {"models": (), "rows": 0}


@cache
def record() -> Record:
    found: Record = tokenizers.run(tokenizers.Config(**TINY))
    return found


def bare(**changes: Any) -> Record:
    found: Record = tokenizers.run(tokenizers.Config(**(BARE | changes)))
    return found


def failed(found: Record) -> list[str]:
    return [name for name, held in found.checks.items() if not held]


def test_every_check_holds(tmp_path: Path) -> None:
    found = record()
    assert failed(found) == []
    assert found.key == config_key("tokenizer_audit", tokenizers.Config(**TINY))
    assert not found.findings
    found.save(tmp_path / "record.json")
    assert Record.load(tmp_path / "record.json").results == json.loads(json.dumps(found.results))
    assert set(found.results["tokenizers"]) == {*SIBLINGS, "planted byte-level BPE", "planted byte fallback"}
    assert len(found.results["pairs"]) == 6
    assert [model["name"] for model in found.models] == list(SIBLINGS)
    assert "# Tokenizers: what an exchange" in report_markdown([found], {})


def test_names_split_what_bytes_join() -> None:
    pairs = {(row["a"], row["b"]): row for row in record().results["pairs"]}
    planted = pairs["planted byte-level BPE", "planted byte fallback"]
    assert (planted["shared"], planted["only_a"], planted["only_b"], planted["union"]) == (260, 2, 0, 262)
    assert planted["split_a"] > 0
    same = pairs[SIBLINGS]
    assert (same["only_a"], same["only_b"], same["split_a"], same["split_b"]) == (0, 0, 0, 0)
    mass = {(row["model"], row["set"]): row for row in record().results["mass"]}
    assert mass["bundled:prose", "another name in bundled:code"]["mean"] == 0
    # "." and "=" of a byte-level model meet the byte tokens of the other kind, which it does not write.
    split = mass["bundled:code", "another name in planted byte fallback"]
    assert split["ids"] == pairs["bundled:code", "planted byte fallback"]["split_a"]
    assert 0 < split["mean"] < 1
    assert all(row["mean"] <= row["largest"] <= 1 + 1e-6 for row in mass.values())


def test_tokens_of_single_bytes_stay_canonical() -> None:
    assert [(row["runs"], row["canonical"], row["rate"]) for row in record().results["contexts"]] == [(4, 4, 0.0)] * 2


def test_contexts_of_an_exchange_by_names() -> None:
    first, second = tokenizers.planted()
    t, h = (first.spellings.index(letter) for letter in "th")
    # One row for no history, then one for each token.
    law = [[0.0] * first.table.size for _ in range(first.table.size + 1)]
    for before, row in enumerate(law, start=-1):
        row[h if before == t else t] = 1.0
    writer = TableModel(law, order=1)
    listener = TableModel.random(second.table.size, seed=0, order=0)
    # Both read what either writes, token by token, where the tokenisation of "thth" is two tokens.
    mine, theirs = tokenizers.exchange_runs([writer, writer], [first, first], ["a"], rows=3, steps=4, seed=0)
    assert mine == theirs == [[t, h, t, h]] * 3
    assert canonical_runs(first.table, mine).departures == (0, 0, 0)
    written = tokenizers.exchange_runs([writer, listener], [first, second], ["a"], rows=6, steps=20, seed=0)
    for one, rows in zip((first, second), written, strict=True):
        assert all(0 <= token < one.table.size for row in rows for token in row)
    assert tokenizers._canonical(second, written[1])["canonical"] < 6


# Planted errors


@pytest.mark.parametrize("kind", ["same_bytes", "changed", "lost"])
def test_an_audit_that_overlooks_an_id_is_found(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    honest = tokenizer_survey.audit_tokenizer

    def careless(*arguments: Any) -> Any:
        found = honest(*arguments)
        return dataclasses.replace(found, **{kind: getattr(found, kind)[1:]})

    monkeypatch.setattr(tokenizer_survey, "audit_tokenizer", careless)
    assert any(name.endswith("the audit counts what was planted") for name in failed(bare()))


def test_a_reader_that_loses_bytes_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    honest = tokenizers.planted

    def lossy() -> list[Any]:
        first, second = honest()
        sound = first.table.tokenize
        table = dataclasses.replace(first.table, tokenize=lambda data: sound(data.lower()))
        return [dataclasses.replace(first, table=table), second]

    monkeypatch.setattr(tokenizers, "planted", lossy)
    assert "planted byte-level BPE: the bytes of all 262 ids survive being read again" in failed(bare())


def test_a_normaliser_that_slips_through_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    honest = tokenizers.from_tokenizer
    monkeypatch.setattr(
        tokenizers, "from_tokenizer", lambda name, own, **options: honest(name, own, drop_normalizer=True, **options)
    )
    assert failed(bare()) == [
        "a tokenizer with a normaliser that folds characters (NFKC) is refused",
        "a tokenizer with a normaliser that lowers case is refused",
    ]


def test_strings_that_are_counted_wrongly_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    honest = tokenizer_survey.compare_strings

    def wrong(*arguments: Any, **options: Any) -> Any:
        found = honest(*arguments, **options)
        return dataclasses.replace(found, shared={pair: count + 1 for pair, count in found.shared.items()})

    monkeypatch.setattr(tokenizer_survey, "compare_strings", wrong)
    assert failed(bare()) == ["strings in common are the same number from either side and by shared ids"]


def test_a_union_numbered_by_order_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    class Ordered:
        def __init__(self, tables: Any) -> None:
            self.vocabulary = dataclasses.replace(tables[0], tokenize=None)

    honest = tokenizers.ByteStrings
    monkeypatch.setattr(tokenizers, "ByteStrings", lambda tables: (Ordered if len(tables) > 2 else honest)(tables))
    assert failed(bare()) == ["the numbers of the union depend on no order"]


def test_a_tokenizer_that_cannot_be_read_fails_a_check(tmp_path: Path) -> None:
    tokenizers.byte_level(normalizers.NFKC()).save_pretrained(tmp_path)
    found = bare(files=(tmp_path / "tokenizer.json",))
    (check,) = failed(found)
    assert check.startswith("tokenizer.json is read (the tokenizer normalises its text (NFKC)")
    assert found.config["files"] == ["tokenizer.json"]
    assert str(tmp_path) not in json.dumps(found.results)


def test_the_union_does_not_depend_on_the_hash_seed() -> None:
    tables = [one.table for one in tokenizers.planted()]
    # Loading torch would take a process longer than all the rest.
    code = (
        "import json, sys; from me_stats.vocabulary_map import ByteStrings, TokenBytes;"
        "spelled = json.load(sys.stdin);"
        "tables = [TokenBytes([s and bytes.fromhex(s) for s in strings], eos) for strings, eos in spelled];"
        "shared = ByteStrings(tables);"
        "print(json.dumps([shared.vocabulary.fingerprint, *(shared.targets(t).tolist() for t in tables)]))"
    )
    spelled = json.dumps([[[s and s.hex() for s in table.strings], table.eos] for table in tables])
    runs = [
        subprocess.run(
            [sys.executable, "-c", code],
            input=spelled,
            capture_output=True,
            text=True,
            check=True,
            env={**os.environ, "PYTHONHASHSEED": seed},
        ).stdout
        for seed in ("1", "2")
    ]
    assert runs[0] == runs[1]
    shared = ByteStrings(tables)
    here = [shared.vocabulary.fingerprint, *(shared.targets(table).tolist() for table in tables)]
    assert json.loads(runs[0]) == here


def test_progress_and_own_text(tmp_path: Path) -> None:
    (tmp_path / "own.txt").write_text("héllo\n" * 9, encoding="utf-8")
    seen: list[tuple[float, str]] = []
    config = tokenizers.Config(**(TINY | {"models": SIBLINGS[:1], "text": tmp_path / "own.txt", "text_bytes": 20}))
    found = tokenizers.run(config, lambda fraction, note: seen.append((fraction, note)))
    fractions = [fraction for fraction, _ in seen]
    assert fractions == sorted(fractions)
    assert 0 <= fractions[0] <= fractions[-1] < 1
    assert all(note for _, note in seen)
    assert found.results["texts"] == {"own.txt": 20}
    assert found.config["text"] == "own.txt"
    assert found.results["mass"][0]["n"] == 20
    assert found.results["contexts"] == []  # one model has nobody to exchange with


def test_the_figure_is_drawn_from_the_record(tmp_path: Path) -> None:
    script = scripts.load("figures", "tokenizer_audit")
    record().save(tmp_path / "record.json")
    loaded = Record.load(tmp_path / "record.json")
    figure = script.draw(loaded, tmp_path / "one")
    assert [path.name for path in figure.paths] == ["tokenizer_audit.pdf", "tokenizer_audit.png"]
    assert read_data(figure.image) == {"caption": figure.caption, "key": loaded.key}
    assert "Two vocabularies share" in figure.caption
    assert "0 of 8 contexts written so" in figure.caption
    assert 100 < len(figure.caption) < 900
    again = script.draw(loaded, tmp_path / "two")
    assert [path.read_bytes() for path in again.paths] == [path.read_bytes() for path in figure.paths]
    for nothing in ("pairs", "mass"):
        loaded.results[nothing] = []
    assert script.draw(loaded, tmp_path / "three").image.is_file()
