"""Models of different tokenizers write together over byte strings: is every law the one that the definition says?

Each component reads the shared history in its own canonical tokenisation. Appended bytes may change how the end of a
history is split, and a cache that kept the old split would be wrong: every law that a session gives, drawn or not, is
compared with the law of a fresh reading, on prompts with accents, emoji, other scripts, code and odd white space.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from me_stats import CESampler, Ensemble, MESampler, SequenceMixtureSampler
from me_stats.divergence import tv_distance
from me_stats.models import Aligned, Conditioned, NextByte
from me_stats.models.base import open_session
from me_stats.models.ensemble import mix
from me_stats.presets import MIXED_SIBLINGS, Setting, aligned, open_recorded
from me_stats.record import Record, Recorder
from me_stats.testing import check_sampler
from me_stats.trace import Trace

NAME, TITLE = "mixed_vocabularies", "Models of different vocabularies write together, over byte strings"

PROMPTS = (
    "Question: How many legs do 3 cats have?\nAnswer:",
    "def fibonacci(n):\n\tif n < 2:\n\t\treturn n\n",
    "La p\u00eache \u00e0 la truite\u00a0: o\u00f9, quand, comment\u00a0? R\u00e9ponse\u00a0:",
    "\U0001f642 \U0001f469\u200d\U0001f469\u200d\U0001f467 and \U0001f1e9\U0001f1ea mean",
    "\u65e5\u672c\u306e\u9996\u90fd\u306f",
    "\u041f\u0440\u0438\u0432\u0435\u0442! \u041a\u0430\u043a",
    "e\u0301 is not \u00e9;\ttabs\t\tand  two  spaces\r\n\r\nNext line:",
    "x = {'a': 1,\n     'b': [2, 3]}\nprint(",
)

_LEAST_PAIRS = 200  # sequences a side below which two samples show nothing


@dataclass(frozen=True)
class Config:
    """`rows` continuations of each prompt by ME, of `steps` byte strings; a session may be `floor` off a fresh read.

    `tested` further continuations of each prompt go through `check_sampler`, for ME, CE, one against the other, and
    with one component per sequence, which must be rejected; 0 leaves them out. `beams` are the numbers of tokenisations
    that a law of the next byte keeps, over `bytes` bytes.
    """

    models: tuple[str, ...] = MIXED_SIBLINGS
    rows: int = 4
    steps: int = 48
    floor: float = 1e-4
    tested: int = 64
    tested_steps: int = 32
    level: float = 1e-6
    second_level: float = 1e-3
    beams: tuple[int, ...] = (1, 4, 16)
    bytes: int = 32
    dtype: str = "float32"
    device: str = "cpu"
    seed: int = 0


def run(config: Config, progress: Callable[[float, str], None] = lambda fraction, note: None) -> Record:
    """Generate, read everything again from the bytes alone, and compare."""
    recorder = Recorder(NAME, TITLE, config)
    setting = open_recorded(recorder)
    ensemble, components = _over_strings(setting)
    names = [name.rsplit("/", 1)[-1].removeprefix("bundled:") for name, _ in setting.models]
    progress(0.0, "generating with ME")
    trace = MESampler(ensemble).sample(PROMPTS, n=config.rows, max_new_tokens=config.steps, seed=config.seed)
    progress(0.15, "generating with CE on the same random numbers")
    latent = CESampler(ensemble, latent=True)
    coupled = latent.sample(PROMPTS, n=config.rows, max_new_tokens=config.steps, seed=config.seed)
    progress(0.35, "reading every history again")
    laws = _laws(trace, lambda done: progress(0.35 + 0.4 * done, "reading every history again"))
    found = [_component(trace, number, component) for number, component in enumerate(components)]
    for row, floors in zip(found, laws["floors"], strict=True):
        row["floor"] = {"mean": float(floors.mean()), "max": float(floors.max())}
    progress(0.8, "reading string by string instead")
    for row, component in zip(found, components, strict=True):
        row["piecewise"] = _piecewise(trace, component)
    progress(0.9, "next bytes by all tokenisations")
    next_byte = [
        _next_byte(trace, name, component, config)
        for name, component in zip(names, components, strict=True)
        if config.beams and _longest(component) > 1  # bytes have one spelling
    ]
    tested = _check(ensemble, config, progress) if config.tested else {}
    text = _texts(trace)
    equal = float(((trace.tokens == coupled.tokens).all(1)).double().mean()) if _alike(trace, coupled) else 0.0
    _judge(recorder, setting.label, config, trace, names, found, laws, text)
    _judge_tests(recorder, setting.label, config, tested)
    return recorder.finish(
        {
            "label": setting.label,
            "names": names,
            "strings": len(components[0].shared.strings),
            "rows": len(trace.tokens),
            "tokens": int(trace.lengths.sum()),
            "components": found,
            "mixture_floor": {"mean": float(laws["mixture"].mean()), "max": float(laws["mixture"].max())},
            "rows_equal_in_ce": equal,
            "text": text,
            "next_byte": next_byte,
            "tests": tested,
            "reads_per_token": trace.cost.reads / int(trace.lengths.sum()),
        }
    )


def _over_strings(setting: Setting) -> tuple[Ensemble, list[Aligned]]:
    """The ensemble over byte strings, which models of one vocabulary can be mixed over too."""
    components = [component for component in setting.ensemble.components if isinstance(component, Aligned)]
    if len(components) == len(setting.ensemble.components):
        return setting.ensemble, components
    if len(setting.models) < 2:
        raise ValueError(f"{setting.label}: byte strings are for several models; name at least two")
    components = aligned([model for _, model in setting.models])
    return Ensemble(components, setting.ensemble.mixing), components


def _histories(trace: Trace, row: int) -> list[tuple[int, ...]]:
    """The shared ids before each token of a row."""
    prompt, path = trace.prompts[int(trace.prompt_index[row])], trace.sequences()[row]
    return [(*prompt, *path[:step]) for step in range(len(path))]


def _laws(trace: Trace, progress: Callable[[float], None]) -> dict[str, Any]:
    """TV between each component's session and a fresh reading at every prefix, and of the mixtures of both.

    The session moves as ME moves it: a component reads when it is drawn, and catches up over the tokens in between.
    Here the other components are read as well, from sessions of their own, so that every lag of one is followed.
    """
    ensemble: Ensemble = trace.model
    prompts, paths = trace.row_prompts(), trace.sequences()
    sessions = [open_session(c, prompts, max_new_tokens=trace.tokens.shape[1]) for c in ensemble.components]
    floors: list[list[np.ndarray]] = [[] for _ in sessions]
    mixture = []
    steps = trace.tokens.shape[1]
    for step in range(steps):
        progress(step / steps)
        live = np.array([row for row, path in enumerate(paths) if len(path) > step])
        prefixes = [(*prompts[row], *paths[row][:step]) for row in live.tolist()]
        # Half of the rows stay behind for a step now and then, so that some catch-ups span several strings.
        late = live[(live + step) % 2 == 0] if step + 1 < steps else live
        places = np.flatnonzero(np.isin(live, late))
        if len(late):
            kept = [prefixes[place] for place in places.tolist()]
            read = [session.log_probs(late).cpu() for session in sessions]
            fresh = [component.log_probs(kept).cpu() for component in ensemble.components]
            for floor, one, other in zip(floors, read, fresh, strict=True):
                floor.append(np.asarray(tv_distance(one, other)))
            weights = ensemble.mixing.log_weights(kept)
            mixture.append(np.asarray(tv_distance(mix(read, weights), mix(fresh, weights))))
        for session in sessions:
            session.append(live, trace.tokens[live, step])
    return {"floors": [np.concatenate(parts) for parts in floors], "mixture": np.concatenate(mixture)}


def _component(trace: Trace, number: int, component: Aligned) -> dict[str, Any]:
    """What one component reads: round trips, histories whose end is split anew, mass without a string, tokens."""
    table, shared = component.token_bytes, component.shared
    lost = again = places = 0
    prefixes = []
    for row in range(len(trace.tokens)):
        before: tuple[int, ...] | None = None
        histories = _histories(trace, row)
        for prefix in histories:
            history = shared.bytes_of(prefix)
            read = component.read(history)
            meant = (table.prefix + history).translate(None, table.unread_bytes)
            lost += table.bytes_of(read) != meant
            if before is not None:
                places += 1
                again += read[: len(before)] != before
            before = read
        prefixes.append(histories[len(histories) // 2])
    dropped = component.dropped_mass(prefixes)
    assert trace.components is not None
    return {
        "share_written": float((trace.components[trace.mask] == number).double().mean()),
        "histories_lost": lost,
        "split_anew": {"steps": again, "of": places},
        "dropped": {"mean": float(dropped.mean()), "max": float(dropped.max())},
        "unread_bytes": len(table.unread_bytes),
    }


def _piecewise(trace: Trace, component: Aligned) -> dict[str, Any]:
    """The law after reading string by string instead, as an exchange of tokens does: the reading is not canonical."""
    shared, table = component.shared, component.token_bytes
    assert table.tokenize is not None
    apart, pairs = 0, []
    for row in range(len(trace.tokens)):
        prefix = _histories(trace, row)[-1]
        prompt = trace.prompts[int(trace.prompt_index[row])]
        pieces = [table.tokenize(shared.strings[token]) for token in prefix[len(prompt) :]]
        read = component.read(shared.bytes_of(prompt)) + tuple(token for piece in pieces for token in piece)
        if read != component.read(shared.bytes_of(prefix)):
            apart += 1
            pairs.append((read, prefix))
    if not pairs:
        return {"rows": len(trace.tokens), "apart": 0, "tv": 0.0}
    other = component.push(component.model.log_probs([read for read, _ in pairs]))
    own = component.log_probs([prefix for _, prefix in pairs])
    tv = np.asarray(tv_distance(own.cpu(), other.cpu()))
    return {"rows": len(trace.tokens), "apart": apart, "tv": float(tv.mean())}


def _next_byte(trace: Trace, name: str, component: Aligned, config: Config) -> dict[str, Any]:
    """What laws of single bytes cost: token laws read a byte, and how far a narrow beam is from the widest."""
    shared, table = component.shared, component.token_bytes
    path = [token for token in trace.sequences()[0] if token < len(shared.strings)]
    text = shared.bytes_of(path)[: config.bytes]
    head = component.read(shared.bytes_of(trace.prompts[0]))
    model = Conditioned(component.model, head)
    laws, rows = {}, []
    for beam in sorted(config.beams, reverse=True):
        byte_model = NextByte(model, token_bytes=dataclasses.replace(table, prefix=b""), beam=beam)
        session = byte_model.session([()])
        read = []
        for byte in text:
            read.append(session.log_probs(np.array([0])))
            session.append(np.array([0]), torch.tensor([byte]))
        laws[beam] = torch.cat(read)
        rows.append({
            "beam": beam,
            "laws_per_byte": session.cost.forwards / len(text),
            "pruned": float(byte_model.pruned_mass([text])[0]),
            "tv_to_widest": float(np.asarray(tv_distance(laws[beam], laws[max(config.beams)])).mean()),
        })  # fmt: skip
    return {"model": name, "bytes": len(text), "tokens": len(table.encode(text)), "beams": rows}


def _check(ensemble: Ensemble, config: Config, progress: Callable[[float, str], None]) -> dict[str, dict[str, Any]]:
    """`check_sampler` with all laws known for each sampler, and of two samples for ME against CE."""
    me, ce = MESampler(ensemble), CESampler(ensemble)
    cases: dict[str, tuple[Any, Any, float]] = {
        "ME": (me, ensemble, config.level),
        "CE": (ce, ensemble, config.level),
        "one component per sequence": (SequenceMixtureSampler(ensemble), ensemble, config.level),
    }
    if config.tested * len(PROMPTS) >= _LEAST_PAIRS:
        cases["ME against CE"] = (me, ce, config.second_level)
    found = {}
    for done, (name, (sampler, against, level)) in enumerate(cases.items()):
        progress(0.92 + 0.02 * done, f"testing {name}")
        result = check_sampler(
            sampler, against, PROMPTS, max_new_tokens=config.tested_steps, n=config.tested, level=level,
            seed=config.seed, stop_early=False, on_fail="return",
        )  # fmt: skip
        # With all laws known the λ-score of whole rows says what can be seen; of two samples only the first tokens do.
        seen = [one for one in result.outcomes if one.effect != "TV" and math.isfinite(one.detects)]
        found[name] = {
            "pvalue": result.pvalue, "level": result.level, "sequences": result.sequences, "tokens": result.tokens,
            "detects": seen[0].detects if seen else result.min_detectable_tv,
            "effect": seen[0].effect if seen else "TV of one step", "tests": len(result.outcomes),
        }  # fmt: skip
    return found


def _judge_tests(recorder: Recorder, label: str, config: Config, tested: dict[str, dict[str, Any]]) -> None:
    for name in ("ME", "CE", "ME against CE"):
        if name in tested:
            row = tested[name]
            held = row["pvalue"] > row["level"]
            recorder.find(
                claim="C8",
                statement=f"{name} over byte strings: every test of whole generations",
                models=label,
                n=f"{row['sequences']} × {config.tested_steps} strings",
                statistic=f"p = {row['pvalue']:.3g}",
                tv_upper=None,
                bound="no bound over all sequences; power stated",
                held=held,
                caveat=f"{row['tests']} tests at level {row['level']:g} together; they see an effect of "
                f"{row['detects']:.2g} ({row['effect']}) with power 0.8",
            )
    control = tested.get("one component per sequence")
    if control is not None:
        recorder.check(
            f"one component per sequence is rejected (p = {control['pvalue']:.1e}, {label})",
            control["pvalue"] < control["level"],
        )


def _texts(trace: Trace) -> dict[str, Any]:
    """Prompts and continuations as bytes, as text, and back; and one row with the component of every piece."""
    shared = trace.model.components[0].shared
    prompts = all(shared.bytes_of(ids) == text.encode() for ids, text in zip(trace.prompts, PROMPTS, strict=True))
    eos = trace.model.vocabulary.eos
    written = [shared.bytes_of(token for token in path if token not in eos) for path in trace.sequences()]
    texts = trace.texts()
    same = [data.decode("utf-8", "replace") == text for data, text in zip(written, texts, strict=True)]
    back = [
        shared.bytes_of(shared.encode(text)) == data
        for data, text in zip(written, texts, strict=True)
        if "\N{REPLACEMENT CHARACTER}" not in text
    ]
    assert trace.components is not None
    pieces = [
        [shared.decode([token]), int(component)]
        for token, component in zip(trace.sequences()[0], trace.components[0].tolist(), strict=False)
    ]
    first = range(0, len(texts), len(texts) // len(PROMPTS))
    return {
        "prompts_survive": prompts,
        "rows_survive": sum(same),
        "whole_texts": len(back),
        "whole_texts_survive": sum(back),
        "sample": {"prompt": PROMPTS[0], "pieces": pieces},
        "samples": [{"prompt": text, "text": texts[row]} for text, row in zip(PROMPTS, first, strict=True)],
    }


def _alike(one: Trace, other: Trace) -> bool:
    return one.tokens.shape == other.tokens.shape


def _judge(
    recorder: Recorder, label: str, config: Config, trace: Trace, names: Sequence[str],
    found: Sequence[dict[str, Any]], laws: dict[str, Any], text: dict[str, Any],
) -> None:  # fmt: skip
    for name, row in zip(names, found, strict=True):
        mean, largest = row["floor"]["mean"], row["floor"]["max"]
        recorder.check(
            f"{name}: sessions give the law of a fresh reading, mean TV {mean:.1e}, largest {largest:.1e} ({label})",
            largest < _largest_floor(config),
        )
        recorder.check(
            f"{name}: every history returns from its tokens byte for byte ({label})", row["histories_lost"] == 0
        )
    anew = sum(row["split_anew"]["steps"] for row in found)
    if max(_longest(component) for component in trace.model.components) > 1:
        # Where every string is one byte, nothing is ever split anew and there is one way to read.
        recorder.check(f"the end of a history is split anew in {anew} steps: the roll-back is seen ({label})", anew > 0)
        worst = max(row["piecewise"]["tv"] for row in found)
        recorder.check(
            f"a reading string by string would be off by TV {worst:.2g}, far above the floor ({label})",
            worst > 10 * _largest_floor(config),
        )
    held = text["rows_survive"] == len(trace.tokens) and text["whole_texts"] == text["whole_texts_survive"]
    recorder.check(
        f"prompts and continuations with accents, emoji, other scripts and code return byte for byte ({label})",
        text["prompts_survive"] and held,
    )
    one_read = trace.cost.reads <= int(trace.lengths.sum())
    recorder.check(f"ME reads at most one law a token ({label})", one_read)
    upper = float(laws["mixture"].max())
    recorder.find(
        claim="C8",
        statement="separable alignment over byte strings: ME's step law is CE's",
        models=label,
        n=f"{len(laws['mixture']):,} prefixes in {len(trace.tokens)} rows",
        statistic=f"largest TV between sessions and definition {upper:.1e}",
        tv_upper=upper,
        bound="exact at these prefixes, up to rounding",
        held=upper < _largest_floor(config),
        caveat="each token law is pushed forward to byte strings before it is mixed; not the published alignment",
    )


def _longest(component: Aligned) -> int:
    return max(len(string) for string in component.token_bytes.strings if string is not None)


def _largest_floor(config: Config) -> float:
    """What rounding may do to one law: `floor` in float32, some hundredths in half precision."""
    eps = torch.finfo(getattr(torch, config.dtype)).eps
    return max(config.floor, 16 * eps) if config.dtype != "float32" else config.floor
