"""Where a command's prompts come from: texts, a file, or a dataset of the Hugging Face hub."""

from __future__ import annotations

import importlib
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

Rows = Iterator[Mapping[str, Any]]

_FIELD = re.compile(r"\{(\w+)\}")
_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+(:[\w.-]+){0,2}")
_ESCAPES = {r"\n": "\n", r"\t": "\t", r"\\": "\\"}


def read_prompts(source: str, *, field: str | None = None, template: str | None = None, count: int) -> tuple[str, ...]:
    """The first `count` prompts of `source`, fewer if it has fewer.

    Parameters
    ----------
    source
        A file, .jsonl, .txt (one prompt a line, empty ones left out) or .parquet (needs pyarrow), or a dataset of the
        hub, ``org/name[:config][:split]`` (needs datasets); the split is train unless another one is named.
    field
        The field of a row that is the prompt; a line of a .txt file is the field ``text``.
    template
        A prompt with ``{field}`` in it instead, and ``\\n`` for the end of a line.

    Raises
    ------
    ValueError, OSError
        With the remedy, in one line.
    """
    rows = _rows(source, field)
    return _prompts(f"--prompts {source}", rows, field, template, count)


def filled(texts: Sequence[str], template: str | None) -> tuple[str, ...]:
    """Literal texts, each in the template as its field ``text``; ValueError where one is empty."""
    return _prompts("--prompt", iter([{"text": text} for text in texts]), None, template, len(texts))


def _prompts(option: str, rows: Rows, field: str | None, template: str | None, count: int) -> tuple[str, ...]:
    found = []
    for number, row in enumerate(islice(rows, count), start=1):
        prompt = _filled(option, row, template) if template is not None else _chosen(option, row, field)
        if not prompt:
            raise ValueError(f"{option}: prompt {number} is empty; a model needs something to continue")
        found.append(prompt)
    if not found:
        raise ValueError(f"{option} holds no prompt")
    return tuple(found)


def _chosen(option: str, row: Mapping[str, Any], field: str | None) -> str:
    texts = {name: value for name, value in row.items() if isinstance(value, str)}
    if field is None and len(texts) == 1:
        return next(iter(texts.values()))
    if field is None:
        raise ValueError(f"{option}: {_fields(texts)}; name one with --field, or give --template")
    if field not in texts:
        raise ValueError(f"{option}: no text in the field {field!r} that --field names; {_fields(texts)}")
    return texts[field]


def _filled(option: str, row: Mapping[str, Any], template: str) -> str:
    def value(match: re.Match[str]) -> str:
        if match[1] not in row:
            raise ValueError(f"{option}: --template asks for {{{match[1]}}}, but {_fields(row)}")
        return str(row[match[1]])

    # A shell leaves \n as two characters; what a field holds is text already.
    pieces = re.split(r"(\{\w+\})", template)
    return "".join(
        _FIELD.sub(value, piece) if place % 2 else re.sub(r"\\[nt\\]", lambda found: _ESCAPES[found[0]], piece)
        for place, piece in enumerate(pieces)
    )


def _fields(row: Mapping[str, Any]) -> str:
    return f"a row has the fields {', '.join(map(str, row))}" if row else "a row has no field with text"


def _rows(source: str, field: str | None) -> Rows:
    path, option = Path(source), f"--prompts {source}"
    if not path.exists() and path.suffix not in (".jsonl", ".txt", ".parquet") and _HUB_ID.fullmatch(source):
        return _hub(source, option)
    readers = {".jsonl": _jsonl, ".txt": _lines, ".parquet": _parquet}
    if path.suffix not in readers:
        raise ValueError(
            f"{option}: give a .jsonl, .txt or .parquet file, or a dataset of the hub as org/name[:config][:split]"
        )
    path.open("rb").close()
    return readers[path.suffix](path, option)


def _lines(path: Path, option: str) -> Rows:
    for _, line in _text_lines(path, option):
        yield {"text": line}


def _jsonl(path: Path, option: str) -> Rows:
    for number, line in _text_lines(path, option):
        try:
            row = json.loads(line)
        except ValueError as error:
            raise ValueError(f"{option}: line {number} is no JSON ({error})") from error
        if not isinstance(row, (dict, str)):
            raise ValueError(f"{option}: line {number} is neither an object nor a text")
        yield row if isinstance(row, dict) else {"text": row}


def _text_lines(path: Path, option: str) -> Iterator[tuple[int, str]]:
    with path.open(encoding="utf-8") as file:
        try:
            for number, line in enumerate(file, start=1):
                if line.strip():
                    yield number, line.rstrip("\n")
        except UnicodeDecodeError as error:
            raise ValueError(f"{option} is not UTF-8 text: {error.reason} at byte {error.start}") from error


def _parquet(path: Path, option: str) -> Rows:
    parquet = _optional("pyarrow.parquet", f"{option}: reading .parquet needs pyarrow; pip install pyarrow, or convert")
    try:
        table = parquet.ParquetFile(path)
        for batch in table.iter_batches(batch_size=256):
            yield from batch.to_pylist()
    except (ValueError, OSError) as error:  # pyarrow's errors are these
        raise ValueError(f"{option}: {str(error).splitlines()[0]}") from error


def _hub(source: str, option: str) -> Rows:
    datasets = _optional(
        "datasets", f"{option}: no such file, and a dataset of the hub needs the package datasets: pip install datasets"
    )
    name, config, split = _hub_parts(source)
    try:
        yield from datasets.load_dataset(name, config, split=split)
    except Exception as error:  # of many libraries: network, files, formats
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise ValueError(f"{option}: the dataset could not be read: {reason}") from error


def _hub_parts(source: str) -> tuple[str, str | None, str]:
    """Dataset, configuration and split of ``org/name[:config][:split]``; one part alone is the split.

    >>> _hub_parts("org/name"), _hub_parts("org/name:test"), _hub_parts("org/name:main:test")
    (('org/name', None, 'train'), ('org/name', None, 'test'), ('org/name', 'main', 'test'))
    """
    name, *rest = source.split(":")
    return name, rest[0] if len(rest) == 2 else None, rest[-1] if rest else "train"


def _optional(module: str, remedy: str) -> Any:
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ValueError(remedy) from error
