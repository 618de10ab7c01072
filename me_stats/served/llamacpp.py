"""llama.cpp's own HTTP server on this machine, for a GGUF of the catalog or any other (package xllamacpp)."""

from __future__ import annotations

import time
import weakref
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from me_stats.models.catalog import CATALOG, CatalogError, cache_folder, resolve
from me_stats.served.client import HttpClient
from me_stats.served.model import ServedModel
from me_stats.vocabulary import Vocabulary

SUFFIX = ":gguf"
_LOOPBACK = "127.0.0.1"


@dataclass(frozen=True)
class LlamaCppServer:
    """A server that runs: where, on which file, with how many prefix caches."""

    name: str
    url: str
    gguf: Path
    slots: int

    def model(self, *, vocabulary: Vocabulary | None = None, **options: Any) -> ServedModel:
        """The served model: by default with the catalog's tokenizer, and as many requests at a time as slots."""
        known = served_vocabulary(self.name) if vocabulary is None else vocabulary
        return ServedModel(self.url, vocabulary=known, **{"concurrency": self.slots, **options})


@contextmanager
def serve(
    name: str, *, slots: int = 4, context: int = 2048, threads: int = 1, ready_seconds: float = 60.0, **settings: Any
) -> Iterator[LlamaCppServer]:
    """Run llama.cpp's server for a GGUF on a free port of this machine, until the block ends.

    Parameters
    ----------
    name
        A catalog name, with or without the suffix ``:gguf``, or the path of a GGUF file.
    slots
        Prefix caches, and requests that run at the same time. ME over K components needs K for each row that it writes
        side by side.
    context
        Tokens of one slot, prompt included.
    threads
        Threads of the server. Busy machines are best served with one.
    settings
        Further fields of xllamacpp's CommonParams; dots reach inside: ``**{"sampling.temp": 0.7}``.

    Raises
    ------
    ImportError
        Without the package xllamacpp.
    CatalogError
        For a model that is not on this machine.
    ValueError
        For counts below 1, and a setting that the package does not know.
    TimeoutError
        If the server is not ready in time.
    """
    if min(slots, context, threads) < 1:
        raise ValueError(f"slots, context and threads must be at least 1, got {slots}, {context} and {threads}")
    gguf = gguf_path(name)
    library = _xllamacpp()
    given = library.CommonParams()
    given.model.path, given.hostnames, given.port = str(gguf), [_LOOPBACK], 0
    given.n_parallel, given.n_ctx = slots, slots * context
    given.cpuparams.n_threads = given.cpuparams_batch.n_threads = threads
    # A thread that waits by spinning takes the core that the client needs.
    given.cpuparams.poll = given.cpuparams_batch.poll = 0
    # Rows have slots of their own, so nothing is worth copying to memory; the page would only be in the way.
    given.cache_ram_mib, given.verbosity, given.warmup, given.ui = 0, -1, False, False
    for field, value in settings.items():
        *path, last = field.split(".")
        place: Any = given
        for step in path:
            place = getattr(place, step)
        if not hasattr(place, last):
            raise ValueError(f"xllamacpp's CommonParams have no field {field!r}")
        setattr(place, last, value)
    server = library.Server(given)
    try:
        url = server.listening_address
        _wait(url, ready_seconds)
        yield LlamaCppServer(name.removesuffix(SUFFIX), url, gguf, slots)
    finally:
        del server  # ends its threads and frees the port


def open_gguf(name: str, **options: Any) -> ServedModel:
    """A catalog model by the name ``smollm2-135m:gguf``: served from now on, until the model object is gone.

    `options` are those of `serve`. The package gives no logits in process, and HTTP costs a millisecond a request, so
    this is a server too.
    """
    with ExitStack() as stack:
        model = stack.enter_context(serve(name, **options)).model()
        weakref.finalize(model, stack.pop_all().close)
    return model


def gguf_path(name: str) -> Path:
    """The GGUF file of a catalog model (``"smollm2-135m"`` or ``"smollm2-135m:gguf"``), or a path as it is.

    >>> gguf_path("smollm3:gguf")
    Traceback (most recent call last):
        ...
    me_stats.models.catalog.CatalogError: no GGUF of 'smollm3' here: give a file, or one of smollm2-135m, gemma3-270m
    """
    plain = name.removesuffix(SUFFIX)
    if plain in CATALOG and CATALOG[plain].kind == "package":
        file = cache_folder() / f"{plain}-gguf" / "model.gguf"
        if not file.is_file():
            raise CatalogError(f"model {plain!r} is not on this machine: run 'me-stats models pull {plain}'")
        return file
    if Path(name).is_file():
        return Path(name)
    known = ", ".join(entry.name for entry in CATALOG.values() if entry.kind == "package")
    raise CatalogError(f"no GGUF of {plain!r} here: give a file, or one of {known}")


def served_vocabulary(name: str) -> Vocabulary:
    """The vocabulary that TransformersModel gives a catalog name, a folder or a hub id, without the weights."""
    # transformers takes seconds to import.
    from transformers import AutoConfig, AutoTokenizer, GenerationConfig

    from me_stats.models.huggingface import vocabulary_of

    source = resolve(name.removesuffix(SUFFIX))
    try:
        generation = GenerationConfig.from_pretrained(source)
    except OSError:
        generation = None
    network = SimpleNamespace(config=AutoConfig.from_pretrained(source), generation_config=generation)
    return vocabulary_of(network, AutoTokenizer.from_pretrained(source))


def _wait(url: str, seconds: float) -> None:
    deadline = time.monotonic() + seconds
    with HttpClient(url, retries=0, timeout=5.0) as client:
        while True:
            try:
                if client.get("/health").get("status") == "ok":
                    return
            except ConnectionError as error:
                if time.monotonic() > deadline:
                    raise TimeoutError(f"the server at {url} was not ready after {seconds:g} s: {error}") from error
            time.sleep(0.05)


def _xllamacpp() -> Any:
    try:
        import xllamacpp
    except ImportError as error:
        raise ImportError("serving a GGUF here needs llama.cpp; run: pip install me-stats[llamacpp]") from error
    return xllamacpp
