"""The host's loop over compiled chunks: their length, the progress bar, and Ctrl-C.

A compiled loop cannot be stopped, so long work is cut into chunks of about a quarter of a second.
Ctrl-C is looked at between them: the trainer then returns what it has, with status
"interrupted". A second Ctrl-C raises `KeyboardInterrupt` at once.
"""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Literal, NamedTuple

from tqdm import tqdm

__all__ = ["Chunk", "Status", "chunks"]

Status = Literal[
    "completed", "converged", "diverged", "interrupted", "nonfinite", "reached", "stopped"
]
"""How a run ended.

completed: all of it was done.
converged: a stop rule of the trainer was met.
diverged: a loss was no longer finite; the params returned are the last with a finite one.
interrupted: Ctrl-C; the result is the best so far.
nonfinite: no finite loss was ever met.
reached: what was looked for was found: a target loss, or enough candidates.
stopped: the time was over, or a callback asked for it.
"""

SECONDS_PER_CHUNK = 0.25
LARGEST_GROWTH = 8


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
    show: bool = False,
    scale: int = 1,
    shown: int | None = None,
    seconds: float = 0.0,
) -> Iterator[Chunk]:
    """Cuts `range(total)` into chunks that take about a quarter of a second each.

    The time between a yield and its report sizes the next chunk; the first holds one unit,
    since it includes compilation. Ends early, after the chunk at hand, on Ctrl-C.

    Args:
        total: units of work.
        largest: most units in a chunk.
        unit: their name in the progress bar.
        show: whether to show the bar, on standard error.
        scale: how many to show for each unit of work.
        shown: how many to show in all, where the last unit is not a full one.
        seconds: how long a chunk should take, if longer than that.

    Yields:
        `Chunk`s that follow each other without a gap.
    """
    begin, size = 0, 1
    shown = total * scale if shown is None else shown
    bar = tqdm(total=shown, unit=f" {unit}", unit_scale=True, disable=not show)

    done = 0.0

    def report(loss: float | None = None) -> None:
        nonlocal done
        done = time.perf_counter()
        if loss is not None:
            bar.set_postfix_str(f"loss {loss:.6g}", refresh=False)

    with _watch_interrupts() as is_interrupted, bar:
        while begin < total and not is_interrupted():
            end = min(begin + size, total)
            started = time.perf_counter()
            yield Chunk(begin, end, report)
            ended = done if done > started else time.perf_counter()
            taken = max(ended - started, 1e-6)
            bar.update(min(end * scale, shown) - bar.n)
            growth = min(max(seconds, SECONDS_PER_CHUNK) / taken, LARGEST_GROWTH)
            size = max(1, min(int(size * growth), largest))
            begin = end


@contextmanager
def _watch_interrupts() -> Iterator[Callable[[], bool]]:
    """Turns the first Ctrl-C into a flag, unless the program handles Ctrl-C in its own way."""
    seen = threading.Event()

    def handle(signum: int, frame: object) -> None:
        del signum, frame
        if seen.is_set():
            raise KeyboardInterrupt
        seen.set()

    in_main_thread = threading.current_thread() is threading.main_thread()
    if not in_main_thread or signal.getsignal(signal.SIGINT) is not signal.default_int_handler:
        yield seen.is_set
        return
    signal.signal(signal.SIGINT, handle)
    try:
        yield seen.is_set
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)
