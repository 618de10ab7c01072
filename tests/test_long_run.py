"""Long runs: which rows there are, what is kept of them, and that interruptions, parts and memory change nothing."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from me_stats import long_run
from me_stats.long_run import ARMS, Arm, LongPlan, column, generate, names_of, open_plan
from me_stats.mixing import ConstantMixing
from me_stats.models import Endless, Ensemble, MarkovModel, Windowed
from me_stats.presets import SIBLINGS
from me_stats.row_statistics import block_means, first_end, scored_tokens, token_features, token_statistics
from me_stats.samplers import CESampler, MESampler, Sampler, SequenceMixtureSampler
from me_stats.variance import FrozenDraw
from tests import tiny

pytestmark = pytest.mark.usefixtures("one_thread")

PLAN = LongPlan(
    models=SIBLINGS, prompts=("The names of the ", "def f(x):\n", "class A:"), weights=None, dtype="float32",
    device="cpu", rows=10, steps=24, batch=4, blocks=3, window=16, hop=8, scored=6, paired=8, control=9, seed=11,
)  # fmt: skip
PER_TOKEN = ("repetition", "distinct", "letters", "line breaks")


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[Arm, list[Path]]:
    return generate(PLAN, tmp_path_factory.mktemp("long"))


@cache
def opened() -> tuple[Ensemble, list[tuple[int, ...]], Any]:
    ensemble, prompts, setting = open_plan(PLAN)
    return ensemble, [ensemble.vocabulary.encode(prompt) for prompt in prompts], setting


@cache
def sampled(arm: Arm) -> Any:
    """The rows of an arm in one batch, by the samplers themselves."""
    ensemble, prompts, _ = opened()
    rows = np.arange(PLAN.rows_of(arm))
    kinds: dict[Arm, type[Sampler]] = {"CE": CESampler, "control": SequenceMixtureSampler}
    step = 2**40
    seed = PLAN.seed + step * {"ME": 0, "same path": 0, "CE": 1, "control": 2}[arm]
    draw = FrozenDraw(component_seed=seed, token_seed=seed + 3 * step) if arm == "same path" else None
    return kinds.get(arm, MESampler)(ensemble).sample(
        [prompts[row % 3] for row in rows], rows=rows, max_new_tokens=PLAN.steps, seed=seed, draw=draw
    )


# What there is


def test_parts_and_rows_are_those_of_the_plan(files: dict[Arm, list[Path]]) -> None:
    assert {arm: len(found) for arm, found in files.items()} == {"ME": 3, "CE": 3, "same path": 2, "control": 3}
    assert [path.name for path in files["same path"]] == ["same-path-000000.npz", "same-path-000004.npz"]
    assert len(list(files["ME"][0].parent.glob("*.npz"))) == 11
    for arm in ARMS:
        assert column(files[arm], "prompt").tolist() == [row % 3 for row in range(PLAN.rows_of(arm))]
    assert column(files["CE"], "scored rows").tolist() == [0, 1, 2, 3, 4, 5]
    assert "scored rows" not in names_of(files["same path"])
    assert names_of([]) == ()
    size = sum(path.stat().st_size for found in files.values() for path in found)
    assert size < 150_000  # of 37 rows and 4 arms, with two kinds of samples


@pytest.mark.parametrize("arm", ARMS)
def test_rows_are_those_of_the_samplers_whatever_the_parts(files: dict[Arm, list[Path]], arm: Arm) -> None:
    ensemble, _, setting = opened()
    trace = sampled(arm)
    tokens = trace.tokens.numpy()
    assert tokens.shape == (PLAN.rows_of(arm), PLAN.steps)
    expected = token_statistics(tokens, token_features(ensemble.vocabulary), blocks=3)
    assert set(expected) == set(PER_TOKEN)
    for name, values in expected.items():
        np.testing.assert_array_equal(column(files[arm], name), values)
    eos = setting.ensemble.vocabulary.eos
    np.testing.assert_array_equal(column(files[arm], "end"), first_end(tokens, eos))
    assert column(files[arm][:1], "first tokens").tolist() == tokens[:1].tolist()
    if arm == "CE":
        assert "first path" not in names_of(files[arm])
    else:
        np.testing.assert_array_equal(column(files[arm], "first path"), trace.components.numpy()[:4])
    # With two rows only, a batch reads other sizes and the same laws.
    some = MESampler(ensemble).sample(trace.row_prompts()[5:7], rows=[5, 6], max_new_tokens=PLAN.steps, seed=PLAN.seed)
    if arm == "ME":
        np.testing.assert_array_equal(some.tokens.numpy(), tokens[5:7])


def test_scores_are_those_of_the_rows(files: dict[Arm, list[Path]]) -> None:
    ensemble, _, _ = opened()
    for arm in ("ME", "CE"):
        trace = sampled(arm)
        scores = scored_tokens(ensemble, trace.row_prompts()[:6], trace.tokens.numpy()[:6])
        for name in long_run.SCORED:
            np.testing.assert_allclose(column(files[arm], name), block_means(scores[name], 3), atol=1e-6)
        # Two of the three parts are scored, and the second has two rows: too few for a time.
        assert column(files[arm], "entropy time").shape == (4,)
        assert column(files[arm], "entropy pooled time").shape == (1, 4)


def test_arms_have_random_numbers_of_their_own_but_for_the_shared_path(files: dict[Arm, list[Path]]) -> None:
    path = {arm: sampled(arm).components for arm in ("ME", "same path", "control")}
    tokens = {arm: sampled(arm).tokens for arm in ARMS}
    assert torch.equal(path["ME"][:8], path["same path"])
    assert bool((tokens["ME"][:8] != tokens["same path"]).any(1).all())
    assert bool((path["control"] == path["control"][:, :1]).all())
    assert bool((path["ME"] != path["ME"][:, :1]).any())
    starts = [tokens[arm][:8, :6].tolist() for arm in ARMS]
    assert all(a != b for i, a in enumerate(starts) for b in starts[:i])
    # By the streams: no arm's seeds meet another's, nor those of a user's next run.
    assert len({long_run._STEP_SEEDS * i + seed for i in range(4) for seed in range(100)}) == 400


def test_arms_of_one_seed_would_repeat_each_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(long_run, "_STEP_SEEDS", 0)
    one = dataclasses.replace(PLAN, rows=8, batch=8, scored=0, control=8, paired=8, steps=6, blocks=3)
    found = generate(one, tmp_path)
    np.testing.assert_array_equal(column(found["ME"], "letters"), column(found["same path"], "letters"))


def test_held_tokens_are_what_the_caches_of_the_last_step_hold(files: dict[Arm, list[Path]]) -> None:
    """The same told as a story: each component reads all there is at its turns, and a hop empties its cache."""
    ensemble, prompts, _ = opened()
    rule = ensemble.components[0].model
    assert isinstance(rule, Windowed)
    path = sampled("ME").components.numpy()
    held = np.zeros((PLAN.rows, PLAN.blocks))
    for row in range(PLAN.rows):
        prompt = len(prompts[row % 3])
        for component in (0, 1):
            begin, cached = 0, 0
            for t in range(PLAN.steps):
                if rule.start(prompt + t) != begin:
                    begin, cached = int(rule.start(prompt + t)), 0
                if path[row, t] == component:
                    cached = prompt + t - begin
                if (t + 1) % 8 == 0:
                    held[row, t // 8] += cached
    np.testing.assert_array_equal(column(files["ME"], "held tokens"), held)
    np.testing.assert_array_equal(column(files["ME"], "component share"), block_means(path == 0, 3))


def test_without_a_window_caches_hold_what_was_read() -> None:
    toy = Ensemble([Endless(MarkovModel.random(3, seed=s)) for s in (0, 1)], ConstantMixing([0.5, 0.5]))
    found = long_run._paths(np.array([[0, 0, 1, 0, 0, 0]]), np.array([7]), toy, 2)
    # After 3 tokens component 0 has read 7 + 1 and component 1 7 + 2; after 6, 7 + 5 and 7 + 2.
    assert found["held tokens"].tolist() == [[17.0, 21.0]]
    assert found["longest wait"].tolist() == [[1, 3]]
    assert found["prefilled"].tolist() == [(7 + 1 + 9 + 2 + 1 + 1) / 6]


def test_rows_go_on_after_an_end_and_its_place_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _, _, setting = opened()
    space = setting.ensemble.vocabulary.encode(" ")[0]
    monkeypatch.setattr(long_run, "first_end", lambda tokens, eos: first_end(tokens, (space,)))
    plan = dataclasses.replace(PLAN, rows=8, batch=8, control=0, paired=0, scored=0, hop=9)
    files = generate(plan, tmp_path)
    assert files["control"] == files["same path"] == []
    ends = column(files["ME"], "end")
    assert (ends > 0).any()
    assert ends.max() <= plan.steps


# Interruptions and processes


class Stop:
    """Progress that ends the run as Ctrl-C does, once `parts` are finished."""

    def __init__(self, folder: Path, parts: int) -> None:
        self.folder, self.parts = folder, parts
        self.seen: list[tuple[float, Any]] = []

    def __call__(self, done: float, total: Any) -> None:
        self.seen.append((done, total))
        if len(list(self.folder.rglob("*.npz"))) >= self.parts:
            raise KeyboardInterrupt


def test_a_run_that_was_stopped_goes_on_to_the_same_files(files: dict[Arm, list[Path]], tmp_path: Path) -> None:
    for parts in (1, 6):
        stop = Stop(tmp_path, parts)
        with pytest.raises(KeyboardInterrupt):
            generate(PLAN, tmp_path, progress=stop)
        assert len(list(tmp_path.glob("*.npz"))) == parts
    seen: list[tuple[int, int]] = []
    again = generate(PLAN, tmp_path, progress=lambda *given: seen.append(given))
    # Every token once, and once more where it is scored.
    total = 24 * (10 + 10 + 8 + 9 + 2 * 6)
    assert seen[0][0] > 0
    assert seen[-1] == (total, total)
    assert seen == sorted(seen)
    for arm in ARMS:
        for one, other in zip(files[arm], again[arm], strict=True):
            assert one.read_bytes() == other.read_bytes()


def test_a_record_does_not_know_of_an_interruption(tmp_path: Path) -> None:
    long = tiny.experiment("long")
    config = long.Config(**tiny.OPTIONS["long"] | {
        "rows": 16, "steps": 24, "batch": 8, "blocks": 3, "window": 16, "hop": 8, "control": 8,
    })  # fmt: skip
    whole = long.run(config, work=tmp_path / "whole", workers=1)
    with pytest.raises(KeyboardInterrupt):
        long.run(config, Stop(tmp_path / "stopped", 1), work=tmp_path / "stopped", workers=1)
    kept = [(path, path.stat().st_mtime_ns) for path in (tmp_path / "stopped").rglob("*.npz")]
    assert len(kept) == 1
    seen: list[float] = []
    resumed = long.run(config, lambda done, note: seen.append(done), work=tmp_path / "stopped", workers=1)
    assert seen == sorted(seen)
    assert 0 <= seen[0] <= seen[-1] <= 1
    assert [(path, path.stat().st_mtime_ns) for path, _ in kept] == kept
    same = {"wall_s": 0.0, "finished": ""}
    assert dataclasses.replace(resumed, **same) == dataclasses.replace(whole, **same)
    for path in (tmp_path / "whole").rglob("*.npz"):
        assert path.read_bytes() == (tmp_path / "stopped" / path.relative_to(tmp_path / "whole")).read_bytes()
    # Another seed is another run, in a folder of its own.
    other = dataclasses.replace(config, seed=1)
    assert long.config_key("long", other) not in {path.name for path in (tmp_path / "whole").iterdir()}


# Refusals


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rows": 7}, "rows must be at least 8, got 7"),
        ({"steps": 3}, "steps must be at least 4, got 3"),
        ({"batch": 0}, "batch must be at least 1, got 0"),
        ({"blocks": 1}, "blocks must be at least 2, got 1"),
        ({"scored": -1}, "scored must be at least 0, got -1"),
        ({"scored": 11}, r"scored must lie in 0..10 \(rows\), got 11"),
        ({"paired": 11}, r"paired must lie in 0..10 \(rows\), got 11"),
        ({"paired": -1}, r"paired must lie in 0..10 \(rows\), got -1"),
        ({"control": -1}, r"control must be 0 \(none\) or at least 8 rows, got -1"),
        ({"control": 7}, r"control must be 0 \(none\) or at least 8 rows, got 7"),
        ({"blocks": 5}, "blocks must divide steps into blocks of two tokens or more, got 5 blocks of 24 tokens"),
        ({"blocks": 24}, "blocks must divide steps into blocks of two tokens or more"),
        ({"window": None}, "hop is how far a window moves, and there is none; give window too"),
    ],
)
def test_plans_that_make_no_sense_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(PLAN, **changes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"models": ()}, "models must name at least one model"),
        ({"weights": (0.2, 0.3, 0.5)}, "mixing has 3 weights for 2 components"),
        ({"weights": (0.2, 0.3)}, "weights must sum to 1"),
        ({"window": 10**6}, "window is 1000000 tokens, but .* reads at most"),
        ({"hop": 17}, r"hop must be an integer in 1..16 \(the window\), got 17"),
        ({"window": None, "hop": None, "steps": 3 * 10**6}, "give a window of at most .* tokens, or fewer steps"),
        ({"prompts": tuple("abcdef")}, "rows must be at least two for each of 6 prompts, got 10"),
    ],
)
def test_plans_that_the_models_cannot_run_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        open_plan(dataclasses.replace(PLAN, **changes))


def test_what_is_missing_or_damaged_is_named(files: dict[Arm, list[Path]], tmp_path: Path) -> None:
    with pytest.raises(KeyError, match="no part holds 'nonsense'"):
        column(files["ME"], "nonsense")
    with pytest.raises(KeyError, match="no part holds 'end'"):
        column([], "end")
    half = tmp_path / "ME-000000.npz"
    for content in (None, b"", b"nonsense", files["ME"][0].read_bytes()[:-40]):
        if content is not None:
            half.write_bytes(content)
        for read in (lambda: column([half], "end"), lambda: names_of([half])):
            with pytest.raises(ValueError, match=r"ME-000000.npz is missing or damaged .*; run again to compute it"):
                read()


# Memory

MEMORY = """
import re, tempfile
from pathlib import Path
import torch
from me_stats.long_run import LongPlan, generate
from me_stats.presets import SIBLINGS

torch.set_num_threads(1)
for rows, batch in ((8, 8), (128, 8), (128, 128)):
    plan = LongPlan(models=SIBLINGS, prompts=("The names of the " * 16,), weights=None, dtype="float32", device="cpu",
                    rows=rows, steps=16, batch=batch, blocks=4, window=None, hop=None, scored=0, paired=0, control=0,
                    seed=rows)
    with tempfile.TemporaryDirectory() as folder:
        generate(plan, Path(folder))
    # The peak of this program alone: ru_maxrss would count the one that started it.
    print(re.search(r"VmHWM:\\s+(\\d+)", Path("/proc/self/status").read_text())[1])
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux's account of a process")
def test_memory_is_that_of_one_part_however_many_rows_there_are() -> None:
    """The peak of one process after N rows, after 16N in parts of N, and after 16N at once."""
    done = subprocess.run([sys.executable, "-c", MEMORY], capture_output=True, text=True, timeout=300, check=True)
    few, many, together = map(int, done.stdout.split())
    # What rows that pile up would add is what they add at once; the allocator's own noise is some megabytes.
    assert many - few < (together - few) / 3, (few, many, together)
    assert together - few > 60_000, (few, many, together)


def test_time_spent_adds_up_over_runs(tmp_path: Path) -> None:
    plan = dataclasses.replace(PLAN, scored=0, paired=0, control=0)
    assert long_run.seconds_spent(tmp_path) == 0.0
    generate(plan, tmp_path)
    first = long_run.seconds_spent(tmp_path)
    (tmp_path / "seconds.json").write_text('{"seconds": 1000.0}\n', encoding="utf-8")
    generate(plan, tmp_path)
    assert first < 1000.0 <= long_run.seconds_spent(tmp_path) < 1000.0 + 60.0
    (tmp_path / "seconds.json").write_text("half a fi", encoding="utf-8")
    assert long_run.seconds_spent(tmp_path) == 0.0
