"""No command is silent for more than ten seconds; the clock of these tests passes when told to."""

import io
import sys
import threading
from types import SimpleNamespace

import pytest

from xkd_schemas import progress
from xkd_schemas.console import say
from xkd_schemas.progress import Progress, heartbeat, remark, tick, tick_each


class Clock:
    now = 1000.0

    def __call__(self) -> float:
        return self.now


class Screen(io.StringIO):
    tty = False

    def isatty(self) -> bool:
        return self.tty


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(progress, "time", SimpleNamespace(monotonic=clock))
    return clock


def on_screen(monkeypatch, *, tty: bool = False) -> Screen:
    screen = Screen()
    screen.tty = tty
    monkeypatch.setattr(sys, "stderr", screen)
    monkeypatch.setenv("COLUMNS", "120")
    return screen


def test_off_a_terminal_a_line_says_count_elapsed_and_left_every_ten_seconds(clock, monkeypatch) -> None:
    screen = on_screen(monkeypatch)
    with Progress("teachers/T", 90):
        for _ in tick_each(range(12)):
            clock.now += 5
    lines = screen.getvalue().splitlines()

    assert lines[:2] == [
        "teachers/T: 2 of 90 rows, 0:10 elapsed, 7:20 left", "teachers/T: 4 of 90 rows, 0:20 elapsed, 7:10 left",
    ]  # fmt: skip
    assert len(lines) == 6


@pytest.mark.parametrize(("seconds", "quiet"), [(0.09, False), (9, True)])
def test_short_work_and_a_quiet_process_print_nothing(clock, monkeypatch, seconds: float, quiet: bool) -> None:
    screen = on_screen(monkeypatch)
    with Progress("teachers/T", 90, quiet=quiet):
        for _ in tick_each(range(90)):
            clock.now += seconds
    assert screen.getvalue() == ""


def test_on_a_terminal_a_bar_is_taken_off_before_other_lines_and_at_the_end(clock, monkeypatch, capsys) -> None:
    screen = on_screen(monkeypatch, tty=True)
    with Progress("teachers/T", 90):
        clock.now += 3
        tick(45)
        remark("shards 3, 4 at work")
        say("another line")
        clock.now += 3
        tick(45)
    first, *rest = screen.getvalue().split("\r\x1b[K")[1:]

    assert first == "teachers/T: [##########..........] 45 of 90 rows, 0:03 elapsed, 0:03 left"
    assert rest[0] == "", "the bar is off when the other line is written"
    assert rest[1].endswith("] 90 of 90 rows, 0:06 elapsed, 0:00 left, shards 3, 4 at work")
    assert rest[2] == ""


def test_work_that_never_ticks_is_shown_by_the_heartbeat_with_what_was_counted_before(clock, monkeypatch) -> None:
    screen = on_screen(monkeypatch)
    counted, over, beats = threading.Event(), threading.Event(), iter(range(4))

    class Beats(threading.Event):
        def wait(self, _seconds: float | None = None) -> bool:
            counted.wait(60)
            if next(beats, None) is None:
                over.set()
            clock.now += 9
            return over.is_set()

    monkeypatch.setattr(progress, "threading", SimpleNamespace(Event=Beats, Thread=threading.Thread))
    with heartbeat("xkd-cache"), Progress("bits per byte", 64):
        tick(16)
        counted.set()
        assert over.wait(60)

    assert screen.getvalue().splitlines()[2:] == [
        "bits per byte: 16 of 64 rows, 0:27 elapsed, 1:21 left",
        "bits per byte: 16 of 64 rows, 0:36 elapsed, 1:48 left",
    ]


def test_only_the_innermost_work_is_shown_and_the_silence_counts_over_all_of_it(clock, monkeypatch) -> None:
    screen = on_screen(monkeypatch)
    with Progress("xkd-train") as whole:
        clock.now += 5
        with Progress("load"):
            whole.beat()
            clock.now += 5
            tick()
        clock.now += 5
        whole.beat()
        clock.now += 5
        whole.beat()

    assert screen.getvalue().splitlines() == ["load: 0:05 elapsed", "xkd-train: 0:20 elapsed"]
