"""What the commands that read text share: where documents come from, and their scores under each model."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console

from me_stats.cli_options import say

if TYPE_CHECKING:
    from me_stats.corpus import CorpusScores, Document
    from me_stats.presets import Setting


class Split(StrEnum):
    """What ends a document."""

    blank_lines = "blank-lines"
    lines = "lines"
    file = "file"


def sources_of(text: Sequence[Path], domain: Sequence[str]) -> list[tuple[str, Path]]:
    """(domain, file) of all inputs; ValueError or OSError before any model is opened."""
    sources = [(path.stem, path) for path in text]
    for entry in domain:
        name, equals, file = entry.partition("=")
        if not (name and equals and file):
            raise ValueError(f"--domain {entry}: expected NAME=FILE")
        sources.append((name, Path(file)))
    if not sources:
        raise ValueError("no text: give files with --text FILE ... or --domain NAME=FILE ...")
    for _, path in sources:
        path.open("rb").close()
    return sources


def score_sources(
    setting: Setting,
    sources: Sequence[tuple[str, Path]],
    split: Split,
    window: int | None,
    folder: Path,
    console: Console,
) -> CorpusScores:
    """Scores of all documents, kept in `folder` as they come, with a progress bar."""
    from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

    from me_stats.corpus import read_documents, score_corpus

    columns = (
        SpinnerColumn(),
        TextColumn("scoring"),
        BarColumn(bar_width=24),
        TextColumn("{task.percentage:>3.0f}%"),
        TimeElapsedColumn(),
        TextColumn("{task.fields[note]}"),
    )
    if not console.is_terminal:
        say(console, f"scoring with {', '.join(component_labels(setting))} ...")
    with Progress(*columns, console=console, disable=not console.is_terminal) as bar:
        task = bar.add_task("", total=sum(path.stat().st_size for _, path in sources), note="")

        def stream() -> Iterator[Document]:
            for name, path in sources:
                # A text file's way of ending documents has a space where an option can't.
                for document in read_documents(path, split=split.value.replace("-", " "), domain=name):  # type: ignore[arg-type]
                    yield document
                    bar.advance(task, len(str(document.content).encode()))

        def report(documents: int, tokens: int) -> None:
            bar.update(task, note=f"{documents} documents, {tokens} tokens")

        try:
            return score_corpus(setting.ensemble.components, stream(), window=window, out=folder, progress=report)
        except KeyboardInterrupt:
            bar.stop()
            say(console, f"\ninterrupted: what is scored is kept in {folder}; the same command goes on from there")
            raise


def component_labels(setting: Setting) -> list[str]:
    """One name for each component: its model, or its system prompt."""
    from me_stats.presets import SYSTEM_PROMPTS

    names = [name for name, _ in setting.models]
    return names if len(names) == len(setting.ensemble.components) else [f"“{text}”" for text in SYSTEM_PROMPTS]


def identity(name: str, model: Any) -> dict[str, Any]:
    """What a result says of a model."""
    return {
        "name": name,
        "dtype": str(model.dtype).removeprefix("torch."),
        "source": model.source,
        "vocabulary": {"size": model.vocabulary.size, "fingerprint": model.vocabulary.fingerprint},
    }
