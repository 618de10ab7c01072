"""A sampler, or a law, as a model of the evaluation harness (lm-eval)."""

from __future__ import annotations

import hashlib
import json
import logging
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from me_stats.models.ensemble import component_paths, mix
from me_stats.samplers.base import Sampler
from me_stats.samplers.conventional import CESampler
from me_stats.stopping import cut
from me_stats.tasks._lm_eval import harness_class, load
from me_stats.tasks.encoding import Encoder, Pair
from me_stats.trace import require_independent_rows

logger = logging.getLogger(__name__)

TOGETHER = 256  # rows of a batch at most, if the caller does not say: finished texts are handed out batch by batch
_LENGTHS = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")  # of the harness, by priority

_LM: Any = harness_class()


@dataclass(frozen=True)
class _Job:
    """One text to write: its place among the requests, its random numbers, its prompt and where it stops."""

    place: int
    seed: int
    row: int
    prompt: tuple[int, ...]
    until: tuple[str, ...]
    max_new_tokens: int


class HarnessLM(_LM):
    r"""A sampler as a model of lm-eval: it writes what `sampler` draws, and scores under the law of ``sampler.model``.

    **Texts** are draws from the sampler's own law. ``do_sample``, ``temperature``, ``top_p`` and the like of a task are
    not applied, since they would change the law under test: transforms belong into the composition. What is ignored is
    logged once. Stop strings and ``max_gen_toks`` hold; a text is cut at its first stop string.

    The random numbers of a text are keyed by `seed`, task and document: the sampler's seed is a hash of (seed, task
    name, request of the document), its row is document · repeats + repeat, where the same request again in one call is
    its next repeat. So a text is the same whatever the limit,
    the order and the batch size, up to the rounding of batched networks (see `Sampler.sample`), and CE and ME share
    their random numbers.

    **Scores** are exact: :math:`\sum_t \log \sum_i w_i P_i(x_t)` of the continuation, by one teacher-forced pass of
    each component. A continuation is "greedy" if each of its tokens is the most probable under the mixture, the lowest
    id among equals.

    Prompts that leave no room for what has to be written lose their oldest tokens; `truncated` counts them.

    Parameters
    ----------
    sampler
        A Sampler, or any LanguageModel with a tokenizer, which is then sampled by `CESampler`.
    seed
        One seed for all tasks.
    name
        For reports; default that of the sampler.
    max_new_tokens
        Where a task does not say ``max_gen_toks``.
    batch_size
        Texts that are written together; default as many as the caches of the networks allow, 256 at most.
    chat
        Whether prompts are meant for the chat template: checked at once, and for the caller to pass on to the harness
        (``apply_chat_template=lm.chat``), which calls `apply_chat_template`.
    progress
        Called with the number of requests answered since the last call; default a bar on a terminal.
    on_done
        Called with a request's place and its text when a batch of `generate_until` is finished.
    answered
        Asked for each place of `generate_until`; a text is taken for its answer, None is written. So an interrupted run
        goes on with the same random numbers.

    Attributes
    ----------
    truncated
        Requests, by task, that lost their oldest tokens.

    Raises
    ------
    ValueError
        Where lm-eval is not installed, for a vocabulary without a tokenizer, for a sampler whose rows share component
        draws, and for ``chat=True`` without one chat template for all components.
    """

    def __init__(
        self,
        sampler: Any,
        *,
        seed: int = 0,
        name: str | None = None,
        max_new_tokens: int = 256,
        batch_size: int | None = None,
        chat: bool = False,
        progress: Callable[[int], None] | None = None,
        on_done: Callable[[int, str], None] | None = None,
        answered: Callable[[int], str | None] | None = None,
    ) -> None:
        load("lm_eval.api.model")
        super().__init__()
        require_independent_rows(sampler, type(self).__name__)
        self.sampler: Sampler = sampler if isinstance(sampler, Sampler) else CESampler(sampler)
        self.model = self.sampler.model
        draft = getattr(self.sampler, "draft", None)
        self.encoder = Encoder(self.model, () if draft is None else (draft,))
        self.seed, self.name = seed, name or type(self.sampler).__name__
        self.max_new_tokens, self.batch_size, self.chat = max_new_tokens, batch_size, chat
        self.on_done, self.answered = on_done, answered
        self.truncated: Counter[str] = Counter()
        self._progress = progress
        self._ignored: set[str] = set()
        if chat:
            _ = self.encoder.chat_template

    # --- texts -----------------------------------------------------------------------------------------------------

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """A text for each request ``(context, gen_kwargs)``, in their order."""
        known = [None if self.answered is None else self.answered(place) for place in range(len(requests))]
        answers = ["" if text is None else text for text in known]
        before = self.truncated.copy()
        groups: dict[tuple[Any, ...], list[_Job]] = defaultdict(list)
        for job in self._jobs(requests, known):
            groups[job.seed, job.until, job.max_new_tokens].append(job)
        self._report(before)
        with self._advancing(len(requests), disable_tqdm) as advance:
            advance(sum(text is not None for text in known))
            for group in groups.values():
                group.sort(key=lambda job: (-len(job.prompt), job.row))
                start = 0
                while start < len(group):
                    batch = group[start : start + self._rows(group[start])]
                    for job, text in zip(batch, self._write(batch), strict=True):
                        answers[job.place] = text
                        if self.on_done is not None:
                            self.on_done(job.place, text)
                    start += len(batch)
                    advance(len(batch))
        return answers

    def _jobs(self, requests: Sequence[Any], known: Sequence[str | None]) -> Iterator[_Job]:
        seen: Counter[tuple[Any, ...]] = Counter()
        for place, request in enumerate(requests):
            task, document, number = str(request.task_name), request.doc_id, request.idx
            repeats = request.repeats or 1
            repeat = seen[task, document, number]
            seen[task, document, number] += 1
            if document is not None and repeat >= repeats:
                raise ValueError(f"requests hold document {document} of {task} more often than its {repeats} repeats")
            if known[place] is not None:
                continue
            context, options = request.args
            until, length = self._options(options)
            prompt = self._fitted(task, self.encoder.prompt(context), length)
            row = place if document is None else document * repeats + repeat
            yield _Job(place, stream_seed(self.seed, task, number), row, prompt, until, length)

    def _options(self, options: dict[str, Any]) -> tuple[tuple[str, ...], int]:
        """Stop strings and length; what else a task asks for is logged once."""
        ignored = {key for key in options if key not in (*_LENGTHS, "until")} - self._ignored
        if ignored:
            self._ignored |= ignored
            logger.warning(
                "%s ignores %s of the task: texts are drawn from the law of the composition; put transforms into it, "
                "such as Warped(model, Temperature(0.7))",
                self.name,
                ", ".join(f"{key}={options[key]!r}" for key in sorted(ignored)),
            )
        until = options.get("until") or ()
        strings = (until,) if isinstance(until, str) else tuple(until)
        length = next((options[key] for key in _LENGTHS if options.get(key) is not None), self.max_new_tokens)
        return tuple(string for string in strings if string), int(length)

    def _rows(self, job: _Job) -> int:
        fitting = self.sampler._rows_at_once(len(job.prompt), job.max_new_tokens)
        return self.batch_size or min(fitting, TOGETHER)

    def _write(self, batch: Sequence[_Job]) -> list[str]:
        trace = self.sampler.sample(
            [job.prompt for job in batch],
            max_new_tokens=batch[0].max_new_tokens,
            seed=batch[0].seed,
            rows=[job.row for job in batch],
            batch_size=len(batch),
            until=batch[0].until,
        )
        vocabulary = self.model.vocabulary
        rows = [row[:-1] if row[-1] in vocabulary.eos else row for row in trace.sequences()]
        return [cut(vocabulary.decode(row), batch[0].until) for row in rows]

    # --- scores ----------------------------------------------------------------------------------------------------

    def loglikelihood(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """Log-probability of each request's continuation given its context, and whether it is greedy."""
        before, pairs = self.truncated.copy(), []
        for request in requests:
            context, continuation = self.encoder.pair(*request.args)
            pairs.append((self._fitted(str(request.task_name), context, len(continuation)), continuation))
        self._report(before)
        with self._advancing(len(requests), disable_tqdm) as advance:
            return self._scored(pairs, lambda places: advance(len(places)))

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
        """Log-probability of each request's whole text.

        Every token is predicted once. A text that does not fit goes through windows with as much context as there is
        room for; over byte strings a window is sized for two tokens of a network for each of the text.
        """
        utils = load("lm_eval.utils")
        totals, owners, pairs = [0.0] * len(requests), [], []
        for place, request in enumerate(requests):
            ids = list(self.model.vocabulary.encode(request.args[0]))
            # -1 stands for what is read before the text, which may be no token or several.
            size = self.encoder.window or max(1, len(ids))
            for window in utils.get_rolling_token_windows(ids, prefix_token=-1, max_seq_len=size, context_len=1):
                context, predicted = utils.make_disjoint_window(window)
                owners.append(place)
                first = context[:1] == [-1]
                pairs.append(((*self.encoder.nothing, *context[1:]) if first else tuple(context), tuple(predicted)))
        left = Counter(owners)
        with self._advancing(len(requests), disable_tqdm) as advance:
            advance(len(requests) - len(left))

            def done(places: Sequence[int]) -> None:
                left.subtract(owners[place] for place in places)
                advance(sum(left[owner] == 0 for owner in {owners[place] for place in places}))

            for owner, (log_p, _) in zip(owners, self._scored(pairs, done, greedy=False), strict=True):
                totals[owner] += log_p
        return totals

    def _scored(
        self, pairs: Sequence[Pair], done: Callable[[Sequence[int]], None], *, greedy: bool = True
    ) -> list[tuple[float, bool]]:
        """Log-probability of each continuation, and whether it is greedy; `done` hears of places as they are scored."""
        # Choices that differ in their last token share every law that they need.
        groups: dict[Pair, list[int]] = defaultdict(list)
        for place, (context, continuation) in enumerate(pairs):
            groups[context, continuation[:-1]].append(place)
        # The longest first, so that rows of a batch are of one length and memory is short at once, or never.
        order = sorted(groups, key=lambda key: -len(key[0]) - len(key[1]))
        contexts = [context for context, _ in order]
        paths = component_paths(self.model, contexts, [pairs[groups[key][0]][1] for key in order])
        scores = [(0.0, False)] * len(pairs)
        for key, (laws, log_weights) in zip(order, paths, strict=True):
            best = (laws[0] if len(laws) == 1 else mix(laws, log_weights)).argmax(-1).cpu() if greedy else None
            for place in groups[key]:
                tokens = torch.tensor(pairs[place][1], dtype=torch.int64)
                log_p = float(_mixed(laws, log_weights, tokens).sum())
                scores[place] = log_p, best is not None and torch.equal(best, tokens)
            done(groups[key])
        return scores

    # --- prompts ---------------------------------------------------------------------------------------------------

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """The prompt of a chat, in the one template of all components; see `Encoder.chat`."""
        return self.encoder.chat(chat_history, reply=add_generation_prompt)

    def chat_template(self, chat_template: bool | str = False) -> str | None:
        """The template, for the harness's report; None where it is not wanted."""
        return self.encoder.chat_template if chat_template else None

    @property
    def tokenizer_name(self) -> str:
        """What the harness keys prepared requests by."""
        return f"me_stats-{self.model.vocabulary.fingerprint}"

    def set_cache_hook(self, cache_hook: Any) -> None:
        """ValueError: the harness's cache is keyed by the prompt alone, so that repeats and seeds would be one draw."""
        raise ValueError("the harness's cache would take one draw for all repeats and seeds; use on_done and answered")

    def _fitted(self, task: str, prompt: tuple[int, ...], new: int) -> tuple[int, ...]:
        fitted = self.encoder.fit(prompt, new)
        self.truncated[task] += len(fitted) < len(prompt)
        return fitted

    def _report(self, before: Counter[str]) -> None:
        for task, count in (self.truncated - before).items():
            logger.warning("%d prompts of %s did not fit and lost their oldest tokens", count, task)

    @contextmanager
    def _advancing(self, total: int, hidden: bool) -> Iterator[Callable[[int], None]]:
        if self._progress is not None:
            yield self._progress
            return
        with load("tqdm").tqdm(total=total, desc=self.name[:40], disable=True if hidden else None) as bar:
            yield bar.update


def stream_seed(seed: int, task: str, number: int = 0) -> int:
    """The sampler's seed for request `number` of each document of a task: the same on every machine.

    >>> stream_seed(0, "gsm8k") == stream_seed(0, "gsm8k"), stream_seed(0, "gsm8k") == stream_seed(1, "gsm8k")
    (True, False)
    """
    digest = hashlib.sha256(json.dumps([int(seed), task, int(number)]).encode()).digest()
    return int.from_bytes(digest[:8], "big")


def _mixed(laws: Sequence[Tensor], log_weights: Tensor, tokens: Tensor) -> Tensor:
    """(T,) log Σ_i w_i P_i of each token, in double precision, from K laws (T, V) and log-weights (T, K)."""
    picked = [law.gather(1, tokens.to(law.device)[:, None])[:, 0].to("cpu", torch.float64) for law in laws]
    return (torch.stack(picked, -1) + log_weights.to("cpu", torch.float64)).logsumexp(-1)
