"""LitServe: a LitAPI whose workers each hold a copy of the model.

    python loadtest/peers/litserve_app.py

As its documentation recommends: `workers_per_device` for copies on one CPU, `max_batch_size` with a
short `batch_timeout` for batching, decoding in `decode_request`, one inference in `predict`.
"""

# No `from __future__ import annotations`: LitServe compares the annotation with the class itself.
from typing import Any

import litserve
from starlette.requests import Request
from ten_crops import BATCH, BATCH_WAIT_S, PORT, WORKERS, answers, open_session, ten_crops


class Classifier(litserve.LitAPI):  # type: ignore[misc]  # only its own environment knows its type
    """Upload -> crops -> answer."""

    def setup(self, device: str) -> None:
        """Once in each worker."""
        self.session = open_session()

    def decode_request(self, request: Request) -> Any:
        """The form's field `file` as crops, float32 [10, 3, 224, 224]."""
        return ten_crops(request["file"].file.read())  # type: ignore[index]  # LitServe hands on the form

    def predict(self, x: Any) -> Any:
        """One inference."""
        return answers(self.session, [x])[0]

    def encode_response(self, output: dict[str, Any]) -> dict[str, Any]:
        """JSON as it is."""
        return output


class Batched(Classifier):
    """The same, several photographs at once."""

    def batch(self, inputs: list[Any]) -> list[Any]:
        """As they are: `predict` puts them together."""
        return inputs

    def unbatch(self, output: list[Any]) -> list[Any]:
        """One answer each."""
        return output

    def predict(self, x: list[Any]) -> list[dict[str, Any]]:
        """One inference for the batch."""
        return answers(self.session, x)


if __name__ == "__main__":
    if BATCH > 1:
        api: Classifier = Batched(max_batch_size=BATCH, batch_timeout=BATCH_WAIT_S, api_path="/classify")
    else:
        api = Classifier(api_path="/classify")
    server = litserve.LitServer(api, accelerator="cpu", workers_per_device=WORKERS, timeout=120)
    server.run(host="127.0.0.1", port=PORT, log_level="warning", generate_client_file=False)
