"""Questions that come with every Python: code and prose of the standard library that the bundled models never saw.

The bundled byte-level models complete texts and answer no questions, so these tasks ask for what a completion shows:
whether brackets are closed, whether a block is indented, how many bits a byte costs.
"""

from __future__ import annotations

import re
from functools import cache
from itertools import pairwise
from typing import Any

from me_stats.scripts import load

_PAIRS = {")": "(", "]": "[", "}": "{"}
_CONTEXT = 400  # characters before what is to be completed
_LEAST = 40  # characters before a block, for a model to see how the code is written
_TEXT = 400  # characters that are scored, to the end of their line
_BLOCK = re.compile(r"( *)(?:async |def |class |if |elif |else|for |while |try|except|finally|with )[^#]*:")


@cache
def unseen(domain: str) -> tuple[str, ...]:
    """Documents of the standard library, of the domain ``"code"`` or ``"prose"``, held out of the training."""
    return tuple(document.decode() for document in load("experiments", "train_siblings").held_out()[domain])


def still_open(text: str, before: str = "") -> str | None:
    """The brackets that are open after a piece of Python, those open `before` it included.

    Strings and comments are read over. None where a bracket closes another one, or a string does not end on its line.

    >>> still_open("f(a, [b"), still_open("])", before="(["), still_open("(]"), still_open("g('(', x) # (")
    ('([', '', None, '')
    """
    stack, quote, place = list(before), "", 0
    while place < len(text):
        char = text[place]
        if quote:
            if char == "\\":
                place += 1
            elif char == "\n":
                return None
            elif char == quote:
                quote = ""
        elif char in "\"'":
            quote = char
        elif char == "#":
            end = text.find("\n", place)
            place = len(text) if end < 0 else end
        elif char in "([{":
            stack.append(char)
        elif char in _PAIRS and (not stack or stack.pop() != _PAIRS[char]):
            return None
        place += 1
    return None if quote else "".join(stack)


def bracket_rows() -> list[dict[str, Any]]:
    """Code that stops after an argument within brackets; at most two cuts of a document, the deepest ones."""
    rows = []
    for number, document in enumerate(unseen("code")):
        cuts = sorted(_cuts(document), key=lambda cut: (-len(cut[1]), cut[0]))
        taken = {document.rfind("\n", 0, place): (place, opened) for place, opened in reversed(cuts)}
        for place, opened in sorted(taken.values(), key=lambda cut: (-len(cut[1]), cut[0]))[:2]:
            end = document.find("\n", place)
            rows.append({"id": f"{number}:{place}", "prompt": _before(document, place),
                         "target": document[place : end if end >= 0 else None], "open": opened})  # fmt: skip
    return rows


def closes(text: str, opened: str) -> bool:
    """Whether the first line of `text` closes all that is open, in the right order."""
    return still_open(text.partition("\n")[0], before=opened) == ""


def indentation_rows() -> list[dict[str, Any]]:
    """Code that stops after the line that opens a block; at most three of a document."""
    rows = []
    for number, document in enumerate(unseen("code")):
        lines, place, found = document.split("\n"), 0, 0
        for line, following in pairwise(lines):
            place += len(line) + 1
            opened = _BLOCK.fullmatch(line)
            step = _indent(following) - _indent(line)
            if opened and following.strip() and 0 < step <= 8 and place > _LEAST and found < 3:
                found += 1
                rows.append({"id": f"{number}:{place}", "prompt": _before(document, place), "target": following,
                             "indent": _indent(line) + step})  # fmt: skip
    return rows


def indents(text: str, indent: int) -> bool:
    """Whether the first line of `text` that is not blank starts after exactly `indent` spaces."""
    line = next((line for line in text.split("\n") if line.strip()), "")
    return bool(line) and _indent(line) == indent


def text_rows(domain: str) -> list[dict[str, Any]]:
    """The first lines of documents, to be scored."""
    return [{"id": f"{domain}:{number}", "prompt": "", "target": text[: text.find("\n", _TEXT) + 1 or None]}
            for number, text in enumerate(unseen(domain))]  # fmt: skip


def _cuts(document: str) -> list[tuple[int, str]]:
    """Places before a comma or a closing bracket, after which a line closes what it opened itself."""
    if '"""' in document or "'''" in document or "\\\n" in document:
        return []
    cuts, start, above = [], 0, ""
    for line in document.split("\n"):
        stack = still_open(line, before=above)
        if above == "" and stack == "":
            for place in range(1, len(line)):
                opened = still_open(line[:place]) if line[place] in ",)]}" and line[place - 1] not in "([{," else ""
                if opened:
                    cuts.append((start + place, opened))
        if stack is None:
            return cuts
        above, start = stack, start + len(line) + 1
    return cuts


def _before(document: str, place: int) -> str:
    begin = document.rfind("\n", 0, max(0, place - _CONTEXT)) + 1 if place > _CONTEXT else 0
    return document[begin:place]


def _indent(line: str) -> int:
    return len(line) - len(line.lstrip(" "))
