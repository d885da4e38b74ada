"""What the library says while it works, and that an application can silence it."""

import logging
import subprocess
import sys

from atv.progress import Steps, bar, log, log_once


def test_messages_and_bars_go_to_standard_error_and_the_level_silences_them(capsys, monkeypatch):
    with bar("read", 3) as progress:
        progress.advance(3)
    log.info("a [message] as it is")
    said = capsys.readouterr()
    assert said.out == ""
    assert "read" in said.err
    assert "a [message] as it is" in said.err
    monkeypatch.setattr(log, "level", logging.WARNING)
    log._cache.clear()
    with bar("read", 3) as progress:
        progress.advance(3)
        progress.describe("still")
        progress.reach(3)
    log.info("a message")
    log_once("a warning of this test")
    log_once("a warning of this test")
    assert capsys.readouterr().err.splitlines() == ["a warning of this test"]
    log._cache.clear()


def test_a_log_file_gets_a_line_about_a_running_bar_every_thirty_seconds(monkeypatch, capsys):
    now = [0.0]
    monkeypatch.setattr("atv.progress.time.monotonic", lambda: now[0])
    with bar("train", 100) as progress:
        for _ in range(10):
            now[0] += 7
            progress.advance(10)
        said = capsys.readouterr().err.splitlines()
    assert [line.split(" in ")[0] for line in said] == ["train: 50 of 100", "train: 100 of 100"]


def test_a_terminal_gets_the_bar_and_no_lines(monkeypatch, capsys):
    monkeypatch.setattr("atv.progress.LINE_EVERY", 0.0)
    monkeypatch.setattr("atv.progress.console._force_terminal", True)
    with bar("train", 100) as progress:
        progress.advance(10)
    said = capsys.readouterr().err
    assert "10/100" in said
    assert "10 of 100" not in said


def test_a_configured_logger_keeps_its_handlers_and_level():
    code = (
        "import logging\nlog = logging.getLogger('atv')\nlog.addHandler(logging.NullHandler())\nlog.setLevel(40)\n"
        "from atv.progress import log as same\n"
        "assert same is log and len(log.handlers) == 1 and log.level == 40 and log.propagate"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_the_time_left_is_that_of_steps_of_the_same_kind(monkeypatch, caplog):
    now = [0.0]
    monkeypatch.setattr("atv.progress.time.perf_counter", lambda: now[0])
    steps = Steps(["quick", "slow", "quick", "slow", "quick", "slow"])
    said = []
    caplog.set_level("INFO", logger="atv")
    for kind, minutes, new in (("quick", 1, True), ("quick", 0, False), ("slow", 9, True), ("slow", 11, True)):
        steps.begin(kind, kind)
        said.append(caplog.messages[-1])
        now[0] += 60 * minutes
        steps.end(new)
    steps.begin("quick", "quick")
    said.append(caplog.messages[-1])
    assert said == [
        "[1 of 6] quick",
        "[2 of 6] quick; more than 2 min left",  # nothing is known of the slow ones
        "[3 of 6] slow; more than 1 min left",
        "[4 of 6] slow; about 19 min left",
        "[5 of 6] quick; about 11 min left",
    ]
