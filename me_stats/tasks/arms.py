"""CE, ME and the models by themselves on the same tasks: run, compared item by item, and written as a record."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from me_stats.models import TransformersModel, Warped
from me_stats.orders import OrderedLaw, Transforms
from me_stats.paired import paired_difference
from me_stats.presets import open_setting
from me_stats.record import Record, Recorder, config_key, plain
from me_stats.samplers import CESampler, MESampler
from me_stats.samplers.base import Sampler
from me_stats.tasks.definitions import BENCHMARKS, task
from me_stats.tasks.run import ItemScores, evaluate

NAME = "eval"
ARMS = ("CE", "ME", "single")
_SHARE = ("exact_match", "acc", "acc_norm")  # metrics that are a share of items


@dataclass(frozen=True)
class EvalPlan:
    """What to run: models and weights, transforms before the mixture, arms, tasks, and how many runs of which items.

    Attributes
    ----------
    data
        Folder with a folder for each of gsm8k, mmlu, bbh, arc_challenge; None: datasets of the hub.
    arms
        Of ``CE``, ``ME`` and ``single``, which is each model by itself.
    weights
        λ; () for one model.
    fewshot, limit, max_new_tokens, batch
        As in `task` and `evaluate`; None: their defaults.
    seed, seeds
        The runs are seeded by seed, seed + 1, ..., as many as `seeds`.
    margin
        Difference of accuracies, in (0, 1), that is taken for none.
    """

    models: tuple[str, ...]
    tasks: tuple[str, ...]
    data: Path | None = None
    arms: tuple[str, ...] = ("CE", "ME")
    transforms: Transforms = field(default_factory=Transforms)
    weights: tuple[float, ...] = ()
    fewshot: int | None = None
    limit: int | None = None
    seed: int = 0
    seeds: int = 1
    max_new_tokens: int | None = None
    batch: int | None = None
    chat: bool = False
    margin: float = 0.02
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    device: str = "cpu"

    def __post_init__(self) -> None:
        unknown = [arm for arm in self.arms if arm not in ARMS]
        if unknown or not self.arms or len(set(self.arms)) < len(self.arms):
            raise ValueError(f"arms must be some of {', '.join(ARMS)}, each once, got {' '.join(self.arms)}")
        if len(self.models) == 1 and self.arms != ("single",):
            raise ValueError("one model is no ensemble: give two models or more, or the arm single")
        if len(self.models) > 1 and len(self.weights) != len(self.models):
            raise ValueError(f"weights has {len(self.weights)} values for {len(self.models)} models; give one each")
        if not 0 < self.margin < 1:
            raise ValueError(f"margin must lie between 0 and 1, got {self.margin}")
        if self.seeds < 1 or not self.tasks or len(set(self.tasks)) < len(self.tasks):
            raise ValueError("need at least one seed, and at least one task, each once")
        self.transforms.warps()

    def open_tasks(self) -> dict[str, Any]:
        """The tasks by name; ValueError, before any model is opened, for names and data that are not there."""
        found: dict[str, Any] = {}
        for name in self.tasks:
            group = name.partition(":")[0]
            place = None if self.data is None or group not in BENCHMARKS else self.data / group
            found |= task(name, data=place, fewshot=self.fewshot if group not in _NO_SHOTS else None)
        return found


_NO_SHOTS = ("closing_brackets", "indentation", "stdlib_bpb")


def run(
    plan: EvalPlan,
    tasks: Mapping[str, Any],
    work: Path,
    progress: Callable[[float, str], None] = lambda fraction, note: None,
) -> Record:
    """Run every arm on `tasks`, those of the plan, and compare CE and ME. `work` keeps the texts, an arm a folder.

    The same plan goes on where it stopped; one with more seeds, tasks or items takes over what is there.
    """
    recorder = Recorder(NAME, f"{', '.join(plan.models)} on {', '.join(plan.tasks)}", plan)
    progress(0.0, "opening the models")
    samplers, models = _samplers(plan)
    for name, model in models:
        recorder.add_model(name, model)
    found: dict[str, dict[str, ItemScores]] = {}
    for place, (arm, sampler) in enumerate(samplers.items()):

        def tell(done: int, total: int, name: str, place: int = place, arm: str = arm) -> None:
            progress((place + done / max(1, total)) / len(samplers), f"{arm}: {name}, {done:,} of {total:,} answers")

        found[arm] = evaluate(
            sampler, tasks, seeds=range(plan.seed, plan.seed + plan.seeds), limit=plan.limit,
            work=text_folder(plan, work) / _file_name(arm), progress=tell, max_new_tokens=plan.max_new_tokens,
            batch_size=plan.batch, chat=plan.chat,
        )  # fmt: skip
    return recorder.finish(results(found, margin=plan.margin))


def text_folder(plan: EvalPlan, work: Path) -> Path:
    """Where the texts of a plan's arms are kept: one folder for all plans that draw from the same laws."""
    law = [plan.models, plan.weights, plan.transforms, plan.chat, plan.dtype, plan.device]
    return work / config_key(NAME, law)


def results(found: Mapping[str, Mapping[str, ItemScores]], *, margin: float) -> dict[str, Any]:
    """What a record says of the scores by arm and task.

    Groups, the tasks whose names agree up to a colon, are also taken as one set of items. The differences are ME - CE,
    where both ran and scores are shares; scores without chance, from exact laws, are the same in both.
    """
    arms, first = list(found), next(iter(found.values()))
    tasks = []
    for name, scores in first.items():
        tasks.append({
            "task": name, "metric": scores.metric, "items": scores.items, "of": scores.of,
            "runs": scores.scores.shape[1], "mean": {arm: found[arm][name].mean for arm in arms},
            "scores": {arm: found[arm][name].scores for arm in arms},
        })  # fmt: skip
    groups: dict[str, list[str]] = {}
    for name, scores in first.items():
        if scores.metric in _SHARE:
            groups.setdefault(name.partition(":")[0], []).append(name)
    groups = {group: names for group, names in groups.items() if len(names) > 1}
    differences = []
    if {"CE", "ME"} <= found.keys():
        shares = {name: [name] for name, scores in first.items() if scores.metric in _SHARE} | groups
        for name, members in shares.items():
            me, ce = (_stacked([found[arm][one] for one in members]) for arm in ("ME", "CE"))
            difference = paired_difference(me, ce, margin=margin, paired_runs=me.shape[1] > 1)
            differences.append({"task": name, "first": "ME", "second": "CE"} | plain(difference))
    return {
        "arms": arms, "tasks": tasks, "differences": differences, "margin": margin,
        "groups": [
            {"task": group, "tasks": len(names), "items": sum(len(first[one].items) for one in names),
             "mean": {arm: float(_stacked([found[arm][one] for one in names]).mean()) for arm in arms}}
            for group, names in groups.items()
        ],
    }  # fmt: skip


def _stacked(scores: Sequence[ItemScores]) -> NDArray[np.float64]:
    """The items of several tasks as one set; those with one run stand for as many as the others have."""
    runs = max(one.scores.shape[1] for one in scores)
    return np.concatenate([np.broadcast_to(one.scores, (len(one.items), runs)) for one in scores])


def _samplers(plan: EvalPlan) -> tuple[dict[str, Sampler], list[tuple[str, Any]]]:
    if len(plan.models) == 1:
        model = TransformersModel(plan.models[0], dtype=plan.dtype, device=plan.device)
        warps = plan.transforms.warps()
        return {plan.models[0]: CESampler(Warped(model, *warps) if warps else model)}, [(plan.models[0], model)]
    setting = open_setting(plan.models, weights=plan.weights, dtype=plan.dtype, device=plan.device)
    mixture = OrderedLaw("transform-then-mix", plan.transforms, plan.weights).over(setting.ensemble.components)
    samplers: dict[str, Sampler] = {}
    for arm in plan.arms:
        if arm == "single":
            for number, (name, part) in enumerate(zip(plan.models, mixture.components, strict=True)):
                samplers[name if plan.models.count(name) == 1 else f"{name} ({number + 1})"] = CESampler(part)
        else:
            samplers[arm] = MESampler(mixture) if arm == "ME" else CESampler(mixture)
    return samplers, list(setting.models)


def _file_name(arm: str) -> str:
    return "".join(char if char.isalnum() or char in "-._" else "+" for char in arm)
