from __future__ import annotations

import pytest

from me_stats.models import _gguf


@pytest.fixture
def converters_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever is installed, a pull finds what a conversion needs."""
    monkeypatch.setattr(_gguf, "missing_packages", list)
