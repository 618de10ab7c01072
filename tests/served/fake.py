"""Servers of a known law in this process: they speak every dialect, can misbehave, and can be asked without HTTP."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np

from me_stats.models import TableModel
from me_stats.served import ServedModel
from tests.http_server import JsonHandler, Server, listening

Fault = Callable[[int], str | None]
FAULTS = ("500", "503", "429", "drop", "lost", "truncated", "malformed", "repeat", "delay")


class Fake:
    """Draws from `model` with the generator that a request's seed starts, and answers as `dialect` does.

    Parameters
    ----------
    faults
        Request number -> what goes wrong with it: a status, or one of `FAULTS`; None answers well.
    temperature, stale, tells
        Planted bugs: a temperature of the server's own, a prefix cache that lost so many last tokens, and whether the
        answer admits the temperature.
    stops
        Further ids at which the server stops, as at the end of a turn.
    top
        Most log-probabilities that it returns.
    """

    def __init__(
        self,
        model: TableModel,
        *,
        dialect: str = "llama.cpp",
        name: str = "toy",
        faults: Fault = lambda number: None,
        temperature: float = 1.0,
        tells: bool = True,
        stale: int = 0,
        stops: tuple[int, ...] = (),
        strips: bool = False,
        top: int | None = None,
        key: str | None = None,
    ) -> None:
        self.model, self.dialect, self.name, self.faults, self.key = model, dialect, name, faults, key
        self.temperature, self.tells, self.stale, self.strips, self.top = temperature, tells, stale, strips, top
        self.stops = {*stops, *model.vocabulary.eos}
        self.requests: list[dict[str, Any]] = []
        self.failed = self.running = self.most_running = 0
        self.last: bytes | None = None
        self.lock = threading.Lock()
        self._cdf: dict[int, np.ndarray] = {}

    def draw(self, prefix: list[int], count: int, seed: int) -> tuple[list[int], bool]:
        """Tokens after `prefix`, and whether they ended."""
        read = prefix[: len(prefix) - self.stale] if len(prefix) > self.stale + 1 else prefix
        state, written = int(self.model.states_of([tuple(read)])[0]), []
        for uniform in np.random.default_rng(seed).random(count):
            token = int(np.searchsorted(self._cdf_of(state), uniform, side="right"))
            written.append(token)
            if token in self.stops:
                return written, True
            state = int(self.model.next_states(np.array([state]), np.array([token]))[0])
        return written, False

    def _cdf_of(self, state: int) -> np.ndarray:
        if state not in self._cdf:
            mass = (self.model.log_table[state] / self.temperature).softmax(-1).numpy()
            self._cdf[state] = mass.cumsum() / mass.sum()
        return self._cdf[state]

    def get(self, path: str) -> dict[str, Any] | None:
        size = self.model.vocabulary.size
        return {
            "/props": {"model_path": self.name, "model_alias": self.name, "total_slots": 4},
            "/v1/models": {"data": [{"id": self.name, "meta": {"n_vocab": size}}]},
            "/version": {"version": "0"},
            "/get_model_info": {"model_path": self.name},
            "/health": {"status": "ok"},
        }.get(path)

    def post(self, path: str, sent: dict[str, Any]) -> dict[str, Any] | None:
        answer = {"/completion": self._llama, "/v1/completions": self._openai, "/generate": self._sglang}.get(path)
        return None if answer is None else answer(sent)

    def _top(self, prefix: list[int], wanted: int) -> list[tuple[int, float]]:
        law = self.model.log_probs([tuple(prefix)])[0].numpy()
        order = np.argsort(-law, kind="stable")[: min(wanted, self.top or wanted)]
        return [(int(token), float(law[token])) for token in order]

    def _llama(self, sent: dict[str, Any]) -> dict[str, Any]:
        tokens, ended = self.draw(sent["prompt"], sent["n_predict"], sent["seed"])
        told = {name: value for name, value in sent.items() if name not in ("prompt", "n_predict", "id_slot")}
        if self.temperature != 1 and self.tells:
            told["temperature"] = self.temperature
        answer = {
            "tokens": tokens, "stop_type": "eos" if ended else "limit", "model": self.name, "truncated": False,
            "tokens_evaluated": len(sent["prompt"]), "generation_settings": told, "timings": {"prompt_n": 1},
        }  # fmt: skip
        if sent["n_probs"]:
            law = [{"id": token, "logprob": value} for token, value in self._top(sent["prompt"], sent["n_probs"])]
            answer["completion_probabilities"] = [{"top_logprobs": law}]
        return answer

    def _openai(self, sent: dict[str, Any]) -> dict[str, Any]:
        tokens, ended = self.draw(sent["prompt"], sent["max_tokens"], sent["seed"])
        if ended and self.strips:
            tokens = tokens[:-1]
        choice: dict[str, Any] = {"finish_reason": "stop" if ended else "length", "text": ""}
        if sent.get("return_token_ids"):
            choice |= {"token_ids": tokens, "prompt_token_ids": sent["prompt"]}
        wanted = sent.get("logprobs")
        if wanted is not None:
            law = {f"token_id:{token}": value for token, value in self._top(sent["prompt"], wanted)}
            choice["logprobs"] = {"tokens": [f"token_id:{token}" for token in tokens], "top_logprobs": [law]}
        usage = {"prompt_tokens": len(sent["prompt"]), "prompt_tokens_details": {"cached_tokens": 0}}
        return {"id": f"cmpl-{sent.get('request_id', 'x')}", "model": self.name, "choices": [choice], "usage": usage}

    def _sglang(self, sent: dict[str, Any]) -> dict[str, Any]:
        options = sent["sampling_params"]
        tokens, ended = self.draw(sent["input_ids"], options["max_new_tokens"], options["sampling_seed"])
        finish = {"type": "stop", "matched": tokens[-1]} if ended else {"type": "length"}
        meta: dict[str, Any] = {"id": sent["rid"], "finish_reason": finish, "prompt_tokens": len(sent["input_ids"])}
        if sent.get("return_logprob"):
            law = self._top(sent["input_ids"], sent["top_logprobs_num"])
            meta["output_top_logprobs"] = [[[value, token, None] for token, value in law]]
        return {"output_ids": tokens[:-1] if ended and self.strips else tokens, "meta_info": meta}


class Direct:
    """What `HttpClient` does, without HTTP: the expected outcome of a run that nothing disturbs."""

    def __init__(self, fake: Fake) -> None:
        self.fake, self.url, self.concurrency, self.retried = fake, "direct", 1, 0

    def get(self, path: str) -> Any:
        return self.fake.get(path)

    def post(self, path: str, body: Callable[[int], Any], *, read: Callable[[Any, Any], Any]) -> Any:
        sent = body(0)
        with self.fake.lock:
            self.fake.requests.append(sent)
        return read(sent, self.fake.post(path, sent))

    def map(self, function: Callable[..., Any], *items: Iterable[Any]) -> list[Any]:
        return [function(*each) for each in zip(*items, strict=True)]


def direct(fake: Fake, **options: Any) -> ServedModel:
    """A ServedModel of `fake` without HTTP."""
    model = ServedModel("http://direct", vocabulary=fake.model.vocabulary, dialect=fake.dialect, **options)
    model.client = Direct(fake)  # type: ignore[assignment]
    return model


class _Handler(JsonHandler):
    server: _Server

    def do_GET(self) -> None:
        found = self.server.fake.get(self.path)
        self.answer(200 if found else 404, json.dumps(found or {"error": "no such page"}).encode())

    def do_POST(self) -> None:
        fake = self.server.fake
        sent = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if fake.key is not None and self.headers.get("Authorization") != f"Bearer {fake.key}":
            return self.answer(401, f"this key is wrong: {self.headers.get('Authorization')}".encode())
        with fake.lock:
            number = len(fake.requests)
            fake.requests.append(sent)
            fake.running += 1
            fake.most_running = max(fake.most_running, fake.running)
        try:
            fault = fake.faults(number)
            fake.failed += fault not in (None, "delay")
            self.respond(sent, fault)
        finally:
            with fake.lock:
                fake.running -= 1

    def respond(self, sent: dict[str, Any], fault: str | None) -> None:
        fake = self.server.fake
        if fault == "drop":
            self.close_connection = True
            return
        if fault is not None and fault.isdecimal():
            return self.answer(int(fault), b'{"error": "planted"}', {"Retry-After": "0"})
        if fault == "delay":
            time.sleep(0.003)
        body = json.dumps(fake.post(self.path, sent)).encode()
        with fake.lock:
            before, fake.last = fake.last, body
        if fault == "lost":
            self.close_connection = True
        elif fault == "truncated":
            self.answer(200, body[: len(body) // 2], {"Content-Length": str(len(body))})
            self.close_connection = True
        elif fault == "malformed":
            self.answer(200, body[: len(body) // 2])
        else:
            self.answer(200, before if fault == "repeat" and before else body)


class _Server(Server):
    def __init__(self, fake: Fake) -> None:
        super().__init__(_Handler)
        self.fake = fake


@contextmanager
def running(fake: Fake) -> Iterator[str]:
    """Url of a server that answers as `fake`; give it another `fake` to restart it with another model."""
    server = _Server(fake)
    fake.server = server  # type: ignore[attr-defined]
    with listening(server) as url:
        yield url


@contextmanager
def served(fake: Fake, **options: Any) -> Iterator[ServedModel]:
    """A `ServedModel` of a running `fake`."""
    with running(fake) as url:
        model = ServedModel(url, vocabulary=fake.model.vocabulary, dialect=fake.dialect, **{"retries": 30, **options})
        try:
            yield model
        finally:
            model.client.close()


__all__ = ["FAULTS", "Direct", "Fake", "direct", "running", "served"]
