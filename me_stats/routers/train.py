"""Training a router on cached component log-probabilities: K floats a token, no language model in the loop."""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from me_stats.likelihood import MixtureLikelihood, newton
from me_stats.models.base import Prefix
from me_stats.routers.base import Router, at_least, length_batches
from me_stats.routers.documents import ScoredDocument, as_documents

_LOG_TEMPERATURES = 2.0  # calibration looks at e^-2 .. e^2
_SHUFFLE = 0.25  # batches hold documents of like length, give or take this share


@dataclass(frozen=True)
class Epoch:
    """One pass: its number (0 is before training) and NLL in nats per token; `train` runs while weights move."""

    number: int
    train: float
    validation: float


@dataclass(frozen=True, eq=False)
class RouterFit:
    """A trained router, and what it gained over the best constant weights on documents that it never saw.

    Attributes
    ----------
    router
        The parameters of `best_epoch`, calibrated; float32.
    history
        One entry per epoch, from 0.
    best_epoch
        0 if training never helped: then the router is all but the constant mixture.
    temperature
        What logits are divided by, chosen on the validation documents.
    nll_train, nll_validation
        Nats per token.
    constant_weights, constant_nll_train, constant_nll_validation
        Of the best constant weights on the training documents.
    document_gain, document_tokens
        (D,) nats saved against the constant, and scored tokens, of each validation document. Stopping and calibration
        looked at these documents too, so judge a small gain on a third set (`document_nll`).
    train_tokens, n_parameters, seconds, options
        Scored tokens trained on, trained numbers, wall time, and the arguments of the call.
    """

    router: Router
    history: tuple[Epoch, ...]
    best_epoch: int
    temperature: float
    nll_train: float
    nll_validation: float
    constant_weights: tuple[float, ...]
    constant_nll_train: float
    constant_nll_validation: float
    document_gain: np.ndarray
    document_tokens: np.ndarray
    train_tokens: int
    n_parameters: int
    seconds: float
    options: dict[str, Any]

    @property
    def gain(self) -> float:
        """Nats per token saved on the validation documents."""
        return float(self.document_gain.sum() / self.document_tokens.sum())

    @property
    def gain_error(self) -> float:
        """Standard error of `gain` over documents; infinite with fewer than two."""
        count = len(self.document_gain)
        if count < 2:
            return math.inf
        residual = self.document_gain - self.gain * self.document_tokens
        return float(np.sqrt((residual**2).sum() * count / (count - 1)) / self.document_tokens.sum())


def train_router(
    router: Router,
    sequences: Sequence[Prefix],
    component_log_probs: Any,
    *,
    validation: float | tuple[Sequence[Prefix], Any] = 0.2,
    epochs: int = 30,
    lr: float | None = None,
    weight_decay: float = 1e-3,
    patience: int = 4,
    batch_tokens: int = 4096,
    seed: int = 0,
    progress: Callable[[Epoch], None] | None = None,
) -> RouterFit:
    r"""Minimise :math:`-\log \sum_i w_i(c_t) P_i(x_t | c_t)` per token, stopping on held-out documents.

    Starts from the router's parameters; a bias of zeros starts at the best constant weights. The best epoch, epoch 0
    included, is kept, and its temperature calibrated. The router given is not changed. Documents are whole in every
    batch: cut very long ones for a `RecurrentRouter`, whose time grows with the longest.

    Parameters
    ----------
    sequences
        Token ids of D documents.
    component_log_probs
        Natural logs: D arrays (S_d, K) for the last S_d tokens of each document, or one (Σ T_d, K) for all tokens.
    validation
        Share of the documents to hold out, or (sequences, component_log_probs) of others.
    lr
        Of Adam with decoupled weight decay (Loshchilov and Hutter 2019, arXiv 1711.05101); default the router's own.
    weight_decay
        Pulls towards the constant mixture; the bias is free.
    patience
        Epochs without a better validation NLL before training stops.
    batch_tokens
        Positions of one step, padding included.
    seed
        Of the split and of the order of batches.
    progress
        Called with each `Epoch`.

    Raises
    ------
    ValueError
        For scores that do not fit the documents, hold NaN or rule a token out altogether, for fewer than one document
        to train and one to validate on, or if training diverges.

    Examples
    --------
    >>> from me_stats.routers import NgramRouter
    >>> documents = [[0, 1] * 8, [1, 0] * 8] * 4
    >>> sure = np.log([[0.9, 0.1], [0.1, 0.9]])  # component i knows that token i comes next
    >>> scores = [sure[document] for document in documents]
    >>> fit = train_router(NgramRouter(2, order=1, buckets=64), documents, scores, epochs=20, batch_tokens=64)
    >>> fit.constant_nll_validation > 0.65, fit.nll_validation < 0.25
    (True, True)
    """
    began = time.perf_counter()
    _check(router, epochs, lr, weight_decay, patience, batch_tokens)
    lr = router.learning_rate if lr is None else lr
    train, held = _split(as_documents(sequences, component_log_probs, router.n_components), validation, router, seed)
    fitted = router.duplicate().float().train().requires_grad_(True)
    inputs = {id(document): features for part in (train, held) for document, features in _features(fitted, part)}
    flat = torch.cat([document.log_probs for document in train]).double()
    weights = torch.from_numpy(newton(MixtureLikelihood(flat.numpy())).weights)
    if not bool(fitted.bias.any()):
        with torch.no_grad():
            fitted.bias.copy_(weights.clamp(min=1e-6).log())
    decayed = [parameter for name, parameter in fitted.named_parameters() if name != "bias"]
    groups = [{"params": decayed, "weight_decay": weight_decay}, {"params": [fitted.bias], "weight_decay": 0.0}]
    optimiser = torch.optim.AdamW(groups, lr=lr)
    rng = np.random.default_rng([seed, 1])
    history = [Epoch(0, _nll(fitted, train, inputs), _nll(fitted, held, inputs))]
    best, kept = history[0], copy.deepcopy(fitted.state_dict())
    if progress is not None:
        progress(history[0])
    for number in range(1, epochs + 1):
        loss = _epoch(fitted, optimiser, train, inputs, batch_tokens, rng)
        history.append(Epoch(number, loss, _nll(fitted, held, inputs)))
        if not math.isfinite(history[-1].validation):
            raise ValueError(f"training diverged in epoch {number}; use an lr below {lr}")
        if progress is not None:
            progress(history[-1])
        if history[-1].validation < best.validation:
            best, kept = history[-1], copy.deepcopy(fitted.state_dict())
        elif number - best.number >= patience:
            break
    fitted.load_state_dict(kept)
    fitted.eval().requires_grad_(False)
    temperature = _calibrate(fitted.duplicate().double(), held, inputs)
    fitted.temperature.mul_(temperature)
    exact = fitted.duplicate().double()
    constant = [(document.log_probs.double() + weights.log()).logsumexp(-1).sum() for document in held]
    own = [-found.sum() for found in _log_likelihood(exact, held, inputs)]
    tokens = np.array([len(document.log_probs) for document in held])
    gain = np.array([-float(a) - float(b) for a, b in zip(constant, own, strict=True)])
    return RouterFit(
        router=fitted,
        history=tuple(history),
        best_epoch=best.number,
        temperature=float(fitted.temperature),
        nll_train=_nll(exact, train, inputs),
        nll_validation=float(sum(map(float, own)) / tokens.sum()),
        constant_weights=tuple(weights.tolist()),
        constant_nll_train=-float((flat + weights.log()).logsumexp(-1).mean()),
        constant_nll_validation=-float(sum(map(float, constant)) / tokens.sum()),
        document_gain=gain,
        document_tokens=tokens,
        train_tokens=len(flat),
        n_parameters=router.n_parameters,
        seconds=time.perf_counter() - began,
        options={
            "epochs": epochs,
            "lr": lr,
            "weight_decay": weight_decay,
            "patience": patience,
            "batch_tokens": batch_tokens,
            "seed": seed,
        },
    )


def _check(
    router: Router, epochs: int, lr: float | None, weight_decay: float, patience: int, batch_tokens: int
) -> None:
    if not isinstance(router, Router):
        raise TypeError(f"router must be a Router such as NgramRouter(2), got {router!r:.80}")
    at_least(1, epochs=epochs)
    at_least(1, patience=patience)
    at_least(1, batch_tokens=batch_tokens)
    if lr is not None and not (math.isfinite(lr) and lr > 0):
        raise ValueError(f"lr must be positive, got {lr}")
    if not (math.isfinite(weight_decay) and weight_decay >= 0):
        raise ValueError(f"weight_decay must be at least 0, got {weight_decay}")


def _split(
    documents: list[ScoredDocument], validation: float | tuple[Sequence[Prefix], Any], router: Router, seed: int
) -> tuple[list[ScoredDocument], list[ScoredDocument]]:
    if isinstance(validation, tuple):
        held = as_documents(*validation, router.n_components)
    else:
        if not 0 < validation < 1:
            raise ValueError(f"validation must be a share between 0 and 1, or documents with scores, got {validation}")
        order = np.random.default_rng([seed, 0]).permutation(len(documents)).tolist()
        count = max(1, round(validation * len(documents)))
        held = [documents[place] for place in order[:count]]
        documents = [documents[place] for place in order[count:]]
    if not documents or not held:
        raise ValueError("at least one scored document to train on and one to validate on are needed")
    return documents, held


def _features(router: Router, documents: list[ScoredDocument]) -> list[tuple[ScoredDocument, Tensor]]:
    """Features of the prefixes before every token, computed once."""
    found = router.features([document.tokens[:-1] for document in documents])
    return list(zip(documents, found, strict=True))


def _batch(documents: list[ScoredDocument], inputs: dict[int, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    """Padded features (B, L, ...) and log-probabilities (B, L, K), and which of these are scored."""
    features = pad_sequence([inputs[id(document)] for document in documents], batch_first=True)
    shape = features.shape[:2]
    log_probs = torch.zeros((*shape, documents[0].log_probs.shape[1]))
    mask = torch.zeros(shape, dtype=torch.bool)
    for row, document in enumerate(documents):
        span = slice(document.start, len(document.tokens))
        log_probs[row, span], mask[row, span] = document.log_probs, True
    return features, log_probs, mask


def _epoch(
    router: Router,
    optimiser: torch.optim.Optimizer,
    documents: list[ScoredDocument],
    inputs: dict[int, Tensor],
    batch_tokens: int,
    rng: np.random.Generator,
) -> float:
    # Neighbours in length share a batch, so that little is padding; noise shuffles them between epochs.
    noisy = np.array([len(document.tokens) for document in documents]) * rng.uniform(1, 1 + _SHUFFLE, len(documents))
    order = [documents[place] for place in np.argsort(noisy, kind="stable")]
    batches = length_batches([len(document.tokens) for document in order], batch_tokens)
    total, count = 0.0, 0
    for place in rng.permutation(len(batches)):
        features, log_probs, mask = _batch([order[row] for row in batches[place]], inputs)
        loss = -(router(features).log_softmax(-1) + log_probs).logsumexp(-1)[mask].mean()
        optimiser.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(router.parameters(), 1.0)
        optimiser.step()
        total += float(loss.detach()) * int(mask.sum())
        count += int(mask.sum())
    return total / count


def _logits(router: Router, documents: list[ScoredDocument], inputs: dict[int, Tensor]) -> list[Tensor]:
    """Logits (S, K), float64, before each scored token of every document."""
    order = sorted(range(len(documents)), key=lambda place: len(documents[place].tokens))
    found: list[Tensor] = [torch.empty(0)] * len(documents)
    for batch in length_batches([len(documents[place].tokens) for place in order], 1 << 16):
        mine = [order[row] for row in batch]
        with torch.no_grad():
            logits = router(pad_sequence([inputs[id(documents[place])] for place in mine], batch_first=True))
        for place, path in zip(mine, logits.double(), strict=True):
            found[place] = path[documents[place].start : len(documents[place].tokens)]
    return found


def _log_likelihood(router: Router, documents: list[ScoredDocument], inputs: dict[int, Tensor]) -> list[Tensor]:
    """(S,) log Σ w_i P_i of every scored token."""
    pairs = zip(_logits(router, documents, inputs), documents, strict=True)
    return [(logits.log_softmax(-1) + document.log_probs.double()).logsumexp(-1) for logits, document in pairs]


def _nll(router: Router, documents: list[ScoredDocument], inputs: dict[int, Tensor]) -> float:
    return -float(torch.cat(_log_likelihood(router, documents, inputs)).mean())


def _calibrate(router: Router, documents: list[ScoredDocument], inputs: dict[int, Tensor]) -> float:
    """The temperature of the smallest NLL, by two nested grids that hold the present one."""
    logits = torch.cat(_logits(router, documents, inputs))
    log_probs = torch.cat([document.log_probs for document in documents]).double()

    def nll(log_t: float) -> float:
        return -float(((logits / math.exp(log_t)).log_softmax(-1) + log_probs).logsumexp(-1).mean())

    best, width = 0.0, _LOG_TEMPERATURES
    for _ in range(2):
        # The centre comes first, so that it stays where nothing is better.
        offsets = sorted(np.linspace(-width, width, 21).tolist(), key=abs)
        best = min((best + offset for offset in offsets), key=nll)
        width /= 10
    return math.exp(best)
