"""A tiny run of every experiment, made once, for the tests of whatever reads records."""

from __future__ import annotations

import dataclasses
import os
import tempfile
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path
from types import ModuleType
from typing import Any

from filelock import FileLock

from me_stats import scripts
from me_stats.presets import SIBLINGS
from me_stats.record import Record, config_key, plain

OPTIONS: dict[str, dict[str, Any]] = {
    "toy_equivalence": {"shapes": ((2, 3, 3), (3, 2, 3)), "toys": 1},
    "per_step": {"prompts": 1, "draws": 20_000, "shift": 0.2, "margin": 0.05},
    "certificate": {"rows": 4, "steps": 12, "component_draws": 400_000},
    "sequences": {"exact_cases": ((3, 3),), "rows": 64, "steps": 32, "coupled_rows": 4},
    "cache_floor": {"dtypes": ("float32", "bfloat16"), "lags": (1, 2, 4), "rows": 2, "steps": 12},
    "transform_order": {"rows": 4, "steps": 16, "sequence_rows": 24, "sequence_steps": 16},
    "repairs": {
        "toys": 1, "exact_cases": (("top-k 5", 1), ("greedy", 3)), "rows": 24, "steps": 24, "first": 100,
        "second_level": 0.01, "permutations": 999, "without_repairs": ("top-k 5", "top-k 10"), "repairs_from_q": (),
        "chunks": (1, 4), "batches": (1, 4), "timed_steps": 24, "repeats": 1,
    },
    "generation": {"batches": (1, 64), "steps": 24, "repeats": 1},
    "speed": {
        "models": SIBLINGS, "dtype": "float32", "components": (1, 2), "batches": (1, 4), "steps": 6, "batch_steps": 4,
        "prompt_length": 6, "rounds": 2, "spans": (1, 2, 4), "contexts": (6, 16), "curve_dtypes": (),
        "arms": ("single", "CE", "ME", "ME lockstep", "ME shared", "CE top-k", "speculative"),
    },
    "mixed_vocabularies": {"rows": 1, "steps": 16, "tested": 8, "tested_steps": 16, "bytes": 12},
    "tokenizer_audit": {
        "models": SIBLINGS, "tokenizers": (), "files": (), "planted": True, "rows": 4, "steps": 12,
    },
    "accuracy": {"tasks": ("indentation", "stdlib_bpb:prose"), "limit": 8, "texts": 2, "runs": 2, "margin": 0.5},
    "weights": {
        "text_bytes": 3000, "document_bytes": 300, "runs": 60, "run_tokens": 1000, "solver_tokens": 20_000,
    },
    "sensitivity": {
        "toys": 2, "toy_rows": 1500, "points": 5, "rows": 8, "steps": 12, "text_bytes": 3000, "document_bytes": 300,
        "triangle": 4, "triangle_rows": 400,
    },
    "routers": {
        "documents": 96, "longest": 448, "epochs": 16, "width": 16, "betas": (0.0, 0.05, 1.0), "prompts": 1,
        "rows": 200, "steps": 16, "first": 2000, "diverse_rows": 4, "diverse_steps": 12, "shown": 160,
    },
    "long": {
        "rows": 48, "steps": 120, "batch": 64, "blocks": 6, "window": 64, "hop": 48, "scored": 16, "paired": 16,
        "control": 64, "weights": (0.5, 0.5), "level": 0.02,
    },
    "shared_draws": {
        "batches": (2, 8), "groups": 30, "rows": 240, "coverage_runs": 40, "runs": 60, "power_runs": 60, "shift": 0.35,
        "permutations": 99, "sibling_groups": 5, "steps": 16, "timed_groups": 1, "repeats": 1,
    },
    "variance_reduction": {"rows": 16, "steps": 24, "path_rows": 4, "toys": 1, "toy_runs": 40, "toy_rows": 60},
    "audit": {"tables": 3000},
    "long_toys": {
        "rows": 500, "steps": 64, "long_rows": 8, "long_steps": 10_000, "window": 1000, "waits": (100, 1000, 10_000),
        "test_rows": 200, "test_level": 1e-3,
    },
    "long_coverage": {"repeats": 120, "steps": 224, "pairs": 2000, "many": 600},
    "speed_forecast": {
        "groups": ("qwen", "mixed"), "batches": (1, 8, 32), "steps": 64, "overheads": (0.05, 0.5),
        "equal_sizes": (1, 3), "launches": (0.0, 0.02),
    },
    "generate_judged": {"prompts": 1, "rows": 600, "assisted_rows": 30, "steps": 16},
    "calibration": {
        "runs": 450, "zipf_runs": 30, "sequence_runs": 48, "pool_rows": 96, "two_sample_runs": 12, "far_runs": 4000,
        "steps": 8,
    },
    "tv_bounds": {
        "grid": ((64, (1000, 10_000), 120), (2000, (10_000,), 20)), "sequence_draws": (500,), "sequence_runs": 30,
    },
    "power": {
        "mutants": (
            "one component per sequence", "sticky component", "stale cache at 5% of switches",
            "zero-probability token drawn", "stops with the first row",
        ),
        "seeds": 3, "cap": 3000, "rows": 150, "sibling_seeds": 1, "slow": False, "repeats": 1, "points": 40,
    },
    "power_one_step": {
        "grid": ((256, 10_000, 30), (3000, 2000, 10)), "sequence_runs": 3, "rows": 300, "steps": 24,
    },
}  # fmt: skip

# Experiments whose planted bugs and progress have a test file of their own.
APART = {
    "speed": "test_speed.py",
    "calibration": "test_calibration.py",
    "tv_bounds": "test_tv_bounds.py",
    "certificate": "test_certificate.py",
    "generate_judged": "test_generate_judged.py",
    "power": "test_power.py",
    "power_one_step": "test_power.py",
    "transform_order": "test_transform_order.py",
    "repairs": "test_repairs_experiment.py",
    "mixed_vocabularies": "test_mixed_vocabularies.py",
    "tokenizer_audit": "test_tokenizer_audit_experiment.py",
    "audit": "test_audit_experiment.py",
    "accuracy": "test_accuracy.py",
    "weights": "test_weights_experiment.py",
    "sensitivity": "test_sensitivity_experiment.py",
    "routers": "test_routers.py",
    "long": "test_long.py",
    "shared_draws": "test_shared_draws.py",
    "variance_reduction": "test_variance_reduction.py",
    "long_toys": "test_long_toys.py",
    "long_coverage": "test_long_coverage.py",
    "speed_forecast": "test_speed_forecast.py",
}


def experiment(name: str) -> ModuleType:
    """The module that the main job would run."""
    return scripts.load("experiments", name)


def config(name: str, **changes: Any) -> Any:
    """The tiny configuration of an experiment, with `changes`."""
    return experiment(name).Config(**(OPTIONS[name] | changes))


@cache
def record(name: str) -> Record:
    """What the tiny configuration of an experiment leaves behind; workers of one test run share it."""
    run = os.environ.get("PYTEST_XDIST_TESTRUNUID")
    if run is None:
        result: Record = _RUNS[name](config(name))
        return result
    folder = Path(tempfile.gettempdir()) / f"me_stats-tests-{run}"
    folder.mkdir(exist_ok=True)
    path = folder / f"{name}.json"
    with FileLock(path.with_suffix(".lock")):
        if not path.exists():
            _RUNS[name](config(name)).save(path)
        return Record.load(path)


def stand_in(name: str, resolved: Any) -> Record:
    """The tiny record under the key of the configuration `resolved`: a run of it that takes no time."""
    return dataclasses.replace(record(name), key=config_key(name, resolved), config=plain(resolved))


# Tests put other functions in their place.
_RUNS: dict[str, Callable[[Any], Record]] = {name: experiment(name).run for name in OPTIONS}
_RUNS["long"] = partial(_RUNS["long"], workers=1)  # type: ignore[call-arg]  # a process takes longer to start
