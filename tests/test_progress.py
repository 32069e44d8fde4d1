"""Long work shows one bar in a terminal, lines where output is redirected, and nothing if asked."""

import io
import logging
import re
import threading
import time

import pytest

import flowvi
from flowvi.runtime import progress
from flowvi.runtime.clock import Clock
from flowvi.runtime.progress import Progress, current, showing, within


class Terminal(io.StringIO):
    """An error stream that is a terminal."""

    def isatty(self) -> bool:
        return True


@pytest.fixture
def often(monkeypatch):
    """Bars and lines are shown every few milliseconds."""
    monkeypatch.setattr(progress._Bar, "every", 0.005)
    monkeypatch.setattr(progress._Lines, "every", 0.005)


def stream(monkeypatch, terminal: bool) -> io.StringIO:
    made = Terminal() if terminal else io.StringIO()
    monkeypatch.setattr("sys.stderr", made)
    return made


def seen_within(made: io.StringIO, words: str) -> bool:
    """Whether words appear in a stream; the thread that writes them may be late."""
    end = time.monotonic() + 20.0
    while time.monotonic() < end and words not in made.getvalue():
        time.sleep(0.005)
    return words in made.getvalue()


def normal():
    site = {"x": flowvi.Site()}
    return flowvi.from_density(lambda v: -0.5 * v["x"] ** 2, site)


def test_a_terminal_has_one_bar_with_phase_bound_and_times(monkeypatch, often):
    made = stream(monkeypatch, terminal=True)

    with showing("wells", True, Clock(1000.0)) as shown:
        shown.phase("stage 1", 200)
        for bound in (-3.0, -1.0):
            shown.step(bound)
        assert seen_within(made, "step 2 of ≤ 200")
        shown.phase("check")
        assert seen_within(made, "wells: check")

    text = made.getvalue()
    assert "wells: stage 1 |" in text and "bound -2.000 ± 1" in text
    assert re.search(r"\d s of 17 min, 17 min left", text)
    assert text.count("\n") == 1  # all of it is one line, written over and over
    assert "wells: done |" in text


def test_a_redirected_stream_has_plain_lines(monkeypatch, often):
    made = stream(monkeypatch, terminal=False)

    with showing("wells", True) as shown:
        shown.phase("stage 1", 200)
        shown.step(-3.0)
        assert seen_within(made, "step 1 of ≤ 200")

    assert "\r" not in made.getvalue()
    assert all(line.startswith("wells: stage 1, step") for line in made.getvalue().splitlines()[1:])


def test_lines_come_every_ten_seconds():
    assert progress._Lines.every == 10.0


@pytest.mark.parametrize("terminal", [True, False])
def test_nothing_is_shown_unless_asked_or_where_a_logger_is_silenced(monkeypatch, often, terminal):
    made = stream(monkeypatch, terminal)
    logger = logging.getLogger("flowvi")

    with showing("wells", False):
        time.sleep(0.05)
    monkeypatch.setattr(logger, "level", logging.WARNING)
    with showing("wells", True):
        time.sleep(0.05)

    assert made.getvalue() == ""


def test_a_program_with_logging_gets_lines_and_decisions(monkeypatch, often, caplog):
    stream(monkeypatch, terminal=False)
    caplog.set_level(logging.INFO, "flowvi")

    fit = flowvi.fit(normal(), "meanfield", steps=5, compile=False, progress=False)
    with showing("wells", True) as shown:
        shown.phase("stage 1")
        end = time.monotonic() + 20.0
        while "wells: stage 1" not in caplog.text and time.monotonic() < end:
            time.sleep(0.005)

    names = {record.name for record in caplog.records}
    assert names == {"flowvi.fit", "flowvi.progress"}
    assert all(line in caplog.text for line in fit.log)


def test_a_fit_shows_its_phases_in_one_bar(monkeypatch, often):
    made = stream(monkeypatch, terminal=True)
    phases = []
    begin = Progress.phase

    def noted(self, words, *rest):
        phases.append(words)
        begin(self, words, *rest)

    monkeypatch.setattr(Progress, "phase", noted)
    flowvi.fit(normal(), "meanfield", steps=20, compile=False)

    assert made.getvalue().count("\n") == 1
    assert phases[0] == "searching for a start" and phases[-1] == "done"
    assert {"training, smaller steps", "check by fresh draws"} <= {*phases}


def test_a_part_of_other_work_has_no_bar_of_its_own(monkeypatch, often):
    made = stream(monkeypatch, terminal=True)

    with showing("wells", True) as whole, within("NUTS", True) as part:
        assert part is whole and current() is whole
    with within("NUTS", True) as alone:
        assert alone.name == "NUTS"

    assert made.getvalue().count("\n") == 2


def test_a_closed_stream_ends_nothing(monkeypatch, often):
    made = stream(monkeypatch, terminal=False)

    with showing("wells", True):
        made.close()
        time.sleep(0.05)
    with showing("wells", True) as shown:
        shown.step(1.0)

    assert "flowvi progress" not in [thread.name for thread in threading.enumerate()]


@pytest.mark.parametrize("room", [None, 100, 60, 40, 25])
def test_a_bar_says_what_there_is_room_for(room):
    title = "eight_schools: realnvp guide, stage 1, smaller steps"
    numbers = "step 35 of ≤ 100, bound -31.320 ± 0.004, 8 s, ≤ 2 min left of this"

    found = progress.fitting(title, numbers, room)

    assert room is None or len("".join(found)) <= max(room, 45)
    assert found[1].endswith("8 s, ≤ 2 min left of this")
    if room is None:
        assert found == (title, numbers)
    elif room <= 60:
        assert "eight_schools" not in found[0] and found[0].startswith("realnvp guide")
