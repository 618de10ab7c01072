"""One HTTP client: what it tries again, how long it waits, and what it never says."""

from __future__ import annotations

import socket
import sys
from collections.abc import Callable
from typing import Any

import pytest

from me_stats.served import HttpClient
from me_stats.served.client import Malformed
from tests.served.fake import Fake, running
from tests.served.test_sampler import CHAINS

SENT = {"prompt": [0], "n_predict": 2, "seed": 1, "n_probs": 0}


@pytest.fixture(autouse=True)
def _no_proxy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")


@pytest.fixture
def pauses(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    taken: list[float] = []
    monkeypatch.setattr("me_stats.served.client.time.sleep", taken.append)
    return taken


def post(client: HttpClient, *, read: Callable[[Any, Any], Any] = lambda sent, answer: answer) -> Any:
    with client:
        return client.post("/completion", lambda attempt: SENT, read=read)


def test_pauses_double_and_give_way_to_the_server(pauses: list[float]) -> None:
    faults = ["drop", "drop", "429", "drop", None]
    with running(Fake(CHAINS[0], faults=faults.__getitem__)) as url:
        client = HttpClient(url, retries=4)
        assert len(post(client)["tokens"]) == 2
    assert pauses == [0.25, 0.5, 0.0, 2.0]
    assert client.retried == 4


def test_a_bad_answer_is_asked_for_again_by_the_patient(pauses: list[float]) -> None:
    for patient, asked in ((True, 3), (False, 1)):
        fake = Fake(CHAINS[0], faults=lambda number: "malformed")
        with running(fake) as url, pytest.raises(Malformed, match="something other than JSON"):
            post(HttpClient(url, retries=2, patient=patient))
        assert len(fake.requests) == asked


def test_each_attempt_can_differ(pauses: list[float]) -> None:
    fake = Fake(CHAINS[0], faults=lambda number: "drop" if number < 2 else None)
    with running(fake) as url, HttpClient(url) as client:
        client.post("/completion", lambda attempt: {**SENT, "tag": attempt}, read=lambda sent, answer: answer)
    assert [sent["tag"] for sent in fake.requests] == [0, 1, 2]


def test_a_refusal_is_final(pauses: list[float]) -> None:
    with running(Fake(CHAINS[0])) as url, HttpClient(url) as client:
        with pytest.raises(ValueError, match="answered 404"):
            client.get("/nothing")
        assert client.get("/health") == {"status": "ok"}
    assert pauses == []


def test_where_no_server_listens(pauses: list[float]) -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{unused.getsockname()[1]}"
        with pytest.raises(ConnectionError, match=r"cannot connect to .* right\? \(3 attempts\)"):
            post(HttpClient(url, retries=2))
        with pytest.raises(ConnectionError, match=r"right\?$"):
            post(HttpClient(url, retries=2, patient=False))
    assert pauses == [0.25, 0.5]


def test_a_closed_client_opens_again_and_needs_its_package(monkeypatch: pytest.MonkeyPatch) -> None:
    with running(Fake(CHAINS[0])) as url:
        client = HttpClient(url)
        assert post(client) == post(client)
    monkeypatch.setitem(sys.modules, "httpx2", None)
    with pytest.raises(ImportError, match="pip install httpx2"):
        HttpClient("http://localhost", needed_by="this").get("/")
