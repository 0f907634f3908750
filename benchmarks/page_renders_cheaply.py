"""The page shows its first view in under a second and renders two streams in under 15% of a core.

    python benchmarks/page_renders_cheaply.py [--seconds 15] [--rate 20]

Headless Chromium, software rendering, fresh profile, loopback. CPU is what all of Chromium's processes use while two
answers stream at ``rate`` tokens per second each, as a share of one core; the same is measured while the page is idle.
Prints one JSON line.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
import tempfile
import time
from pathlib import Path

import psutil

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

from playwright.sync_api import Page, sync_playwright

from bitladder.records import to_json
from ladder_examples import run_record
from page_gateway import ANSWERS, Fake, gateway_app, serving

SWITCHES = ["--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking", "--disable-sync"]
FIRST_VIEWS = 7
SHOWN = """new Promise((done) => {
    const look = () => document.querySelector("#compare form") ? done(performance.now()) : requestAnimationFrame(look);
    look();
})"""


def browser_cpu() -> dict[int, float]:
    """CPU seconds of every Chromium process beneath this one."""
    used = {}
    for process in psutil.Process().children(recursive=True):
        try:
            if "chrom" in process.name():
                times = process.cpu_times()
                used[process.pid] = times.user + times.system
        except psutil.NoSuchProcess:
            continue  # it ended between listing and asking
    return used


def share_of_core(page: Page, seconds: float) -> float:
    """Chromium's CPU over the next ``seconds``, as a share of one core."""
    before, began = browser_cpu(), time.monotonic()
    page.wait_for_timeout(1000 * seconds)
    spent = sum(used - before.get(pid, 0.0) for pid, used in browser_cpu().items())
    return spent / (time.monotonic() - began)


def first_views(page: Page, url: str) -> list[float]:
    """Milliseconds from navigation to the form, a fresh load each."""
    times = []
    for _ in range(FIRST_VIEWS):
        page.goto("about:blank")
        page.goto(url)
        times.append(page.evaluate(SHOWN))
    return sorted(times)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=15)
    parser.add_argument("--rate", type=float, default=20, help="tokens per second of each stream")
    options = parser.parse_args()
    chromium = os.environ.get("CHROMIUM") or shutil.which("chromium") or shutil.which("chromium-browser")
    if chromium is None:
        sys.exit("Chromium is not installed (Debian: apt-get install chromium)")
    fake = Fake()
    fake.delay = 1 / options.rate
    words = [(" word", 0.9)] * int(options.rate * (options.seconds + 5))
    ANSWERS["long"] = {"Q6_K": words, "Q4_K_M": words}
    with tempfile.TemporaryDirectory() as folder:
        run = Path(folder) / "run.json"
        run.write_text(json.dumps(to_json(run_record())))
        with serving(gateway_app(run, fake)) as url, sync_playwright() as playwright:
            browser = playwright.chromium.launch(executable_path=chromium, args=SWITCHES)
            page = browser.new_page()
            views = first_views(page, url)
            page.wait_for_timeout(1500)
            idle = share_of_core(page, 4)
            page.fill("#prompt", "long")
            page.click("button[type=submit]")
            page.wait_for_selector(".answer .text:has-text('word word')")
            streaming = share_of_core(page, options.seconds)
            browser.close()
    told = {
        "first_view_ms": {"median": round(views[len(views) // 2]), "worst": round(views[-1])},
        "core_share": {"idle": round(idle, 3), "two_streams": round(streaming, 3)},
        "setting": {"rate": options.rate, "seconds": options.seconds, "load_average": os.getloadavg()[0]},
    }
    print(json.dumps(told))


if __name__ == "__main__":
    main()
