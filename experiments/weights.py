"""Which weights explain a text, and do they move with its domain?

Prose, code and both in equal bytes, none of it seen in training, are scored by every component. λ̂ of each domain comes
with an interval that allows for tokens of one document that go together, with its loss on documents held out of the
fit, and with what it costs on the other domains. Simulated texts show how often the intervals hold.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from scipy import stats

from me_stats import ConstantMixing, Ensemble
from me_stats.corpus import CorpusScores, Document, score_corpus
from me_stats.equivalence import binomial_interval
from me_stats.likelihood import MixtureLikelihood, em, newton
from me_stats.models.base import path_log_probs
from me_stats.presets import SIBLINGS, open_recorded
from me_stats.record import Record, Recorder
from me_stats.scripts import load
from me_stats.sensitivity.reweight import shown
from me_stats.transfer import CrossValidation, DomainFits, cross_validate, document_nll, fit_by_domain
from me_stats.weights import WeightFit, fit_weights, held_out_nll

NAME, TITLE = "weights", "The weights that explain a text, by domain"
DOMAINS = ("prose", "code", "mixed")

# True weights of simulated texts; "documents" have one component each, drawn with the weight.
CASES: tuple[tuple[str, tuple[float, ...]], ...] = (
    ("tokens", (0.0, 1.0)),
    ("tokens", (0.02, 0.98)),
    ("tokens", (0.3, 0.7)),
    ("tokens", (0.98, 0.02)),
    ("tokens", (0.2, 0.3, 0.5)),
    ("tokens", (0.0, 0.3, 0.7)),
    ("documents", (0.3, 0.7)),
)
_LEAST_COVERAGE = 0.93
_DIFFERENCES = (0.0, 1e-5, 1e-3, 0.01, 0.1, 1.0)  # relative, between the laws of two components
_ALIKE, _DISTINCT = 1e-3, 1.0  # up to the first all fits must be flagged, from the second on none
_WORDS, _GROUP = 50, 50  # vocabulary of simulated texts, and tokens of one of their documents
_POINTS = 41  # of a likelihood curve
_MARGINS = {"weight": 0.1, "nll": 0.01}  # smaller differences between domains count as none
# Nats a token between two ways to compute the same law: batches of other shapes round otherwise.
_ROUNDING = {"float32": 1e-3, "float16": 1e-2, "bfloat16": 5e-2}


@dataclass(frozen=True)
class Config:
    """`text_bytes` of each domain, in documents of at most `document_bytes`; `folds` of the cross-validation.

    `runs` simulated texts of `run_tokens` tokens a case, 0 for none; `solver_tokens` to compare the solvers on.
    """

    models: tuple[str, ...] = SIBLINGS
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    device: str = "cpu"
    text_bytes: int = 40_000
    document_bytes: int = 4000
    folds: int = 5
    confidence: float = 0.95
    runs: int = 1000
    run_tokens: int = 2000
    solver_tokens: int = 1_000_000
    seed: int = 0


def run(config: Config, progress: Callable[[float, str], None] = lambda fraction, note: None) -> Record:
    """Score the texts, fit each domain, judge the fits on other text; then simulate."""
    recorder = Recorder(NAME, TITLE, config)
    progress(0.0, "reading held-out text")
    documents = held_out(config.text_bytes, config.document_bytes)
    setting = open_recorded(recorder)
    components = setting.ensemble.components
    progress(0.15, f"scoring {len(documents)} documents")
    scores = score_corpus(components, documents)
    progress(0.5, "fitting weights")
    parts = {name: scores.subset([d for d, own in enumerate(scores.domains) if own == name]) for name in DOMAINS}
    found = fit_by_domain(scores, confidence=config.confidence)
    validated = {
        name: cross_validate(part, folds=config.folds, seed=config.seed, confidence=config.confidence)
        for name, part in parts.items()
    }
    results: dict[str, Any] = {
        "label": setting.label,
        "components": component_names(config.models, len(components)),
        "texts": {name: _text(part) for name, part in parts.items()},
        "fits": {name: _fit(fit) for name, fit in found.fits.items()},
        "pooled": _fit(found.pooled),
        "transfer": {"nll": found.nll, "excess": found.excess, "intervals": found.intervals},
        "validated": {name: _validation(one) for name, one in validated.items()},
        "curves": {name: _curve(part, found.fits[name]) for name, part in parts.items()},
        "power": _power(found, parts),
    }
    _check_text(recorder, components, parts, found, validated, config)
    _find(
        recorder,
        found,
        parts,
        results,
        setting.label,
        specialised=config.models == SIBLINGS,
        prompts_only=len(config.models) == 1,
    )
    if config.runs:
        progress(0.6, "simulated texts: coverage")
        results["coverage"] = [row for case in CASES for row in _coverage(case, config)]
        progress(0.85, "components that are nearly the same")
        results["alike"] = [_alike(difference, config) for difference in _DIFFERENCES]
        progress(0.92, "Newton against EM")
        results["solvers"] = _solvers(config)
        _check_simulated(recorder, results)
    return recorder.finish(results)


def held_out(text_bytes: int, document_bytes: int) -> list[Document]:
    """Documents that the siblings were not trained on: prose, code, and others of both kinds as ``"mixed"``.

    The text is that of the running Python, and Pythons differ: where one has less than `text_bytes` of a domain, all
    have as much as it allows, and ValueError says so below half.
    """
    documents: dict[str, list[Document]] = {name: [] for name in DOMAINS}
    unseen = load("experiments", "train_siblings").held_out()
    texts_of = {name: [text[:document_bytes].decode(errors="ignore") for text in unseen[name]] for name in DOMAINS[:2]}
    for name, texts in texts_of.items():
        there_is = sum(len(text.encode()) for text in texts) * 2 // 3  # the rest is for "mixed"
        if there_is < text_bytes / 2:
            raise ValueError(f"text_bytes={text_bytes} is more held-out {name} than there is; lower it")
        text_bytes = min(text_bytes, there_is)
    for name, texts in texts_of.items():
        for domain, budget in ((name, text_bytes), ("mixed", text_bytes // 2)):
            while budget > 0:
                taken = texts.pop(0).encode()[:budget].decode(errors="ignore")
                if taken:
                    documents[domain].append(Document(domain, taken))
                budget -= max(1, len(taken.encode()))
    return [document for name in DOMAINS for document in documents[name]]


def component_names(models: Sequence[str], count: int) -> list[str]:
    """Short names: of the models, or of the prompts of one model."""
    if len(models) == 1:
        return [f"prompt {i + 1}" for i in range(count)]
    return [name.removeprefix("bundled:") for name in models]


def _text(part: CorpusScores) -> dict[str, int]:
    return {"documents": part.n_documents, "tokens": part.n, "bytes": int(part.bytes.sum())}


def _fit(fit: WeightFit) -> dict[str, Any]:
    kept = ("weights", "intervals", "stderr", "nll", "bits_per_byte", "identified", "reason", "interval_method")
    return {name: getattr(fit, name) for name in (*kept, "min_information", "n", "n_groups", "iterations")}


def _validation(found: CrossValidation) -> dict[str, Any]:
    rivals = {one.alternative: one for one in found.comparisons}
    alone = [one for name, one in rivals.items() if name.endswith("alone")]
    return {
        "nll": found.nll,
        "bits_per_byte": found.bits_per_byte,
        "weights": found.weights,
        "equal": rivals["equal weights"],
        "best_single": min(alone, key=lambda one: one.nll),
    }


def _curve(part: CorpusScores, fit: WeightFit) -> dict[str, Any] | None:
    """Loss along the line of weights of two components, less that at λ̂."""
    if len(fit.weights) != 2:
        return None
    at = (1 - np.cos(np.linspace(0, np.pi, _POINTS))) / 2  # denser at the ends, where curves are steep
    return {"weight": at, "excess": [held_out_nll(part.log_probs, [w, 1 - w]) - fit.nll for w in at]}


def _power(found: DomainFits, parts: dict[str, CorpusScores]) -> dict[str, float]:
    """Differences between prose and code that this text would have shown with power 0.8."""
    level, power = (1 + found.confidence) / 2, 0.8
    errors = [float(found.fits[name].stderr[0]) for name in DOMAINS[:2]]
    # Two intervals are apart if λ̂ differ by more than the sum of their half-widths.
    weight = stats.norm.ppf(level) * sum(errors) + stats.norm.ppf(power) * math.hypot(*errors)
    losses = []
    for i, j in _crossed(found):
        limit = stats.t.ppf(level, parts[DOMAINS[j]].n_documents - 1)
        stderr = float(np.diff(found.intervals[i, j])[0]) / 2 / limit
        losses.append(stderr * (limit + stats.norm.ppf(power)))
    return {"weight": float(weight), "nll": float(max(losses))}


def _crossed(found: DomainFits) -> list[tuple[int, int]]:
    """Places of (code λ̂ on prose) and (prose λ̂ on code) in the transfer matrix."""
    prose, code = (found.domains.index(name) for name in DOMAINS[:2])
    return [(code, prose), (prose, code)]


def _check_text(
    recorder: Recorder,
    components: Sequence[Any],
    parts: dict[str, CorpusScores],
    found: DomainFits,
    validated: dict[str, CrossValidation],
    config: Config,
) -> None:
    worst = 0.0
    for name, part in parts.items():
        few = part.subset(np.arange(min(2, part.n_documents)))
        weights = found.fits[name].weights
        direct = _ensemble_nll(Ensemble(components, ConstantMixing(weights)), few)
        worst = max(worst, float((np.abs(direct - document_nll(few, weights)) / few.lengths).max()))
    recorder.check(
        f"the ensemble at λ̂ has the loss that component scores say (off by {worst:.1e} nats a token)",
        worst <= _ROUNDING[config.dtype],
    )
    for name, one in validated.items():
        # Twice the half-width: nine intervals are asked here, on whatever text this Python comes with.
        losing = [r.alternative for r in one.comparisons if 1.5 * r.interval[1] - 0.5 * r.interval[0] < 0]
        recorder.check(
            f"{name}: λ̂ of other documents does not lose ({one.nll:.4f} nats a token)"
            + (f": {', '.join(losing)} win" if losing else ""),
            not losing,
        )
    least = min(float(found.excess.min()), 0.0)
    recorder.check(f"no weights explain a domain better than its own λ̂ (by {-least:.1e})", least >= -1e-9)
    if config.models == SIBLINGS:
        own = [float(found.fits[name].weights[i]) for i, name in enumerate(DOMAINS[:2])]
        recorder.check(
            f"each sibling has most of the weight on text like its own ({own[0]:.3f} prose, {own[1]:.3f} code)",
            min(own) > 0.5,
        )
        between = found.fits["code"].weights[0] < found.fits["mixed"].weights[0] < found.fits["prose"].weights[0]
        recorder.check("λ̂ of the mixed text lies between those of prose and code", bool(between))


def _ensemble_nll(ensemble: Ensemble, part: CorpusScores) -> np.ndarray:
    """(D,) loss of each document by the ensemble's own laws, nats."""
    prompts, tails = zip(*((prompt, tokens.tolist()) for prompt, tokens in part.sequences()), strict=True)
    laws = path_log_probs(ensemble, prompts, tails)
    picked = [
        law.double().gather(1, torch.tensor(tail, device=law.device)[:, None])
        for law, tail in zip(laws, tails, strict=True)
    ]
    return np.array([-float(one.sum()) for one in picked])


def _find(
    recorder: Recorder,
    found: DomainFits,
    parts: dict[str, CorpusScores],
    results: dict[str, Any],
    label: str,
    *,
    specialised: bool,
    prompts_only: bool,
) -> None:
    prose, code = (found.fits[name] for name in DOMAINS[:2])
    first, power = results["components"][0], results["power"]
    n = f"{prose.n:,} + {code.n:,} tokens of {sum(parts[name].n_documents for name in DOMAINS[:2])} documents"
    (low, high), (other_low, other_high) = prose.intervals[0], code.intervals[0]
    spans = ", ".join(
        f"{fit.weights[0]:.3f} [{fit.intervals[0][0]:.3f}, {fit.intervals[0][1]:.3f}] on {name}"
        for name, fit in zip(DOMAINS, (prose, code), strict=False)
    )
    apart = bool(low > other_high or other_low > high) and prose.identified and code.identified
    (i, j), (k, m) = _crossed(found)
    gaps = {"code λ̂ on prose": (i, j), "prose λ̂ on code": (k, m)}
    low_ends, high_ends = ([float(found.intervals[at][end]) for at in gaps.values()] for end in (0, 1))
    losses = ", ".join(
        f"{name} {found.excess[at]:+.4f} [{found.intervals[at][0]:.4f}, {found.intervals[at][1]:.4f}]"
        for name, at in gaps.items()
    )
    if prompts_only:
        # Two prompts of one model were not made for these texts: what λ̂ does is stated, and no verdict on the claim.
        recorder.check(
            f"{label}: weight of {first} {spans}; {losses} nats a token; λ̂ is {'' if apart else 'not '}seen to move",
            prose.identified and code.identified,
        )
        return
    level = f"{found.confidence:.0%} confidence"
    robust = ", robust by document" if prose.n_groups and code.n_groups else ", too few documents to allow for them"
    recorder.find(
        claim="C13",
        statement="the best λ is another for prose than for code",
        models=label,
        n=n,
        statistic=f"weight of {first} {spans}",
        tv_upper=None,
        bound=level + robust,
        **_verdict(apart, max(high - other_low, other_high - low), _MARGINS["weight"], specialised=specialised),
        caveat=f"with power 0.8 this text shows an effect of {power['weight']:.3f} in λ; best means likelihood, "
        "not accuracy on a task",
    )
    recorder.find(
        claim="C13",
        statement="the λ of one domain loses on the other",
        models=label,
        n=n,
        statistic=f"{losses} nats a token",
        tv_upper=None,
        bound=f"{level}, paired by document",
        **_verdict(min(low_ends) > 0, max(high_ends), _MARGINS["nll"], specialised=specialised),
        caveat=f"with power 0.8 this text shows an effect of {power['nll']:.4f} nats a token; "
        "each domain's own λ̂ was fitted on the text that it is judged on",
    )


def _verdict(shown: bool, largest: float, margin: float, *, specialised: bool) -> dict[str, Any]:
    """A difference shown, or bounded below `margin`, or neither: then the text is too short to say.

    That no difference is there refutes the claim only for components that were made for the domains.
    """
    if shown:
        return {"verdict": "reproduced at small scale", "held": True}
    if specialised and largest < margin:
        return {"verdict": "refuted as stated", "held": False}
    return {"verdict": "not testable here", "held": True}


def _laws(rng: np.random.Generator, k: int) -> np.ndarray:
    return rng.dirichlet(np.ones(_WORDS), size=k)


def _coverage(case: tuple[str, tuple[float, ...]], config: Config) -> list[dict[str, Any]]:
    """How often the interval of each weight holds the truth; with documents, also that of who ignores them."""
    unit, truth = case
    k, n = len(truth), config.run_tokens
    rng = np.random.default_rng([config.seed, CASES.index(case)])
    log_laws = np.log(_laws(rng, k))
    covered, ignoring = np.zeros(k, dtype=int), np.zeros(k, dtype=int)
    size = _GROUP if unit == "documents" else 1
    groups = np.arange(n) // size
    for _ in range(config.runs):
        component = rng.choice(k, size=groups[-1] + 1, p=truth)[groups]
        log_probs = log_laws[:, _tokens(rng, log_laws, component)].T
        fit = fit_weights(log_probs, groups=groups if size > 1 else None, confidence=config.confidence)
        covered += _holds(fit, truth)
        if size > 1:
            ignoring += _holds(fit_weights(log_probs, confidence=config.confidence), truth)
    rows = []
    for i in range(k if k > 2 else 1):  # two weights have the same interval, turned round
        low, high = binomial_interval(int(covered[i]), config.runs)
        rows.append(
            {
                "unit": unit, "weights": truth, "truth": truth[i], "runs": config.runs, "covered": int(covered[i]),
                "low": low, "high": high, "ignoring": int(ignoring[i]) if size > 1 else None,
            }
        )  # fmt: skip
    return rows


def _tokens(rng: np.random.Generator, log_laws: np.ndarray, component: np.ndarray) -> np.ndarray:
    cumulative = np.cumsum(np.exp(log_laws), axis=1)
    uniform = rng.random(len(component))
    tokens = np.empty(len(component), dtype=int)
    for i, row in enumerate(cumulative):
        own = component == i
        tokens[own] = np.minimum(np.searchsorted(row, uniform[own], side="right"), _WORDS - 1)
    return tokens


def _holds(fit: WeightFit, truth: Sequence[float]) -> np.ndarray:
    # Ends that reach 0 or 1 are exact there; elsewhere a root is known to 1e-10.
    return (fit.intervals[:, 0] <= np.array(truth) + 1e-9) & (np.array(truth) - 1e-9 <= fit.intervals[:, 1])


def _alike(difference: float, config: Config) -> dict[str, Any]:
    """Share of fits that say they cannot tell two components apart whose laws differ by `difference` of themselves."""
    rng = np.random.default_rng([config.seed, 100, _DIFFERENCES.index(difference)])
    runs = max(20, config.runs // 5)
    base, other = _laws(rng, 2)
    laws = np.stack([base, base * (1 - difference) + other * difference])
    flagged = 0
    for _ in range(runs):
        component = rng.choice(2, size=config.run_tokens, p=[0.3, 0.7])
        tokens = _tokens(rng, np.log(laws), component)
        flagged += not fit_weights(np.log(laws)[:, tokens].T).identified
    return {"difference": difference, "runs": runs, "flagged": flagged}


def _solvers(config: Config) -> dict[str, Any]:
    """Newton and EM on one long simulated text of three components."""
    rng = np.random.default_rng([config.seed, 200])
    log_laws = np.log(_laws(rng, 3))
    component = rng.choice(3, size=config.solver_tokens, p=[0.2, 0.3, 0.5])
    likelihood = MixtureLikelihood(log_laws[:, _tokens(rng, log_laws, component)].T)
    found, seconds = {}, {}
    for name, solver in (("newton", newton), ("em", em)):
        started = time.perf_counter()
        found[name] = solver(likelihood)
        seconds[name] = time.perf_counter() - started
    return {
        "tokens": likelihood.n,
        "weights": found["newton"].weights,
        "difference": float(np.abs(found["newton"].weights - found["em"].weights).max()),
        "iterations": {name: one.iterations for name, one in found.items()},
        "seconds": seconds,
        "ratio": seconds["em"] / max(seconds["newton"], 1e-9),
    }


def _check_simulated(recorder: Recorder, results: dict[str, Any]) -> None:
    for row in results["coverage"]:
        where = f"{row['truth']:g} of {shown(row['weights'])}, independent {row['unit']}"
        recorder.check(
            f"intervals hold: {where} (coverage {row['covered'] / row['runs']:.3f})",
            stats.binom.cdf(row["covered"], row["runs"], _LEAST_COVERAGE) > 1e-3,
        )
        if row["ignoring"] is not None:
            recorder.check(
                f"intervals that ignore documents do not hold ({row['ignoring'] / row['runs']:.3f})",
                stats.binom.cdf(row["ignoring"], row["runs"], _LEAST_COVERAGE) < 1e-6,
            )
    alike = [row for row in results["alike"] if row["difference"] <= _ALIKE]
    distinct = [row for row in results["alike"] if row["difference"] >= _DISTINCT]
    shares = [sum(row["flagged"] for row in rows) / sum(row["runs"] for row in rows) for rows in (alike, distinct)]
    recorder.check(f"components that differ by {_ALIKE:g} or less are flagged ({shares[0]:.1%})", shares[0] >= 0.99)
    recorder.check(f"distinct components are not flagged ({shares[1]:.1%})", shares[1] <= 0.01)
    solvers = results["solvers"]
    recorder.check(
        f"Newton and EM agree on {solvers['tokens']:,} tokens (within {solvers['difference']:.1e})",
        solvers["difference"] <= 1e-7,
    )
