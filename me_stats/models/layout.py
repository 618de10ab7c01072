"""Where the packed tokens of one forward belong: whose they are, where their keys go, and who may look where."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from me_stats.devices import on_device
from me_stats.models.slots import SlotCache


def stretches(starts: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """``start, start + 1, ..., start + length - 1`` of each pair, end to end.

    >>> stretches(np.array([5, 0]), np.array([2, 3])).tolist()
    [5, 6, 0, 1, 2]
    """
    return np.repeat(starts - (np.cumsum(lengths) - lengths), lengths) + np.arange(lengths.sum())


@dataclass(frozen=True)
class Sizes:
    """Sizes of a forward: rows R, the longest span S, packed tokens Q, laws read, and key positions seen."""

    rows: int
    span: int
    packed: int
    reads: int
    visible: int

    @classmethod
    def of(cls, starts: np.ndarray, stops: np.ndarray, reads: np.ndarray) -> Sizes:
        spans = stops - starts
        return cls(len(spans), int(spans.max()), int(spans.sum()), int(reads.sum()), int(stops.max()))

    @property
    def lengths(self) -> tuple[int, ...]:
        """How long the arrays of `index_arrays` are."""
        grid = self.rows * self.span
        return (grid, self.packed, self.packed, self.packed, self.reads, grid, self.rows)


def index_arrays(
    sizes: Sizes, slots: np.ndarray, starts: np.ndarray, stops: np.ndarray, reads: np.ndarray, *, spare: int = 0
) -> np.ndarray:
    """All indices of a forward, end to end, each padded to the length that `sizes` gives it.

    Fold (R·S), unfold (Q), position (Q) and slot (Q) of the packed tokens, the places that are read, position (R·S) of
    the queries, slot (R) of the rows. What is padding stands in slot `spare` and is never read.
    """
    spans = stops - starts
    ends = np.cumsum(spans)
    offset = np.arange(sizes.span)
    # Short rows repeat their last token to fill their line; the copies are never read back.
    line = np.minimum(offset[None], spans[:, None] - 1)
    real = offset[None] < spans[:, None]
    positions = starts[:, None] + line
    exact = (
        ((ends - spans)[:, None] + line).reshape(-1),
        np.flatnonzero(real),
        positions[real],
        np.repeat(slots, spans),
        stretches(ends - reads, reads),
        positions.reshape(-1),
        slots,
    )
    lengths = sizes.lengths
    flat = np.zeros(sum(lengths), dtype=np.int64)
    for place, (array, length, begin) in enumerate(zip(exact, lengths, np.cumsum(lengths) - lengths, strict=True)):
        flat[begin : begin + len(array)] = array
        if place in (3, 6):
            flat[begin + len(array) : begin + length] = spare
    return flat


class Layout:
    """Where the packed tokens of one forward belong: slot and position of each, and the unfolded shape.

    `read` are the packed places whose laws are asked for: the last `reads` (R,) of each row. `even` says that the
    packed tokens are the lines of rows already.
    """

    even: bool
    _slots: tuple[int, int] | Tensor  # first slot and number of rows where slots adjoin, else the slot of each row
    _block: tuple[int, int] | None  # first position and span that all rows write, if it is one and slots adjoin

    def __init__(
        self, cache: SlotCache, slots: np.ndarray, starts: np.ndarray, stops: np.ndarray, reads: np.ndarray,
        device: torch.device,
    ) -> None:  # fmt: skip
        sizes = Sizes.of(starts, stops, reads)
        # One host-to-device copy for all indices.
        self._place(cache, sizes, on_device(index_arrays(sizes, slots, starts, stops, reads), device))
        if bool((np.diff(slots) == 1).all()):
            # Neighbouring slots are read in place; others have to be gathered.
            self._slots = (int(slots[0]), sizes.rows)
        self.even = sizes.rows * sizes.span == sizes.packed
        if self.even and isinstance(self._slots, tuple) and bool((starts == starts[0]).all()):
            self._block = (int(starts[0]), sizes.span)
        # One new token a row, and rows of one length: every query sees all there is.
        self._all_seen = sizes.span == 1 and bool((stops == sizes.visible).all())

    @classmethod
    def over(cls, cache: SlotCache, sizes: Sizes, indices: Tensor, *, in_place: bool) -> Layout:
        """A layout whose index arrays are views of `indices`, for forwards of one padded shape.

        `in_place` says that row r stands in slot r.
        """
        layout = cls.__new__(cls)
        layout._place(cache, sizes, indices)
        if in_place:
            layout._slots = (0, sizes.rows)
        layout.even = sizes.rows == 1 or sizes.span == 1
        return layout

    def _place(self, cache: SlotCache, sizes: Sizes, indices: Tensor) -> None:
        self.cache, self.shape, self.visible = cache, (sizes.rows, sizes.span), sizes.visible
        self.fold, self.unfold, self.positions, self.token_slots, self.read, lines, slots = indices.split(sizes.lengths)
        self._query_positions = lines.view(self.shape)
        self._slots, self._block, self.even, self._all_seen = slots, None, False, False
        self._masks: dict[int | None, Tensor | None] = {}
        self._wide: dict[tuple[int | None, int], Tensor] = {}
        self._layers: set[int] = set()

    def forget(self) -> None:
        """Begin another forward of the same shape: masks are made anew from what the indices hold then."""
        self._masks, self._wide, self._layers = {}, {}, set()

    def lines(self, query: Tensor) -> Tensor:
        """Packed queries (1, H, Q, D) as one line per row (R, H, S, D)."""
        tokens = query[0].transpose(0, 1)
        lines = tokens if self.even else tokens[self.fold]
        return lines.reshape(*self.shape, query.shape[1], query.shape[3]).transpose(1, 2)

    def packed(self, out: Tensor) -> Tensor:
        """(R, S, H, D) back to the packed (1, Q, H, D)."""
        flat = out.reshape(-1, *out.shape[2:])
        return flat[None] if self.even else flat[self.unfold][None]

    def store(self, index: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Write the packed keys and values, and return what each row sees: (R, heads, visible, head_dim)."""
        if index in self._layers:
            raise ValueError("its layers run attention more than once")
        self._layers.add(index)
        stored = self.cache.layer(index, keys, values)
        for old, new in zip(stored, (keys, values), strict=True):
            if self._block is not None:
                block = new[0].reshape(new.shape[1], *self.shape, new.shape[3])
                self._rows(old).narrow(2, *self._block).copy_(block.transpose(0, 1))
            else:
                old[self.token_slots, :, self.positions] = new[0].transpose(0, 1)
        return self._seen(stored[0]), self._seen(stored[1])

    def _seen(self, store: Tensor) -> Tensor:
        return self._rows(store.narrow(2, 0, self.visible))

    def _rows(self, store: Tensor) -> Tensor:
        if isinstance(self._slots, tuple):
            return store.narrow(0, *self._slots)
        # index_select copies a row's keys as one block, 2 to 4 times faster than indexing with a list of rows.
        return store.index_select(0, self._slots)

    def mask(self, window: int | None) -> Tensor | None:
        """(R, 1, S, visible), True where a query may look: not ahead, and within the sliding window; None: everywhere.

        Attention without a mask takes about two thirds of the time.
        """
        if window not in self._masks and self._all_seen and (window is None or self.visible <= window):
            self._masks[window] = None
        elif window not in self._masks:
            query = self._query_positions[:, None, :, None]
            key = torch.arange(self.visible, device=query.device)
            allowed = key <= query
            if window is not None:
                allowed &= key > query - window
            self._masks[window] = allowed
        return self._masks[window]

    def wide_mask(self, window: int | None, groups: int) -> Tensor | None:
        """The mask (R, 1, groups·S, visible) of queries whose `groups` heads share a key head, made once a forward."""
        mask = self.mask(window)
        if mask is None or groups == 1:
            return mask
        if (window, groups) not in self._wide:
            self._wide[window, groups] = mask.repeat(1, 1, groups, 1)
        return self._wide[window, groups]

    def require_used(self, window: int | None) -> None:
        """ValueError unless attention came by, and looked through the config's sliding window if it has one."""
        if not self._layers:
            raise ValueError("its attention takes no arguments from the caller")
        if window is not None and window not in self._masks:
            raise ValueError(f"its attention does not say that it looks back {window} tokens only")
