"""A router that reads the final hidden state of one network, which then runs at every step."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor

from me_stats.models.base import Cost, Prefix
from me_stats.models.huggingface import TransformersModel
from me_stats.models.ragged import RaggedSession
from me_stats.routers.base import Router, at_least, length_batches

_FORWARD_TOKENS = 1 << 12  # positions, padding included, of one forward over whole documents


class HiddenStateRouter(Router):
    r"""Linear or one hidden layer on a frozen network's last state, :math:`s(c) = f(\mathrm{norm}(h(c)))`.

    ME stays exact, since the state is a function of the prefix, but the network runs at every step whichever component
    writes: its forwards and tokens are in the cost of the ensemble's session, on top of what the same network costs as
    a component. Before the first token the state counts as zero.

    Parameters
    ----------
    model
        The network to read, with ``session="ragged"``; it is shared, never copied or trained.
    width
        Of the hidden layer (tanh); None for a linear map.
    seed
        Of that layer's random initial weights.

    Raises
    ------
    ValueError
        If the network keeps no keys and values per row, or its last hidden state is not what its output layer reads.

    Notes
    -----
    `train_router` keeps hidden_size floats a token. Sequences past the network's context window are refused.
    """

    def __init__(self, model: TransformersModel, n_components: int, *, width: int | None = None, seed: int = 0) -> None:
        super().__init__(n_components)
        if not isinstance(model, TransformersModel):
            raise TypeError(f"model must be a TransformersModel, whose hidden states can be read, got {model!r:.80}")
        self.model, self.seed = model, seed
        self.width = None if width is None else at_least(1, width=width)
        self.hidden_size = int(_output_layer(model).weight.shape[1])
        _probe(model)
        inputs = self.hidden_size if width is None else width
        if width is not None:
            generator = torch.Generator().manual_seed(seed)
            first = torch.randn((width, self.hidden_size), generator=generator) / self.hidden_size**0.5
            self.first = torch.nn.Parameter(first)
        self.last = torch.nn.Parameter(torch.zeros(n_components, inputs))

    def features(self, sequences: Sequence[Prefix]) -> list[Tensor]:
        rows = [tuple(sequence) for sequence in sequences]
        self.model._check([row for row in rows if row])
        # Lists of prefixes repeat themselves, and a forward is dear.
        distinct = sorted(dict.fromkeys(rows), key=len)
        states: dict[tuple[int, ...], Tensor] = {}
        for batch in length_batches(list(map(len, distinct)), _FORWARD_TOKENS):
            part = [distinct[place] for place in batch]
            for row, found in zip(part, self._states(part), strict=True):
                states[row] = torch.nn.functional.pad(found[: len(row)], (0, 0, 1, 0))
        return [states[row] for row in rows]

    def _states(self, rows: Sequence[tuple[int, ...]]) -> Tensor:
        longest = max(map(len, rows))
        if longest == 0:
            return torch.zeros((len(rows), 0, self.hidden_size))
        ids = torch.tensor([[*row, *[0] * (longest - len(row))] for row in rows], device=self.model.device)
        with torch.no_grad():
            # Causal attention never looks right, so padding on the right needs no mask.
            states = self.model.network.base_model(input_ids=ids, use_cache=False).last_hidden_state
        return states.float().cpu()

    def scores(self, features: Tensor) -> Tensor:
        # A few coordinates of a transformer's state are far larger than the rest; the norm bounds them.
        states = torch.nn.functional.layer_norm(features.to(self.bias.dtype), (self.hidden_size,))
        if self.width is not None:
            states = torch.tanh(states @ self.first.T)
        return states @ self.last.T

    def stream(self, prompts: Sequence[Prefix]) -> _HiddenStream:
        return _HiddenStream(self, prompts)

    def options(self) -> dict[str, Any]:
        return {"n_components": self.n_components, "width": self.width, "seed": self.seed}

    def _shared(self) -> tuple[Any, ...]:
        return (self.model,)


class _HiddenStream:
    """Hidden states of rows, caught up when they are read."""

    def __init__(self, router: HiddenStateRouter, prompts: Sequence[Prefix]) -> None:
        model = router.model
        model._check(prompts)
        self._router = router
        self._session = _HiddenSession(model, prompts, router.hidden_size)
        self._stale = np.ones(len(prompts), dtype=bool)

    @property
    def cost(self) -> Cost:
        return self._session.cost

    def append(self, rows: np.ndarray, tokens: Tensor) -> None:
        self._session.append(rows, tokens)
        self._stale[rows] = True

    def scores(self, rows: np.ndarray) -> Tensor:
        missing = rows[self._stale[rows]]
        if len(missing):
            self._session.log_probs(missing)
            self._stale[missing] = False
        return self._router.scores(self._session.states[torch.from_numpy(rows)])


class _HiddenSession(RaggedSession):
    """The network's ragged session, which also keeps what its output layer read last in every row."""

    def __init__(self, model: TransformersModel, prompts: Sequence[Prefix], hidden_size: int) -> None:
        super().__init__(
            model.network,
            prompts,
            size=model.vocabulary.size,
            max_new_tokens=None,
            max_length=model.context_length,
        )
        self._output_layer = _output_layer(model)
        self.states = torch.zeros((len(prompts), hidden_size))

    def _run(self, rows: np.ndarray, starts: np.ndarray, stops: np.ndarray, reads: np.ndarray) -> tuple[Tensor, int]:
        with _reading(self._output_layer) as seen:
            laws, fed = super()._run(rows, starts, stops, reads)
        order = np.argsort(self._slot[rows], kind="stable")  # the packed order of the forward
        last = torch.from_numpy(np.cumsum(reads[order]) - 1)
        self.states[torch.from_numpy(rows[order])] = seen[0][0].float().cpu()[last]
        return laws, fed


def _output_layer(model: TransformersModel) -> Any:
    layer = model.network.get_output_embeddings()
    if layer is None or model._session_kind != "ragged":
        raise ValueError(f"{model.name} must have an output layer and session='ragged' to route on its hidden state")
    return layer


@contextmanager
def _reading(layer: torch.nn.Module) -> Iterator[list[Tensor]]:
    """Inputs of `layer` in every call inside the block."""
    seen: list[Tensor] = []

    def keep(_: torch.nn.Module, given: tuple[Tensor, ...]) -> None:
        seen.append(given[0])

    hook = layer.register_forward_pre_hook(keep)
    try:
        yield seen
    finally:
        hook.remove()


def _probe(model: TransformersModel) -> None:
    """Refuse a network whose base does not end in the state that its output layer reads: the session would differ."""
    ids = torch.tensor([[model.vocabulary.size // 3, model.vocabulary.size // 2]], device=model.device)
    with torch.no_grad(), _reading(_output_layer(model)) as seen:
        model.network(input_ids=ids, use_cache=False)
        states = model.network.base_model(input_ids=ids, use_cache=False).last_hidden_state
    if seen[0].shape != states.shape or not torch.allclose(seen[0].float(), states.float(), rtol=1e-2, atol=1e-3):
        raise ValueError(
            f"{model.name} changes its last hidden state before the output layer; choose another component"
        )
