"""Attention over rows that are packed end to end, under names that transformers finds.

Every linear layer works on one sequence without padding. Inside attention the spans are unfolded to one line per row
and meet that row's own keys in a slot cache.
"""

from __future__ import annotations

import sys
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import eager_mask, sdpa_mask

from me_stats.models.layout import Layout

# The names under which transformers finds the attention below: for the usual scaled dot product, and for
# models with soft-capped scores or attention sinks, which exist in those models' own eager code only.
ATTENTION, EAGER_ATTENTION = "me_stats_ragged", "me_stats_ragged_eager"

_KNOWN_LAYERS = {"full_attention", "sliding_attention"}


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
    lines, keys, values, window = _unfold(module, query, key, value, attention_mask, ragged, kwargs)
    rows, heads, span, width = lines.shape
    # Query heads that share a key head become extra query positions, so keys are never repeated.
    groups = heads // keys.shape[1]
    grouped = lines.reshape(rows, keys.shape[1], groups * span, width)
    mask = ragged.wide_mask(window, groups)
    out = scaled_dot_product_attention(grouped, keys, values, attn_mask=mask, scale=kwargs.get("scaling"))
    return ragged.packed(out.reshape(rows, heads, span, values.shape[3]).transpose(1, 2)), None


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
    lines, keys, values, window = _unfold(module, query, key, value, attention_mask, ragged, kwargs)
    mask, additive = ragged.mask(window), None
    if mask is not None:
        additive = torch.zeros(mask.shape, dtype=query.dtype, device=query.device)
        additive.masked_fill_(~mask, torch.finfo(query.dtype).min)
    return ragged.packed(eager(module, lines, keys, values, additive, **kwargs)[0]), None


def _unfold(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    given: Tensor | None,
    ragged: Layout,
    kwargs: dict[str, Any],
) -> tuple[Tensor, Tensor, Tensor, int | None]:
    """Queries (R, H, S, D) one line per row, the keys and values that each row sees, and the sliding window."""
    if given is not None and given.numel() > 1:
        raise ValueError("its attention builds a mask of its own")
    # Some models tell attention about the window, others keep it on the module.
    window = kwargs["sliding_window"] if "sliding_window" in kwargs else getattr(module, "sliding_window", None)
    keys, values = ragged.store(module.layer_idx, key, value)  # type: ignore[arg-type]
    return ragged.lines(query), keys, values, window


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
