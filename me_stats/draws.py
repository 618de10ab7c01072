"""Every random choice of every sampler passes through one injected `Draw`.

In production the draw is `RowStreams`: inverse-CDF on counter-based random numbers, so that a row's
output does not depend on which rows run beside it. In `me_stats.exact` it is an enumerator that walks
every path of the same sampler code.
"""

from __future__ import annotations

import operator
from typing import Literal, Protocol

import numpy as np
import torch
from torch import Tensor

Stream = Literal["component", "token", "accept", "repair"]

# One Philox key per purpose, so that CE and ME share token randomness whatever else they draw.
# The last two belong to samplers that may throw a draft away.
_STREAM_KEYS: dict[Stream, int] = {"component": 0, "token": 1, "accept": 2, "repair": 3}
BLOCK = 16  # uniforms per row that are generated together; 4 Philox counters of 4 words each
_SEED_BITS = 120  # what Philox's 128-bit key leaves beside the stream
_GAP = 64  # rows that are cheaper to generate and drop than to start a generator anew
UNIFORM_BITS = 53  # uniforms are k·2⁻⁵³, the finest grid on which all of [0, 1) is exact in float64


class Draw(Protocol):
    """Choose one index per row from that row's law."""

    def __call__(
        self, log_law: Tensor, rows: np.ndarray, step: int, *, stream: Stream, index: Tensor | None = None
    ) -> Tensor:
        """Indices (B,) drawn from ``log_law`` (U, V), one for each of the B ``rows``.

        Row b uses law ``index[b]``, or law b if `index` is None. ``rows`` are global row numbers.
        """
        ...


def inverse_cdf(log_law: Tensor, uniforms: Tensor, *, index: Tensor | None = None) -> Tensor:
    r"""Smallest x with :math:`\sum_{y \le x} P(y) > u`, for each u in [0, 1).

    The strict inequality gives every token exactly the half-open interval of its mass, so a token of
    probability zero is never returned, at ties or as u → 1.

    Parameters
    ----------
    log_law
        (U, V) natural log-probabilities; rows are renormalised by their float64 sum.
    uniforms
        (B,) float64 in [0, 1).
    index
        (B,) which law each uniform uses; None pairs them one to one (B = U).

    Returns
    -------
    Tensor
        (B,) int64 indices in 0..V-1.

    Raises
    ------
    ValueError
        If a law has a NaN or no token of positive probability (checked on the CPU only: on an
        accelerator a check would copy a value to the host at every token).

    Examples
    --------
    >>> law = torch.tensor([[0.5, 0.0, 0.5]]).log()
    >>> inverse_cdf(law, torch.tensor([0.0, 0.49, 0.5, 1 - 2**-53]), index=torch.zeros(4, dtype=torch.long))
    tensor([0, 0, 2, 2])
    """
    mass = log_law.exp()
    cdf = mass.cumsum(-1, dtype=torch.float64)
    if not cdf.is_cpu:
        # A parallel scan rounds differently at every position; keep only the steps that carry mass.
        cdf = torch.where(mass > 0, cdf, torch.zeros_like(cdf)).cummax(-1).values
    total = cdf[:, -1]
    if cdf.is_cpu and not bool(((total > 0) & total.isfinite()).all()):
        raise ValueError("cannot draw: a next-token law has a NaN or no token with positive probability")
    own_total = total if index is None else total[index]
    target = torch.minimum(uniforms * own_total, torch.nextafter(own_total, torch.zeros_like(own_total)))
    if index is None:
        return torch.searchsorted(cdf, target[:, None], right=True)[:, 0].clamp_(max=cdf.shape[1] - 1)
    chosen = torch.empty(len(target), dtype=torch.int64, device=cdf.device)
    for law in range(len(cdf)):
        mine = index == law
        chosen[mine] = torch.searchsorted(cdf[law], target[mine], right=True)
    return chosen.clamp_(max=cdf.shape[1] - 1)


def inverse_cdf_error(log_law: Tensor) -> Tensor:
    r"""Total variation (U,) between each law (U, V) and what `inverse_cdf` draws from it, bounded from above.

    Each token gets the interval between two rounded float64 sums, and the uniforms lie on a grid of 2⁻⁵³, so
    ``½ Σ |width(x) − P(x)| + V 2⁻⁵³`` bounds the distance; the law is the float64 exponential, renormalised.

    >>> bool(inverse_cdf_error(torch.randn(3, 1000).log_softmax(-1)).max() < 1e-6)
    True
    """
    cdf = log_law.exp().cumsum(-1, dtype=torch.float64)
    widths = torch.diff(cdf / cdf[:, -1:], dim=-1, prepend=torch.zeros(len(cdf), 1, dtype=cdf.dtype, device=cdf.device))
    exact = log_law.double().softmax(-1)
    return (widths - exact).abs().sum(-1) / 2 + log_law.shape[-1] * 2.0**-UNIFORM_BITS


class RowStreams:
    """Independent uniforms addressed by (seed, stream, row, step); nothing is consumed in order.

    Philox4x64-10 (Salmon et al. 2011) as shipped by numpy, keyed by seed and stream, with the row and
    the step in the counter. A row therefore sees the same numbers in any batch, in any order and on any
    machine, and the component path of a row is known before its first forward. Seeds have up to 120 bits.

    >>> streams = RowStreams(seed=7)
    >>> alone = streams.uniforms(np.array([5]), step=3, stream="token")
    >>> beside = streams.uniforms(np.array([9, 5, 4]), step=3, stream="token")
    >>> bool(alone[0] == beside[1])
    True
    """

    def __init__(self, seed: int) -> None:
        self.seed = operator.index(seed)
        if not 0 <= self.seed < 2**_SEED_BITS:
            raise ValueError(f"seed must lie in 0..2**{_SEED_BITS} - 1, got {seed}")
        self._blocks: dict[Stream, tuple[int, np.ndarray, np.ndarray]] = {}

    def __call__(
        self, log_law: Tensor, rows: np.ndarray, step: int, *, stream: Stream, index: Tensor | None = None
    ) -> Tensor:
        uniforms = torch.from_numpy(self.uniforms(rows, step, stream=stream))
        return inverse_cdf(log_law, uniforms.to(log_law.device, non_blocking=True), index=index)

    def uniforms(self, rows: np.ndarray, step: int, *, stream: Stream) -> np.ndarray:
        """Uniforms (B,) float64 in [0, 1) on a grid of 2⁻⁵³, for `rows` at `step`; equal rows get equal ones."""
        if not len(rows):
            return np.empty(0)
        block, offset = divmod(step, BLOCK)
        cached = self._blocks.get(stream)
        known = cached[1] if cached is not None else np.empty(0, dtype=np.int64)
        place = np.searchsorted(known, rows)
        missing = bool((known[np.minimum(place, len(known) - 1)] != rows).any()) if len(known) else True
        if cached is None or cached[0] != block or missing:
            known = np.union1d(known, rows) if missing else known
            cached = (block, known, self.integers(known, block, stream=stream) * 2.0**-UNIFORM_BITS)
            self._blocks[stream] = cached
            place = np.searchsorted(known, rows)
        return cached[2][place, offset]

    def integers(self, rows: np.ndarray, block: int, *, stream: Stream) -> np.ndarray:
        """Integers k (B, 16) of the uniforms k·2⁻⁵³ at steps 16·block to 16·block + 15 of sorted `rows`."""
        key = np.array([self.seed % 2**64, _STREAM_KEYS[stream] + (self.seed >> 64 << 8)], dtype=np.uint64)
        runs = []
        for near in np.split(rows, np.flatnonzero(np.diff(rows) > _GAP) + 1):
            counter = np.array([int(near[0]) * (BLOCK // 4), block, 0, 0], dtype=np.uint64)
            words = np.random.Philox(key=key, counter=counter).random_raw(int(near[-1] - near[0] + 1) * BLOCK)
            words >>= np.uint64(64 - UNIFORM_BITS)
            runs.append(words.view(np.int64).reshape(-1, BLOCK)[near - near[0]])
        return runs[0] if len(runs) == 1 else np.concatenate(runs)
