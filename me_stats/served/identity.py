"""Whether a server still serves the model that a run began with."""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Iterable

COMPARED = 4  # the most probable tokens of the probe
_TOLERANCE = 0.25  # nats: above what batching and caches of one model do to a likely token, below another model


class ServerChanged(RuntimeError):
    """The server now serves another model than the one that this run began with."""


class Identity:
    """What a server said of its model at the first request, to compare with what it says later.

    Parameters
    ----------
    url
        For messages.
    told
        Asks the server for its names and sizes.
    probed
        Asks for log-probabilities after a fixed prefix, most probable first: other weights under the same name differ
        there. May be empty.
    """

    def __init__(self, url: str, told: Callable[[], dict[str, str]], probed: Callable[[], dict[int, float]]) -> None:
        self._url, self._told, self._probed = url, told, probed
        self._lock = threading.RLock()
        self._first: tuple[dict[str, str], dict[int, float]] | None = None
        self._marks: dict[str, str] = {}

    @property
    def names(self) -> dict[str, str]:
        """What the server said at first."""
        return self.pin()[0]

    def pin(self) -> tuple[dict[str, str], dict[int, float]]:
        """Names and law of the probe, asked for once."""
        with self._lock:
            if self._first is None:
                self._first = self._told(), self._probed()
            return self._first

    def verify(self) -> None:
        """Raise `ServerChanged` unless the server says now what it said at first."""
        names, law = self.pin()
        now = self._told()
        for name in sorted(names.keys() | now.keys()):
            self._compare(name, names.get(name), now.get(name))
        if law:
            told = self._probed()
            for token, value in list(law.items())[:COMPARED]:
                if not abs(told.get(token, -math.inf) - value) < _TOLERANCE:
                    raise self._changed(f"the log-probability of token {token} after the probe", value, told.get(token))

    def mark(self, marks: Iterable[tuple[str, str]]) -> None:
        """Compare what an answer says about the server with what earlier ones said."""
        with self._lock:
            for name, value in marks:
                self._compare(name, self._marks.setdefault(name, value), value)

    def _compare(self, name: str, first: str | None, now: str | None) -> None:
        if first != now:
            raise self._changed(name, first, now)

    def _changed(self, what: str, first: object, now: object) -> ServerChanged:
        return ServerChanged(
            f"the server at {self._url} changed during the run: {what} was {first}, and is {now}; what was written "
            "meanwhile is thrown away. Start it with the first model again, or begin anew"
        )
