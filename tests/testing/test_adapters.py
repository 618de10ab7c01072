"""Adapters: rows of the right law, seeds that mean what they say, and messages for what cannot be adapted."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from transformers import GenerationConfig, LlamaConfig, StoppingCriteria

from me_stats.goodness import PortfolioResult, portfolio
from me_stats.models import TableModel, TransformersModel
from me_stats.testing.adapters import Generate, one_by_one, row_seeds
from tests.networks import devices, network, shape

PROMPT = tuple(b"class Node:\n    def __init__(self, ")
FLAT = tuple(b"import ")  # where 2% of the mass lies outside the 50 likeliest bytes
RAGGED = [tuple(b"The "), tuple(b"import os"), tuple(b"The "), tuple(b"a"), tuple(b"import re")]


@pytest.fixture(scope="module")
def prose() -> TransformersModel:
    return TransformersModel("bundled:prose")


@pytest.fixture
def code() -> TransformersModel:
    """The other sibling; the generation config of an assistant may be changed."""
    model = TransformersModel("bundled:code")
    model.network.generation_config = copy.deepcopy(model.network.generation_config)
    return model


@pytest.fixture(scope="module")
def short_lived() -> Any:
    """Three of 64 ids end a sequence, and one of them pads."""
    return network(LlamaConfig(**shape(eos_token_id=[0, 7, 9])), gain=0.5)


def judged(model: TransformersModel, sampler: Any, *, n: int) -> PortfolioResult:
    rows = sampler([FLAT] * n, max_new_tokens=1, seed=0)
    law = model.log_probs([FLAT])[0].double().numpy()
    return portfolio(np.bincount([row[0] for row in rows], minlength=len(law)), law, level=1e-9)


def test_one_by_one_follows_the_law_of_its_function() -> None:
    model = TableModel.random(5, seed=0)
    law = model.log_probs([(2,)])[0].exp().numpy()

    def draw(prompt: tuple[int, ...], max_new_tokens: int, seed: int) -> np.ndarray:
        return np.random.default_rng(seed).choice(5, size=max_new_tokens, p=law)

    def stuck(prompt: tuple[int, ...], max_new_tokens: int, seed: int) -> np.ndarray:
        return draw(prompt, max_new_tokens, seed % 4)

    def pvalue(function: Callable[..., np.ndarray], n: int, seed: int) -> float:
        rows = one_by_one(function)([(2,)] * n, max_new_tokens=1, seed=seed)
        return portfolio(np.bincount([row[0] for row in rows], minlength=5), np.log(law)).pvalue

    alarms = sum(pvalue(draw, 100, seed) <= 0.05 for seed in range(200))
    assert alarms <= 27  # P(Binomial(200, 0.05) > 27) < 1e-5
    assert pvalue(draw, 20_000, 0) > 1e-3
    assert pvalue(stuck, 20_000, 0) < 1e-9


def test_one_by_one_takes_what_functions_return_and_passes_its_arguments_on() -> None:
    calls: list[tuple[tuple[int, ...], int, int]] = []
    results = iter([[1, 2], np.array([3]), torch.tensor([4, 5]), (6,)])

    def function(prompt: tuple[int, ...], max_new_tokens: int, seed: int) -> Any:
        calls.append((prompt, max_new_tokens, seed))
        return next(results)

    rows = one_by_one(function)([(0,), (1, 2), (3,), (0,)], max_new_tokens=2, seed=9)
    assert rows == [[1, 2], [3], [4, 5], [6]]
    assert [call[:2] for call in calls] == [((0,), 2), ((1, 2), 2), ((3,), 2), ((0,), 2)]
    assert [call[2] for call in calls] == row_seeds(9, 4)


@pytest.mark.parametrize("result", [None, 3, "text", [0.5], torch.tensor([0.5]), [[1], [2]], np.zeros((2, 2), int)])
def test_one_by_one_refuses_what_is_no_row_of_ids(result: Any) -> None:
    with pytest.raises(TypeError, match="flat sequence of integer ids"):
        one_by_one(lambda prompt, max_new_tokens, seed: result)([(0,)], max_new_tokens=1, seed=0)


def test_seeds_of_rows_are_distinct_small_and_stable() -> None:
    seeds = row_seeds(0, 200_000)  # about ten of as many 31-bit words repeat
    assert len(set(seeds)) == 200_000
    assert 0 <= min(seeds) <= max(seeds) < 2**31
    assert row_seeds(0, 100) == seeds[:100]
    assert not set(row_seeds(1, 100)) & set(seeds[:100])
    assert row_seeds(0, 0) == []


def test_generate_follows_the_law_once_its_silent_default_is_off(prose: TransformersModel) -> None:
    assert judged(prose, Generate(prose, top_k=0, batch_size=500), n=4000).pvalue > 1e-3
    assert judged(prose, Generate(prose, batch_size=500), n=8000).rejected
    assert judged(prose, Generate(prose, top_k=0, temperature=0.7, batch_size=500), n=4000).rejected


def test_false_alarms_of_generate_are_rare(prose: TransformersModel) -> None:
    law = prose.log_probs([FLAT])[0].double().numpy()
    sampler = Generate(prose, top_k=0)
    drawn = [sampler([FLAT] * 50, max_new_tokens=1, seed=seed) for seed in range(100)]
    counts = [np.bincount([row[0] for row in rows], minlength=256) for rows in drawn]
    alarms = sum(portfolio(row, law).pvalue <= 0.05 for row in counts)
    assert alarms <= 17  # P(Binomial(100, 0.05) > 17) < 1e-5


def test_generate_takes_configs_loaded_models_and_greedy_decoding(prose: TransformersModel) -> None:
    config = GenerationConfig(top_k=0, max_new_tokens=99)
    before = config.to_dict()
    expected = Generate(prose, top_k=0)(RAGGED, max_new_tokens=3, seed=4)
    assert Generate(prose.network, config)(RAGGED, max_new_tokens=3, seed=4) == expected
    assert Generate(prose, config, return_dict_in_generate=True)(RAGGED, max_new_tokens=3, seed=4) == expected
    assert Generate(prose, config, top_k=1)(RAGGED, max_new_tokens=3, seed=4) != expected
    assert config.to_dict() == before
    greedy = Generate(prose, do_sample=False)(RAGGED, max_new_tokens=3, seed=4)
    assert greedy == Generate(prose, GenerationConfig(do_sample=False))(RAGGED, max_new_tokens=3, seed=5)
    assert greedy[1][0] == int(prose.log_probs([RAGGED[1]]).argmax())


def test_rows_stay_with_their_prompts_and_repeat_with_the_seed(prose: TransformersModel) -> None:
    for batch_size in (1, 2, 64):
        sampler = Generate(prose, batch_size=batch_size, top_k=1)  # the likeliest id, whatever the seed
        rows = sampler(RAGGED, max_new_tokens=4, seed=0)
        assert rows == [sampler([prompt], max_new_tokens=4, seed=1)[0] for prompt in RAGGED]
    sampler = Generate(prose, top_k=0, batch_size=3)
    prompts = [PROMPT] * 10
    rows = sampler(prompts, max_new_tokens=4, seed=0)
    assert rows == sampler(prompts, max_new_tokens=4, seed=0)
    assert rows != sampler(prompts, max_new_tokens=4, seed=1)
    assert len(set(map(tuple, rows))) > 5
    assert sampler([], max_new_tokens=4, seed=0) == []


@devices
def test_the_generators_of_the_caller_stay_where_they_were(device: str) -> None:
    model = TransformersModel("bundled:prose", device=device)
    torch.rand(3)
    state, on_device = torch.get_rng_state(), torch.cuda.get_rng_state() if device == "cuda" else None
    rows = Generate(model, top_k=0)([PROMPT] * 20, max_new_tokens=2, seed=3)
    assert torch.equal(torch.get_rng_state(), state)
    if on_device is not None:
        assert torch.equal(torch.cuda.get_rng_state(), on_device)
    torch.rand(3)
    assert Generate(model, top_k=0)([PROMPT] * 20, max_new_tokens=2, seed=3) == rows


def test_rows_are_cut_after_the_first_end_and_keep_it(short_lived: Any) -> None:
    def rows(**options: Any) -> list[list[int]]:
        return Generate(short_lived, top_k=0, **options)([(1, 2, 3)] * 60, max_new_tokens=20, seed=0)

    for ends, options in (({0, 7, 9}, {}), ({5}, {"eos_token_id": 5}), ({5, 6}, {"eos_token_id": [5, 6]})):
        written = rows(**options)
        assert all((row[-1] in ends or len(row) == 20) and not ends & set(row[:-1]) for row in written)
        assert {row[-1] for row in written if len(row) < 20} == ends


class _AfterAnEvenId(StoppingCriteria):
    """Ends a row at an id that tells nobody that it is an end."""

    def __call__(self, input_ids: Any, scores: Any, **_: Any) -> Any:
        return input_ids[:, -1] % 2 == 0


def test_an_end_of_a_users_own_is_not_mistaken_for_padding(short_lived: Any) -> None:
    sampler = Generate(short_lived, top_k=0, eos_token_id=63, stopping_criteria=[_AfterAnEvenId()])
    rows = sampler([(1, 2, 3)] * 20, max_new_tokens=8, seed=0)
    assert any(len(row) < 8 for row in rows)
    assert all(token % 2 for row in rows for token in row[:-1])


def test_assisted_generation_draws_from_the_target(prose: TransformersModel, code: TransformersModel) -> None:
    sampler = Generate(prose, assistant_model=code, top_k=0)
    rows = sampler([PROMPT] * 150, max_new_tokens=2, seed=0)
    target, assistant = (model.log_probs([PROMPT])[0].double().numpy() for model in (prose, code))
    counts = np.bincount([row[0] for row in rows], minlength=256)
    assert portfolio(counts, target).pvalue > 1e-3
    assert portfolio(counts, assistant, level=1e-9).rejected
    assert sampler(RAGGED, max_new_tokens=3, seed=1) == sampler(RAGGED, max_new_tokens=3, seed=1)


def test_the_weight_of_an_assistant_mixes_what_it_drafted_and_nothing_else(
    prose: TransformersModel, code: TransformersModel
) -> None:
    weight = 0.3
    code.network.generation_config.assistant_confidence_threshold = 0.0
    sampler = Generate(prose, assistant_model=code, assistant_ensemble_weight=weight, top_k=0)
    target, assistant = (model.log_probs([PROMPT])[0].double().numpy() for model in (prose, code))
    mixture = np.logaddexp(target + np.log(weight), assistant + np.log(1 - weight))
    swapped = np.logaddexp(target + np.log(1 - weight), assistant + np.log(weight))

    def counts(max_new_tokens: int, n: int) -> np.ndarray:
        rows = sampler([PROMPT] * n, max_new_tokens=max_new_tokens, seed=0)
        return np.bincount([row[0] for row in rows], minlength=256)

    drafted, last = counts(2, 400), counts(1, 200)
    assert portfolio(drafted, mixture).pvalue > 1e-3
    assert portfolio(drafted, swapped, level=1e-9).rejected
    # A row's last token is never drafted: it comes from the target alone.
    assert portfolio(last, target).pvalue > 1e-3
    assert portfolio(last, mixture, level=1e-9).rejected


@pytest.mark.parametrize(
    ("make", "error", "says"),
    [
        (lambda model: Generate("bundled:prose"), TypeError, "model must be a transformers model"),
        (lambda model: Generate(model, assistant_model="x"), TypeError, "assistant_model must be"),
        (lambda model: Generate(model, max_new_tokens=3), ValueError, "sets max_new_tokens itself"),
        (lambda model: Generate(model, num_return_sequences=3), ValueError, "sets num_return_sequences itself"),
        (lambda model: Generate(model, batch_size=0), ValueError, "batch_size must be at least 1"),
        (lambda model: Generate(model)([()], max_new_tokens=1, seed=0), ValueError, "at least one token each"),
        (lambda model: Generate(model)([(1,)], max_new_tokens=0, seed=0), ValueError, "max_new_tokens must be"),
        (
            lambda model: Generate(model, GenerationConfig(do_sample=True, num_return_sequences=2))(
                [(1,)], max_new_tokens=1, seed=0
            ),
            ValueError,
            "2 rows for 1 prompts; set num_return_sequences to 1",
        ),
    ],
)
def test_bad_arguments_are_named(
    prose: TransformersModel, make: Callable[[Any], object], error: type[Exception], says: str
) -> None:
    with pytest.raises(error, match=says):
        make(prose)


def test_repr_names_what_was_asked_for(prose: TransformersModel) -> None:
    assert repr(Generate(prose, top_k=0)) == "Generate(LlamaForCausalLM, top_k=0, do_sample=True)"
    shown = repr(Generate(prose, GenerationConfig(), assistant_model=prose))
    assert shown == "Generate(LlamaForCausalLM, generation_config, assistant_model=LlamaForCausalLM, do_sample=True)"
