"""Whether this machine is ready: versions, extras, devices, precisions, threads, models, disk; a verdict for each.

`doctor_endpoint` does the same for an inference server. Both give `Check`s, as the preflight of a run does.
"""

from __future__ import annotations

import importlib.metadata
import os
import platform
import shutil
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from me_stats.devices import DTYPES
from me_stats.model_checks import Check
from me_stats.part_cost import GIB
from me_stats.preflight import free_memory

if TYPE_CHECKING:
    from packaging.requirements import Requirement

_NAME = "me-stats"
_LITTLE_MEMORY, _LITTLE_DISK = 2 * GIB, 5 * GIB
_SIDE = 512  # of the matrices that are multiplied
_PURPOSES = {
    "gguf": "me-stats models pull",
    "vocabularies": "me-stats tokenizers",
    "http": "served models",
    "llamacpp": "GGUF models on this machine",
    "lm-eval": "me-stats eval",
    "ray": "runs on many machines",
    "slurm": "runs on a cluster",
}


def look() -> tuple[Check, ...]:
    """All checks of this machine, in about a second; nothing is loaded, pulled or changed.

    >>> found = look()
    >>> [check.name for check in found][:2]
    ['python', 'packages']
    """
    return (python(), *packages(), extras(), threads(), host_memory(), *devices(), *models(), git())


# --- packages -------------------------------------------------------------------------------------------


def python() -> Check:
    """The interpreter against what the package asks for."""
    from packaging.specifiers import SpecifierSet

    wanted, version = importlib.metadata.metadata(_NAME)["Requires-Python"], platform.python_version()
    if not SpecifierSet(wanted).contains(version, prereleases=True):
        return Check("python", "fail", f"{version}, and {wanted} is required", f"use a Python {wanted}")
    return Check("python", "ok", f"{version} ({wanted} is required)")


def packages(version: Callable[[str], str] = importlib.metadata.version) -> list[Check]:
    """What me_stats needs always: one line, and one more for each that is absent or too old."""
    needed = [requirement for extra, requirement in _requirements() if not extra]
    wrong = {one.name: fault for one in needed if (fault := _fault(one, version))}
    good = ", ".join(f"{one.name} {version(one.name)}" for one in needed if one.name not in wrong)
    bad = [
        Check(f"package {one.name}", "fail", wrong[one.name], f'pip install "{one.name}{one.specifier}"')
        for one in needed
        if one.name in wrong
    ]
    return [Check("packages", "ok", good), *bad]


def extras(version: Callable[[str], str] = importlib.metadata.version) -> Check:
    """Which optional parts are here; what is absent is only a warning where it is too old."""
    groups: dict[str, list[Requirement]] = {}
    for extra, requirement in _requirements():
        if extra:
            groups.setdefault(extra, []).append(requirement)
    faults = {extra: [fault for one in group if (fault := _fault(one, version))] for extra, group in groups.items()}
    old = [fault for found in faults.values() for fault in found if "is required" in fault]
    absent = [extra for extra, found in faults.items() if found]
    parts = [f"here: {', '.join(extra for extra in groups if extra not in absent) or 'none'}"]
    if absent:
        parts.append("not here: " + ", ".join(f"{x} ({_PURPOSES[x]})" if x in _PURPOSES else x for x in absent))
    remedy = f'where needed: pip install "{_NAME}[{",".join(absent)}]"' if absent else ""
    return Check("extras", "warn" if old else "ok", "; ".join([*parts, *dict.fromkeys(old)]), remedy)


def _requirements() -> list[tuple[str, Requirement]]:
    """Requirements of the installed package with the extra that each belongs to, ``""`` for all."""
    from packaging.requirements import Requirement

    found = []
    known = importlib.metadata.metadata(_NAME).get_all("Provides-Extra") or []
    for line in importlib.metadata.requires(_NAME) or []:
        one = Requirement(line)
        if one.marker is None or one.marker.evaluate({"extra": ""}):
            found.append(("", one))
        else:
            found += [(extra, one) for extra in known if one.marker.evaluate({"extra": extra})]
    return found


def _fault(one: Requirement, version: Callable[[str], str]) -> str:
    try:
        found = version(one.name)
    except importlib.metadata.PackageNotFoundError:
        return f"{one.name} is not installed"
    return "" if one.specifier.contains(found, prereleases=True) else f"{one.name} {found}, {one.specifier} is required"


# --- machine --------------------------------------------------------------------------------------------


def threads() -> Check:
    """Threads of torch against the cores that this process may use."""
    import torch

    count, cores = torch.get_num_threads(), _cores()
    detail = f"{count} of torch, {cores} cores for this process"
    if count > cores:
        return Check("threads", "warn", f"{detail}: they wait for each other", f"set OMP_NUM_THREADS={cores}")
    if 2 * count <= cores:
        return Check("threads", "ok", detail, f"set OMP_NUM_THREADS={cores} for one large run")
    return Check("threads", "ok", detail)


def _cores() -> int:
    own = getattr(os, "sched_getaffinity", None)
    cores = len(own(0)) if own is not None else os.cpu_count() or 1
    try:
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text(encoding="ascii").split()
        return max(1, min(cores, int(quota) // int(period)))
    except (OSError, ValueError):  # no limit
        return cores


def host_memory(free: Callable[[str], int | None] = free_memory) -> Check:
    """Memory that is free on the host."""
    there = free("cpu")
    if there is None:
        return Check("memory", "warn", "what is free is not known", "see for yourself")
    if there < _LITTLE_MEMORY:
        return Check("memory", "warn", f"{there / GIB:.1f} GiB free", "end other programs, or use small models")
    return Check("memory", "ok", f"{there / GIB:.1f} GiB free")


def devices() -> list[Check]:
    """Each device with its memory, and how fast it multiplies in each precision."""
    import torch

    found = []
    names = ["cpu"]
    if torch.cuda.is_available():
        names += [f"cuda:{index}" for index in range(torch.cuda.device_count())]
    elif Path("/proc/driver/nvidia/version").exists():
        built = f"was built for CUDA {torch.version.cuda}" if torch.version.cuda else "was built without CUDA"
        found.append(
            Check("cuda", "warn", f"a driver is here, but torch {torch.__version__} {built}", "install a torch for it")
        )
    for name in names:
        if name != "cpu":
            free, total = torch.cuda.mem_get_info(name)
            detail = f"{torch.cuda.get_device_name(name)}, {free / GIB:.1f} of {total / GIB:.1f} GiB free"
            little = free < _LITTLE_MEMORY
            remedy = "end other programs on it, or give another --device" if little else ""
            found.append(Check(name, "warn" if little else "ok", detail, remedy))
        found.append(_precisions(name))
    return found


def _precisions(device: str) -> Check:
    rates = {name: _rate(device, name) for name in DTYPES}
    shown = ", ".join(f"{name} {rate / 1e9:.0f}" if rate else f"{name} none" for name, rate in rates.items())
    slow = [name for name, rate in rates.items() if rate < rates["float32"] / 2]
    detail = f"{shown} GFLOP/s"
    if not rates["float32"]:
        return Check(f"dtypes on {device}", "fail", detail, "give another --device")
    remedy = f"choose another --dtype than {' or '.join(slow)}, which is slow here" if slow else ""
    return Check(f"dtypes on {device}", "ok", detail, remedy)


def _rate(device: str, dtype: str) -> float:
    """Operations a second of a product of matrices, the best of three; 0 where there is none."""
    import torch

    try:
        matrix = torch.ones(_SIDE, _SIDE, dtype=DTYPES[dtype], device=device)
        times = []
        for _ in range(4):
            begin = time.perf_counter()
            matrix.mm(matrix)[0, 0].item()  # waits for the device
            times.append(time.perf_counter() - begin)
    except (RuntimeError, AssertionError, NotImplementedError):
        return 0.0
    return float(2 * _SIDE**3 / min(times[1:]))


# --- models and disk ------------------------------------------------------------------------------------


def models() -> list[Check]:
    """The catalog, the folder that models are pulled to, and the space there."""
    from me_stats.models import catalog

    found, folder = [], catalog.cache_folder()
    here, absent, broken, need = [], [], [], 0
    for entry in catalog.CATALOG.values():
        kept = catalog.pulled(entry.name)
        if entry.kind == "bundled":
            broken += [] if kept else [entry.name]
        elif kept:
            here += [f"{entry.name} ({dtype}, {_size(place) / 1e6:.0f} MB)" for dtype, place in kept.items()]
        else:
            absent.append(entry.name)
            need += 2 * entry.size + 4 * entry.parameters
    parts = [f"here: {', '.join(['bundled', *here])}", *([f"not here: {', '.join(absent)}"] if absent else [])]
    remedy = f"where needed: me-stats models pull {' '.join(absent)}" if absent else ""
    found.append(Check("models", "ok", "; ".join(parts), remedy))
    if broken:
        found.append(Check("bundled models", "fail", f"missing: {', '.join(broken)}", f"install {_NAME} again"))
    place = next(path for path in (folder, *folder.parents) if path.exists())
    try:
        with tempfile.TemporaryFile(dir=place):
            pass
        found.append(Check("model folder", "ok", f"{folder} can be written"))
    except OSError as error:
        reason = f"cannot write to {folder}: {error.strerror}"
        found.append(Check("model folder", "warn", reason, "set ME_STATS_CACHE to a folder that you can write"))
    for name, where, least in (("disk of models", place, max(need, _LITTLE_DISK)), ("disk", Path(), _LITTLE_DISK)):
        there = shutil.disk_usage(where).free
        little = there < least
        more = "free some space, or choose another folder" if little else ""
        found.append(Check(name, "warn" if little else "ok", f"{there / GIB:.1f} GiB free", more))
    return found


def _size(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def git() -> Check:
    """The revision that runs of a clone will note."""
    from me_stats.record import environment

    revision = environment()["git"]
    if revision is None:
        return Check("revision", "ok", f"{_NAME} {importlib.metadata.version(_NAME)}, not in a clone")
    if revision["dirty"]:
        return Check("revision", "ok", f"{revision['revision'][:12]}, with changes", "commit what records should name")
    return Check("revision", "ok", revision["revision"][:12])
