"""Rows of a transformer that advance on their own: lazy key-value synchronisation, without padding.

One forward takes the missing tokens of all rows that are read, packed end to end as a single sequence. This is the
paper's "forward-extend" (arXiv 2605.00419, section 2.3) for many rows, each with its own length and lag. Rows can take
tokens back, and be read at their last few positions at once, which is what speculative sampling asks for.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from me_stats.devices import on_device
from me_stats.models.base import Cost, NaNLawError, Prefix
from me_stats.models.graphs import GraphPool, run_network
from me_stats.models.layout import Layout, stretches
from me_stats.models.slots import SlotCache


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
        graphs: GraphPool | None = None,
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
        length = longest + (max_new_tokens or 16)
        self._graphs = None if graphs is None else graphs.lend(self, max_slots=len(prompts), length=length)
        self._cache = SlotCache(max_slots=len(prompts), length=length) if self._graphs is None else self._graphs.cache
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
        row, step = on_device(np.stack([rows, steps]), self._device)
        self._written[row, step] = tokens.to(self._device, non_blocking=True)
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
        return self.log_probs_along(rows, np.zeros(len(rows), dtype=np.int64))

    def log_probs_along(self, rows: np.ndarray, counts: np.ndarray) -> Tensor:
        """Laws (Σ(counts + 1), V) before each of the last `counts` (B,) tokens of `rows` (B,) and after them, packed.

        One forward; a second where rows copy a prompt that this read computes. Tokens whose laws are asked for are fed
        again if they were fed before: their keys and values are stored, their laws are not.
        """
        if (self._length[rows] <= counts).any():
            raise ValueError("a row without tokens has no law; append one before it is read")
        self.cost += Cost(0, 0, int(counts.sum()) + len(rows))
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
            return self._forward(rows, counts)
        laws = torch.empty((int(counts.sum()) + len(rows), self._size), device=self._device)
        places = on_device(np.repeat(late, counts + 1), self._device)
        laws[~places] = self._forward(rows[~late], counts[~late])
        self._share_prompts(rows[late])
        laws[places] = self._forward(rows[late], counts[late])
        return laws

    def _share_prompts(self, rows: np.ndarray) -> None:
        """Give new rows the keys and values of their prompts, which other rows have computed."""
        if not len(rows):
            return
        self._assign_slots(rows)
        for prompt in np.unique(self._prompt[rows]):
            mine = rows[self._prompt[rows] == prompt]
            known = self._prompt_length[mine]  # shorter than the prompt in rows that were cut
            slots = on_device(self._slot[mine], self._device)
            self._cache.copy(int(self._home[prompt]), slots, int(known.max()))
            self._cached[mine] = known

    def _assign_slots(self, rows: np.ndarray) -> None:
        self._slot[rows] = self._used + np.arange(len(rows))
        self._used += len(rows)
        self._cache.reserve(self._used, int(self._length[rows].max()))

    def _forward(self, rows: np.ndarray, counts: np.ndarray) -> Tensor:
        if not len(rows):
            return torch.empty((0, self._size), device=self._device)
        fresh = rows[self._slot[rows] < 0]
        if len(fresh):
            self._assign_slots(fresh)
            lenders = fresh[self._whole[fresh]]
            self._home[self._prompt[lenders]] = self._slot[lenders]
        stops = self._length[rows]
        self._cache.reserve(self._used, int(stops.max()))
        # A row is fed from its first token without keys, or from the first position that is read if that comes before.
        starts = np.minimum(self._cached[rows], stops - 1 - counts)
        laws, fed = self._run(rows, starts, stops, counts + 1)
        self._cached[rows] = stops
        self.cost += Cost(1, fed, 0)
        return laws

    def _run(self, rows: np.ndarray, starts: np.ndarray, stops: np.ndarray, reads: np.ndarray) -> tuple[Tensor, int]:
        """Laws (Σ reads, V) after the last `reads` (B,) tokens that are fed of each row, and how many tokens were."""
        order = np.argsort(self._slot[rows], kind="stable")
        rows, starts, stops, reads = rows[order], starts[order], stops[order], reads[order]
        tokens = self._packed_tokens(rows, starts, stops - starts)
        laws = None
        if self._graphs is not None:
            laws = self._graphs.laws(tokens, self._slot[rows], starts, stops, reads)
        if laws is None:
            layout = Layout(self._cache, self._slot[rows], starts, stops, reads, self._device)
            laws = run_network(self._network, tokens, layout, self._size)
            layout.require_used(self._window)
        # A NaN anywhere in a row's logits is one everywhere; on an accelerator the check would stall the queue.
        if laws.is_cpu and bool(laws[:, 0].isnan().any()):
            raise NaNLawError(f"{type(self._network).__name__} returned NaN logits; use a wider dtype")
        if not np.array_equal(order, np.arange(len(order))):
            back = np.argsort(order)
            blocks = stretches((np.cumsum(reads) - reads)[back], reads[back])
            laws = laws[on_device(blocks, self._device)]
        return laws, len(tokens)

    def _packed_tokens(self, rows: np.ndarray, starts: np.ndarray, spans: np.ndarray) -> Tensor:
        """Ids (Σ spans,) of the tokens of `rows` from `starts` on, end to end."""
        prompt_length = self._prompt_length[rows]
        step = stretches(starts - prompt_length, spans)
        row = np.repeat(rows, spans)
        if (starts >= prompt_length).all():
            row_, step_ = on_device(np.stack([row, step]), self._device)
            return self._written[row_, step_]
        prompt, position = np.repeat(self._prompt[rows], spans), stretches(starts, spans)
        position = np.minimum(position, self._prompt_tokens.shape[1] - 1)
        row_, step_, prompt_, position_ = on_device(np.stack([row, step, prompt, position]), self._device)
        return torch.where(step_ < 0, self._prompt_tokens[prompt_, position_], self._written[row_, step_.clamp(min=0)])
