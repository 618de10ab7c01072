"""What can fail in a run, looked at before its first forward: files, tokenizers, memory, disk, packages, data.

A 7-billion model takes minutes to load, and a run of several hours ends at whatever was forgotten. `check` opens
configs, tokenizers and the headers of weights, and asks the machine; it runs no forward and loads no weights.
"""

from __future__ import annotations

import importlib.util
import shutil
import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING

from me_stats.devices import device_fault, torch_dtype
from me_stats.model_checks import Check, OpenModel, Status, open_model, to_pull, vocabularies
from me_stats.part_cost import GIB, PROMPT, Forecast, ModelSize, forecast, machine_of, runs_of
from me_stats.tokenizer_sources import label_of

if TYPE_CHECKING:
    from rich.table import Table

    from me_stats.groups import Group
    from me_stats.plans import Part

_RECORD_BYTES = 300 << 20  # records, figures and kept work of a run
# Extras of the package that experiments import when they run, and what they are needed for.
_EXTRAS = {"accuracy": ("lm_eval", "lm-eval")}


@dataclass(frozen=True)
class Preflight:
    """All checks of a run and the forecast of its parts; `assumed` is the machine that the forecast is for."""

    checks: tuple[Check, ...]
    forecasts: tuple[Forecast, ...]
    assumed: str

    @property
    def passed(self) -> bool:
        """Whether nothing failed; a run may start."""
        return all(check.status != "fail" for check in self.checks)

    def require_passed(self) -> None:
        """ValueError that names what failed, with its remedy."""
        failed = [check for check in self.checks if check.status == "fail"]
        if failed:
            lines = "; ".join(f"{check.name}: {check.detail} ({check.remedy})" for check in failed)
            raise ValueError(f"{len(failed)} of {len(self.checks)} checks failed before the first forward: {lines}")


def check(
    parts: Sequence[Part],
    *,
    device: str,
    dtype: str,
    out: Path,
    group: Group | None = None,
    data: Path | None = None,
    free: Callable[[str], int | None] | None = None,
) -> Preflight:
    """Look at everything that `parts` need on this machine. Bad news are checks, not errors.

    Parameters
    ----------
    parts
        Of any run (`plans.plan`); models are those in their configs.
    device, dtype
        As the run was asked for.
    out
        Folder of the run's records.
    group
        For its revisions, and for the shapes of models that are not here yet.
    data
        Folder of the benchmarks' files, as the accuracy part takes it.
    free
        Free bytes of a device, ``"cpu"`` for the host, None where that is not known; default `free_memory`.
    """
    checks = [_device(device), _precision(device, dtype)]
    present = checks[0].status == "ok"
    opened: dict[str, OpenModel] = {}
    sets = [tuple(getattr(part.config, "models", ())) for part in parts]
    revisions = dict(zip(group.models, group.revisions, strict=True)) if group and group.revisions else {}
    chat = group is not None and group.prompts == "chat"
    for name in dict.fromkeys(name for names in sets for name in names):
        opened[name], seen = open_model(name, revision=revisions.get(name, ""), alone=(name,) in sets, chat=chat)
        checks += seen
    checks += [*vocabularies(parts, opened), *_windows(parts, opened)]
    sizes = {name: ModelSize.of(one.network) for name, one in opened.items() if one.network is not None}
    if group and group.shapes:  # known without a file
        for name, shape in zip(group.models, group.shapes, strict=True):
            if name in opened and name not in sizes:
                sizes[name] = ModelSize.of(open_model(f"random:{shape}")[0].network)
    hardware, assumed = machine_of(device)
    kind = device.partition(":")[0]
    forecasts = [
        forecast(part, sizes, hardware, kind=kind, aligned=len({opened[name].vocabulary for name in names}) > 1)
        for part, names in zip(parts, sets, strict=True)
    ]
    checks += _memory(forecasts, device if present else None, free or free_memory)
    checks += [_folder(out), _disk("disk for records", out, _RECORD_BYTES), *_downloads(opened)]
    checks += [*_extras(parts, opened), *_data(parts, data)]
    return Preflight(tuple(checks), tuple(forecasts), assumed)


def table(checks: Iterable[Check]) -> Table:
    """The checks as a table for a terminal."""
    from rich.markup import escape
    from rich.table import Column, Table

    marks = {"ok": "[green]✓[/]", "warn": "[yellow]![/]", "fail": "[bold red]✗[/]"}
    name = Column("Check", overflow="fold")
    shown = Table("", name, "Finding", "What to do", title="Before the first forward", title_justify="left")
    for one in checks:
        shown.add_row(marks[one.status], escape(one.name), escape(one.detail), escape(one.remedy))
    return shown


def forecast_table(found: Preflight) -> Table:
    """The forecast as a table for a terminal."""
    from rich.markup import escape
    from rich.table import Column, Table

    name = Column("Part", overflow="fold", min_width=20)  # to be copied to --only
    title = f"Forecast, nothing measured: {found.assumed}"
    shown = Table(name, "Forwards", "Expected", "Memory", "Not in it", title=title, title_justify="left")
    for one in found.forecasts:
        sized = (f"{one.forwards:,}", _span(one.seconds), f"{one.memory / GIB:.1f} GiB")
        shown.add_row(escape(one.name), *(sized if one.seconds else ("", "not predicted", "")), one.left_out)
    known = [one.seconds for one in found.forecasts if one.seconds]
    total = (sum(low for low, _ in known), sum(high for _, high in known))
    shown.add_section()
    shown.add_row("forwards of all parts", "", _span(total) if known else "not predicted", "", "the host's work")
    return shown


def free_memory(device: str) -> int | None:
    """Bytes that are free on a device; of the host for ``"cpu"``, within its limits where a container has some."""
    if device.partition(":")[0] == "cuda":
        import torch

        return int(torch.cuda.mem_get_info(device)[0])
    if device != "cpu":
        return None
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
        found = next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:"))
    except (OSError, StopIteration, ValueError):
        return None
    try:
        limit, used = (int(Path(f"/sys/fs/cgroup/memory.{what}").read_text()) for what in ("max", "current"))
    except (OSError, ValueError):  # no such limit
        return found
    return min(found, max(0, limit - used))


def _span(seconds: tuple[float, float] | None) -> str:
    """A range of times for people.

    >>> _span((0.4, 2.0)), _span((100.0, 400.0)), _span((4000.0, 7000.0))
    ('0.4 to 2 s', '1.7 to 6.7 min', '67 to 117 min')
    """
    low, high = seconds or (0.0, 0.0)
    unit, name = next(pair for pair in ((3600, "h"), (60, "min"), (1, "s")) if high >= 2 * pair[0] or pair[0] == 1)
    return f"{_digits(low / unit)} to {_digits(high / unit)} {name}"


def _digits(value: float) -> str:
    return f"{value:.0f}" if value >= 10 else f"{value:.2g}"


# --- machine --------------------------------------------------------------------------------------------


def _device(device: str) -> Check:
    import torch

    if fault := device_fault(device):
        here = "cuda" if torch.cuda.is_available() else "cpu"
        return Check("device", "fail", f"{device}: {fault}", f"give --device {here}, or run where there is one")
    name = torch.cuda.get_device_name(device) if device.startswith("cuda") else f"threads: {torch.get_num_threads()}"
    return Check("device", "ok", f"{device}, {name}")


def _precision(device: str, dtype: str) -> Check:
    import torch

    try:
        precision = torch_dtype(dtype)
    except ValueError as error:
        return Check("dtype", "fail", str(error), "give --dtype float32 or --dtype bfloat16")
    try:
        where = torch.device(device)
        if where.type == "cuda" and dtype == "bfloat16" and torch.cuda.is_available():
            with torch.cuda.device(where):
                if not torch.cuda.is_bf16_supported(including_emulation=False):
                    return Check(
                        "dtype", "warn", f"{device} emulates bfloat16", "give --dtype float16, or expect a crawl"
                    )
        torch.ones(2, 2, dtype=precision, device=where).mm(torch.ones(2, 2, dtype=precision, device=where))
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        return Check("dtype", "fail", f"{dtype} on {device}: {_line(error)}", "give another --dtype or --device")
    return Check("dtype", "ok", f"{dtype} on {device}")


def _memory(forecasts: Sequence[Forecast], device: str | None, free: Callable[[str], int | None]) -> list[Check]:
    """The part that takes most, against what is free on its device and, for loading, on the host."""
    found = []
    needs = [("memory", device, lambda one: one.memory), ("host memory for loading", "cpu", lambda one: one.host)]
    for name, where, size in needs:
        worst = max(forecasts, key=size, default=None)
        if worst is None or not size(worst) or where is None:
            continue
        there = free(where)
        need = f"{worst.name} takes about {size(worst) / GIB:.1f} GiB"
        if there is None:
            found.append(Check(name, "warn", f"{need}; what is free on {where} is not known", "see for yourself"))
            continue
        detail = f"{need}, {there / GIB:.1f} GiB are free on {where}"
        remedy = "give --dtype bfloat16, smaller models, or a device with more memory; --only leaves parts out"
        status: Status = "fail" if size(worst) > there else "warn" if size(worst) > 0.85 * there else "ok"
        found.append(Check(name, status, detail, "" if status == "ok" else remedy))
    return found


def _windows(parts: Sequence[Part], opened: Mapping[str, OpenModel]) -> list[Check]:
    """Whether the longest rows fit the context of every model; prompts are taken to be short."""
    longest: dict[str, tuple[int, str]] = {}
    for part in parts:
        names = getattr(part.config, "models", ())
        if getattr(part.config, "window", None) is None:
            steps = max((run.steps for run in runs_of(part, max(2, len(names)))[0]), default=0)
            for name in names:
                longest[name] = max(longest.get(name, (0, "")), (PROMPT + steps, part.name))
    found = []
    for name, (tokens, where) in longest.items():
        config = opened[name].network.config.get_text_config() if opened[name].network is not None else None
        window = getattr(config, "max_position_embeddings", None)
        if window is not None and tokens > window:
            detail = f"{where} writes rows of {tokens:,} tokens, it reads {window:,}"
            remedy = "leave the part out with --only, or give a model of longer context"
            found.append(Check(f"{label_of(name)}: context", "fail", detail, remedy))
    return found


def _folder(out: Path) -> Check:
    """Whether files can be written where `out` is or would be made; a look makes no folder."""
    try:
        with tempfile.TemporaryFile(dir=_existing(out / "records")):
            pass
    except OSError as error:
        return Check("out", "fail", f"cannot write to {out}: {error.strerror}", "give another folder with --out")
    return Check("out", "ok", f"{out} can be written")


def _existing(folder: Path) -> Path:
    return next((path for path in (folder, *folder.absolute().parents) if path.exists()), Path("."))


def _disk(name: str, folder: Path, need: int) -> Check:
    place = _existing(folder)
    there = shutil.disk_usage(place).free
    detail = f"{need / GIB:.1f} GiB needed, {there / GIB:.1f} GiB free"
    if there < need:
        return Check(name, "fail", detail, f"free some space on the disk of {place}, or choose another folder")
    return Check(name, "ok", detail)


def _downloads(opened: Mapping[str, OpenModel]) -> list[Check]:
    missing = [one.checkpoint for one in opened.values() if one.checkpoint and one.checkpoint.folder is None]
    if not missing:
        return []
    from huggingface_hub.constants import HF_HUB_CACHE

    return [_disk("disk for downloads", Path(HF_HUB_CACHE), sum(one.download or 0 for one in missing))]


# --- packages and data ----------------------------------------------------------------------------------


def _extras(parts: Sequence[Part], opened: Mapping[str, OpenModel]) -> list[Check]:
    needed: dict[str, tuple[str, str]] = {}
    for name in opened:
        if to_pull(name):
            needed |= dict.fromkeys(("gguf", "accelerate"), ("gguf", name))
    for part in parts:
        if part.experiment in _EXTRAS:
            package, extra = _EXTRAS[part.experiment]
            needed[package] = (extra, part.name)
    return [
        Check(f"package {package}", "ok", f"for {why}") if importlib.util.find_spec(package)
        else Check(f"package {package}", "fail", f"{why} needs it", f'pip install "me-stats[{extra}]"')
        for package, (extra, why) in needed.items()
    ]  # fmt: skip


def _data(parts: Sequence[Part], data: Path | None) -> list[Check]:
    """Files that configs name must be there."""
    found = {}
    for part in parts:
        for field in fields(part.config):
            value = getattr(part.config, field.name)
            for path in value if isinstance(value, tuple) else (value,):
                if isinstance(path, Path) and part.experiment != "tokenizer_audit":  # it says which were absent
                    there = path.expanduser().exists()
                    found[path] = (
                        Check(f"data of {part.name}", "ok", f"{path} is there") if there
                        else Check(f"data of {part.name}", "fail", f"{path} is not there", "give the path of the files")
                    )  # fmt: skip
    tasks = dict.fromkeys(name for part in parts if part.experiment == "accuracy" for name in part.config.tasks)
    return [*found.values(), *(_task(name, data) for name in tasks)]


def _task(name: str, data: Path | None) -> Check:
    """Whether the files of a task are there and can be read."""
    from me_stats.scripts import load
    from me_stats.tasks import data as readers

    try:
        source = load("experiments", "accuracy")._source(name, data)
        if source is not None:
            items = getattr(readers, name.partition(":")[0])(source)
            if not (items[0] if isinstance(items, tuple) else items):
                raise ValueError(f"the files of {name} hold no items")
    except (ValueError, OSError) as error:
        return Check(f"task {name}", "fail", _line(error), "give the folder of the benchmarks' files, see --data")
    return Check(f"task {name}", "ok", "comes with the package" if source is None else "its files can be read")


def _line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
