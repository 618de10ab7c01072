"""Read a published table of paired accuracies: one printed number a line, its digits kept as they stand."""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from decimal import Decimal
from pathlib import Path

SINGLE = "single"
"""The setting of a row that gives one model alone."""

_REQUIRED = ("group", "setting", "dataset", "accuracy")
_OPTIONAL = ("table", "k", "model", "printed_delta", "items", "runs")
_NUMBER = re.compile(r"[+-]?[0-9]+(\.[0-9]+)?")
_LONGEST = 12  # digits of a number that a table can hold in earnest


@dataclass(frozen=True)
class Entry:
    """One printed accuracy, in percent, with the line it stands on.

    `group` names an ensemble (``"A + B"``), `model` one model alone; `items` and `runs` are None where the table does
    not give them.
    """

    line: int
    table: str
    group: str
    setting: str
    k: str
    model: str
    dataset: str
    accuracy: Decimal
    printed_delta: Decimal | None = None
    items: int | None = None
    runs: int | None = None

    @property
    def unit(self) -> Decimal:
        """One unit of the last printed digit, in points."""
        return unit(self.accuracy)

    @property
    def label(self) -> str:
        """What the number is of: ``"ME, A + B, k = 5, ARC"``."""
        who = (self.model,) if self.setting == SINGLE else (self.setting, self.group)
        return ", ".join([*who, *([f"k = {self.k}"] if self.k else []), self.dataset])


@dataclass(frozen=True)
class PairedTable:
    """Accuracies of two methods on the same data sets, and of models alone where the table has them."""

    source: str
    methods: tuple[str, str]
    pairs: tuple[tuple[Entry, Entry], ...]
    singles: tuple[Entry, ...]

    @property
    def entries(self) -> tuple[Entry, ...]:
        """All of them, by line."""
        both = [entry for pair in self.pairs for entry in pair]
        return tuple(sorted([*both, *self.singles], key=lambda entry: entry.line))

    @property
    def datasets(self) -> tuple[str, ...]:
        """Data sets of the pairs, in the order of the table."""
        return tuple(dict.fromkeys(first.dataset for first, _ in self.pairs))


def unit(number: Decimal) -> Decimal:
    """One unit of the last digit of a number.

    >>> unit(Decimal("66.70"))
    Decimal('0.01')
    """
    return Decimal(1).scaleb(int(number.as_tuple().exponent))


def read_table(path: str | Path) -> PairedTable:
    """Read a CSV file of `parse_table`; ValueError names file, line and column, OSError if there is no such file."""
    path = Path(path)
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{path.name} is not UTF-8 text ({error.reason} at byte {error.start}); save it as CSV"
        ) from error
    return parse_table(text, source=path.name)


def parse_table(text: str, *, source: str = "table") -> PairedTable:
    """Pair the accuracies of two methods.

    The first line names the columns: `group`, `setting`, `dataset` and `accuracy` (percent), and where there are such
    `table`, `k`, `model`, `printed_delta`, `items` and `runs`. One line is one printed number. `setting` is the method,
    or ``single`` for a model alone, whose name stands in `model`. The two methods are told apart in the order in which
    they first appear: differences are second minus first. Digits are kept as printed, so 66.70 is not 66.7.

    Raises
    ------
    ValueError
        With line and column: a column that is unknown or missing, a number that is none or lies outside 0..100, a cell
        that stands there twice, a cell with one method only, methods that are not two.

    >>> table = parse_table("group,setting,dataset,accuracy\\nA + B,CE,ARC,78.70\\nA + B,ME,ARC,80.06\\n")
    >>> table.methods, len(table.pairs), table.pairs[0][1].accuracy
    (('CE', 'ME'), 1, Decimal('80.06'))
    """
    if "\0" in text:
        raise ValueError(f"{source} is a binary file, not CSV text")
    reader = csv.reader(io.StringIO(text, newline=""), strict=True)
    try:
        lines = [(reader.line_num, [cell.strip() for cell in row]) for row in reader]
    except csv.Error as error:
        raise ValueError(f"{source}, line {reader.line_num}: {error}; is it CSV?") from error
    lines = [(number, row) for number, row in lines if any(row)]
    if not lines:
        raise ValueError(f"{source} is empty; its first line names the columns {', '.join(_REQUIRED)}")
    columns = _columns(source, lines[0][1])
    entries = [_entry(source, number, columns, row) for number, row in lines[1:]]
    return _paired(source, entries)


def counts_of(
    table: PairedTable, items: Mapping[str, int], runs: int | None
) -> Callable[[Entry], tuple[int, int] | None]:
    """(items, runs) behind each entry, from its line or from what is given; None for a model alone without them.

    ValueError for a pair without counts or with two, for a count given that contradicts the table, and for items of a
    data set that the table does not have.
    """
    given = [(f"items of {name}", count) for name, count in items.items()]
    for what, number in [*given, *([("runs", runs)] if runs is not None else [])]:
        if isinstance(number, bool) or not isinstance(number, int) or number < 1:
            raise ValueError(f"{what}: needs a whole count of at least 1, got {number!r}")
    unknown = sorted(set(items) - {entry.dataset for entry in table.entries})
    if unknown:
        raise ValueError(f"items: no data set {unknown[0]!r} in {table.source}; it has {', '.join(table.datasets)}")
    for entry in table.entries:
        for column, count in (("items", items.get(entry.dataset)), ("runs", runs)):
            own = getattr(entry, column)
            if own is not None and count is not None and own != count:
                raise ValueError(f"{table.source}, line {entry.line}, column {column}: {own}, and {count} is given")

    def size(entry: Entry) -> tuple[int, int] | None:
        n, r = entry.items or items.get(entry.dataset), entry.runs or runs
        return None if n is None or r is None else (n, r)

    for pair in table.pairs:
        for entry in pair:
            if entry.items is None and entry.dataset not in items:
                raise ValueError(f"how many items has {entry.dataset}? Give {entry.dataset}=COUNT or a column 'items'")
            if size(entry) is None:
                raise ValueError(
                    f"how many runs is a number of {table.source} the mean of? Give runs or a column 'runs'"
                )
        if size(pair[0]) != size(pair[1]):
            raise ValueError(f"{table.source}, line {pair[1].line}: {pair[1].label} has not the counts of its pair")
    return size


def _columns(source: str, names: Sequence[str]) -> list[str]:
    columns = [name.lower() for name in names]
    if len(columns) == 1 and re.search(r"[;\t]", columns[0]):
        raise ValueError(f"{source}, line 1: columns are not separated by commas; save it as comma-separated values")
    for name in columns:
        if name not in (*_REQUIRED, *_OPTIONAL):
            known = ", ".join((*_REQUIRED, *_OPTIONAL))
            raise ValueError(f"{source}, line 1: unknown column {name[:40]!r}; columns are {known}")
        if columns.count(name) > 1:
            raise ValueError(f"{source}, line 1: two columns are called {name!r}")
    missing = [name for name in _REQUIRED if name not in columns]
    if missing:
        raise ValueError(f"{source}, line 1: no column {missing[0]!r}; a table needs {', '.join(_REQUIRED)}")
    return columns


def _entry(source: str, line: int, columns: Sequence[str], row: Sequence[str]) -> Entry:
    if len(row) != len(columns):
        hint = "; write decimals with a point, not a comma" if len(row) > len(columns) else ""
        raise ValueError(f"{source}, line {line}: {len(row)} fields for {len(columns)} columns{hint}")
    cells = dict.fromkeys(_OPTIONAL, "") | dict(zip(columns, row, strict=True))
    for name in ("setting", "dataset", "accuracy", "model" if cells["setting"] == SINGLE else "group"):
        if not cells[name]:
            raise ValueError(f"{source}, line {line}, column {name}: nothing there")
    accuracy = _number(source, line, "accuracy", cells["accuracy"])
    if not 0 <= accuracy <= 100:
        raise ValueError(f"{source}, line {line}, column accuracy: {accuracy} lies outside 0 to 100 percent")
    delta = cells["printed_delta"]
    return Entry(
        line=line,
        **{name: cells[name] for name in ("table", "group", "setting", "k", "model", "dataset")},
        accuracy=accuracy,
        printed_delta=_number(source, line, "printed_delta", delta) if delta else None,
        items=_count(source, line, "items", cells["items"]),
        runs=_count(source, line, "runs", cells["runs"]),
    )


def _number(source: str, line: int, column: str, text: str) -> Decimal:
    plain = text.replace("−", "-")  # as PDFs print it
    if not _NUMBER.fullmatch(plain) or len(plain) > _LONGEST:
        hint = ""
        if "%" in text:
            hint = "; leave the percent sign out"
        elif "," in text:
            hint = "; write decimals with a point"
        raise ValueError(f"{source}, line {line}, column {column}: {text[:40]!r} is not a number{hint}")
    return Decimal(plain)


def _count(source: str, line: int, column: str, text: str) -> int | None:
    if not text:
        return None
    if not re.fullmatch(r"[0-9]{1,12}", text) or int(text) == 0:
        raise ValueError(f"{source}, line {line}, column {column}: {text[:40]!r} is not a count of at least 1")
    return int(text)


def _paired(source: str, entries: Sequence[Entry]) -> PairedTable:
    seen: dict[tuple[str, ...], Entry] = {}
    for entry in entries:
        key = (entry.table, entry.group, entry.k, entry.dataset, entry.setting, entry.model)
        if key in seen:
            raise ValueError(f"{source}, line {entry.line}: {entry.label} stands on line {seen[key].line} already")
        seen[key] = entry
    methods = tuple(dict.fromkeys(entry.setting for entry in entries if entry.setting != SINGLE))
    if len(methods) != 2:
        names = ", ".join(methods[:5]) or "none"
        raise ValueError(
            f"{source}, column setting: a table of pairs has two methods besides {SINGLE!r}, found {names}"
        )
    cells: dict[tuple[str, ...], dict[str, Entry]] = {}
    for entry in entries:
        if entry.setting != SINGLE:
            place = (entry.table, entry.group, entry.k, entry.dataset)
            cell = cells.setdefault(place, {})
            if entry.setting in cell:  # two lines that differ in the name of a model alone
                raise ValueError(
                    f"{source}, line {entry.line}: {entry.label} stands on line {cell[entry.setting].line}"
                )
            cell[entry.setting] = entry
    for cell in cells.values():
        if len(cell) == 1:
            (entry,) = cell.values()
            other = methods[1 - methods.index(entry.setting)]
            raise ValueError(f"{source}, line {entry.line}: {entry.label} has no {other} to compare with")
    if all(entry.accuracy <= 1 for entry in entries):
        raise ValueError(f"{source}, column accuracy: no value is above 1; give percent, not shares")
    pairs = tuple((cell[methods[0]], cell[methods[1]]) for cell in cells.values())
    singles = tuple(entry for entry in entries if entry.setting == SINGLE)
    return PairedTable(source, (methods[0], methods[1]), pairs, singles)
