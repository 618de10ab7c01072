from __future__ import annotations

import math
import re
from pathlib import Path

import pytest

from me_stats.models import _gguf, catalog
from me_stats.models.catalog import CatalogError, cache_folder, get_entry, pull, pulled, resolve
from tests.wheels import ENTRY, FakeConvert, FakePip

pytestmark = pytest.mark.usefixtures("converters_installed")


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
    with pytest.raises(
        CatalogError, match="known are bundled:prose, bundled:code, bundled:words, smollm2-135m, gemma3-270m"
    ):
        get_entry("xyzzy")


@pytest.mark.parametrize("name", ["bundled:prose", "bundled:code", "bundled:words"])
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
