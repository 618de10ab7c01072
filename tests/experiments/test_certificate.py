"""The white-box certificate is small on right code, and grows past its margin with each bug planted inside a step."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from me_stats.draws import RowStreams
from me_stats.models.base import open_session
from tests import tiny

certificate = tiny.experiment("certificate")


def test_the_terms_add_up_and_cover_what_is_known() -> None:
    results = tiny.record("certificate").results
    worst = results["certificate"]["worst"]
    assert sum(worst.values()) == pytest.approx(results["certificate"]["quantiles"][-1])
    assert 0 < worst["cache_term"] < 1e-4
    assert 0 < results["draw_tv"] < 1e-6
    assert results["stale"] > 0.2
    shares = np.array(results["weights"]["counts"]) / sum(results["weights"]["counts"])
    distance = np.abs(shares - results["weights"]["lambda"]).sum() / 2
    assert distance < results["weights"]["tv_upper"] < 0.01


def _biased(self: RowStreams, rows: np.ndarray, step: int, *, stream: Any) -> np.ndarray:
    uniforms = uniforms_of(self, rows, step, stream=stream)
    return uniforms * 0.95 if stream == "component" else uniforms


uniforms_of = RowStreams.uniforms


def test_planted_wrong_weights_exceed_the_margin(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(RowStreams, "uniforms", _biased)
    record = certificate.run(tiny.config("certificate"))
    assert not record.held
    assert record.results["weights"]["tv_upper"] > 0.02


def test_planted_noise_in_the_cache_exceeds_the_margin(monkeypatch: pytest.MonkeyPatch) -> None:
    class Noisy:
        def __init__(self, session: Any) -> None:
            self.session, self.append = session, session.append

        def log_probs(self, rows: np.ndarray) -> Tensor:
            laws = self.session.log_probs(rows)
            return (laws + 0.2 * torch.linspace(-1, 1, laws.shape[-1])).log_softmax(-1)

    monkeypatch.setattr(certificate, "open_session", lambda *given, **more: Noisy(open_session(*given, **more)))
    record = certificate.run(tiny.config("certificate"))
    assert not record.held
    assert max(record.results["cache_tv"]) > 0.02


def test_progress_goes_forward() -> None:
    seen: list[float] = []
    certificate.run(tiny.config("certificate", rows=1, steps=2), lambda fraction, note: seen.append(fraction))
    assert seen == sorted(seen)
    assert len(seen) >= 3
