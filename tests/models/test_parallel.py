"""Components in processes of their own: the same tokens, clear errors, and nothing that stays behind."""

from __future__ import annotations

import multiprocessing
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch

from me_stats import CESampler, ConstantMixing, Ensemble, MESampler
from me_stats.bench_models import BenchModels, bench_components
from me_stats.models import LanguageModel, MarkovModel
from me_stats.models import parallel as parallel_module
from me_stats.models.parallel import ComponentProcess, ParallelEnsemble, start_components
from me_stats.parts import WorkerDied
from me_stats.presets import SIBLINGS

MIXING = ConstantMixing([0.3, 0.7])


@pytest.fixture(scope="module")
def models() -> BenchModels:
    return bench_components(SIBLINGS, 2)


@pytest.fixture(scope="module")
def running(models: BenchModels, one_thread: None) -> Iterator[ParallelEnsemble]:
    with ParallelEnsemble(start_components(models.openers), MIXING) as ensemble:
        yield ensemble


def toy() -> MarkovModel:
    return MarkovModel.random(4, seed=0)


def broken() -> LanguageModel:
    raise ValueError("no such model")


def test_ce_in_parallel_writes_the_tokens_of_ce(models: BenchModels, running: ParallelEnsemble) -> None:
    plain = Ensemble(models.components, MIXING)
    options: dict[str, Any] = {"n": 3, "max_new_tokens": 24, "seed": 5}
    prompts = [models.prompt(12), models.prompt(5)]
    expected, found = (CESampler(m).sample(prompts, **options) for m in (plain, running))
    assert torch.equal(found.tokens, expected.tokens)
    assert found.cost == expected.cost
    # ME reads one component at a time, and may do so in processes too.
    expected, found = (MESampler(m).sample(prompts, **options) for m in (plain, running))
    assert torch.equal(found.tokens, expected.tokens)


def test_it_has_the_law_of_the_ensemble(models: BenchModels, running: ParallelEnsemble) -> None:
    plain = Ensemble(models.components, MIXING)
    prefixes = [models.prompt(9), models.prompt(4), (7,)]
    assert torch.equal(running.log_probs(prefixes), plain.log_probs(prefixes))
    laws = running.log_probs(prefixes[:1])
    running.log_probs(prefixes[1:])
    assert torch.equal(laws, plain.log_probs(prefixes[:1]))  # what was returned is not written over
    session = running.session(prefixes, max_new_tokens=2)
    session.append(np.array([1]), torch.tensor([3]))
    expected = plain.log_probs([(*prefixes[1], 3), prefixes[0]])
    assert float((session.log_probs(np.array([1, 0])) - expected).abs().max()) < 1e-4


def test_errors_of_a_component_are_raised_here_and_it_goes_on(running: ParallelEnsemble) -> None:
    with pytest.raises(ValueError, match="an empty prompt"):
        running.session([()])
    with pytest.raises(ValueError, match="an empty prompt"):
        running.log_probs([()])
    assert running.log_probs([(1, 2)]).shape == (1, 256)


def test_only_components_that_can_run_at_once_are_taken(models: BenchModels) -> None:
    with pytest.raises(TypeError, match="start_components"):
        ParallelEnsemble(models.components, MIXING)


def test_an_opener_that_fails_leaves_no_process() -> None:
    before = set(multiprocessing.active_children())
    with pytest.raises(ValueError, match="no such model"):
        start_components([toy, broken])
    assert set(multiprocessing.active_children()) == before


def test_a_dead_process_is_named_and_a_closed_one_refuses() -> None:
    (component,) = start_components([toy])
    assert torch.equal(component.log_probs([(1,)]), toy().log_probs([(1,)]).float())
    ensemble = ParallelEnsemble([component], ConstantMixing([1.0]))
    session = ensemble.session([(0,)])
    component._process.kill()
    with pytest.raises(WorkerDied, match=r"died \(exit code -9\)"):
        session.log_probs(np.array([0]))
    with pytest.raises(WorkerDied, match="was closed"):
        component.log_probs([(0,)])
    ensemble.close()
    component.close()


def test_an_interruption_ends_the_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    before = set(multiprocessing.active_children())
    components = start_components([toy])
    session = ParallelEnsemble(components, ConstantMixing([1.0])).session([(0,)])

    def interrupted(*_: Any) -> Any:
        raise KeyboardInterrupt

    monkeypatch.setattr(parallel_module, "wait", interrupted)
    with pytest.raises(KeyboardInterrupt):
        session.log_probs(np.array([0]))
    monkeypatch.undo()
    assert set(multiprocessing.active_children()) == before
    assert all(isinstance(component, ComponentProcess) for component in components)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_streams_of_one_device_write_the_tokens_of_ce() -> None:
    models = bench_components(SIBLINGS, 2, device="cuda")
    prompts = [models.prompt(12), models.prompt(5)]
    made = (Ensemble(models.components, MIXING), ParallelEnsemble(models.components, MIXING))
    expected, found = (CESampler(m).sample(prompts, n=3, max_new_tokens=24, seed=5) for m in made)
    assert torch.equal(found.tokens, expected.tokens)
