"""``me-stats tokenizers``: tables, records and figures; refusals that do not stop it; mistakes in one line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from tokenizers import normalizers

from me_stats import cli, tokenizer_survey
from me_stats.record import Record
from me_stats.report.style import read_data
from tests.commands import Run
from tests.test_tokenizer_sources import TIKTOKEN, tokenizer


@pytest.fixture
def folders(tmp_path: Path) -> Path:
    """A sound tokenizer, one that normalises, a vocabulary file, and a text."""
    tokenizer().save_pretrained(tmp_path / "own")
    tokenizer(normalizers.NFKC()).save_pretrained(tmp_path / "folding")
    (tmp_path / "small.tiktoken").write_bytes(TIKTOKEN)
    (tmp_path / "notes.txt").write_text("def f(x):\n    return x\n" * 4, encoding="utf-8")
    return tmp_path


def squeezed(text: str) -> str:
    return " ".join(text.split())


def test_one_tokenizer(run: Run) -> None:
    result = run("tokenizers", "bundled:prose")
    assert result.code == 0
    text = squeezed(result.out)
    assert "ids 256" in text
    assert "ids mis-decoded 128 (50.20%)" in text
    assert "ids that bytes change 0" in text
    assert "unread bytes 1 (00)" in text
    assert "shared" not in text


def test_pairs_and_what_a_file_cannot_tell(run: Run, folders: Path) -> None:
    result = run("tokenizers", "bundled:prose", "own", "small.tiktoken")
    assert result.code == 0
    text = squeezed(result.out)
    assert "ids lost by encode(decode) 128 (50.20%) 128 (50.00%) not known" in text
    assert "bundled:prose, own 255 (100%)" in text
    assert "own, small.tiktoken 2 (1%) 254 1" in text
    assert str(folders) not in result.out


def test_against_compares_and_does_not_audit(run: Run, folders: Path) -> None:
    result = run("tokenizers", "bundled:prose", "--against", "own", "small.tiktoken", "--json")
    assert result.code == 0
    found = json.loads(result.out)
    assert list(found["tokenizers"]) == ["bundled:prose"]
    assert [(row["a"], row["b"]) for row in found["pairs"]] == [
        ("bundled:prose", "own"), ("bundled:prose", "small.tiktoken"),
    ]  # fmt: skip
    assert found["all"]["union"] == 257


def test_record_and_figure(run: Run, folders: Path) -> None:
    result = run("tokenizers", "bundled:prose", "own", "--text", "notes.txt", "--out", "audit")
    assert result.code == 0
    record = Record.load(folders / "audit" / "tokenizer_audit.json")
    stakes = {row["set"]: row for row in record.results["mass"]}
    assert stakes["ends"]["n"] == len("def f(x):\n    return x\n") * 4
    assert 0 < stakes["lost by decode and encode"]["mean"] < 0.1
    assert record.models[0]["name"] == "bundled:prose"
    assert str(folders) not in (folders / "audit" / "tokenizer_audit.json").read_text(encoding="utf-8")
    image = read_data(folders / "audit" / "tokenizer_audit.png")
    assert image["key"] == record.key
    assert "share 100% of their strings" in image["caption"]
    assert "mean mass" in result.out
    assert "Results: audit/tokenizer_audit.json, audit/tokenizer_audit.png" in result.err


def test_a_refused_tokenizer_does_not_stop_the_others(run: Run, folders: Path) -> None:
    result = run("tokenizers", "folding", "bundled:prose", "own", "--out", "audit")
    assert result.code == 1
    assert "refused: folding: the tokenizer normalises its text (NFKC)" in squeezed(result.err)
    assert "--drop-normalizer reads the text as it stands" in squeezed(result.err)
    record = Record.load(folders / "audit" / "tokenizer_audit.json")
    assert set(record.results["tokenizers"]) == {"bundled:prose", "own"}
    assert list(record.results["refused"]) == ["folding"]
    assert "1 tokenizer could not be read." in read_data(folders / "audit" / "tokenizer_audit.png")["caption"]
    again = run("tokenizers", "folding", "bundled:prose", "--drop-normalizer")
    assert again.code == 0
    assert "normaliser NFKC none" in squeezed(again.out)


def test_nothing_but_refused(run: Run, folders: Path) -> None:
    result = run("tokenizers", "folding")
    assert result.code == 1
    assert "ids refused" in squeezed(result.out)
    assert json.loads(run("tokenizers", "folding", "--json").out)["refused"].keys() == {"folding"}


def test_ctrl_c_writes_nothing(run: Run, folders: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def stop(*arguments: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(tokenizer_survey, "audit_tokenizer", stop)
    result = run("tokenizers", "bundled:prose", "--out", "audit")
    assert result.code == cli.INTERRUPTED
    assert "interrupted: nothing was written" in result.err
    assert list((folders / "audit").iterdir()) == []


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "Missing argument 'A B ...'"),
        (("qwen25",), "no tokenizer 'qwen25': did you mean 'qwen2.5'?"),
        (("smolm2-135m",), "did you mean 'smollm2-135m'"),
        (("absent.gguf",), "absent.gguf: No such file"),
        (("notes.txt",), "notes.txt is no vocabulary file that is known: give *.tiktoken"),
        (("own", "--against", "./none"), "no folder './none'"),
        (("own", "own"), "two tokenizers are called 'own': give each once"),
        (("own", "--text", "absent.txt"), "absent.txt: No such file"),
        (("own", "--text", "latin.txt"), "--text latin.txt is not UTF-8"),
        (("bundled:prose", "--text", "blank.txt"), "--text blank.txt: the file is empty"),
        (("own", "--text", "notes.txt", "own/../notes.txt"), "--text has two files of one name"),
        (("own", "--text", "notes.txt"), "--text needs a model with weights"),
        (("bundled:prose", "--text", "notes.txt", "--device", "abacus"), "--device abacus"),
        (("own", "--out", "notes.txt"), "cannot write to notes.txt: File exists; choose another --out"),
    ],
)
def test_mistakes_are_one_line(run: Run, folders: Path, arguments: tuple[str, ...], message: str) -> None:
    (folders / "latin.txt").write_bytes("café".encode("latin-1"))
    (folders / "blank.txt").write_text("\n \n", encoding="utf-8")
    result = run("tokenizers", *arguments)
    assert result.code == 2
    assert message in result.line
