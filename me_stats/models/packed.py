"""Attention over rows that are packed end to end: their keys and values in slots, and who may look where.

Every linear layer works on one sequence without padding. Inside attention the spans are unfolded to one line per row
and meet that row's own keys in a slot cache.
"""

from __future__ import annotations

import sys
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import eager_mask, sdpa_mask

# The names under which transformers finds the attention below: for the usual scaled dot product, and for
# models with soft-capped scores or attention sinks, which exist in those models' own eager code only.
ATTENTION, EAGER_ATTENTION = "me_stats_ragged", "me_stats_ragged_eager"

_KNOWN_LAYERS = {"full_attention", "sliding_attention"}


class SlotCache:
    """Keys and values of all layers, one slot per row, each slot filled from the left.

    Slots and positions grow by doubling, so a session that reads a few rows of many holds only those.
    """

    def __init__(self, *, max_slots: int, length: int) -> None:
        self.max_slots = max_slots
        self._length = length
        self._capacity = 0
        self._layers: dict[int, tuple[Tensor, Tensor]] = {}

    def reserve(self, slots: int, length: int) -> None:
        """Make room for `slots` rows of `length` tokens."""
        grown = slots > self._capacity or length > self._length
        if slots > self._capacity:
            self._capacity = min(self.max_slots, max(slots, 2 * self._capacity))
        if length > self._length:
            self._length = max(length, 2 * self._length)
        if grown:
            for layer, pair in self._layers.items():
                self._layers[layer] = (self._enlarged(pair[0]), self._enlarged(pair[1]))

    def _enlarged(self, old: Tensor) -> Tensor:
        new = old.new_zeros((self._capacity, old.shape[1], self._length, old.shape[3]))
        new[: old.shape[0], :, : old.shape[2]] = old
        return new

    def layer(self, index: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Storage (slots, heads, length, head_dim) of a layer, shaped by its first keys and values."""
        if index not in self._layers:
            shapes = [(self._capacity, new.shape[1], self._length, new.shape[3]) for new in (keys, values)]
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


def stretches(starts: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """``start, start + 1, ..., start + length - 1`` of each pair, end to end.

    >>> stretches(np.array([5, 0]), np.array([2, 3])).tolist()
    [5, 6, 0, 1, 2]
    """
    return np.repeat(starts - (np.cumsum(lengths) - lengths), lengths) + np.arange(lengths.sum())


class Layout:
    """Where the packed tokens of one forward belong: slot and position of each, and the unfolded shape.

    `read` are the packed places whose laws are asked for: the last `reads` (R,) of each row.
    """

    def __init__(
        self, cache: SlotCache, slots: np.ndarray, starts: np.ndarray, stops: np.ndarray, reads: np.ndarray,
        device: torch.device,
    ) -> None:  # fmt: skip
        spans = stops - starts
        ends = np.cumsum(spans)
        longest = int(spans.max())
        self.cache = cache
        self.total = int(ends[-1])
        self.visible = int(stops.max())  # key positions that any row may look at
        self.shape = (len(slots), longest)
        offset = np.arange(longest)
        # Short rows repeat their last token to fill their line; the copies are never read back.
        line = np.minimum(offset[None], spans[:, None] - 1)
        fold = (ends - spans)[:, None] + line
        real = offset[None] < spans[:, None]
        positions = starts[:, None] + line
        packed = [fold.reshape(-1), np.flatnonzero(real), positions[real], np.repeat(slots, spans)]
        packed.append(stretches(ends - reads, reads))
        # One host-to-device copy for all indices.
        moved = torch.from_numpy(np.concatenate([*packed, positions.reshape(-1)])).to(device, non_blocking=True)
        pieces = moved.split([*map(len, packed), positions.size])
        self.fold, self.unfold, self.positions, self.token_slots, self.read, lines = pieces
        self._query_positions = lines.view(self.shape)
        together = bool((np.diff(slots) == 1).all())
        # Neighbouring slots are read in place; others have to be gathered.
        self._slots: slice | Tensor = (
            slice(int(slots[0]), int(slots[-1]) + 1) if together else torch.from_numpy(slots).to(device)
        )
        # One new token a row, and rows of one length: every query sees all there is.
        self._even = longest == 1 and bool((stops == self.visible).all())
        self._masks: dict[int | None, Tensor | None] = {}
        self._layers: set[int] = set()

    def store(self, index: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Write the packed keys and values, and return what each row sees: (R, heads, visible, head_dim)."""
        if index in self._layers:
            raise ValueError("its layers run attention more than once")
        self._layers.add(index)
        stored = self.cache.layer(index, keys, values)
        for old, new in zip(stored, (keys, values), strict=True):
            old[self.token_slots, :, self.positions] = new[0].transpose(0, 1)
        return self._seen(stored[0]), self._seen(stored[1])

    def _seen(self, store: Tensor) -> Tensor:
        seen = store[:, :, : self.visible]
        # index_select copies a row's keys as one block, 2 to 4 times faster than indexing with a list of rows.
        return seen[self._slots] if isinstance(self._slots, slice) else seen.index_select(0, self._slots)

    def mask(self, window: int | None) -> Tensor | None:
        """(R, 1, S, visible), True where a query may look: not ahead, and within the sliding window; None: everywhere.

        Attention without a mask takes about two thirds of the time.
        """
        if window not in self._masks and self._even and (window is None or self.visible <= window):
            self._masks[window] = None
        elif window not in self._masks:
            query = self._query_positions[:, None, :, None]
            key = torch.arange(self.visible, device=query.device)
            allowed = key <= query
            if window is not None:
                allowed &= key > query - window
            self._masks[window] = allowed
        return self._masks[window]

    def require_used(self, window: int | None) -> None:
        """ValueError unless attention came by, and looked through the config's sliding window if it has one."""
        if not self._layers:
            raise ValueError("its attention takes no arguments from the caller")
        if window is not None and window not in self._masks:
            raise ValueError(f"its attention does not say that it looks back {window} tokens only")


def attention(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    ragged: Layout | None = None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """Scaled dot-product attention of packed rows; without a layout, transformers' own."""
    if ragged is None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)
    lines, keys, values, mask = _unfold(module, query, key, value, attention_mask, ragged, kwargs)
    rows, heads, span, width = lines.shape
    # Query heads that share a key head become extra query positions, so keys are never repeated.
    groups = heads // keys.shape[1]
    grouped = lines.reshape(rows, keys.shape[1], groups * span, width)
    wide = mask.repeat(1, 1, groups, 1) if groups > 1 and mask is not None else mask
    out = scaled_dot_product_attention(grouped, keys, values, attn_mask=wide, scale=kwargs.get("scaling"))
    return _fold(out.reshape(rows, heads, span, values.shape[3]).transpose(1, 2), ragged), None


def eager_attention(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    ragged: Layout | None = None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """The model's own eager attention, of packed rows or of plain ones."""
    eager = sys.modules[type(module).__module__].__dict__["eager_attention_forward"]
    if ragged is None:
        out: tuple[Tensor, Tensor | None] = eager(module, query, key, value, attention_mask, **kwargs)
        return out
    lines, keys, values, mask = _unfold(module, query, key, value, attention_mask, ragged, kwargs)
    additive = None
    if mask is not None:
        additive = torch.zeros(mask.shape, dtype=query.dtype, device=query.device)
        additive.masked_fill_(~mask, torch.finfo(query.dtype).min)
    return _fold(eager(module, lines, keys, values, additive, **kwargs)[0], ragged), None


def _unfold(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    given: Tensor | None,
    ragged: Layout,
    kwargs: dict[str, Any],
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Queries (R, H, S, D) one line per row, the keys and values that each row sees, and the mask."""
    if given is not None and given.numel() > 1:
        raise ValueError("its attention builds a mask of its own")
    # Some models tell attention about the window, others keep it on the module.
    window = kwargs["sliding_window"] if "sliding_window" in kwargs else getattr(module, "sliding_window", None)
    keys, values = ragged.store(module.layer_idx, key, value)  # type: ignore[arg-type]
    lines = query[0].transpose(0, 1)[ragged.fold].view(*ragged.shape, query.shape[1], query.shape[3])
    return lines.transpose(1, 2), keys, values, ragged.mask(window)


def _fold(out: Tensor, ragged: Layout) -> Tensor:
    """(R, S, H, D) back to the packed (1, Q, H, D)."""
    return out.reshape(-1, *out.shape[2:])[ragged.unfold][None]


for _name, _attention, _mask in (
    (ATTENTION, attention, sdpa_mask),
    (EAGER_ATTENTION, eager_attention, eager_mask),
):
    AttentionInterface.register(_name, _attention)
    AttentionMaskInterface.register(_name, _mask)


def attention_for(network: Any) -> str:
    """Which of the two attentions a model needs; ValueError names what cannot be kept per row."""
    config = network.config.get_text_config()
    unknown = set(getattr(config, "layer_types", None) or []) - _KNOWN_LAYERS
    if unknown:
        raise ValueError(f"it has layers of type {', '.join(sorted(unknown))}")
    if not network._supports_attention_backend:
        raise ValueError("it has its own attention code")
    capped = getattr(config, "attn_logit_softcapping", None) is not None
    return ATTENTION if network._supports_sdpa and not capped else EAGER_ATTENTION
