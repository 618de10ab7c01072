"""Prompts from texts, files and the hub: what is read, what is filled in, and one line for each mistake."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from me_stats.cli_prompts import filled, read_prompts

ROWS = [{"question": "How many?", "answer": "3", "n": 1}, {"question": "Where?\nHere", "answer": "4", "n": 2}]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    lines = "\n".join(json.dumps(row) for row in ROWS)
    (tmp_path / "a.jsonl").write_text(lines + "\n\n", encoding="utf-8")
    (tmp_path / "plain.jsonl").write_text('"one"\n{"x": "two"}\n', encoding="utf-8")
    (tmp_path / "bad.jsonl").write_text('{"x": "one"}\n{"x": \n', encoding="utf-8")
    (tmp_path / "numbers.jsonl").write_text("3\n", encoding="utf-8")
    (tmp_path / "a.txt").write_text("first line\n\n  second  \r\n", encoding="utf-8", newline="")
    (tmp_path / "empty.txt").write_text("\n\n", encoding="utf-8")
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9\n")
    (tmp_path / "a.csv").write_text("x", encoding="utf-8")
    (tmp_path / "a.parquet").write_bytes(b"PAR1")
    return tmp_path


def test_files(folder: Path) -> None:
    assert read_prompts("a.jsonl", field="question", count=9) == ("How many?", "Where?\nHere")
    assert read_prompts("a.jsonl", field="question", count=1) == ("How many?",)
    assert read_prompts("plain.jsonl", count=2) == ("one", "two")
    assert read_prompts("bad.jsonl", count=1) == ("one",)  # what is not asked for is not read
    assert [text.strip() for text in read_prompts(str(folder / "a.txt"), count=5)] == ["first line", "second"]


def test_templates(folder: Path) -> None:
    template = r"Question {n}: {question}\nAnswer:\t\\n"
    assert read_prompts("a.jsonl", template=template, count=1) == ("Question 1: How many?\nAnswer:\t\\n",)
    assert filled([r"a\nb", "c"], "<{text}>") == (r"<a\nb>", "<c>")
    assert filled(["a"], None) == ("a",)
    assert filled(["a"], "{text} {{text}} {text.__class__}") == ("a {a} {text.__class__}",)


@pytest.mark.parametrize(
    ("source", "options", "message"),
    [
        ("a.jsonl", {}, "--prompts a.jsonl: a row has the fields question, answer; name one with --field, or give"),
        ("a.jsonl", {"field": "query"}, "no text in the field 'query' that --field names; a row has the fields"),
        ("a.jsonl", {"field": "n"}, "no text in the field 'n'"),
        ("a.jsonl", {"template": "{query}"}, "--template asks for {query}, but a row has the fields question, answer"),
        ("bad.jsonl", {}, "line 2 is no JSON"),
        ("numbers.jsonl", {}, "line 1 is neither an object nor a text"),
        ("empty.txt", {}, "--prompts empty.txt holds no prompt"),
        ("latin.txt", {}, "--prompts latin.txt is not UTF-8 text"),
        ("a.csv", {}, "give a .jsonl, .txt or .parquet file, or a dataset of the hub as org/name"),
        ("nothing", {}, "give a .jsonl, .txt or .parquet file, or a dataset of the hub as org/name"),
        ("org/name:a:b:c", {}, "give a .jsonl, .txt or .parquet file"),
    ],
)
def test_mistakes_name_the_option_and_the_remedy(
    folder: Path, source: str, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=source) as raised:
        read_prompts(source, count=9, **options)
    assert message in str(raised.value)
    assert "\n" not in str(raised.value)


def test_an_absent_file_and_empty_prompts(folder: Path) -> None:
    with pytest.raises(FileNotFoundError):
        read_prompts("absent.jsonl", count=1)
    with pytest.raises(ValueError, match="--prompt: prompt 2 is empty"):
        filled(["a", ""], None)


@pytest.mark.parametrize(("module", "source"), [("pyarrow.parquet", "a.parquet"), ("datasets", "org/name")])
def test_what_is_not_installed_is_said(folder: Path, module: str, source: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, module.partition(".")[0], None)
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ValueError, match="pip install"):
        read_prompts(source, count=1)


def test_a_dataset_of_the_hub(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Any] = []
    stand_in = ModuleType("datasets")

    def load_dataset(*arguments: Any, **options: Any) -> Any:
        seen.append((arguments, options))
        if arguments[0] == "org/gone":
            raise RuntimeError("no such dataset\nwith a long story")
        return iter(ROWS)

    stand_in.load_dataset = load_dataset  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "datasets", stand_in)
    assert read_prompts("org/name:main:test", field="question", count=1) == ("How many?",)
    assert read_prompts("org/name", field="question", count=2)[1] == "Where?\nHere"
    assert seen == [(("org/name", "main"), {"split": "test"}), (("org/name", None), {"split": "train"})]
    with pytest.raises(ValueError, match=r"--prompts org/gone: the dataset could not be read: no such dataset$"):
        read_prompts("org/gone", count=1)


def test_parquet(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class ParquetFile:
        def __init__(self, path: Path) -> None:
            if path.name == "damaged.parquet":
                raise ValueError("no footer")

        def iter_batches(self, batch_size: int) -> Any:
            class Batch:
                def to_pylist(self) -> list[dict[str, Any]]:
                    return ROWS

            return iter([Batch()])

    package, stand_in = ModuleType("pyarrow"), ModuleType("pyarrow.parquet")
    stand_in.ParquetFile = ParquetFile  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "pyarrow", package)
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", stand_in)
    assert read_prompts("a.parquet", field="question", count=2)[0] == "How many?"
    (folder / "damaged.parquet").write_bytes(b"")
    with pytest.raises(ValueError, match=r"--prompts damaged\.parquet: no footer"):
        read_prompts("damaged.parquet", count=1)
