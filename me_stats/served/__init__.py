"""Models behind inference servers: laws and tokens over HTTP, and ME that asks for a run of tokens at a time."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from me_stats.served.client import HttpClient
    from me_stats.served.dialects import Dialect
    from me_stats.served.identity import ServerChanged
    from me_stats.served.kept import sample_kept
    from me_stats.served.laws import PartialLaws, mix_partial, tv_interval
    from me_stats.served.llamacpp import LlamaCppServer, open_gguf, serve
    from me_stats.served.model import DIALECTS, ServedModel
    from me_stats.served.sampler import ServedME, expected_requests

# The plugin of `me_stats.testing` imports the client alone, so names load at first use.
_HOME = {
    "DIALECTS": "model",
    "Dialect": "dialects",
    "HttpClient": "client",
    "LlamaCppServer": "llamacpp",
    "PartialLaws": "laws",
    "ServedME": "sampler",
    "ServedModel": "model",
    "ServerChanged": "identity",
    "expected_requests": "sampler",
    "mix_partial": "laws",
    "open_gguf": "llamacpp",
    "sample_kept": "kept",
    "serve": "llamacpp",
    "tv_interval": "laws",
}

__all__ = [
    "DIALECTS",
    "Dialect",
    "HttpClient",
    "LlamaCppServer",
    "PartialLaws",
    "ServedME",
    "ServedModel",
    "ServerChanged",
    "expected_requests",
    "mix_partial",
    "open_gguf",
    "sample_kept",
    "serve",
    "tv_interval",
]


def __getattr__(name: str) -> object:
    if name in _HOME:
        return getattr(importlib.import_module(f"me_stats.served.{_HOME[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
