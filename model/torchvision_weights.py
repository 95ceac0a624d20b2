"""torchvision's published AlexNet as a checkpoint of this project: the `owt` variant, 1000 classes.

The file's keys are `features.<n>` and `classifier.<n>`; its name ends in the first eight hex digits
of its SHA-256. torchvision normalises with the same mean and standard deviation as
`serving.contract`, so the weights are taken over as they are.
"""

from __future__ import annotations

import csv
import re
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Final

import torch

from model.checkpoint import Checkpoint, CheckpointError, sha256
from model.images import IMAGENET_CLASSES
from model.net import AlexNet, Architecture
from serving.postprocess import Label

URL: Final = "https://download.pytorch.org/models/alexnet-owt-7be5be79.pth"
LAYERS: Final = {
    "features.0": "conv1",
    "features.3": "conv2",
    "features.6": "conv3",
    "features.8": "conv4",
    "features.10": "conv5",
    "classifier.1": "fc6",
    "classifier.4": "fc7",
    "classifier.6": "fc8",
}
_ATTEMPTS: Final = 3
_TIMEOUT_S: Final = 30.0
_PIECE: Final = 1 << 20


def read_torchvision(path: Path) -> Checkpoint:
    """The published file (or one of its layout) as a checkpoint; raises CheckpointError."""
    check_hash(path)
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch.load raises RuntimeError, UnpicklingError, EOFError, ...
        raise CheckpointError(f"{path}: not a readable PyTorch file: {error}") from error
    expected = {f"{layer}.{kind}" for layer in LAYERS for kind in ("weight", "bias")}
    if not isinstance(state, dict) or set(state) != expected:
        raise CheckpointError(f"{path}: not torchvision's AlexNet (features.*, classifier.* of 8 layers)")
    renamed = {}
    for name, tensor in state.items():
        layer, kind = name.rsplit(".", 1)
        renamed[f"{LAYERS[layer]}.{kind}"] = tensor
    net = AlexNet(Architecture("owt", len(renamed["fc8.bias"])))
    try:
        net.load_state_dict(renamed)
    except RuntimeError as error:
        raise CheckpointError(f"{path}: weights of another shape: {error}") from error
    labels = imagenet_labels()
    if len(labels) != net.architecture.classes:
        raise CheckpointError(f"{path}: {net.architecture.classes} classes, not the {len(labels)} of ILSVRC")
    return Checkpoint(net.eval(), labels, {"source": f"torchvision, {path.name}"})


def imagenet_labels() -> list[Label]:
    """The 1000 classes of ILSVRC 2012 in the order of the published weights."""
    with IMAGENET_CLASSES.open(newline="", encoding="utf-8") as file:
        return [Label(row["wnid"], row["name"]) for row in csv.DictReader(file)]


def check_hash(path: Path) -> None:
    """Raises CheckpointError if the file's name states a hash that its content does not have."""
    if not path.is_file():
        raise CheckpointError(f"{path}: no such file")
    stated = re.search(r"-([0-9a-f]{8,64})\.pth$", path.name)
    if stated is None:
        return
    digest = sha256(path)
    if not digest.startswith(stated[1]):
        raise CheckpointError(
            f"{path}: SHA-256 {digest[:16]}... does not begin as its name says; fetch it again"
        )


def download(
    folder: Path,
    advance: Callable[[int, int], None],
    url: str = URL,
    wait_s: float = 2.0,
) -> Path:
    """Fetch the weights into `folder`, once; `advance(bytes so far, bytes in all)`.

    Written beside and renamed when whole. Raises CheckpointError when offline, with the way out.
    """
    path = folder / url.rsplit("/", 1)[1]
    if path.exists():
        return path
    folder.mkdir(parents=True, exist_ok=True)
    beside = path.with_suffix(".part")
    for attempt in range(_ATTEMPTS):
        try:
            _fetch(url, beside, advance)
            break
        except OSError as error:
            if attempt == _ATTEMPTS - 1:
                beside.unlink(missing_ok=True)
                raise CheckpointError(
                    f"{url} cannot be fetched ({error}); fetch it elsewhere and give it with --file"
                ) from error
            time.sleep(wait_s * 2**attempt)
    beside.replace(path)
    return path


def _fetch(url: str, beside: Path, advance: Callable[[int, int], None]) -> None:
    with urllib.request.urlopen(url, timeout=_TIMEOUT_S) as response, beside.open("wb") as file:
        total = int(response.headers.get("content-length") or 0)
        while piece := response.read(_PIECE):
            file.write(piece)
            advance(file.tell(), total)
        if total and file.tell() != total:
            raise urllib.error.ContentTooShortError(
                f"{file.tell()} of {total} bytes", (url, response.headers)
            )
