"""Samplers as models of lm-eval: texts that depend on seed, task and document alone, and exact scores."""

from __future__ import annotations

import itertools
import json
import logging
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

pytest.importorskip("lm_eval")

from lm_eval.api.instance import Instance

from me_stats.mixing import ConstantMixing
from me_stats.models import Aligned, Ensemble, TableModel, TopK, TransformersModel, Warped
from me_stats.presets import SIBLINGS, open_setting
from me_stats.samplers import CESampler, MESampler, SpeculativeSampler
from me_stats.tasks import harness
from me_stats.tasks._lm_eval import load
from me_stats.tasks.harness import HarnessLM, stream_seed
from me_stats.vocabulary import Vocabulary
from me_stats.vocabulary_map import ByteStrings, TokenBytes
from tests.strategies import LastTokenMixing, OutsideModel

LETTERS = "abcd"


class Letters:
    """One letter an id."""

    def encode(self, text: str, add_special_tokens: bool = False) -> list[int]:
        return [LETTERS.index(letter) for letter in text]

    def decode(self, ids: Sequence[int]) -> str:
        return "".join(LETTERS[token] for token in ids)


def tables(context: int | None = None) -> list[TableModel]:
    found = [TableModel.random(4, seed=s, order=3, concentration=1.0, eos=(3,)) for s in (0, 1)]
    for table in found:
        table.vocabulary = Vocabulary(4, eos=(3,), tokenizer=Letters())
        if context is not None:
            table.context_length = context  # type: ignore[attr-defined]
    return found


def pair(context: int | None = None) -> Ensemble:
    return Ensemble(tables(context), ConstantMixing([0.3, 0.7]))


def over_strings() -> Ensemble:
    known = [TokenBytes.greedy([b"a", b"ab", b"c", b"b"]), TokenBytes.greedy([b"c", b"b", b"bc", b"a"])]
    shared = ByteStrings(known)
    parts = [TableModel.random(4, seed=s, order=2, concentration=1.0) for s in (0, 1)]
    rows = zip(parts, known, strict=True)
    return Ensemble([Aligned(part, shared, token_bytes=own) for part, own in rows], ConstantMixing([0.3, 0.7]))


MODELS: dict[str, Any] = {
    "constant weights": pair(),
    "a router": Ensemble(tables(), LastTokenMixing(np.random.default_rng(0).dirichlet(np.ones(2), 5))),
    "transformed": Warped(pair(), TopK(3)),
    "of someone else": Ensemble([OutsideModel(table) for table in tables()], ConstantMixing([0.3, 0.7])),
    "over byte strings": over_strings(),
    "one table": tables()[0],
}


def asked(kind: str, *arguments: tuple[Any, ...], task: str = "toy", repeats: int = 1) -> list[Instance]:
    return [
        Instance(kind, {}, given, 0, metadata=(task, number, repeats))  # type: ignore[arg-type]
        for number, given in enumerate(arguments)
    ]


def by_definition(model: Any, context: str, continuation: str) -> float:
    """Sum of the logs of next-token laws, each after its own prefix."""
    start, ids = model.vocabulary.encode(context), model.vocabulary.encode(context + continuation)
    laws = torch.as_tensor(model.log_probs([ids[:place] for place in range(len(start), len(ids))]))
    return float(sum(law[token] for law, token in zip(laws, ids[len(start) :], strict=True)))


# --- scores -----------------------------------------------------------------------------------------------------


def all_right(model: Any, *, atol: float = 1e-12) -> bool:
    pairs = [(context, "".join(rest)) for context in ("", "ab", "cc") for rest in itertools.product("abc", repeat=3)]
    found = HarnessLM(model).loglikelihood(asked("loglikelihood", *pairs))
    expected = [by_definition(model, *own) for own in pairs]  # -inf among them, where a transform cuts
    return np.allclose([log_p for log_p, _ in found], expected, rtol=0, atol=atol)


@pytest.mark.parametrize("name", MODELS)
def test_scores_are_those_of_the_definition(name: str) -> None:
    assert all_right(MODELS[name])


def test_scores_of_all_continuations_sum_to_one() -> None:
    pairs = [("ab", "".join(rest)) for rest in itertools.product(LETTERS, repeat=3)]
    found = HarnessLM(pair()).loglikelihood(asked("loglikelihood", *pairs))
    assert sum(np.exp(log_p) for log_p, _ in found) == pytest.approx(1, abs=1e-12)
    # Exactly one of them is what greedy decoding of the mixture writes.
    best = max(range(64), key=lambda place: found[place][1])
    assert [greedy for _, greedy in found].count(True) == 1
    ids = [LETTERS.index(letter) for letter in "ab"]
    for letter in pairs[best][1]:
        assert int(pair().log_probs([ids])[0].argmax()) == LETTERS.index(letter)
        ids.append(LETTERS.index(letter))


def mixes_logs(laws: Sequence[Tensor], log_weights: Tensor, tokens: Tensor) -> Tensor:
    return sum(log_weights[:, i].exp() * law.gather(1, tokens[:, None])[:, 0] for i, law in enumerate(laws))


def first_component_only(laws: Sequence[Tensor], log_weights: Tensor, tokens: Tensor) -> Tensor:
    return RIGHT(laws[:1], torch.zeros(len(tokens), 1), tokens)


def one_token_late(laws: Sequence[Tensor], log_weights: Tensor, tokens: Tensor) -> Tensor:
    return RIGHT([law[:-1] for law in laws], log_weights[:-1], tokens[1:])


def weights_of_the_first_token(laws: Sequence[Tensor], log_weights: Tensor, tokens: Tensor) -> Tensor:
    return RIGHT(laws, log_weights[:1].expand_as(log_weights), tokens)


RIGHT = harness._mixed


@pytest.mark.parametrize(
    ("bug", "name"),
    [
        (mixes_logs, "constant weights"),
        (first_component_only, "constant weights"),
        (one_token_late, "constant weights"),
        (weights_of_the_first_token, "a router"),
    ],
)
def test_planted_bugs_change_scores(bug: Any, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(harness, "_mixed", bug)
    assert not all_right(MODELS[name], atol=1e-3)


def test_choices_of_one_token_share_a_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    rows: list[int] = []
    right = harness.component_paths

    def counted(model: Any, prompts: Any, tokens: Any) -> Any:
        rows.append(len(prompts))
        return right(model, prompts, tokens)

    monkeypatch.setattr(harness, "component_paths", counted)
    pairs = [(context, choice) for context in ("ab", "ba") for choice in ("a", "b", "c", "bc", "ba")]
    heard: list[int] = []
    found = HarnessLM(pair(), progress=heard.append).loglikelihood(asked("loglikelihood", *pairs))
    assert rows == [4]
    assert sum(heard) == len(pairs)
    for own, (log_p, _) in zip(pairs, found, strict=True):
        assert log_p == pytest.approx(by_definition(pair(), *own), abs=1e-12)


@pytest.mark.parametrize(("double", "tolerance"), [(True, 1e-6), (False, 1e-5)])
def test_bundled_siblings_are_scored_token_by_token(double: bool, tolerance: float) -> None:
    model = open_setting(SIBLINGS).ensemble
    if double:  # float32 forwards of another batch shape differ by some 1e-6
        for component in model.components:
            component.network.double()
    pairs = [("The names of the ", "objects"), ("def f(", "self):"), ("x = ", "1"), ("x = ", "2")]
    found = HarnessLM(MESampler(model)).loglikelihood(asked("loglikelihood", *pairs))
    for (context, continuation), (log_p, greedy) in zip(pairs, found, strict=True):
        moved = context.rstrip()
        assert log_p == pytest.approx(by_definition(model, moved, context[len(moved) :] + continuation), abs=tolerance)
        prefix = list(model.vocabulary.encode(moved))
        best = []
        for token in model.vocabulary.encode(context + continuation)[len(prefix) :]:
            best.append(int(model.log_probs([prefix])[0].argmax()) == token)
            prefix.append(token)
        assert greedy == all(best)


def test_one_model_is_scored_as_the_harness_scores_it() -> None:
    pytest.importorskip("accelerate")
    words = TransformersModel("bundled:words")
    theirs = load("lm_eval.models.huggingface").HFLM(
        pretrained=TransformersModel("bundled:words", session="prefix").network,
        tokenizer=words.vocabulary.tokenizer,
        batch_size=1,
        max_length=50,
    )
    ours = HarnessLM(words)
    ours.encoder.window = 50
    pairs = [
        ("The names of the", " objects"),
        ("The names of ", "the"),
        ("", "class Node"),
        ("def f(x):\n", "  return"),
    ]
    scored = [lm.loglikelihood(asked("loglikelihood", *pairs)) for lm in (ours, theirs)]
    for own, other in zip(*scored, strict=True):
        assert own == (pytest.approx(other[0], abs=1e-4), other[1])
    theirs.add_bos_token = False  # else it scores a begin of sequence behind another one
    texts = [(text * 20,) for text in ("The names of the objects. ", "def f(self):\n    pass\n", "x")]
    rolled = [lm.loglikelihood_rolling(asked("loglikelihood_rolling", *texts)) for lm in (ours, theirs)]
    assert rolled[0] == pytest.approx(rolled[1], abs=1e-3)


# --- long texts -------------------------------------------------------------------------------------------------


def by_windows(model: Any, text: str, size: int) -> float:
    """Windows of `size` tokens by hand: the first predicts all of its own, each later one what is new."""
    ids, total, done = model.vocabulary.encode(text), 0.0, 0
    while done < len(ids):
        stop = min(len(ids), done + size)
        start = max(0, stop - size - 1)
        for place in range(done, stop):
            total += float(torch.as_tensor(model.log_probs([ids[start:place]]))[0, ids[place]])
        done = stop
    return total


@pytest.mark.parametrize("length", [1, 4, 5, 6, 10, 13])
def test_rolling_predicts_every_token_once(length: int) -> None:
    model, text = pair(context=6), ("abcabbcaacbab" * 2)[:length]
    assert HarnessLM(model).encoder.window == 5
    (found,) = HarnessLM(model).loglikelihood_rolling(asked("loglikelihood_rolling", (text,)))
    assert found == pytest.approx(by_windows(model, text, 5), abs=1e-12)
    (whole,) = HarnessLM(pair()).loglikelihood_rolling(asked("loglikelihood_rolling", (text,)))
    assert whole == pytest.approx(by_definition(pair(), "", text), abs=1e-12)
    # Windows that cut the context, overlap or skip would not give the same.
    if length > 6:
        assert abs(found - whole) > 1e-6
        assert abs(found - by_windows(model, text, 4)) > 1e-6
        assert abs(found - by_windows(model, text[1:], 5)) > 1e-6


def test_rolling_of_several_texts() -> None:
    texts = ["abc", "", "cab" * 4]
    heard: list[int] = []
    model = HarnessLM(pair(context=6), progress=heard.append)
    found = model.loglikelihood_rolling(asked("loglikelihood_rolling", *((text,) for text in texts)))
    assert found == [pytest.approx(by_windows(model.model, text, 5), abs=1e-12) for text in texts]
    assert found[1] == 0
    assert sum(heard) == 3


# --- texts ------------------------------------------------------------------------------------------------------

OPTIONS = {"until": ["bb", "d"], "max_gen_toks": 12}
CONTEXTS = ["a", "ab", "abc", "ca", "b", "cab"]


def written(requests: Sequence[Instance], sampler: Any = None, **options: Any) -> list[str]:
    return HarnessLM(MESampler(pair()) if sampler is None else sampler, **options).generate_until(requests)


def test_texts_depend_on_seed_task_and_document_alone() -> None:
    requests = asked("generate_until", *((context, OPTIONS) for context in CONTEXTS * 5))
    texts = written(requests)
    assert len(set(texts)) > 10
    for batch_size in (1, 2, 7):
        assert written(requests, batch_size=batch_size) == texts
    assert written(requests[:4]) == texts[:4]
    assert written(requests[::-1]) == texts[::-1]
    assert written(requests[5:9]) == texts[5:9]
    other = asked("generate_until", *((context, OPTIONS) for context in CONTEXTS * 5), task="other")
    together = written([request for both in zip(requests, other, strict=True) for request in both])
    assert together[::2] == texts
    assert together[1::2] == written(other) != texts
    assert written(requests, seed=1) != texts
    assert written(requests, CESampler(pair(), latent=True)) == texts


def test_texts_are_rows_of_the_sampler() -> None:
    (text,) = written(asked("generate_until", ("ab", {"max_gen_toks": 9}))[:1], seed=5)
    trace = MESampler(pair()).sample("ab", max_new_tokens=9, seed=stream_seed(5, "toy"), rows=[0])
    assert text == trace.texts()[0].removesuffix("d")


def test_repeats_are_draws_of_their_own() -> None:
    once = asked("generate_until", *((context, OPTIONS) for context in CONTEXTS), repeats=3)
    cloned = [request for request in once for _ in range(3)]
    texts = written(cloned)
    assert sum(len(set(texts[place : place + 3])) > 1 for place in range(0, 18, 3)) > 3
    assert written(cloned[3:9]) == texts[3:9]
    with pytest.raises(ValueError, match="requests hold document 0 of toy more often than its 3 repeats"):
        written([once[0]] * 4)


def test_an_interrupted_run_goes_on() -> None:
    requests = asked("generate_until", *((context, OPTIONS) for context in CONTEXTS))
    kept: dict[int, str] = {}
    texts = written(requests, batch_size=2, on_done=kept.__setitem__)
    assert kept == dict(enumerate(texts))
    some = {place: kept[place] for place in (0, 3)}
    again: dict[int, str] = {}
    heard: list[int] = []
    assert written(requests, answered=some.get, on_done=again.__setitem__, progress=heard.append) == texts
    assert set(again) == {1, 2, 4, 5}
    assert sum(heard) == 6


def test_texts_end_before_their_stop_string() -> None:
    contexts = [("a", {"until": until, "max_gen_toks": 30}) for until in (["bb", "ca"], "ca", ["", "c"], None)] * 10
    texts = written(asked("generate_until", *contexts))
    for text, (_, options) in zip(texts, contexts, strict=True):
        until = [options["until"]] if isinstance(options["until"], str) else options["until"] or []
        assert not any(string in text for string in until if string)
        assert "d" not in text
        assert len(text) <= 30
    lengths = asked("generate_until", ("a", {"max_new_tokens": 2}), ("a", {}))
    assert [len(text) <= most for text, most in zip(written(lengths, max_new_tokens=3), (2, 3), strict=True)]


def test_options_that_would_change_the_law_are_named_once(caplog: pytest.LogCaptureFixture) -> None:
    free = asked("generate_until", *((context, OPTIONS) for context in CONTEXTS))
    asking = {**OPTIONS, "temperature": 0.0, "do_sample": False}
    with caplog.at_level(logging.WARNING):
        texts = written(asked("generate_until", *((context, asking) for context in CONTEXTS)))
    assert texts == written(free)
    (message,) = [record.getMessage() for record in caplog.records]
    assert message.startswith("MESampler ignores do_sample=False, temperature=0.0 of the task")


def test_prompts_without_room_lose_their_oldest_tokens(caplog: pytest.LogCaptureFixture) -> None:
    options = {"max_gen_toks": 4}
    long = asked("generate_until", ("cabcab" + "abc", options), ("abc", options))
    lm = HarnessLM(MESampler(pair(context=7)))
    with caplog.at_level(logging.WARNING):
        texts = lm.generate_until(long)
    assert texts == written(asked("generate_until", ("abc", options), ("abc", options)))
    assert lm.truncated == {"toy": 1}
    assert [record.getMessage() for record in caplog.records] == [
        "1 prompts of toy did not fit and lost their oldest tokens"
    ]
    (found,) = lm.loglikelihood(asked("loglikelihood", ("cabcab" + "abcab", "ca")))
    assert found[0] == pytest.approx(by_definition(pair(), "abcab", "ca"), abs=1e-12)
    assert lm.truncated["toy"] == 2
    greedy = SpeculativeSampler(pair(), pair(context=7))
    assert HarnessLM(greedy).encoder.fit((0,) * 9, 4) == (0,) * 3


# --- the model itself -------------------------------------------------------------------------------------------


def test_what_cannot_be_a_model_is_refused() -> None:
    with pytest.raises(ValueError, match=r"HarnessLM counts rows as independent, and MESampler has shared_rows=2"):
        HarnessLM(MESampler(pair(), shared_rows=2))
    with pytest.raises(ValueError, match="has no tokenizer"):
        HarnessLM(TableModel.random(3, seed=0))
    with pytest.raises(ValueError, match="has no chat template"):
        HarnessLM(pair(), chat=True)
    with pytest.raises(TypeError, match="must be a LanguageModel"):
        HarnessLM("gpt2")
    with pytest.raises(ValueError, match="one draw for all repeats and seeds"):
        HarnessLM(pair()).set_cache_hook(None)
    with pytest.raises(ValueError, match="has no chat template"):
        HarnessLM(pair()).apply_chat_template([{"role": "user", "content": "a"}])
    assert HarnessLM(pair()).chat_template(False) is None
    assert HarnessLM(pair(), name="mine").name == "mine"
    assert HarnessLM(pair()).tokenizer_name == "me_stats-ids"


def test_without_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "lm_eval.api.model", None)
    with pytest.raises(ValueError, match=r"lm_eval needs the extra: pip install 'me-stats\[lm-eval\]'"):
        HarnessLM(pair())
    with pytest.raises(ValueError, match="needs the extra"):
        load("lm_eval.api.model")


def task_of(path: Path, kind: str, **config: Any) -> Any:
    return load("lm_eval.api.task").ConfigurableTask(
        config={
            "task": kind, "output_type": kind, "dataset_path": "json", "test_split": "test", "num_fewshot": 0,
            "dataset_kwargs": {"data_files": {"test": str(path)}, "cache_dir": str(path.parent / "cache")},
            "doc_to_text": "{{question}}", "doc_to_target": "{{answer}}", **config,
        }
    )  # fmt: skip


def test_the_harness_runs_end_to_end(tmp_path: Path) -> None:
    path = tmp_path / "questions.jsonl"
    rows = [
        {"question": "def f(", "answer": "x", "choices": ["self):", "zzq"]},
        {"question": "The names of the ", "answer": "y", "choices": ["a", "names"]},
        {"question": "class ", "answer": "Node", "choices": ["Node", "def"]},
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    texts = task_of(
        path, "generate_until", generation_kwargs={"until": ["\n", " "], "max_gen_toks": 12}, repeats=2,
        metric_list=[{"metric": "exact_match"}],
    )  # fmt: skip
    choices = task_of(
        path, "multiple_choice", doc_to_choice="{{choices}}", doc_to_target=0, metric_list=[{"metric": "acc"}]
    )
    model = HarnessLM(MESampler(open_setting(SIBLINGS).ensemble), seed=3)
    found = load("lm_eval.evaluator").simple_evaluate(
        model, tasks=[texts, choices], limit=2, bootstrap_iters=0, log_samples=True,
        task_manager=load("lm_eval.tasks").TaskManager(include_defaults=False),
    )  # fmt: skip
    asked_ = rows[:2]
    drawn = [sample["resps"][0] for sample in found["samples"]["generate_until"]]
    requests = [
        request
        for number, row in enumerate(asked_)
        for request in [Instance("generate_until", row, (row["question"], texts.config.generation_kwargs), 0,
                                 metadata=("generate_until", number, 2))] * 2
    ]  # fmt: skip
    expected = HarnessLM(MESampler(open_setting(SIBLINGS).ensemble), seed=3, batch_size=1).generate_until(requests)
    assert [text for own in drawn for text in own] == expected
    right = [
        by_definition(model.model, row["question"].rstrip(), row["question"][len(row["question"].rstrip()) :] + choice)
        for row in asked_
        for choice in (f" {choice}" for choice in row["choices"])
    ]
    scores = [
        score for sample in found["samples"]["multiple_choice"] for score, _ in (own[0] for own in sample["resps"])
    ]
    assert scores == [pytest.approx(value, abs=1e-4) for value in right]
    acc = np.mean([right[place] > right[place + 1] for place in range(0, len(right), 2)])
    assert found["results"]["multiple_choice"]["acc,none"] == pytest.approx(float(acc))
