"""The page in a real browser: headless Chromium, on a server that is a process.

The server writes down every address outside of this machine that it asks for, by an audit hook of
Python's, and the browser every request; both lists must be empty at the end.
"""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers.scripts import environment
from PIL import Image

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "chrome")
FLAGS = [
    *("--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync"),
    *("--disable-background-networking", "--disable-component-update"),
]
SECONDS = 60_000  # of patience, in milliseconds

SERVER = """
import ipaddress, socket, sys

def watch(event, arguments):
    if event not in ("socket.connect", "socket.getaddrinfo", "socket.gethostbyname"):
        return
    host = arguments[0] if event != "socket.connect" else arguments[1]
    host = host[0] if isinstance(host, tuple) else host
    if event == "socket.connect" and arguments[0].family == socket.AF_UNIX:
        return
    if host in (None, "", "localhost"):
        return
    try:
        if ipaddress.ip_address(host).is_loopback:
            return
    except ValueError:
        pass
    with open(sys.argv[1], "a") as file:
        print(event, host, file=file)

sys.addaudithook(watch)
from coup_fast.cli import main
sys.exit(main(["app", "--port", "0", "--device", "cpu", *sys.argv[2:]]))
"""


def chromium() -> str:
    """The browser's path; skips, or fails where it may not be missing, if there is none."""
    for name in BROWSERS:
        if path := shutil.which(name):
            return path
    if os.environ.get("COUP_FAST_FAIL_WITHOUT_CHROMIUM"):
        pytest.fail("there is no Chromium, and COUP_FAST_FAIL_WITHOUT_CHROMIUM is set")
    pytest.skip("needs Chromium (apt-get install chromium)")


@contextmanager
def served(folder: Path, *words: str) -> Iterator[str]:
    """The address of a page that a process serves; checks how it ends."""
    calls, temporary = folder / "calls.txt", folder / "temporary"
    temporary.mkdir()
    program = [sys.executable, "-c", SERVER, str(calls), *words]
    process = subprocess.Popen(
        program,
        cwd=temporary,
        env=environment(TMPDIR=str(temporary), OMP_NUM_THREADS="1"),
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stderr is not None
    try:
        said = process.stderr.readline()
        address = re.match(r"http://127\.0\.0\.1:\d+", said)
        assert address is not None, said + process.stderr.read()
        yield address[0]
    finally:
        process.send_signal(signal.SIGTERM)
        try:
            rest = process.communicate(timeout=30)[1]
        except subprocess.TimeoutExpired:
            process.kill()
            raise
    assert process.returncode == 128 + signal.SIGTERM
    assert "Traceback" not in rest
    assert not calls.exists(), calls.read_text()
    assert list(temporary.iterdir()) == []  # uploads included


@pytest.fixture(scope="module")
def address(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    for name in ("gradio", "mlxtend", "playwright"):
        pytest.importorskip(name)
    chromium()
    with served(tmp_path_factory.mktemp("server")) as where:
        yield where


@pytest.fixture(scope="module")
def browser(address: str) -> Iterator[Any]:
    from playwright.sync_api import sync_playwright

    with sync_playwright() as driver:
        program = driver.chromium.launch(executable_path=chromium(), args=FLAGS)
        yield program
        program.close()


@pytest.fixture
def page(browser: Any, address: str) -> Iterator[Any]:
    """The page, loaded; asks for nothing outside and has no errors."""
    context = browser.new_context(viewport={"width": 1280, "height": 900})
    context.set_default_timeout(SECONDS)
    page = context.new_page()
    requests: list[str] = []
    errors: list[str] = []
    page.on("request", lambda request: requests.append(request.url))
    page.on("pageerror", lambda error: errors.append(str(error)))
    page.on("console", lambda line: errors.append(line.text) if line.type == "error" else None)
    page.goto(address)
    page.wait_for_selector("#run")
    yield page
    context.close()
    outside = [url for url in requests if not url.startswith((address, "data:", "blob:"))]
    assert requests
    assert not outside
    assert not errors


def pictures(page: Any) -> list[str]:
    return page.eval_on_selector_all("#stage img", "images => images.map(image => image.src)")


def headings(page: Any) -> list[str]:
    return page.locator("#stage figcaption").all_inner_texts()


def purify(page: Any, steps: int) -> None:
    """Start a run and wait until it has ended."""
    page.fill("#num_steps input", str(steps))
    page.click("#run")
    page.wait_for_selector(f"#step input[max='{steps}']", state="visible")
    page.wait_for_selector("#stage :text('Purified')")


def test_a_digit_is_attacked_purified_and_looked_at_step_by_step(page: Any) -> None:
    assert headings(page) == ["Input", "Attacked", "Purified"]
    assert len(pictures(page)) == 1
    purify(page, 12)
    given, attacked, purified = pictures(page)
    assert len({given, attacked, purified}) == 3
    seen = page.locator("#stage .cf-view b").all_inner_texts()
    assert seen[0] == "0"  # the first digit
    assert seen[1] != "0"
    words = page.inner_text("#summary")
    assert "a step" in words
    assert "12 steps" in words
    assert "weak" in words
    page.fill("#step input[type=number]", "3")
    page.keyboard.press("Enter")
    page.wait_for_selector("#stage :text('After step 3 of 12')")
    early = pictures(page)
    assert early[:2] == [given, attacked]
    assert early[2] != purified


def test_an_upload_is_purified(page: Any, tmp_path: Path) -> None:
    before = pictures(page)
    array = np.random.default_rng(1).integers(0, 256, (40, 60, 3), dtype=np.uint8)
    Image.fromarray(array).save(tmp_path / "mine.png")
    page.set_input_files("input[type=file]", tmp_path / "mine.png")
    page.wait_for_selector("#message :text('mine.png')")
    assert "40 × 40" in page.inner_text("#message")
    page.wait_for_function(
        "before => document.querySelector('#stage img').src != before", arg=before[0]
    )
    page.uncheck("#attack input")
    page.wait_for_selector("#epsilon", state="hidden")
    purify(page, 3)
    assert headings(page) == ["Input", "Purified"]
    given, purified = pictures(page)
    assert given != purified
    assert "weak" not in page.inner_text("#summary")


def test_a_bad_file_is_refused_in_words(page: Any, tmp_path: Path) -> None:
    (tmp_path / "letter.png").write_text("Dear reader")
    page.set_input_files("input[type=file]", tmp_path / "letter.png")
    page.wait_for_selector("#message [role=alert]")
    assert page.inner_text("#message") == "letter.png is not an image that pillow can read."
    assert pictures(page) == []
    page.click("#run")
    page.wait_for_selector("#status [role=alert]")
    assert "picture" in page.inner_text("#status")
    page.locator("#samples button").nth(4).click()
    page.wait_for_selector("#stage img")
    assert page.locator("#message [role=alert]").count() == 0
    assert page.locator("#status [role=alert]").count() == 0


def test_a_bad_setting_is_refused_in_words(page: Any) -> None:
    page.fill("#t_star input", "5")
    page.click("#run")
    page.wait_for_selector("#status [role=alert]")
    assert "t_star" in page.inner_text("#status")
    assert page.is_visible("#run")
    page.fill("#t_star input", "0.1")
    purify(page, 2)


def test_a_method_brings_its_settings(page: Any) -> None:
    page.click("#method input")
    page.click("[role=option][aria-label=adp]")
    page.wait_for_selector("#about :text('ADP')")
    page.wait_for_selector("#t_star", state="hidden")
    assert page.input_value("#num_steps input") == "10"
    assert not page.is_visible("#solver")
    page.click("#run")
    page.wait_for_selector("#summary :text('adp: sigma 0.1')")


def test_a_run_can_be_stopped_and_another_waits_for_it(page: Any, browser: Any) -> None:
    second = browser.new_page()
    second.set_default_timeout(SECONDS)
    second.goto(page.url)
    second.wait_for_selector("#run")
    second.fill("#num_steps input", "2")
    page.fill("#num_steps input", "1000")
    page.click("#run")
    page.wait_for_selector("#status :text('of 1000')")
    second.click("#run")
    second.wait_for_function("document.querySelector('#status').innerText.includes('queue: 1')")
    page.click("#stop")
    page.wait_for_selector("#run", state="visible")
    assert headings(page) == ["Input", "Attacked", "Purified"]
    assert len(pictures(page)) == 1
    second.wait_for_selector("#step input[max='2']", state="visible")
    second.close()
    purify(page, 2)


def test_another_picture_ends_the_run(page: Any) -> None:
    page.fill("#num_steps input", "1000")
    page.click("#run")
    page.wait_for_selector("#status :text('of 1000')")
    before = pictures(page)[0]
    page.locator("#samples button").nth(7).click()
    page.wait_for_selector("#run", state="visible")
    (after,) = pictures(page)
    assert after != before
    assert page.get_attribute("#stage img", "alt") == "a 7"


@pytest.mark.parametrize("width", [390, 1280])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_it_fits_its_window_and_can_be_read(
    width: int, scheme: str, browser: Any, address: str
) -> None:
    context = browser.new_context(viewport={"width": width, "height": 800}, color_scheme=scheme)
    context.set_default_timeout(SECONDS)
    page = context.new_page()
    page.goto(address)
    page.wait_for_selector("#run")
    purify(page, 2)
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    back = luminance(page, "body", "backgroundColor")
    assert (back < 0.1) == (scheme == "dark")
    for place in ("#heading p", "#stage figcaption", "#stage li", "#summary p", "#about"):
        front = luminance(page, place, "color")
        light, dark = max(front, back), min(front, back)
        assert (light + 0.05) / (dark + 0.05) > 4.5, place  # WCAG 2.1, AA
    context.close()


def luminance(page: Any, place: str, what: str) -> float:
    """Relative luminance of a colour on the page, as WCAG 2.1 defines it."""
    text = page.eval_on_selector(place, f"part => getComputedStyle(part).{what}")
    channels = np.array([float(x) for x in re.findall(r"[\d.]+", text)[:3]]) / 255
    linear = np.where(channels <= 0.04045, channels / 12.92, ((channels + 0.055) / 1.055) ** 2.4)
    return float(linear @ [0.2126, 0.7152, 0.0722])


def test_browsers_are_told_to_stay_here(address: str) -> None:
    with urllib.request.urlopen(address) as answer:
        policy = answer.headers["content-security-policy"]
        html = answer.read().decode()
    assert "default-src 'self'" in policy
    assert "http:" not in policy
    assert "https:" not in policy
    assert '"analytics_enabled": false' in html or '"analytics_enabled":false' in html
    with pytest.raises(urllib.error.HTTPError):
        urllib.request.urlopen(f"{address}/monitoring")


def test_large_files_are_not_taken(page: Any, tmp_path: Path) -> None:
    with (tmp_path / "large.png").open("wb") as file:
        file.truncate(33 * 2**20)
    page.set_input_files("input[type=file]", tmp_path / "large.png")
    page.wait_for_selector(":text('large.png'), :text('exceeds')")
