"""The host's loop: chunks without gaps, a quarter of a second each, and what Ctrl-C does."""

import io
import os
import signal
import sys
import threading
from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest

from jaxnn.run import loop
from jaxnn.run.loop import watch_interrupts


class Chunk(NamedTuple):
    begin: int
    end: int
    report: Any


def chunks(total, *, largest, unit, scale=1, show=False, is_interrupted=lambda: False):
    """The loop's chunks for work of so many units, none of which are done yet."""
    work: Any = SimpleNamespace(
        total=total, largest=largest, unit=unit, shown=lambda units: scale * units, seconds=0.0
    )
    limits = loop.Limits(shows=show, is_interrupted=is_interrupted)
    return (Chunk(*chunk) for chunk in loop._chunks(work, 0, limits))


class Clock:
    """A clock for the loop that work sets forward by hand."""

    def __init__(self, monkeypatch):
        self.now = 0.0
        monkeypatch.setattr(loop, "time", SimpleNamespace(perf_counter=lambda: self.now))

    def work(self, total, seconds_per_unit, largest=10**9, compilation=0.0):
        """Sizes of the chunks for work of a constant speed."""
        sizes = []
        for chunk in chunks(total, largest=largest, unit="steps"):
            sizes.append(chunk.end - chunk.begin)
            self.now += sizes[-1] * seconds_per_unit + (compilation if len(sizes) == 1 else 0)
            chunk.report(0.0)
        return sizes


@pytest.fixture
def clock(monkeypatch):
    return Clock(monkeypatch)


SIGNALS = [signal.SIGINT, signal.SIGTERM]


@pytest.fixture(autouse=True)
def handlers():
    """The handlers that Python starts with, also where the tests run in the background."""
    before = [signal.getsignal(signum) for signum in SIGNALS]
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    yield
    for signum, handler in zip(SIGNALS, before, strict=True):
        signal.signal(signum, handler)


def send(signum):
    os.kill(os.getpid(), signum)


@pytest.mark.parametrize("total", [1, 2, 7, 8, 9, 10, 73, 585, 10_007, 2**40 + 1])
@pytest.mark.parametrize("largest", [1, 3, 64, 2**30])
def test_chunks_tile_the_range_without_a_gap(clock, total, largest):
    end, count = 0, 0
    for chunk in chunks(total, largest=largest, unit="steps"):
        assert chunk.begin == end < chunk.end <= total
        assert chunk.end - chunk.begin <= largest
        end, count = chunk.end, count + 1
        clock.now += 1e-9 * (chunk.end - chunk.begin)
        chunk.report(0.0)
        if count == 1_000:
            break
    assert end == total or count == 1_000


def test_the_first_chunk_is_one_unit_and_the_next_are_at_most_eight_times_the_last(clock):
    assert clock.work(700, 1e-6) == [1, 8, 64, 512, 115]


def test_a_chunk_of_steady_work_takes_a_quarter_of_a_second(clock):
    sizes = clock.work(100_000, 1e-4)
    assert sizes[:5] == [1, 8, 64, 512, 2500]
    assert set(sizes[4:-1]) <= {2499, 2500}


def test_a_long_compilation_does_not_stop_the_growth(clock):
    assert clock.work(100, 1e-6, compilation=20.0) == [1, 1, 8, 64, 26]


def test_what_a_caller_does_after_its_report_does_not_shorten_the_chunks(clock):
    sizes = []
    for chunk in chunks(700, largest=10**9, unit="steps"):
        sizes.append(chunk.end - chunk.begin)
        clock.now += 1e-6 * sizes[-1]
        chunk.report(0.0)
        clock.now += 60
    assert sizes == [1, 8, 64, 512, 115]


def counting(total, limits, saved=None):
    """Runs work that adds one a unit, and notes what is saved."""
    saved = [] if saved is None else saved
    work: Any = loop.Work(
        advance=lambda state, begin, end: (state + end - begin, None),
        progress=lambda state: loop.Progress(state, 0.5),
        content=lambda state: ({}, {"next": state}, None),
        total=total,
        largest=10**9,
        unit="steps",
    )
    checkpoint: Any = SimpleNamespace(save=lambda *content: saved.append(content[1]))
    return loop.run(work, 0, 0, None, limits, checkpoint)


def test_what_is_saved_on_the_way_says_that_it_runs(monkeypatch):
    monkeypatch.setattr(loop, "SECONDS_BETWEEN_SAVES", 0.0)
    saved = []
    counting(600, loop.Limits(), saved)
    assert [each["status"] for each in saved] == ["running"] * (len(saved) - 1) + ["completed"]
    assert len(saved) >= 2


def work_until(signum, before_end):
    """Ends of the chunks of work that is sent a signal `before_end` times from index 9 on."""
    done = []
    with watch_interrupts() as is_interrupted:
        for chunk in chunks(1_000, largest=10, unit="steps", is_interrupted=is_interrupted):
            if chunk.begin >= 9:
                for _ in range(before_end):
                    send(signum)
            done.append(chunk.end)
            chunk.report(0.0)
    return done


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_the_first_signal_ends_the_loop_after_the_chunk_at_hand(clock, signum):
    before = signal.getsignal(signum)
    assert work_until(signum, 1) == [1, 9, 19]
    assert signal.getsignal(signum) is before


@pytest.mark.parametrize(
    ("signum", "error"), [(signal.SIGINT, KeyboardInterrupt), (signal.SIGTERM, SystemExit)]
)
def test_the_second_signal_raises_at_once(clock, signum, error):
    before = signal.getsignal(signum)
    with pytest.raises(error):
        work_until(signum, 2)
    assert signal.getsignal(signum) is before


def test_the_handlers_are_restored_after_an_end_and_an_error():
    before = [signal.getsignal(signum) for signum in SIGNALS]

    def fail():
        with watch_interrupts():
            assert not {signal.getsignal(signum) for signum in SIGNALS} & set(before)
            raise ArithmeticError

    with watch_interrupts():
        assert not {signal.getsignal(signum) for signum in SIGNALS} & set(before)
    assert [signal.getsignal(signum) for signum in SIGNALS] == before
    with pytest.raises(ArithmeticError) as held:
        fail()
    assert held.tb is not None  # The traceback, and with it every frame, is alive.
    assert [signal.getsignal(signum) for signum in SIGNALS] == before


@pytest.mark.parametrize("signum", SIGNALS)
def test_a_program_with_a_handler_of_its_own_keeps_it(clock, signum):
    heard = []

    def own(signum, frame):
        heard.append(signum)

    signal.signal(signum, own)
    done = work_until(signum, 1)
    assert done[-1] == 1_000
    assert len(heard) == len(done) - 2
    assert signal.getsignal(signum) is own


def test_a_thread_other_than_the_main_one_leaves_signals_alone(clock):
    before, seen = signal.getsignal(signal.SIGINT), []

    def work():
        with watch_interrupts() as is_interrupted:
            seen.append((is_interrupted(), signal.getsignal(signal.SIGINT)))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert seen == [(False, before)]


class Broken(io.TextIOBase):
    """A stream that takes a few lines and then none."""

    def __init__(self, lines):
        self.left = lines

    def write(self, text):
        self.left -= 1
        if self.left < 0:
            raise BrokenPipeError(32, "Broken pipe")
        return len(text)


@pytest.mark.parametrize("lines", [0, 1, 2, 3])
def test_a_broken_stream_ends_the_bar_and_not_the_work(clock, monkeypatch, lines):
    monkeypatch.setattr(sys, "stderr", Broken(lines))
    done = []
    for chunk in chunks(100, largest=7, unit="steps", show=True):
        clock.now += 1.0
        done.append(chunk.end)
        chunk.report(0.5)
    assert done[-1] == 100


@pytest.mark.parametrize("is_there", [True, False])
def test_a_stream_that_is_closed_or_none_has_no_bar(clock, monkeypatch, is_there):
    closed = io.StringIO()
    closed.close()
    monkeypatch.setattr(sys, "stderr", closed if is_there else None)
    assert [chunk.end for chunk in chunks(9, largest=8, unit="steps", show=True)] == [1, 9]
