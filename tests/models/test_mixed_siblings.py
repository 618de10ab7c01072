"""Prose over bytes mixed with words over pieces of text: what holds for mixed vocabularies, on real transformers."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from me_stats import exact
from me_stats.divergence import tv_distance
from me_stats.mixing import ConstantMixing
from me_stats.models import Ensemble, TopK
from me_stats.models.aligned import Aligned, AlignedSession
from me_stats.presets import MIXED_SIBLINGS, Setting, open_setting
from me_stats.samplers import CESampler, MESampler
from me_stats.testing import check_language_model, check_session
from me_stats.trace import Trace
from tests.stand_ins import reads_alone

# Accents, emoji, other scripts, code, newlines, controls spelled out, the end of a word and the middle of one.
TEXTS = (
    "The names of the ",
    "Un café, naï",
    "日本語 and 😀",
    "def read(path):\n    ",
    "class Node:\r\n\t# Ünïcödé\n\n\n",
    "</s> is <0x41> and <s>",
    "\n",
)
STEPS = 24


@pytest.fixture(scope="module")
def setting() -> Setting:
    return open_setting(MIXED_SIBLINGS)


@pytest.fixture(scope="module")
def trace(setting: Setting) -> Trace:
    return MESampler(setting.ensemble).sample(TEXTS, n=2, max_new_tokens=STEPS, seed=5)


def parts(setting: Setting) -> tuple[Aligned, Aligned]:
    prose, words = setting.ensemble.components
    assert isinstance(prose, Aligned)
    assert isinstance(words, Aligned)
    return prose, words


def paths(trace: Trace) -> Iterator[tuple[tuple[int, ...], tuple[int, ...]]]:
    """Prompt and continuation of each row, without its end."""
    ends = trace.model.vocabulary.eos
    for row, place in enumerate(trace.prompt_index.tolist()):
        tokens = trace.tokens[row, : int(trace.lengths[row])].tolist()
        yield trace.prompts[place], tuple(token for token in tokens if token not in ends)


def rereadings(aligned: Aligned, prompt: tuple[int, ...], path: tuple[int, ...]) -> int:
    """Steps after which what the model had read is no longer how it reads the longer history."""
    reads = [aligned.read(aligned.shared.bytes_of((*prompt, *path[:step]))) for step in range(len(path) + 1)]
    return sum(later[: len(sooner)] != sooner for sooner, later in itertools.pairwise(reads))


# --- the law -----------------------------------------------------------------------------------------


def test_the_pair_shares_its_strings_and_one_end(setting: Setting) -> None:
    prose, words = parts(setting)
    shared = prose.shared
    assert words.shared is shared
    assert prose.token_bytes.eos == (0,)
    assert words.token_bytes.eos == (1, 4)
    assert shared.vocabulary.eos == (len(shared.strings),)
    assert {len(string) for string in shared.strings} >= {1, 2, 3, 8}
    assert set(shared.strings) > {bytes([value]) for value in range(256)}
    assert words.model.context == (2,)  # type: ignore[attr-defined]
    assert words.read("é".encode()) == words.token_bytes.encode(b"\xc3") + words.token_bytes.encode(b"\xa9")
    check_language_model(setting.ensemble, TEXTS)


def test_the_law_of_words_is_the_sum_over_its_ids(setting: Setting) -> None:
    _, words = parts(setting)
    table, shared = words.token_bytes, words.shared
    prefixes = [tuple(shared.encode(text)) for text in TEXTS]
    # From the network itself: its own ids after its begin, as it would be run without any of this.
    histories = [torch.tensor([(2, *table.encode(text.encode()))]) for text in TEXTS]
    network = setting.models[1][1].network
    with torch.inference_mode():
        logits = torch.cat([network(input_ids=ids).logits[:, -1, : table.size] for ids in histories])
    expected = torch.zeros(len(TEXTS), shared.vocabulary.size, dtype=torch.float64)
    for token, mass in enumerate(logits.double().softmax(-1).T):
        string = table.strings[token]
        if string is not None:
            expected[:, shared.strings.index(string)] += mass
        elif token in table.eos:
            expected[:, shared.vocabulary.eos[0]] += mass
    lost = 1 - expected.sum(-1)
    assert torch.allclose(words.dropped_mass(prefixes).double(), lost, atol=1e-5)
    law = words.log_probs(prefixes).double().exp()
    assert (law - expected / (1 - lost[:, None])).abs().sum(-1).max() < 2e-4
    assert lost[0] < 1e-3 < lost.max()  # a control gets mass where words has never seen the like, and loses it


def test_either_end_of_words_ends_the_text(setting: Setting) -> None:
    """Documents close with the one or the other, so that both carry the mass of the shared end."""
    _, words = parts(setting)
    history = words.shared.encode("The value of the object is returned.\n")
    own = words.model.log_probs([words.token_bytes.encode(words.shared.bytes_of(history))])[0].exp()
    assert min(own[1], own[4]) > 1e-5
    law = words.log_probs([history])[0].exp()
    assert float(law[-1]) == pytest.approx(float(own[1] + own[4]), rel=1e-2)


def test_the_two_laws_are_far_apart_and_overlap(setting: Setting, trace: Trace) -> None:
    distances = []
    for prompt, path in list(paths(trace))[:6]:
        laws = [torch.cat(list(part.path_log_probs([prompt], [path]))) for part in parts(setting)]  # (T, S) of each
        distances += torch.as_tensor(tv_distance(*laws, check=False)).tolist()
    assert 0.4 < np.mean(distances) < 0.99


# --- sessions ----------------------------------------------------------------------------------------


def along(model: Any, prompts: list[tuple[int, ...]], rows: list[tuple[int, ...]], period: int) -> Tensor:
    """Largest TV between a session and `log_probs`, where row r is read at each step that r % period divides."""
    session, largest, unread = model.session(prompts), torch.zeros(()), [0] * len(rows)
    for step in range(max(map(len, rows)) + 1):
        alive = np.array([r for r, row in enumerate(rows) if len(row) >= step])
        read = np.array([r for r in alive.tolist() if (step + r) % period == 0 or step == len(rows[r])], dtype=np.int64)
        if len(read):
            laws = model.log_probs([(*prompts[r], *rows[r][:step]) for r in read.tolist()])
            distance = torch.as_tensor(tv_distance(session.log_probs(read), laws, check=False)).max()
            largest = torch.maximum(largest, distance.float())
        for r in read.tolist():
            unread[r] = step
        on = np.array([r for r in alive.tolist() if len(rows[r]) > step], dtype=np.int64)
        if len(on):
            session.append(on, torch.tensor([rows[r][step] for r in on.tolist()]))
    return largest


@pytest.mark.parametrize("period", [1, 3])
def test_sessions_are_the_laws_along_rows_of_me(setting: Setting, trace: Trace, period: int) -> None:
    rows = list(paths(trace))
    rows = [(prompt, path[: len(path) - number % 5]) for number, (prompt, path) in enumerate(rows)]  # ragged
    _, words = parts(setting)
    again = sum(rereadings(words, prompt, path) for prompt, path in rows)
    assert again > len(rows)  # what another vocabulary writes changes how words reads it, all the time
    for part in parts(setting):
        assert along(part, [prompt for prompt, _ in rows], [path for _, path in rows], period) < 1e-4


def test_components_of_a_session_switch_and_fall_behind(setting: Setting) -> None:
    check_session(setting.ensemble, TEXTS, steps=8, schedules=2, seed=2)


def test_reading_strings_alone_is_rejected(setting: Setting, trace: Trace, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(AlignedSession, "_catch_up", reads_alone)
    rows = list(paths(trace))
    prose, words = (
        along(part, [prompt for prompt, _ in rows], [path for _, path in rows], 1) for part in parts(setting)
    )
    assert prose < 1e-4  # a byte is read alone anyway
    assert words > 0.1


# --- whole sequences ---------------------------------------------------------------------------------


def truncated(setting: Setting, top: int) -> Ensemble:
    return Ensemble([part.warped(TopK(top)) for part in parts(setting)], ConstantMixing([0.6, 0.4]))


@pytest.mark.parametrize("steps", [2, 3])
@pytest.mark.parametrize("kind", [CESampler, MESampler])
def test_ce_and_me_have_the_law_of_the_ensemble(setting: Setting, kind: Any, steps: int) -> None:
    ensemble = truncated(setting, 2)
    halves = [*(bytes([byte]) for byte in "é".encode()), "日".encode()[:2]]  # histories that end within a character
    for text in (*TEXTS[:5], *halves[:1], halves[2]):
        prompt = setting.ensemble.vocabulary.tokenizer.encode(text)
        law = exact.sequence_law(ensemble, prompt, max_new_tokens=steps)
        assert law.total == pytest.approx(1, abs=1e-5)
        assert len(law.rows) > 2**steps
        assert exact.sampler_law(kind(ensemble), prompt, max_new_tokens=steps).tv_distance(law) < 1e-5


def test_the_exact_law_rejects_reading_strings_alone(setting: Setting, monkeypatch: pytest.MonkeyPatch) -> None:
    ensemble = truncated(setting, 2)
    prompt = setting.ensemble.vocabulary.tokenizer.encode("The na")
    law = exact.sequence_law(ensemble, prompt, max_new_tokens=3)
    assert exact.sampler_law(MESampler(ensemble), prompt, max_new_tokens=3).tv_distance(law) < 1e-5
    monkeypatch.setattr(AlignedSession, "_catch_up", reads_alone)
    assert exact.sampler_law(MESampler(ensemble), prompt, max_new_tokens=3).tv_distance(law) > 0.01


# --- text --------------------------------------------------------------------------------------------


def test_generations_decode_byte_for_byte(setting: Setting, trace: Trace) -> None:
    prose, words = parts(setting)
    shared = prose.shared
    for (prompt, path), place, text in zip(paths(trace), trace.prompt_index.tolist(), trace.texts(), strict=True):
        assert shared.bytes_of(prompt) == TEXTS[place].encode()
        history = shared.bytes_of((*prompt, *path))
        assert text == shared.bytes_of(path).decode("utf-8", "replace")
        assert words.token_bytes.bytes_of(words.read(history)) == history
        assert bytes(prose.read(history)) == history
    ended = [reason == "eos" for reason in trace.stop_reason]
    last = [int(trace.tokens[row, int(trace.lengths[row]) - 1]) for row in range(len(ended))]
    assert [token == shared.vocabulary.eos[0] for token in last] == ended
    used = trace.components[trace.components >= 0]  # type: ignore[index, operator]
    assert set(used.tolist()) == {0, 1}


def test_rows_of_a_batch_are_those_of_rows_alone(setting: Setting, trace: Trace) -> None:
    for row in (0, 7, 11):
        prompt = trace.prompts[int(trace.prompt_index[row])]
        alone = MESampler(setting.ensemble).sample([prompt], max_new_tokens=STEPS, seed=5, rows=[row])
        assert alone.tokens[0].tolist() == trace.tokens[row, : int(trace.lengths[row])].tolist()
