from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers

from me_stats import exact
from me_stats.divergence import tv_distance
from me_stats.mixing import ConstantMixing
from me_stats.models import Aligned, Ensemble, TableModel, TopK, UnionTopK, Warped
from me_stats.models.aligned import PushForward
from me_stats.samplers import CESampler, MESampler
from me_stats.testing import check_language_model, check_session
from me_stats.tokenizer_bytes import SPACE, byte_alphabet
from me_stats.vocabulary import Vocabulary
from me_stats.vocabulary_map import ByteStrings
from me_stats.vocabulary_names import converted_names, file_names
from tests.strategies import seeds

MIXING = ConstantMixing([0.6, 0.4])


def byte_level() -> Tokenizer:
    merges = [("Ġ", "a"), ("Ã", "©"), ("Ċ", "Ċ"), ("=", "=")]
    pieces = [*byte_alphabet(), *(a + b for a, b in merges)]
    backend = Tokenizer(models.BPE({piece: n for n, piece in enumerate(pieces)}, merges))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(["<eos>"])
    return backend


def sentence_piece() -> Tokenizer:
    pieces = ["<unk>", "</s>", *(f"<0x{value:02X}>" for value in range(256))]
    pieces += [SPACE, "a", "=", ".", "\n", "é", f"{SPACE}a", "=="]
    merges = [(SPACE, "a"), ("=", "=")]
    backend = Tokenizer(
        models.BPE({piece: n for n, piece in enumerate(pieces)}, merges, unk_token="<unk>", byte_fallback=True)
    )
    backend.normalizer = normalizers.Replace(" ", SPACE)
    backend.decoder = decoders.Sequence([decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()])
    backend.add_special_tokens(["<unk>", "</s>"])
    return backend


class Written(TableModel):
    """A table with a real tokenizer's vocabulary."""

    def __init__(self, backend: Tokenizer, eos: str, rows: np.ndarray) -> None:
        super().__init__(rows, order=0, eos=(backend.token_to_id(eos),))
        self.vocabulary = Vocabulary(len(rows[0]), eos=self.vocabulary.eos, fingerprint=eos, tokenizer=backend)


KINDS = ((byte_level(), "<eos>"), (sentence_piece(), "</s>"))


def written(seed: int = 0) -> list[Written]:
    rng = np.random.default_rng(seed)
    sizes = [backend.get_vocab_size() for backend, _ in KINDS]
    return [
        Written(backend, eos, rng.dirichlet(np.full(size, 0.05))[None])
        for (backend, eos), size in zip(KINDS, sizes, strict=True)
    ]


PLAIN = ByteStrings.of(written())
CONVERTED = ByteStrings.of(written(), names=converted_names)
FILES = ByteStrings.of(written(), names=file_names)


def split(shared: ByteStrings) -> set[bytes]:
    """Strings that both tables have, and under no common name."""
    one, other = ({entry for entry in table.entries if entry} for table in shared.tables)
    both = {string for string, _ in one} & {string for string, _ in other}
    return both - {string for string, _ in one & other}


def to_bytes(shared: ByteStrings, law: torch.Tensor) -> torch.Tensor:
    return PushForward(PLAIN.targets(shared.table()), PLAIN.vocabulary.size)(law)


def test_the_conversion_splits_what_the_ledger_says() -> None:
    # Letters and digits, the lone space and the space in front of a word are mapped back. "é" stays two signs.
    assert {b"\xc3\xa9"} | {bytes([value]) for value in range(128, 256)} <= split(CONVERTED)
    for text in (b"a", b" ", b" a", b"=="):
        assert text not in split(CONVERTED)
    # Gemma-like vocabularies have "=" as a piece and as a byte: the byte's entry is the one that is shared.
    at = [(entry, CONVERTED.names[n]) for n, entry in enumerate(CONVERTED.strings) if entry in (b"=", b".", b"\n")]  # type: ignore[index]
    assert at == [
        (b"\n", "\n"), (b"\n", "<0x0A>"), (b".", "."), (b".", "<0x2E>"), (b"=", "<0x3D>"), (b"=", "="),
    ]  # fmt: skip
    first, second = CONVERTED.tables
    for sign in (b"=", b".", b"\n"):
        [own] = [n for n in first.entries if n and n[0] == sign]
        read = second.entries[second.encode(sign)[0]]
        assert own[1] == f"<0x{sign[0]:02X}>"
        assert read == (sign, sign.decode())


def test_names_as_in_the_files_split_every_sign_that_is_no_ascii_letter() -> None:
    assert {b" a", b" ", b"\n", b"\xc3\xa9"} <= split(FILES)
    assert not {b"a", b"=", b".", b"=="} & split(FILES)


def test_one_model_is_split_from_nothing() -> None:
    for names in (file_names, converted_names):
        alone = ByteStrings.of(written()[:1], names=names)
        assert alone.strings == ByteStrings.of(written()[:1]).strings


@given(seeds, st.sampled_from([CONVERTED, FILES]))
def test_without_a_cut_names_lose_nothing(seed: int, shared: ByteStrings) -> None:
    def mixture(alphabet: ByteStrings) -> torch.Tensor:
        parts = [
            Aligned(model, alphabet, token_bytes=t) for model, t in zip(written(seed), alphabet.tables, strict=True)
        ]
        return Ensemble(parts, MIXING).log_probs([alphabet.encode("a=")])[0]

    assert tv_distance(to_bytes(shared, mixture(shared)[None])[0], mixture(PLAIN)) < 1e-12


def test_with_a_union_names_are_another_law() -> None:
    # Both models write "=", "a" and "." with .5, .3 and .2. By bytes the first two are kept.
    rows = []
    for backend, _ in KINDS:
        row = np.zeros(backend.get_vocab_size())
        row[[backend.token_to_id(sign) for sign in "=a."]] = 0.5, 0.3, 0.2
        rows.append(row[None])
    toys = [Written(backend, eos, row) for (backend, eos), row in zip(KINDS, rows, strict=True)]

    def share_of_equals(shared: ByteStrings, **options: Any) -> float:
        parts = [Aligned(toy, shared, token_bytes=table) for toy, table in zip(toys, shared.tables, strict=True)]
        union = UnionTopK(parts, MIXING, 2, renormalise="component", **options)
        return float(to_bytes(shared, union.log_probs([()]))[0, PLAIN.encode("=")[0]].exp())

    assert share_of_equals(PLAIN) == share_of_equals(PLAIN, score="first_subtoken") == pytest.approx(5 / 8)
    # By names "=" has two entries. The first model has no id for the second's, and scores it by its own "=" again.
    assert share_of_equals(CONVERTED) == pytest.approx(5 / 8)
    assert share_of_equals(CONVERTED, score="first_subtoken") == pytest.approx(0.6 * 10 / 13 + 0.4 * 5 / 8)


@given(seeds, st.integers(1, 3))
def test_a_cut_by_names_keeps_less_mass(seed: int, k: int) -> None:
    """k entries write at most k texts, and at most the mass of the k most probable ones."""
    for number, toy in enumerate(written(seed)):
        kept = []
        for shared in (FILES, PLAIN):
            part = Aligned(toy, shared, token_bytes=shared.tables[number])
            kept.append(float(UnionTopK([part], ConstantMixing([1.0]), k).score_sums([part.log_probs([()])])))
        assert kept[0] <= kept[1] + 1e-12


def test_a_union_by_names_is_a_law_over_bytes_like_any_other() -> None:
    toys = written(3)
    parts = [Aligned(toy, FILES, token_bytes=table) for toy, table in zip(toys, FILES.tables, strict=True)]
    union = UnionTopK(parts, MIXING, 2, renormalise="component", score="first_subtoken")
    as_bytes = Aligned(union, PLAIN, token_bytes=FILES.table())
    check_language_model(as_bytes)
    check_session(as_bytes, [PLAIN.encode("a= é")], seed=1)
    direct = to_bytes(FILES, union.log_probs([FILES.encode("a=")]))
    assert torch.allclose(as_bytes.log_probs([PLAIN.encode("a=")]), direct)


def test_ce_and_me_are_equal_over_names_too() -> None:
    toys = written(4)
    parts = [
        Aligned(Warped(toy, TopK(2)), FILES, token_bytes=table) for toy, table in zip(toys, FILES.tables, strict=True)
    ]
    ensemble = Ensemble(parts, MIXING)
    law = exact.sequence_law(ensemble, [0], max_new_tokens=2)
    for sampler in (CESampler(ensemble), MESampler(ensemble)):
        assert exact.sampler_law(sampler, [0], max_new_tokens=2).tv_distance(law) < 1e-12
