"""Ensembles by name: the paper's groups at full size, one file each, and files of the same form that users write.

A file says which models, in which precision, under which weights and top-k, and which claims the group answers.
`resolve` turns a name into what a run takes, `parts` puts the group's own choices into the parts of a run.
"""

from __future__ import annotations

import dataclasses
import difflib
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from me_stats.claims import CLAIMS

if TYPE_CHECKING:
    from me_stats.plans import Part
    from me_stats.record import Record

Dtype = Literal["float32", "bfloat16", "float16"]
FOLDER = Path(__file__).with_name("groups")
TASKS = ("gsm8k", "mmlu", "bbh", "arc_challenge")
_CHOICES = {
    "dtype": ("float32", "bfloat16", "float16"),
    "vocabularies": ("one", "several"),
    "prompts": ("chat", "text"),
}
_LISTS: dict[str, type] = {"models": str, "shapes": str, "revisions": str, "k": int, "tasks": str, "claims": str}


@dataclass(frozen=True)
class Group:
    """An ensemble and how to examine it; the keys of a group file are these fields, all but the name.

    Attributes
    ----------
    name
        The file's name without its ending; part of the names of records.
    label
        For tables.
    models
        (K,) hub ids, folders or catalog names.
    shapes
        (K,) names in `me_stats.models.shapes.PUBLISHED`, for forecasts, and for speed where `vocabularies` differ.
    revisions
        (K,) commits, or the beginnings of them, that the checkpoints must be of; ``""`` for any. Empty: any.
    weights
        (K,) λ; ``equal`` in the file, and by default, for 1/K each.
    k
        The top-k of the tables to reproduce.
    vocabularies
        ``"one"``, or ``"several"``: then the models are mixed over byte strings.
    prompts
        ``"chat"``: tasks are asked in each model's chat format; ``"text"``: as plain text.
    dtype
        Of the weights.
    tasks
        Those of `TASKS` to compare accuracies on.
    claims
        The claims (`me_stats.claims`) that a run answers.
    note
        What a reader must know, such as what is guessed.
    """

    name: str
    label: str
    models: tuple[str, ...]
    shapes: tuple[str, ...] = ()
    revisions: tuple[str, ...] = ()
    weights: tuple[float, ...] = ()
    k: tuple[int, ...] = (5, 10)
    vocabularies: Literal["one", "several"] = "one"
    prompts: Literal["chat", "text"] = "chat"
    dtype: Dtype = "bfloat16"
    tasks: tuple[str, ...] = TASKS
    claims: tuple[str, ...] = ()
    note: str = ""

    def __post_init__(self) -> None:
        if not self.weights:
            object.__setattr__(self, "weights", (1 / len(self.models),) * len(self.models))

    @property
    def timed(self) -> tuple[str, ...]:
        """What the speed part times, () for nothing: the models where they have one vocabulary, else their shapes.

        What a forward costs depends on shapes and not on weights, and ids of shapes of one width are one vocabulary.
        """
        if self.vocabularies == "one":
            return self.models
        from me_stats.models.shapes import PUBLISHED

        widths = {PUBLISHED[shape]["vocab_size"] for shape in self.shapes}
        return tuple(f"random:{shape}" for shape in self.shapes) if len(widths) == 1 else ()


def names() -> tuple[str, ...]:
    """The groups that come with the package.

    >>> names()
    ('hermes2', 'hermes3', 'mixed', 'qwen')
    """
    return tuple(sorted(path.stem for path in FOLDER.glob("*.yaml")))


def load_group(name_or_path: str | Path) -> Group:
    """The group of this name, or of a YAML file at this path.

    Raises ValueError for an unknown name, and for a file that is no group, with the file and the key.

    >>> group = load_group("mixed")
    >>> group.models[1], group.k, group.timed
    ('deepseek-ai/deepseek-llm-7b-chat', (5, 10), ())
    """
    path = FOLDER / f"{name_or_path}.yaml"
    if str(name_or_path) not in names():
        path = Path(name_or_path).expanduser()
        if not path.is_file():
            close = difflib.get_close_matches(str(name_or_path), names(), n=1)
            hint = f"did you mean {close[0]!r}?" if close else f"known are {', '.join(names())}"
            raise ValueError(f"no group {str(name_or_path)!r}: {hint} Or give the path of a group file (YAML)")
    return _checked(path, _read(path))


def resolve(name_or_path: str | Path, models: Sequence[str] | None = None, dtype: str | None = None) -> Group:
    """A group as one run takes it: `models` and `dtype` replace those of the file where they are given.

    Models are replaced one by one, in the order of the file, such as by folders that hold the same checkpoints.

    Raises ValueError as `load_group`, and for another number of models.

    >>> resolve("qwen", ["/models/a", "/models/b"]).models
    ('/models/a', '/models/b')
    """
    group = load_group(name_or_path)
    if models and len(models) != len(group.models):
        raise ValueError(
            f"--models must name {len(group.models)} models, in place of {' and '.join(group.models)}; "
            f"got {len(models)}"
        )
    if dtype is not None and dtype not in _CHOICES["dtype"]:
        raise ValueError(f"dtype must be one of {', '.join(_CHOICES['dtype'])}, got {dtype!r}")
    return replace(
        group,
        models=tuple(models or group.models),
        revisions=() if models else group.revisions,
        dtype=dtype or group.dtype,  # type: ignore[arg-type]
    )


def parts(group: Group, planned: Sequence[Part]) -> list[Part]:
    """The parts of a run on a group, from those `planned` for its models: named after it, with its own choices in them.

    What is about several vocabularies is left out where there is one. Long generations take its weights. The speed part
    times its numbers of components at its weights; random weights in published shapes are timed on accelerators alone.
    Accuracies are compared on its tasks, in one part for each of its top-k, where there is such an experiment. Parts
    without models stay as they are.
    """
    from me_stats.plans import Part

    own = {part.experiment: part for part in planned if getattr(part.config, "models", ())}
    if not own:
        return list(planned)
    where = next(iter(own.values())).config
    kind = getattr(where, "device", "cpu").partition(":")[0]
    tag = group.name + ("" if kind == "cpu" else f"-{kind}")
    numbers = tuple(range(1, len(group.models) + 1))
    choices: dict[str, dict[str, Any]] = {
        "long": {"weights": group.weights},
        "speed": {
            "models": group.timed, "components": numbers, "weights": (group.weights,),
            # A first model in float32 beside all others would not fit beside three of 7 billion weights.
            "curve_dtypes": (), "dtype": group.dtype,
        },
        "accuracy": {
            "models": group.models, "weights": group.weights, "tasks": group.tasks, "chat": group.prompts == "chat",
            "dtype": group.dtype,
        },
    }  # fmt: skip
    absent = ("mixed_vocabularies",) if group.vocabularies == "one" else ()
    found = [
        Part(part.experiment, tag, replace(part.config, **choices.get(part.experiment, {})))
        if part in own.values() else part
        for part in planned if part.experiment not in (*_OF_GROUPS, *absent)
    ]  # fmt: skip
    random = group.timed != group.models
    for experiment in _OF_GROUPS:
        config = own[experiment].config if experiment in own else _config(experiment, where)
        if config is None or (experiment == "speed" and (not group.timed or (random and kind == "cpu"))):
            continue
        known = {field.name for field in fields(config)}
        taken = {name: value for name, value in choices[experiment].items() if name in known}
        if experiment == "speed":
            found.append(Part(experiment, tag, replace(config, **taken)))
        else:  # one part for each k of the tables
            suffix = tag.removeprefix(group.name)
            found += [
                Part(experiment, f"{group.name}-k{k}{suffix}", replace(config, **taken, top_k=k)) for k in group.k
            ]
    return found


_OF_GROUPS = ("speed", "accuracy")  # parts that every group has, planned or not


def _config(experiment: str, where: Any) -> Any:
    """The experiment's own configuration on the device and with the seed of `where`; None without the experiment."""
    from me_stats.scripts import load

    try:
        kind = load("experiments", experiment).Config
    except FileNotFoundError:
        return None
    known = {field.name for field in fields(kind)}
    return kind(**{name: getattr(where, name) for name in ("device", "seed") if name in known and hasattr(where, name)})


def command(record: Record) -> str | None:
    """The command that makes a record of one of our groups again; None for any other record."""
    tag = record.name.partition("-")[2]
    name, config = tag.partition("-")[0], record.config
    if name not in names():
        return None
    group = load_group(name)
    words = ["me-stats", "reproduce", "--preset", name]
    models = tuple(config.get("models", ()))
    if models not in (group.models, group.timed):
        words += ["--models", *models]
    for option, usual in (("device", "cpu"), ("dtype", group.dtype), ("seed", 0)):
        if config.get(option, usual) != usual:
            words += [f"--{option}", str(config[option])]
    return shlex.join([*words, "--only", record.name])


def _read(path: Path) -> Mapping[str, Any]:
    import yaml  # type: ignore[import-untyped]  # transformers brings it

    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is no YAML file: {' '.join(str(error).split())}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} must hold keys and values, such as 'models: [a, b]'; got {content!r:.60}")
    return content


def _checked(path: Path, content: Mapping[str, Any]) -> Group:
    """The group in a file; every message names the file and the key."""

    def refuse(key: str, reason: str) -> ValueError:
        return ValueError(f"{path}: {key} {reason}")

    known = {field.name: field for field in dataclasses.fields(Group) if field.name != "name"}
    for key in content:
        if key not in known:
            close = difflib.get_close_matches(str(key), known, n=1)
            raise refuse(str(key), f"is no key of a group; {f'did you mean {close[0]}?' if close else _all(known)}")
    for key, field in known.items():
        if field.default is MISSING and key not in content:
            raise refuse(key, "is missing")
    values: dict[str, Any] = {"name": path.stem}
    for key, value in content.items():
        if key in _LISTS:
            values[key] = _list(key, value, refuse)
        elif key == "weights":
            values[key] = () if value == "equal" else value
        elif key in _CHOICES:
            if value not in _CHOICES[key]:
                raise refuse(key, f"must be one of {', '.join(_CHOICES[key])}, got {value!r}")
            values[key] = value
        elif isinstance(value, str) and value.strip():
            values[key] = value.strip()
        else:
            raise refuse(key, f"must be a text, got {value!r:.60}")
    _check_lists(values, refuse)
    return Group(**values)


def _all(known: Mapping[str, Any]) -> str:
    return f"known are {', '.join(known)}"


def _list(key: str, value: Any, refuse: Any) -> tuple[Any, ...]:
    kind = _LISTS[key]
    empty_is_any = key == "revisions"
    if not isinstance(value, list) or not value:
        raise refuse(key, f"must be a list, such as [{'5, 10' if kind is int else 'a, b'}]; got {value!r:.60}")
    for one in value:
        if kind is int:
            usable = type(one) is int and one > 0
        else:
            usable = isinstance(one, str) and (empty_is_any or bool(one.strip()))
        if not usable:
            what = "positive whole numbers" if kind is int else "texts"
            raise refuse(key, f"must hold {what} alone, got {one!r:.60}")
    return tuple(value)


def _check_lists(values: dict[str, Any], refuse: Any) -> None:
    from me_stats.mixing import ConstantMixing
    from me_stats.models.shapes import PUBLISHED

    k = len(values["models"])
    if k < 2:
        raise refuse("models", "must name at least two models")
    for key in ("shapes", "revisions"):
        if key in values and len(values[key]) != k:
            raise refuse(key, f"must have one for each of {k} models, got {len(values[key])}")
    for key, known in (("shapes", tuple(PUBLISHED)), ("tasks", TASKS), ("claims", tuple(CLAIMS))):
        unknown = sorted(set(values.get(key, ())) - set(known))
        if unknown:
            raise refuse(key, f"must be among {', '.join(known)}; got {unknown[0]!r}")
    if values.get("weights"):
        try:
            weights = tuple(ConstantMixing(values["weights"]).weights.tolist())
        except (ValueError, TypeError) as error:
            raise refuse("weights", f"must be 'equal' or a law over the models: {error}") from error
        if len(weights) != k:
            raise refuse("weights", f"must have one for each of {k} models, got {len(weights)}")
        values["weights"] = weights
