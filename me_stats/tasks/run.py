"""Tasks run on a sampler, seed by seed: the score of every item, with the texts kept as they come."""

from __future__ import annotations

import copy
import hashlib
import json
import math
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from me_stats.tasks._lm_eval import load
from me_stats.tasks.harness import HarnessLM

Progress = Callable[[int, int, str], None]
_KEPT_TOGETHER = 256  # scores; texts are kept batch by batch
# Of a task that has several, the first of these; what is no number of an item, like a perplexity, comes last.
_METRICS = ("exact_match", "acc", "bits_per_byte")


@dataclass(frozen=True)
class ItemScores:
    """`scores` (I, R) of the items of a task, R runs of each: 1 right and 0 wrong, or bits per byte.

    `items` are the ids of the data where it has any, else the numbers of the rows. `of` counts the items that they were
    taken from. A task that draws nothing, as where options are only scored, has one run.
    """

    task: str
    metric: str
    items: tuple[str | int, ...]
    scores: NDArray[np.float64]
    of: int

    @property
    def mean(self) -> float:
        """Mean score over items and runs."""
        return float(self.scores.mean())


def spread(count: int, limit: int | None) -> list[int]:
    """At most `limit` of the numbers 0..count - 1, evenly spaced, so that no part of a sorted set is left out.

    >>> spread(100, 4), spread(3, 5), spread(2, None)
    ([12, 37, 62, 87], [0, 1, 2], [0, 1])
    """
    if limit is not None and limit < 1:
        raise ValueError(f"limit must be at least 1, got {limit}")
    if limit is None or limit >= count:
        return list(range(count))
    return [(2 * place + 1) * count // (2 * limit) for place in range(limit)]


def evaluate(
    sampler: Any,
    tasks: Mapping[str, Any],
    *,
    seeds: Sequence[int] = (0,),
    limit: int | None = None,
    work: Path | None = None,
    progress: Progress | None = None,
    max_new_tokens: int | None = None,
    batch_size: int | None = None,
    chat: bool = False,
) -> dict[str, ItemScores]:
    """Scores of every item of every task, from one run of lm-eval a task and seed.

    Parameters
    ----------
    sampler
        A sampler, or a LanguageModel whose law is to be drawn from; see `HarnessLM`.
    tasks
        Tasks of lm-eval by name, as `me_stats.tasks.definitions.task` gives them.
    seeds
        One run each. Tasks that draw nothing run once.
    limit
        Items of each task, evenly spaced over it; default all.
    work
        Folder of this sampler alone. It holds a .jsonl file a task and seed, with the text of each item as it is
        written: what is there already is not drawn again, and a line that an interruption cut is.
    progress
        Called with items done, items in all, and the task.
    max_new_tokens
        Of each answer; default as many as the task asks for.
    batch_size, chat
        Texts that are written together, which is what an interruption loses, and whether prompts are turns of a chat:
        see `HarnessLM`.

    Returns
    -------
    dict
        Of `ItemScores` by task; by ``task,filter`` where a task of lm-eval reads its answers in several ways.

    Raises
    ------
    ValueError
        For no task, repeated seeds, or a task without a number for each item.
    """
    run_lm_eval = load("lm_eval.evaluator").evaluate
    if not tasks:
        raise ValueError("tasks must name at least one task")
    if not seeds or len(set(seeds)) < len(seeds):
        raise ValueError(f"seeds must be distinct, and at least one, got {list(seeds)}")
    HarnessLM(sampler, batch_size=batch_size, chat=chat)  # refuses before any task is read
    if work is not None:
        work.mkdir(parents=True, exist_ok=True)
    plan = {name: _Items(task, spread(len(task.eval_docs), limit)) for name, task in tasks.items()}
    runs = [(name, seed) for name, items in plan.items() for seed in (seeds if items.drawn else seeds[:1])]
    total, done = sum(len(plan[name].rows) for name, _ in runs), 0
    columns: dict[str, dict[str, list[NDArray[np.float64]]]] = {name: {} for name in plan}
    metrics: dict[str, str] = {}
    for name, seed in runs:
        items = plan[name]
        if max_new_tokens is not None and items.drawn:
            items.task.set_config("generation_kwargs", {"max_gen_toks": max_new_tokens}, update=True)

        def tell(count: int, before: int = done, name: str = name) -> None:
            if progress is not None:
                progress(before + count, total, name)

        path = None if work is None else work / f"{_file_name(name)}-seed{seed}.jsonl"
        model = _Keeping(
            sampler, rows=items.rows, path=path, tell=tell, seed=seed, batch_size=batch_size, chat=chat
        )  # fmt: skip
        found = _run(run_lm_eval, name, items, model)
        for way, (metric, scores) in found.items():
            metrics[way] = metric
            columns[name].setdefault(way, []).append(scores)
        done += len(items.rows)
    return {
        way: ItemScores(way, metrics[way], plan[name].ids(), np.stack(scores, axis=1), len(plan[name].task.eval_docs))
        for name, ways in columns.items()
        for way, scores in ways.items()
    }


@dataclass(frozen=True)
class _Items:
    """A task and the numbers of its rows that are asked."""

    task: Any
    rows: list[int]

    @property
    def drawn(self) -> bool:
        return self.task.get_config("output_type") == "generate_until"

    def ids(self) -> tuple[str | int, ...]:
        rows = self.task.eval_docs
        ids = [
            row["id"] if isinstance(row.get("id"), str) else number for number in self.rows for row in [rows[number]]
        ]
        return tuple(ids) if len(set(ids)) == len(ids) else tuple(self.rows)


def _run(run_lm_eval: Any, name: str, items: _Items, model: HarnessLM) -> dict[str, tuple[str, NDArray[np.float64]]]:
    """(metric, scores in the order of the items) by task, or by task and filter where there are several."""
    task = items.task
    task.set_fewshot_seed(0)
    if task.get_config("num_fewshot") is None:
        task.set_config("num_fewshot", 0)
    whole = len(items.rows) == len(task.eval_docs)
    found = run_lm_eval(
        model, {"tasks": {name: task}, "groups": {}, "group_map": {}}, bootstrap_iters=0,
        apply_chat_template=model.chat, samples=None if whole else {name: items.rows}, fewshot_as_multiturn=model.chat,
    )  # fmt: skip
    samples = found["samples"][name]
    filters = list(dict.fromkeys(sample["filter"] for sample in samples))
    scores = {}
    for one in filters:
        mine = sorted((sample for sample in samples if sample["filter"] == one), key=lambda sample: sample["doc_id"])
        metric = _metric(name, mine[0])
        scores[name if len(filters) == 1 else f"{name},{one}"] = (
            metric, np.array([_number(sample[metric]) for sample in mine], dtype=np.float64)
        )  # fmt: skip
    return scores


def _metric(name: str, sample: Mapping[str, Any]) -> str:
    known = [metric for metric in (*_METRICS, *sample["metrics"]) if metric in sample["metrics"]]
    for metric in known:
        if metric == "bits_per_byte" or isinstance(sample[metric], (bool, int, float, np.number)):
            return metric
    raise ValueError(f"{name} has no metric with a number for each item, only {', '.join(sample['metrics'])}")


def _number(value: Any) -> float:
    if isinstance(value, tuple):
        log_p, size = value  # of a document, in nats and bytes
        return -log_p / (size * math.log(2))
    return float(value)


class _Keeping(HarnessLM):
    """A sampler as a model of lm-eval whose answers to one task are kept as they come; kept ones are not drawn again.

    `rows` are the documents' numbers in the whole task. lm-eval counts those that it was asked for, which would make
    the random numbers of a text depend on the limit.
    """

    def __init__(
        self, sampler: Any, *, rows: Sequence[int], path: Path | None, tell: Callable[[int], None], **options: Any
    ) -> None:
        super().__init__(sampler, progress=self._advance, **options)
        self._rows_of, self._path, self._tell = rows, path, tell
        self._asked, self._answered = 1, 0
        self._known = {} if path is None else {line["key"]: line["answer"] for line in _lines(path)}

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        requests, keys, keep = self._begin("text", requests)
        self.answered = lambda place: self._known.get(keys[place])
        self.on_done = lambda place, text: keep([place], [text])
        return super().generate_until(requests, disable_tqdm)

    def loglikelihood(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        found = self._scores("score", requests, super().loglikelihood)
        return [(float(log_p), bool(greedy)) for log_p, greedy in found]

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
        return self._scores("rolling", requests, super().loglikelihood_rolling)

    def _scores(self, kind: str, requests: Sequence[Any], score: Callable[[Sequence[Any]], list[Any]]) -> list[Any]:
        requests, keys, keep = self._begin(kind, requests)
        missing = [place for place, key in enumerate(keys) if key not in self._known]
        self._advance(len(keys) - len(missing))
        for start in range(0, len(missing), _KEPT_TOGETHER):
            places = missing[start : start + _KEPT_TOGETHER]
            keep(places, score([requests[place] for place in places]))
        return [self._known[key] for key in keys]

    def _begin(self, kind: str, requests: Sequence[Any]) -> tuple[list[Any], list[str], Callable[..., None]]:
        numbered = []
        for request in requests:
            one = copy.copy(request)
            one.doc_id = self._rows_of[request.doc_id]
            numbered.append(one)
        seen: Counter[str] = Counter()
        keys = []
        for request in numbered:
            text = json.dumps([kind, request.doc_id, request.idx, *request.args], sort_keys=True, default=str)
            keys.append(hashlib.sha256(f"{seen[text]} {text}".encode()).hexdigest()[:24])
            seen[text] += 1  # repeats of a document are draws of their own
        self._asked, self._answered = len(keys), 0

        def keep(places: Sequence[int], answers: Sequence[Any]) -> None:
            self._known |= {keys[place]: answer for place, answer in zip(places, answers, strict=True)}
            if self._path is not None:
                lines = [{"item": numbered[place].doc_id, "answer": answer, "key": keys[place]}
                         for place, answer in zip(places, answers, strict=True)]  # fmt: skip
                with self._path.open("a", encoding="utf-8") as file:
                    file.write("".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines))

        return numbered, keys, keep

    def _advance(self, count: int) -> None:
        self._answered += count
        self._tell(len(self._rows_of) * min(self._answered, self._asked) // self._asked)


def _file_name(task: str) -> str:
    return re.sub(r"[^\w.-]+", "+", task)


def _lines(path: Path) -> list[dict[str, Any]]:
    """The whole lines of a file of answers, which is cut after them: an interruption may leave a part of one."""
    if not path.exists():
        return []
    data = path.read_bytes()
    size = data.rfind(b"\n") + 1
    if size < len(data):
        with path.open("r+b") as file:
            file.truncate(size)
    found = []
    for line in data[:size].splitlines():
        try:
            read = json.loads(line)
        except ValueError:
            continue  # damaged: drawn again
        if isinstance(read, dict) and {"key", "answer"} <= read.keys():
            found.append(read)
    return found
