"""torchvision's published layout, with random weights, becomes the same function here."""

from __future__ import annotations

import hashlib
import http.server
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import nn

from model.checkpoint import CheckpointError
from model.torchvision_weights import check_hash, download, imagenet_labels, read_torchvision


def torchvision_alexnet() -> nn.ModuleDict:
    """Layer for layer as torchvision.models.alexnet names them."""
    features = nn.Sequential(
        nn.Conv2d(3, 64, 11, 4, 2), nn.ReLU(), nn.MaxPool2d(3, 2),
        nn.Conv2d(64, 192, 5, padding=2), nn.ReLU(), nn.MaxPool2d(3, 2),
        nn.Conv2d(192, 384, 3, padding=1), nn.ReLU(),
        nn.Conv2d(384, 256, 3, padding=1), nn.ReLU(),
        nn.Conv2d(256, 256, 3, padding=1), nn.ReLU(), nn.MaxPool2d(3, 2),
    )  # fmt: skip
    classifier = nn.Sequential(
        nn.Dropout(), nn.Linear(9216, 4096), nn.ReLU(), nn.Dropout(), nn.Linear(4096, 4096), nn.ReLU(),
        nn.Linear(4096, 1000),
    )  # fmt: skip
    return nn.ModuleDict({"features": features, "classifier": classifier}).eval()


def test_the_same_picture_gets_the_same_logits(tmp_path: Path) -> None:
    torch.manual_seed(0)
    theirs = torchvision_alexnet()
    path = tmp_path / "weights.pth"
    torch.save(theirs.state_dict(), path)
    read = read_torchvision(path)
    x = torch.randn(2, 3, 224, 224)
    with torch.inference_mode():
        expected = theirs["classifier"](theirs["features"](x).flatten(1))
        torch.testing.assert_close(read.net.logits(x), expected, rtol=1e-4, atol=1e-5)
    assert read.net.architecture.variant == "owt"
    assert (read.labels[0].name, read.labels[999].wnid) == ("tench", "n15075141")


def test_the_labels_are_ilsvrc_s_thousand() -> None:
    labels = imagenet_labels()
    assert len({label.wnid for label in labels}) == 1000
    names = [label.name for label in labels]
    assert sorted(name for name in set(names) if names.count(name) > 1) == ["crane", "maillot"]


def test_other_files_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "weights.pth"
    with pytest.raises(CheckpointError, match="no such file"):
        read_torchvision(path)
    path.write_bytes(b"not weights")
    with pytest.raises(CheckpointError, match="not a readable PyTorch file"):
        read_torchvision(path)
    torch.save({"features.0.weight": torch.zeros(1)}, path)
    with pytest.raises(CheckpointError, match="not torchvision's AlexNet"):
        read_torchvision(path)


def test_a_hash_in_the_name_is_checked(tmp_path: Path) -> None:
    content = b"some weights"
    digest = hashlib.sha256(content).hexdigest()
    good, bad = tmp_path / f"alexnet-owt-{digest[:8]}.pth", tmp_path / "alexnet-owt-7be5be79.pth"
    good.write_bytes(content)
    bad.write_bytes(content)
    check_hash(good)
    with pytest.raises(CheckpointError, match="fetch it again"):
        check_hash(bad)


class Weights(http.server.BaseHTTPRequestHandler):
    content = bytes(range(256)) * 20_000
    failures = 0

    def do_GET(self) -> None:
        self.send_response(200)
        self.send_header("content-length", str(len(self.content)))
        self.end_headers()
        broken = type(self).failures > 0
        type(self).failures -= broken
        self.wfile.write(self.content[: len(self.content) // 2] if broken else self.content)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def weights_url() -> Iterator[str]:
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Weights) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}/alexnet.pth"
        server.shutdown()
        thread.join()


def test_a_download_that_breaks_off_is_tried_again_and_never_seen_half(
    weights_url: str, tmp_path: Path
) -> None:
    Weights.failures = 2
    seen: list[tuple[int, int]] = []
    path = download(tmp_path, lambda done, total: seen.append((done, total)), weights_url, wait_s=0.01)
    assert path.read_bytes() == Weights.content
    assert seen[-1] == (len(Weights.content), len(Weights.content))
    assert list(tmp_path.iterdir()) == [path]


def test_offline_is_told_with_the_way_out(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="give it with --file"):
        download(tmp_path, lambda *_: None, "http://127.0.0.1:9/alexnet.pth", wait_s=0.01)
    assert list(tmp_path.iterdir()) == []
