"""Tokenizers by name, without their models' weights: what an audit opens.

A name is a catalog model, one of the paper's vocabularies (`catalog.VOCABULARIES`), a vocabulary file, or a folder
or hub id that transformers finds a tokenizer in. Files give a table without a reading rule.
"""

from __future__ import annotations

import difflib
import hashlib
import json
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from me_stats.models import catalog
from me_stats.tokenizer_bytes import read_tokenizer
from me_stats.vocabulary import Vocabulary
from me_stats.vocabulary_files import read_file
from me_stats.vocabulary_map import TokenBytes
from me_stats.vocabulary_names import is_byte_level, spellings_of

_FILES = ("*.tiktoken", "*.model or *.model.v1 (SentencePiece)", "*.gguf", "tokenizer.json")


class RefusedTokenizer(ValueError):
    """A tokenizer that is there but cannot be exchanged byte for byte, or not be read; the message is the reason."""


@dataclass(frozen=True)
class OpenTokenizer:
    """A tokenizer ready to be audited.

    Attributes
    ----------
    name
        For tables: the catalog name or hub id, or the last part of a path.
    table
        Its `TokenBytes`, without a reading rule where it comes from a vocabulary file.
    spellings
        (V,) token strings as they stand in the file; None where it has none.
    vocabulary
        Vocabulary with the tokenizer, None for a file.
    normaliser
        What the tokenizer does to a text before it splits it, ``"none"`` for nothing, ``"unknown"`` for a file.
    padded
        Rows of the network's logits past the tokenizer's last id; 0 where there is no config.
    source
        Where it comes from: package, file or name, with its sha256 where there is one. No path.
    """

    name: str
    table: TokenBytes
    spellings: tuple[str | None, ...]
    vocabulary: Vocabulary | None = None
    normaliser: str = "unknown"
    padded: int = 0
    source: dict[str, str] = field(default_factory=dict)

    @property
    def byte_level(self) -> bool:
        """Spelled in the byte alphabet, or as text with byte fallback."""
        return is_byte_level(self.table, self.spellings)

    def encode(self, text: str) -> list[int]:
        """Ids of a text; ValueError for a vocabulary file."""
        if self.vocabulary is None:
            raise ValueError(f"{self.name} is a vocabulary file and reads no text")
        return list(self.vocabulary.encode(text))


def label_of(name: str | Path) -> str:
    """The name to show: a path's last part, any other name as it is.

    >>> label_of("Qwen/Qwen2.5-3B-Instruct"), label_of("models/vocab.gguf"), label_of("qwen2.5")
    ('Qwen/Qwen2.5-3B-Instruct', 'vocab.gguf', 'qwen2.5')
    """
    text = str(name)
    if text in catalog.CATALOG or text in catalog.VOCABULARIES:
        return text
    path = Path(text).expanduser()
    return path.resolve().name if isinstance(name, Path) or _kind(path) or path.exists() else text


def is_model(name: str | Path) -> bool:
    """Whether `name` stands for a model with weights rather than for a vocabulary alone.

    >>> is_model("bundled:prose"), is_model("qwen2.5"), is_model("vocab.gguf")
    (True, False, False)
    """
    text, path = str(name), Path(name).expanduser()
    if text in catalog.CATALOG:
        return True
    if text in catalog.VOCABULARIES or _kind(path):
        return False
    return not path.is_dir() or any(any(path.glob(ending)) for ending in ("*.safetensors", "*.bin"))


def check_name(name: str | Path) -> None:
    """Raise where nothing of this name can be opened: OSError for an absent file, CatalogError for a slip."""
    text, path = str(name), Path(name).expanduser()
    if text in catalog.CATALOG or text in catalog.VOCABULARIES:
        return
    if _kind(path) and not path.is_dir():
        path.open("rb").close()
    elif path.is_file():
        raise ValueError(f"{name} is no vocabulary file that is known: give {', '.join(_FILES)}")
    elif close := [] if "/" in text else difflib.get_close_matches(text, catalog.VOCABULARIES, n=1, cutoff=0.8):
        raise catalog.CatalogError(f"no tokenizer {text!r}: did you mean {close[0]!r}?")
    else:
        catalog.resolve(text)


def open_tokenizer(
    name: str | Path, *, drop_normalizer: bool = False, say: Callable[[str], None] = lambda line: None
) -> OpenTokenizer:
    """Open a tokenizer by name, path or hub id; the files of catalog names are pulled if they are not here.

    Parameters
    ----------
    name
        See the module's docstring.
    drop_normalizer
        As in `read_tokenizer`.
    say
        Called with a line for each phase of a download.

    Raises
    ------
    RefusedTokenizer
        With the reason, for a tokenizer that loses text or a file that cannot be read.
    ValueError, OSError, CatalogError
        Nothing of that name is there.

    Examples
    --------
    >>> opened = open_tokenizer("bundled:prose")
    >>> opened.table.size, opened.byte_level, opened.normaliser
    (256, True, 'none')
    """
    check_name(name)
    text = str(name)
    if text in catalog.VOCABULARIES:
        entry = catalog.VOCABULARIES[text]
        file = catalog.pull_vocabulary(entry, progress=say)
        size = int(str(entry.facts["vocab_size"]))
        opened = _from_file(text, file, eos=entry.eos_token_ids, size=size)
        # A file of bytes alone has no spelling for its ends.
        ends = dict(zip(entry.eos_token_ids, entry.facts.get("eos_tokens", ()), strict=False))  # type: ignore[call-overload]
        spellings = tuple(ends.get(token, spelling) for token, spelling in enumerate(opened.spellings))
        return replace(opened, spellings=spellings, source={"package": entry.wheels[0].requirement, **opened.source})
    if _kind(Path(text)) not in ("", "json"):
        return _from_file(label_of(name), Path(text).expanduser())
    if text in catalog.CATALOG and not catalog.pulled(text):
        catalog.pull(text, progress=say)
    return _from_pretrained(name, drop_normalizer)


def from_tokenizer(
    name: str,
    tokenizer: Any,
    *,
    size: int | None = None,
    eos: Sequence[int] = (),
    drop_normalizer: bool = False,
    source: dict[str, str] | None = None,
) -> OpenTokenizer:
    """A tokenizer that is loaded already; `size` is the width of its model's law, default the tokenizer's own.

    Raises RefusedTokenizer with the reason.
    """
    known = len(tokenizer) if size is None else size
    inside = tuple(token for token in eos if 0 <= token < known)
    vocabulary = Vocabulary(known, eos=inside, tokenizer=tokenizer)
    try:
        table = read_tokenizer(vocabulary, drop_normalizer=drop_normalizer)
    except ValueError as error:
        raise RefusedTokenizer(str(error)) from error
    found = source or {"tokenizer": table.fingerprint}
    return OpenTokenizer(name, table, spellings_of(tokenizer, known), vocabulary, _normaliser(tokenizer), 0, found)


def _from_pretrained(name: str | Path, drop_normalizer: bool) -> OpenTokenizer:
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    path = Path(name).expanduser()
    width: int | None = None
    folder, eos = "", None
    try:
        if _kind(path) == "json":
            tokenizer: Any = PreTrainedTokenizerFast(tokenizer_file=str(path), clean_up_tokenization_spaces=False)
        else:
            folder = catalog.resolve(name)
            tokenizer = AutoTokenizer.from_pretrained(folder)
    except catalog.CatalogError:
        raise
    except Exception as error:  # a broken file surfaces as whatever its parser raises
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ValueError(
            f"cannot load the tokenizer of {label_of(name)}: {reason}; give a catalog name, a hub id that can be "
            "reached, a folder with tokenizer.json, or a vocabulary file"
        ) from error
    if _kind(path) != "json":
        width, eos = _declared(folder)
    if eos is None:
        eos = tokenizer.eos_token_id
    ends = [eos] if isinstance(eos, int) else list(eos or [])
    size = len(tokenizer) if width is None else min(width, len(tokenizer))
    source = {"name": label_of(name)}
    own = path if path.is_file() else Path(folder) / "tokenizer.json"
    if own.is_file():
        source["sha256"] = _sha256(own)
    opened = from_tokenizer(
        label_of(name), tokenizer, size=size, eos=ends, drop_normalizer=drop_normalizer, source=source
    )
    return replace(opened, padded=max(0, (width or size) - size))


def _declared(folder: str) -> tuple[int | None, Any]:
    """Width of the model's law and the ids at which it ends; None for each where a folder holds a tokenizer alone."""
    from transformers import AutoConfig, GenerationConfig

    width, eos = None, None
    with suppress(OSError, ValueError):
        config = AutoConfig.from_pretrained(folder).get_text_config()
        width, eos = config.vocab_size, getattr(config, "eos_token_id", None)
    with suppress(OSError, ValueError):
        declared = GenerationConfig.from_pretrained(folder).eos_token_id
        eos = eos if declared is None else declared
    return width, eos


def _from_file(name: str, path: Path, *, eos: Sequence[int] | None = None, size: int | None = None) -> OpenTokenizer:
    try:
        table, spellings = read_file(path, _kind(path), size=size, eos=eos)
    except (ValueError, ImportError, RuntimeError) as error:  # sentencepiece raises RuntimeError for other files
        raise RefusedTokenizer(" ".join(str(error).split())) from error
    return OpenTokenizer(name, table, spellings, source={"file": path.name, "sha256": _sha256(path)})


def _kind(path: Path) -> str:
    """Which reader a file's name asks for, "" for none."""
    name = path.name.lower()
    if name.endswith((".tiktoken", ".gguf")):
        return name.rsplit(".", 1)[1]
    if name.endswith(".model") or ".model.v" in name:
        return "sentencepiece"
    return "json" if name.endswith(".json") else ""


def _normaliser(tokenizer: Any) -> str:
    backend = getattr(tokenizer, "backend_tokenizer", tokenizer)
    step = json.loads(backend.to_str()).get("normalizer")
    if step is None:
        return "none"
    return ", ".join(inner["type"] for inner in step.get("normalizers", [step])) or "none"


def _sha256(path: Path) -> str:
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
