"""The time of a forward from a data sheet: what a network weighs, what a machine moves and multiplies.

A `Roofline` is a bound, not a measurement: kernels reach a part of a machine's rates, and code that launches them one
by one waits for the host. Both are arguments (`Hardware.memory_efficiency`, `launch_per_layer`, ...), and what follows
from them is a forecast.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from me_stats.forward_time import Measured

Floats = NDArray[np.float64]

ITEM_BYTES: Mapping[str, int] = MappingProxyType({"float32": 4, "bfloat16": 2, "float16": 2})


@dataclass(frozen=True)
class ModelShape:
    """What a decoder weighs, in numbers of values.

    Attributes
    ----------
    layers
        L.
    body
        Weights that multiply every token fed: all but the embeddings and the output layer. Experts that a token does
        not pass are counted too.
    head
        Weights of the output layer, which multiply once for each law. Tied weights are counted here: as embeddings
        they are looked up, not multiplied.
    cache_width
        Keys and values stored for a token, over all layers.
    query_width
        Heads times their width, in one layer.
    vocabulary
        Rows of the output layer.
    dtype
        Of the weights and of the cache.
    """

    layers: int
    body: int
    head: int
    cache_width: int
    query_width: int
    vocabulary: int
    dtype: str = "float32"

    @classmethod
    def of(cls, source: Any) -> ModelShape:
        """The shape of a loaded network, of its Hugging Face config, or of a dict with its ``model_type``.

        A config is counted on a network without storage, so it takes no memory. Raises ValueError for a network
        without an output layer of its own.
        """
        network = source if hasattr(source, "get_output_embeddings") else _without_storage(source)
        output, inputs = network.get_output_embeddings(), network.get_input_embeddings()
        if output is None or inputs is None:
            raise ValueError(f"{type(network).__name__} has no output layer; give a causal language model")
        own = {id(p): p.numel() for p in network.parameters()}  # tied weights once
        head = {id(p): p.numel() for p in output.parameters()}
        looked_up = {id(p) for p in inputs.parameters()} - set(head)
        config = network.config.get_text_config()
        heads = config.num_attention_heads
        width = getattr(config, "head_dim", None) or config.hidden_size // heads
        key_heads = getattr(config, "num_key_value_heads", None) or heads
        return cls(
            layers=config.num_hidden_layers,
            body=sum(n for key, n in own.items() if key not in head and key not in looked_up),
            head=sum(head.values()),
            cache_width=2 * config.num_hidden_layers * key_heads * width,
            query_width=heads * width,
            vocabulary=output.weight.shape[0],
            dtype=str(network.dtype).removeprefix("torch."),
        )

    @property
    def head_share(self) -> float:
        """Share of the output layer in all weights that a forward of one token reads."""
        return self.head / (self.body + self.head)


def _without_storage(source: Any) -> Any:
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    config = source
    if isinstance(source, Mapping):
        if "model_type" not in source:
            raise ValueError("config must name its model_type, as a config.json does")
        config = AutoConfig.for_model(**source)
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config)


@dataclass(frozen=True)
class Hardware:
    """What a machine can do at best, and what part of it code is taken to reach.

    Attributes
    ----------
    name
        For tables.
    bandwidth
        Bytes a second from main memory.
    peak
        Floating-point operations a second by dtype, dense; a multiplication and an addition are two.
    memory_efficiency, compute_efficiency
        Parts of the two that are reached; 1 gives a bound.
    launch_per_layer, launch_per_forward
        Seconds in which the machine waits for the host, for each layer and for each forward.
    """

    name: str
    bandwidth: float
    peak: Mapping[str, float] = field(hash=False)
    memory_efficiency: float = 1.0
    compute_efficiency: float = 1.0
    launch_per_layer: float = 0.0
    launch_per_forward: float = 0.0

    def __post_init__(self) -> None:
        if self.bandwidth <= 0 or any(value <= 0 for value in self.peak.values()):
            raise ValueError(f"bandwidth and peak of {self.name} must be positive")
        for name in ("memory_efficiency", "compute_efficiency"):
            if not 0 < getattr(self, name) <= 1:
                raise ValueError(f"{name} must lie in (0, 1], got {getattr(self, name)}")
        if min(self.launch_per_layer, self.launch_per_forward) < 0:
            raise ValueError("launch_per_layer and launch_per_forward must be at least 0")


HARDWARE: Mapping[str, Hardware] = MappingProxyType(
    {
        "cpu-2": Hardware("2 CPU cores", 15e9, MappingProxyType({"float32": 0.13e12, "bfloat16": 0.37e12})),
        "h100": Hardware(
            "H100 SXM",
            3.35e12,
            MappingProxyType({"float32": 67e12, "bfloat16": 989e12, "float16": 989e12}),
        ),
        "h200": Hardware(
            "H200 SXM",
            4.8e12,
            MappingProxyType({"float32": 67e12, "bfloat16": 989e12, "float16": 989e12}),
        ),
    }
)
"""Machines by name.

H100 SXM and H200 SXM: NVIDIA's data sheets of the two, memory bandwidth 3.35 and 4.8 TB/s; 67 TFLOP/s in float32, and
1,979 in bfloat16 and float16 with sparsity, half of that without. ``cpu-2``: what the bare weight
products of SmolLM2-135M reach on two cores of a server with matrix units for bfloat16, on 1 token and on 64; another
machine differs, so calibrate there (`forward_time.calibrate`).
"""


@dataclass(frozen=True)
class Roofline:
    r"""Least time of a forward, :math:`\mathrm{launch} + \sum_p \max(\mathrm{bytes}_p/\mathrm{bandwidth},
    \mathrm{flops}_p/\mathrm{peak})`, over the parts p that follow each other.

    The parts: the body, :math:`2 \cdot \mathrm{body} \cdot \mathrm{fed}` operations on weights read once; attention,
    which reads the keys and values of every row and multiplies them with its queries; the output layer,
    :math:`2 \cdot \mathrm{head} \cdot \mathrm{rows}`; and laws, which are written as logits, widened to float32 and
    normalised. Sliding windows are not counted. `dtype` is that of weights and cache, by default the shape's.

    Raises ValueError for a dtype whose peak the hardware does not name.

    >>> shape = ModelShape(layers=1, body=10**9, head=10**8, cache_width=2, query_width=1, vocabulary=10**4)
    >>> slow = Hardware("toy", bandwidth=1e9, peak={"float32": 1e12})
    >>> Roofline(shape, slow).seconds([1, 1], [1, 1000], [0, 0]).round(3).tolist()  # 4.4 GB, and 2,000 GFLOP of 4 s
    [4.4, 4.4]
    """

    shape: ModelShape
    hardware: Hardware
    dtype: str | None = None

    def __post_init__(self) -> None:
        name = self._dtype
        if name not in ITEM_BYTES or name not in self.hardware.peak:
            known = ", ".join(name for name in ITEM_BYTES if name in self.hardware.peak)
            raise ValueError(f"dtype must be one that {self.hardware.name} has a peak for ({known}), got {name!r}")

    @property
    def _dtype(self) -> str:
        return self.dtype or self.shape.dtype

    def seconds(self, rows: ArrayLike, fed: ArrayLike, context: ArrayLike) -> Floats:
        """Seconds (F,) of forwards that read `rows` laws, are fed `fed` tokens and look at `context` keys."""
        laws, tokens, keys = (np.asarray(values, dtype=np.float64) for values in (rows, fed, context))
        shape, item = self.shape, ITEM_BYTES[self._dtype]
        body = self._time(shape.body * item, 2 * shape.body * tokens)
        # Tokens are spread evenly over the rows: a product for each query and key, twice, in each layer.
        pairs = tokens * keys / np.maximum(laws, 1)
        attention = self._time(shape.cache_width * item * keys, 4 * shape.layers * shape.query_width * pairs)
        head = self._time(shape.head * item, 2 * shape.head * laws)
        # Logits are written and read; float32 is written, and read and written by the log-softmax.
        normalised = self._time((2 * item + 12) * shape.vocabulary * laws, 0.0 * laws)
        launch = self.hardware.launch_per_forward + shape.layers * self.hardware.launch_per_layer
        return np.asarray(launch + body + attention + head + normalised)

    def _time(self, moved: float | Floats, operations: Floats) -> Floats:
        hardware = self.hardware
        reached = hardware.peak[self._dtype] * hardware.compute_efficiency
        return np.maximum(moved / (hardware.bandwidth * hardware.memory_efficiency), operations / reached)


@dataclass(frozen=True)
class Rates:
    """What a machine reaches on one network: bytes a second at one token, operations a second on further tokens."""

    bandwidth: float
    operations: float


def reached(time: Measured, shape: ModelShape) -> Rates:
    """Rates that a calibrated `time` of a network of `shape` amounts to, its fixed overheads and all.

    The bandwidth is all weights over the time of one token; the operations are those of the body between the last two
    numbers of tokens that were measured, infinite where these took the same time.

    >>> shape = ModelShape(layers=1, body=900, head=100, cache_width=2, query_width=1, vocabulary=10)
    >>> reached(Measured((1, 2, 4), (2.0, 2.0, 3.0), (1, 2), (0.0, 0.0), 0.0, 0.0), shape)
    Rates(bandwidth=2000.0, operations=3600.0)
    """
    slope = (time.fed_seconds[-1] - time.fed_seconds[-2]) / (time.fed[-1] - time.fed[-2])
    bandwidth = (shape.body + shape.head) * ITEM_BYTES[shape.dtype] / time.fed_seconds[0]
    return Rates(bandwidth, 2 * shape.body / slope if slope > 0 else math.inf)


@dataclass(frozen=True)
class Limits:
    """How many times faster than CE ME can be, where one thing alone takes time.

    Attributes
    ----------
    passes
        One row, and passes over the weights are all there is: :math:`\\sum_i W_i / \\sum_i λ_i W_i`, K for equal
        weights or equal sizes. CE makes K passes a token, ME one.
    arithmetic
        Many rows, and multiplications are all there is: every component still ingests every token, so only the output
        layers of components that are not drawn are saved: :math:`\\sum_i (B_i + H_i) / \\sum_i (B_i + λ_i H_i)`.
    keys
        Many long rows, and reading their keys and values is all there is: CE reads those of all components for a token,
        ME those of one, since a span of tokens reads them once: :math:`\\sum_i C_i / \\sum_i λ_i C_i`.
    """

    passes: float
    arithmetic: float
    keys: float


def limits(shapes: Sequence[ModelShape], weights: ArrayLike) -> Limits:
    """The limits of an ensemble of `shapes` with mixing `weights` (K,).

    >>> shape = ModelShape(layers=1, body=9, head=1, cache_width=2, query_width=1, vocabulary=10)
    >>> found = limits([shape, shape], [0.5, 0.5])
    >>> found.passes, round(found.arithmetic, 3), found.keys
    (2.0, 1.053, 2.0)
    """
    law = np.asarray(weights, dtype=np.float64)
    if law.shape != (len(shapes),) or (law < 0).any() or abs(law.sum() - 1) > 1e-6:
        raise ValueError(f"weights must be {len(shapes)} numbers of at least 0 that sum to 1, one for each of shapes")
    body = np.array([shape.body for shape in shapes], dtype=np.float64)
    head = np.array([shape.head for shape in shapes], dtype=np.float64)
    cache = np.array([shape.cache_width for shape in shapes], dtype=np.float64)
    both = body + head
    return Limits(
        float(both.sum() / (law @ both)),
        float(both.sum() / (body.sum() + law @ head)),
        float(cache.sum() / (law @ cache)),
    )
