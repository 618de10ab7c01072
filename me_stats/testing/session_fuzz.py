"""The smallest schedule on which a session does not agree with the definition of its model."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from hypothesis import strategies as st
from torch import Tensor

from me_stats.divergence import tv_distance
from me_stats.models.base import checked_laws, open_session, require_language_model
from me_stats.models.ensemble import Ensemble, EnsembleSession
from me_stats.testing.result import ConformanceResult, ModelRejected
from me_stats.testing.search import check_counts, rounded, search
from me_stats.testing.strategies import Turn, ensembles, prompts, schedules


def fuzz_session(
    build: Callable[[Ensemble], Any],
    *,
    max_examples: int = 200,
    max_rows: int = 3,
    max_steps: int = 16,
    max_components: int = 3,
    max_vocabulary: int = 3,
    min_prompt_length: int = 1,
    tolerance: float = 1e-9,
    seed: int = 0,
) -> ConformanceResult:
    """Look for the smallest schedule on which the session of the model that `build` makes leaves ``log_probs``.

    Each example is a toy ensemble, prompts of several lengths and a schedule of appends and reads: rows in any order,
    each at its own pace, with long lags and repeated reads. Every law read is compared with
    ``build(ensemble).log_probs``, so no probability is involved. Of an `Ensemble` the schedule reads the mixture or
    single components, as ME does. The toys remember up to five tokens, so what a session forgets of older ones is
    not seen.

    Parameters
    ----------
    build
        ``build(ensemble)`` returns a language model with the session in question. It may call `hypothesis.assume`.
    max_rows, max_steps
        Rows of a session, and appends to a row, at most.
    max_components, max_vocabulary
        Largest K and V.
    min_prompt_length
        0 tries empty prompts too.
    tolerance
        Total variation that is allowed between the two; 1e-9 suits float64.
    seed
        Of the search; another seed looks at other examples.

    Raises
    ------
    ModelRejected
        With the smallest schedule found in the message, and the result as `.result`.
    TypeError, ValueError
        For bad options, or a `build` that returns no model. What the session raises is passed on.

    Examples
    --------
    >>> fuzz_session(lambda ensemble: ensemble, max_examples=20).passed
    True
    """
    check_counts(
        max_examples=max_examples, max_rows=max_rows, max_steps=max_steps, max_components=max_components,
        max_vocabulary=max_vocabulary,
    )  # fmt: skip
    if max_vocabulary < 2:
        raise ValueError("max_vocabulary must be at least 2: a law over one token hides every fault")
    if not 0 <= tolerance < 1:
        raise ValueError(f"tolerance must be a total variation in [0, 1), got {tolerance}")
    judge = _Judge(build, tolerance)
    examples = _session_examples(max_rows, max_steps, max_components, max_vocabulary, min_prompt_length)
    found = search(examples, judge, max_examples=max_examples, seed=seed)
    if found is None:
        return ConformanceResult((), judge.largest, tolerance, judge.compared)
    example, finding, replayed = found
    message = finding.describe(example)
    if not replayed:
        message += "\n    run again it agreed: the session depends on more than its rows"
    raise ModelRejected(ConformanceResult((message,), finding.distance, tolerance, judge.compared))


@dataclass(frozen=True)
class _SessionExample:
    ensemble: Ensemble
    prompts: tuple[tuple[int, ...], ...]
    schedule: tuple[Turn, ...]


@st.composite
def _session_examples(
    draw: st.DrawFn, max_rows: int, max_steps: int, max_components: int, max_vocabulary: int, min_prompt_length: int
) -> _SessionExample:
    # A law that remembers nothing, or has one token, hides what a session forgets.
    worlds = ensembles(
        max_components=max_components,
        min_vocabulary=2,
        max_vocabulary=max_vocabulary,
        min_order=1,
        warped=False,
        max_order=5,
        eos=False,
    )
    ensemble = draw(worlds)
    size = ensemble.vocabulary.size
    texts = prompts(size, min_length=min_prompt_length, max_length=min_prompt_length + 3)
    starts = draw(st.lists(texts, min_size=1, max_size=max_rows))
    plan = schedules(len(starts), max_steps, size=size, readers=1 + len(ensemble.components))
    return _SessionExample(ensemble, tuple(starts), draw(plan))


@dataclass(frozen=True)
class _Finding:
    """What a reader got wrong at turn `turn`: in words, and with the worst of the laws that it read."""

    reader: str
    turn: int
    what: str
    distance: float
    laws: str = ""

    def describe(self, example: _SessionExample) -> str:
        ensemble = example.ensemble
        lines = [
            f"{self.what}; smallest schedule found:",
            f"K = {len(ensemble.components)} components, V = {ensemble.vocabulary.size} tokens, "
            f"prompts {list(example.prompts)}",
            *(_sentence(turn) for turn in example.schedule[: self.turn]),
            f"{_sentence(example.schedule[self.turn])} ({self.reader}), which is wrong",
            *filter(None, [self.laws]),
        ]
        return "\n    ".join(lines)


def _sentence(turn: Turn) -> str:
    grown = ", ".join(f"token {token} to row {row}" for row, token in zip(turn.appended, turn.tokens, strict=True))
    parts = [f"append {grown}"] if grown else []
    parts += [f"read {'row' if len(turn.read) == 1 else 'rows'} {', '.join(map(str, turn.read))}"] if turn.read else []
    return ", then ".join(parts)


@dataclass
class _Judge:
    """Runs one schedule after the other, and remembers how many laws it compared."""

    build: Callable[[Ensemble], Any]
    tolerance: float
    largest: float = 0.0
    compared: int = 0

    def __call__(self, example: _SessionExample) -> _Finding | None:
        model = self.build(example.ensemble)
        require_language_model(model, name="build(ensemble)")
        prefixes = list(example.prompts)
        session = open_session(model, prefixes, max_new_tokens=max(1, len(example.schedule)))
        readers = [("by the session", model, session)]
        if isinstance(model, Ensemble) and isinstance(session, EnsembleSession):
            parts = zip(model.components, session.components, strict=True)
            readers += [(f"by component {i}", component, own) for i, (component, own) in enumerate(parts)]
        for number, turn in enumerate(example.schedule):
            if turn.appended:
                session.append(np.array(turn.appended), torch.tensor(turn.tokens))
            for row, token in zip(turn.appended, turn.tokens, strict=True):
                prefixes[row] = (*prefixes[row], token)
            if turn.read:
                name, part, own = readers[turn.reader % len(readers)]
                finding = self._read(name, number, part, own, turn.read, [prefixes[row] for row in turn.read])
                if finding is not None:
                    return finding
        return None

    def _read(
        self, reader: str, turn: int, model: Any, session: Any, rows: Sequence[int], prefixes: list[tuple[int, ...]]
    ) -> _Finding | None:
        defined = _laws(model, model.log_probs(prefixes), len(rows))
        laws = session.log_probs(np.array(rows))
        try:
            read = _laws(model, laws, len(rows))
        except ValueError as error:
            return _Finding(reader, turn, f"what the session returned is no law: {error}", 1.0)
        distances = torch.as_tensor(tv_distance(read, defined, check=False))
        self.compared += len(rows)
        worst = int(distances.argmax())
        distance = float(distances[worst])
        self.largest = max(self.largest, distance)
        if distance <= self.tolerance:
            return None
        shown = f"after {prefixes[worst]}: log_probs gives {rounded(defined[worst].exp())}, the session "
        shown += f"{rounded(read[worst].exp())}"
        what = f"the session is a total variation of {distance:.3g} away from log_probs"
        return _Finding(reader, turn, what, distance, f"row {rows[worst]} {shown}")


def _laws(model: Any, laws: Any, rows: int) -> Tensor:
    # Copied, since a model may write into the same memory at its next call.
    return checked_laws(model, laws, rows).detach().to("cpu", torch.float64, copy=True)
