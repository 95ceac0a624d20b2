"""A corpus of hostile files and bodies against a real gateway: each is answered, and it stays as it was."""

from __future__ import annotations

import socket
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import numpy as np
import psutil
import pytest
from images import encoded, header_announcing, photograph
from processes import Gateway, gateway
from support import tiny_repository

FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "AVIF")
DOCUMENTED = {200, 400, 413, 415, 422}
BOUNDARY = "x"
CHUNKED = (
    b"POST /classify HTTP/1.1\r\nHost: x\r\nContent-Type: image/jpeg\r\n"
    b"Transfer-Encoding: chunked\r\n\r\n"
)
FORM = {"content-type": f"multipart/form-data; boundary={BOUNDARY}"}


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Gateway]:
    repository = tiny_repository(tmp_path_factory.mktemp("repository"))
    with gateway(repository, body_timeout_s=2, pulse_s=0, log_level="warning") as started:
        yield started


def files() -> list[bytes]:
    rng = np.random.default_rng(0)
    whole = {name: encoded(photograph(1, 120, 90).convert("RGB"), name) for name in FORMATS}
    found: list[bytes] = []
    for name, data in whole.items():
        for _ in range(20):  # flipped bytes, a few or many, anywhere or in the header
            damaged = bytearray(data)
            reach = len(data) if rng.random() < 0.5 else min(80, len(data))
            for place in rng.integers(0, reach, int(rng.integers(1, 40))):
                damaged[place] = int(rng.integers(256))
            found.append(bytes(damaged))
        found += [data[: int(share * len(data))] for share in rng.random(10)]
        for other in whole.values():  # the head of one with the tail of another
            found.append(data[: len(data) // 2] + other[len(other) // 2 :])
        start, end = sorted(rng.integers(0, len(data), 2).tolist())
        found += [data[:start] + data[end:], data[:end] + data[start:], data[:64] + rng.bytes(20_000)]
        if name != "AVIF":
            sizes = ((60_000, 60_000), (1, 65_535), (16_000, 16_000))
            found += [header_announcing(name, *size) for size in sizes]
    polyglots = [b"<script>", b"PK\x03\x04" + bytes(50), b"%PDF-1.7", b"<?xml?><svg/>", bytes(5000)]
    found += [head + whole["PNG"] for head in polyglots] + [whole["JPEG"] + tail for tail in polyglots]
    return [*found, b"", b"\0", b"\xff\xd8", b"\x89PNG\r\n\x1a\n", bytes(100_000), rng.bytes(100_000)]


def part(head: str, body: bytes = b"x") -> bytes:
    return f"--{BOUNDARY}\r\n{head}\r\n\r\n".encode() + body + b"\r\n"


def bodies() -> list[bytes]:
    """Odd multipart."""
    file, end = 'Content-Disposition: form-data; name="file"; filename="a.jpg"', b"--x--\r\n"
    return [
        b"", b"--x", b"--x--", b"--y\r\n\r\n", end, b"\r\n" * 1000, b"--x\r\n" * 1000,
        part(file), part("") + end, part(":") + end, part("Content-Disposition: nonsense") + end,
        part(file.replace("file", "other")) + end, part(file) * 20 + end,
        part(file + "\r\nContent-Transfer-Encoding: base64") + end,
        part('Content-Disposition: form-data; name="file"', b"\xff\xd8") + end,
        part(file + "\r\nX: " + "y" * 9000) + end, part(f'{file[:-1]}{"n" * 9000}"') + end,
        part('Content-Disposition: form-data; name="a"') * 50 + end,
        part(file.replace("a.jpg", "../../etc/passwd\0")) + end, part(file, b"\r\n--x" * 500) + end,
    ]  # fmt: skip


def resident(running: Gateway) -> int:
    process = psutil.Process(running.process.pid)
    return sum(each.memory_info().rss for each in (process, *process.children(recursive=True)))


def test_each_is_answered_as_documented_and_the_gateway_stays_as_it_was(running: Gateway) -> None:
    corpus = files()
    assert len(corpus) >= 300
    good, jpeg = encoded(photograph(2)), {"content-type": "image/jpeg"}
    with (
        httpx.Client(base_url=running.url, timeout=30) as client,
        ThreadPoolExecutor(8) as several,
    ):

        def status(asked: tuple[bytes, dict[str, str]]) -> int:
            answer = client.post("/classify", content=asked[0], headers=asked[1])
            if answer.status_code != 200:
                assert answer.headers["content-type"] == "application/problem+json"
                assert len(answer.json()["detail"]) < 400 and "Traceback" not in answer.text
            return answer.status_code

        def all_of(asked: list[tuple[bytes, dict[str, str]]]) -> Counter[int]:
            return Counter(several.map(status, asked))

        hostile = [(data, jpeg) for data in corpus] + [(body, FORM) for body in bodies()]
        all_of(hostile[::4] + [(good, jpeg)] * 40)  # what is loaded and allocated at first
        before = resident(running)
        found = all_of(hostile)
        assert set(found) <= DOCUMENTED, found
        assert found[200] > 10 and found[422] > 100 and found[415] > 10 and found[413] > 5, found
        assert all_of([(good, jpeg)] * 20) == {200: 20}
        assert resident(running) < 1.15 * before


@pytest.mark.parametrize(
    "body",
    [
        b"5\r\nhello\r\n",  # then nothing
        b"zz\r\nhello\r\n",
        b"-5\r\nhello\r\n0\r\n\r\n",
        b"ffffffffffffffffff\r\nhello",
        b"5;" + b"x" * 5000 + b"\r\nhello\r\n0\r\n\r\n",
        b"0\r\nTrailer: " + b"y" * 5000 + b"\r\n\r\n",
    ],
)
def test_a_broken_or_endless_chunked_body_is_refused_in_time(running: Gateway, body: bytes) -> None:
    with socket.create_connection(("127.0.0.1", running.port), timeout=20) as connection:
        connection.sendall(CHUNKED + body)
        said = connection.recv(65536)
    assert not said or int(said.split()[1]) in DOCUMENTED | {408}
    assert httpx.get(f"{running.url}/readyz").status_code == 200


def test_a_chunked_body_without_end_is_cut_off_at_the_limit(tmp_path: Path) -> None:
    with (
        gateway(tiny_repository(tmp_path), max_upload_bytes=300_000, pulse_s=0) as small,
        socket.create_connection(("127.0.0.1", small.port), timeout=20) as connection,
    ):
        connection.sendall(CHUNKED + (b"8000\r\n" + bytes(0x8000) + b"\r\n") * 10)
        connection.sendall(b"0\r\n\r\n")
        assert connection.recv(65536).startswith(b"HTTP/1.1 413")
