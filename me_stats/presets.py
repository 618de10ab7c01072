"""Ensembles and prompts to run on, by name: what experiments and the command line open."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from jinja2 import TemplateError

from me_stats.mixing import ConstantMixing
from me_stats.models import Aligned, Conditioned, Ensemble, LanguageModel, TransformersModel
from me_stats.tokenizer_bytes import read_tokenizer
from me_stats.vocabulary import Prompt
from me_stats.vocabulary_map import ByteStrings

if TYPE_CHECKING:
    from me_stats.record import Recorder

SIBLINGS = ("bundled:prose", "bundled:code")
MIXED_SIBLINGS = ("bundled:prose", "bundled:words")  # bytes, and pieces of text
_LABELS: dict[tuple[str, ...], str] = {
    SIBLINGS: "bundled siblings",
    MIXED_SIBLINGS: "bundled siblings of two vocabularies",
}

_GGUF = ":gguf"

# One model under two system prompts is an ensemble of two laws over one vocabulary (prompt ensembling).
SYSTEM_PROMPTS = (
    "You answer in one short plain sentence.",
    "You are a poet. Answer in rhymed verses, one per line.",
)

CHAT_PROMPTS = (
    "A baker sells 3 loaves in the morning and twice as many in the afternoon. How many loaves is that?",
    "Why does the moon look larger near the horizon?",
    "Describe a quiet street after rain.",
    "What should I pack for two days in the mountains?",
)
TEXT_PROMPTS = (
    "def read(path):\n    ",
    "The names of the ",
    "class Node:\n    def __init__(self, ",
    "An expression is evaluated ",
)
# For models without a vocabulary, hence without a chat format, in common.
QUESTIONS = tuple(f"Question: {text}\nAnswer:" for text in CHAT_PROMPTS)


@dataclass(frozen=True)
class Setting:
    """An ensemble ready to run, with prompts that suit it and a name for tables."""

    label: str
    ensemble: Ensemble
    prompts: tuple[Prompt, ...]
    models: tuple[tuple[str, Any], ...]


def open_setting(
    models: Sequence[str],
    *,
    weights: Sequence[float] | None = None,
    dtype: Literal["float32", "bfloat16", "float16"] = "float32",
    device: str = "cpu",
) -> Setting:
    """Open models by name as an ensemble: several models mixed, or one under two system prompts.

    Models of different vocabularies are mixed over byte strings, see `aligned`.

    Parameters
    ----------
    models
        Names that `TransformersModel` takes, or a catalog name with ``:gguf``: llama.cpp's server then runs the model
        on this machine's processor in the precision of its file, until nothing refers to it. One name means prompt
        ensembling.
    weights
        λ; default (0.6, 0.4) for two components, so that a swap of components shows, else equal.
    """
    if not models:
        raise ValueError("models must name at least one model")
    opened = [_open(name, dtype, device) for name in models]
    components: Sequence[LanguageModel]
    if len(opened) == 1:
        components, prompts = _under_system_prompts(opened[0], models[0])
        label = f"{models[0]} under {len(components)} prompts"
    else:
        mixed = any(model.vocabulary != opened[0].vocabulary for model in opened)
        components = aligned(opened) if mixed else opened
        bundled = all(name.startswith("bundled:") for name in models)  # they complete texts and answer nothing
        prompts = list(TEXT_PROMPTS if bundled else QUESTIONS if mixed else CHAT_PROMPTS)
        label = _LABELS.get(tuple(models), " + ".join(models))
    if weights is None:
        weights = (0.6, 0.4) if len(components) == 2 else (1 / len(components),) * len(components)
    ensemble = Ensemble(components, ConstantMixing(weights))
    return Setting(label, ensemble, tuple(prompts), tuple(zip(models, opened, strict=True)))


def _open(name: str, dtype: Literal["float32", "bfloat16", "float16"], device: str) -> LanguageModel:
    if not name.endswith(_GGUF):
        return TransformersModel(name, dtype=dtype, device=device)
    if (dtype, device) != ("float32", "cpu"):
        raise ValueError(f"{name} runs on the cpu in the precision of its file; leave dtype and device out")
    from me_stats.served import open_gguf

    try:
        return open_gguf(name)
    except ImportError as error:
        raise ValueError(str(error)) from error


def aligned(models: Sequence[LanguageModel]) -> list[Aligned]:
    """The models as laws over the byte strings of all of them, each behind its own begin of sequence where it has one.

    Raises ValueError, with the model and the reason, for a tokenizer that cannot be read as bytes.
    """
    begun = [Conditioned(model, begin) if (begin := _begin(model)) else model for model in models]
    try:
        shared = ByteStrings.of(begun)
    except ValueError:
        for model in models:
            _require_bytes(model)
        raise
    return [Aligned(model, shared) for model in begun]


def _require_bytes(model: LanguageModel) -> None:
    try:
        read_tokenizer(model.vocabulary)
    except ValueError as error:
        raise ValueError(f"{_called(model)} cannot be mixed with models of other vocabularies: {error}") from None


def _called(model: LanguageModel) -> str:
    return str(getattr(model, "name", "") or model)


def _begin(model: LanguageModel) -> list[int]:
    """What the tokenizer puts before a text of its own accord."""
    plain, special = (model.vocabulary.tokenizer.encode("a", add_special_tokens=add) for add in (False, True))
    return list(special[: len(special) - len(plain)]) if special[-len(plain) :] == plain else []


def open_recorded(recorder: Recorder, *, weights: Sequence[float] | None = None) -> Setting:
    """The setting that the recorder's config names, with its models noted in the record.

    The config has `models` and may have `dtype` and `device`; see `open_setting`.
    """
    config = recorder.config
    where = {name: getattr(config, name) for name in ("dtype", "device") if hasattr(config, name)}
    setting = open_setting(config.models, weights=weights, **where)
    for name, model in setting.models:
        recorder.add_model(name, model)
    return setting


def _under_system_prompts(model: LanguageModel, name: str) -> tuple[list[Conditioned], list[Prompt]]:
    """One component per system prompt, and prompts that hold everything after it."""
    tokenizer = model.vocabulary.tokenizer
    if getattr(tokenizer, "chat_template", None) is None:
        contexts = [f"{system}\n\n" for system in SYSTEM_PROMPTS]
        return [Conditioned(model, context) for context in contexts], list(TEXT_PROMPTS)
    heads = [chat_text(tokenizer, [("system", system)]) for system in SYSTEM_PROMPTS]
    if any(system not in head for system, head in zip(SYSTEM_PROMPTS, heads, strict=True)):
        # Some templates move it into the first user turn: the components would be one and the same.
        raise ValueError(f"the chat template of {name} does not put the system prompt first")
    prompts: list[Prompt] = []
    for text in CHAT_PROMPTS:
        whole = chat_text(tokenizer, [("system", SYSTEM_PROMPTS[0]), ("user", text)], reply=True)
        if not whole.startswith(heads[0]):
            raise ValueError(f"the chat template of {name} does not put the system prompt first")
        prompts.append(whole[len(heads[0]) :])
    return [Conditioned(model, head) for head in heads], prompts


def chat_text(tokenizer: Any, turns: Sequence[tuple[str, str]], *, reply: bool = False) -> str:
    """The text of `turns` (role, content) in the chat format of `tokenizer`; with `reply`, up to where it answers."""
    messages = [{"role": role, "content": content} for role, content in turns]
    try:
        return str(tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=reply))
    except TemplateError as error:
        raise ValueError(f"the chat template takes no system prompt: {error}") from error
