"""What goes wrong when models of different vocabularies exchange tokens, counted on real and on planted tokenizers.

For each tokenizer the ids that a round trip loses, for each pair the strings that they share, and for each model the
probability that hangs on ids which an exchange by names or by decoded text does not carry over. Planted tokenizers with
known faults check the counts; those that cannot be exchanged byte for byte must be refused.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from me_stats.models import TransformersModel
from me_stats.models.base import open_session
from me_stats.models.catalog import cache_folder
from me_stats.record import Record, Recorder
from me_stats.tokenizer_audit import canonical_runs, exchange_text
from me_stats.tokenizer_bytes import SPACE, byte_alphabet
from me_stats.tokenizer_sources import OpenTokenizer, RefusedTokenizer, from_tokenizer, open_tokenizer
from me_stats.tokenizer_survey import Survey
from me_stats.vocabulary_map import ByteStrings
from me_stats.vocabulary_names import exchange_names

NAME, TITLE = "tokenizer_audit", "Tokenizers: what an exchange of tokens between vocabularies loses"

TEXTS = {
    "English": """The ferry left the harbour at six, an hour late, and nobody on deck seemed to mind. "We will be home
by dark," said the captain; he had said so every evening for thirty years. Gulls followed the boat as far as the
lighthouse (the old one, not the new), then turned back. Anna counted them: twelve, then nine, then none. She wrote the
numbers into her notebook, closed it, and asked what was for dinner. Fish, of course - it was always fish!""",
    "maths": """A baker sells 3 loaves in the morning and twice as many in the afternoon. Each loaf costs $2.50.
How much does she earn in a day?
In the afternoon she sells 3 * 2 = 6 loaves, so 3 + 6 = 9 loaves in all.
She earns 9 * 2.50 = $22.50 a day.
Over 5 days this is 5 * 22.50 = $112.50, and 10% of it, $11.25, goes to the mill: she keeps 112.50 - 11.25 = $101.25.
#### 101.25""",
    "code": """def mean(values, default=None):
    \"\"\"The arithmetic mean; `default` for no values.\"\"\"
    total, count = 0.0, 0
    for value in values:
        if value is not None:
            total += value
            count += 1
    if count == 0:
        return default
    return total / count


print(mean([1, 2, 3.5], default=-1))  # 2.1666666666666665
""",
}
PROMPTS = ("Question: how many days are in three weeks?\nAnswer:", "The quick way to sort a list in Python is")


# DeepSeek-7B's vocabulary as llama.cpp ships it for its tests (MIT); no package brings this file alone.
DEEPSEEK = Path("ggml-vocab-deepseek-llm.gguf")


@dataclass(frozen=True)
class Config:
    """`models` have weights, `tokenizers` are vocabularies by name, `files` vocabulary files.

    A file is taken from its path or, by its name, from the folder ``vocabularies`` of the cache; the record says which
    were absent.

    `text` is a UTF-8 file to measure the mass on instead of `TEXTS`, at most `text_bytes` of it. `rows` generations of
    `steps` tokens are written by the exchange of names, to see whether their contexts are canonical; 0 leaves them out.
    `planted` takes the tokenizers that are built here into the comparison too.
    """

    models: tuple[str, ...] = ("smollm2-135m", "gemma3-270m")
    tokenizers: tuple[str, ...] = ("mistral-7b", "qwen2.5")
    files: tuple[Path, ...] = (DEEPSEEK,)
    text: Path | None = None
    text_bytes: int = 20_000
    rows: int = 16
    steps: int = 48
    planted: bool = False
    dtype: str = "float32"
    device: str = "cpu"
    seed: int = 0

    def __post_init__(self) -> None:
        # A record shows the names of files alone, which takes paths.
        object.__setattr__(self, "files", tuple(map(Path, self.files)))
        object.__setattr__(self, "text", None if self.text is None else Path(self.text))


def run(config: Config, progress: Callable[[float, str], None] = lambda fraction, note: None) -> Record:
    """Open everything, count, compare, and read the models along the texts."""
    recorder = Recorder(NAME, TITLE, config)
    texts = _texts(config)
    opened, refused = [], {}
    places = {file: (file, cache_folder() / "vocabularies" / file.name) for file in config.files}
    found = {file: [place for place in both if place.is_file()] for file, both in places.items()}
    there, absent = [both[0] for both in found.values() if both], [file.name for file in found if not found[file]]
    names: list[str | Path] = [*config.models, *config.tokenizers, *there]
    for name in names:
        progress(0.0, f"opening {Path(name).name}")
        try:
            opened.append(open_tokenizer(name))
        except RefusedTokenizer as error:
            refused[Path(name).name] = str(error)
    toys = planted()
    survey = Survey(opened + (toys if config.planted else []), progress=_part(progress, 0.05, 0.4))
    progress(0.4, "the union")
    results = {
        "tokenizers": survey.tokenizer_rows(),
        "refused": refused,
        "absent": absent,
        "pairs": survey.pair_rows(),
        "all": survey.union_row(),
        "texts": {name: len(text.encode()) for name, text in texts.items()},
    }
    mass = []
    contexts: list[dict[str, Any]] = []
    with_weights = [one for one in opened if one.name in config.models]
    loaded = []
    for done, one in enumerate(with_weights):
        progress(0.45 + 0.35 * done / len(with_weights), f"{one.name} along the texts")
        model = TransformersModel(one.name, dtype=config.dtype, device=config.device)  # type: ignore[arg-type]
        recorder.add_model(one.name, model)
        mass += survey.mass_rows(one.name, model, list(texts.values()))
        loaded.append(model)
    if config.rows and len(loaded) > 1:
        progress(0.8, "generations by an exchange of names")
        written = exchange_runs(loaded, with_weights, PROMPTS, rows=config.rows, steps=config.steps, seed=config.seed)
        contexts = [_canonical(one, rows) for one, rows in zip(with_weights, written, strict=True)]
    results |= {"mass": mass, "contexts": contexts}
    _judge(recorder, survey, refused, toys, results)
    return recorder.finish(results)


def _texts(config: Config) -> dict[str, str]:
    if config.text is None:
        return TEXTS
    data = config.text.read_bytes()[: config.text_bytes]
    return {config.text.name: data.decode("utf-8", "ignore")}


def _part(progress: Callable[[float, str], None], low: float, high: float) -> Callable[[float, str], None]:
    return lambda fraction, note: progress(low + (high - low) * fraction, note)


def _canonical(one: OpenTokenizer, rows: list[list[int]]) -> dict[str, Any]:
    """How many contexts are their text's tokenisation; `rate`, departures a token of context, allows for short ones."""
    runs = canonical_runs(one.table, rows)
    lengths = [len(row) if place < 0 else place + 1 for row, place in zip(rows, runs.departures, strict=True)]
    return {
        "model": one.name,
        "runs": runs.runs,
        "canonical": runs.canonical,
        "tokens": sum(map(len, rows)) / len(rows),
        "rate": (runs.runs - runs.canonical) / max(1, sum(lengths)),
    }


def exchange_runs(
    loaded: Sequence[Any], opened: Sequence[OpenTokenizer], prompts: Sequence[str], *, rows: int, steps: int, seed: int
) -> list[list[list[int]]]:
    """Contexts of each model after ME that hands tokens over by name, as published code does, without the prompts.

    Every token, also a model's own, becomes its name, the name becomes text, and every model encodes that text.
    A row stops at an end of sequence. Equal weights.
    """
    rng = np.random.default_rng(seed)
    names = [exchange_names(one.table, one.spellings) for one in opened]
    texts = [prompts[row % len(prompts)] for row in range(rows)]
    sessions = [
        open_session(model, [_prompt(one, text) for text in texts], max_new_tokens=4 * steps)
        for model, one in zip(loaded, opened, strict=True)
    ]
    contexts: list[list[list[int]]] = [[[] for _ in range(rows)] for _ in opened]
    alive = np.ones(rows, dtype=bool)
    for _ in range(steps):
        chosen = rng.integers(len(opened), size=rows)
        for m, session in enumerate(sessions):
            mine = np.flatnonzero(alive & (chosen == m))
            if not len(mine):
                continue
            laws = session.log_probs(mine).double().exp().cpu().numpy()
            for row, law in zip(mine.tolist(), laws, strict=True):
                token = int(np.searchsorted(np.cumsum(law), rng.random() * law.sum(), side="right"))
                token = min(token, len(law) - 1)
                name = names[m][token]
                if opened[m].table.strings[token] is None or name is None:
                    alive[row] = False
                    continue
                for j, one in enumerate(opened):
                    room = 4 * steps - len(contexts[j][row])
                    ids = one.encode(exchange_text(name))[:room]
                    contexts[j][row] += ids
                    for back in ids:
                        sessions[j].append(np.array([row]), torch.tensor([back]))
    return contexts


def _prompt(one: OpenTokenizer, text: str) -> tuple[int, ...]:
    begin = getattr(one.vocabulary.tokenizer, "bos_token_id", None) if one.vocabulary is not None else None
    return (*([] if begin is None else [int(begin)]), *one.encode(text))


# Tokenizers whose faults are known, because they are built in.

_MERGES = [("t", "h"), ("th", "e"), ("Ġ", "the"), ("Ã", "©")]
PADDED, UNREACHED, ABOVE_ASCII = 5, ("unmerged", "Ġnever"), 128


def byte_level(normalizer: Any = None) -> PreTrainedTokenizerFast:
    """Byte-level BPE with two ends, a turn marker that says "end" and two tokens that no merge leads to."""
    pieces = [*byte_alphabet(), *(a + b for a, b in _MERGES), *UNREACHED]
    backend = Tokenizer(models.BPE({piece: n for n, piece in enumerate(pieces)}, _MERGES))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.normalizer = normalizer
    backend.add_special_tokens(["<eos>", "<|endoftext|>", "<|end_of_turn|>", "<bos>"])
    return PreTrainedTokenizerFast(tokenizer_object=backend, clean_up_tokenization_spaces=False)


def with_fallback(*, byte_fallback: bool = True) -> PreTrainedTokenizerFast:
    """SentencePiece's kind: 256 byte tokens, of which those of " ", ".", "=", "t", "h" and "e" are idle, and pieces."""
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{value:02X}>" for value in range(256))]
    pieces += [SPACE, "t", "h", "e", ".", "=", "th", "the", f"{SPACE}the", "é"]
    merges = [("t", "h"), ("th", "e"), (SPACE, "the")]
    ids = {piece: n for n, piece in enumerate(pieces)}
    backend = Tokenizer(models.BPE(ids, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=byte_fallback))
    backend.normalizer = normalizers.Replace(" ", SPACE)
    backend.decoder = decoders.Sequence([decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()])
    backend.add_special_tokens(["<unk>", "<s>", "</s>"])
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, clean_up_tokenization_spaces=False, unk_token="<unk>", bos_token="<s>"
    )


def planted() -> list[OpenTokenizer]:
    """The two sound ones, with padded rows and two ends for the first."""
    first, second = byte_level(), with_fallback()
    ends = [first.convert_tokens_to_ids(name) for name in ("<eos>", "<|endoftext|>")]
    return [
        from_tokenizer("planted byte-level BPE", first, size=len(first) + PADDED, eos=ends),
        from_tokenizer("planted byte fallback", second, eos=[second.convert_tokens_to_ids("</s>")]),
    ]


def broken() -> dict[str, Any]:
    """Tokenizers that must be refused, by what is wrong with them."""
    return {
        "a normaliser that folds characters (NFKC)": byte_level(normalizers.NFKC()),
        "a normaliser that lowers case": byte_level(normalizers.Lowercase()),
        "no byte fallback": with_fallback(byte_fallback=False),
    }


def expected() -> dict[str, dict[str, int]]:
    """What the audit of `planted` has to count."""
    # Halves of characters do not decode; what no merge leads to does not return either.
    bpe = {"same_bytes": 0, "changed": 2, "mis_decoded": ABOVE_ASCII, "lost": ABOVE_ASCII + 2}
    bpe |= {"END": 2, "CONTROL": 2, "UNUSED": PADDED, "end_like": 1}
    # Six pieces of one ASCII byte leave their byte tokens idle; "é" has two bytes and no byte token of its own.
    fallback = {"same_bytes": 12, "changed": 6, "mis_decoded": ABOVE_ASCII, "lost": ABOVE_ASCII + 6}
    fallback |= {"END": 1, "CONTROL": 2, "UNUSED": 0, "end_like": 0}
    return {"planted byte-level BPE": bpe, "planted byte fallback": fallback}


def _judge(
    recorder: Recorder,
    survey: Survey,
    refused: dict[str, str],
    toys: list[OpenTokenizer],
    results: dict[str, Any],
) -> None:
    counted = Survey(toys)
    rows = counted.tokenizer_rows()
    for name, numbers in expected().items():
        row = rows[name]
        found = {**row["counts"], **row["roles"], "end_like": len(row["end_like"])}
        recorder.check(f"{name}: the audit counts what was planted", numbers.items() <= found.items())
    for fault, tokenizer in broken().items():
        try:
            from_tokenizer(fault, tokenizer)
            right = False
        except RefusedTokenizer:
            right = True
        recorder.check(f"a tokenizer with {fault} is refused", right)
    for name, reason in refused.items():
        recorder.check(f"{name} is read ({reason})", False)
    for name, row in {**rows, **results["tokenizers"]}.items():
        if row["unkept"] is not None:
            ordinary = row["roles"]["ORDINARY"]
            recorder.check(f"{name}: the bytes of all {ordinary:,} ids survive being read again", row["unkept"] == 0)
    everyone = [one.table for one in (*survey.known.values(), *toys)]
    turned = ByteStrings(everyone[::-1])
    recorder.check(
        "strings in common are the same number from either side and by shared ids",
        all(map(strings_agree, (survey, counted))),
    )
    recorder.check(
        "the numbers of the union depend on no order",
        turned.vocabulary.fingerprint == ByteStrings(everyone).vocabulary.fingerprint,
    )


def strings_agree(survey: Survey) -> bool:
    """Whether pairs share the same number of strings counted from each side, and by the ids of `ByteStrings`."""
    for row in survey.pair_rows():
        tables = [survey.known[row[side]].table for side in ("a", "b")]
        strings = [{string for string in table.strings if string is not None} for table in tables]
        shared = ByteStrings(tables)
        ids = [set(shared.targets(table).tolist()) & set(range(len(shared.strings))) for table in tables]
        counts = {
            sum(string in strings[1] for string in strings[0]),
            sum(string in strings[0] for string in strings[1]),
            len(ids[0] & ids[1]),
        }
        if counts != {row["shared"]} or len(shared.strings) != row["union"]:
            return False
    return True
