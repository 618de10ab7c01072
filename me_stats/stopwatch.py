"""Seconds, memory and energy of a piece of work, on a CPU or an accelerator."""

from __future__ import annotations

import contextlib
import importlib
import math
import platform
import time
import warnings
from pathlib import Path
from typing import Any

import torch

from me_stats.report import count


class Stopwatch:
    """Times what runs between `start` and `stop`; work queued on CUDA before `start` does not count.

    >>> watch = Stopwatch("cpu")
    >>> watch.start()
    >>> seconds, memory, joules = watch.stop()
    >>> seconds >= 0, memory
    (True, 0)
    """

    def __init__(self, device: torch.device | str) -> None:
        self.device = torch.device(device)
        self.is_cuda = self.device.type == "cuda"
        self._energy = _energy_meter(self.device) if self.is_cuda else None
        self._begin, self._joules = 0.0, math.nan
        self._events: tuple[Any, Any] | None = None

    def start(self) -> None:
        if self.is_cuda:
            torch.cuda.synchronize(self.device)
            torch.cuda.reset_peak_memory_stats(self.device)
            self._joules = self._energy() if self._energy is not None else math.nan
            self._events = (torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True))
            self._events[0].record(torch.cuda.current_stream(self.device))
        else:
            self._begin = time.perf_counter()

    def stop(self) -> tuple[float, int, float]:
        """Seconds, peak bytes that torch held on the accelerator (0 on a CPU), and joules (NaN where unknown)."""
        if self._events is None:
            return time.perf_counter() - self._begin, 0, math.nan
        self._events[1].record(torch.cuda.current_stream(self.device))
        torch.cuda.synchronize(self.device)
        joules = self._energy() - self._joules if self._energy is not None else math.nan
        seconds = self._events[0].elapsed_time(self._events[1]) / 1000
        return seconds, int(torch.cuda.max_memory_allocated(self.device)), joules


def _energy_meter(device: torch.device) -> Any:
    """A function that returns the joules that the device has used; None where nobody can say."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # an old name of the package warns of its new one
            pynvml = importlib.import_module("pynvml")
        pynvml.nvmlInit()
        handle = pynvml.nvmlDeviceGetHandleByUUID(f"GPU-{torch.cuda.get_device_properties(device).uuid}")
        pynvml.nvmlDeviceGetTotalEnergyConsumption(handle)
    except Exception:  # no package, no driver, no right to ask, or a device that does not count
        return None
    return lambda: pynvml.nvmlDeviceGetTotalEnergyConsumption(handle) / 1000


def machine_name(device: torch.device | str = "cpu") -> str:
    """What the speeds belong to: the accelerator's name, or the processor's and the threads that torch uses."""
    if torch.device(device).type == "cuda":
        return str(torch.cuda.get_device_name(device))
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return f"{line.partition(':')[2].strip()}, {count(torch.get_num_threads(), 'thread')}"
    return f"{platform.processor() or platform.machine()}, {count(torch.get_num_threads(), 'thread')}"
