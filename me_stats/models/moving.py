"""Rows spread over several sessions of one model: those that must start anew move together to a fresh one."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from me_stats.devices import on_device
from me_stats.models.base import Cost, Prefix, Session, open_session


class MovingRows:
    """A session whose rows can be given other prefixes: they leave their session, which ends with its last row.

    `place` (N,) is where each row stands in its own session.
    """

    def __init__(self, model: Any, prompts: Sequence[Prefix], *, max_new_tokens: int | None = None) -> None:
        self._model = model
        self.sessions: dict[int, Session] = {}
        self._members: dict[int, int] = {}
        self._home = np.zeros(len(prompts), dtype=np.int64)
        self.place = np.zeros(len(prompts), dtype=np.int64)
        self._left = Cost()  # of sessions that ended
        self._opened = 0
        self._open(np.arange(len(prompts)), prompts, max_new_tokens)

    @property
    def cost(self) -> Cost:
        return sum((session.cost for session in self.sessions.values()), self._left)

    def append(self, rows: np.ndarray, tokens: Tensor) -> None:
        for session, mine in self.groups(rows):
            own = tokens if len(mine) == len(rows) else tokens[on_device(mine, tokens.device)]
            session.append(self.place[rows[mine]], own)

    def log_probs(self, rows: np.ndarray) -> Tensor:
        parts = [(mine, session.log_probs(self.place[rows[mine]])) for session, mine in self.groups(rows)]
        if len(parts) == 1:
            return parts[0][1]
        laws = torch.cat([part for _, part in parts])
        back = np.argsort(np.concatenate([mine for mine, _ in parts]), kind="stable")
        return laws[on_device(back, laws.device)]

    def groups(self, rows: np.ndarray) -> Iterator[tuple[Session, np.ndarray]]:
        """Sessions of `rows`, each with the places of its rows in `rows`."""
        homes = self._home[rows]
        for home in np.unique(homes).tolist():
            yield self.sessions[home], np.flatnonzero(homes == home)

    def move(self, rows: np.ndarray, prompts: Sequence[Prefix], *, max_new_tokens: int | None = None) -> None:
        """Give `rows` the prefixes `prompts` in a fresh session."""
        if not len(rows):
            return
        for home in self._home[rows].tolist():
            self._members[home] -= 1
            if not self._members[home]:
                self._left += self.sessions.pop(home).cost
        self._open(rows, prompts, max_new_tokens)

    def _open(self, rows: np.ndarray, prompts: Sequence[Prefix], max_new_tokens: int | None) -> None:
        self._home[rows], self.place[rows] = self._opened, np.arange(len(rows))
        self.sessions[self._opened] = open_session(self._model, prompts, max_new_tokens=max_new_tokens)
        self._members[self._opened] = len(rows)
        self._opened += 1


def feed(session: Any, rows: np.ndarray, tails: Sequence[Prefix]) -> None:
    """Append the `tails`, tokens of different lengths, to their `rows` (B,) of a session."""
    for step in range(max(map(len, tails), default=0)):
        longer = np.array([place for place, tail in enumerate(tails) if len(tail) > step])
        session.append(rows[longer], torch.tensor([tails[place][step] for place in longer.tolist()]))
