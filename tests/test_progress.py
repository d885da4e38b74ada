"""What the library says while it works, and that an application can silence it."""

import logging
import subprocess
import sys

from atv.progress import bar, log, log_once


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


def test_a_configured_logger_keeps_its_handlers_and_level():
    code = (
        "import logging\nlog = logging.getLogger('atv')\nlog.addHandler(logging.NullHandler())\nlog.setLevel(40)\n"
        "from atv.progress import log as same\n"
        "assert same is log and len(log.handlers) == 1 and log.level == 40 and log.propagate"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
