"""What a run finds out before its first forward: planted faults, each with a remedy, and no forward at all."""

from __future__ import annotations

import dataclasses
import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from rich.console import Console
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from me_stats import preflight
from me_stats.checkpoint_files import Fault, read_weights
from me_stats.groups import Group, load_group
from me_stats.model_checks import Check
from me_stats.part_cost import GIB
from me_stats.plans import Part
from me_stats.preflight import Preflight, check
from me_stats.scripts import load
from tests.checkpoints import save_stand_in

MODELS = ("qwen2.5-3b", "qwen2.5-math-1.5b")


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two checkpoints of one vocabulary in several shards, and two of others."""
    root = tmp_path_factory.mktemp("saved")
    for shape in (*MODELS, "mistral-7b", "deepseek-7b"):
        save_stand_in(root / shape, shape, shard="200KB")
    return root


@pytest.fixture
def root(saved: Path, tmp_path: Path) -> Path:
    """The checkpoints, for a test to damage."""
    return Path(shutil.copytree(saved, tmp_path / "models"))


@pytest.fixture(autouse=True)
def forwards(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """No check may run a network: whatever is called is listed, and refused."""
    called: list[str] = []

    def refused(self: torch.nn.Module, *arguments: Any, **options: Any) -> Any:
        called.append(type(self).__name__)
        raise AssertionError("a forward")

    monkeypatch.setattr(torch.nn.Module, "__call__", refused)
    return called


def part(*names: str | Path, experiment: str = "certificate", **options: Any) -> Part:
    config = load("experiments", experiment).Config(models=tuple(map(str, names)), **options)
    return Part(experiment, "some", config)


def look(*parts: Part, tmp: Path, **options: Any) -> Preflight:
    return check(parts, **({"device": "cpu", "dtype": "float32", "out": tmp / "out"} | options))


def pair(root: Path, *others: str) -> Part:
    return part(*(root / name for name in others or MODELS))


def failed(found: Preflight) -> Check:
    """The one check that failed, which the run would stop at."""
    (bad,) = [one for one in found.checks if one.status == "fail"]
    assert not found.passed
    assert bad.remedy
    with pytest.raises(ValueError, match=r"1 of .* checks failed before the first forward") as stop:
        found.require_passed()
    assert bad.detail in str(stop.value)
    assert bad.remedy in str(stop.value)
    return bad


# Nothing wrong


def test_whole_checkpoints_pass(root: Path, tmp_path: Path, forwards: list[str]) -> None:
    found = look(pair(root), tmp=tmp_path)
    assert found.passed
    found.require_passed()
    assert {one.status for one in found.checks} == {"ok"}
    seen = {one.name: one.detail for one in found.checks}
    assert "qwen2" in seen["qwen2.5-3b: config"]
    assert seen["qwen2.5-3b: tokenizer"] == "261 tokens, 2,374 rows of logits"
    assert seen[f"vocabularies of {' + '.join(MODELS)}"] == "one, of 261 tokens"
    assert len(list((root / MODELS[0]).glob("*.safetensors"))) > 1
    assert forwards == []


def test_vocabularies_that_can_be_aligned_pass(root: Path, tmp_path: Path) -> None:
    found = look(pair(root, "mistral-7b", "deepseek-7b"), tmp=tmp_path)
    assert found.passed
    assert [one.detail for one in found.checks if "vocabularies" in one.name] == [
        "they differ and are aligned over byte strings"
    ]
    assert found.forecasts[0].left_out == "alignment, draws on the host"


def test_the_tables_show_it_all(root: Path, tmp_path: Path) -> None:
    found = look(pair(root), Part("toy_equivalence", "", load("experiments", "toy_equivalence").Config()), tmp=tmp_path)
    console = Console(width=200, record=True, file=(tmp_path / "shown").open("w", encoding="utf-8"))
    console.print(preflight.table(found.checks))
    console.print(preflight.forecast_table(found))
    console.file.close()
    text = console.export_text()
    for one in found.checks:
        assert one.name in text
    for words in ("certificate-some", "not predicted", "Forecast, nothing measured: rates of two CPU cores"):
        assert words in text


def test_names_of_the_catalog_and_shapes_pass(tmp_path: Path) -> None:
    found = look(part("bundled:prose", "bundled:code"), part("bundled:prose", "bundled:words"), tmp=tmp_path)
    assert found.passed
    random = part("random:openchat-7b", "random:nous-hermes-7b", experiment="speed")
    assert look(random, tmp=tmp_path, free=lambda device: 100 * GIB).passed
    assert "must be one of" in failed(look(part("random:gpt-5"), tmp=tmp_path)).detail


# Faults of files


def lose_shard(folder: Path) -> None:
    sorted(folder.glob("*.safetensors"))[-1].unlink()


def cut_shard(folder: Path) -> None:
    path = max(folder.glob("*.safetensors"), key=lambda path: path.stat().st_size)
    path.write_bytes(path.read_bytes()[:-100])


def empty_shard(folder: Path) -> None:
    next(folder.glob("*.safetensors")).write_bytes(b"")


def cut_header(folder: Path) -> None:
    path = next(folder.glob("*.safetensors"))
    path.write_bytes(path.read_bytes()[:50])


def garble_header(folder: Path) -> None:
    path = next(folder.glob("*.safetensors"))
    path.write_bytes(path.read_bytes().replace(b'"dtype"', b'"dtyp"', 1).replace(b'"shape":[', b'"shape":(', 1))


def break_index(folder: Path) -> None:
    (folder / "model.safetensors.index.json").write_text("{")


def name_more_tensors(folder: Path) -> None:
    path = folder / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    shard = next(iter(index["weight_map"].values()))
    path.write_text(json.dumps(index | {"weight_map": index["weight_map"] | {"model.extra": shard}}))


def leave_shard_out(folder: Path) -> None:
    path = folder / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    last = sorted(set(index["weight_map"].values()))[-1]
    kept = {tensor: shard for tensor, shard in index["weight_map"].items() if shard != last}
    path.write_text(json.dumps({"weight_map": kept}))


def no_weights(folder: Path) -> None:
    for path in folder.glob("model*"):
        path.unlink()


def change_config(folder: Path, **changes: Any) -> None:
    path = folder / "config.json"
    config = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({key: value for key, value in config.items() if value is not None}))


def no_tokenizer(folder: Path) -> None:
    for path in folder.glob("tokenizer*"):
        path.unlink()


FAULTS: dict[str, tuple[Callable[[Path], Any], str, str]] = {
    "missing shard": (lose_shard, "weights", r"1 of \d shards are missing"),
    "truncated safetensors": (cut_shard, "weights", "bytes, its header says"),
    "empty shard": (empty_shard, "weights", "is empty"),
    "cut header": (cut_header, "weights", "is cut off or no safetensors file"),
    "garbled header": (garble_header, "weights", "the header of .* cannot be read"),
    "broken index": (break_index, "weights", "index.json cannot be read"),
    "tensor nowhere": (name_more_tensors, "weights", "lacks model.extra"),
    "index without a shard": (leave_shard_out, "weights", "the weights hold .* numbers, the network"),
    "no weights": (no_weights, "weights", "holds no weights"),
    "config without vocab": (
        lambda folder: change_config(folder, vocab_size=None),
        "weights",
        "where config.json makes",
    ),
    "config of another width": (lambda folder: change_config(folder, intermediate_size=64), "weights", "where config"),
    "config of no model": (
        lambda folder: change_config(folder, model_type="t5"),
        "config",
        "no causal language model",
    ),
    "broken config": (lambda folder: (folder / "config.json").write_text("{"), "config", "no causal language model"),
    "no config": (lambda folder: (folder / "config.json").unlink(), "files", "has no config.json"),
    "no tokenizer": (no_tokenizer, "tokenizer", "holds no tokenizer"),
    "broken tokenizer": (lambda folder: (folder / "tokenizer.json").write_text("{"), "tokenizer", "does not load"),
}


@pytest.mark.parametrize("fault", list(FAULTS))
def test_a_fault_of_files_is_found(fault: str, root: Path, tmp_path: Path, forwards: list[str]) -> None:
    plant, where, detail = FAULTS[fault]
    plant(root / MODELS[1])
    bad = failed(look(pair(root), tmp=tmp_path))
    assert bad.name == f"{MODELS[1]}: {where}"
    assert re.search(detail, bad.detail), bad.detail
    assert forwards == []


# Faults of tokenizers


def words(folder: Path, size: int = 3) -> None:
    """A tokenizer of words, which loses every other."""
    raw = Tokenizer(models.WordLevel({f"w{n}": n for n in range(size)}, unk_token="w0"))
    raw.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=raw, unk_token="w0", eos_token="w1").save_pretrained(folder)


def test_vocabularies_that_cannot_be_aligned_are_found(root: Path, tmp_path: Path) -> None:
    words(root / "mistral-7b")
    bad = failed(look(pair(root, "deepseek-7b", "mistral-7b"), tmp=tmp_path))
    assert bad.name == "vocabularies of deepseek-7b + mistral-7b"
    assert "and mistral-7b cannot be (the tokenizer (WordLevel) has neither byte-level" in bad.detail


def test_one_vocabulary_may_not_be_readable_as_bytes(root: Path, tmp_path: Path) -> None:
    over_bytes = part(*(root / name for name in MODELS), experiment="mixed_vocabularies")
    bad = failed(look(pair(root), over_bytes, tmp=tmp_path))
    assert "mixed_vocabularies-some reads as byte strings" in bad.detail
    assert "normalises its text (NFC)" in bad.detail  # as Qwen's tokenizers do
    assert bad.remedy == "leave it out with --only"


def test_parts_that_need_one_vocabulary_are_found(root: Path, tmp_path: Path) -> None:
    bad = failed(look(part(root / MODELS[0], root / "mistral-7b", experiment="speed"), tmp=tmp_path))
    assert "speed-some needs one" in bad.detail


def test_a_tokenizer_wider_than_the_logits_is_a_warning(root: Path, tmp_path: Path) -> None:
    words(root / "mistral-7b", size=600)
    found = look(part(root / "mistral-7b"), tmp=tmp_path)
    (seen,) = [one for one in found.checks if one.name == "mistral-7b: tokenizer"]
    assert (seen.status, "ids from 500 on cannot be read" in seen.detail) == ("warn", True)


def test_chat_templates_are_looked_at_where_they_are_used(root: Path, tmp_path: Path) -> None:
    (root / MODELS[0] / "chat_template.jinja").unlink()
    chat = Group("mine", "mine", tuple(str(root / name) for name in MODELS))
    names = [one.name for one in look(pair(root), tmp=tmp_path, group=chat).checks if one.status == "warn"]
    assert names == [f"{MODELS[0]}: chat template"]
    plain = dataclasses.replace(chat, prompts="text")
    assert all(one.status == "ok" for one in look(pair(root), tmp=tmp_path, group=plain).checks)
    last = "{% for m in messages if m.role == 'user' %}{{ m.content }}{% endfor %}"
    (root / MODELS[1] / "chat_template.jinja").write_text(last)
    assert look(pair(root), tmp=tmp_path).passed
    assert "does not put the system prompt first" in failed(look(part(root / MODELS[1]), tmp=tmp_path)).detail


# Faults of the machine


def test_too_little_memory_is_found(root: Path, tmp_path: Path) -> None:
    bad = failed(look(pair(root), tmp=tmp_path, free=lambda device: 2**20))
    assert bad.name == "memory"
    assert "certificate-some takes about" in bad.detail
    assert "--dtype bfloat16" in bad.remedy
    need = look(pair(root), tmp=tmp_path).forecasts[0].memory
    for there, status in ((need - 1, "fail"), (int(1.1 * need), "warn"), (2 * need, "ok"), (None, "warn")):
        found = look(pair(root), tmp=tmp_path, free=lambda device, there=there: there)
        assert [one.status for one in found.checks if one.name == "memory"] == [status]


def test_memory_is_that_of_the_weights_and_more(root: Path, tmp_path: Path) -> None:
    numbers = sum(read_weights(root / name).values for name in MODELS)
    sizes = [
        look(part(*(root / name for name in MODELS), rows=4, steps=8, dtype=dtype), tmp=tmp_path).forecasts[0].memory
        for dtype in ("float32", "bfloat16")
    ]
    assert 4 * numbers < sizes[0] < 4 * numbers + 2**25
    assert 2 * numbers < sizes[1] < sizes[0]


def test_free_memory_of_this_machine() -> None:
    there = preflight.free_memory("cpu")
    assert there is None or 2**20 < there < 2**50
    assert preflight.free_memory("meta") is None


def test_an_out_folder_that_cannot_be_written_is_found(root: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    bad = failed(look(pair(root), tmp=tmp_path, out=tmp_path / "file" / "out"))
    assert (bad.name, "--out" in bad.remedy) == ("out", True)
    assert look(pair(root), tmp=tmp_path, out=tmp_path / "new" / "out").passed
    assert not (tmp_path / "new").exists()  # a look leaves nothing behind


def test_a_full_disk_is_found(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=2**20))
    assert failed(look(pair(root), tmp=tmp_path)).name == "disk for records"


@pytest.mark.parametrize("device", ["cuda:99", "warp"])
def test_an_unknown_device_is_found(device: str, root: Path, tmp_path: Path, forwards: list[str]) -> None:
    found = look(pair(root), tmp=tmp_path, device=device)
    bad = next(one for one in found.checks if one.status == "fail")
    assert (bad.name, bad.remedy.startswith("give --device")) == ("device", True)
    assert "H100 SXM" in found.assumed
    assert found.forecasts[0].seconds is not None
    assert forwards == []


def test_an_unknown_dtype_is_found(root: Path, tmp_path: Path) -> None:
    bad = failed(look(pair(root), tmp=tmp_path, dtype="int4"))
    assert (bad.name, "must be one of" in bad.detail) == ("dtype", True)


def test_rows_past_the_context_are_found(root: Path, tmp_path: Path) -> None:
    change_config(root / MODELS[1], max_position_embeddings=100)
    bad = failed(look(part(*(root / name for name in MODELS), steps=60), tmp=tmp_path))
    assert (bad.name, "it reads 100" in bad.detail) == (f"{MODELS[1]}: context", True)


def test_missing_packages_and_data_are_found(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    @dataclasses.dataclass(frozen=True)
    class Config:
        models: tuple[str, ...]
        data: Path
        tasks: tuple[str, ...] = ()

    accuracy = Part("accuracy", "some", Config((), tmp_path / "absent.jsonl"))
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    found = [one for one in look(accuracy, tmp=tmp_path).checks if one.status == "fail"]
    assert [one.name for one in found] == ["package lm_eval", "data of accuracy-some"]
    assert found[0].remedy == 'pip install "me-stats[lm-eval]"'


def test_files_of_tasks_are_read(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("ME_STATS_DATA", raising=False)
    names = (root / name for name in MODELS)
    accuracy = part(*names, experiment="accuracy", tasks=("gsm8k", "indentation"), runs=1)
    folder = tmp_path / "data" / "gsm8k"
    for rows, status in (
        ([], "fail"),
        ([{"question": "1 + 1?"}], "fail"),
        ([{"question": "?", "answer": "#### 2"}], "ok"),
    ):
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "test.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
        found = {one.name: one.status for one in look(accuracy, tmp=tmp_path, data=tmp_path / "data").checks}
        assert (found["task gsm8k"], found["task indentation"]) == (status, "ok")
    seen = [one for one in look(accuracy, tmp=tmp_path).checks if one.name == "task gsm8k"]
    assert [(one.status, "ME_STATS_DATA" in one.detail) for one in seen] == [("fail", True)]


def test_models_that_are_not_here_are_told_by_their_shapes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def absent(name: str) -> Any:
        raise Fault(f"{name} is not here", "fetch it")

    monkeypatch.setattr("me_stats.model_checks.find", absent)
    group = load_group("qwen")
    found = look(part(*group.models, dtype="bfloat16"), tmp=tmp_path, group=group, device="cuda:99")
    assert [one.name for one in found.checks if one.status == "fail"][-2:] == [
        f"{name}: files" for name in group.models
    ]
    (told,) = found.forecasts
    assert told.seconds is not None
    assert 4.6e9 * 2 < told.memory < 5.5e9 * 2  # 3.09 and 1.54 billion weights
    blind = look(part(*group.models), tmp=tmp_path).forecasts[0]
    assert (blind.seconds, blind.left_out) == (None, "all of it")


def test_another_revision_is_found(root: Path, tmp_path: Path) -> None:
    group = Group("mine", "mine", tuple(str(root / name) for name in MODELS), revisions=("", "abc123"))
    bad = failed(look(pair(root), tmp=tmp_path, group=group))
    assert "the group asks for revision abc123" in bad.detail
    assert "--revision abc123" in bad.remedy
