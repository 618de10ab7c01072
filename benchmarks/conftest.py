"""Ratios of two times taken in turn, kept in `ratios.json` and compared with it.

`pytest benchmarks` measures and compares, `pytest benchmarks --store` measures and stores. A time depends on the
machine; how it compares with reading the same memory, or with the code that it replaces, much less so.
"""

from __future__ import annotations

import datetime
import json
import platform
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import pytest
import torch

STORED = Path(__file__).with_name("ratios.json")
WORSE = 1.5  # a ratio that grew by more than this fails; other programs on the machine move it by less
ROUNDS = 9  # the second and the eighth of nine hold the median between them with 96%, the ends of five with 94%

Ratio = Callable[..., float]
MEASURED = pytest.StashKey[dict[str, dict[str, float]]]()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--store", action="store_true", help="write the measured ratios to benchmarks/ratios.json")


@pytest.fixture
def ratio(benchmark: Any, request: pytest.FixtureRequest) -> Ratio:
    """``ratio(thing, reference)``: median over rounds of the time of `thing` over that of `reference`, in turn."""

    def measure(thing: Callable[[], Any], reference: Callable[[], Any], *, rounds: int = ROUNDS) -> float:
        references: list[float] = []

        def time_the_reference() -> None:
            started = time.perf_counter()
            reference()
            references.append(time.perf_counter() - started)

        thing()
        reference()
        benchmark.pedantic(thing, setup=time_the_reference, rounds=rounds)
        quotients = sorted((np.array(benchmark.stats.stats.data) / np.array(references)).tolist())
        trim = int(rounds >= ROUNDS)
        found = {"ratio": median(quotients), "low": quotients[trim], "high": quotients[-1 - trim], "rounds": rounds}
        request.config.stash.setdefault(MEASURED, {})[request.node.name.removeprefix("test_")] = found
        return median(quotients)

    return measure


def worse(measured: dict[str, dict[str, float]], stored: dict[str, dict[str, float]]) -> list[str]:
    """Names whose whole interval lies above `WORSE` times the stored ratio."""
    return [name for name, new in measured.items() if name in stored and new["low"] > WORSE * stored[name]["ratio"]]


def pytest_sessionfinish(session: pytest.Session) -> None:
    measured = session.config.stash.get(MEASURED, {})
    if not measured:
        return
    old = json.loads(STORED.read_text()) if STORED.exists() else {"ratios": {}}
    if session.config.getoption("--store"):
        STORED.write_text(
            json.dumps({**_machine(), "ratios": {**old["ratios"], **_rounded(measured)}}, indent=2) + "\n"
        )
    elif worse(measured, old["ratios"]):
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    measured = config.stash.get(MEASURED, {})
    old = json.loads(STORED.read_text())["ratios"] if STORED.exists() else {}
    for name, new in measured.items():
        stored = f"stored {old[name]['ratio']:8.3g}" if name in old else "not stored     "
        verdict = "WORSE" if worse({name: new}, old) else ""
        interval = f"[{new['low']:.3g}, {new['high']:.3g}]"
        terminalreporter.write_line(f"{name:44} {new['ratio']:8.3g} {interval:18} {stored} {verdict}")


def _rounded(measured: dict[str, dict[str, float]]) -> dict[str, dict[str, float]]:
    return {
        name: {**{key: float(f"{value:.3g}") for key, value in found.items()}, "rounds": int(found["rounds"])}
        for name, found in measured.items()
    }


def _machine() -> dict[str, Any]:
    return {
        "date": datetime.date.today().isoformat(),
        "machine": f"{platform.machine()} with {torch.backends.cpu.get_cpu_capability()}",
        "threads": torch.get_num_threads(),
        "torch": torch.__version__.split("+")[0],
    }
