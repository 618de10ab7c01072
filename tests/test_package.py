"""What a newcomer relies on: a light import, names that resolve, documents that run, nothing of this machine."""

from __future__ import annotations

import ast
import importlib
import inspect
import pkgutil
import re
import subprocess
import sys
import tomllib
from pathlib import Path
from urllib.parse import unquote

import pytest

import me_stats
from me_stats import cli
from me_stats.record import Record
from me_stats.report.style import read_data

ROOT = Path(__file__).resolve().parent.parent
RECORDS = sorted((ROOT / "experiments" / "results").glob("*.json"))
MODULES = ["me_stats"] + [
    found.name for found in pkgutil.walk_packages(me_stats.__path__, "me_stats.") if "._shipped" not in found.name
]


# Imports


@pytest.mark.parametrize("statement", ["import me_stats", "import me_stats.cli", "from me_stats import __version__"])
def test_import_stays_light(statement: str) -> None:
    heavy = "torch", "transformers", "scipy", "matplotlib", "numpy"
    code = f"import sys; {statement}; print([name for name in {heavy} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=True)
    assert done.stdout.strip() == "[]"


def test_toys_do_without_transformers() -> None:
    code = "import sys; from me_stats import MESampler, exact, models; print('transformers' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=True)
    assert done.stdout.strip() == "False"


@pytest.mark.parametrize("name", me_stats.__all__)
def test_every_public_name_resolves(name: str) -> None:
    assert getattr(me_stats, name) is not None
    assert name in dir(me_stats)


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="nonsense"):
        _ = me_stats.nonsense


def test_public_names_are_sorted_and_distinct() -> None:
    assert sorted(set(me_stats.__all__)) == sorted(me_stats.__all__)


# Docstrings


@pytest.mark.parametrize("name", MODULES)
def test_everything_public_has_a_docstring(name: str) -> None:
    module = importlib.import_module(name)
    assert (module.__doc__ or "").strip(), name
    bare = []
    for attribute, value in vars(module).items():
        ours = getattr(value, "__module__", None) == name
        if attribute.startswith("_") or not ours or not (inspect.isclass(value) or inspect.isfunction(value)):
            continue
        written = vars(value).get("__doc__") if inspect.isclass(value) else value.__doc__
        # A dataclass without a docstring gets its signature for one.
        if not (written or "").strip() or (written or "").startswith(f"{attribute}("):
            bare.append(attribute)
    assert bare == []


@pytest.mark.parametrize("folder", ["experiments", "figures"])
def test_scripts_have_docstrings(folder: str) -> None:
    for path in sorted((ROOT / folder).glob("*.py")):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        assert ast.get_docstring(tree), path.name
        for node in tree.body:
            if isinstance(node, (ast.FunctionDef, ast.ClassDef)) and not node.name.startswith("_"):
                assert ast.get_docstring(node), f"{path.name}: {node.name}"


# Documents

DOCUMENTS = (
    "README.md",
    "CONTRIBUTING.md",
    "docs/testing.md",
    "docs/mixing.md",
    "docs/long.md",
    "docs/orders.md",
    "docs/tasks.md",
    "docs/served.md",
    "docs/executors.md",
    "docs/speed.md",
)


@pytest.mark.parametrize("name", DOCUMENTS)
def test_python_in_documents_runs(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = ROOT / name
    blocks = re.findall(r"^```python\n(.*?)^```$", path.read_text(encoding="utf-8"), flags=re.M | re.S)
    if not blocks:
        pytest.skip(f"{name} has no Python in it")
    monkeypatch.chdir(tmp_path)
    namespace: dict[str, object] = {"__name__": "document"}
    for number, block in enumerate(blocks):
        exec(compile(block, f"{name}, block {number + 1}", "exec"), namespace)  # one session, as a reader would type it
    assert list(tmp_path.iterdir()) == []


def test_a_verdict_takes_fewer_than_fifteen_lines() -> None:
    text = (ROOT / "docs" / "testing.md").read_text(encoding="utf-8")
    first = re.search(r"^```python\n(.*?)^```$", text, flags=re.M | re.S)
    assert first is not None
    assert len([line for line in first[1].splitlines() if line.strip()]) < 15
    assert "check_sampler(my_sampler" in first[1]


@pytest.mark.parametrize("name", [*DOCUMENTS, "paper_repro.md"])
def test_links_of_documents_lead_somewhere(name: str) -> None:
    path = ROOT / name
    if not path.exists():
        pytest.skip(f"there is no {name} yet")
    text = path.read_text(encoding="utf-8")
    for target in re.findall(r"\]\(([^)#\s]+)", text):
        if "://" in target or target.startswith("report/"):
            continue
        if (target.startswith("figures/") or target == "paper_repro.md") and not RECORDS:
            continue  # both are made from records
        assert (path.parent / unquote(target)).exists(), target


def test_commands_in_the_readme_parse(capsys: pytest.CaptureFixture[str]) -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    commands = set(re.findall(r"`me-stats ([^`]+)`", text))
    assert commands
    for command in commands:
        words = cli._spread(command.split(), ["--models", "--only", "--text"])
        subcommand = [word for word in words if not word.startswith("-")][:1]
        with pytest.raises(SystemExit) as stop:
            cli.main([*subcommand, "--help"])
        assert not stop.value.code
        shown = capsys.readouterr().out
        for option in (word for word in words if word.startswith("--")):
            assert option in shown, command


# What is committed


def test_constraints_pin_versions_and_nothing_else() -> None:
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    for line in lines:
        assert re.fullmatch(r"[A-Za-z0-9][\w.-]*==\d[\w.!]*", line), line  # no URL, hash, option, host or local build
    names = [re.sub(r"[-_.]+", "-", line.split("==")[0]).lower() for line in lines]
    assert len(set(names)) == len(names)
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    wanted = [
        *project["project"]["dependencies"],
        *(line for group in project["project"].get("optional-dependencies", {}).values() for line in group),
        *(line for group in project["dependency-groups"].values() for line in group),
    ]
    for requirement in wanted:
        name = re.match(r"[\w.-]+", requirement)
        assert name is not None
        assert re.sub(r"[-_.]+", "-", name[0]).lower() in names, requirement


def test_version_is_the_projects() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert project["version"] == me_stats.__version__


def tracked() -> list[Path]:
    try:
        run = subprocess.run(["git", "-C", str(ROOT), "ls-files", "-z"], capture_output=True, check=True, timeout=60)
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("this is no git checkout")
    return [ROOT / name for name in run.stdout.decode().split("\0") if name]


def test_no_tracked_file_names_a_path_of_a_machine() -> None:
    # Spelled in two parts, so that this file does not find itself.
    forbidden = [("/" + name + "/").encode() for name in ("work", "root")]
    found = []
    for path in tracked():
        content = path.read_bytes() if path.is_file() else b""
        found += [f"{path.relative_to(ROOT)}: {word.decode()}" for word in forbidden if word in content]
    assert found == []


def test_no_tracked_file_is_larger_than_a_repository_should_carry() -> None:
    large = [str(path.relative_to(ROOT)) for path in tracked() if path.is_file() and path.stat().st_size > 4_000_000]
    assert large == []


# Results that are committed


@pytest.fixture
def records() -> list[Record]:
    if not RECORDS:
        pytest.skip("experiments/results holds no records yet: run 'me-stats reproduce' and copy its records there")
    return [Record.load(path) for path in RECORDS]


def test_committed_records_held_and_were_made_from_a_commit(records: list[Record]) -> None:
    for path, record in zip(RECORDS, records, strict=True):
        assert path.stem == record.name
        assert record.held, record.name
        assert record.environment["git"] is not None, record.name


def test_paper_repro_is_what_the_committed_records_say(
    records: list[Record], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TQDM_DISABLE", "1")
    with pytest.raises(SystemExit) as stop:
        cli.main(["report", str(RECORDS[0].parent), "--out", str(tmp_path), "--paper", str(tmp_path / "paper.md")])
    assert not stop.value.code
    stale = "paper_repro.md is stale: run 'make figures'"
    assert (tmp_path / "paper.md").read_text(encoding="utf-8") == (ROOT / "paper_repro.md").read_text(
        encoding="utf-8"
    ), stale


def test_committed_figures_are_drawn_from_the_committed_records(records: list[Record]) -> None:
    for record in records:
        image = ROOT / "figures" / f"{record.name}.png"
        assert image.with_suffix(".pdf").exists() or (ROOT / "figures" / f"{record.name}.pdf").exists()
        assert read_data(image).get("key") == record.key, f"{image.name} is stale: run 'make figures'"
