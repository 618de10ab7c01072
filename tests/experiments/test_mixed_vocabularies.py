"""The experiment on mixed vocabularies: its numbers on the bundled siblings, and bugs that flip its checks."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from me_stats import scripts
from me_stats.mixing import ConstantMixing
from me_stats.models import Ensemble
from me_stats.models.aligned import AlignedSession
from me_stats.presets import SIBLINGS
from me_stats.record import Record
from me_stats.samplers import MESampler
from me_stats.vocabulary_map import ByteStrings, TokenBytes

experiment: Any = scripts.load("experiments", "mixed_vocabularies")
TESTED = experiment.Config(rows=1, steps=16, tested=8, tested_steps=16)
CONFIG = experiment.Config(rows=1, steps=16, tested=0)

pytestmark = pytest.mark.usefixtures("one_thread")


def failed(record: Record) -> list[str]:
    return [name for name, held in record.checks.items() if not held]


@pytest.fixture(scope="module")
def record() -> Record:
    found: Record = experiment.run(TESTED)
    return found


def test_all_checks_hold_and_the_numbers_are_of_this_run(record: Record) -> None:
    assert failed(record) == []
    results = record.results
    assert results["names"] == ["prose", "words"]
    assert results["rows"] == len(experiment.PROMPTS)
    assert sum(row["share_written"] for row in results["components"]) == pytest.approx(1)
    assert results["components"][0]["split_anew"]["steps"] == 0  # bytes are never split anew
    assert results["components"][1]["split_anew"]["steps"] > 0
    assert results["mixture_floor"]["max"] <= max(row["floor"]["max"] for row in results["components"])
    text = "".join(piece for piece, _ in results["text"]["sample"]["pieces"])
    assert results["text"]["samples"][0]["text"].startswith(text[:4])
    assert [(finding.claim, finding.held) for finding in record.findings] == [("C8", True)] * 3
    assert results["tests"]["ME"]["sequences"] == 8 * len(experiment.PROMPTS)


def test_a_session_that_never_takes_tokens_back_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    def stubborn(self: Any, rows: np.ndarray) -> None:
        for row in rows.tolist():
            table, known = self._aligned.token_bytes, len(self._aligned.token_bytes.bytes_of(self._read[row]))
            fresh = tuple(table.tokenize((table.prefix + self._history[row])[known:]))
            for token in fresh:
                self._rows.append(np.array([row]), torch.tensor([token]))
            self._read[row] += fresh
        self._stale[rows] = False

    monkeypatch.setattr(AlignedSession, "_catch_up", stubborn)
    assert any("words: sessions give the law of a fresh reading" in name for name in failed(experiment.run(CONFIG)))


def test_a_sampler_with_another_weight_is_rejected(monkeypatch: pytest.MonkeyPatch) -> None:
    def other(ensemble: Ensemble) -> MESampler:
        return MESampler(Ensemble(ensemble.components, ConstantMixing([0.1, 0.9])))

    monkeypatch.setattr(experiment, "MESampler", other)
    monkeypatch.setattr(experiment, "_LEAST_PAIRS", 1)
    names = failed(experiment.run(TESTED))
    assert any("ME over byte strings: every test" in name for name in names)
    assert any("ME against CE over byte strings" in name for name in names)
    assert not any("CE over byte strings: every test" in name and "ME" not in name for name in names)


def test_a_lossy_decoder_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    decode = ByteStrings.decode
    monkeypatch.setattr(ByteStrings, "decode", lambda self, ids: decode(self, ids).strip())
    assert any("return byte for byte" in name for name in failed(experiment.run(CONFIG)))


def test_a_lossy_reading_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    encode = TokenBytes.encode
    monkeypatch.setattr(TokenBytes, "encode", lambda self, data: encode(self, data.replace(b"\t", b" ")))
    with pytest.raises(ValueError, match="does not give back its text"):
        experiment.run(CONFIG)


def test_a_narrow_beam_costs_less_and_says_what_it_left_out(record: Record) -> None:
    [found] = record.results["next_byte"]  # prose writes bytes, which have one spelling
    assert found["model"] == "words"
    wide, *_, narrow = found["beams"]
    assert (wide["tv_to_widest"], narrow["beam"]) == (0, 1)
    assert wide["laws_per_byte"] > narrow["laws_per_byte"]
    assert narrow["pruned"] > wide["pruned"]
    assert found["tokens"] < found["bytes"]


def test_models_of_one_vocabulary_are_mixed_over_byte_strings_too() -> None:
    found = experiment.run(experiment.Config(models=SIBLINGS, rows=1, steps=4, tested=0))
    assert failed(found) == []
    assert not any("split anew" in name for name in found.checks)
    with pytest.raises(ValueError, match="name at least two"):
        experiment.run(experiment.Config(models=SIBLINGS[:1], rows=1, steps=2))
