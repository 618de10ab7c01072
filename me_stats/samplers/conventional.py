"""CE, the conventional ensemble: marginal sampling from the mixture."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from me_stats.draws import Draw
from me_stats.models.ensemble import Ensemble, EnsembleSession
from me_stats.samplers import tabular
from me_stats.samplers.base import Batch, StepSampler


class CESampler(StepSampler):
    r"""Draws each token from the model's own law; for an Ensemble from :math:`\sum_i λ_i P_i`.

    Takes any LanguageModel. For an Ensemble every step runs all K components.

    Parameters
    ----------
    model
        Any LanguageModel.
    latent
        Draw the component and then its token, from the same random numbers as ME, while still running
        all K components: the latent form of the same law. With one seed it writes ME's tokens, which
        tests everything in ME but the draw itself. Needs an Ensemble.

    Source: arXiv 2605.00419, section 2.1.
    """

    def __init__(self, model: Any, *, latent: bool = False) -> None:
        super().__init__(model)
        if latent and not isinstance(model, Ensemble):
            raise TypeError(f"latent=True needs an Ensemble to draw components of, got {model!r}")
        self.latent = latent

    def _plan(self) -> tabular.Plan | None:
        if self.latent:
            return tabular.Plan.ancestral(self.model, read_all=True)
        return tabular.Plan.marginal(self.model)

    def _step(
        self, batch: Batch, positions: np.ndarray, step: int, draw: Draw, memory: dict[str, Any]
    ) -> tuple[Tensor, np.ndarray | None]:
        rows = batch.rows[positions]
        if not self.latent:
            laws, index = batch.read(batch.session, positions, step)
            return draw(laws, rows, step, stream="token", index=index), None
        session = batch.session
        assert isinstance(session, EnsembleSession)
        log_weights = session.mixing.log_weights(positions)
        chosen = draw(log_weights, rows, step, stream="component").cpu().numpy()
        tokens: Tensor | None = None
        for i, component in enumerate(session.components):
            laws, index = batch.read(component, positions, step)
            mine = np.flatnonzero(chosen == i)
            tokens = torch.empty(len(rows), dtype=torch.int64, device=laws.device) if tokens is None else tokens
            if len(mine):
                own = torch.from_numpy(mine).to(laws.device)
                law, own_index = (laws[own], None) if index is None else (laws, index[own])
                drawn = draw(law, rows[mine], step, stream="token", index=own_index)
                tokens[own.to(tokens.device)] = drawn.to(tokens.device)
        assert tokens is not None
        return tokens, chosen
