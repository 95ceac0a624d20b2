"""The page in a real headless Chromium, over the real app with a fake engine."""

from __future__ import annotations

import base64
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from chromium import answered, photo
from playwright.sync_api import Browser, FilePayload, Page, expect
from support import LABELS, FakeBackend, encoded, picture

Serve = Callable[..., Any]


def test_a_chosen_photograph_gets_five_labels_with_bars(
    open_page: Callable[..., Page], live_server: str, backend: FakeBackend
) -> None:
    page = open_page(live_server)
    page.set_input_files("#choose", photo(1, "lake & <b>fish</b>.jpg"))
    answered(page)
    assert page.locator("h3").inner_text() == "lake & <b>fish</b>.jpg"
    mean = backend.probabilities(backend.batches[0]).mean(axis=0)
    winner = LABELS[mean.argmax()].name
    assert page.locator(".label > span:first-child").all_inner_texts()[0] == winner
    assert page.locator(".label").count() == 5
    width = page.locator(".bar > span").first.evaluate("bar => bar.style.width")
    assert float(width.rstrip("%")) == pytest.approx(100 * mean.max(), abs=0.01)
    assert page.locator(".stage-list li").count() == 5
    assert page.locator(".picture").evaluate("image => image.naturalWidth") == 320
    expect(page.locator("#announce")).to_contain_text(winner)


def test_the_disclosure_explains_the_ten_crops_and_their_mean(
    open_page: Callable[..., Page], live_server: str, backend: FakeBackend
) -> None:
    page = open_page(live_server)
    page.set_input_files("#choose", photo(2, width=256, height=256))
    answered(page)
    page.locator(".card summary").click()
    expect(page.locator(".views canvas")).to_have_count(10)
    expect(page.locator(".mean > .column")).to_have_count(10)
    each = backend.probabilities(backend.batches[0])
    winner = each.mean(axis=0).argmax()
    heights = page.locator(".mean > .column").evaluate_all("all => all.map(c => parseFloat(c.style.height))")
    assert heights == pytest.approx((100 * each[:, winner]).tolist(), abs=0.01)
    # The browser's crops are the server's: compare the pixels of each canvas.
    for index in range(10):
        drawn = (
            page.locator(".views canvas")
            .nth(index)
            .evaluate("""canvas => Array.from(
            canvas.getContext('2d').getImageData(0, 0, 224, 224).data.filter((_, i) => i % 4 !== 3))""")
        )
        expected = backend.batches[0][index].reshape(-1).astype(int)
        assert abs(expected - drawn).mean() < 2.5, f"crop {index}"


def test_an_exif_rotated_photograph_is_cut_upright(
    open_page: Callable[..., Page], live_server: str, backend: FakeBackend
) -> None:
    image = picture(3, 256, 256)
    exif = image.getexif()
    exif[0x0112] = 6
    page = open_page(live_server)
    rotated: FilePayload = {
        "name": "turned.jpg",
        "mimeType": "image/jpeg",
        "buffer": encoded(image, exif=exif, quality=95),
    }
    page.set_input_files("#choose", rotated)
    answered(page)
    page.locator(".card summary").click()
    drawn = (
        page.locator(".views canvas")
        .nth(4)
        .evaluate("""canvas => Array.from(
        canvas.getContext('2d').getImageData(0, 0, 224, 224).data.filter((_, i) => i % 4 !== 3))""")
    )
    assert abs(backend.batches[0][4].reshape(-1).astype(int) - drawn).mean() < 2.5


def test_several_photographs_are_all_answered_and_a_wrong_one_is_told(
    open_page: Callable[..., Page], live_server: str
) -> None:
    page = open_page(live_server, expected=("415",))
    wrong: FilePayload = {"name": "notes.jpg", "mimeType": "image/jpeg", "buffer": b"these are notes"}
    page.set_input_files("#choose", [photo(4), wrong, photo(5), photo(6)])
    answered(page, 3)
    error = page.locator(".card", has_text="notes.jpg").locator(".error")
    expect(error).to_contain_text("Choose a JPEG")
    page.set_input_files("#choose", photo(7))
    answered(page, 4)


DROP = """async ([target, kind, name, base64]) => {
    const bytes = Uint8Array.from(atob(base64), c => c.charCodeAt(0));
    const data = new DataTransfer();
    data.items.add(new File([bytes], name, { type: 'image/jpeg' }));
    const event = kind === 'paste'
        ? new ClipboardEvent('paste', { clipboardData: data, bubbles: true })
        : new DragEvent('drop', { dataTransfer: data, bubbles: true, cancelable: true });
    document.querySelector(target).dispatchEvent(event);
}"""


@pytest.mark.parametrize(("kind", "target"), [("drop", "#drop"), ("drop", "footer"), ("paste", "body")])
def test_a_photograph_may_be_dropped_anywhere_or_pasted(
    open_page: Callable[..., Page], live_server: str, kind: str, target: str
) -> None:
    page = open_page(live_server)
    page.evaluate(DROP, [target, kind, "p.jpg", base64.b64encode(encoded(picture(8))).decode()])
    answered(page)


def test_the_keyboard_alone_is_enough(
    open_page: Callable[..., Page], live_server: str, tmp_path: Path
) -> None:
    file = tmp_path / "keyboard.jpg"
    file.write_bytes(encoded(picture(9)))
    page = open_page(live_server)
    page.on("filechooser", lambda chooser: chooser.set_files(file))
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.id") == "pick"
    outline = page.locator("#pick").evaluate("button => getComputedStyle(button).outlineStyle")
    assert outline == "solid", "the focus is visible"
    page.keyboard.press("Enter")
    answered(page)
    for _ in range(12):
        page.keyboard.press("Tab")
        if (
            page.evaluate("document.activeElement.closest('.card') && document.activeElement.tagName")
            == "SUMMARY"
        ):
            break
    page.keyboard.press("Enter")
    expect(page.locator(".views canvas")).to_have_count(10)


def test_the_views_can_be_chosen(
    open_page: Callable[..., Page], live_server: str, backend: FakeBackend
) -> None:
    page = open_page(live_server)
    page.get_by_label("centre crop only").check()
    page.set_input_files("#choose", photo(10))
    answered(page)
    assert [len(batch) for batch in backend.batches] == [1]
    expect(page.locator(".card summary")).to_have_text("The one crop it saw")


def test_a_file_over_the_limit_is_refused_before_it_is_sent(
    open_page: Callable[..., Page], serve: Serve, backend: FakeBackend
) -> None:
    with serve(backend, max_upload_bytes=2000) as url:
        page = open_page(url)
        sent: list[str] = []
        page.on("request", lambda r: sent.append(r.url) if r.method == "POST" else None)
        page.set_input_files("#choose", photo(11, width=900, height=700))
        expect(page.locator(".error")).to_contain_text("at most 2 kB")
        assert sent == []
        page.context.close()


def test_a_server_that_is_gone_is_told_in_words(open_page: Callable[..., Page], live_server: str) -> None:
    page = open_page(live_server, expected=("ERR_INTERNET_DISCONNECTED",))
    page.context.set_offline(True)
    page.set_input_files("#choose", photo(12))
    expect(page.locator(".error")).to_contain_text("cannot be reached")
    page.context.set_offline(False)
    page.set_input_files("#choose", photo(13))
    answered(page)


def test_the_classes_are_listed(open_page: Callable[..., Page], live_server: str) -> None:
    page = open_page(live_server)
    page.locator(".classes summary").click()
    assert page.locator("#classes li").all_inner_texts() == [label.name for label in LABELS]
    expect(page.locator("#model")).to_contain_text("50.0 % of its validation photographs")


def test_a_phone_needs_no_sideways_scrolling(open_page: Callable[..., Page], live_server: str) -> None:
    page = open_page(live_server, viewport={"width": 360, "height": 740})
    page.set_input_files("#choose", photo(14, "a-very-long-name-without-any-space-in-it-" * 3 + ".jpg"))
    answered(page)
    page.locator(".card summary").click()
    expect(page.locator(".views canvas")).to_have_count(10)
    page.locator(".classes summary").click()
    assert page.evaluate("document.documentElement.scrollWidth") <= 360


def test_dark_mode_is_dark(open_page: Callable[..., Page], live_server: str) -> None:
    def brightness(scheme: str) -> float:
        page = open_page(live_server, color_scheme=scheme)
        colour: str = page.evaluate("getComputedStyle(document.body).backgroundColor")
        return sum(map(float, colour.removeprefix("rgb(").removesuffix(")").split(",")))

    assert brightness("dark") < 150 < 600 < brightness("light")


def test_the_interface_description_works_without_the_internet(browser: Browser, live_server: str) -> None:
    page = browser.new_context().new_page()
    strangers: list[str] = []
    page.on(
        "request", lambda r: None if r.url.startswith((live_server, "data:")) else strangers.append(r.url)
    )
    page.goto(f"{live_server}/docs")
    expect(page.get_by_text("Classify a photograph")).to_be_visible(timeout=15_000)
    assert strangers == []
    page.context.close()
