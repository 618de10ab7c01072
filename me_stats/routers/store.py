"""Routers on disk: one safetensors file that says what it is, for which vocabulary, and how it was made."""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from me_stats.routers.base import Router
from me_stats.routers.ngram import NgramRouter
from me_stats.routers.recurrent import RecurrentRouter
from me_stats.vocabulary import Vocabulary

_KEY, _SCHEMA = "me_stats", "1"


def save_router(
    router: Router, path: str | Path, *, vocabulary: Vocabulary, training: Mapping[str, Any] | None = None
) -> None:
    """Write parameters (safetensors) and, in the file's header, JSON with what is needed to trust them.

    Parameters
    ----------
    vocabulary
        What the token ids mean; `load_router` refuses another.
    training
        Provenance that JSON can hold, such as ``RouterFit.options`` with the corpus and the NLLs.
    """
    if not isinstance(router, Router):
        raise TypeError(f"router must be a Router, got {router!r:.80}")
    state = {name: tensor.detach().cpu().contiguous() for name, tensor in router.state_dict().items()}
    about = {
        "schema": _SCHEMA,
        "class": type(router).__name__,
        "options": router.options(),
        "vocabulary": {"size": vocabulary.size, "eos": vocabulary.eos, "fingerprint": vocabulary.fingerprint},
        "network": _network(getattr(router, "model", None)),
        "training": dict(training or {}),
        "version": importlib.metadata.version("me-stats"),
        "sha256": _digest(state),
    }
    save_file(state, str(path), metadata={_KEY: json.dumps(about, sort_keys=True)})


def load_router(path: str | Path, vocabulary: Vocabulary, *, model: Any = None) -> Router:
    """The router of `save_router`, bit by bit.

    Parameters
    ----------
    vocabulary
        Of the ensemble that will use it.
    model
        The network that a `HiddenStateRouter` reads; None for the others.

    Raises
    ------
    ValueError
        If the file is no router or damaged, or was trained for another vocabulary or network.
    """
    about, state = _read(Path(path))
    try:
        saved = Vocabulary(**{**about["vocabulary"], "eos": tuple(about["vocabulary"]["eos"])})
        router = _build(about, model, path)
        router.to(state["bias"].dtype).load_state_dict(state)
    except (KeyError, TypeError, RuntimeError) as error:
        raise ValueError(f"{path} is damaged: what its header says does not fit its parameters ({error})") from error
    saved.require_equal(vocabulary, name=f"the router in {path}", other_name="vocabulary")
    return router


def router_metadata(path: str | Path) -> dict[str, Any]:
    """What the header says: class, options, vocabulary, network, training, package version, digest."""
    return _read(Path(path))[0]


def _read(path: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    try:
        with safe_open(str(path), framework="pt") as file:
            header = file.metadata() or {}
            state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
    except FileNotFoundError:
        raise ValueError(f"there is no router file at {path}") from None
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path} is damaged or no safetensors file: {error}") from error
    try:
        about = json.loads(header[_KEY])
        known = about["schema"] == _SCHEMA
        digest, _ = about["sha256"], (about["class"], about["options"], about["vocabulary"], about["network"])
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path} does not describe a router; write it with save_router") from error
    if not known:
        raise ValueError(f"{path} has schema {about['schema']}, this version reads {_SCHEMA}")
    if _digest(state) != digest:
        raise ValueError(f"{path} is damaged: its parameters do not have the digest in its header")
    return about, state


def _build(about: dict[str, Any], model: Any, path: str | Path) -> Router:
    kind, options = about["class"], about["options"]
    if kind == "NgramRouter":
        return NgramRouter(**options)
    if kind == "RecurrentRouter":
        return RecurrentRouter(**options)
    if kind != "HiddenStateRouter":
        raise ValueError(f"{path} holds a {kind}, which this version does not know")
    if model is None:
        raise ValueError(f"the router in {path} reads {about['network']['name']}; give that network as model=")
    if _network(model) != about["network"]:
        raise ValueError(f"the router in {path} was trained on {about['network']}, got {_network(model)}")
    from me_stats.routers.hidden import HiddenStateRouter  # loads transformers, which takes seconds

    return HiddenStateRouter(model, **options)


def _network(model: Any) -> dict[str, Any] | None:
    return None if model is None else {"name": model.name, **model.source}


def _digest(state: Mapping[str, Tensor]) -> str:
    total = hashlib.sha256()
    for name in sorted(state):
        tensor = state[name]
        total.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        total.update(tensor.reshape(-1).view(torch.uint8).numpy().tobytes())
    return total.hexdigest()
