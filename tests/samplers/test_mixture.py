from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from me_stats.draws import Draw
from me_stats.exact import sampler_law, sequence_law
from me_stats.mixing import ConstantMixing
from me_stats.models import Conditioned, Ensemble, Greedy, MarkovModel, TableModel, Temperature, TopK, TopP, Warped
from me_stats.models.base import PrefixSession
from me_stats.samplers import CESampler, MESampler, SequenceMixtureSampler
from tests.strategies import LastTokenMixing, OutsideModel, ensembles, horizons, prompts, seeds, simplex

pytestmark = pytest.mark.usefixtures("tables_for_any_length")


@given(st.data())
def test_ancestral_sampling_has_the_mixture_law(data: st.DataObject) -> None:
    ensemble = data.draw(ensembles())
    prompt = data.draw(prompts(ensemble.vocabulary.size))
    steps = data.draw(horizons(ensemble.vocabulary.size * len(ensemble.components)))
    law = sequence_law(ensemble, prompt, max_new_tokens=steps)
    assert law.total == pytest.approx(1, abs=1e-12)
    assert sampler_law(MESampler(ensemble), prompt, max_new_tokens=steps).tv_distance(law) < 1e-12


@given(st.data(), st.lists(seeds, min_size=4, max_size=4))
def test_four_components_over_five_tokens_of_arg_max(data: st.DataObject, numbers: list[int]) -> None:
    # Greedy components leave the component's choice alone, so T = 5 at K = 4 stays enumerable.
    parts = [Warped(TableModel.random(3, seed=seed, order=2), Greedy()) for seed in numbers]
    ensemble = Ensemble(parts, ConstantMixing(data.draw(simplex(4))))
    law = sequence_law(ensemble, [0], max_new_tokens=5)
    for sampler in (MESampler(ensemble), CESampler(ensemble), CESampler(ensemble, latent=True)):
        assert sampler_law(sampler, [0], max_new_tokens=5).tv_distance(law) < 1e-12


@given(seeds, st.integers(1, 3), st.integers(1, 3), st.booleans())
def test_a_rule_of_the_prefix_keeps_me_exact(seed: int, n_components: int, size: int, ends: bool) -> None:
    rng = np.random.Generator(np.random.Philox(seed))
    weights = rng.dirichlet(np.ones(n_components), size + 1)
    weights[rng.integers(0, size + 1)] = np.eye(n_components)[rng.integers(0, n_components)]
    parts = [
        TableModel.random(size, seed=seed + i, order=2, eos=(size - 1,) if ends else ()) for i in range(n_components)
    ]
    ensemble = Ensemble(parts, LastTokenMixing(weights))
    law = sequence_law(ensemble, [0], max_new_tokens=3)
    for sampler in (MESampler(ensemble), CESampler(ensemble), CESampler(ensemble, latent=True)):
        assert sampler_law(sampler, [0], max_new_tokens=3).tv_distance(law) < 1e-12


def test_components_of_any_make_mix_exactly() -> None:
    table = TableModel.random(3, seed=0, order=2, eos=(2,))
    inner = Ensemble([table, MarkovModel.random(3, seed=1, eos=(2,))], ConstantMixing([0.4, 0.6]))
    parts = [
        Warped(inner, TopK(2)),  # a component may itself mix before it transforms
        Conditioned(OutsideModel(table), [1, 0]),
        Warped(OutsideModel(MarkovModel.random(3, seed=2, eos=(2,))), Temperature(0.5), TopP(0.8)),
    ]
    ensemble = Ensemble(parts, ConstantMixing([0.2, 0.3, 0.5]))
    law = sequence_law(ensemble, [1], max_new_tokens=4)
    assert sampler_law(MESampler(ensemble), [1], max_new_tokens=4).tv_distance(law) < 1e-12
    assert sampler_law(CESampler(ensemble), [1], max_new_tokens=4).tv_distance(law) < 1e-12


def test_weights_of_zero_are_never_drawn() -> None:
    ensemble = Ensemble([MarkovModel.random(3, seed=s) for s in range(4)], ConstantMixing([0, 0.5, 0, 0.5]))
    for batch_size in (None, 50):
        trace = MESampler(ensemble).sample([0], n=50, max_new_tokens=20, batch_size=batch_size)
        assert set(trace.components.flatten().tolist()) == {1, 3}


# --- what ME refuses --------------------------------------------------------------------------------------

ENSEMBLE = Ensemble([MarkovModel.random(3, seed=s) for s in (0, 1)], ConstantMixing([0.3, 0.7]))


def test_mix_then_transform_is_refused_with_its_repair() -> None:
    with pytest.raises(TypeError) as refusal:
        MESampler(Warped(ENSEMBLE, TopK(5)))  # type: ignore[arg-type]
    message = str(refusal.value)
    assert message.startswith("MESampler cannot sample Warped(Ensemble, TopK(k=5))")
    assert "mix-then-transform" in message
    assert "unless g is affine" in message
    repair = "Ensemble([Warped(m, TopK(k=5)) for m in models], mixing)"
    assert f"transform-then-mix, {repair}, or CESampler of this model" in message
    # The repair is code that runs.
    names = {"models": ENSEMBLE.components, "mixing": ENSEMBLE.mixing, "Ensemble": Ensemble, "Warped": Warped}
    repaired = eval(repair, {**names, "TopK": TopK})
    assert MESampler(repaired).sample([0], max_new_tokens=2).tokens.shape == (1, 2)


def test_nested_transforms_are_named_in_the_order_they_apply() -> None:
    nested = Warped(Warped(ENSEMBLE, Temperature(0.5)), TopK(2))
    with pytest.raises(TypeError, match=r"Warped\(Ensemble, Temperature\(tau=0.5\), TopK\(k=2\)\): this is mix-then"):
        MESampler(nested)  # type: ignore[arg-type]


def test_controls_are_refused_under_their_own_name() -> None:
    with pytest.raises(TypeError, match="SequenceMixtureSampler cannot sample Warped"):
        SequenceMixtureSampler(Warped(ENSEMBLE, TopK(5)))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "model", [MarkovModel.random(3, seed=0), Warped(MarkovModel.random(3, seed=0), TopK(2)), Conditioned(ENSEMBLE, [0])]
)
def test_a_model_without_components_is_refused(model: Any) -> None:
    with pytest.raises(
        TypeError, match=f"MESampler needs an Ensemble.* got {type(model).__name__}. CESampler takes any"
    ):
        MESampler(model)


# --- planted bugs: each must be far from the law that ME has to rounding -----------------------------------


class Mutant(MESampler):
    """ME with another choice of component."""

    def _law(self, log_weights: Tensor, step: int, last: np.ndarray | None) -> Tensor:
        raise AssertionError

    def _components(
        self,
        log_weights: Tensor,
        rows: np.ndarray,
        positions: np.ndarray,
        step: int,
        draw: Draw,
        memory: dict[str, Any],
    ) -> np.ndarray:
        kept = memory.setdefault("last", np.zeros(int(positions.max()) + 1, dtype=np.int64))
        law = self._law(log_weights.exp(), step, kept[positions] if step else None)
        kept[positions] = draw(law.log(), rows, step, stream="component").numpy()
        return kept[positions]


class WeightsOff(Mutant):
    def _law(self, weights: Tensor, step: int, last: np.ndarray | None) -> Tensor:
        return weights + torch.tensor([0.05, -0.05])


class RoundRobin(Mutant):
    def _law(self, weights: Tensor, step: int, last: np.ndarray | None) -> Tensor:
        return torch.eye(weights.shape[1], dtype=weights.dtype)[step % weights.shape[1]].expand_as(weights)


class Sticky(Mutant):
    def _law(self, weights: Tensor, step: int, last: np.ndarray | None) -> Tensor:
        if last is None:
            return weights
        return (weights + torch.eye(weights.shape[1], dtype=weights.dtype)[torch.from_numpy(last)]) / 2


class Faithful(Mutant):
    """No bug: the harness itself changes nothing."""

    def _law(self, weights: Tensor, step: int, last: np.ndarray | None) -> Tensor:
        return weights


class StaleSession(PrefixSession):
    """A cache that loses every second token."""

    def append(self, rows: np.ndarray, tokens: Tensor) -> None:
        self.count = getattr(self, "count", 0) + 1
        if self.count % 2:
            super().append(rows, tokens)


class Stale(OutsideModel):
    def session(self, prompts: Sequence[Sequence[int]], *, max_new_tokens: int | None = None) -> StaleSession:
        return StaleSession(self, prompts)


class DropsTheEnd(MESampler):
    """Never draws the last token that has mass."""

    def _step(
        self, batch: Any, positions: np.ndarray, step: int, draw: Draw, memory: dict[str, Any]
    ) -> tuple[Tensor, np.ndarray | None]:
        def cut(log_law: Tensor, *args: Any, stream: Any, index: Any = None) -> Tensor:
            if stream == "token":
                log_law = log_law.clone()
                log_law[:, -1] = -torch.inf
            return draw(log_law, *args, stream=stream, index=index)

        return super()._step(batch, positions, step, cut, memory)


def distance(sampler: MESampler, model: Ensemble = ENSEMBLE) -> float:
    law = sequence_law(model, [0], max_new_tokens=3)
    return sampler_law(sampler, [0], max_new_tokens=3).tv_distance(law)


def test_planted_bugs_are_told_from_me() -> None:
    assert distance(MESampler(ENSEMBLE)) < 1e-12
    assert distance(Faithful(ENSEMBLE)) < 1e-12
    cold = Ensemble([Warped(ENSEMBLE.components[0], Temperature(0.8)), ENSEMBLE.components[1]], ENSEMBLE.mixing)
    stale = Ensemble([Stale(ENSEMBLE.components[0]), ENSEMBLE.components[1]], ENSEMBLE.mixing)  # type: ignore[arg-type]
    wrong = {
        "weights off by 0.05": WeightsOff(ENSEMBLE),
        "round robin": RoundRobin(ENSEMBLE),
        "sticky": Sticky(ENSEMBLE),
        "one component per sequence": SequenceMixtureSampler(ENSEMBLE),
        "last token dropped": DropsTheEnd(ENSEMBLE),
        "temperature on one component": MESampler(cold),
        "stale cache": MESampler(stale),
    }
    distances = {name: distance(sampler) for name, sampler in wrong.items()}
    assert min(distances.values()) > 0.01, distances


def test_a_subclass_runs_its_own_steps_on_tables_too() -> None:
    # The fast path of tables knows ME, not what a subclass made of it.
    for mutant in (RoundRobin(ENSEMBLE), Sticky(ENSEMBLE)):
        fast = mutant.sample([0], n=20, max_new_tokens=9, seed=1)
        slow = mutant.sample([0], n=20, max_new_tokens=9, seed=1, batch_size=20)
        assert torch.equal(fast.tokens, slow.tokens)
        assert not torch.equal(fast.tokens, MESampler(ENSEMBLE).sample([0], n=20, max_new_tokens=9, seed=1).tokens)
    assert RoundRobin(ENSEMBLE).sample([0], n=2, max_new_tokens=3).components.tolist() == [[0, 1, 0]] * 2
