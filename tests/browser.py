"""A headless Chromium for tests, of Debian's packages `chromium` and `chromium-driver`."""

from __future__ import annotations

import importlib.util
import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any


# Without a screen, and without what a browser asks the internet for by itself.
ARGUMENTS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--window-size=1180,1290",
)


def missing_part() -> str | None:
    """What a test in a browser needs and does not find, as a reason to skip it; `None` if nothing is missing."""
    for package in ("gradio", "selenium"):
        if importlib.util.find_spec(package) is None:
            return f"the package {package} is not installed"
    for program in ("chromium", "chromedriver"):
        if shutil.which(program) is None:
            return f"the program {program} is not installed"
    return None


@contextmanager
def browser(folder: Path) -> Iterator[Any]:
    """A `selenium.webdriver.Chrome` with its own data in an empty folder. It logs its requests and its errors."""
    from selenium import webdriver

    options = webdriver.ChromeOptions()
    for argument in (*ARGUMENTS, f"--user-data-dir={folder}"):
        options.add_argument(argument)
    options.binary_location = shutil.which("chromium")
    options.set_capability("goog:loggingPrefs", {"performance": "ALL", "browser": "ALL"})
    driver = webdriver.Chrome(options, webdriver.ChromeService(shutil.which("chromedriver")))
    try:
        yield driver
    finally:
        driver.quit()


def requested_urls(driver: Any) -> list[str]:
    """The addresses of the network that the browser has asked since the last call."""
    messages = [json.loads(entry["message"])["message"] for entry in driver.get_log("performance")]
    sent = [message["params"]["request"]["url"] for message in messages if message["method"] == _SENT]
    return [url for url in sent if url.startswith(("http:", "https:", "ws:", "wss:"))]


_SENT = "Network.requestWillBeSent"
