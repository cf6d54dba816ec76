"""The one loop of the host: chunks of compiled work, progress, limits, saves and Ctrl-C.

A compiled loop cannot be stopped, so long work is cut into chunks of about a quarter of a second.
Between them the loop shows progress, calls the callback, saves, and looks whether Ctrl-C or
SIGTERM has come: a run then ends with status "interrupted" and what it has. A second Ctrl-C
raises `KeyboardInterrupt` at once, and a second SIGTERM ends the program.

A trainer gives the loop its `Work`: how to take steps, how far they came, and what to save.
"""

from __future__ import annotations

import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any, Generic, Literal, NamedTuple, TypeVar

import numpy as np
from numpy.typing import DTypeLike
from tqdm.auto import tqdm

from jaxnn.run.checkpoint import Arrays, Checkpoint, Metadata
from jaxnn.run.checks import as_count, as_real
from jaxnn.typing import MetricFn, PyTree, Status

State = TypeVar("State")
Result = TypeVar("Result", bound=Any)

SECONDS_PER_CHUNK, LARGEST_GROWTH = 0.25, 8
SECONDS_BETWEEN_SAVES, SHARE_OF_SAVES = 30.0, 20
"""A long history takes long to save: the pause is at least 20 times as long as the save."""
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
        best_params: `best_params()` returns the best params so far, with the axes of the result;
            None if no loss was finite. They are made when this is called, and not before.
    """

    num_evaluations: int
    loss: float
    best_params: Callable[[], PyTree] = lambda: None


class Improvement(NamedTuple):
    """A loss that is lower than all before it; printed, it is a line.

    Attributes:
        evaluations: losses evaluated up to and with it.
        loss: the loss.
        metric: what `metric_fn` returned there; None without one, or where it was not recorded.

    Example:
        >>> print(Improvement(1_200, 0.25, 0.9))
                  1,200  loss 0.250000  metric 0.9
    """

    evaluations: int
    loss: float
    metric: float | None = None

    def __str__(self) -> str:
        """Return the line."""
        measured = "" if self.metric is None else f"  metric {float(self.metric):.4g}"
        return f"{self.evaluations:>15,}  loss {self.loss:.6f}{measured}"


def improvements_of(
    evaluations: np.ndarray, losses: np.ndarray, metrics: np.ndarray | None
) -> list[Improvement]:
    """Return the improvements among losses in the order of their evaluation."""
    best_before = np.minimum.accumulate(np.append(np.inf, losses))[:-1]
    places = np.flatnonzero(losses < best_before)
    measured = [None] * len(places) if metrics is None else metrics[places].tolist()
    rows = zip(evaluations[places].tolist(), losses[places].tolist(), measured, strict=True)
    return [Improvement(*row) for row in rows]


class Every(NamedTuple):
    """A callback that comes at fixed intervals, in place of some four times a second.

    Attributes:
        interval: candidates of a search, steps of each chain or epochs of a descent between two
            calls; a search rounds it down to whole tiles of candidates.
        callback: called with a `Progress`.

    Example:
        >>> Every(1_000, lambda progress: None).interval
        1000
    """

    interval: int
    callback: Callable[[Progress], None]


Callback = Callable[[Progress], None] | Every


class Limits(NamedTuple):
    """When a run ends, whatever it has found: asked between chunks.

    Attributes:
        max_seconds: seconds it may take.
        callback: called with a `Progress`; raises `StopIteration` to end the run.
        interval: what the progress bar counts between two calls; None for every chunk.
        shows: whether to show a progress bar.
        is_interrupted: whether a signal has asked for the end; see `watch_interrupts`.
    """

    max_seconds: float | None = None
    callback: Callable[[Progress], None] | None = None
    interval: int | None = None
    shows: bool = False
    is_interrupted: Callable[[], bool] = lambda: False


class Work(NamedTuple, Generic[State]):
    """What a trainer gives the loop; a unit is what cannot be cut, such as a step.

    Attributes:
        advance: `advance(state, begin, end)` -> the state after the units from `begin` to `end`,
            or after fewer if a stop rule ends the run, and the status: None while it goes on.
        progress: `progress(state)` -> a `Progress`.
        content: `content(state)` -> arrays, metadata, and a function that returns the arrays of
            the history, or None: what a checkpoint saves, besides the status.
        total: units in all; the first ones may be done already.
        largest: most units of a chunk.
        unit: the name of what the bar counts.
        shown: what the bar shows for a number of units.
        seconds: how long a chunk should take, if longer than usual.
    """

    advance: Callable[[State, int, int], tuple[State, Status | None]]
    progress: Callable[[State], Progress]
    content: Callable[[State], tuple[Arrays, Metadata, Callable[[], Arrays] | None]]
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
    """Go on from a state until the work, a stop rule, a limit or a signal ends it.

    `done` units are done already, and `status` is None, or why there is nothing left to do. A
    checkpoint is saved every half minute and at the end, also after an error. Returns the last
    state, and why the run ended.
    """
    started = saved = time.monotonic()
    pause = SECONDS_BETWEEN_SAVES
    max_seconds = np.inf if limits.max_seconds is None else limits.max_seconds

    def save(status: Status) -> None:
        if checkpoint is not None:
            arrays, metadata, history = work.content(state)
            checkpoint.save(arrays, {**metadata, "status": status}, history)

    def ending() -> Status:
        return status or ("interrupted" if done < work.total else "completed")

    try:
        for begin, end, report in _chunks(work, done if status is None else work.total, limits):
            state, status = work.advance(state, begin, end)
            done, progress = end, work.progress(state)
            report(progress.loss)
            is_over = time.monotonic() - started >= max_seconds
            is_over |= _asks_to_stop(work, limits, end, progress)
            if is_over and status is None and done < work.total:
                status = "stopped"
            if status is not None:
                break
            if (now := time.monotonic()) - saved > pause:
                save("running")
                saved = time.monotonic()
                pause = max(SECONDS_BETWEEN_SAVES, SHARE_OF_SAVES * (saved - now))
    finally:
        save(ending())
    return state, ending()


def told(result: Result, is_interrupted: Callable[[], bool]) -> Result:
    """Return the result, whose status also tells of a signal that came with the last chunk.

    The caller would miss it, since a signal that a run has taken reaches no other handler.
    """
    if not is_interrupted():
        return result
    kept = np.isin(result.status, ["diverged", "nonfinite"])
    status = np.where(kept, result.status, "interrupted")
    return result._replace(status=status if status.ndim else str(status))


def _asks_to_stop(work: Work[PyTree], limits: Limits, done: int, progress: Progress) -> bool:
    """Calls the callback, if it is due; returns whether it asks for the end."""
    is_due = done % _stride(work, limits) == 0 or done == work.total
    if limits.callback is not None and is_due:
        try:
            limits.callback(progress)
        except StopIteration:
            return True
    return False


def _stride(work: Work[PyTree], limits: Limits) -> int:
    """Units between two calls of the callback."""
    return max((limits.interval or 1) // max(work.shown(1), 1), 1)


def _chunks(
    work: Work[PyTree], begin: int, limits: Limits
) -> Iterator[tuple[int, int, Callable[[float], None]]]:
    """Cuts what is left into chunks that take about a quarter of a second each.

    Yields the first unit, one past the last, and `report(loss)`, which says that they are done.
    The time between a yield and its report sizes the next chunk; the first holds one unit, since
    it includes compilation. What comes after a report does not shorten the next chunk.
    """
    size, reported, first, stride = 1, 0.0, begin, _stride(work, limits)
    with _Bar(work.shown(work.total) - work.shown(first), work.unit, limits.shows) as bar:

        def report(loss: float) -> None:
            nonlocal reported
            reported = time.perf_counter()
            if not np.isnan(loss):
                bar.call("set_postfix_str", f"loss {loss:.6g}", refresh=False)

        while begin < work.total and not limits.is_interrupted():
            end = min(begin + size, work.total)
            if limits.interval is not None:
                end = min(end, (begin // stride + 1) * stride)
            started = time.perf_counter()
            yield begin, end, report
            taken = max(reported - started, 1e-6)
            bar.call("update", work.shown(end) - work.shown(begin))
            growth = min(max(work.seconds, SECONDS_PER_CHUNK) / taken, LARGEST_GROWTH)
            size = max(1, min(int((end - begin) * growth), work.largest))
            begin = end


class _Bar:
    """A progress bar that is given up, and not the run, when its stream is closed or broken."""

    def __init__(self, total: int, unit: str, shows: bool) -> None:
        self._bar: tqdm | None = None
        if shows and sys.stderr is not None:
            with suppress(Exception):
                self._bar = tqdm(total=total, unit=f" {unit}", unit_scale=True)

    def __enter__(self) -> _Bar:
        return self

    def __exit__(self, *_: object) -> None:
        self.call("close")

    def call(self, method: str, *args: object, **keywords: object) -> None:
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
    max_seconds: float | None,
    callback: Callback | None,
    progress: bool | Literal["lines"],
    metric: Callable[[PyTree], PyTree] | None = None,
) -> Limits:
    """Return the limits, checked; `metric(params)` is for the lines of improvements."""
    if max_seconds is not None:
        max_seconds = float(as_real("max_seconds", max_seconds))
    interval = None
    if isinstance(callback, Every):
        interval, callback = as_count("callback.interval", callback.interval, 1), callback.callback
    if callback is not None and not callable(callback):
        raise TypeError(f"callback must be callable; got a {type(callback).__name__}")
    if isinstance(progress, str):
        if progress != "lines":
            raise ValueError(f"progress must be True, False or 'lines'; got {progress!r}")
        return Limits(max_seconds, _printing(callback, metric), interval)
    return Limits(max_seconds, callback, interval, bool(progress))


def metric_of(metric_fn: MetricFn | None, batch: PyTree) -> Callable[[PyTree], PyTree] | None:
    """Return a function of params alone; None without a metric."""
    return None if metric_fn is None else lambda params: metric_fn(params, batch)


def _printing(
    callback: Callable[[Progress], None] | None, metric: Callable[[PyTree], PyTree] | None
) -> Callable[[Progress], None]:
    """A callback that prints a line wherever the loss is lower than when it last did."""
    lowest = np.inf

    def call(progress: Progress) -> None:
        nonlocal lowest
        if progress.loss < lowest:
            lowest = progress.loss
            measured = None if metric is None else metric(progress.best_params())
            tqdm.write(str(Improvement(progress.num_evaluations, lowest, measured)))
        if callback is not None:
            callback(progress)

    return call


def as_target(target_loss: float | None, dtype: DTypeLike) -> float | None:
    """Return a target, as a number that losses of this dtype can take."""
    if target_loss is None:
        return None
    as_real("target_loss", target_loss, minimum=-np.inf)
    return float(np.asarray(target_loss, dtype))


def record_interval(saved: int | None, width: int, num_steps: int) -> int:
    """Return every how many steps one is recorded, so that a history fits `HISTORY_BYTES`.

    A record has `width` bytes. The interval is a power of two, times that of the checkpoint,
    `saved`, whose records cannot be made denser.

    Example:
        >>> record_interval(None, 27 * 1_024, 1_000_000)
        64
    """
    most, every = max(HISTORY_BYTES // width, 1), saved or 1
    while num_steps // every > most:
        every *= 2
    return every
