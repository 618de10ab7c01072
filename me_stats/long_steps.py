"""Summaries of one step whose laws are long and float32: few passes over memory, one step at a time.

`steps.step_scores` in float64 makes a dozen arrays of the size of its laws. Here the laws stay float32, in space that
serves every step, and only sums and the realised token are float64. The rounding is that of the laws themselves: 1e-6
of a probability at most. Components so close that it would show are left to float64.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from me_stats.divergence import exponentials, row_totals

Floats = NDArray[np.float64]

_TINY = torch.finfo(torch.float32).tiny
_CLOSE = 1e-4  # information per step below which float32 might move a direction by a percent


class LongSteps:
    """Space for steps of K components over V tokens."""

    def __init__(self, components: int, tokens: int) -> None:
        self._parts, self._rest = torch.empty(components, tokens), torch.empty(3, tokens)

    def sums(self, log_laws: Tensor, log_weights: Tensor, token: int) -> dict[str, Any] | None:
        """Fields of `steps.StepScores` for `token` under float32 laws (K, V) and normalised `log_weights` (K,).

        None asks for float64: a law that is none, a token of probability zero, or components (of positive weight)
        that are too close.
        """
        parts, (p, log_p, free) = self._parts, self._rest
        mass = row_totals(exponentials(log_laws, parts))
        log_mass = mass.log()
        if not bool((log_mass.abs() < 1e-3).all()):
            return None
        weights = log_weights.exp()
        torch.mv(parts.T, (weights / mass).float(), out=p)
        # Nothing is lost: all tokens below the smallest normal float32 have 1e-32 together.
        torch.log(p.clamp_(min=_TINY), out=log_p)
        total = float(_total(p))
        entropy = -float(_total(torch.mul(p, log_p, out=free))) / total
        log_p.add_(entropy)
        variance = float(_total(torch.mul(p, log_p, out=free).mul_(log_p))) / total
        below_rank = self._mass_before(p, token, descending=True)
        if float(weights[0]) < 1:
            below_ratio = self._mass_before(torch.sub(log_laws[0], log_p, out=log_p), token)
        else:  # P_1 is p: all ratios tie
            below_ratio = float(_total(p[:token]))
        information = self._information(weights.numpy(), mass.numpy())
        log_own = log_laws[:, token].double() - log_mass
        at = torch.logsumexp(log_own + log_weights, 0)
        if information is None or at.exp() == 0:
            return None
        score = (0.5 * log_weights + log_own - at).exp() - (0.5 * log_weights).exp()
        return {
            "score": score.numpy(),
            "information": information,
            "log_p": float(at),
            "entropy": entropy,
            "variance": variance,
            "p": float(at.exp()),
            "below_ratio": below_ratio,
            "below_rank": below_rank,
            "mask": True,
            "impossible": False,
        }

    def _mass_before(self, key: Tensor, token: int, *, descending: bool = False) -> float:
        """Mass of the tokens whose key comes first; ties by id."""
        p, before, own = self._rest[0], self._rest[2], key[token]
        first, strictly = (torch.ge, torch.gt) if descending else (torch.le, torch.lt)
        first(key[:token], own, out=before[:token])
        strictly(key[token:], own, out=before[token:])
        return float(_total(before.mul_(p)))

    def _information(self, weights: Floats, mass: Floats) -> Floats | None:
        """Σ p s sᵀ (K, K), which uses up the space of the parts and of p."""
        live = np.flatnonzero(weights)
        information = np.zeros((len(weights), len(weights)))
        if len(live) < 2:
            return information
        p, heaviest = self._rest[0], live[np.argmax(weights[live])]
        others = live[live != heaviest]
        # u_i = (P_i - p)/sqrt(p) does not cancel where components are close, as P_i P_j/p - 1 would.
        gaps = self._parts[: len(others)]
        for row, i in enumerate(others.tolist()):
            torch.sub(self._parts[i], p, alpha=float(mass[i]), out=gaps[row])
        gaps.mul_(torch.rsqrt(p, out=p))
        gram = (gaps @ gaps.mT).double().numpy() / np.outer(mass[others], mass[others])
        if not float(np.linalg.eigvalsh(gram * np.sqrt(np.outer(weights[others], weights[others])))[0]) > _CLOSE:
            return None
        # The heaviest follows, since the weighted gaps add up to nothing.
        extend = np.zeros((len(weights), len(others)))
        extend[others, np.arange(len(others))] = 1.0
        extend[heaviest] = -weights[others] / weights[heaviest]
        extend *= np.sqrt(weights)[:, None]
        information = extend @ gram @ extend.T
        return np.asarray((information + information.T) / 2)


def _total(values: Tensor) -> Tensor:
    return row_totals(values[None])[0]
