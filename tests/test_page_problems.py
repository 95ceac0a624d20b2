"""The page when something is wrong: every documented problem, a busy server, a key, a broken connection."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from chromium import answered, photo, problem
from playwright.sync_api import FilePayload, Page, Route, expect
from support import FakeBackend, encoded, picture

from serving.errors import Overloaded

OpenPage = Callable[..., Page]
ASKED = re.compile(r"/classify\?")
HOPELESS = (413, 415, 422)
WORDS = {
    400: "did not understand",
    404: "no longer has",
    408: "too slow",
    413: "too large",
    415: "cannot read this kind of file",
    422: "damaged",
    429: "Too many requests",
    500: "broke inside the server",
    502: "The model behind the server failed",
    503: "busy",
    504: "took too long",
}


@pytest.fixture
def page(open_page: OpenPage, live_server: str) -> Page:
    return open_page(live_server, expected=("status of", "net::ERR"))


def newest(page: Page, file: FilePayload) -> Any:
    """The card of a photograph that is chosen now."""
    page.set_input_files("#choose", file)
    return page.locator(".card", has_text=file["name"])


def test_every_problem_is_told_in_words_with_what_helps_and_what_the_server_said(page: Page) -> None:
    for status, words in WORDS.items():
        page.route(ASKED, problem(status, retry_after="86400"))
        card = newest(page, photo(status, f"{status}.jpg", width=40, height=30))
        expect(card.locator(".error strong")).to_contain_text(words)
        expect(card.locator(".error")).to_contain_text("The server said: The reason.")
        expect(card.locator(".error")).to_contain_text("r-17")
        again = card.get_by_role("button", name="again")
        expect(again).to_have_count(0 if status in HOPELESS else 1)
        page.unroute(ASKED)
    expect(page.locator(".card", has_text="503.jpg").locator(".error")).to_contain_text("in about 24 hours")


def test_an_answer_that_is_no_problem_document_is_told_in_words_too(page: Page) -> None:
    page.route(ASKED, lambda route: route.fulfill(status=502, body="<html>Bad Gateway</html>"))
    expect(newest(page, photo(1)).locator(".error")).to_contain_text(WORDS[502])
    page.route(ASKED, lambda route: route.fulfill(status=418, body="short and stout"))
    expect(newest(page, photo(2, "tea.jpg")).locator(".error")).to_contain_text("status 418")
    page.route(ASKED, lambda route: route.fulfill(status=200, body="{half an answ"))
    expect(newest(page, photo(3, "half.jpg")).locator(".error")).to_contain_text("status 200")


@pytest.mark.parametrize("status", [429, 503])
def test_a_busy_server_is_asked_again_when_it_said(page: Page, status: int) -> None:
    page.route(ASKED, problem(status, retry_after="1"), times=2)
    card = newest(page, photo(4))
    expect(card.locator(".soon")).to_contain_text(re.compile(r"Trying again in \d s\."))
    answered(page)
    expect(card.locator(".soon")).to_have_count(0)


def test_a_countdown_can_be_ended_either_way(open_page: OpenPage, serve: Callable[..., Any]) -> None:
    busy = [True]

    def full() -> None:
        if busy[0]:
            raise Overloaded("more waits than there is room for")

    with serve(FakeBackend(before=full)) as url:
        page = open_page(url, expected=("503",))
        cards = [newest(page, photo(seed, f"{seed}.jpg")) for seed in (5, 6)]
        for card in cards:
            expect(card.locator(".soon")).to_be_visible(timeout=15_000)
        cards[0].get_by_role("button", name="Cancel").click()
        expect(cards[0].locator(".error")).to_contain_text("Cancelled.")
        busy[0] = False
        for button in page.get_by_role("button", name="Try now").all():
            button.click()
        expect(cards[1].locator(".labels")).to_be_visible(timeout=15_000)
        cards[0].get_by_role("button", name="again").click()
        expect(cards[0].locator(".labels")).to_be_visible(timeout=15_000)
        page.context.close()


def test_a_connection_that_breaks_is_told_and_the_photograph_can_be_sent_again(page: Page) -> None:
    page.route(ASKED, lambda route: route.abort("connectionreset"), times=1)
    card = newest(page, photo(7))
    expect(card.locator(".error")).to_contain_text(re.compile("connection broke|cannot be reached"))
    card.get_by_role("button", name="again").click()
    answered(page)


def test_a_server_that_has_gone_is_told(open_page: OpenPage, serve: Callable[..., Any]) -> None:
    with serve(FakeBackend()) as url:
        page = open_page(url, expected=("net::ERR",))
    card = newest(page, photo(8))
    expect(card.locator(".error")).to_contain_text("cannot be reached")
    expect(card.get_by_role("button", name="again")).to_be_visible()


def test_a_file_that_has_gone_since_it_was_chosen_is_told(page: Page, tmp_path: Path) -> None:
    held: list[Route] = []

    def hold(route: Route) -> None:
        held.append(route)

    page.route(ASKED, hold)
    gone = tmp_path / "gone.jpg"
    gone.write_bytes(encoded(picture(9)))
    page.set_input_files("#choose", [photo(10), photo(11)])  # both places of the queue are taken
    expect(page.locator('.card[data-state="sending"]')).to_have_count(2)
    page.set_input_files("#choose", gone)
    gone.unlink()
    while len(held) < 2:
        page.wait_for_timeout(10)
    for route in held:
        route.continue_()
    expect(page.locator(".card", has_text="gone.jpg").locator(".error")).to_contain_text("cannot be read")


def test_an_empty_file_a_text_and_a_telephones_heic_are_told_apart(page: Page) -> None:
    empty: FilePayload = {"name": "empty.jpg", "mimeType": "image/jpeg", "buffer": b""}
    text: FilePayload = {"name": "notes.txt", "mimeType": "text/plain", "buffer": b"notes"}
    heic: FilePayload = {
        "name": "IMG_1.HEIC",
        "mimeType": "image/heic",
        "buffer": b"\0\0\0\x18ftypheic\0\0\0\0mif1heic" + bytes(400),
    }
    expect(newest(page, empty).locator(".error")).to_contain_text("The file is empty.")
    expect(newest(page, text).locator(".error")).to_contain_text("not a picture but text/plain")
    expect(newest(page, heic).locator(".error")).to_contain_text("share it as JPEG", timeout=15_000)
    expect(page.locator(".no-picture")).to_have_count(3)


def test_a_key_is_asked_for_kept_for_the_tab_and_sent(page: Page) -> None:
    def door(route: Route) -> None:
        if route.request.headers.get("authorization") == "Bearer right-key":
            route.continue_()
        else:
            problem(401)(route)

    page.route(re.compile("/classify|/models|/model$|/labels"), door)
    page.reload()
    expect(page.locator("#key")).to_be_focused()
    expect(page.locator("#model")).to_contain_text("wants an API key")
    page.set_input_files("#choose", [photo(12), photo(13, "other.jpg")])
    expect(page.locator(".card").first).to_contain_text("Waiting")
    for wrong in ("two words", "wrong-key"):
        page.locator("#key").fill(wrong)
        page.keyboard.press("Enter")
        expect(page.locator("#key-words")).to_contain_text(re.compile("one word|did not accept"))
    page.locator("#key").fill("right-key")
    page.get_by_role("button", name="Go on").click()
    answered(page, 2)
    expect(page.locator("#model")).to_contain_text("alexnet")
    expect(page.locator("#door")).to_be_hidden()
    stored = "[Object.values(sessionStorage), Object.values(localStorage), document.cookie]"
    assert page.evaluate(stored) == [["right-key"], [], ""]
    page.reload()
    expect(page.locator("#model")).to_contain_text("alexnet")
    newest(page, photo(14))
    answered(page)


def test_an_answer_from_fewer_crops_says_so_and_the_full_one_can_be_had(page: Page) -> None:
    asked: list[str] = []

    def busy(route: Route) -> None:
        asked.append(route.request.url)
        response = route.fetch()
        fewer = {"degraded": True, "crops": 2} if "degrade=false" not in route.request.url else {}
        route.fulfill(response=response, json=response.json() | fewer)

    page.route(ASKED, busy)
    card = newest(page, photo(15))
    expect(card.locator(".notice")).to_contain_text("looked at 2 crops only")
    card.get_by_role("button", name="Ask again").click()
    expect(card.locator(".notice")).to_have_count(0)
    answered(page)
    assert ["degrade=false" in url for url in asked] == [False, True]


def test_a_large_upload_shows_its_progress_and_can_be_cancelled(
    open_page: OpenPage, live_server: str, backend: FakeBackend
) -> None:
    page = open_page(live_server)
    network = page.context.new_cdp_session(page)
    slow = {"offline": False, "latency": 0, "downloadThroughput": -1, "uploadThroughput": 500_000}
    network.send("Network.emulateNetworkConditions", slow)
    noise = encoded(picture(16, 1300, 1100, noise=120), "PNG")
    assert len(noise) > 2e6
    card = newest(page, {"name": "large.png", "mimeType": "image/png", "buffer": noise})
    expect(card.locator("progress")).to_be_visible()
    expect(card).to_contain_text(re.compile(r"Sending .* of \d\.\d MB"))
    assert 0 <= card.locator("progress").evaluate("bar => bar.value") < 1
    card.get_by_role("button", name="Cancel").click()
    expect(card.locator(".error")).to_contain_text("Cancelled.")
    assert backend.batches == []
    network.send("Network.emulateNetworkConditions", slow | {"uploadThroughput": -1})
    card.get_by_role("button", name="again").click()
    expect(card.locator(".labels")).to_be_visible(timeout=15_000)
