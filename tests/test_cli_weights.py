"""``me-stats fit-lambda`` on the bundled siblings: results, files, resuming, and mistakes in one line."""

from __future__ import annotations

import json
import pydoc_data.topics
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from me_stats import cli, cli_weights
from me_stats.corpus import CorpusScores
from me_stats.report.style import read_data
from tests.commands import Run

MODELS = ("--models", "bundled:prose", "--models", "bundled:code")


@pytest.fixture
def texts(tmp_path: Path) -> dict[str, Path]:
    prose = "\n\n".join(list(pydoc_data.topics.topics.values())[:3])[:2500]
    code = Path(cli_weights.__file__).read_text(encoding="utf-8")[-2500:]
    paths = {"prose": tmp_path / "prose.txt", "code": tmp_path / "code.txt"}
    paths["prose"].write_text(prose, encoding="utf-8")
    paths["code"].write_text(code, encoding="utf-8")
    return paths


def results(folder: Path) -> dict[str, Any]:
    loaded: dict[str, Any] = json.loads((folder / "fit-lambda.json").read_text(encoding="utf-8"))
    return loaded


def test_the_whole_command(run: Run, texts: dict[str, Path], tmp_path: Path) -> None:
    done = run(
        "fit-lambda", *MODELS, "--text", texts["prose"], "--domain", f"python={texts['code']}", "--out", "out",
        "--weights-out", "lambda.json", "--folds", "3",
    )  # fmt: skip
    assert done.code == 0
    for words in ("bundled:prose", "python", "all text", "equal weights", "bundled:code alone", "bits/byte"):
        assert words in done.out
    found = results(tmp_path / "out")
    fits = found["domains"]["fits"]
    assert list(fits) == ["prose", "python"]
    assert fits["prose"]["weights"][0] > 0.9
    assert fits["python"]["weights"][1] > 0.6
    assert fits["prose"]["intervals"][0][0] > fits["python"]["intervals"][0][1]
    assert found["models"][0]["source"]["sha256"]
    assert len(found["cross_validation"]["fold_nll"]) == 3
    assert str(tmp_path) not in json.dumps(found)
    weights = json.loads((tmp_path / "lambda.json").read_text(encoding="utf-8"))
    assert weights["components"] == ["bundled:prose", "bundled:code"]
    assert weights["weights"] == found["domains"]["pooled"]["weights"]
    assert "Mixing weights" in read_data(tmp_path / "out" / "fit-lambda.png")["caption"]
    assert (tmp_path / "out" / "fit-lambda.pdf").is_file()
    scores = CorpusScores.load(tmp_path / "out" / "scores")
    assert scores.n == found["domains"]["pooled"]["n"] <= sum(path.stat().st_size for path in texts.values())


def test_ctrl_c_keeps_what_is_done_and_the_same_command_goes_on(
    run: Run, texts: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from me_stats import corpus

    real = corpus.score_corpus

    def small_batches(*arguments: Any, progress: Any, **options: Any) -> CorpusScores:
        def stop(documents: int, tokens: int) -> None:
            progress(documents, tokens)
            if tokens > 2000 and not finished:
                raise KeyboardInterrupt

        return real(*arguments, progress=stop, batch_tokens=300, **options)

    finished: list[bool] = []
    monkeypatch.setattr(corpus, "score_corpus", small_batches)
    files = ("--text", texts["prose"], "--text", texts["code"])
    command = ("fit-lambda", *MODELS, *files, "--out", "cut", "--split", "lines")
    stopped = run(*command)
    assert stopped.code == cli.INTERRUPTED
    assert "what is scored is kept in cut/scores; the same command goes on from there" in stopped.err
    assert not (tmp_path / "cut" / "fit-lambda.json").exists()
    finished.append(True)
    assert run(*command).code == 0
    monkeypatch.undo()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(corpus, "score_corpus", lambda *a, **o: real(*a, **{**o, "batch_tokens": 300}))
    whole = [*command]
    whole[whole.index("cut")] = "whole"
    assert run(*whole).code == 0
    arrays = [(tmp_path / name / "scores" / "log_probs.npy").read_bytes() for name in ("cut", "whole")]
    assert arrays[0] == arrays[1]
    first, second = results(tmp_path / "cut"), results(tmp_path / "whole")
    assert first["domains"] == second["domains"]
    assert first["cross_validation"] == second["cross_validation"]


def test_one_model_runs_under_two_system_prompts(run: Run, texts: dict[str, Path], tmp_path: Path) -> None:
    texts["prose"].write_text("The rose is red.\n\nThe sky is blue.\n", encoding="utf-8")
    done = run("fit-lambda", "--models", "bundled:prose", "--text", texts["prose"], "--out", "out")
    assert done.code == 0
    assert "no cross-validation: 2 documents are fewer than --folds 5" in done.err
    found = results(tmp_path / "out")
    assert found["cross_validation"] is None
    assert found["components"][1].startswith("“You are a poet.")
    assert np.isclose(sum(found["domains"]["pooled"]["weights"]), 1)
    if not found["domains"]["pooled"]["identified"]:
        assert "λ is not identified" in done.err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((*MODELS,), "no text: give files with --text FILE"),
        ((*MODELS, "--text", "absent.txt"), "absent.txt: No such file"),
        ((*MODELS, "--domain", "prose.txt"), "--domain prose.txt: expected NAME=FILE"),
        ((*MODELS, "--domain", "=prose.txt"), "expected NAME=FILE"),
        (("--text", "prose.txt"), "--models"),
        (("--models", "smolm2-135m", "--text", "prose.txt"), "did you mean 'smollm2-135m'"),
        ((*MODELS, "--text", "prose.txt", "--out", "code.txt"), "code.txt: File exists"),
        ((*MODELS, "--text", "prose.txt", "--device", "abacus"), "--device abacus"),
        ((*MODELS, "--text", "prose.txt", "--folds", "1"), "--folds"),
        ((*MODELS, "--text", "prose.txt", "--window", "9000"), "window is 9000 tokens, but a component sees only 8192"),
        ((*MODELS, "--text", "latin.txt"), "latin.txt is not UTF-8"),
        ((*MODELS, "--text", "blank.txt"), "documents is empty"),
    ],
)
def test_mistakes_are_one_line(
    run: Run, texts: dict[str, Path], tmp_path: Path, arguments: tuple[str, ...], message: str
) -> None:
    (tmp_path / "latin.txt").write_bytes("café".encode("latin-1"))
    (tmp_path / "blank.txt").write_text("\n \n", encoding="utf-8")
    result = run("fit-lambda", *arguments)
    assert result.code == 2
    (line,) = [line for line in result.err.splitlines() if line.startswith("me-stats: ")]
    assert message in line
    assert not list(tmp_path.rglob("fit-lambda.json"))


def test_scores_of_another_text_are_not_overwritten(run: Run, texts: dict[str, Path]) -> None:
    assert run("fit-lambda", *MODELS, "--text", texts["prose"], "--out", "out").code == 0
    result = run("fit-lambda", *MODELS, "--text", texts["code"], "--out", "out")
    assert result.code == 2
    assert "out/scores holds" in result.err
    assert "choose another folder" in result.err


def test_help_teaches_with_an_example(run: Run) -> None:
    result = run("fit-lambda", "--help")
    assert result.code == 0
    assert "me-stats fit-lambda --models bundled:prose bundled:code --text notes.txt" in " ".join(result.out.split())
