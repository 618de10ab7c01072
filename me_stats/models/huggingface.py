"""Any causal language model that transformers loads, as a LanguageModel."""

from __future__ import annotations

import hashlib
import json
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from me_stats.devices import torch_dtype
from me_stats.models.base import LanguageModel, NaNLawError, Prefix, PrefixSession, Session
from me_stats.models.catalog import resolve
from me_stats.models.graphs import GraphPool
from me_stats.models.packed import attention_for
from me_stats.models.ragged import RaggedSession
from me_stats.vocabulary import Vocabulary

_LOGIT_BYTES = 256 << 20  # teacher-forced logits that are held at a time


class TransformersModel(LanguageModel):
    """A Hugging Face causal LM: next-token laws in float32, whatever the weights' dtype.

    Parameters
    ----------
    name
        A catalog name (``"bundled:prose"``, ``"smollm2-135m"``), a local folder, a hub id, or a loaded
        ``PreTrainedModel`` (then give `tokenizer` too, unless prompts are token ids).
    dtype
        ``"float32"``, ``"bfloat16"`` or ``"float16"``; default float32 by name, unchanged for a loaded model.
    device
        ``"cpu"``, ``"cuda"``, ``"cuda:1"``, ...; default CPU by name, unchanged for a loaded model.
    max_cache_gb
        Bound on the keys and values of one session, in GiB; samplers split their rows into batches that
        stay below it.
    session
        ``"ragged"``: lazy key-value synchronisation with one forward for all rows that are read.
        ``"prefix"``: no cache, for architectures that keep other state than keys and values.
    graphs
        Replay forwards that recur as CUDA graphs (`me_stats.models.graphs`): a small batch is then as fast as the
        device, not as its host. Default: on a CUDA device with a ragged session, where the network can be captured.

    Attributes
    ----------
    context_length
        Longest sequence whose law depends on its tokens alone, or None where the config names none.
    source
        Identity of the weights: hub commit, or sha256.

    Raises
    ------
    ValueError
        Unknown dtype, a checkpoint that is broken, incomplete or not a causal LM, an architecture that the
        ragged session cannot serve, a prompt that is empty or past the context window, logits with NaN.

    Notes
    -----
    `log_probs` is a padded prefill through the model's usual attention with no cache: the definition that
    the session is tested against. Logit rows past the tokenizer's last id carry no token and are left out.
    Opening a model runs four forwards of a few tokens: they refuse a network that looks ahead, and an
    architecture whose session leaves the definition.
    """

    def __init__(
        self,
        name: str | Path | PreTrainedModel,
        *,
        dtype: Literal["float32", "bfloat16", "float16"] | None = None,
        device: str | None = None,
        tokenizer: Any = None,
        max_cache_gb: float = 4.0,
        session: Literal["ragged", "prefix"] = "ragged",
        graphs: bool | None = None,
    ) -> None:
        wanted = None if dtype is None else torch_dtype(dtype)
        if session not in ("ragged", "prefix"):
            raise ValueError(f"session must be 'ragged' or 'prefix', got {session!r}")
        if max_cache_gb <= 0:
            raise ValueError(f"max_cache_gb must be positive, got {max_cache_gb}")
        if isinstance(name, PreTrainedModel):
            self.name = name.config.name_or_path or type(name).__name__
            self.network: Any = name if wanted is None else name.to(wanted)
            self.source: dict[str, str] = {}
        else:
            self.name, device = str(name), device or "cpu"
            self.network, tokenizer = _load(self.name, wanted or torch.float32, tokenizer)
            self.source = _identity(resolve(self.name), self.network)
        if device is not None:
            self.network = self.network.to(device)
        self.network = self.network.eval().requires_grad_(False)
        self._session_kind = session
        self._graphs: GraphPool | None = None  # the probe runs without
        self._cache_bytes, self._token_bytes = int(max_cache_gb * 2**30), 0
        self.context_length = _context_length(self.network.config.get_text_config())
        self.vocabulary = vocabulary_of(self.network, tokenizer)
        if session == "ragged":
            self._refusing(lambda: self.network.set_attn_implementation(attention_for(self.network)))
        self._probe()
        self._graphs = self._graph_pool(graphs)

    @property
    def graphs(self) -> bool:
        """Whether forwards that recur are replayed as CUDA graphs."""
        return self._graphs is not None

    def _graph_pool(self, wanted: bool | None) -> GraphPool | None:
        able = self.device.type == "cuda" and self._session_kind == "ragged"
        if wanted and not able:
            raise ValueError(f"graphs=True needs a CUDA device and session='ragged'; {self.name} is on {self.device}")
        if wanted is False or not able:
            return None
        try:
            return GraphPool(self.network, self.vocabulary.size).tried()
        except RuntimeError as error:
            if wanted:
                raise ValueError(f"{self.name} cannot be captured as a CUDA graph: {_first_line(error)}") from error
            warnings.warn(f"{self.name} runs without CUDA graphs: {_first_line(error)}", stacklevel=3)
            return None

    def _probe(self) -> None:
        """Refuse what would be silently wrong: a network that looks ahead, a session off its definition.

        Architectures differ in ways that no flag tells (position offsets, masks of their own, several
        attentions in a layer), so four forwards of at most four tokens ask the network itself.
        """
        if (self.context_length or 5) < 5:
            return
        path = tuple(self.vocabulary.size * k // 9 for k in (1, 3, 5, 7))
        (laws,) = self.path_log_probs([path[:1]], [(*path[1:], path[0])])  # after 1, 2, 3 and 4 tokens
        # Far above rounding, far below what a wrong position or a leaking row does.
        tolerance = 0.25 if self.dtype.itemsize < 4 else 0.01
        if _distance(self.log_probs([path[:2]]), laws[1:2]) > tolerance:
            raise ValueError(f"{self.name} is not a causal language model: its law of a token depends on later ones")
        if self._session_kind == "ragged":
            distance = self._refusing(lambda: _distance(self._lagging_laws(path), laws[2:]))
            if distance > tolerance:
                raise ValueError(_no_cache(self.name, f"laws are off by a total variation of {distance:.2g}"))

    def _lagging_laws(self, path: tuple[int, ...]) -> Tensor:
        """Laws after 3 and 4 tokens of `path` by a session whose rows have different lags."""
        session = self.session([path[:1], path[:3]], max_new_tokens=2)
        assert isinstance(session, RaggedSession)
        session.log_probs(np.array([0, 1]))
        for row, token in ((0, path[1]), (0, path[2]), (1, path[3])):
            session.append(np.array([row]), torch.tensor([token]))
        laws = session.log_probs(np.array([0, 1]))
        self._token_bytes = session.cache_bytes_per_token
        return laws

    def _refusing(self, attempt: Callable[[], Any]) -> Any:
        try:
            return attempt()
        except NaNLawError:
            raise
        except (TypeError, ValueError) as error:
            raise ValueError(_no_cache(self.name, _first_line(error))) from error

    @property
    def dtype(self) -> torch.dtype:
        return self.network.dtype

    @property
    def device(self) -> torch.device:
        return self.network.device

    @property
    def weight_bytes(self) -> int:
        """Bytes of all parameters: what one decoding step has to read."""
        return sum(parameter.nbytes for parameter in self.network.parameters())

    def cache_bytes_per_token(self) -> int:
        """Bytes of keys and values that one token of one row takes over all layers; 0 without a cache."""
        return self._token_bytes

    def rows_that_fit(self, length: int) -> int:
        """Rows of `length` tokens whose keys and values stay below ``max_cache_gb``."""
        return max(1, self._cache_bytes // max(1, self._token_bytes * length))

    def log_probs(self, prefixes: Sequence[Prefix]) -> Tensor:
        self._check(prefixes)
        laws = [law[-1:] for law in self._prefill(prefixes, [len(prefix) - 1 for prefix in prefixes])]
        return torch.cat(laws) if laws else torch.empty((0, self.vocabulary.size), device=self.device)

    def session(self, prompts: Sequence[Prefix], *, max_new_tokens: int | None = None) -> Session:
        self._check(prompts, [max_new_tokens or 0] * len(prompts))
        if self._session_kind == "prefix":
            return PrefixSession(self, prompts)
        return RaggedSession(
            self.network,
            prompts,
            size=self.vocabulary.size,
            max_new_tokens=max_new_tokens,
            max_length=self.context_length,
            graphs=self._graphs,
        )

    def path_log_probs(self, prompts: Sequence[Prefix], tokens: Sequence[Prefix]) -> Iterator[Tensor]:
        self._check(prompts, list(map(len, tokens)))
        rows = [(*prompt, *path[:-1]) for prompt, path in zip(prompts, tokens, strict=True) if len(path)]
        starts = [len(prompt) - 1 for prompt, path in zip(prompts, tokens, strict=True) if len(path)]
        laws = self._prefill(rows, starts)
        for path in tokens:
            yield next(laws) if len(path) else torch.empty((0, self.vocabulary.size), device=self.device)

    def _prefill(self, rows: Sequence[Prefix], starts: Sequence[int]) -> Iterator[Tensor]:
        """Laws after positions starts[row]..end of each row, by right-padded batches without a cache."""
        index = 0
        while index < len(rows):
            taken, longest = 0, 0
            while index + taken < len(rows):
                wider = max(longest, len(rows[index + taken]))
                if taken and (taken + 1) * wider * self.vocabulary.size * 4 > _LOGIT_BYTES:
                    break
                longest, taken = wider, taken + 1
            part = rows[index : index + taken]
            ids = np.zeros((taken, longest), dtype=np.int64)
            for i, row in enumerate(part):
                ids[i, : len(row)] = row
            first = min(starts[index : index + taken])
            with torch.no_grad():
                # Causal attention never looks right, so padding on the right needs no mask.
                logits = self.network(
                    input_ids=torch.from_numpy(ids).to(self.device), use_cache=False, logits_to_keep=longest - first
                ).logits[:, :, : self.vocabulary.size]
            for i, row in enumerate(part):
                laws = logits[i, starts[index + i] - first : len(row) - first].float().log_softmax(-1)
                # A NaN anywhere in a row's logits is one everywhere.
                if bool(laws[:, 0].isnan().any()):
                    raise NaNLawError(f"{self.name} returned NaN logits; check the checkpoint, or use a wider dtype")
                yield laws
            index += taken

    def _check(self, prompts: Sequence[Prefix], extra: Sequence[int] | None = None) -> None:
        if not all(map(len, prompts)):
            raise ValueError(f"an empty prompt gives {self.name} nothing to read; start with at least one token")
        for prompt, new in zip(prompts, extra or [0] * len(prompts), strict=True):
            if self.context_length is not None and len(prompt) + new > self.context_length:
                raise ValueError(
                    f"prompt of {len(prompt)} tokens and {new} new ones exceed the context window of {self.name} "
                    f"({self.context_length} tokens); shorten the prompt or max_new_tokens"
                )

    def __repr__(self) -> str:
        return f"TransformersModel({self.name!r}, {str(self.dtype).removeprefix('torch.')})"


def _load(name: str, dtype: torch.dtype, tokenizer: Any) -> tuple[Any, Any]:
    source = resolve(name)
    try:
        config = AutoConfig.from_pretrained(source)
        network, info = AutoModelForCausalLM.from_pretrained(
            source, dtype=dtype, config=config, output_loading_info=True
        )
    except Exception as error:  # a broken file surfaces as whatever its parser raises
        if "Unrecognized configuration class" in str(error) or "Unrecognized model" in str(error):
            raise ValueError(f"{name} is not a causal language model that transformers can load") from error
        raise ValueError(f"cannot load {name}: {_first_line(error)}") from error
    # transformers fills absent weights with random numbers and only logs it.
    absent = sorted(map(str, info["missing_keys"]))
    if absent:
        raise ValueError(f"cannot load {name}: the checkpoint lacks {len(absent)} weights, such as {absent[0]}")
    if tokenizer is None:
        try:
            tokenizer = AutoTokenizer.from_pretrained(source)
        except Exception as error:
            raise ValueError(
                f"cannot load the tokenizer of {name} ({_first_line(error)}); give one as tokenizer="
            ) from error
    return network, tokenizer


def _identity(source: str, network: Any) -> dict[str, str]:
    """What tells these weights from others: a hub commit, or the sha256 of the local files."""
    commit = getattr(network.config, "_commit_hash", None)
    if commit:
        return {"hub": source, "commit": commit}
    manifest = Path(source) / "me_stats.json"
    if manifest.is_file():
        return {"sha256": " ".join(json.loads(manifest.read_text())["weights_sha256"].values())}
    weights = sorted(Path(source).glob("*.safetensors"))
    digest = hashlib.sha256()
    for path in weights:
        with path.open("rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    return {"sha256": digest.hexdigest()} if weights else {}


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__


def _no_cache(name: str, reason: str) -> str:
    return f"{name} cannot keep keys and values per row ({reason}); use session='prefix' (correct, but without a cache)"


def _distance(laws: Tensor, others: Tensor) -> float:
    """Largest total variation between the rows of two laws (B, V)."""
    return float((laws.exp() - others.exp()).abs().sum(-1).max() / 2)


def _context_length(config: Any) -> int | None:
    """The context window, up to where its positions mean the same for every row of a batch."""
    window: int | None = getattr(config, "max_position_embeddings", None)
    rope = getattr(config, "rope_parameters", None) or {}
    for parameters in (rope, *(value for value in rope.values() if isinstance(value, dict))):
        if parameters.get("rope_type") == "longrope":
            # Past this length the longest row changes the frequencies of all, those of stored keys excepted.
            original: int | None = parameters.get("original_max_position_embeddings")
            window = min(filter(None, (window, original)), default=None)
    return window


def vocabulary_of(network: Any, tokenizer: Any) -> Vocabulary:
    """The ids that a network gives laws over and its tokenizer (None: none) names, with the ends it declares."""
    width = network.config.get_text_config().vocab_size
    known = width if tokenizer is None else min(width, len(tokenizer))
    declared = network.generation_config.eos_token_id if network.generation_config is not None else None
    if declared is None:
        declared = network.config.get_text_config().eos_token_id
    eos = [declared] if isinstance(declared, int) else list(declared or [])
    fingerprint = "ids"
    if tokenizer is not None:
        table = sorted(tokenizer.get_vocab().items(), key=lambda item: (item[1], item[0]))
        fingerprint = hashlib.sha256(json.dumps(table).encode()).hexdigest()[:16]
    return Vocabulary(known, eos=tuple(t for t in eos if 0 <= t < known), fingerprint=fingerprint, tokenizer=tokenizer)
