"""Other people's samplers in the one form that `check_sampler` takes: functions, and `generate` of transformers.

`me_stats.testing.endpoint` does the same for servers.
"""

from __future__ import annotations

import copy
import operator
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

# Algorithms that take one row only, and ends that no id tells from the padding after them.
_ONE_ROW = (
    "assistant_model",
    "assistant_early_exit",
    "prompt_lookup_num_tokens",
    "use_mtp",
    "stop_strings",
    "stopping_criteria",
)
_OURS = ("inputs", "input_ids", "attention_mask", "max_new_tokens", "max_length", "num_return_sequences")


class TokenSampler(Protocol):
    """Whatever writes token ids after prompts: row r of the result continues ``prompts[r]``.

    A right one keeps four promises, and `check_sampler` holds it to them:

    - rows are independent of each other, also where prompts repeat;
    - another seed gives fresh randomness, the same seed may repeat the rows;
    - the prompt is not repeated, and the end-of-sequence id is kept as the last token of its row;
    - a row is shorter than `max_new_tokens` only where it ended.

    Any callable of this form will do; `one_by_one`, `Generate` and `Completions` make one.

    >>> def fair_coins(prompts, *, max_new_tokens, seed):
    ...     return np.random.default_rng(seed).integers(0, 2, (len(prompts), max_new_tokens))
    >>> sampler: TokenSampler = fair_coins
    >>> sampler([(0,), (0,)], max_new_tokens=3, seed=1).shape
    (2, 3)
    """

    def __call__(
        self, prompts: Sequence[tuple[int, ...]], *, max_new_tokens: int, seed: int
    ) -> Tensor | np.ndarray | Sequence[Sequence[int]]:
        """Continuations of B prompts: B ragged rows of ids, or an array (B, T) with -1 after a row's end."""
        ...


def one_by_one(function: Callable[[tuple[int, ...], int, int], Iterable[int]]) -> TokenSampler:
    """Turn a function of one prompt into a `TokenSampler`: called once a row, each time with a seed of its own.

    Parameters
    ----------
    function
        ``function(prompt, max_new_tokens, seed)`` returns the ids written after `prompt`: a list, an array (T,) or a
        tensor (T,). The seeds of the rows are distinct and lie in 0..2**31 - 1.

    Raises
    ------
    TypeError
        When called: for a result that is no flat sequence of integers.

    Examples
    --------
    >>> sampler = one_by_one(lambda prompt, n, seed: np.random.default_rng(seed).integers(0, 2, n))
    >>> [len(row) for row in sampler([(0,), (0,)], max_new_tokens=3, seed=1)]
    [3, 3]
    """

    def sample(prompts: Sequence[tuple[int, ...]], *, max_new_tokens: int, seed: int) -> list[list[int]]:
        seeds = row_seeds(seed, len(prompts))
        calls = zip(prompts, seeds, strict=True)
        return [_integers(function(tuple(prompt), max_new_tokens, own)) for prompt, own in calls]

    return sample


def row_seeds(seed: int, rows: int) -> list[int]:
    """Distinct seeds in 0..2**31 - 1, one a row; a row's seed does not depend on how many rows follow.

    >>> row_seeds(0, 2) == row_seeds(0, 3)[:2], row_seeds(0, 2) == row_seeds(1, 2)
    (True, False)
    """
    # 31 bits, which every random number generator and server takes; repeats are skipped, and spares stand in.
    words = np.random.SeedSequence(seed).generate_state(rows + rows // 8 + 16) >> 1
    _, first = np.unique(words, return_index=True)
    return [int(word) for word in words[np.sort(first)][:rows]]


class Generate:
    r"""Transformers' ``model.generate`` as a `TokenSampler`, with every silent default as it acts on a user.

    Nothing is set but ``do_sample=True`` (unless `options` or `generation_config` say otherwise) and what a call
    needs: ids, mask, ``max_new_tokens``. So ``top_k=50`` and whatever the checkpoint's own generation config holds stay
    in force. Give ``top_k=0`` and so on to draw from the model's own law.

    Parameters
    ----------
    model
        A transformers model, or a `TransformersModel`.
    generation_config
        As for ``generate``; `options` override it.
    batch_size
        Rows per call of ``generate``. Only rows whose prompts have equal length share one, so nothing is padded.
        Assisted generation, and options that stop rows one by one, run one row at a time.
    options
        Further arguments of ``generate``; ``assistant_model`` may be a `TransformersModel` too.

    Notes
    -----
    ``generate`` draws from torch's global generators. They are seeded for the call, on the devices of the models
    alone, and their states are put back after it. Rows are cut after the first end-of-sequence id of the generation
    config: what follows is padding.

    Raises
    ------
    TypeError
        For a model that cannot generate.
    ValueError
        For options that a call sets itself; when called: for an empty prompt, counts below 1, or a generation config
        that returns several sequences a prompt.

    Examples
    --------
    >>> from me_stats.models import TransformersModel
    >>> sampler = Generate(TransformersModel("bundled:prose"), top_k=0)
    >>> [len(row) for row in sampler([tuple(b"The name"), tuple(b"A")], max_new_tokens=3, seed=0)]
    [3, 3]
    """

    def __init__(self, model: Any, generation_config: Any = None, *, batch_size: int = 64, **options: Any) -> None:
        taken = [name for name in _OURS if name in options]
        if taken:
            raise ValueError(f"Generate sets {taken[0]} itself; leave it out of the options")
        if batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, got {batch_size}")
        self.network = _network(model, "model")
        if options.get("assistant_model") is not None:
            options["assistant_model"] = _network(options["assistant_model"], "assistant_model")
        if "do_sample" not in options and getattr(generation_config, "do_sample", None) is None:
            options["do_sample"] = True
        self.generation_config, self.options = generation_config, options
        self.batch_size = 1 if any(self._setting(name) for name in _ONE_ROW) else batch_size

    def __call__(self, prompts: Sequence[tuple[int, ...]], *, max_new_tokens: int, seed: int) -> list[list[int]]:
        """Continuations of B prompts as B ragged rows of ids; see `TokenSampler`."""
        if max_new_tokens < 1:
            raise ValueError(f"max_new_tokens must be at least 1, got {max_new_tokens}")
        if not all(map(len, prompts)):
            raise ValueError("prompts must hold at least one token each: generate has nothing to read in an empty one")
        models = [self.network, *filter(None, [self.options.get("assistant_model")])]
        ends = _ids(self._setting("eos_token_id"))
        rows: list[list[int]] = [[]] * len(prompts)
        with _seeded(seed, {parameter.device for model in models for parameter in model.parameters()}):
            for members in _batches(list(map(len, prompts)), self.batch_size):
                written = self._generate([prompts[row] for row in members], max_new_tokens)
                for row, ids in zip(members, written, strict=True):
                    end = next((place for place, token in enumerate(ids) if token in ends), len(ids))
                    rows[row] = ids[: end + 1]
        return rows

    def _generate(self, prompts: Sequence[tuple[int, ...]], max_new_tokens: int) -> list[list[int]]:
        ids = torch.tensor(prompts, device=self.network.device)
        options = {**self.options, "max_new_tokens": max_new_tokens}
        if self.generation_config is not None:
            # generate takes settings from a config or from arguments, and not from both for much longer.
            config = copy.deepcopy(self.generation_config)
            options = {**config.update(**options), "generation_config": config}
        output = self.network.generate(ids, attention_mask=torch.ones_like(ids), **options)
        sequences = getattr(output, "sequences", output)
        if len(sequences) != len(prompts):
            raise ValueError(
                f"generate returned {len(sequences)} rows for {len(prompts)} prompts; set num_return_sequences to 1"
            )
        written: list[list[int]] = sequences[:, ids.shape[1] :].tolist()
        return written

    def _setting(self, name: str) -> Any:
        """The value that generate will use: of the options, else of the config, else of the model's own."""
        if name in self.options:
            return self.options[name]
        configs = (self.generation_config, getattr(self.network, "generation_config", None))
        values = (getattr(config, name, None) for config in configs)
        return next((value for value in values if value is not None), None)

    def __repr__(self) -> str:
        shown = [type(self.network).__name__]
        shown += [] if self.generation_config is None else ["generation_config"]
        shown += [f"{name}={_short(value)}" for name, value in self.options.items()]
        return f"Generate({', '.join(shown)})"


def _network(model: Any, name: str) -> Any:
    # transformers takes seconds to import, and plain functions do not need it.
    from me_stats.models.huggingface import TransformersModel

    network = model.network if isinstance(model, TransformersModel) else model
    if not callable(getattr(network, "generate", None)):
        raise TypeError(f"{name} must be a transformers model with .generate or a TransformersModel, got {model!r:.60}")
    return network


def _batches(lengths: Sequence[int], batch_size: int) -> Iterator[list[int]]:
    """Rows of equal length, at most `batch_size` at a time."""
    for length in sorted(set(lengths)):
        members = [row for row, own in enumerate(lengths) if own == length]
        yield from (members[start : start + batch_size] for start in range(0, len(members), batch_size))


@contextmanager
def _seeded(seed: int, devices: Iterable[torch.device]) -> Iterator[None]:
    """Seed torch's global generators of the CPU and of `devices`, and put their states back after."""
    used = sorted({(device.type, device.index or 0) for device in devices if device.type != "cpu"})
    with ExitStack() as stack:
        stack.enter_context(torch.random.fork_rng(devices=[]))
        # Not torch.manual_seed, which would seed accelerators that were not forked.
        torch.default_generator.manual_seed(seed)
        for kind, index in used:
            module = torch.get_device_module(kind)
            stack.enter_context(torch.random.fork_rng(devices=[index], device_type=kind))
            if hasattr(module, "device"):
                stack.enter_context(module.device(index))
            module.manual_seed(seed)
        yield


def _integers(ids: Any) -> list[int]:
    try:
        return [operator.index(token) for token in (ids.tolist() if hasattr(ids, "tolist") else ids)]
    except TypeError as error:
        raise TypeError(f"the function must return a flat sequence of integer ids, got {ids!r:.60}") from error


def _ids(setting: Any) -> frozenset[int]:
    if setting is None:
        return frozenset()
    return frozenset([setting] if isinstance(setting, int) else map(int, setting))


def _short(value: Any) -> str:
    return repr(value) if isinstance(value, (bool, int, float, str)) else type(value).__name__
