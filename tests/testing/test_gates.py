"""The gate: every planted bug is rejected by a default check at level 1e-6, and the right sampler passes the same call.

Seeds are fixed, so that the outcome is too.
"""

from __future__ import annotations

import pytest

from me_stats.models import LanguageModel
from me_stats.samplers import Sampler
from me_stats.testing import MUTANTS, CheckResult, check_sampler, check_session
from me_stats.testing.mutants import PROMPTS

LEVEL = 1e-6
ROWS = 600  # of each prompt
MORE_ROWS = {"only the token redrawn": 2000, "temperature 1.05": 2000}
# Its rows are too close to the claim to be told apart at 2,000 of each prompt; the session shows it at once.
BY_SESSION = ("stale cache at 5% of switches",)
TWIN: dict[str, bool] = {}


def check(sampler: Sampler, null: LanguageModel, rows: int) -> CheckResult:
    return check_sampler(sampler, null, PROMPTS, max_new_tokens=32, n=rows, level=LEVEL, seed=1, on_fail="return")


@pytest.mark.parametrize("name", MUTANTS)
def test_a_planted_bug_is_rejected(name: str) -> None:
    mutant = MUTANTS[name]
    ensemble = mutant.ensemble()
    found = []
    if mutant.model is not None:
        found.append(not check_session(mutant.model(ensemble), PROMPTS, on_fail="return").passed)
        assert found[-1], "check_session passes a session with a bug"
    if name not in BY_SESSION:
        result = check(mutant.sampler(ensemble), mutant.null(ensemble), MORE_ROWS.get(name, ROWS))
        found.append(not result.passed)
        assert found[-1], str(result)
    assert found


@pytest.mark.parametrize("name", MUTANTS)
def test_the_right_sampler_passes_the_same_call(name: str) -> None:
    mutant = MUTANTS[name]
    ensemble = mutant.ensemble()
    null = mutant.null(ensemble)
    rows = MORE_ROWS.get(name, ROWS)
    # Most mutants share a playground and a claim: the same call would give the same answer.
    key = f"{mutant.ensemble.__name__}, {rows}" + ("" if null is ensemble else f", {name}")
    if key not in TWIN:
        TWIN[key] = check(mutant.right_sampler(ensemble), null, rows).passed
        assert check_session(null, PROMPTS, on_fail="return").passed
    assert TWIN[key]
