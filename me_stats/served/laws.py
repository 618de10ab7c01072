"""Laws of which only the most probable tokens are known: the missing mass is carried as an interval, never hidden."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from me_stats.mixing import ConstantMixing


@dataclass(frozen=True)
class PartialLaws:
    """B laws over V tokens, each known on some of them.

    Attributes
    ----------
    ids
        (B, n) int64, tokens that are listed; -1 pads.
    log_probs
        (B, n) float64, natural logs of the mass that is known to lie on them; -inf where padded.
    missing
        (B,) float64, mass that is known to exist but not where.
    size
        V.
    closed
        The missing mass lies outside the listed ids, as in a top-n list. False for a mixture of several lists: a token
        that one component lists and another does not may have more than its listed mass.
    """

    ids: Tensor
    log_probs: Tensor
    missing: Tensor
    size: int
    closed: bool = True

    def dense(self) -> Tensor:
        """Known mass (B, V), summing to 1 - `missing`."""
        mass = torch.zeros(len(self.ids), self.size + 1, dtype=torch.float64)
        mass.scatter_(1, self.ids % (self.size + 1), self.log_probs.double().exp())
        return mass[:, : self.size]

    def listed(self) -> Tensor:
        """(B, V) True where a token is listed."""
        known = torch.zeros(len(self.ids), self.size + 1, dtype=torch.bool)
        known.scatter_(1, self.ids % (self.size + 1), torch.ones_like(self.ids, dtype=torch.bool))
        return known[:, : self.size]


def tv_interval(first: PartialLaws, second: PartialLaws | Tensor) -> tuple[Tensor, Tensor]:
    r"""The smallest and the largest total variation (B,) that laws with these known parts can have.

    :math:`TV = 1 - \sum_x \min(p_x, q_x)`. The known parts overlap at least by the sum over minima; at most, missing
    mass fills the other law's excess first, and what is left of both overlaps itself. `second` may be log-laws (B, V).

    Raises
    ------
    ValueError
        For another number of laws or tokens.

    >>> ids = torch.tensor([[0, 1]])
    >>> known = PartialLaws(ids, torch.tensor([[0.6, 0.2]]).log(), torch.tensor([0.2]), size=4)
    >>> low, high = tv_interval(known, torch.tensor([[0.5, 0.2, 0.2, 0.1]]).log())
    >>> round(float(low), 6), round(float(high), 6)
    (0.1, 0.3)
    """
    other = second if isinstance(second, PartialLaws) else _whole(second)
    if (len(first.ids), first.size) != (len(other.ids), other.size):
        raise ValueError(
            f"both must be laws over the same tokens, got {len(first.ids)} over {first.size} and "
            f"{len(other.ids)} over {other.size}"
        )
    p, q = first.dense(), other.dense()
    overlap = torch.minimum(p, q).sum(1)
    # Excess of one law that the missing mass of the other can lie under.
    over_p = ((p - q).clamp(min=0) * (~other.listed() | (not other.closed))).sum(1)
    over_q = ((q - p).clamp(min=0) * (~first.listed() | (not first.closed))).sum(1)
    fill_p, fill_q = torch.minimum(other.missing, over_p), torch.minimum(first.missing, over_q)
    most = overlap + fill_p + fill_q + torch.minimum(other.missing - fill_p, first.missing - fill_q)
    return (1 - most).clamp(0, 1), (1 - overlap).clamp(0, 1)


def mix_partial(laws: Sequence[PartialLaws], weights: Sequence[float]) -> PartialLaws:
    r"""The mixture :math:`\sum_i λ_i P_i` of partial laws; its missing mass is :math:`\sum_i λ_i m_i`.

    >>> a = PartialLaws(torch.tensor([[0]]), torch.tensor([[0.9]]).log(), torch.tensor([0.1]), size=3)
    >>> b = PartialLaws(torch.tensor([[1]]), torch.tensor([[0.7]]).log(), torch.tensor([0.3]), size=3)
    >>> both = mix_partial([a, b], [0.5, 0.5])
    >>> [round(p, 6) for p in both.dense()[0].tolist()], round(float(both.missing), 6), both.closed
    ([0.45, 0.35, 0.0], 0.2, False)
    """
    if len({(len(law.ids), law.size) for law in laws}) != 1 or len(weights) != len(laws):
        raise ValueError("laws must hold PartialLaws of as many rows and tokens each, and weights one weight for each")
    shares = ConstantMixing(weights).weights.tolist()
    mass = sum((share * law.dense() for share, law in zip(shares, laws, strict=True)), torch.zeros(()))
    listed = torch.stack([law.listed() for law in laws])
    anywhere, width = listed.any(0), int(listed.any(0).sum(1).max())
    ids = torch.where(anywhere, torch.arange(laws[0].size), laws[0].size).sort(1).values[:, :width]
    padded = ids == laws[0].size
    picked = mass.gather(1, ids.clamp(max=laws[0].size - 1)).masked_fill(padded, 0.0)
    missing = sum((share * law.missing for share, law in zip(shares, laws, strict=True)), torch.zeros(()))
    # One list is the same as another only where all components list the same tokens, and know all of their mass there.
    closed = all(law.closed for law in laws) and bool((listed == anywhere).all())
    return PartialLaws(ids.masked_fill(padded, -1), picked.log(), missing, laws[0].size, closed)


def _whole(laws: Tensor) -> PartialLaws:
    ids = torch.arange(laws.shape[1]).expand(len(laws), -1)
    return PartialLaws(ids, laws.double(), torch.zeros(len(laws), dtype=torch.float64), laws.shape[1])
