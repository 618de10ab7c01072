"""`me-stats compare` on the bundled siblings: what it prints and writes, how it goes on, and what it refuses."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from transformers.utils import logging

from me_stats import cli_compare, comparison_run
from me_stats.comparison import compare_laws
from me_stats.comparison_run import ComparePlan, rows_kept
from me_stats.models import Aligned
from me_stats.orders import OrderedLaw, Transforms
from me_stats.presets import SIBLINGS, Setting, open_setting
from me_stats.record import Record
from me_stats.report.style import read_data
from me_stats.samplers import MESampler
from tests.commands import Run

SMALL = (
    "--models", *SIBLINGS, "--temperature", ".7", "--top-k", "5", "--prompt", "The names of the ", "def f(", "--rows",
    "4", "--max-new-tokens", "6", "--batch", "2",
)  # fmt: skip
FIRST = OrderedLaw("transform-then-mix", Transforms(temperature=0.7, top_k=5), (0.6, 0.4))
SECOND = OrderedLaw("published-ce", Transforms(temperature=0.7, top_k=5), (0.6, 0.4))


@pytest.fixture(autouse=True)
def no_bars() -> Iterator[None]:
    """No loading bars of transformers, which a command switches off where it comes first."""
    logging.disable_progress_bar()
    yield
    logging.enable_progress_bar()


def test_it_prints_what_differs_why_and_what_to_do(run: Run, tmp_path: Path) -> None:
    result = run("compare", *SMALL, "--seed", "3", "--worst", "2")
    assert result.code == 0, result.err
    assert result.err.splitlines()[-1] == "Record and figure: compare, compare.png"
    for word in (
        "p   transform-then-mix, temperature 0.7, top-k 5, λ = 0.6, 0.4", "q   published-ce", "mean TV [95%]",
        "p's mass that q excludes", "top-k-again", "TV of whole texts", "q cannot write", "runs a token",
        "Where they differ most", "What to do", "MESampler(p)", "In Python", "components = open_setting(",
    ):  # fmt: skip
        assert word in result.out, word
    assert result.out.count("\nrow ") == 2
    assert not re.search(r"The vocabularies differ", result.out)
    record = Record.load(Path("compare/compare.json"))
    assert (record.name, record.checks, record.findings) == ("compare", {}, ())
    assert [model["name"] for model in record.models] == list(SIBLINGS)
    assert str(tmp_path) not in Path("compare/compare.json").read_text(encoding="utf-8")
    about = read_data(Path("compare/compare.png"))
    assert about["key"] == record.key
    assert "24 prefixes in 4 rows drawn from p" in about["caption"]
    assert Path("compare/compare.pdf").exists()


def test_its_numbers_are_those_of_the_library(run: Run) -> None:
    assert run("compare", *SMALL).code == 0
    found = Record.load(Path("compare/compare.json")).results
    components = open_setting(SIBLINGS).ensemble.components
    p, q = FIRST.over(components), SECOND.over(components)
    trace = MESampler(p).sample(["The names of the ", "def f("] * 2, max_new_tokens=6)
    expected = compare_laws(p, q, trace.row_prompts(), trace.sequences(), floor=found["comparison"]["floor"])
    for name in ("step", "outside", "missing"):
        assert found["comparison"][name]["value"] == pytest.approx(getattr(expected, name).value, abs=1e-6)
    assert found["forwards"]["repair"] == pytest.approx(expected.forecast.forwards_per_token, abs=1e-4)
    assert (found["forwards"]["CE"], found["forwards"]["ME"], found["components"]) == (2, 1, 2)
    assert [gap["length"] for gap in found["comparison"]["lengths"]] == [1, 2, 4, 6]
    assert [cause["name"] for cause in found["causes"]] == ["temperature", "union", "joint", "top_k_again"]
    assert found["causes"][-1]["cumulative"] == found["comparison"]["step"]
    assert found["curve"][-1] == found["comparison"]["largest"]
    worst = found["worst"][0]
    assert worst["tv"] == found["comparison"]["largest"]
    assert worst["text"].startswith(("The names of the ", "def f("))
    assert all(0 <= entry[name] <= 1 for entry in worst["tokens"] for name in "pq")
    exec(found["program"], {})


def test_ctrl_c_keeps_rows_and_the_same_command_goes_on(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = run("compare", *SMALL, "--out", "whole")
    assert whole.code == 0
    read, calls = comparison_run._read, []

    def interrupted(laws: Any, rows: range, tick: Any) -> Any:
        calls.append(rows)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return read(laws, rows, tick)

    monkeypatch.setattr(comparison_run, "_read", interrupted)
    stopped = run("compare", *SMALL)
    assert stopped.code == 130
    assert "interrupted: 2 of 4 rows are kept in compare/parts; the same command goes on from there" in stopped.err
    assert "Traceback" not in stopped.err
    assert not Path("compare/compare.json").exists()
    again = run("compare", *SMALL)
    assert again.code == 0
    assert calls == [range(2), range(2, 4), range(2, 4)]
    assert again.out == whole.out
    one, other = (Record.load(Path(folder, "compare.json")) for folder in ("compare", "whole"))
    assert (one.results, one.key) == (other.results, other.key)
    # All there: nothing is drawn again. A damaged part is.
    assert run("compare", *SMALL).out == whole.out
    assert len(calls) == 3
    (part,) = Path("compare/parts").glob("*/rows-000002.npz")
    part.write_bytes(part.read_bytes()[:100])
    assert run("compare", *SMALL).out == whole.out
    assert calls[3:] == [range(2, 4)]
    # Another command has parts of its own.
    assert run("compare", *SMALL, "--seed", "1").code == 0
    assert len(list(Path("compare/parts").iterdir())) == 2


def test_prompts_of_a_file_and_the_command_that_makes_the_record_again(run: Run, tmp_path: Path) -> None:
    rows = [{"question": f"What is {n}?", "answer": str(n)} for n in range(9)]
    Path("some").mkdir()
    Path("some/a.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    options = ("--rows", "4", "--max-new-tokens", "3", "--against", "mix-then-transform:weights=.5/.5,top-k=4,greedy")
    template = r"Q: {question}\nA:"
    result = run("compare", "--models", *SIBLINGS, *options, "--prompts", "some/a.jsonl", "--template", template,
                 "--n-prompts", "2")  # fmt: skip
    assert result.code == 0, result.err
    record = Record.load(Path("compare/compare.json"))
    assert record.config["prompts"] == ["Q: What is 0?\nA:", "Q: What is 1?\nA:"]
    assert record.results["source"] == {"prompts": "a.jsonl", "template": template}
    assert [cause["name"] for cause in record.results["causes"]] == ["weights", "settings", "top_k", "greedy"]
    assert record.results["causes"][2]["alone"] is None
    command = cli_compare.command(record)
    assert "--prompts a.jsonl" in command
    Path("some/a.jsonl").rename("a.jsonl")
    again = run(*shlex.split(command)[1:], "--out", "again")
    assert again.code == 0, again.err
    assert Record.load(Path("again/compare.json")).key == record.key
    assert again.out == result.out


def test_the_report_shows_it(run: Run) -> None:
    assert run("compare", *SMALL).code == 0
    result = run("report", "compare")
    assert result.code == 0, result.err
    text = Path("report/report.md").read_text(encoding="utf-8")
    assert "figures/compare.png" in text
    assert "## Other experiments" in text
    (line,) = (line for line in text.splitlines() if line.startswith("me-stats compare "))
    assert line == cli_compare.command(Record.load(Path("compare/compare.json")))
    page = Path("report/index.html").read_text(encoding="utf-8")
    assert "data:image/png;base64" in page
    assert read_data(Path("report/figures/compare.png")) == read_data(Path("compare/compare.png"))


def test_equal_laws_and_one_model(run: Run) -> None:
    small = ("--models", "bundled:prose", "--rows", "2", "--max-new-tokens", "2", "--law", "published-ce")
    result = run("compare", *small, "--against", "union-component:top-k=256")
    assert result.code == 0, result.err
    assert "one law up to rounding" in result.out
    record = Record.load(Path("compare/compare.json"))
    assert (record.results["drawn_by"], record.results["causes"]) == ("CESampler", [])
    assert "cause" not in result.out
    assert "bundled:prose under 2 prompts" in result.out


def test_mixed_vocabularies_are_stated_with_what_is_dropped(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def aligned_setting(models: Any, **options: Any) -> Setting:
        from dataclasses import replace

        from me_stats.models import Ensemble
        from me_stats.presets import aligned

        setting = open_setting(models, **options)
        components = aligned([model for _, model in setting.models])
        return replace(setting, ensemble=Ensemble(components, setting.ensemble.mixing))

    monkeypatch.setattr(comparison_run, "open_setting", aligned_setting)
    result = run("compare", *SMALL)
    assert result.code == 0, result.err
    known = Record.load(Path("compare/compare.json")).results["vocabularies"]
    text = " ".join(result.out.split())
    assert f"The vocabularies differ ({SIBLINGS[0]} " in text
    assert f"laws are over {known['strings']:,} byte strings" in text
    assert known["strings"] == aligned_setting(SIBLINGS).ensemble.vocabulary.size
    for (name, mass), part in zip(known["dropped"].items(), aligned_setting(SIBLINGS).ensemble.components, strict=True):
        assert isinstance(part, Aligned)
        assert 0 <= mass["mean"] <= mass["largest"] < 1
        assert f"{name} {cli_compare._percent(mass['mean'])}" in text


# Mistakes


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--law", "mixed"), "--law mixed: order must be one of transform-then-mix"),
        (("--law", "union-joint"), "--law union-joint: union-joint is a union of top-k sets: set top_k"),
        (("--against", "published-ce:top-k=many"), "--against published-ce:top-k=many: top-k=many: no value for top-k"),
        (("--against", "published-ce:top-k"), "no value for top-k; such as top-k=10 or top-k=none"),
        (("--against", "published-ce:heat=1"), "heat is no setting of a law; there are weights, temperature, top-k"),
        (("--against", "published-ce:weights=1/1"), "weights must sum to 1"),
        (("--against", "published-ce:weights=.5/.3/.2"), "weights has 3 values for 2 components"),
        (("--against", "published-ce:greedy=perhaps"), "no value for greedy; such as greedy or greedy=false"),
        (("--min-p", ".1"), "--against published-ce: published-ce has no min-p"),
        (("--greedy", "--temperature", ".7"), "greedy reads no temperature"),
        (("--top-k", "0"), "TopK needs an integer k of at least 1"),
        (("--top-p", "0"), "TopP needs 0 < p"),
        (("--weights", ".6,.2,.2"), "--weights has 3 weights for 2 components; give one each"),
        (("--weights", ".6;.4"), "--weights .6;.4: could not convert"),
        (("--prompts", "absent.jsonl"), "absent.jsonl: No such file"),
        (("--prompts", "a.txt", "--prompt", "b"), "--prompts names a source and --prompt gives texts"),
        (("--field", "x"), "--field names a field of --prompts, and there is no such source"),
        (("--prompts", "a.txt", "--field", "x", "--template", "{x}"), "leave out --field"),
        (("--template", "{x}"), "--template is filled from --prompts or --prompt, and there is neither"),
        (("--prompt", "a", "--template", "{x}"), "--template asks for {x}, but a row has the fields text"),
        (("--rows", "1"), "'--rows'"),
        (("--n-prompts", "0"), "'--n-prompts'"),
        (("--worst", "-1"), "'--worst'"),
        (("--device", "gpu9"), "--device gpu9: "),
        (("--dtype", "int4"), "int4"),
        (("--models", "smolm2-135m"), "did you mean 'smollm2-135m'"),
        (("--out", "a.txt"), "cannot write to a.txt"),
        (("--max-new-tokens", "99999"), "max_new_tokens: a prompt of "),
    ],
    ids=" ".join,
)
def test_mistakes_are_one_line(run: Run, arguments: tuple[str, ...], message: str) -> None:
    Path("a.txt").write_text("a text\n", encoding="utf-8")
    models = () if "--models" in arguments else ("--models", *SIBLINGS)
    result = run("compare", *models, *arguments)
    assert result.code == 2
    assert message in result.line
    assert "Traceback" not in result.line
    assert not Path("compare/compare.json").exists()


@pytest.mark.parametrize("change", [{"rows": 1}, {"max_new_tokens": 0}, {"batch": 0}, {"worst": -1}], ids=str)
def test_plans_refuse_what_cannot_be(change: dict[str, int]) -> None:
    with pytest.raises(ValueError, match=f"{next(iter(change))} must be at least"):
        ComparePlan(SIBLINGS, None, FIRST, SECOND, **change)  # type: ignore[arg-type]


def test_rows_kept_counts_the_last_part_as_it_is(tmp_path: Path) -> None:
    plan = ComparePlan(SIBLINGS, None, FIRST, SECOND, rows=5, batch=2)
    folder = comparison_run.part_folder(plan, tmp_path)
    assert rows_kept(plan, tmp_path) == 0
    folder.mkdir(parents=True)
    for start in (0, 4):
        np.savez(folder / f"rows-{start:06d}.npz", x=np.zeros(1))
    assert rows_kept(plan, tmp_path) == 3


def test_help_has_examples_that_parse(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    text = run("compare", "--help").out
    examples = [line.strip() for line in text.splitlines() if line.strip().startswith("me-stats compare --")]
    assert len(examples) == 4
    Path("a.jsonl").write_text('{"question": "What?", "answer": "that"}\n', encoding="utf-8")
    Path("a.txt").write_text("Why?\n", encoding="utf-8")
    seen: list[ComparePlan] = []

    def stop(plan: ComparePlan, *_: Any, **__: Any) -> Record:
        seen.append(plan)
        raise ValueError("seen")

    monkeypatch.setattr(comparison_run, "run", stop)
    monkeypatch.setattr(cli_compare, "prepare_models", lambda *_, **__: None)
    for example in examples:
        assert run(*shlex.split(example)[1:]).line == "me-stats: seen"
    assert [plan.second.order for plan in seen] == ["published-ce"] * 3 + ["transform-then-mix"]
    assert (seen[0].rows, seen[0].first.transforms.top_k, seen[0].prompts) == (32, 10, None)
    assert (seen[1].prompts, seen[1].first.transforms) == (("Why?",), Transforms(top_k=5))
    assert (seen[2].prompts, seen[2].second.transforms.greedy) == (("Q: What?\nA:",), True)
    assert seen[3].second.weights == (0.5, 0.5)
