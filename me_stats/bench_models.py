"""Components to time: real models, copies of one, or random weights in a real shape; their rows never end early."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np

from me_stats.models import Conditioned, LanguageModel, TransformersModel
from me_stats.presets import CHAT_PROMPTS, TEXT_PROMPTS

RANDOM = "random:"  # such a name is a shape without trained weights, see `models.shapes`

# Short, so that little of a run is spent on reading them, and different, so that the components are.
SYSTEM_PROMPTS = (
    "You answer in one short plain sentence.",
    "You are a poet and answer in rhymes.",
    "You are a careful teacher of children.",
    "You reply like a laconic old sailor.",
)


@dataclass(frozen=True, eq=False)
class BenchModels:
    """K components that are ready to run, and what their costs depend on.

    Attributes
    ----------
    label
        For tables; says where the weights are random.
    names
        (K,) the model of each component.
    components
        (K,) over one vocabulary without end-of-sequence: a row writes as many tokens as it is asked for.
    networks
        (K,) the model below each component. With ``copies=False`` they are one.
    openers
        (K,) picklable functions that open the components again, for `models.parallel`.
    """

    label: str
    names: tuple[str, ...]
    components: tuple[Any, ...]
    networks: tuple[TransformersModel, ...]
    openers: tuple[Callable[[], Any], ...]

    @property
    def contexts(self) -> tuple[int, ...]:
        """(K,) tokens that each component reads before every prompt."""
        return tuple(len(getattr(component, "context", ())) for component in self.components)

    @property
    def device(self) -> Any:
        return self.networks[0].device

    def prompt(self, length: int) -> tuple[int, ...]:
        """A prompt of exactly `length` tokens: text where there is a tokenizer, fixed ids where there is none."""
        vocabulary = self.components[0].vocabulary
        if vocabulary.tokenizer is None:
            return tuple(np.random.default_rng(length).integers(vocabulary.size, size=length).tolist())
        chat = getattr(vocabulary.tokenizer, "chat_template", None) is not None
        ids = vocabulary.encode(" ".join(CHAT_PROMPTS if chat else TEXT_PROMPTS))
        return tuple(np.resize(np.array(ids), length).tolist())


def bench_components(
    models: Sequence[str], k: int, *, dtype: str = "float32", device: str = "cpu", copies: bool = True
) -> BenchModels:
    """K components: the `models` in turn, or K copies of a single one under different system prompts.

    Parameters
    ----------
    models
        Names that `TransformersModel` takes, or ``random:<shape>``.
    k
        Components.
    copies
        Every component holds weights of its own, as different models would, so that no cache serves two of them.
        False: a model that is named once or more is in memory once.

    Raises
    ------
    ValueError
        If k is not positive, no model is named, or the models' vocabularies differ.

    >>> bench = bench_components(["bundled:prose", "bundled:code"], 3)
    >>> bench.names, bench.components[0].vocabulary.eos, len(bench.prompt(40))
    (('bundled:prose', 'bundled:code', 'bundled:prose'), (), 40)
    """
    if not models or k < 1:
        raise ValueError(f"give at least one model and one component, got {len(models)} and {k}")
    names = tuple(models[i % len(models)] for i in range(k))
    openers = tuple(
        partial(open_component, name, i if len(models) == 1 else None, dtype=dtype, device=device)
        for i, name in enumerate(names)
    )
    known: dict[str, TransformersModel] = {}
    networks = []
    for name in names:
        if copies or name not in known:
            known[name] = open_network(name, dtype=dtype, device=device)
        networks.append(known[name])
    for name, network in zip(names, networks, strict=True):
        if network.vocabulary != networks[0].vocabulary:
            raise ValueError(f"{names[0]} and {name} have different vocabularies; time models over one vocabulary")
    components = tuple(under_prompt(network, i) if len(models) == 1 else network for i, network in enumerate(networks))
    return BenchModels(_label(models, k), names, components, tuple(networks), openers)


def open_component(name: str, prompt: int | None, *, dtype: str, device: str) -> LanguageModel:
    """One component, for a process of its own: the model `name`, under a system prompt unless `prompt` is None."""
    network = open_network(name, dtype=dtype, device=device)
    return network if prompt is None else under_prompt(network, prompt)


def open_network(name: str, *, dtype: str, device: str) -> TransformersModel:
    """The model, with a vocabulary in which nothing ends a row."""
    options: dict[str, Any] = {"dtype": dtype, "device": device}
    if name.startswith(RANDOM):
        from me_stats.models.shapes import random_network

        model = TransformersModel(random_network(name.removeprefix(RANDOM), **options))
        model.name = name
    else:
        model = TransformersModel(name, **options)
    model.vocabulary = dataclasses.replace(model.vocabulary, eos=())
    return model


def under_prompt(model: TransformersModel, number: int) -> LanguageModel:
    """`model` behind the system prompt of that number; alone where it has no tokenizer to read one."""
    tokenizer = model.vocabulary.tokenizer
    if tokenizer is None:
        return model
    text = SYSTEM_PROMPTS[number % len(SYSTEM_PROMPTS)]
    if getattr(tokenizer, "chat_template", None) is not None:
        head = str(tokenizer.apply_chat_template([{"role": "system", "content": text}], tokenize=False))
        # Some templates move it into the first user turn; then it stands as plain text.
        text = head if text in head else text
    return Conditioned(model, text + "\n" * (not text.endswith("\n")))


def _label(models: Sequence[str], k: int) -> str:
    kinds = " + ".join(f"{name.removeprefix(RANDOM)} (random weights)" if name.startswith(RANDOM) else name
                       for name in models)  # fmt: skip
    if len(models) > 1:
        return kinds
    return f"{kinds}, 1 to {k} copies" if k > 1 else kinds
