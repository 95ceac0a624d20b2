"""Two ports: what the public is shown, and what only operators are."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from processes import Gateway, gateway
from support import FakeBackend, encoded, picture, run_alexnet, tiny_repository
from test_keys import key_named

from serving.app import create_app
from serving.keys import write_keys
from serving.settings import Settings

OPS_ONLY = {"/metrics", "/docs", "/docs/assets/swagger-ui.css", "/openapi.json"}
BOTH = {"/livez", "/readyz"}
PARTS_OF_DOCS = {"/page/docs.js", "/page/icon.svg"}


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Gateway]:
    folder = tmp_path_factory.mktemp("sides")
    secret, key = key_named("shop")
    write_keys(folder / "keys.json", [key])
    (folder / "key").write_text(secret)
    repository = tiny_repository(folder / "repository")
    with gateway(repository, ops_port=0, api_keys_file=folder / "keys.json") as server:
        yield server


def statuses(url: str, paths: set[str]) -> set[int]:
    with httpx.Client(base_url=url) as client:
        return {client.get(path).status_code for path in paths}


def test_operators_see_metrics_health_and_docs_without_a_key(server: Gateway) -> None:
    assert statuses(server.ops_url, OPS_ONLY | BOTH | PARTS_OF_DOCS) == {200}
    assert "alexnet_" in httpx.get(f"{server.ops_url}/metrics").text


def test_the_public_sees_none_of_it_but_health(server: Gateway) -> None:
    assert statuses(server.url, OPS_ONLY) == {404}
    assert statuses(server.url, BOTH | PARTS_OF_DOCS | {"/"}) == {200}
    absent = httpx.get(f"{server.url}/metrics")
    assert absent.headers["content-type"] == "application/problem+json"
    assert "x-request-id" in absent.headers and "content-security-policy" in absent.headers


def test_nothing_but_that_is_served_to_operators_keyless_as_they_are(server: Gateway) -> None:
    """Every other route of the app: the second port must be no way around the keys."""
    routes = {getattr(route, "path", "") for route in create_app(Settings(), FakeBackend()).routes}
    rest = routes - OPS_ONLY - BOTH - {"/docs/assets"}
    assert {"/", "/classify", "/labels", "/model", "/models"} <= rest
    assert statuses(server.ops_url, rest | {"/page/page.js", "/nope"}) == {404}
    photo = encoded(picture(1))
    answer = httpx.post(f"{server.ops_url}/classify", content=photo, headers={"content-type": "image/jpeg"})
    assert answer.status_code == 404


def test_by_itself_the_second_port_is_this_machine_s_alone(server: Gateway) -> None:
    assert server.ops_url.startswith("http://127.0.0.1:") and server.ops_url != server.url
    assert Settings().ops_host == "127.0.0.1"


def test_without_a_second_port_all_is_on_the_one(live_server: str) -> None:
    assert statuses(live_server, OPS_ONLY | BOTH) == {200}


def test_the_page_points_to_what_is_there_and_nowhere_else(server: Gateway, live_server: str) -> None:
    for url, docs in ((live_server, True), (server.url, False)):
        page = httpx.get(url)
        links = set(re.findall(r'(?:href|src)="(/[^"]*)"', page.text))
        assert len(links) > 2 and statuses(url, links) == {200}
        assert ("/docs" in links) is docs
        assert "curl -F" in page.text and len(re.findall("<p[ >]", page.text)) == page.text.count("</p>")
        assert page.headers["content-type"] == "text/html; charset=utf-8"


def test_the_same_port_twice_is_told_and_a_taken_one_ends_the_start(server: Gateway, tmp_path: Path) -> None:
    twice = run_alexnet("serve", "--port", "8000", "--ops-port", "8000")
    assert twice.returncode == 1
    (line,) = twice.stderr.splitlines()
    assert "must differ" in line
    taken = server.ops_url.rsplit(":", 1)[1]
    done = run_alexnet(
        "serve", "--port", "0", "--ops-port", taken, "--repository", tiny_repository(tmp_path)
    )
    assert done.returncode != 0
    assert "address already in use" in done.stderr.lower() and "Traceback" not in done.stderr
    assert done.stdout == "", "it never said that it was ready"
