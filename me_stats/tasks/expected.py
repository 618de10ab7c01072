"""Exact accuracy of a law where the answer is short: the mean score over all texts, without drawing one.

Sampled scores have noise; what they estimate is a number, ``E score = sum_texts P(text) score(text)``. It can be summed
where few texts matter: a letter is one token, and an indentation is settled by the first character that is no space. So
two laws can be compared in accuracy exactly, and samplers against both.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from me_stats.models.shared import SharedSession
from me_stats.stopping import cut
from me_stats.tasks.encoding import Encoder
from me_stats.tasks.run import spread

Floats = NDArray[np.float64]

_LEAST = 1e-300  # no token of probability 0 is followed


@dataclass(frozen=True, eq=False)
class ExpectedScores:
    """Mean score (I,) of each of `items`, between `lower` and `upper`: exact up to the mass of texts left out."""

    task: str
    items: tuple[str | int, ...]
    lower: Floats
    upper: Floats

    @property
    def scores(self) -> Floats:
        """Middle of both bounds (I,)."""
        return (self.lower + self.upper) / 2

    @property
    def gap(self) -> float:
        """The largest distance of an item's bounds."""
        return float((self.upper - self.lower).max())


@dataclass(frozen=True)
class _Item:
    """What a task asks of one document, and how it scores a text."""

    prompt: tuple[int, ...]
    until: tuple[str, ...]
    length: int
    score: Callable[[str], float]


def expected_scores(
    laws: Mapping[str, Any],
    name: str,
    task: Any,
    *,
    limit: int | None = None,
    max_new_tokens: int | None = None,
    decided: Callable[[str], bool] = lambda text: False,
    negligible: float = 1e-6,
    batch_size: int = 32,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> dict[str, ExpectedScores]:
    """Mean score of each item under each of `laws`, LanguageModels of one vocabulary, by walking every text.

    Prompts, items and scores are those of `evaluate` with the same `limit` and `max_new_tokens`. Networks that several
    laws are made of run once.

    Parameters
    ----------
    name, task
        A task of lm-eval that asks for texts and scores them by ``exact_match``.
    decided
        Whether no continuation of a text can change its score. Texts that it leaves open are continued up to
        `max_new_tokens`, so without it only a token or two can be walked.
    negligible
        Beginnings that no law gives this probability are not followed; their mass is what `upper` has above `lower`.
    progress
        Called with items done and items in all.

    Raises
    ------
    ValueError
        For no law, laws of several vocabularies, or a task that draws no texts.
    """
    if not laws or len({law.vocabulary.fingerprint for law in laws.values()}) > 1:
        raise ValueError("laws must be at least one, over one vocabulary")
    if task.get_config("output_type") != "generate_until":
        raise ValueError(f"{name} draws no texts: its scores are exact as they are; use evaluate")
    numbers = spread(len(task.eval_docs), limit)
    models = list(laws.values())
    items = _items(task, numbers, Encoder(models[0], models[1:]), max_new_tokens)
    lower, lost = np.zeros((2, len(items), len(models)))
    for start in range(0, len(items), batch_size):
        progress(start, len(items))
        part = slice(start, start + batch_size)
        _walk(models, items[part], lower[part], lost[part], decided, negligible)
    named = [task.eval_docs[number].get("id") for number in numbers]
    ids = tuple(named) if len(set(named)) == len(named) and isinstance(named[0], str) else tuple(numbers)
    upper = np.minimum(1.0, lower + lost)
    return {law: ExpectedScores(name, ids, lower[:, i], upper[:, i]) for i, law in enumerate(laws)}


def _walk(
    models: Sequence[Any], items: Sequence[_Item], lower: Floats, lost: Floats, decided: Callable[[str], bool],
    negligible: float,
) -> None:  # fmt: skip
    """Depth first, all items a step at a time: a row goes back to where its next text branched off."""
    vocabulary = models[0].vocabulary
    session = SharedSession(models, [item.prompt for item in items], max_new_tokens=max(item.length for item in items))
    left: list[list[tuple[tuple[int, ...], Floats]]] = [[((), np.ones(len(models)))] for _ in items]
    here: list[tuple[int, ...]] = [()] * len(items)
    while any(left):
        rows = np.array([row for row, texts in enumerate(left) if texts])
        nodes = [left[row].pop() for row in rows]
        # A node is a child of one that its row has been at, so all but its last token are read already.
        kept = [max(0, len(ids) - 1) for ids, _ in nodes]
        session.drop(rows, np.array([len(here[row]) for row in rows]) - kept)
        deeper = np.array([bool(ids) for ids, _ in nodes])
        if deeper.any():
            session.append(rows[deeper], np.array([ids[-1] for ids, _ in nodes if ids]))
        reading = session.now(rows)
        # Normalised, as the inverse CDF reads them.
        found = np.stack([reading.law(m).double().log_softmax(-1).exp().cpu().numpy() for m in models], -1)
        for row, (ids, mass), probs in zip(rows.tolist(), nodes, found, strict=True):
            here[row], item = ids, items[row]
            likely = np.flatnonzero((probs * mass).max(-1) >= max(negligible, _LEAST))
            lost[row] += mass * np.maximum(0.0, 1 - probs[likely].sum(0))
            for token in likely.tolist():
                text, own = (*ids, token), mass * probs[token]
                ended = token in vocabulary.eos
                written = vocabulary.decode(ids if ended else text)
                answer = cut(written, item.until)
                if ended or len(text) == item.length or answer != written or decided(answer):
                    lower[row] += own * item.score(answer)
                else:
                    left[row].append((text, own))


def _items(task: Any, numbers: Sequence[int], encoder: Encoder, max_new_tokens: int | None) -> list[_Item]:
    """The requests that lm-eval would make of these rows."""
    task.set_fewshot_seed(0)
    if task.get_config("num_fewshot") is None:
        task.set_config("num_fewshot", 0)
    if max_new_tokens is not None:
        task.set_config("generation_kwargs", {"max_gen_toks": max_new_tokens}, update=True)
    task.build_all_requests(samples=list(numbers), rank=0, world_size=1)
    items = []
    for request in sorted(task.instances, key=lambda request: request.doc_id):
        context, options = request.args
        until, length = options.get("until") or (), int(options["max_gen_toks"])
        prompt = encoder.fit(encoder.prompt(context), length)

        def score(text: str, row: Any = request.doc) -> float:
            return float(task.process_results(row, [text])["exact_match"])

        items.append(_Item(prompt, (until,) if isinstance(until, str) else tuple(until), length, score))
    return items
