"""The demonstration's one bar, at a terminal."""

import io
import sys

import pytest

from leafkern.demo.progress import Journey


class Terminal(io.StringIO):
    def isatty(self):
        return True


def terminal(monkeypatch) -> Terminal:
    """Stands in for stderr; called in the test, for pytest sets its own stderr between fixtures and test."""
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.setenv("COLUMNS", "120")
    monkeypatch.setattr(sys, "stderr", Terminal())
    return sys.stderr


def test_stages_fill_the_bar_by_the_seconds_expected(monkeypatch, capsys):
    screen = terminal(monkeypatch)
    with Journey({"one": ("First", 1.0), "two": ("Second", 1.0)}) as journey:
        (task,) = journey._bar.tasks
        journey.stage("one")
        journey(1, 2, "12 texts/s")
        assert (task.completed, task.total, task.fields["facts"]) == (0.5, 2.0, "12 texts/s")
        journey.expect("two", 9.0)
        journey.stage("two")
        assert (task.completed, task.total) == (1.0, 10.0)
        assert task.fields["left"] == "about 0:09 left  "
        journey(3, 2)
        assert task.completed == 10.0
    drawn = screen.getvalue()
    for shown in ("━", "Second", "100%"):
        assert shown in drawn
    assert "leafkern demo:" not in drawn
    assert list(journey.seconds) == ["one", "two"]
    assert capsys.readouterr().out == ""


def test_an_error_leaves_the_bar_where_it_stood(monkeypatch):
    terminal(monkeypatch)
    journey = Journey({"one": ("First", 4.0)})

    def fail():
        with journey:
            journey.stage("one")
            journey(1, 4)
            raise ValueError("x")

    with pytest.raises(ValueError, match="x"):
        fail()
    assert journey._bar.tasks[0].completed == 1.0
    assert journey._bar.live.is_started is False
