"""Evaluating what runs elsewhere: a gateway asked as clients do, a Triton server through its backend."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fake_triton import fake_triton
from support import LABELS, FakeBackend, encoded, picture, run_alexnet

from commands.evaluate import triton_predictor
from model.data import Decoded
from model.evaluate import evaluate_predictor
from model.images import ImageFolder
from model.remote import Gateway, RemoteError, remote_tally
from serving.contract import Crops
from serving.errors import ModelNotReady

CLASSES = [label.wnid for label in LABELS]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two photographs of each of the fake engine's ten classes."""
    root = tmp_path_factory.mktemp("photographs")
    for number, name in enumerate(CLASSES):
        (root / name).mkdir()
        for copy in range(2):
            photo = picture(10 * number + copy, 200 + 20 * copy, 180)
            (root / name / f"{copy}.jpg").write_bytes(encoded(photo))
    return root


@pytest.mark.parametrize("crops", [Crops.CENTER, Crops.TEN])
def test_a_gateway_is_counted_as_its_engine_would_be(
    live_server: str, backend: FakeBackend, data: Path, crops: Crops
) -> None:
    gateway = Gateway(live_server)
    assert gateway.classes() == CLASSES
    turned = ImageFolder.scan(data, CLASSES[::-1])  # the order is the caller's, by name
    seen: list[int] = []
    result = remote_tally(gateway, turned, crops, seen.append).evaluation(crops)
    local = evaluate_predictor(
        backend.probabilities, Decoded.read(ImageFolder.scan(data, CLASSES), 1), crops
    )
    assert sum(seen) == 20
    assert (result.images, result.top1_error, result.top5_error) == (20, local.top1_error, local.top5_error)
    assert result.calibration_error == pytest.approx(local.calibration_error, abs=1e-6)


def test_the_command_evaluates_a_gateway_and_says_so_in_a_table(live_server: str, data: Path) -> None:
    done = run_alexnet("evaluate", live_server, data)
    assert done.returncode == 0, done.stderr
    for words in ("calibration error", "images/s", "center", "ten"):
        assert words in done.stdout
    nobody = run_alexnet("evaluate", "http://127.0.0.1:9", data)
    assert nobody.returncode == 1
    (line,) = nobody.stderr.splitlines()
    assert "http://127.0.0.1:9 cannot be reached" in line


class Odd(BaseHTTPRequestHandler):
    """A gateway that is full, degraded, or answers other classes, in the order of `answers`."""

    answers: list[tuple[int, dict[str, Any]]]

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers["Content-Length"]))
        status, body = self.answers.pop(0) if len(self.answers) > 1 else self.answers[0]
        self.send_response(status)
        if status == 503:
            self.send_header("Retry-After", "0")
        text = json.dumps(body).encode()
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text)

    def log_message(self, *_: object) -> None:
        """Quiet."""


@pytest.fixture
def odd(monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[Gateway, list[tuple[int, dict[str, Any]]]]]:
    monkeypatch.setattr("model.remote.TRIES", 3)
    Odd.answers = []
    server = ThreadingHTTPServer(("127.0.0.1", 0), Odd)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield Gateway(f"http://127.0.0.1:{server.server_port}"), Odd.answers
    server.shutdown()
    server.server_close()


def whole(crops: int = 10, **probabilities: float) -> tuple[int, dict[str, Any]]:
    predictions = [{"wnid": name, "probability": share} for name, share in probabilities.items()]
    return 200, {"crops": crops, "predictions": predictions}


def test_a_full_or_degraded_gateway_is_asked_again(odd: tuple[Gateway, list[Any]]) -> None:
    gateway, answers = odd
    answers += [(503, {}), (503, {}), whole(2, a=0.9, b=0.1), whole(b=0.7, a=0.3)]
    np.testing.assert_allclose(gateway.ask(b"x", Crops.TEN, ["a", "b"]), [0.3, 0.7])


@pytest.mark.parametrize(
    ("answer", "words"),
    [
        ((503, {}), "503"),
        ((415, {"title": "no picture"}), "415 .*no picture"),
        (whole(2, a=0.9, b=0.1), "busy and answers with 2 crops"),
        (whole(a=0.9, c=0.1), "of 2 classes, or others"),
    ],
)
def test_what_cannot_be_counted_is_told(odd: tuple[Gateway, list[Any]], answer: Any, words: str) -> None:
    gateway, answers = odd
    answers.append(answer)
    with pytest.raises(RemoteError, match=words):
        gateway.ask(b"x", Crops.TEN, ["a", "b"])


def test_a_triton_model_is_counted_as_its_engine_would_be(data: Path, backend: FakeBackend) -> None:
    with fake_triton() as server, triton_predictor(f"127.0.0.1:{server.port}/alexnet") as (predict, classes):
        assert classes == CLASSES
        decoded = Decoded.read(ImageFolder.scan(data, classes), 1)
        result = evaluate_predictor(predict, decoded, Crops.TEN)
    assert result == evaluate_predictor(backend.probabilities, decoded, Crops.TEN)
    with pytest.raises(ModelNotReady), triton_predictor(f"127.0.0.1:{server.port}/alexnet"):
        pass
