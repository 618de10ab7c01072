"""What the parts of a run take, told in advance: forwards from their configs, seconds from the cost model, memory.

A forecast, not a promise. `runs_of` reads the sizes in a config: who writes how many rows of how many tokens. The cost
model of `me_stats.cost` counts their forwards, a `Roofline` says the least time of each, and `SLOWER` how much longer
real forwards took. Tests, enumerations, drawing and the alignment of vocabularies run on the host and are not counted;
`Forecast.left_out` says where that matters.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from me_stats.cost import Work, ce_work, me_work, predicted_seconds
from me_stats.hardware import HARDWARE, ITEM_BYTES, Hardware, ModelShape, Roofline

if TYPE_CHECKING:
    from me_stats.plans import Part

GIB = 2**30
# Times of real forwards over those of the data sheet: on an H100 2.1 to 3.2 for three models of 7 billion weights and
# 3.6 to 6.0 for Qwen2.5-3B + Math-1.5B (records of `me-stats bench`); on two CPU cores 1.8 for SmolLM2-135M.
SLOWER: Mapping[str, tuple[float, float]] = MappingProxyType({"cpu": (1.0, 4.0), "cuda": (2.0, 6.0)})
# What captured CUDA graphs held besides, as a share of the weights, in the same records: 0.59 and 0.72.
_GRAPHS = 0.75
_CACHE_LIMIT = 4 * GIB  # keys and values of one session, the default of TransformersModel
PROMPT = 64  # tokens, taken for all prompts
_COUNTED_STEPS = 64  # of longer rows: cost grows with the length
_READ_BYTES = 256 << 20  # logits of one teacher-forced forward, as in TransformersModel

Arm = Literal["CE", "ME", "one", "read"]


@dataclass(frozen=True)
class Run:
    """`rows` of `steps` tokens, `repeat` times, by CE, by ME, by one model alone, or read again by all models.

    `k` are the components that take part, None for all.
    """

    arm: Arm
    rows: int
    steps: int
    repeat: int = 1
    k: int | None = None


@dataclass(frozen=True)
class ModelSize:
    """What a model weighs: its shape for the cost model, and the number of all its parameters."""

    shape: ModelShape
    parameters: int

    @classmethod
    def of(cls, network: Any) -> ModelSize:
        """The size of a network, which may be on the meta device."""
        return cls(ModelShape.of(network), sum(parameter.numel() for parameter in network.parameters()))


@dataclass(frozen=True)
class Forecast:
    """What a part is expected to take.

    Attributes
    ----------
    name
        Of the part.
    seconds
        Least and most of its forwards; None where nothing is predicted.
    forwards, tokens
        Forwards, and tokens fed.
    memory
        Bytes on the device: weights, keys and values, laws, and captured graphs.
    host
        Bytes of host memory that loading takes.
    left_out
        What the seconds leave out.
    """

    name: str
    seconds: tuple[float, float] | None
    forwards: int
    tokens: int
    memory: int
    host: int
    left_out: str = ""


def machine_of(device: str) -> tuple[Hardware, str]:
    """The data sheet to forecast with, and what is assumed where the machine is not known."""
    if device.partition(":")[0] == "cpu":
        return HARDWARE["cpu-2"], "rates of two CPU cores"
    import torch

    name = torch.cuda.get_device_name(device) if torch.cuda.is_available() else ""
    for key in ("h200", "h100"):
        if key in name.lower():
            return HARDWARE[key], f"data sheet of {HARDWARE[key].name}"
    here = name or f"no {device} here"
    return HARDWARE["h100"], f"data sheet of {HARDWARE['h100'].name} ({here}: an assumption)"


def runs_of(part: Part, k: int) -> tuple[list[Run], str]:
    """The generations and readings of a part over `k` components, and what they leave out.

    An experiment that is not known here has none, and everything is left out.

    >>> from me_stats.plans import plan
    >>> part = next(part for part in plan(size="quick") if part.experiment == "certificate")
    >>> [(run.arm, run.rows, run.steps) for run in runs_of(part, 2)[0]]
    [('ME', 8, 32), ('read', 8, 32), ('read', 8, 32)]
    """
    if part.experiment not in _EXPERIMENTS:
        return [], "all of it"
    read, left_out = _EXPERIMENTS[part.experiment]
    return read(part.config, k), left_out


def forecast(
    part: Part, sizes: Mapping[str, ModelSize], hardware: Hardware, *, kind: str, aligned: bool = False
) -> Forecast:
    """What `part` takes on `hardware`, its models being of `sizes` by name, on a `kind` of device (``"cpu"``, ...).

    A model that `sizes` lacks leaves all of it out, `aligned` models what their alignment takes.
    """
    names: Sequence[str] = getattr(part.config, "models", ())
    own = [sizes[name] for name in names if name in sizes]
    if not own or len(own) < len(names):
        left_out = "all of it" if names else "all of it: it runs on the host"
        return Forecast(part.name, None, 0, 0, 0, 0, left_out)
    # One model stands for two components: itself under two prompts.
    components = [size.shape for size in (own if len(own) > 1 else own * 2)]
    dtype = _dtypes(part.config)[0]
    runs, left_out = runs_of(part, len(components))
    if aligned and runs and "alignment" not in left_out:
        left_out = f"alignment, {left_out}" if left_out else "alignment on the host"
    times = [Roofline(components[i % len(components)], hardware, dtype) for i in range(max(8, len(components)))]
    seconds, forwards, tokens = 0.0, 0, 0
    for run in runs:
        work, scale = _work(run, components)
        seconds += scale * predicted_seconds(work, times)
        forwards += round(scale * work.cost.forwards)
        tokens += round(scale * work.cost.tokens_forwarded)
    low, high = SLOWER["cpu" if kind == "cpu" else "cuda"]
    caches, laws = _working_memory(runs, components, dtype)
    weights = _weight_bytes(part.config, own)
    if kind != "cpu" and part.experiment == "speed":  # times more shapes than any other part
        weights = round((1 + _GRAPHS) * weights)
    host = 0 if kind == "cpu" else max(size.parameters for size in own) * ITEM_BYTES[dtype]
    return Forecast(
        part.name, (low * seconds, high * seconds) if runs else None, forwards, tokens, weights + caches + laws, host,
        left_out,
    )  # fmt: skip


def _work(run: Run, components: Sequence[ModelShape]) -> tuple[Work, float]:
    """Forwards of a run, of its first steps where it is long, and how many times as many it has."""
    k = run.k or len(components)
    if run.arm == "read":
        return _reading(run, components, k), float(run.repeat)
    steps = min(run.steps, _COUNTED_STEPS)
    scale = run.repeat * run.steps / steps
    if run.arm == "ME":
        path = np.random.default_rng(0).integers(k, size=(run.rows, steps))
        return me_work(path, prompt_length=PROMPT), scale
    return ce_work(run.rows, steps, 1 if run.arm == "one" else k, prompt_length=PROMPT), scale


def _reading(run: Run, components: Sequence[ModelShape], k: int) -> Work:
    """Teacher forcing: all rows through every component, as many at a time as their logits may take memory."""
    length = PROMPT + run.steps
    forwards = []
    for i in range(k):
        per = max(1, _READ_BYTES // (length * components[i % len(components)].vocabulary * 4))
        for start in range(0, run.rows, per):
            rows = min(per, run.rows - start)
            forwards.append((i, rows * run.steps, rows * length, rows * length))
    component, laws, fed, context = np.array(forwards, dtype=np.int64).T
    return Work(component, laws, fed, context, 0, 0)


def _dtypes(config: Any) -> list[str]:
    """Precisions of a part, the main one first."""
    several = [*getattr(config, "dtypes", ())]
    return list(dict.fromkeys([getattr(config, "dtype", several[0] if several else "float32"), *several]))


def _weight_bytes(config: Any, own: Sequence[ModelSize]) -> int:
    """Weights that are in memory together."""
    widest = max(ITEM_BYTES[dtype] for dtype in _dtypes(config))
    if hasattr(config, "dtypes"):  # models and precisions come one after the other
        return max(size.parameters for size in own) * widest
    if getattr(config, "copies", False):
        opened = [own[i % len(own)] for i in range(max(config.components))]
        curves = sum(own[0].parameters * ITEM_BYTES[dtype] for dtype in config.curve_dtypes if dtype != config.dtype)
        return sum(size.parameters for size in opened) * widest + curves
    return sum(size.parameters for size in own) * widest


def _working_memory(runs: Sequence[Run], components: Sequence[ModelShape], dtype: str) -> tuple[int, int]:
    """Bytes of keys and values, and of laws, of the largest run."""
    caches = laws = 0
    for run in runs:
        own = [components[i % len(components)] for i in range(run.k or len(components))]
        if run.arm == "read":
            # Logits, in float32, normalised, and what the last of them become.
            every = run.rows * (PROMPT + run.steps) * max(shape.vocabulary for shape in own) * 4
            laws = max(laws, 4 * min(every, _READ_BYTES))
            continue
        tokens = run.rows * (PROMPT + run.steps)
        one = [min(_CACHE_LIMIT, tokens * shape.cache_width * ITEM_BYTES[dtype]) for shape in own]
        caches = max(caches, sum(one))
        # Logits, a law of each component in float32, and the mixture with its cumulated sum in float64.
        laws = max(laws, run.rows * max(shape.vocabulary for shape in own) * (4 * len(own) + 24))
    return caches, laws


def _per_step(config: Any, k: int) -> list[Run]:
    # Three samplers draw in calls of 250,000 rows, which share one law.
    return [Run("CE", 1, 1, 3 * config.prompts * math.ceil(config.draws / 250_000))]


def _certificate(config: Any, k: int) -> list[Run]:
    return [Run("ME", config.rows, config.steps), *[Run("read", config.rows, config.steps)] * 2]


def _sequences(config: Any, k: int) -> list[Run]:
    arms: tuple[Arm, ...] = ("ME", "CE", "one", "read", "read", "read")
    whole = [Run(arm, config.rows, config.steps) for arm in arms]
    return [*whole, Run("ME", config.coupled_rows, config.steps, 2), Run("CE", config.coupled_rows, config.steps)]


def _cache_floor(config: Any, k: int) -> list[Run]:
    each = len(config.models) * len(config.dtypes)
    lazy = [Run("one", config.rows, max(1, config.steps // lag), each) for lag in (1, *config.lags)]
    return [*lazy, Run("read", config.rows, config.steps, each, k=1), Run("one", 1, config.steps, each)]


def _transform_order(config: Any, k: int) -> list[Run]:
    rows, steps = max(config.rows, config.sequence_rows), max(config.steps, config.sequence_steps)
    floors = Run("read", min(config.rows, 8), config.steps, 4)
    return [Run("ME", rows, steps), floors, Run("read", config.rows, config.steps), Run("read", rows, steps, 2)]


def _repairs(config: Any, k: int) -> list[Run]:
    timed_runs = config.repeats * (len(config.chunks) + 2)
    timed = [Run("CE", batch, config.timed_steps, timed_runs) for batch in config.batches]
    return [Run("CE", config.rows, config.steps, 8), Run("ME", config.rows, config.steps, 8), *timed]


def _generation(config: Any, k: int) -> list[Run]:
    arms: tuple[Arm, ...] = ("ME", "CE")
    return [Run(arm, batch, config.steps, config.repeats) for batch in config.batches for arm in arms]


def _speed(config: Any, k: int) -> list[Run]:
    from me_stats.scripts import load

    cells, _ = load("experiments", "speed").plan(config)
    runs = []
    for cell in cells:
        arm: Arm = "one" if cell.arm == "single" else "ME" if cell.arm.startswith("ME") else "CE"
        runs.append(Run(arm, cell.batch, cell.steps, config.rounds + 2, k=cell.k))
    # Single forwards behind each of two contexts, beside every round.
    spans = Run("one", 1, 2, 2 * config.rounds * len(config.spans) * len(config.models))
    return [*runs, spans]


def _mixed_vocabularies(config: Any, k: int) -> list[Run]:
    rows = 3 * config.rows
    runs = [Run("ME", rows, config.steps), Run("CE", rows, config.steps), Run("read", rows, config.steps, 3)]
    if config.tested:
        arms: tuple[Arm, ...] = ("ME", "CE", "one", "read", "read", "read")
        runs += [Run(arm, 3 * config.tested, config.tested_steps) for arm in arms]
    return runs


def _weights(config: Any, k: int) -> list[Run]:
    # Two domains; a token of English or code is about three bytes.
    documents = math.ceil(2 * config.text_bytes / config.document_bytes)
    return [Run("read", documents, max(1, config.document_bytes // 3))]


def _long(config: Any, k: int) -> list[Run]:
    def batches(rows: int) -> int:
        return math.ceil(rows / config.batch)

    rows, steps = min(config.batch, config.rows), config.steps
    me = Run("ME", rows, steps, batches(config.rows) + batches(config.paired))
    runs = [me, Run("CE", rows, steps, batches(config.rows))]
    if config.control:
        runs.append(Run("one", min(rows, config.control), steps, batches(config.control)))
    if config.scored:
        runs.append(Run("read", config.scored, steps, 2))
    return runs


def _accuracy(config: Any, k: int) -> list[Run]:
    # Tasks in the task, and tokens of an answer.
    kinds = {"gsm8k": (1, 256), "bbh": (27, 256), "arc_challenge": (1, 1), "mmlu": (57, 1)}
    runs = []
    for name in config.tasks:
        group, _, one = name.partition(":")
        tasks, steps = kinds.get(group, (1, 64))
        repeat = (1 if one else tasks) * config.runs * math.ceil(config.limit / config.batch_size)
        steps = min(steps, config.max_new_tokens or steps)
        runs += [Run("ME", config.batch_size, steps, repeat), Run("CE", config.batch_size, steps, 2 * repeat)]
    return runs


def _tokenizer_audit(config: Any, k: int) -> list[Run]:
    audited = Run("read", max(1, config.text_bytes // 1500), 500)
    return [audited, Run("one", 3 * config.rows, config.steps)] if config.rows else [audited]


_EXPERIMENTS: Mapping[str, tuple[Callable[[Any, int], list[Run]], str]] = MappingProxyType(
    {
        "per_step": (_per_step, "drawing on the host"),
        "certificate": (_certificate, "draws on the host"),
        "sequences": (_sequences, "enumeration, tests on the host"),
        "cache_floor": (_cache_floor, ""),
        "transform_order": (_transform_order, "prices on the host"),
        "repairs": (_repairs, "enumeration, tests on the host"),
        "generation": (_generation, ""),
        "speed": (_speed, "capturing CUDA graphs"),
        "mixed_vocabularies": (_mixed_vocabularies, "alignment, tests on the host"),
        "tokenizer_audit": (_tokenizer_audit, "tokenizers on the host"),
        "weights": (_weights, "fits on the host"),
        "long": (_long, "statistics on the host"),
        "accuracy": (_accuracy, "long prompts, answers that end early"),
    }
)
