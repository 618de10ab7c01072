"""Files of checkpoints that are whole, cut off or elsewhere. Faults of safetensors are planted in test_preflight.py."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx2
import pytest
import torch
from huggingface_hub import errors as hub

from me_stats.checkpoint_files import Fault, find, read_weights
from me_stats.part_cost import GIB
from tests.checkpoints import save_stand_in


def test_names_that_nothing_can_open(tmp_path: Path) -> None:
    (tmp_path / "file.safetensors").write_bytes(b"x")
    for name, message in (
        ("bundled:pros", "did you mean 'bundled:prose'"),
        (str(tmp_path / "file.safetensors"), "is a file"),
        (str(tmp_path), "has no config.json"),
        ("no such/name at all", "no folder"),
    ):
        with pytest.raises(Fault, match=message) as fault:
            find(name)
        assert fault.value.remedy


def test_pickled_weights_are_looked_at_too(tmp_path: Path) -> None:
    torch.save({"a": torch.ones(4)}, tmp_path / "pytorch_model.bin")
    assert read_weights(tmp_path).shapes == {}
    whole = (tmp_path / "pytorch_model.bin").read_bytes()
    (tmp_path / "pytorch_model.bin").write_bytes(whole[:-20])
    with pytest.raises(Fault, match="is cut off"):
        read_weights(tmp_path)
    index = {"metadata": {"total_size": 10**6}, "weight_map": {"a": "pytorch_model-1.bin"}}
    (tmp_path / "pytorch_model.bin").rename(tmp_path / "pytorch_model-1.bin")
    (tmp_path / "pytorch_model-1.bin").write_bytes(whole)
    (tmp_path / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    with pytest.raises(Fault, match="bytes of 1,000,000 that the index names"):
        read_weights(tmp_path)


# The hub


def answer(status: int, kind: type[hub.HfHubHTTPError]) -> Exception:
    request = httpx2.Request("GET", "https://hub.test/org/name")
    return kind("refused", response=httpx2.Response(status, request=request))


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Put an answer, an error or files with sizes, in the place of the hub's."""

    def put(info: Any, metadata: Any = None) -> None:
        def say(value: Any) -> Any:
            if isinstance(value, Exception):
                raise value
            return value

        api = SimpleNamespace(model_info=lambda name, **options: say(info))
        monkeypatch.setattr("huggingface_hub.HfApi", lambda: api)
        monkeypatch.setattr("huggingface_hub.get_hf_file_metadata", lambda url, **options: say(metadata))
        monkeypatch.setattr("huggingface_hub.try_to_load_from_cache", lambda *arguments: None)

    return put


def listing(**sizes: int) -> SimpleNamespace:
    files = [SimpleNamespace(rfilename=name.replace("_json", ".json").replace("_st", ".safetensors"), size=size)
             for name, size in sizes.items()]  # fmt: skip
    return SimpleNamespace(siblings=files, sha="c0ffee")


@pytest.mark.parametrize(
    ("info", "metadata", "detail", "remedy"),
    [
        (answer(401, hub.RepositoryNotFoundError), None, "has no model org/name", "check the spelling"),
        (listing(config_json=1), answer(403, hub.GatedRepoError), "gated", "accept the terms"),
        (answer(500, hub.HfHubHTTPError), None, "the hub refuses", "try again"),
        (hub.OfflineModeIsEnabled("no"), None, "HF_HUB_OFFLINE", "unset HF_HUB_OFFLINE"),
        (ConnectionError("no route"), None, "cannot be reached", "hf download org/name"),
        (listing(README_json=1), None, "no weights", "name a checkpoint"),
    ],
)
def test_what_keeps_us_from_the_hub_is_named(
    info: Any, metadata: Any, detail: str, remedy: str, asked: Callable[..., None]
) -> None:
    asked(info, metadata)
    with pytest.raises(Fault, match=detail) as fault:
        find("org/name")
    assert remedy in fault.value.remedy


def test_a_download_is_told_with_its_size(asked: Callable[..., None]) -> None:
    asked(listing(config_json=10, a_st=3 * GIB, b_st=GIB))
    found = find("org/name")
    assert (found.folder, found.commit, found.download) == (None, "c0ffee", 4 * GIB)


def test_a_whole_model_in_the_cache_needs_no_network(
    tmp_path: Path, asked: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked(ConnectionError("no route"))
    folder = Path(save_stand_in(tmp_path / "c0ffee", "qwen2.5-3b", shard="200KB"))
    monkeypatch.setattr("huggingface_hub.try_to_load_from_cache", lambda *arguments: str(folder / "config.json"))
    assert (find("org/name").folder, find("org/name").commit) == (folder, "c0ffee")
    sorted(folder.glob("*.safetensors"))[-1].unlink()
    with pytest.raises(Fault, match=r"cannot be reached .*\(in the cache, 1 of \d shards are missing"):
        find("org/name")
