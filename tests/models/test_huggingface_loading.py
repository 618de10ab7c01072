from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import BertConfig, BertModel, LlamaConfig, T5Config, T5Model

from me_stats.mixing import ConstantMixing
from me_stats.models import Ensemble
from me_stats.models.huggingface import TransformersModel
from me_stats.samplers import CESampler
from tests.mixtures import PROMPTS, ROUNDING
from tests.networks import FAMILIES, V, byte_tokenizer, network, shape, total_variation


def folder_config(**changes: Any) -> LlamaConfig:
    return LlamaConfig(**shape(vocab_size=264, hidden_size=16, intermediate_size=16, head_dim=4) | changes)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small Llama and its byte tokenizer, as `save_pretrained` leaves them."""
    folder = tmp_path_factory.mktemp("checkpoint")
    network(folder_config(eos_token_id=257)).save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture
def copy(checkpoint: Path, tmp_path: Path) -> Path:
    for file in checkpoint.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    return tmp_path


# --- vocabularies


def test_folder_opens_with_its_tokenizer(checkpoint: Path) -> None:
    model = TransformersModel(checkpoint)
    assert (model.name, model.dtype, model.vocabulary.eos) == (str(checkpoint), torch.float32, (257,))
    assert model.vocabulary.decode(model.vocabulary.encode("ab é")) == "ab é"
    assert set(model.source) == {"sha256"}
    trace = CESampler(model).sample("ab é", max_new_tokens=4, n=2)
    assert all(isinstance(text, str) for text in trace.texts())
    halved = TransformersModel(checkpoint, dtype="bfloat16")
    assert halved.dtype == torch.bfloat16
    assert halved.source == model.source
    assert TransformersModel(checkpoint, tokenizer=byte_tokenizer()).vocabulary == model.vocabulary


def test_logit_rows_without_a_token_are_cut(checkpoint: Path) -> None:
    model = TransformersModel(checkpoint)
    assert model.network.config.vocab_size == 264
    assert model.vocabulary.size == 258
    (path,) = model.path_log_probs([(5, 6)], [[7]])
    for laws in (model.log_probs([(5, 6)]), model.session([(5, 6)]).log_probs(np.arange(1)), path):
        assert laws.shape == (1, 258)
        assert laws.logsumexp(-1).abs().max() < 1e-5
    bare = TransformersModel(model.network)
    assert bare.vocabulary.size == 264
    # Leaving rows out is conditioning on the rest.
    rest = bare.log_probs([(5, 6)])[:, :258].log_softmax(-1)
    assert total_variation(rest, model.log_probs([(5, 6)])).max() < ROUNDING


def test_ends_come_from_the_generation_config_first(checkpoint: Path) -> None:
    def eos(declared: Any, config: Any = None) -> tuple[int, ...]:
        own = network(folder_config(eos_token_id=config))
        own.generation_config.eos_token_id = declared
        return TransformersModel(own, tokenizer=byte_tokenizer()).vocabulary.eos

    assert eos([257, 3]) == (3, 257)
    assert eos(4, config=5) == (4,)
    assert eos(None, config=5) == (5,)
    assert eos(None) == ()
    assert eos([3, 260, -1]) == (3,)  # ids without a token can't be written


def test_rows_end_at_any_of_the_ends() -> None:
    own = network(FAMILIES["llama"]())
    own.generation_config.eos_token_id = [20, 21, 22, 23, 24]
    model = TransformersModel(own)
    trace = CESampler(model).sample(PROMPTS, max_new_tokens=30, n=8)
    ends = torch.isin(trace.tokens, torch.tensor(model.vocabulary.eos))
    last = torch.arange(trace.tokens.shape[1])[None] == trace.lengths[:, None] - 1
    assert bool((ends <= last).all())
    assert {"eos", "length"} == set(trace.stop_reason)


def test_only_equal_token_tables_mix() -> None:
    byte, other = byte_tokenizer(), byte_tokenizer()
    other.add_tokens(["extra"])
    renamed = byte_tokenizer()
    renamed.add_tokens(["different"])
    networks = [network(folder_config(), seed=i) for i in (0, 1)]
    weights = ConstantMixing([0.6, 0.4])
    first = TransformersModel(networks[0], tokenizer=byte)
    Ensemble([first, TransformersModel(networks[1], tokenizer=byte_tokenizer())], weights)
    with pytest.raises(ValueError, match="258 against 259 tokens"):
        Ensemble([first, TransformersModel(networks[1], tokenizer=other)], weights)
    with pytest.raises(ValueError, match="ids stand for different tokens"):
        Ensemble(
            [TransformersModel(networks[0], tokenizer=other), TransformersModel(networks[1], tokenizer=renamed)],
            weights,
        )


# --- broken checkpoints


def truncate(folder: Path) -> None:
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])


def cut_header(folder: Path) -> None:
    (folder / "model.safetensors").write_bytes(b"\x00\x01")


def garbage_config(folder: Path) -> None:
    (folder / "config.json").write_text("{not json")


def list_config(folder: Path) -> None:
    (folder / "config.json").write_text("[1, 2]")


def no_config(folder: Path) -> None:
    (folder / "config.json").unlink()


def no_weights(folder: Path) -> None:
    (folder / "model.safetensors").unlink()


def edit_config(folder: Path, **changes: Any) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | changes))


def wrong_shapes(folder: Path) -> None:
    edit_config(folder, intermediate_size=24)


def bad_number(folder: Path) -> None:
    edit_config(folder, num_hidden_layers="two")


def one_weight_missing(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    del weights["model.layers.1.mlp.up_proj.weight"]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def unknown_architecture(folder: Path) -> None:
    edit_config(folder, model_type="nonesuch")


def garbage_tokenizer(folder: Path) -> None:
    (folder / "tokenizer.json").write_text("{}")


def no_tokenizer(folder: Path) -> None:
    for file in folder.glob("tokenizer*"):
        file.unlink()


BROKEN: tuple[tuple[Callable[[Path], None], str], ...] = (
    (truncate, "^cannot load "),
    (cut_header, "^cannot load "),
    (garbage_config, "^cannot load "),
    (list_config, "^cannot load |is not a causal language model"),
    (no_config, "^cannot load |is not a causal language model"),
    (no_weights, "^cannot load "),
    (wrong_shapes, "^cannot load "),
    (bad_number, "^cannot load "),
    (one_weight_missing, r"lacks 1 weights, such as model\.layers\.1\.mlp\.up_proj\.weight$"),
    (unknown_architecture, "^cannot load |is not a causal language model"),
    (garbage_tokenizer, "^cannot load the tokenizer of .*give one as tokenizer=$"),
    (no_tokenizer, "^cannot load the tokenizer of .*give one as tokenizer=$"),
)


@pytest.mark.parametrize(("damage", "message"), BROKEN, ids=[damage.__name__ for damage, _ in BROKEN])
def test_broken_folder_is_refused_in_one_line(copy: Path, damage: Callable[[Path], None], message: str) -> None:
    damage(copy)
    with pytest.raises(ValueError, match=message) as refusal:
        TransformersModel(copy)
    assert "\n" not in str(refusal.value)
    assert str(copy) in str(refusal.value)


def test_folder_without_tokenizer_opens_with_one_given(copy: Path) -> None:
    no_tokenizer(copy)
    assert TransformersModel(copy, tokenizer=byte_tokenizer()).vocabulary.size == 258


@pytest.mark.parametrize("kind", ["bert", "t5"])
def test_checkpoint_of_another_kind_is_refused(kind: str, tmp_path: Path) -> None:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        if kind == "bert":
            BertModel(BertConfig(**shape())).save_pretrained(tmp_path)
        else:
            config = T5Config(vocab_size=V, d_model=16, d_kv=4, d_ff=16, num_layers=1, num_heads=2)
            T5Model(config).save_pretrained(tmp_path)
    byte_tokenizer().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"is not a causal language model|lacks \d+ weights") as refusal:
        TransformersModel(tmp_path)
    assert "\n" not in str(refusal.value)
