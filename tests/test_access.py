"""What the log says of each request, and what it never says."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, suppress
from pathlib import Path
from typing import Any

import httpx
import pytest
from starlette.types import Message, Receive, Scope, Send
from support import FakeBackend, encoded, picture
from test_keys import key_named

from serving.access import AccessLog
from serving.keys import write_keys
from serving.logs import fields_of

Serve = Callable[..., AbstractContextManager[str]]
Line = tuple[int, dict[str, Any]]
JPEG = {"content-type": "image/jpeg"}
PHOTO = encoded(picture(61))
TRACE = "4bf92f3577b34da6a3ce929d0e0e4736"


class Lines(logging.Handler):
    """The access lines as level and fields; `upto(n)` waits until there are so many."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[Line] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.seen.append((record.levelno, dict(fields_of(record))))

    def upto(self, count: int) -> list[Line]:
        """A line is written after its answer has left, so a client may be ahead of it."""
        until = time.monotonic() + 10
        while len(self.seen) < count and time.monotonic() < until:
            time.sleep(0.005)
        assert len(self.seen) == count, self.seen
        return self.seen


@pytest.fixture
def lines() -> Iterator[Lines]:
    handler, logger = Lines(), logging.getLogger("alexnet.access")
    before = logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    yield handler
    logger.removeHandler(handler)
    logger.setLevel(before)


def test_an_answer_is_one_line_with_its_model_crops_bytes_and_stages(
    live_server: str, lines: Lines
) -> None:
    headers = JPEG | {"x-request-id": "abc-1", "traceparent": f"00-{TRACE}-00f067aa0ba902b7-01"}
    answer = httpx.post(f"{live_server}/classify", content=PHOTO, headers=headers)
    [(level, line)] = lines.upto(1)
    ms = line.pop("ms")
    assert level == logging.INFO
    assert line == {
        "request_id": "abc-1",
        "client": "127.0.0.1",
        "method": "POST",
        "path": "/classify",
        "status": 200,
        "bytes_in": len(PHOTO),
        "bytes_out": len(answer.content),
        "trace_id": TRACE,
        "model": "alexnet",
        "version": "7",
        "crops": 10,
        "degraded": False,
    }
    said = answer.json()["timing_ms"]
    assert set(ms) == set(said) and ms["total"] >= said["total"]
    assert {stage: ms[stage] for stage in ms if stage != "total"} == pytest.approx(
        {stage: said[stage] for stage in said if stage != "total"}
    )


@pytest.mark.parametrize(
    "traceparent",
    [
        "",
        "nonsense",
        f"00-{'0' * 32}-00f067aa0ba902b7-01",
        f"00-{TRACE}-{'0' * 16}-01",
        f"00-{TRACE.upper()}-00f067aa0ba902b7-01",
        f"00-{TRACE}-00f067aa0ba902b7-01\tstatus=200",
    ],
)
def test_what_is_no_trace_is_not_told_as_one(live_server: str, lines: Lines, traceparent: str) -> None:
    httpx.get(f"{live_server}/models", headers={"traceparent": traceparent})
    [(_, line)] = lines.upto(1)
    assert "trace_id" not in line


@pytest.mark.parametrize(
    ("method", "path", "body", "status", "reason"),
    [
        ("POST", "/classify", b"nonsense", 415, "unsupported_format"),
        ("POST", "/classify", PHOTO[: len(PHOTO) // 2], 422, "undecodable_image"),
        ("POST", "/classify", PHOTO * 9, 413, "too_many_bytes"),
        ("POST", "/classify?top=0", PHOTO, 400, "malformed_request"),
        ("POST", "/classify?model=nope", PHOTO, 404, "unknown_model"),
        ("GET", "/nope", b"", 404, None),
    ],
)
def test_a_refusal_is_a_line_with_its_reason(
    serve: Serve, backend: FakeBackend, lines: Lines, method: str, path: str, body: bytes, status: int,
    reason: str | None,
) -> None:  # fmt: skip
    with serve(backend, max_upload_bytes=len(PHOTO) * 2) as url:
        answer = httpx.request(method, url + path, content=body, headers=JPEG)
    [(level, line)] = lines.upto(1)
    assert (level, line["status"], line.get("reason")) == (logging.INFO, status, reason)
    assert line["request_id"] == answer.json()["request_id"]
    assert "model" not in line and set(line["ms"]) == {"total"}


def test_a_failure_of_ours_is_a_warning_under_the_request_id_of_its_trace(
    serve: Serve, lines: Lines, caplog: pytest.LogCaptureFixture
) -> None:
    def explode() -> None:
        raise RuntimeError("no luck")

    with serve(FakeBackend(before=explode)) as url:
        httpx.post(f"{url}/classify", content=PHOTO, headers=JPEG)
    [(level, line)] = lines.upto(1)
    assert (level, line["status"]) == (logging.WARNING, 500)
    assert any(line["request_id"] in record.getMessage() and record.exc_info for record in caplog.records)


def test_health_is_told_only_where_it_is_bad(serve: Serve, backend: FakeBackend, lines: Lines) -> None:
    with serve(backend) as url:
        for path in ("/livez", "/readyz", "/metrics"):
            assert httpx.get(url + path).status_code == 200
        backend.ready = False
        assert httpx.get(f"{url}/readyz").status_code == 503
    [(level, line)] = lines.upto(1)
    assert (level, line["path"], line["status"], line["reason"]) == (
        logging.WARNING, "/readyz", 503, "model_not_ready",
    )  # fmt: skip


def test_neither_query_nor_file_name_nor_photograph_nor_key_is_in_a_line(
    serve: Serve, backend: FakeBackend, lines: Lines, tmp_path: Path
) -> None:
    secret, key = key_named("shop")
    write_keys(tmp_path / "keys.json", [key])
    marked = PHOTO[:2] + b"\xff\xfe\x00\x13MARKED-PHOTOGRAPH" + PHOTO[2:]
    with serve(backend, api_keys_file=tmp_path / "keys.json") as url:
        for shown in (secret, secret + "x"):
            httpx.post(
                f"{url}/classify?token=QUERY-SECRET",
                files={"file": ("PRIVATE-NAME.jpg", marked)},
                headers={"authorization": f"Bearer {shown}", "cookie": "COOKIE-SECRET"},
            )
    (_, answered), (_, refused) = lines.upto(2)
    assert (answered["status"], answered["key"]) == (200, "shop")
    assert (refused["status"], refused["reason"]) == (401, "unauthorized")
    for private in ("QUERY", "PRIVATE", "MARKED", "COOKIE", secret, key.sha256):
        assert private not in str(lines.seen)


def test_an_endless_path_is_cut(live_server: str, lines: Lines) -> None:
    httpx.get(f"{live_server}/{'a' * 5000}")
    [(_, line)] = lines.upto(1)
    assert len(line["path"]) == 200


# --- what a server does not do by itself -----------------------------------------------------------

SCOPE: Scope = {"type": "http", "method": "GET", "path": "/x", "headers": [], "client": None}


def line_of(app: Callable[[Scope, Receive, Send], Any], lines: Lines) -> Line:
    async def receive() -> Message:
        return {"type": "http.request", "body": b"12345", "more_body": False}

    async def send(_: Message) -> None:
        pass

    with suppress(OSError):
        asyncio.run(AccessLog(app)({**SCOPE}, receive, send))
    [line] = lines.seen
    return line


def test_an_answer_that_broke_off_is_a_warning(lines: Lines) -> None:
    async def half(scope: Scope, receive: Receive, send: Send) -> None:
        await receive()
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b"123", "more_body": True})
        raise OSError("disk")

    level, line = line_of(half, lines)
    assert level == logging.WARNING
    assert (line["status"], line["cut_off"], line["bytes_in"], line["bytes_out"]) == (200, True, 5, 3)


def test_a_request_left_without_an_answer_is_a_warning(lines: Lines) -> None:
    async def nothing(scope: Scope, receive: Receive, send: Send) -> None:
        raise OSError("disk")

    level, line = line_of(nothing, lines)
    assert level == logging.WARNING and "status" not in line
