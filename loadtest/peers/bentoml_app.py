"""BentoML: a service whose workers each hold a copy of the model.

    bentoml serve bentoml_app:Classifier --working-dir loadtest/peers --host 127.0.0.1 --port PORT

As its documentation recommends: `workers` for copies on one machine, `threads` for synchronous
endpoints, and for adaptive batching a second service, that takes the crops, behind the one that
takes uploads.
"""

from __future__ import annotations

import os
from typing import Any

import bentoml
import numpy as np
from PIL.Image import Image
from ten_crops import BATCH, WORKERS, answer, answers, crops_of, open_session

THREADS_PER_WORKER = int(os.environ.get("PEER_SERVICE_THREADS", "1"))
TRAFFIC = {"timeout": 120}

if BATCH == 1:

    @bentoml.service(workers=WORKERS, threads=THREADS_PER_WORKER, traffic=TRAFFIC)
    class Classifier:
        """Upload -> crops -> answer in one worker."""

        def __init__(self) -> None:
            self.session = open_session()

        @bentoml.api(route="/classify")
        def classify(self, file: Image) -> dict[str, Any]:
            """The five likeliest classes of the mean over ten crops."""
            return answers(self.session, [crops_of(file)])[0]

else:

    @bentoml.service(workers=1, traffic=TRAFFIC)
    class Model:
        """float32 [N, 10, 3, 224, 224] -> logits [N, 10, classes]: batches along N."""

        def __init__(self) -> None:
            self.session = open_session()

        @bentoml.api(batchable=True, batch_dim=0, max_batch_size=BATCH, max_latency_ms=60_000)
        def logits(self, x: np.ndarray) -> np.ndarray:
            """One inference."""
            flat = x.reshape(-1, 3, 224, 224)
            return np.asarray(self.session.run(None, {"x": flat})[0]).reshape(len(x), 10, -1)

    @bentoml.service(workers=WORKERS, threads=THREADS_PER_WORKER, traffic=TRAFFIC)
    class Classifier:  # type: ignore[no-redef]
        """Upload -> crops, the model's service, answer."""

        model = bentoml.depends(Model)

        @bentoml.api(route="/classify")
        async def classify(self, file: Image) -> dict[str, Any]:
            """The five likeliest classes of the mean over ten crops."""
            crops = crops_of(file)[np.newaxis]
            return answer((await self.model.to_async.logits(crops))[0])
