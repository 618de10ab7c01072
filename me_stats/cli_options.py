"""What the commands share: options, and checks of them that come before any work."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich import box
from rich.console import Console
from rich.table import Table

if TYPE_CHECKING:
    from me_stats.presets import Setting


class Dtype(StrEnum):
    """Precisions that ``--dtype`` takes."""

    float32 = "float32"
    bfloat16 = "bfloat16"
    float16 = "float16"


Models = Annotated[
    list[str],
    typer.Option(
        "--models",
        metavar="A B ...",
        help="Catalog names, folders or hub ids over one vocabulary; a single model runs under two system prompts.",
    ),
]
Window = Annotated[
    int | None, typer.Option(min=2, help="Tokens of context that a model sees; default: all it can, at most 4096.")
]
Device = Annotated[str, typer.Option(help="cpu, cuda, cuda:1, ...")]
Precision = Annotated[Dtype, typer.Option(help="Precision of the models' weights.")]


def say(console: Console, line: str) -> None:
    """A line for people, in which a bracket is a bracket and which is broken nowhere."""
    console.print(line, highlight=False, markup=False, soft_wrap=True)


def check_out(out: Path, folder: str = "records") -> None:
    """OSError before any work if the results could not be written to `folder` in `out`; ``""`` is `out` itself."""
    path = out / folder
    try:
        path.mkdir(parents=True, exist_ok=True)
        probe = path / ".writable"
        probe.write_bytes(b"")
        probe.unlink()
    except OSError as error:
        raise OSError(error.errno, f"cannot write to {out}: {error.strerror}; choose another --out") from error


def check_device(device: str) -> None:
    """ValueError with the reason if there is no such device."""
    from me_stats.devices import device_fault

    if fault := device_fault(device):
        raise ValueError(f"--device {device}: {fault}")


def open_models(
    models: Sequence[str],
    *,
    weights: Sequence[float] | None = None,
    device: str,
    dtype: Dtype,
    say: Callable[[str], None],
) -> Setting:
    """The ensemble of ``--models``; catalog names that are not on this machine are pulled first, which `say` tells."""
    from me_stats.presets import open_setting

    prepare_models(models, device=device, say=say)
    return open_setting(models, weights=weights, dtype=dtype.value, device=device)


def prepare_models(models: Sequence[str], *, device: str, say: Callable[[str], None]) -> None:
    """Check device and names, pull what is missing, and choose the number of threads; opens nothing."""
    import torch

    from me_stats.models import catalog

    check_device(device)
    for name in dict.fromkeys(model.removesuffix(":gguf") for model in models):
        if name in catalog.CATALOG and not catalog.pulled(name):
            catalog.pull(name, progress=say)
        catalog.resolve(name)
    if torch.device(device).type == "cpu" and all(name.startswith("bundled:") for name in models):
        torch.set_num_threads(1)  # several threads gain nothing on tiny models


def parsed_weights(text: str, option: str) -> tuple[float, ...] | None:
    """Mixing weights from ``λ,λ,...``, None for an empty text; ValueError names the option."""
    if not text:
        return None
    from me_stats.mixing import ConstantMixing

    try:
        return tuple(ConstantMixing([float(part) for part in text.split(",")]).weights.tolist())
    except ValueError as error:
        raise ValueError(f"{option} {text}: {error}") from error


def numbers_table(*columns: str) -> Table:
    """An empty table with names in its first column and numbers in the others."""
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False)
    for number, name in enumerate(columns):
        table.add_column(name, justify="right" if number else "left", no_wrap=True)
    return table
