"""What each peer does with a photograph: float32 NumPy preprocessing, the stock export, five classes.

Only NumPy, Pillow and ONNX Runtime, for each peer has an environment of its own. How it is set up
comes from the environment:

    PEER_MODEL    the stock export
    PEER_PORT     where to listen, on 127.0.0.1
    PEER_WORKERS  processes that hold a copy of the model
    PEER_THREADS  ONNX Runtime's threads in each; 0: its default
    PEER_BATCH    photographs that may be answered in one inference; 1: no batching
"""

from __future__ import annotations

import io
import os
from typing import Any

import numpy as np
import onnxruntime
from PIL import Image

MODEL = os.environ["PEER_MODEL"]
PORT = int(os.environ.get("PEER_PORT", "0"))
WORKERS = int(os.environ.get("PEER_WORKERS", "1"))
THREADS = int(os.environ.get("PEER_THREADS", "0"))
BATCH = int(os.environ.get("PEER_BATCH", "1"))
BATCH_WAIT_S = 0.02
"""How long a batch waits for company: a fifth of one inference."""

MEAN = np.array([0.485, 0.456, 0.406], np.float32)
STD = np.array([0.229, 0.224, 0.225], np.float32)


def open_session() -> Any:
    """The stock export in ONNX Runtime, on this process's threads."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = THREADS
    return onnxruntime.InferenceSession(MODEL, options, providers=["CPUExecutionProvider"])


def ten_crops(file: bytes) -> Any:
    """Shorter side 256, five crops of 224 and their mirrors: float32 [10, 3, 224, 224]."""
    return crops_of(Image.open(io.BytesIO(file)))


def crops_of(image: Image.Image) -> Any:
    """The same of an open picture."""
    image = image.convert("RGB")
    scale = 256 / min(image.size)
    image = image.resize((round(image.width * scale), round(image.height * scale)), Image.Resampling.BILINEAR)
    left, top = (image.width - 256) // 2, (image.height - 256) // 2
    pixels = np.asarray(image.crop((left, top, left + 256, top + 256)))
    pixels = (pixels.astype(np.float32) / 255 - MEAN) / STD
    five = [pixels[r : r + 224, c : c + 224] for r, c in ((0, 0), (0, 32), (32, 0), (32, 32), (16, 16))]
    return np.stack(five + [crop[:, ::-1] for crop in five]).transpose(0, 3, 1, 2).astype(np.float32)


def answers(session: Any, crops: list[Any]) -> list[dict[str, Any]]:
    """One inference for all photographs; each answer is the mean over its ten crops."""
    logits = session.run(None, {"x": crops[0] if len(crops) == 1 else np.concatenate(crops)})[0]
    return [answer(ten) for ten in logits.reshape(len(crops), 10, -1)]


def answer(logits: Any) -> dict[str, Any]:
    """float32 [10, classes] -> the five likeliest classes of the mean probabilities."""
    exponentials = np.exp(logits - logits.max(axis=1, keepdims=True))
    mean = (exponentials / exponentials.sum(axis=1, keepdims=True)).mean(axis=0)
    top = np.argsort(-mean)[:5]
    return {"predictions": [{"index": int(i), "probability": float(mean[i])} for i in top]}
