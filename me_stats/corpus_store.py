"""Where the scores of a corpus are kept: arrays in memory, or .npy files that grow and are read as memory maps."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from me_stats.record import write_atomically

SCHEMA = 1
_HEADER = 128  # bytes of a .npy header with room for any length
_SAME = 1e-3  # nats: far above rounding on other hardware, far below another model
_CHUNK = 1 << 16


@dataclass(frozen=True, eq=False)
class CorpusScores:
    """n scored tokens in D documents under K components.

    Attributes
    ----------
    log_probs
        (n, K) natural log P_i(x_t | prefix), float32 or float64; a memory map if it lies in a folder.
    tokens, bytes
        (n,) int32 token ids, and the UTF-8 bytes that each stands for (0 where unknown).
    lengths
        (D,) scored tokens of each document; documents follow each other in the arrays.
    prompts
        (D, P) ids that stood before the first scored token of each document.
    domains
        (D,) names.
    settings
        How it was scored: window, stride, prompt and the like.
    """

    log_probs: np.ndarray
    tokens: np.ndarray
    bytes: np.ndarray
    lengths: np.ndarray
    prompts: np.ndarray
    domains: tuple[str, ...]
    settings: dict[str, Any]

    def __post_init__(self) -> None:
        n = len(self.log_probs)
        if self.log_probs.ndim != 2 or self.tokens.shape != (n,) or self.bytes.shape != (n,):
            raise ValueError(f"log_probs must be (n, K), tokens and bytes (n,); n is {n}")
        if self.lengths.sum() != n or not len(self.lengths) == len(self.domains) == len(self.prompts):
            raise ValueError("lengths must add up to n, with one entry each in lengths, prompts and domains")

    @property
    def n(self) -> int:
        """Scored tokens."""
        return len(self.log_probs)

    @property
    def n_components(self) -> int:
        """K."""
        return int(self.log_probs.shape[1])

    @property
    def n_documents(self) -> int:
        """D, documents without a scored token included."""
        return len(self.lengths)

    @cached_property
    def document(self) -> np.ndarray:
        """(n,) int32 number of the document of each token."""
        return np.repeat(np.arange(len(self.lengths), dtype=np.int32), self.lengths)

    @cached_property
    def offsets(self) -> np.ndarray:
        """(D + 1,) document d holds the tokens ``offsets[d]`` to ``offsets[d + 1]``."""
        return np.concatenate([[0], np.cumsum(self.lengths, dtype=np.int64)])

    def sequences(self) -> Iterator[tuple[tuple[int, ...], np.ndarray]]:
        """(prompt, tokens) of each document in order: token t was scored after ``(*prompt, *tokens[:t])``.

        In a document longer than the window, after the last part of that; see `score_corpus`.
        """
        for d, prompt in enumerate(self.prompts):
            yield tuple(map(int, prompt)), self.tokens[self.offsets[d] : self.offsets[d + 1]]

    def chunks(self, size: int = _CHUNK) -> Iterator[np.ndarray]:
        """Rows of `log_probs` in order, `size` at a time, as float64 in memory."""
        for start in range(0, self.n, size):
            yield np.asarray(self.log_probs[start : start + size], dtype=np.float64)

    def subset(self, documents: Sequence[int] | np.ndarray) -> CorpusScores:
        """The scores of some documents, in the given order, copied into memory."""
        chosen = np.asarray(documents)
        if chosen.dtype == bool:
            chosen = np.flatnonzero(chosen)
        if len(chosen) and not (np.issubdtype(chosen.dtype, np.integer) and 0 <= chosen.min() <= chosen.max()):
            raise ValueError("documents must be numbers of documents, or a mask over them")
        if len(chosen) and chosen.max() >= self.n_documents:
            raise ValueError(f"documents has {int(chosen.max())}, but there are only {self.n_documents}")
        chosen = chosen.astype(np.int64)
        spans = [np.arange(self.offsets[d], self.offsets[d + 1]) for d in chosen]
        rows = np.concatenate([*spans, np.empty(0, dtype=np.int64)]).astype(np.int64)
        return CorpusScores(
            log_probs=np.asarray(self.log_probs[rows]),
            tokens=np.asarray(self.tokens[rows]),
            bytes=np.asarray(self.bytes[rows]),
            lengths=self.lengths[chosen],
            prompts=self.prompts[chosen],
            domains=tuple(self.domains[d] for d in chosen),
            settings=self.settings,
        )

    def save(self, folder: str | Path) -> None:
        """Write to a new folder, in the form that `load` reads and ``score_corpus(out=...)`` writes."""
        writer = ScoreWriter(Path(folder), self.settings)
        if writer.n_documents:
            raise ValueError(f"{folder} holds scores already; choose another folder")
        writer.add(
            self.log_probs,
            tokens=self.tokens,
            n_bytes=self.bytes,
            lengths=self.lengths,
            prompts=self.prompts,
            domains=self.domains,
            digest="",
        )
        writer.finish(self.n_documents)

    @classmethod
    def load(cls, folder: str | Path) -> CorpusScores:
        """Scores in a folder, as memory maps. ValueError if it holds none, or unfinished ones."""
        folder = Path(folder)
        index = _read_index(folder)
        if index is None:
            raise ValueError(f"{folder} holds no scores of a corpus; score_corpus(out=...) writes them")
        if not index["complete"]:
            raise ValueError(
                f"{folder} holds the unfinished scores of {index['documents']} documents; run score_corpus with the "
                "same arguments again to finish them"
            )
        return _scores({name: np.load(folder / f"{name}.npy", mmap_mode="r") for name in _FILES}, index)


_FILES = ("log_probs", "tokens", "bytes", "documents")


class ScoreWriter:
    """Scores that grow batch by batch.

    In a folder each batch is appended to the arrays first and named in ``index.json`` last, so what the index does not
    name is half-written and is cut off when the run goes on.
    """

    def __init__(self, folder: Path | None, settings: dict[str, Any]) -> None:
        self.folder, self.settings = folder, settings
        self._index: dict[str, Any] = {
            "schema": SCHEMA, "settings": settings, "complete": False, "documents": 0, "tokens": 0, "domains": [],
            "digests": [], "arrays": {},
        }  # fmt: skip
        self._parts: dict[str, list[np.ndarray]] = {name: [] for name in _FILES}
        if folder is not None:
            found = _read_index(folder)
            if found is not None and found["settings"] != settings:
                changed = [name for name in settings if settings[name] != found["settings"].get(name)]
                raise ValueError(
                    f"{folder} holds scores made with another {', '.join(changed)}; choose another folder, or delete it"
                )
            self._index = found or self._index

    @property
    def n_tokens(self) -> int:
        """Scored tokens so far."""
        return int(self._index["tokens"])

    @property
    def n_documents(self) -> int:
        """Documents so far."""
        return int(self._index["documents"])

    def holds(self, documents: int, digest: str) -> bool:
        """Whether the folder has the first `documents` documents; ValueError if it has other ones."""
        if documents > self.n_documents:
            if self._index["complete"]:
                raise ValueError(f"{self.folder} holds finished scores of fewer documents; choose another folder")
            return False
        if [documents, digest] not in self._index["digests"]:
            raise ValueError(f"{self.folder} holds the scores of other documents; choose another folder, or delete it")
        return True

    def require_same(self, log_probs: np.ndarray) -> None:
        """ValueError unless the first scores in the folder are these, up to rounding."""
        assert self.folder is not None
        stored = self._mapped("log_probs")[: len(log_probs)]
        if not np.allclose(stored, log_probs, rtol=1e-3, atol=_SAME):
            raise ValueError(f"{self.folder} holds the scores of other models; choose another folder, or delete it")

    def add(
        self,
        log_probs: np.ndarray,
        *,
        tokens: np.ndarray,
        n_bytes: np.ndarray,
        lengths: Sequence[int] | np.ndarray,
        prompts: Sequence[Sequence[int]] | np.ndarray,
        domains: Sequence[str],
        digest: str,
    ) -> None:
        """Append whole documents."""
        names = self._index["domains"]
        names += [name for name in dict.fromkeys(domains) if name not in names]
        heads = np.asarray(prompts, dtype=np.int64).reshape(len(domains), -1)
        rows = {
            "log_probs": log_probs,
            "tokens": np.asarray(tokens, dtype=np.int32),
            "bytes": np.asarray(n_bytes, dtype=np.int32),
            "documents": np.column_stack([lengths, [names.index(name) for name in domains], heads]).astype(np.int64),
        }
        for name, array in rows.items():
            if len(array):
                self._append(name, array)
        self._index["tokens"] += len(log_probs)
        self._index["documents"] += len(domains)
        self._index["digests"].append([self._index["documents"], digest])
        self._write_index()

    def finish(self, documents: int) -> CorpusScores:
        """The scores of all `documents`, read back from the folder if there is one."""
        if documents != self.n_documents:
            raise ValueError(
                f"{self.folder} holds the scores of {self.n_documents} documents, these are {documents}; choose "
                "another folder, or delete it"
            )
        if not self.n_tokens:
            raise ValueError("no token was scored: every document has one token, which is the context of a next one")
        if self.folder is None:
            arrays = {name: np.concatenate(parts) for name, parts in self._parts.items()}
            return _scores(arrays, self._index)
        for name in _FILES:
            with self._path(name).open("r+b") as file:
                file.truncate(self._stop(name))
                file.write(_header(*self._layout(name)))
        self._index["complete"] = True
        self._write_index()
        return CorpusScores.load(self.folder)

    def _append(self, name: str, array: np.ndarray) -> None:
        # The first rows decide the type; a batch of another precision must not change it half-way.
        known = self._index["arrays"].setdefault(name, {"dtype": array.dtype.str, "shape": list(array.shape[1:])})
        array = np.ascontiguousarray(array, dtype=known["dtype"])
        if self.folder is None:
            self._parts[name].append(array)
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        path = self._path(name)
        with path.open("r+b" if path.exists() and self._rows(name) else "w+b") as file:
            if self._rows(name):
                file.truncate(self._stop(name))
                file.seek(0, 2)
            else:
                file.write(_header(array.dtype, (0, *array.shape[1:])))
            file.write(array.tobytes())

    def _path(self, name: str) -> Path:
        assert self.folder is not None
        return self.folder / f"{name}.npy"

    def _rows(self, name: str) -> int:
        return self.n_documents if name == "documents" else self.n_tokens

    def _layout(self, name: str) -> tuple[np.dtype[Any], tuple[int, ...]]:
        known = self._index["arrays"][name]
        return np.dtype(known["dtype"]), (self._rows(name), *known["shape"])

    def _stop(self, name: str) -> int:
        dtype, shape = self._layout(name)
        return _HEADER + dtype.itemsize * math.prod(shape)

    def _mapped(self, name: str) -> np.ndarray:
        dtype, shape = self._layout(name)
        return np.memmap(self._path(name), dtype=dtype, mode="r", offset=_HEADER, shape=shape)

    def _write_index(self) -> None:
        if self.folder is not None:
            write_atomically(self.folder / "index.json", json.dumps(self._index) + "\n")


def _scores(arrays: Mapping[str, np.ndarray], index: Mapping[str, Any]) -> CorpusScores:
    documents, names = np.asarray(arrays["documents"]), index["domains"]
    return CorpusScores(
        log_probs=arrays["log_probs"],
        tokens=arrays["tokens"],
        bytes=arrays["bytes"],
        lengths=documents[:, 0],
        prompts=documents[:, 2:],
        domains=tuple(names[i] for i in documents[:, 1]),
        settings=index["settings"],
    )


def _header(dtype: np.dtype[Any], shape: tuple[int, ...]) -> bytes:
    """The header of a .npy file (format 1.0), always of one length, so that the shape can be filled in last."""
    text = f"{{'descr': '{dtype.str}', 'fortran_order': False, 'shape': {shape}, }}"
    return b"\x93NUMPY\x01\x00" + (_HEADER - 10).to_bytes(2, "little") + text.ljust(_HEADER - 11).encode() + b"\n"


def _read_index(folder: Path) -> dict[str, Any] | None:
    try:
        index: dict[str, Any] = json.loads((folder / "index.json").read_text(encoding="utf-8"))
        if index["schema"] != SCHEMA:
            raise ValueError(f"schema is {index['schema']}, this version reads {SCHEMA}")
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{folder / 'index.json'} is not an index of scores: {error}; delete the folder") from error
    return index
