"""``me-stats audit-table``: numbers, words, record and figure; mistakes in one line."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from me_stats.record import Record
from me_stats.report.style import read_data
from tests.commands import Run

DATA = Path(__file__).resolve().parents[1] / "experiments" / "data"
ITEMS = ("--items", "GSM8K=1319", "MMLU=14042", "BBH=6511", "ARC=1172", "--runs", "5")
GOOD = "group,setting,dataset,accuracy\ng,CE,A,70.10\ng,ME,A,70.20\n"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name in ("paper_tables.csv", "speculative_sampling.csv"):
        shutil.copy(DATA / name, tmp_path)
    (tmp_path / "good.csv").write_text(GOOD, encoding="utf-8")
    return tmp_path


def squeezed(text: str) -> str:
    return " ".join(text.split())


def test_the_table_of_the_paper(run: Run, folder: Path) -> None:
    result = run("audit-table", "paper_tables.csv", *ITEMS)
    assert result.code == 0
    assert result.err == ""
    text = squeezed(result.out)
    assert "66.67 67.90 +1.23 +4.91 2.9e-05 2.9e-05 0.70" in text
    assert "all cells 32 58.95 0.0026 0.997 +0.002 0.17 2.59 15, 17" in text
    assert "without MMLU 24 19.59 0.72" in text
    assert "k = 10 16 40.60" in text
    assert "1 cell stands out after Holm's correction" in text
    assert "1 of 64 printed differences does not follow" in text
    assert list(folder.glob("*.json")) == []


def test_record_and_figure(run: Run, folder: Path) -> None:
    result = run("audit-table", "paper_tables.csv", *ITEMS, "--level", "0.01", "--out", "found")
    assert result.code == 0
    record = Record.load(folder / "found" / "audit-paper_tables.json")
    assert record.config["table"] == "paper_tables.csv"
    assert record.config["items"] == {"GSM8K": 1319, "MMLU": 14042, "BBH": 6511, "ARC": 1172}
    assert (record.config["runs"], record.config["level"], len(record.config["sha256"])) == (5, 0.01, 64)
    assert record.results["audit"]["blocks"][0]["statistic"] == pytest.approx(58.95, abs=0.01)
    assert record.results["paragraph"] in result.out.replace("\n", " ") or "Σz²" in record.results["paragraph"]
    assert record.findings == ()
    for kind in ("pdf", "png"):
        assert (folder / "found" / f"audit-paper_tables.{kind}").is_file()
    caption = read_data(folder / "found" / "audit-paper_tables.png")["caption"]
    assert caption.startswith("The printed accuracies of CE and ME scatter more than equal accuracies do")
    assert "audit-paper_tables.json" in result.err


def test_another_table_with_its_own_counts(run: Run, folder: Path) -> None:
    result = run("audit-table", "speculative_sampling.csv", "--out", folder)
    assert result.code == 0
    text = squeezed(result.out)
    assert "HumanEval, Chinchilla 70B 45.1 47.0 +1.90 +0.35 1.000 0.73 15.42" in text
    assert "2 pairs of ArS and SpS on 2 data sets, 1 run a number" in text
    assert "k = " not in text
    assert (folder / "audit-speculative_sampling.png").is_file()


def test_noise_and_level_reach_the_audit(run: Run, folder: Path) -> None:
    def text(*options: str) -> str:
        return squeezed(run("audit-table", "good.csv", "--items", "A=500", "--runs", "2", *options).out)

    assert "A, g 70.10 70.20 +0.10 +0.05" in text()
    assert "A, g 70.10 70.20 +0.10 +0.10" in text("--noise", "0.25")
    assert "independent runs of 0.25 of their largest noise" in text("--noise", "0.25")
    assert "(99% confidence)" in text("--level", "0.01")


def test_a_name_with_brackets_is_a_name(run: Run, folder: Path) -> None:
    (folder / "odd.csv").write_text(GOOD.replace("\ng,", "\n[bold]g[/],"), encoding="utf-8")
    result = run("audit-table", "odd.csv", "--items", "A=500", "--runs", "2")
    assert result.code == 0
    assert "A, [bold]g[/]" in result.out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "see 'me-stats audit-table --help'"),
        (("absent.csv",), "absent.csv"),
        ((".",), "directory"),
        (("good.csv",), "how many items has A? Give A=COUNT or a column 'items'"),
        (("good.csv", "--items", "A=500"), "how many runs is a number of good.csv the mean of"),
        (("good.csv", "--items", "A=500", "--runs", "0"), "'--runs'"),
        (("good.csv", "--items", "A=500", "B=3", "--runs", "1"), "no data set 'B' in good.csv; it has A"),
        (("good.csv", "--items", "A=500", "A=400", "--runs", "1"), "--items A=400: A has a count already"),
        (("good.csv", "--items", "A", "--runs", "1"), "--items A: give a data set and its number of items"),
        (("good.csv", "--items", "A=-5", "--runs", "1"), "--items A=-5: give a data set"),
        (("good.csv", "--items", "A=1e3", "--runs", "1"), "--items A=1e3: give a data set"),
        (("good.csv", "--items", "A=0", "--runs", "1"), "--items A=0: give a data set"),
        (("good.csv", "--items", "A=500", "--runs", "1", "--noise", "1.5"), "noise must lie in (0, 1]"),
        (("good.csv", "--items", "A=500", "--runs", "1", "--noise", "nan"), "noise must lie in (0, 1]"),
        (("good.csv", "--items", "A=500", "--runs", "1", "--level", "0"), "level must lie in (0, 0.5]"),
        (("good.csv", "--items", "A=500", "--runs", "1", "--out", "good.csv"), "cannot write to good.csv"),
        (("speculative_sampling.csv", "--runs", "100"), "line 2, column runs: 1, and 100 is given"),
    ],
)
def test_mistakes_are_one_line(run: Run, folder: Path, arguments: tuple[str, ...], message: str) -> None:
    result = run("audit-table", *arguments)
    assert result.code == 2
    assert message in result.line


BAD: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "is empty"),
    "blank": (b"\n\n , \n", "is empty"),
    "binary": (bytes(range(256)), "is not UTF-8 text"),
    "zeros": (bytes(100), "is a binary file"),
    "latin": ("group,setting,dataset,accuracy\né,CE,A,70\n".encode("latin-1"), "is not UTF-8 text"),
    "wide": (GOOD.encode("utf-16"), "is not UTF-8 text"),
    "semicolons": (GOOD.replace(",", ";").encode(), "columns are not separated by commas"),
    "no column": (b"group,setting,dataset\ng,CE,A\n", "no column 'accuracy'"),
    "other column": (GOOD.replace("group", "team").encode(), "line 1: unknown column 'team'"),
    "no header": (b"g,CE,A,70.10\ng,ME,A,70.20\n", "line 1: unknown column 'g'"),
    "nan": (GOOD.replace("70.20", "NaN").encode(), "line 3, column accuracy: 'NaN' is not a number"),
    "percent": (GOOD.replace("70.20", "70.20%").encode(), "leave the percent sign out"),
    "comma": (GOOD.replace("70.20", "70,20").encode(), "line 3: 5 fields for 4 columns; write decimals with a point"),
    "quoted comma": (GOOD.replace("70.20", '"70,20"').encode(), "write decimals with a point"),
    "quote": (GOOD.replace("70.20", '"70.20').encode(), "is it CSV?"),
    "shares": (GOOD.replace("70.", "0.70").encode(), "give percent, not shares"),
    "too large": (GOOD.replace("70.20", "702.0").encode(), "lies outside 0 to 100"),
    "unpaired": (GOOD.rsplit("g", 1)[0].encode(), "two methods besides 'single', found CE"),
    "twice": ((GOOD + "g,ME,A,70.20\n").encode(), "line 4: ME, g, A stands on line 3 already"),
    "sure": (GOOD.replace("70.10", "100").replace("70.20", "100").encode(), "too few for a normal score"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_files_are_one_line(run: Run, tmp_path: Path, name: str) -> None:
    content, message = BAD[name]
    (tmp_path / "bad.csv").write_bytes(content)
    result = run("audit-table", "bad.csv", "--items", "A=500", "--runs", "5", "--out", "found")
    assert result.code == 2
    assert message in result.line
    assert not (tmp_path / "found").exists()


def test_a_byte_order_mark_is_no_mistake(run: Run, tmp_path: Path) -> None:
    (tmp_path / "excel.csv").write_bytes(b"\xef\xbb\xbf" + GOOD.replace("\n", "\r\n").encode())
    assert run("audit-table", "excel.csv", "--items", "A=500", "--runs", "5").code == 0
