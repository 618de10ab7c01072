"""Keys and values of many rows: one slot per row, in storage that never moves while a session reads it."""

from __future__ import annotations

from torch import Tensor


class SlotCache:
    """Keys and values of all layers, one slot per row, each slot filled from the left.

    Slots and positions grow by doubling, so a session that reads a few rows of many holds only those.

    Parameters
    ----------
    max_slots, length
        Rows at most, and positions of a slot to begin with.
    spare
        Keep one more slot, behind the others, for what belongs to no row; and grow to `max_slots` at once, since
        forwards that were captured on a device know the storage by its address.
    """

    def __init__(self, *, max_slots: int, length: int, spare: bool = False) -> None:
        self.max_slots = max_slots
        self.version = 0  # counts how often storage moved
        self._length = length
        self._capacity = 0
        self._spare = spare
        self._layers: dict[int, tuple[Tensor, Tensor]] = {}

    @property
    def spare(self) -> int:
        """The slot that belongs to no row."""
        return self._capacity

    @property
    def length(self) -> int:
        """Positions of a slot."""
        return self._length

    def reserve(self, slots: int, length: int) -> None:
        """Make room for `slots` rows of `length` tokens."""
        grown = slots > self._capacity or length > self._length
        if slots > self._capacity:
            least = self.max_slots if self._spare and self._capacity else 2 * self._capacity
            self._capacity = min(self.max_slots, max(slots, least))
        if length > self._length:
            self._length = max(length, 2 * self._length)
        if grown:
            self.version += 1
            for layer, pair in self._layers.items():
                self._layers[layer] = (self._enlarged(pair[0]), self._enlarged(pair[1]))

    def _enlarged(self, old: Tensor) -> Tensor:
        new = old.new_zeros((self._capacity + self._spare, old.shape[1], self._length, old.shape[3]))
        new[: old.shape[0], :, : old.shape[2]] = old
        return new

    def layer(self, index: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Storage (slots, heads, length, head_dim) of a layer, shaped by its first keys and values."""
        if index not in self._layers:
            slots = self._capacity + self._spare
            shapes = [(slots, new.shape[1], self._length, new.shape[3]) for new in (keys, values)]
            self._layers[index] = (keys.new_zeros(shapes[0]), values.new_zeros(shapes[1]))
        return self._layers[index]

    def copy(self, source: int, targets: Tensor, length: int) -> None:
        """Copy the first `length` positions of slot `source` into the slots `targets`."""
        for pair in self._layers.values():
            for store in pair:
                store[targets, :, :length] = store[source, :, :length]

    @property
    def bytes(self) -> int:
        """Memory held, in bytes."""
        return sum(store.nbytes for pair in self._layers.values() for store in pair)

    @property
    def bytes_per_token(self) -> int:
        """Bytes of one position of one slot, over all layers."""
        return sum(store[0, :, 0].nbytes for pair in self._layers.values() for store in pair)
