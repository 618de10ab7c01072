"""Train the two byte-level Llama siblings that me_stats carries, *prose* and *code*.

Why they exist. A claim about ensembles of language models should be checkable on a laptop, offline, in seconds, and
on the code path that real models take: AutoModelForCausalLM, rotary embeddings, grouped-query attention, a key-value
cache, a tokenizer. Table toys have exact laws but none of that machinery; public checkpoints have it but are too large
to carry. These two have half a million parameters each, one vocabulary (the 256 bytes) and clearly different laws.

Why this corpus. It comes with every Python, so training needs no download and can be repeated anywhere:

  prose  the language reference in pydoc_data.topics, then the docstrings of the standard library of 300 characters
         or more, because the topics alone (0.5 MB) are too few to learn from;
  code   the standard library's modules with every docstring cut out, so that the two corpora share no text.

Both are cut at blank lines into documents of about 300 to 2000 characters. Byte 0 never occurs in them and ends each
one, so both models learn when to stop. A long paragraph that occurs twice is kept once, and one document in sixteen,
by its sha256, is held out.

Why these choices. Most steps see 256 bytes, the last 15% see 1024, and half of all windows skip positions, so that
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
from collections.abc import Iterator
from functools import cache
from importlib import import_module
from pathlib import Path

import numpy as np
import safetensors.torch
import tokenizers
import torch
import transformers
from rich.progress import Progress
from tokenizers import decoders, models, pre_tokenizers
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM, GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from me_stats.tokenizer_bytes import byte_alphabet

DOMAINS = ("prose", "code")
END = 0
SHORTEST, LONGEST = 300, 2000  # characters: shorter sections of a text are joined, longer ones are cut
CORPUS_BYTES = 4_000_000
PEAK_RATE = 4e-3
BATCH_TOKENS, CONTEXT, LONG_CONTEXT, LONG_SHARE, MAX_POSITIONS = 4096, 256, 1024, 0.15, 8192
# Tests and tools are not written like the library; encodings, entities and stringprep are tables.
SKIPPED = {"test", "tests", "idle_test", "idlelib", "tkinter", "turtledemo", "lib2to3", "distutils", "ensurepip"}
SKIPPED |= {"pydoc_data", "site-packages", "dist-packages", "encodings", "entities.py", "stringprep.py"}
# Two key-value heads serve four query heads, as in current models.
SHAPE = {"vocab_size": 256, "hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 3}
HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": MAX_POSITIONS}
ROLES = {"bos_token_id": END, "eos_token_id": END}


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


def held_out() -> dict[str, list[bytes]]:
    """Return each domain's documents that the siblings were not trained on."""
    return {domain: [text for text in held.split(bytes([END])) if text] for domain, (_, held) in corpora().items()}


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """Return the tokenizer whose ids are the bytes of the text.

    GPT-2's byte alphabet shows byte 0 as a letter, but that letter in a text is two other bytes. No special
    token is registered, since its string could match in a text: the end is declared by role in config.json.
    """
    tokenizer = tokenizers.Tokenizer(models.BPE(vocab=byte_alphabet(), merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, clean_up_tokenization_spaces=False)


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


def train(domain: str, streams: tuple[bytes, bytes], args: argparse.Namespace, progress: Progress) -> None:
    """Train one sibling and write its folder; go on from its checkpoint where there is one of the same run."""
    folder, data = args.out / domain, np.frombuffer(streams[0], dtype=np.uint8)
    corpus = {
        "text": "pydoc_data.topics and docstrings" if domain == "prose" else "standard library without docstrings",
        "documents": {"train": streams[0].count(END), "held_out": streams[1].count(END)},
        "bytes": {"train": len(streams[0]), "held_out": len(streams[1])},
        "sha256": hashlib.sha256(b"".join(streams)).hexdigest(),
    }
    run = {"domain": domain, "seed": args.seed, "steps": args.steps, "bf16": args.bf16, "corpus": corpus}
    with torch.random.fork_rng():
        torch.manual_seed(args.seed)
        model = LlamaForCausalLM(LlamaConfig(**SHAPE, **HEADS, **ROLES, tie_word_embeddings=True, dtype="float32"))
    # Muon for the layers' matrices: after 600 steps 2.06 held-out bits on prose, where AdamW alone had 2.18.
    matrices = [weight for name, weight in model.named_parameters() if "_proj" in name]
    others = [weight for name, weight in model.named_parameters() if "_proj" not in name]
    muon = torch.optim.Muon(matrices, weight_decay=0.1, adjust_lr_fn="match_rms_adamw")
    parts, log, start = [model, muon, torch.optim.AdamW(others, betas=(0.9, 0.95), weight_decay=0.0)], [], 0
    if (folder / "checkpoint.pt").exists() and (saved := torch.load(folder / "checkpoint.pt"))["run"] == run:
        log, start = saved["log"], saved["step"]
        for part, state in zip(parts, saved["states"], strict=True):
            part.load_state_dict(state)
    task = progress.add_task(domain, total=args.steps, completed=start)
    for step in range(start, args.steps):
        tokens, positions = batch(data, step, args)
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
            held_out = score(model, streams[1], length=LONG_CONTEXT, windows=16)[1].mean().item()
            train_bits = loss.item() / math.log(2)
            log.append({"step": step + 1, "train_bits": round(train_bits, 4), "held_out_bits": round(held_out, 4)})
            progress.console.print(domain, *(f"{name} {value}" for name, value in log[-1].items()))
            states = [part.state_dict() for part in parts]
            with put_in_place(folder) as temporary:
                torch.save({"run": run, "step": step + 1, "log": log, "states": states}, temporary / "checkpoint.pt")
    weights = {name: weight.half() for name, weight in model.state_dict().items() if name != "lm_head.weight"}
    with put_in_place(folder) as temporary:
        (temporary / "model.safetensors").write_bytes(safetensors.torch.save(weights, {"format": "pt"}))
        model.config.save_pretrained(temporary)
        GenerationConfig(**ROLES, pad_token_id=END).save_pretrained(temporary)
        byte_tokenizer().save_pretrained(temporary)
    versions = {"python": platform.python_version()}
    versions |= {module.__name__: module.__version__ for module in (torch, transformers, tokenizers, np)}
    with put_in_place(folder) as temporary:
        report = {**run, "parameters": model.num_parameters(), "versions": versions, "log": log}
        (temporary / "training.json").write_text(json.dumps(report, indent=1))
    (folder / "checkpoint.pt").unlink()


def measure(out: Path, streams: dict[str, tuple[bytes, bytes]]) -> None:
    """Measure the stored siblings on the held-out text of both domains, and add that to their reports."""
    paths = [out / domain / "training.json" for domain in DOMAINS]
    reports = {path.parent.name: json.loads(path.read_text()) for path in paths if path.exists()}
    laws: dict[str, list[torch.Tensor]] = {domain: [] for domain in DOMAINS}
    for name, report in reports.items():
        model = AutoModelForCausalLM.from_pretrained(out / name)
        report["held_out_bits_per_byte"] = {}
        for domain, (_, held_out) in streams.items():
            law, bits = score(model, held_out, length=LONG_CONTEXT, windows=64)
            laws[domain].append(law.exp())
            report["held_out_bits_per_byte"][domain] = round(bits.mean().item(), 4)
        bits = score(model, streams[name][1], length=MAX_POSITIONS, windows=8)[1].mean(0)
        spans = itertools.pairwise([0, 64, 256, 1024, 2048, 4096, MAX_POSITIONS])
        report["bits_per_byte_by_position"] = {f"{a}-{b}": round(bits[a:b].mean().item(), 4) for a, b in spans}
    for name, report in reports.items():
        if len(reports) == len(DOMAINS):
            tv = {domain: round(((p - q).abs().sum(-1) / 2).mean().item(), 4) for domain, (p, q) in laws.items()}
            report["mean_tv_between_siblings"] = tv
        with put_in_place(out / name) as temporary:
            (temporary / "training.json").write_text(json.dumps(report, indent=1) + "\n")


def main() -> None:
    """Read the command line and train what it asks for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--domain", nargs="+", choices=DOMAINS, default=DOMAINS, help="which siblings (default: both)")
    parser.add_argument("--steps", type=int, default=2500, help="steps of 4096 bytes (default: %(default)s)")
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
            for domain in dict.fromkeys(args.domain):
                train(domain, streams[domain], args, progress)
    except KeyboardInterrupt:
        raise SystemExit(f"Stopped. The same command goes on from the work kept in {args.out}.") from None
    measure(args.out, streams)


if __name__ == "__main__":
    main()
