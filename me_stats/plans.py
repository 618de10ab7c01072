"""What the main job runs: experiments, models and sizes.

Three sizes. *quick* takes toys and the bundled models, with small samples. *laptop*, the default, adds real language
models where each shows what the others cannot, and ends within a quarter of an hour on two cores. *full* is what the
committed records come from.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from me_stats.presets import MIXED_SIBLINGS, SIBLINGS
from me_stats.record import config_key
from me_stats.scripts import load

Size = Literal["quick", "laptop", "full"]
Options = dict[str, dict[str, Any]]

# Real language models that a run takes along: one under two system prompts, and two of different vocabularies.
LANGUAGE_MODEL = ("smollm2-135m",)
MIXED_MODELS = ("smollm2-135m", "gemma3-270m")


@dataclass(frozen=True)
class Part:
    """One experiment on one set of models."""

    experiment: str
    tag: str
    config: Any

    @property
    def name(self) -> str:
        return f"{self.experiment}-{self.tag}" if self.tag else self.experiment

    @property
    def key(self) -> str:
        return config_key(self.experiment, self.config)


def plan(
    *,
    size: Size = "laptop",
    models: Sequence[str] | None = None,
    several: bool | None = None,
    data: bool = False,
    dtype: str = "float32",
    device: str = "cpu",
    seed: int = 0,
) -> list[Part]:
    """The parts of a run: toys, then each set of models, then what shows how far our tests can be trusted.

    `models` replaces the default sets and leaves the last group out; the toys run in every case. `several` says whether
    they have several vocabularies, None: look at those that are on this machine. With `data`, language models also do
    the benchmarks, whose files the caller has.

    >>> [len(plan(size=size)) for size in ("quick", "laptop", "full")]
    [31, 39, 46]
    """
    toys = {"shapes": ((2, 5, 3), (3, 3, 3), (4, 2, 3))} if size != "full" else {}
    parts = [Part("toy_equivalence", "", _config("toy_equivalence", seed=seed, **toys))]
    where = {"dtype": dtype, "device": device, "seed": seed}
    if models is None:
        parts += _siblings(size, where, speed=size == "quick")
        parts += _parts(_MIXED_SIBLINGS[size], "siblings-mixed", MIXED_SIBLINGS, where)
        if size != "quick":
            parts += _parts(_language_model(size, where), _tag(LANGUAGE_MODEL), LANGUAGE_MODEL, where)
            parts += _parts(_BENCHMARKS[size] if data else {}, _tag(LANGUAGE_MODEL), LANGUAGE_MODEL, where)
            parts += _parts(_MIXED[size], _tag(MIXED_MODELS), MIXED_MODELS, where)
            parts += _parts(_MIXED_BENCHMARKS if data else {}, _tag(MIXED_MODELS), MIXED_MODELS, where)
        parts += [Part(name, "", _config(name, seed=seed, **options)) for name, options in _INSTRUMENTS[size].items()]
    elif tuple(models) == SIBLINGS:
        parts += _siblings(size, where)
    elif several or (several is None and _several_vocabularies(models)):
        bundled = tuple(models) == MIXED_SIBLINGS
        parts += _parts((_MIXED_SIBLINGS if bundled else _MIXED)[size], _tag(models), models, where)
        parts += _parts(_MIXED_BENCHMARKS if data and not bundled else {}, _tag(models), models, where)
    else:
        parts += _parts(_LANGUAGE[size] | (_SEVERAL if len(models) > 1 else {}), _tag(models), models, where)
        parts += _parts(_BENCHMARKS[size] if data else {}, _tag(models), models, where)
    return parts


def _parts(sizes: Mapping[str, dict[str, Any]], tag: str, models: Sequence[str], where: dict[str, Any]) -> list[Part]:
    return [_part(name, tag, models, where, **options) for name, options in sizes.items()]


def _siblings(size: Size, where: dict[str, Any], *, speed: bool = True) -> list[Part]:
    # Of models this small the host's share is all there is to time: other runs time a language model.
    chosen = {name: options for name, options in _SIBLINGS[size].items() if speed or name != "speed"}
    return _parts(chosen, "siblings", SIBLINGS, where)


def _language_model(size: Size, where: dict[str, Any]) -> Options:
    chosen = dict(_LANGUAGE[size])
    if size == "full" and where["device"] == "cpu":
        chosen["speed"] = _TARGETS
    if where["dtype"] == "float32":
        # Speed is asked of the precision that people run, and long rows take half the time in it; records say so.
        chosen |= {name: chosen[name] | {"dtype": "bfloat16"} for name in ("speed", "long") if name in chosen}
    return chosen


def _several_vocabularies(models: Sequence[str]) -> bool:
    """Whether models that lie on this machine differ in their vocabularies; no network is asked for others."""
    from me_stats.models import catalog
    from me_stats.tokenizer_sources import RefusedTokenizer, open_tokenizer

    here = [name for name in models if (catalog.pulled(name) if name in catalog.CATALOG else Path(name).is_dir())]
    if len(here) < 2:
        return False
    try:
        return len({open_tokenizer(name).table.fingerprint for name in here}) > 1
    except (RefusedTokenizer, ValueError, OSError):
        return False  # the parts will say what is wrong


def _tag(models: Sequence[str]) -> str:
    return "+".join(name.replace("/", "_").replace(":", "_") for name in models)


def _part(name: str, tag: str, models: Sequence[str], where: dict[str, Any], **options: Any) -> Part:
    # Not all take everything: the cache floor is measured in every dtype, so it has none of its own.
    taken = {field.name for field in dataclasses.fields(load("experiments", name).Config)}
    known = {option: value for option, value in where.items() if option in taken and option not in options}
    # What an accelerator gives stands beside what a processor gives.
    kind = where["device"].partition(":")[0]
    tag += "" if kind == "cpu" else f"-{kind}"
    return Part(name, tag, _config(name, models=tuple(models), **known, **options))


def _config(name: str, **options: Any) -> Any:
    return load("experiments", name).Config(**options)


# --- sizes ----------------------------------------------------------------------------------------------

_SMALL_SIBLINGS: Options = {
    "per_step": {"prompts": 2, "draws": 100_000, "margin": 0.02},
    "certificate": {"rows": 8, "steps": 32},
    "sequences": {"exact_cases": ((3, 4), (0, 1)), "rows": 64, "coupled_rows": 8, "steps": 48},
    "cache_floor": {"rows": 4, "steps": 64},
    "transform_order": {"rows": 8, "steps": 32, "sequence_rows": 64, "sequence_steps": 64},
    "repairs": {"toys": 1, "rows": 96, "steps": 48, "first": 500, "repeats": 2, "repairs_from_q": ()},
    "generation": {"repeats": 1},
    "speed": {
        "components": (1, 2, 3), "batches": (1, 4, 16), "steps": 16, "batch_steps": 8, "rounds": 3,
        "spans": (1, 2, 4, 8, 16), "contexts": (8, 24), "curve_dtypes": (),
        "arms": ("single", "CE", "ME", "ME lockstep", "ME shared"),
    },
    "accuracy": {"limit": 40, "runs": 3, "texts": 4},
    "weights": {"text_bytes": 8000, "document_bytes": 500, "runs": 100, "solver_tokens": 100_000},
    "sensitivity": {
        "toys": 3, "toy_rows": 3000, "points": 5, "rows": 16, "steps": 24, "text_bytes": 8000,
        "document_bytes": 500, "triangle": 5, "triangle_rows": 600,
    },
    "routers": {
        "longest": 512, "epochs": 16, "width": 16, "betas": (0.0, 0.05, 1.0), "first": 4000, "diverse_rows": 16,
        "diverse_steps": 48,
    },
    "long": {
        "rows": 128, "steps": 512, "batch": 64, "blocks": 8, "scored": 64, "paired": 64, "control": 32,
    },
    "shared_draws": {
        "coverage_runs": 60, "runs": 200, "power_runs": 60, "shift": 0.35, "sibling_groups": 24,
        "timed_groups": 2, "repeats": 1,
    },
    "variance_reduction": {"rows": 48, "steps": 64, "path_rows": 4, "toys": 1, "toy_runs": 100},
}  # fmt: skip
_SIBLINGS: dict[Size, Options] = {
    "quick": _SMALL_SIBLINGS,
    "laptop": _SMALL_SIBLINGS,
    "full": {name: {} for name in _SMALL_SIBLINGS} | {"accuracy": {"limit": 421, "runs": 8, "texts": 40}},
}

# What two quiet cores reach with models of one size: the record of a busy machine says which it missed.
_TARGETS: dict[str, Any] = {
    "required_ratio": ((2, 1.85), (3, 2.7)), "required_share": 0.95, "required_batch_gain": 10.0,
    "cost_error": 0.15, "near_single": 0.1,
}  # fmt: skip

_LANGUAGE_FULL: Options = {
    "per_step": {"prompts": 1, "draws": 2_000_000},
    "certificate": {"rows": 8, "steps": 48},
    "sequences": {"exact_cases": ((3, 3),), "rows": 64, "steps": 32, "coupled_rows": 4},
    "cache_floor": {"rows": 4, "steps": 48, "lags": (1, 4, 16)},
    "transform_order": {"rows": 8, "steps": 32, "sequence_rows": 32, "sequence_steps": 100},
    "repairs": {
        "toys": 0, "rows": 16, "steps": 16, "first": 64, "permutations": 999, "second_level": 0.01,
        "without_repairs": (), "repairs_from_q": (), "exact_cases": (("top-k 5", 1), ("greedy", 3)),
        "chunks": (2, 4, 8), "batches": (1,), "timed_steps": 32,
    },
    "generation": {"steps": 16},
    "speed": {},
    "weights": {"text_bytes": 3000, "document_bytes": 300, "runs": 0},
    "long": {
        "rows": 48, "steps": 1024, "batch": 48, "window": None, "hop": None, "scored": 48, "paired": 24,
        "control": 32,
    },
}  # fmt: skip

# Each claim that a real model can speak to, at the size at which every check still has the power that it states.
_LANGUAGE_LAPTOP: Options = {
    "per_step": {"prompts": 1, "draws": 1_000_000},
    "certificate": {"rows": 4, "steps": 32},
    "sequences": {"exact_cases": ((3, 3),), "rows": 64, "steps": 32, "coupled_rows": 2},
    "cache_floor": {"rows": 2, "steps": 32, "lags": (1, 4, 16)},
    "transform_order": {"rows": 4, "steps": 24, "sequence_rows": 12, "sequence_steps": 48},
    "speed": {
        "components": (1, 2, 3), "batches": (1, 4), "weights": ((0.5, 0.5),), "steps": 24, "rounds": 3,
        "spans": (1, 2, 4, 16), "curve_dtypes": (),
        "arms": ("single", "CE", "CE parallel", "ME", "ME lockstep", "ME shared"),
    },
    "weights": {"text_bytes": 3000, "document_bytes": 300, "runs": 0},
}  # fmt: skip
_LANGUAGE: dict[Size, Options] = {"quick": _LANGUAGE_LAPTOP, "laptop": _LANGUAGE_LAPTOP, "full": _LANGUAGE_FULL}

# Tasks of the paper's tables. Letters are one token, so that their accuracies are summed exactly.
_BENCHMARKS_SMALL: Options = {"accuracy": {"tasks": ("arc_challenge",), "limit": 24, "runs": 2}}
_BENCHMARKS: dict[Size, Options] = {
    "quick": _BENCHMARKS_SMALL,
    "laptop": _BENCHMARKS_SMALL,
    "full": {
        "accuracy": {
            "tasks": ("arc_challenge", "bbh:boolean_expressions"), "limit": 48, "runs": 2, "fewshot": 2,
            "max_new_tokens": 128,
        },
    },
}  # fmt: skip
_MIXED_BENCHMARKS: Options = {"accuracy": {"tasks": ("arc_challenge",), "limit": 32, "runs": 2}}

# Several models over one vocabulary can also be mixed as if it were not one.
_SEVERAL: Options = {"mixed_vocabularies": {"rows": 2, "steps": 32, "tested": 3, "tested_steps": 24}}

_SMALL_MIXED_SIBLINGS: Options = {
    "per_step": {"prompts": 1, "draws": 200_000, "margin": 0.03},
    "certificate": {"rows": 8, "steps": 32},
    "sequences": {"exact_cases": ((3, 3),), "rows": 64, "coupled_rows": 8, "steps": 32},
    "transform_order": {"rows": 8, "steps": 24, "sequence_rows": 64, "sequence_steps": 48},
    "mixed_vocabularies": {"rows": 1, "steps": 24, "tested": 16, "tested_steps": 24},
    "tokenizer_audit": {"tokenizers": (), "files": (), "planted": True, "rows": 4},
}
_MIXED_SIBLINGS: dict[Size, Options] = {
    "quick": _SMALL_MIXED_SIBLINGS,
    "laptop": _SMALL_MIXED_SIBLINGS,
    "full": {
        "per_step": {}, "certificate": {}, "sequences": {"exact_cases": ((3, 5), (8, 3))}, "transform_order": {},
        "mixed_vocabularies": {},
        "tokenizer_audit": {"tokenizers": (), "files": (), "planted": True},
    },
}  # fmt: skip

# Real models share 265,018 byte strings, so that laws are long and draws must be many.
_MIXED_FULL: Options = {
    "per_step": {"prompts": 1, "draws": 4_000_000},
    "certificate": {"rows": 8, "steps": 32},
    "sequences": {"exact_cases": ((3, 3),), "rows": 32, "steps": 32, "coupled_rows": 4},
    "transform_order": {
        "rows": 12, "steps": 24, "sequence_rows": 16, "sequence_steps": 24, "curves": False,
    },
    "mixed_vocabularies": {"rows": 2, "steps": 32, "tested": 3, "tested_steps": 24},
    "tokenizer_audit": {},
}  # fmt: skip
_MIXED_LAPTOP: Options = {
    "per_step": {"prompts": 1, "draws": 2_000_000},
    "certificate": {"rows": 4, "steps": 16},
}
_MIXED: dict[Size, Options] = {"quick": _MIXED_LAPTOP, "laptop": _MIXED_LAPTOP, "full": _MIXED_FULL}

_SMALL_INSTRUMENTS: Options = {
    "audit": {},
    "long_toys": {
        "rows": 2000, "steps": 512, "long_steps": 100_000, "window": 1000, "waits": (100, 1000, 10_000, 100_000),
    },
    "long_coverage": {"repeats": 400},
    "speed_forecast": {"batches": (1, 4, 16, 64, 256), "equal_sizes": (1, 2, 4)},
    "generate_judged": {"rows": 500, "assisted_rows": 30},
    "calibration": {
        "runs": 500, "zipf_runs": 80, "sequence_runs": 80, "pool_rows": 300, "two_sample_runs": 40,
        "far_runs": 50_000,
    },
    "tv_bounds": {
        "grid": ((256, (1000, 10_000, 100_000), 60), (50_257, (100_000,), 12)), "sequence_draws": (1000,),
        "sequence_runs": 60,
    },
    "power": {
        "mutants": (
            "one component per sequence", "sticky component", "components in turn", "stale cache",
            "weights off by five points", "top-k after mixing", "last token dropped", "random numbers reused",
            "seed ignored", "zero-probability token drawn", "stops with the first row",
        ),
        "seeds": 3, "cap": 30_000, "rows": 600, "sibling_seeds": 2, "slow": False,
    },
    "power_one_step": {"grid": ((256, 10_000, 60), (50_257, 10_000, 12)), "sequence_runs": 4},
}  # fmt: skip
_INSTRUMENTS: dict[Size, Options] = {
    "quick": _SMALL_INSTRUMENTS,
    "laptop": _SMALL_INSTRUMENTS,
    "full": {name: {} for name in _SMALL_INSTRUMENTS},
}
