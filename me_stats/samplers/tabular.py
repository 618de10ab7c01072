"""Samplers on tables alone: the same random numbers, laws and tokens as the general loop, vectorised.

A chain of look-ups needs no network, no session and no per-step tensor of laws, so toys run at the speed
of their random numbers. The inverse CDF is found through a guide table (Chen and Asau 1974): a uniform's
leading bits give a cell to start from, and almost always that cell is the answer.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from me_stats.draws import _BLOCK, RowStreams
from me_stats.mixing import ConstantMixing
from me_stats.models.base import Cost
from me_stats.models.ensemble import Ensemble
from me_stats.models.toy import TableModel
from me_stats.models.warped import Warped

_MAX_ENTRIES = 1 << 23  # guide tables past 64 MB would leave every cache
_CHUNK = 8192  # rows whose state stays in the second-level cache


def tabulate(model: Any) -> TableModel | None:
    """`model` as one table of laws, if it is built from tables; None otherwise."""
    if isinstance(model, TableModel):
        return model
    if isinstance(model, Warped):
        inner = tabulate(model.model)
        if inner is None:
            return None
        warped = model.warp(inner.log_table)
        return TableModel.from_log_table(warped, order=inner.order, eos=inner.vocabulary.eos)
    if isinstance(model, Ensemble) and isinstance(model.mixing, ConstantMixing):
        parts = _common_order(model)
        if parts is None:
            return None
        weights = model.mixing.log_weights([()] * len(parts[0].log_table))
        from me_stats.models.ensemble import mix

        mixed = mix([part.log_table for part in parts], weights)
        return TableModel.from_log_table(mixed, order=parts[0].order, eos=model.vocabulary.eos)
    return None


def _common_order(ensemble: Ensemble) -> list[TableModel] | None:
    tables = [tabulate(component) for component in ensemble.components]
    known = [table for table in tables if table is not None]
    if len(known) < len(tables):
        return None
    order = max(table.order for table in known)
    return [table if table.order == order else table.at_order(order) for table in known]


@dataclass(frozen=True)
class Plan:
    """A sampler reduced to K tables, weights over them, and how often the component is drawn.

    `weights` is None where tokens come from one table. `redraw` False keeps the first component of a row.
    """

    tables: list[TableModel]
    weights: Tensor | None = None
    redraw: bool = True
    laws_per_token: int = 1

    @classmethod
    def marginal(cls, model: Any) -> Plan | None:
        """One law per token: the mixture itself."""
        table = tabulate(model)
        parts = len(model.components) if isinstance(model, Ensemble) else 1
        return None if table is None else cls([table], laws_per_token=parts)._if_small()

    @classmethod
    def ancestral(cls, ensemble: Ensemble, *, redraw: bool = True, laws_per_token: int = 1) -> Plan | None:
        """A component per token (or per row), then its law."""
        if not isinstance(ensemble.mixing, ConstantMixing):
            return None
        tables = _common_order(ensemble)
        if tables is None:
            return None
        return cls(tables, ensemble.mixing.weights, redraw, laws_per_token)._if_small()

    def _if_small(self) -> Plan | None:
        laws = len(self.tables) * len(self.tables[0].log_table)
        return self if laws * 8 * self.tables[0].vocabulary.size <= _MAX_ENTRIES else None

    def run(
        self,
        prompts: list[tuple[int, ...]],
        prompt_index: np.ndarray,
        rows: np.ndarray,
        max_new_tokens: int,
        seed: int,
    ) -> tuple[Tensor, Tensor | None, Cost]:
        """Tokens (N, T), components (N, T) or None, and the cost."""
        look_up = _GuideTable(torch.stack([table.log_table for table in self.tables]))
        component_cdf = None if self.weights is None else _Cdf(self.weights.log()[None])
        eos = np.array(self.tables[0].vocabulary.eos, dtype=np.int64)
        starts = self.tables[0].states_of(prompts)[prompt_index]
        order = np.argsort(rows, kind="stable")
        tokens = np.full((len(rows), max_new_tokens), -1, dtype=np.int64)
        components = np.full_like(tokens, -1) if self.weights is not None else None
        streams = RowStreams(seed)
        for begin in range(0, len(rows), _CHUNK):
            mine = order[begin : begin + _CHUNK]
            states, chosen = starts[mine], np.zeros(len(mine), dtype=np.int64)
            for block in range(-(-max_new_tokens // _BLOCK)):
                token_u = np.ascontiguousarray(streams.block(rows[mine], block, stream="token").T)
                if component_cdf is not None and (self.redraw or block == 0):
                    component_u = streams.block(rows[mine], block, stream="component").T
                    path = component_cdf.find(component_u)
                out = np.empty((_BLOCK, len(mine)), dtype=np.int64)
                paths = np.empty_like(out)
                steps = min(_BLOCK, max_new_tokens - block * _BLOCK)
                for offset in range(steps):
                    if component_cdf is not None and (self.redraw or block == offset == 0):
                        chosen = path[offset]
                    paths[offset] = chosen
                    out[offset] = look_up.find(chosen, states, token_u[offset])
                    states = self.tables[0].next_states(states, out[offset])
                span = slice(block * _BLOCK, block * _BLOCK + steps)
                tokens[mine, span] = out[:steps].T
                if components is not None:
                    components[mine, span] = paths[:steps].T
                if len(eos):
                    alive = ~np.isin(out[:steps], eos).any(0)
                    if not alive.all():
                        mine, states, chosen = mine[alive], states[alive], chosen[alive]
                        if not len(mine):
                            break
        drawn = int((tokens >= 0).sum())
        cost = Cost(self.laws_per_token * max_new_tokens, self.laws_per_token * drawn, self.laws_per_token * drawn)
        return torch.from_numpy(tokens), None if components is None else torch.from_numpy(components), cost


class _Cdf:
    """Inverse CDF of one short law, exactly as `draws.inverse_cdf` finds it."""

    def __init__(self, log_law: Tensor) -> None:
        self._cdf = log_law.exp().cumsum(-1, dtype=torch.float64)[0].numpy()
        self._below = np.nextafter(self._cdf[-1], 0)

    def find(self, uniforms: np.ndarray) -> np.ndarray:
        target = np.minimum(uniforms * self._cdf[-1], self._below)
        return np.searchsorted(self._cdf, target, side="right")


class _GuideTable:
    """Inverse CDFs of K·S laws with a guide of 4 to 8 cells per token."""

    def __init__(self, log_tables: Tensor) -> None:
        _, self._states, self._size = log_tables.shape
        cdf = log_tables.reshape(-1, self._size).exp().cumsum(-1, dtype=torch.float64)
        self._total = cdf[:, -1].numpy().copy()
        self._below = np.nextafter(self._total, 0)
        self._cells = 1 << (4 * self._size - 1).bit_length()
        # A hair below the cell's left edge, so that rounding can only start the search early.
        edges = torch.arange(self._cells, dtype=torch.float64) / self._cells * (1 - 2**-50)
        start = torch.searchsorted(cdf, edges * cdf[:, -1:], right=True)
        self._guide = start.numpy().astype(np.int32).reshape(-1)
        self._cdf = cdf.numpy().reshape(-1)

    def find(self, components: np.ndarray, states: np.ndarray, uniforms: np.ndarray) -> np.ndarray:
        law = components * self._states + states
        target = np.minimum(uniforms * self._total[law], self._below[law])
        cell = (uniforms * self._cells).astype(np.int64)
        place = law * self._size + self._guide[law * self._cells + cell]
        behind = np.flatnonzero(self._cdf[place] <= target)
        while len(behind):
            place[behind] += 1
            behind = behind[self._cdf[place[behind]] <= target[behind]]
        return place - law * self._size
