"""Scores in a folder: resumed runs to the bit, nothing half-written read, nothing of another call mixed in."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from me_stats.corpus import CorpusScores, Document, score_corpus
from me_stats.models import TableModel

MODELS = [TableModel.random(3, order=2, seed=i) for i in range(2)]
RNG = np.random.default_rng(0)
DOCUMENTS = [Document("ab"[i % 2], RNG.integers(0, 3, 9).tolist()) for i in range(40)]
FILES = ("log_probs", "tokens", "bytes", "documents")


def run(out: Path | None, documents: Any = DOCUMENTS, models: Any = MODELS, **options: Any) -> CorpusScores:
    return score_corpus(models, documents, out=out, batch_tokens=16, **options)


def interrupted(out: Path, after: int) -> None:
    calls = []

    def stop(documents: int, tokens: int) -> None:
        calls.append((documents, tokens))
        if len(calls) == after:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(out, progress=stop)


def same(left: CorpusScores, right: CorpusScores) -> bool:
    arrays = ("log_probs", "tokens", "bytes", "lengths", "prompts", "document")
    pairs = [(np.asarray(getattr(left, name)), np.asarray(getattr(right, name))) for name in arrays]
    return left.domains == right.domains and all(a.dtype == b.dtype and np.array_equal(a, b) for a, b in pairs)


def test_a_folder_holds_what_memory_would(tmp_path: Path) -> None:
    memory, disk = run(None), run(tmp_path / "scores")
    assert isinstance(disk.log_probs, np.memmap)
    assert same(memory, disk)
    assert same(memory, CorpusScores.load(tmp_path / "scores"))
    for name in FILES:  # ordinary .npy files, for any reader
        assert len(np.load(tmp_path / "scores" / f"{name}.npy")) in (memory.n, memory.n_documents)


@pytest.mark.parametrize("after", [1, 2, 4])
@pytest.mark.parametrize("torn", [False, True])
def test_a_killed_run_goes_on_to_the_same_bits(tmp_path: Path, after: int, torn: bool) -> None:
    whole = run(tmp_path / "whole")
    interrupted(tmp_path / "cut", after)
    with pytest.raises(ValueError, match=r"unfinished scores of \d+ documents; run score_corpus with the same"):
        CorpusScores.load(tmp_path / "cut")
    if torn:  # killed in the middle of a batch
        for name in FILES[: after % 3 + 1]:
            with (tmp_path / "cut" / f"{name}.npy").open("ab") as file:
                file.write(b"half-written rows")
    scored: list[int] = []
    again = run(tmp_path / "cut", progress=lambda documents, tokens: scored.append(documents))
    assert same(whole, again)
    for name in FILES:
        left, right = (tmp_path / folder / f"{name}.npy" for folder in ("whole", "cut"))
        assert left.read_bytes() == right.read_bytes()
    assert len(scored) == 6 - after + 1  # of the batches done before, only the first was scored again


def test_finished_scores_are_not_made_again(tmp_path: Path) -> None:
    first = run(tmp_path)
    stamp = (tmp_path / "log_probs.npy").read_bytes()
    calls: list[int] = []
    assert same(first, run(tmp_path, progress=lambda documents, tokens: calls.append(documents)))
    assert len(calls) == 1
    assert (tmp_path / "log_probs.npy").read_bytes() == stamp


@pytest.mark.parametrize("finished", [False, True])
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"documents": DOCUMENTS[::-1]}, "other documents"),
        ({"documents": [Document("c", d.content) for d in DOCUMENTS]}, "other documents"),
        ({"documents": DOCUMENTS[:3]}, "documents"),
        ({"models": MODELS[::-1]}, "other models"),
        ({"models": [MODELS[0], TableModel.random(3, order=2, seed=9)]}, "other models"),
        ({"models": MODELS[:1]}, "another components"),
        ({"window": 5}, "another window, stride"),
        ({"prompt": [1]}, "another prompt, context_only"),
    ],
)
def test_scores_of_another_call_are_not_mixed_in(
    tmp_path: Path, change: dict[str, Any], message: str, finished: bool
) -> None:
    if finished:
        run(tmp_path)
    else:
        interrupted(tmp_path, 2)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    with pytest.raises(ValueError, match=message):
        run(tmp_path, **change)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_more_documents_than_finished_ones_are_refused(tmp_path: Path) -> None:
    run(tmp_path, documents=DOCUMENTS[:14])
    with pytest.raises(ValueError, match="documents"):
        run(tmp_path)


def test_save_and_load(tmp_path: Path) -> None:
    scores = run(None)
    scores.save(tmp_path / "copy")
    assert same(scores, CorpusScores.load(tmp_path / "copy"))
    assert CorpusScores.load(str(tmp_path / "copy")).settings == scores.settings
    with pytest.raises(ValueError, match="holds scores already"):
        scores.save(tmp_path / "copy")


def test_load_refuses_what_is_no_folder_of_scores(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="holds no scores"):
        CorpusScores.load(tmp_path)
    for content in ("not json", "{}", json.dumps({"schema": 99})):
        (tmp_path / "index.json").write_text(content, encoding="utf-8")
        with pytest.raises(ValueError, match="is not an index of scores"):
            CorpusScores.load(tmp_path)


@pytest.mark.parametrize("where", ["memory", "disk"])
def test_parts_of_scores(tmp_path: Path, where: str) -> None:
    scores = run(tmp_path if where == "disk" else None)
    part = scores.subset([3, 1])
    assert part.domains == ("b", "b")
    assert part.lengths.tolist() == [8, 8]
    np.testing.assert_array_equal(part.log_probs[:8], scores.log_probs[scores.document == 3])
    np.testing.assert_array_equal(part.log_probs[8:], scores.log_probs[scores.document == 1])
    assert next(part.sequences())[0] == tuple(scores.prompts[3])
    mask = np.array([domain == "a" for domain in scores.domains])
    assert set(scores.subset(mask).domains) == {"a"}
    assert scores.subset([]).n == 0
    np.testing.assert_array_equal(np.concatenate(list(scores.chunks(7))), scores.log_probs)
    assert all(chunk.dtype == np.float64 for chunk in scores.chunks())
    for bad in ([40], [-1], [0.5]):
        with pytest.raises(ValueError, match="documents"):
            scores.subset(bad)  # type: ignore[arg-type]
