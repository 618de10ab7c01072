"""HTTP with retries, once for the whole project: JSON in, JSON out, bounded, and silent about the key."""

from __future__ import annotations

import threading
import time
import weakref
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar
from urllib.parse import urlsplit

T = TypeVar("T")
Json = dict[str, Any]

_FIRST_PAUSE, _LONGEST_PAUSE = 0.25, 30.0  # seconds
_FIELD_REMEDY = "the server does not take this request; leave a field out by giving it as None, such as top_k=None"
_REMEDIES = {
    400: _FIELD_REMEDY,
    401: "give a valid api_key",
    403: "give an api_key that may use this model",
    404: "give the base url, which mostly ends in /v1, and a model that the server serves",
    422: _FIELD_REMEDY,
    429: "lower concurrency, or raise retries",
}


class Malformed(ValueError):
    """An answer that is cut off, not JSON, or that answers another request: asked again where the client is patient."""


class HttpClient:
    """POST and GET of JSON against one base url, from any number of threads.

    Parameters
    ----------
    url
        Base url, to which paths are appended.
    api_key
        Sent as a bearer token; never part of a message or of `repr`.
    concurrency
        Requests that run at the same time; further threads wait.
    timeout
        Seconds that one request may take to connect, and to answer.
    retries
        Further attempts after status 429 or 5xx, a timeout or a lost connection, with pauses of 0.25 s, 0.5 s, ... (or
        as the server asks).
    patient
        Also ask again where no server listens, as while it restarts, and after a `Malformed` answer.
    needed_by
        Who needs httpx2, for the message where it is missing.

    Attributes
    ----------
    retried
        Attempts that failed so far.

    Raises
    ------
    ValueError
        For arguments out of range; when used: for a request that the server refuses, or an answer that stays malformed.
    ConnectionError
        When used: for a server that is out of reach, or still fails or is silent after all retries.

    >>> HttpClient("http://localhost:8000", api_key="secret")
    HttpClient('http://localhost:8000')
    """

    def __init__(
        self,
        url: str,
        *,
        api_key: str | None = None,
        concurrency: int = 8,
        timeout: float = 60.0,
        retries: int = 3,
        patient: bool = True,
        needed_by: str = "a served model",
    ) -> None:
        if not url.startswith(("http://", "https://")) or "@" in urlsplit(url).netloc:
            raise ValueError("url must start with http:// or https:// and hold no credentials; give api_key instead")
        if api_key is not None and not (api_key.isascii() and api_key.isprintable() and " " not in api_key):
            raise ValueError("api_key holds spaces, line ends or letters that no header takes; strip() it")
        if concurrency < 1 or retries < 0 or not timeout > 0:
            raise ValueError(
                "concurrency must be at least 1, retries at least 0 and timeout positive, got "
                f"{concurrency}, {retries} and {timeout}"
            )
        self.url, self.concurrency, self.timeout, self.retries = url.rstrip("/"), concurrency, timeout, retries
        self.patient, self.retried = patient, 0
        self._api_key, self._needed_by = api_key, needed_by
        self._lock, self._slots = threading.Lock(), threading.BoundedSemaphore(concurrency)
        self._client: Any = None
        self._httpx: Any = None

    def post(self, path: str, body: Callable[[int], Json], *, read: Callable[[Json, Any], T]) -> T:
        """``read(sent, answer)`` of the answer to ``body(attempt)``, attempt 0, 1, ..., until one is well."""
        return self._attempts("POST", path, body, read)

    def get(self, path: str) -> Any:
        """The JSON at `path`."""
        return self._attempts("GET", path, lambda attempt: {}, lambda sent, answer: answer)

    def map(self, function: Callable[..., T], *items: Iterable[Any]) -> list[T]:
        """``function`` of the items in threads, in order; the first failure ends the rest."""
        columns = [list(column) for column in items]
        if len(columns[0]) == 1:
            return [function(*(column[0] for column in columns))]
        with ThreadPoolExecutor(max_workers=self.concurrency) as pool:
            return list(pool.map(function, *columns))

    def close(self) -> None:
        """Close idle connections; the next request opens new ones."""
        with self._lock:
            client, self._client = self._client, None
        if client is not None:
            client.close()

    def __enter__(self) -> HttpClient:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"HttpClient({self.url!r})"

    def _attempts(self, method: str, path: str, body: Callable[[int], Json], read: Callable[[Json, Any], T]) -> T:
        where = self.url + path
        for attempt in range(self.retries + 1):
            sent = body(attempt)
            try:
                return self._attempt(method, where, sent, read)
            except _Failed as failure:
                failed = failure
            with self._lock:
                self.retried += 1
            if failed.final or attempt == self.retries:
                break
            time.sleep(min(_FIRST_PAUSE * 2**attempt, _LONGEST_PAUSE) if failed.pause is None else failed.pause)
        if failed.malformed is not None:
            raise failed.malformed
        attempts = "" if failed.final else f" ({self.retries + 1} attempts)"
        raise ConnectionError(f"{failed}{attempts}") from failed.__cause__

    def _attempt(self, method: str, where: str, sent: Json, read: Callable[[Json, Any], T]) -> T:
        client = self._open()
        try:
            with self._slots:
                response = client.request(method, where, json=sent) if method == "POST" else client.get(where)
        except self._httpx.ConnectError as error:
            refused = f"cannot connect to {where} ({error}); is the server running, and is the url right?"
            raise _Failed(refused, final=not self.patient) from error
        except self._httpx.TransportError as error:
            lost = f"{where} failed: {type(error).__name__}, with timeout={self.timeout:g} s; raise the timeout"
            raise _Failed(lost) from error
        if not response.is_success:
            self._refused(where, response)
        try:
            return read(sent, self._parsed(where, response))
        except Malformed as error:
            raise _Failed(str(error), final=not self.patient, malformed=error) from error

    def _refused(self, where: str, response: Any) -> None:
        status = response.status_code
        remedy = _REMEDIES.get(status, "see the log of the server")
        failure = f"{where} answered {status}: {self._excerpt(response.text)}; {remedy}"
        if status != 429 and status < 500:
            raise ValueError(failure)
        raise _Failed(failure, pause=_retry_after(response.headers.get("retry-after")))

    def _parsed(self, where: str, response: Any) -> Any:
        try:
            return response.json()
        except ValueError as error:
            raise Malformed(
                f"{where} answered with something other than JSON, {self._excerpt(response.text)!r}; "
                "is it the base url of an OpenAI-style server?"
            ) from error

    def _excerpt(self, text: str) -> str:
        # Servers like to quote the key that they refuse.
        return (text.replace(self._api_key, "***") if self._api_key else text)[:200]

    def _open(self) -> Any:
        with self._lock:
            if self._client is None:
                self._httpx = _httpx(self._needed_by)
                headers = {"Authorization": f"Bearer {self._api_key}"} if self._api_key else {}
                limits = self._httpx.Limits(
                    max_connections=self.concurrency, max_keepalive_connections=self.concurrency
                )
                self._client = self._httpx.Client(headers=headers, timeout=self.timeout, limits=limits)
                weakref.finalize(self, self._client.close)
            return self._client


class _Failed(Exception):
    """One attempt that may be made again, unless it is `final`."""

    def __init__(
        self, message: str, *, pause: float | None = None, final: bool = False, malformed: Malformed | None = None
    ) -> None:
        super().__init__(message)
        self.pause, self.final, self.malformed = pause, final, malformed


def _retry_after(header: str | None) -> float | None:
    """The pause that the server asks for, where it gives one in seconds."""
    return min(float(header), _LONGEST_PAUSE) if header and header.isdecimal() else None


def _httpx(needed_by: str) -> Any:
    try:
        import httpx2
    except ImportError as error:
        raise ImportError(f"{needed_by} needs an HTTP client; run: pip install httpx2") from error
    return httpx2
