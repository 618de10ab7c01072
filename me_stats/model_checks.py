"""Checks of models before anything is loaded: files, config, weights, tokenizer, and whether they can be mixed.

`open_model` reads what is small of one model and builds its network without storage; `vocabularies` compares those that
run together.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, partial
from typing import TYPE_CHECKING, Any, Literal

from me_stats.checkpoint_files import Checkpoint, Fault, find, read_weights, require_fitting, require_tokenizer
from me_stats.part_cost import GIB
from me_stats.tokenizer_bytes import read_tokenizer
from me_stats.tokenizer_sources import label_of
from me_stats.vocabulary import Vocabulary

if TYPE_CHECKING:
    from me_stats.plans import Part

Status = Literal["ok", "warn", "fail"]
_RANDOM = "random:"
# Experiments whose components must have one vocabulary, and those that read even one as byte strings.
_ONE_VOCABULARY, _BYTE_STRINGS = ("speed",), ("mixed_vocabularies",)


@dataclass(frozen=True)
class Check:
    """One thing that was looked at; `remedy` is empty where there is nothing to do."""

    name: str
    status: Status
    detail: str
    remedy: str = ""


@dataclass
class OpenModel:
    """What is known of a model without its weights: as much as could be read.

    Attributes
    ----------
    checkpoint
        Where its files are.
    network
        Its network on the meta device: shapes without storage.
    vocabulary
        As `TransformersModel` would have it.
    """

    checkpoint: Checkpoint | None = None
    network: Any = None
    vocabulary: Vocabulary | None = None


def to_pull(name: str) -> bool:
    """Whether `name` is a catalog model that a run pulls first."""
    from me_stats.models import catalog

    return name in catalog.CATALOG and not catalog.pulled(name)


def open_model(
    name: str, *, revision: str = "", alone: bool = False, chat: bool = False
) -> tuple[OpenModel, list[Check]]:
    """A model without its weights, and what was looked at: files, config, weights, tokenizer, chat template.

    Parameters
    ----------
    name
        As `TransformersModel` takes it, or ``random:<shape>``.
    revision
        The commit, or its beginning, that the checkpoint must be of.
    alone
        It runs under two system prompts.
    chat
        Tasks are asked in its chat format.
    """
    opened = OpenModel()
    if name.startswith(_RANDOM):
        return opened, [_shape(name, opened)]
    if to_pull(name):
        pull = f"'me-stats models pull {name}'"
        return opened, [Check(name, "warn", "not on this machine yet; the run pulls it", pull)]
    found = []
    steps: tuple[tuple[str, Callable[[], str | Check]], ...] = (
        ("files", lambda: _files(name, opened, revision)),
        ("config", lambda: _config(opened)),
        ("weights", lambda: _weights(opened)),
        ("tokenizer", lambda: _tokenizer(name, opened)),
        ("chat template", lambda: _template(name, opened, alone, chat)),
    )
    for step, look in steps:
        try:
            seen = look()
        except Fault as fault:
            found.append(Check(f"{label_of(name)}: {step}", "fail", str(fault), fault.remedy))
            if step in ("files", "config"):
                break  # nothing else can be read
        else:
            found.append(seen if isinstance(seen, Check) else Check(f"{label_of(name)}: {step}", "ok", seen))
        if step == "tokenizer" and opened.vocabulary is None:
            break
    return opened, found


def _shape(name: str, opened: OpenModel) -> Check:
    from me_stats.models.shapes import published_config

    try:
        opened.network = _without_storage(published_config(name.removeprefix(_RANDOM)))
    except ValueError as error:
        return Check(name, "fail", str(error), "name a published shape")
    opened.vocabulary = Vocabulary(opened.network.config.vocab_size)
    return Check(name, "ok", "random weights in a published shape: good for speed alone")


def _files(name: str, opened: OpenModel, revision: str) -> str | Check:
    checkpoint = opened.checkpoint = find(name)
    if revision and not checkpoint.commit.startswith(revision):
        raise Fault(
            f"the group asks for revision {revision}, here is {checkpoint.commit or 'a folder of none'}",
            f"'hf download {name} --revision {revision}', and give its folder with --models",
        )
    if checkpoint.folder is not None:
        return f"on this machine{f', commit {checkpoint.commit[:8]}' if checkpoint.commit else ''}"
    size = "of unknown size" if checkpoint.download is None else f"of {checkpoint.download / GIB:.1f} GiB"
    return Check(
        f"{label_of(name)}: files", "warn", f"a download {size} comes first", f"'hf download {name}' beforehand"
    )


def _config(opened: OpenModel) -> str:
    from transformers import AutoConfig

    assert opened.checkpoint is not None
    try:
        config = AutoConfig.from_pretrained(opened.checkpoint.source)
        opened.network = _without_storage(config)
    except Exception as error:  # a broken file surfaces as whatever its parser raises
        raise Fault(
            f"config.json makes no causal language model: {_line(error)}",
            "take config.json from where the weights come from, or a newer transformers",
        ) from error
    text = config.get_text_config()
    window = getattr(text, "max_position_embeddings", None)
    return f"{config.model_type}, {opened.network.num_parameters() / 1e9:.2f} billion weights, context {window}"


def _without_storage(config: Any) -> Any:
    import torch
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config)


def _weights(opened: OpenModel) -> str:
    assert opened.checkpoint is not None
    if opened.checkpoint.folder is None:
        return "looked at after the download"
    weights = read_weights(opened.checkpoint.folder)
    require_fitting(weights, opened.network)
    return f"{weights.bytes / GIB:.2f} GiB, whole; files: {len(weights.files)}"


def _tokenizer(name: str, opened: OpenModel) -> str | Check:
    from transformers import AutoTokenizer, GenerationConfig

    from me_stats.models.huggingface import vocabulary_of

    assert opened.checkpoint is not None
    if opened.checkpoint.folder is not None:
        require_tokenizer(opened.checkpoint.folder)
    try:
        tokenizer = AutoTokenizer.from_pretrained(opened.checkpoint.source)
    except Exception as error:
        raise Fault(f"the tokenizer does not load: {_line(error)}",
                    "copy the tokenizer's files from the model that it was trained from") from error  # fmt: skip
    with contextlib.suppress(OSError, ValueError):  # without one the config says where sequences end
        opened.network.generation_config = GenerationConfig.from_pretrained(opened.checkpoint.source)
    vocabulary = opened.vocabulary = vocabulary_of(opened.network, tokenizer)
    width = opened.network.config.get_text_config().vocab_size
    detail = f"{len(tokenizer):,} tokens, {width:,} rows of logits"
    if len(tokenizer) > width:
        detail += f": ids from {width:,} on cannot be read or written"
        remedy = "take the tokenizer that belongs to these weights"
        return Check(f"{label_of(name)}: tokenizer", "warn", detail, remedy)
    if not vocabulary.eos:
        return Check(f"{label_of(name)}: tokenizer", "warn", f"{detail}; nothing ends a sequence",
                     "set eos_token_id in generation_config.json, if the model ends its answers")  # fmt: skip
    return detail


def _template(name: str, opened: OpenModel, alone: bool, chat: bool) -> str | Check:
    from me_stats.presets import SYSTEM_PROMPTS, chat_text

    assert opened.vocabulary is not None
    tokenizer = opened.vocabulary.tokenizer
    if not getattr(tokenizer, "chat_template", None):
        detail = "none: the model is asked in plain text"
        if not chat:
            return detail
        return Check(
            f"{label_of(name)}: chat template", "warn", detail, "add the model's chat_template.jinja to its folder"
        )
    if alone:
        remedy = "give a model whose chat template puts the system prompt first, or two models"
        try:
            heads = [chat_text(tokenizer, [("system", system)]) for system in SYSTEM_PROMPTS]
        except ValueError as error:
            raise Fault(str(error), remedy) from error
        if any(system not in head for system, head in zip(SYSTEM_PROMPTS, heads, strict=True)):
            raise Fault("it does not put the system prompt first", remedy)
    return "there is one"


def vocabularies(parts: Sequence[Part], opened: Mapping[str, OpenModel]) -> list[Check]:
    """Whether each set of models that runs together has one vocabulary, or several that can be aligned."""
    sets = dict.fromkeys(tuple(getattr(part.config, "models", ())) for part in parts)
    unreadable = cache(partial(_unreadable, opened))
    found = []
    for names in sets:
        if len(names) < 2 or None in (known := [opened[name].vocabulary for name in names]):
            continue
        title = f"vocabularies of {' + '.join(map(label_of, names))}"
        users = [part for part in parts if getattr(part.config, "models", ()) == names]
        one = all(vocabulary == known[0] for vocabulary in known)
        timed = [part.name for part in users if part.experiment in _ONE_VOCABULARY]
        aligned = [part.name for part in users if not one or part.experiment in _BYTE_STRINGS]
        reasons = [f"{label_of(name)} cannot be ({unreadable(name)})" for name in names if aligned and unreadable(name)]
        if timed and not one:
            found.append(Check(title, "fail", f"they differ, and {timed[0]} needs one", "leave it out with --only"))
        elif reasons and one:
            detail = f"one, which {aligned[0]} reads as byte strings, and {reasons[0]}"
            found.append(Check(title, "fail", detail, "leave it out with --only"))
        elif reasons:
            detail = f"they differ and must be aligned over byte strings, and {reasons[0]}"
            remedy = "choose a model with a byte-level or byte-fallback tokenizer in its place"
            found.append(Check(title, "fail", detail, remedy))
        else:
            assert known[0] is not None
            detail = f"one, of {known[0].size:,} tokens" if one else "they differ and are aligned over byte strings"
            found.append(Check(title, "ok", detail))
    return found


def _unreadable(opened: Mapping[str, OpenModel], name: str) -> str:
    """Why the tokens of a model cannot be read as bytes; "" where they can."""
    vocabulary = opened[name].vocabulary
    assert vocabulary is not None
    try:
        read_tokenizer(vocabulary)
    except ValueError as error:
        return " ".join(str(error).split())
    return ""


def _line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
