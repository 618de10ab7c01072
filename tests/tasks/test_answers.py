"""What a text answers: a known answer in many styles is found, and what is no answer is none."""

from __future__ import annotations

from decimal import Decimal

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from me_stats.tasks.answers import letter, number, phrase, same_phrase

NUMBER_STYLES = (
    "{}", " {}.", "${}", "The answer is {}.", "So the answer is ${}.\n", "3 + 4 = 7 apples. The answer is: {} apples.",
    "#### {}", "the answer is **{}**", "Answer: {}", "We get \\boxed{{{}}} as asked.", "He has 5 left.\nSo it is {}",
    "The answer is 2 * 3 = {}.", "The answer is 3. No, the answer is {}.", "1. First 2 + 2.\n2. Then\n#### {}\n",
    "The final answer is {} (because 3 of 4 are left).", "In total: {} dollars.",
)  # fmt: skip
LETTER_STYLES = (
    "{}", " {}", "({})", "{}.", "{})", "{}: because", "{}. A thing of 2 parts", " {}\n\nQuestion: Which?", "[{}]",
    "The answer is {}", "The answer is {}.", "the correct answer is ({}).", "Answer: {}", "**{}**", "**{}.** A thing",
    "The correct answer is option {}.", "The answer is\n{}", "\\boxed{{{}}}", "I would choose {}.",
    "Let me see. A planet is no star, so the answer is {}.", "The best answer is {} because it is so.", "`{}`",
    "(A) is wrong and (B) is wrong. Therefore the answer is ({}).", "The answer would be {}, I think.", '"{}"',
    "It is hard to say.\nFinal Answer: {}", "The answer is **{}**",
)  # fmt: skip
LOWER_STYLES = (
    "{}",
    "({})",
    "{}.",
    "{})",
    "the answer is {}",
    "the answer is ({}).",
    "answer: {}.",
    "the answer is {}.",
)


@given(st.integers(-(10**9), 10**9), st.sampled_from(NUMBER_STYLES), st.booleans(), st.sampled_from(["", ".0", ".00"]))
@example(0, "{}", False, "")
def test_a_number_is_found_in_every_style(value: int, style: str, commas: bool, zeros: str) -> None:
    shown = f"{abs(value):,}" if commas else str(abs(value))
    if value < 0 and "${}" in style:
        style = style.replace("${}", "-${}")
        sign = ""
    else:
        sign = "-" if value < 0 else ""
    assert number(style.format(sign + shown + zeros)) == value


def test_a_minus_between_numbers_is_no_sign() -> None:
    assert number("12-5") == 5
    assert number("(3)-4") == 4
    assert number("it falls to −7") == -7
    assert number("2.5 of 3,000.25 ") == Decimal("3000.25")
    assert number("ids 1,2,3") == 3


@pytest.mark.parametrize("text", ["", "no number", "####", "The answer is", "\\boxed{x}", "$", "-", "#### none\n"])
def test_no_number_is_none(text: str) -> None:
    assert number(text) is None


@given(st.sampled_from("ABCD"), st.sampled_from(LETTER_STYLES))
def test_a_letter_is_found_in_every_style(label: str, style: str) -> None:
    assert letter(style.format(label)) == label


@given(st.sampled_from("ABCDE"), st.sampled_from(LOWER_STYLES))
def test_a_lower_case_letter_is_found(label: str, style: str) -> None:
    assert letter(style.format(label.lower()), "ABCDE") == label


@pytest.mark.parametrize(
    "text",
    [
        "", "A planet", " A planet that turns.", "A star is bright", "The answer is a planet.", "a dog",
        "Because of it", "It is a bird.", "The answer is A planet", "Dogs bark", "Either",
        "B-12 is a vitamin in both (A) and (C)", "The answer is not clear", "E", "The answer is F.", "Bats and cats",
        "A lot depends", "Answers vary",
        "b12", "So it is not to choose D. The answer is F.", "a.m. or p.m.", "A's are good", "CAD", "?", "I think so",
        "A. one\nB. two\nC. three\nD. four",
    ],
)  # fmt: skip
def test_a_word_is_no_letter(text: str) -> None:
    # The last one lists the options and chooses none; what stands at the start is taken, as of a bare "A. one".
    assert letter(text) == ("A" if text.startswith("A. one") else None)


def test_the_last_word_counts_and_a_letter_at_the_start_stands() -> None:
    assert letter("The answer is A. Wait: the answer is B.") == "B"
    assert letter("C. The option D is wrong") == "C"
    assert letter("C. Yet after all the answer is D.") == "D"
    assert letter("Only (B) fits, (B) is it") == "B"
    assert letter("both (B) and (C)") is None
    assert letter("The answer is e.", "ABCDE") == "E"


@given(st.text(max_size=60))
def test_no_text_is_an_error(text: str) -> None:
    found = letter(text)
    assert found is None or found in "ABCD"
    assert number(text) is None or isinstance(number(text), Decimal)
    for target in ("(B)", "True", "12", "] )", "a b"):
        assert isinstance(same_phrase(text, target), bool)
    said = phrase(text)
    assert said is None or said


PHRASE_STYLES = (
    "So the answer is {}.", "Let us see.\n1 + 1. So the answer is {}.\n\nQ: and", "the answer is: {}", "Answer: {}.",
    "**Answer:** {}", "Not yet. The answer is no thing. So the answer is {}.", "{}", "It is so.\n{}.",
)  # fmt: skip


@given(
    st.sampled_from(["True", "No", "valid", "(B)", "(K)", "-35", "1203", "] ] }", "> )", "barn damp delmarva it&t"]),
    st.sampled_from(PHRASE_STYLES),
)
def test_a_phrase_is_found_in_every_style(target: str, style: str) -> None:
    assert same_phrase(style.format(target), target)
    assert same_phrase(style.format(target.casefold()), target)


@pytest.mark.parametrize(
    ("text", "target", "same"),
    [
        ("the answer is (B).", "(B)", True), ("the answer is B", "(B)", True), ("the answer is (A).", "(B)", False),
        ("the answer is True", "False", False), ("It is True", "True", False), ("the answer is 1,203.", "1203", True),
        ("the answer is ]]}", "] ] }", True), ("the answer is ] }", "] ] }", False),
        ("the answer is barn, damp.", "barn damp", True), ("", "True", False), ("the answer is", "True", False),
        ("the answer is 24", "2", False), ("So the answer is invalid.", "valid", False),
        ("the answer is True and the answer is False", "True", False),
    ],
)  # fmt: skip
def test_a_phrase_is_the_target_or_not(text: str, target: str, same: bool) -> None:
    assert same_phrase(text, target) is same
