"""Runs of tasks: scores by item and seed, what is kept, and what goes on from it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from me_stats.models import Ensemble, Warped
from me_stats.models.warped import Greedy
from me_stats.presets import SIBLINGS, open_setting
from me_stats.samplers import CESampler, MESampler
from me_stats.tasks import run as module
from me_stats.tasks.definitions import _generation, _rolling, _task
from me_stats.tasks.run import ItemScores, evaluate, spread

pytest.importorskip("lm_eval")

WORDS = ["def f(x):\n", "import ", "class Node", "return ", "for x in "]


@pytest.fixture(scope="module")
def ensemble(one_thread: None) -> Ensemble:
    return open_setting(SIBLINGS).ensemble


def spaces(name: str = "spaces", count: int = 5, tokens: int = 4) -> Any:
    """Whether a space comes within some bytes: right now and then."""
    rows = [{"id": f"w{n}", "prompt": WORDS[n % 5], "target": " "} for n in range(count)]
    return _generation(name, rows, score=lambda row, text: " " in text, max_gen_toks=tokens, until=["\n"])


@given(st.integers(1, 500), st.integers(1, 600))
def test_items_are_spread_over_the_set(count: int, limit: int) -> None:
    found = spread(count, limit)
    assert len(found) == min(count, limit)
    assert found == sorted(set(found))
    assert 0 <= found[0] <= (count // limit) // 2 + 1
    assert found[-1] < count
    if len(found) > 1:
        gaps = np.diff(found)
        assert gaps.max() - gaps.min() <= 1
        assert abs(found[0] - (count - 1 - found[-1])) <= 1


def test_scores_are_those_of_the_texts(ensemble: Ensemble, tmp_path: Path) -> None:
    said: list[tuple[int, int, str]] = []
    found = evaluate(
        MESampler(ensemble), {"spaces": spaces()}, seeds=(3, 4), work=tmp_path / "new",
        progress=lambda *told: said.append(told),
    )["spaces"]  # fmt: skip
    assert isinstance(found, ItemScores)
    assert (found.metric, found.items, found.of) == ("exact_match", ("w0", "w1", "w2", "w3", "w4"), 5)
    assert found.scores.shape == (5, 2)
    for column, seed in enumerate((3, 4)):
        lines = [json.loads(line) for line in (tmp_path / f"new/spaces-seed{seed}.jsonl").read_text().splitlines()]
        texts = {line["item"]: line["answer"] for line in lines}
        assert found.scores[:, column].tolist() == [float(" " in texts[item]) for item in range(5)]
    assert found.mean == found.scores.mean()
    assert said[-1] == (10, 10, "spaces")
    assert [done for done, _, _ in said] == sorted(done for done, _, _ in said)
    # Runs differ, and the same seeds give the same.
    again = evaluate(MESampler(ensemble), {"spaces": spaces()}, seeds=(4, 3), batch_size=2)["spaces"]
    np.testing.assert_array_equal(again.scores, found.scores[:, ::-1])


def test_a_text_is_the_same_whatever_the_limit(ensemble: Ensemble, tmp_path: Path) -> None:
    for limit, folder in ((None, "all"), (2, "few")):
        scores = evaluate(CESampler(ensemble), {"spaces": spaces()}, limit=limit, work=tmp_path / folder)["spaces"]
    assert (scores.items, scores.of) == (("w1", "w3"), 5)
    every, few = ((tmp_path / folder / "spaces-seed0.jsonl").read_text().splitlines() for folder in ("all", "few"))
    assert set(few) <= set(every)
    assert len(few) == 2


def test_an_interrupted_run_goes_on(ensemble: Ensemble, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = evaluate(MESampler(ensemble), {"spaces": spaces()}, work=tmp_path / "whole")["spaces"]
    write, batches = module.HarnessLM._write, []

    def interrupted(self: Any, batch: Any) -> Any:
        batches.append(len(batch))
        if len(batches) == 2:
            raise KeyboardInterrupt
        return write(self, batch)

    monkeypatch.setattr(module.HarnessLM, "_write", interrupted)
    with pytest.raises(KeyboardInterrupt):
        evaluate(MESampler(ensemble), {"spaces": spaces()}, work=tmp_path, batch_size=2)
    path = tmp_path / "spaces-seed0.jsonl"
    assert len(path.read_text().splitlines()) == 2
    with path.open("a") as file:
        file.write('{"item": 4, "answ')  # as a power cut leaves it
    said: list[int] = []
    again = evaluate(
        MESampler(ensemble), {"spaces": spaces()}, work=tmp_path, batch_size=2,
        progress=lambda done, *_: said.append(done),
    )["spaces"]  # fmt: skip
    assert batches == [2, 2, 2, 1]
    assert said[0] == 2
    np.testing.assert_array_equal(again.scores, whole.scores)
    kept = [sorted((folder / path.name).read_text().splitlines()) for folder in (tmp_path, tmp_path / "whole")]
    assert kept[0] == kept[1]
    # All there: nothing is drawn. Another length is another text.
    evaluate(MESampler(ensemble), {"spaces": spaces()}, work=tmp_path)
    assert len(batches) == 4
    evaluate(MESampler(ensemble), {"spaces": spaces(tokens=3)}, work=tmp_path)
    assert batches[4:] == [5]
    # A damaged line is drawn again.
    lines = path.read_text().splitlines()
    path.write_text("\n".join([lines[0][:9], *lines[1:5]]) + "\n")
    evaluate(MESampler(ensemble), {"spaces": spaces()}, work=tmp_path)
    assert batches[5:] == [1]


def test_planted_answers_are_scored(ensemble: Ensemble) -> None:
    greedy = Warped(ensemble.components[1], Greedy())
    text = "def __init__(self):\n    self.x = "
    one = _generation("one", [{"id": "a", "prompt": text, "target": ""}, {"id": "b", "prompt": "def f", "target": ""}],
                      score=lambda row, answer: row["id"] == "a", max_gen_toks=2, until=["\n"])  # fmt: skip
    found = evaluate(greedy, {"one": one}, seeds=(0, 1))["one"]
    assert found.scores.tolist() == [[1, 1], [0, 0]]


def test_bits_per_byte_are_those_of_the_law(ensemble: Ensemble, tmp_path: Path) -> None:
    texts = ["import os\n", "The names of é\n"]
    rows = [{"id": str(n), "prompt": "", "target": text} for n, text in enumerate(texts)]
    found = evaluate(ensemble, {"bits": _rolling("bits", rows)}, seeds=(0, 1, 2), work=tmp_path)["bits"]
    assert (found.metric, found.scores.shape) == ("bits_per_byte", (2, 1))  # nothing is drawn: one run
    for row, text in enumerate(texts):
        tokens = (0, *text.encode())  # an end stands before the first byte
        laws = ensemble.log_probs([tokens[:place] for place in range(1, len(tokens))])
        bits = -sum(float(law[token]) for law, token in zip(laws, tokens[1:], strict=True)) / np.log(2)
        assert found.scores[row, 0] * (len(tokens) - 1) == pytest.approx(bits, rel=1e-4)
    again = evaluate(MESampler(ensemble), {"bits": _rolling("bits", rows)}, work=tmp_path)["bits"]
    np.testing.assert_array_equal(again.scores, found.scores)


def test_options_of_lm_eval_tasks_are_scored(ensemble: Ensemble) -> None:
    rows = [{"prompt": "import", "target": 1, "choices": ["qqq", "os"]},
            {"prompt": "def", "target": 0, "choices": ["f", "%"]}]  # fmt: skip
    choices = _task(rows, {"task": "choices", "output_type": "multiple_choice", "doc_to_choice": "choices",
                           "metric_list": [{"metric": name, "aggregation": "mean", "higher_is_better": True}
                                           for name in ("acc_norm", "acc")]})  # fmt: skip
    found = evaluate(ensemble, {"choices": choices}, seeds=(0, 1))["choices"]
    assert (found.metric, found.items, found.scores.tolist()) == ("acc", (0, 1), [[1.0], [1.0]])


def test_several_ways_to_read_an_answer_are_several_scores(ensemble: Ensemble) -> None:
    rows = [{"prompt": "def f(", "target": "x"}]
    filters = [{"name": name, "filter": [{"function": "take_first"}]} for name in ("strict", "loose")]
    several = _task(rows, {
        "task": "several", "output_type": "generate_until", "generation_kwargs": {"until": ["\n"], "max_gen_toks": 2},
        "filter_list": filters, "metric_list": [{"metric": "exact_match", "aggregation": "mean",
                                                 "higher_is_better": True}]})  # fmt: skip
    found = evaluate(ensemble, {"several": several}, max_new_tokens=1)
    assert list(found) == ["several,strict", "several,loose"]
    assert several.config.generation_kwargs["max_gen_toks"] == 1


def test_what_is_refused(ensemble: Ensemble) -> None:
    with pytest.raises(ValueError, match="at least one task"):
        evaluate(ensemble, {})
    with pytest.raises(ValueError, match="seeds must be distinct"):
        evaluate(ensemble, {"spaces": spaces()}, seeds=(1, 1))
    with pytest.raises(ValueError, match="limit must be at least 1"):
        evaluate(ensemble, {"spaces": spaces()}, limit=0)
    metric = {"metric": "word_perplexity", "aggregation": "weighted_perplexity", "higher_is_better": False}
    config = {"task": "words", "output_type": "loglikelihood_rolling", "metric_list": [metric]}
    rolling = _task([{"prompt": "", "target": "a b"}], config)
    with pytest.raises(ValueError, match="words has no metric with a number for each item, only word_perplexity"):
        evaluate(ensemble, {"words": rolling})
