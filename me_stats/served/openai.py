"""The completions protocol of OpenAI as vLLM and others speak it, with token ids for prompts and answers."""

from __future__ import annotations

from typing import Any, ClassVar

from me_stats.served.client import HttpClient, Json, Malformed
from me_stats.served.dialects import Ask, Completion, Dialect, check_finish, checked_ids, log_of, member

_TOKEN = "token_id:"


class OpenAI(Dialect):
    """``POST /v1/completions`` with the fields of the protocol alone. The answer must still hold token ids.

    That is ``choices[0].token_ids``, or logprobs whose tokens read ``token_id:123``.
    """

    name, path, seed_bits = "openai", "/v1/completions", 63
    neutral: ClassVar[Json] = {
        "temperature": 1.0, "top_p": 1.0, "presence_penalty": 0.0, "frequency_penalty": 0.0, "n": 1, "echo": False,
        "stream": False,
    }  # fmt: skip

    def body(self, ask: Ask) -> Json:
        own: Json = {"model": ask.model, "prompt": list(ask.prefix), "max_tokens": ask.max_tokens, "seed": ask.seed}
        # Where ids come as logprobs only, those of the sampled tokens are needed in any case.
        return {**own, "logprobs": ask.n_probs}

    def read(self, ask: Ask, sent: Json, answer: Any) -> Completion:
        choices = member(answer, "choices")
        if not isinstance(choices, list) or len(choices) != 1 or not isinstance(choices[0], dict):
            raise Malformed(f"the server must answer with one entry in choices, got {answer!s:.120}")
        choice = choices[0]
        self._check_own(ask, answer, choice)
        tokens = token_ids(choice)
        if tokens is None:
            raise ValueError(
                "the server returned no token ids, and text does not tell which tokens wrote it; it must return "
                "choices[0].token_ids (vLLM: return_token_ids) or logprobs whose tokens read 'token_id:123' (vLLM: "
                "return_tokens_as_token_ids)"
            )
        reason, matched = choice.get("finish_reason"), choice.get("stop_reason")
        if reason == "stop" and isinstance(matched, int) and tokens[-1:] != [matched]:
            tokens.append(matched)
        check_finish(self.name, reason, len(tokens), ask.max_tokens)
        logprobs = choice.get("logprobs") or {}
        laws = tuple(_law(step) for step in (logprobs.get("top_logprobs") or () if ask.n_probs else ()))
        details = (answer.get("usage") or {}).get("prompt_tokens_details") or {}
        fed = len(ask.prefix) - int(details.get("cached_tokens") or 0)
        marks = tuple((name, str(answer[name])) for name in ("model", "system_fingerprint") if answer.get(name))
        kept = isinstance(matched, int) or self._keeps_ends
        return Completion(checked_ids(tokens), reason == "stop", kept, laws, fed, marks)

    _keeps_ends: ClassVar[bool] = False

    def _check_own(self, ask: Ask, answer: Json, choice: Json) -> None:
        """Malformed where the answer tells that it is another request's."""
        read = (answer.get("usage") or {}).get("prompt_tokens", len(ask.prefix))
        if read != len(ask.prefix) or (choice.get("prompt_token_ids") or list(ask.prefix)) != list(ask.prefix):
            raise Malformed("the server answered another request than the one it was sent")

    def identity(self, client: HttpClient) -> dict[str, str]:
        models = member(client.get("/v1/models"), "data")
        kept = ("id", "root", "parent", "max_model_len", "owned_by")
        named = [{name: str(model[name]) for name in kept if model.get(name) is not None} for model in models]
        return {f"model {number}: {name}": value for number, own in enumerate(named) for name, value in own.items()}


class VLLM(OpenAI):
    """vLLM's completions: ids both ways (``return_token_ids``, 0.10.2 and later), its own sampling fields named."""

    name = "vllm"
    neutral: ClassVar[Json] = {
        **OpenAI.neutral, "top_k": 0, "min_p": 0.0, "repetition_penalty": 1.0, "length_penalty": 1.0,
        "use_beam_search": False, "min_tokens": 0, "stop_token_ids": [], "ignore_eos": False, "bad_words": [],
        "skip_special_tokens": False, "add_special_tokens": False, "return_token_ids": True,
        "return_tokens_as_token_ids": True,
    }  # fmt: skip
    _keeps_ends = True

    def body(self, ask: Ask) -> Json:
        own = {**super().body(ask), "request_id": ask.tag}
        if not ask.n_probs:
            del own["logprobs"]
        return own

    def _check_own(self, ask: Ask, answer: Json, choice: Json) -> None:
        super()._check_own(ask, answer, choice)
        # vLLM names an answer after its request; a proxy in between may not, and then says nothing of ours.
        name = str(answer.get("id", ""))
        if ask.tag.split("-")[0] in name and ask.tag not in name:
            raise Malformed("the server answered another request than the one it was sent")

    def identity(self, client: HttpClient) -> dict[str, str]:
        return {**super().identity(client), "version": str(client.get("/version").get("version"))}


def token_ids(choice: Json) -> list[int] | None:
    """The ids of a choice of completions, from ``token_ids`` or from logprobs that spell ids; None if it has none."""
    ids = choice.get("token_ids")
    if ids is None:
        logprobs = choice.get("logprobs")
        tokens = logprobs.get("tokens") if isinstance(logprobs, dict) else None
        if not isinstance(tokens, list) or not all(str(token).startswith(_TOKEN) for token in tokens):
            return None
        ids = [str(token).removeprefix(_TOKEN) for token in tokens]
        return [int(token) for token in ids] if all(map(str.isdecimal, ids)) else None
    valid = isinstance(ids, list) and all(isinstance(token, int) and not isinstance(token, bool) for token in ids)
    return list(ids) if valid else None


def _law(step: dict[str, float]) -> tuple[list[int], list[float]]:
    if not all(token.startswith(_TOKEN) for token in step):
        raise ValueError(
            "the server names tokens of top_logprobs by text, which does not tell ids apart; it must take "
            "return_tokens_as_token_ids (vLLM does)"
        )
    return [int(token.removeprefix(_TOKEN)) for token in step], [log_of(value) for value in step.values()]
