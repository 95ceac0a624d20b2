"""Ray Serve: a deployment whose replicas each hold a copy of the model.

    python loadtest/peers/ray_app.py

As its documentation recommends: a replica a core, or one that is given all; FastAPI as ingress with
a plain `def`, which Ray runs in a thread pool; `max_ongoing_requests` well above the defaults; and
`@serve.batch` for batching.
"""

# No `from __future__ import annotations`: Ray sends the class to its replicas by value, where FastAPI
# could not look the names of its annotations up.
import os
import signal
import threading
from typing import Any

import ray
from fastapi import FastAPI, UploadFile
from ray import serve
from ten_crops import BATCH, BATCH_WAIT_S, PORT, WORKERS, answers, open_session, ten_crops

app = FastAPI()
CORES = len(os.sched_getaffinity(0))


@serve.deployment(
    num_replicas=WORKERS,
    max_ongoing_requests=100,
    ray_actor_options={"num_cpus": CORES / WORKERS},
)
@serve.ingress(app)
class Classifier:
    """Upload -> crops -> answer in one replica."""

    def __init__(self) -> None:
        self.session = open_session()

    if BATCH > 1:

        @app.post("/classify")
        async def classify(self, file: UploadFile) -> dict[str, Any]:
            """The five likeliest classes of the mean over ten crops."""
            answered: dict[str, Any] = await self.batched(ten_crops(await file.read()))
            return answered

        @serve.batch(max_batch_size=BATCH, batch_wait_timeout_s=BATCH_WAIT_S)
        async def batched(self, crops: list[Any]) -> list[dict[str, Any]]:
            """One inference for the batch."""
            return answers(self.session, crops)

    else:

        @app.post("/classify")
        def classify(self, file: UploadFile) -> dict[str, Any]:
            """The five likeliest classes of the mean over ten crops."""
            return answers(self.session, [ten_crops(file.file.read())])[0]

    @app.get("/readyz")
    def ready(self) -> dict[str, str]:
        """Loaded."""
        return {"status": "ready"}


if __name__ == "__main__":
    stopped = threading.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: stopped.set())
    ray.init(num_cpus=CORES, include_dashboard=False, log_to_driver=False, configure_logging=False)
    serve.start(http_options={"host": "127.0.0.1", "port": PORT})
    serve.run(Classifier.bind(), name="classifier", route_prefix="/")
    stopped.wait()
    ray.shutdown()
