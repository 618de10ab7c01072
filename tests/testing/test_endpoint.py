"""Completions against a real server on this machine: its law, its faults, and what never leaves the client."""

from __future__ import annotations

import socket
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from me_stats.goodness import portfolio
from me_stats.models import TableModel
from me_stats.testing.endpoint import Completions
from tests.testing.server import KEY, serving

V, EOS = 6, 5
PROMPT = (1, 2)


@pytest.fixture(autouse=True)
def _no_proxy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")


@pytest.fixture(scope="module")
def model() -> TableModel:
    return TableModel.random(V, seed=3, eos=(EOS,))


def first_tokens(rows: list[list[int]]) -> np.ndarray:
    return np.bincount([row[0] for row in rows], minlength=V)


def sampled(model: TableModel, *, n: int, server: dict[str, Any] | None = None, **body: Any) -> np.ndarray:
    with serving(model, **(server or {})) as (url, _):
        return first_tokens(Completions(url, model="toy", **body)([PROMPT] * n, max_new_tokens=1, seed=0))


def test_rows_follow_the_law_of_the_model(model: TableModel) -> None:
    law = model.log_probs([PROMPT])[0].numpy()
    assert portfolio(sampled(model, n=400), law).pvalue > 1e-3
    assert portfolio(sampled(model, n=400, temperature=0.5), law, level=1e-9).rejected


def test_defaults_of_the_server_are_overruled_unless_left_to_it(model: TableModel) -> None:
    law, server = model.log_probs([PROMPT])[0].numpy(), {"defaults": {"top_k": 2}}
    assert portfolio(sampled(model, n=150, server=server), law).pvalue > 1e-3
    left_out = sampled(model, n=150, server=server, top_k=None)
    assert portfolio(left_out, law, level=1e-9).rejected
    assert np.count_nonzero(left_out) == 2


def test_false_alarms_are_rare(model: TableModel) -> None:
    law = model.log_probs([PROMPT])[0].numpy()
    with serving(model) as (url, _):
        sampler = Completions(url, model="toy")
        counts = [first_tokens(sampler([PROMPT] * 25, max_new_tokens=1, seed=seed)) for seed in range(40)]
    # P(Binomial(40, 0.05) > 10) < 1e-5
    assert sum(portfolio(row, law).pvalue <= 0.05 for row in counts) <= 10


def test_rows_repeat_with_the_seed_and_differ_otherwise(model: TableModel) -> None:
    prompts = [(1,), (1,), (0, 3, 2), (4,)] * 5
    with serving(model) as (url, served):
        sampler = Completions(url, model="toy", concurrency=4)
        rows = sampler(prompts, max_new_tokens=8, seed=1)
        assert sampler(prompts, max_new_tokens=8, seed=1) == rows
        assert sampler(prompts, max_new_tokens=8, seed=2) != rows
        assert Completions(url, model="toy", concurrency=1)(prompts, max_new_tokens=8, seed=1) == rows
        assert served.most_running <= 4
    assert rows[0::4] != rows[1::4]
    assert all(len(row) == 8 or row[-1] == EOS for row in rows)
    assert any(len(row) < 8 for row in rows)


def test_a_request_holds_ids_a_seed_of_its_own_and_neutral_settings(model: TableModel) -> None:
    with serving(model) as (url, served):
        Completions(f"{url}/completions/", model="toy", min_p=None, user="x")([(1,), (1,)], max_new_tokens=2, seed=0)
    first, second = served.requests
    assert first.pop("seed") != second.pop("seed")
    assert (
        first
        == second
        == {
            "model": "toy",
            "prompt": [1],
            "max_tokens": 2,
            "temperature": 1.0,
            "top_p": 1.0,
            "top_k": -1,
            "repetition_penalty": 1.0,
            "return_token_ids": True,
            "user": "x",
        }
    )


def test_ids_may_come_as_logprobs(model: TableModel) -> None:
    prompts = [PROMPT] * 8
    with serving(model) as (url, _):
        expected = Completions(url, model="toy")(prompts, max_new_tokens=4, seed=0)
    with serving(model, returns="logprobs") as (url, _):
        sampler = Completions(url, model="toy", return_tokens_as_token_ids=True, logprobs=0)
        assert sampler(prompts, max_new_tokens=4, seed=0) == expected


def test_an_end_that_the_server_strips_is_put_back(model: TableModel) -> None:
    prompts = [PROMPT] * 40
    with serving(model) as (url, _):
        expected = Completions(url, model="toy", eos=[EOS, 0])(prompts, max_new_tokens=4, seed=0)
    with serving(model, strip_eos=True) as (url, _):
        assert Completions(url, model="toy", eos=EOS)(prompts, max_new_tokens=4, seed=0) == expected
        without = Completions(url, model="toy")(prompts, max_new_tokens=4, seed=0)
        assert without == [[token for token in row if token != EOS] for row in expected]
        with pytest.raises(ValueError, match="does not say which of the ids"):
            Completions(url, model="toy", eos=[EOS, V + 1])(prompts, max_new_tokens=4, seed=0)


@pytest.mark.parametrize("fault", ["500", "503", "429", "drop", "slow"])
def test_a_passing_fault_changes_no_row(model: TableModel, fault: str) -> None:
    with serving(model) as (url, _):
        expected = Completions(url, model="toy")([PROMPT] * 4, max_new_tokens=4, seed=0)
    with serving(model, faults=[None, fault]) as (url, served):
        sampler = Completions(url, model="toy", timeout=0.5)
        assert sampler([PROMPT] * 4, max_new_tokens=4, seed=0) == expected
    assert len(served.requests) == 5


@pytest.mark.parametrize(
    ("fault", "error", "says"),
    [
        ("500", ConnectionError, "answered 500: .*planted 500.*see the log of the server .2 attempts"),
        ("429", ConnectionError, "answered 429: .*lower concurrency"),
        ("slow", ConnectionError, "ReadTimeout, with timeout=0.3 s; raise the timeout"),
        ("400", ValueError, "answered 400: .*giving it as None"),
        ("malformed", ValueError, "something other than JSON"),
        ("empty", ValueError, "one entry in choices"),
        ("short", ValueError, "stopped after 3 of 4 tokens with finish_reason 'length'"),
    ],
)
def test_a_lasting_fault_is_named_with_the_url_and_a_remedy(
    model: TableModel, fault: str, error: type[Exception], says: str
) -> None:
    endless = TableModel.random(V, seed=3)
    with serving(endless, faults=[fault] * 2) as (url, served):
        with pytest.raises(error, match=says) as caught:
            Completions(url, model="toy", retries=1, timeout=0.3)([PROMPT], max_new_tokens=4, seed=0)
        assert f"{url}/completions" in str(caught.value)
        assert len(served.requests) == (2 if error is ConnectionError else 1)


def test_text_alone_is_refused(model: TableModel) -> None:
    with serving(model, returns="text") as (url, _), pytest.raises(ValueError, match=r"must return .*token_ids"):
        Completions(url, model="toy")([PROMPT], max_new_tokens=2, seed=0)


def test_one_failure_ends_the_whole_call(model: TableModel) -> None:
    with serving(model, faults=["400"]) as (url, served):
        with pytest.raises(ValueError, match="answered 400"):
            Completions(url, model="toy", concurrency=1)([PROMPT] * 200, max_new_tokens=1, seed=0)
        assert len(served.requests) < 100


def test_no_server_and_no_page() -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{unused.getsockname()[1]}/v1"
        with pytest.raises(ConnectionError, match=r"cannot connect to .*is the server running"):
            Completions(url, model="toy")([PROMPT], max_new_tokens=1, seed=0)
    with serving(TableModel.random(V, seed=0)) as (url, _), pytest.raises(ValueError, match="mostly ends in /v1"):
        Completions(url.removesuffix("/v1"), model="toy")([PROMPT], max_new_tokens=1, seed=0)


def test_the_key_is_sent_and_never_shown(model: TableModel) -> None:
    with serving(model, key=KEY) as (url, _):
        good, bad = (Completions(url, model="toy", api_key=key) for key in (KEY, "sk-wrong"))
        assert len(good([PROMPT], max_new_tokens=1, seed=0)) == 1
        with pytest.raises(ValueError, match=r"answered 401: .*\*\*\*.*valid api_key") as caught:
            bad([PROMPT], max_new_tokens=1, seed=0)
    assert "sk-wrong" not in str(caught.value) + repr(bad)


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: Completions("localhost:8000", model="m"), "url must start with http"),
        (lambda: Completions("http://me:word@host/v1", model="m"), "no credentials"),
        (lambda: Completions("http://host/v1", model="m", api_key="word\n"), "strip"),
        (lambda: Completions("http://host/v1", model="m", concurrency=0), "concurrency must be at least 1"),
        (lambda: Completions("http://host/v1", model="m", retries=-1), "retries at least 0"),
        (lambda: Completions("http://host/v1", model="m", timeout=0), "timeout positive"),
        (lambda: Completions("http://host/v1", model="m", seed=3), "sets seed itself"),
        (lambda: Completions("http://host/v1", model="m", n=3), "sets n itself"),
        (lambda: Completions("http://host/v1", model="m")([(0,)], max_new_tokens=0, seed=0), "max_new_tokens must be"),
    ],
)
def test_bad_arguments_are_named(make: Callable[[], object], says: str) -> None:
    with pytest.raises(ValueError, match=says) as caught:
        make()
    assert "word" not in str(caught.value)
