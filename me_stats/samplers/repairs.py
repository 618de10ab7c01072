"""Ancestral sampling from a mixture that may only write the tokens of a fixed set."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from me_stats.draws import Draw
from me_stats.models.base import Session
from me_stats.models.ensemble import EnsembleSession
from me_stats.models.joint import Restricted
from me_stats.samplers.base import Batch, StepSampler


class FixedMaskSampler(StepSampler):
    r"""Draws from the mixture conditioned on a fixed token set A by redrawing component and token *together*.

    A pair m ~ λ, x ~ P_m that is accepted where x ∈ A has the law :math:`λ_m P_m(x) 1_A(x) / \sum_j λ_j P_j(A)`, so x
    has the law of `Restricted`. Redrawing the token alone keeps m ~ λ and gives :math:`\sum_i λ_i P_i(x|A)`, the law of
    a mask inside each component.

    Parameters
    ----------
    target
        A `Restricted` model.
    attempts
        Pairs that are tried. A row that has none accepted draws :math:`m \sim λ'_m \propto λ_m P_m(A)` and
        :math:`x \sim P_m(\cdot|A)`, which is exact and needs all K laws: P_m(A) is known to component m alone. Any
        number of attempts draws from the same law. 0 always takes the second way. A token is missing after r attempts
        with probability :math:`(1 - \sum_i λ_i P_i(A))^r`; a component runs once a token however often it is drawn.

    Raises
    ------
    TypeError
        If `target` is not a `Restricted`.
    ValueError
        For a negative number of attempts, or, when sampling, a mixture that gives A no mass.

    Notes
    -----
    The first pair is drawn from ME's random numbers: where it is accepted, the token is ME's of the same seed.
    `Trace.components` is the component that wrote each token; given that A was hit, it is m with weights λ'.

    Examples
    --------
    >>> from me_stats.exact import sampler_law, sequence_law
    >>> from me_stats.mixing import ConstantMixing
    >>> from me_stats.models.toy import MarkovModel
    >>> target = Restricted([MarkovModel.random(3, seed=s) for s in (0, 1)], ConstantMixing([0.3, 0.7]), [0, 2])
    >>> law = sampler_law(FixedMaskSampler(target, attempts=1), [0], max_new_tokens=2)
    >>> law.tv_distance(sequence_law(target, [0], max_new_tokens=2)) < 1e-12
    True
    """

    def __init__(self, target: Restricted, *, attempts: int = 8) -> None:
        if not isinstance(target, Restricted):
            raise TypeError(
                f"target must be a Restricted(components, mixing, allowed) model, got {type(target).__name__}: "
                "a set that changes with the laws is no fixed mask; SpeculativeSampler takes any target"
            )
        if not isinstance(attempts, (int, np.integer)) or attempts < 0:
            raise ValueError(f"attempts must be an integer of at least 0, got {attempts!r}")
        super().__init__(target)
        self.attempts = int(attempts)

    def _step(
        self, batch: Batch, positions: np.ndarray, step: int, draw: Draw, memory: dict[str, Any]
    ) -> tuple[Tensor, np.ndarray | None]:
        session = batch.session
        assert isinstance(session, EnsembleSession)
        laws = _StepLaws(batch, session.components, positions, step)
        log_weights = session.mixing.log_weights(positions)
        tokens = np.zeros(len(positions), dtype=np.int64)
        components = np.zeros(len(positions), dtype=np.int64)
        waiting = np.arange(len(positions))
        for attempt in range(self.attempts):
            pair = _Pair(draw, batch.rows[positions], step, attempt, self.attempts)
            drawn, chosen = self._attempt(pair, laws, log_weights, waiting)
            tokens[waiting], components[waiting] = drawn, chosen
            waiting = waiting[~self.model.mask[torch.from_numpy(drawn)].numpy()]
            if not len(waiting):
                return torch.from_numpy(tokens), components
        pair = _Pair(draw, batch.rows[positions], step, self.attempts, self.attempts)
        tokens[waiting], components[waiting] = self._tilted(pair, laws, log_weights, waiting)
        return torch.from_numpy(tokens), components

    def _attempt(
        self, pair: _Pair, laws: _StepLaws, log_weights: Tensor, waiting: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        """A component and a token of it for each of the `waiting` places."""
        chosen = pair.component(log_weights[torch.from_numpy(waiting)], waiting)
        tokens = np.zeros(len(waiting), dtype=np.int64)
        for i in np.unique(chosen).tolist():
            mine = np.flatnonzero(chosen == i)
            law, index = laws.of(i, waiting[mine])
            tokens[mine] = pair.token(law, waiting[mine], index)
        return tokens, chosen

    def _tilted(
        self, pair: _Pair, laws: _StepLaws, log_weights: Tensor, waiting: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        inside, masses = [], []
        for i in range(len(self.model.components)):
            law, index = laws.of(i, waiting)
            law = law.masked_fill(~self.model.mask.to(law.device), -torch.inf)
            law = law if index is None else law[index]
            inside.append(law)
            masses.append(law.logsumexp(-1).to("cpu", torch.float64))
        joint = log_weights[torch.from_numpy(waiting)] + torch.stack(masses, -1)
        if bool((joint == -torch.inf).all(-1).any()):
            raise ValueError("the mixture gives no mass to the allowed tokens, so it cannot be conditioned on them")
        chosen = pair.component(joint.log_softmax(-1), waiting)
        tokens = np.zeros(len(waiting), dtype=np.int64)
        for i in np.unique(chosen).tolist():
            mine = np.flatnonzero(chosen == i)
            law = inside[i][torch.from_numpy(mine).to(inside[i].device)]
            tokens[mine] = pair.token(law.log_softmax(-1), waiting[mine], None)
        return tokens, chosen

    def __repr__(self) -> str:
        return f"FixedMaskSampler({self.model!r}, attempts={self.attempts})"


class _Pair:
    """The random numbers of one attempt: ME's own for the first, and fresh ones of stream "repair" for the others."""

    def __init__(self, draw: Draw, rows: np.ndarray, step: int, attempt: int, attempts: int) -> None:
        self._draw, self._rows, self._step, self._first = draw, rows, step, attempt == 0
        # Two addresses an attempt, so that no uniform is used twice.
        self._address = 2 * (step * (attempts + 1) + attempt)

    def component(self, log_weights: Tensor, places: np.ndarray) -> np.ndarray:
        rows = self._rows[places]
        if self._first:
            return self._draw(log_weights, rows, self._step, stream="component").cpu().numpy()
        return self._draw(log_weights, rows, self._address, stream="repair").cpu().numpy()

    def token(self, law: Tensor, places: np.ndarray, index: Tensor | None) -> np.ndarray:
        rows = self._rows[places]
        if self._first:
            return self._draw(law, rows, self._step, stream="token", index=index).cpu().numpy()
        return self._draw(law, rows, self._address + 1, stream="repair", index=index).cpu().numpy()


class _StepLaws:
    """The component laws of one step, each read once for a row however often it is asked for."""

    def __init__(self, batch: Batch, components: tuple[Session, ...], positions: np.ndarray, step: int) -> None:
        self._batch, self._components = batch, components
        self._positions, self._step = positions, step
        self._laws: dict[int, Tensor] = {}
        self._known: dict[int, np.ndarray] = {}
        self._shared: dict[int, tuple[Tensor, Tensor | None]] = {}

    def of(self, i: int, places: np.ndarray) -> tuple[Tensor, Tensor | None]:
        """Laws of component i for `places` among the positions, and which law each uses (None: one each)."""
        wanted = torch.from_numpy(places)
        if self._step == 0:
            # All rows of a prompt share their first law, so it is read for all of them.
            if i not in self._shared:
                self._shared[i] = self._batch.read(self._components[i], self._positions, 0)
            laws, index = self._shared[i]
            wanted = wanted.to(laws.device)
            return (laws[wanted], None) if index is None else (laws, index[wanted])
        known = self._known.setdefault(i, np.zeros(len(self._positions), dtype=bool))
        missing = places[~known[places]]
        if len(missing):
            fresh = self._components[i].log_probs(self._positions[missing])
            if i not in self._laws:
                self._laws[i] = fresh.new_empty((len(self._positions), fresh.shape[1]))
            self._laws[i][torch.from_numpy(missing).to(fresh.device)] = fresh
            known[missing] = True
        return self._laws[i][wanted.to(self._laws[i].device)], None
