"""Weights by Bayes' rule: the components that predicted the prefix well speak next."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from me_stats.mixing import ConstantMixing, MixingSession
from me_stats.models.base import Cost, Prefix, Session, open_session, path_log_probs, require_language_model
from me_stats.routers.base import Decodable, at_least


class BayesRouter(Decodable):
    r"""Posterior weights, :math:`w_i(c) \propto λ_i \, P_i(c_{>g} \mid c_{\le g})^β`, of a prefix c of which g tokens
    were given.

    β = 0 is the constant mixture λ. β = 1 is the posterior of "one component wrote it all", and then
    :math:`\prod_t \sum_i w_i P_i(x_t) = \sum_i λ_i \prod_t P_i(x_t)`: per-token sampling of this router is the
    sequence mixture. The rule reads past tokens only, so ME is exact, but needs all K laws at every step: ME saves
    nothing here. β > 1 commits sooner.

    Parameters
    ----------
    components
        The models whose predictions count; usually those of the ensemble.
    prior
        λ, (K,) on the simplex.
    beta
        β >= 0.
    given
        g >= 0: how many first tokens are a prompt that nobody predicted. Longer prompts count as evidence from token
        g + 1 on; a prefix of up to g tokens has the prior's weights. Models that refuse an empty prefix need g >= 1.

    Notes
    -----
    Where β > 0 and no component of positive prior can have written the prefix, the conditional law is undefined, and
    the weights are the prior's.

    Examples
    --------
    >>> from me_stats.models import TableModel
    >>> coins = [TableModel([[0.8, 0.2]], order=0), TableModel([[0.4, 0.6]], order=0)]
    >>> BayesRouter(coins, [0.5, 0.5], given=0).log_weights([(), (1,), (1, 1)]).exp()
    tensor([[0.5000, 0.5000],
            [0.2500, 0.7500],
            [0.1000, 0.9000]], dtype=torch.float64)
    """

    def __init__(
        self, components: Sequence[Any], prior: Sequence[float] | np.ndarray | Tensor, *, beta: float = 1.0, given: int
    ) -> None:
        for i, component in enumerate(components):
            require_language_model(component, name=f"components[{i}]")
        self._prior = ConstantMixing(prior)
        self.n_components = self._prior.n_components
        if len(components) != self.n_components:
            raise ValueError(f"prior has {self.n_components} weights for {len(components)} components; give one each")
        if not (math.isfinite(beta) and beta >= 0):
            raise ValueError(f"beta must be finite and at least 0, got {beta}")
        self.components, self.prior, self.beta = tuple(components), self._prior.weights, beta
        self.given = at_least(0, given=given)

    def log_weights(self, prefixes: Sequence[Prefix]) -> Tensor:
        if self.beta == 0:
            return self._prior.log_weights(prefixes)
        evidence = [path.sum(0) for path in self.evidence(prefixes)]
        return self.posterior(torch.stack(evidence) if evidence else torch.empty((0, self.n_components)).double())

    def session(self, prompts: Sequence[Prefix]) -> MixingSession:
        return self._prior.session(prompts) if self.beta == 0 else _BayesSession(self, prompts)

    def path_log_weights(self, prompt: Prefix, tokens: Sequence[int]) -> Tensor:
        if self.beta == 0 or not len(tokens):
            return self._prior.path_log_weights(prompt, tokens)
        (log_probs,) = self.evidence([(*prompt, *tokens[:-1])])
        # One entry per scored token, and the prefixes of up to `given` tokens before them.
        unscored = min(self.given, len(prompt) + len(tokens) - 1)
        totals = torch.nn.functional.pad(log_probs.cumsum(0), (0, 0, 1 + unscored, 0))
        return self.posterior(totals[len(prompt) :])

    def evidence(self, prefixes: Sequence[Prefix]) -> list[Tensor]:
        """Per prefix (n, K) log P_i of its tokens past the given ones, n = max(0, length - given)."""
        starts = [tuple(prefix[: self.given]) for prefix in prefixes]
        scored = [tuple(prefix[self.given :]) for prefix in prefixes]
        found = [torch.zeros((len(path), self.n_components), dtype=torch.float64) for path in scored]
        # A model may refuse to be asked for nothing.
        asked = [row for row, path in enumerate(scored) if path]
        for i, component in enumerate(self.components):
            laws = path_log_probs(component, [starts[row] for row in asked], [scored[row] for row in asked])
            for row, law in zip(asked, laws, strict=True):
                ids = torch.tensor(scored[row], dtype=torch.int64, device=law.device)
                found[row][:, i] = law.gather(-1, ids[:, None])[:, 0].to("cpu", torch.float64)
        return found

    def posterior(self, evidence: Tensor) -> Tensor:
        """Log-weights (..., K) from summed log-probabilities (..., K)."""
        joint = self._prior.log_weights([()])[0] + self.beta * evidence
        impossible = (joint == -torch.inf).all(-1, keepdim=True)
        return torch.where(impossible, self._prior.log_weights([()])[0], joint).log_softmax(-1)

    def __repr__(self) -> str:
        return f"BayesRouter({self.n_components} components, {self.prior.tolist()}, beta={self.beta})"


class _BayesSession:
    """Every component's session, read at every token: what was predicted of it is the evidence."""

    def __init__(self, router: BayesRouter, prompts: Sequence[Prefix]) -> None:
        self._router = router
        self._length = np.array([len(prompt) for prompt in prompts], dtype=np.int64)
        self._components: tuple[Session, ...] = tuple(open_session(c, prompts) for c in router.components)
        distinct = {prompt: place for place, prompt in enumerate(dict.fromkeys(map(tuple, prompts)))}
        known = [path.sum(0) for path in router.evidence(list(distinct))]
        self._evidence = torch.stack([known[distinct[tuple(prompt)]] for prompt in prompts])
        # The prompts were scored by one forward per component and distinct prompt.
        scored = [len(prompt) for prompt in distinct if len(prompt) > router.given]
        reads = sum(length - router.given for length in scored)
        self._prompt_cost = Cost(len(scored), sum(scored) - len(scored), reads)

    @property
    def cost(self) -> Cost:
        """Of all components together."""
        prompts = [self._prompt_cost] * len(self._components)
        return sum((session.cost for session in self._components), sum(prompts, Cost()))

    def append(self, rows: np.ndarray, tokens: Tensor) -> None:
        scored = self._length[rows] >= self._router.given
        mine = rows[scored]
        for i, session in enumerate(self._components):
            if len(mine):
                laws = session.log_probs(mine)
                ids = tokens[torch.from_numpy(scored).to(tokens.device)].to(laws.device)
                picked = laws.gather(-1, ids[:, None])[:, 0]
                self._evidence[torch.from_numpy(mine), i] += picked.to("cpu", torch.float64)
            session.append(rows, tokens)
        self._length[rows] += 1

    def log_weights(self, rows: np.ndarray) -> Tensor:
        return self._router.posterior(self._evidence[torch.from_numpy(rows)])
