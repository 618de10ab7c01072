"""What a generated text answers: a number, a letter or a phrase; None where it answers nothing that can be read.

Each function reads a text of any kind and raises nothing. A text that answers twice is taken by its last word, except
that a letter at the very start stands unless "the answer is ..." follows it.
"""

from __future__ import annotations

import re
from decimal import Decimal

_NUMBER = re.compile(
    r"(?:(?<![\w)\]])(?P<sign>[-−–])\s?\$?)?"  # "12-5" is no negative number
    r"(?P<digits>[0-9]{1,3}(?:,[0-9]{3})+(?![0-9])|[0-9]+)(?P<rest>\.[0-9]+)?"
)
_SAYS = r"answer\b[\s*_]*(?:is|was|are|would be|will be|should be|must be|[:=])"
_SAYS_NUMBER = (re.compile(r"####"), re.compile(r"\\boxed\b"), re.compile(_SAYS, re.IGNORECASE))
_SENTENCE = re.compile(r"\.(?=\s|$)|\n")
_WORDS = r"because|since|is|due"  # what may follow a letter A that is no article


def number(text: str) -> Decimal | None:
    r"""The number that a text ends up with: after ``####``, ``\boxed``, or "the answer is", else its last one.

    >>> number("9 * 2 = 18. The answer is $1,018.00."), number("So 3 + 4 = 7, and 7 - 9 = -2"), number("none")
    (Decimal('1018.00'), Decimal('-2'), None)
    """
    text = text.replace("{,}", ",")
    for phrase in _SAYS_NUMBER:
        places = [found.end() for found in phrase.finditer(text)]
        if places:
            sentence = _SENTENCE.split(text[places[-1] :].lstrip(), maxsplit=1)[0]
            # "The answer is 3 * 4 = 12": what comes after the last sign of equality is meant.
            for part in (sentence.rpartition("=")[2], sentence):
                if (found := _NUMBER.search(part)) is not None:
                    return _decimal(found)
    numbers = list(_NUMBER.finditer(text))
    return _decimal(numbers[-1]) if numbers else None


def letter(text: str, labels: str = "ABCD") -> str | None:
    """The option that a text chooses, as one of the upper-case `labels`.

    An article is no option, so a bare "A" counts only where nothing that could be its noun comes after it.

    >>> [letter(text) for text in (" B", "(c)", "d. Because", "The answer is A.", "A planet", "A", "It is a dog")]
    ['B', 'C', 'D', 'A', None, 'A', None]
    """
    # "The answer is F" chooses none of A to D, and leaves what else stands in the text unread.
    letters = "".join(dict.fromkeys("ABCDEFGH" + labels))
    big, small, either = f"[{letters}]", f"[{letters.lower()}]", f"[{letters}{letters.lower()}]"
    no_article = "".join(label for label in letters if label not in "AI")
    marked = rf"[(\[]\s*({either})\s*[)\]]|\*\*\s*({big})\s*[.):]?\s*\*\*|\\boxed\{{\W*(?:text\{{\W*)?({either})\W*\}}"
    closed = rf"({either})(?![\w'’])(?=[\s*_`\"'$]*(?:[.):,;*}}]|\n|$))(?!\.\w)"
    bare = rf"([{no_article}])(?=\s|/)|({big})(?=\s+(?:{_WORDS}|[-–—(])(?:\s|\W))"
    after = rf"([{no_article.lower()}])(?=\s)|({small})(?=\s+(?:because|since)\b)"
    start = r"[\s*_`\"'$]*"
    option = rf"(?:(?:the|option|choice|letter)\b\s*:?\s*)*{start}"
    patterns = (
        rf"(?i:{_SAYS}\s*:?\s*{option})(?:{marked}|{closed}|{bare}|{after})",
        rf"\A{start}(?:{marked}|{closed}|{bare})",
        rf"(?i:(?<!not )(?<!n't )(?<!not to )\b(?:option|choice|choose|select|pick|is)\b\s*:?\s*)"
        rf"{start}(?:{marked}|(?!{small}){closed}|{bare})",
    )
    for pattern in patterns:
        found = list(re.finditer(pattern, text))
        if found:
            return _among(labels, _group(found[-1]))
    everywhere = {_group(found) for found in re.finditer(rf"{marked}|(?m:^\s*)(?!{small}){closed}", text)}
    return _among(labels, everywhere.pop()) if len(everywhere) == 1 else None


def phrase(text: str) -> str | None:
    """What comes after the last "the answer is", up to the end of the sentence; without one, the last line.

    >>> phrase("Not so. So the answer is False."), phrase("Let us see.\\nvalid"), phrase(" ")
    ('False', 'valid', None)
    """
    places = [found.end() for found in re.finditer(_SAYS, text, re.IGNORECASE)]
    if places:
        said = _SENTENCE.split(text[places[-1] :].strip(" \t\n:*"), maxsplit=1)[0]
    else:
        said = text.strip().rpartition("\n")[2]
    return said.strip(" \t*_`\"'.$:") or None


def same_phrase(text: str, target: str) -> bool:
    """Whether a text answers with `target`: a letter ``"(B)"``, a number, brackets, or words in any case.

    >>> [same_phrase(*pair) for pair in (("the answer is b.", "(B)"), ("So the answer is ]] }.", "] ] }"))]
    [True, True]
    """
    option = re.fullmatch(r"\(([A-Z])\)", target.strip())
    if option is not None:
        return letter(text, "ABCDEFGHIJKLMNOPQRSTUVWXYZ") == option[1]
    said = phrase(text)
    if said is None:
        return False
    mine, its = (_NUMBER.fullmatch(part.strip()) for part in (said, target))
    if mine is not None and its is not None:
        return _decimal(mine) == _decimal(its)
    return _plain(said) == _plain(target)


def _plain(text: str) -> str:
    joint = "" if not re.search(r"\w", text) else " "  # brackets alone: spaces between them say nothing
    return joint.join(text.casefold().replace(",", " ").strip(" .\"'`*").split())


def _decimal(found: re.Match[str]) -> Decimal:
    value = Decimal(found["digits"].replace(",", "") + (found["rest"] or ""))
    return -value if found["sign"] else value


def _among(labels: str, chosen: str) -> str | None:
    return chosen if chosen in labels else None


def _group(found: re.Match[str]) -> str:
    return next(part for part in found.groups() if part is not None).upper()
