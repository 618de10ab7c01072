"""What each inference server is asked and answers: token ids in, token ids and log-probabilities out.

Every request names every setting that a server or a checkpoint could set by itself, at the value that does nothing.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from me_stats.served.client import HttpClient, Json, Malformed


@dataclass(frozen=True)
class Ask:
    """One request: at most `max_tokens` tokens after `prefix`, drawn with `seed`.

    `n_probs` most probable tokens are reported with each (0: none); `tag` names the attempt, and `lane` tells requests
    that continue each other from those that do not (None: unknown).
    """

    model: str
    prefix: tuple[int, ...]
    max_tokens: int
    seed: int
    n_probs: int
    tag: str
    lane: int | None = None


@dataclass(frozen=True)
class Completion:
    """An answer: the ids written, and ids and natural log-probabilities of the law of each, where they were asked for.

    `ended` tells a stop at some id from one at `max_tokens`, `stop_kept` whether that id surely is the last of
    `tokens`. `fed` counts prompt tokens that the server ran, as far as it says; `marks` are what the answer says about
    the server.
    """

    tokens: tuple[int, ...]
    ended: bool
    stop_kept: bool
    laws: tuple[tuple[list[int], list[float]], ...]
    fed: int
    marks: tuple[tuple[str, str], ...] = ()


class Dialect(ABC):
    """One server's way to speak. `seed_bits` is the width of the seeds that it takes, `path` where it is asked."""

    name: ClassVar[str]
    path: ClassVar[str]
    seed_bits: ClassVar[int]
    neutral: ClassVar[Json]

    def request(self, ask: Ask, fields: Mapping[str, Any]) -> Json:
        """What is sent: `neutral`, the user's own `fields` over it (None leaves one out), and what asks for `ask`."""
        kept = {name: value for name, value in {**self.neutral, **fields}.items() if value is not None}
        return {**kept, **self.body(ask)}

    @abstractmethod
    def body(self, ask: Ask) -> Json:
        """The fields that differ between requests."""

    @abstractmethod
    def read(self, ask: Ask, sent: Json, answer: Any) -> Completion:
        """The answer to what was `sent`; Malformed if it is none, ValueError if it says that another thing was done."""

    @abstractmethod
    def identity(self, client: HttpClient) -> dict[str, str]:
        """What tells this server's model from another."""

    def lanes(self, client: HttpClient) -> int | None:
        """Prefix caches that requests address by lane; None where the server keeps them by itself."""
        return None

    def __repr__(self) -> str:
        return f"{type(self).__name__}()"


class LlamaCpp(Dialect):
    """llama.cpp's own server, ``POST /completion``. It reports its settings with each answer, and they are compared."""

    name, path, seed_bits = "llama.cpp", "/completion", 32
    neutral: ClassVar[Json] = {
        "temperature": 1.0, "dynatemp_range": 0.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0, "top_n_sigma": -1.0,
        "typical_p": 1.0, "xtc_probability": 0.0, "repeat_penalty": 1.0, "repeat_last_n": 0, "presence_penalty": 0.0,
        "frequency_penalty": 0.0, "dry_multiplier": 0.0, "mirostat": 0, "adaptive_target": -1.0, "ignore_eos": False,
        "logit_bias": [], "grammar": "", "stop": [], "samplers": ["temperature"], "post_sampling_probs": False,
        "min_keep": 0, "n_keep": 0, "n_discard": 0, "n_indent": 0, "t_max_predict_ms": -1, "stream": False,
        "cache_prompt": True, "return_tokens": True,
    }  # fmt: skip

    def body(self, ask: Ask) -> Json:
        own: Json = {"prompt": list(ask.prefix), "n_predict": ask.max_tokens, "seed": ask.seed, "n_probs": ask.n_probs}
        return own if ask.lane is None else {**own, "id_slot": ask.lane}

    def read(self, ask: Ask, sent: Json, answer: Any) -> Completion:
        tokens, reason = member(answer, "tokens"), member(answer, "stop_type")
        settings, timings = answer.get("generation_settings") or {}, answer.get("timings") or {}
        if settings.get("seed", ask.seed) != ask.seed or answer.get("tokens_evaluated", len(ask.prefix)) != len(
            ask.prefix
        ):
            raise Malformed("the server answered another request than the one it was sent")
        for field in sorted(sent.keys() & settings.keys()):
            if not _same(settings[field], sent[field]):
                raise ValueError(
                    f"the server sampled with {field}={settings[field]!r} although it was asked for {sent[field]!r}; "
                    "its draws are not from the model's law"
                )
        if answer.get("truncated") or (reason == "limit" and len(tokens) < ask.max_tokens):
            raise ValueError(
                f"the server ran out of context after {len(ask.prefix)} + {len(tokens)} tokens; start it with a longer "
                "context (llama-server -c, per slot), or ask for fewer tokens"
            )
        if reason not in ("limit", "eos"):
            raise ValueError(f"the server stopped for the reason {reason!r}; such a row is no sample")
        laws = tuple(
            (
                [entry["id"] for entry in step["top_logprobs"]],
                [log_of(entry["logprob"]) for entry in step["top_logprobs"]],
            )
            for step in answer.get("completion_probabilities") or ()
        )
        fed = timings.get("prompt_n", len(ask.prefix))
        return Completion(checked_ids(tokens), reason == "eos", True, laws, fed, (("model", str(answer.get("model"))),))

    def identity(self, client: HttpClient) -> dict[str, str]:
        properties, models = client.get("/props"), client.get("/v1/models")
        meta = (models.get("data") or [{}])[0].get("meta") or {}
        named = {
            name: properties.get(name) for name in ("model_path", "model_alias", "build_info", "bos_token", "eos_token")
        }
        sized = {name: meta.get(name) for name in ("n_vocab", "n_params", "n_embd", "size", "ftype")}
        return {name: str(value) for name, value in {**named, **sized}.items() if value is not None}

    def lanes(self, client: HttpClient) -> int | None:
        return int(client.get("/props").get("total_slots") or 1)


class SGLang(Dialect):
    """SGLang's native ``POST /generate``. Seeds count only with ``--enable-deterministic-inference``."""

    name, path, seed_bits = "sglang", "/generate", 31
    neutral: ClassVar[Json] = {
        "temperature": 1.0, "top_p": 1.0, "top_k": -1, "min_p": 0.0, "repetition_penalty": 1.0, "presence_penalty": 0.0,
        "frequency_penalty": 0.0, "min_new_tokens": 0, "n": 1, "ignore_eos": False, "skip_special_tokens": False,
        "spaces_between_special_tokens": False, "no_stop_trim": True,
    }  # fmt: skip

    def request(self, ask: Ask, fields: Mapping[str, Any]) -> Json:
        own = {"max_new_tokens": ask.max_tokens, "sampling_seed": ask.seed}
        kept = {name: value for name, value in {**self.neutral, **own, **fields}.items() if value is not None}
        return {"sampling_params": kept, **self.body(ask)}

    def body(self, ask: Ask) -> Json:
        own: Json = {"input_ids": list(ask.prefix), "rid": ask.tag, "stream": False}
        if ask.n_probs:
            own |= {"return_logprob": True, "top_logprobs_num": ask.n_probs, "logprob_start_len": -1}
        return own

    def read(self, ask: Ask, sent: Json, answer: Any) -> Completion:
        tokens, meta = list(member(answer, "output_ids")), member(answer, "meta_info")
        if meta.get("id", ask.tag) != ask.tag or meta.get("prompt_tokens", len(ask.prefix)) != len(ask.prefix):
            raise Malformed("the server answered another request than the one it was sent")
        finish = meta.get("finish_reason") or {}
        reason, matched = finish.get("type"), finish.get("matched")
        if reason == "stop" and isinstance(matched, int) and tokens[-1:] != [matched]:
            tokens.append(matched)
        check_finish("sglang", reason, len(tokens), ask.max_tokens)
        laws = tuple(
            ([int(entry[1]) for entry in step], [log_of(entry[0]) for entry in step])
            for step in (meta.get("output_top_logprobs") or () if ask.n_probs else ())
        )
        fed = len(ask.prefix) - int(meta.get("cached_tokens") or 0)
        marks = tuple((name, str(meta[name])) for name in ("weight_version",) if name in meta)
        return Completion(checked_ids(tokens), reason == "stop", isinstance(matched, int), laws, fed, marks)

    def identity(self, client: HttpClient) -> dict[str, str]:
        info = client.get("/get_model_info")
        kept = ("model_path", "tokenizer_path", "weight_version", "model_type", "architectures")
        return {name: str(info[name]) for name in kept if info.get(name) is not None}


def member(answer: Any, name: str) -> Any:
    """The field `name` of an answer; Malformed where it is missing."""
    if not isinstance(answer, dict) or answer.get(name) is None:
        raise Malformed(f"the server answered without {name!r}: {answer!s:.120}")
    return answer[name]


def checked_ids(tokens: Sequence[Any]) -> tuple[int, ...]:
    """`tokens` as ids; Malformed where one is no integer."""
    if not all(isinstance(token, int) and not isinstance(token, bool) for token in tokens):
        raise Malformed(f"the server answered with ids that are no integers: {tokens!s:.120}")
    return tuple(tokens)


def log_of(value: float | None) -> float:
    """A log-probability as servers write it in JSON."""
    # JSON has no infinity; servers write null or their lowest float for a probability of zero.
    return float("-inf") if value is None or value < -1e30 else float(value)


def _same(told: Any, asked: Any) -> bool:
    if isinstance(told, (int, float)) and isinstance(asked, (int, float)):
        return abs(told - asked) < 1e-6
    return bool(told == asked)


def check_finish(name: str, reason: Any, written: int, asked: int) -> None:
    """ValueError unless an answer stopped at an id or at its full length."""
    if reason not in ("stop", "length") or (reason == "length" and written < asked):
        raise ValueError(
            f"{name} stopped after {written} of {asked} tokens with the reason {reason!r}; such a row is no sample: "
            "check the context window and the filters of the server"
        )
