"""The host's loop over compiled chunks: their length, the progress bar, and Ctrl-C.

A compiled loop cannot be stopped, so long work is cut into chunks of about a quarter of a second.
Between them the loop looks whether Ctrl-C or SIGTERM has come: the trainer then saves and returns
what it has, with status "interrupted". A second Ctrl-C raises `KeyboardInterrupt` at once, and a
second SIGTERM ends the program.
"""

from __future__ import annotations

import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any, Literal, NamedTuple

from tqdm import tqdm

__all__ = ["Chunk", "Status", "chunks", "watch_interrupts"]

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

SECONDS_PER_CHUNK = 0.25
LARGEST_GROWTH = 8
DEFAULT_HANDLERS = {
    signal.SIGINT: signal.default_int_handler,
    signal.SIGTERM: signal.SIG_DFL,
}


class Chunk(NamedTuple):
    """A piece of the work.

    Attributes:
        begin: first unit of work.
        end: one past the last.
        report: `report(loss)` says that the work is done, and shows the best loss so far in the
            progress bar, if there is one. What the caller does after it does not shorten the
            next chunk.
    """

    begin: int
    end: int
    report: Callable[..., None]


def chunks(
    total: int,
    *,
    largest: int,
    unit: str,
    is_interrupted: Callable[[], bool],
    show: bool = False,
    scale: int = 1,
    shown: int | None = None,
    seconds: float = 0.0,
) -> Iterator[Chunk]:
    """Cuts `range(total)` into chunks that take about a quarter of a second each.

    The time between a yield and its report sizes the next chunk; the first holds one unit,
    since it includes compilation.

    Args:
        total: units of work.
        largest: most units in a chunk.
        unit: their name in the progress bar.
        is_interrupted: whether to end early, after the chunk at hand; see `watch_interrupts`.
        show: whether to show the bar, on standard error.
        scale: how many to show for each unit of work.
        shown: how many to show in all, where the last unit is not a full one.
        seconds: how long a chunk should take, if longer than that.

    Yields:
        `Chunk`s that follow each other without a gap.
    """
    begin, size = 0, 1
    shown = total * scale if shown is None else shown
    done = 0.0
    with _Bar(shown, unit, show) as bar:

        def report(loss: float | None = None) -> None:
            nonlocal done
            done = time.perf_counter()
            if loss is not None:
                bar.call("set_postfix_str", f"loss {loss:.6g}", refresh=False)

        while begin < total and not is_interrupted():
            end = min(begin + size, total)
            started = time.perf_counter()
            yield Chunk(begin, end, report)
            ended = done if done > started else time.perf_counter()
            taken = max(ended - started, 1e-6)
            bar.call("update", min(end * scale, shown) - min(begin * scale, shown))
            growth = min(max(seconds, SECONDS_PER_CHUNK) / taken, LARGEST_GROWTH)
            size = max(1, min(int(size * growth), largest))
            begin = end


class _Bar:
    """A progress bar that is given up, and not the run, when its stream is closed or broken."""

    def __init__(self, total: int, unit: str, show: bool) -> None:
        self._bar: tqdm[Any] | None = None
        if show and sys.stderr is not None:
            with suppress(OSError, ValueError):
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
        except (OSError, ValueError):
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
