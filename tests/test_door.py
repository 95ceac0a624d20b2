"""Who comes in: keys on every route but a few, before anything of the body is read, as often as they may."""

from __future__ import annotations

import re
import socket
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from urllib.parse import urlsplit

import httpx
import pytest
from support import FakeBackend, encoded, picture, run_alexnet
from test_keys import Clock, key_named

from model.remote import Gateway, RemoteError
from serving.app import create_app
from serving.bucket import TokenBucket
from serving.keys import write_keys
from serving.settings import Settings

Serve = Callable[..., AbstractContextManager[str]]
PHOTO = encoded(picture(31))
JPEG = {"content-type": "image/jpeg"}
ORIGIN = "https://shop.example"


class House:
    """A gateway with keys; `keys` by name."""

    def __init__(self, url: str, path: Path, keys: dict[str, str]) -> None:
        self.client = httpx.Client(base_url=url, timeout=20)
        self.url, self.path, self.keys = url, path, keys

    def classify(self, name: str = "", **headers: str) -> httpx.Response:
        shown = {"authorization": f"Bearer {self.keys[name]}"} if name else {}
        return self.client.post("/classify?crops=center", content=PHOTO, headers=JPEG | shown | headers)


@pytest.fixture
def house(serve: Serve, backend: FakeBackend, tmp_path: Path) -> Iterator[House]:
    pairs = [key_named("shop"), key_named("slow", rate=0.01, burst=3), key_named("trickle", rate=0.02)]
    path = tmp_path / "keys.json"
    write_keys(path, [key for _, key in pairs])
    with serve(backend, api_keys_file=path, cors_origins=ORIGIN) as url:
        house = House(url, path, {key.name: secret for secret, key in pairs})
        with house.client:
            yield house


def test_either_header_opens(house: House) -> None:
    secret = house.keys["shop"]
    assert house.classify("shop").status_code == 200
    assert house.classify(**{"x-api-key": secret}).status_code == 200
    assert house.classify(authorization=f"bearer   {secret}").status_code == 200
    assert house.classify(authorization="Basic abc", **{"x-api-key": secret}).status_code == 200


@pytest.mark.parametrize(
    "headers",
    [
        {"authorization": "Bearer alexnet_wrong"},
        {"x-api-key": "alexnet_wrong"},
        {"x-api-key": "schlüssel"},
        {"x-api-key": "k" * 30_000},
    ],
    ids=["bearer", "header", "not ASCII", "long"],
)
def test_a_wrong_key_is_401_and_says_so(house: House, backend: FakeBackend, headers: dict[str, str]) -> None:
    raw = [(name.encode(), value.encode("latin-1")) for name, value in (JPEG | headers).items()]
    answer = house.client.post("/classify", content=PHOTO, headers=raw)
    assert answer.status_code == 401
    assert answer.headers["www-authenticate"] == 'Bearer realm="alexnet", error="invalid_token"'
    assert answer.json()["title"] == "Unauthorized" and "not known" in answer.json()["detail"]
    assert not backend.batches


@pytest.mark.parametrize(
    "headers",
    [
        {},
        {"authorization": "Bearer"},
        {"authorization": "Basic YTpi"},
        {"x-api-key": ""},
    ],
)
def test_without_a_key_it_is_401_and_says_how_to_show_one(house: House, headers: dict[str, str]) -> None:
    answer = house.classify(**headers)
    assert answer.status_code == 401
    assert answer.headers["content-type"] == "application/problem+json"
    assert answer.headers["www-authenticate"] == 'Bearer realm="alexnet"'
    assert "X-API-Key" in answer.json()["detail"]
    assert answer.headers["cache-control"] == "no-store"
    assert answer.json()["request_id"] == answer.headers["x-request-id"]


def test_a_key_in_the_address_does_not_open(house: House) -> None:
    """Addresses are kept in logs and histories."""
    for name in ("key", "api_key", "access_token", "X-API-Key"):
        assert house.client.get("/model", params={name: house.keys["shop"]}).status_code == 401


def test_nothing_of_the_body_is_waited_for(house: House) -> None:
    address = urlsplit(house.url)
    with socket.create_connection((address.hostname, address.port), timeout=10) as connection:
        connection.sendall(b"POST /classify HTTP/1.1\r\nhost: x\r\ncontent-length: 1000000\r\n\r\n")
        assert connection.recv(12) == b"HTTP/1.1 401"


OPEN = ("/", "/page/page.js", "/livez", "/readyz", "/docs", "/docs/assets/swagger-ui.css", "/openapi.json")


def test_every_route_wants_a_key_but_health_the_page_and_the_description(house: House) -> None:
    """Of the app's own routes, so that one that is added later is seen here."""
    for path in OPEN:
        assert house.client.get(path).status_code == 200, path
    routes = {getattr(route, "path", "") for route in create_app(Settings(), FakeBackend()).routes}
    guarded = routes - {*OPEN, "/page", "/docs/assets"}
    assert {"/classify", "/labels", "/metrics", "/model", "/models"} <= guarded
    for path in (*guarded, "/nope", "/pages", "/livez/", "/%6dodel", "/MODEL"):
        for method in ("GET", "POST", "PUT", "DELETE", "OPTIONS", "HEAD"):
            assert house.client.request(method, path).status_code == 401, (method, path)


def test_metrics_are_open_to_a_key(house: House) -> None:
    answer = house.client.get("/metrics", headers={"authorization": f"Bearer {house.keys['shop']}"})
    assert answer.status_code == 200 and "alexnet_" in answer.text


def test_paths_that_climb_do_not_get_past_the_door(house: House) -> None:
    address = urlsplit(house.url)
    climbing = ("/page/../model", "/page/%2e%2e/model", "/docs/assets/../../model", "/page/..%2fmodel")
    for path in climbing:
        with socket.create_connection((address.hostname, address.port), timeout=10) as connection:
            connection.sendall(f"GET {path} HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n".encode())
            answer = b"".join(iter(lambda: connection.recv(65536), b""))
            assert answer[9:12] in (b"401", b"404"), path
            assert b"max_upload_bytes" not in answer


def test_the_project_s_own_clients_show_the_key_of_their_environment(house: House, tmp_path: Path) -> None:
    assert len(Gateway(house.url, house.keys["shop"]).classes()) == 10
    with pytest.raises(RemoteError, match="401"):
        Gateway(house.url).classes()
    for key, words in (("", "401"), (house.keys["shop"], "version 7")):  # which this repository has not
        done = run_alexnet("verify", house.url, "--repository", tmp_path, ALEXNET_API_KEY=key)
        assert done.returncode == 1 and words in done.stderr, done.stderr
        assert not key or key not in done.stderr


# --- rates ---------------------------------------------------------------------------------------


def test_a_key_asks_as_often_as_it_may_then_429_with_the_time(house: House, backend: FakeBackend) -> None:
    assert [house.classify("slow").status_code for _ in range(3)] == [200] * 3
    refused = house.classify("slow")
    assert refused.status_code == 429
    assert 90 <= int(refused.headers["retry-after"]) <= 100  # 0.01 a second
    assert refused.json()["title"] == "Too many requests"
    assert "slow" in refused.json()["detail"] and "0.01" in refused.json()["detail"]
    assert len(backend.batches) == 3
    assert house.classify("shop").status_code == 200, "others go on"
    shown = {"authorization": f"Bearer {house.keys['slow']}"}
    assert house.client.get("/labels", headers=shown).status_code == 200, "labels are no photographs"


def test_a_burst_is_a_second_s_worth_by_itself_and_at_least_one(house: House) -> None:
    assert [house.classify("trickle").status_code for _ in range(2)] == [200, 429]


def test_a_bucket_fills_with_time_up_to_its_size() -> None:
    clock = Clock()
    bucket = TokenBucket(2.0, 3.0, clock)
    assert [bucket.take() for _ in range(3)] == [0, 0, 0]
    assert bucket.take() == pytest.approx(0.5)
    clock.now_s += 0.25
    assert bucket.take() == pytest.approx(0.25), "a refusal takes nothing"
    clock.now_s += 0.25
    assert bucket.take() == 0
    clock.now_s += 1000
    assert [bucket.take() > 0 for _ in range(4)] == [False, False, False, True]


def test_over_a_long_time_a_bucket_lets_through_its_rate_and_one_burst() -> None:
    clock = Clock()
    bucket, passed = TokenBucket(7.0, 20.0, clock), 0
    for _ in range(10_000):
        clock.now_s += 0.01
        passed += bucket.take() == 0
    assert passed == pytest.approx(100 * 7 + 20, abs=1)


def test_other_limits_do_not_give_back_what_was_used() -> None:
    clock = Clock()
    bucket = TokenBucket(1.0, 10.0, clock)
    for _ in range(9):
        bucket.take()
    bucket.resize(1.0, 100.0)
    assert [bucket.take() > 0 for _ in range(2)] == [False, True]
    bucket.resize(10.0, 100.0)
    assert bucket.take() == pytest.approx(0.1)


# --- whose request it is -------------------------------------------------------------------------


def test_fairness_goes_by_the_key_s_name(
    serve: Serve, backend: FakeBackend, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from serving.pipeline import Pipeline

    askers: list[str] = []
    check = Pipeline.check

    def noted(self: Pipeline, *arguments: object) -> None:
        askers.append(arguments[2].client)  # type: ignore[attr-defined]
        check(self, *arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(Pipeline, "check", noted)
    secret, key = key_named("shop")
    write_keys(tmp_path / "keys.json", [key])
    with serve(backend, api_keys_file=tmp_path / "keys.json") as url:
        headers = JPEG | {"x-api-key": secret}
        assert httpx.post(f"{url}/classify", content=PHOTO, headers=headers).status_code == 200
    with serve(backend) as url:
        assert httpx.post(f"{url}/classify", content=PHOTO, headers=JPEG).status_code == 200
    assert askers == ["shop", "127.0.0.1"]


def test_refusals_at_the_door_are_counted(house: House) -> None:
    house.classify()
    shown = {"authorization": f"Bearer {house.keys['shop']}"}
    assert re.search(r'alexnet_refusals_total\{.*401.*\} 1', house.client.get("/metrics", headers=shown).text)


def test_the_description_says_which_routes_want_a_key(house: House, serve: Serve) -> None:
    schema = house.client.get("/openapi.json").json()
    assert set(schema["components"]["securitySchemes"]) == {"bearer", "header"}
    wanted = {path for path, each in schema["paths"].items() if "security" in next(iter(each.values()))}
    assert wanted == {"/classify", "/labels", "/model", "/models"}
    with serve(FakeBackend()) as url:
        assert "securitySchemes" not in httpx.get(f"{url}/openapi.json").json()["components"]


# --- pages of other origins ----------------------------------------------------------------------

PREFLIGHT = {"access-control-request-method": "POST", "access-control-request-headers": "authorization"}


def test_a_page_of_an_allowed_origin_may_ask_with_a_key(house: House) -> None:
    asked = house.client.options("/classify", headers={"origin": ORIGIN} | PREFLIGHT)
    assert asked.status_code == 200
    assert asked.headers["access-control-allow-origin"] == ORIGIN
    assert "authorization" in asked.headers["access-control-allow-headers"].lower()
    for answer in (house.classify("shop", origin=ORIGIN), house.classify(origin=ORIGIN)):
        assert answer.headers["access-control-allow-origin"] == ORIGIN
        assert "retry-after" in answer.headers["access-control-expose-headers"].lower()
        assert "access-control-allow-credentials" not in answer.headers


@pytest.mark.parametrize("origin", ["https://shop.example.evil.test", "http://shop.example", "null", "https://other"])
def test_a_page_of_another_origin_may_not(house: House, origin: str) -> None:
    asked = house.client.options("/classify", headers={"origin": origin} | PREFLIGHT)
    assert asked.status_code == 400
    for answer in (asked, house.classify("shop", origin=origin)):
        assert "access-control-allow-origin" not in answer.headers


def test_by_itself_no_other_origin_may_ask(live_server: str) -> None:
    answer = httpx.get(f"{live_server}/labels", headers={"origin": ORIGIN})
    assert answer.status_code == 200
    assert not [name for name in answer.headers if name.startswith("access-control")]


@pytest.mark.parametrize(
    "origins", ["*", "null", "shop.example", "https://shop.example/", "https://a b", "https://ok.example, ftp://x"]
)
def test_an_origin_that_is_none_is_refused_at_the_start(origins: str) -> None:
    with pytest.raises(ValueError, match="is no origin"):
        Settings(cors_origins=origins)
