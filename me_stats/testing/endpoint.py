"""A completions server (vLLM, or any that speaks its dialect of the OpenAI protocol) as a `TokenSampler`."""

from __future__ import annotations

import operator
from collections.abc import Iterable, Sequence
from typing import Any

from me_stats.served.client import HttpClient, Json
from me_stats.served.openai import token_ids
from me_stats.testing.adapters import row_seeds

# The law of the model itself, against what servers do by default (vLLM follows the checkpoint's generation config).
_NEUTRAL: dict[str, Any] = {
    "temperature": 1.0,
    "top_p": 1.0,
    "top_k": -1,
    "min_p": 0.0,
    "repetition_penalty": 1.0,
    "return_token_ids": True,
}
_OURS = ("model", "prompt", "max_tokens", "seed", "n", "best_of", "stream", "echo")


class Completions:
    """Rows from ``POST {url}/completions``, one request a row, each with a seed of its own.

    Parameters
    ----------
    url
        Base url, such as ``"http://localhost:8000/v1"``.
    model
        Name of the model on the server.
    api_key
        Sent as a bearer token; never part of a message or of `repr`.
    concurrency
        Requests that run at the same time.
    timeout
        Seconds that one request may take to connect, and to answer.
    retries
        Further attempts after status 429 or 5xx, a timeout or a lost connection, with pauses of 0.25 s, 0.5 s, ... (or
        as the server asks). An attempt repeats the seed of its row, so what failed does not select what is kept.
    eos
        End-of-sequence id or ids of the model. Where a server that stops (``finish_reason: "stop"``) leaves it out of
        the ids, it is added.
    body
        Further fields of every request. Sent unless given: ``temperature=1, top_p=1, top_k=-1, min_p=0,
        repetition_penalty=1, return_token_ids=True``; None leaves a field out.

    Notes
    -----
    The server must take token ids as prompt and return ids, since text does not tell which tokens wrote it. vLLM does
    so by ``return_token_ids`` (0.10.2 and later), or as logprobs with ``return_tokens_as_token_ids=True, logprobs=0``.
    The HTTP client is httpx2, which huggingface_hub installs.

    Raises
    ------
    ValueError
        For arguments out of range; when called: for a request that the server refuses, an answer that is not JSON,
        that holds no token ids, or that ends for a reason other than an end of sequence or `max_new_tokens`.
    ConnectionError
        When called: for a server that is out of reach, or still fails or is silent after all retries.

    Examples
    --------
    >>> Completions("http://localhost:8000/v1", model="my-model", api_key="secret", temperature=0.7)
    Completions('http://localhost:8000/v1', model='my-model', temperature=0.7)

    Source: the fields are those of vLLM's OpenAI-compatible server.
    """

    def __init__(
        self,
        url: str,
        *,
        model: str,
        api_key: str | None = None,
        concurrency: int = 8,
        timeout: float = 60.0,
        retries: int = 3,
        eos: int | Iterable[int] | None = None,
        **body: Any,
    ) -> None:
        taken = [name for name in _OURS if name in body]
        if taken:
            raise ValueError(f"Completions sets {taken[0]} itself; leave it out of the body")
        self.url = url.rstrip("/").removesuffix("/completions")
        self.model, self.body = model, body
        self.eos = () if eos is None else (eos,) if isinstance(eos, int) else tuple(eos)
        options: dict[str, Any] = {"concurrency": concurrency, "timeout": timeout, "retries": retries}
        self._options = {**options, "api_key": api_key, "patient": False, "needed_by": "Completions"}
        self._client()

    def __call__(self, prompts: Sequence[tuple[int, ...]], *, max_new_tokens: int, seed: int) -> list[list[int]]:
        """Continuations of B prompts as B ragged rows of ids; see `TokenSampler`."""
        if max_new_tokens < 1:
            raise ValueError(f"max_new_tokens must be at least 1, got {max_new_tokens}")
        fields = {name: value for name, value in {**_NEUTRAL, **self.body}.items() if value is not None}

        def row(prompt: tuple[int, ...], own: int) -> list[int]:
            ids = {"model": self.model, "prompt": [operator.index(token) for token in prompt]}
            request: Json = {**fields, **ids, "max_tokens": max_new_tokens, "seed": own}
            return client.post(
                "/completions", lambda attempt: request, read=lambda sent, answer: self._tokens(answer, max_new_tokens)
            )

        with self._client() as client:
            return client.map(row, prompts, row_seeds(seed, len(prompts)))

    def _client(self) -> HttpClient:
        return HttpClient(self.url, **self._options)

    def _tokens(self, answer: Any, max_new_tokens: int) -> list[int]:
        """Token ids of the first choice, its end included."""
        choices = answer.get("choices") if isinstance(answer, dict) else None
        if not isinstance(choices, list) or len(choices) != 1 or not isinstance(choices[0], dict):
            raise ValueError(f"{self.url}/completions must answer with one entry in choices, got {answer!s:.120}")
        choice = choices[0]
        ids, reason = token_ids(choice), choice.get("finish_reason")
        if ids is None:
            raise ValueError(
                f"{self.url}/completions returned no token ids, and text does not tell which tokens wrote it; the "
                "server must return choices[0].token_ids (vLLM: return_token_ids, sent by default), or logprobs whose "
                "tokens read 'token_id:123' (vLLM: give return_tokens_as_token_ids=True, logprobs=0)"
            )
        if reason == "stop":
            return self._ended(ids, choice.get("stop_reason"))
        if reason != "length" or len(ids) < max_new_tokens:
            raise ValueError(
                f"{self.url}/completions stopped after {len(ids)} of {max_new_tokens} tokens with finish_reason "
                f"{reason!r}; such a row is no sample: check the context window and the filters of the server"
            )
        return ids

    def _ended(self, ids: list[int], stop_reason: Any) -> list[int]:
        if not self.eos or (ids and ids[-1] in self.eos):
            return ids
        if stop_reason in self.eos:
            return [*ids, int(stop_reason)]
        if len(self.eos) > 1:
            raise ValueError(
                f"{self.url}/completions does not say which of the ids {self.eos} ended a row; serve the model so that "
                "token ids hold it (vLLM does), or give the one id that it stops at as eos"
            )
        return [*ids, self.eos[0]]

    def __repr__(self) -> str:
        fields = "".join(f", {name}={value!r}" for name, value in self.body.items())
        return f"Completions({self.url!r}, model={self.model!r}{fields})"
