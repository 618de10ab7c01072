"""Samplers with planted bugs: wrong laws, wrong component paths, wrong random numbers, wrong ends."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from me_stats.draws import Draw, RowStreams, Stream, inverse_cdf
from me_stats.models.base import Cost, LanguageModel, Prefix, Session, checked_laws, open_session, path_log_probs
from me_stats.models.warped import Warp
from me_stats.samplers.base import Run, Sampler
from me_stats.samplers.mixture import MESampler
from me_stats.trace import Trace

# --- wrong laws ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Banned(Warp):
    """The law given that none of `tokens` is drawn. Not affine: a mixture must be conditioned as a whole.

    >>> Banned((0,))(torch.tensor([[0.5, 0.1, 0.4]]).log()).exp()
    tensor([[0.0000, 0.2000, 0.8000]])
    """

    tokens: tuple[int, ...]

    def __call__(self, log_probs: Tensor) -> Tensor:
        banned = torch.zeros(log_probs.shape[-1], dtype=torch.bool, device=log_probs.device)
        banned[list(self.tokens)] = True
        return log_probs.masked_fill(banned, -math.inf).log_softmax(-1)


@dataclass(frozen=True)
class LastDropped(Warp):
    """The law without the possible token of the highest id."""

    def __call__(self, log_probs: Tensor) -> Tensor:
        ids = torch.arange(log_probs.shape[-1], device=log_probs.device)
        last = torch.where(log_probs > -math.inf, ids, -1).argmax(-1, keepdim=True)
        only = (log_probs > -math.inf).sum(-1, keepdim=True) == 1
        return log_probs.masked_fill((ids == last) & ~only, -math.inf).log_softmax(-1)


@dataclass(frozen=True)
class Sometimes(Warp):
    """A transform g that strikes on a share ε of the steps: ``(1 - ε) p + ε g(p)``."""

    warp: Warp
    share: float

    def __call__(self, log_probs: Tensor) -> Tensor:
        return torch.logaddexp(math.log1p(-self.share) + log_probs, math.log(self.share) + self.warp(log_probs))


class RepetitionPenalised(LanguageModel):
    """The law with the log-probabilities of all tokens of the prefix multiplied by `penalty`, renormalised.

    Source: Keskar et al. (2019), arXiv 1909.05858, section 4.1, as generation libraries apply it to logits below 0.
    """

    def __init__(self, model: Any, penalty: float) -> None:
        self.model, self.penalty = model, penalty
        self.vocabulary = model.vocabulary

    def log_probs(self, prefixes: Sequence[Prefix]) -> Tensor:
        laws = checked_laws(self.model, self.model.log_probs(prefixes), len(prefixes))
        seen = torch.zeros(laws.shape, dtype=torch.bool)
        for row, prefix in enumerate(prefixes):
            seen[row, list(prefix)] = True
        return self.penalised(laws, seen)

    def penalised(self, laws: Tensor, seen: Tensor) -> Tensor:
        """Laws (B, V) after the penalty on the tokens that are `seen` (B, V)."""
        return torch.where(seen.to(laws.device), laws * self.penalty, laws).log_softmax(-1)

    def session(self, prompts: Sequence[Prefix], *, max_new_tokens: int | None = None) -> RepetitionSession:
        return RepetitionSession(self, prompts)


class RepetitionSession:
    """The inner session, and a table of the tokens that each row has seen."""

    def __init__(self, model: RepetitionPenalised, prompts: Sequence[Prefix]) -> None:
        self._model, self._session = model, open_session(model.model, prompts)
        self._seen = torch.zeros(len(prompts), model.vocabulary.size, dtype=torch.bool)
        for row, prompt in enumerate(prompts):
            self._seen[row, list(prompt)] = True

    @property
    def cost(self) -> Cost:
        return self._session.cost

    def append(self, rows: np.ndarray, tokens: Tensor) -> None:
        self._session.append(rows, tokens)
        self._seen[torch.from_numpy(rows), tokens.cpu()] = True

    def log_probs(self, rows: np.ndarray) -> Tensor:
        return self._model.penalised(self._session.log_probs(rows), self._seen[torch.from_numpy(rows)])


class Endless(LanguageModel):
    """The same law over a vocabulary in which no token ends a sequence."""

    def __init__(self, model: Any) -> None:
        self.model = model
        self.vocabulary = replace(model.vocabulary, eos=())

    def log_probs(self, prefixes: Sequence[Prefix]) -> Tensor:
        return checked_laws(self.model, self.model.log_probs(prefixes), len(prefixes))

    def session(self, prompts: Sequence[Prefix], *, max_new_tokens: int | None = None) -> Session:
        return open_session(self.model, prompts, max_new_tokens=max_new_tokens)

    def path_log_probs(self, prompts: Sequence[Prefix], tokens: Sequence[Prefix]) -> Iterator[Tensor]:
        return path_log_probs(self.model, prompts, tokens)


# --- wrong component paths -----------------------------------------------------------------------------------------


class RoundRobinSampler(MESampler):
    """Draws the first component of a row, and takes the others in turn."""

    def _components(
        self, log_weights: Tensor, rows: np.ndarray, positions: np.ndarray, step: int, draw: Draw,
        memory: dict[str, Any],
    ) -> np.ndarray:  # fmt: skip
        if step == 0:
            memory["first"] = super()._components(log_weights, rows, positions, step, draw, memory)
        return np.asarray((memory["first"][positions] + step) % log_weights.shape[-1])


# --- wrong random numbers ------------------------------------------------------------------------------------------


class FaultyDraw:
    """A draw by inverse CDF whose uniforms, or whose look-up, go wrong in a subclass.

    `numbers` are all row numbers of the run.
    """

    def __init__(self, seed: int, numbers: np.ndarray) -> None:
        self._streams = RowStreams(seed)
        self._first = int(numbers.min())

    def __call__(
        self, log_law: Tensor, rows: np.ndarray, step: int, *, stream: Stream, index: Tensor | None = None
    ) -> Tensor:
        uniforms = torch.from_numpy(self._uniforms(rows, step, stream)).to(log_law.device)
        return self._look_up(log_law, uniforms, index, stream)

    def _uniforms(self, rows: np.ndarray, step: int, stream: Stream) -> np.ndarray:
        return self._streams.uniforms(rows, step, stream=stream)

    def _look_up(self, log_law: Tensor, uniforms: Tensor, index: Tensor | None, stream: Stream) -> Tensor:
        return inverse_cdf(log_law, uniforms, index=index)


class OneNumberDraw(FaultyDraw):
    """The component is chosen by the number that chooses the token."""

    def _uniforms(self, rows: np.ndarray, step: int, stream: Stream) -> np.ndarray:
        return super()._uniforms(rows, step, "token")


class ReusedDraw(FaultyDraw):
    """Every second token is chosen by the number of the token before it."""

    def _uniforms(self, rows: np.ndarray, step: int, stream: Stream) -> np.ndarray:
        return super()._uniforms(rows, step - step % 2 if stream == "token" else step, stream)


class ReseededDraw(FaultyDraw):
    """Every step starts the row's generator anew."""

    def _uniforms(self, rows: np.ndarray, step: int, stream: Stream) -> np.ndarray:
        return super()._uniforms(rows, 0, stream)


class SharedDraw(FaultyDraw):
    """All rows of the run get the numbers of its first."""

    def _uniforms(self, rows: np.ndarray, step: int, stream: Stream) -> np.ndarray:
        return super()._uniforms(np.full_like(rows, self._first), step, stream)


class SeedIgnoredDraw(FaultyDraw):
    """Every run gets the numbers of the first run."""

    def __init__(self, seed: int, numbers: np.ndarray) -> None:
        super().__init__(0, numbers)

    def _uniforms(self, rows: np.ndarray, step: int, stream: Stream) -> np.ndarray:
        return super()._uniforms(rows - self._first, step, stream)


class TiesDraw(FaultyDraw):
    """Uniforms and cumulative masses on the grid of bfloat16, compared with the wrong inequality.

    A uniform that equals a boundary belongs to the token above it. Here it goes to the one below, and 0 goes to token
    0 whatever its mass.
    """

    strict = False  # True is the right inequality

    def _look_up(self, log_law: Tensor, uniforms: Tensor, index: Tensor | None, stream: Stream) -> Tensor:
        if stream == "component":
            return inverse_cdf(log_law, uniforms, index=index)
        cdf = _paired(log_law, index).exp().cumsum(-1).bfloat16().double()
        grid = (uniforms * 256).floor() / 256
        return torch.searchsorted(cdf, grid[:, None], right=self.strict)[:, 0].clamp_(max=cdf.shape[-1] - 1)


class RoundedUpDraw(FaultyDraw):
    """Uniforms cast to bfloat16 after they were drawn: one in 512 becomes 1 and takes the last id."""

    def _look_up(self, log_law: Tensor, uniforms: Tensor, index: Tensor | None, stream: Stream) -> Tensor:
        if stream == "component":
            return inverse_cdf(log_law, uniforms, index=index)
        cdf = _paired(log_law, index).exp().cumsum(-1)
        rounded = uniforms.bfloat16().double()[:, None]
        return torch.searchsorted(cdf / cdf[:, -1:], rounded, right=True)[:, 0].clamp_(max=cdf.shape[-1] - 1)


class HalfPrecisionDraw(FaultyDraw):
    """Cumulative masses added up in bfloat16: masses below 2⁻⁹ change no sum above 1/2, and the tail is lost."""

    def _look_up(self, log_law: Tensor, uniforms: Tensor, index: Tensor | None, stream: Stream) -> Tensor:
        if stream == "component":
            return inverse_cdf(log_law, uniforms, index=index)
        mass = log_law.exp().bfloat16().T.contiguous()
        sums = torch.empty_like(mass)
        total = torch.zeros_like(mass[0])
        # Not cumsum, which may add up in single precision; a kernel in half precision rounds after every addition.
        for token, own in enumerate(mass):
            sums[token] = total = total + own
        cdf = _paired(sums.T.double(), index).contiguous()
        target = uniforms * cdf[:, -1]
        return torch.searchsorted(cdf, target[:, None], right=True)[:, 0].clamp_(max=cdf.shape[-1] - 1)


def _paired(log_law: Tensor, index: Tensor | None) -> Tensor:
    return log_law if index is None else log_law[index]


# --- wrong ends ----------------------------------------------------------------------------------------------------


def ended_unless_switched(trace: Trace, claimed: Any) -> Trace:
    """Rows of an `Endless` run, cut at the first end whose component also writes the next token."""
    assert trace.components is not None
    ends = torch.isin(trace.tokens, torch.tensor(claimed.vocabulary.eos, dtype=torch.int64))
    ends[:, :-1] &= trace.components[:, 1:] == trace.components[:, :-1]
    steps = trace.tokens.shape[1]
    return _cut(trace, torch.where(ends.any(1), ends.int().argmax(1) + 1, steps))


def ended_with_the_first(trace: Trace, claimed: Any) -> Trace:
    """Rows in batches of eight, all cut where the first of them ends."""
    _, batch = torch.unique(trace.rows // 8, return_inverse=True)
    shortest = torch.full((int(batch.max()) + 1,), trace.tokens.shape[1])
    return _cut(trace, shortest.scatter_reduce(0, batch, trace.lengths, "amin")[batch])


def _cut(trace: Trace, lengths: Tensor) -> Trace:
    longest = int(lengths.max())
    after = torch.arange(longest)[None] >= lengths[:, None]
    components = None if trace.components is None else trace.components[:, :longest].masked_fill(after, -1)
    tokens = trace.tokens[:, :longest].masked_fill(after, -1)
    return replace(trace, tokens=tokens, lengths=lengths, components=components)


# --- the sampler that hides them -----------------------------------------------------------------------------------


class FaultySampler(Sampler):
    """What `inner` writes, under the claim that it follows `claimed`.

    Parameters
    ----------
    claimed
        The law that traces name as their model.
    inner
        Right or wrong sampler of the same or another law.
    draw
        Builds wrong random numbers from the seed and the row numbers.
    finish
        Changes where the rows of the finished trace end.
    """

    def __init__(
        self,
        claimed: Any,
        inner: Sampler,
        *,
        draw: Callable[[int, np.ndarray], Draw] | None = None,
        finish: Callable[[Trace, Any], Trace] | None = None,
    ) -> None:
        super().__init__(claimed)
        self.inner, self.draw, self.finish = inner, draw, finish
        self.shared_rows = inner.shared_rows

    def _run_batch(self, run: Run) -> tuple[Tensor, Tensor | None, Cost]:
        return self.inner._run_batch(run)

    def sample(self, prompts: Any, *, seed: int = 0, draw: Draw | None = None, **options: Any) -> Trace:
        """As `Sampler.sample`; a `draw` that is given replaces the wrong one."""
        numbers = options.get("rows")
        used = draw
        if draw is None and self.draw is not None:
            used = self.draw(seed, np.zeros(1, dtype=np.int64) if numbers is None else np.asarray(numbers))
        trace = self.inner.sample(prompts, seed=seed, draw=used, **options)
        if self.finish is not None:
            trace = self.finish(trace, self.model)
        return replace(trace, model=self.model, seed=seed if draw is None else None)
