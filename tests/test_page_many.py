"""Many photographs at once, what leaves the page (table, files, clipboard), and what was chosen."""

from __future__ import annotations

import csv
import json
import re
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from urllib.parse import parse_qs, urlsplit

import pytest
from chromium import answered, photo
from playwright.sync_api import Browser, FilePayload, Page, Request, expect
from support import LABELS, FakeBackend, encoded, picture, serving

from serving.backends import Backend
from serving.models import Others
from serving.settings import Settings

OpenPage = Callable[..., Page]
FILES = 50
COUNT_URLS = """
    window.urls = new Set();
    const make = URL.createObjectURL, revoke = URL.revokeObjectURL;
    URL.createObjectURL = (blob) => { const url = make(blob); window.urls.add(url); return url; };
    URL.revokeObjectURL = (url) => { window.urls.delete(url); revoke(url); };
"""


def batch_of(count: int) -> list[FilePayload]:
    """Photographs of 60x50, three of them with names that a spreadsheet or a page could trip over."""
    odd = ['=1+1,"a".jpg', "<img src=x>.jpg", "été 雪.jpg"]
    return [photo(seed, name, width=60, height=50) for seed, name in enumerate(odd)] + [
        photo(seed, f"{seed}.jpg", width=60, height=50) for seed in range(3, count)
    ]


def test_fifty_at_once_two_under_way_each_with_a_row_and_nothing_left_in_memory(
    open_page: OpenPage, live_server: str, tmp_path: Path
) -> None:
    page = open_page(live_server)
    page.add_init_script(COUNT_URLS)
    page.reload()
    under_way: set[Request] = set()
    most: list[int] = []

    def began(request: Request) -> None:
        if request.method == "POST":
            under_way.add(request)
            most.append(len(under_way))

    def ended(request: Request) -> None:
        under_way.discard(request)

    page.on("request", began)
    page.on("requestfinished", ended)
    page.set_input_files("#choose", batch_of(FILES))
    expect(page.locator("#batch-words")).to_have_text(f"All {FILES} photographs answered", timeout=40_000)
    assert len(most) == FILES
    assert max(most) == 2
    expect(page.locator("#rows tr")).to_have_count(FILES)
    expect(page.locator("#announce")).to_have_text(f"All {FILES} photographs answered.")
    expect(page.locator(".card .picture")).to_have_count(FILES)
    page.locator("#rows a", has_text="<img").click()
    expect(page.locator("h3:target")).to_have_text("<img src=x>.jpg")

    with page.expect_download() as downloading:
        page.get_by_role("button", name="Download CSV").click()
    downloading.value.save_as(tmp_path / "a.csv")
    with (tmp_path / "a.csv").open(encoding="utf-8-sig", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["file"] for row in rows[:4]] == ["'=1+1,\"a\".jpg", "<img src=x>.jpg", "été 雪.jpg", "3.jpg"]
    assert {row["crops"] for row in rows} == {"10"}
    with page.expect_download() as downloading:
        page.get_by_role("button", name="Download JSON").click()
    downloading.value.save_as(tmp_path / "a.json")
    answers = json.loads((tmp_path / "a.json").read_text())
    assert [float(row["probability"]) for row in rows] == [
        entry["predictions"][0]["probability"] for entry in answers
    ]
    assert answers[0]["file"] == '=1+1,"a".jpg'

    page.get_by_role("button", name="Clear").click()
    expect(page.locator(".card")).to_have_count(0)
    expect(page.locator("#batch")).to_be_hidden()
    page.wait_for_timeout(1100)  # downloads keep theirs for a second
    assert page.evaluate("[...window.urls]") == []


def test_a_large_photograph_is_shown_small(open_page: OpenPage, live_server: str) -> None:
    page = open_page(live_server)
    page.set_input_files("#choose", photo(1, width=3000, height=2000))
    answered(page)
    size = page.locator(".picture").evaluate("image => [image.naturalWidth, image.naturalHeight]")
    assert size == [640, 427]


def test_a_batch_can_be_stopped_and_the_rest_asked_later(
    open_page: OpenPage, live_server: str, backend: FakeBackend
) -> None:
    page = open_page(live_server)
    page.route(re.compile("/classify"), lambda route: None)  # answers nothing
    page.set_input_files("#choose", batch_of(6))
    expect(page.locator('[data-state="sending"].card')).to_have_count(2)
    page.get_by_role("button", name="Stop").click()
    expect(page.locator("#batch-words")).to_have_text("0 of 6 photographs answered, 6 failed")
    page.unroute(re.compile("/classify"))
    page.get_by_role("button", name="Try the failed again").click()
    expect(page.locator("#batch-words")).to_have_text("All 6 photographs answered", timeout=15_000)
    assert len(backend.batches) == 6


def test_more_than_the_page_holds_is_told(open_page: OpenPage, live_server: str) -> None:
    page = open_page(live_server)
    empty: FilePayload = {"name": "e.jpg", "mimeType": "image/jpeg", "buffer": b""}
    page.set_input_files("#choose", [empty] * 510)
    expect(page.locator("#overflow")).to_contain_text("The first 500 of 510")
    expect(page.locator(".card")).to_have_count(500)


COPIED = "navigator.clipboard.readText()"


@pytest.mark.skipif(shutil.which("curl") is None, reason="no curl on PATH")
def test_the_curl_line_asks_the_same_whatever_the_files_name(
    open_page: OpenPage, live_server: str, tmp_path: Path
) -> None:
    name = """it's "$(touch pwned)"; `id` \\ &.jpg"""
    (tmp_path / name).write_bytes(encoded(picture(2)))
    page = open_page(live_server, permissions=["clipboard-read", "clipboard-write"])
    page.get_by_label("Centre crop only").check()
    page.locator("#top").select_option("3")
    page.set_input_files("#choose", tmp_path / name)
    answered(page)
    page.get_by_role("button", name="as JSON").click()
    expect(page.locator("#announce")).to_have_text("Copied")
    shown = json.loads(page.evaluate(COPIED))
    expect(page.locator(".card .actions")).not_to_contain_text("Copied", timeout=5000)
    page.get_by_role("button", name="curl").click()
    expect(page.locator(".card .actions")).to_contain_text("Copied")
    line = page.evaluate(COPIED)
    done = subprocess.run(
        ["sh", "-c", f"{line} --silent --show-error --noproxy '*'"],
        cwd=tmp_path,
        capture_output=True,
        timeout=30,
        check=True,
    )
    answer = json.loads(done.stdout)
    assert answer["predictions"] == shown["predictions"]
    assert (len(answer["predictions"]), answer["crops"]) == (3, 1)
    assert [path.name for path in tmp_path.iterdir()] == [name]


def test_the_key_never_stands_in_the_curl_line(open_page: OpenPage, live_server: str) -> None:
    page = open_page(live_server, permissions=["clipboard-read", "clipboard-write"])
    page.evaluate("sessionStorage.setItem('alexnet-key', 'my-secret')")
    page.set_input_files("#choose", photo(3))
    answered(page)
    page.get_by_role("button", name="curl").click()
    expect(page.locator("#announce")).to_have_text("Copied")
    line = page.evaluate(COPIED)
    assert "my-secret" not in line
    assert '"Authorization: Bearer $ALEXNET_KEY"' in line


def test_copying_works_without_a_clipboard_as_over_plain_http(open_page: OpenPage, live_server: str) -> None:
    page = open_page(live_server, permissions=["clipboard-read"])
    page.set_input_files("#choose", photo(4))
    answered(page)
    page.evaluate("navigator.clipboard.writeText = undefined")
    copy = page.get_by_role("button", name="as JSON")
    copy.focus()
    page.keyboard.press("Enter")
    expect(page.locator("#announce")).to_have_text("Copied")
    assert json.loads(page.evaluate(COPIED))["crops"] == 10
    expect(copy).to_be_focused()


def test_the_model_can_be_chosen_where_there_are_several(open_page: OpenPage) -> None:
    async def names() -> list[str]:
        return ["alexnet", "smaller"]

    def open_(_: str) -> Backend:
        return FakeBackend(LABELS[:4])

    with serving(Settings(pulse_s=0), FakeBackend(), Others(names, open_)) as url:
        page = open_page(url)
        expect(page.locator("#models option")).to_have_text(["alexnet (fp32)", "smaller"])
        page.get_by_label("Model").select_option("smaller")
        expect(page.locator("#model")).to_contain_text("4 classes")
        expect(page.locator("#top option")).to_have_text(["1", "3"])
        queries: list[str] = []
        page.on("request", lambda r: queries.append(urlsplit(r.url).query) if r.method == "POST" else None)
        page.set_input_files("#choose", photo(5))
        answered(page)
        expect(page.locator(".label")).to_have_count(3)
        asked = parse_qs(queries[0])
        assert (asked["model"], asked["top"], asked["crops"]) == (["smaller"], ["3"], ["ten"])
        page.context.close()


def test_one_model_is_no_choice(open_page: OpenPage, live_server: str) -> None:
    expect(open_page(live_server).locator("#model-choice")).to_be_hidden()


def test_without_javascript_a_plain_sentence_says_what_to_do(browser: Browser, live_server: str) -> None:
    page = browser.new_context(java_script_enabled=False).new_page()
    page.goto(live_server)
    text = page.locator("body").inner_text()
    assert "needs JavaScript" in text
    assert "curl -F file=@photo.jpg" in text
    expect(page.locator("#pick")).to_be_hidden()
    page.context.close()
