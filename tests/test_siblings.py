"""The bundled models: what is stored, how it loads, and that each knows its own text."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from types import ModuleType

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from me_stats.scripts import load

BUNDLED = Path(__file__).parents[1] / "me_stats" / "models" / "bundled"
DOMAINS = ("prose", "code")
SIBLINGS = (*DOMAINS, "words")
TEXTS = [
    "",
    "plain ASCII,  two  spaces .  And , a tab\t!\n\n\nend\r\n",
    "Grüße, naïve café, Ω",
    "日本語と中文",
    "😀 👩‍🔬 🇫🇷",
    "Ā\x00Ġ Ċ <|endoftext|> <s>",
    " leading and trailing ",
]


@pytest.fixture(scope="module")
def models() -> dict[str, PreTrainedModel]:
    return {name: AutoModelForCausalLM.from_pretrained(BUNDLED / name) for name in SIBLINGS}


@pytest.fixture(scope="module")
def script() -> ModuleType:
    return load("experiments", "train_siblings")


@pytest.fixture(scope="module")
def corpora(script: ModuleType) -> dict[str, tuple[bytes, bytes]]:
    streams: dict[str, tuple[bytes, bytes]] = script.corpora()
    return streams


def report(domain: str) -> dict:
    loaded: dict = json.loads((BUNDLED / domain / "training.json").read_text())
    return loaded


@pytest.mark.parametrize("domain", SIBLINGS)
def test_files_are_complete_and_small(domain: str) -> None:
    names = {"config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", "training.json"}
    assert names | {"model.safetensors"} <= {path.name for path in (BUNDLED / domain).iterdir()}
    assert not (BUNDLED / domain / "checkpoint.pt").exists()
    assert (BUNDLED / domain / "model.safetensors").stat().st_size < 1_600_000
    assert sum(path.stat().st_size for path in (BUNDLED / domain).iterdir()) < 1_700_000


@pytest.mark.parametrize("domain", SIBLINGS)
def test_loads_silently_in_float32(domain: str, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        model = AutoModelForCausalLM.from_pretrained(BUNDLED / domain)
        tokenizer = AutoTokenizer.from_pretrained(BUNDLED / domain)
    assert not caplog.records
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    assert model.num_parameters() == report(domain)["parameters"]
    assert model.config.model_type == "llama"
    assert model.config.num_key_value_heads < model.config.num_attention_heads
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert (len(tokenizer), model.config.vocab_size) == ((1000, 1040) if domain == "words" else (256, 256))


@pytest.mark.parametrize("domain", DOMAINS)
def test_token_ids_are_the_bytes(domain: str) -> None:
    tokenizer = AutoTokenizer.from_pretrained(BUNDLED / domain)
    for text in TEXTS:
        ids = tokenizer.encode(text)
        assert ids == list(text.encode())
        assert tokenizer.decode(ids) == text
        assert tokenizer(text)["input_ids"] == ids
    assert tokenizer.convert_tokens_to_ids(tokenizer.convert_ids_to_tokens(list(range(256)))) == list(range(256))


@pytest.mark.parametrize("domain", DOMAINS)
def test_the_end_is_a_role_and_no_special_token(domain: str) -> None:
    tokenizer = AutoTokenizer.from_pretrained(BUNDLED / domain)
    assert tokenizer.all_special_ids == []
    assert tokenizer.get_added_vocab() == {}
    for name in ("config.json", "generation_config.json"):
        assert json.loads((BUNDLED / domain / name).read_text())["eos_token_id"] == 0


def test_corpora_are_disjoint_and_end_their_documents(corpora: dict[str, tuple[bytes, bytes]]) -> None:
    pieces = [set(stream.split(b"\0")[:-1]) for streams in corpora.values() for stream in streams]
    assert len(set().union(*pieces)) == sum(map(len, pieces))
    for streams in corpora.values():
        assert all(stream.endswith(b"\n\0") and not stream.startswith(b"\0") for stream in streams)
        train, held_out = streams
        assert len(train) > 8 * len(held_out) > 0
        assert 500 < len(train) / train.count(b"\0") < 3000  # so that an end comes within a few thousand bytes


def test_each_model_knows_its_own_domain(
    models: dict[str, PreTrainedModel], corpora: dict[str, tuple[bytes, bytes]], script: ModuleType
) -> None:
    laws, bits = {}, {}
    for name, model in ((name, models[name]) for name in DOMAINS):
        for domain, (_, held_out) in corpora.items():
            law, cost = script.score(model, held_out, length=512, windows=6)
            laws[name, domain], bits[name, domain] = law.exp(), cost.mean().item()
    for own, other in (DOMAINS, DOMAINS[::-1]):
        assert bits[own, own] < 2.2
        assert bits[own, own] + 0.4 < bits[other, own]
        assert (laws["prose", own] - laws["code", own]).abs().sum(-1).mean() / 2 > 0.2


@pytest.mark.parametrize("domain", DOMAINS)
def test_the_end_is_likely_only_where_a_document_can_end(
    domain: str, models: dict[str, PreTrainedModel], corpora: dict[str, tuple[bytes, bytes]], script: ModuleType
) -> None:
    held_out = corpora[domain][1]
    law, _ = script.score(models[domain], held_out, length=512, windows=12)
    end = law[..., 0].exp().flatten()
    after_newline = torch.tensor([byte == ord("\n") for byte in held_out[: end.numel()]])
    assert end[~after_newline].mean() < 2e-4 < end.mean() < 5e-3
    assert end[after_newline].mean() > 50 * end[~after_newline].mean()


def test_report_holds_what_the_stored_weights_do() -> None:
    for own, other in (DOMAINS, DOMAINS[::-1]):
        bits = report(own)["held_out_bits_per_byte"]
        assert bits[own] < 2.2
        assert bits[own] + 0.4 < bits[other]
        assert min(report(own)["mean_tv_between_siblings"].values()) > 0.2
        assert max(report(own)["bits_per_byte_by_position"].values()) < 4


def test_batches_depend_on_seed_and_step_alone(script: ModuleType) -> None:
    stream = script.np.arange(50_000, dtype=script.np.uint8)
    args = script.argparse.Namespace(seed=3, steps=100)
    for step, length in ((0, script.CONTEXT), (99, script.LONG_CONTEXT)):
        tokens, positions = script.batch(stream, step, args)
        again = script.batch(stream, step, args)
        assert torch.equal(tokens, again[0])
        assert torch.equal(positions, again[1])
        assert tokens.shape == (script.BATCH_TOKENS // length, length + 1)
        assert positions.max() < script.MAX_POSITIONS
        assert (positions.diff(dim=1) >= 1).all()
        assert ((positions.diff(dim=1) > 1).sum(1) <= 1).all()
    assert not torch.equal(script.batch(stream, 0, args)[0], script.batch(stream, 1, args)[0])


def test_an_interrupted_run_ends_where_a_whole_run_does(
    script: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = b"".join(b"def f%d(x):\n    return x + %d\n\0" % (number, number) for number in range(400))
    monkeypatch.setattr(script, "SHAPE", {**script.SHAPE, "hidden_size": 16, "intermediate_size": 16})
    monkeypatch.setattr(script, "BATCH_TOKENS", 64)
    monkeypatch.setattr(script, "CONTEXT", 16)
    monkeypatch.setattr(script, "LONG_CONTEXT", 32)

    def run(name: str) -> bytes:
        args = script.argparse.Namespace(out=tmp_path / name, seed=1, steps=130, bf16=False)
        with script.Progress(disable=True) as progress:
            script.train(script.byte_course("code", (text, text[:2000] + b"\0")), args, progress)
        return (tmp_path / name / "code" / "model.safetensors").read_bytes()

    whole, batch = run("whole"), script.batch

    def interrupted(stream: object, step: int, args: object) -> object:
        if step == 117:
            raise KeyboardInterrupt
        return batch(stream, step, args)

    monkeypatch.setattr(script, "batch", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run("halved")
    assert [path.name for path in (tmp_path / "halved" / "code").iterdir()] == ["checkpoint.pt"]
    monkeypatch.setattr(script, "batch", batch)
    assert run("halved") == whole
