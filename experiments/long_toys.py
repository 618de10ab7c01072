"""Long generations where every answer is known: chains of up to a million tokens a row against closed forms.

Two Markov ensembles, one of long and one of short memory. What the library says about long rows (variance and its
growth, autocorrelation, waits of components, CE against ME) is compared with the law. One component per sequence is the
control that all of this must find. `long_coverage` asks how often the intervals cover, and about paths, ends and drift.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import stats

from me_stats import CESampler, ConstantMixing, Ensemble, MESampler, SequenceMixtureSampler
from me_stats.chains import effective_draws, rank_rhat
from me_stats.dependence import autocorrelation_time, autocovariances, geyer_time
from me_stats.lags import expected_prefill, lag_test, longest_wait, longest_waits, prefill_per_step
from me_stats.models import MarkovModel
from me_stats.per_sequence import detectable_ratio, sequence_tests, variance_ratio
from me_stats.record import Record, Recorder
from me_stats.samplers.tabular import tabulate
from me_stats.trace import Trace
from me_stats.variance import MarkovMoments, markov_moments, variance_growth

NAME, TITLE = "long_toys", "Long generations on toys: closed forms, up to a million tokens a row"
STATISTICS = ("token", "surprisal")

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]
Progress = Callable[[float, str], None]


@dataclass(frozen=True)
class Config:
    """`rows` of `steps` tokens for moments, `long_rows` of `long_steps` for what shows only there.

    `long_steps` is a multiple of `window` and of all `waits`. `doubt` is the chance that right samplers and right
    estimators fail any check, divided among fewer than 1000 comparisons; `test_level` is that of the permutation tests.
    """

    rows: int = 4000
    steps: int = 1024
    long_rows: int = 8
    long_steps: int = 1_000_000
    window: int = 10_000
    waits: tuple[int, ...] = (100, 1000, 10_000, 100_000, 1_000_000)
    test_rows: int = 500
    doubt: float = 1e-6
    test_level: float = 1e-4
    seed: int = 0

    @property
    def strict(self) -> float:
        """Level of one comparison."""
        return self.doubt / 1000


@dataclass(frozen=True)
class Toy:
    """An ensemble of chains that starts from the stationary law of its mixture."""

    name: str
    ensemble: Ensemble

    @property
    def laws(self) -> Floats:
        """Mixed laws (1+V, V): of the first token, then after each token."""
        table = tabulate(self.ensemble)
        assert table is not None
        return np.asarray(table.at_order(1).log_table.exp().numpy())

    def values(self, tokens: Ints, statistic: str) -> Floats:
        """The statistic of each token (N, T): its number over V-1, or -log P(token | before) in nats."""
        laws = self.laws
        if statistic == "token":
            return tokens / (laws.shape[1] - 1)
        before = np.concatenate([np.zeros((len(tokens), 1), dtype=np.int64), 1 + tokens[:, :-1]], axis=1)
        return np.asarray(-np.log(laws)[before, tokens])

    @property
    def weights(self) -> Floats:
        """Mixing weights (K,)."""
        return np.asarray(self.ensemble.mixing.weights.numpy())  # type: ignore[attr-defined]

    def moments(self, statistic: str, steps: int, *, middle: bool = False) -> MarkovMoments:
        """Closed form of sums from a row's first token on, or from its `middle`."""
        laws = self.laws
        size = laws.shape[1]
        if statistic == "token":
            return markov_moments(self.ensemble, np.arange(size) / (size - 1), steps=steps)
        # A surprisal belongs to two tokens: the chain of pairs, (row of the law, token written).
        onward = np.zeros((size + 1, size, size + 1, size))
        for token in range(size):
            onward[:, token, 1 + token] = laws[1 + token]
        first = np.zeros_like(laws)
        first[0] = laws[0]
        if middle:
            first = np.concatenate([np.zeros((1, size)), laws[0][:, None] * laws[1:]])
        pairs = MarkovModel(first.reshape(-1), onward.reshape(laws.size, laws.size))
        return markov_moments(pairs, -np.log(laws).reshape(-1), steps=steps)


def toys() -> tuple[Toy, Toy]:
    """Long memory: two chains that stay where they are. Short memory: three random ones."""
    rng = np.random.default_rng(5)
    stay = [staying([0.4, 0.3, 0.2, 0.1], 0.98), staying([0.1, 0.2, 0.3, 0.4], 0.8)]
    return Toy("long memory", stationary(stay, [0.6, 0.4])), Toy(
        "short memory", stationary([rng.dirichlet(np.ones(8), 8) for _ in range(3)], [0.5, 0.3, 0.2])
    )


def staying(law: list[float], stay: float) -> Floats:
    """A chain that keeps its token with chance `stay`, and else draws from `law`."""
    return stay * np.eye(len(law)) + (1 - stay) * np.tile(law, (len(law), 1))


def stationary(tables: list[Floats], weights: list[float]) -> Ensemble:
    """An ensemble whose first token has the stationary law of the mixture."""
    mixed = sum(weight * table for weight, table in zip(weights, tables, strict=True))
    law = np.linalg.matrix_power(np.asarray(mixed), 1 << 12)[0]
    return Ensemble([MarkovModel(law / law.sum(), table) for table in tables], ConstantMixing(weights))


def run(config: Config, progress: Progress = lambda fraction, note: None) -> Record:
    """Draw rows of each toy and compare what the library says with the closed form."""
    recorder = Recorder(NAME, TITLE, config)
    results: dict[str, Any] = {"moments": [], "long": [], "waits": [], "pairs": [], "lags": []}
    for i, toy in enumerate(toys()):
        progress(0.45 * i, f"{toy.name}: moments")
        traces = _traces(toy, config)
        results["moments"] += _moments(toy, traces, config)
        results["pairs"].append(_compare(toy, traces, config))
        results["lags"].append(_lags(toy, traces, config))
        progress(0.45 * i + 0.1, f"{toy.name}: {config.long_rows} rows of {config.long_steps:,} tokens")
        long, waits = _long(toy, config)
        results["long"] += long
        results["waits"] += waits
    _judge(recorder, results, config)
    return recorder.finish(results)


def _traces(toy: Toy, config: Config) -> dict[str, Trace]:
    kinds = {"CE": CESampler, "ME": MESampler, "control": SequenceMixtureSampler}
    return {
        name: kind(toy.ensemble).sample((), n=config.rows, max_new_tokens=config.steps, seed=config.seed + 10 + i)
        for i, (name, kind) in enumerate(kinds.items())
    }


def _once(toy: Toy, steps: int) -> tuple[Floats, Floats]:
    """Mean and variance of sums of tokens where a component is drawn once per sequence."""
    size = toy.laws.shape[1]
    parts = [markov_moments(c, np.arange(size) / (size - 1), steps=steps) for c in toy.ensemble.components]
    weights = toy.weights
    mean = sum(w * part.mean for w, part in zip(weights, parts, strict=True))
    second = sum(w * (part.variance + part.mean**2) for w, part in zip(weights, parts, strict=True))
    return np.asarray(mean), np.asarray(second - mean**2)


def _moments(toy: Toy, traces: dict[str, Trace], config: Config) -> Iterator[dict[str, Any]]:
    """Means and variances of sums on a grid of t, and the growth of the variance, beside their closed forms."""
    grid = 2 ** np.arange(int(math.log2(config.steps)) + 1)
    start = max(1, config.steps // 8)
    for (name, trace), statistic in itertools.product(traces.items(), STATISTICS):
        if name == "control" and statistic == "surprisal":
            continue
        sums = toy.values(trace.tokens.numpy(), statistic).cumsum(1)
        oracle = toy.moments(statistic, config.steps)
        mean, variance = (oracle.mean, oracle.variance) if name != "control" else _once(toy, config.steps)
        growth = variance_growth(sums, start=start, confidence=1 - config.strict)
        log_t = np.log(np.arange(start, config.steps + 1))
        log_t -= log_t.mean()
        z = (sums.mean(0) - mean) / np.sqrt(variance / len(sums))
        at = grid - 1
        low, high = growth.rate.interval
        rate = float(log_t @ np.log(variance[start - 1 :]) / (log_t @ log_t))
        yield {
            "toy": toy.name, "sampler": name, "statistic": statistic, "n": len(sums), "t": grid,
            "variance": growth.variance[at], "exact": variance[at], "ce_exact": oracle.variance[at],
            "z": float(np.abs(z[at]).max()), "error": float(np.abs(growth.variance[at] / variance[at] - 1).max()),
            "inside": bool(((growth.lower <= variance) & (variance <= growth.upper))[at].all()),
            "rate": growth.rate.value, "exact_rate": rate, "rate_inside": bool(low <= rate <= high),
        }  # fmt: skip


def _compare(toy: Toy, traces: dict[str, Trace], config: Config) -> dict[str, Any]:
    """ME, and the control, against CE by one value a sequence; R-hat over halves of each as a description."""
    sums = {name: {s: toy.values(trace.tokens.numpy(), s).sum(1) for s in STATISTICS} for name, trace in traces.items()}
    found: dict[str, Any] = {"toy": toy.name}
    rng = np.random.default_rng(config.seed + 20)
    m = config.test_rows
    for name in ("ME", "control"):
        ratios = {s: variance_ratio(sums[name][s], sums["CE"][s], confidence=1 - config.strict) for s in STATISTICS}
        tests = sequence_tests(
            {s: (sums["CE"][s][:m], sums[name][s][:m]) for s in STATISTICS}, level=config.test_level,
            permutations=math.ceil(4 / config.test_level), rng=rng,
        )  # fmt: skip
        halves = np.stack([sums[kind]["token"][: config.rows // 2 * 2].reshape(2, -1) for kind in ("CE", name)])
        agreement = rank_rhat(halves.reshape(4, -1))
        found[name] = {
            "ratio": {s: ratio.value for s, ratio in ratios.items()},
            "interval": {s: variance_ratio(sums[name][s], sums["CE"][s]).interval for s in STATISTICS},
            "differs": any(not low <= 1 <= high for low, high in (ratio.interval for ratio in ratios.values())),
            "rejected": tests.rejected, "pvalue": tests.pvalue, "rhat": agreement.rhat, "ess": agreement.ess_bulk,
        }  # fmt: skip
    kurtosis = float(stats.kurtosis(sums["CE"]["token"], fisher=False))
    found["detectable"] = detectable_ratio(config.rows, kurtosis=kurtosis)
    return found


def _lags(toy: Toy, traces: dict[str, Trace], config: Config) -> dict[str, Any]:
    weights = toy.weights
    prefill = prefill_per_step(traces["ME"], confidence=1 - config.strict)
    return {
        "toy": toy.name, "pvalue": lag_test(traces["ME"]).pvalue, "control": lag_test(traces["control"]).pvalue,
        "prefill": prefill.value, "interval": prefill.interval, "expected": expected_prefill(weights, config.steps),
    }  # fmt: skip


def _long(toy: Toy, config: Config) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Per-token variance and autocorrelation of rows of a million tokens, and the longest waits in them."""
    rows: list[dict[str, Any]] = []
    waits: list[dict[str, Any]] = []
    for i, kind in enumerate((CESampler, MESampler)):
        trace = kind(toy.ensemble).sample(
            (), n=config.long_rows, max_new_tokens=config.long_steps, seed=config.seed + 30 + i
        )
        for statistic in STATISTICS:
            v = toy.values(trace.tokens.numpy(), statistic)
            rows.append({"toy": toy.name, "sampler": "CE" if i == 0 else "ME", "statistic": statistic})
            rows[-1] |= _long_row(toy, v, statistic, config, timed=i == 1)
        if trace.components is not None:
            waits = list(_waits(toy, trace.components.numpy(), config))
    return rows, waits


def _long_row(toy: Toy, v: Floats, statistic: str, config: Config, *, timed: bool) -> dict[str, Any]:
    n, steps = v.shape
    # Windows of a row depend on each other by about tau/window, which is less than their error.
    windows = v.reshape(n * steps // config.window, 10, -1).sum(2).cumsum(1)
    growth = variance_growth(windows, confidence=1 - config.strict)
    oracle = toy.moments(statistic, config.window, middle=True)
    exact = float(oracle.variance[-1])
    found: dict[str, Any] = {
        "windows": len(windows), "per_token": growth.variance[-1] / config.window, "exact": exact / config.window,
        "limit": oracle.asymptotic_variance, "inside": bool(growth.lower[-1] <= exact <= growth.upper[-1]),
        "rate": growth.rate.value,
    }  # fmt: skip
    if statistic == "token":  # stationary from its first token on
        off = v.sum(1) - steps * oracle.stationary_mean
        # Past the window, where correlations are long gone, each token adds the limit.
        variance = exact + (steps - config.window) * oracle.asymptotic_variance
        square = float((off**2).sum() / variance)
        found |= {
            "row_variance": square / n, "pvalue": 2 * min(stats.chi2.cdf(square, n), stats.chi2.sf(square, n)),
            "mean_pvalue": float(2 * stats.norm.sf(abs(off.sum()) / math.sqrt(n * variance))),
        }  # fmt: skip
    if timed:
        tau = oracle.asymptotic_variance / float(oracle.variance[0])
        time = autocorrelation_time(v.reshape(-1, config.window), confidence=1 - config.strict)
        low, high = time.pooled.interval
        by_row = geyer_time(autocovariances(v) / steps)
        found |= {
            "tau": time.pooled.value, "exact_tau": tau, "tau_inside": low <= tau <= high,
            "row_tau_error": float(np.abs(by_row / tau - 1).max()), "ess": time.effective_tokens,
            "row_ess": steps / by_row, "arviz_ess": effective_draws(v), "exact_ess": v.size / tau,
        }  # fmt: skip
    return found


def _waits(toy: Toy, components: Ints, config: Config) -> Iterator[dict[str, Any]]:
    """Longest waits in rows of each length against exact quantiles; pieces of a path are independent."""
    weights = toy.weights
    for steps in config.waits:
        longest = longest_waits(components.reshape(-1, steps)[:1000], len(weights))
        for i, weight in enumerate(weights.tolist()):
            law, own = longest_wait(weight, steps), longest[:, i]
            low, middle, high = (law.quantile(p) for p in (0.01, 0.5, 0.99))
            pvalues = [
                stats.binomtest(int((own <= q).sum()), len(own), float(law.cdf[q])).pvalue for q in (low, middle, high)
            ]
            yield {
                "toy": toy.name, "component": i, "weight": weight, "steps": steps, "n": len(own),
                "mean": float(own.mean()), "exact": law.mean, "low": low, "high": high, "most": int(own.max()),
                "pvalue": min(1.0, 3 * min(pvalues)),
            }  # fmt: skip


def _judge(recorder: Recorder, results: dict[str, Any], config: Config) -> None:
    """One finding an estimator."""
    drawn = [row for row in results["moments"] if row["sampler"] != "control"]
    once = [row for row in results["moments"] if row["sampler"] == "control"]
    tested = [pair["ME"] for pair in results["pairs"]]
    controls = [pair["control"] for pair in results["pairs"]]
    timed = [row for row in results["long"] if "tau" in row]
    summed = [row for row in results["long"] if "pvalue" in row]
    level = f"level {config.doubt:g} for all findings"
    n = f"{config.rows:,} rows of {config.steps:,} tokens, CE and ME each"
    million = f"{config.long_rows} rows of {config.long_steps:,} tokens, CE and ME each"
    z = float(stats.norm.isf(config.strict / 2))

    def find(statement: str, n: str, statistic: str, held: bool, caveat: str, bound: str = level) -> None:
        recorder.find(
            claim="C14", statement=statement, models="Markov toys, V = 4 and 8, K = 2 and 3", n=n, statistic=statistic,
            tv_upper=None, bound=bound, held=held, caveat=caveat,
            verdict="reproduced at small scale" if held else "refuted as stated",
        )  # fmt: skip

    find(
        "mean and variance of sums over a row are those of the closed form at every length",
        n,
        f"variances within {_most(drawn, 'error'):.1%}, means within {_most(drawn, 'z'):.1f} standard errors",
        all(row["inside"] and row["z"] < z for row in drawn),
        f"a variance off by less than {math.expm1(z * math.sqrt(2 / config.rows)):.0%} may pass",
    )
    find(
        "the variance grows like T for CE and for ME",
        n,
        "log-log slopes " + ", ".join(f"{row['rate']:.2f} ({row['exact_rate']:.2f})" for row in drawn),
        all(row["rate_inside"] for row in drawn),
        f"slope from T = {max(1, config.steps // 8)} on; exact slope of the closed form in brackets",
    )
    find(
        "in rows of a million tokens the variance per token is that of the closed form",
        million,
        f"within {max(abs(row['per_token'] / row['exact'] - 1) for row in results['long']):.1%} in "
        f"{results['long'][0]['windows']} windows of {config.window:,}; whole rows: p at least "
        f"{min(min(row['pvalue'], row['mean_pvalue']) for row in summed):.2g}",
        all(row["inside"] for row in results["long"])
        and all(min(row["pvalue"], row["mean_pvalue"]) > config.strict for row in summed),
        f"{config.long_rows} whole rows tell a factor of {_factor(config):.1f} at this level",
    )
    find(
        "autocorrelation times and effective tokens are those of the closed form",
        f"{config.long_rows} rows of {config.long_steps:,} tokens, ME",
        f"times within {max(abs(row['tau'] / row['exact_tau'] - 1) for row in timed):.1%}; effective tokens within "
        f"{max(abs(row['ess'] / row['arviz_ess'] - 1) for row in timed):.1%} of arviz-stats",
        all(row["tau_inside"] for row in timed),
        f"pooled over windows of {config.window:,}; a single row is off by up to {_most(timed, 'row_tau_error'):.0%}",
    )
    find(
        "waits of components, their longest and the prefill per step have the law of independent draws",
        n,
        f"longest wait {max(row['most'] for row in results['waits'])} in {config.long_steps:,} tokens; smallest p "
        f"{min(row['pvalue'] for row in results['waits'] + results['lags']):.2g} of {len(results['waits']) + 2}",
        all(row["pvalue"] > config.strict for row in results["waits"] + results["lags"])
        and all(row["interval"][0] <= row["expected"] <= row["interval"][1] for row in results["lags"]),
        "constant weights; a router's waits are not geometric",
    )
    find(
        "ME and CE have one law of sums and surprisals over long rows",
        n,
        "Var ME/Var CE " + ", ".join(f"{_shown(pair, s)}" for pair in tested for s in STATISTICS),
        not any(pair["differs"] or pair["rejected"] for pair in tested),
        f"95% intervals; a ratio below {max(pair['detectable'] for pair in results['pairs']):.2f} may pass; R-hat "
        f"{max(pair['rhat'] for pair in tested):.3f}, a description",
        f"level {config.doubt:g}, permutation tests {2 * config.test_level:g}",
    )
    find(
        "one component per sequence is found: its variance is larger and grows faster, as its own closed form says",
        n,
        f"Var/Var CE {min(pair['ratio']['token'] for pair in controls):.1f} or more, slopes "
        + ", ".join(f"{row['rate']:.2f} ({row['exact_rate']:.2f})" for row in once),
        all(pair["differs"] and pair["rejected"] for pair in controls)
        and all(row["rate_inside"] and row["inside"] for row in once)
        and all(row["control"] < config.strict for row in results["lags"]),
        f"a planted bug; R-hat {min(pair['rhat'] for pair in controls):.2f} or more",
    )


def _most(rows: list[dict[str, Any]], name: str) -> float:
    return max(float(row[name]) for row in rows)


def _shown(pair: dict[str, Any], statistic: str) -> str:
    low, high = pair["interval"][statistic]
    return f"{pair['ratio'][statistic]:.2f} [{low:.2f}, {high:.2f}]"


def _factor(config: Config) -> float:
    """Ratio of variances that the chi-square test of whole rows finds with power 0.8."""
    rows = config.long_rows
    return float(stats.chi2.isf(config.strict / 2, rows) / stats.chi2.ppf(0.2, rows))
