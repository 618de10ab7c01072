"""The scripts of the repository, experiments and figures, as modules: in a clone and in an installed package."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType


def load(folder: str, name: str) -> ModuleType:
    """Module `name` of the repository's ``experiments`` or ``figures`` folder.

    The folders stand beside the package in a clone, and inside it in an installed wheel.
    """
    package = Path(__file__).resolve().parent
    for root in (package.parent, package / "_shipped"):
        path = root / folder / f"{name}.py"
        if path.is_file():
            qualified = f"me_stats_{folder}.{name}"
            if qualified in sys.modules:
                return sys.modules[qualified]
            spec = importlib.util.spec_from_file_location(qualified, path)
            assert spec is not None
            assert spec.loader is not None
            module = importlib.util.module_from_spec(spec)
            sys.modules[qualified] = module  # dataclasses look their module up while it loads
            try:
                spec.loader.exec_module(module)
            except BaseException:
                del sys.modules[qualified]  # half a module would pass for a whole one in the next call
                raise
            return module
    raise FileNotFoundError(f"{folder}/{name}.py is neither beside the package nor inside it; reinstall me_stats")
