"""Whether an inference server can be trusted with draws: who it is, ids, laws, seeds, prefix cache, defaults that leak.

Draws are asked for twice: with every sampling setting sent at the value that does nothing, as `ServedModel` does (these
must follow the law), and without any, as a plain client would (these show what the server does by itself).
"""

from __future__ import annotations

import copy
import math
import secrets
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from me_stats.leaks import Draws, LawCheck, check_law, named, suspects
from me_stats.model_checks import Check, Status
from me_stats.served.dialects import Ask
from me_stats.served.identity import ServerChanged
from me_stats.served.laws import tv_interval
from me_stats.served.model import ServedModel
from me_stats.served.seeds import request_seed

LEVEL = 1e-6
# Total variation of one law read twice, on a repeated pattern: with llama.cpp, weights of 4 bits and activations of 8,
# at most 0.03 was measured; without the last token of the prefix, 0.56 to 0.88.
_FLOOR, _WORST = 0.05, 0.15
_ROWS, _LENGTH = 6, 8  # texts that are written for the checks of ids and of seeds
_LONG, _NEW = 64, 8  # tokens of a prefix that is worth keeping, and those at its start that no server has seen

# What a server may set by itself, as fields of requests.
_SETTINGS = (
    "temperature", "top_k", "top_p", "min_p", "repeat_penalty", "repetition_penalty", "presence_penalty",
    "frequency_penalty", "dynatemp_range", "top_n_sigma", "typical_p", "xtc_probability", "dry_multiplier", "mirostat",
    "adaptive_target", "min_tokens", "min_new_tokens", "ignore_eos", "logit_bias", "bad_words", "grammar",
    "length_penalty", "use_beam_search",
)  # fmt: skip
_GATES = ("samplers", "repeat_last_n")  # without them, some of the above do nothing
_FLAGS = {
    "llama.cpp": {
        "temperature": "--temp 1", "top_k": "--top-k 0", "top_p": "--top-p 1", "min_p": "--min-p 0",
        "repeat_penalty": "--repeat-penalty 1", "presence_penalty": "--presence-penalty 0",
        "frequency_penalty": "--frequency-penalty 0", "typical_p": "--typical 1",
        "xtc_probability": "--xtc-probability 0", "dry_multiplier": "--dry-multiplier 0", "mirostat": "--mirostat 0",
        "dynatemp_range": "--dynatemp-range 0",
    },
    "vllm": dict.fromkeys(_SETTINGS, "--generation-config vllm"),
    "sglang": dict.fromkeys(_SETTINGS, "--sampling-defaults openai"),
}  # fmt: skip
_ALL_LAWS = {"vllm": "start the server with --max-logprobs -1 --logprobs-mode raw_logprobs"}
_CACHE = {
    "vllm": "start the server with --enable-prefix-caching --enable-prompt-tokens-details",
    "sglang": "start the server without --disable-radix-cache",
    "llama.cpp": "start the server with more slots (--parallel), and leave cache_prompt on",
}
_SEEDS = {"sglang": "start the server with --enable-deterministic-inference"}
_TEXTS, _PATTERN = ("The best thing about", "She opened the door and"), " one two three four"

_Expected = (ValueError, ConnectionError, ServerChanged)


@dataclass
class Visit:
    """What the checks of one server share; `laws` are filled by the one that reads them."""

    model: ServedModel
    draws: int
    seed: int
    level: float
    pattern: tuple[int, ...] = ()
    prefixes: tuple[tuple[int, ...], ...] = ()
    laws: list[dict[int, float]] = field(default_factory=list)
    listed: int = 0

    def __post_init__(self) -> None:
        words, size = self.model.vocabulary, self.model.vocabulary.size
        if words.tokenizer is not None:
            self.pattern = words.encode(_PATTERN)
            texts = tuple(words.encode(text) for text in _TEXTS)
        else:
            ids = np.random.default_rng(self.seed).choice(size, min(4, size), replace=False).tolist()
            self.pattern, texts = tuple(ids), ((ids[0],), (ids[-1], ids[0]))
        # What was seen before comes again, and shows penalties.
        self.prefixes = (*texts, (self.pattern * 3)[:-1])

    def seeds(self, arm: str, n: int, row: int = 0) -> list[int]:
        bits = self.model.dialect.seed_bits
        return [request_seed(self.seed, row, step, arm=arm, bits=bits) for step in range(n)]

    def draw(self, model: ServedModel, arm: str) -> list[Draws]:
        """`draws` tokens, spread over the prefixes."""
        n, found = math.ceil(self.draws / len(self.prefixes)), []
        for row, (prefix, law) in enumerate(zip(self.prefixes, self.laws, strict=True)):
            rows = model.sample_tokens([prefix] * n, 1, self.seeds(arm, n, row))
            found.append(Draws.of(prefix, [tokens[0] for tokens in rows], law, model.vocabulary.size))
        return found

    def read(self, prefixes: Sequence[Sequence[int]], n: int) -> list[dict[int, float]]:
        partial = self.model.partial_laws([tuple(prefix) for prefix in prefixes], n=n)
        return [
            {int(token): float(value) for token, value in zip(ids, values, strict=True) if token >= 0}
            for ids, values in zip(partial.ids.tolist(), partial.log_probs.tolist(), strict=True)
        ]

    def left_out(self, names: Sequence[str]) -> ServedModel:
        """The model, asked without the fields `names`."""
        plain = copy.copy(self.model)
        gone = {name: None for name in (*names, *_GATES) if name in self.model.dialect.neutral}
        plain.fields = {**{k: v for k, v in self.model.fields.items() if k not in gone}, **gone}
        return plain


def examine(model: ServedModel, *, draws: int = 600, seed: int = 0, level: float = LEVEL) -> tuple[Check, ...]:
    """All checks of one server. Bad news are checks, not errors.

    Parameters
    ----------
    model
        The server, in the dialect that it speaks. With a tokenizer in its vocabulary, texts are compared too.
    draws
        Tokens that are drawn for each law that is tested.
    seed
        Of the requests.
    level
        False-alarm rate of each test of a law.

    Raises
    ------
    ConnectionError
        For a server that is out of reach at first.
    ValueError
        For one that refuses the first question, and for arguments out of range.
    """
    if draws < 30 or not 0 < level < 0.5:
        raise ValueError(f"draws must be at least 30 and level lie in (0, 0.5), got {draws} and {level}")
    told = model.dialect.identity(model.client)  # errors that all checks would have
    visit = Visit(model, draws, seed, level)
    found = [_server(visit, told)]
    if found[0].status == "fail":
        return tuple(found)
    steps: tuple[tuple[str, Callable[[Visit], list[Check]]], ...] = (
        ("token ids", _ids), ("seeds", _seeds), ("log-probabilities", _laws), ("law of the draws", _law),
        ("prefix cache", _cache), ("server", _same),
    )  # fmt: skip
    for name, step in steps:
        try:
            found += step(visit)
        except _Expected as error:
            found.append(
                Check(name, "fail", str(error), "see --dialect, --model and --vocabulary, and the server's log")
            )
            if step is _ids:
                break  # all others would end there too
    return tuple(found)


def _server(visit: Visit, told: dict[str, str]) -> Check:
    model = visit.model
    values = dict.fromkeys(f"{name} {value}" for name, value in told.items() if value)
    detail = f"{model.dialect.name} at {model.client.url}: {', '.join(values)}"
    width = int(told.get("n_vocab", model.vocabulary.size))
    if width < model.vocabulary.size:
        short = f"{detail}; the vocabulary given has {model.vocabulary.size} ids"
        return Check("server", "fail", short, "give the --vocabulary of the model that it serves")
    return Check("server", "ok", detail)


def _same(visit: Visit) -> list[Check]:
    visit.model.verify()
    return []


# --- ids ------------------------------------------------------------------------------------------------


def _ids(visit: Visit) -> list[Check]:
    """Prompt ids are counted by the server, sampled ids compared with the text that it gives for them."""
    model, agreed, told = visit.model, 0, 0
    for row, seed in enumerate(visit.seeds("ids", _ROWS)):
        tokens, answer = _raw(model, visit.prefixes[row % len(visit.prefixes)], _LENGTH, seed)
        if not all(0 <= token < model.vocabulary.size for token in tokens):
            detail = f"the server wrote {max(tokens)}, outside of 0..{model.vocabulary.size - 1}"
            return [Check("token ids", "fail", detail, "give the --vocabulary of the model that it serves")]
        text = _text_of(answer)
        if text:
            told += 1
            agreed += _spells(model.vocabulary.tokenizer, tokens, text)
    counted = f"ids both ways in {_ROWS} requests"
    if model.vocabulary.tokenizer is None:
        return [Check("token ids", "warn", f"{counted}; nothing here says what they mean", "give --vocabulary NAME")]
    if not told:
        return [Check("token ids", "warn", f"{counted}; the server returns no text to compare", "compare it yourself")]
    detail = f"{counted}; {agreed} of {told} texts are what the vocabulary here makes of the ids"
    if 2 * agreed < told:
        return [Check("token ids", "fail", detail, "give the --vocabulary of the model that it serves")]
    return [Check("token ids", "ok" if agreed == told else "warn", detail, "" if agreed == told else "compare some")]


def _raw(model: ServedModel, prefix: Sequence[int], count: int, seed: int) -> tuple[tuple[int, ...], Any]:
    """Ids written, and the whole answer."""
    ask = Ask(model.name, tuple(prefix), count, seed, 0, f"doctor-{secrets.token_hex(4)}")

    def read(sent: dict[str, Any], answer: Any) -> tuple[tuple[int, ...], Any]:
        return model.dialect.read(ask, sent, answer).tokens, answer

    return model.client.post(model.dialect.path, lambda attempt: model.dialect.request(ask, model.fields), read=read)


def _text_of(answer: Any) -> str:
    choices = answer.get("choices") or [{}]
    return str(answer.get("content") or answer.get("text") or choices[0].get("text") or "")


def _spells(tokenizer: Any, tokens: Sequence[int], text: str) -> bool:
    """Whether the ids are this text here, with or without its special tokens; a letter may be cut at the end."""
    if tokenizer is None:
        return False
    special = set(getattr(tokenizer, "all_special_ids", ()))
    for kept in (list(tokens), [token for token in tokens if token not in special]):
        ours, theirs = (part.replace("\ufffd", "").strip() for part in (tokenizer.decode(kept), text))
        if ours == theirs or (theirs and ours.startswith(theirs) and len(ours) < len(theirs) + 3):
            return True
    return False


# --- laws -----------------------------------------------------------------------------------------------


def _laws(visit: Visit) -> list[Check]:
    """As much of the laws as the server returns."""
    size, refused = visit.model.vocabulary.size, ""
    for n in dict.fromkeys((size, min(20, size), min(5, size))):
        try:
            visit.laws = visit.read(visit.prefixes, n)
        except ValueError as error:
            refused = str(error)
            continue
        visit.listed = n
        least = min(len(law) for law in visit.laws)
        if least == size:
            return [Check("log-probabilities", "ok", f"whole laws of {size:,} tokens")]
        worst = max(1 - sum(math.exp(value) for value in law.values()) for law in visit.laws)
        detail = f"the first {least} of {size:,} tokens, up to {worst:.2g} of the mass is missing"
        remedy = _ALL_LAWS.get(visit.model.dialect.name, "allow more log-probabilities on the server")
        return [Check("log-probabilities", "warn", detail, remedy)]
    remedy = _ALL_LAWS.get(visit.model.dialect.name, "let the server return log-probabilities")
    return [Check("log-probabilities", "fail", f"none, so no law can be compared: {refused}", remedy)]


def _law(visit: Visit) -> list[Check]:
    """Draws with neutral settings against the returned laws; if they agree, draws of a plain client."""
    if not visit.laws:
        return []
    draws = visit.draw(visit.model, "neutral")
    found = check_law(draws, level=visit.level)
    if not found.rejected:
        return [Check("law of the draws", "ok", f"neutral requests follow it: {_numbers(found)}"), *_defaults(visit)]
    earlier = visit.read([prefix[:-1] or prefix for prefix in visit.prefixes], visit.listed)
    name = named(suspects(draws, {"stale prefix cache (the last token is lost)": earlier}))
    if all(len(set(one.tokens.tolist())) == 1 for one in draws):
        name = "a temperature of 0, or one seed for all"
    looks = f"; it looks like {name}" if name else ""
    detail = f"neutral requests do not follow the returned laws{looks}: {_numbers(found)}"
    return [Check("law of the draws", "fail", detail, _mend(visit.model, name))]


def _numbers(found: LawCheck) -> str:
    tv = f"TV {found.least_tv:.2f}" if found.least_tv < 1 else "no TV"
    return (
        f"p = {found.pvalue:.2g} at level {found.level:g}, {found.n:,} draws; they show {tv}, or a cut of "
        f"{found.least_cut:.1%} of the mass"
    )


def _mend(model: ServedModel, name: str) -> str:
    """What mends a law that is wrong although the request asked for none of it."""
    if name.startswith("stale"):
        return "start the server without prefix caching, and report it to its makers"
    if name.startswith("a temperature of 0"):
        return "remove a fixed seed, or a temperature of 0, from the server's settings"
    if name.startswith("ids"):
        return "give the --vocabulary and tokenizer of the model that it serves"
    flag = next((flag for key, flag in _FLAGS.get(model.dialect.name, {}).items() if key in name), "")
    if "repetition" in name and model.dialect.name == "llama.cpp":
        flag = _FLAGS["llama.cpp"]["repeat_penalty"]
    if model.dialect.name == "openai":
        return "give the --dialect of the server, or switch its defaults off (vLLM: --generation-config vllm)"
    start = f"start the server with {flag}" if flag else "look for settings of the server that override requests"
    return f"{start}; the request's own fields do not reach it"


def _defaults(visit: Visit) -> list[Check]:
    """What applies to a plain client: as the server tells, or else by leaving out one field after the other."""
    model = visit.model
    names = [name for name in _SETTINGS if name in model.dialect.neutral]
    plain = visit.left_out(names)
    found = check_law(visit.draw(plain, "plain"), level=visit.level)
    told = _told(visit, plain, names)
    leaks = {name: f"the server says {_short(value)}" for name, value in told.items()}
    if found.rejected and not leaks:
        for name in names:
            alone = check_law(visit.draw(visit.left_out([name]), f"without {name}"), level=visit.level)
            if alone.rejected:
                value = next((one.value for one in alone.suspicions if one.name == name), "")
                leaks[name] = f"{'about ' + value + ', ' if value else ''}p = {alone.pvalue:.2g}"
    shown = f"plain requests: {_numbers(found)}"
    if not leaks and not found.rejected:
        return [Check("defaults", "ok", f"none shows in {shown}")]
    if not leaks:
        looks = named(found.suspicions) or "something"
        remedy = "send every field, as ServedModel does"
        return [Check("defaults", "warn", f"{looks} leaks, and no field alone shows it; {shown}", remedy)]
    status: Status = "warn"
    checks = [Check(f"default: {name}", status, why, _switch_off(model, name)) for name, why in leaks.items()]
    return [*checks, Check("defaults", status, f"draws differ in {shown}")] if found.rejected else checks


def _told(visit: Visit, plain: ServedModel, names: Sequence[str]) -> dict[str, Any]:
    """Settings of a plain request that do something, where answers hold them (llama.cpp)."""
    _, answer = _raw(plain, visit.prefixes[0], 1, visit.seeds("told", 1)[0])
    settings = answer.get("generation_settings") or {}
    return {name: settings[name] for name in names if name in settings and _does(name, settings, visit.model)}


def _short(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else f"{value!r:.40}"


def _does(name: str, settings: dict[str, Any], model: ServedModel) -> bool:
    value, neutral = settings[name], model.dialect.neutral[name]
    if isinstance(value, (int, float)) and isinstance(neutral, (int, float)):
        # A negative sigma, target or k is off as well.
        return abs(value - neutral) > 1e-6 and not (value <= 0 and neutral <= 0)
    return bool(value != neutral)


def _switch_off(model: ServedModel, name: str) -> str:
    flag = _FLAGS.get(model.dialect.name, {}).get(name)
    start = f"start the server with {flag}, or send" if flag else "send"
    return f"{start} {name}={model.dialect.neutral[name]} with each request (ServedModel does)"


# --- seeds and cache ------------------------------------------------------------------------------------


def _seeds(visit: Visit) -> list[Check]:
    """One seed twice, and others."""
    model, seeds = visit.model, visit.seeds("replay", _ROWS)
    rows = [model.sample_tokens([visit.prefixes[0]] * _ROWS, _LENGTH, seeds) for _ in range(2)]
    again = sum(first == second for first, second in zip(*rows, strict=True))
    if len({tuple(row) for row in rows[0]}) == 1:
        detail = f"{_ROWS} seeds give the same {_LENGTH} tokens: noise is replayed, or there is none"
        return [
            Check("seeds", "fail", detail, "remove a fixed seed, or a temperature of 0, from the server's settings")
        ]
    detail = f"{again} of {_ROWS} rows of {_LENGTH} tokens repeat with their seed, and seeds differ"
    if again == _ROWS:
        return [Check("seeds", "ok", detail)]
    remedy = _SEEDS.get(model.dialect.name, "let one request run at a time, or take repeated requests as new draws")
    if 2 * again < _ROWS:
        detail = f"the server ignores seeds: {detail}; the law is not touched, but no run can be repeated"
    return [Check("seeds", "warn", detail, remedy)]


def _cache(visit: Visit) -> list[Check]:
    """A long prefix twice: what the server fed of it, and whether the law is the same."""
    if not visit.laws:
        return []
    model, size = visit.model, visit.model.vocabulary.size
    rng = np.random.default_rng(secrets.randbits(64))  # no server has seen it, also where the doctor came before
    tail = (visit.pattern * _LONG)[: _LONG - _NEW]
    prefix = (*rng.integers(size, size=_NEW).tolist(), *tail)
    n, fed, laws = min(visit.listed, 1000), [], []
    for _ in range(2):
        start = model.cost
        laws.append(model.partial_laws([prefix], n=n))
        fed.append(model.cost.since(start).tokens_forwarded)
    apart = float(tv_interval(*laws)[0])
    moved = f"the law moves by TV {apart:.2g} (floor {_FLOOR})"
    if apart > _FLOOR:
        status: Status = "fail" if apart > _WORST else "warn"
        remedy = "start the server without prefix caching, and report it to its makers"
        return [Check("prefix cache", status, f"stale or imprecise: read again, {moved}", remedy)]
    detail = f"{fed[0]} of {_LONG} tokens fed at first, {fed[1]} when asked again; {moved}"
    if fed[1] <= _LONG // 2:
        return [Check("prefix cache", "ok", detail)]
    return [Check("prefix cache", "warn", detail, _CACHE.get(model.dialect.name, "switch prefix caching on"))]
