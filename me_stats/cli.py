"""The ``me-stats`` command."""

from __future__ import annotations

import errno
import os
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Any

import typer

from me_stats import (
    __version__,
    cli_audit,
    cli_bench,
    cli_compare,
    cli_doctor,
    cli_eval,
    cli_long,
    cli_models,
    cli_reproduce,
    cli_router,
    cli_sweep,
    cli_tokenizers,
    cli_weights,
)

if TYPE_CHECKING:
    pass

app = typer.Typer(
    help="Does sampling one model per token (ME) follow the ensemble's law (CE)? Exact proofs on toys, bounds on "
    "real models.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
)
app.command()(cli_reproduce.reproduce)
app.command()(cli_reproduce.report)
app.add_typer(cli_models.app, name="models")
app.command(cli_weights.NAME)(cli_weights.fit_lambda)
app.command()(cli_sweep.sweep)
app.command()(cli_long.long)
app.command()(cli_compare.compare)
app.command()(cli_bench.bench)
app.command()(cli_tokenizers.tokenizers)
app.command()(cli_audit.audit_table)
app.command()(cli_doctor.doctor)
app.command(cli_eval.NAME)(cli_eval.evaluate)
app.command(cli_router.NAME)(cli_router.train_router)

# Options that take several values after one name.
_REPEATED = ("--models", "--only", "--text", "--domain", "--prompt", "--against", "--batch", "--weights", "--arms",
             "--items", "--tasks", "--executor-option")  # fmt: skip
OK, BAD_USAGE, INTERRUPTED = 0, 2, 130
# RuntimeErrors that say what to do; any other is a bug and keeps its traceback.
_EXPECTED = (("me_stats.models.catalog", "CatalogError"), ("me_stats.executors", "WorkerDied"))

# Usage errors of the click that typer carries within it or, in older versions, stands on.
_UsageError: Any = typer.BadParameter.__base__


def _version(value: bool) -> None:
    if value:
        typer.echo(f"me-stats {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    pass


def _spread(arguments: Sequence[str], options: Sequence[str]) -> list[str]:
    """``--models A B`` as ``--models A --models B``, which is how the parser wants repeated values.

    >>> _spread(["reproduce", "--models", "a", "b", "--quick"], ["--models"])
    ['reproduce', '--models', 'a', '--models', 'b', '--quick']
    """
    out: list[str] = []
    current: str | None = None
    for argument in arguments:
        if argument.startswith("-"):
            current = argument if argument in options else None
        elif current is not None and out[-1] != current:
            out.append(current)
        out.append(argument)
    return out


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line; bad input ends in one line and exit code 2, never in a traceback."""
    given = _spread(list(sys.argv[1:] if arguments is None else arguments), _REPEATED)
    # Loading bars of transformers would be drawn into our own; tqdm reads this when it is first imported.
    os.environ.setdefault("TQDM_DISABLE", "1")
    try:
        code = app(given, standalone_mode=False, prog_name="me-stats")
    except _UsageError as error:
        message = error.format_message()  # empty where the help has just been printed
        code = _fail(f"{message.rstrip('.')}; see '{error.ctx.command_path} --help'") if message else BAD_USAGE
    except (KeyboardInterrupt, typer.Abort):
        code = INTERRUPTED
    except OSError as error:
        code = _fail(_explain(error))
    except (ValueError, TypeError, RuntimeError) as error:
        # Loading these modules loads torch, which --help and --version can do without.
        loaded = [(sys.modules.get(module), name) for module, name in _EXPECTED]
        known = tuple(getattr(module, name) for module, name in loaded if module is not None)
        if isinstance(error, RuntimeError) and not isinstance(error, known):
            raise
        code = _fail(" ".join([str(error), *getattr(error, "__notes__", ())]))
    sys.exit(code or OK)


def _explain(error: OSError) -> str:
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return "the disk is full: free some space and run the same command again; what is finished is kept"
    where = f"{error.filename}: " if error.filename else ""
    return f"{where}{error.strerror}" if error.strerror else str(error)


def _fail(message: str) -> int:
    if os.environ.get("ME_STATS_TRACEBACK"):
        raise
    typer.echo(f"me-stats: {' '.join(message.split())}", err=True)
    return BAD_USAGE
