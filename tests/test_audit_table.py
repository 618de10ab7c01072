"""Reading a table: what it says of itself, and an error with line and column for whatever it should not be."""

from __future__ import annotations

import contextlib
from decimal import Decimal
from fractions import Fraction
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from me_stats.audit_digits import attainable, find_grains, find_slips
from me_stats.audit_table import parse_table, read_table

DATA = Path(__file__).resolve().parents[1] / "experiments" / "data"
HEAD = "group,setting,k,model,dataset,accuracy,printed_delta\n"
GOOD = HEAD + "a + b,CE,5,,ARC,70.10,+1.10\na + b,ME,5,,ARC,70.2,+1.20\n"


def test_a_table_keeps_its_digits_and_lines() -> None:
    table = parse_table(HEAD + ',single,,a,ARC,69.00,\n\n"a + b", ME ,5,,ARC,70.20,−1.20\na + b,CE,5,,ARC,70.1,+1.10\n')
    assert table.methods == ("ME", "CE")  # in the order of the table
    ((one, two),) = table.pairs
    assert (one.line, two.line, one.accuracy, two.accuracy) == (4, 5, Decimal("70.20"), Decimal("70.1"))
    assert (one.unit, two.unit) == (Decimal("0.01"), Decimal("0.1"))
    assert one.printed_delta == Decimal("-1.20")
    assert one.label == "ME, a + b, k = 5, ARC"
    assert [entry.label for entry in table.entries] == ["a, ARC", "ME, a + b, k = 5, ARC", "CE, a + b, k = 5, ARC"]
    assert table.datasets == ("ARC",)


def test_the_committed_tables() -> None:
    paper = read_table(DATA / "paper_tables.csv")
    assert (len(paper.pairs), len(paper.singles), paper.methods) == (32, 32, ("CE", "ME"))
    other = read_table(DATA / "speculative_sampling.csv")
    assert [(one.dataset, one.items, str(one.accuracy), str(two.accuracy)) for one, two in other.pairs] == [
        ("XSum", 11305, "11.2", "11.4"),
        ("HumanEval", 164, "45.1", "47.0"),
    ]


def test_a_byte_order_mark_and_line_ends_of_windows(tmp_path: Path) -> None:
    path = tmp_path / "table.csv"
    path.write_bytes(b"\xef\xbb\xbf" + GOOD.replace("\n", "\r\n").encode())
    assert read_table(path).pairs == parse_table(GOOD).pairs


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "table is empty; its first line names the columns group, setting"),
        (" \n,,\n", "table is empty"),
        ("group;setting;dataset;accuracy\n", "line 1: columns are not separated by commas"),
        ("a\tb\n", "line 1: columns are not separated by commas"),
        ("group,setting,dataset\n", "line 1: no column 'accuracy'"),
        ("group,setting,dataset,accuracy,speed\n", "line 1: unknown column 'speed'; columns are group"),
        ("group,setting,dataset,accuracy,k,K\n", "line 1: two columns are called 'k'"),
        (HEAD, "a table of pairs has two methods besides 'single', found none"),
        (HEAD + "g,CE,5,,ARC,70,\n", "found CE"),
        (GOOD + "a + b,XE,5,,ARC,70,\n", "found CE, ME, XE"),
        (GOOD + "a + b,CE,10,,ARC,70,\n", "line 4: CE, a + b, k = 10, ARC has no ME to compare with"),
        (GOOD + "a + b,ME,10,,ARC,70,\n", "line 4: ME, a + b, k = 10, ARC has no CE to compare with"),
        (GOOD + "a + b,ME,5,,ARC,70,\n", "line 4: ME, a + b, k = 5, ARC stands on line 3 already"),
        (GOOD + "a + b,ME,5,x,ARC,70,\n", "line 4: ME, a + b, k = 5, ARC stands on line 3"),
        (GOOD + ",single,,a,ARC,70,\n,single,,a,ARC,71,\n", "line 5: a, ARC stands on line 4 already"),
        (GOOD + ",single,,,ARC,70,\n", "line 4, column model: nothing there"),
        (GOOD + ",CE,5,,BBH,70,\n", "line 4, column group: nothing there"),
        (GOOD + "g,CE,5,,,70,\n", "line 4, column dataset: nothing there"),
        (GOOD + "g,CE,5,,BBH,,\n", "line 4, column accuracy: nothing there"),
        (GOOD + "g,CE,5,,BBH,nan,\n", "line 4, column accuracy: 'nan' is not a number"),
        (GOOD + "g,CE,5,,BBH,1e1,\n", "'1e1' is not a number"),
        (GOOD + "g,CE,5,,BBH,inf,\n", "'inf' is not a number"),
        (GOOD + "g,CE,5,,BBH,٣٤,\n", "is not a number"),
        (GOOD + f"g,CE,5,,BBH,7{'0' * 5000},\n", "is not a number"),
        (GOOD + "g,CE,5,,BBH,70.1%,\n", "'70.1%' is not a number; leave the percent sign out"),
        (GOOD + 'g,CE,5,,BBH,"70,1",\n', "'70,1' is not a number; write decimals with a point"),
        (GOOD + "g,CE,5,,BBH,70,1,\n", "line 4: 8 fields for 7 columns; write decimals with a point"),
        (GOOD + "g,CE,5\n", "line 4: 3 fields for 7 columns"),
        (GOOD + "g,CE,5,,BBH,100.1,\n", "column accuracy: 100.1 lies outside 0 to 100"),
        (GOOD + "g,CE,5,,BBH,-1,\n", "column accuracy: -1 lies outside 0 to 100"),
        (GOOD + "g,CE,5,,BBH,70,up\n", "line 4, column printed_delta: 'up' is not a number"),
        (GOOD + 'g,"CE,5,,BBH,70,\n', "is it CSV"),
        (HEAD + "g,CE,5,,ARC,0.70,\ng,ME,5,,ARC,0.71,\n", "no value is above 1; give percent"),
        ("group,setting,dataset,accuracy,items\ng,CE,A,70,0\n", "line 2, column items: '0' is not a count"),
        ("group,setting,dataset,accuracy,runs\ng,CE,A,70,2.5\n", "line 2, column runs: '2.5' is not a count"),
        ("group,setting\0,dataset,accuracy\n", "is a binary file"),
    ],
)  # fmt: skip
def test_what_is_no_table_of_pairs(text: str, message: str) -> None:
    with pytest.raises(ValueError) as error:
        parse_table(text)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_files_that_are_no_text(tmp_path: Path) -> None:
    path = tmp_path / "image.csv"
    path.write_bytes(b"\x89PNG\r\n\x1a\n\x00\x00")
    with pytest.raises(ValueError, match=r"image.csv is not UTF-8 text .*; save it as CSV"):
        read_table(path)
    with pytest.raises(FileNotFoundError):
        read_table(tmp_path / "absent.csv")


@given(st.text(max_size=200))
def test_no_text_raises_anything_else(text: str) -> None:
    for candidate in (text, HEAD + text, GOOD + text):
        with contextlib.suppress(ValueError):
            parse_table(candidate)


# Digits


def slips(*rows: str) -> list[tuple[str, float]]:
    singles = ",single,,a,ARC,69.00,\n,single,,b,ARC,60.00,\n"
    found, _ = find_slips(parse_table(HEAD + singles + "\n".join(rows)))
    return [(slip.label, slip.implied) for slip in found]


@pytest.mark.parametrize(
    ("printed", "found"),
    [
        ("+1.10", False),
        ("+1.11", False),
        ("+1.09", False),
        ("+1.12", True),
        ("-1.10", True),
        ("1.1", False),
        ("+2", True),
    ],
)
def test_a_difference_may_be_off_by_the_rounding_of_three_numbers(printed: str, found: bool) -> None:
    rows = (f"a + b,CE,5,,ARC,70.10,{printed}", "a + b,ME,5,,ARC,70.10,")
    assert slips(*rows) == ([("CE, a + b, k = 5, ARC", float(69 + Decimal(printed)))] if found else [])


def test_the_best_model_is_that_of_the_group_in_its_part_of_the_table() -> None:
    text = """table,group,setting,model,dataset,accuracy,printed_delta
1,,single,a,A,50.0,
1,,single,b,A,40.0,
1,,single,c,A,90.0,
2,,single,a,A,10.0,
1,a + b,CE,,A,52.0,+2.0
1,a + b,ME,,A,53.0,+4.0
2,a,CE,,A,11.0,+1.0
2,a,ME,,A,11.0,+1.0
2,a + b,CE,,A,11.0,+9.0
2,a + b,ME,,A,11.0,+9.0
"""
    found, checked = find_slips(parse_table(text))
    assert [(slip.line, slip.best_model, slip.computed) for slip in found] == [(7, "a", 3.0)]
    assert checked == 4  # b does not stand alone in part 2


@given(st.integers(1, 60), st.integers(0, 1000), st.sampled_from([1, 10]))
def test_attainable_is_what_counting_says(total: int, tenths: int, parts: int) -> None:
    value, slack = Decimal(tenths) / 10, Decimal("0.5") / parts
    counted = any(abs(Fraction(100 * count, total) - Fraction(value)) <= Fraction(slack) for count in range(total + 1))
    assert attainable(value, total, slack=slack) == counted


def test_values_that_no_count_gives() -> None:
    head = "group,setting,k,dataset,accuracy\n"
    table = parse_table(head + "g,CE,1,A,45.1\ng,ME,1,A,45.4\ng,CE,2,A,47.0\ng,ME,2,A,47.1\n")
    (one,) = find_grains(table.entries, lambda entry: (164, 1))
    assert one.unattainable == ("ME, g, k = 1, A: 45.4", "ME, g, k = 2, A: 47.1")
    assert (one.values, one.unless_rounded) == (4, 2)
    assert one.step == pytest.approx(0.61, abs=0.001)
    assert one.chance == pytest.approx(0.836)
    (many,) = find_grains(table.entries, lambda entry: (164, 100))
    assert (many.unattainable, many.chance) == ((), 0.0)
    (runs,) = find_grains(table.entries, lambda entry: (164, 5))
    assert runs.unless_rounded <= len(runs.unattainable)
    assert find_grains(table.entries, lambda entry: None) == ()
