"""A Chromium without a window, for pages that need no network. By selenium and the driver that is
installed beside the browser.

selenium rather than playwright: it drives the system's Chromium by the driver of the same version,
where playwright expects a browser of its own making and brings a Node.js of some 40 MB.
"""

from __future__ import annotations

import json
import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

__all__ = ["chromium", "missing", "opened", "requests", "until"]

_ARGUMENTS = (
    "--headless=new",
    "--no-sandbox",  # it does not start as root in a container otherwise
    "--disable-dev-shm-usage",
    # WebGL without a GPU
    "--use-angle=swiftshader",
    "--enable-unsafe-swiftshader",
    # nothing that the page did not ask for
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-extensions",
    "--disable-quic",
    "--disable-sync",
    "--no-first-run",
)


def _program(*names: str) -> str | None:
    return next((found for name in names if (found := shutil.which(name))), None)


def _chromium() -> str | None:
    return _program("chromium", "chromium-browser", "google-chrome")


def missing() -> str:
    """Why there is no browser; "" where there is one."""
    if _chromium() is None or _program("chromedriver") is None:
        return "no chromium and chromedriver on the PATH"
    try:
        import selenium  # noqa: F401
    except ImportError:
        return "selenium is not installed"
    return ""


@contextmanager
def chromium(width: int = 1280, height: int = 900, load_seconds: float = 60) -> Iterator[Any]:
    """A browser with an empty profile, as selenium's driver; it ends with the block."""
    from selenium.webdriver import Chrome, ChromeOptions
    from selenium.webdriver.chrome.service import Service

    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
        options = ChromeOptions()
        options.binary_location = str(_chromium())
        for argument in _ARGUMENTS:
            options.add_argument(argument)
        options.add_argument(f"--user-data-dir={profile}")
        options.add_argument(f"--window-size={width},{height}")
        options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
        driver = Chrome(options=options, service=Service(_program("chromedriver")))
        try:
            driver.set_page_load_timeout(load_seconds)
            driver.set_script_timeout(load_seconds)
            yield driver
        finally:
            driver.quit()


def until(driver: Any, condition: str, seconds: float = 60) -> Any:
    """Waits until a JavaScript expression is true, and returns its value."""
    end = time.monotonic() + seconds
    while True:
        value = driver.execute_script(f"return {condition}")
        if value:
            return value
        if time.monotonic() > end:
            raise TimeoutError(f"after {seconds} s, still not true: {condition}")
        time.sleep(0.05)


def opened(driver: Any, path: Any) -> None:
    """Loads a report and waits for all its plots."""
    driver.get(path.resolve().as_uri())
    until(driver, "document.documentElement.dataset.drawn === 'all'")


def requests(driver: Any) -> list[str]:
    """Addresses that were asked for since the last call."""
    messages = [json.loads(entry["message"])["message"] for entry in driver.get_log("performance")]
    sent = [m["params"] for m in messages if m["method"] == "Network.requestWillBeSent"]
    return [params["request"]["url"] for params in sent]
