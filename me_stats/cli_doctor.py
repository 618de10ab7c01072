"""``me-stats doctor``: what is wrong with this machine, or with an inference server, and what mends it."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

from me_stats.cli_options import say

if TYPE_CHECKING:
    from me_stats.served import ServedModel
    from me_stats.vocabulary import Vocabulary


def doctor(
    endpoint: Annotated[
        str | None, typer.Option(metavar="URL", help="Look at this inference server instead of this machine.")
    ] = None,
    dialect: Annotated[str, typer.Option(help="What it speaks: llama.cpp, vllm, sglang or openai.")] = "llama.cpp",
    model: Annotated[str, typer.Option(help="Name of the model, where the server has several.")] = "",
    vocabulary: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="Catalog name, folder or hub id whose tokenizer the ids belong to."),
    ] = None,
    api_key_env: Annotated[
        str | None, typer.Option(metavar="VAR", help="Environment variable that holds the key of the server.")
    ] = None,
    draws: Annotated[int, typer.Option(min=30, help="Tokens drawn for each law that is tested.")] = 600,
    seed: Annotated[int, typer.Option(min=0, help="Of the requests.")] = 0,
) -> None:
    """Is this machine ready, or can this server be trusted with draws? A verdict a line, and what mends it.

    Without --endpoint: versions, extras, devices, memory, precisions, threads, models, disk.

    With it: who the server is, token ids both ways, seeds, its draws against its log-probabilities (level 1e-6), its
    prefix cache, and the sampling defaults that reach a client who does not switch them off.

    Exit code: 0 nothing failed (there may be warnings), 1 something failed, 2 bad usage or no server there.

    \b
    Examples:
      me-stats doctor
      me-stats doctor --endpoint http://localhost:8080 --vocabulary smollm2-135m
      me-stats doctor --endpoint http://localhost:8000 --dialect vllm --vocabulary Qwen/Qwen2.5-3B-Instruct
    """
    from me_stats.preflight import table

    if endpoint is None:
        from me_stats.doctor import look

        title, checks = "This machine", look()
    else:
        from me_stats.doctor_endpoint import examine

        try:
            served = _open(endpoint, dialect, model, vocabulary, _key(api_key_env))
            with served.client:
                title, checks = endpoint, examine(served, draws=draws, seed=seed)
        except ImportError as error:
            raise ValueError(str(error)) from error
    console = Console()
    shown = table(checks)
    shown.title = title
    console.print(shown)
    counts = {status: sum(check.status == status for check in checks) for status in ("ok", "warn", "fail")}
    say(console, ", ".join(f"{count} {status}" for status, count in counts.items()))
    if counts["fail"]:
        raise typer.Exit(1)


def _key(variable: str | None) -> str | None:
    if variable is None:
        return None
    key = os.environ.get(variable)
    if not key:
        raise ValueError(f"--api-key-env {variable}: no such environment variable")
    return key


def _open(url: str, dialect: str, model: str, vocabulary: str | None, key: str | None) -> ServedModel:
    from me_stats.served import DIALECTS, ServedModel
    from me_stats.vocabulary import Vocabulary

    if dialect not in DIALECTS:
        raise ValueError(f"--dialect {dialect}: one of {', '.join(DIALECTS)}")
    options: dict[str, Any] = {"dialect": dialect, "model": model, "api_key": key, "retries": 2}
    if vocabulary is not None:
        return ServedModel(url, vocabulary=_vocabulary(vocabulary), **options)
    with ServedModel(url, vocabulary=Vocabulary(1), **options).client as client:
        size = DIALECTS[dialect].identity(client).get("n_vocab")
    if size is None:
        raise ValueError("the server does not say how many ids it has: give --vocabulary, the model's name or folder")
    return ServedModel(url, vocabulary=Vocabulary(int(size)), **options)


def _vocabulary(name: str) -> Vocabulary:
    from me_stats.served.llamacpp import served_vocabulary

    try:
        return served_vocabulary(name)
    except OSError as error:
        raise ValueError(f"--vocabulary {name}: {str(error).splitlines()[0]}") from error
