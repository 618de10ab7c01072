"""The checks of models and sessions: right ones pass, and every way to break the contract is named."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from me_stats import ConstantMixing, Ensemble
from me_stats.models import MarkovModel, TableModel, Temperature, TopK, Warped
from me_stats.models.base import Cost, LanguageModel, PrefixSession
from me_stats.testing import ModelRejected, check_language_model, check_session
from tests import mixtures
from tests.strategies import OutsideModel

CHAIN = MarkovModel.random(5, seed=0, eos=(4,))
PAIR = Ensemble([CHAIN, MarkovModel.random(5, seed=1, eos=(4,))], ConstantMixing([0.5, 0.5]))

RIGHT: dict[str, Any] = {
    "table": TableModel.random(3, seed=0, order=2),
    "one token": TableModel([[1.0]], order=0, eos=(0,)),
    "chain": CHAIN,
    "warped": Warped(CHAIN, Temperature(0.7), TopK(2)),
    "ensemble": PAIR,
    "warp of an ensemble": Warped(PAIR, TopK(2)),
    "by someone else": OutsideModel(TableModel.random(4, seed=1, order=1)),
    "transformer": mixtures.component(),
    "ensemble of transformers": mixtures.ensemble(),
}


@pytest.mark.parametrize("name", RIGHT)
def test_right_models_pass(name: str) -> None:
    for result in (check_language_model(RIGHT[name]), check_session(RIGHT[name], schedules=3)):
        assert result.passed
        assert result.compared > 20
        assert result.largest_tv <= result.tolerance
        assert "conforms" in str(result)


class Broken(LanguageModel):
    """A chain with one thing wrong in how it answers."""

    def __init__(self, wrong: str) -> None:
        self.vocabulary, self.wrong, self.calls = CHAIN.vocabulary, wrong, 0
        self.buffer = torch.zeros(64, 5, dtype=torch.float64)

    def log_probs(self, prefixes: Sequence[Sequence[int]]) -> Tensor:
        self.calls += 1
        laws = CHAIN.log_probs(prefixes)
        uniform = torch.full_like(laws, 0.2).log()
        if self.wrong == "raw logits":
            return laws + 1
        if self.wrong == "NaN":
            return torch.where(torch.arange(5) == 2, torch.nan, laws)
        if self.wrong == "one law too many":
            return torch.cat([laws, laws[:1]])
        if self.wrong == "integers":
            return laws.long()
        if self.wrong == "depends on the batch":
            return laws if len(prefixes) < 3 else uniform
        if self.wrong == "depends on the order":
            return torch.cat([uniform[:1], laws[1:]]) if len(prefixes) > 1 else laws
        if self.wrong == "changes from call to call":
            return laws if self.calls % 2 else uniform
        if self.wrong == "depends on the type":
            return uniform if isinstance(prefixes[0], list) else laws
        assert self.wrong == "crashes"
        raise RuntimeError("index out of range in self")


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ("raw logits", "not normalised"),
        ("NaN", "returned NaN"),
        ("one law too many", "returned shape"),
        ("integers", "floating-point"),
        ("depends on the batch", "asked for together"),
        ("depends on the order", "order of the prefixes"),
        ("changes from call to call", "from call to call"),
        ("depends on the type", "or on their type"),
        ("crashes", "index out of range"),
    ],
)
def test_broken_models_are_named(wrong: str, message: str) -> None:
    with pytest.raises(ModelRejected, match=message) as caught:
        check_language_model(Broken(wrong))
    assert not caught.value.result.passed
    assert not check_language_model(Broken(wrong), on_fail="return").passed


def test_a_wrong_path_is_found() -> None:
    class Late(MarkovModel):
        def path_log_probs(self, prompts: Any, tokens: Any) -> Any:
            for laws in super().path_log_probs(prompts, tokens):
                yield laws.roll(1, 0)

    with pytest.raises(ModelRejected, match="path_log_probs differs"):
        check_language_model(Late.random(5, seed=0))


class FaultySession(PrefixSession):
    """A session with one thing wrong."""

    def __init__(self, model: Any, prompts: Any, wrong: str) -> None:
        super().__init__(model, prompts)
        self.wrong, self.pending = wrong, dict.fromkeys(range(len(prompts)), 0)

    def append(self, rows: np.ndarray, tokens: Tensor) -> None:
        for row, token in zip(rows.tolist(), tokens.tolist(), strict=True):
            self.pending[row] += 1
            if self.wrong == "skips when it lags" and self.pending[row] > 2:
                continue
            self._prefixes[row] = (*self._prefixes[row], token)

    def log_probs(self, rows: np.ndarray) -> Tensor:
        laws = super().log_probs(np.sort(rows) if self.wrong == "sorts its rows" else rows)
        for row in rows.tolist():
            self.pending[row] = 0
            if self.wrong == "reading appends":
                self._prefixes[row] = (*self._prefixes[row], int(laws[0].argmax()))
        return laws


@pytest.mark.parametrize("wrong", ["skips when it lags", "sorts its rows", "reading appends"])
@pytest.mark.parametrize("inside", [False, True], ids=["alone", "in an ensemble"])
def test_faulty_sessions_are_found(wrong: str, inside: bool) -> None:
    class Faulty(MarkovModel):
        def session(self, prompts: Any, *, max_new_tokens: int | None = None) -> Any:
            return FaultySession(self, prompts, wrong)

    model: Any = Faulty.random(5, seed=0)
    if inside:
        model = Ensemble([CHAIN_WITHOUT_END, model], ConstantMixing([0.5, 0.5]))
    with pytest.raises(ModelRejected, match="differs from log_probs"):
        check_session(model)


CHAIN_WITHOUT_END = MarkovModel.random(5, seed=3)


def test_a_session_that_breaks_is_a_fault_and_no_traceback() -> None:
    class Breaks(MarkovModel):
        def session(self, prompts: Any, *, max_new_tokens: int | None = None) -> Any:
            class Session:
                cost = Cost()

                def append(self, rows: Any, tokens: Any) -> None: ...

                def log_probs(self, rows: Any) -> Tensor:
                    return torch.zeros(1, 2)

            return Session()

    with pytest.raises(ModelRejected, match="returned shape"):
        check_session(Breaks.random(5, seed=0))


def test_options_are_checked() -> None:
    with pytest.raises(TypeError, match="LanguageModel"):
        check_language_model(3)
    with pytest.raises(ValueError, match="tolerance"):
        check_session(CHAIN, tolerance=1.5)
    with pytest.raises(ValueError, match="on_fail"):
        check_session(CHAIN, on_fail="maybe")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="at least 1"):
        check_session(CHAIN, steps=0)
    assert check_session(CHAIN, [0, 1], tolerance=0.0).tolerance == 0.0
