"""A headless Chromium for the tests of pages, and what they ask of it."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

# The machine may be busy, or stopped for a minute.
PATIENCE = 120
HOW = "install Chromium and its driver (Debian: apt-get install chromium chromium-driver) and selenium"


def programs() -> tuple[str, str] | None:
    """Paths of the browser and its driver."""
    names = ("chromium", "chromium-browser", "google-chrome", "chrome")
    found = next(filter(None, map(shutil.which, names)), None), shutil.which("chromedriver")
    return (found[0], found[1]) if found[0] and found[1] else None


def start() -> Iterator[Any]:
    """A browser, closed at the end; without one the test is skipped, in CI failed."""
    try:
        from selenium import webdriver
        from selenium.common.exceptions import WebDriverException
        from selenium.webdriver.chrome.service import Service
    except ModuleNotFoundError as error:
        if error.name != "selenium":
            raise
        webdriver = None
    paths = programs()
    if webdriver is None or paths is None:
        refuse = pytest.fail if os.environ.get("CI") else pytest.skip
        refuse(f"no browser to look at pages with: {HOW}")
    options = webdriver.ChromeOptions()
    options.binary_location = paths[0]
    # Containers run as root, without a sandbox of the browser's own and with little shared memory.
    for argument in ("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--lang=en"):
        options.add_argument(argument)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    for attempt in range(3):
        try:
            driver = webdriver.Chrome(options=options, service=Service(paths[1]))
            break
        except WebDriverException:
            if attempt == 2:
                raise
    driver.set_page_load_timeout(PATIENCE)
    driver.set_script_timeout(PATIENCE)
    try:
        yield driver
    finally:
        driver.quit()


def show(driver: Any, path: Path, page: str, width: int, height: int, **media: str) -> None:
    """Open ``page``, written to ``path``, in a window of this size; ``media`` are features such as color_scheme."""
    features = [{"name": f"prefers-{name.replace('_', '-')}", "value": value} for name, value in media.items()]
    driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})
    metrics = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 500}
    driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
    path.write_text(page, encoding="utf-8")
    driver.get(path.as_uri())


def wait(driver: Any, condition: Callable[[], Any], message: str) -> None:
    from selenium.webdriver.support.ui import WebDriverWait

    WebDriverWait(driver, PATIENCE, poll_frequency=0.05).until(lambda _: condition(), message)


def complaints(driver: Any) -> list[str]:
    """What the console has said since the last call."""
    return [entry["message"] for entry in driver.get_log("browser")]


def requests(driver: Any) -> list[str]:
    """The addresses asked for since the last call."""
    messages = [json.loads(entry["message"])["message"] for entry in driver.get_log("performance")]
    return [m["params"]["request"]["url"] for m in messages if m["method"] == "Network.requestWillBeSent"]
