"""Components as things that write tokens: a served model, under a context, or over byte strings."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any

from me_stats.models.aligned import Aligned
from me_stats.models.base import Prefix
from me_stats.models.conditioned import Conditioned
from me_stats.served.model import ServedModel
from me_stats.served.seeds import next_seed

# The seed of the request that begins so many tokens after the run does, in so many bits.
Seeds = Callable[[int, int], int]


class Arm(ABC):
    """One component of a served ensemble. `model` is where it is served."""

    model: ServedModel

    @abstractmethod
    def write(self, history: Prefix, count: int, seeds: Seeds, lane: int | None) -> list[int]:
        """`count` tokens after `history`, in shared ids; fewer only where the last ends the sequence."""


class PlainArm(Arm):
    """A served model that reads a context before the history."""

    def __init__(self, model: ServedModel, context: Prefix) -> None:
        self.model, self.context = model, tuple(context)

    def write(self, history: Prefix, count: int, seeds: Seeds, lane: int | None) -> list[int]:
        return self.model.write((*self.context, *history), count, seeds(0, self.model.dialect.seed_bits), lane)


class AlignedArm(Arm):
    """A served model over byte strings, by draws instead of laws.

    The law of `Aligned` is that of the bytes of an id drawn after the canonical reading of the history, given that the
    id stands for something. So an id is drawn, and drawn again if it is a control. The ids that the server wrote behind
    it count as long as the reading of what was written goes through them; from where it does not, they were drawn after
    another prefix, and are thrown away. Whether it does depends on ids before them alone, so nothing is selected.
    """

    def __init__(self, aligned: Aligned, inner: PlainArm) -> None:
        self.aligned, self.inner, self.model = aligned, inner, inner.model
        self.targets = aligned.shared.targets(aligned.token_bytes).tolist()

    def write(self, history: Prefix, count: int, seeds: Seeds, lane: int | None) -> list[int]:
        shared = self.aligned.shared.bytes_of(history)
        written: list[int] = []
        refused = 0
        while len(written) < count:
            begun, read = len(written), self.aligned.read(shared)

            def own(offset: int, bits: int, begun: int = begun, refused: int = refused) -> int:
                return next_seed(seeds(begun, bits), refused, bits=bits)

            for token in self.inner.write(read, count - begun, own, lane):
                target = self.targets[token]
                if target < 0:
                    break
                written.append(target)
                shared += self.aligned.written(target)
                if target in self.aligned.vocabulary.eos:
                    return written
                read = (*read, token)
                if self.aligned.read(shared) != read:
                    break
            refused = refused + 1 if len(written) == begun else 0
        return written


def open_arm(component: Any, name: str) -> Arm:
    """How `component` is asked for tokens; TypeError if a server cannot draw from its law."""
    if isinstance(component, Aligned):
        return AlignedArm(component, _plain(component.model, name))
    return _plain(component, name)


def _plain(component: Any, name: str) -> PlainArm:
    context: tuple[int, ...] = ()
    inner = component
    while isinstance(inner, Conditioned):
        # An outer context is read before an inner one's prefix, hence after the inner context.
        context, inner = (*inner.context, *context), inner.model
    if not isinstance(inner, ServedModel):
        raise TypeError(
            f"{name} must be a ServedModel, Conditioned or Aligned over one, for a server to draw from its law; got "
            f"{component!r:.80}. MESampler and CESampler take any model, and draw here from laws"
        )
    return PlainArm(inner, context)
