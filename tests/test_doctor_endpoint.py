"""The doctor: each planted default and bug is found by its name, and a clean server gets a clean bill."""

from __future__ import annotations

from typing import Any

import pytest

from me_stats.doctor_endpoint import examine
from me_stats.model_checks import Check
from me_stats.models import MarkovModel
from me_stats.models.catalog import CatalogError, pulled
from me_stats.vocabulary import Vocabulary
from tests.leaky import Leaky, Letters
from tests.served.fake import direct

V = 20
CHAIN = MarkovModel.random(V, seed=3)
WORDS = Vocabulary(V, tokenizer=Letters())
NAME = "smollm2-135m"
PLANTED = {
    "temperature": {"temperature": 0.6},
    "top_k": {"top_k": 5},
    "top_p": {"top_p": 0.8},
    "min_p": {"min_p": 0.1},
    "repetition penalty": {"penalty": 1.5},
}
FIELDS = {"repetition penalty": {"llama.cpp": "repeat_penalty"}}
CLEAN = ["server", "token ids", "seeds", "log-probabilities", "law of the draws", "defaults", "prefix cache"]


def seen(*, dialect: str = "vllm", words: Vocabulary = WORDS, seed: int = 0, **bugs: Any) -> tuple[Check, ...]:
    fields = {"return_token_ids": True} if dialect == "openai" else {}
    model = direct(Leaky(CHAIN, dialect=dialect, **bugs), fields=fields)
    model.vocabulary = words
    return examine(model, seed=seed)


def bad(checks: tuple[Check, ...]) -> dict[str, Check]:
    return {check.name: check for check in checks if check.status != "ok"}


@pytest.mark.parametrize("seed", range(20))
def test_a_clean_server_gives_no_alarm(seed: int) -> None:
    checks = seen(dialect=("vllm", "llama.cpp")[seed % 2], seed=seed)
    assert [(check.name, check.status) for check in checks] == [(name, "ok") for name in CLEAN]
    assert not any(check.remedy for check in checks)


@pytest.mark.parametrize("dialect", ["vllm", "sglang", "llama.cpp"])
@pytest.mark.parametrize("name", PLANTED)
def test_each_default_that_a_plain_client_gets_is_named(name: str, dialect: str) -> None:
    # llama.cpp tells its settings with each answer; here it does not, and draws must do.
    found = bad(seen(dialect=dialect, defaults=PLANTED[name], tells=False))
    field = FIELDS.get(name, {}).get(dialect, name.replace(" ", "_"))
    found.pop("token ids", None)  # SGLang's fake returns no text
    found.pop("prefix cache", None)  # nor what it kept
    assert set(found) == {f"default: {field}", "defaults"}
    leak = found[f"default: {field}"]
    assert leak.status == "warn"
    assert {"vllm": "--generation-config vllm", "sglang": "--sampling-defaults openai", "llama.cpp": "--"}[
        dialect
    ] in leak.remedy
    assert f"send {field}=" in leak.remedy
    if field in PLANTED[name]:
        assert leak.detail.startswith("about 0." if name != "top_k" else "about 5, ")


def test_defaults_that_come_together_are_all_named() -> None:
    both = {"temperature": 0.5, "top_k": 3}
    assert {"default: temperature", "default: top_k"} <= set(bad(seen(defaults=both)))
    told = bad(seen(dialect="llama.cpp", defaults=both))
    assert told["default: temperature"].detail == "the server says 0.5"
    assert told["default: top_k"].remedy.startswith("start the server with --top-k 0, or send top_k=0")


@pytest.mark.parametrize("name", PLANTED)
def test_each_default_that_no_field_switches_off_fails_by_name(name: str) -> None:
    law = bad(seen(defaults=PLANTED[name], overrides=True))["law of the draws"]
    assert law.status == "fail"
    assert f"it looks like {name}" in law.detail
    assert "level 1e-06, 600 draws" in law.detail
    # A protocol without the field cannot ask for it to be off.
    if name in ("top_k", "min_p"):
        assert "--dialect" in bad(seen(defaults=PLANTED[name], dialect="openai"))["law of the draws"].remedy


def test_llamacpp_that_admits_another_setting_is_refused() -> None:
    checks = seen(dialect="llama.cpp", defaults={"temperature": 0.6}, overrides=True)
    assert [check.status for check in checks] == ["ok", "fail"]
    assert "sampled with temperature=0.6 although it was asked for 1.0" in checks[-1].detail


@pytest.mark.parametrize(
    ("bugs", "name", "status", "says"),
    [
        ({"shift": 1}, "law of the draws", "fail", "ids shifted by 1"),
        ({"stale": 1}, "law of the draws", "fail", "stale prefix cache"),
        ({"forgets": True}, "prefix cache", "fail", "stale or imprecise"),
        ({"caches": False}, "prefix cache", "warn", "64 of 64 tokens fed at first, 64 when asked again"),
        ({"seeds": "ignored"}, "seeds", "warn", "the server ignores seeds"),
        ({"seeds": "fixed"}, "seeds", "fail", "6 seeds give the same 8 tokens"),
        ({"top": 5}, "log-probabilities", "warn", "the first 5 of 20 tokens"),
        ({"words": Vocabulary(V, tokenizer=Letters("b"))}, "token ids", "fail", "0 of 6 texts"),
        ({"words": Vocabulary(V)}, "token ids", "warn", "nothing here says what they mean"),
        ({"words": Vocabulary(5)}, "token ids", "fail", "outside of 0..4"),
    ],
)
def test_each_bug_is_found(bugs: dict[str, Any], name: str, status: str, says: str) -> None:
    check = bad(seen(**bugs))[name]
    assert (check.status, says in check.detail, check.remedy != "") == (status, True, True)


def test_a_top_list_is_enough_to_find_what_leaks() -> None:
    assert "default: top_k" in bad(seen(top=10, defaults={"top_k": 4}))
    assert set(bad(seen(top=10))) == {"log-probabilities"}


def test_a_server_of_fewer_ids_fails() -> None:
    wide = Vocabulary(50, tokenizer=Letters())
    (check,) = seen(dialect="llama.cpp", words=wide)
    assert (check.name, check.status) == ("server", "fail")


def test_bad_arguments_are_named() -> None:
    with pytest.raises(ValueError, match="draws must be at least 30"):
        examine(direct(Leaky(CHAIN)), draws=3)


def test_llamacpp_with_defaults_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("xllamacpp", reason="needs xllamacpp: pip install me-stats[llamacpp]")
    from me_stats.served import serve
    from me_stats.served.llamacpp import gguf_path

    try:
        gguf_path(NAME)
    except CatalogError as error:
        pytest.skip(str(error))
    if not pulled(NAME):
        pytest.skip(f"the tokenizer of {NAME} is not on this machine: run 'me-stats models pull {NAME}'")
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    with serve(NAME, slots=4, context=256, **{"sampling.temp": 0.3, "sampling.top_k": 2}) as server:
        model = server.model()
        with model.client:
            checks = examine(model, draws=90)
    found = bad(checks)
    assert all(check.status == "warn" for check in found.values())
    assert found["default: temperature"].detail == "the server says 0.3"
    assert "--temp 1" in found["default: temperature"].remedy
    assert found["default: top_k"].detail == "the server says 2"
    assert {"default: top_p", "default: min_p", "defaults"} <= set(found)  # llama.cpp's own
    assert [check.name for check in checks if check.status == "ok"][:5] == CLEAN[:5]
