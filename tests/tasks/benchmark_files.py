"""Small files in the published formats of the benchmarks, with made-up questions."""

from __future__ import annotations

import json
from pathlib import Path

COT = """BENCHMARK DATA SHOULD NEVER APPEAR
-----
Say whether a number is even.

Q: Is 2 even?
A: Let's think step by step.
2 is 2 * 1. So the answer is Yes.

Q: Is 3 even?
Options:
- Yes
- No
A: Let's think step by step.
3 is 2 + 1.
It is odd. So the answer is No."""


def write(folder: Path, rows: int = 6) -> Path:
    """Folders gsm8k, arc_challenge, bbh and mmlu."""
    numbers = range(rows)
    sums = [{"question": f"What is {n} thousand?", "answer": f"It is {n} * 1000.\n#### {n},000"} for n in numbers]
    _jsonl(folder / "gsm8k/test.jsonl", sums)
    arc = [{"id": f"q{n}", "question": f"Which is {n}?", "answerKey": "ABC"[n % 3],
            "choices": {"text": ["x", "y", "z"], "label": ["A", "B", "C"]}} for n in numbers]  # fmt: skip
    counted = {"choices": {"text": ["x", "y"], "label": ["1", "2"]}, "answerKey": "2"}
    _jsonl(folder / "arc_challenge/ARC-Challenge-Test.jsonl", [*arc[1:], arc[0] | counted])
    tasks = {
        "navigate": [{"input": f"Is {n} even?", "target": "No" if n % 2 else "Yes"} for n in numbers],
        "snarks": [{"input": f"Which is {n}?\nOptions:\n(A) x\n(B) y", "target": "(B)"} for n in numbers],
    }
    for name, examples in tasks.items():
        _write(folder / f"bbh/{name}.json", json.dumps({"canary": "", "examples": examples}))
    _write(folder / "bbh/SOURCE.json", "{}")
    _write(folder / "bbh/cot-prompts/navigate.txt", COT)
    _write(folder / "bbh/cot-prompts/snarks.txt", COT.replace("by step.\n", "by step. "))
    for subject in ("anatomy", "us_history"):
        lines = [f'"What, if {n}?",w,x,"y, and",z,{"ABCD"[n % 4]}' for n in numbers]
        for split, kept in (("test", lines), ("dev", lines[:2])):
            _write(folder / f"mmlu/{split}/{subject}_{split}.csv", "\n".join(kept) + "\n")
    return folder


def _jsonl(path: Path, rows: list[dict]) -> None:
    _write(path, "\n".join(map(json.dumps, rows)) + "\n")


def _write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
