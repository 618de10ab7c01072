"""A text scored by every component: K floats a token, the common currency of weights, routers and sweeps.

`read_documents` streams documents from files, `score_corpus` teacher-forces each component along them, and
`CorpusScores` holds the log-probabilities with the tokens, in memory or in a folder of .npy files that a killed run
continues.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch

from me_stats.corpus_store import CorpusScores, ScoreWriter
from me_stats.models.base import path_log_probs, require_language_model
from me_stats.models.conditioned import Conditioned
from me_stats.models.windowed import context_length
from me_stats.vocabulary import Prompt, Vocabulary
from me_stats.vocabulary_map import require_one_spelling

__all__ = ["CorpusScores", "Document", "read_documents", "score_corpus", "token_bytes"]

Split = Literal["blank lines", "lines", "file"]


@dataclass(frozen=True)
class Document:
    """One text, or its token ids, under the name of its domain.

    >>> Document("prose", "The names of the parameters.").domain
    'prose'
    """

    domain: str
    content: Prompt


def read_documents(
    paths: str | Path | Sequence[str | Path], *, split: Split = "blank lines", domain: str | None = None
) -> Iterator[Document]:
    """Documents of text files, one after the other; no file is held in memory as a whole.

    Parameters
    ----------
    paths
        UTF-8 text files. In a ``.jsonl`` file each line is a document, an object with a ``text`` field.
    split
        What ends a document: ``"blank lines"`` (paragraphs), ``"lines"``, or the end of the ``"file"``. Line ends are
        read as one newline character; blank documents are left out.
    domain
        Name for all documents; by default each file's name without its ending.

    Raises
    ------
    FileNotFoundError, ValueError
        A file is missing (at once, before the first document), not UTF-8, or not JSON lines with ``text``.
    """
    if split not in ("blank lines", "lines", "file"):
        raise ValueError(f"split must be 'blank lines', 'lines' or 'file', got {split!r}")
    files = [Path(path) for path in ([paths] if isinstance(paths, (str, Path)) else paths)]
    for path in files:
        path.open("rb").close()
    return (Document(domain or path.stem, text) for path in files for text in _texts(path, split))


def _texts(path: Path, split: Split) -> Iterator[str]:
    jsonl = path.suffix == ".jsonl"
    number, held = 0, []
    try:
        with path.open(encoding="utf-8-sig") as file:
            for number, line in enumerate(file, 1):
                if jsonl:
                    held = [_json_text(path, number, line)] if line.strip() else []
                elif split == "file" or line.strip():
                    held.append(line)
                if held and (jsonl or split == "lines" or (split == "blank lines" and not line.strip())):
                    yield from _document(held, jsonl or split == "file")
                    held = []
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{path} is not UTF-8 (near line {number + 1}: {error.reason}); convert it, for example with "
            f"'iconv -f LATIN1 -t UTF-8'"
        ) from error
    yield from _document(held, jsonl or split == "file")


def _document(lines: list[str], whole: bool) -> Iterator[str]:
    text = "".join(lines)
    if text.strip():
        yield text if whole else text.removesuffix("\n")


def _json_text(path: Path, number: int, line: str) -> str:
    try:
        text = json.loads(line)["text"]
    except (ValueError, KeyError, TypeError):
        text = None
    if not isinstance(text, str):
        raise ValueError(f'{path}, line {number}: expected a JSON object with a "text" string')
    return text


class _Span(NamedTuple):
    """One window: tokens begin..end of a document, of which first..end are scored."""

    document: int
    begin: int
    first: int
    end: int


def score_corpus(
    models: Sequence[Any],
    documents: Iterable[Document],
    *,
    prompt: Sequence[int] | None = None,
    window: int | None = None,
    stride: int | None = None,
    batch_tokens: int = 4096,
    out: str | Path | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> CorpusScores:
    """Natural log P_i(x_t | document before t) of every token of every document under each of K components.

    *First token.* Each document is read after `prompt`. By default that is the tokenizer's begin- or else
    end-of-sequence id, or where the tokenizer names neither, the vocabulary's first end-of-sequence id. Without any
    (toys), a document's first token is context only and not scored. Components that are all `Conditioned` bring their
    own context, so nothing is put before the document.

    *Long documents.* A component sees at most `window` tokens, the scored one included. Window j starts ``j·stride``
    tokens into the document, after `prompt`, and scores the tokens that no earlier window reached: each token once,
    after at least ``window - stride`` tokens of context (prompt included), or after all there is.

    Parameters
    ----------
    models
        K components over one vocabulary.
    documents
        Any iterable; a stream is read once and never held as a whole.
    prompt
        Token ids that stand before every document; ``()`` scores the first token after the empty prefix.
    window, stride
        By default the smallest context window of the components, at most `batch_tokens`; and half of it.
    batch_tokens
        Tokens, padding included, in one forward. It bounds memory: a forward makes ``batch_tokens · V`` logits.
    out
        A folder for the scores as memory-mapped files. A folder with unfinished scores of the same call is continued
        after the last batch of documents that it holds, to the same bits as an unbroken run; with finished ones,
        they are returned. The first batch is scored again to see that the models are the same.
    progress
        Called with the documents and scored tokens done so far.

    Raises
    ------
    ValueError
        Different vocabularies, also where they are mixed over byte strings; no or empty documents, a window that does
        not fit, an `out` of another call.

    Examples
    --------
    >>> from me_stats.models.toy import MarkovModel
    >>> chain = MarkovModel([0.5, 0.5], [[0.9, 0.1], [0.2, 0.8]])
    >>> score_corpus([chain], [Document("toy", [0, 1, 1])]).log_probs.T
    array([[-2.30258509, -0.22314355]])
    """
    vocabulary = _one_vocabulary(models)
    require_one_spelling(vocabulary)
    before, context_only = _start(models, vocabulary, prompt)
    limits = [limit for limit in map(context_length, models) if limit is not None]
    window = min([*limits, batch_tokens]) if window is None else window
    if window > min([window, *limits]):
        raise ValueError(f"window is {window} tokens, but a component sees only {min(limits)}; lower window")
    room = window - len(before)  # for tokens of the document
    stride = max(1, room // 2) if stride is None else stride
    if not (context_only < room and 1 <= stride <= room and stride < window):
        raise ValueError(
            f"window ({window} tokens, {len(before)} of them the prompt) and stride ({stride}) must satisfy "
            "1 ≤ stride < window and stride ≤ window - prompt"
        )
    table = token_bytes(vocabulary)
    settings = {
        "components": len(models), "prompt": list(before), "context_only": context_only, "window": window,
        "stride": stride, "batch_tokens": batch_tokens, "vocabulary": [vocabulary.size, vocabulary.fingerprint],
    }  # fmt: skip
    writer = ScoreWriter(None if out is None else Path(out), settings)
    seen, skip, digest = 0, int(context_only), hashlib.sha256()
    for batch in _batches(documents, vocabulary, skip, room, stride, batch_tokens):
        seen += len(batch.ids)
        for document, ids in zip(batch.documents, batch.ids, strict=True):
            digest.update(json.dumps([document.domain, len(ids)]).encode() + np.asarray(ids, np.int64).tobytes())
        known = writer.holds(seen, digest.hexdigest())
        if known and seen > len(batch.ids):
            continue
        log_probs = _score(models, batch, before, skip, batch_tokens)
        if known:
            writer.require_same(log_probs)
        else:
            writer.add(
                log_probs,
                tokens=np.concatenate([ids[skip:] for ids in batch.ids]),
                n_bytes=np.concatenate(
                    [_bytes(d.content, ids, table)[skip:] for d, ids in zip(batch.documents, batch.ids, strict=True)]
                ),
                lengths=[len(ids) - skip for ids in batch.ids],
                prompts=[ids[:1].tolist() if context_only else before for ids in batch.ids],
                domains=[document.domain for document in batch.documents],
                digest=digest.hexdigest(),
            )
        if progress is not None:
            progress(seen, writer.n_tokens)
    if not seen:
        raise ValueError("documents is empty; there is nothing to score")
    return writer.finish(seen)


def _one_vocabulary(models: Sequence[Any]) -> Vocabulary:
    if not isinstance(models, Sequence) or not models:
        raise TypeError("models must be a sequence of at least one LanguageModel")
    for i, model in enumerate(models):
        require_language_model(model, name=f"models[{i}]")
        models[0].vocabulary.require_equal(model.vocabulary, name="models[0]", other_name=f"models[{i}]")
    vocabulary: Vocabulary = models[0].vocabulary
    return vocabulary


def _start(models: Sequence[Any], vocabulary: Vocabulary, prompt: Sequence[int] | None) -> tuple[tuple[int, ...], bool]:
    """Ids before each document, and whether its first token only serves as context."""
    if prompt is not None:
        return vocabulary.encode(prompt), False
    if all(isinstance(model, Conditioned) and model.context for model in models):
        return (), False
    tokenizer = vocabulary.tokenizer
    named = [getattr(tokenizer, name, None) for name in ("bos_token_id", "eos_token_id")]
    known = [token for token in (*named, *(vocabulary.eos if tokenizer is not None else ())) if token is not None]
    return ((int(known[0]),), False) if known else ((), True)


class _Batch(NamedTuple):
    documents: list[Document]
    ids: list[np.ndarray]
    spans: list[_Span]


def _batches(
    documents: Iterable[Document], vocabulary: Vocabulary, skip: int, room: int, stride: int, batch_tokens: int
) -> Iterator[_Batch]:
    """Consecutive documents of about four forwards; where they end depends on the documents alone."""
    batch, size = _Batch([], [], []), 0
    for number, document in enumerate(documents):
        ids = np.array(vocabulary.encode(document.content), dtype=np.int32)
        if not len(ids):
            raise ValueError(f"document {number} ({document.domain}) is empty; leave it out")
        if batch.ids and size + len(ids) > 4 * batch_tokens:
            yield batch
            batch, size = _Batch([], [], []), 0
        begin, first = 0, skip
        while first < len(ids):
            end = min(len(ids), begin + room)
            batch.spans.append(_Span(len(batch.ids), begin, first, end))
            begin, first = begin + stride, end
        batch.documents.append(document)
        batch.ids.append(ids)
        size += len(ids)
    if batch.ids:
        yield batch


def _score(models: Sequence[Any], batch: _Batch, before: tuple[int, ...], skip: int, batch_tokens: int) -> np.ndarray:
    """Log-probabilities (n, K) of the scored tokens of a batch, float64 if any component's laws are."""
    ids = batch.ids
    starts = np.concatenate([[0], np.cumsum([len(row) - skip for row in ids])])
    columns = []
    for model in models:
        column = np.empty(0, dtype=np.float32)
        for group in _forwards(batch.spans, len(before), batch_tokens):
            heads = [(*before, *ids[s.document][s.begin : s.first].tolist()) for s in group]
            tails = [ids[s.document][s.first : s.end].tolist() for s in group]
            for span, tail, law in zip(group, tails, path_log_probs(model, heads, tails), strict=True):
                picked = law.gather(1, torch.tensor(tail, device=law.device)[:, None])[:, 0].cpu()
                values = (picked if picked.dtype == torch.float64 else picked.float()).numpy()
                if not len(column):
                    column = np.empty(int(starts[-1]), dtype=values.dtype)
                at = int(starts[span.document]) - skip
                column[at + span.first : at + span.end] = values
        columns.append(column)
    return np.stack(columns, axis=1)


def _forwards(spans: list[_Span], before: int, batch_tokens: int) -> Iterator[list[_Span]]:
    """Spans of similar length together: little padding, and no more tokens than a forward may have."""
    group: list[_Span] = []
    for span in sorted(spans, key=lambda s: s.begin - s.end):
        longest = before + group[0].end - group[0].begin if group else 0
        if group and (len(group) + 1) * longest > batch_tokens:
            yield group
            group = []
        group.append(span)
    if group:
        yield group


def token_bytes(vocabulary: Vocabulary) -> np.ndarray | None:
    """(V,) UTF-8 bytes that each token stands for, or None without a tokenizer.

    Byte-level vocabularies spell each byte as one character; others mark a space with ``▁`` and lone bytes as
    ``<0x0A>``.
    """
    tokenizer = vocabulary.tokenizer
    if tokenizer is None or not hasattr(tokenizer, "convert_ids_to_tokens"):
        return None
    names = [str(name) for name in tokenizer.convert_ids_to_tokens(list(range(vocabulary.size)))]
    added = set(getattr(tokenizer, "added_tokens_decoder", ()))
    spaced = any("▁" in name for i, name in enumerate(names) if i not in added)
    return np.array([_piece_bytes(name, spaced, i in added) for i, name in enumerate(names)], dtype=np.int32)


def _piece_bytes(name: str, spaced: bool, added: bool) -> int:
    if spaced and len(name) == 6 and name.startswith("<0x") and name.endswith(">"):
        return 1
    if not (spaced or added) and all(ord(sign) < 0x144 for sign in name):
        return len(name)
    return len((name.replace("▁", " ") if spaced else name).encode())


def _bytes(content: Prompt, ids: np.ndarray, table: np.ndarray | None) -> np.ndarray:
    """Bytes (T,) of a document's tokens, 0 where unknown.

    What a tokenizer changes (a space put in front, a sign it does not know) counts with the first tokens, so that the
    bytes of a text add up.
    """
    if table is None:
        return np.zeros(len(ids), dtype=np.int32)
    sizes = table[ids]
    if isinstance(content, str):
        excess = int(sizes.sum()) - len(content.encode())
        for i in range(len(sizes)):
            taken = min(int(sizes[i]), excess)
            sizes[i] -= taken
            excess -= taken
            if excess <= 0:
                break
    return sizes
