"""What lies in a checkpoint's files, read without loading it: where they are, whether they are whole, what they weigh.

`find` says where the files of a model are or would come from, `read_weights` looks at the headers of all shards, and
both raise `Fault` with what is wrong and what to do. A download that was cut off, a shard that was left out and a
config of another model are found in a second, not after minutes of loading.
"""

from __future__ import annotations

import json
import math
import os
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from me_stats.models import catalog

# What transformers looks for, in its order.
_WEIGHTS = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json")
TOKENIZERS = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "tekken.json", "spiece.model")
_MOST_HEADER = 100_000_000  # bytes, the format's own limit
_SECONDS = 10.0  # that the hub has to answer


class Fault(ValueError):
    """Something that would end a run: the message says what, `remedy` what to do."""

    def __init__(self, detail: str, remedy: str) -> None:
        super().__init__(detail)
        self.remedy = remedy


@dataclass(frozen=True)
class Checkpoint:
    """Where a model's files are.

    Attributes
    ----------
    name
        As it was asked for.
    source
        What ``from_pretrained`` takes.
    folder
        The folder that holds all files, None where some are still to be downloaded.
    commit
        Of a hub model; ``""`` for a folder of the user's.
    download
        Bytes that a run would download, None where the hub does not say.
    """

    name: str
    source: str
    folder: Path | None
    commit: str = ""
    download: int | None = 0


@dataclass(frozen=True)
class Weights:
    """The weights in a folder: files, bytes, and numbers by tensor (empty where the format does not tell)."""

    files: tuple[Path, ...]
    bytes: int
    shapes: Mapping[str, tuple[int, ...]] = field(repr=False)

    @property
    def values(self) -> int:
        """Numbers in all tensors."""
        return sum(math.prod(shape) for shape in self.shapes.values())


def find(name: str) -> Checkpoint:
    """Where the files of `name` are: in a folder, in the hub's cache, or on the hub.

    A hub model whose files are all in the cache asks no network. Raises Fault where nothing can be opened.
    """
    try:
        source = catalog.resolve(name)
    except catalog.CatalogError as error:
        raise Fault(str(error), "see 'me-stats models list', or give a folder or a hub id") from error
    path = Path(source)
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise Fault(f"{path} has no config.json", "give the folder that holds config.json, weights and tokenizer")
        return Checkpoint(name, source, path)
    if path.exists():
        raise Fault(f"{path} is a file", "give the folder that holds config.json, weights and tokenizer")
    return _on_the_hub(name)


def read_weights(folder: Path) -> Weights:
    """The weights of a checkpoint, by the headers of its shards; nothing is loaded.

    Raises Fault for files that are absent, empty, cut off or not of the format, and for tensors that the index names
    and no shard holds.
    """
    listed = next((folder / name for name in _WEIGHTS if (folder / name).exists()), None)
    if listed is None:
        raise Fault(f"{folder} holds no weights ({_WEIGHTS[0]} or {_WEIGHTS[1]})", _again(folder))
    index: dict[str, Any] = {}
    if listed.suffix == ".json":
        index = _json(listed)
        where = index.get("weight_map")
        if not isinstance(where, dict) or not where:
            raise Fault(f"{listed.name} has no weight_map", _again(folder))
        files = [folder / shard for shard in dict.fromkeys(where.values())]
    else:
        files, where = [listed], {}
    absent = [path.name for path in files if not path.is_file()]
    if absent:
        raise Fault(f"{len(absent)} of {len(files)} shards are missing, such as {absent[0]}", _again(folder))
    empty = [path.name for path in files if path.stat().st_size == 0]
    if empty:
        raise Fault(f"{empty[0]} is empty", _again(folder))
    shapes: dict[str, tuple[int, ...]] = {}
    tensor_bytes = 0
    for path in files:
        if path.suffix == ".safetensors":
            own, size = _safetensors(path)
            lost = [tensor for tensor, shard in where.items() if shard == path.name and tensor not in own]
            if lost:
                raise Fault(f"{path.name} lacks {lost[0]}, which the index says it holds", _again(folder))
            shapes |= own
            tensor_bytes += size
        else:
            _pickled(path)
            tensor_bytes += path.stat().st_size
    declared = index.get("metadata", {}).get("total_size")
    if isinstance(declared, int | float) and tensor_bytes < declared:
        raise Fault(f"the shards hold {tensor_bytes:,} bytes of {int(declared):,} that the index names", _again(folder))
    return Weights(tuple(files), tensor_bytes, shapes)


def require_tokenizer(folder: Path) -> None:
    """Raise Fault for a folder without a tokenizer: transformers may then make up an empty one."""
    if not any((folder / name).is_file() for name in TOKENIZERS):
        raise Fault(
            f"{folder} holds no tokenizer ({TOKENIZERS[0]}, {TOKENIZERS[1]}, ...)",
            "copy the tokenizer's files from the model that it was trained from into the folder",
        )


def require_fitting(weights: Weights, network: Any) -> None:
    """Raise Fault where tensors are of other shapes than those of `network`, or too few.

    Names that one of the two does not have are left alone: transformers translates many. `network` may be on the meta
    device.
    """
    expected = {name: tuple(parameter.shape) for name, parameter in network.named_parameters()}
    for name, shape in weights.shapes.items():
        if name in expected and shape != expected[name]:
            raise Fault(
                f"{name} is {_times(shape)}, where config.json makes it {_times(expected[name])}",
                "config.json is not that of these weights, or lacks keys such as vocab_size: take both from one source",
            )
    needed = sum(parameter.numel() for parameter in network.parameters())
    quantised = getattr(network.config, "quantization_config", None) is not None
    if weights.shapes and not quantised and weights.values < needed:
        raise Fault(
            f"the weights hold {weights.values:,} numbers, the network {needed:,}", _again(weights.files[0].parent)
        )


def _times(shape: tuple[int, ...]) -> str:
    return " × ".join(map(str, shape))


def _again(folder: Path) -> str:
    return f"download the files again and compare their sizes; they belong into {folder}"


def _json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise Fault(f"{path.name} cannot be read: {error}", _again(path.parent)) from error
    if not isinstance(content, dict):
        raise Fault(f"{path.name} holds no keys", _again(path.parent))
    return content


def _safetensors(path: Path) -> tuple[dict[str, tuple[int, ...]], int]:
    """Shapes by tensor, and the bytes of all tensors, from the header; the file must be as long as it says."""
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or not 2 <= length <= min(size - 8, _MOST_HEADER):
            raise Fault(f"{path.name} is cut off or no safetensors file ({size:,} bytes)", _again(path.parent))
        raw = file.read(length)
    try:
        header = json.loads(raw)
        tensors = {name: tensor for name, tensor in header.items() if name != "__metadata__"}
        shapes = {name: tuple(map(int, tensor["shape"])) for name, tensor in tensors.items()}
        end = max((int(tensor["data_offsets"][1]) for tensor in tensors.values()), default=0)
    except (ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
        raise Fault(f"the header of {path.name} cannot be read ({error})", _again(path.parent)) from error
    if size != 8 + length + end:
        raise Fault(f"{path.name} has {size:,} bytes, its header says {8 + length + end:,}", _again(path.parent))
    return shapes, end


def _pickled(path: Path) -> None:
    """Raise Fault for a .bin file that was cut off: a zip file has its table at the end."""
    with path.open("rb") as file:
        zipped = file.read(2) == b"PK"
    if zipped and not zipfile.is_zipfile(path):
        raise Fault(f"{path.name} is cut off", _again(path.parent))


def _on_the_hub(name: str) -> Checkpoint:
    from huggingface_hub import try_to_load_from_cache

    cached = try_to_load_from_cache(name, "config.json")
    reason = ""
    if isinstance(cached, str | os.PathLike):
        folder = Path(cached).parent
        try:
            read_weights(folder)
            require_tokenizer(folder)
            return Checkpoint(name, name, folder, folder.name)
        except Fault as fault:
            reason = f" (in the cache, {fault})"
    try:
        info = _ask(name)
    except Fault as fault:
        raise Fault(f"{fault}{reason}", fault.remedy) from fault
    sizes = {sibling.rfilename: sibling.size for sibling in info.siblings or ()}
    chosen = next((stem for stem in (".safetensors", ".bin") if any(file.endswith(stem) for file in sizes)), None)
    if chosen is None or "config.json" not in sizes:
        lacking = "weights" if chosen is None else "config.json"
        raise Fault(f"{name} on the hub has no {lacking} that transformers loads",
                    "name a checkpoint of transformers, with config.json and safetensors")  # fmt: skip
    wanted = [size for file, size in sizes.items() if file.endswith(chosen) and "/" not in file]
    total = None if None in wanted else sum(size or 0 for size in wanted)
    return Checkpoint(name, name, None, info.sha or "", total)


def _ask(name: str) -> Any:
    """The hub's list of files; Fault with the remedy for what keeps us from them."""
    from huggingface_hub import HfApi, get_hf_file_metadata, hf_hub_url
    from huggingface_hub import errors as hub

    fetch = f"'hf download {name}' on a machine with a network, then copy the cache or give its folder with --models"
    try:
        info = HfApi().model_info(name, files_metadata=True, timeout=_SECONDS)
        # The list of a gated model is public, its files are not.
        get_hf_file_metadata(hf_hub_url(name, "config.json"), timeout=_SECONDS)
    except hub.GatedRepoError as error:
        raise Fault(f"{name} is gated and this account may not read it",
                    f"accept the terms on the hub page of {name}, then 'hf auth login' (or set HF_TOKEN)"
                    ) from error  # fmt: skip
    except hub.RepositoryNotFoundError as error:
        raise Fault(f"the hub has no model {name}, or it is private",
                    "check the spelling; for a private model 'hf auth login' (or set HF_TOKEN)") from error  # fmt: skip
    except hub.OfflineModeIsEnabled as error:
        raise Fault(f"{name} is not on this machine, and HF_HUB_OFFLINE forbids to ask the hub",
                    f"unset HF_HUB_OFFLINE, or {fetch}") from error  # fmt: skip
    except hub.HfHubHTTPError as error:
        raise Fault(f"the hub refuses {name}: {_line(error)}", "try again later, or 'hf auth login'") from error
    except Exception as error:  # whatever the network layers raise
        raise Fault(f"{name} is not on this machine, and the hub cannot be reached ({_line(error)})",
                    f"check the network, or {fetch}") from error  # fmt: skip
    return info


def _line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:120]
