from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from me_stats.mixing import ConstantMixing
from me_stats.routers import (
    HiddenStateRouter,
    NgramRouter,
    RecurrentRouter,
    Router,
    RouterMixing,
    load_router,
    router_metadata,
    save_router,
    train_router,
)
from me_stats.vocabulary import Vocabulary
from tests.mixtures import component
from tests.networks import tiny
from tests.routers.toys import scrambled

WORDS = Vocabulary(64, eos=(3,), fingerprint="words")


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "router.safetensors"
    save_router(scrambled(NgramRouter(2, order=2, buckets=32)), path, vocabulary=WORDS)
    return path


@pytest.mark.parametrize("double", [False, True])
@pytest.mark.parametrize("kind", ["ngram", "recurrent", "hidden", "hidden layer"])
def test_every_router_comes_back_bit_by_bit(kind: str, double: bool, tmp_path: Path) -> None:
    model = component(0) if kind.startswith("hidden") else None
    router: Router = {
        "ngram": lambda: NgramRouter(2, order=2, buckets=32),
        "recurrent": lambda: RecurrentRouter(2, 64, width=3, seed=4),
        "hidden": lambda: HiddenStateRouter(component(0), 2),
        "hidden layer": lambda: HiddenStateRouter(component(0), 2, width=4),
    }[kind]()
    scrambled(router).temperature.fill_(1.25)
    router = router.double() if double else router
    path = tmp_path / "router.safetensors"
    save_router(router, path, vocabulary=WORDS, training={"corpus": "none", "nll": 1.5})
    found = load_router(path, WORDS, model=model)
    assert type(found) is type(router)
    assert found.options() == router.options()
    for name, tensor in router.state_dict().items():
        assert found.state_dict()[name].dtype == tensor.dtype
        assert torch.equal(found.state_dict()[name], tensor)
    prefixes = [(5, 6), (7,)]
    assert torch.equal(RouterMixing(found).log_weights(prefixes), RouterMixing(router).log_weights(prefixes))
    assert router_metadata(path)["training"] == {"corpus": "none", "nll": 1.5}


def test_the_options_of_a_fit_are_provenance(tmp_path: Path) -> None:
    scores = np.log(np.full((4, 2), 0.5))
    fit = train_router(NgramRouter(2, buckets=8), [[0, 1, 2, 3]] * 3, [scores] * 3, epochs=1)
    save_router(fit.router, tmp_path / "r", vocabulary=WORDS, training=fit.options)
    about = router_metadata(tmp_path / "r")
    assert about["training"] == fit.options
    assert about["version"]
    assert about["vocabulary"] == {"size": 64, "eos": [3], "fingerprint": "words"}


@pytest.mark.parametrize(
    ("vocabulary", "reason"),
    [
        (Vocabulary(65, eos=(3,), fingerprint="words"), "64 against 65 tokens"),
        (Vocabulary(64, eos=(3,), fingerprint="bytes"), "same size, but the ids stand for different tokens"),
        (Vocabulary(64, eos=(4,), fingerprint="words"), "different end-of-sequence ids"),
    ],
)
def test_another_vocabulary_is_refused(file: Path, vocabulary: Vocabulary, reason: str) -> None:
    with pytest.raises(ValueError, match=f"router in .* and vocabulary have different vocabularies.*{reason}"):
        load_router(file, vocabulary)


def test_every_flipped_byte_is_noticed_or_harmless(file: Path) -> None:
    right, state = file.read_bytes(), load_router(file, WORDS).state_dict()
    rng = np.random.default_rng(0)
    refused = 0
    for place in [*range(8), *rng.integers(8, len(right), 150).tolist()]:
        changed = bytearray(right)
        changed[place] ^= 1 << int(rng.integers(8))
        file.write_bytes(bytes(changed))
        try:
            found = load_router(file, WORDS).state_dict()
        except ValueError:
            refused += 1
        else:
            # Only provenance may read differently.
            assert all(torch.equal(found[name], tensor) for name, tensor in state.items())
    assert refused > 100


@pytest.mark.parametrize("length", [0, 7, 100, 600])
def test_cut_files_are_refused(file: Path, length: int) -> None:
    file.write_bytes(file.read_bytes()[:length])
    with pytest.raises(ValueError, match="is damaged or no safetensors file"):
        load_router(file, WORDS)


def test_files_that_are_no_routers_are_refused(file: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="there is no router file at"):
        load_router(tmp_path / "absent", WORDS)
    with pytest.raises(ValueError, match="is damaged or no safetensors file"):
        load_router(tmp_path, WORDS)
    state, about = load_file(file), router_metadata(file)
    for changed, message in (
        ({}, "does not describe a router"),
        ({"me_stats": "{"}, "does not describe a router"),
        ({"me_stats": json.dumps(about | {"schema": "9"})}, "has schema 9, this version reads 1"),
        ({"me_stats": json.dumps(about | {"class": "Oracle"})}, "holds a Oracle, which this version does not know"),
        ({"me_stats": json.dumps(about | {"options": {"n_components": 3}})}, "what its header says does not fit"),
        ({"me_stats": json.dumps(about | {"options": {"components": 3}})}, "what its header says does not fit"),
    ):
        save_file(state, file, metadata=changed)
        with pytest.raises(ValueError, match=message):
            load_router(file, WORDS)
    with pytest.raises(TypeError, match="router must be a Router"):
        save_router(ConstantMixing([1.0]), file, vocabulary=WORDS)  # type: ignore[arg-type]


def test_a_hidden_state_router_asks_for_its_network(tmp_path: Path) -> None:
    path = tmp_path / "r"
    save_router(HiddenStateRouter(component(0), 2), path, vocabulary=WORDS)
    with pytest.raises(ValueError, match="give that network as model="):
        load_router(path, WORDS)
    other = tiny("gpt2")
    other.name = "another"
    with pytest.raises(ValueError, match=r"was trained on .*, got .*another"):
        load_router(path, WORDS, model=other)
