"""The peer: what most tutorials serve. FastAPI, a stock export, float32 normalisation in NumPy.

    uvicorn --app-dir loadtest naive_server:app      with NAIVE_MODEL=stock.onnx

Configured as FastAPI's documentation recommends: the blocking endpoint is a plain `def`, which
runs in the thread pool, and ONNX Runtime keeps its defaults.
"""

from __future__ import annotations

import io
import os
from typing import Annotated, Any

import numpy as np
import onnxruntime
from fastapi import FastAPI, File
from PIL import Image

MEAN = np.array([0.485, 0.456, 0.406], np.float32)
STD = np.array([0.229, 0.224, 0.225], np.float32)

app = FastAPI()
session = onnxruntime.InferenceSession(os.environ["NAIVE_MODEL"], providers=["CPUExecutionProvider"])


def ten_crops(image: Image.Image) -> Any:
    """Shorter side 256, five crops of 224 and their mirrors: float32 [10, 3, 224, 224]."""
    scale = 256 / min(image.size)
    image = image.resize((round(image.width * scale), round(image.height * scale)), Image.Resampling.BILINEAR)
    left, top = (image.width - 256) // 2, (image.height - 256) // 2
    pixels = np.asarray(image.crop((left, top, left + 256, top + 256)))
    pixels = (pixels.astype(np.float32) / 255 - MEAN) / STD
    five = [pixels[r : r + 224, c : c + 224] for r, c in ((0, 0), (0, 32), (32, 0), (32, 32), (16, 16))]
    return np.stack(five + [crop[:, ::-1] for crop in five]).transpose(0, 3, 1, 2).astype(np.float32)


@app.post("/classify")
def classify(file: Annotated[bytes, File()]) -> dict[str, Any]:
    """The five likeliest classes of the mean over ten crops."""
    logits = session.run(None, {"x": ten_crops(Image.open(io.BytesIO(file)).convert("RGB"))})[0]
    exponentials = np.exp(logits - logits.max(axis=1, keepdims=True))
    mean = (exponentials / exponentials.sum(axis=1, keepdims=True)).mean(axis=0)
    top = np.argsort(-mean)[:5]
    return {"predictions": [{"index": int(i), "probability": float(mean[i])} for i in top]}


@app.get("/readyz")
def ready() -> dict[str, str]:
    """Loaded."""
    return {"status": "ready"}
