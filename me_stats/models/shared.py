"""Several models over the same networks: each network runs once, and rows can take tokens back.

A draft and its target usually read the same components, transformed in another order. Their trees of `Warped`,
`Ensemble` and joint transforms are evaluated here on one session per distinct network below them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from me_stats.devices import on_device
from me_stats.mixing import ConstantMixing, Mixing, checked_log_weights
from me_stats.models.base import Cost, Prefix, PrefixSession, Session, checked_laws, open_session, path_log_probs
from me_stats.models.ensemble import Combination
from me_stats.models.warped import Warped


class Lookback(Session, Protocol):
    """A session that also goes back. Optional: a session without the two is replaced by `PrefixLookback`."""

    def drop(self, rows: np.ndarray, counts: np.ndarray) -> None:
        """Take back the last `counts` (B,) tokens of the distinct `rows` (B,)."""
        ...

    def log_probs_along(self, rows: np.ndarray, counts: np.ndarray) -> Tensor:
        """Laws (Σ(counts + 1), V) before each of the last `counts` (B,) tokens of `rows` (B,) and after them, packed.

        One forward for all of them, where a cache allows it.
        """
        ...


class PrefixLookback(PrefixSession):
    """`Lookback` by the model's definition, without a cache: every read feeds whole prefixes."""

    def log_probs_along(self, rows: np.ndarray, counts: np.ndarray) -> Tensor:
        distinct: dict[tuple[tuple[int, ...], int], int] = {}
        asked = [(self._prefixes[row], count) for row, count in zip(rows.tolist(), counts.tolist(), strict=True)]
        index = [distinct.setdefault(item, len(distinct)) for item in asked]
        heads = [prefix[: len(prefix) - count] for prefix, count in distinct]
        # Teacher forcing gives the law before each token, so one more token asks for the law at the end.
        paths = [(*prefix[len(prefix) - count :], 0) for prefix, count in distinct]
        laws = list(path_log_probs(self._model, heads, paths))
        fed = sum(len(prefix) for prefix, _ in distinct)
        self.cost += Cost(1, fed, int(counts.sum()) + len(rows))
        return torch.cat([laws[i] for i in index])


def open_lookback(model: Any, prompts: Sequence[Prefix], *, max_new_tokens: int | None = None) -> Lookback:
    """The model's own session if that can go back, and a `PrefixLookback` if not."""
    session = open_session(model, prompts, max_new_tokens=max_new_tokens)
    if callable(getattr(session, "drop", None)) and callable(getattr(session, "log_probs_along", None)):
        return session  # type: ignore[return-value]
    return PrefixLookback(model, prompts)


def networks(*models: Any) -> list[Any]:
    """The distinct models that the laws of `models` are made of, told apart by identity.

    >>> from me_stats.models import Ensemble, MarkovModel, TopK
    >>> a, b = MarkovModel.random(3, seed=0), MarkovModel.random(3, seed=1)
    >>> both = Ensemble([a, b], ConstantMixing([0.5, 0.5]))
    >>> len(networks(Warped(both, TopK(2)), Ensemble([Warped(a, TopK(2)), Warped(b, TopK(2))], both.mixing)))
    2
    """
    return list({id(leaf): leaf for model in models for leaf in _leaves(model)}.values())


def _parts(model: Any) -> tuple[Any, ...] | None:
    """What the law of `model` is computed from; None if it stands for itself.

    `Warped` itself, and combinations that keep to `combine`: a subclass may have changed what the law is.
    """
    if type(model) is Warped:
        return (model.model,)
    own = isinstance(model, Combination) and type(model).log_probs is Combination.log_probs
    return model.components if own else None


def _leaves(model: Any) -> list[Any]:
    parts = _parts(model)
    return [model] if parts is None else [leaf for part in parts for leaf in _leaves(part)]


def _rules(model: Any) -> list[Mixing]:
    parts = _parts(model) or ()
    own = [] if type(model) is Warped or not parts else [model.mixing]
    return [*own, *(rule for part in parts for rule in _rules(part))]


@dataclass(frozen=True)
class Reading:
    """What the networks said at P prefixes; laws of the models above them are computed on request."""

    prefixes: list[tuple[int, ...]]
    read: Callable[[Any], Tensor]
    narrow: Callable[[np.ndarray], Reading] | None = None

    def law(self, model: Any) -> Tensor:
        """Laws (P, V) of `model`."""
        parts = _parts(model)
        if parts is None:
            return self.read(model)
        laws = [self.law(part) for part in parts]
        if type(model) is Warped:
            return model.warp(laws[0])
        return model.combine(laws, self.log_weights(model.mixing))

    def log_weights(self, mixing: Mixing) -> Tensor:
        """Log-weights (P, K) of a mixing rule, by its definition: its own runs are not counted."""
        return checked_log_weights(mixing, self.prefixes)

    def at(self, places: np.ndarray) -> Reading:
        """The reading of some of the prefixes; one that has not begun reads no others."""
        if self.narrow is not None:
            return self.narrow(places)
        return Reading([self.prefixes[place] for place in places], lambda leaf: _take(self.read(leaf), places))


@dataclass(frozen=True)
class KeptReading(Reading):
    """A `Reading` that keeps every law it computed: for prefixes whose laws are asked for part by part."""

    known: dict[int, tuple[Any, Tensor]] = field(default_factory=dict, repr=False)

    def law(self, model: Any) -> Tensor:
        # The model is kept with its law, so that its id stays its own.
        if id(model) not in self.known:
            self.known[id(model)] = (model, super().law(model))
        return self.known[id(model)][1]

    def at(self, places: np.ndarray) -> Reading:
        return _Part([self.prefixes[place] for place in places], self.read, whole=self, places=places)


@dataclass(frozen=True)
class _Part(Reading):
    """Some of the prefixes of a `KeptReading`, by their laws in the whole."""

    whole: Reading | None = None
    places: np.ndarray | None = None

    def law(self, model: Any) -> Tensor:
        assert self.whole is not None
        assert self.places is not None
        return _take(self.whole.law(model), self.places)

    def at(self, places: np.ndarray) -> Reading:
        assert self.whole is not None
        assert self.places is not None
        return self.whole.at(self.places[places])


def readings_along(models: Sequence[Any], prompts: Sequence[Prefix], tokens: Sequence[Prefix]) -> Iterator[Reading]:
    """Per row the `Reading` before each of its tokens: one pass of each network serves all laws above them.

    ``reading.law(model)`` is the teacher-forced law (T_row, V) of any of the `models`, and of whatever else is made of
    their networks.

    >>> from me_stats.models import Ensemble, MarkovModel, TopK
    >>> toys, mixing = [MarkovModel.random(4, seed=s) for s in (0, 1)], ConstantMixing([0.5, 0.5])
    >>> after, inside = Warped(Ensemble(toys, mixing), TopK(2)), Ensemble([Warped(t, TopK(2)) for t in toys], mixing)
    >>> [reading] = readings_along([after, inside], [(0,)], [(1, 2, 3)])
    >>> bool((reading.law(after) == next(iter(after.path_log_probs([(0,)], [(1, 2, 3)])))).all())
    True
    """
    leaves = networks(*models)
    routed = _are_routed(models)
    paths = [path_log_probs(leaf, prompts, tokens) for leaf in leaves]
    for prompt, path, *laws in zip(prompts, tokens, *paths, strict=True):
        known = {id(leaf): law for leaf, law in zip(leaves, laws, strict=True)}
        prefixes = [(*prompt, *path[:step]) if routed else () for step in range(len(path))]
        yield Reading(prefixes, lambda leaf, known=known: known[id(leaf)])  # type: ignore[misc]


def _are_routed(models: Sequence[Any]) -> bool:
    """Whether some weights depend on the prefix; constant ones need none, and long rows would copy them all."""
    return any(type(rule) is not ConstantMixing for model in models for rule in _rules(model))


def _take(laws: Tensor, places: np.ndarray) -> Tensor:
    return laws[on_device(places, laws.device)]


class SharedSession:
    """Rows that several `models` read, on one session per network below them.

    Every network catches up when a law that needs it is asked for, so a component that is not drawn does not run.
    """

    def __init__(self, models: Sequence[Any], prompts: Sequence[Prefix], *, max_new_tokens: int | None = None) -> None:
        self._sessions = {
            id(leaf): (leaf, open_lookback(leaf, prompts, max_new_tokens=max_new_tokens)) for leaf in networks(*models)
        }
        self._routed = _are_routed(models)
        self._rows = [list(prompt) for prompt in prompts]

    @property
    def cost(self) -> Cost:
        return sum((session.cost for _, session in self._sessions.values()), Cost())

    def append(self, rows: np.ndarray, tokens: np.ndarray) -> None:
        for row, token in zip(rows.tolist(), tokens.tolist(), strict=True):
            self._rows[row].append(token)
        for _, session in self._sessions.values():
            session.append(rows, torch.from_numpy(tokens))

    def drop(self, rows: np.ndarray, counts: np.ndarray) -> None:
        """Take back the last `counts` (B,) tokens of `rows` (B,)."""
        some = counts > 0
        rows, counts = rows[some], counts[some]
        if not len(rows):
            return
        for row, count in zip(rows.tolist(), counts.tolist(), strict=True):
            del self._rows[row][-count:]
        for _, session in self._sessions.values():
            session.drop(rows, counts)

    def now(self, rows: np.ndarray) -> Reading:
        """The laws of the next token of `rows`; a network runs when a law that needs it is asked for."""
        prefixes = [tuple(self._rows[row]) if self._routed else () for row in rows.tolist()]
        read = self._reader(len(prefixes), lambda session: session.log_probs(rows))
        return Reading(prefixes, read, lambda places: self.now(rows[places]))

    def along(self, rows: np.ndarray, counts: np.ndarray) -> Reading:
        """The laws at the last ``counts + 1`` positions of `rows`, packed end to end."""
        prefixes = [
            tuple(self._rows[row][: len(self._rows[row]) - back]) if self._routed else ()
            for row, count in zip(rows.tolist(), counts.tolist(), strict=True)
            for back in range(count, -1, -1)
        ]
        return KeptReading(prefixes, self._reader(len(prefixes), lambda session: session.log_probs_along(rows, counts)))

    def _reader(self, count: int, ask: Callable[[Lookback], Tensor]) -> Callable[[Any], Tensor]:
        known: dict[int, Tensor] = {}

        def read(leaf: Any) -> Tensor:
            if id(leaf) not in known:
                model, session = self._sessions[id(leaf)]
                known[id(leaf)] = checked_laws(model, ask(session), count)
            return known[id(leaf)]

        return read
