"""Servers that fail in every way: nothing is lost, nothing counted twice, no half-written file, no key in sight."""

from __future__ import annotations

import pickle
import threading
import traceback
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from me_stats import ConstantMixing, Ensemble
from me_stats.models import MarkovModel
from me_stats.served import ServedME, ServedModel, ServerChanged, sample_kept
from tests.served.fake import FAULTS, Fake, direct, running, served
from tests.served.test_sampler import CHAINS, STEPS, WEIGHTS, V, pvalue

KEY = "sk-not-a-secret"


@pytest.fixture(autouse=True)
def _no_proxy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")


@pytest.fixture
def _short_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("me_stats.served.client._FIRST_PAUSE", 0.001)
    monkeypatch.setattr("me_stats.served.client._LONGEST_PAUSE", 0.01)


def now_and_then(seed: int, share: float = 0.15) -> Any:
    """A fault with one request in seven, of a kind that the number of the request decides."""

    def fault(number: int) -> str | None:
        rng = np.random.default_rng([seed, number])
        return str(rng.choice(FAULTS)) if rng.random() < share else None

    return fault


def ensemble(*models: ServedModel) -> Ensemble:
    return Ensemble(list(models), ConstantMixing(WEIGHTS))


@pytest.mark.usefixtures("_short_pauses")
@pytest.mark.parametrize("requests", [800, pytest.param(10_000, marks=pytest.mark.slow)])
def test_a_fuzzed_server_gives_the_tokens_of_a_clean_one(requests: int) -> None:
    rows = round(requests / 29.3)  # runs of 60 tokens at these weights
    fuzzed = [Fake(chain, faults=now_and_then(seed)) for seed, chain in enumerate(CHAINS)]
    given = {"n": rows, "max_new_tokens": STEPS, "seed": 8}
    clean = ServedME(ensemble(*[direct(Fake(chain)) for chain in CHAINS])).sample([0], **given)
    with served(fuzzed[0], concurrency=8) as one, served(fuzzed[1], concurrency=8) as other:
        trace = ServedME(ensemble(one, other), rows_at_once=6).sample([0], **given)
    assert bool((trace.tokens == clean.tokens).all())
    assert bool((trace.components == clean.components).all())
    # What was drawn and lost, or sent twice, is in no count.
    assert trace.cost.requests == clean.cost.requests >= 0.95 * requests
    assert trace.lengths.tolist() == [STEPS] * rows
    assert min(fake.failed for fake in fuzzed) > 0.05 * requests / 2
    assert pvalue(trace) > 1e-6


@pytest.mark.usefixtures("_short_pauses")
@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("dialect", ["llama.cpp", "vllm", "sglang"])
def test_each_fault_in_each_dialect_changes_no_token(fault: str, dialect: str) -> None:
    chain = CHAINS[0]
    seeds = list(range(100, 112))
    expected = direct(Fake(chain, dialect=dialect)).sample_tokens([(0,)] * 12, 4, seeds)
    with served(Fake(chain, dialect=dialect, faults=lambda n: fault if n % 3 == 2 else None), concurrency=3) as model:
        assert model.sample_tokens([(0,)] * 12, 4, seeds) == expected
        assert model.cost.requests == 12
        assert (model.client.retried > 0) == (fault != "delay")


@pytest.mark.usefixtures("_short_pauses")
def test_a_server_that_comes_back_with_another_model_ends_the_run() -> None:
    for name, chain in (("toy", MarkovModel.random(V, seed=9)), ("another", CHAINS[0])):
        first = Fake(CHAINS[0])
        with running(first) as url:
            server = first.server  # type: ignore[attr-defined]

            def fault(
                number: int, first: Fake = first, server: Any = server, name: str = name, chain: Any = chain
            ) -> Any:
                # The process dies with a request in flight, and another takes its port.
                if number == 20:
                    server.fake = Fake(chain, name=name)
                    return "drop"
                return None

            first.faults = fault
            model = ServedModel(url, vocabulary=CHAINS[0].vocabulary)
            with pytest.raises(ServerChanged, match=r"changed during the run: .* thrown away"):
                ServedME(Ensemble([model], ConstantMixing([1.0]))).sample([0], n=50, max_new_tokens=5)
            model.client.close()


@pytest.mark.usefixtures("_short_pauses")
def test_a_change_that_no_request_noticed_is_found_at_the_end() -> None:
    first = Fake(CHAINS[0])
    with running(first) as url:
        server = first.server  # type: ignore[attr-defined]
        first.faults = lambda number: setattr(server, "fake", Fake(CHAINS[1])) if number == 20 else None
        model = ServedModel(url, vocabulary=CHAINS[0].vocabulary)
        with pytest.raises(ServerChanged, match="log-probability of token"):
            ServedME(Ensemble([model], ConstantMixing([1.0]))).sample([0], n=50, max_new_tokens=5)
        model.client.close()


@pytest.mark.usefixtures("_short_pauses")
def test_a_server_that_was_away_is_waited_for() -> None:
    fake = Fake(CHAINS[0])
    with running(fake) as url:
        model = ServedModel(url, vocabulary=fake.model.vocabulary, retries=500)
        expected = model.sample_tokens([(0,)], 5, [3])
        port = int(url.rsplit(":", 1)[1])
    model.client.close()
    found: list[Any] = []
    asking = threading.Thread(target=lambda: found.append(model.sample_tokens([(0,)], 5, [3])))
    asking.start()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("tests.served.fake._Server.PORT", port)
        with running(fake):
            asking.join(timeout=20)
    model.client.close()
    assert found == [expected]


def test_concurrency_is_bounded() -> None:
    fake = Fake(CHAINS[0], faults=lambda number: "delay")
    with served(fake, concurrency=3) as model:
        threads = [threading.Thread(target=model.sample_tokens, args=([(0,)] * 10, 2, range(10))) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert 1 < fake.most_running <= 3


@pytest.mark.usefixtures("_short_pauses")
def test_the_key_is_sent_and_shown_nowhere(caplog: pytest.LogCaptureFixture, tmp_path: Path) -> None:
    caplog.set_level("DEBUG")
    fake = Fake(CHAINS[0], key=KEY)
    with served(fake, api_key=KEY) as model:
        sampler = ServedME(Ensemble([model], ConstantMixing([1.0])))
        trace = sample_kept(sampler, [0], folder=tmp_path, n=2, max_new_tokens=3)
        shown = repr(model) + repr(model.client) + repr(sampler) + repr(trace) + str(model.identity) + caplog.text
    with served(fake, api_key="sk-wrong") as model:
        with pytest.raises(ValueError, match=r"answered 401: .*\*\*\*") as caught:
            model.sample_tokens([(0,)], 1, [0])
        shown += "".join(traceback.format_exception(caught.value))
        with pytest.raises(TypeError):
            pickle.dumps(model)
    assert "sk-" not in shown
    assert not any(b"sk-" in path.read_bytes() for path in tmp_path.rglob("*") if path.is_file())


def test_kept_rows_survive_an_interruption(tmp_path: Path) -> None:
    given: dict[str, Any] = {"n": 12, "max_new_tokens": STEPS, "seed": 4}
    whole = ServedME(ensemble(*[direct(Fake(chain)) for chain in CHAINS])).sample([[0], [2]], **given)
    fakes = [Fake(chain) for chain in CHAINS]
    sampler = ServedME(ensemble(*map(direct, fakes)), rows_at_once=1)

    def interrupt(done: int, total: int) -> None:
        if done >= 8:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        sample_kept(sampler, [[0], [2]], folder=tmp_path, rows_per_part=4, progress=interrupt, **given)
    kept = sorted(path.name for path in tmp_path.iterdir())
    assert kept
    asked = sum(len(fake.requests) for fake in fakes)
    trace = sample_kept(sampler, [[0], [2]], folder=tmp_path, rows_per_part=4, **given)
    assert bool((trace.tokens == whole.tokens).all())
    assert trace.cost.requests == whole.cost.requests
    assert sum(len(fake.requests) for fake in fakes) - asked < whole.cost.requests
    again = sum(len(fake.requests) for fake in fakes)
    sample_kept(sampler, [[0], [2]], folder=tmp_path, rows_per_part=4, **given)
    assert sum(len(fake.requests) for fake in fakes) == again
    assert len(sample_kept(sampler, [[0], [2]], folder=tmp_path, **{**given, "seed": 5}).rows) == 24


def test_a_full_disk_leaves_whole_files_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import os

    given: dict[str, Any] = {"n": 8, "max_new_tokens": 5, "rows_per_part": 2}
    sampler = ServedME(ensemble(*[direct(Fake(chain)) for chain in CHAINS]))
    calls = []

    def full(*arguments: Any) -> None:
        calls.append(arguments)
        if len(calls) > 2:
            raise OSError(28, "No space left on device")
        replace(*arguments)

    replace = os.replace
    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(OSError, match="No space left"):
        sample_kept(sampler, [0], folder=tmp_path, **given)
    monkeypatch.setattr(os, "replace", replace)
    assert sorted(path.suffix for path in tmp_path.iterdir()) == [".npz"] * 2
    assert len(sample_kept(sampler, [0], folder=tmp_path, **given).rows) == 8


def test_an_interruption_ends_the_requests_that_wait() -> None:
    fake = Fake(CHAINS[0], faults=lambda number: "delay")
    with served(fake) as model:
        sampler = ServedME(Ensemble([model, model], ConstantMixing(WEIGHTS)))

        def interrupt(tokens: int) -> None:
            raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            sampler.sample([0], n=200, max_new_tokens=STEPS, progress=interrupt)
    assert len(fake.requests) < 1000
