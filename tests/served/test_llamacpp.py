"""A real server, llama.cpp's own, with SmolLM2: ids, laws, draws, and ME over two system prompts."""

from __future__ import annotations

import gc
from collections.abc import Iterator

import numpy as np
import pytest
import torch

from me_stats import CESampler, ConstantMixing, Ensemble
from me_stats.goodness import portfolio
from me_stats.models import Aligned, Conditioned, TransformersModel
from me_stats.models.catalog import CatalogError, pulled
from me_stats.presets import SYSTEM_PROMPTS
from me_stats.served import LlamaCppServer, ServedME, ServedModel, expected_requests, open_gguf, serve, tv_interval
from me_stats.served.llamacpp import gguf_path
from me_stats.testing import check_sampler
from me_stats.vocabulary_map import ByteStrings

NAME, OTHER = "smollm2-135m", "gemma3-270m"
QUESTION = "<|im_start|>user\nDescribe a quiet street after rain.<|im_end|>\n<|im_start|>assistant\n"


def _need(name: str) -> None:
    pytest.importorskip("xllamacpp", reason="needs xllamacpp: pip install me-stats[llamacpp]")
    try:
        gguf_path(name)
    except CatalogError as error:
        pytest.skip(str(error))
    if not pulled(name):
        pytest.skip(f"the tokenizer of {name} is not on this machine: run 'me-stats models pull {name}'")


@pytest.fixture(autouse=True)
def _no_proxy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")


@pytest.fixture(scope="module")
def server() -> Iterator[LlamaCppServer]:
    _need(NAME)
    # A server whose own defaults are far from the model's law: none of them may reach a draw.
    with serve(NAME, slots=4, context=512, **{"sampling.temp": 0.3, "sampling.top_k": 2}) as running:
        yield running


@pytest.fixture(scope="module")
def model(server: LlamaCppServer) -> Iterator[ServedModel]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("NO_PROXY", "127.0.0.1")
        opened = server.model()
        yield opened
        opened.client.close()


def two_prompts(model: ServedModel) -> Ensemble:
    contexts = [f"<|im_start|>system\n{prompt}<|im_end|>\n" for prompt in SYSTEM_PROMPTS]
    return Ensemble([Conditioned(model, context) for context in contexts], ConstantMixing([0.6, 0.4]))


def test_the_server_says_who_it_is_and_reads_ids(model: ServedModel) -> None:
    assert model.identity["n_vocab"] == "49152"
    assert model.lanes == 4
    ids = model.vocabulary.encode("<|im_start|>In 1984,\n    37 x")
    assert model.client.get("/health") == {"status": "ok"}
    told = model.client.post("/tokenize", lambda n: {"content": "In 1984,\n    37 x"}, read=lambda sent, answer: answer)
    assert told["tokens"] == list(ids[1:])
    shown = model.client.post("/detokenize", lambda n: {"tokens": ids[1:]}, read=lambda sent, answer: answer)
    assert shown["content"] == model.vocabulary.decode(ids[1:])
    model.verify()


def test_laws_are_near_those_of_the_same_weights_in_torch(model: ServedModel) -> None:
    other = TransformersModel(NAME)
    assert model.vocabulary == other.vocabulary
    ids = [model.vocabulary.encode(text) for text in ("The capital of France is", QUESTION)]
    laws = model.log_probs(ids).exp()
    assert torch.allclose(laws.sum(1), torch.ones(2), atol=1e-5)
    distance = (laws - other.log_probs(ids).exp()).abs().sum(1) / 2
    # llama.cpp multiplies quantised weights with activations of 8 bits: measured 0.008 and 0.057.
    assert distance.tolist() == pytest.approx([0, 0], abs=0.1)
    partial = model.partial_laws(ids, n=40)
    low, high = tv_interval(partial, laws.log())
    assert bool((low < 1e-3).all())
    assert bool(((high - partial.missing).abs() < 1e-3).all())


def first_tokens(model: ServedModel, ids: tuple[int, ...], n: int) -> np.ndarray:
    rows = model.sample_tokens([ids] * n, 1, [997 * seed for seed in range(n)])
    return np.bincount([row[0] for row in rows], minlength=model.vocabulary.size)


def test_tokens_follow_the_returned_law(server: LlamaCppServer, model: ServedModel) -> None:
    ids = model.vocabulary.encode("The capital of France is")
    law = model.log_probs([ids])[0].numpy()
    assert portfolio(first_tokens(model, ids, 300), law).pvalue > 1e-6
    cooler = server.model(fields={"temperature": 0.7})
    assert portfolio(first_tokens(cooler, ids, 300), law, level=1e-9).rejected
    cooler.client.close()


def test_a_seed_repeats_its_tokens_whatever_the_cache_holds(model: ServedModel) -> None:
    ids = model.vocabulary.encode(QUESTION)
    first = model.write(ids, 12, 5, lane=0)
    model.write(model.vocabulary.encode("Something else"), 3, 1, lane=0)
    assert model.write(ids, 12, 5, lane=0)[:4] == first[:4]
    assert model.write(ids, 12, 6, lane=0) != first


def test_me_over_two_prompts_is_one_request_a_run(model: ServedModel) -> None:
    steps, n = 24, 4
    trace = ServedME(two_prompts(model)).sample([QUESTION], n=n, max_new_tokens=steps, seed=1)
    runs = [
        1 + int((row[: length - 1] != row[1:length]).sum())
        for row, length in zip(trace.components, trace.lengths, strict=True)
    ]
    assert trace.cost.requests == sum(runs)
    mean, deviation = expected_requests([0.6, 0.4], steps)
    assert np.mean(runs) <= mean + 4 * deviation / np.sqrt(n)
    # Each component reads its prompt once a row, and then what was written since its last turn.
    assert trace.cost.tokens_forwarded < n * (2 * 64 + 2 * steps)
    assert all(trace.texts())


def test_ce_over_two_prompts_draws_from_served_laws(model: ServedModel) -> None:
    trace = CESampler(two_prompts(model)).sample([QUESTION], max_new_tokens=2, seed=1)
    assert trace.cost.reads == 4
    assert len(trace.texts()[0]) > 0


def test_a_name_with_a_suffix_starts_a_server_that_ends_with_the_model() -> None:
    _need(NAME)
    model = open_gguf(f"{NAME}:gguf", slots=1, context=128)
    url = model.client.url
    assert len(model.write(model.vocabulary.encode("A"), 2, 1)) == 2
    model.client.close()
    del model
    gc.collect()
    gone = ServedModel(url, vocabulary=TransformersModel("bundled:prose").vocabulary, retries=0)
    with pytest.raises(ConnectionError, match="cannot connect"):
        gone.verify()


@pytest.mark.slow
def test_me_passes_the_sequence_tests_against_served_laws(model: ServedModel) -> None:
    ensemble = two_prompts(model)
    # A whole law of every prefix that was drawn: half a second each.
    result = check_sampler(ServedME(ensemble), ensemble, [QUESTION], max_new_tokens=2, n=20, stop_early=False)
    assert result.passed


@pytest.mark.slow
def test_smollm2_and_gemma_write_byte_strings_together(model: ServedModel) -> None:
    _need(OTHER)
    with serve(OTHER, slots=4, context=512) as server:
        gemma = server.model()
        shared = ByteStrings.of([model, gemma])
        # Gemma reads a begin of sequence, SmolLM2 a marker, before the shared history.
        parts = [Aligned(Conditioned(model, [1]), shared), Aligned(Conditioned(gemma, [2]), shared)]
        both = Ensemble(parts, ConstantMixing([0.6, 0.4]))
        trace = ServedME(both).sample(["The best way to learn a language is"], n=2, max_new_tokens=10, seed=1)
        assert {0, 1} <= set(trace.components.flatten().tolist())
        assert all(trace.texts())
        ce = CESampler(both).sample(["The best way to learn a language is"], max_new_tokens=1, seed=1)
        assert len(ce.texts()[0]) > 0
        gemma.client.close()


@pytest.mark.parametrize(
    ("options", "error", "says"),
    [
        ({"name": "smollm3"}, CatalogError, "no GGUF of 'smollm3' here"),
        ({"name": NAME, "slots": 0}, ValueError, "slots, context and threads must be at least 1"),
        ({"name": NAME, "n_gpus": 2}, ValueError, "no field 'n_gpus'"),
    ],
)
def test_bad_arguments_are_named(options: dict[str, object], error: type[Exception], says: str) -> None:
    _need(NAME)
    with pytest.raises(error, match=says), serve(**options):  # type: ignore[arg-type]
        pass
