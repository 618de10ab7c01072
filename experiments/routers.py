"""C11 and C12: routers that read the prefix, trained on text, judged on other text, and sampled.

Everything happens on held-out text of the two domains that the bundled siblings were trained on, which neither sibling
has seen, and on documents that switch between the domains every few dozen bytes. Source documents are split first, so
that no text is in two parts: routers and the best constant λ learn from the first part, training stops and β is chosen
on the second, and every number comes from the third.

Three trained routers read the last three bytes, the whole prefix through a recurrent net, and the hidden state of the
prose sibling. A fourth is Bayes' rule: β = 0 is the constant mixture, β = 1 the mixture of whole sequences.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy import stats

from me_stats import Ensemble, MESampler
from me_stats.corpus import CorpusScores, Document, score_corpus
from me_stats.mixing import ConstantMixing, Mixing
from me_stats.models import catalog
from me_stats.presets import SIBLINGS, open_recorded
from me_stats.record import Record, Recorder
from me_stats.routers import (
    BayesRouter,
    HiddenStateRouter,
    LastComponentSampler,
    NgramRouter,
    PeekingSampler,
    RecurrentRouter,
    Router,
    RouterFit,
    RouterMixing,
    StickySampler,
    decoding_distances,
    document_nll,
    scored_sequences,
    train_router,
)
from me_stats.scripts import load
from me_stats.testing import check_sampler
from me_stats.weights import fit_weights

NAME, TITLE = "routers", "Learned routers: sampled, composed, thresholded"
DOMAINS = ("prose", "code", "mixed")
PARTS = {"train": 0.5, "validation": 0.15, "test": 0.35}
_PATIENCE = 8  # epochs: with little text a recurrent net takes a few before it helps
_BATCH = {"n-gram": 4096}
_WORTH = 0.01  # nats/byte: an interval that holds 0 and such a gain decides nothing
_SAME = 1e-6  # TV of a step that rounding of float32 laws can cause


@dataclass(frozen=True)
class Config:
    """At most `documents` sources a domain, cut to `longest` bytes; `rows` continuations of each of `prompts`.

    `piece` bounds the bytes between two switches of a mixed document, `margin` is the loss in nats a byte that counts
    as none on pure domains, `first` the draws of a first token, `shown` the bytes of the routing picture.
    """

    models: tuple[str, str] = SIBLINGS
    documents: int = 96
    longest: int = 768
    piece: tuple[int, int] = (64, 192)
    epochs: int = 20
    width: int = 24
    betas: tuple[float, ...] = (0.0, 0.01, 0.05, 0.25, 1.0)
    margin: float = 0.02
    prompts: int = 2
    rows: int = 150
    steps: int = 24
    first: int = 10_000
    level: float = 1e-6
    diverse_rows: int = 32
    diverse_steps: int = 64
    shown: int = 480
    seed: int = 0


@dataclass(frozen=True)
class _Text:
    """One document: its bytes, and which of them come from code."""

    domain: str
    ids: tuple[int, ...]
    is_code: tuple[bool, ...]


def run(config: Config, progress: Callable[[float, str], None] = lambda fraction, note: None) -> Record:
    """Score the text, train the routers, judge them, sample them, and look at one document."""
    recorder = Recorder(NAME, TITLE, config)
    setting = open_recorded(recorder)
    components = setting.ensemble.components
    progress(0.0, "held-out text")
    texts, same = _texts(config)
    scores = {}
    for i, (part, chosen) in enumerate(texts.items()):
        progress(0.08 + 0.1 * i, f"scoring {part} text")
        documents = [Document(text.domain, text.ids) for text in chosen]
        scores[part] = score_corpus(components, documents, prompt=components[0].vocabulary.eos)
    constant = fit_weights(scores["train"].log_probs, groups=scores["train"].document)
    routers: dict[str, Router] = {
        "n-gram": NgramRouter(2),
        "recurrent": RecurrentRouter(2, components[0].vocabulary.size, width=config.width, seed=config.seed),
        "hidden state": HiddenStateRouter(components[0], 2),
    }
    fits: dict[str, RouterFit] = {}
    for i, (name, router) in enumerate(routers.items()):
        progress(0.35 + 0.1 * i, f"training the {name} router")
        fits[name] = train_router(
            router, *scored_sequences(scores["train"]), validation=scored_sequences(scores["validation"]),
            epochs=config.epochs, patience=_PATIENCE, batch_tokens=_BATCH.get(name, 16_384), seed=config.seed,
        )  # fmt: skip
    mixings = {name: RouterMixing(fit.router) for name, fit in fits.items()}
    judged = _judge(scores, constant.weights, mixings, components, config)
    progress(0.65, "sampling with each router")
    sampled, compared = [], "text that neither sibling has seen"
    for name, mixing in mixings.items():
        sampled.append({"router": name, **_sample(Ensemble(components, mixing), setting.prompts, config)})
        sampled[-1]["forwards_per_token"] = _forwards(Ensemble(components, mixing), setting.prompts[0], config)
    controls = _controls(Ensemble(components, mixings["n-gram"]), setting.prompts, config)
    progress(0.85, "the Bayes axis")
    bayes = [_diversity(beta, constant.weights, setting, config) for beta in config.betas]
    for row in bayes:
        row["nll"] = {domain: judged["bayes"][row["beta"]][domain]["nll"] for domain in DOMAINS}
    compared += "" if same else "; this Python's library is not quite the one that the siblings were trained on"
    for name in fits:
        _find_gain(recorder, name, judged["routers"][name]["mixed"], setting.label, compared)
    _find_no_loss(recorder, judged["routers"], setting.label, compared, config)
    for row in sampled:
        _find_same_law(recorder, row, setting.label, config)
    for row in controls:
        recorder.check(f"{row['control']} on the n-gram router is caught (p = {row['pvalue']:.1e})", row["rejected"])
    _check_bayes(recorder, judged)
    best = min(fits, key=lambda name: fits[name].nll_validation)
    return recorder.finish({
        "label": setting.label,
        "corpus": {
            "that_of_the_siblings": same, "documents": {part: len(chosen) for part, chosen in texts.items()},
            "bytes": {part: found.n for part, found in scores.items()},
        },
        "constant": {"weights": constant.weights, "intervals": constant.intervals},
        "training": [_training(name, fit) for name, fit in fits.items()],
        "held_out": judged["table"], "beta": judged["beta"], "sampled": sampled, "controls": controls, "bayes": bayes,
        "picture": {"router": best, **_picture(texts["test"], scores["test"], mixings[best], config)},
    })  # fmt: skip


def _training(name: str, fit: RouterFit) -> dict[str, Any]:
    return {
        "router": name, "seconds": round(fit.seconds, 2), "parameters": fit.n_parameters, "best_epoch": fit.best_epoch,
        "temperature": fit.temperature, "nll_validation": fit.nll_validation,
    }  # fmt: skip


# The text


def _held_out() -> tuple[dict[str, list[bytes]], bool]:
    """Documents of each domain that the siblings were not trained on, and whether the corpus is the very same."""
    siblings, same = load("experiments", "train_siblings"), True
    for domain, (train, held_out) in siblings.corpora().items():
        told = json.loads(Path(catalog.resolve(f"bundled:{domain}"), "training.json").read_text(encoding="utf-8"))
        same &= hashlib.sha256(train + held_out).hexdigest() == told["corpus"]["sha256"]
    return siblings.held_out(), same


def _texts(config: Config) -> tuple[dict[str, list[_Text]], bool]:
    """Texts of each part; a mixed one is made of a prose and a code document of the same part."""
    found, same = _held_out()
    rng = np.random.default_rng([config.seed, 0])
    count = min(config.documents, *map(len, found.values()))
    sources = {
        domain: [documents[i] for i in rng.permutation(len(documents))[:count]] for domain, documents in found.items()
    }
    edges = np.round(np.cumsum([0.0, *PARTS.values()]) * count).astype(int)
    texts: dict[str, list[_Text]] = {}
    for part, start, stop in zip(PARTS, edges[:-1], edges[1:], strict=True):
        prose, code = (sources[domain][start:stop] for domain in ("prose", "code"))
        pure = [
            _Text(domain, tuple(document[: config.longest]), (domain == "code",) * min(len(document), config.longest))
            for domain, documents in (("prose", prose), ("code", code))
            for document in documents
        ]
        texts[part] = [*pure, *(_interleaved(pair, rng, config) for pair in zip(prose, code, strict=True))]
    return texts, same


def _interleaved(pair: tuple[bytes, bytes], rng: np.random.Generator, config: Config) -> _Text:
    """Pieces of two documents in turn; their lengths are random, so that counting bytes says nothing."""
    left, turn = list(pair), int(rng.integers(2))
    ids: list[int] = []
    is_code: list[bool] = []
    while all(left) and len(ids) < config.longest:
        size = int(rng.integers(config.piece[0], config.piece[1] + 1))
        ids += left[turn][:size]
        is_code += [turn == 1] * len(left[turn][:size])
        left[turn], turn = left[turn][size:], 1 - turn
    return _Text("mixed", tuple(ids[: config.longest]), tuple(is_code[: config.longest]))


# Held-out loss


def _judge(
    scores: dict[str, CorpusScores], weights: np.ndarray, mixings: dict[str, Any], components: Any, config: Config
) -> dict[str, Any]:
    """Loss of every way to choose weights on the test part by domain, and what it saves against the best constant."""
    test = scores["test"]
    constant = ConstantMixing(weights / weights.sum())
    own = {domain: fit_weights(_of(scores["train"], domain).log_probs).weights for domain in DOMAINS}
    bayes = {beta: BayesRouter(components, constant.weights, beta=beta, given=1) for beta in config.betas}
    parts = {domain: _of(test, domain) for domain in DOMAINS}
    base = {domain: _losses(constant, part) for domain, part in parts.items()}
    validation = {beta: float(_bayes_losses(router, scores["validation"]).sum()) for beta, router in bayes.items()}
    chosen = min((beta for beta in config.betas if beta > 0), key=lambda beta: validation[beta])
    table: list[dict[str, Any]] = []
    found: dict[str, Any] = {"table": table, "routers": {}, "bayes": {}, "beta": chosen}

    def add(name: str, losses: dict[str, np.ndarray]) -> dict[str, dict[str, Any]]:
        rows = {j: {"weights": name, "domain": j, **_gain(base[j], losses[j], part)} for j, part in parts.items()}
        table.extend(rows.values())
        return rows

    add("best constant λ", base)
    add("λ of its domain", {j: _losses(ConstantMixing(own[j] / own[j].sum()), part) for j, part in parts.items()})
    for i, name in enumerate(config.models):
        add(f"{name} alone", {j: -_component_sums(part)[:, i] for j, part in parts.items()})
    for name, mixing in mixings.items():
        found["routers"][name] = add(name, {j: _losses(mixing, part) for j, part in parts.items()})
    for beta, router in bayes.items():
        losses = {j: _bayes_losses(router, part) for j, part in parts.items()}
        found["bayes"][beta] = add(f"Bayes {beta:g}", losses)
    # One document through the models themselves, against the sums of cached scores.
    one = test.subset([0])
    router = bayes[chosen]
    found["bayes_cache_error"] = float(abs(_losses(router, one) - _bayes_losses(router, one))[0]) / one.n
    mixture = -np.logaddexp.reduce(np.log(constant.weights.numpy()) + _component_sums(test), axis=1)
    sequence = _bayes_losses(BayesRouter(components, constant.weights, beta=1.0, given=1), test)
    found["sequence_mixture_error"] = float(np.abs(mixture / sequence - 1).max())
    return found


def _of(scores: CorpusScores, domain: str) -> CorpusScores:
    return scores.subset([d for d, name in enumerate(scores.domains) if name == domain])


def _losses(mixing: Mixing, scores: CorpusScores) -> np.ndarray:
    """(D,) nats of each document."""
    return document_nll(mixing, *scored_sequences(scores))[0]


def _component_sums(scores: CorpusScores) -> np.ndarray:
    """(D, K) log-probability of whole documents."""
    return np.add.reduceat(scores.log_probs.astype(float), scores.offsets[:-1], axis=0)


def _bayes_losses(router: BayesRouter, scores: CorpusScores) -> np.ndarray:
    """(D,) nats of each document from cached scores: the evidence at a byte is the sum over those before it."""
    losses = []
    for log_probs in torch.from_numpy(scores.log_probs).double().split(scores.lengths.tolist()):
        evidence = log_probs.cumsum(0) - log_probs
        losses.append(-float((router.posterior(evidence) + log_probs).logsumexp(-1).sum()))
    return np.array(losses)


def _gain(base: np.ndarray, losses: np.ndarray, scores: CorpusScores) -> dict[str, float]:
    """Loss, and nats a byte saved against `base`, with a paired 95% interval over documents."""
    saved, n, count = base - losses, scores.n, len(scores.lengths)
    gain = float(saved.sum()) / n
    error = math.sqrt(count / (count - 1) * float(((saved - gain * scores.lengths) ** 2).sum())) / n
    limit, power = float(stats.t.ppf(0.975, count - 1)), float(stats.t.ppf(0.8, count - 1))
    return {
        "nll": float(losses.sum()) / n, "bits_per_byte": float(losses.sum()) / n / math.log(2), "gain": gain,
        "low": gain - limit * error, "high": gain + limit * error, "detects": (limit + power) * error,
        "documents": count, "bytes": n,
    }  # fmt: skip


# Sampling


def _router_checks(sampler: Any, ensemble: Ensemble, prompts: Sequence[Any], config: Config, **options: Any) -> Any:
    asked = list(prompts[: config.prompts])
    return check_sampler(sampler, ensemble, asked, level=config.level, seed=config.seed, on_fail="return", **options)


def _sample(ensemble: Ensemble, prompts: Sequence[Any], config: Config) -> dict[str, Any]:
    """ME against the law that CE computes, and the exact distances between the decodings along ME's own rows."""
    sampler = MESampler(ensemble)
    whole = _router_checks(sampler, ensemble, prompts, config, max_new_tokens=config.steps, n=config.rows)
    first = _router_checks(sampler, ensemble, prompts, config, max_new_tokens=1, n=config.first)
    few = max(1, config.rows // 4)
    trace = sampler.sample(list(prompts[: config.prompts]), n=few, max_new_tokens=config.steps, seed=config.seed)
    apart = decoding_distances(ensemble, trace.row_prompts(), trace.sequences())
    return {
        "pvalue": whole.pvalue, "passed": bool(whole.passed and first.passed), "first_pvalue": first.pvalue,
        "tokens": whole.tokens + first.tokens, "sequences": whole.sequences,
        "min_detectable_tv": first.min_detectable_tv, "tv_upper_first": first.tv_upper,
        "compose_tv": float(apart.compose.max()), "threshold_tv": apart.mean("threshold"),
        "threshold_tv_largest": float(apart.threshold.max()), "top_weight": apart.mean("top_weight"),
    }  # fmt: skip


def _controls(ensemble: Ensemble, prompts: Sequence[Any], config: Config) -> list[dict[str, Any]]:
    samplers = {
        "last component": LastComponentSampler(ensemble, boost=20.0), "peeking": PeekingSampler(ensemble),
        "sticky": StickySampler(ensemble, keep=0.9),
    }  # fmt: skip
    rows = []
    for name, sampler in samplers.items():
        found = _router_checks(sampler, ensemble, prompts, config, max_new_tokens=config.steps, n=config.rows)
        rows.append({"control": name, "pvalue": found.pvalue, "rejected": not found.passed, "worst": found.worst.name})
    return rows


def _forwards(ensemble: Ensemble, prompt: Any, config: Config) -> float:
    """Runs of a network per token of one row: 1 is the least, and CE takes K."""
    trace = MESampler(ensemble).sample([prompt], n=1, max_new_tokens=config.steps, seed=config.seed)
    return trace.cost.forwards / int(trace.lengths.sum())


def _diversity(beta: float, weights: np.ndarray, setting: Any, config: Config) -> dict[str, Any]:
    """What ME writes with Bayes' rule: entropy, distinct trigrams, and how far the weights have decided at the end."""
    components = setting.ensemble.components
    prompts = [tuple(components[0].vocabulary.encode(prompt)) for prompt in setting.prompts]
    # The prompt is given, so that each sequence starts from the prior.
    rows, nats, tokens, top = [], [], 0, []
    for i, prompt in enumerate(prompts):
        ensemble = Ensemble(components, BayesRouter(components, weights / weights.sum(), beta=beta, given=len(prompt)))
        trace = MESampler(ensemble).sample(
            [prompt], n=-(-config.diverse_rows // len(prompts)), max_new_tokens=config.diverse_steps,
            seed=config.seed + i,
        )  # fmt: skip
        rows += trace.sequences()
        nats += (-trace.log_probs.sum(1)).tolist()
        tokens += int(trace.lengths.sum())
        last = trace.score.log_weights[torch.arange(len(trace.lengths)), trace.lengths - 1]
        top += last.exp().amax(-1).tolist()
    grams = [tuple(row[t : t + 3]) for row in rows for t in range(len(row) - 2)]
    residual = np.array(nats) - sum(nats) / tokens * np.array(list(map(len, rows)))
    return {
        "beta": beta, "entropy": sum(nats) / tokens, "entropy_error": float(np.sqrt((residual**2).sum())) / tokens,
        "distinct": len(set(grams)) / max(1, len(grams)), "top_weight": float(np.mean(top)), "tokens": tokens,
        "forwards_per_token": _forwards(ensemble, setting.prompts[-1], config),
    }  # fmt: skip


def _picture(texts: Sequence[_Text], scores: CorpusScores, mixing: RouterMixing, config: Config) -> dict[str, Any]:
    """One mixed document: weight of code before each byte, and probability that code wrote it after seeing it."""
    printable = {*range(32, 127), 10}
    mixed = [place for place, text in enumerate(texts) if text.domain == "mixed"]
    order = np.random.default_rng([config.seed, 1]).permutation(mixed).tolist()
    place = next((place for place in order if _shows_well(texts[place], printable, config.shown)), order[0])
    one = scores.subset([place])
    ((prompt, tokens),) = one.sequences()
    log_weights = mixing.path_log_weights(prompt, tokens.tolist())
    posterior = (log_weights + torch.from_numpy(one.log_probs).double()).softmax(-1)
    stop = config.shown
    return {
        "text": "".join(chr(byte) if byte in printable else "·" for byte in texts[place].ids[:stop]),
        "is_code": [int(code) for code in texts[place].is_code[:stop]],
        "weight": log_weights[:stop, 1].exp().numpy().round(4),
        "responsibility": posterior[:stop, 1].numpy().round(4),
    }


def _shows_well(text: _Text, printable: set[int], shown: int) -> bool:
    """Whether a page can show the text: long enough, printable, and its prose in words (many docstrings are code)."""
    ids = text.ids[:shown]
    prose = [byte for byte, code in zip(ids, text.is_code, strict=False) if not code]
    words = sum(chr(byte).isalpha() or chr(byte) in " ,.\n" for byte in prose)
    return len(ids) == shown and printable.issuperset(ids) and words > 0.95 * len(prose)


def _find_gain(recorder: Recorder, name: str, row: dict[str, Any], label: str, text: str) -> None:
    _find_c12(
        recorder, row, label, row["low"] > 0, row["high"] > _WORTH, text, "likelihood, not accuracy",
        statement=f"{name} router beats the best constant λ on documents that switch domains",
        statistic=f"saves {_spelled(row)}", bound="95% confidence, paired by document",
    )  # fmt: skip


def _find_no_loss(recorder: Recorder, routers: dict[str, Any], label: str, text: str, config: Config) -> None:
    pure = [(name, rows[domain]) for name, rows in routers.items() for domain in ("prose", "code")]
    name, worst = min(pure, key=lambda pair: pair[1]["low"])
    _find_c12(
        recorder, worst, label, worst["low"] > -config.margin, worst["high"] > 0, text,
        "against one λ for all text, not the domain's own",
        statement="no router loses on documents of one domain",
        statistic=f"worst of {len(pure)}: {name} on {worst['domain']}, saves {_spelled(worst)}",
        bound=f"95% confidence each, margin {config.margin:g} nats/byte",
    )  # fmt: skip


def _spelled(row: dict[str, Any]) -> str:
    return f"{row['gain']:.4f} nats/byte ({row['low']:.4f} to {row['high']:.4f})"


def _find_c12(
    recorder: Recorder, row: Any, label: str, shown: bool, open_: bool, text: str, limits: str, **said: str
) -> None:
    # Another Python's library gives other text, and little of it may leave both answers `open_`.
    verdict = "reproduced at small scale" if shown else "not testable here" if open_ else "refuted as stated"
    recorder.find(
        claim="C12", models=label, n=f"{row['documents']} documents, {row['bytes']:,} bytes", tv_upper=None,
        held=shown or open_, verdict=verdict,
        caveat=f"{text}; an effect of {row['detects']:.2g} nats/byte is found with power 0.8; {limits}", **said,
    )  # fmt: skip


def _find_same_law(recorder: Recorder, row: dict[str, Any], label: str, config: Config) -> None:
    held = bool(row["passed"] and row["compose_tv"] < _SAME)
    recorder.find(
        claim="C11", statement=f"ME drawing from the {row['router']} router has the law that CE sums", models=label,
        n=f"{row['tokens']:,} tokens, {row['sequences']:,} continuations of {config.steps}",
        statistic=(
            f"p = {row['pvalue']:.2g} (continuations), {row['first_pvalue']:.2g} (first tokens); CE differs by at most "
            f"{row['compose_tv']:.1e} a step, the threshold by {row['threshold_tv']:.3f} on average (exact)"
        ),
        tv_upper=row["tv_upper_first"], bound="95% confidence on the first token", held=held,
        verdict="reproduced at small scale" if held else "refuted as stated",
        caveat=f"a departure of {row['min_detectable_tv']:.2g} of the first token's law is found with power 0.8",
    )  # fmt: skip


def _check_bayes(recorder: Recorder, judged: dict[str, Any]) -> None:
    recorder.check(
        f"Bayes' rule with β = 1 is the mixture of whole sequences (off by {judged['sequence_mixture_error']:.0e})",
        judged["sequence_mixture_error"] < 1e-9,
    )
    recorder.check(
        f"cached scores give Bayes' rule as the models do (off by {judged['bayes_cache_error']:.0e} nats/byte)",
        judged["bayes_cache_error"] < 1e-4,
    )
