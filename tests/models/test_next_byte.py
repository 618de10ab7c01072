"""Next-byte laws against enumeration of all tokenisations."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from me_stats.divergence import tv_distance
from me_stats.exact import sampler_law, sequence_law
from me_stats.mixing import ConstantMixing
from me_stats.models import Conditioned, Ensemble, MarkovModel, TopK, Warped
from me_stats.models.aligned import Aligned
from me_stats.models.next_byte import BYTES, END, NextByte
from me_stats.samplers import CESampler, MESampler
from me_stats.testing import check_language_model
from me_stats.vocabulary_map import ByteStrings, TokenBytes

TABLE = TokenBytes.greedy([b"a", b"b", b"ab", b"ba", b"abb", b"\xff", b"\xff\xff", b"a"], eos=())
ENDED = TokenBytes.greedy([b"a", b"b", b"ab", b"bb", None, None], eos=(4,))


def toy(seed: int = 0, table: TokenBytes = TABLE, *, alpha: float = 1.0) -> MarkovModel:
    return MarkovModel.random(table.size, seed=seed, eos=table.eos, concentration=alpha)


def beginning(model: MarkovModel, table: TokenBytes, history: bytes) -> float:
    """P(the text begins with `history`), row of tokens by row of tokens; controls are redrawn."""
    total = 0.0
    waiting: list[tuple[tuple[int, ...], bytes, float]] = [((), b"", 1.0)]
    while waiting:
        tokens, text, weight = waiting.pop()
        if len(text) >= len(history):
            total += weight
            continue
        law = model.log_probs([tokens])[0].exp().double().numpy()
        silent = [t for t, string in enumerate(table.strings) if string is None and t not in table.eos]
        law = law / (1 - law[silent].sum())
        for token, string in enumerate(table.strings):
            if string is not None and (text + string)[: len(history)] == history[: len(text + string)]:
                waiting.append(((*tokens, token), text + string, weight * law[token]))
    return total


def by_hand(model: MarkovModel, table: TokenBytes, history: bytes) -> np.ndarray:
    law = np.zeros(257)
    for byte in range(256):
        if any(bytes([byte]) in string for string in table.strings if string is not None):
            law[byte] = beginning(model, table, history + bytes([byte]))
    law[END] = beginning(model, table, history) - law.sum()
    return law / beginning(model, table, history)


@pytest.mark.parametrize("table", [TABLE, ENDED], ids=["no end", "an end and a control"])
@pytest.mark.parametrize("seed", [0, 1])
def test_the_law_is_that_of_all_tokenisations(table: TokenBytes, seed: int) -> None:
    model = toy(seed, table)
    bytes_known = [byte for byte in (97, 98, 255) if any(bytes([byte]) == s for s in table.strings)]
    for length in range(5):
        for history in itertools.product(bytes_known, repeat=length):
            law = NextByte(model, token_bytes=table).log_probs([history])[0].exp().numpy()
            assert np.abs(law - by_hand(model, table, bytes(history))).max() < 1e-12


def test_one_tokenisation_alone_is_another_law() -> None:
    """The planted bug: the canonical tokenisation is taken for all of them."""
    model, history = toy(3), b"abab"
    everything = NextByte(model, token_bytes=TABLE).log_probs([history])
    one = NextByte(model, token_bytes=TABLE, beam=1).log_probs([history])
    assert tv_distance(everything, one)[0] > 0.01  # type: ignore[index]


@settings(max_examples=25)
@given(st.lists(st.sampled_from([97, 98]), max_size=7), st.integers(0, 50), st.integers(1, 6))
def test_a_beam_that_left_nothing_out_is_exact(history: Sequence[int], seed: int, beam: int) -> None:
    model = toy(seed, alpha=0.3)
    exact, pruned = (NextByte(model, token_bytes=TABLE, beam=width) for width in (None, beam))
    assert exact.pruned_mass([history])[0] == 0
    share = pruned.pruned_mass([history])[0]
    assert 0 <= share < 1
    gap = float(tv_distance(exact.log_probs([history]), pruned.log_probs([history]))[0])  # type: ignore[index]
    assert gap < 1e-12 or share > 0
    wide = NextByte(model, token_bytes=TABLE, beam=1000)
    assert bool((wide.log_probs([history]) == exact.log_probs([history])).all())


def test_sessions_prefixes_and_paths_agree() -> None:
    table = TokenBytes((*(bytes([value]) for value in range(256)), b"ab", b"ba", b"aba", None), eos=(259,))
    model = NextByte(toy(1, table), token_bytes=table)
    check_language_model(model, prompts=[(), b"ab", b"b"], seed=0)
    rows = np.arange(3)
    session = model.session([(), b"ab", b"b"])
    for byte in b"abab":
        session.append(rows[1:], torch.full((2,), byte))
    laws = session.log_probs(rows)
    assert bool((laws == model.log_probs([(), b"ababab", b"babab"])).all())
    assert session.cost.reads == 3


def test_bytes_of_several_components_mix_exactly() -> None:
    """Two tokenizers over one alphabet: what ME and CE write, enumerated."""
    other = TokenBytes.greedy([b"b", b"a", b"bab", None], eos=(3,))
    components = [NextByte(toy(0, ENDED), token_bytes=ENDED), NextByte(toy(1, other), token_bytes=other)]
    ensemble = Ensemble([Warped(components[0], TopK(2)), components[1]], ConstantMixing([0.3, 0.7]))
    law = sequence_law(ensemble, b"a", max_new_tokens=3)
    for sampler in (MESampler(ensemble), CESampler(ensemble)):
        assert sampler_law(sampler, b"a", max_new_tokens=3).tv_distance(law) < 1e-12


def test_whole_strings_from_a_boundary_are_the_same_text() -> None:
    """Before anything is written, the first bytes have the law that the first strings imply."""
    model, shared = toy(2), ByteStrings([TABLE])
    strings = Aligned(model, shared, token_bytes=TABLE).log_probs([()])[0].exp()
    first = np.zeros(257)
    for string, share in zip(shared.strings, strings.tolist(), strict=True):
        first[string[0]] += share
    assert np.abs(NextByte(model, token_bytes=TABLE).log_probs([()])[0].exp().numpy() - first).max() < 1e-12


def test_a_prompt_of_tokens_goes_inside() -> None:
    model = toy(0)
    inside = NextByte(Conditioned(model, [2, 0]), token_bytes=TABLE).log_probs([()])[0].exp()
    own = model.log_probs([(2, 0)])[0].exp()
    begins_with_a = sum(own[t] for t, s in enumerate(TABLE.strings) if s is not None and s[:1] == b"a")
    assert float(inside[97]) == pytest.approx(float(begins_with_a), abs=1e-12)


def test_what_cannot_be_is_refused() -> None:
    model = NextByte(toy(), token_bytes=TABLE)
    with pytest.raises(ValueError, match="cannot write byte 0x63"):
        model.log_probs([b"ac"])
    with pytest.raises(ValueError, match="no end of sequence"):
        model.log_probs([(97, END)])
    with pytest.raises(ValueError, match="beam must be at least 1"):
        NextByte(toy(), token_bytes=TABLE, beam=0)
    with pytest.raises(ValueError, match="token_bytes has 6 ids"):
        NextByte(toy(), token_bytes=ENDED)
    assert BYTES.vocabulary.encode("é") == (0xC3, 0xA9)
    assert torch.isfinite(model.log_probs([b"\xff\xff\xff"])[0, 255])
