"""Texts as prompts: one begin of sequence, pairs split as the harness splits them, room, and chats."""

from __future__ import annotations

import logging
from typing import Any

import pytest

from me_stats.mixing import ConstantMixing
from me_stats.models import Conditioned, Ensemble, MarkovModel, TableModel, TransformersModel, Warped
from me_stats.presets import MIXED_SIBLINGS, SIBLINGS, open_setting
from me_stats.tasks.encoding import Encoder, inside
from me_stats.vocabulary import Vocabulary

TEMPLATE = (
    "{{ bos_token }}{% for turn in messages %}{% if turn.role == 'system' and strict %}{{ raise_exception('no') }}"
    "{% endif %}[{{ turn.role }}]{{ turn.content }}{% endfor %}{% if add_generation_prompt %}[assistant]{% endif %}"
)
TURNS = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Why?"}]


@pytest.fixture(scope="module")
def words() -> TransformersModel:
    """A tokenizer with a begin of sequence."""
    return TransformersModel("bundled:words")


class Letters:
    """One letter an id, and nothing of what Hugging Face's have."""

    def encode(self, text: str, add_special_tokens: bool = False) -> list[int]:
        return [ord(letter) - ord("a") for letter in text]

    def decode(self, ids: Any) -> str:
        return "".join(chr(ord("a") + token) for token in ids)


def toy(context: int | None = None) -> MarkovModel:
    model = MarkovModel.random(5, seed=0, eos=(4,))
    model.vocabulary = Vocabulary(5, eos=(4,), tokenizer=Letters())
    if context is not None:
        model.context_length = context  # type: ignore[attr-defined]
    return model


# --- the begin of sequence ----------------------------------------------------------------------------------


def test_the_begin_comes_once(words: TransformersModel) -> None:
    begin = words.vocabulary.tokenizer.bos_token_id
    encoder = Encoder(words)
    plain = words.vocabulary.encode("a house")
    assert encoder.begin == (begin,)
    assert encoder.prompt("a house") == (begin, *plain)
    assert encoder.prompt("<s>a house").count(begin) == 1
    assert encoder.prompt("") == (begin,)
    assert encoder.pair("a", " house") == ((begin, *words.vocabulary.encode("a")), encoder.prompt("a house")[2:])
    for text in ("house", "<s>house"):
        context, continuation = encoder.pair("", text)
        assert context == (begin,)
        assert begin not in continuation
    # A context that comes first has it already.
    behind = Encoder(Ensemble([Conditioned(words, "<s>one"), Conditioned(words, "<s>two")], ConstantMixing([0.5, 0.5])))
    assert behind.begin == ()
    assert behind.nothing == ()


class Silent(Letters):
    """Has a begin of sequence and does not write it."""

    bos_token_id = 2


def test_what_is_read_where_there_is_nothing() -> None:
    silent = toy()
    silent.vocabulary = Vocabulary(5, eos=(4,), tokenizer=Silent())
    assert Encoder(silent).begin == ()
    assert Encoder(silent).nothing == (2,)
    assert Encoder(silent).pair("", "ab") == ((2,), (0, 1))
    prose = TransformersModel("bundled:prose")
    assert Encoder(prose).begin == ()
    assert Encoder(prose).nothing == prose.vocabulary.eos == (0,)
    assert Encoder(prose).pair("", "ab") == ((0,), prose.vocabulary.encode("ab"))
    assert Encoder(toy()).nothing == ()
    with pytest.raises(ValueError, match="has no tokenizer, and tasks are texts"):
        Encoder(MarkovModel.random(3, seed=0))


# --- pairs ----------------------------------------------------------------------------------------------------


def test_spaces_go_to_the_continuation_and_the_whole_is_split(words: TransformersModel) -> None:
    encoder, encode = Encoder(words), words.vocabulary.encode
    head = encoder.begin
    whole = (*head, *encode("The answer is yes"))
    context = (*head, *encode("The answer is"))
    for pair in (("The answer is", " yes"), ("The answer is ", "yes"), ("The answer", " is yes")):
        before, after = encoder.pair(*pair)
        assert before + after == whole
    assert encoder.pair("The answer is  ", "yes")[0] == context
    assert encoder.pair("The answer is ", "yes") == (context, whole[len(context) :])
    spaces, after = encoder.pair("  ", "yes")
    assert spaces == encoder.nothing
    assert after == encode("  yes")
    with pytest.raises(ValueError, match="the continuation '' adds no token"):
        encoder.pair("The answer", "")
    with pytest.raises(ValueError, match="adds no token"):
        encoder.pair("", "")


# --- room -----------------------------------------------------------------------------------------------------


def test_the_oldest_tokens_go_first() -> None:
    encoder = Encoder(toy(context=6))
    assert encoder.fit((0, 1, 2), 3) == (0, 1, 2)
    assert encoder.fit((0, 1, 2, 3, 0, 1), 3) == (3, 0, 1)
    assert encoder.fit((0, 1, 2, 3, 0, 1), 5) == (1,)
    with pytest.raises(ValueError, match=r"6 tokens leave no room for a prompt in a context of 6; lower max_gen_toks"):
        encoder.fit((0, 1), 6)
    assert Encoder(toy()).fit((0,) * 10_000, 10_000) == (0,) * 10_000
    assert Encoder(toy()).window is None
    assert encoder.window == 5


def test_the_begin_stays_and_the_draft_counts() -> None:
    encoder = Encoder(toy(context=20), also=[toy(context=6)])
    encoder.begin = (4,)
    assert encoder.fit((4, 0, 1, 2, 3), 3) == (4, 2, 3)
    assert encoder.fit((0, 1, 2, 3), 3) == (1, 2, 3)


def test_models_over_byte_strings_are_asked_for_their_own_tokens() -> None:
    ensemble = open_setting(MIXED_SIBLINGS).ensemble
    encoder = Encoder(Warped(ensemble))
    assert encoder.begin == encoder.nothing == ()
    networks = [part for part in inside(ensemble) if isinstance(part, TransformersModel)]
    text = "The names of the " * 600
    prompt = encoder.prompt(text)
    short = encoder.fit(prompt, 100)
    assert prompt[-len(short) :] == short
    assert len(short) < len(prompt)
    own = [len(part.read(ensemble.components[0].shared.bytes_of(short))) for part in ensemble.components]
    limits = [network.context_length or 0 for network in networks]
    assert all(length + 200 <= limit for length, limit in zip(own, limits, strict=True))
    assert any(length + 200 > limit - 8 for length, limit in zip(own, limits, strict=True))


# --- chats ----------------------------------------------------------------------------------------------------


def chatty(template: str | None, name: str = "bundled:words") -> TransformersModel:
    model = TransformersModel(name)
    model.vocabulary.tokenizer.chat_template = template
    return model


def both(*templates: str | None) -> Ensemble:
    return Ensemble([chatty(template) for template in templates], ConstantMixing([0.5, 0.5]))


def test_the_one_template_is_used_once() -> None:
    encoder = Encoder(both(TEMPLATE, TEMPLATE))
    text = encoder.chat(TURNS)
    assert text == "<s>[system]Be brief.[user]Why?[assistant]"
    assert encoder.chat_template == TEMPLATE
    begin = encoder.vocabulary.tokenizer.bos_token_id
    assert encoder.prompt(text).count(begin) == 1
    opened = [*TURNS, {"role": "assistant", "content": "Because"}]
    assert encoder.chat(opened, reply=False).endswith("[assistant]Because")


def test_a_template_without_a_system_prompt(caplog: pytest.LogCaptureFixture) -> None:
    encoder = Encoder(both(*["{% set strict = true %}" + TEMPLATE] * 2))
    with caplog.at_level(logging.WARNING):
        assert encoder.chat(TURNS) == "<s>[user]Why?[assistant]"
    assert "takes no system prompt" in caplog.text


def test_templates_that_differ_are_refused_by_name() -> None:
    with pytest.raises(ValueError, match=r"bundled:words have different chat templates.*plain prompts"):
        _ = Encoder(both(TEMPLATE, TEMPLATE + " ")).chat_template
    with pytest.raises(ValueError, match=r"bundled:words has no chat template; use plain prompts"):
        Encoder(both(TEMPLATE, None)).chat(TURNS)
    siblings = Encoder(open_setting(SIBLINGS).ensemble)
    with pytest.raises(ValueError, match=r"bundled:prose, bundled:code has no chat template"):
        siblings.chat(TURNS)
    mixed = Encoder(open_setting(MIXED_SIBLINGS).ensemble)
    with pytest.raises(ValueError, match=r"over the byte strings of bundled:prose, bundled:words"):
        mixed.chat(TURNS)


def test_all_models_inside() -> None:
    tables = [TableModel.random(3, seed=s) for s in (0, 1)]
    ensemble = Ensemble([Conditioned(tables[0], [1]), tables[1]], ConstantMixing([0.5, 0.5]))
    assert [type(part).__name__ for part in inside(Warped(ensemble))] == [
        "Warped", "Ensemble", "Conditioned", "TableModel", "TableModel",
    ]  # fmt: skip
