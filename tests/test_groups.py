"""The paper's groups: their files, files of users, and runs of their parts on stand-ins of the same shapes."""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path
from typing import Any

import pytest

from me_stats import groups, plans, preflight, reproduce
from me_stats.groups import Group, load_group, resolve
from me_stats.models.shapes import PAPER_GROUPS
from me_stats.plans import Part
from tests import tiny
from tests.checkpoints import real_tokenizers, save_group, save_stand_in

WHOLE = "label: A + B\nmodels: [org/a, org/b]\n"


def write(folder: Path, text: str) -> Path:
    path = folder / "mine.yaml"
    path.write_text(text, encoding="utf-8")
    return path


# Files


@pytest.mark.parametrize("name", list(PAPER_GROUPS))
def test_the_papers_groups_are_files(name: str) -> None:
    group = load_group(name)
    assert group.shapes == PAPER_GROUPS[name]
    assert len(group.models) == len(group.shapes) == len(group.weights)
    assert group.k == (5, 10)
    assert group.tasks == groups.TASKS
    assert {"C9", "C10"} <= set(group.claims)
    assert group.dtype == "bfloat16"
    assert "our reading" in group.note
    assert set(groups.names()) == set(PAPER_GROUPS)


def test_what_is_timed_has_one_vocabulary() -> None:
    assert load_group("qwen").timed == load_group("qwen").models
    assert load_group("hermes3").timed == ("random:openchat-7b", "random:nous-hermes-7b", "random:openhermes-7b")
    assert load_group("mixed").timed == ()  # their widths differ


def test_a_file_of_the_users_has_the_same_form(tmp_path: Path) -> None:
    text = WHOLE + "weights: [0.25, 0.75]\nk: [3]\nrevisions: [abc, '']\ntasks: [gsm8k]\nclaims: [C1]\nprompts: text\n"
    group = load_group(write(tmp_path, text))
    assert group == Group(
        "mine", "A + B", ("org/a", "org/b"), revisions=("abc", ""), weights=(0.25, 0.75), k=(3,), prompts="text",
        tasks=("gsm8k",), claims=("C1",),
    )  # fmt: skip
    assert load_group(write(tmp_path, WHOLE + "weights: equal\n")).weights == (0.5, 0.5)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("models: [a, b]\n", "label is missing"),
        ("label: x\n", "models is missing"),
        (WHOLE + "wieghts: [1, 0]\n", "wieghts is no key of a group; did you mean weights"),
        (WHOLE + "zzz: 1\n", "zzz is no key of a group; known are label"),
        ("label: x\nmodels: [a]\n", "models must name at least two"),
        ("label: x\nmodels: a\n", "models must be a list"),
        ("label: x\nmodels: [a, 3]\n", "models must hold texts alone, got 3"),
        ("label: ''\nmodels: [a, b]\n", "label must be a text"),
        (WHOLE + "weights: [0.5, 0.6]\n", "weights must be 'equal' or a law over the models: weights must sum to 1"),
        (WHOLE + "weights: heavy\n", "weights must be 'equal' or a law"),
        (WHOLE + "weights: [1]\n", "weights must have one for each of 2 models, got 1"),
        (WHOLE + "k: [0]\n", "k must hold positive whole numbers alone, got 0"),
        (WHOLE + "k: [true]\n", "k must hold positive whole numbers alone, got True"),
        (WHOLE + "k: 5\n", r"k must be a list, such as \[5, 10\]"),
        (WHOLE + "dtype: int4\n", "dtype must be one of float32, bfloat16, float16, got 'int4'"),
        (WHOLE + "vocabularies: two\n", "vocabularies must be one of one, several"),
        (WHOLE + "prompts: none\n", "prompts must be one of chat, text"),
        (WHOLE + "shapes: [openchat-7b]\n", "shapes must have one for each of 2 models, got 1"),
        (WHOLE + "shapes: [openchat-7b, gpt-5]\n", "shapes must be among .* got 'gpt-5'"),
        (WHOLE + "revisions: [a]\n", "revisions must have one for each of 2 models"),
        (WHOLE + "tasks: [trivia]\n", "tasks must be among gsm8k, .* got 'trivia'"),
        (WHOLE + "claims: [C16]\n", "claims must be among C1, .* got 'C16'"),
        ("models: [a, b\n", "is no YAML file"),
        ("- a\n- b\n", "must hold keys and values"),
        ("", "must hold keys and values"),
    ],
)
def test_a_bad_file_is_refused_with_file_and_key(text: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message) as refusal:
        load_group(write(tmp_path, text))
    assert "mine.yaml" in str(refusal.value)
    assert "\n" not in str(refusal.value)


def test_an_unknown_group_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no group 'qwenn': did you mean 'qwen'"):
        load_group("qwenn")
    with pytest.raises(ValueError, match=r"known are hermes2, .* path of a group file"):
        load_group(tmp_path / "absent.yaml")


# One run


def test_models_and_dtype_of_a_run_replace_those_of_the_file() -> None:
    group = load_group("mixed")
    assert resolve("mixed") == group
    local = resolve("mixed", ["a", "b", "c"], "float32")
    assert local == dataclasses.replace(group, models=("a", "b", "c"), dtype="float32")
    with pytest.raises(ValueError, match=r"must name 3 models, in place of openchat/.* got 2"):
        resolve("mixed", ["a", "b"])
    with pytest.raises(ValueError, match="dtype must be one of"):
        resolve("mixed", dtype="int4")


def test_revisions_are_those_of_the_hub(tmp_path: Path) -> None:
    path = write(tmp_path, WHOLE + "revisions: [abc, def]\n")
    assert resolve(path).revisions == ("abc", "def")
    assert resolve(path, ["x", "y"]).revisions == ()


def planned(models: tuple[str, ...], **options: Any) -> list[Part]:
    return plans.plan(models=models, **({"size": "full", "dtype": "bfloat16", "device": "cuda"} | options))


def test_parts_are_named_after_the_group_and_hold_its_choices() -> None:
    group = load_group("qwen")
    before = planned(group.models)
    parts = {part.name: part.config for part in groups.parts(group, before)}
    kept = {f"{part.experiment}-qwen-cuda" if part.tag else part.experiment for part in before}
    kept.remove("mixed_vocabularies-qwen-cuda")  # they have one
    assert kept <= set(parts) <= kept | {"accuracy-qwen-k5-cuda", "accuracy-qwen-k10-cuda"}
    assert parts["toy_equivalence"] == before[0].config
    assert parts["long-qwen-cuda"].weights == (0.5, 0.5)
    speed = parts["speed-qwen-cuda"]
    assert (speed.models, speed.components, speed.weights, speed.dtype, speed.device) == (
        group.models, (1, 2), ((0.5, 0.5),), "bfloat16", "cuda",
    )  # fmt: skip
    assert {config.device for name, config in parts.items() if name != "toy_equivalence"} == {"cuda"}


def test_shapes_are_timed_on_accelerators_where_vocabularies_differ() -> None:
    group = load_group("hermes3")
    before = [part for part in planned(group.models) if part.experiment in ("toy_equivalence", "per_step")]
    parts = {part.experiment: part.config for part in groups.parts(group, before)}
    assert parts["speed"].models == group.timed
    assert parts["speed"].components == (1, 2, 3)
    for name, device in (("mixed", "cuda"), ("hermes3", "cpu")):
        group = load_group(name)
        before = planned(group.models, device=device)
        assert "speed" not in {part.experiment for part in groups.parts(group, before)}


def test_accuracies_are_compared_at_the_groups_k(monkeypatch: pytest.MonkeyPatch) -> None:
    @dataclasses.dataclass(frozen=True)
    class Config:
        models: tuple[str, ...] = ("a",)
        top_k: int = 3
        tasks: tuple[str, ...] = ()
        device: str = "cpu"

    stand_in = type(sys)("stand_in")
    stand_in.Config = Config  # type: ignore[attr-defined]
    load = plans.load
    monkeypatch.setattr(
        "me_stats.scripts.load", lambda folder, name: stand_in if name == "accuracy" else load(folder, name)
    )
    group = load_group("qwen")
    found = [part for part in groups.parts(group, planned(group.models)) if part.experiment == "accuracy"]
    assert {part.name: part.config for part in found} == {
        f"accuracy-qwen-k{k}-cuda": Config(group.models, k, groups.TASKS, "cuda") for k in (5, 10)
    }


def test_records_of_groups_name_their_command() -> None:
    config = {"models": list(load_group("qwen").models), "device": "cuda", "dtype": "bfloat16", "seed": 0}
    record = dataclasses.replace(tiny.record("toy_equivalence"), name="per_step-qwen-cuda", config=config)
    common = "me-stats reproduce --preset qwen"
    assert groups.command(record) == f"{common} --device cuda --only per_step-qwen-cuda"
    local = dataclasses.replace(
        record, name="per_step-qwen", config={"models": ["/a", "/b"], "dtype": "float32", "seed": 3}
    )
    assert groups.command(local) == f"{common} --models /a /b --dtype float32 --seed 3 --only per_step-qwen"
    for name in ("toy_equivalence", "per_step-siblings-mixed", "speed-bench-h100-qwen"):
        assert groups.command(dataclasses.replace(record, name=name)) is None


def test_a_plan_without_models_stays_as_it_is() -> None:
    toys = planned(("a", "b"))[:1]
    assert groups.parts(load_group("qwen"), toys) == toys


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("name", ["qwen", "mixed"])
def test_the_smallest_parts_of_a_group_run_on_stand_ins(name: str, tmp_path: Path) -> None:
    models = save_group(tmp_path / "models", load_group(name))
    chosen = resolve(name, models, "float32")
    before = plans.plan(size="quick", models=chosen.models, dtype=chosen.dtype)
    small = {
        "per_step": {"prompts": 1, "draws": 20_000, "margin": 0.05},
        "certificate": {"rows": 4, "steps": 8, "component_draws": 400_000},
    }
    for part in groups.parts(chosen, before):
        if part.experiment in small:
            tiny = Part(part.experiment, part.tag, dataclasses.replace(part.config, **small.pop(part.experiment)))
            record = reproduce.run_part(tiny, tmp_path / "records", lambda fraction, note: None)
            assert record.held, record.checks
            assert record.name == f"{part.experiment}-{name}"
            assert [model["name"] for model in record.models] == models
    assert not small


@pytest.mark.slow
@pytest.mark.usefixtures("one_thread")
def test_the_mixed_group_runs_on_its_real_vocabularies(tmp_path: Path) -> None:
    tokenizers = real_tokenizers(tmp_path)
    if not tokenizers:
        pytest.skip("the vocabularies of Mistral and DeepSeek are not in the cache folder")
    models = [
        save_stand_in(tmp_path / shape, shape, tokenizer=tokenizers[shape]) for shape in load_group("mixed").shapes
    ]
    chosen = resolve("mixed", models, "float32")
    before = plans.plan(size="quick", models=chosen.models, dtype=chosen.dtype)
    (part,) = (part for part in groups.parts(chosen, before) if part.experiment == "certificate")
    part = Part(part.experiment, part.tag, dataclasses.replace(part.config, rows=4, steps=4, component_draws=400_000))
    found = preflight.check([part], device="cpu", dtype=chosen.dtype, out=tmp_path / "out", group=chosen)
    assert found.passed, found.checks
    assert "they differ and are aligned over byte strings" in [one.detail for one in found.checks]
    assert reproduce.run_part(part, tmp_path / "records", lambda fraction, note: None).held
