"""The one place that imports the evaluation harness, an extra: nothing else of the package needs it."""

from __future__ import annotations

import importlib
from typing import Any


def load(name: str) -> Any:
    """The module `name` of lm_eval, or of what it brings along (datasets).

    ValueError that names the extra where it is not installed.
    """
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        raise ValueError(f"{name.split('.')[0]} needs the extra: pip install 'me-stats[lm-eval]' ({error})") from error


def harness_class() -> type:
    """What a model of the harness derives from; `object` where the harness is not installed."""
    try:
        found: type = load("lm_eval.api.model").LM
    except ValueError:
        return object
    return found
