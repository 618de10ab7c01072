from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import tokenizers
import torch
from tokenizers.models import WordLevel
from tokenizers.processors import TemplateProcessing
from transformers import LlamaConfig, PreTrainedTokenizerFast

from me_stats import presets
from me_stats.models import Aligned, Conditioned
from me_stats.models.huggingface import TransformersModel
from me_stats.presets import (
    CHAT_PROMPTS,
    MIXED_SIBLINGS,
    QUESTIONS,
    SIBLINGS,
    SYSTEM_PROMPTS,
    TEXT_PROMPTS,
    Setting,
    open_recorded,
    open_setting,
)
from me_stats.record import Recorder
from me_stats.samplers import CESampler, MESampler
from me_stats.vocabulary_map import Role
from tests.networks import byte_tokenizer, network, shape

BUNDLED = Path(presets.__file__).parent / "models" / "bundled"
CHAT = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}</{{ m.role }}>{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
SYSTEM_IN_USER_TURN = (
    "<s>{% set first = messages[0].content if messages[0].role == 'system' else '' %}"
    "{% for m in messages if m.role == 'user' %}<user>{{ first }} {{ m.content }}{% endfor %}"
)
NO_SYSTEM = (
    "{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('no system role') }}{% endif %}{% endfor %}"
)
SYSTEM_LAST = "{% for m in messages | reverse %}<{{ m.role }}>{{ m.content }}{% endfor %}"


def save(
    folder: Path, *, seed: int = 0, chat_template: str | None = None, tokenizer: PreTrainedTokenizerFast | None = None
) -> str:
    tokenizer = tokenizer or byte_tokenizer(chat_template=chat_template)
    sizes: dict[str, Any] = {"vocab_size": 264, "hidden_size": 16, "intermediate_size": 16, "head_dim": 4}
    config = LlamaConfig(**shape(**sizes, max_position_embeddings=256, eos_token_id=tokenizer.eos_token_id))
    network(config, seed=seed).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def begun(*more: str) -> PreTrainedTokenizerFast:
    """Bytes and `more` strings, with a begin of sequence that the tokenizer puts before a text."""
    tokenizer = byte_tokenizer()
    tokenizer.add_tokens([*more])
    begin = ("<s>", tokenizer.bos_token_id)
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[begin])
    return tokenizer


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    root = tmp_path_factory.mktemp("models")
    return [save(root / str(seed), seed=seed) for seed in range(3)]


def weights(setting: Setting) -> list[float]:
    return setting.ensemble.mixing.weights.tolist()  # type: ignore[attr-defined]


def test_siblings_are_a_setting_of_their_own() -> None:
    if not all((BUNDLED / name.removeprefix("bundled:")).is_dir() for name in SIBLINGS):
        pytest.skip("the bundled siblings are not in me_stats/models/bundled")
    setting = open_setting(SIBLINGS)
    assert setting.label == "bundled siblings"
    assert weights(setting) == [0.6, 0.4]
    assert setting.prompts == TEXT_PROMPTS
    assert [name for name, _ in setting.models] == list(SIBLINGS)
    assert [model for _, model in setting.models] == list(setting.ensemble.components)
    prompt = setting.ensemble.vocabulary.encode(setting.prompts[0])
    laws = [model.log_probs([prompt]) for model in setting.ensemble.components]
    assert not torch.allclose(*laws)
    trace = MESampler(setting.ensemble).sample(setting.prompts, max_new_tokens=8)
    assert len(trace.texts()) == len(TEXT_PROMPTS)


def test_several_models_are_mixed(folders: list[str]) -> None:
    two = open_setting(folders[:2])
    assert (two.label, two.prompts) == (f"{folders[0]} + {folders[1]}", CHAT_PROMPTS)
    assert weights(two) == [0.6, 0.4]
    three = open_setting(folders, dtype="bfloat16")
    assert weights(three) == pytest.approx([1 / 3] * 3, abs=1e-15)
    assert {model.dtype for _, model in three.models} == {torch.bfloat16}
    assert weights(open_setting(folders, weights=[0.5, 0.25, 0.25])) == [0.5, 0.25, 0.25]


def test_models_of_different_vocabularies_are_aligned_behind_their_begins(folders: list[str], tmp_path: Path) -> None:
    other = save(tmp_path / "begun", seed=7, tokenizer=begun(" the", "ing"))
    setting = open_setting([folders[0], other])
    assert setting.prompts == QUESTIONS
    assert setting.label == f"{folders[0]} + {other}"
    assert weights(setting) == [0.6, 0.4]
    (_, plain), (_, behind) = setting.models
    first, second = setting.ensemble.components
    assert isinstance(first, Aligned)
    assert isinstance(second, Aligned)
    assert first.model is plain  # its tokenizer puts nothing before a text
    assert isinstance(second.model, Conditioned)
    assert second.model.model is behind
    assert second.model.context == (behind.vocabulary.tokenizer.bos_token_id,)
    shared = first.shared
    assert second.shared is shared
    assert set(shared.strings) == {bytes([value]) for value in range(256)} | {b" the", b"ing"}
    ids = [behind.vocabulary.tokenizer.encode(text) for text in setting.prompts]
    expected = behind.log_probs([tuple(row) for row in ids]).exp()
    law = second.log_probs([setting.ensemble.vocabulary.encode(text) for text in setting.prompts]).exp()
    place = shared.strings.index(b"ing")
    token = behind.vocabulary.tokenizer.convert_tokens_to_ids("ing")
    kept = expected[:, [role in (Role.ORDINARY, Role.END) for role in second.token_bytes.roles]].sum(-1)
    assert torch.allclose(law[:, place], expected[:, token] / kept, atol=1e-5)
    assert len(MESampler(setting.ensemble).sample(setting.prompts, max_new_tokens=4).texts()) == len(QUESTIONS)


def test_the_siblings_of_two_vocabularies_complete_texts() -> None:
    setting = open_setting(MIXED_SIBLINGS)
    assert setting.label == "bundled siblings of two vocabularies"
    assert setting.prompts == TEXT_PROMPTS
    prose, words = setting.ensemble.components
    assert isinstance(prose, Aligned)
    assert isinstance(words, Aligned)
    assert isinstance(prose.model, TransformersModel)
    assert words.model.context == (2,)  # type: ignore[attr-defined]
    three = open_setting((*SIBLINGS, "bundled:words"))
    assert three.label == "bundled:prose + bundled:code + bundled:words"
    assert three.prompts == TEXT_PROMPTS
    assert {len(component.vocabulary.tokenizer.strings) for component in three.ensemble.components} == {
        len(prose.shared.strings)
    }


def test_one_model_without_a_chat_template_reads_the_system_prompts_as_text(folders: list[str]) -> None:
    setting = open_setting(folders[:1])
    assert setting.label == f"{folders[0]} under 2 prompts"
    assert setting.prompts == TEXT_PROMPTS
    assert weights(setting) == [0.6, 0.4]
    (name, model), components = setting.models[0], setting.ensemble.components
    assert name == folders[0]
    assert isinstance(model, TransformersModel)
    for component, system in zip(components, SYSTEM_PROMPTS, strict=True):
        assert isinstance(component, Conditioned)
        assert component.model is model  # one set of weights in memory
        assert model.vocabulary.decode(component.context) == f"{system}\n\n"
    trace = CESampler(setting.ensemble).sample(setting.prompts[0], max_new_tokens=3)
    assert len(trace.texts()) == 1


def test_chat_prompts_are_split_after_the_system_prompt(tmp_path: Path) -> None:
    setting = open_setting([save(tmp_path, chat_template=CHAT)])
    decode = setting.ensemble.vocabulary.decode
    for component, system in zip(setting.ensemble.components, SYSTEM_PROMPTS, strict=True):
        for text, prompt in zip(CHAT_PROMPTS, setting.prompts, strict=True):
            whole = decode((*component.context, *setting.ensemble.vocabulary.encode(prompt)))
            assert whole == f"<system>{system}</system><user>{text}</user><assistant>"
    prompt = setting.ensemble.vocabulary.encode(setting.prompts[0])
    laws = [component.log_probs([prompt]) for component in setting.ensemble.components]
    assert not torch.allclose(*laws)


@pytest.mark.parametrize(
    ("template", "message"),
    [
        (SYSTEM_LAST, "does not put the system prompt first"),
        (SYSTEM_IN_USER_TURN, "does not put the system prompt first"),
        (NO_SYSTEM, "takes no system prompt: no system role"),
    ],
)
def test_chat_template_with_the_system_prompt_elsewhere_is_refused(template: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        open_setting([save(tmp_path, chat_template=template)])


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ([0.5, 0.2, 0.3], "3 weights for 2 components"),
        ([0.5, 0.4], "sum to 1"),
        ([1.5, -0.5], "weights"),
        ([float("nan"), 1.0], "weights"),
    ],
)
def test_bad_weights_are_refused(folders: list[str], given: list[float], message: str) -> None:
    with pytest.raises(ValueError, match=message) as refusal:
        open_setting(folders[:2], weights=given)
    assert "\n" not in str(refusal.value)


def test_bad_models_are_refused(folders: list[str], tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="at least one model"):
        open_setting([])
    with pytest.raises(ValueError, match=r"^dtype must be one of"):
        open_setting(folders[:1], dtype="int4")  # type: ignore[arg-type]
    bare = tokenizers.Tokenizer(WordLevel({"a": 0, "</s>": 1, "?": 2}, unk_token="?"))
    words = PreTrainedTokenizerFast(tokenizer_object=bare, eos_token="</s>", unk_token="?")
    with pytest.raises(ValueError, match=r"words cannot be mixed .*\(WordLevel\) has neither byte-level .* fallback"):
        open_setting([folders[0], save(tmp_path / "words", tokenizer=words)])


@dataclass(frozen=True)
class _Config:
    models: tuple[str, ...] = SIBLINGS
    dtype: str = "bfloat16"


def test_a_recorded_setting_is_the_configs_and_names_its_models() -> None:
    recorder = Recorder("some", "Some experiment", _Config())
    setting = open_recorded(recorder, weights=[0.25, 0.75])
    assert weights(setting) == [0.25, 0.75]
    assert [(model["name"], model["dtype"]) for model in recorder.models] == [(name, "bfloat16") for name in SIBLINGS]


def test_a_gguf_name_is_served_here_in_the_precision_of_its_file() -> None:
    with pytest.raises(ValueError, match=r"smollm2-135m:gguf runs on the cpu.*leave dtype and device out"):
        open_setting(["smollm2-135m:gguf"], dtype="bfloat16")


def test_a_gguf_name_opens_a_server_under_two_prompts(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("xllamacpp", reason="needs xllamacpp: pip install me-stats[llamacpp]")
    from me_stats.models.catalog import CatalogError, pulled
    from me_stats.served import ServedME
    from me_stats.served.llamacpp import gguf_path

    try:
        gguf_path("smollm2-135m")
    except CatalogError as error:
        pytest.skip(str(error))
    if not pulled("smollm2-135m"):
        pytest.skip("the tokenizer of smollm2-135m is not on this machine: run 'me-stats models pull smollm2-135m'")
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    setting = open_setting(["smollm2-135m:gguf"])
    assert setting.label == "smollm2-135m:gguf under 2 prompts"
    trace = ServedME(setting.ensemble).sample(list(setting.prompts[:2]), max_new_tokens=5, seed=1)
    assert trace.lengths.tolist() == [5, 5]
    setting.models[0][1].client.close()
