"""The host's loop: chunks without gaps, a quarter of a second each, and what Ctrl-C does."""

import os
import signal
import threading
from types import SimpleNamespace

import pytest

from jaxnn.training import pacing
from jaxnn.training.pacing import chunks


class Clock:
    """A clock for `pacing` that work sets forward by hand."""

    def __init__(self, monkeypatch):
        self.now = 0.0
        monkeypatch.setattr(pacing, "time", SimpleNamespace(perf_counter=lambda: self.now))

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


@pytest.fixture(autouse=True)
def ctrl_c():
    """The handler that Python starts with, also where the tests run in the background."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def interrupt():
    os.kill(os.getpid(), signal.SIGINT)


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


def test_nothing_to_do_yields_nothing(clock):
    assert clock.work(0, 1.0) == []


def test_the_first_chunk_is_one_unit_and_the_next_are_at_most_eight_times_the_last(clock):
    assert clock.work(700, 1e-6) == [1, 8, 64, 512, 115]


def test_a_chunk_of_steady_work_takes_a_quarter_of_a_second(clock):
    sizes = clock.work(100_000, 1e-4)
    assert sizes[:5] == [1, 8, 64, 512, 2500]
    assert set(sizes[4:-1]) <= {2499, 2500}


def test_work_slower_than_a_chunk_goes_unit_by_unit(clock):
    assert clock.work(5, 60.0) == [1] * 5


def test_the_size_shrinks_when_the_work_slows_down(clock):
    sizes = []
    for chunk in chunks(20_000, largest=10**9, unit="steps"):
        sizes.append(chunk.end - chunk.begin)
        clock.now += sizes[-1] * (1e-4 if len(sizes) < 6 else 1e-2)
        chunk.report(0.0)
    assert max(sizes[:6]) == 2500
    assert max(sizes[6:]) <= 25


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


def test_the_first_interrupt_ends_the_loop_after_the_chunk_at_hand(clock):
    before, done = signal.getsignal(signal.SIGINT), []
    for chunk in chunks(1_000, largest=10, unit="steps"):
        if chunk.begin >= 9:
            interrupt()
        done.append(chunk.end)
        chunk.report(0.0)
    assert done == [1, 9, 19]
    assert signal.getsignal(signal.SIGINT) is before


def test_the_second_interrupt_raises_at_once(clock):
    before, done = signal.getsignal(signal.SIGINT), []

    def work():
        for chunk in chunks(1_000, largest=10, unit="steps"):
            interrupt()
            interrupt()
            done.append(chunk.end)

    with pytest.raises(KeyboardInterrupt):
        work()
    assert done == []
    assert signal.getsignal(signal.SIGINT) is before


def test_the_handler_is_restored_after_an_end_a_break_and_an_error(clock):
    before = signal.getsignal(signal.SIGINT)

    def fail():
        for _ in chunks(3, largest=1, unit="steps"):
            assert signal.getsignal(signal.SIGINT) is not before
            raise ArithmeticError

    for _ in chunks(3, largest=1, unit="steps"):
        assert signal.getsignal(signal.SIGINT) is not before
    assert signal.getsignal(signal.SIGINT) is before
    for _ in chunks(3, largest=1, unit="steps"):
        break
    assert signal.getsignal(signal.SIGINT) is before
    with pytest.raises(ArithmeticError) as held:
        fail()
    assert held.tb is not None
    assert signal.getsignal(signal.SIGINT) is before


def test_a_program_with_a_handler_of_its_own_keeps_it(clock):
    heard = []

    def own(signum, frame):
        heard.append(signum)

    signal.signal(signal.SIGINT, own)
    done = []
    for chunk in chunks(100, largest=10, unit="steps"):
        assert signal.getsignal(signal.SIGINT) is own
        interrupt()
        done.append(chunk.end)
        chunk.report(0.0)
    assert done[-1] == 100
    assert len(heard) == len(done)
    assert signal.getsignal(signal.SIGINT) is own


def test_a_thread_other_than_the_main_one_leaves_signals_alone(clock):
    before, seen = signal.getsignal(signal.SIGINT), []

    def work():
        for chunk in chunks(9, largest=8, unit="steps"):
            seen.append((chunk.end, signal.getsignal(signal.SIGINT)))
            chunk.report(0.0)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert seen == [(1, before), (9, before)]


def test_nothing_is_printed_unless_asked(clock, capfd):
    for chunk in chunks(100, largest=7, unit="steps"):
        chunk.report(0.5)
    assert capfd.readouterr() == ("", "")


def test_the_bar_goes_to_standard_error_with_the_scaled_count_and_the_loss(clock, capfd):
    for chunk in chunks(100, largest=7, unit="candidates", scale=16, show=True):
        chunk.report(0.4375)
    out, err = capfd.readouterr()
    assert out == ""
    assert "1.60k/1.60k" in err
    assert "candidates" in err
    assert "loss 0.4375" in err
