"""Pages in a real browser: an installed Chromium, driven by playwright, which brings none of its own.

`make test-browser` installs both. Nothing here is imported until a test asks for a page.
"""

import os
import shutil
from collections.abc import Iterator
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

import pytest

if TYPE_CHECKING:
    from playwright.sync_api import Browser, BrowserContext, Page

PATIENCE = 60_000  # milliseconds until what must show on a page has not shown
LOCAL = {"127.0.0.1", "localhost", "::1"}
WITHIN = {"about", "blob", "data", "file"}  # the schemes that reach no network
FLAGS = [
    "--headless=new",
    "--no-sandbox",  # Chromium refuses to run as root, as containers do, with it
    "--disable-gpu",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--no-first-run",
    "--use-fake-device-for-media-stream",  # a camera that shows a moving disc
]


@pytest.fixture(scope="session")
def chromium() -> str:
    """The path of a Chromium: PLAYWRIGHT_CHROMIUM, or the one that is installed."""
    for name in (os.environ.get("PLAYWRIGHT_CHROMIUM"), "chromium", "chromium-browser", "google-chrome"):
        if name and (path := shutil.which(name)):
            return path
    pytest.fail("There is no Chromium: install Debian's package chromium, or name one with PLAYWRIGHT_CHROMIUM.")


@pytest.fixture(scope="session")
def browser(chromium: str) -> "Iterator[Browser]":
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        launched = playwright.chromium.launch(executable_path=chromium, args=FLAGS)
        yield launched
        launched.close()


@pytest.fixture
def faults() -> list[str]:
    """What went wrong on the test's pages so far: errors on the console, exceptions, requests beyond this machine.

    Whatever is left in it fails the test when that ends.
    """
    return []


@pytest.fixture
def context(browser: "Browser", faults: list[str]) -> "Iterator[BrowserContext]":
    """A profile of its own, where every page that opens is watched for `faults`."""

    def watch(kind: str, url: str) -> None:
        parts = urlsplit(url)
        if parts.scheme not in WITHIN and parts.hostname not in LOCAL:
            faults.append(f"{kind} beyond this machine: {url}")

    made = browser.new_context()
    made.set_default_timeout(PATIENCE)
    made.on("console", lambda said: faults.append(f"console: {said.text}") if said.type == "error" else None)
    made.on("weberror", lambda raised: faults.append(f"exception: {raised.error}"))
    made.on("request", lambda request: watch("request", request.url))
    made.on("page", lambda page: page.on("websocket", lambda socket: watch("websocket", socket.url)))
    yield made
    made.close()


@pytest.fixture
def page(context: "BrowserContext", faults: list[str]) -> "Iterator[Page]":
    """An empty page. Its test fails on any of `faults`."""
    opened = context.new_page()
    yield opened
    opened.evaluate("1")  # an answer comes after all that the page has said before
    assert not faults, "\n".join(faults)
