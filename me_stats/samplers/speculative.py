"""Any law, drafted by ME: draft a few tokens, check them in one pass of all networks, repair the first that fails."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from me_stats.devices import on_device
from me_stats.draws import Draw, Stream
from me_stats.models.base import Cost, require_language_model
from me_stats.models.ensemble import Ensemble
from me_stats.models.shared import Reading, SharedSession
from me_stats.samplers.base import Run, Sampler, rows_that_fit


class SpeculativeSampler(Sampler):
    r"""Draws from any `target` by checking drafts of another model: exact for every transform, greedy included.

    At a prefix with target law q and draft law p, a drafted token x ~ p is accepted with probability
    :math:`\min(1, q(x)/p(x))`; if not, the token is drawn from :math:`(q - p)_+` renormalised. The token has the law q,
    and is accepted with probability :math:`\sum_x \min(p, q) = 1 - \mathrm{TV}(p, q)`: the distance between two orders
    of a transform is the price of the repair.

    A round drafts `chunk` tokens, one run each of the component that is drawn, and then reads every network once at
    all their positions. Networks that target and draft have in common run once for both (`networks`). With L distinct
    networks and acceptance a that does not change along a row, a round of c + L forwards writes
    :math:`(1 - a^{c+1})/(1 - a)` tokens; CE needs L a token.

    Parameters
    ----------
    target
        The law to draw from: any LanguageModel, such as ``Warped(Ensemble(models, mixing), TopK(10))`` or a
        `PublishedCE`.
    draft
        Any LanguageModel over the same vocabulary. An `Ensemble` is sampled as ME does, one component a token.
    chunk
        c >= 1. It changes the speed and not the tokens.

    Raises
    ------
    TypeError, ValueError
        For what is no LanguageModel, vocabularies that differ, or a chunk below 1.

    Notes
    -----
    p is the law of the whole draft, Σ λ_i P_i, not that of the component m that wrote x. The acceptance by
    min(1, q/P_m) with repairs from (q - P_m)_+ is exact too, for every m, and never accepts more: its rate is
    1 - Σ λ_m TV(P_m, q), and TV is convex (equal where q is one token, as under greedy). It would spare the other laws
    of a draft whose networks the target does not read; where they are shared, all K are read for q anyway, and p costs
    nothing.

    Random numbers are addressed by row and token, as ME's are. A draft behind a rejected token is forgotten before
    anything depended on it, so its numbers are fresh when the position is drafted again; and the last position of a
    round, whose laws are there, is drafted and checked like the others. Every written token has thus used the numbers
    of its own position only: the output is the same for every chunk, and equal to ME's of the same seed up to the
    first rejection. All of it holds up to the rounding of the networks, as for `Sampler.sample`.

    Source: Leviathan, Kalman, Matias (2023), Fast inference from transformers via speculative decoding, ICML; Chen et
    al. (2023), arXiv 2302.01318. Its use as the repair of ME is ours.

    Examples
    --------
    >>> from me_stats.exact import sampler_law, sequence_law
    >>> from me_stats.mixing import ConstantMixing
    >>> from me_stats.models import Greedy, MarkovModel, Warped
    >>> toys, mixing = [MarkovModel.random(3, seed=s) for s in (0, 1)], ConstantMixing([0.3, 0.7])
    >>> target = Warped(Ensemble(toys, mixing), Greedy())
    >>> sampler = SpeculativeSampler(target, Ensemble(toys, mixing), chunk=1)
    >>> law = sampler_law(sampler, [0], max_new_tokens=2)
    >>> law.tv_distance(sequence_law(target, [0], max_new_tokens=2)) < 1e-12
    True
    """

    def __init__(self, target: Any, draft: Any, *, chunk: int = 4) -> None:
        super().__init__(target)
        require_language_model(draft, name="draft")
        target.vocabulary.require_equal(draft.vocabulary, name="target", other_name="draft")
        if not isinstance(chunk, (int, np.integer)) or chunk < 1:
            raise ValueError(f"chunk must be an integer of at least 1, got {chunk!r}")
        self.draft, self.chunk = draft, int(chunk)
        # Rows, verdicts and their probabilities, for the copy that `measure_acceptance` runs.
        self._verdicts: list[tuple[np.ndarray, np.ndarray, np.ndarray]] | None = None

    def _run_batch(self, run: Run) -> tuple[Tensor, Tensor | None, Cost]:
        session = SharedSession((self.model, self.draft), run.starts, max_new_tokens=run.max_new_tokens)
        grid = np.full((len(run.numbers), run.max_new_tokens), -1, dtype=np.int64)
        eos = np.array(self.model.vocabulary.eos, dtype=np.int64)
        watch = run.watch(self.model.vocabulary)
        written = np.zeros(len(run.numbers), dtype=np.int64)
        active = np.arange(len(run.numbers))
        while len(active):
            drafts = _Round(self, session, active, run.numbers, written, run.max_new_tokens, run.draw)
            tokens, lengths = drafts.write(eos)
            for place, row in enumerate(active.tolist()):
                grid[row, written[row] : written[row] + lengths[place]] = tokens[place, : lengths[place]]
            written[active] += lengths
            run.note(int(lengths.sum()))
            new = np.arange(tokens.shape[1]) < lengths[:, None]
            watch.see(np.repeat(active, lengths), torch.from_numpy(tokens[new]))
            active = active[(written[active] < run.max_new_tokens) & watch.alive[active]]
        return torch.from_numpy(grid), None, session.cost

    def _propose(self, reading: Reading, rows: np.ndarray, steps: np.ndarray, draw: Draw) -> np.ndarray:
        """A token (B,) of the draft at each prefix of `reading`."""
        draft = self.draft
        if not isinstance(draft, Ensemble):
            return _drawn(draw, reading.law(draft), rows, steps, "token")
        chosen = _drawn(draw, reading.log_weights(draft.mixing), rows, steps, "component")
        tokens = np.zeros(len(rows), dtype=np.int64)
        for i in np.unique(chosen).tolist():
            mine = np.flatnonzero(chosen == i)
            law = reading.at(mine).law(draft.components[i])
            tokens[mine] = _drawn(draw, law, rows[mine], steps[mine], "token")
        return tokens

    def _proposal(self, reading: Reading, rows: np.ndarray, steps: np.ndarray) -> Tensor:
        """The law (B, V) that each draft is judged by: the whole draft's."""
        return reading.law(self.draft)

    def _left_over(self, reading: Reading, q: Tensor, p: Tensor) -> Tensor:
        """What drafts of law p leave to be written at the prefixes of `reading`: (q - p)+ (B, V), up to its sum."""
        rest = (q - p).clamp(min=0.0)
        # A rejection that leaves nothing is rounding; the target's own law is right then.
        return torch.where(rest.sum(-1, keepdim=True) > 0, rest, q)

    def _rows_at_once(self, prompt_length: int, max_new_tokens: int) -> int:
        return min(rows_that_fit(model, prompt_length + max_new_tokens) for model in (self.model, self.draft))

    def __repr__(self) -> str:
        return f"SpeculativeSampler({self.model!r}, {self.draft!r}, chunk={self.chunk})"


class _Round:
    """One round of the rows at `places`: drafts, then verdicts. The session ends with what was written appended."""

    def __init__(
        self, sampler: SpeculativeSampler, session: SharedSession, places: np.ndarray, numbers: np.ndarray,
        written: np.ndarray, limit: int, draw: Draw,
    ) -> None:  # fmt: skip
        self.sampler, self.session, self.draw = sampler, session, draw
        self.places, self.rows, self.first = places, numbers[places], written[places]
        # The last position of a round is drafted after the laws are read, so it needs no run of its own.
        self.limit = limit
        self.span = np.minimum(sampler.chunk, limit - self.first - 1)

    def write(self, eos: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Tokens (B, chunk + 1) of this round, and how many of them each row wrote."""
        drafted, counts = self._draft(eos)
        ended = (counts > 0) & np.isin(drafted[np.arange(len(counts)), np.maximum(counts - 1, 0)], eos)
        reading = self.session.along(self.places, counts)
        starts = np.cumsum(counts + 1) - (counts + 1)
        lengths, kept = np.zeros_like(counts), np.zeros_like(counts)
        going = np.arange(len(counts))
        for j in range(int(counts.max()) + 1):
            going = going[(counts[going] > j) | ((counts[going] == j) & ~ended[going])]
            if not len(going):
                break
            here = reading.at(starts[going] + j)
            fresh = np.flatnonzero(counts[going] == j)
            if len(fresh):
                drafted[going[fresh], j] = self.sampler._propose(
                    here.at(fresh), self.rows[going[fresh]], self.first[going[fresh]] + j, self.draw
                )
            tokens, accepted = self._verdict(here, going, drafted[going, j], j)
            drafted[going, j] = tokens
            lengths[going] = j + 1
            kept[going] += accepted & (counts[going] > j)
            going = going[accepted & (counts[going] > j) & ~np.isin(tokens, eos)]
        # What was drafted behind the last accepted token goes, and the token that replaces it comes.
        self.session.drop(self.places, counts - kept)
        own = np.flatnonzero((lengths > kept) & (self.first + lengths < self.limit))
        self.session.append(self.places[own], drafted[own, lengths[own] - 1])
        return drafted, lengths

    def _draft(self, eos: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        drafted = np.full((len(self.places), self.sampler.chunk + 1), -1, dtype=np.int64)
        counts = np.zeros(len(self.places), dtype=np.int64)
        going = np.arange(len(self.places))
        for j in range(self.sampler.chunk):
            going = going[self.span[going] > j]
            if not len(going):
                break
            # A network that no drawn component needs does not run.
            now = self.session.now(self.places[going])
            tokens = self.sampler._propose(now, self.rows[going], self.first[going] + j, self.draw)
            drafted[going, j] = tokens
            counts[going] += 1
            self.session.append(self.places[going], tokens)
            going = going[~np.isin(tokens, eos)]
        return drafted, counts

    def _verdict(self, here: Reading, going: np.ndarray, tokens: np.ndarray, j: int) -> tuple[np.ndarray, np.ndarray]:
        """Tokens after the check, and which of them were accepted as drafted."""
        rows, steps = self.rows[going], self.first[going] + j
        q = here.law(self.sampler.model).to("cpu", torch.float64).log_softmax(-1)
        p = self.sampler._proposal(here, rows, steps).to("cpu", torch.float64).log_softmax(-1)
        ids = torch.from_numpy(tokens)[:, None]
        log_q, log_p = q.gather(-1, ids)[:, 0], p.gather(-1, ids)[:, 0]
        # Rounding may take away a token's draft mass between drafting and checking: then q alone decides.
        log_ratio = torch.where(log_q == -torch.inf, log_q, log_q - log_p).clamp(max=0.0)
        verdict_law = torch.stack([log_ratio, torch.log1p(-log_ratio.exp())], -1)
        accepted = _drawn(self.draw, verdict_law, rows, steps, "accept") == 0
        if self.sampler._verdicts is not None:
            chance = torch.minimum(p, q).exp().sum(-1).clamp(max=1.0).numpy()
            self.sampler._verdicts.append((rows, accepted, chance))
        failed = np.flatnonzero(~accepted)
        if len(failed):
            where = torch.from_numpy(failed)
            rest = self.sampler._left_over(here.at(failed), q[where].exp(), p[where].exp())
            tokens = tokens.copy()
            tokens[failed] = _drawn(self.draw, rest.log(), rows[failed], steps[failed], "repair")
        return tokens, accepted


def _drawn(draw: Draw, log_law: Tensor, rows: np.ndarray, steps: np.ndarray, stream: Stream) -> np.ndarray:
    """Indices (B,) drawn from laws (B, V) for rows that stand at different steps."""
    drawn = np.zeros(len(rows), dtype=np.int64)
    for step in np.unique(steps).tolist():
        mine = np.flatnonzero(steps == step)
        law = log_law if len(mine) == len(rows) else log_law[on_device(mine, log_law.device)]
        drawn[mine] = draw(law, rows[mine], step, stream=stream).cpu().numpy()
    return drawn
