"""Prompts, answers and files of the tasks, and what is said where one is not there."""

from __future__ import annotations

import json
import os
import re
import sys
from pathlib import Path
from typing import Any

import pytest

from me_stats.tasks import data as files
from me_stats.tasks.definitions import task
from tests.tasks.benchmark_files import COT, write

pytest.importorskip("lm_eval")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write(tmp_path)


@pytest.fixture
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    def unreachable(*_: Any, **__: Any) -> None:
        raise ConnectionError("no route to the hub\nsecond line")

    monkeypatch.setattr(datasets, "load_dataset", unreachable)


def prompt(one: Any, row: int = 0) -> str:
    return one.fewshot_context(one.eval_docs[row], one.config.num_fewshot)


def score(one: Any, row: int, text: str) -> float:
    return one.process_results(one.eval_docs[row], [text])["exact_match"]


def test_gsm8k(folder: Path) -> None:
    one = task("gsm8k", data=folder / "gsm8k")["gsm8k"]
    text = prompt(one, 3)
    assert text.startswith("Q: A tram has 18 passengers.")
    assert text.endswith("The answer is 39.\n\nQ: What is 3 thousand?\nA:")
    assert text.count("The answer is") == 8
    assert [score(one, 3, answer) for answer in (" 3000", "The answer is $3,000.", "4", "")] == [1, 1, 0, 0]
    short = task("gsm8k", data=folder / "gsm8k/test.jsonl", fewshot=0)["gsm8k"]
    assert prompt(short) == "Q: What is 0 thousand?\nA:"
    assert short.config.generation_kwargs == {"until": ["\nQ:"], "max_gen_toks": 400}


def test_the_exemplars_answer_themselves() -> None:
    from me_stats.tasks.answers import number
    from me_stats.tasks.exemplars import ARITHMETIC

    assert len(ARITHMETIC) == len({question for question, _ in ARITHMETIC}) == 8
    for _, worked in ARITHMETIC:
        sums = re.findall(r"([0-9.]+(?: [-+*/] [0-9.]+)+) = ([0-9]+)", worked)
        assert sums
        for left, right in sums:
            assert eval(left) == float(right)
        assert number(worked) == float(worked.rpartition(" ")[2].rstrip("."))


def test_bbh_is_the_published_prompt(folder: Path) -> None:
    tasks = task("bbh", data=folder / "bbh")
    assert list(tasks) == ["bbh:navigate", "bbh:snarks"]
    published = COT.partition("-----\n")[2]
    step = "A: Let's think step by step."
    assert prompt(tasks["bbh:navigate"], 1) == f"{published}\n\nQ: Is 1 even?\n{step}"
    spaced = published.replace("by step.\n", "by step. ")
    assert prompt(tasks["bbh:snarks"]).startswith(f"{spaced}\n\nQ: Which is 0?\nOptions:")
    assert [score(tasks["bbh:navigate"], 1, answer) for answer in ("So the answer is No.", "It is odd")] == [1, 0]
    assert [score(tasks["bbh:snarks"], 1, answer) for answer in ("the answer is (B).", "(A)")] == [1, 0]
    (alone,) = task("bbh:navigate", data=folder / "bbh/navigate.json", fewshot=1).values()
    assert prompt(alone).count(step) == 2


def test_arc_reads_the_options_as_letters(folder: Path) -> None:
    one = task("arc_challenge", data=folder / "arc_challenge")["arc_challenge"]
    text = prompt(one)
    assert text.endswith("Question: Which is 1?\nA. x\nB. y\nC. z\nAnswer:")
    assert text.count("Question:") == 1  # there is no split to show
    assert [score(one, 0, answer) for answer in (" B", "(b)", "A", "B planets", "Because")] == [1, 1, 0, 1, 0]
    assert one.eval_docs[5]["answer"] == "B"  # its options were numbered
    assert score(one, 5, "C") == 0
    lines = (folder / "arc_challenge/ARC-Challenge-Test.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    published = [
        {"id": row["id"], "answerKey": row["answerKey"], "question": {"stem": row["question"], "choices": [
            {"text": text, "label": label} for text, label in zip(*row["choices"].values(), strict=True)]}}
        for row in rows
    ]  # fmt: skip
    (folder / "arc_challenge/ARC-Challenge-Dev.jsonl").write_text("\n".join(map(json.dumps, published)))
    two = task("arc_challenge", data=folder / "arc_challenge", fewshot=2)["arc_challenge"]
    assert prompt(two).count("Answer:") == 3
    assert "Question: Which is 1?\nA. x\nB. y\nC. z\nAnswer: B\n\nQuestion: Which is 2?" in prompt(two)


def test_mmlu_is_a_group_of_subjects(folder: Path) -> None:
    tasks = task("mmlu", data=folder / "mmlu")
    assert list(tasks) == ["mmlu:anatomy", "mmlu:us_history"]
    text = prompt(tasks["mmlu:us_history"], 2)
    assert text.startswith("Questions about us history.")
    assert text.endswith("Question: What, if 2?\nA. w\nB. x\nC. y, and\nD. z\nAnswer:")
    assert text.count("Answer:") == 3
    rows = [{"question": "Q?", "choices": ["a", "b"], "answer": n % 2, "subject": "law"} for n in range(3)]
    (folder / "one.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (law,) = task("mmlu:law", data=folder / "one.jsonl").values()
    assert [row["answer"] for row in law.eval_docs] == ["A", "B", "A"]
    with pytest.raises(ValueError, match="mmlu:anatomi is no subject of the data; near it: anatomy"):
        task("mmlu:anatomi", data=folder / "mmlu")


def test_what_is_not_there_is_named_with_both_remedies(folder: Path, offline: None) -> None:
    with pytest.raises(ValueError, match=r"data: .*nowhere does not exist; give a folder with test.jsonl .* hub id"):
        task("gsm8k", data=folder / "nowhere")
    with pytest.raises(ValueError, match=r"data: openai/gsm8k could not be read from the hub \(no route to the hub\)"):
        task("gsm8k")
    with pytest.raises(ValueError, match=r"bbh has no test.jsonl; give a folder"):
        task("gsm8k", data=folder / "bbh")
    with pytest.raises(ValueError, match=r"has no ARC-Challenge-Test.jsonl or test.jsonl"):
        task("arc_challenge", data=folder / "bbh")
    with pytest.raises(ValueError, match=r"gsm8k has no \*.json with examples"):
        task("bbh", data=folder / "gsm8k")
    with pytest.raises(ValueError, match=r"bbh:navigat is no task; near it: navigate"):
        task("bbh:navigat", data=folder / "bbh")
    (folder / "bad.jsonl").write_text('{"question": "Why?"}\n')
    with pytest.raises(ValueError, match="row 1 of gsm8k has no 'answer'"):
        task("gsm8k", data=folder / "bad.jsonl")
    (folder / "bad.jsonl").write_text('{"question": "Why?", "answer": "#### 1"}\n{')
    with pytest.raises(ValueError, match=r"line 2 of .*bad.jsonl is no JSON"):
        task("gsm8k", data=folder / "bad.jsonl")
    (folder / "bad.jsonl").write_text('{"question": "Why?", "answer": "none"}\n')
    with pytest.raises(ValueError, match="question 0 of gsm8k has no number"):
        task("gsm8k", data=folder / "bad.jsonl")
    with pytest.raises(ValueError, match=r"fewshot: bbh:navigate has 2 answered questions to show in its data, got 3"):
        task("bbh:navigate", data=folder / "bbh", fewshot=3)
    with pytest.raises(ValueError, match="gsm8k is one task; leave out :easy"):
        task("gsm8k:easy", data=folder / "gsm8k")
    with pytest.raises(ValueError, match="closing_brackets is made of the standard library's files"):
        task("closing_brackets", data=folder)


def test_datasets_of_the_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    asked = []

    def stored(name: str, config: str, split: str) -> Any:
        asked.append((name, config, split))
        return [{"question": "Q?", "choices": ["a", "b"], "answer": 1, "subject": "law"}, {
            "question": "What is 1?", "answer": "#### 1"}, {"input": "Is it?", "target": "Yes"}][
                ["cais/mmlu", "openai/gsm8k", "lukaemon/bbh"].index(name):][:1]  # fmt: skip

    monkeypatch.setattr(datasets, "load_dataset", stored)
    assert task("mmlu")["mmlu:law"].eval_docs[0]["answer"] == "B"
    assert len(task("gsm8k")["gsm8k"].eval_docs) == 1
    assert prompt(task("bbh:navigate")["bbh:navigate"]) == "Q: Is it?\nA: Let's think step by step."
    assert asked == [("cais/mmlu", "all", "test"), ("cais/mmlu", "all", "dev"), ("openai/gsm8k", "main", "test"),
                     ("lukaemon/bbh", "navigate", "test")]  # fmt: skip
    assert len(files.BBH) == 27


def test_other_names_go_to_lm_eval(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import lm_eval.tasks

    class Bare(lm_eval.tasks.TaskManager):
        """Without the thousands of files that lm-eval reads first."""

        def __init__(self, include_defaults: bool = True) -> None:
            super().__init__(include_defaults=False)

    monkeypatch.setattr(lm_eval.tasks, "TaskManager", Bare)
    with pytest.raises(ValueError, match="gsm8kk is no task; near it: gsm8k"):
        task("gsm8kk")
    (tmp_path / "broken.yaml").write_text("task: broken\ndataset_path: no/such\ntest_split: test\n")
    with pytest.raises(ValueError, match=r"broken.yaml: lm-eval could not open this task \(.*be online"):
        task(str(tmp_path / "broken.yaml"))
    with pytest.raises(ValueError, match="data: arc_easy is a task of lm-eval, which brings its own"):
        task("arc_easy", data=tmp_path)
    (tmp_path / "rows.jsonl").write_text('{"q": "1 + 1 =", "a": "2"}\n{"q": "1 + 2 =", "a": "3"}\n')
    (tmp_path / "sums.yaml").write_text(
        f"task: sums\ndataset_path: json\ndataset_kwargs:\n  data_files: {{test: {tmp_path}/rows.jsonl}}\n"
        "test_split: test\noutput_type: generate_until\ndoc_to_text: '{{q}}'\ndoc_to_target: '{{a}}'\n"
        "generation_kwargs: {until: ['\\n'], max_gen_toks: 4}\n"
        "metric_list: [{metric: exact_match, aggregation: mean, higher_is_better: true}]\n"
    )
    (sums,) = task(str(tmp_path / "sums.yaml")).values()
    assert len(sums.eval_docs) == 2


def test_without_lm_eval_the_extra_is_named(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "lm_eval.api.task", None)
    with pytest.raises(ValueError, match=r"pip install 'me-stats\[lm-eval\]'"):
        task("gsm8k", data=folder / "gsm8k")


@pytest.mark.skipif("ME_STATS_DATA" not in os.environ, reason="ME_STATS_DATA names no folder with the benchmarks")
def test_the_published_files() -> None:
    folder = Path(os.environ["ME_STATS_DATA"])
    assert len(task("gsm8k", data=folder / "gsm8k")["gsm8k"].eval_docs) == 1319
    assert len(task("arc_challenge", data=folder / "arc_challenge")["arc_challenge"].eval_docs) == 1172
    tasks = task("bbh", data=folder / "bbh")
    assert sorted(tasks) == [f"bbh:{name}" for name in sorted(files.BBH)]
    assert sum(len(one.eval_docs) for one in tasks.values()) == 6511
    for name, one in tasks.items():
        worked = (folder / "bbh/cot-prompts" / f"{name[4:]}.txt").read_text(encoding="utf-8")
        assert prompt(one).startswith(worked.partition("-----\n")[2].strip() + "\n\nQ: ")
        for row in one.eval_docs:
            assert one.process_results(row, [f"It is so. So the answer is {row['target']}."]) == {"exact_match": 1.0}
