"""The main job: run the experiments part by part, keep what is finished, draw and report.

A part is one experiment on one set of models. Its record is written when it is complete, and a run that
finds a record of the same configuration does not do the part again.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.util
import inspect
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

from me_stats.presets import MIXED_SIBLINGS, SIBLINGS
from me_stats.record import Record, config_key, experiment_of
from me_stats.report import ABOUT_TESTS

# Real language models that a full run takes along: one under two system prompts, and two of different vocabularies.
LANGUAGE_MODEL = ("smollm2-135m",)
MIXED_MODELS = ("smollm2-135m", "gemma3-270m")

Progress = Callable[[float, str], None]


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


def load(folder: str, name: str) -> ModuleType:
    """Module `name` of the repository's ``experiments`` or ``figures`` folder.

    The folders stand beside the package in a clone, and inside it in an installed wheel.
    """
    package = Path(__file__).resolve().parent
    for root in (package.parent, package / "_shipped"):
        path = root / folder / f"{name}.py"
        if path.is_file():
            qualified = f"me_stats_{folder}.{name}"
            if qualified in sys.modules:
                return sys.modules[qualified]
            spec = importlib.util.spec_from_file_location(qualified, path)
            assert spec is not None
            assert spec.loader is not None
            module = importlib.util.module_from_spec(spec)
            sys.modules[qualified] = module  # dataclasses look their module up while it loads
            try:
                spec.loader.exec_module(module)
            except BaseException:
                del sys.modules[qualified]  # half a module would pass for a whole one in the next call
                raise
            return module
    raise FileNotFoundError(f"{folder}/{name}.py is neither beside the package nor inside it; reinstall me_stats")


def plan(
    *,
    quick: bool = False,
    models: Sequence[str] | None = None,
    dtype: str = "float32",
    device: str = "cpu",
    seed: int = 0,
) -> list[Part]:
    """The parts of a run: toys, then each set of models, then what shows how far our tests can be trusted.

    `models` replaces the default sets and leaves the last group out; the toys run in every case. `quick` makes samples
    of toys and siblings smaller and leaves out what needs a download.
    """
    toys = _config("toy_equivalence", seed=seed, **({"shapes": ((2, 5, 3), (3, 3, 3), (4, 2, 3))} if quick else {}))
    parts = [Part("toy_equivalence", "", toys)]
    where = {"dtype": dtype, "device": device, "seed": seed}
    if models is None:
        parts += _siblings(where, quick=quick)
        parts += _mixed(MIXED_SIBLINGS, "siblings-mixed", where, size="quick" if quick else "siblings")
        if not quick:
            # Long rows take half the time in half precision; the record states what rounding does.
            long = {"dtype": "bfloat16"} if dtype == "float32" else {}
            parts += _language_models(LANGUAGE_MODEL, where, long=long, speed=_SPEED if device == "cpu" else {})
            parts += _mixed(MIXED_MODELS, _tag(MIXED_MODELS), where, size="real")
        parts += _instruments(seed, quick=quick)
    elif tuple(models) == SIBLINGS:
        parts += _siblings(where, quick=quick)
    elif _several_vocabularies(models):
        size = "siblings" if tuple(models) == MIXED_SIBLINGS else "real"
        parts += _mixed(models, _tag(models), where, size="quick" if quick else size)
    else:
        parts += _language_models(models, where)
    return parts


def _siblings(where: dict[str, Any], *, quick: bool) -> list[Part]:
    small: dict[str, dict[str, Any]] = {
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
    # Of models this small the host's share is all there is to time; a full run times a language model.
    chosen = small if quick else {name: {} for name in small if name != "speed"}
    return [_part(name, "siblings", SIBLINGS, where, **options) for name, options in chosen.items()]


# What two quiet cores reach with models of one size: the record of a busy machine says which it missed.
_SPEED: dict[str, Any] = {
    "dtype": "bfloat16", "required_ratio": ((2, 1.85), (3, 2.7)), "required_share": 0.95, "required_batch_gain": 10.0,
    "cost_error": 0.15, "near_single": 0.1,
}  # fmt: skip


def _language_models(
    models: Sequence[str], where: dict[str, Any], *, long: dict[str, Any] | None = None,
    speed: dict[str, Any] | None = None,
) -> list[Part]:  # fmt: skip
    chosen: dict[str, dict[str, Any]] = {
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
        "speed": speed or {},
        "weights": {"text_bytes": 3000, "document_bytes": 300, "runs": 0},
        "long": {
            "rows": 48, "steps": 1024, "batch": 48, "window": None, "hop": None, "scored": 48, "paired": 24,
            "control": 32, **(long or {}),
        },
    }  # fmt: skip
    if len(models) > 1:
        chosen["mixed_vocabularies"] = {"rows": 2, "steps": 32, "tested": 3, "tested_steps": 24}
    return [_part(name, _tag(models), tuple(models), where, **options) for name, options in chosen.items()]


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


def _mixed(models: Sequence[str], tag: str, where: dict[str, Any], *, size: str) -> list[Part]:
    """Parts on models of different vocabularies: what they write over byte strings, and every test of that."""
    # Real models share 265,018 byte strings, so that laws are long and draws must be many.
    sizes: dict[str, dict[str, dict[str, Any]]] = {
        "real": {
            "per_step": {"prompts": 1, "draws": 4_000_000},
            "certificate": {"rows": 8, "steps": 32},
            "sequences": {"exact_cases": ((3, 3),), "rows": 32, "steps": 32, "coupled_rows": 4},
            "transform_order": {
                "rows": 12, "steps": 24, "sequence_rows": 16, "sequence_steps": 24, "curves": False,
            },
            "mixed_vocabularies": {"rows": 2, "steps": 32, "tested": 3, "tested_steps": 24},
            "tokenizer_audit": {},
        },
        "siblings": {
            "per_step": {}, "certificate": {}, "sequences": {"exact_cases": ((3, 5), (8, 3))}, "transform_order": {},
            "mixed_vocabularies": {},
            "tokenizer_audit": {"tokenizers": (), "files": (), "planted": True},
        },
        "quick": {
            "per_step": {"prompts": 1, "draws": 200_000, "margin": 0.03},
            "certificate": {"rows": 8, "steps": 32},
            "sequences": {"exact_cases": ((3, 3),), "rows": 64, "coupled_rows": 8, "steps": 32},
            "transform_order": {"rows": 8, "steps": 24, "sequence_rows": 64, "sequence_steps": 48},
            "mixed_vocabularies": {"rows": 1, "steps": 24, "tested": 16, "tested_steps": 24},
            "tokenizer_audit": {"tokenizers": (), "files": (), "planted": True, "rows": 4},
        },
    }  # fmt: skip
    return [_part(name, tag, tuple(models), where, **options) for name, options in sizes[size].items()]


def _instruments(seed: int, *, quick: bool) -> list[Part]:
    small: dict[str, dict[str, Any]] = {
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
    chosen = small if quick else {name: {} for name in small}
    return [Part(name, "", _config(name, seed=seed, **options)) for name, options in chosen.items()]


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


def finished(part: Part, records: Path) -> Record | None:
    """The part's record, if it was completed with this configuration and all its checks held."""
    path = records / f"{part.name}.json"
    try:
        record = Record.load(path)
    except (OSError, ValueError):
        return None
    return record if record.key == part.key and record.held else None


def run_part(part: Part, records: Path, progress: Progress) -> Record:
    """Run a part and write its record."""
    run = load("experiments", part.experiment).run
    # Long parts keep what they have done in a folder of their own.
    resumable = {"work": records.parent / "work"} if "work" in inspect.signature(run).parameters else {}
    with _threads(part):
        record: Record = run(part.config, progress, **resumable)
    record = dataclasses.replace(record, name=part.name)
    record.save(records / f"{part.name}.json")
    return record


@contextlib.contextmanager
def _threads(part: Part) -> Iterator[None]:
    """One thread for tiny models: several gain nothing there, and on a busy machine they wait for each other."""
    import torch

    before = torch.get_num_threads()
    if all(name.startswith("bundled:") for name in getattr(part.config, "models", ())):
        torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


# The order in which a report tells the story: the paper's claims, and then how far our tests can be trusted.
ORDER = (
    "toy_equivalence",
    "per_step",
    "certificate",
    "sequences",
    "cache_floor",
    "transform_order",
    "repairs",
    "generation",
    "speed",
    "mixed_vocabularies",
    "tokenizer_audit",
    "weights",
    "sensitivity",
    "routers",
    "long",
    "shared_draws",
    "variance_reduction",
    "long_toys",
    "long_coverage",
    "speed_forecast",
    *ABOUT_TESTS,
)


def rank(name: str) -> int:
    """Place of a record in the report."""
    experiment = experiment_of(name)
    return ORDER.index(experiment) if experiment in ORDER else len(ORDER)


def draw_figures(records: Sequence[Record], folder: Path) -> dict[str, list[Any]]:
    """Figures of each record by record name; an experiment without a figure script has none."""
    figures: dict[str, list[Any]] = {}
    for record in records:
        experiment = experiment_of(record.name)
        if experiment in ORDER:
            try:
                script = load("figures", experiment)
            except FileNotFoundError:
                continue
            figures[record.name] = [script.draw(record, folder)]
    return figures
