"""C10, and C9 in accuracy: the tasks of the tables, run with CE, with ME and with the published CE at k = 5.

CE and ME with top-k inside the components have one law, so their accuracies differ by noise alone. The published CE
truncates the mixture, which is another law: how far do its accuracies move? Where an answer is short, expected
accuracies are summed exactly and sampled ones are checked against them; elsewhere paired runs on the same items are
compared, for these items and for items like these. Bits per byte say whether the mixture gains over its components.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from me_stats.models import Conditioned, Ensemble
from me_stats.orders import OrderedLaw, Transforms
from me_stats.paired import PairedDifference, items_needed, paired_difference
from me_stats.presets import SIBLINGS, Setting, open_recorded
from me_stats.record import Record, Recorder, config_key
from me_stats.samplers import CESampler, MESampler
from me_stats.sensitivity.estimate import mean_estimate
from me_stats.tails import detectable_shift
from me_stats.tasks.definitions import BENCHMARKS, task
from me_stats.tasks.expected import ExpectedScores, expected_scores
from me_stats.tasks.run import ItemScores, evaluate

Floats = NDArray[np.float64]

NAME, TITLE = "accuracy", "Accuracy on tasks: CE, ME and the published CE"
DATA = "ME_STATS_DATA"
LETTERS = ("arc_challenge", "mmlu")  # answered with one token
ARMS = ("CE", "ME", "published CE")
_LAW = {"CE": "transform-then-mix", "ME": "transform-then-mix", "published CE": "published-ce"}

# One model is an ensemble under two texts. The system prompts of a chat would not do: a question that stands in no turn
# of the chat is answered with its end.
CONTEXTS = (
    "An exam in several parts, with the right answer to every question.\n\n",
    "Notes of a student who answered these questions in a hurry.\n\n",
)

_SURPRISE = 6.0  # standard errors; a right run is further off once in 5e8
_ROUNDING = 1e-5  # of a law, in TV a step
_NEGLIGIBLE = 1e-5  # probability of a beginning that is not followed
_DECIDED: dict[str, Callable[[str], bool]] = {"indentation": lambda text: bool(text.strip())}


@dataclass(frozen=True)
class Config:
    """At most `limit` items of each of `tasks`, `runs` runs of every arm; `texts` documents for bits per byte.

    `margin` is the difference of accuracies that counts as none. `fewshot` and `max_new_tokens` replace what a task
    with worked answers asks for by itself; answers that are letters take one token.
    """

    models: tuple[str, ...] = SIBLINGS
    tasks: tuple[str, ...] = ("indentation", "closing_brackets", "stdlib_bpb")
    limit: int = 120
    texts: int = 24
    runs: int = 5
    top_k: int = 5
    margin: float = 0.05
    fewshot: int | None = None
    max_new_tokens: int | None = None
    weights: tuple[float, ...] | None = None
    batch_size: int = 32
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    device: str = "cpu"
    seed: int = 0


def run(
    config: Config,
    progress: Callable[[float, str], None] = lambda fraction, note: None,
    *,
    work: Path | None = None,
    data: Path | None = None,
) -> Record:
    """Sum what can be summed, run every arm, compare, judge.

    Texts are kept in `work` as they are written, and a run that was interrupted goes on from there. `data` is a folder
    with the benchmarks' files, one folder each (gsm8k, bbh, arc_challenge, mmlu); default that of ME_STATS_DATA. The
    record holds names and hashes of the files, and no path.
    """
    sources = {name: _source(name, data) for name in config.tasks}
    recorder = Recorder(NAME, TITLE, config)
    setting = _under_contexts(open_recorded(recorder, weights=config.weights))
    laws = _laws(setting, config.top_k)
    samplers = {
        "CE": CESampler(laws["CE"]),
        "ME": MESampler(laws["ME"]),
        "published CE": CESampler(laws["published CE"]),
    }
    folder = None if work is None else work / config_key(NAME, config)
    opened = {
        one: found for name, source in sources.items()
        for one, found in task(name, data=source, fewshot=_shots(name, config)).items()
    }  # fmt: skip
    scored = {one: found for one, found in opened.items() if found.get_config("output_type") != "generate_until"}
    rows, texts = [], []
    for number, (name, found) in enumerate(opened.items()):
        steps = _Steps(progress, number / len(opened), 1 / len(opened))
        if name in scored:
            texts.append(_bits(name, found, setting, config, folder, steps))
        else:
            rows.append(_compare(name, found, laws, samplers, config, folder, steps))
    results = {
        "label": setting.label,
        "weights": setting.ensemble.mixing.log_weights([()])[0].exp().tolist(),
        "margin": config.margin,
        "rows": rows,
        "texts": texts,
        "files": [entry for name, source in sources.items() if source for entry in _files(name, source)],
    }
    _check(recorder, results)
    _find_pairs(recorder, results)
    _find_exact(recorder, results)
    return recorder.finish(results)


@dataclass
class _Steps:
    """Part of a progress bar: `share` of it from `start`, of which the arms take equal pieces."""

    progress: Callable[[float, str], None]
    start: float
    share: float
    place: int = 0
    pieces: int = 4

    def __call__(self, done: int, total: int, note: str) -> None:
        within = (self.place + done / max(1, total)) / self.pieces
        self.progress(self.start + self.share * min(1.0, within), note)


def _under_contexts(setting: Setting) -> Setting:
    """A setting of one model, under the texts of CONTEXTS; any other as it is."""
    if len(setting.models) > 1:
        return setting
    ((name, model),) = setting.models
    components = [Conditioned(model, context) for context in CONTEXTS]
    return replace(setting, ensemble=Ensemble(components, setting.ensemble.mixing), label=f"{name} under 2 texts")


def _laws(setting: Setting, k: int) -> dict[str, Any]:
    weights = tuple(setting.ensemble.mixing.log_weights([()])[0].exp().tolist())
    orders = {
        order: OrderedLaw(order, Transforms(top_k=k), weights).over(setting.ensemble.components)  # type: ignore[arg-type]
        for order in dict.fromkeys(_LAW.values())
    }
    return {arm: orders[order] for arm, order in _LAW.items()}


# --- data -------------------------------------------------------------------------------------------------------------


def _shots(name: str, config: Config) -> int | None:
    """Answered questions before each, of tasks that show some."""
    return config.fewshot if name.partition(":")[0] in ("gsm8k", "bbh") else None


def _source(name: str, data: Path | None) -> Path | None:
    """The folder of a task's files; None for one that needs none. ValueError for one that is not there."""
    group = name.partition(":")[0]
    if group not in BENCHMARKS:
        return None
    root = data or (Path(os.environ[DATA]) if os.environ.get(DATA) else None)
    if root is None:
        raise ValueError(
            f"{name} needs the benchmark's files: pass --data FOLDER or set {DATA}=FOLDER, a folder that holds one "
            f"folder a benchmark ({', '.join(BENCHMARKS)}) with its files as published"
        )
    if not (root / group).is_dir():
        raise ValueError(f"{name}: the data folder has no folder {group}; --data or {DATA} must name one that has")
    return root / group


def _files(name: str, folder: Path) -> Iterator[dict[str, str]]:
    """Name and sha256 of each file that a task may have read."""
    group, _, one = name.partition(":")
    patterns = (f"**/{one}.json", f"**/{one}.txt") if group == "bbh" and one else ("**/*.json*", "**/*.csv", "**/*.txt")
    for path in sorted({path for pattern in patterns for path in folder.glob(pattern)}):
        if path.name != "SOURCE.json":
            digest = hashlib.sha256(path.read_bytes()).hexdigest()
            yield {"task": name, "file": path.relative_to(folder).as_posix(), "sha256": digest}


# --- one task ---------------------------------------------------------------------------------------------------------


def _compare(
    name: str, found: Any, laws: Mapping[str, Any], samplers: Mapping[str, Any], config: Config, folder: Path | None,
    steps: _Steps,
) -> dict[str, Any]:  # fmt: skip
    group = name.partition(":")[0]
    length = 1 if group in LETTERS else config.max_new_tokens
    exact: dict[str, ExpectedScores] = {}
    if length == 1 or name in _DECIDED:
        distinct = {arm: laws[arm] for arm in ("CE", "published CE")}
        exact = expected_scores(
            distinct, name, found, limit=config.limit, max_new_tokens=length, negligible=_NEGLIGIBLE,
            decided=_DECIDED.get(name, lambda text: False), batch_size=config.batch_size,
            progress=lambda done, total: steps(done, total, f"{name}, summing"),
        )  # fmt: skip
        exact = {arm: exact["published CE" if arm == "published CE" else "CE"] for arm in ARMS}
    sampled: dict[str, ItemScores] = {}
    for arm, sampler in samplers.items():
        steps.place += 1
        (sampled[arm],) = evaluate(
            sampler, {name: found}, seeds=[1000 * config.seed + run for run in range(config.runs)], limit=config.limit,
            max_new_tokens=length, batch_size=config.batch_size,
            work=None if folder is None else folder / arm.replace(" ", "-"),
            progress=lambda done, total, _, arm=arm: steps(done, total, f"{name}, {arm}"),  # type: ignore[misc]
        ).values()  # fmt: skip
    scores = {arm: found.scores for arm, found in sampled.items()}
    # Run r of every arm reads the same random numbers.
    pairs = {
        f"{arm} - ME": paired_difference(
            scores[arm], scores["ME"], margin=config.margin, paired_runs=True
        )
        for arm in ("CE", "published CE")
    }  # fmt: skip
    one = sampled["CE"]
    split = pairs["CE - ME"].split
    accuracy, share = float(scores["ME"].mean()), 1.0 - (max(split.icc) if split else 0.0)
    return {
        "task": name,
        "items": len(one.items),
        "of": one.of,
        "runs": one.scores.shape[1],
        "max_new_tokens": length,
        "arms": {arm: _alone(scores[arm]) for arm in ARMS},
        "pairs": {pair: _summary(found) for pair, found in pairs.items()},
        "icc": max(split.icc) if split else None,
        # Of each arm, for samplers of one law and independent runs.
        "items_needed": {
            f"{margin:g}": items_needed(margin, accuracy=accuracy, within_share=share, runs=one.scores.shape[1])
            for margin in (0.01, 0.02, 0.05)
        },
        "exact": _exact(exact, scores) if exact else None,
    }


def _alone(scores: Floats) -> dict[str, Any]:
    """Mean of one arm; its interval for these items is that of a difference from an arm that is always 0."""
    reading = paired_difference(scores, np.zeros_like(scores)).these_items
    low, high = reading.estimate.interval
    return {"accuracy": reading.estimate.value, "interval": (max(0.0, low), high)}


def _summary(found: PairedDifference) -> dict[str, Any]:
    return {
        "difference": found.these_items.estimate.value,
        **{
            name: {
                "stderr": reading.estimate.stderr, "interval": reading.estimate.interval, "pvalue": reading.pvalue,
                "guaranteed": reading.guaranteed, "equivalence_pvalue": reading.equivalence_pvalue,
                "equivalent": reading.equivalent, "smallest_margin": reading.smallest_margin,
                "detects": min(1.0, max(detectable_shift() * reading.estimate.stderr, reading.smallest_margin)),
            }
            for name, reading in (("these items", found.these_items), ("items like these", found.items_like_these))
        },
        "split": None if found.split is None else asdict(found.split),
    }  # fmt: skip


def _exact(exact: Mapping[str, ExpectedScores], scores: Mapping[str, Floats]) -> dict[str, Any]:
    """Expected accuracies, how far sampled ones are from them in standard errors, and differences of the laws."""
    arms = {}
    for arm, expected in exact.items():
        p, right, runs = expected.scores, scores[arm].sum(1), scores[arm].shape[1]
        spread = p * (1 - p)
        # Of each item's count: (k - R p)^2 has this mean, and by the fourth moment of a binomial this variance.
        squares = (right - runs * p) ** 2 - runs * spread
        fourth = runs * spread * (1 + (3 * runs - 6) * spread) - (runs * spread) ** 2
        arms[arm] = {
            "accuracy": float(p.mean()),
            "z": _standard(
                float((right - runs * p).sum()), float(runs * spread.sum()), expected.gap * right.size * runs
            ),
            "items_z": _standard(float(squares.sum()), float(fourth.sum()), expected.gap * right.size * runs**2),
            # What the sampled mean would have to be off by to be found, with power 0.8.
            "detects": float((_SURPRISE + 0.84) * np.sqrt(spread.sum() / runs) / right.size),
        }
    moved = exact["published CE"].scores - exact["ME"].scores
    gap = max(found.gap for found in exact.values())
    mean = mean_estimate(moved)  # over items like these; for these items it is known
    return {
        "arms": arms,
        "gap": gap,
        "difference": mean.value,
        "interval": mean.interval,
        "largest": float(np.abs(moved).max()),
        "moved": moved.round(6).tolist(),
    }


def _standard(off: float, variance: float, slack: float) -> float:
    """`off` in standard errors, less what the bounds of an expectation leave open."""
    left = max(0.0, abs(off) - slack)
    return 0.0 if left == 0 else float(np.sign(off) * min(1e9, left / max(1e-12, variance**0.5)))


def _bits(
    name: str, found: Any, setting: Setting, config: Config, folder: Path | None, steps: _Steps
) -> dict[str, Any]:
    """Bits per byte of the mixture and of each component, without transforms: truncation forbids what texts hold."""
    components = setting.ensemble.components
    arms = {"mixture": setting.ensemble, **{f"component {i + 1}": one for i, one in enumerate(components)}}
    steps.pieces, bits = len(arms), {}
    for place, (arm, law) in enumerate(arms.items()):
        steps.place = place
        (scores,) = evaluate(
            law, {name: found}, limit=config.texts, batch_size=config.batch_size,
            work=None if folder is None else folder / arm.replace(" ", "-"),
            progress=lambda done, total, _, arm=arm: steps(done, total, f"{name}, {arm}"),  # type: ignore[misc]
        ).values()  # fmt: skip
        bits[arm] = scores.scores[:, 0]
    gains = {arm: asdict(mean_estimate(own - bits["mixture"])) for arm, own in bits.items() if arm != "mixture"}
    # -log sum λ_i P_i <= -log P_i - log λ_i at each token, and a text has no more tokens than bytes.
    weights = setting.ensemble.mixing.log_weights([()])[0].exp().tolist()
    excess = [
        float((bits["mixture"] - bits[f"component {i + 1}"]).max() + np.log2(weight))
        for i, weight in enumerate(weights) if weight > 0
    ]  # fmt: skip
    return {
        "task": name,
        "items": len(bits["mixture"]),
        "bits": {arm: asdict(mean_estimate(own)) for arm, own in bits.items()},
        "gains": gains,
        "excess": max(excess),
    }


# --- verdicts ---------------------------------------------------------------------------------------------------------


def _check(recorder: Recorder, results: dict[str, Any]) -> None:
    label = results["label"]
    for row in results["rows"]:
        for arm, found in (row["exact"] or {"arms": {}})["arms"].items():
            recorder.check(
                f"{row['task']}: sampled {arm} has its exact accuracy, {found['z']:+.1f} standard errors ({label})",
                abs(found["z"]) < _SURPRISE,
            )
            recorder.check(
                f"{row['task']}: so have single items under {arm}, {found['items_z']:+.1f} standard errors ({label})",
                abs(found["items_z"]) < _SURPRISE,
            )
    for row in results["texts"]:
        recorder.check(
            f"{row['task']}: a mixture costs at most log2(1/λ) bits a byte more than a component ({label})",
            row["excess"] < 1e-3,
        )


def _find_pairs(recorder: Recorder, results: dict[str, Any]) -> None:
    """C10: are accuracies equal, up to a margin, where the laws are and where they are not?"""
    rows, margin, k = results["rows"], results["margin"], recorder.config.top_k
    if not rows:
        return
    for pair, one_law in (("CE - ME", True), ("published CE - ME", False)):
        readings = {row["task"]: _reading(row, pair, margin, exactly=not one_law) for row in rows}
        far = max(readings, key=lambda name: abs(readings[name]["difference"]))
        low, high = readings[far]["interval"]
        shown = all(found["equivalent"] for found in readings.values())
        smallest = max(found["smallest_margin"] for found in readings.values())
        # One law for both: only a bug makes a difference, so it has to be a sure one.
        level = 1e-9 if one_law else 0.05
        apart = any(found["pvalue"] * len(readings) < level and not found["equivalent"] for found in readings.values())
        verdict = "refuted as stated" if apart else "reproduced at small scale" if shown else "not testable here"
        count = sum(row["items"] for row in rows)
        tasks = f"{len(rows)} task{'s' * (len(rows) > 1)}"
        tests = "one-sided tests at 5%" if one_law else "exact sums, else one-sided tests at 5%,"
        laws = "one law, top-k inside the components" if one_law else "another law, top-k after mixing"
        recorder.find(
            claim="C10",
            statement=f"accuracy of {pair.replace(' - ', ' against ')} on {tasks}, k = {k} ({laws})",
            models=results["label"],
            n=f"{count:,} items, {min(row['runs'] for row in rows)} runs each",
            statistic=f"at most {readings[far]['difference']:+.3f}, on {far} (95%: {low:+.3f} to {high:+.3f})",
            tv_upper=None,
            bound=f"{tests} on every task, these items: margin {smallest:.3f} shown, {margin:g} asked",
            verdict=verdict,
            held=verdict != "refuted as stated" or not one_law,
            caveat=(
                f"with power 0.8 an effect of {max(found['detects'] for found in readings.values()):.3f} is seen on "
                "every task; accuracy bounds no TV, however equal it is"
            ),
        )  # fmt: skip


def _reading(row: dict[str, Any], pair: str, margin: float, *, exactly: bool) -> dict[str, Any]:
    """What is known of a difference for these items: the exact one of the laws if that is asked for and there."""
    if not (exactly and row["exact"]):
        return {"difference": row["pairs"][pair]["difference"], **row["pairs"][pair]["these items"]}
    value, gap = row["exact"]["difference"], row["exact"]["gap"]
    return {
        "difference": value, "interval": (value - gap, value + gap), "pvalue": float(abs(value) <= gap),
        "smallest_margin": abs(value) + gap, "equivalent": abs(value) + gap < margin, "detects": gap,
    }  # fmt: skip


def _find_exact(recorder: Recorder, results: dict[str, Any]) -> None:
    """C9: expected accuracies of both laws, without sampling: any difference is one of the laws."""
    rows = [row for row in results["rows"] if row["exact"]]
    if not rows:
        return
    far = max(rows, key=lambda row: abs(row["exact"]["difference"]))
    largest = max(row["exact"]["largest"] for row in rows)
    gap = max(row["exact"]["gap"] for row in rows)
    apart = largest > max(10 * gap, _ROUNDING)
    recorder.find(
        claim="C9",
        statement=f"expected accuracy of published CE against ME, k = {recorder.config.top_k}, summed over all texts",
        models=results["label"],
        n=f"{sum(row['items'] for row in rows):,} items of {', '.join(row['task'] for row in rows)}",
        statistic=(
            f"mean difference {far['exact']['difference']:+.4f} on {far['task']}; a single item moves by up to "
            f"{largest:.3f}, so the TV of its texts is at least that"
        ),
        tv_upper=None,
        bound=f"sums exact to {max(gap, _ROUNDING):.0e}",
        verdict="refuted as stated" if apart else "not testable here",
        held=True,
        caveat=(
            f"no noise: an effect of {max(10 * gap, _ROUNDING):.0e} on any item is seen, with more than power 0.8; a "
            "small mean hides items that move up and down"
        ),
    )  # fmt: skip
