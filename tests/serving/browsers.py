"""Debian's Chromium, or another that is installed, without a window."""

import contextlib
import shutil

import pytest

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")


@contextlib.contextmanager
def chromium():
    """A running browser. A test that needs one is skipped where there is none."""
    reason = "the page is driven by playwright (pip install 'qlab[test]')"
    playwright = pytest.importorskip("playwright.sync_api", reason=reason)
    path = next(filter(None, map(shutil.which, NAMES)), None)
    if path is None:
        pytest.skip(f"none of {', '.join(NAMES)} is installed; `apt install chromium` brings one")
    with playwright.sync_playwright() as run:
        browser = run.chromium.launch(executable_path=path)
        try:
            yield browser
        finally:
            browser.close()
