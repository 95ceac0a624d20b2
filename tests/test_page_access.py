"""The page for everybody: axe-core's rules in every state, the keyboard, the ear, motion."""

from __future__ import annotations

from collections.abc import Callable
from importlib.resources import files
from typing import Any

import pytest
from chromium import answered, photo, problem
from playwright.sync_api import FilePayload, Page, expect

OpenPage = Callable[..., Page]
AXE = (files("axe_playwright_python") / "axe.min.js").read_text(encoding="utf-8")
SIZES = {"phone": {"width": 390, "height": 844}, "desktop": {"width": 1280, "height": 900}}


def violations(page: Page) -> list[str]:
    """What axe-core finds: rule, impact, and the first node that breaks it."""
    page.evaluate(AXE)  # the browser's tools may, whatever the page's own policy says
    found: dict[str, Any] = page.evaluate("axe.run(document, {resultTypes: ['violations']})")
    return [f"{v['id']} ({v['impact']}): {v['nodes'][0]['html'][:200]}" for v in found["violations"]]


@pytest.mark.parametrize(("scheme", "size"), [("light", "desktop"), ("dark", "phone")])
def test_axe_finds_nothing(open_page: OpenPage, live_server: str, scheme: str, size: str) -> None:
    page = open_page(
        live_server,
        expected=("status of",),
        color_scheme=scheme,
        viewport=SIZES[size],
        reduced_motion="reduce",
    )
    assert violations(page) == [], "as it opens"

    page.set_input_files("#choose", photo(1))
    answered(page)
    page.locator(".card summary").click()
    expect(page.locator(".views canvas")).to_have_count(10)
    page.locator(".classes summary").click()
    assert violations(page) == [], "one answer, explained"

    states = {"busy.jpg": problem(503, "100"), "broken.jpg": problem(500), "locked.jpg": problem(401)}
    for name, answer in states.items():
        page.route("**/classify?*", answer)
        page.set_input_files("#choose", photo(2, name))
        expect(page.locator(".card", has_text=name).locator(".soon, .error")).to_be_visible()
        page.unroute("**/classify?*")
    waiting: FilePayload = photo(3, "waiting.jpg")
    page.set_input_files("#choose", waiting)
    expect(page.locator("#door")).to_be_visible()
    expect(page.locator("#rows tr")).to_have_count(5)
    assert violations(page) == [], "many, in every state, and the door"
    assert page.evaluate("document.documentElement.scrollWidth") <= SIZES[size]["width"]


def test_axe_is_awake(open_page: OpenPage, live_server: str) -> None:
    page = open_page(live_server)
    page.evaluate("document.getElementById('pick').textContent = ''")
    assert [v for v in violations(page) if v.startswith("button-name")]


def test_the_focus_is_never_lost_when_a_card_changes(open_page: OpenPage, live_server: str) -> None:
    page = open_page(live_server)
    page.route("**/classify?*", lambda route: None)
    page.set_input_files("#choose", photo(4, "kept.jpg"))
    page.get_by_role("button", name="Cancel kept.jpg").focus()
    page.keyboard.press("Enter")
    expect(page.locator("h3")).to_be_focused()
    page.keyboard.press("Tab")
    expect(page.get_by_role("button", name="Try kept.jpg again")).to_be_focused()


def test_the_options_follow_the_arrow_keys_with_a_visible_focus(
    open_page: OpenPage, live_server: str
) -> None:
    page = open_page(live_server)
    page.keyboard.press("Tab")
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.value") == "ten"
    page.keyboard.press("ArrowRight")
    expect(page.get_by_label("Centre crop only")).to_be_checked()
    outline = page.get_by_text("Centre crop only").evaluate(
        "span => getComputedStyle(span.parentElement).outlineStyle"
    )
    assert outline == "solid"


@pytest.mark.parametrize(("motion", "animation"), [("reduce", "none"), ("no-preference", "turn")])
def test_nothing_moves_for_those_who_asked_for_that(
    open_page: OpenPage, live_server: str, motion: str, animation: str
) -> None:
    page = open_page(live_server, reduced_motion=motion)
    page.route("**/classify?*", lambda route: None)
    page.set_input_files("#choose", photo(5))
    spinner = page.locator(".working").evaluate("node => getComputedStyle(node, '::before').animationName")
    assert spinner == animation
