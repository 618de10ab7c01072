"""Published shapes have the sizes that their cards state, and random networks of them run like any other."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from me_stats import ConstantMixing
from me_stats.cost import me_work
from me_stats.hardware import ModelShape
from me_stats.models import Ensemble, TransformersModel
from me_stats.models.catalog import get_entry
from me_stats.models.shapes import PAPER_GROUPS, PUBLISHED, published_config, random_network
from me_stats.samplers import CESampler, MESampler
from tests.networks import total_variation

TINY = {"dtype": "float32", "layers": 2, "shrink": 16}


@pytest.mark.parametrize(
    ("name", "parameters", "without_embeddings"),
    [
        ("qwen2.5-3b", 3.09e9, 2.77e9),
        ("qwen2.5-math-1.5b", 1.54e9, 1.31e9),
        ("mistral-7b", 7.241732096e9, 6.979588096e9),
        ("deepseek-7b", 6.910365696e9, 6.07150489e9),
        ("gemma3-270m", get_entry("gemma3-270m").parameters, 100e6),
    ],
)
def test_sizes_are_those_of_the_model_cards(name: str, parameters: float, without_embeddings: float) -> None:
    shape = ModelShape.of(published_config(name))
    tied = PUBLISHED[name]["tie_word_embeddings"]
    assert shape.body + shape.head * (1 if tied else 2) == pytest.approx(parameters, rel=3e-3)
    assert shape.body == pytest.approx(without_embeddings, rel=4e-3)


def test_the_output_layer_is_most_of_a_small_model_with_many_tokens() -> None:
    assert ModelShape.of(published_config("gemma3-270m")).head_share == pytest.approx(0.626, abs=1e-3)
    assert ModelShape.of(published_config("mistral-7b")).head_share < 0.02


def test_groups_name_published_shapes() -> None:
    assert {name for group in PAPER_GROUPS.values() for name in group} <= set(PUBLISHED)
    assert [len(group) for group in PAPER_GROUPS.values()] == [2, 2, 3, 3]


@pytest.mark.parametrize("name", PUBLISHED)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_random_network_opens(name: str, dtype: str) -> None:
    network = random_network(name, dtype=dtype, layers=2, shrink=16)  # type: ignore[arg-type]
    model = TransformersModel(network)  # runs its own checks
    assert str(model.dtype) == f"torch.{dtype}"
    assert model.vocabulary.size == PUBLISHED[name]["vocab_size"] // 16
    assert model.log_probs([[1, 2, 3]]).isfinite().all()


@pytest.mark.parametrize("name", PUBLISHED)
def test_what_is_no_weight_is_as_if_built_in_memory(name: str) -> None:
    built = AutoModelForCausalLM.from_config(published_config(name, layers=2, shrink=16), dtype=torch.float32)
    network = random_network(name, **TINY)  # type: ignore[arg-type]
    found, expected = dict(network.named_buffers()), dict(built.named_buffers())
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[key], expected[key]) for key in expected)
    one = {key: value for key, value in built.state_dict().items() if value.dim() == 1}
    assert all(torch.equal(network.state_dict()[key], value) for key, value in one.items())
    tied = network.get_output_embeddings().weight is network.get_input_embeddings().weight
    assert tied == PUBLISHED[name]["tie_word_embeddings"]


def test_weights_are_drawn_from_the_seed_alone() -> None:
    state = torch.get_rng_state()
    first, again, other = (random_network("mistral-7b", **TINY, seed=seed) for seed in (0, 0, 1))  # type: ignore[arg-type]
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(first.lm_head.weight, again.lm_head.weight)
    assert not torch.equal(first.lm_head.weight, other.lm_head.weight)
    assert float(first.model.layers[1].mlp.up_proj.weight.std()) == pytest.approx(0.02, rel=0.01)
    laws = [TransformersModel(network).log_probs([[5, 6, 7]]) for network in (first, other)]
    assert float(total_variation(*laws)) > 0.05


@pytest.mark.parametrize("group", ["hermes2", "hermes3"])
def test_ensembles_of_a_group_are_sampled_and_counted(group: str) -> None:
    names = PAPER_GROUPS[group]
    models = [TransformersModel(random_network(name, **TINY, seed=i)) for i, name in enumerate(names)]  # type: ignore[arg-type]
    ensemble = Ensemble(models, ConstantMixing(np.full(len(names), 1 / len(names))))
    trace = MESampler(ensemble).sample([[3, 1, 4, 1, 5]], n=3, max_new_tokens=9)
    assert trace.tokens.shape == (3, 9)
    assert trace.components is not None
    assert trace.cost == me_work(trace.components.numpy(), prompt_length=5, horizon=9).cost
    assert CESampler(ensemble).sample([[3, 1, 4, 1, 5]], n=3, max_new_tokens=9).cost.forwards == 9 * len(names)


def test_what_is_no_network_is_refused() -> None:
    with pytest.raises(ValueError, match=r"name must be one of qwen2\.5-3b"):
        published_config("gpt-5")
    for layers in (0, 33):
        with pytest.raises(ValueError, match=r"layers must lie in 1\.\.32"):
            published_config("mistral-7b", layers=layers)
    for shrink in (0, 3, 128):
        with pytest.raises(ValueError, match="shrink must be a divisor of 64"):
            published_config("mistral-7b", shrink=shrink)
    with pytest.raises(ValueError, match="dtype"):
        random_network("mistral-7b", dtype="int8")  # type: ignore[arg-type]
