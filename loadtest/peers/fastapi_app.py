"""The naive way: what most tutorials serve. FastAPI, a stock export, float32 normalisation in NumPy.

    uvicorn --app-dir loadtest/peers fastapi_app:app [--workers N]

As FastAPI's documentation recommends: the blocking endpoint is a plain `def`, which runs in the
thread pool, and uvicorn starts the workers.
"""

from __future__ import annotations

from typing import Annotated, Any

from fastapi import FastAPI, File
from ten_crops import answers, open_session, ten_crops

app = FastAPI()
session = open_session()


@app.post("/classify")
def classify(file: Annotated[bytes, File()]) -> dict[str, Any]:
    """The five likeliest classes of the mean over ten crops."""
    return answers(session, [ten_crops(file)])[0]


@app.get("/readyz")
def ready() -> dict[str, str]:
    """Loaded."""
    return {"status": "ready"}
