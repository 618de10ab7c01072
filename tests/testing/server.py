"""A small completions server in this process: it samples a model of ours by our own sampler, and can misbehave."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from me_stats import CESampler
from me_stats.models import LanguageModel, MinP, Temperature, TopK, TopP, Warp, Warped
from tests.http_server import JsonHandler, Server, listening

KEY = "sk-not-a-secret"


class CompletionsServer:
    """Answers ``POST /v1/completions`` from `model`.

    Parameters
    ----------
    returns
        "token_ids", "logprobs" (tokens as ``token_id:123``) or "text" alone.
    strip_eos
        Leave the end-of-sequence id out of the ids, as some servers do.
    defaults
        Sampling fields of requests that leave them out, like those of a checkpoint's generation config.
    faults
        What goes wrong with the first requests, one each: a status ("500"), "malformed", "empty", "slow", "short" or
        "drop"; None answers well.
    key
        Refuse requests without this bearer token.
    """

    def __init__(
        self,
        model: LanguageModel,
        *,
        returns: str = "token_ids",
        strip_eos: bool = False,
        defaults: dict[str, float] | None = None,
        faults: Sequence[str | None] = (),
        key: str | None = None,
    ) -> None:
        self.model, self.returns, self.strip_eos, self.key = model, returns, strip_eos, key
        self.defaults, self.faults = defaults or {}, list(faults)
        self.requests: list[dict[str, Any]] = []
        self.running = self.most_running = 0
        self.lock, self.stopped = threading.Lock(), threading.Event()

    def complete(self, request: dict[str, Any]) -> dict[str, Any]:
        asked = {**self.defaults, **request}
        warps: list[Warp] = []
        if asked.get("temperature", 1) != 1:
            warps.append(Temperature(asked["temperature"]))
        if asked.get("top_k", -1) > 0:
            warps.append(TopK(asked["top_k"]))
        if asked.get("top_p", 1) < 1:
            warps.append(TopP(asked["top_p"]))
        if asked.get("min_p", 0) > 0:
            warps.append(MinP(asked["min_p"]))
        sampler = CESampler(Warped(self.model, *warps) if warps else self.model)
        trace = sampler.sample([request["prompt"]], max_new_tokens=request["max_tokens"], seed=request["seed"])
        (ids,), (reason,) = trace.sequences(), trace.stop_reason
        if self.strip_eos and reason == "eos":
            ids = ids[:-1]
        choice: dict[str, Any] = {"index": 0, "text": self.model.vocabulary.decode(ids)}
        choice["finish_reason"] = {"eos": "stop", "length": "length"}[reason]
        if self.returns == "token_ids" and request.get("return_token_ids"):
            choice["token_ids"] = ids
        if self.returns == "logprobs" and request.get("return_tokens_as_token_ids"):
            choice["logprobs"] = {"tokens": [f"token_id:{token}" for token in ids]}
        return {"object": "text_completion", "model": request["model"], "choices": [choice]}


class _Handler(JsonHandler):
    server: _Server

    def do_POST(self) -> None:
        served = self.server.served
        body = self.rfile.read(int(self.headers["Content-Length"]))
        if self.path != "/v1/completions":
            return self.answer(404, {"error": "no such page"})
        if served.key is not None and self.headers.get("Authorization") != f"Bearer {served.key}":
            return self.answer(401, {"error": f"this key is wrong: {self.headers.get('Authorization')}"})
        request = json.loads(body)
        with served.lock:
            served.requests.append(request)
            fault = served.faults.pop(0) if served.faults else None
            served.running += 1
            served.most_running = max(served.most_running, served.running)
        try:
            self.respond(request, fault)
        finally:
            with served.lock:
                served.running -= 1

    def respond(self, request: dict[str, Any], fault: str | None) -> None:
        served = self.server.served
        if fault == "drop":
            self.close_connection = True
        elif fault == "slow":
            served.stopped.wait(5)
            self.close_connection = True
        elif fault == "malformed":
            self.answer(200, b'{"choices": [')
        elif fault == "empty":
            self.answer(200, {"choices": []})
        elif fault is not None and fault.isdecimal():
            self.answer(int(fault), {"error": f"planted {fault}"}, {"Retry-After": "0"} if fault == "429" else {})
        else:
            answer = served.complete(request)
            if fault == "short":
                answer["choices"][0]["token_ids"].pop()
            self.answer(200, answer)


class _Server(Server):
    def __init__(self, served: CompletionsServer) -> None:
        super().__init__(_Handler)
        self.served = served


@contextmanager
def serving(model: LanguageModel, **options: Any) -> Iterator[tuple[str, CompletionsServer]]:
    """Base url of a running `CompletionsServer`, and the server itself."""
    served = CompletionsServer(model, **options)
    with listening(_Server(served), before_the_end=served.stopped.set) as url:
        yield f"{url}/v1", served
