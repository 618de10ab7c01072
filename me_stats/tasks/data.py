"""Questions of the benchmarks from files in their published formats, or from the Hugging Face hub.

Every reader gives plain rows. Nothing is copied or cached here, and an absent file is named with both remedies.
"""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from me_stats.tasks._lm_eval import load

Row = dict[str, Any]

HUB = {"gsm8k": "openai/gsm8k", "arc_challenge": "allenai/ai2_arc", "mmlu": "cais/mmlu", "bbh": "lukaemon/bbh"}
FILES = {
    "gsm8k": "test.jsonl (question, answer) of openai/grade-school-math",
    "arc_challenge": "ARC-Challenge-Test.jsonl (id, question, choices, answerKey)",
    "mmlu": "test/*_test.csv and dev/*_dev.csv as published, or test.jsonl (question, choices, answer, subject)",
    "bbh": "*.json (examples of input and target) and cot-prompts/*.txt of suzgunmirac/BIG-Bench-Hard",
}
BBH = (
    "boolean_expressions", "causal_judgement", "date_understanding", "disambiguation_qa", "dyck_languages",
    "formal_fallacies", "geometric_shapes", "hyperbaton", "logical_deduction_five_objects",
    "logical_deduction_seven_objects", "logical_deduction_three_objects", "movie_recommendation",
    "multistep_arithmetic_two", "navigate", "object_counting", "penguins_in_a_table",
    "reasoning_about_colored_objects", "ruin_names", "salient_translation_error_detection", "snarks",
    "sports_understanding", "temporal_sequences", "tracking_shuffled_objects_five_objects",
    "tracking_shuffled_objects_seven_objects", "tracking_shuffled_objects_three_objects", "web_of_lies", "word_sorting",
)  # fmt: skip
_TEST, _DEV = ("ARC-Challenge-Test", "test"), ("ARC-Challenge-Dev", "dev", "validation", "ARC-Challenge-Train", "train")


@dataclass(frozen=True)
class Questions:
    """`rows` to answer; `shots` with their answers shown, to stand before a question; and a line about them all."""

    rows: list[Row]
    shots: list[Row]
    description: str = ""


def gsm8k(source: str | Path | None) -> list[Row]:
    """Rows of question and answer, the latter as text that ends in ``#### number``."""
    place = _place("gsm8k", source)
    if isinstance(place, str):
        rows = _hub("gsm8k", place, "main", "test")
    else:
        rows = _jsonl(place if place.is_file() else _need("gsm8k", place, ["test.jsonl"]))
    return _checked("gsm8k", rows, ("question", "answer"))


def arc_challenge(source: str | Path | None) -> tuple[list[Row], list[Row]]:
    """Rows of id, question, options and answer (a letter), of the test split and of a split to show; often empty."""
    place = _place("arc_challenge", source)
    if isinstance(place, str):
        found = [_hub("arc_challenge", place, "ARC-Challenge", split) for split in ("test", "validation")]
    elif place.is_file():
        found = [_jsonl(place), []]
    else:
        test = _need("arc_challenge", place, [f"{name}.jsonl" for name in _TEST])
        found = [_jsonl(test), _optional(place, [f"{name}.jsonl" for name in _DEV])]
    test_rows, dev_rows = (
        [_arc(row) for row in _checked("arc_challenge", rows, ("question", "answerKey"))] for rows in found
    )
    return test_rows, dev_rows


def mmlu(source: str | Path | None) -> dict[str, tuple[list[Row], list[Row]]]:
    """By subject: rows of question, options and answer (a letter), of the test split and of the dev split."""
    place = _place("mmlu", source)
    if isinstance(place, str):
        found = [_hub("mmlu", place, "all", split) for split in ("test", "dev")]
    elif place.is_file():
        found = [_jsonl(place), []]
    else:
        tables = [sorted(place.glob(f"**/{split}/*_{split}.csv")) for split in ("test", "dev")]
        if tables[0]:
            found = [[row for path in paths for row in _csv(path)] for paths in tables]
        else:
            found = [_jsonl(_need("mmlu", place, ["test.jsonl"])), _optional(place, ["dev.jsonl", "validation.jsonl"])]
    subjects: dict[str, tuple[list[Row], list[Row]]] = {}
    for split, rows in enumerate(found):
        for row in _checked("mmlu", rows, ("question", "choices", "answer")):
            one = {"question": row["question"], "options": list(row["choices"]), "answer": _letter(row["answer"])}
            subjects.setdefault(str(row.get("subject") or "all"), ([], []))[split].append(one)
    return {name: found for name, found in sorted(subjects.items()) if found[0]}


def bbh(source: str | Path | None, name: str | None = None) -> dict[str, Questions]:
    """By task, or of one task: input and target of each row, and the published worked answers where they are there."""
    place = _place("bbh", source)
    if isinstance(place, str):
        return {one: Questions(_checked("bbh", _hub("bbh", place, one, "test"), ("input", "target")), [])
                for one in ([name] if name else BBH)}  # fmt: skip
    paths = [place] if place.is_file() else sorted(place.glob("*.json")) or sorted(place.glob("bbh/*.json"))
    if name is not None:
        paths = [path for path in paths if path.stem == name]
    tasks = {}
    for path in paths:
        read = _json(path)
        if isinstance(read, dict) and "examples" in read:
            rows = _checked(path.name, read["examples"], ("input", "target"))
            folders = (path.parent / "cot-prompts", path.parent.parent / "cot-prompts")
            worked = next((file for folder in folders if (file := folder / f"{path.stem}.txt").is_file()), None)
            about, shots = _worked(worked) if worked else ("", [])
            tasks[path.stem] = Questions(rows, shots, about)
    if not tasks:
        raise ValueError(f"data: {place} has no {name or '*'}.json with examples; {_remedies('bbh')}")
    return tasks


def _worked(path: Path) -> tuple[str, list[Row]]:
    """The line about the task, and question and answer of each example, of a file of cot-prompts."""
    text = path.read_text(encoding="utf-8").partition("-----\n")[2]
    about, *examples = re.split(r"\n\nQ: ", text.strip())
    shots = []
    for example in examples:
        question, mark, answer = example.partition("\nA: Let's think step by step.")
        if not mark or not answer[:1].isspace():
            raise ValueError(f'data: {path.name} has an example without "A: Let\'s think step by step."')
        shots.append({"input": question, "worked": answer.strip(), "before": answer[0]})  # a space or a new line
    return about.strip(), shots


def _arc(row: Row) -> Row:
    question, choices = row["question"], row.get("choices")
    if isinstance(question, Mapping):  # as AI2 published it
        question, choices = question["stem"], question.get("choices")
    if isinstance(choices, Mapping):
        labels, texts = list(choices["label"]), list(choices["text"])
    else:
        labels, texts = ([one[name] for one in choices or ()] for name in ("label", "text"))
    if row["answerKey"] not in labels:
        raise ValueError(f"data: the answer {row['answerKey']!r} of {row.get('id')} is none of {labels}")
    answer = "ABCDEFGH"[labels.index(row["answerKey"])]  # some questions number their options
    return {"id": row.get("id"), "question": question, "options": texts, "answer": answer}


def _letter(answer: Any) -> str:
    """The letter that an answer is, or counts to."""
    text = str(answer).strip().upper()
    if not re.fullmatch("[0-7A-H]", text):
        raise ValueError(f"data: the answer {answer!r} is neither a letter nor the number of an option")
    return "ABCDEFGH"[int(text)] if text.isdigit() else text


def _place(task: str, source: str | Path | None) -> Path | str:
    """A path that exists, or the id of a dataset of the hub."""
    if source is None:
        return HUB[task]
    path = Path(source)
    if path.exists():
        return path
    if isinstance(source, str) and re.fullmatch(r"[\w.-]+/[\w.-]+", source) and not path.suffix:
        return source
    raise ValueError(f"data: {source} does not exist; {_remedies(task)}")


def _remedies(task: str) -> str:
    return f"give a folder with {FILES[task]}, or be online and give the hub id {HUB[task]}"


def _need(task: str, folder: Path, names: Sequence[str]) -> Path:
    for name in names:
        if (folder / name).is_file():
            return folder / name
    raise ValueError(f"data: {folder} has no {' or '.join(names)}; {_remedies(task)}")


def _optional(folder: Path, names: Sequence[str]) -> list[Row]:
    return next((_jsonl(folder / name) for name in names if (folder / name).is_file()), [])


def _jsonl(path: Path) -> list[Row]:
    rows = []
    for number, line in enumerate(path.read_text(encoding="utf-8").split("\n"), start=1):
        if line.strip():
            try:
                rows.append(json.loads(line))
            except ValueError as error:
                raise ValueError(f"data: line {number} of {path} is no JSON ({error})") from error
    return rows


def _json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"data: {path} is no JSON ({error})") from error


def _csv(path: Path) -> Iterable[Row]:
    subject = path.stem.rpartition("_")[0]
    with path.open(encoding="utf-8", newline="") as file:
        for number, cells in enumerate(csv.reader(file), start=1):
            if len(cells) < 4:
                raise ValueError(f"data: line {number} of {path} has {len(cells)} cells, not question, options, answer")
            yield {"question": cells[0], "choices": cells[1:-1], "answer": cells[-1], "subject": subject}


def _checked(task: str, rows: Iterable[Any], fields: Sequence[str]) -> list[Row]:
    rows = list(rows)
    for number, row in enumerate(rows, start=1):
        absent = [name for name in fields if not isinstance(row, Mapping) or name not in row]
        if absent:
            raise ValueError(f"data: row {number} of {task} has no {absent[0]!r}; a row has {', '.join(fields)}")
    return rows


def _hub(task: str, place: str, config: str, split: str) -> list[Row]:
    load_dataset = load("datasets").load_dataset
    try:
        return [dict(row) for row in load_dataset(place, config, split=split)]
    except Exception as error:  # of many libraries: network, files, formats
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise ValueError(f"data: {place} could not be read from the hub ({reason}); {_remedies(task)}") from error
