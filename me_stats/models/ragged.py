"""Rows of a transformer that advance on their own: lazy key-value synchronisation, without padding.

One forward takes the missing tokens of all rows that are read, packed end to end as a single sequence, so
every linear layer works on real tokens only. Inside attention the spans are unfolded to one line per row
and meet that row's own keys in a slot cache. This is the paper's "forward-extend" (arXiv 2605.00419,
section 2.3) for many rows, each with its own length and lag.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import eager_mask, sdpa_mask

from me_stats.models.base import Cost, NaNLawError, Prefix

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


class Layout:
    """Where the packed tokens of one forward belong: slot and position of each, and the unfolded shape."""

    def __init__(
        self, cache: SlotCache, slots: np.ndarray, starts: np.ndarray, stops: np.ndarray, device: torch.device
    ) -> None:
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
        packed = [fold.reshape(-1), np.flatnonzero(real), positions[real], np.repeat(slots, spans), ends - 1]
        # One host-to-device copy for all indices.
        moved = torch.from_numpy(np.concatenate([*packed, positions.reshape(-1)])).to(device, non_blocking=True)
        pieces = moved.split([*map(len, packed), positions.size])
        self.fold, self.unfold, self.positions, self.token_slots, self.last, lines = pieces
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


def _window(config: Any, max_length: int | None) -> int | None:
    """The sliding window that some layer must look through, if rows can grow past it."""
    window: int | None = getattr(config, "sliding_window", None)
    types = getattr(config, "layer_types", None)
    if window is None or (types is not None and "sliding_attention" not in types):
        return None
    return window if max_length is None or window < max_length else None


class RaggedSession:
    """Rows of one transformers model, caught up when they are read.

    Rows that start from the same prompt share its prefill: the first one read computes it, the others
    copy its keys and values.
    """

    def __init__(
        self,
        network: Any,
        prompts: Sequence[Prefix],
        *,
        size: int,
        max_new_tokens: int | None,
        max_length: int | None,
    ) -> None:
        self._network, self._size, self._max_length = network, size, max_length
        self._device = network.device
        distinct = {prompt: i for i, prompt in enumerate(dict.fromkeys(map(tuple, prompts)))}
        self._prompt = np.array([distinct[tuple(prompt)] for prompt in prompts], dtype=np.int64)
        lengths = np.array([len(prompt) for prompt in distinct], dtype=np.int64)
        longest = int(lengths.max(initial=1))
        table = np.zeros((len(distinct), longest), dtype=np.int64)
        for i, prompt in enumerate(distinct):
            table[i, : len(prompt)] = prompt
        self._prompt_tokens = torch.from_numpy(table).to(self._device)
        self._prompt_length = lengths[self._prompt]
        self._length = self._prompt_length.copy()  # tokens known, per row
        self._cached = np.zeros(len(prompts), dtype=np.int64)  # tokens whose keys and values are stored
        self._slot = np.full(len(prompts), -1, dtype=np.int64)
        self._whole = np.ones(len(prompts), dtype=bool)  # rows that still hold all of their prompt
        self._home = np.full(len(distinct), -1, dtype=np.int64)  # slot that holds a prompt's prefill
        self._used = 0
        self._written = torch.zeros((len(prompts), max_new_tokens or 16), dtype=torch.int64, device=self._device)
        self._cache = SlotCache(max_slots=len(prompts), length=longest + (max_new_tokens or 16))
        self._window = _window(network.config.get_text_config(), max_length)
        self.cost = Cost()

    @property
    def cache_bytes(self) -> int:
        """Memory that keys and values hold now, in bytes."""
        return self._cache.bytes

    @property
    def cache_bytes_per_token(self) -> int:
        """Bytes of keys and values of one token of one row; 0 before the first forward."""
        return self._cache.bytes_per_token

    def append(self, rows: np.ndarray, tokens: Tensor) -> None:
        steps = self._length[rows] - self._prompt_length[rows]
        longest = int(steps.max(initial=-1)) + 1
        if self._max_length is not None and int(self._length[rows].max(initial=0)) >= self._max_length:
            raise ValueError(f"a row would grow past the context window of {self._max_length} tokens")
        if longest > self._written.shape[1]:
            self._written = torch.nn.functional.pad(self._written, (0, self._written.shape[1]))
        where = torch.from_numpy(np.stack([rows, steps])).to(self._device, non_blocking=True)
        self._written[where[0], where[1]] = tokens.to(self._device)
        self._length[rows] += 1

    def drop(self, rows: np.ndarray, counts: np.ndarray) -> None:
        """Take back the last `counts` (B,) tokens of the distinct `rows` (B,), those of the prompt too.

        What stays keeps its keys and values. A row left without a token must get one before it is read.
        """
        kept = self._length[rows] - counts
        if (np.asarray(counts) < 0).any() or (kept < 0).any():
            raise ValueError("counts must lie between 0 and the number of tokens of each row")
        self._length[rows] = kept
        self._cached[rows] = np.minimum(self._cached[rows], kept)
        short = kept < self._prompt_length[rows]
        cut = rows[short]
        # What a cut row writes next goes where its prompt's end was, so no other row may copy from it.
        self._home[np.isin(self._home, self._slot[cut]) & (self._home >= 0)] = -1
        self._prompt_length[cut] = kept[short]
        self._whole[cut] = False

    def log_probs(self, rows: np.ndarray) -> Tensor:
        if not self._length[rows].all():
            raise ValueError("a row without tokens has no law; append one before it is read")
        self.cost += Cost(0, 0, len(rows))
        new = self._slot[rows] < 0
        stored = self._home[self._prompt[rows]] >= 0
        self._share_prompts(rows[new & stored])
        # Of the new rows with a prompt that nobody has read, the first whole one computes it and the others copy it.
        late = new & ~stored
        able = np.flatnonzero(late & self._whole[rows])
        first = able[np.unique(self._prompt[rows[able]], return_index=True)[1]]
        late &= np.isin(self._prompt[rows], self._prompt[rows[first]])
        late[first] = False
        if not late.any():
            return self._forward(rows)
        laws = torch.empty((len(rows), self._size), device=self._device)
        laws[torch.from_numpy(~late).to(self._device)] = self._forward(rows[~late])
        self._share_prompts(rows[late])
        laws[torch.from_numpy(late).to(self._device)] = self._forward(rows[late])
        return laws

    def _share_prompts(self, rows: np.ndarray) -> None:
        """Give new rows the keys and values of their prompts, which other rows have computed."""
        if not len(rows):
            return
        self._assign_slots(rows)
        for prompt in np.unique(self._prompt[rows]):
            mine = rows[self._prompt[rows] == prompt]
            known = self._prompt_length[mine]  # shorter than the prompt in rows that were cut
            slots = torch.from_numpy(self._slot[mine]).to(self._device)
            self._cache.copy(int(self._home[prompt]), slots, int(known.max()))
            self._cached[mine] = known

    def _assign_slots(self, rows: np.ndarray) -> None:
        self._slot[rows] = self._used + np.arange(len(rows))
        self._used += len(rows)
        self._cache.reserve(self._used, int(self._length[rows].max()))

    def _forward(self, rows: np.ndarray) -> Tensor:
        if not len(rows):
            return torch.empty((0, self._size), device=self._device)
        fresh = rows[self._slot[rows] < 0]
        if len(fresh):
            self._assign_slots(fresh)
            lenders = fresh[self._whole[fresh]]
            self._home[self._prompt[lenders]] = self._slot[lenders]
        stops = self._length[rows]
        self._cache.reserve(self._used, int(stops.max()))
        # A row that is read again without a new token feeds its last one again.
        starts = np.minimum(self._cached[rows], stops - 1)
        laws, fed = self._run(rows, starts, stops)
        self._cached[rows] = stops
        self.cost += Cost(1, fed, 0)
        return laws

    def _run(self, rows: np.ndarray, starts: np.ndarray, stops: np.ndarray) -> tuple[Tensor, int]:
        order = np.argsort(self._slot[rows], kind="stable")
        rows, starts, stops = rows[order], starts[order], stops[order]
        layout = Layout(self._cache, self._slot[rows], starts, stops, self._device)
        spans = stops - starts
        owner = np.stack([np.repeat(rows, spans), np.repeat(self._prompt[rows], spans),
                          np.repeat(self._prompt_length[rows], spans)])  # fmt: skip
        row, prompt, prompt_length = torch.from_numpy(owner).to(self._device, non_blocking=True)
        step = layout.positions - prompt_length
        from_prompt = self._prompt_tokens[prompt, layout.positions.clamp(max=self._prompt_tokens.shape[1] - 1)]
        tokens = torch.where(step < 0, from_prompt, self._written[row, step.clamp(min=0)])
        with torch.no_grad():
            logits = self._network(
                input_ids=tokens[None],
                position_ids=layout.positions[None],
                # Any 4-D mask stops transformers from building one; the layout has the real masks.
                attention_mask=torch.ones((1, 1, 1, 1), dtype=torch.bool, device=self._device),
                use_cache=False,
                logits_to_keep=layout.last,
                ragged=layout,
            ).logits[0, :, : self._size]
        layout.require_used(self._window)
        laws = logits.float().log_softmax(-1)
        # A NaN anywhere in a row's logits is one everywhere; on an accelerator the check would stall the queue.
        if laws.is_cpu and bool(laws[:, 0].isnan().any()):
            raise NaNLawError(f"{type(self._network).__name__} returned NaN logits; use a wider dtype")
        if not np.array_equal(order, np.arange(len(order))):
            laws = laws[torch.from_numpy(np.argsort(order)).to(self._device)]
        return laws, layout.total
