"""Forwards of a few shapes, captured once as CUDA graphs and replayed.

A decoding step of a large network is a thousand small kernels, and a host starts them more slowly than the device runs
them. A captured graph starts them all at once. It needs fixed shapes and fixed memory: sizes are rounded up to powers
of two, the padding stands in a slot of its own, and storage of keys and values goes from one session to the next.
"""

from __future__ import annotations

import threading
import weakref
from collections import Counter
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from me_stats.devices import on_device
from me_stats.models.layout import Layout, Sizes, index_arrays
from me_stats.models.slots import SlotCache

_KEYS = 256  # key positions are rounded up to a multiple of this
_LARGEST = 1024  # packed tokens of a forward that is still captured
_CAPTURING = threading.Lock()  # a capture begins by waiting for the device, which another one would not bear
_SEEN_BEFORE = 1  # forwards of a shape that run as they are before one is captured: rare shapes never pay for that


def run_network(network: Any, tokens: Tensor, layout: Layout, size: int) -> Tensor:
    """Laws (reads, V) of the packed `tokens` (Q,) at the places that `layout` reads."""
    with torch.no_grad():
        logits = network(
            input_ids=tokens[None],
            position_ids=layout.positions[None],
            # Any 4-D mask stops transformers from building one; the layout has the real masks.
            attention_mask=torch.ones((1, 1, 1, 1), dtype=torch.bool, device=tokens.device),
            use_cache=False,
            logits_to_keep=layout.read,
            ragged=layout,
        ).logits[0, :, :size]
        return logits.float().log_softmax(-1)


def _power(n: int) -> int:
    return 1 << (n - 1).bit_length()


def rounded(sizes: Sizes, length: int) -> Sizes:
    """The sizes that a forward is padded to, in storage of `length` positions.

    >>> rounded(Sizes(rows=43, span=5, packed=61, reads=43, visible=300), 600)
    Sizes(rows=64, span=16, packed=64, reads=64, visible=512)
    """
    rows, span = _power(sizes.rows), _power(sizes.span)
    if rows > 1 and span > 1:  # lags of many rows vary most: few lengths of lines, few captures
        span = next(length for length in (4, 16, 64, 256, span) if length >= span)
    # The tokens of one row are its line; one token each makes the lines of many.
    packed = rows * span if 1 in (rows, span) else _power(sizes.packed)
    visible = min(length, -(-sizes.visible // _KEYS) * _KEYS)
    return Sizes(rows, span, packed, _power(sizes.reads), visible)


@dataclass
class _Captured:
    """One forward in fixed memory: what it reads, what it runs, and where it leaves its laws."""

    indices: Tensor
    tokens: Tensor
    layout: Layout
    graph: Any
    laws: Tensor


class Graphs:
    """The captured forwards of one network over one slot cache; one session at a time.

    `capture` False runs the same padded forwards without a graph, which is what tests on a processor can compare.
    """

    def __init__(self, network: Any, size: int, cache: SlotCache, *, capture: bool = True) -> None:
        self.cache = cache
        self._network, self._size, self._capture = network, size, capture
        self._version = cache.version
        self._captured: dict[tuple[Sizes, bool], _Captured] = {}
        self._seen: Counter[tuple[Sizes, bool]] = Counter()
        self._pool: Any = None

    def laws(
        self, tokens: Tensor, slots: np.ndarray, starts: np.ndarray, stops: np.ndarray, reads: np.ndarray
    ) -> Tensor | None:
        """Laws (Σ reads, V) of the packed `tokens` (Q,), or None for a forward that should run as it is."""
        sizes = Sizes.of(starts, stops, reads)
        if sizes.packed > _LARGEST:
            return None
        padded = rounded(sizes, self.cache.length)
        in_place = padded.rows <= self.cache.spare and bool((slots == np.arange(len(slots))).all())
        key = (padded, in_place)
        if self._version != self.cache.version:  # the storage moved: what was captured reads the old one
            self._captured.clear()
            self._version = self.cache.version
        self._seen[key] += 1
        if key not in self._captured and self._seen[key] <= _SEEN_BEFORE:
            return None
        indices = index_arrays(padded, slots, starts, stops, reads, spare=self.cache.spare)
        moved = on_device(indices, tokens.device)
        if key not in self._captured:
            self._captured[key] = self._prepared(padded, in_place, moved)
        captured = self._captured[key]
        captured.indices.copy_(moved)
        captured.tokens[: len(tokens)] = tokens
        if self._capture:
            captured.graph.replay()
            laws = captured.laws
        else:
            laws = self._run(captured)
        return laws[: sizes.reads].clone()  # the next replay writes over them

    def _prepared(self, sizes: Sizes, in_place: bool, indices: Tensor) -> _Captured:
        own = indices.clone()
        layout = Layout.over(self.cache, sizes, own, in_place=in_place)
        tokens = torch.zeros(sizes.packed, dtype=torch.int64, device=own.device)
        captured = _Captured(own, tokens, layout, None, tokens)
        if not self._capture:
            return captured
        with _CAPTURING:
            self._record(captured)
        return captured

    def _record(self, captured: _Captured) -> None:
        # Libraries choose kernels and take memory in a first run, which must not be captured.
        beside = torch.cuda.Stream()
        beside.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(beside):
            self._run(captured)
        torch.cuda.current_stream().wait_stream(beside)
        self._pool = self._pool or torch.cuda.graph_pool_handle()
        captured.graph = torch.cuda.CUDAGraph()
        # Other threads may run other networks meanwhile.
        with torch.cuda.graph(captured.graph, pool=self._pool, capture_error_mode="thread_local"):
            captured.laws = self._run(captured)

    def _run(self, captured: _Captured) -> Tensor:
        captured.layout.forget()
        return run_network(self._network, captured.tokens, captured.layout, self._size)


class GraphPool:
    """Graphs of one network, lent to one session at a time and given back when that session goes."""

    def __init__(self, network: Any, size: int, *, capture: bool = True) -> None:
        self._network, self._size, self._capture = network, size, capture
        self._free: list[Graphs] = []

    def lend(self, borrower: object, *, max_slots: int, length: int) -> Graphs:
        """Graphs whose cache has room for `max_slots` rows of `length` tokens, until `borrower` is collected."""
        length = -(-length // _KEYS) * _KEYS
        fitting = [g for g in self._free if g.cache.max_slots >= max_slots and g.cache.length >= length]
        if fitting:
            # The largest: then all sessions share what one has captured.
            graphs = max(fitting, key=lambda g: g.cache.max_slots * g.cache.length)
            self._free.remove(graphs)
        else:
            self._free.clear()  # smaller storage would only take memory
            cache = SlotCache(max_slots=max_slots, length=length, spare=True)
            graphs = Graphs(self._network, self._size, cache, capture=self._capture)
        weakref.finalize(borrower, self._free.append, graphs).atexit = False
        return graphs

    def tried(self) -> GraphPool:
        """This pool, after a capture of one token; RuntimeError if the network cannot be captured."""
        graphs = Graphs(
            self._network, self._size, SlotCache(max_slots=1, length=_KEYS, spare=True), capture=self._capture
        )
        graphs.cache.reserve(1, 1)
        one, zero = np.array([1]), np.array([0])
        for _ in range(_SEEN_BEFORE + 1):
            graphs.laws(torch.zeros(1, dtype=torch.int64, device=self._network.device), zero, zero, one, one)
        return self
