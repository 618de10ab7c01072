"""Tasks of the paper's tables, and some that need no download, as tasks of the lm-evaluation-harness.

========================  =============================================================================================
``gsm8k``                 word problems, chain of thought behind eight worked ones; the last number or "the answer is"
``bbh``, ``bbh:NAME``     BIG-Bench Hard, its published chains of thought; the phrase after "the answer is"
``arc_challenge``         science questions; the letter of an option
``mmlu``, ``mmlu:NAME``   questions of 57 subjects; the letter of an option
``closing_brackets``      unseen code of the standard library, cut within brackets: does the line close them all?
``indentation``           unseen code, cut where a block opens: is the next line indented by the right step?
``stdlib_bpb``            bits per byte of unseen code and prose of the standard library
========================  =============================================================================================

Any other name goes to lm-eval: one of its tasks, or a YAML file. A score is 1 where the answer is exactly the right
one and 0 elsewhere; a text in which no answer is found is wrong, not an error.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from me_stats.tasks import answers, data, stdlib
from me_stats.tasks._lm_eval import load
from me_stats.tasks.data import Row
from me_stats.tasks.exemplars import ARITHMETIC

Task = Any  # lm_eval.api.task.Task, which is not imported before it is needed
Score = Callable[[Row, str], bool]

BENCHMARKS = ("gsm8k", "mmlu", "bbh", "arc_challenge")
BUNDLED = ("closing_brackets", "indentation", "stdlib_bpb")
_SHOWN = 5  # questions before one of a letter, where there are such
_LETTERS = "ABCDEFGH"


def task(name: str, *, data: str | Path | None = None, fewshot: int | None = None) -> dict[str, Task]:
    """The tasks of this name, by name: one, or all of a group.

    Parameters
    ----------
    name
        As in the table above; ``"bbh:boolean_expressions"`` is one task of a group.
    data
        A file or folder in the published format (see `me_stats.tasks.data.FILES`), or the id of a dataset of the hub;
        default the usual id there.
    fewshot
        Answered questions before each; default 8 for GSM8K, 3 for BBH, else 5, or what the data has.

    Raises
    ------
    ValueError
        For an unknown name, with those that are near; for data that is not there or in another format; without lm_eval.
    """
    group, _, one = name.partition(":")
    if group in _BENCHMARKS:
        found = _BENCHMARKS[group](data, one or None, fewshot)
    elif group in BUNDLED:
        if data is not None or fewshot:
            raise ValueError(f"{group} is made of the standard library's files: leave out data and fewshot")
        found = _bundled(group, one or None)
    else:
        if data is not None:
            raise ValueError(f"data: {name} is a task of lm-eval, which brings its own; leave out data")
        return _known_to_lm_eval(name, fewshot)
    return found


def _gsm8k(source: str | Path | None, one: str | None, fewshot: int | None) -> dict[str, Task]:
    _no_member("gsm8k", one)
    rows = [
        {"id": str(number), "prompt": f"Q: {row['question'].strip()}\nA:", "target": answer, "answer": answer}
        for number, row in enumerate(data.gsm8k(source))
        for answer in [row["answer"].rpartition("####")[2].strip()]
    ]
    for row in rows:
        if answers.number(row["answer"]) is None:
            raise ValueError(f"data: question {row['id']} of gsm8k has no number after #### in its answer")
    shots = [{"prompt": f"Q: {question}\nA:", "target": answer} for question, answer in ARITHMETIC]
    return {
        "gsm8k": _generation(
            "gsm8k", rows, shots=_first("gsm8k", shots, fewshot), max_gen_toks=400, until=["\nQ:"],
            score=lambda row, text: answers.number(text) == answers.number(row["answer"]),
        )
    }  # fmt: skip


def _bbh(source: str | Path | None, one: str | None, fewshot: int | None) -> dict[str, Task]:
    if one is not None and one not in data.BBH:
        raise ValueError(f"bbh:{one} is no task; {_near(one, data.BBH)}")
    tasks = {}
    for name, found in data.bbh(source, one).items():
        rows = [
            {"id": str(number), "prompt": _step_by_step(row["input"]), "target": row["target"],
             "answer": row["target"], "description": _above(found.description)}
            for number, row in enumerate(found.rows)
        ]  # fmt: skip
        shots = [{"prompt": _step_by_step(row["input"]), "target": row["worked"]} for row in found.shots]
        tasks[f"bbh:{name}"] = _generation(
            f"bbh:{name}", rows, shots=_first(f"bbh:{name}", shots, fewshot), max_gen_toks=512, until=["\nQ:"],
            score=lambda row, text: answers.same_phrase(text, row["answer"]),
            target_delimiter=found.shots[0]["before"] if found.shots else "\n",
        )  # fmt: skip
    return tasks


def _arc_challenge(source: str | Path | None, one: str | None, fewshot: int | None) -> dict[str, Task]:
    _no_member("arc_challenge", one)
    test, dev = data.arc_challenge(source)
    return {"arc_challenge": _of_letters("arc_challenge", test, dev, "science", fewshot)}


def _mmlu(source: str | Path | None, one: str | None, fewshot: int | None) -> dict[str, Task]:
    subjects = data.mmlu(source)
    if one is not None and one not in subjects:
        raise ValueError(f"mmlu:{one} is no subject of the data; {_near(one, subjects)}")
    return {
        f"mmlu:{name}": _of_letters(f"mmlu:{name}", test, dev, name.replace("_", " "), fewshot)
        for name, (test, dev) in subjects.items()
        if one in (None, name)
    }


_BENCHMARKS: dict[str, Callable[[str | Path | None, str | None, int | None], dict[str, Task]]] = {
    "gsm8k": _gsm8k, "mmlu": _mmlu, "bbh": _bbh, "arc_challenge": _arc_challenge,
}  # fmt: skip


def _of_letters(name: str, test: Sequence[Row], dev: Sequence[Row], about: str, fewshot: int | None) -> Task:
    description = f"Questions about {about}. The answer to each is the letter of one option."

    def shown(number: int, row: Row) -> Row:
        options = "\n".join(f"{label}. {text}" for label, text in zip(_LETTERS, row["options"], strict=False))
        return {
            "id": str(row.get("id") or number), "prompt": f"Question: {row['question'].strip()}\n{options}\nAnswer:",
            "target": row["answer"], "answer": row["answer"], "labels": _LETTERS[: len(row["options"])],
            "description": _above(description),
        }  # fmt: skip

    rows, shots = ([shown(number, row) for number, row in enumerate(rows)] for rows in (test, dev))
    return _generation(
        name, rows, shots=_first(name, shots, fewshot, usual=_SHOWN), max_gen_toks=32, until=["\nQuestion:"],
        score=lambda row, text: answers.letter(text, row["labels"]) == row["answer"],
    )  # fmt: skip


def _bundled(group: str, one: str | None) -> dict[str, Task]:
    if group == "stdlib_bpb":
        if one not in (None, "code", "prose"):
            raise ValueError(f"stdlib_bpb:{one} is no task; there are stdlib_bpb:code and stdlib_bpb:prose")
        return {f"{group}:{domain}": _rolling(f"{group}:{domain}", stdlib.text_rows(domain))
                for domain in ([one] if one else ("code", "prose"))}  # fmt: skip
    _no_member(group, one)
    if group == "closing_brackets":
        return {group: _generation(
            group, stdlib.bracket_rows(), max_gen_toks=64, until=["\n"], target_delimiter="",
            score=lambda row, text: stdlib.closes(text, row["open"]),
        )}  # fmt: skip
    return {group: _generation(
        group, stdlib.indentation_rows(), max_gen_toks=24, until=["\n\n"], target_delimiter="",
        score=lambda row, text: stdlib.indents(text, row["indent"]),
    )}  # fmt: skip


def _generation(
    name: str,
    rows: list[Row],
    *,
    score: Score,
    max_gen_toks: int,
    until: list[str],
    shots: Sequence[Row] = (),
    target_delimiter: str = " ",
) -> Task:
    def process_results(row: Row, results: Sequence[str]) -> dict[str, float]:
        return {"exact_match": float(score(row, results[0]))}

    return _task(rows, {
        "task": name, "output_type": "generate_until", "process_results": process_results,
        "metric_list": [{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}],
        "generation_kwargs": {"until": until, "max_gen_toks": max_gen_toks}, "target_delimiter": target_delimiter,
        "num_fewshot": len(shots), "fewshot_config": {"sampler": "first_n", "samples": list(shots)} if shots else None,
        "description": "description" if rows and rows[0].get("description") else "",  # the field of a row
    })  # fmt: skip


def _rolling(name: str, rows: list[Row]) -> Task:
    metric = {"metric": "bits_per_byte", "aggregation": "bits_per_byte", "higher_is_better": False}
    return _task(rows, {"task": name, "output_type": "loglikelihood_rolling", "num_fewshot": 0,
                        "metric_list": [metric]})  # fmt: skip


def _task(rows: list[Row], config: dict[str, Any]) -> Task:
    """A task whose rows are here: nothing is fetched, and nothing is left in a cache."""
    if not rows:
        raise ValueError(f"data: {config['task']} has no question")
    base, dataset = load("lm_eval.api.task").ConfigurableTask, load("datasets").Dataset

    class Here(base):  # type: ignore[misc, valid-type]
        def download(self, *_: Any, **__: Any) -> None:
            self.dataset = {"test": dataset.from_list(rows)}

    fields = {"test_split": "test", "doc_to_text": "prompt", "doc_to_target": "target", "metadata": {"version": 1}}
    return Here(config=config | fields)


def _known_to_lm_eval(name: str, fewshot: int | None) -> dict[str, Task]:
    file = Path(name).is_file()
    manager = load("lm_eval.tasks").TaskManager(include_defaults=not file)  # thousands of files
    if not file and name not in manager.all_tasks:
        raise ValueError(f"{name} is no task; {_near(name, [*BENCHMARKS, *BUNDLED, *manager.all_tasks])}")
    try:
        found: Mapping[str, Task] = manager.load([name])["tasks"]
    except Exception as error:  # of many libraries: network, files, formats
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise ValueError(
            f"{name}: lm-eval could not open this task ({reason}); its data comes from the hub: be online, or take a "
            f"task whose files you can give: {', '.join(BENCHMARKS)}"
        ) from error
    for one in found.values():
        if fewshot is not None and one.get_config("num_fewshot") != 0:
            one.set_config(key="num_fewshot", value=fewshot)
    return dict(found)


def _step_by_step(question: str) -> str:
    return f"Q: {question}\nA: Let's think step by step."


def _above(text: str) -> str:
    return f"{text}\n\n" if text else ""


def _first(name: str, shots: Sequence[Row], fewshot: int | None, *, usual: int | None = None) -> Sequence[Row]:
    if fewshot is None:
        return shots[:usual]
    if not 0 <= fewshot <= len(shots):
        raise ValueError(f"fewshot: {name} has {len(shots)} answered questions to show in its data, got {fewshot}")
    return shots[:fewshot]


def _no_member(group: str, one: str | None) -> None:
    if one is not None:
        raise ValueError(f"{group}:{one}: {group} is one task; leave out :{one}")


def _near(name: str, known: Sequence[str] | Mapping[str, Any]) -> str:
    close = difflib.get_close_matches(name, list(known), n=4, cutoff=0.5)
    return f"near it: {', '.join(close)}" if close else f"there are {', '.join(list(known)[:8])}, ..."
