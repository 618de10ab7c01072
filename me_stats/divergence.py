"""Divergences between laws given as natural log-probabilities.

Every function takes two arrays of the same shape, laws along `axis` (the last one by default), and returns
a float64 tensor with that axis removed, or a float where nothing is left. A zero probability is -inf.
Symbols of probability zero under both laws contribute nothing. Where p puts mass on a symbol that q
excludes, KL(p‖q) and χ²(p‖q) are +inf: that infinity is a flag, not an error, and `escaped_mass` says how
much mass escaped. The result is never NaN.

Sums run in float64 over blocks of rows, so a (1000, 262144) float32 pair is never copied to float64 whole. TV and KL
of long float32 laws are first computed in float32: its rounding moves p by |log p| 2⁻²³, as much as the rounding that
the input has undergone, which is 1e-6 of a law at most. What comes out below `FLOOR` or is not finite is computed again
in float64, so small divergences keep all their digits.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TypeAlias

import numpy as np
import torch
from numpy.typing import ArrayLike
from torch import Tensor

LogProbs: TypeAlias = Tensor | ArrayLike
Kernel: TypeAlias = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
Float32Kernel: TypeAlias = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor], Tensor]

# How far a row may sum from 1. log_softmax in float32 over 262,144 tokens is 1e-5 off, and float64 has to let such
# rows through once they are widened. Below that, rounding log p between -16 and -8 moves p by up to 8 eps, always
# the same way for a uniform law: 3% in bfloat16.
SUM_TOLERANCE = {torch.float64: 1e-4, torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 5e-2}
# Elements of one block. On a processor its float64 temporaries should stay in cache; an accelerator wants
# fewer launches.
CPU_BLOCK, DEVICE_BLOCK = 2**17, 2**24
# Laws of this many tokens go through float32 first; its blocks are half as wide, and long enough for every thread.
LONG, FLOAT32_BLOCK = 2**13, 2**20
FLOOR = 1e-2
_PIECE = 512  # float32 numbers that are added up before float64 takes over
_LOG2_E = math.log2(math.e)
_HUGE = 1e300  # stands for an infinite log-ratio, which times 0 would be NaN


def tv_distance(log_p: LogProbs, log_q: LogProbs, *, axis: int = -1, check: bool = True) -> Tensor | float:
    """Total variation ½ Σ |p − q|, in [0, 1]: the largest gap between the two laws on any event.

    Parameters
    ----------
    log_p, log_q
        Natural log-probabilities of one shape, any number of axes, laws along `axis`; tensors or array-likes.
    axis
        The axis that is summed over.
    check
        Refuse rows that are not laws: NaN, a probability above 1, a sum away from 1. False trusts the caller.

    Raises
    ------
    ValueError
        Shapes or devices differ, or a row is not a law; the message names the argument.
    TypeError
        The input is not real floating-point.

    Examples
    --------
    >>> laws = torch.tensor([[0.75, 0.25], [0.5, 0.5]], dtype=torch.float64).log()
    >>> tv_distance(laws[0], laws[1])
    0.25
    >>> tv_distance(laws, laws.flip(1))
    tensor([0.5000, 0.0000], dtype=torch.float64)
    """
    return _reduce(_tv_kernel, log_p, log_q, axis, check)


def kl_divergence(log_p: LogProbs, log_q: LogProbs, *, axis: int = -1, check: bool = True) -> Tensor | float:
    """Kullback–Leibler divergence KL(p‖q) = Σ p (log p − log q), in nats.

    Computed as Σ p (log p − log q) − Σp + Σq: the same for laws, and free of the first-order rounding that
    float32 rows bring, so that it is never negative. +inf where q excludes a symbol that p allows; see
    `escaped_mass` for the bound that remains. Arguments and errors as in `tv_distance`.

    Examples
    --------
    >>> kl_divergence([math.log(0.5), math.log(0.5)], [math.log(0.25), math.log(0.75)])
    0.1438...
    >>> kl_divergence([math.log(0.5), math.log(0.5)], [0.0, -math.inf])
    inf
    """
    return _reduce(_kl_kernel, log_p, log_q, axis, check)


def chi_square_divergence(log_p: LogProbs, log_q: LogProbs, *, axis: int = -1, check: bool = True) -> Tensor | float:
    """Pearson divergence χ²(p‖q) = Σ (p − q)² / q, at least 4 TV².

    n times this is the noncentrality of Pearson's statistic when n draws of p are tested against q. +inf
    where q excludes a symbol that p allows; see `escaped_mass`. Arguments and errors as in `tv_distance`.

    Examples
    --------
    >>> round(chi_square_divergence([math.log(0.6), math.log(0.4)], [math.log(0.5), math.log(0.5)]), 12)
    0.04
    """
    return _reduce(_chi_square_kernel, log_p, log_q, axis, check)


def hellinger_distance(log_p: LogProbs, log_q: LogProbs, *, axis: int = -1, check: bool = True) -> Tensor | float:
    """Hellinger distance H = √(½ Σ (√p − √q)²), in [0, 1]; H² ≤ TV ≤ √2 H.

    Arguments and errors as in `tv_distance`.

    Examples
    --------
    >>> hellinger_distance([0.0, -math.inf], [-math.inf, 0.0])
    1.0
    """
    return _reduce(_hellinger_kernel, log_p, log_q, axis, check)


def js_divergence(log_p: LogProbs, log_q: LogProbs, *, axis: int = -1, check: bool = True) -> Tensor | float:
    """Jensen–Shannon divergence ½ KL(p‖m) + ½ KL(q‖m) with m = (p + q)/2, in nats, in [0, log 2].

    Finite for any two laws. Arguments and errors as in `tv_distance`.

    Examples
    --------
    >>> js_divergence([0.0, -math.inf], [-math.inf, 0.0]) == math.log(2)
    True
    """
    return _reduce(_js_kernel, log_p, log_q, axis, check)


def escaped_mass(log_p: LogProbs, log_q: LogProbs, *, axis: int = -1, check: bool = True) -> Tensor | float:
    """Mass that p puts outside the support of q: P_p(q = 0), in [0, 1].

    What to quote when KL(p‖q) or χ²(p‖q) is infinite. It bounds TV from below, at one step and for
    sequences: TV_seq ≥ P(some token outside the support). Arguments and errors as in `tv_distance`.

    Examples
    --------
    >>> escaped_mass([math.log(0.75), math.log(0.25)], [0.0, -math.inf])
    0.25
    """
    return _reduce(_escaped_kernel, log_p, log_q, axis, check)


# A kernel may overwrite its arguments, which are copies.
def _tv_kernel(log_p: Tensor, log_q: Tensor, p: Tensor, q: Tensor) -> Tensor:
    return p.sub_(q).abs_().sum(-1).mul_(0.5).clamp_(max=1.0)


def _kl_kernel(log_p: Tensor, log_q: Tensor, p: Tensor, q: Tensor) -> Tensor:
    # Ask the logarithms, not p: exp(-800) is 0 in float64, and 0 · inf would be NaN.
    log_ratio = log_p.sub_(log_q).nan_to_num_(nan=0.0, posinf=_HUGE, neginf=0.0)
    escapes = log_ratio.amax(-1) == _HUGE
    total = (q.sum(-1) - p.sum(-1)).add_(p.mul_(log_ratio).sum(-1))
    return total.clamp_(min=0.0).masked_fill_(escapes, math.inf)


def _chi_square_kernel(log_p: Tensor, log_q: Tensor, p: Tensor, q: Tensor) -> Tensor:
    log_ratio = (log_p - log_q).nan_to_num_(nan=0.0, posinf=math.inf, neginf=-math.inf)
    # q (p/q − 1)² does not cancel for close laws; p²/q − 2p + q is no 0 · inf where q underflows.
    close = q * torch.expm1(log_ratio).square_()
    far = torch.exp(log_p + log_ratio) - 2.0 * p + q
    return torch.where(log_ratio < 1.0, close, far).sum(-1)


def _hellinger_kernel(log_p: Tensor, log_q: Tensor, p: Tensor, q: Tensor) -> Tensor:
    return p.sqrt_().sub_(q.sqrt_()).square_().sum(-1).mul_(0.5).sqrt_().clamp_(max=1.0)


def _js_kernel(log_p: Tensor, log_q: Tensor, p: Tensor, q: Tensor) -> Tensor:
    # log p/m = log 2 + logsigmoid(log p/q). A ratio beyond e^1000 leaves exactly 0 in the smaller law.
    log_ratio = (log_p - log_q).nan_to_num_(nan=0.0, posinf=1e3, neginf=-1e3)
    log_sigmoid = torch.nn.functional.logsigmoid
    terms = p * (math.log(2) + log_sigmoid(log_ratio)) + q * (math.log(2) + log_sigmoid(-log_ratio))
    return terms.sum(-1).mul_(0.5).clamp_(min=0.0, max=math.log(2))


def _escaped_kernel(log_p: Tensor, log_q: Tensor, p: Tensor, q: Tensor) -> Tensor:
    return p.masked_fill_(log_q > -math.inf, 0.0).sum(-1).clamp_(max=1.0)


def _tv_float32(log_p: Tensor, log_q: Tensor, p: Tensor, q: Tensor, total_p: Tensor, total_q: Tensor) -> Tensor:
    # ½ |p − q| = max(p, q) − ½ (p + q): the sums of p and q are there already. What cancels here is above `FLOOR`.
    return row_totals(torch.maximum(p, q, out=p)).sub_((total_p + total_q) / 2).clamp_(max=1.0)


def _kl_float32(log_p: Tensor, log_q: Tensor, p: Tensor, q: Tensor, total_p: Tensor, total_q: Tensor) -> Tensor:
    # Where either excludes a symbol this is not finite, and float64 sorts it out.
    return row_totals(torch.sub(log_p, log_q, out=q).mul_(p)) + (total_q - total_p)


_IN_FLOAT32: dict[Kernel, Float32Kernel] = {_tv_kernel: _tv_float32, _kl_kernel: _kl_float32}


@torch.no_grad()
def _reduce(kernel: Kernel, log_p: LogProbs, log_q: LogProbs, axis: int, check: bool) -> Tensor | float:
    """Apply `kernel` to blocks of rows; the one place that validates."""
    p_rows, q_rows = _as_tensor("log_p", log_p), _as_tensor("log_q", log_q)
    if p_rows.shape != q_rows.shape:
        raise ValueError(
            f"log_p has shape {tuple(p_rows.shape)} and log_q {tuple(q_rows.shape)}: give both the same shape"
        )
    if p_rows.device != q_rows.device:
        raise ValueError(f"log_p is on {p_rows.device} and log_q on {q_rows.device}: move one of them")
    if p_rows.ndim == 0 or not -p_rows.ndim <= axis < p_rows.ndim:
        raise ValueError(f"axis {axis} does not exist in log_p of shape {tuple(p_rows.shape)}")
    p_rows, q_rows = p_rows.movedim(axis, -1), q_rows.movedim(axis, -1)
    shape, size = p_rows.shape[:-1], p_rows.shape[-1]
    if size == 0:
        raise ValueError(f"log_p has no symbols along axis {axis}: a law needs at least one")
    p_rows, q_rows = p_rows.reshape(-1, size), q_rows.reshape(-1, size)

    out = torch.empty(p_rows.shape[0], dtype=torch.float64, device=p_rows.device)
    if kernel in _IN_FLOAT32 and out.is_cpu and size >= LONG and p_rows.dtype == q_rows.dtype == torch.float32:
        _float32_blocks(_IN_FLOAT32[kernel], p_rows, q_rows, out, check)
        unsure = ~((out >= FLOOR) & out.isfinite())
        _float64_blocks(kernel, p_rows, q_rows, out, False, unsure.nonzero()[:, 0])
    else:
        _float64_blocks(kernel, p_rows, q_rows, out, check)
    return out.reshape(shape) if shape else out.item()


def _float64_blocks(
    kernel: Kernel, p_rows: Tensor, q_rows: Tensor, out: Tensor, check: bool, chosen: Tensor | None = None
) -> None:
    """Write `out` for the `chosen` rows, or all."""
    count = len(out) if chosen is None else len(chosen)
    step = max(1, (CPU_BLOCK if out.is_cpu else DEVICE_BLOCK) // p_rows.shape[1])
    # The space of one block serves all: fresh pages for every temporary cost more than the arithmetic.
    space = torch.empty((4, min(step, count), p_rows.shape[1]), dtype=torch.float64, device=out.device)
    for start in range(0, count, step):
        block = slice(start, start + step) if chosen is None else chosen[start : start + step]
        log_p, log_q, p, q = space[:, : count - start]
        exponentials(log_p.copy_(p_rows[block]), p)
        exponentials(log_q.copy_(q_rows[block]), q)
        if check:
            _check_law("log_p", p.sum(-1), p_rows.dtype)
            _check_law("log_q", q.sum(-1), q_rows.dtype)
        out[block] = kernel(log_p, log_q, p, q)


def _float32_blocks(kernel: Float32Kernel, p_rows: Tensor, q_rows: Tensor, out: Tensor, check: bool) -> None:
    step = max(1, FLOAT32_BLOCK // p_rows.shape[1])
    space = torch.empty(2, min(step, len(out)), p_rows.shape[1])
    for start in range(0, len(out), step):
        block = slice(start, start + step)
        log_p, log_q = p_rows[block], q_rows[block]
        p, q = (exponentials(law, place[: len(law)]) for law, place in zip((log_p, log_q), space, strict=True))
        total_p, total_q = row_totals(p), row_totals(q)
        if check:
            _check_law("log_p", total_p, p_rows.dtype)
            _check_law("log_q", total_q, q_rows.dtype)
        out[block] = kernel(log_p, log_q, p, q, total_p, total_q)


def exponentials(values: Tensor, out: Tensor) -> Tensor:
    """e^values, written to `out`: through exp2, which torch computes about four times faster on some processors."""
    return torch.mul(values, _LOG2_E, out=out).exp2_()


def row_totals(values: Tensor) -> Tensor:
    """Sums (R,) of the rows of a float32 (R, V), in float64 but for pieces that are too short to lose anything."""
    whole = values.shape[1] // _PIECE * _PIECE
    pieces = values[:, :whole].unflatten(-1, (-1, _PIECE)).sum(-1)
    return pieces.sum(-1, dtype=torch.float64) + values[:, whole:].sum(-1, dtype=torch.float64)


def _as_tensor(name: str, value: LogProbs) -> Tensor:
    if not isinstance(value, Tensor):
        array = np.asarray(value)
        if array.dtype.kind not in "fiu":
            raise TypeError(f"{name} must hold real numbers, not {array.dtype}")
        # Integers and Python lists become float64; torch takes neither read-only nor reversed arrays.
        floats = array if array.dtype in (np.float16, np.float32) else array.astype(np.float64, copy=False)
        value = torch.from_numpy(np.require(floats, requirements=["C", "W"]))
    if value.dtype not in SUM_TOLERANCE:
        raise TypeError(f"{name} must hold real floating-point numbers of 16 bits or more, not {value.dtype}")
    return value


def _check_law(name: str, totals: Tensor, dtype: torch.dtype) -> None:
    """The sums of a law's probabilities show everything: NaN spreads into them, a probability above 1 lifts them."""
    tolerance = SUM_TOLERANCE[dtype]
    worst = (totals - 1.0).abs().max().item()
    if not worst <= tolerance:
        raise ValueError(
            f"{name} is not a law: it contains NaN"
            if math.isnan(worst)
            else f"{name} is not a law: a row of probabilities is {worst:.3g} away from summing to 1 "
            f"(tolerance {tolerance:g} for {dtype}); pass log_softmax output"
        )
