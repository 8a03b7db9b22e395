"""Looks at a page in a real browser: is everything there, does it fit, and does the browser complain?"""

from __future__ import annotations

import html
import json
import os
import re
import shutil
import subprocess
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from specdec.bench.report import replace_bytes, replace_text
from specdec.errors import UsageError

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome", "microsoft-edge")
WIDTHS = {"screenshot.png": 1200, "screenshot-narrow.png": 390}  # CSS pixels
TIMEOUT = 120  # seconds a call

# measures what was laid out, and puts it where --dump-dom prints it
PROBE = """<script>
const failed = [];
addEventListener("error", e => failed.push(e.target.src || e.target.href || e.message), true);
addEventListener("load", () => {
  const sized = name => [...document.querySelectorAll(name)].map(e => {
    const box = e.getBoundingClientRect();
    return box.width > 0 && box.height > 0;
  });
  const found = {
    tables: sized("table"), figures: sized("figure"), drawings: sized("figure svg"),
    failed, requests: performance.getEntriesByType("resource").map(e => e.name),
    width: document.documentElement.scrollWidth, window: innerWidth,
    height: document.documentElement.scrollHeight
  };
  const into = document.createElement("pre");
  into.id = "specdec-probe";
  into.textContent = JSON.stringify(found);
  document.body.append(into);
});
</script>"""


def find() -> str | None:
    """The browser that ``check`` runs; None where there is none."""
    return next(filter(None, map(shutil.which, BROWSERS)), None)


def check(page: Path) -> tuple[list[str], list[Path]]:
    """Open a page of ``render.write`` at two widths.

    Args:
        page: report.html.

    Returns:
        What is wrong with it, one line each, and the screenshots, which lie beside it.

    Raises:
        UsageError: no browser, or it does not run.
    """
    browser = find()
    if browser is None:
        raise UsageError(
            f"--check: none of {', '.join(BROWSERS)} is on the PATH; install Chromium (Debian, Ubuntu: `apt install "
            "chromium`) or Chrome, or leave --check out"
        )
    text = page.read_text(encoding="utf-8")
    problems, shots = [], []
    # beside the page: a browser in a sandbox of its own need not see the system's temporary folder
    with TemporaryDirectory(prefix=".check-", dir=page.parent) as folder:
        copy = Path(folder) / "probe.html"
        # the page allows no script, the probe is one
        allowed = text.replace("default-src 'none'", "default-src 'none'; script-src 'unsafe-inline'", 1)
        replace_text(copy, allowed.replace("<head>", f"<head>{PROBE}", 1))
        for name, width in WIDTHS.items():
            found = _probe(browser, copy, width, folder)
            problems += [f"at {width} pixels: {problem}" for problem in _problems(found, text)]
            shot = Path(folder) / name
            said = _run(browser, page, width, folder, f"--screenshot={shot}", height=found["height"])[1]
            problems += [f"at {width} pixels: the browser says: {line}" for line in _complaints(said)]
            if not shot.exists():
                problems.append(f"at {width} pixels: the browser drew no screenshot")
                continue
            replace_bytes(page.with_name(name), shot.read_bytes())
            shots.append(page.with_name(name))
    return problems, shots


def _probe(browser: str, copy: Path, width: int, folder: str) -> dict[str, Any]:
    dom, said = _run(browser, copy, width, folder, "--dump-dom")
    match = re.search(r'<pre id="specdec-probe">(.*?)</pre>', dom, re.DOTALL)
    if match is None:
        raise UsageError(f"--check: {browser} did not load {copy.name} ({said.strip()[-200:] or 'it says nothing'})")
    found: dict[str, Any] = json.loads(html.unescape(match[1]))
    return found


def _problems(found: dict[str, Any], text: str) -> list[str]:
    """What the browser laid out against what the file says."""
    problems = []
    for kind, tag in {"tables": "<table", "figures": "<figure>", "drawings": "<svg"}.items():
        wanted, there = text.count(tag), len(found[kind])
        if wanted != there:
            problems.append(f"{there} of {wanted} {kind} are there")
        if empty := found[kind].count(False):
            problems.append(f"{empty} {kind} have no size")
    problems += [f"it asked for {address}" for address in found["requests"]]
    problems += [f"it failed at {what}" for what in found["failed"]]
    if found["width"] > found["window"]:
        problems.append(f"the page is {found['width']} pixels wide and must be scrolled sideways")
    return problems


def _complaints(said: str) -> list[str]:
    """Lines of the page's console in the browser's log."""
    return [line.strip()[:300] for line in said.splitlines() if ":CONSOLE" in line]


def _run(browser: str, file: Path, width: int, folder: str, action: str, height: int = 900) -> tuple[str, str]:
    """What a browser without a window prints and logs."""
    command = [
        browser, "--headless", "--disable-gpu", "--hide-scrollbars", "--no-first-run", "--disable-extensions",
        "--enable-logging=stderr", f"--user-data-dir={folder}/profile", f"--window-size={width},{height}", action,
        file.resolve().as_uri(),
    ]  # fmt: skip
    if hasattr(os, "geteuid") and os.geteuid() == 0:
        command.insert(1, "--no-sandbox")  # Chromium's sandbox refuses to run as root
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT, errors="replace")
    except (OSError, subprocess.TimeoutExpired) as error:
        raise UsageError(f"--check: {browser} does not run here ({error}); try another browser") from error
    return done.stdout, done.stderr
