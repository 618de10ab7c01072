"""ME, the mixture-model-like ensemble: ancestral sampling, one component per token."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from me_stats.devices import on_device
from me_stats.draws import BLOCK, Draw, RowStreams
from me_stats.mixing import ConstantMixing
from me_stats.models.base import Cost, open_session
from me_stats.models.ensemble import Ensemble, EnsembleSession
from me_stats.models.joint import JointTransform
from me_stats.models.warped import Warp, Warped
from me_stats.samplers import tabular
from me_stats.samplers.base import Batch, Run, StepSampler
from me_stats.schedule import Schedule


class MESampler(StepSampler):
    r"""Draws a component :math:`m \sim \mathrm{Cat}(w(prefix))`, runs it alone, and draws from its law.

    The token's law given the prefix is :math:`\sum_i w_i P_i`, the law that `CESampler` draws from, at one
    model run per token instead of K. Components that were not drawn catch up when they are.

    With constant weights the components of all rows and steps are drawn before they are needed, and rows of a batch
    drift apart: a component runs when enough rows wait for it (`me_stats.schedule`). The tokens are those of a run in
    lockstep, row by row.

    Parameters
    ----------
    ensemble
        An Ensemble: transforms must stand inside it, on single components (transform-then-mix).
    shared_rows
        B >= 1: rows whose global number // B agree share the component uniform of every step. Every row keeps its law
        and depends on its own number, the seed and its prompt alone; rows of a group depend on each other, so a mean
        over them is worth fewer rows (`dependence.design_effect`), and tests that count rows refuse them (see
        `me_stats.trace`). With constant weights a group runs one component a step: B rows that are one batch
        (``batch_size=B``) cost one forward a step, where B rows with draws of their own cost
        :math:`\sum_i 1 - (1-λ_i)^B` in lockstep and about :math:`(1 + (\sum_i \sqrt{λ_i})^2)/2` of them if B is
        large and rows drift apart, a component's first read of a prompt aside.
    lockstep
        Keep all rows of a batch at the same step: the same tokens, more forwards. A router's weights, a subclass that
        chooses in its own way and a `draw` that is no `RowStreams` ask for it anyway; tables count forwards as if so.

    Raises
    ------
    TypeError
        For anything else. A transform of the mixture needs all K laws at every step.
    ValueError
        If `shared_rows` is not an integer of at least 1.

    Source: arXiv 2605.00419, section 2.2; `shared_rows` is ours.

    >>> from me_stats import ConstantMixing
    >>> from me_stats.models import MarkovModel
    >>> toy = Ensemble([MarkovModel.random(3, seed=s) for s in (0, 1)], ConstantMixing([0.5, 0.5]))
    >>> given = dict(n=32, max_new_tokens=100, batch_size=32)
    >>> [MESampler(toy, shared_rows=b, lockstep=True).sample([0], **given).cost.forwards for b in (1, 32)]
    [200, 100]
    >>> MESampler(toy).sample([0], **given).cost.forwards
    157
    """

    def __init__(self, ensemble: Ensemble, *, shared_rows: int = 1, lockstep: bool = False) -> None:
        if not isinstance(ensemble, Ensemble):
            raise TypeError(_refusal(type(self).__name__, ensemble))
        if not isinstance(shared_rows, (int, np.integer)) or shared_rows < 1:
            raise ValueError(f"shared_rows must be an integer of at least 1, got {shared_rows!r}")
        super().__init__(ensemble)
        self.shared_rows, self.lockstep = int(shared_rows), bool(lockstep)

    def __repr__(self) -> str:
        options = f", shared_rows={self.shared_rows}" * (self.shared_rows > 1) + ", lockstep=True" * self.lockstep
        return f"{super().__repr__()[:-1]}{options})"

    def _plan(self) -> tabular.Plan | None:
        return tabular.Plan.ancestral(self.model, shared_rows=self.shared_rows)

    def _components(
        self, log_weights: Tensor, rows: np.ndarray, positions: np.ndarray, step: int, draw: Draw,
        memory: dict[str, Any],
    ) -> np.ndarray:  # fmt: skip
        """The component (B,) that writes each row's next token."""
        return draw(log_weights, rows // self.shared_rows, step, stream="component").cpu().numpy()

    def _step(
        self, batch: Batch, positions: np.ndarray, step: int, draw: Draw, memory: dict[str, Any]
    ) -> tuple[Tensor, np.ndarray | None]:
        session = batch.session
        assert isinstance(session, EnsembleSession)
        rows = batch.rows[positions]
        # Weights live on the host, so the path is known before any forward and no token is waited for.
        chosen = self._components(session.mixing.log_weights(positions), rows, positions, step, draw, memory)
        parts, places = [], []
        for i, component in enumerate(session.components):
            mine = np.flatnonzero(chosen == i)
            if len(mine):
                laws, index = batch.read(component, positions[mine], step)
                parts.append(draw(laws, rows[mine], step, stream="token", index=index))
                places.append(mine)
        if len(parts) == 1:
            return parts[0], chosen
        back = on_device(np.argsort(np.concatenate(places), kind="stable"), parts[0].device)
        return torch.cat([part.to(parts[0].device) for part in parts])[back], chosen

    def _run_batch(self, run: Run) -> tuple[Tensor, Tensor | None, Cost]:
        alone = len(run.numbers) == 1 or run.max_new_tokens == 1
        # Another draw, such as one that enumerates, may count on steps that come in order.
        if alone or not self._drifts() or type(run.draw) is not RowStreams:
            return super()._run_batch(run)
        session = open_session(self.model, run.starts, max_new_tokens=run.max_new_tokens)
        assert isinstance(session, EnsembleSession)
        drift = _Drift(run, session, self)
        while (count := drift.serve()) > 0:
            run.note(count)
        return *drift.grids(), session.cost

    def _drifts(self) -> bool:
        """Whether components can be drawn ahead: the weights are constant, and the class draws and steps as ME does."""
        own = (type(self)._step, type(self)._components) == _OWN_CHOICE
        return own and not self.lockstep and type(self.model.mixing) is ConstantMixing


# What the rows that drift do in their own order; a class, or a planted bug, that does something else steps in lockstep.
_OWN_CHOICE = (MESampler._step, MESampler._components)


class _Drift:
    """A batch whose rows advance on their own, each when the component that it waits for runs."""

    def __init__(self, run: Run, session: EnsembleSession, sampler: MESampler) -> None:
        assert isinstance(run.draw, RowStreams)
        self.batch, self.session = Batch(session, run.numbers, run.prompt_index), session
        self.draw, self.steps = run.draw, run.max_new_tokens
        self.groups = run.numbers // sampler.shared_rows
        self.log_weights = sampler.model.mixing.log_weights([()])
        self.narrow = np.min_scalar_type(-self.log_weights.shape[1])
        self.known = min(self.steps, BLOCK)
        self.schedule = Schedule(self._drawn_ahead(0, self.known), horizon=self.steps)
        self.watch = run.watch(sampler.model.vocabulary)
        self.written: list[tuple[np.ndarray, Tensor]] = []
        self.components = np.full((len(run.numbers), self.steps), -1, dtype=np.int64)

    def _drawn_ahead(self, start: int, stop: int) -> np.ndarray:
        """Components (N, stop - start) of all rows."""
        shape = (len(self.groups), stop - start)
        rows, steps = np.repeat(self.groups, shape[1]), np.tile(np.arange(start, stop), shape[0])
        index = torch.zeros(len(rows), dtype=torch.int64)
        drawn = self.draw(self.log_weights, rows, steps, stream="component", index=index)
        return drawn.numpy().astype(self.narrow).reshape(shape)

    def serve(self) -> int:
        """Run the component that is next, and write a token to each row that waits for it; how many, 0 at the end."""
        served = self.schedule.next()
        if served is None:
            return 0
        rows, steps, first = served.rows, served.steps, not served.steps.any()
        laws, index = self.batch.read(self.session.components[served.component], rows, 0 if first else 1)
        tokens = self.draw(laws, self.batch.rows[rows], 0 if first else steps, stream="token", index=index)
        self.written.append((rows * self.steps + steps, tokens))
        self.components[rows, steps] = served.component
        furthest = int(steps.max()) + 1
        if furthest < self.steps:
            self.session.append(rows, tokens)
        elif len(on := np.flatnonzero(steps + 1 < self.steps)):
            self.session.append(rows[on], tokens[on_device(on, tokens.device)])
        if len(ended := self.watch.see(rows, tokens)):
            self.schedule.end(ended)
        if furthest == self.known < self.steps:
            start, self.known = self.known, min(self.steps, self.known + BLOCK)
            self.schedule.extend(self._drawn_ahead(start, self.known))
        return len(rows)

    def grids(self) -> tuple[Tensor, Tensor]:
        """Tokens and components (N, T), -1 where none were written."""
        grid = torch.full((self.components.size,), -1, dtype=torch.int64)
        device = self.written[0][1].device
        # One copy to the host for the whole batch.
        flat = torch.cat([tokens.to(device) for _, tokens in self.written]).cpu()
        grid[torch.from_numpy(np.concatenate([places for places, _ in self.written]))] = flat
        return grid.view(self.components.shape), torch.from_numpy(self.components)


def _refusal(sampler: str, model: object) -> str:
    inner: Any = model
    order: tuple[Warp, ...] = ()
    while isinstance(inner, Warped):
        inner, order = inner.model, (*inner.warps, *order)
    warps = ", ".join(map(repr, order))
    if isinstance(inner, JointTransform):
        return (
            f"{sampler} cannot sample {type(inner).__name__}{f' under {warps}' if order else ''}: this is a joint "
            "transform of all K laws at every step, so one component cannot know its part. Exact choices: "
            "transforms of single components, such as Ensemble([Warped(m, TopK(k)) for m in models], mixing), another "
            "law; SpeculativeSampler with an ME draft, or CESampler of this model"
        )
    if isinstance(model, Warped) and isinstance(inner, Ensemble):
        return (
            f"{sampler} cannot sample Warped(Ensemble, {warps}): this is mix-then-transform, g(Σ λ_i P_i), and "
            "g needs all K laws at every step (drawing one component gives Σ λ_i g(P_i), another law unless g "
            "is affine). Exact choices: transform-then-mix, "
            f"Ensemble([Warped(m, {warps}) for m in models], mixing), or CESampler of this model, or "
            "SpeculativeSampler with an ME draft"
        )
    return (
        f"{sampler} needs an Ensemble, which says what the components are; got {type(model).__name__}. "
        "CESampler takes any LanguageModel"
    )
