"""How often do the tests of this package reject a sampler that is right?

Every test runs many times on samples whose law is known to be the null: toys, a Zipf law over a real vocabulary's
size, and the bundled transformers. A test of level α may reject at most a share α of the runs. Two practices that are
known to break this come along as controls, so that the same count is seen to catch them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from scipy import sparse, special, stats
from torch import Tensor

from me_stats import CESampler, ConstantMixing, Ensemble, MESampler
from me_stats.chi_square import GoodnessResult, chi_square_gof, pool_cells, whitener
from me_stats.eprocess import EProcess
from me_stats.equivalence import binomial_interval
from me_stats.evidence import Evidence
from me_stats.families import ALL_FAMILIES, SCORE_FAMILIES
from me_stats.goodness import Portfolio
from me_stats.martingale import martingale_portfolio
from me_stats.models import MarkovModel
from me_stats.models.ensemble import chunked_paths
from me_stats.prefixes import combine_prefixes, martingale_chi_square
from me_stats.presets import SIBLINGS, open_recorded
from me_stats.record import Record, Recorder
from me_stats.repeats import RepeatProcess
from me_stats.samplers import Sampler
from me_stats.sequential import dirichlet_log_evalue, sequential_test
from me_stats.steps import StepScores, join_steps, step_scores
from me_stats.testing.budget import divide
from me_stats.twosample import closeness_test, two_sample_portfolio

NAME, TITLE = "calibration", "False alarms of every test"
WORLDS = (
    "toys, one step", "Zipf, one step", "transformers, one step", "toys, sequences", "transformers, sequences",
    "far tail",
)  # fmt: skip
LEVELS = (0.05, 0.01, 0.001)
CURVE = tuple(float(f"{level:.3g}") for level in 10.0 ** -np.arange(1, 6.01, 0.25))
_FAR = 0.01  # where the far tail starts
_CELLS = 1 << 22  # counts that stand in memory at once

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]


@dataclass(frozen=True)
class Config:
    """Runs are of one test on one sample. `doubt` is the chance that a right set of tests fails the checks.

    `allowed` is the factor over the level that the chi-square law, an approximation, may reach in the far tail, where
    rates are known exactly or from a million runs.
    """

    models: tuple[str, ...] = SIBLINGS
    runs: int = 3000
    zipf_runs: int = 1200
    zipf_draws: int = 10_000
    sequence_runs: int = 1000
    pool_rows: int = 2400
    rows_per_run: int = 6
    steps: int = 16
    two_sample_runs: int = 250
    permutations: int = 199
    looks: int = 60
    far_runs: int = 1_000_000
    doubt: float = 1e-6
    allowed: float = 2.0
    dtype: str = "float32"
    device: str = "cpu"
    seed: int = 0


class _Ledger:
    """P-values by world, test and kind of test; alarms where a test has no p-value."""

    def __init__(self) -> None:
        self._pvalues: dict[tuple[str, str, str], list[Floats]] = {}
        self._counted: list[dict[str, Any]] = []

    def add(self, world: str, test: str, kind: str, pvalues: ArrayLike) -> None:
        """P-values of further runs, one or many."""
        self._pvalues.setdefault((world, test, kind), []).append(np.atleast_1d(np.asarray(pvalues, dtype=float)))

    def count(self, world: str, test: str, kind: str, runs: int, alarms: dict[float, int]) -> None:
        """Alarms by level among `runs`."""
        levels = {"levels": list(alarms), "alarms": list(alarms.values())}
        self._counted.append({"world": world, "test": test, "kind": kind, "runs": runs, **levels})

    def rows(self) -> list[dict[str, Any]]:
        """One row a test, with its alarms at `LEVELS` and at the levels of the curve that its runs can resolve."""
        for (world, test, kind), parts in self._pvalues.items():
            p = np.concatenate(parts)
            levels = sorted({*LEVELS, *(level for level in CURVE if level * len(p) >= 2)}, reverse=True)
            self.count(world, test, kind, len(p), {level: int((p <= level).sum()) for level in levels})
        self._pvalues.clear()
        return sorted(self._counted, key=lambda row: WORLDS.index(row["world"]))


def run(config: Config, progress: Callable[[float, str], None] = lambda fraction, note: None) -> Record:
    """Simulate the null world by world, run the tests, count the alarms."""
    recorder, ledger = Recorder(NAME, TITLE, config), _Ledger()
    rng = np.random.default_rng(config.seed)
    progress(0.0, "toys, one step")
    _toys_one_step(ledger, config, rng)
    progress(0.2, "toys, tests that look again and again")
    _looking_often(ledger, config, rng)
    progress(0.3, "toys, whole sequences")
    _toys_sequences(ledger, config, rng)
    progress(0.5, "two Zipf components over 50,257 tokens")
    _zipf(ledger, config, rng)
    progress(0.65, "transformers")
    setting = open_recorded(recorder)
    _transformers_one_step(ledger, setting.ensemble, setting.prompts, config, rng)
    progress(0.75, "transformers, whole sequences")
    sampler = CESampler(setting.ensemble)
    pool = _pool(sampler, setting.prompts, config.pool_rows, config.steps, config.seed, rng)
    _sequences(ledger, "transformers, sequences", "", pool, config, rng)
    progress(0.9, "the far tail")
    exact = _far_tail(ledger, config, rng)
    rows = ledger.rows()
    _judge(recorder, rows, exact, config)
    return recorder.finish({"label": setting.label, "rows": rows, "exact": exact})


def _toys_one_step(ledger: _Ledger, config: Config, rng: np.random.Generator) -> None:
    world = "toys, one step"
    for vocabulary, components, draws in ((8, 2, 200), (64, 2, 1000), (16, 3, 400)):
        parts = rng.dirichlet(np.full(vocabulary, 0.5), size=components)
        test = _portfolio(parts, np.full(components, 1 / components))
        _portfolio_rows(ledger, world, f"V={vocabulary}, K={components}: ", test, draws, config.runs, rng)
    laws = rng.dirichlet(np.full(8, 1.0), size=4)  # four prefixes, few draws of each
    runs = max(1, config.runs // 3)
    counts = [rng.multinomial(60, law, size=runs) for law in laws]
    combined = [
        combine_prefixes([chi_square_gof(part[r], law) for part, law in zip(counts, laws, strict=True)])
        for r in range(runs)
    ]
    _add_combined(ledger, world, "cells", combined)
    law = rng.dirichlet(np.ones(64))
    pairs = rng.multinomial(60, law, size=(runs, 2))
    pvalues = [closeness_test(x, y, level=0.05, permutations=config.permutations, rng=rng).pvalue for x, y in pairs]
    ledger.add(world, "closeness", "permutation", pvalues)


def _zipf(ledger: _Ledger, config: Config, rng: np.random.Generator) -> None:
    world = "Zipf, one step"
    parts = np.exp(0.7 * rng.normal(size=(2, 50_257))) / np.arange(1, 50_258) ** 1.1
    test = _portfolio(parts / parts.sum(1, keepdims=True), np.array([0.5, 0.5]))
    _portfolio_rows(ledger, world, "", test, config.zipf_draws, config.zipf_runs, rng)


def _transformers_one_step(
    ledger: _Ledger, ensemble: Ensemble, prompts: Sequence[Any], config: Config, rng: np.random.Generator
) -> None:
    world = "transformers, one step"
    weights = ensemble.mixing.weights.double().cpu().numpy()  # type: ignore[attr-defined]
    per_prompt: list[list[GoodnessResult]] = []
    for p, prompt in enumerate(prompts):
        ids = ensemble.vocabulary.encode(prompt)
        laws = [component.log_probs([ids]).double().cpu()[0].exp().numpy() for component in ensemble.components]
        test = _portfolio(np.stack(laws), weights)
        _portfolio_rows(ledger, world, f"prompt {p + 1}: ", test, 2000, max(1, config.runs // 3), rng)
        index, cells = next((index, cells) for name, index, cells in test.partitions if name == "top 64")
        law = np.bincount(index, weights=test.p, minlength=cells)
        counts = rng.multinomial(500, law / law.sum(), size=max(1, config.runs // 6))
        per_prompt.append([chi_square_gof(row, law) for row in counts])
    combined = [combine_prefixes(results) for results in zip(*per_prompt, strict=True)]
    _add_combined(ledger, world, "top 64", combined)


def _portfolio(parts: Floats, weights: Floats) -> Portfolio:
    parts = parts / parts.sum(1, keepdims=True)
    return Portfolio.from_null(np.log(weights @ parts), np.log(parts))


def _portfolio_rows(
    ledger: _Ledger, world: str, prefix: str, test: Portfolio, draws: int, runs: int, rng: np.random.Generator
) -> None:
    """Each member and their combination."""
    kinds = dict.fromkeys((name for name, _ in test.scores), "score") | {"portfolio": "combination"}
    for counts in _chunks(test.p, draws, runs, rng):
        for name, pvalues in _pvalues(test, counts).items():
            ledger.add(world, prefix + name, kinds.get(name, "cells"), pvalues)
        if world == "Zipf, one step":
            x2 = ((counts - draws * test.p) ** 2 / (draws * test.p)).sum(1)
            ledger.add(world, "chi-square on all cells, none pooled", "control", special.chdtrc(len(test.p) - 1, x2))


def _chunks(p: Floats, draws: int, runs: int, rng: np.random.Generator) -> Iterator[Ints]:
    size = max(1, _CELLS // len(p))
    for start in range(0, runs, size):
        yield rng.multinomial(draws, p / p.sum(), size=min(size, runs - start))


def _pvalues(test: Portfolio, counts: Ints) -> dict[str, Floats]:
    """P-values (R,) of each member and of the portfolio for counts (R, V); those that pass CURVE[0] are not exact.

    No test's p-value lies below its chi-square tail, so only runs in which some tail is small need the test itself.
    """
    tails = _tails(test, counts)
    found = {name: tail.copy() for name, tail in tails.items()} | {"portfolio": np.ones(len(counts))}
    smallest = np.min(list(tails.values()), axis=0)
    for r in np.flatnonzero(smallest <= CURVE[0]):
        result = test.test(counts[r])
        found["portfolio"][r] = result.pvalue
        for member in result.results:
            if member.name in tails:
                found[member.name][r] = member.pvalue
    return found


def _tails(test: Portfolio, counts: Ints) -> dict[str, Floats]:
    """Chi-square tails (R,) of the informative members, all runs at once."""
    n, tails = int(counts[0].sum()), {}
    for name, index, cells in test.partitions:
        onto = sparse.csr_array((np.ones(len(index)), (np.arange(len(index)), index)), shape=(len(index), cells))
        binned, law = counts @ onto, test.p @ onto
        groups = pool_cells(n * law[law > 0], 5.0)
        merge = np.eye(int(groups.max()) + 1)[groups]
        observed, expected = binned[:, law > 0] @ merge, n * law[law > 0] @ merge
        if len(expected) > 1:
            tails[name] = special.chdtrc(len(expected) - 1, ((observed - expected) ** 2 / expected).sum(1))
    for name, values in test.scores:
        d = values - test.p @ values
        whiten = whitener(n * (d.T * test.p) @ d, n)
        if whiten.shape[1]:
            tails[name] = special.chdtrc(whiten.shape[1], ((counts @ d @ whiten) ** 2).sum(1))
    return tails


def _add_combined(ledger: _Ledger, world: str, name: str, combined: Sequence[Any]) -> None:
    for i, how in enumerate(("sum over prefixes", "pooled over prefixes")):
        ledger.add(world, f"{name}, {how}", "cells", [result.results[i].pvalue for result in combined])
    ledger.add(world, f"{name}, both", "combination", [result.pvalue for result in combined])


def _looking_often(ledger: _Ledger, config: Config, rng: np.random.Generator) -> None:
    world = "toys, one step"
    law, runs, every = rng.dirichlet(np.full(16, 4.0)), max(1, config.runs // 3), 25
    counts = rng.multinomial(every, law, size=(runs, config.looks)).cumsum(1)
    log_sup = [max(dirichlet_log_evalue(look, law, tv=0.1) for look in looks) for looks in counts]
    ledger.add(world, "Dirichlet e-value, every look", "anytime", _anytime(np.array(log_sup)))
    late = counts[:, 200 // every :]  # from 200 draws on, where the chi-square law is good
    expected = late.sum(-1, keepdims=True) * law
    naive = special.chdtrc(15, ((late - expected) ** 2 / expected).sum(-1)).min(1)
    ledger.add(world, "chi-square, read at every look", "control", naive)

    def fair(n: int, look: int) -> float:
        return chi_square_gof(rng.multinomial(n, law), law).pvalue

    def uniform(n: int, look: int) -> float:
        return float(rng.random())

    for name, pvalue, times in (("chi-square", fair, runs), ("exact p-values", uniform, 4 * runs)):
        alarms = {
            level: sum(sequential_test(pvalue, level=level, first=200).rejected for _ in range(times))
            for level in LEVELS
        }
        ledger.count(world, f"sequential test of {name}", "anytime", times, alarms)


def _anytime(log_sup: Floats) -> Floats:
    return np.exp(-np.maximum(log_sup, 0.0))


@dataclass(frozen=True, eq=False)
class _Pool:
    """Rows (N, T) of a right sampler, scored under the null; `bins` and `mass` are what `_rank_bins` gives."""

    steps: StepScores
    evidence: Evidence
    tokens: list[list[int]]
    group: Ints
    bins: Ints
    mass: Floats


def _pool(
    sampler: Sampler, prompts: Sequence[Any], rows: int, steps: int, seed: int, rng: np.random.Generator
) -> _Pool:
    trace = sampler.sample(prompts, n=max(1, rows // len(prompts)), max_new_tokens=steps, seed=seed)
    scores, evidence, bins = [], [], []
    for laws, log_weights, written in chunked_paths(trace.model, trace.row_prompts(), trace.sequences()):
        scores.append(step_scores(laws, log_weights, written))
        evidence.append(Evidence.from_laws(laws, log_weights, written, families=ALL_FAMILIES, rng=rng))
        bins.append(_rank_bins(laws, log_weights, written))
    mask = trace.mask.cpu().numpy()
    index, mass = (np.concatenate(part) for part in zip(*bins, strict=True))
    grid, masses = np.zeros(mask.shape, dtype=np.int64), np.zeros((*mask.shape, mass.shape[1]))
    grid[mask], masses[mask] = index, mass
    joined = join_steps(scores, mask), Evidence.join(evidence, mask)
    return _Pool(*joined, trace.sequences(), trace.prompt_index.numpy(), grid, masses)


def _rank_bins(laws: Tensor, log_weights: Tensor, tokens: Tensor) -> tuple[Ints, Floats]:
    """Bins by powers of two of the rank under the null: that of each token, and the null's mass (L, B) in each."""
    p = (laws.double().cpu() + log_weights.double().cpu()[..., None]).logsumexp(-2).exp()
    p, order = (p / p.sum(-1, keepdim=True)).sort(dim=-1, descending=True, stable=True)
    bins = torch.from_numpy(np.frexp(np.arange(1.0, p.shape[-1] + 1))[1].astype(np.int64) - 1)
    mass = torch.zeros(len(p), int(bins[-1]) + 1, dtype=p.dtype).index_add(1, bins, p)
    rank = (order == tokens.cpu()[:, None]).int().argmax(-1)
    return bins[rank].numpy(), mass.numpy()


def _toys_sequences(ledger: _Ledger, config: Config, rng: np.random.Generator) -> None:
    world = "toys, sequences"
    for vocabulary, weights, concentration in ((8, (0.5, 0.5), 0.5), (32, (0.6, 0.3, 0.1), 0.3)):
        seeds = rng.integers(1 << 30, size=len(weights))
        parts = [MarkovModel.random(vocabulary, seed=int(s), concentration=concentration) for s in seeds]
        sampler = MESampler(Ensemble(parts, ConstantMixing(weights)))
        rows = config.sequence_runs * config.rows_per_run
        pool = _pool(sampler, [(0,), (1,)], rows, config.steps, config.seed, rng)
        _sequences(ledger, world, f"V={vocabulary}, K={len(weights)}: ", pool, config, rng)
        if vocabulary == 8:
            _two_samples(ledger, world, pool, config, rng)


def _sequences(ledger: _Ledger, world: str, prefix: str, pool: _Pool, config: Config, rng: np.random.Generator) -> None:
    """The pool cut into runs of a few rows; the e-processes also look after every token of every row alone."""
    runs = len(pool.tokens) // config.rows_per_run
    n_components = pool.evidence.ratios.shape[-1]
    for r in range(runs):
        own = np.arange(r, len(pool.tokens), runs)  # rows of all prompts
        result = martingale_portfolio(_rows(pool.steps, own), rng)
        for member in result.results:
            if member.df:
                kind = "transform" if member.name.startswith("PIT") else "score"
                ledger.add(world, prefix + member.name, kind, member.pvalue)
        ledger.add(world, f"{prefix}martingale portfolio", "combination", result.pvalue)
        mask = pool.steps.mask[own]
        tested = martingale_chi_square(pool.bins[own][mask], pool.mass[own][mask])
        ledger.add(world, f"{prefix}rank bins, one draw a prefix", "cells", tested.pvalue)
        process = EProcess(n_components, families=ALL_FAMILIES)
        process.update(_rows(pool.evidence, own))
        ledger.add(world, f"{prefix}e-process, row after row", "anytime", process.pvalue)
        repeats, first = RepeatProcess(), [tuple(pool.tokens[i][:2]) for i in own]
        repeats.update(pool.group[own].tolist(), first, pool.steps.log_p[own, :2].sum(1))
        ledger.add(world, f"{prefix}repeats of two tokens", "anytime", repeats.pvalue)
    sets = {"all families": ALL_FAMILIES, "score families": SCORE_FAMILIES}
    for name, families in (sets | {family.name: (family,) for family in ALL_FAMILIES}).items():
        paths = EProcess(n_components, families=families).paths(pool.evidence)
        ledger.add(world, f"{prefix}e-process, {name}", "anytime", _anytime(paths.max(1)))


def _two_samples(ledger: _Ledger, world: str, pool: _Pool, config: Config, rng: np.random.Generator) -> None:
    """Two sets of rows of one sampler, each with rows of both prompts."""
    rows, order = 12, rng.permutation(len(pool.tokens))
    for r in range(min(config.two_sample_runs, len(order) // (2 * rows))):
        own = order[2 * rows * r : 2 * rows * (r + 1)]
        x, y = ([pool.tokens[i] for i in half] for half in (own[:rows], own[rows:]))
        result = two_sample_portfolio(x, y, level=0.05, permutations=config.permutations, rng=rng)
        for member in result.members:
            if member.informative:
                ledger.add(world, f"two-sample: {member.name}", "permutation", member.pvalue)
        ledger.add(world, "two-sample portfolio", "permutation", result.pvalue)


def _rows(arrays: Any, own: Ints) -> Any:
    """The same dataclass with the rows `own` of each array."""
    chosen = {}
    for entry in fields(arrays):
        value = getattr(arrays, entry.name)
        chosen[entry.name] = {k: v[own] for k, v in value.items()} if isinstance(value, dict) else value[own]
    return type(arrays)(**chosen)


def _far_tail(ledger: _Ledger, config: Config, rng: np.random.Generator) -> list[dict[str, Any]]:
    """Levels down to 1e-6: many runs of 16 cells, and every outcome of two."""
    steep = 0.75 ** np.arange(16)
    for name, law, draws in (
        ("16 equal cells, 20 draws each", np.full(16, 1 / 16), 320),
        ("16 cells, the last expect 5 draws", steep / steep.sum(), round(5 * steep.sum() / steep[-1])),
    ):
        pvalues: list[Floats] = []
        for counts in _chunks(law, draws, config.far_runs, rng):
            expected = draws * law
            found = special.chdtrc(15, ((counts - expected) ** 2 / expected).sum(1))
            for r in np.flatnonzero(found <= _FAR):  # no p-value lies below its chi-square tail
                found[r] = chi_square_gof(counts[r], law).pvalue
            pvalues.append(found)
        joined = np.concatenate(pvalues)
        levels = [level for level in CURVE if _FAR >= level >= 20 / len(joined)] or [_FAR]
        ledger.count("far tail", name, "cells", len(joined), {a: int((joined <= a).sum()) for a in levels})
    return [_two_cells(expected, draws) for expected, draws in ((20, 40), (5, 100), (20, 10_000))]


def _two_cells(expected: int, draws: int) -> dict[str, Any]:
    """The exact false-alarm rate of every level of two cells: each outcome's probability by its p-value."""
    share = expected / draws
    hits = np.arange(max(0, expected - 100), min(draws, expected + 200) + 1)  # the others have no weight
    found = np.array([chi_square_gof([h, draws - h], [share, 1 - share]).pvalue for h in hits])
    weight = stats.binom.pmf(hits, draws, share)
    reached = found[found > 1e-9]
    worst = max(float(weight[found <= level].sum()) / level for level in reached)
    rates = [float(weight[found <= level].sum()) for level in CURVE]
    name = f"2 cells, one expects {expected} of {draws:,} draws"
    return {"test": name, "levels": CURVE, "rates": rates, "worst": worst}


def _judge(recorder: Recorder, rows: list[dict[str, Any]], exact: list[dict[str, Any]], config: Config) -> None:
    """One check a world, one for each test that is above its level, and one for each control."""
    comparisons = sum(len(_checked(row)) for row in rows)
    confidence = 1 - config.doubt / comparisons
    for row in rows:
        row["intervals"] = [binomial_interval(alarms, row["runs"]) for alarms in row["alarms"]]
        row["above"], row["conservative"] = [], []
        for level, alarms in _checked(row):
            low, high = binomial_interval(alarms, row["runs"], confidence=confidence)
            row["above"] += [level] * (low > level)
            row["conservative"] += [level] * (high < level)
    for world in WORLDS[:-1]:
        own = [row for row in rows if row["world"] == world and row["kind"] != "control"]
        recorder.check(
            f"{world}: {len(own)} tests reject a right sampler no more often than their level",
            not any(row["above"] for row in own),
        )
        for row in own:
            if row["above"]:
                recorder.check(f"{world}: {row['test']} at level {max(row['above']):g}", False)
    for row in rows:
        if row["kind"] == "control":
            recorder.check(f"{row['world']}: the control is above its level ({row['test']})", bool(row["above"]))
    far = [n / row["runs"] / a for row in rows if row["world"] == WORLDS[-1] for a, n in _checked(row)]
    worst = max([*far, *(row["worst"] for row in exact)])
    recorder.check(
        f"{WORLDS[-1]}: chi-square within {config.allowed:g} times every level (largest {worst:.2f})",
        worst <= config.allowed,
    )
    shares = [parts * divide(config.doubt, parts) for parts in range(1, 2000)]
    recorder.check("the shares of a budget add up to no more than the budget", max(shares) <= config.doubt)


def _checked(row: dict[str, Any]) -> list[tuple[float, int]]:
    kept = CURVE if row["world"] == "far tail" else LEVELS
    return [(a, n) for a, n in zip(row["levels"], row["alarms"], strict=True) if a in kept]
