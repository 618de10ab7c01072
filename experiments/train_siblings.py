"""Train the Llama siblings that me_stats carries: *prose* and *code* over bytes, *words* over pieces of text.

Why they exist. A claim about ensembles of language models should be checkable on a laptop, offline, in seconds, and
on the code path that real models take: AutoModelForCausalLM, rotary embeddings, grouped-query attention, a key-value
cache, a tokenizer. Table toys have exact laws but none of that machinery; public checkpoints have it but are too large
to carry. Prose and code have half a million parameters each, one vocabulary (the 256 bytes) and clearly different
laws. Words learns both texts in another vocabulary, so that mixing tokenizers is checked on this path too. Its
tokenizer has the traits that make this hard in real ones, see `word_tokenizer`.

Why this corpus. It comes with every Python, so training needs no download and can be repeated anywhere:

  prose  the language reference in pydoc_data.topics, then the docstrings of the standard library of 300 characters
         or more, because the topics alone (0.5 MB) are too few to learn from;
  code   the standard library's modules with every docstring cut out, so that the two corpora share no text.

Both are cut at blank lines into documents of about 300 to 2000 characters. Byte 0 never occurs in them and ends each
one, so the models learn when to stop. A long paragraph that occurs twice is kept once, and one document in sixteen,
by its sha256, is held out. Words reads the training documents of both, in the order of their sha256.

Why these choices. Most steps see 256 tokens, the last 15% see 1024, and half of all windows skip positions, so that
the law stays sane at lengths never trained on. Weights are stored in float16 (11 significant bits, half the size);
config.json says float32, in which they were trained and in which they load. training.json is written last: the log,
the measurements of the stored weights on held-out text, and the versions. The corpus, and so the weights, depend on
the Python version; its sha256 tells which one it was.

Work is kept every 100 steps. After Ctrl-C the same command goes on from there, on the batches it would have seen.
"""

from __future__ import annotations

import argparse
import ast
import contextlib
import hashlib
import itertools
import json
import math
import os
import platform
import re
import sysconfig
import tempfile
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.torch
import tokenizers
import torch
import transformers
from rich.progress import Progress
from tokenizers import Regex, decoders, models, normalizers, pre_tokenizers, processors, trainers
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM, GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from me_stats.tokenizer_bytes import SPACE, byte_alphabet, read_tokenizer
from me_stats.vocabulary import Vocabulary
from me_stats.vocabulary_map import TokenBytes

DOMAINS = ("prose", "code")
SIBLINGS = (*DOMAINS, "words")
END = 0
SHORTEST, LONGEST = 300, 2000  # characters: shorter sections of a text are joined, longer ones are cut
CORPUS_BYTES = 4_000_000
PEAK_RATE = 4e-3
BATCH_TOKENS, CONTEXT, LONG_CONTEXT, LONG_SHARE, MAX_POSITIONS = 4096, 256, 1024, 0.15, 8192
# Tests and tools are not written like the library; encodings, entities and stringprep are tables.
SKIPPED = {"test", "tests", "idle_test", "idlelib", "tkinter", "turtledemo", "lib2to3", "distutils", "ensurepip"}
SKIPPED |= {"pydoc_data", "site-packages", "dist-packages", "encodings", "entities.py", "stringprep.py"}
# Two key-value heads serve four query heads, as in current models.
SHAPE = {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 3}
HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": MAX_POSITIONS}
CONTROLS = ("<pad>", "</s>", "<s>", "<unk>", "<end_of_turn>")
PAD, WORD_ENDS, BEGIN = 0, (1, 4), 2  # ids of words; either end closes a document
TOKENS, WIDTH = 1000, 1040  # ids of words, and rows of its logits: 40 stand for nothing
# What a learned piece may span: newlines, an indentation, a word or punctuation with the space before it.
PIECES = rf"\n+|{SPACE}+(?={SPACE})|{SPACE}?\w+|{SPACE}?[^\w{SPACE}\n]+"


def modules() -> Iterator[tuple[str, list[str]]]:
    """Yield each module of the standard library as its source without docstrings and its docstrings."""
    root = Path(sysconfig.get_path("stdlib"))
    for path in sorted(root.rglob("*.py"), key=lambda path: path.relative_to(root).as_posix()):
        parts = path.relative_to(root).parts
        # _sysconfigdata and config-* describe the machine that built this Python, not the library.
        if not SKIPPED.isdisjoint(parts) or any(part.startswith(("_sysconfigdata", "config-")) for part in parts):
            continue
        source = path.read_text(encoding="utf-8", errors="replace")
        docstrings: list[str] = []
        cut: set[int] = set()
        for node in ast.walk(ast.parse(source)):
            if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
                text = ast.get_docstring(node)
                if text is not None:
                    docstrings.append(text)
                    cut.update(range(node.body[0].lineno, (node.body[0].end_lineno or 0) + 1))
        lines = enumerate(source.split("\n"), start=1)  # as ast counts them: splitlines also splits at form feeds
        yield "\n".join(line for number, line in lines if number not in cut), docstrings


def documents(text: str, seen: set[str]) -> Iterator[str]:
    """Cut a text into documents at blank lines, leaving out long paragraphs already in `seen`."""
    document = ""
    for section in re.split(r"\n{3,}", text.strip("\n")):
        for paragraph in re.split(r"\n\s*\n", section):
            if paragraph in seen:
                continue
            if len(paragraph) >= 80:
                seen.add(paragraph)
            if document and len(document) + len(paragraph) > LONGEST:
                yield document.strip("\n") + "\n"
                document = ""
            document += paragraph + "\n\n"
        if len(document) >= SHORTEST:
            yield document.strip("\n") + "\n"
            document = ""
    if document.strip():
        yield document.strip("\n") + "\n"


@cache
def corpora() -> dict[str, tuple[bytes, bytes]]:
    """Return each domain's training and held-out streams: documents, each ended by byte 0.

    Documents come in the order of their sha256, which shuffles them, splits them and bounds the size alike
    on every machine.
    """
    library = list(modules())
    topics = sorted(import_module("pydoc_data.topics").topics.values(), key=lambda text: (-len(text), text))
    docstrings = [text for _, found in library for text in found if len(text) >= SHORTEST]
    streams = {}
    for domain, texts in {"prose": topics + docstrings, "code": [source for source, _ in library]}.items():
        seen: set[str] = set()
        found = [document.encode() for text in texts for document in documents(text, seen)]
        keyed = sorted((hashlib.sha256(document).digest(), document) for document in found if END not in document)
        if not keyed:
            raise RuntimeError(f"no {domain} text: this Python comes without the sources of its standard library")
        train, held_out = bytearray(), bytearray()
        for digest, document in keyed:
            if len(train) + len(held_out) < CORPUS_BYTES:
                stream = held_out if digest[-1] % 16 == 0 else train
                stream += document + bytes([END])
        streams[domain] = bytes(train), bytes(held_out)
    return streams


def split(stream: bytes) -> list[bytes]:
    """Return the documents of a stream."""
    return [document for document in stream.split(bytes([END])) if document]


def held_out() -> dict[str, list[bytes]]:
    """Return each domain's documents that the siblings were not trained on."""
    return {domain: split(held) for domain, (_, held) in corpora().items()}


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """Return the tokenizer whose ids are the bytes of the text.

    GPT-2's byte alphabet shows byte 0 as a letter, but that letter in a text is two other bytes. No special
    token is registered, since its string could match in a text: the end is declared by role in config.json.
    """
    tokenizer = tokenizers.Tokenizer(models.BPE(vocab=byte_alphabet(), merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, clean_up_tokenization_spaces=False)


def word_tokenizer(texts: Iterable[str]) -> PreTrainedTokenizerFast:
    """Return a tokenizer learned from texts, with the traits of Gemma's and its like.

    Pieces of text with U+2581 for a space, merged over the whole text; 256 byte tokens for what no piece spells, so
    that many bytes have two ids; a begin that it puts before a text; two ends. The result depends on the texts alone:
    the alphabet is given, and pieces that are equally frequent are taken in the order of their ids.
    """
    spaces, printable = normalizers.Replace(" ", SPACE), [chr(code) for code in range(0x21, 0x7F)]
    alphabet = ["\n", *printable, SPACE]
    learner = tokenizers.Tokenizer(models.BPE())
    learner.normalizer, learner.pre_tokenizer = spaces, pre_tokenizers.Split(Regex(PIECES), "isolated")
    learner.train_from_iterator(
        texts,
        trainers.BpeTrainer(
            vocab_size=TOKENS,
            special_tokens=[*CONTROLS, *(f"<0x{value:02X}>" for value in range(256))],
            initial_alphabet=alphabet,
            limit_alphabet=len(alphabet),
            max_token_length=16,
            show_progress=False,
        ),
    )
    # The byte tokens were special so far, to have the first ids. A text that spells one out is still a text.
    learned = json.loads(learner.to_str())["model"]
    pieces = {"vocab": learned["vocab"], "merges": [tuple(merge) for merge in learned["merges"]]}
    tokenizer = tokenizers.Tokenizer(models.BPE(**pieces, byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    tokenizer.normalizer = spaces
    tokenizer.decoder = decoders.Sequence([decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()])
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", BEGIN)])
    names = dict(zip(("pad_token", "eos_token", "bos_token", "unk_token"), CONTROLS, strict=False))
    names |= {"additional_special_tokens": [*CONTROLS[4:]], "clean_up_tokenization_spaces": False}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names)


def word_table(tokenizer: PreTrainedTokenizerFast) -> TokenBytes:
    """Return the bytes of each row of the logits of words."""
    return read_tokenizer(Vocabulary(WIDTH, eos=WORD_ENDS, tokenizer=tokenizer))


def word_ids(document: bytes, table: TokenBytes) -> list[int]:
    """Return a document between its begin and its end: one in four, by its sha256, ends with the turn."""
    return [BEGIN, *table.encode(document), WORD_ENDS[hashlib.sha256(document).digest()[-2] % 4 == 0]]


@dataclass(frozen=True)
class Course:
    """What one sibling is taught: ids, the tokenizer and roles that go with them, and how it is examined."""

    name: str
    corpus: dict[str, Any]
    ids: np.ndarray
    width: int  # of the logits
    tokenizer: PreTrainedTokenizerFast
    roles: dict[str, int]
    generation: dict[str, Any]
    held_out_bits: Callable[[torch.nn.Module], float]  # per byte


def byte_course(domain: str, streams: tuple[bytes, bytes]) -> Course:
    """Return the course of a sibling whose ids are the bytes."""
    text = "pydoc_data.topics and docstrings" if domain == "prose" else "standard library without docstrings"
    corpus, roles = {"text": text, **_counts([streams])}, {"bos_token_id": END, "eos_token_id": END}

    def examine(model: torch.nn.Module) -> float:
        return score(model, streams[1], length=LONG_CONTEXT, windows=16)[1].mean().item()

    ids = np.frombuffer(streams[0], dtype=np.uint8)
    return Course(domain, corpus, ids, 256, byte_tokenizer(), roles, {**roles, "pad_token_id": END}, examine)


def word_course(streams: dict[str, tuple[bytes, bytes]]) -> Course:
    """Return the course of the sibling that reads both domains in pieces of text."""
    documents = [document for train, _ in streams.values() for document in split(train)]
    documents.sort(key=lambda document: hashlib.sha256(document).digest())
    tokenizer = word_tokenizer(document.decode() for document in documents)
    table = word_table(tokenizer)
    ids = np.array([token for document in documents for token in word_ids(document, table)], dtype=np.uint16)
    corpus = {"text": "the texts of prose and code", **_counts(streams.values()), "tokens": {"train": len(ids)}}
    roles = {"bos_token_id": BEGIN, "eos_token_id": WORD_ENDS[0], "pad_token_id": PAD}

    def examine(model: torch.nn.Module) -> float:
        bits = [score_words(model, table, held, length=LONG_CONTEXT, windows=8) for _, held in streams.values()]
        return torch.cat(bits).mean().item()

    generation = {**roles, "eos_token_id": list(WORD_ENDS)}
    return Course("words", corpus, ids, WIDTH, tokenizer, roles, generation, examine)


def _counts(streams: Iterable[tuple[bytes, bytes]]) -> dict[str, Any]:
    train, held = (b"".join(parts) for parts in zip(*streams, strict=True))
    return {
        "documents": {"train": train.count(END), "held_out": held.count(END)},
        "bytes": {"train": len(train), "held_out": len(held)},
        "sha256": hashlib.sha256(train + held).hexdigest(),
    }


def batch(stream: np.ndarray, step: int, args: argparse.Namespace) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the windows and positions of one step, a function of the seed and the step alone.

    Half of the windows skip a random number of positions at a random place, so that distances up to the longest
    are seen at the cost of short windows (positional skip-wise training, Zhu et al. 2023, arXiv:2309.10400).
    """
    length = LONG_CONTEXT if step >= (1 - LONG_SHARE) * args.steps else CONTEXT
    rng, rows = np.random.default_rng([args.seed, step]), BATCH_TOKENS // length
    windows = rng.integers(len(stream) - length, size=(rows, 1)) + np.arange(length + 1)
    skips = rng.integers(MAX_POSITIONS - length, size=(rows, 1)) * rng.integers(2, size=(rows, 1))
    positions = np.arange(length) + skips * (np.arange(length) >= rng.integers(1, length, size=(rows, 1)))
    return torch.from_numpy(stream[windows].astype(np.int64)), torch.from_numpy(positions)


@contextlib.contextmanager
def put_in_place(folder: Path) -> Iterator[Path]:
    """Give a temporary folder to fill, then move its files into `folder`: none of them is ever half written."""
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder) as temporary:
        yield Path(temporary)
        for file in sorted(Path(temporary).iterdir()):
            os.replace(file, folder / file.name)


@torch.inference_mode()
def score(model: torch.nn.Module, stream: bytes, *, length: int, windows: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return log laws (windows, length, 256) in nats after each prefix, and bits (windows, length) of the next byte."""
    count = min(windows, (len(stream) - 1) // length)
    rows = torch.tensor([list(stream[row * length : (row + 1) * length + 1]) for row in range(count)])
    logits = torch.cat([model(input_ids=row[None, :-1], use_cache=False).logits for row in rows])
    laws = logits.float().log_softmax(-1)
    return laws, -laws.gather(-1, rows[:, 1:, None])[..., 0] / math.log(2)


@torch.inference_mode()
def score_words(model: torch.nn.Module, table: TokenBytes, stream: bytes, *, length: int, windows: int) -> torch.Tensor:
    """Return bits (windows, length) of each byte in the tokens of words, those of a token spread evenly over its bytes.

    A window is tokenised as a document is, so this is the cost of one spelling: at least that of the text. Both ends
    are one, byte 0, and the begin after it has no byte and no cost.
    """
    count, rows = min(windows, len(stream) // length), []
    for row in range(count):
        ids, sizes = [BEGIN], [0]
        for number, document in enumerate(stream[row * length : (row + 1) * length].split(bytes([END]))):
            tokens = table.encode(document)
            ids += [WORD_ENDS[0], BEGIN, *tokens] if number else tokens
            sizes += [*([1, 0] if number else []), *(len(table.strings[token] or b"") for token in tokens)]
        laws = model(input_ids=torch.tensor([ids[:-1]]), use_cache=False).logits[0].float().log_softmax(-1)
        laws[:, WORD_ENDS[0]] = laws[:, WORD_ENDS].logsumexp(-1)
        taken = -laws.gather(-1, torch.tensor(ids[1:])[:, None])[:, 0] / math.log(2)
        spans = torch.tensor(sizes[1:])
        rows.append((taken / spans.clamp(min=1)).repeat_interleave(spans))
    return torch.stack(rows)


def train(course: Course, args: argparse.Namespace, progress: Progress) -> None:
    """Train one sibling and write its folder; go on from its checkpoint where there is one of the same run."""
    name, corpus = course.name, course.corpus
    folder, ids_per_byte = args.out / name, len(course.ids) / corpus["bytes"]["train"]
    run = {"domain": name, "seed": args.seed, "steps": args.steps, "bf16": args.bf16, "corpus": corpus}
    config = {"vocab_size": course.width, **SHAPE, **HEADS, **course.roles}
    with torch.random.fork_rng():
        torch.manual_seed(args.seed)
        model = LlamaForCausalLM(LlamaConfig(**config, tie_word_embeddings=True, dtype="float32"))
    # Muon for the layers' matrices: after 600 steps 2.06 held-out bits on prose, where AdamW alone had 2.18.
    matrices = [weight for key, weight in model.named_parameters() if "_proj" in key]
    others = [weight for key, weight in model.named_parameters() if "_proj" not in key]
    muon = torch.optim.Muon(matrices, weight_decay=0.1, adjust_lr_fn="match_rms_adamw")
    parts, log, start = [model, muon, torch.optim.AdamW(others, betas=(0.9, 0.95), weight_decay=0.0)], [], 0
    if (folder / "checkpoint.pt").exists() and (saved := torch.load(folder / "checkpoint.pt"))["run"] == run:
        log, start = saved["log"], saved["step"]
        for part, state in zip(parts, saved["states"], strict=True):
            part.load_state_dict(state)
    task = progress.add_task(name, total=args.steps, completed=start)
    for step in range(start, args.steps):
        tokens, positions = batch(course.ids, step, args)
        mask = torch.ones_like(positions)  # without it, a skip in the positions would start another sequence
        with torch.autocast("cpu", torch.bfloat16, enabled=args.bf16):
            logits = model(tokens[:, :-1], position_ids=positions, attention_mask=mask, use_cache=False).logits
        loss = cross_entropy(logits.float().flatten(0, 1), tokens[:, 1:].flatten())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in parts[1:]:
            cosine = 0.5 * (1 + math.cos(math.pi * step / args.steps))
            optimizer.param_groups[0]["lr"] = PEAK_RATE * min((step + 1) / 100, cosine)
            optimizer.step()
            optimizer.zero_grad()
        progress.advance(task)
        if (step + 1) % 100 == 0 or step + 1 == args.steps:
            bits = {
                "train_bits": loss.item() / math.log(2) * ids_per_byte,
                "held_out_bits": course.held_out_bits(model),
            }
            log.append({"step": step + 1} | {key: round(value, 4) for key, value in bits.items()})
            progress.console.print(name, *(f"{key} {value}" for key, value in log[-1].items()))
            states = [part.state_dict() for part in parts]
            with put_in_place(folder) as temporary:
                torch.save({"run": run, "step": step + 1, "log": log, "states": states}, temporary / "checkpoint.pt")
    weights = {key: weight.half() for key, weight in model.state_dict().items() if key != "lm_head.weight"}
    with put_in_place(folder) as temporary:
        (temporary / "model.safetensors").write_bytes(safetensors.torch.save(weights, {"format": "pt"}))
        model.config.save_pretrained(temporary)
        GenerationConfig(**course.generation).save_pretrained(temporary)
        course.tokenizer.save_pretrained(temporary)
    versions = {"python": platform.python_version()}
    versions |= {module.__name__: module.__version__ for module in (torch, transformers, tokenizers, np)}
    with put_in_place(folder) as temporary:
        report = {**run, "parameters": model.num_parameters(), "versions": versions, "log": log}
        (temporary / "training.json").write_text(json.dumps(report, indent=1))
    (folder / "checkpoint.pt").unlink()


def measure(out: Path, streams: dict[str, tuple[bytes, bytes]]) -> None:
    """Measure the stored siblings on the held-out text of both domains, and add that to their reports."""
    paths = [out / name / "training.json" for name in SIBLINGS]
    reports = {path.parent.name: json.loads(path.read_text()) for path in paths if path.exists()}
    laws: dict[str, list[torch.Tensor]] = {domain: [] for domain in DOMAINS}
    for name, report in reports.items():
        model = AutoModelForCausalLM.from_pretrained(out / name)
        table = None if name in DOMAINS else word_table(transformers.AutoTokenizer.from_pretrained(out / name))
        report["held_out_bits_per_byte"] = {}
        for domain, (_, held_out) in streams.items():
            if table is None:
                law, bits = score(model, held_out, length=LONG_CONTEXT, windows=64)
                laws[domain].append(law.exp())
            else:
                bits = score_words(model, table, held_out, length=LONG_CONTEXT, windows=64)
            report["held_out_bits_per_byte"][domain] = round(bits.mean().item(), 4)
        long = {"length": MAX_POSITIONS, "windows": 8}
        if table is None:
            bits = score(model, streams[name][1], **long)[1]
        else:
            bits = torch.cat([score_words(model, table, held_out, **long) for _, held_out in streams.values()])
        spans = itertools.pairwise([0, 64, 256, 1024, 2048, 4096, MAX_POSITIONS])
        at = bits.mean(0)
        report["bits_per_byte_by_position"] = {f"{a}-{b}": round(at[a:b].mean().item(), 4) for a, b in spans}
    for name, report in reports.items():
        if name in DOMAINS and all(domain in reports for domain in DOMAINS):
            tv = {domain: round(((p - q).abs().sum(-1) / 2).mean().item(), 4) for domain, (p, q) in laws.items()}
            report["mean_tv_between_siblings"] = tv
        with put_in_place(out / name) as temporary:
            (temporary / "training.json").write_text(json.dumps(report, indent=1) + "\n")


def main() -> None:
    """Read the command line and train what it asks for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--domain", nargs="+", choices=SIBLINGS, default=SIBLINGS, help="which siblings (default: all)")
    parser.add_argument("--steps", type=int, default=2500, help="steps of 4096 tokens (default: %(default)s)")
    parser.add_argument("--quick", action="store_true", help="60 steps: shows in a minute that everything works")
    parser.add_argument("--seed", type=int, default=0, help="fixes the first weights and every batch")
    parser.add_argument("--out", type=Path, default=Path("runs/siblings"), help="folder (default: %(default)s)")
    parser.add_argument("--bf16", action="store_true", help="multiply in bfloat16: faster where the processor has it")
    parser.add_argument("--threads", type=int, default=2, help="CPU threads (default: %(default)s)")
    args = parser.parse_args()
    args.steps = 60 if args.quick else args.steps
    torch.set_num_threads(args.threads)
    transformers.utils.logging.disable_progress_bar()
    streams = corpora()
    try:
        with Progress() as progress:
            for name in dict.fromkeys(args.domain):
                course = byte_course(name, streams[name]) if name in DOMAINS else word_course(streams)
                train(course, args, progress)
    except KeyboardInterrupt:
        raise SystemExit(f"Stopped. The same command goes on from the work kept in {args.out}.") from None
    measure(args.out, streams)


if __name__ == "__main__":
    main()
