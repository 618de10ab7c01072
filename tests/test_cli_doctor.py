"""``me-stats doctor``: verdicts, exit codes, and a key that stays where it is."""

from __future__ import annotations

from typing import Any

import pytest
from typer.testing import CliRunner

from me_stats import cli
from me_stats.models import MarkovModel
from tests.commands import Run
from tests.leaky import Leaky
from tests.served.fake import running

CHAIN = MarkovModel.random(12, seed=3)
KEY = "sk-very-secret"


class Sized(Leaky):
    """A `Leaky` llama.cpp server that tells the number of its ids."""

    def get(self, path: str) -> dict[str, Any] | None:
        found = super().get(path)
        return {"data": [{"id": "toy", "meta": {"n_vocab": 12}}]} if path == "/v1/models" else found


@pytest.fixture(autouse=True)
def _straight(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")


def squeezed(text: str) -> str:
    return " ".join(text.replace("│", " ").split())


def test_this_machine(run: Run) -> None:
    result = run("doctor")
    assert result.code == 0
    assert result.err == ""
    assert "This machine" in result.out
    assert "dtypes on cpu" in result.out
    assert result.out.splitlines()[-1].endswith(" 0 fail")


def test_a_good_server_and_one_that_leaks(run: Run) -> None:
    with running(Sized(CHAIN)) as url:
        result = run("doctor", "--endpoint", url, "--draws", "90")
        assert result.code == 0
        assert result.out.splitlines()[-1] == "6 ok, 1 warn, 0 fail"  # no vocabulary, so no texts
    with running(Sized(CHAIN, defaults={"temperature": 0.3, "top_k": 2})) as url:
        result = run("doctor", "--endpoint", url, "--draws", "90")
        assert result.code == 0
        assert "default: temperature" in squeezed(result.out)
        assert "--top-k 0" in squeezed(result.out)
    with running(Sized(CHAIN, shift=1)) as url:
        result = run("doctor", "--endpoint", f"{url}/v1", "--draws", "90")
        assert result.code == 1
        assert "1 fail" in result.out


def test_the_key_comes_from_the_environment_and_is_not_shown(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("A_KEY", KEY)
    fake = Sized(CHAIN, key=KEY)
    with running(fake) as url:
        result = run("doctor", "--endpoint", url, "--draws", "90", "--api-key-env", "A_KEY")
        assert result.code == 0
        assert KEY not in result.out + result.err
        monkeypatch.setenv("A_KEY", KEY + "-wrong")
        result = run("doctor", "--endpoint", url, "--draws", "90", "--api-key-env", "A_KEY")
        assert result.code == 1
        assert "answered 401" in squeezed(result.out)
        assert KEY not in result.out + result.err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--endpoint", "http://127.0.0.1:9", "--dialect", "vllm"), "cannot connect to http://127.0.0.1:9"),
        (("--endpoint", "127.0.0.1:9"), "url must start with http://"),
        (("--endpoint", "http://127.0.0.1:9", "--dialect", "tgi"), "--dialect tgi: one of llama.cpp, vllm"),
        (("--endpoint", "http://127.0.0.1:9", "--api-key-env", "NO_KEY"), "--api-key-env NO_KEY: no such environment"),
        (("--endpoint", "http://127.0.0.1:9", "--vocabulary", "bundled:pros"), "did you mean 'bundled:prose'"),
        (("--endpoint", "http://127.0.0.1:9", "--draws", "3"), "--draws"),
    ],
)
def test_mistakes_are_one_line(run: Run, arguments: tuple[str, ...], message: str) -> None:
    result = run("doctor", *arguments)
    assert result.code == 2
    assert message in result.line


def test_a_server_that_does_not_tell_its_size_needs_a_vocabulary(run: Run) -> None:
    with running(Leaky(CHAIN, dialect="vllm")) as url:
        result = run("doctor", "--endpoint", url, "--dialect", "vllm")
    assert result.code == 2
    assert "give --vocabulary" in result.line


def test_help_says_what_the_exit_codes_mean() -> None:
    result = CliRunner().invoke(cli.app, ["doctor", "--help"])
    assert result.exit_code == 0
    assert "Exit code" in result.stdout
