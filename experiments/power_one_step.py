"""Our tests beside tests that are in use: who rejects a right sampler, and who finds a planted bug?

One step: a mixture of two Zipf-like laws with small and large vocabularies, wrong in ways that samplers go wrong. Every
test sees the same draws, at the level that it declares, if it declares one. Sequences: two mixed Markov chains, where
two-sample tests get as many rows again from a right sampler, and ours the law instead.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from me_stats import ConstantMixing, Ensemble, MESampler
from me_stats.eprocess import EProcess
from me_stats.equivalence import binomial_interval
from me_stats.evidence import collect
from me_stats.families import SCORE_FAMILIES
from me_stats.goodness import Portfolio
from me_stats.martingale import martingale_portfolio
from me_stats.models import MarkovModel
from me_stats.record import Record, Recorder
from me_stats.samplers import Sampler
from me_stats.steps import collect_steps
from me_stats.testing import MUTANTS, in_use
from me_stats.twosample import two_sample_portfolio

NAME, TITLE = "power_one_step", "Our tests beside the tests in use"
OURS = {"portfolio, 0.05": 0.05, "portfolio, 1e-3": 1e-3, "portfolio, 1e-6": 1e-6}
THEIRS = ("all cells", "observed cells", "distance ratio", "cosine")
ON_SEQUENCES = ("Hamming MMD", "two-sample portfolio", "martingales, 1e-6", "e-process, 1e-6")
RIGHT = "right"
_WEIGHTS = (0.6, 0.4)
_FEW = 10  # draws in the first sample of the distance ratio
_TWO_SAMPLE_LEVEL = 0.05

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Config:
    """`grid` are (V, draws, runs); the right sampler gets `more` times as many runs. `doubt` is the chance that right
    tests fail the checks. `rows` sequences of `steps` tokens, `sequence_runs` times.
    """

    grid: tuple[tuple[int, int, int], ...] = ((256, 10_000, 300), (50_257, 10_000, 50), (50_257, 100_000, 50))
    more: int = 3
    sequence_runs: int = 40
    rows: int = 500
    steps: int = 32
    spread: float = 0.5
    permutations: int = 199
    doubt: float = 1e-6
    seed: int = 0


def run(config: Config, progress: Callable[[float, str], None] = lambda fraction, note: None) -> Record:
    """Draw from each wrong law many times and count who rejects."""
    recorder = Recorder(NAME, TITLE, config)
    rng = np.random.default_rng(config.seed)
    rows = []
    for i, (vocabulary, n, runs) in enumerate(config.grid):
        progress(0.7 * i / len(config.grid), f"one step, {vocabulary:,} tokens, {n:,} draws")
        rows += _one_step(vocabulary, n, runs, config, rng)
    sequences = []
    for i, (name, sampler) in enumerate(_sequence_samplers(config).items()):
        progress(0.7 + 0.075 * i, f"sequences, {name}")
        sequences.append(_sequences(name, sampler, config))
    _check(recorder, rows, sequences, config)
    return recorder.finish({"rows": rows, "sequences": sequences})


def laws(vocabulary: int) -> tuple[Floats, Floats]:
    """A mixture p (V,) and its components (2, V), both about proportional to rank^-1.1."""
    rng = np.random.default_rng(0)
    parts = np.exp(0.5 * rng.normal(size=(2, vocabulary))) / np.arange(1, vocabulary + 1) ** 1.1
    # Ids in no order, as after a tokenizer's first tokens: rank is nothing that a test may read off the id.
    parts = parts[:, rng.permutation(vocabulary)]
    parts /= parts.sum(1, keepdims=True)
    return np.array(_WEIGHTS) @ parts, parts


def bugs(p: Floats, parts: Floats) -> dict[str, Floats]:
    """Laws (V,) of wrong samplers of p."""
    order = np.argsort(-p, kind="stable")
    mass = np.cumsum(p[order])
    one = order[np.searchsorted(-p[order], -0.01)]  # the likeliest token of probability .01 or less
    half = np.random.default_rng(1).random(len(p)) < 0.5
    tempered = p ** (1 / 1.05)
    logits = torch.from_numpy(np.log(p)).bfloat16().double().numpy()
    wrong = {
        RIGHT: p,
        "top-p 0.7": np.where(_ranks(order) <= np.searchsorted(mass, 0.7), p, 0.0),
        "top-k 50": np.where(_ranks(order) < 50, p, 0.0),
        "token at .01\nnever drawn": np.where(np.arange(len(p)) == one, 0.0, p),
        "last id\nnever drawn": np.append(p[:-1], 0.0),
        "λ + .05": np.array([_WEIGHTS[0] + 0.05, _WEIGHTS[1] - 0.05]) @ parts,
        "temperature\n1.05": tempered,
        "bfloat16\nlogits": np.exp(logits),
        "TV .01 on\nrandom half": np.where(half, p * (1 + 0.01 / p[half].sum()), p * (1 - 0.01 / p[~half].sum())),
    }
    return {name: q / q.sum() for name, q in wrong.items()}


def _ranks(order: NDArray[np.int64]) -> NDArray[np.int64]:
    ranks = np.empty(len(order), dtype=np.int64)
    ranks[order] = np.arange(len(order))
    return ranks


def _one_step(vocabulary: int, n: int, runs: int, config: Config, rng: np.random.Generator) -> list[dict[str, Any]]:
    p, parts = laws(vocabulary)
    portfolio = Portfolio.from_null(np.log(p), np.log(parts))
    references = in_use.random_references(vocabulary, rng)
    rows = []
    for name, q in bugs(p, parts).items():
        repeats = runs * config.more if name == RIGHT else runs
        rejected = dict.fromkeys((*OURS, *THEIRS), 0)
        unusable = 0
        for _ in range(repeats):
            counts = rng.multinomial(n, q)
            tested = portfolio.test(counts)
            for test, level in OURS.items():
                rejected[test] += tested.pvalue <= level
            verdicts = [
                in_use.all_cell_chi_square(counts, p),
                in_use.observed_count_chi_square(counts, p),
                in_use.distance_ratio(rng.multinomial(_FEW, q), counts, p, references=references),
                in_use.cosine_similarity(counts, p),
            ]
            for verdict in verdicts:
                rejected[verdict.name] += not verdict.accepts
            unusable += not verdicts[1].usable
        row: dict[str, Any] = {"V": vocabulary, "n": n, "bug": name, "tv": _tv(p, q), "runs": repeats}
        row |= {"rejected": rejected, "too_sparse": unusable}
        row["in_sight"] = {test: _in_sight(portfolio, p, q, n, level) for test, level in OURS.items()}
        rows.append(row)
    return rows


def _in_sight(portfolio: Portfolio, p: Floats, q: Floats, n: int, level: float) -> float:
    """Largest quotient of the TV on a partition and the smallest TV that the portfolio says it detects there."""
    tested = portfolio.test(np.random.default_rng(0).multinomial(n, p), level=level)
    stated = {result.name: result.min_detectable_tv for result in tested.results}
    return max(
        _tv(*(np.bincount(index, weights=law, minlength=cells).astype(float) for law in (p, q))) / stated[name]
        for name, index, cells in portfolio.partitions
    )


def _tv(p: Floats, q: Floats) -> float:
    return float(0.5 * np.abs(p - q).sum())


# Sequences


def _sequence_samplers(config: Config) -> dict[str, Sampler]:
    """The right sampler and three wrong ones of two mixed Markov chains over 8 tokens."""
    rng = np.random.default_rng(2)
    shared = rng.normal(size=(9, 8))
    tables = [np.exp(shared + config.spread * rng.normal(size=shared.shape)) for _ in range(2)]
    tables = [table / table.sum(1, keepdims=True) for table in tables]
    ensemble = Ensemble([MarkovModel(table[0], table[1:]) for table in tables], ConstantMixing([0.5, 0.5]))
    names = ("one component per sequence", "sticky component", "temperature 1.05")
    return {RIGHT: MESampler(ensemble)} | {name: MUTANTS[name].sampler(ensemble) for name in names}


def _sequences(name: str, sampler: Sampler, config: Config) -> dict[str, Any]:
    model: Any = sampler.model
    good = MESampler(model)
    rejected = dict.fromkeys(ON_SEQUENCES, 0)
    for i in range(config.sequence_runs):
        seed = config.seed + 2 * i
        x = sampler.sample([0], n=config.rows, max_new_tokens=config.steps, seed=seed)
        y = good.sample([0], n=config.rows, max_new_tokens=config.steps, seed=seed + 1)
        rng = np.random.default_rng([config.seed, i])
        options: dict[str, Any] = {"permutations": config.permutations, "rng": rng}
        both = two_sample_portfolio(x.tokens.numpy(), y.tokens.numpy(), level=_TWO_SAMPLE_LEVEL, **options)
        hamming = next(member for member in both.members if member.name == "Hamming")
        steps = collect_steps(model, x.row_prompts(), x.sequences())
        process = EProcess(len(model.components), families=SCORE_FAMILIES)
        process.update(collect(model, x.row_prompts(), x.tokens, families=SCORE_FAMILIES))
        found = (
            # One set of relabellings serves both; `in_use.hamming_mmd` compares the same number with the same level.
            hamming.pvalue <= _TWO_SAMPLE_LEVEL,
            both.rejected,
            martingale_portfolio(steps, rng, level=1e-6).rejected,
            process.rejects(1e-6),
        )
        for test, one in zip(ON_SEQUENCES, found, strict=True):
            rejected[test] += bool(one)
    laws = [part.log_table[1:].exp().numpy() for part in model.components]
    return {
        "bug": name,
        "runs": config.sequence_runs,
        "rejected": rejected,
        "component_tv": float(0.5 * np.abs(laws[0] - laws[1]).sum(1).mean()),
    }


# Verdicts


def _check(recorder: Recorder, rows: list[dict[str, Any]], sequences: list[dict[str, Any]], config: Config) -> None:
    right = [row for row in rows if row["bug"] == RIGHT]
    doubt = config.doubt / (len(OURS) * (len(rows) + 1))
    for test, level in OURS.items():
        alarms, runs = sum(row["rejected"][test] for row in right), sum(row["runs"] for row in right)
        recorder.check(
            f"{test}: a right sampler is rejected no more often than declared ({alarms} of {runs:,})",
            binomial_interval(alarms, runs, confidence=1 - doubt)[0] <= level,
        )
        seen = [row for row in rows if row["in_sight"][test] >= 1]
        weak = [
            row for row in seen if binomial_interval(row["rejected"][test], row["runs"], confidence=1 - doubt)[1] < 0.8
        ]
        recorder.check(
            f"{test}: finds with power 0.8 what it says it detects ({len(seen)} of {len(rows) - len(right)} bugs)",
            not weak and bool(seen),
        )
    by_name = {row["bug"]: row for row in sequences}
    wrong, correct = by_name["one component per sequence"], by_name[RIGHT]
    for test in ON_SEQUENCES[2:]:
        share = wrong["rejected"][test] / wrong["runs"]
        recorder.check(
            f"sequences, {test}: rejects one component per sequence ({share:.0%}) and no right sampler",
            share > 0.9 and not correct["rejected"][test],
        )
    alarms, runs = correct["rejected"]["two-sample portfolio"], correct["runs"]
    recorder.check(
        f"sequences, two-sample portfolio: rejects a right sampler no more often than declared ({alarms} of {runs})",
        binomial_interval(alarms, runs, confidence=1 - config.doubt)[0] <= _TWO_SAMPLE_LEVEL,
    )
