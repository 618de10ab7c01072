"""Hypothesis without clocks: a slow machine is no failure, and CI replays the same examples every time.

``pytest --hypothesis-profile=thorough`` looks at 2000 examples of each property.
"""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
from hypothesis import HealthCheck, settings

from me_stats.samplers import tabular

settings.register_profile(
    "local",
    deadline=None,
    max_examples=60,
    print_blob=True,
    suppress_health_check=[HealthCheck.too_slow],
)
settings.register_profile("thorough", parent=settings.get_profile("local"), max_examples=2000)
settings.register_profile("ci", parent=settings.get_profile("local"), derandomize=True)
settings.load_profile("ci" if os.environ.get("CI") else "local")


@pytest.fixture(scope="module")
def tables_for_any_length() -> Iterator[None]:
    """Let the fast path of tables write short samples too, which it leaves to the general loop."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tabular, "MIN_TOKENS", 0)
        yield
