"""A real headless Chromium for the tests of the page: fixtures, and photographs to choose."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterator
from typing import Any
from urllib.parse import urlsplit

import pytest
from playwright.sync_api import Browser, FilePayload, Page, Route, expect, sync_playwright
from support import encoded, picture

FLAGS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]
NAMES = ("ALEXNET_CHROMIUM", "chromium", "chromium-browser", "google-chrome")


@pytest.fixture(scope="module")  # its event loop would stand in the way of other tests
def browser() -> Iterator[Browser]:
    chromium = next((path for name in NAMES if (path := os.environ.get(name) or shutil.which(name))), None)
    if chromium is None:
        reason = "no Chromium on PATH (Debian: apt-get install chromium)"
        pytest.fail(reason) if os.environ.get("REQUIRE_BROWSER") else pytest.skip(reason)
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=FLAGS)
        yield browser
        browser.close()


@pytest.fixture
def open_page(browser: Browser) -> Iterator[Callable[..., Page]]:
    """`open_page(url, **context)`; at the end no console error and no request to another origin."""
    pages: list[tuple[Page, list[str], list[str], list[str]]] = []

    def open_(url: str, *, expected: tuple[str, ...] = (), **context: Any) -> Page:
        page = browser.new_context(**context).new_page()
        complaints: list[str] = []
        strangers: list[str] = []
        page.on("console", lambda m: complaints.append(m.text) if m.type in ("error", "warning") else None)
        page.on("pageerror", lambda error: complaints.append(str(error)))
        origin = urlsplit(url).netloc
        page.on(
            "request",
            lambda r: None if urlsplit(r.url).netloc in (origin, "") else strangers.append(r.url),
        )
        pages.append((page, complaints, strangers, list(expected)))
        page.goto(url)
        expect(page.locator("#model")).to_contain_text("alexnet")
        return page

    yield open_
    for page, complaints, strangers, expected in pages:
        page.context.close()
        assert strangers == []
        assert [c for c in complaints if not any(word in c for word in expected)] == []


def photo(seed: int, name: str = "photo.jpg", **size: int) -> FilePayload:
    return {"name": name, "mimeType": "image/jpeg", "buffer": encoded(picture(seed, **size))}


def answered(page: Page, count: int = 1) -> None:
    expect(page.locator(".labels")).to_have_count(count, timeout=15_000)


def problem(status: int, retry_after: str = "", detail: str = "the reason") -> Callable[[Route], None]:
    """An answer as the gateway's: a problem document, and Retry-After where there is one."""
    body = {"type": "about:blank", "title": "T", "status": status, "detail": detail, "request_id": "r-17"}
    headers = {"Retry-After": retry_after} if retry_after else {}
    return lambda route: route.fulfill(
        status=status, headers=headers, content_type="application/problem+json", body=json.dumps(body)
    )
