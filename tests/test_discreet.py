"""What stays inside: paths, versions and traces in answers, photographs on disk and in logs, and keys."""

from __future__ import annotations

import logging
import re
import socket
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from importlib.metadata import version
from pathlib import Path
from urllib.parse import urlsplit

import httpx
import pytest
from processes import Gateway, gateway
from support import ROOT, FakeBackend, encoded, picture, tiny_repository
from test_keys import key_named
from test_stopping import until

from serving.keys import write_keys
from serving.wording import INSIDE

Serve = Callable[..., AbstractContextManager[str]]
JPEG = {"content-type": "image/jpeg"}
PHOTO = encoded(picture(51))
PACKAGES = ("fastapi", "starlette", "uvicorn", "pydantic", "pillow", "numpy", "onnxruntime", "httptools")
TELLING = re.compile(
    r"Traceback|File \"|\.py\b|\.cc\b|0x[0-9a-f]{6}|site-packages|<class|Error\b|Exception|"
    r"python|uvicorn|starlette|fastapi|pydantic|pillow|\bPIL\b|numpy|/(?:srv|tmp|usr|home|opt|etc|root)\b",
    re.IGNORECASE,
)
NO_FILES = ("sh", "-c", 'ulimit -f 0 && exec "$@"', "sh")
"""Runs a command that can write nothing into any file: the kernel refuses the first byte."""


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Gateway]:
    """Under `NO_FILES`; beside the model there are two that cannot be opened."""
    repository = tiny_repository(tmp_path_factory.mktemp("hidden place"))
    for name, file in (("damaged", "1/model.onnx"), ("mislabelled", "labels.txt")):
        tiny_repository(repository, name=name)
        (repository / name / file).write_bytes(b"nonsense \xff\n")
    with gateway(repository, under=NO_FILES, max_upload_bytes=20_000_000) as server:
        yield server


def assert_tells_nothing(said: str, *more: str) -> None:
    found = TELLING.search(said)
    assert not found, f"{found} in {said}"
    for word in (str(ROOT), sys.version.split()[0], *map(version, PACKAGES), *more):
        assert word not in said


# --- answers -------------------------------------------------------------------------------------

MULTIPART = {"content-type": "multipart/form-data; boundary=x"}
BAD: list[tuple[str, str, bytes, dict[str, str]]] = [
    ("GET", "/nope", b"", {}),
    ("GET", "/page/../../etc/passwd", b"", {}),
    ("GET", "/page/%2e%2e/%2e%2e/app.py", b"", {}),
    ("GET", "/page/absent.js", b"", {}),
    ("GET", "/page/", b"", {}),
    ("GET", "/docs/assets/../__init__.py", b"", {}),
    ("GET", "/classify", b"", {}),
    ("DELETE", "/labels", b"", {}),
    ("GET", "/labels?model=damaged", b"", {}),
    ("GET", "/model?model=mislabelled", b"", {}),
    ("GET", "/model?model=../..", b"", {}),
    ("POST", "/classify?model=damaged", PHOTO, JPEG),
    ("POST", "/classify?model=..", PHOTO, JPEG),
    ("POST", "/classify?crops=x&top=-1&detail=perhaps&degrade=2", PHOTO, JPEG),
    ("POST", "/classify?top=99999999999999999999999999", PHOTO, JPEG),
    ("POST", "/classify", PHOTO, JPEG | {"x-request-timeout-ms": "soon"}),
    ("POST", "/classify", PHOTO, JPEG | {"x-request-timeout-ms": "1e400"}),
    ("POST", "/classify", b"", JPEG),
    ("POST", "/classify", b"", {}),
    ("POST", "/classify", PHOTO, {"content-type": "text/html"}),
    ("POST", "/classify", PHOTO, {"content-type": "\x7f;;;"}),
    ("POST", "/classify", PHOTO[: len(PHOTO) // 2], JPEG),
    ("POST", "/classify", b"\x89PNG\r\n\x1a\n" + bytes(60), {"content-type": "image/png"}),
    ("POST", "/classify", b"GIF89a" + bytes(40), {"content-type": "image/gif"}),
    ("POST", "/classify", b"RIFF\x24\x00\x00\x00WEBPVP8 " + bytes(24), {"content-type": "image/webp"}),
    ("POST", "/classify", b"II*\x00\x08\x00\x00\x00" + b"\xff" * 40, {"content-type": "image/tiff"}),
    ("POST", "/classify", b"BM" + b"\xff" * 60, {"content-type": "image/bmp"}),
    ("POST", "/classify", b"\0\0\0\x1cftypavif" + bytes(40), {"content-type": "image/avif"}),
    ("POST", "/classify", b"nonsense", MULTIPART),
    ("POST", "/classify", b"--x\r\n\r\n\r\n--x--\r\n", MULTIPART),
    ("POST", "/classify", b'--x\r\ncontent-disposition: form-data; name="file"\r\n\r\n', MULTIPART),
    ("POST", "/classify", b"x", {"content-type": "multipart/form-data"}),
    ("POST", "/classify", b"x", {"content-type": "multipart/form-data; boundary=" + "b" * 300}),
]


@pytest.mark.parametrize(("method", "path", "body", "headers"), BAD, ids=lambda each: str(each)[:40])
def test_no_refusal_tells_of_the_inside(
    server: Gateway, method: str, path: str, body: bytes, headers: dict[str, str]
) -> None:
    # Over a socket, because clients tidy paths up.
    lines = [f"{method} {path} HTTP/1.1", "host: x", "connection: close", f"content-length: {len(body)}"]
    lines += [f"{name}: {value}" for name, value in headers.items()]
    said = asked(server.url, "\r\n".join([*lines, "", ""]).encode("latin-1") + body)
    assert re.match(r"HTTP/1.1 4|HTTP/1.1 503|HTTP/1.1 307", said), said
    assert_tells_nothing(said, "hidden", "ONNX", "\nserver:")


RAW = [
    b"nonsense\r\n\r\n",
    b"GET / HTTP/9.9\r\n\r\n",
    b"GET /\x00 HTTP/1.1\r\n\r\n",
    b"GET http://[::1 HTTP/1.1\r\nhost: x\r\n\r\n",
    b"GET / HTTP/1.1\r\nhost: x\r\nbad header: y\r\n\r\n",
    b"POST /classify HTTP/1.1\r\nhost: x\r\ncontent-length: -5\r\n\r\n",
    b"POST /classify HTTP/1.1\r\nhost: x\r\ncontent-length: 1\r\ncontent-length: 2\r\n\r\n",
    b"POST /classify HTTP/1.1\r\nhost: x\r\ntransfer-encoding: chunked\r\n\r\nzz\r\n",
    b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(40) + b"\r\n\r\n",
    b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
]


@pytest.mark.parametrize("request_", RAW, ids=lambda each: str(each)[:40])
def test_what_is_no_http_is_refused_without_a_word_of_the_inside(server: Gateway, request_: bytes) -> None:
    assert_tells_nothing(asked(server.url, request_), "hidden", "\nserver:")
    assert httpx.get(f"{server.url}/livez").status_code == 200


def asked(url: str, request: bytes, *, finished: bool = True) -> str:
    address = urlsplit(url)
    with socket.create_connection((address.hostname, address.port), timeout=10) as connection:
        connection.sendall(request)
        connection.settimeout(2 if finished else 0.3)
        try:
            return b"".join(iter(lambda: connection.recv(65536), b"")).decode("latin-1")
        except (ConnectionResetError, TimeoutError):
            return ""


def test_why_a_model_cannot_be_opened_is_in_the_log_and_not_in_the_answer(server: Gateway) -> None:
    answer = httpx.get(f"{server.url}/labels?model=damaged")
    assert (answer.status_code, answer.json()["detail"]) == (503, INSIDE)
    request_id = answer.json()["request_id"]
    until(lambda: any(request_id in line and "model.onnx: cannot be" in line for line in server.log))


def test_a_failure_of_ours_is_told_by_its_request_id_alone(
    serve: Serve, caplog: pytest.LogCaptureFixture
) -> None:
    def explode() -> None:
        raise RuntimeError("cannot open /srv/secret/model.onnx")

    with serve(FakeBackend(before=explode)) as url:
        answer = httpx.post(f"{url}/classify", content=PHOTO, headers=JPEG)
    assert answer.status_code == 500
    assert_tells_nothing(answer.text.replace("Internal error", ""), "secret")
    assert answer.json()["request_id"] in caplog.text and "/srv/secret" in caplog.text


# --- photographs ---------------------------------------------------------------------------------


def test_uploads_of_any_size_are_answered_where_no_file_can_be_written(server: Gateway) -> None:
    large = encoded(picture(52, 2600, 2000), "PNG")
    assert len(large) > 5_000_000
    for data in (PHOTO, large):
        sent = httpx.post(f"{server.url}/classify", files={"file": data}, timeout=30)
        assert sent.status_code == 200, sent.text
        raw = httpx.post(f"{server.url}/classify", content=data, headers=JPEG, timeout=30)
        assert raw.status_code == 200, raw.text


def test_where_no_file_can_be_written_a_spooled_upload_would_fail() -> None:
    """So that the test above could fail: what frameworks do with an upload by themselves, there."""
    import subprocess

    code = "import tempfile; f = tempfile.SpooledTemporaryFile(9); f.write(bytes(99)); f.flush()"
    done = subprocess.run(
        [*NO_FILES, sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode != 0


def test_neither_a_photograph_nor_its_name_nor_a_key_is_logged(
    serve: Serve, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Answered, refused and failed; at the most talkative level of everything but the test's own client."""
    calls = 0

    def fail_the_second_time() -> None:
        nonlocal calls
        calls += 1
        if calls == 2:
            raise RuntimeError("no luck")

    secret, key = key_named("shop", rate=0.001, burst=3)
    write_keys(tmp_path / "keys.json", [key])
    marked = PHOTO[:2] + b"\xff\xfe\x00\x12MARKED-PHOTOGRAPH"[:20] + PHOTO[2:]
    caplog.set_level(logging.DEBUG)
    for name in ("httpx", "httpcore", "httpcore.http11", "httpcore.connection"):
        logging.getLogger(name).setLevel(logging.CRITICAL)
    with serve(FakeBackend(before=fail_the_second_time), api_keys_file=tmp_path / "keys.json") as url:
        statuses = [
            httpx.post(
                f"{url}/classify", files={"file": ("PRIVATE-NAME.jpg", data)},
                headers={"authorization": f"Bearer {shown}"},
            ).status_code
            for data, shown in (
                (marked, secret),
                (marked, secret),
                (marked[:300], secret),
                (marked, secret),
                (marked, secret + "x"),
            )
        ]  # fmt: skip
    assert statuses == [200, 500, 422, 429, 401]
    assert "no luck" in caplog.text, "the log is there"
    for private in ("MARKED-PHOTOGRAPH", "PRIVATE-NAME", secret, key.sha256):
        assert private not in caplog.text
