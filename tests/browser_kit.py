"""A real headless browser, where there is one."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
needed = pytest.mark.skipif(
    CHROMIUM is None, reason="there is no Chromium here (Debian: apt-get install chromium)"
)


def rendered(page: Path, scratch: Path, dark: bool = False) -> str:
    """What the document is once its scripts have run, on a screen as narrow as a phone's. It may complain of
    nothing.
    """
    command = [
        str(CHROMIUM),
        "--headless=new",
        "--no-sandbox",
        "--disable-gpu",
        "--enable-logging=stderr",
        "--v=0",
        f"--user-data-dir={scratch / 'profile'}",
        "--virtual-time-budget=5000",
        "--window-size=500,900",
        f"--blink-settings=preferredColorScheme={0 if dark else 1}",
        "--dump-dom",
        page.resolve().as_uri(),
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240)
    assert "CONSOLE" not in done.stderr, done.stderr
    return done.stdout


def drawn(page: Path, scratch: Path, dark: bool) -> int:
    """The number of curves that it draws of a report."""
    text = rendered(page, scratch, dark)
    found = re.search(r'data-drawn="(\d+)"', text)
    assert found is not None
    assert int(found[1]) == text.count('class="uplot')
    return int(found[1])
