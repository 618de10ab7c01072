"""Samplers on tables alone: the same random numbers, laws and tokens as the general loop, vectorised.

A chain of look-ups needs no network, no session and no per-step tensor of laws, so toys run at the speed
of their random numbers. The inverse CDF is found through a guide table (Chen and Asau 1974): a uniform's
leading bits give a cell, and almost every cell lies inside one token's interval.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from me_stats.draws import BLOCK, UNIFORM_BITS, RowStreams
from me_stats.mixing import ConstantMixing
from me_stats.models.base import Cost
from me_stats.models.ensemble import Ensemble, mix
from me_stats.models.toy import MarkovModel, TableModel
from me_stats.models.warped import Warped

_MAX_ENTRIES = 1 << 20  # probabilities in all tables together; the guide of larger ones would leave every cache
MIN_TOKENS = 256  # fewer than these are written sooner by the general loop than a guide is built
_MAX_CELLS = 1 << 20  # of a guide; a larger one costs more to reach than the search that it saves
_CHUNK = 4096  # rows whose state stays in the second-level cache


def tabulate(model: Any) -> TableModel | None:
    """`model` as one table of laws, if it is built from tables; None otherwise.

    Exact types only: a subclass may have changed what the law is.
    """
    if type(model) in (TableModel, MarkovModel):
        return model
    if type(model) is Warped:
        inner = tabulate(model.model)
        if inner is None:
            return None
        warped = model.warp(inner.log_table)
        return TableModel.from_log_table(warped, order=inner.order, eos=inner.vocabulary.eos)
    if type(model) is Ensemble and type(model.mixing) is ConstantMixing:
        parts = _common_order(model)
        if parts is None:
            return None
        weights = model.mixing.log_weights([()] * len(parts[0].log_table))
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


def _count_tables(model: Any) -> int:
    """Tables that are read for one law of `model`."""
    if isinstance(model, Ensemble):
        return sum(map(_count_tables, model.components))
    return _count_tables(model.model) if isinstance(model, Warped) else 1


@dataclass(frozen=True)
class Plan:
    """A sampler reduced to K tables, weights over them, and how often the component is drawn.

    `weights` is None where tokens come from one table. `redraw` False keeps the first component of a row.
    `reads` counts the tables behind each of the K; `read_all` says that every token reads all of them. Rows whose
    number // `shared_rows` agree share component uniforms.
    """

    tables: list[TableModel]
    reads: tuple[int, ...]
    weights: Tensor | None = None
    redraw: bool = True
    read_all: bool = False
    shared_rows: int = 1

    @classmethod
    def marginal(cls, model: Any) -> Plan | None:
        """One law per token: the mixture itself."""
        table = tabulate(model)
        return None if table is None else cls([table], (_count_tables(model),), read_all=True)._if_small()

    @classmethod
    def ancestral(
        cls, ensemble: Ensemble, *, redraw: bool = True, read_all: bool = False, shared_rows: int = 1
    ) -> Plan | None:
        """A component per token (or per row), then its law."""
        if type(ensemble) is not Ensemble or type(ensemble.mixing) is not ConstantMixing:
            return None
        tables = _common_order(ensemble)
        if tables is None:
            return None
        reads = tuple(map(_count_tables, ensemble.components))
        return cls(tables, reads, ensemble.mixing.weights, redraw, read_all, shared_rows)._if_small()

    def _if_small(self) -> Plan | None:
        return self if len(self.tables) * self.tables[0].log_table.numel() <= _MAX_ENTRIES else None

    def run(
        self,
        prompts: list[tuple[int, ...]],
        prompt_index: np.ndarray,
        rows: np.ndarray,
        max_new_tokens: int,
        seed: int,
        progress: Callable[[int], None] | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """Tokens (N, T) and components (N, T) or None; what follows an end-of-sequence token is arbitrary."""
        first, size = self.tables[0], self.tables[0].vocabulary.size
        n_states, eos = len(first.log_table), np.array(first.vocabulary.eos, dtype=np.int64)
        work = len(rows) * max_new_tokens
        look_up = _Guide(torch.cat([table.log_table for table in self.tables]), work)
        pick = None if self.weights is None else _Guide(self.weights.log()[None], work)
        # A place is a flat index into (K, S, V); a base is where a state's cells begin in the guide.
        every_state, every_token = np.divmod(np.arange(n_states * size), size)
        base_after = np.tile(first.next_states(every_state, every_token) * look_up.cells, len(self.tables))
        token_at = np.tile(every_token, len(self.tables)).astype(np.int32)
        base_at_start = first.states_of(prompts)[prompt_index] * look_up.cells
        tokens = np.full((len(rows), max_new_tokens), -1, dtype=np.int64)
        components = None if pick is None else np.full_like(tokens, -1)
        streams = RowStreams(seed)
        order = np.argsort(rows, kind="stable")
        in_order = bool((np.diff(rows) >= 0).all())
        for begin in range(0, len(rows), _CHUNK):
            mine = order[begin : begin + _CHUNK]
            base, path = base_at_start[mine], np.zeros((BLOCK, len(mine)), dtype=np.int64)
            for block in range(-(-max_new_tokens // BLOCK)):
                integers = np.ascontiguousarray(streams.integers(rows[mine], block, stream="token").T)
                if pick is not None and (self.redraw or block == 0):
                    groups = rows[mine] // self.shared_rows
                    chosen = np.ascontiguousarray(streams.integers(groups, block, stream="component").T)
                    path = pick.find(chosen >> pick.shift, chosen)
                    path = path if self.redraw else np.tile(path[0], (BLOCK, 1))
                cell = integers >> look_up.shift
                if pick is not None:
                    cell += path * (n_states * look_up.cells)
                steps = min(BLOCK, max_new_tokens - block * BLOCK)
                place = np.empty((steps, len(mine)), dtype=np.int32)
                for step in range(steps):
                    place[step] = look_up.find(np.add(cell[step], base, out=cell[step]), integers[step])
                    base = base_after.take(place[step])
                span = slice(block * BLOCK, block * BLOCK + steps)
                written = token_at.take(place)
                # A run of rows is written as a slice, at half the cost.
                places = slice(mine[0], mine[-1] + 1) if len(mine) == mine[-1] + 1 - mine[0] and in_order else mine
                tokens[places, span] = written.T
                if components is not None:
                    components[places, span] = path[:steps].T
                if progress is not None:
                    progress(written.size)
                if len(eos):
                    alive = ~np.isin(written, eos).any(0)
                    mine, base, path = mine[alive], base[alive], path[:, alive]
                    if not len(mine):
                        break
        return torch.from_numpy(tokens), None if components is None else torch.from_numpy(components)

    def cost(self, tokens: Tensor, components: Tensor | None, prompt_index: np.ndarray) -> Cost:
        """What the general loop counts, in one batch, for trimmed `tokens` and `components` (N, T)."""
        if self.read_all or components is None:
            readers = [((tokens >= 0).numpy(), sum(self.reads))]
        else:
            readers = [((components == i).numpy(), reads) for i, reads in enumerate(self.reads)]
        total = Cost()
        for reading, reads in readers:
            laws = reading.sum(0)
            # Rows of one prompt share their first law.
            laws[0] = np.count_nonzero(np.bincount(prompt_index[reading[:, 0]]))
            total += Cost(reads * int((laws > 0).sum()), reads * int(laws.sum()), reads * int(laws.sum()))
        return total


class _Guide:
    """Inverse CDFs of L laws of V outcomes, exactly as `draws.inverse_cdf` finds them.

    Works on the integers k of the uniforms u = k·2⁻⁵³: cell ``l·cells + (k >> shift)`` of law l holds the
    place ``l·V + x`` of its outcome, or the complement of the first candidate where outcomes meet.
    """

    def __init__(self, log_laws: Tensor, work: int) -> None:
        n_laws, size = log_laws.shape
        # 16 to 32 cells per outcome leave few cells with two, but a guide larger than its use costs more.
        bits = (16 * size - 1).bit_length()
        while bits > 2 and n_laws << bits > min(max(work, 1 << 12), _MAX_CELLS):
            bits -= 1
        self.cells, self.shift = 1 << bits, UNIFORM_BITS - bits
        passed = _first_integers(log_laws.exp().cumsum(-1, dtype=torch.float64).numpy())
        # The first cell that begins past each entry; `start` counts the entries that a cell's beginning has passed.
        behind = np.clip(-(-passed >> self.shift), 0, self.cells) + np.arange(n_laws)[:, None] * (self.cells + 1)
        start = np.bincount(behind.reshape(-1), minlength=n_laws * (self.cells + 1)).reshape(n_laws, -1).cumsum(1)
        start[:, -1] = (passed < 1 << UNIFORM_BITS).sum(1)
        place = (start[:, :-1] + np.arange(n_laws)[:, None] * size).astype(np.int32)
        self._guide = np.where(start[:, :-1] == start[:, 1:], place, ~place).reshape(-1)
        self._passed = passed.reshape(-1)

    def find(self, cell: np.ndarray, integers: np.ndarray) -> np.ndarray:
        """Places of the outcomes, shaped as `cell`."""
        place = self._guide.take(cell)
        flat = place.reshape(-1)
        unsure = np.flatnonzero(flat < 0)
        if len(unsure):
            found, target = ~flat[unsure], integers.reshape(-1)[unsure]
            behind = np.flatnonzero(self._passed[found] <= target)
            while len(behind):
                found[behind] += 1
                behind = behind[self._passed[found[behind]] <= target[behind]]
            flat[unsure] = found
        return place


def _first_integers(cdf: np.ndarray) -> np.ndarray:
    """Smallest k for which u = k·2⁻⁵³ lies past each entry of `cdf` (L, V), rounding included.

    Past means ``cdf <= min(u·total, the float below total)``, the rule of `draws.inverse_cdf`; entries equal
    to the total are never passed.
    """
    total = cdf[:, -1:]
    guess = np.ceil(cdf / total * 2.0**UNIFORM_BITS).astype(np.int64) - 4  # rounding moves k by less than 4
    passed = guess.copy()
    for offset in range(8):
        uniforms = (guess + offset) * 2.0**-UNIFORM_BITS
        passed += np.minimum(uniforms * total, np.nextafter(total, 0)) < cdf
    return passed
