"""Questions made of the standard library: what is cut where, and what counts as right."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from me_stats.tasks import stdlib
from me_stats.tasks.stdlib import closes, indents, still_open

CODE = """def read(path, mode="r"):
    with open(join(root, path), mode) as file:
        return [line.strip(" (") for line in file]

x = {"a": (1, 2)}
# not (this, one
"""


@pytest.fixture
def few(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stdlib, "unseen", lambda domain: (CODE, "'''a(b, c)'''\n", "no brackets\n", "f(\n    a, b)\n"))


def _nested(inner: st.SearchStrategy[str]) -> st.SearchStrategy[str]:
    before = st.sampled_from(["a, ", "'('", ""])
    return st.builds(lambda *parts: "{}({})[{}]{{}}".format(*parts), before, inner, inner)


@given(st.recursive(st.just(""), _nested, max_leaves=8))
def test_what_is_balanced_is_closed_and_a_cut_is_not(text: str) -> None:
    assert still_open(text) == ""
    for place in range(len(text)):
        opened = still_open(text[:place])
        if opened is not None:
            assert still_open(text[place:], before=opened) == ""
            assert closes(text[place:] + "\nf((", opened) or not opened
            assert not closes(text[place:] + ")", opened)


@pytest.mark.parametrize(
    ("text", "opened", "right"),
    [
        ("])", "([", True), (")]", "([", False), (", b)", "(", True), (", b", "(", False), ("')')", "(", True),
        ("')", "(", False), (r"'\')')", "(", True), (")  # (", "(", True), ("", "(", False), ("\n)", "(", False),
        ("))", "(", False), (", f(x))", "(", True),
    ],
)  # fmt: skip
def test_brackets_are_closed_in_order(text: str, opened: str, right: bool) -> None:
    assert closes(text, opened) is right


def test_lines_are_cut_within_brackets(few: None) -> None:
    rows = stdlib.bracket_rows()
    assert [(row["prompt"].rpartition("\n")[2], row["target"], row["open"]) for row in rows] == [
        ("    with open(join(root", ", path), mode) as file:", "(("),
        ('        return [line.strip(" ("', ") for line in file]", "[("),
    ]
    for row in rows:
        assert closes(row["target"], row["open"])
        assert CODE.startswith(row["prompt"])


def test_blocks_are_cut_after_their_line(few: None) -> None:
    (row,) = stdlib.indentation_rows()
    assert row["prompt"].endswith("mode) as file:\n")  # the first is too early in its document
    assert row["indent"] == 8
    assert [indents(text, 8) for text in ("        x", "\n \n        x\ny", "    x", "          x", "", "x", "\n")] == [
        True, True, False, False, False, False, False,
    ]  # fmt: skip


def test_prompts_hold_whole_lines() -> None:
    text = "\n".join(f"line {number}" for number in range(200))
    assert stdlib._before(text, 1000).startswith("line ")
    assert 300 < len(stdlib._before(text, 1000)) < 450
    assert stdlib._before(text, 90) == text[:90]


def test_documents_are_those_held_out() -> None:
    stdlib.unseen.cache_clear()
    rows = {name: make() for name, make in (("brackets", stdlib.bracket_rows), ("blocks", stdlib.indentation_rows))}
    assert min(map(len, rows.values())) >= 100
    for row in rows["brackets"]:
        assert closes(row["target"], row["open"])
    for row in rows["blocks"]:
        assert indents(row["target"], row["indent"])
    assert all(0 < len(row["target"]) < 1000 for row in stdlib.text_rows("prose"))
    assert len({row["id"] for row in rows["brackets"]}) == len(rows["brackets"])
