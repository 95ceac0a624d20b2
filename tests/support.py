"""Tiny pictures, a fake engine and real servers on free loopback ports."""

from __future__ import annotations

import io
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import uvicorn
from PIL import Image
from starlette.types import ASGIApp

from serving.app import create_app
from serving.backends import Backend, Inference, Model, ModelInfo
from serving.contract import Crops
from serving.decoders import Decoders
from serving.errors import ModelNotReady
from serving.models import Others
from serving.postprocess import Label, Probabilities
from serving.preprocess import Pixels, cut_crops, is_square
from serving.settings import Settings

if TYPE_CHECKING:
    from model.net import AlexNet

ROOT = Path(__file__).resolve().parent.parent
ALEXNET = [sys.executable, str(ROOT / "alexnet.py")]
NARROW = 64
"""Width of fc6 and fc7 under the fixture `narrow`."""
QUIET = os.environ | {"COLUMNS": "120", "NO_COLOR": "1"}

LABELS = tuple(
    Label(wnid, name)
    for wnid, name in (
        ("n01440764", "tench"),
        ("n02102040", "English springer"),
        ("n02979186", "cassette player"),
        ("n03000684", "chain saw"),
        ("n03028079", "church"),
        ("n03394916", "French horn"),
        ("n03417042", "garbage truck"),
        ("n03425413", "gas pump"),
        ("n03445777", "golf ball"),
        ("n03888257", "parachute"),
    )
)


class FakeBackend:
    """An engine whose answer depends on every pixel: softmax of ten random projections.

    `before` runs at each inference, so that a test can make it slow, make it fail or `reload`.
    """

    concurrency = 1
    batch_crops = 10
    takes_squares = False

    def __init__(self, labels: tuple[Label, ...] = LABELS, before: Callable[[], None] = lambda: None) -> None:
        self.batches: list[Pixels] = []
        self.deadlines: list[float | None] = []
        self.ready = False
        self._before = before
        self.provenance: dict[str, Any] = {"accuracy": {"top1_ten": 0.5}}
        self._model = Model(ModelInfo("alexnet", "7", "fp32", "fake"), labels, self.provenance)
        self._projection = np.random.default_rng(0).normal(0, 1e-3, (224 * 224 * 3, len(labels)))

    @property
    def model(self) -> Model:
        if not self.ready:
            raise ModelNotReady("the model alexnet is not loaded yet; try again in a moment")
        return self._model

    async def start(self) -> None:
        self.ready = True

    async def infer(self, crops: Pixels, deadline_s: float | None = None) -> Inference:
        self._before()
        self.batches.append(crops)
        self.deadlines.append(deadline_s)
        return Inference(self.probabilities(crops), self._model)

    def reload(self, version: str, seed: int) -> None:
        """From now on another version answers, with other projections."""
        self._model = replace(self._model, info=replace(self._model.info, version=version))
        self._projection = np.random.default_rng(seed).normal(0, 1e-3, self._projection.shape)

    def probabilities(self, crops: Pixels) -> Probabilities:
        """What `infer` answers, for a test to compare with."""
        if is_square(crops):
            crops = cut_crops(crops[0], Crops.TEN)
        logits = (crops.reshape(len(crops), -1) / 255.0 - 0.5) @ self._projection
        powers = np.exp(logits - logits.max(axis=1, keepdims=True))
        result: Probabilities = (powers / powers.sum(axis=1, keepdims=True)).astype(np.float32)
        return result

    async def close(self) -> None:
        self.ready = False


def picture(seed: int, width: int = 320, height: int = 260, noise: int = 30) -> Image.Image:
    """A random picture with structure at several scales."""
    rng = np.random.default_rng(seed)
    coarse = rng.integers(0, 256, (5, 6, 3), np.uint8)
    image = np.asarray(Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC))
    grain = rng.integers(-noise, noise + 1, image.shape)
    return Image.fromarray((image.astype(int) + grain).clip(0, 255).astype(np.uint8))


def encoded(image: Image.Image, image_format: str = "JPEG", **options: object) -> bytes:
    """The picture as a file's bytes."""
    buffer = io.BytesIO()
    image.save(buffer, image_format, **options)
    return buffer.getvalue()


def run_alexnet(*arguments: str | Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """The command in a process of its own, its output captured; `environment` is added to ours."""
    return subprocess.run(
        [*ALEXNET, *map(str, arguments)],
        cwd=ROOT,
        env=QUIET | environment,
        capture_output=True,
        text=True,
        timeout=110,
        check=False,
    )


@contextmanager
def serving(
    settings: Settings,
    backend: Backend,
    others: Others | None = None,
    decoders: Decoders | None = None,
    traced: Callable[[ASGIApp], ASGIApp] | None = None,
) -> Iterator[str]:
    """The real app in a real uvicorn on a free loopback port; yields its URL."""
    app = create_app(settings, backend, others, decoders=decoders, traced=traced)
    config = uvicorn.Config(app, port=0, log_level="warning")
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    until = time.monotonic() + 20
    while not server.started:
        assert thread.is_alive() and time.monotonic() < until, "the server did not start"
        time.sleep(0.01)
    try:
        yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join(20)
        assert not thread.is_alive(), "the server did not stop"


def tiny_repository(
    root: Path, *, classes: int = 10, name: str = "alexnet", version: int = 1, seed: int = 0
) -> Path:
    """A model repository whose network is the mean colour, a random matrix and a softmax."""
    import onnx
    from onnx import TensorProto, helper, numpy_helper

    weights = np.random.default_rng(seed).normal(0, 0.05, (3, classes)).astype(np.float32)
    graph = helper.make_graph(
        [
            helper.make_node("Cast", ["images"], ["floats"], to=TensorProto.FLOAT),
            helper.make_node("ReduceMean", ["floats", "axes"], ["mean"], keepdims=0),
            helper.make_node("MatMul", ["mean", "weights"], ["logits"]),
            helper.make_node("Softmax", ["logits"], ["probabilities"], axis=1),
        ],
        "tiny",
        [helper.make_tensor_value_info("images", TensorProto.UINT8, ["batch", 224, 224, 3])],
        [helper.make_tensor_value_info("probabilities", TensorProto.FLOAT, ["batch", classes])],
        [numpy_helper.from_array(weights, "weights"), numpy_helper.from_array(np.array([1, 2]), "axes")],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    folder = root / name / str(version)
    folder.mkdir(parents=True)
    onnx.save(model, folder / "model.onnx")
    (folder / "provenance.json").write_text('{"precision": "fp32", "accuracy": {"top1_ten": 0.5}}')
    lines = [label.line() for label in LABELS[:classes]]
    (root / name / "labels.txt").write_text("\n".join(lines) + "\n")
    return root


def triton_repository(root: Path, *, version: int = 1, seed: int = 0) -> Path:
    """A tiny repository with the config.pbtxt that Triton wants."""
    from export.config import config_text

    tiny_repository(root, version=version, seed=seed)
    (root / "alexnet" / "config.pbtxt").write_text(config_text("alexnet", len(LABELS)))
    return root


def random_net(
    variant: str = "2012",
    low_rank: int | None = 24,
    *,
    classes: int = 7,
    batch_norm: bool = False,
    conv1: float,
    spread: float,
) -> AlexNet:
    """Random weights; `conv1` scales the first layer's, and logits differ between images by `spread`.

    A random network's logits differ little, so that stretching them enlarges the rounding as well.
    """
    import torch

    from export.gate import generated_crops
    from model.net import AlexNet, Architecture, initialise_kaiming

    torch.manual_seed(8)
    net = AlexNet(Architecture(variant, classes, low_rank=low_rank, batch_norm=batch_norm)).eval()
    initialise_kaiming(net)
    with torch.inference_mode():
        net.get_submodule("conv1").get_parameter("weight").mul_(conv1)
        x = net.normalise(torch.from_numpy(generated_crops(32)))
        net.fc8.weight.div_(net.logits(x).std(dim=0, keepdim=True).T / spread)
        net.fc8.bias.sub_(net.logits(x).mean(dim=0))
    return net
