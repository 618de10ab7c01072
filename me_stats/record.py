"""What an experiment leaves behind: numbers, the checks they passed, and where they came from.

Records are JSON, written last and atomically: a record that exists is complete. Figures, the report and
``paper_repro.md`` read records and nothing else.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.metadata
import json
import os
import platform
import subprocess
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, fields, is_dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np

SCHEMA = 1
Verdict = Literal["reproduced", "reproduced at small scale", "refuted as stated", "not testable here"]
_PACKAGES = ("me-stats", "torch", "transformers", "numpy", "scipy")


@dataclass(frozen=True)
class Finding:
    """One row of the verdict table: what was asked, what came out, and how far to trust it.

    Attributes
    ----------
    claim
        ``"C1"`` .. ``"C15"``.
    statement
        What was compared, in a few words.
    models, n
        On what, and from how many draws, paths or laws.
    statistic
        The number, with its name: ``"TV 3.1e-16 (exact)"``.
    tv_upper
        Upper bound on the TV distance of the compared laws, None where the finding bounds something else.
    bound
        What kind of bound: ``"exact"``, ``"95% confidence"``, ``"measured floor"``.
    verdict
        One of the four verdicts of `Verdict`.
    held
        Whether the check behind it held.
    caveat
        What the number does not say.
    """

    claim: str
    statement: str
    models: str
    n: str
    statistic: str
    tv_upper: float | None
    bound: str
    verdict: Verdict
    held: bool
    caveat: str = ""

    def __post_init__(self) -> None:
        if self.verdict not in get_args(Verdict):
            raise ValueError(f"verdict must be one of {get_args(Verdict)}, got {self.verdict!r}")


@dataclass(frozen=True)
class Record:
    """Everything about one finished experiment.

    Attributes
    ----------
    name, title
        The experiment's file name, and a line for people.
    key
        Hash of the resolved config, schema and package version; a record with another key is not reused.
    config
        The resolved configuration.
    findings
        Rows for the verdict table.
    checks
        Named booleans; the run fails if one is False.
    results
        Numbers that figures draw.
    models
        Identity of each model: name, source hash, dtype, vocabulary.
    environment
        Versions, git revision, hardware.
    wall_s
        Seconds it took.
    """

    name: str
    title: str
    key: str
    config: dict[str, Any]
    findings: tuple[Finding, ...]
    checks: dict[str, bool]
    results: dict[str, Any]
    models: tuple[dict[str, Any], ...]
    environment: dict[str, Any]
    wall_s: float
    finished: str
    schema: int = SCHEMA

    @property
    def held(self) -> bool:
        return all(self.checks.values())

    def save(self, path: Path) -> None:
        """Write to `path`; what stood there before stays until the new record is complete."""
        write_atomically(path, json.dumps(plain(self), indent=1, ensure_ascii=False, allow_nan=False) + "\n")

    @classmethod
    def load(cls, path: Path) -> Record:
        """Read a record; ValueError if the file is not one."""
        try:
            data = json.loads(Path(path).read_text(encoding="utf-8"))
            if data["schema"] != SCHEMA:
                raise ValueError(f"schema is {data['schema']!r}, this version reads {SCHEMA}")
            for name, kind in _JSON_TYPES.items():
                if not isinstance(data[name], kind):
                    raise TypeError(f"{name} is of type {type(data[name]).__name__}")
            data["findings"] = tuple(Finding(**finding) for finding in data["findings"])
            data["models"] = tuple(data["models"])
            return cls(**{f.name: data[f.name] for f in fields(cls)})
        except (KeyError, TypeError, ValueError, RecursionError) as error:
            raise ValueError(f"{path} is not a me_stats record: {type(error).__name__}: {error}") from error


# What a reader of a record relies on; a file with other types fails here and not in the middle of a report.
_JSON_TYPES: dict[str, Any] = {
    "name": str, "title": str, "key": str, "config": dict, "findings": list, "checks": dict, "results": dict,
    "models": list, "environment": dict, "wall_s": (int, float), "finished": str,
}  # fmt: skip


@dataclass
class Recorder:
    """Collects one experiment's output and stamps it with its origin.

    >>> recorder = Recorder("demo", "A demonstration", {"n": 3})
    >>> recorder.check("three is odd", 3 % 2 == 1)
    True
    >>> recorder.finish({"value": 3}).held
    True
    """

    name: str
    title: str
    config: Any
    models: list[dict[str, Any]] = field(default_factory=list)
    findings: list[Finding] = field(default_factory=list)
    checks: dict[str, bool] = field(default_factory=dict)
    _started: float = field(default_factory=time.perf_counter)

    def check(self, name: str, held: bool) -> bool:
        """Note a named check and return whether it held; a name that failed once has failed."""
        self.checks[name] = self.checks.get(name, True) and bool(held)
        return bool(held)

    def find(self, **finding: Any) -> None:
        """Add a row to the verdict table, which is also a check; without a `verdict`, `held` decides it."""
        finding.setdefault("verdict", "reproduced at small scale" if finding["held"] else "refuted as stated")
        row = Finding(**finding)
        self.findings.append(row)
        self.check(f"{row.claim}: {row.statement} ({row.models})", row.held)

    def add_model(self, name: str, model: Any) -> None:
        """Note a model's identity."""
        network, served = getattr(model, "network", None), getattr(model, "identity", None)
        dtype = "float64" if served is None else "as served"
        kept = None if served is None else {key: value for key, value in served.items() if key != "model_path"}
        self.models.append(
            {
                "name": name,
                "kind": type(model).__name__,
                "dtype": str(model.dtype).removeprefix("torch.") if network is not None else dtype,
                "device": str(model.device) if network is not None else "cpu",
                "parameters": sum(p.numel() for p in network.parameters()) if network is not None else None,
                "vocabulary": {"size": model.vocabulary.size, "fingerprint": model.vocabulary.fingerprint},
                "source": getattr(model, "source", kept),
            }
        )

    def count_earlier(self, seconds: float) -> None:
        """Add time that earlier, interrupted runs spent on what this one goes on with."""
        self._started -= seconds

    def finish(self, results: dict[str, Any]) -> Record:
        config = plain(self.config)
        return Record(
            name=self.name,
            title=self.title,
            key=config_key(self.name, config),
            config=config,
            findings=tuple(self.findings),
            checks=dict(self.checks),
            results=plain(results),
            models=tuple(self.models),
            environment=environment(),
            wall_s=round(time.perf_counter() - self._started, 2),
            finished=datetime.now(UTC).isoformat(timespec="seconds"),
        )


def config_key(name: str, config: Any) -> str:
    """Hash that a record must carry to stand in for running `name` with `config`."""
    from me_stats import __version__

    text = json.dumps([SCHEMA, __version__, name, plain(config)], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def environment() -> dict[str, Any]:
    """Versions, git revision and hardware, without a path or a host name."""
    import torch

    return {
        "python": platform.python_version(),
        "versions": {name: _version(name) for name in _PACKAGES},
        "git": _git(),
        "machine": platform.machine(),
        "cpu_threads": torch.get_num_threads(),
        "accelerator": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
    }


def write_atomically(path: Path, content: str | bytes) -> None:
    """Write a file so that `path` holds either the old content or all of the new."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    data = content.encode() if isinstance(content, str) else content
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
        umask = os.umask(0)
        os.umask(umask)
        Path(name).chmod(0o666 & ~umask)
        Path(name).replace(path)
    except BaseException:
        with contextlib.suppress(OSError):
            Path(name).unlink()
        raise


def plain(value: Any) -> Any:
    """`value` as JSON types; infinities become the strings ``"inf"`` and ``"-inf"``, NaN is refused."""
    if is_dataclass(value) and not isinstance(value, type):
        return {f.name: plain(getattr(value, f.name)) for f in fields(value)}
    if isinstance(value, dict):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    if hasattr(value, "tolist"):
        return plain(value.tolist())
    if isinstance(value, Path):
        return value.name
    if isinstance(value, float) and not np.isfinite(value):
        if np.isnan(value):
            raise ValueError("a result is NaN; records hold numbers that can be read back")
        return "inf" if value > 0 else "-inf"
    return value


def experiment_of(name: str) -> str:
    """The experiment of a record's name, which may end in a tag: ``per_step-siblings``."""
    return name.split("-")[0]


def load_records(paths: Sequence[Path]) -> dict[str, Record]:
    """Records by name."""
    records = [Record.load(path) for path in paths]
    return {record.name: record for record in records}


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _git() -> dict[str, Any] | None:
    here = Path(__file__).resolve()
    # The first question refuses a repository that me_stats is merely installed in.
    asked = (
        ["ls-files", "--error-unmatch", here.name],
        ["rev-parse", "HEAD"],
        ["status", "--porcelain", "--untracked-files=no"],
    )
    try:
        answers = [
            subprocess.run(["git", "-C", str(here.parent), *args], capture_output=True, text=True, check=True).stdout
            for args in asked
        ]
    except (OSError, subprocess.CalledProcessError):
        return None
    return {"revision": answers[1].strip(), "dirty": bool(answers[2].strip())}
