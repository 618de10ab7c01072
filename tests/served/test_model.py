"""ServedModel in every dialect: its law, its refusals, and what a request says."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from me_stats import CESampler, ConstantMixing, Ensemble, MESampler
from me_stats.exact import sampler_law
from me_stats.models import MarkovModel
from me_stats.served import DIALECTS, ServedModel, tv_interval
from me_stats.testing import check_language_model
from me_stats.vocabulary import Vocabulary
from tests.served.fake import Fake, direct, served

V = 6
CHAIN = MarkovModel.random(V, seed=3)
ENDING = MarkovModel.random(V, seed=3, eos=(4,))
OWN = ("llama.cpp", "vllm", "sglang")


@pytest.fixture(autouse=True)
def _no_proxy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")


@pytest.mark.parametrize("dialect", OWN)
def test_whole_laws_are_those_of_the_model(dialect: str) -> None:
    with served(Fake(CHAIN, dialect=dialect)) as model:
        prefixes = [(0,), (1, 2), (5,)]
        assert torch.allclose(model.log_probs(prefixes).double(), CHAIN.log_probs(prefixes), atol=1e-6)
        assert model.cost.requests == 3


def test_it_is_a_language_model() -> None:
    check_language_model(direct(Fake(CHAIN)), prompts=[[0], [3, 1]])


@pytest.mark.parametrize("dialect", OWN)
def test_partial_laws_carry_what_is_missing(dialect: str) -> None:
    model = direct(Fake(CHAIN, dialect=dialect, top=3))
    partial = model.partial_laws([(0,), (2,)], n=3)
    whole = CHAIN.log_probs([(0,), (2,)])
    assert torch.allclose(partial.missing, 1 - whole.exp().sort(descending=True).values[:, :3].sum(1), atol=1e-9)
    low, high = tv_interval(partial, whole)
    assert low.tolist() == pytest.approx([0, 0], abs=1e-12)
    assert torch.allclose(high, partial.missing)
    with pytest.raises(ValueError, match=r"returned 3 of 6 log-probabilities.*max-logprobs -1.*partial_laws"):
        model.log_probs([(0,)])


def test_ce_and_me_draw_here_from_served_laws() -> None:
    chains = [MarkovModel.random(3, seed=seed) for seed in (1, 2)]
    mixing = ConstantMixing([0.3, 0.7])
    ours = Ensemble([direct(Fake(chain)) for chain in chains], mixing)
    for sampler in (CESampler, MESampler):
        law = sampler_law(sampler(ours), [0], max_new_tokens=2)
        exact = sampler_law(sampler(Ensemble(chains, mixing)), [0], max_new_tokens=2)
        assert law.rows == exact.rows
        assert np.allclose(law.log_probs, exact.log_probs, atol=1e-5)
    trace = CESampler(ours).sample([0], n=4, max_new_tokens=3)
    assert trace.cost.requests == trace.cost.reads


@pytest.mark.parametrize("dialect", [*OWN, "openai"])
@pytest.mark.parametrize("strips", [False, True])
def test_an_end_is_the_last_token_whether_the_server_returns_it_or_not(dialect: str, strips: bool) -> None:
    if strips and dialect in ("llama.cpp", "vllm"):
        pytest.skip("they return it")
    fields = {"return_token_ids": True} if dialect == "openai" else None
    seeds = list(range(30))
    expected = direct(Fake(ENDING)).sample_tokens([(0,)] * 30, 5, seeds)
    model = direct(Fake(ENDING, dialect=dialect, strips=strips), fields=fields, probe=())
    assert model.sample_tokens([(0,)] * 30, 5, seeds) == expected
    assert any(len(row) < 5 for row in expected)


def test_ids_may_be_spelled_in_logprobs() -> None:
    fields = {"return_token_ids": None}
    expected = direct(Fake(CHAIN)).sample_tokens([(0,)], 5, [1])
    assert direct(Fake(CHAIN, dialect="openai"), fields=fields).sample_tokens([(0,)], 5, [1]) == expected


@pytest.mark.parametrize("dialect", DIALECTS)
def test_no_default_of_a_server_is_left_to_it(dialect: str) -> None:
    fake = Fake(CHAIN, dialect=dialect)
    fields = {"return_token_ids": True} if dialect == "openai" else {}
    direct(fake, model="toy", fields=fields).sample_tokens([(1, 2)], 3, [7])
    sent = fake.requests[-1]
    neutral = sent["sampling_params"] if dialect == "sglang" else sent
    assert (neutral["temperature"], neutral["top_p"], neutral["presence_penalty"]) == (1.0, 1.0, 0.0)
    if dialect != "openai":
        assert neutral["min_p"] == 0.0
        assert neutral["top_k"] in (0, -1)
        assert neutral.get("repetition_penalty", neutral.get("repeat_penalty")) == 1.0
    if dialect == "llama.cpp":
        assert (sent["samplers"], sent["dry_multiplier"], sent["mirostat"], sent["logit_bias"]) == (
            ["temperature"],
            0,
            0,
            [],
        )
    assert 7 in (sent.get("seed"), neutral.get("sampling_seed"))
    assert [1, 2] in (sent.get("prompt"), sent.get("input_ids"))


def test_seeds_count_and_repeat() -> None:
    model = direct(Fake(CHAIN))
    rows = model.sample_tokens([(0,)] * 3, [4, 4, 2], [1, 2, 1])
    assert rows[2] == rows[0][:2]
    assert rows[0] != rows[1]
    assert rows[0] == model.write((0,), 4, 1)


def test_a_row_goes_on_behind_a_stop_of_the_server() -> None:
    model = direct(Fake(CHAIN, stops=(0, 1, 2)))
    rows = model.sample_tokens([(0,)] * 20, 30, list(range(20)))
    assert {len(row) for row in rows} == {30}
    counts = np.bincount(np.concatenate(rows), minlength=V)
    assert (counts > 0).all()


class _Half(Fake):
    def __init__(self, model: MarkovModel, change: dict[str, Any]) -> None:
        super().__init__(model)
        self.change = change

    def post(self, path: str, sent: dict[str, Any]) -> dict[str, Any] | None:
        answer = super().post(path, sent)
        return answer if answer is None or sent["n_probs"] else {**answer, **self.change}


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"truncated": True}, "ran out of context after 1 \\+ 4 tokens"),
        ({"tokens": [1]}, "ran out of context after 1 \\+ 1 tokens"),
        ({"stop_type": "word"}, "stopped for the reason 'word'"),
        ({"tokens": None}, "answered without 'tokens'"),
        ({"tokens": [], "stop_type": "eos"}, "answered without a token"),
        ({"tokens": [1, 2, 3, V]}, "wrote id 6, outside the vocabulary"),
        ({"tokens": ["a"] * 4}, "no integers"),
        ({"tokens_evaluated": 9}, "answered another request"),
        ({"generation_settings": {"seed": 4}}, "answered another request"),
        ({"generation_settings": {"top_k": 40}}, "sampled with top_k=40 although it was asked for 0"),
        ({"timings": 3}, "another form than expected"),
    ],
)
def test_answers_that_are_no_sample_are_refused(change: dict[str, Any], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        direct(_Half(CHAIN, change)).sample_tokens([(0,)], 4, [1])


@pytest.mark.parametrize(
    ("make", "error", "says"),
    [
        (
            lambda: ServedModel("http://h", vocabulary=Vocabulary(3), dialect="tgi"),
            ValueError,
            "dialect must be one of",
        ),
        (lambda: ServedModel("http://h", vocabulary=None), TypeError, "vocabulary must be"),  # type: ignore[arg-type]
        (lambda: ServedModel("h", vocabulary=Vocabulary(3)), ValueError, "url must start with http"),
        (lambda: direct(Fake(CHAIN)).log_probs([()]), ValueError, "an empty prefix"),
        (lambda: direct(Fake(CHAIN)).partial_laws([(0,)], n=7), ValueError, "n must lie in 1..6"),
        (lambda: direct(Fake(CHAIN)).sample_tokens([(0,)], 3, []), ValueError, "one seed"),
        (lambda: direct(Fake(CHAIN)).sample_tokens([(0,)], 0, [1]), ValueError, "at least one token"),
    ],
)
def test_bad_arguments_are_named(make: Any, error: type[Exception], says: str) -> None:
    with pytest.raises(error, match=says):
        make()


def test_a_server_without_log_probabilities_is_told_apart_by_name_alone() -> None:
    silent = Fake(CHAIN, dialect="openai", top=0)
    model = direct(silent, probe=(), fields={"return_token_ids": True})
    assert len(model.sample_tokens([(0,)], 3, [1])[0]) == 3
    model.verify()
    assert model.identity == {"model 0: id": "toy"}
