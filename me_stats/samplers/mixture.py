"""ME, the mixture-model-like ensemble: ancestral sampling, one component per token."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from me_stats.draws import Draw
from me_stats.models.ensemble import Ensemble, EnsembleSession
from me_stats.models.joint import JointTransform
from me_stats.models.warped import Warp, Warped
from me_stats.samplers import tabular
from me_stats.samplers.base import Batch, StepSampler


class MESampler(StepSampler):
    r"""Draws a component :math:`m \sim \mathrm{Cat}(w(prefix))`, runs it alone, and draws from its law.

    The token's law given the prefix is :math:`\sum_i w_i P_i`, the law that `CESampler` draws from, at one
    model run per token instead of K. Components that were not drawn catch up when they are.

    Parameters
    ----------
    ensemble
        An Ensemble: transforms must stand inside it, on single components (transform-then-mix).
    shared_rows
        B >= 1: rows whose global number // B agree share the component uniform of every step. Every row keeps its law
        and depends on its own number, the seed and its prompt alone; rows of a group depend on each other, so a mean
        over them is worth fewer rows (`dependence.design_effect`), and tests that count rows refuse them (see
        `me_stats.trace`). With constant weights a group runs one component a step: B rows that are one batch
        (``batch_size=B``) cost one forward a step, where B rows with draws of their own cost
        :math:`\sum_i 1 - (1-λ_i)^B`, a component's first read of a prompt aside.

    Raises
    ------
    TypeError
        For anything else. A transform of the mixture needs all K laws at every step.
    ValueError
        If `shared_rows` is not an integer of at least 1.

    Source: arXiv 2605.00419, section 2.2; `shared_rows` is ours.

    >>> from me_stats import ConstantMixing
    >>> from me_stats.models import MarkovModel
    >>> toy = Ensemble([MarkovModel.random(3, seed=s) for s in (0, 1)], ConstantMixing([0.5, 0.5]))
    >>> given = dict(n=32, max_new_tokens=100, batch_size=32)
    >>> [MESampler(toy, shared_rows=b).sample([0], **given).cost.forwards for b in (1, 32)]
    [200, 100]
    """

    def __init__(self, ensemble: Ensemble, *, shared_rows: int = 1) -> None:
        if not isinstance(ensemble, Ensemble):
            raise TypeError(_refusal(type(self).__name__, ensemble))
        if not isinstance(shared_rows, (int, np.integer)) or shared_rows < 1:
            raise ValueError(f"shared_rows must be an integer of at least 1, got {shared_rows!r}")
        super().__init__(ensemble)
        self.shared_rows = int(shared_rows)

    def __repr__(self) -> str:
        shown = super().__repr__()
        return shown if self.shared_rows == 1 else f"{shown[:-1]}, shared_rows={self.shared_rows})"

    def _plan(self) -> tabular.Plan | None:
        return tabular.Plan.ancestral(self.model, shared_rows=self.shared_rows)

    def _components(
        self, log_weights: Tensor, rows: np.ndarray, positions: np.ndarray, step: int, draw: Draw,
        memory: dict[str, Any],
    ) -> np.ndarray:  # fmt: skip
        """The component (B,) that writes each row's next token."""
        return draw(log_weights, rows // self.shared_rows, step, stream="component").cpu().numpy()

    def _step(
        self, batch: Batch, positions: np.ndarray, step: int, draw: Draw, memory: dict[str, Any]
    ) -> tuple[Tensor, np.ndarray | None]:
        session = batch.session
        assert isinstance(session, EnsembleSession)
        rows = batch.rows[positions]
        # Weights live on the host, so the path is known before any forward and no token is waited for.
        chosen = self._components(session.mixing.log_weights(positions), rows, positions, step, draw, memory)
        parts, places = [], []
        for i, component in enumerate(session.components):
            mine = np.flatnonzero(chosen == i)
            if len(mine):
                laws, index = batch.read(component, positions[mine], step)
                parts.append(draw(laws, rows[mine], step, stream="token", index=index))
                places.append(mine)
        if len(parts) == 1:
            return parts[0], chosen
        back = torch.from_numpy(np.argsort(np.concatenate(places), kind="stable")).to(parts[0].device)
        return torch.cat([part.to(parts[0].device) for part in parts])[back], chosen


def _refusal(sampler: str, model: object) -> str:
    inner: Any = model
    order: tuple[Warp, ...] = ()
    while isinstance(inner, Warped):
        inner, order = inner.model, (*inner.warps, *order)
    warps = ", ".join(map(repr, order))
    if isinstance(inner, JointTransform):
        return (
            f"{sampler} cannot sample {type(inner).__name__}{f' under {warps}' if order else ''}: this is a joint "
            "transform of all K laws at every step, so one component cannot know its part. Exact choices: "
            "transforms of single components, such as Ensemble([Warped(m, TopK(k)) for m in models], mixing), another "
            "law; SpeculativeSampler with an ME draft, or CESampler of this model"
        )
    if isinstance(model, Warped) and isinstance(inner, Ensemble):
        return (
            f"{sampler} cannot sample Warped(Ensemble, {warps}): this is mix-then-transform, g(Σ λ_i P_i), and "
            "g needs all K laws at every step (drawing one component gives Σ λ_i g(P_i), another law unless g "
            "is affine). Exact choices: transform-then-mix, "
            f"Ensemble([Warped(m, {warps}) for m in models], mixing), or CESampler of this model, or "
            "SpeculativeSampler with an ME draft"
        )
    return (
        f"{sampler} needs an Ensemble, which says what the components are; got {type(model).__name__}. "
        "CESampler takes any LanguageModel"
    )
