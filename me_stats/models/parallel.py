"""An ensemble whose components run at once: each in a process of its own, or each on a CUDA stream of its own."""

from __future__ import annotations

import signal
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from multiprocessing.connection import Connection, wait
from typing import Any, TypeGuard

import numpy as np
import torch
from torch import Tensor
from torch.multiprocessing import get_context

from me_stats.mixing import Mixing
from me_stats.models.base import Cost, LanguageModel, Prefix, open_session
from me_stats.models.ensemble import Ensemble, EnsembleSession
from me_stats.parts import WorkerDied

Opener = Callable[[], LanguageModel]
_PATIENCE = 5  # seconds that a process gets to end by itself


class ParallelEnsemble(Ensemble):
    """An `Ensemble`, law and tokens, whose session reads all K components at the same time.

    Parameters
    ----------
    components
        All from `start_components`, one process each, or all models on one CUDA device, which then run on a thread and
        a stream each in this process.
    mixing
        As of `Ensemble`.

    Raises
    ------
    ValueError, TypeError
        As `Ensemble`; TypeError for components that can only run one after the other.
    WorkerDied
        When a law is asked for and a process has died.

    Use it in a ``with`` statement, or call `close`: it ends the processes. While ME runs one component a token, this
    runs them all, side by side: less time where the device has room for it, and as much work.
    """

    def __init__(self, components: Sequence[Any], mixing: Mixing) -> None:
        super().__init__(components, mixing)
        if not (_are_processes(self.components) or all(map(_is_on_cuda, self.components))):
            raise TypeError(
                "components must come from start_components([...]), or be models on one CUDA device; others can only "
                "run one after the other, as Ensemble does"
            )

    def session(self, prompts: Sequence[Prefix], *, max_new_tokens: int | None = None) -> EnsembleSession:
        return ParallelSession(self, prompts, max_new_tokens=max_new_tokens)

    def close(self) -> None:
        """End the processes of the components; again is no error."""
        for component in self.components:
            if isinstance(component, ComponentProcess):
                component.close()

    def __enter__(self) -> ParallelEnsemble:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class ParallelSession(EnsembleSession):
    """Asks all components for their laws before it waits for the first."""

    def __init__(self, model: ParallelEnsemble, prompts: Sequence[Prefix], *, max_new_tokens: int | None) -> None:
        self._close: Callable[[], None] | None = None
        if _are_processes(model.components):
            self._close = model.close
            # Each takes its share of the threads that this process would use.
            share = max(1, torch.get_num_threads() // len(model.components))
            for component in model.components:
                component.request("threads", share)
            for component in model.components:
                component.reply()
        super().__init__(model, prompts, max_new_tokens=max_new_tokens)

    def log_probs(self, rows: np.ndarray) -> Tensor:
        laws = self._in_processes(rows) if self._close is not None else self._on_streams(rows)
        return self._combine(laws, self.mixing.log_weights(rows))

    def _in_processes(self, rows: np.ndarray) -> list[Tensor]:
        sessions: Sequence[Any] = self.components
        try:
            for session in sessions:
                session.ask(rows)
            return [session.answer() for session in sessions]
        except BaseException:
            assert self._close is not None
            self._close()  # answers may be on their way that nobody will take
            raise

    def _on_streams(self, rows: np.ndarray) -> list[Tensor]:
        pool, streams = self._pool
        here = torch.cuda.current_stream()

        def read(session: Any, stream: Any) -> Tensor:
            with torch.cuda.stream(stream):
                stream.wait_stream(here)
                laws: Tensor = session.log_probs(rows)
                return laws

        laws = list(pool.map(read, self.components, streams))
        for law, stream in zip(laws, streams, strict=True):
            here.wait_stream(stream)
            law.record_stream(here)
        return laws

    @cached_property
    def _pool(self) -> tuple[ThreadPoolExecutor, list[Any]]:
        k = len(self.components)
        return ThreadPoolExecutor(k), [torch.cuda.Stream() for _ in range(k)]


def start_components(openers: Sequence[Opener]) -> list[ComponentProcess]:
    """Start a process for each opener, all at once, and wait until every model is open.

    An opener is a picklable function that returns a LanguageModel on the CPU, such as
    ``partial(TransformersModel, "smollm2-135m")``; a script that calls this needs the usual
    ``if __name__ == "__main__":``. Errors of an opener are raised here, and then no process is left.
    """
    started: list[ComponentProcess] = []
    try:
        started += [ComponentProcess(opener) for opener in openers]
        for component in started:
            component.wait_until_open()
    except BaseException:
        for component in started:
            component.close()
        raise
    return started


class ComponentProcess(LanguageModel):
    """A language model in a process of its own, from `start_components`.

    Laws come back through memory that both processes map; requests and errors through a pipe.
    """

    def __init__(self, opener: Opener) -> None:
        context = get_context("spawn")
        self._pipe, theirs = context.Pipe()
        # A daemon ends with this process, whatever ends it.
        self._process: Any = context.Process(target=_serve, args=(theirs, opener), daemon=True)
        self._process.start()
        theirs.close()
        self._sessions = 0
        self.finished: list[int] = []  # sessions that nobody holds any more
        self._room: Tensor | None = None

    def wait_until_open(self) -> None:
        """Take the vocabulary when the model is there."""
        self.vocabulary = self.reply()

    def log_probs(self, prefixes: Sequence[Prefix]) -> Tensor:
        self.request("laws", [tuple(prefix) for prefix in prefixes], self.room(len(prefixes)))
        return self.laws(self.reply())

    def session(self, prompts: Sequence[Prefix], *, max_new_tokens: int | None = None) -> ProcessSession:
        return ProcessSession(self, prompts, max_new_tokens)

    def new_session(self, prompts: Sequence[Prefix], max_new_tokens: int | None) -> int:
        """Open a session over there and return its number."""
        self._sessions += 1
        finished, self.finished = self.finished, []
        self.request("open", self._sessions, [tuple(prompt) for prompt in prompts], max_new_tokens, finished)
        self.reply()
        return self._sessions

    def room(self, rows: int) -> Tensor | None:
        """Shared memory for `rows` laws where the other side needs more than it has, else None."""
        if self._room is not None and len(self._room) >= rows:
            return None
        self._room = torch.empty((rows, self.vocabulary.size)).share_memory_()
        return self._room

    def laws(self, rows: int) -> Tensor:
        """The first laws in the shared memory; a copy, since the next read writes there."""
        assert self._room is not None
        return self._room[:rows].clone()

    def request(self, *message: Any) -> None:
        """Send a request, whose `reply` must be taken before the next one."""
        if self._pipe.closed:
            raise WorkerDied("this component's process was closed; start_components again")
        try:
            self._pipe.send(message)
        except OSError as error:
            raise self._died() from error

    def reply(self) -> Any:
        """The answer to the last request; errors of the other side are raised here."""
        try:
            if self._pipe not in wait([self._pipe, self._process.sentinel]):
                raise self._died()
            error, value = self._pipe.recv()
        except (EOFError, ConnectionError) as error:
            raise self._died() from error
        except KeyboardInterrupt:
            self.close()  # an answer is on its way that nobody will take
            raise
        if error is not None:
            raise error
        return value

    def _died(self) -> WorkerDied:
        self._process.join(timeout=_PATIENCE)
        code = self._process.exitcode
        self.close()
        return WorkerDied(f"the process of a component died (exit code {code}), perhaps for want of memory")

    def close(self) -> None:
        """End the process; again is no error."""
        if self._pipe.closed:
            return
        self._pipe.close()  # the other side ends when it has nobody to serve
        self._process.join(timeout=_PATIENCE)
        if self._process.is_alive():
            self._process.terminate()
            self._process.join(timeout=_PATIENCE)
        self._process.close()


class ProcessSession:
    """The session of a `ComponentProcess`: it lives there, and is asked from here."""

    def __init__(self, component: ComponentProcess, prompts: Sequence[Prefix], max_new_tokens: int | None) -> None:
        self._component = component
        self._number = component.new_session(prompts, max_new_tokens)
        self._pending: list[tuple[np.ndarray, np.ndarray]] = []

    @property
    def cost(self) -> Cost:
        self._component.request("cost", self._number)
        cost: Cost = self._component.reply()
        return cost

    def append(self, rows: np.ndarray, tokens: Tensor) -> None:
        # Tokens travel with the next read: a message of their own would cost as much.
        self._pending.append((np.array(rows), tokens.cpu().numpy().copy()))

    def ask(self, rows: np.ndarray) -> None:
        """Begin to read the laws of `rows`."""
        pending, self._pending = self._pending, []
        room = self._component.room(len(rows))
        self._component.request("read", self._number, pending, np.asarray(rows), room)

    def answer(self) -> Tensor:
        """The laws that were asked for."""
        return self._component.laws(self._component.reply())

    def log_probs(self, rows: np.ndarray) -> Tensor:
        self.ask(rows)
        return self.answer()

    def __del__(self) -> None:
        # No message: this may run while another one waits for its answer.
        if hasattr(self, "_number"):
            self._component.finished.append(self._number)


def _serve(pipe: Connection, opener: Opener) -> None:
    """What a component's process does: open the model, then answer until the pipe is closed."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent decides what an interruption ends
    torch.set_num_threads(1)
    sessions: dict[int, Any] = {}
    room: Tensor | None = None
    model: Any = None
    message: tuple[Any, ...] = ("start",)
    while True:
        value: Any = None
        try:
            match message:
                case ("start",):
                    model = opener()
                    value = model.vocabulary
                case ("threads", count):
                    torch.set_num_threads(count)
                case ("open", number, prompts, max_new_tokens, finished):
                    for old in finished:
                        sessions.pop(old, None)
                    sessions[number] = open_session(model, prompts, max_new_tokens=max_new_tokens)
                case ("read", number, pending, rows, new_room):
                    room = room if new_room is None else new_room
                    for where, tokens in pending:
                        sessions[number].append(where, torch.from_numpy(tokens))
                    value = _put(sessions[number].log_probs(rows), room)
                case ("laws", prefixes, new_room):
                    room = room if new_room is None else new_room
                    value = _put(model.log_probs(prefixes), room)
                case ("cost", number):
                    value = sessions[number].cost
            pipe.send((None, value))
        except (BrokenPipeError, EOFError):
            return
        except Exception as error:  # the parent raises it
            pipe.send((_portable(error), None))
            if model is None:
                return
        try:
            message = pipe.recv()
        except (EOFError, ConnectionError):
            return


def _put(laws: Tensor, room: Tensor | None) -> int:
    assert room is not None
    room[: len(laws)].copy_(laws)
    return len(laws)


def _portable(error: Exception) -> Exception:
    """An error that survives the pipe: of the same kind where that is a common one."""
    kind = next((known for known in (ValueError, TypeError) if isinstance(error, known)), RuntimeError)
    return kind(str(error) if kind is not RuntimeError else f"{type(error).__name__}: {error}")


def _are_processes(components: Sequence[Any]) -> TypeGuard[Sequence[ComponentProcess]]:
    return all(isinstance(component, ComponentProcess) for component in components)


def _is_on_cuda(component: Any) -> bool:
    while not hasattr(component, "device") and hasattr(component, "model"):
        component = component.model
    return getattr(getattr(component, "device", None), "type", "cpu") == "cuda"
