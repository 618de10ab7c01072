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

from me_stats.devices import on_device

Stream = Literal["component", "token", "accept", "repair"]

# One Philox key per purpose, so that CE and ME share token randomness whatever else they draw.
# The last two belong to samplers that may throw a draft away.
_STREAM_KEYS: dict[Stream, int] = {"component": 0, "token": 1, "accept": 2, "repair": 3}
BLOCK = 16  # uniforms per row that are generated together; 4 Philox counters of 4 words each
_SEED_BITS = 120  # what Philox's 128-bit key leaves beside the stream
_BESIDE = 3  # blocks that are kept beside the newest one, for rows that stand at different steps
_GAP = 64  # rows that are cheaper to generate and drop than to start a generator anew
PIECE = 512  # tokens of a long law that are added up together; the search then looks inside one piece
_SPACE = 2**20  # masses that stand in memory at a time
UNIFORM_BITS = 53  # uniforms are k·2⁻⁵³, the finest grid on which all of [0, 1) is exact in float64


class Draw(Protocol):
    """Choose one index per row from that row's law."""

    def __call__(
        self, log_law: Tensor, rows: np.ndarray, step: int, *, stream: Stream, index: Tensor | None = None
    ) -> Tensor:
        """Indices (B,) drawn from ``log_law`` (U, V), one for each of the B ``rows``.

        Row b uses law ``index[b]``, or law b if `index` is None. ``rows`` are global row numbers. Samplers ask for
        one step at a time, except where they know that the draw is a `RowStreams`, which takes a step for each row.
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
    if log_law.is_cpu and log_law.shape[1] > PIECE:
        return _by_pieces(log_law, uniforms, index)
    mass = log_law.exp()
    cdf = mass.cumsum(-1, dtype=torch.float64)
    if not cdf.is_cpu:
        # A parallel scan rounds differently at every position; keep only the steps that carry mass.
        cdf = torch.where(mass > 0, cdf, torch.zeros_like(cdf)).cummax(-1).values
    total = cdf[:, -1]
    if cdf.is_cpu:
        _check_totals(total)
    own_total = total if index is None else total[index]
    target = torch.minimum(uniforms * own_total, _below(own_total))
    if index is None:
        return torch.searchsorted(cdf, target[:, None], right=True)[:, 0].clamp_(max=cdf.shape[1] - 1)
    chosen = torch.empty(len(target), dtype=torch.int64, device=cdf.device)
    for law in range(len(cdf)):
        mine = index == law
        chosen[mine] = torch.searchsorted(cdf[law], target[mine], right=True)
    return chosen.clamp_(max=cdf.shape[1] - 1)


def _by_pieces(log_law: Tensor, uniforms: Tensor, index: Tensor | None) -> Tensor:
    """`inverse_cdf` that adds up pieces of 512 tokens and looks inside one: a single pass over a long law."""
    n_laws, size = log_law.shape
    index = torch.arange(n_laws) if index is None else index
    chosen = torch.empty(len(uniforms), dtype=torch.int64)
    height = max(1, _SPACE // size)
    space = log_law.new_empty(min(height, n_laws), size)
    for first in range(0, n_laws, height):
        some = log_law[first : first + height]
        mass = torch.exp(some, out=space[: len(some)])
        ends = _piece_ends(mass)
        _check_totals(ends[:, -1])
        for mine in ((index >= first) & (index < first + height)).nonzero()[:, 0].split(_SPACE // PIECE):
            own = index[mine] - first
            own_ends = ends[own]
            target = torch.minimum(uniforms[mine] * own_ends[:, -1], _below(own_ends[:, -1]))[:, None]
            piece = torch.searchsorted(own_ends, target, right=True)
            before = torch.where(piece > 0, own_ends.gather(1, (piece - 1).clamp_(min=0)), 0.0)
            ids = piece * PIECE + torch.arange(PIECE)
            inside = torch.where(ids < size, mass[own[:, None], ids.clamp(max=size - 1)], 0.0)
            inside = inside.cumsum(1, dtype=torch.float64)
            # The two sums of a piece round differently: what lies between them belongs to its last token with mass.
            rest = torch.minimum(target - before, _below(inside[:, -1:]))
            chosen[mine] = (piece * PIECE + torch.searchsorted(inside, rest, right=True))[:, 0]
    return chosen


def _piece_ends(mass: Tensor) -> Tensor:
    """Float64 sums (U, ⌈V/512⌉) of the masses (U, V) up to the end of each piece."""
    whole = mass.shape[1] // PIECE * PIECE
    sums = mass[:, :whole].unflatten(1, (-1, PIECE)).sum(-1, dtype=torch.float64)
    if whole < mass.shape[1]:
        sums = torch.cat([sums, mass[:, whole:].sum(1, keepdim=True, dtype=torch.float64)], 1)
    return sums.cumsum(1)


def _below(values: Tensor) -> Tensor:
    return torch.nextafter(values, torch.zeros_like(values))


def _check_totals(total: Tensor) -> None:
    if not bool(((total > 0) & total.isfinite()).all()):
        raise ValueError("cannot draw: a next-token law has a NaN or no token with positive probability")


def inverse_cdf_error(log_law: Tensor) -> Tensor:
    r"""Total variation (U,) between each law (U, V) and what `inverse_cdf` draws from it, bounded from above.

    Each token gets the interval between two rounded float64 sums, and the uniforms lie on a grid of 2⁻⁵³, so
    ``½ Σ |width(x) − P(x)| + V 2⁻⁵³`` bounds the distance; the law is the float64 exponential, renormalised. A long law
    is searched in two sums, each rounded once more: another V 2⁻⁵³.

    >>> bool(inverse_cdf_error(torch.randn(3, 1000).log_softmax(-1)).max() < 1e-6)
    True
    """
    mass, size = log_law.exp(), log_law.shape[-1]
    pieces = log_law.is_cpu and size > PIECE
    cdf = _cdf_by_pieces(mass) if pieces else mass.cumsum(-1, dtype=torch.float64)
    widths = torch.diff(cdf / cdf[:, -1:], dim=-1, prepend=torch.zeros(len(cdf), 1, dtype=cdf.dtype, device=cdf.device))
    exact = log_law.double().softmax(-1)
    return (widths - exact).abs().sum(-1) / 2 + size * 2.0**-UNIFORM_BITS * (2 if pieces else 1)


def _cdf_by_pieces(mass: Tensor) -> Tensor:
    """Where `_by_pieces` passes each token: (U, V) float64."""
    ends = _piece_ends(mass)
    padded = torch.nn.functional.pad(mass, (0, ends.shape[1] * PIECE - mass.shape[1]))
    inside = padded.unflatten(1, (-1, PIECE)).cumsum(-1, dtype=torch.float64)
    before = torch.nn.functional.pad(ends[:, :-1], (1, 0))[..., None]
    last = inside == inside[..., -1:]
    return torch.where(last, ends[..., None], torch.minimum(before + inside, ends[..., None])).flatten(1)[
        :, : mass.shape[1]
    ]


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
        # Per stream: the rows that were asked for, sorted, and the blocks (R, 16) of their numbers that are held.
        self._blocks: dict[Stream, tuple[np.ndarray, dict[int, np.ndarray]]] = {}

    def __call__(
        self, log_law: Tensor, rows: np.ndarray, step: int | np.ndarray, *, stream: Stream, index: Tensor | None = None
    ) -> Tensor:
        uniforms = torch.from_numpy(self.uniforms(rows, step, stream=stream))
        return inverse_cdf(log_law, on_device(uniforms, log_law.device), index=index)

    def uniforms(self, rows: np.ndarray, step: int | np.ndarray, *, stream: Stream) -> np.ndarray:
        """Uniforms (B,) float64 in [0, 1) on a grid of 2⁻⁵³, for `rows` at `step`; equal addresses get equal ones.

        `step` is one step for all rows, or (B,) with a step for each.
        """
        if not len(rows):
            return np.empty(0)
        known = self._blocks[stream][0] if stream in self._blocks else np.empty(0, dtype=np.int64)
        place = np.searchsorted(known, rows)
        if not len(known) or (known[np.minimum(place, len(known) - 1)] != rows).any():
            known = np.union1d(known, rows)
            self._blocks[stream] = known, {}
            place = np.searchsorted(known, rows)
        if not isinstance(step, np.ndarray):
            block, offset = divmod(step, BLOCK)
            return self._block(stream, block, others=0)[place, offset]
        blocks, offsets = np.divmod(step, BLOCK)
        first, last = int(blocks.min()), int(blocks.max())
        if first == last:
            return self._block(stream, first)[place, offsets]
        drawn = np.empty(len(rows))
        for block in np.unique(blocks).tolist():
            mine = blocks == block
            drawn[mine] = self._block(stream, block)[place[mine], offsets[mine]]
        return drawn

    def _block(self, stream: Stream, block: int, *, others: int = _BESIDE) -> np.ndarray:
        """Uniforms (R, 16) of all rows that are known; at most so many other blocks stay with them."""
        known, held = self._blocks[stream]
        if block not in held:
            while len(held) > others:
                del held[next(iter(held))]
            held[block] = self.integers(known, block, stream=stream) * 2.0**-UNIFORM_BITS
        return held[block]

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
