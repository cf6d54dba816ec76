"""The one loop of the host: chunks of compiled work, progress, limits, saves and Ctrl-C.

A compiled loop cannot be stopped, so long work is cut into chunks of about a quarter of a second.
Between them the loop shows progress, asks the callback, saves, and looks whether Ctrl-C or SIGTERM
has come: a run then ends with status "interrupted" and what it has. A second Ctrl-C raises
`KeyboardInterrupt` at once, and a second SIGTERM ends the program.

A trainer gives the loop its `Work`: how to take steps, what to tell of them, and what to save.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Generic, Literal, NamedTuple, TypeVar

import numpy as np
from tqdm import tqdm

from jaxnn.run import checkpoints
from jaxnn.run.checks import as_real
from jaxnn.run.fingerprint import check_same_run

__all__ = [
    "Checkpoint",
    "Limits",
    "Progress",
    "Saved",
    "Status",
    "Work",
    "as_limits",
    "as_record_every",
    "as_target",
    "run",
    "told",
    "watch_interrupts",
]

Status = Literal[
    "completed", "converged", "diverged", "interrupted", "nonfinite", "reached", "stopped"
]
"""How a run ended.

completed: all of it was done.
converged: a stop rule of the trainer was met.
diverged: a loss was no longer finite; the params returned are the last with a finite one.
interrupted: Ctrl-C or SIGTERM; the result is the best so far.
nonfinite: no finite loss was ever met.
reached: what was looked for was found: a target loss, or enough candidates.
stopped: the time was over, or a callback asked for it.
"""

State = TypeVar("State")
Result = TypeVar("Result", bound=Any)

SECONDS_PER_CHUNK, LARGEST_GROWTH = 0.25, 8
SECONDS_BETWEEN_SAVES, SHARE_OF_SAVES = 30.0, 20
"""A long history takes long to save: the pause is 20 times as long as that at least."""
HISTORY_BYTES = 3 * 2**28
"""What a history may take: three quarters of what a checkpoint may."""
DEFAULT_HANDLERS = {
    signal.SIGINT: signal.default_int_handler,
    signal.SIGTERM: signal.SIG_DFL,
}


class Progress(NamedTuple):
    """Where a run stands, for a callback.

    Attributes:
        num_evaluations: losses evaluated so far.
        loss: lowest loss so far; inf if none was finite.
    """

    num_evaluations: int
    loss: float


class Limits(NamedTuple):
    """When a run ends, whatever it has found: asked between chunks.

    Attributes:
        max_seconds: seconds it may take.
        callback: called with a `Progress`; raises `StopIteration` to end the run.
        shows: whether to show a progress bar.
        is_interrupted: whether a signal has asked for the end; see `watch_interrupts`.
    """

    max_seconds: float | None = None
    callback: Callable[[Progress], None] | None = None
    shows: bool = False
    is_interrupted: Callable[[], bool] = lambda: False


Content = tuple[
    Mapping[str, np.ndarray], dict[str, Any], Callable[[], Mapping[str, np.ndarray]] | None
]


class Work(NamedTuple, Generic[State]):
    """What a trainer gives the loop; a unit is what cannot be cut, such as a step.

    Attributes:
        advance: `advance(state, begin, end)` -> the state after the units from `begin` to `end`,
            or after fewer if a stop rule ends the run, and the status: None while it goes on.
        progress: `progress(state)` -> a `Progress`.
        content: `content(state)` -> arrays, facts, and a function that gives the arrays of the
            history, or None: what a checkpoint saves, besides the status.
        total: units in all; the first ones may be done already.
        largest: most units of a chunk.
        unit: the name of what the bar counts.
        shown: what the bar shows for a number of units.
        seconds: how long a chunk should take, if longer than usual.
    """

    advance: Callable[[State, int, int], tuple[State, Status | None]]
    progress: Callable[[State], Progress]
    content: Callable[[State], Content]
    total: int
    largest: int
    unit: str
    shown: Callable[[int], int] = lambda units: units
    seconds: float = 0.0


def run(
    work: Work[State],
    state: State,
    done: int,
    status: Status | None,
    limits: Limits,
    checkpoint: Checkpoint | None,
) -> tuple[State, Status]:
    """Goes on from a state until the work, a stop rule, a limit or a signal ends it.

    Args:
        work: the trainer's part.
        state: where it stands.
        done: units that are done.
        status: None, or why there is nothing left to do.
        limits: when to end early.
        checkpoint: where to save, every half minute and at the end, also after an error.

    Returns:
        The last state, and why it ended.
    """
    started = saved = time.monotonic()
    pause = SECONDS_BETWEEN_SAVES

    def save() -> None:
        if checkpoint is not None:
            arrays, facts, history = work.content(state)
            ending = _ending(status, done < work.total)
            checkpoint.save(arrays, {**facts, "status": ending}, history)

    try:
        for begin, end, report in _chunks(work, done if status is None else work.total, limits):
            state, status = work.advance(state, begin, end)
            done, progress = end, work.progress(state)
            report(progress.loss)
            asked = _asks_to_stop(limits, started, progress)
            if asked and status is None and done < work.total:
                status = "stopped"
            if status is not None:
                break
            if (now := time.monotonic()) - saved > pause:
                save()
                saved = time.monotonic()
                pause = max(SECONDS_BETWEEN_SAVES, SHARE_OF_SAVES * (saved - now))
    finally:
        save()
    return state, _ending(status, done < work.total)


def told(result: Result, is_interrupted: Callable[[], bool]) -> Result:
    """Return the result, with a status that tells a signal which came with the last chunk or later.

    The caller would miss it, since a signal that a run has taken reaches no other handler.
    """
    if not is_interrupted():
        return result
    kept = np.isin(result.status, ["diverged", "nonfinite"])
    status = np.where(kept, result.status, "interrupted")
    return result._replace(status=status if status.ndim else str(status))


def _ending(status: Status | None, is_left: bool) -> Status:
    """Why a run ended: what no rule and no limit has ended, and is not done, a signal has."""
    return status or ("interrupted" if is_left else "completed")


def _asks_to_stop(limits: Limits, started: float, progress: Progress) -> bool:
    """Whether time is up, or the callback says so; `started` is of `time.monotonic`."""
    is_over = limits.max_seconds is not None and time.monotonic() - started >= limits.max_seconds
    if limits.callback is not None:
        try:
            limits.callback(progress)
        except StopIteration:
            return True
    return is_over


def _chunks(
    work: Work[Any], begin: int, limits: Limits
) -> Iterator[tuple[int, int, Callable[[float], None]]]:
    """Cuts what is left into chunks that take about a quarter of a second each.

    The time between a yield and its report sizes the next chunk; the first holds one unit, since
    it includes compilation. What comes after a report does not shorten the next chunk.

    Yields:
        First unit, one past the last, and `report(loss)`, which says that they are done.
    """
    size, reported, first = 1, 0.0, begin
    with _Bar(work.shown(work.total) - work.shown(first), work.unit, limits.shows) as bar:

        def report(loss: float) -> None:
            nonlocal reported
            reported = time.perf_counter()
            if not np.isnan(loss):
                bar.call("set_postfix_str", f"loss {loss:.6g}", refresh=False)

        while begin < work.total and not limits.is_interrupted():
            end = min(begin + size, work.total)
            started = time.perf_counter()
            yield begin, end, report
            taken = max(reported - started, 1e-6)
            bar.call("update", work.shown(end) - work.shown(begin))
            growth = min(max(work.seconds, SECONDS_PER_CHUNK) / taken, LARGEST_GROWTH)
            size = max(1, min(int(size * growth), work.largest))
            begin = end


class _Bar:
    """A progress bar that is given up, and not the run, when its stream is closed or broken."""

    def __init__(self, total: int, unit: str, shows: bool) -> None:
        self._bar: tqdm[Any] | None = None
        if shows and sys.stderr is not None:
            with suppress(Exception):
                self._bar = tqdm(total=total, unit=f" {unit}", unit_scale=True)

    def __enter__(self) -> _Bar:
        return self

    def __exit__(self, *_: object) -> None:
        self.call("close")

    def call(self, method: str, *args: Any, **keywords: Any) -> None:
        """Calls a method of the bar, if there still is one."""
        if self._bar is None:
            return
        try:
            getattr(self._bar, method)(*args, **keywords)
        except Exception:
            self._bar.disable, self._bar = True, None


@contextmanager
def watch_interrupts() -> Iterator[Callable[[], bool]]:
    """Turns the first Ctrl-C or SIGTERM into a flag that the function yielded tells.

    A signal that the program handles in its own way stays with it. The handlers are those from
    before again when the block is left, also by an exception.
    """
    seen = threading.Event()

    def handle(signum: int, frame: object) -> None:
        del frame
        if not seen.is_set():
            seen.set()
        elif signum == signal.SIGINT:
            raise KeyboardInterrupt
        else:
            raise SystemExit(128 + signum)

    watched = []
    if threading.current_thread() is threading.main_thread():
        watched = [(s, h) for s, h in DEFAULT_HANDLERS.items() if signal.getsignal(s) is h]
    try:
        for signum, _ in watched:
            signal.signal(signum, handle)
        yield seen.is_set
    finally:
        for signum, default in watched:
            if signal.getsignal(signum) is handle:
                signal.signal(signum, default)


def as_limits(
    max_seconds: float | None, callback: Callable[[Progress], None] | None, progress: bool
) -> Limits:
    """The limits, checked."""
    if max_seconds is not None:
        max_seconds = float(as_real("max_seconds", max_seconds))
    if callback is not None and not callable(callback):
        raise TypeError(f"callback must be callable; got a {type(callback).__name__}")
    return Limits(max_seconds, callback, bool(progress))


def as_target(target_loss: float | None, dtype: Any) -> float | None:
    """A target, as a number that losses of this dtype can take."""
    if target_loss is None:
        return None
    as_real("target_loss", target_loss, minimum=-np.inf)
    return float(np.asarray(target_loss, dtype))


def as_record_every(asked: int | None, saved: int | None, width: int, num_steps: int) -> int:
    """Which steps to record, so that the history stays within `HISTORY_BYTES`.

    Args:
        asked: 1 for every step, 2 for every second and so on; None to choose what fits.
        saved: as the checkpoint has it, if there is one: its records cannot be made denser.
        width: bytes of the record of a step.
        num_steps: steps in all.

    Returns:
        Every how many steps one is recorded; by choice a power of two, times `saved`.

    Raises:
        ValueError: if what was asked for does not fit, or is not what the checkpoint holds.

    Example:
        >>> as_record_every(None, None, 27 * 1_024, 1_000_000)
        64
    """
    most = max(HISTORY_BYTES // width, 1)
    if asked is None:
        every = saved or 1
        while num_steps // every > most:
            every *= 2
        return every
    if saved not in (None, asked):
        raise ValueError(f"record_every must be None, or {saved} as in the checkpoint; got {asked}")
    if num_steps // asked > most:
        raise ValueError(
            f"record_every must be at least {num_steps // (most + 1) + 1}, or None, for a history "
            f"of {num_steps} steps with {width} bytes each, to take at most "
            f"{HISTORY_BYTES >> 20} MiB; got {asked}"
        )
    return asked


class Saved(NamedTuple):
    """What a checkpoint holds: the arrays of the state, facts, and the arrays of the history."""

    arrays: dict[str, np.ndarray]
    facts: dict[str, Any]
    history: dict[str, np.ndarray] | None


class Checkpoint(NamedTuple):
    """Where a run is saved, and the metadata that whoever goes on from it has to share.

    A history is saved in a file of its own, so that a history which cannot be saved never keeps
    the state, which is what a run goes on from, from being saved.

    Attributes:
        path: the file of the state.
        metadata: what has to be the same.
    """

    path: Path
    metadata: Mapping[str, Any]

    @property
    def history_path(self) -> Path:
        """The file of the history, beside that of the state."""
        path = Path(os.path.realpath(self.path))
        return path.with_name(f"{path.stem}.history{path.suffix}")

    def begin(self, arrays: Mapping[str, np.ndarray], *, has_history: bool = False) -> Saved | None:
        """What was saved, if anything, by a run of the same settings.

        Args:
            arrays: the state before the first step, of the shapes that will be saved.
            has_history: whether there is a history too.

        Raises:
            OSError: if nothing can be saved here.
            ValueError: if what is there is of another run or damaged, or this run's settings or
                state are too large to be saved.
        """
        checkpoints.check_fits(arrays, self.metadata)
        checkpoints.check_writable(self.path)
        if has_history:
            checkpoints.check_writable(self.history_path)
        if not self.path.exists():
            return None
        saved = self._load(self.path)
        if not has_history:
            return saved
        try:
            history = self._load(self.history_path)
        except (FileNotFoundError, checkpoints.LoadError) as error:
            _warn(f"the run goes on without its history: {error}")
            return saved
        if (steps := history.facts["next"]) < saved.facts["next"]:
            _warn(f"the history {self.history_path} ends at {steps}, before {saved.facts['next']}")
        every = max(saved.facts["record_every"], history.facts["record_every"])
        return Saved(saved.arrays, {**saved.facts, "record_every": every}, history.arrays)

    def save(
        self,
        arrays: Mapping[str, np.ndarray],
        facts: Mapping[str, Any],
        history: Callable[[], Mapping[str, np.ndarray]] | None = None,
    ) -> None:
        """Saves; a full disk, or too little memory, is no reason to lose the run.

        The history goes first: if a kill comes between the two, it holds more steps than the state
        has made, which can be cut off, and not fewer, which nobody could give back.
        """
        if history is not None:
            self._save(self.history_path, history, facts)
        self._save(self.path, lambda: arrays, facts)

    def _load(self, path: Path) -> Saved:
        saved = Saved(*checkpoints.load(path), None)
        check_same_run(path, saved.facts, self.metadata)
        return saved

    def _save(
        self, path: Path, arrays: Callable[[], Mapping[str, np.ndarray]], facts: Mapping[str, Any]
    ) -> None:
        try:
            checkpoints.save(path, arrays(), {**self.metadata, **facts})
        except (OSError, ValueError, MemoryError) as error:
            _warn(f"checkpoint not saved: {error}")


def _warn(message: str) -> None:
    """Warns; a closed standard error, or warnings that are errors, must not end the run."""
    with suppress(Exception):
        warnings.warn(message, RuntimeWarning, stacklevel=5)
