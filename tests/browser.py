"""A browser for tests of pages."""

import shutil
from pathlib import Path

import pytest


def browser_of(playwright):
    """A Chromium from the system or from playwright; the test is skipped where there is none."""
    names = ("chromium-headless-shell", "chromium", "chromium-browser", "google-chrome")
    found = next(filter(None, map(shutil.which, names)), playwright.chromium.executable_path)
    if not Path(found).exists():
        pytest.skip("no browser: apt-get install chromium-headless-shell, or playwright install --only-shell chromium")
    return playwright.chromium.launch(executable_path=found)
