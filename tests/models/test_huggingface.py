from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import Phi3Config

from me_stats.mixing import ConstantMixing
from me_stats.models import Conditioned, Cost, Ensemble, TopK, Warped, huggingface
from me_stats.models.catalog import CatalogError
from me_stats.models.huggingface import TransformersModel
from me_stats.models.joint import Restricted
from me_stats.models.ragged import RaggedSession
from me_stats.presets import SIBLINGS, TEXT_PROMPTS
from me_stats.samplers import CESampler, FixedMaskSampler, MESampler, Sampler, SpeculativeSampler
from me_stats.trace import Trace, score
from tests.mixtures import PROMPTS, ROUNDING, STEPS, assert_coupled, component, ensemble
from tests.networks import CONTEXT, FAMILIES, V, devices, network, shape, tiny, total_variation

BUNDLED = Path(huggingface.__file__).parent / "bundled"

SAMPLERS: dict[str, Callable[[Ensemble], Sampler]] = {
    "ce": CESampler,
    "me": MESampler,
    "latent": lambda ensemble: CESampler(ensemble, latent=True),
    "speculative": lambda ensemble: SpeculativeSampler(Warped(ensemble, TopK(8)), ensemble, chunk=3),
    "fixed mask": lambda ensemble: FixedMaskSampler(
        Restricted(ensemble.components, ensemble.mixing, filter(lambda x: x % 8, range(ensemble.vocabulary.size))),
        attempts=1,
    ),
}
every_sampler = pytest.mark.parametrize("build", SAMPLERS.values(), ids=SAMPLERS.keys())


def siblings() -> Ensemble:
    if not all((BUNDLED / name.removeprefix("bundled:")).is_dir() for name in SIBLINGS):
        pytest.skip("the bundled siblings are not in me_stats/models/bundled")
    return Ensemble([TransformersModel(name) for name in SIBLINGS], ConstantMixing([0.6, 0.4]))


# --- cost, as the theory counts it


def last_reads(trace: Trace, model: int) -> np.ndarray:
    """Tokens that each row had written when `model` was last read for it; -1 where it never was."""
    assert trace.components is not None
    read = (trace.components == model).numpy()
    return np.where(read.any(1), read.shape[1] - 1 - read[:, ::-1].argmax(1), -1)


def test_me_runs_one_component_per_token() -> None:
    trace = MESampler(ensemble()).sample(PROMPTS[0], max_new_tokens=STEPS, seed=3)
    assert trace.components is not None
    assert len(trace.components.unique()) == 2
    tokens = sum(len(PROMPTS[0]) + int(last_reads(trace, i)[0]) for i in range(2))
    assert trace.cost == Cost(forwards=STEPS, tokens_forwarded=tokens, reads=STEPS)


def test_component_that_is_never_drawn_never_runs() -> None:
    certain = Ensemble([component(0), component(1)], ConstantMixing([1.0, 0.0]))
    trace = MESampler(certain).sample(PROMPTS[0], max_new_tokens=STEPS)
    assert trace.cost == Cost(STEPS, len(PROMPTS[0]) + STEPS - 1, STEPS)


@pytest.mark.parametrize("latent", [False, True])
def test_ce_runs_every_component_per_token(latent: bool) -> None:
    trace = CESampler(ensemble(), latent=latent).sample(PROMPTS[0], max_new_tokens=STEPS)
    assert trace.cost == Cost(2 * STEPS, 2 * (len(PROMPTS[0]) + STEPS - 1), 2 * STEPS)


def test_continuations_of_one_prompt_share_its_prefill() -> None:
    n, prompt = 7, len(PROMPTS[2])
    ce = CESampler(ensemble()).sample(PROMPTS[2], max_new_tokens=STEPS, n=n)
    assert ce.cost.forwards == 2 * STEPS
    assert ce.cost.tokens_forwarded == 2 * (prompt + n * (STEPS - 1))
    assert ce.cost.reads == 2 * (1 + n * (STEPS - 1))

    me = MESampler(ensemble(), lockstep=True).sample(PROMPTS[2], max_new_tokens=STEPS, n=n, seed=1)
    tokens = sum(prompt + int(last_reads(me, i).clip(min=0).sum()) for i in range(2))
    assert me.cost.tokens_forwarded == tokens
    # Both components were drawn at the first step, so no row ever waits for a prefill: one forward each.
    assert me.components is not None
    assert me.components[:, 0].unique().tolist() == [0, 1]
    assert me.cost.forwards == sum(len(step.unique()) for step in me.components.T)


# --- one row, one text: whatever runs beside it


@devices
@every_sampler
def test_row_does_not_depend_on_batch_order_or_neighbours(build: Callable[..., Sampler], device: str) -> None:
    sampler = build(ensemble(device))
    assert_rows_stand_alone(sampler, [list(prompt) for prompt in PROMPTS])


@every_sampler
def test_row_of_the_siblings_does_not_depend_on_its_batch(build: Callable[..., Sampler]) -> None:
    assert_rows_stand_alone(build(siblings()), list(TEXT_PROMPTS[:3]))


def assert_rows_stand_alone(sampler: Sampler, prompts: list[Any]) -> None:
    n = 2
    options: dict[str, Any] = {"max_new_tokens": STEPS, "n": n, "seed": 11}
    trace = sampler.sample(prompts, **options)
    padded = torch.nn.functional.pad(trace.tokens, (0, STEPS - trace.tokens.shape[1]), value=-1)
    assert len(padded.unique(dim=0)) == len(padded)

    def same(other: Trace, rows: list[int]) -> bool:
        wide = torch.nn.functional.pad(other.tokens, (0, STEPS - other.tokens.shape[1]), value=-1)
        return torch.equal(wide, padded[rows])

    everything = list(range(len(padded)))
    for batch_size in (1, 3, len(padded)):
        assert same(sampler.sample(prompts, **options, batch_size=batch_size), everything)
    backwards = everything[::-1]
    assert same(sampler.sample(prompts[::-1], **options, rows=backwards), backwards)
    assert same(sampler.sample(prompts[1], **options, rows=[2, 3]), [2, 3])
    assert same(sampler.sample(prompts[1:], **options, rows=everything[n:]), everything[n:])


@devices
def test_latent_ce_writes_what_me_writes(device: str) -> None:
    assert_coupled(ensemble(device), PROMPTS)


def test_latent_ce_of_the_siblings_writes_what_me_writes() -> None:
    assert_coupled(siblings(), TEXT_PROMPTS)


# --- teacher forcing


def paths() -> list[list[int]]:
    rng = np.random.default_rng(0)
    return [rng.integers(2, V, length).tolist() for length in (9, 0, 14)]


@devices
def test_laws_along_a_path_are_the_laws_of_its_prefixes(device: str) -> None:
    model = tiny(device=device)
    for prompt, path, laws in zip(PROMPTS, paths(), model.path_log_probs(PROMPTS, paths()), strict=True):
        assert laws.shape == (len(path), V)
        if path:
            whole = model.log_probs([(*prompt, *path[:t]) for t in range(len(path))])
            assert total_variation(laws, whole).max() < ROUNDING


@pytest.mark.parametrize("positions", [1, 40, 10**6])
def test_logit_budget_splits_the_batch_and_changes_nothing(positions: int, monkeypatch: pytest.MonkeyPatch) -> None:
    model = component()
    prompts, continuations = PROMPTS * 3, paths() * 3
    before = list(model.path_log_probs(prompts, continuations))
    sizes: list[tuple[int, int]] = []
    forward = model.network.forward

    def counting(**inputs: Any) -> Any:
        sizes.append(tuple(inputs["input_ids"].shape))
        return forward(**inputs)

    monkeypatch.setattr(huggingface, "_LOGIT_BYTES", positions * V * 4)
    monkeypatch.setattr(model.network, "forward", counting)
    after = list(model.path_log_probs(prompts, continuations))
    assert all(rows == 1 or rows * length <= positions for rows, length in sizes)
    assert sum(rows for rows, _ in sizes) == 6  # empty continuations need no forward
    for laws, others in zip(before, after, strict=True):
        assert laws.shape == others.shape
        assert not len(laws) or total_variation(laws, others).max() < ROUNDING


def test_score_of_a_trace_is_the_definition() -> None:
    trace = MESampler(ensemble()).sample(PROMPTS, max_new_tokens=6, n=2, seed=2)
    for i, model in enumerate(trace.model.components):
        for row, tokens in enumerate(trace.tokens.tolist()):
            prompt = trace.prompts[int(trace.prompt_index[row])]
            laws = model.log_probs([(*prompt, *tokens[:t]) for t in range(6)])
            own = laws.gather(1, torch.tensor(tokens)[:, None])[:, 0].double()
            torch.testing.assert_close(trace.component_log_probs[row, :, i], own, atol=1e-4, rtol=0)
    assert torch.equal(score(trace.model, trace.prompts * 2, [[], []] * 3).log_probs, torch.zeros(6, 0))


def test_batch_of_no_prefixes_is_an_empty_batch_of_laws() -> None:
    assert component().log_probs([]).shape == (0, V)


def test_log_probs_of_a_batch_are_those_of_each_prefix_alone() -> None:
    for family in FAMILIES:
        model = tiny(family)
        alone: list[Tensor] = [model.log_probs([prompt]) for prompt in PROMPTS]
        assert total_variation(model.log_probs(PROMPTS), torch.cat(alone)).max() < ROUNDING


def test_models_nest_in_the_algebra() -> None:
    model = Warped(Conditioned(component(), [20, 21]), TopK(4))
    trace = CESampler(model).sample([8, 9], max_new_tokens=8, n=3)
    assert trace.cost.tokens_forwarded == 4 + 3 * 7
    for tokens in trace.tokens.tolist():
        laws = component().log_probs([(20, 21, 8, 9, *tokens[:t]) for t in range(8)])
        rank = (laws > laws.gather(1, torch.tensor(tokens)[:, None])).sum(1)
        assert int(rank.max()) < 4


# --- memory


def test_rows_are_split_to_keep_caches_below_the_bound(monkeypatch: pytest.MonkeyPatch) -> None:
    length = len(PROMPTS[2]) + STEPS
    per_row = component().cache_bytes_per_token() * length
    bound = int(2.5 * per_row)
    opened: list[RaggedSession] = []
    models = [TransformersModel(component(i).network, max_cache_gb=bound / 2**30) for i in (0, 1)]
    assert models[0].rows_that_fit(length) == 2
    assert models[0].rows_that_fit(100 * length) == 1
    small = Ensemble(models, ConstantMixing([0.6, 0.4]))
    build = RaggedSession.__init__

    def recording(self: RaggedSession, *arguments: Any, **options: Any) -> None:
        opened.append(self)
        build(self, *arguments, **options)

    monkeypatch.setattr(RaggedSession, "__init__", recording)
    for sampler in (CESampler, MESampler):
        opened.clear()
        trace = sampler(small).sample(PROMPTS[2], max_new_tokens=STEPS, n=7)
        assert len(opened) == 2 * 4
        assert 0 < max(session.cache_bytes for session in opened) <= bound
        whole = sampler(ensemble()).sample(PROMPTS[2], max_new_tokens=STEPS, n=7)
        assert torch.equal(trace.tokens, whole.tokens)


@pytest.mark.parametrize("family", FAMILIES)
def test_bytes_per_token_are_those_of_the_cache(family: str) -> None:
    model = tiny(family, dtype="bfloat16")
    session = model.session([(5, 6, 7)] * 4, max_new_tokens=5)
    assert isinstance(session, RaggedSession)
    session.log_probs(np.arange(4))
    assert session.cache_bytes == 4 * 8 * model.cache_bytes_per_token()
    heads = 4 if family in ("gpt2", "gpt_neox") else 2
    assert model.cache_bytes_per_token() == 2 * 2 * heads * 8 * 2


def test_weights_are_counted_in_their_own_precision() -> None:
    full = component().weight_bytes
    assert full == 4 * sum(parameter.numel() for parameter in component().network.parameters())
    assert tiny(dtype="bfloat16").weight_bytes == full // 2


# --- prompts


@pytest.mark.parametrize("session", ["ragged", "prefix"])
def test_empty_or_overlong_prompts_are_refused(session: Any) -> None:
    model = tiny(session=session)
    long = tuple(range(2, 2 + V - 2)) + (5,) * CONTEXT
    assert model.context_length == CONTEXT
    model.session([long[:CONTEXT]])
    for call in (
        lambda prompt: model.log_probs([(5,), prompt]),
        lambda prompt: model.session([(5,), prompt]),
        lambda prompt: list(model.path_log_probs([(5,), prompt], [[], [6]])),
        lambda prompt: CESampler(model).sample([prompt], max_new_tokens=1),
    ):
        with pytest.raises(ValueError, match=r"^an empty prompt gives LlamaForCausalLM nothing to read"):
            call(())
        with pytest.raises(ValueError, match=rf"^prompt of {CONTEXT + 1} tokens .* context window .*\({CONTEXT} tok"):
            call(long[: CONTEXT + 1])
    with pytest.raises(ValueError, match=rf"^prompt of {CONTEXT - 3} tokens and 4 new ones exceed"):
        model.session([long[: CONTEXT - 3]], max_new_tokens=4)
    with pytest.raises(ValueError, match="shorten the prompt or max_new_tokens"):
        CESampler(model).sample([long[: CONTEXT - 3]], max_new_tokens=4)
    CESampler(model).sample([long[: CONTEXT - 3]], max_new_tokens=3)


def test_context_window_counts_each_row_on_its_own() -> None:
    long = (5,) * (CONTEXT - 1)
    laws = list(component().path_log_probs([long, (5,)], [[6], [7] * (CONTEXT - 1)]))
    assert [len(law) for law in laws] == [1, CONTEXT - 1]


def test_ids_outside_the_vocabulary_are_refused() -> None:
    with pytest.raises(ValueError, match=f"token id {V}, outside the vocabulary"):
        CESampler(component()).sample([5, V], max_new_tokens=1)
    with pytest.raises(TypeError, match="no tokenizer"):
        CESampler(component()).sample("text", max_new_tokens=1)


def test_longrope_ends_where_one_row_would_change_the_positions_of_others() -> None:
    short, long = [1.0] * 4, [4.0] * 4
    rope = {
        "rope_type": "longrope", "rope_theta": 10000.0, "short_factor": short, "long_factor": long,
        "original_max_position_embeddings": 24,
    }  # fmt: skip
    config = Phi3Config(**shape(original_max_position_embeddings=24, rope_parameters=rope))
    model = TransformersModel(network(config))
    assert model.context_length == 24
    texts = [tuple(range(5, 5 + 24)), (5, 6, 7)]
    alone = torch.cat([model.log_probs([text]) for text in texts])
    assert total_variation(model.log_probs(texts), alone).max() < ROUNDING
    assert total_variation(model.session(texts).log_probs(np.arange(2)), alone).max() < ROUNDING
    with pytest.raises(ValueError, match="context window"):
        model.log_probs([tuple(range(5, 5 + 25))])
    # Past that length a longer neighbour changes a row's law, which is why the window ends there.
    model.context_length = CONTEXT
    beside = model.log_probs([tuple(range(5, 5 + 25)), (5, 6, 7)])
    assert total_variation(beside[1:], alone[1:]).max() > 1000 * ROUNDING


# --- options


def test_options_are_checked() -> None:
    with pytest.raises(ValueError, match=r"^dtype must be one of .*'float16'.*, got 'int8'"):
        TransformersModel(component().network, dtype="int8")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"^max_cache_gb must be positive"):
        TransformersModel(component().network, max_cache_gb=0)
    with pytest.raises(ValueError, match=r"^session must be 'ragged' or 'prefix', got 'paged'"):
        TransformersModel(component().network, session="paged")  # type: ignore[arg-type]
    with pytest.raises(CatalogError, match="no model"):
        TransformersModel("bundled:nothing")


def test_loaded_model_keeps_its_dtype_unless_told() -> None:
    half = network(FAMILIES["llama"]()).to(torch.bfloat16)
    assert TransformersModel(half).dtype == torch.bfloat16
    model = TransformersModel(half, dtype="float32")
    assert model.dtype == torch.float32
    assert model.device == torch.device("cpu")
    assert repr(model) == "TransformersModel('LlamaForCausalLM', float32)"
    assert not any(parameter.requires_grad for parameter in model.network.parameters())


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_loaded_model_stays_on_its_device() -> None:
    assert TransformersModel(network(FAMILIES["llama"]()).to("cuda")).device.type == "cuda"


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_laws_are_float32_and_normalised(dtype: Any) -> None:
    model = tiny(dtype=dtype)
    laws = model.session(PROMPTS).log_probs(np.arange(3))
    for law in (laws, model.log_probs(PROMPTS)):
        assert law.dtype == torch.float32
        assert law.logsumexp(-1).abs().max() < 1e-5


@pytest.mark.parametrize("family", ["llama", "gemma3", "gemma2", "gpt_oss", "gpt2"])
def test_loaded_model_still_generates_what_it_did(family: str) -> None:
    own = network(FAMILIES[family]())
    prompts = torch.tensor([[0, 0, 5, 6, 7], [8, 9, 10, 11, 12]])
    inputs: dict[str, Any] = {
        "input_ids": prompts, "attention_mask": (prompts > 0).long(), "max_new_tokens": 20, "do_sample": False,
        "pad_token_id": 0,
    }  # fmt: skip
    before = own.generate(**inputs)
    model = TransformersModel(own)
    CESampler(model).sample([5, 6, 7], max_new_tokens=4)
    assert torch.equal(own.generate(**inputs), before)
    # Greedy decoding through the session agrees: the last prompt has no padding.
    greedy = CESampler(Warped(model, TopK(1))).sample([8, 9, 10, 11, 12], max_new_tokens=20)
    assert greedy.tokens[0].tolist() == before[1, 5:].tolist()
