"""The page of `msd-hf demo --web` in a real browser, over loopback.

    python -m pytest -m browser

With `MSD_HF_SCREENSHOT=FILE.png` it leaves the picture of README there.
"""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from urllib.parse import urlsplit

import pytest
from browser import browser, missing_part, requested_urls

from msd_hf.toy import make_prompts


pytestmark = [pytest.mark.browser, pytest.mark.skipif(missing_part() is not None, reason=str(missing_part()))]
SCREENSHOT = os.environ.get("MSD_HF_SCREENSHOT")


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    """The address of the page, of a server in a process of its own, which Ctrl-C must end well."""
    folder = tmp_path_factory.mktemp("elsewhere")
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(map(os.path.abspath, sys.path)), "TMPDIR": str(folder)}
    command = [sys.executable, "-m", "msd_hf", "demo", "--web"]
    server = subprocess.Popen(command, cwd=folder, env=environment, stdout=subprocess.PIPE, text=True)
    alarm = threading.Timer(300, server.kill)
    alarm.start()
    try:
        printed = ""
        while "the page is at" not in printed:
            line = server.stdout.readline()
            assert line, f"the server has ended: {printed}"
            printed += line
        yield re.search(r"http://\S+", printed)[0]
    finally:
        alarm.cancel()
        server.send_signal(signal.SIGINT)
        rest, _ = server.communicate(timeout=60)
    assert server.returncode == 0 and "ended" in rest
    assert list(folder.glob("msd-hf-web-*")) == []  # pictures are deleted


@pytest.fixture
def driver(page, tmp_path):
    with browser(tmp_path / "profile") as driver:
        driver.get(page)
        yield driver


def wait_for(driver, selector: str, seconds: float = 60):
    """The first element that a CSS selector finds, as soon as there is one."""
    end = time.monotonic() + seconds
    while not (found := driver.find_elements("css selector", selector)):
        assert time.monotonic() < end, (
            f"no {selector} after {seconds} s: {driver.find_element('tag name', 'body').text}"
        )
        time.sleep(0.1)
    return found[0]


def ask(driver, text: str, picture: Path | None = None) -> None:
    """Types a question in place of the one that is there, uploads its picture, and sends it."""
    for button in driver.find_elements("css selector", "#question .delete-button"):
        driver.execute_script("arguments[0].click()", button)
    field = wait_for(driver, "#question textarea")
    field.clear()
    field.send_keys(text)
    if picture is not None:
        wait_for(driver, "#question .upload-button, #question [aria-label='Upload a file']")
        driver.find_element("css selector", "#question input[type=file]").send_keys(str(picture))
        wait_for(driver, "#question .thumbnail-item img")
    wait_for(driver, "#question .submit-button").click()


def test_a_click_on_an_example_gives_the_same_answer_in_less_time(driver):
    wait_for(driver, ".gallery-item")
    examples = driver.find_elements("css selector", ".gallery-item")
    assert len(examples) >= 4
    examples[1].click()
    wait_for(driver, ".step.now")  # it runs
    result = wait_for(driver, ".summary.result")
    alone, drafted = (side.text for side in driver.find_elements("css selector", ".side .answer"))
    assert alone == drafted and len(alone.split()) > 10
    assert result.get_attribute("data-same") == "true" and float(result.get_attribute("data-speedup")) > 1
    assert driver.find_elements("css selector", ".with-draft .answer .drafted")
    assert not driver.find_elements("css selector", ".side.alone .answer .drafted")
    assert driver.find_elements("css selector", "#tree .tree li .drafted")
    if SCREENSHOT:
        height = driver.execute_script("return document.documentElement.scrollHeight")
        driver.set_window_size(1180, height + 150)  # without a scroll bar; some of it is the frame of the window
        driver.save_screenshot(SCREENSHOT)
    assert {urlsplit(url).hostname for url in requested_urls(driver)} == {"127.0.0.1"}
    assert [entry for entry in driver.get_log("browser") if entry["level"] == "SEVERE"] == []


def test_a_race_can_be_stopped_and_a_typed_question_is_answered(driver):
    wait_for(driver, ".gallery-item").click()
    wait_for(driver, ".step.now")
    wait_for(driver, "#question .stop-button").click()
    wait_for(driver, "#question .submit-button")
    assert not driver.find_elements("css selector", ".summary.result")
    ask(driver, "Count from 5 to 12.")
    wait_for(driver, ".summary.result")
    alone, drafted = (side.text for side in driver.find_elements("css selector", ".side .answer"))
    assert alone == drafted and "eight" in alone


def test_a_picture_of_ones_own_is_asked_about(driver, tmp_path):
    (prompt,) = make_prompts("test", 1, 5, "background")
    prompt.image.save(tmp_path / "ein Bild – 画.png")
    wait_for(driver, ".gallery-item")
    ask(driver, prompt.question, tmp_path / "ein Bild – 画.png")
    wait_for(driver, ".summary.result")
    alone, drafted = (side.text for side in driver.find_elements("css selector", ".side .answer"))
    assert alone == drafted == prompt.answer


def test_a_question_that_fails_is_said_on_the_page(driver):
    wait_for(driver, ".gallery-item")
    ask(driver, "<image> <b>what</b> is that?")
    assert "Error" in wait_for(driver, ".summary.error").text
    assert driver.find_elements("css selector", ".summary.error b") == []
    wait_for(driver, ".gallery-item").click()
    wait_for(driver, ".summary.result")
