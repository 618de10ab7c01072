"""Named controls: routing that reads more than the prefix, so that every test can show what it catches.

None of them can be written as a `Mixing`, which sees token ids of the prefix and nothing else. Given the prefix,
the component that wrote its last token says something about the next token only through the choice of component;
a router that reads it samples a hidden-Markov mixture, whose law of a token is not that of the ensemble.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from typing import Any

import numpy as np
import torch
from torch import Tensor

from me_stats.draws import Draw
from me_stats.models.ensemble import Ensemble, EnsembleSession
from me_stats.samplers.base import Batch
from me_stats.samplers.mixture import MESampler


class _MemorySampler(MESampler):
    """ME whose weights also read the component that wrote the row's last token; the first token is ME's own."""

    @abstractmethod
    def _weights(self, log_weights: Tensor, last: Tensor) -> Tensor:
        """(B, K) log-weights from those of the prefix and the component (B,) that ran last."""

    def _components(
        self, log_weights: Tensor, rows: np.ndarray, positions: np.ndarray, step: int, draw: Draw,
        memory: dict[str, Any],
    ) -> np.ndarray:  # fmt: skip
        if step == 0:
            memory["last"] = np.zeros(int(positions.max()) + 1, dtype=np.int64)
        else:
            log_weights = self._weights(log_weights, torch.from_numpy(memory["last"][positions]))
        drawn = super()._components(log_weights, rows, positions, step, draw, memory)
        memory["last"][positions] = drawn
        return drawn


class LastComponentSampler(_MemorySampler):
    r"""A router that favours the component that ran last: :math:`w_i \propto w_i(c)\,\text{boost}^{[i = m_{t-1}]}`.

    Parameters
    ----------
    boost
        Positive; 1 is ME, more is momentum, less is alternation.
    """

    def __init__(self, ensemble: Ensemble, *, boost: float = 4.0) -> None:
        super().__init__(ensemble)
        if not (math.isfinite(boost) and boost > 0):
            raise ValueError(f"boost must be finite and positive, got {boost}")
        self.boost = boost

    def _weights(self, log_weights: Tensor, last: Tensor) -> Tensor:
        again = torch.nn.functional.one_hot(last, log_weights.shape[-1])
        return (log_weights + again * math.log(self.boost)).log_softmax(-1)


class StickySampler(_MemorySampler):
    r"""Keeps the last component with probability `keep`, and routes afresh otherwise.

    Under constant weights every single token still has the law of a mixture with these weights; what is wrong is
    the dependence between tokens.
    """

    def __init__(self, ensemble: Ensemble, *, keep: float = 0.5) -> None:
        super().__init__(ensemble)
        if not 0 <= keep <= 1:
            raise ValueError(f"keep must lie in 0..1, got {keep}")
        self.keep = keep

    def _weights(self, log_weights: Tensor, last: Tensor) -> Tensor:
        again = torch.nn.functional.one_hot(last, log_weights.shape[-1])
        return (self.keep * again + (1 - self.keep) * log_weights.exp()).log()


class PeekingSampler(MESampler):
    r"""A router that sees the token it is about to weigh: :math:`q(x) \propto \sum_i r_i(x) P_i(x)`.

    The weights are the responsibilities :math:`r_i(x) = w_i P_i(x) / \sum_j w_j P_j(x)`, right for saying afterwards
    who wrote x and wrong for writing it: tokens on which one component is sure are written too often.
    """

    def _step(
        self, batch: Batch, positions: np.ndarray, step: int, draw: Draw, memory: dict[str, Any]
    ) -> tuple[Tensor, np.ndarray | None]:
        session = batch.session
        assert isinstance(session, EnsembleSession)
        laws = torch.stack([component.log_probs(positions).cpu().double() for component in session.components], 1)
        joint = laws + session.mixing.log_weights(positions)[:, :, None]
        # A token that no component can write has no responsibilities, and no mass.
        peeked = (joint + laws).logsumexp(1) - joint.logsumexp(1)
        law = peeked.nan_to_num(nan=-math.inf).log_softmax(-1)
        return draw(law, batch.rows[positions], step, stream="token"), None
