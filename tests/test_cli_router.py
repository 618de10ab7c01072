"""``me-stats train-router`` on the bundled siblings: results, files that load again, and mistakes in one line."""

from __future__ import annotations

import json
import pydoc_data.topics
from pathlib import Path
from typing import Any

import pytest

from me_stats import cli, cli_router, cli_weights, corpus, routers
from me_stats.corpus import CorpusScores
from me_stats.presets import SIBLINGS, open_setting
from me_stats.report.style import read_data
from tests.commands import Run

MODELS = ("--models", "bundled:prose", "--models", "bundled:code")


@pytest.fixture
def texts(tmp_path: Path) -> tuple[str, ...]:
    prose = "\n\n".join(list(pydoc_data.topics.topics.values())[:4])[:6000]
    code = Path(cli_weights.__file__).read_text(encoding="utf-8")[-6000:]
    (tmp_path / "prose.txt").write_text(prose, encoding="utf-8")
    (tmp_path / "code.txt").write_text(code, encoding="utf-8")
    return ("--text", "prose.txt", "--text", "code.txt")


def training(folder: Path) -> dict[str, Any]:
    loaded: dict[str, Any] = json.loads((folder / "training.json").read_text(encoding="utf-8"))
    return loaded


@pytest.mark.parametrize("kind", ["ngram", "recurrent", "hidden"])
def test_the_whole_command(run: Run, texts: tuple[str, ...], tmp_path: Path, kind: str) -> None:
    done = run("train-router", *MODELS, *texts, "--kind", kind, "--out", "out", "--epochs", "3")
    assert done.code == 0
    for words in (f"{kind} router", "best constant λ", "bundled:code alone", "more than the router", "bits/byte"):
        assert words in done.out
    found = training(tmp_path / "out")
    assert str(tmp_path) not in json.dumps(found)
    assert [row["weights"] for row in found["test"]][:2] == ["router", "best constant λ"]
    assert all(low <= row["more_than_router"] <= high for row in found["test"][1:] for low, high in [row["interval"]])
    assert found["documents"]["validation"] == found["documents"]["test"] >= 3
    assert found["history"][0]["number"] == 0
    assert found["models"][0]["source"]["sha256"]
    assert "best constant λ" in read_data(tmp_path / "out" / "training.png")["caption"]
    files = sorted(path.name for path in (tmp_path / "out").iterdir())
    assert files == ["router.safetensors", "scores", "training.json", "training.pdf", "training.png"]
    # The lines that it prints load the router and sample with it.
    recipe = done.out[done.out.index("from me_stats import Ensemble") :]
    names: dict[str, Any] = {}
    exec(recipe, names)
    assert names["routed"].sample("The ", max_new_tokens=3).tokens.shape == (1, 3)
    about = routers.router_metadata(tmp_path / "out" / "router.safetensors")
    assert about["training"]["test"][0]["nll"] == found["test"][0]["nll"]


def test_the_table_is_the_loss_of_the_saved_router(run: Run, texts: tuple[str, ...], tmp_path: Path) -> None:
    assert run("train-router", *MODELS, *texts, "--out", "out", "--epochs", "3").code == 0
    found = training(tmp_path / "out")
    scores = CorpusScores.load(tmp_path / "out" / "scores")
    test = scores.subset(cli_router._parts(scores, 0.2, 0)["test"])
    router = routers.load_router(
        tmp_path / "out" / "router.safetensors", open_setting(SIBLINGS).ensemble.vocabulary
    )  # fmt: skip
    nats, tokens = routers.document_nll(routers.RouterMixing(router), *routers.scored_sequences(test))
    assert found["test"][0]["nll"] == pytest.approx(nats.sum() / tokens.sum(), rel=1e-9)
    assert found["test"][0]["nll"] < found["test"][2]["nll"]  # than prose alone


def test_ctrl_c_in_training_keeps_the_scores(
    run: Run, texts: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real_corpus, real_score = corpus.score_corpus, corpus._score
    batches: list[int] = []

    def score(*arguments: Any) -> Any:
        batches.append(1)
        return real_score(*arguments)

    def stop(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(corpus, "score_corpus", lambda *a, **o: real_corpus(*a, **{**o, "batch_tokens": 400}))
    monkeypatch.setattr(corpus, "_score", score)
    command = ("train-router", *MODELS, *texts, "--out", "out", "--epochs", "2")
    with monkeypatch.context() as patch:
        patch.setattr(routers, "train_router", stop)
        stopped = run(*command)
    assert stopped.code == cli.INTERRUPTED
    assert "the scores are kept in out/scores" in stopped.err
    assert not (tmp_path / "out" / "router.safetensors").exists()
    assert len(batches) > 4
    batches.clear()
    assert run(*command).code == 0
    assert len(batches) == 1  # scored again, to see that the models are the same


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((*MODELS,), "no text: give files with --text FILE"),
        ((*MODELS, "--text", "absent.txt"), "absent.txt: No such file"),
        ((*MODELS, "--text", "prose.txt", "--validation", "0.5"), "--validation must lie between 0 and 0.5, got 0.5"),
        ((*MODELS, "--text", "prose.txt", "--kind", "oracle"), "--kind"),
        ((*MODELS, "--text", "short.txt"), "2 documents with scored tokens are too few"),
        ((*MODELS, "--text", "prose.txt", "--device", "abacus"), "--device abacus"),
        (("--text", "prose.txt"), "--models"),
    ],
)
def test_mistakes_are_one_line(
    run: Run, texts: tuple[str, ...], tmp_path: Path, arguments: tuple[str, ...], message: str
) -> None:
    (tmp_path / "short.txt").write_text("One.\n\nTwo.\n", encoding="utf-8")
    result = run("train-router", *arguments)
    assert result.code == 2
    (line,) = [line for line in result.err.splitlines() if line.startswith("me-stats: ")]
    assert message in line
    assert not list(tmp_path.rglob("router.safetensors"))


def test_help_teaches_with_an_example(run: Run) -> None:
    result = run("train-router", "--help")
    assert result.code == 0
    assert "me-stats train-router --models bundled:prose bundled:code --text notes.txt" in " ".join(result.out.split())
