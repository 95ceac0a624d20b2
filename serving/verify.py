"""Does a running server still answer as the version was exported? `alexnet verify URL` asks it.

Asked with the golden images of the same version in a repository at hand: through a gateway whole files
go to POST /classify, so that its decoding, crops, labels and averaging are asked as well; to a Triton go
the crops.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from http.client import HTTPException
from pathlib import Path
from typing import Any
from urllib.error import HTTPError
from urllib.parse import urlencode
from urllib.request import Request, urlopen

import numpy as np

from serving.backends import Backend
from serving.contract import Crops
from serving.errors import ModelNotReady, UnknownModel
from serving.golden import Difference, Golden, difference
from serving.postprocess import Probabilities
from serving.preprocess import prepare
from serving.repository import Version, find_version

TIMEOUT_S = 30


@dataclass(frozen=True)
class Verdict:
    """What a server answered, beside what was expected; `broken` says what is wrong, if anything."""

    model: str
    version: str
    tolerance: float
    differences: list[Difference]
    broken: str | None


def verify_gateway(url: str, repository: Path, key: str = "") -> Verdict:
    """Ask the gateway at http(s)://HOST:PORT about the version that it says it serves; `key` if it wants one.

    Raises ModelNotReady where the server is not there, UnknownModel where its version, or that
    version's golden images, are not in the repository.
    """
    gateway = _Gateway(url.rstrip("/"), key)
    served = gateway.ask("/model")
    version = find_version(repository, served["name"], served["version"])
    return _compare(version, lambda data, crops: gateway.row(version, data, crops))


async def verify_backend(backend: Backend, repository: Path) -> Verdict:
    """Ask an engine, Triton's for instance, about the version that answers now; raises as above."""
    await backend.start()
    try:
        model = backend.model
        version = find_version(repository, model.info.name, model.info.version)
        golden = _golden(version)
        infers = [await backend.infer(prepare(image.data, Crops.TEN)) for image in golden.images]
    finally:
        await backend.close()
    if any(inference.model.info.version != version.number for inference in infers):
        raise ModelNotReady(f"{version.model}: the version changed while it was asked; ask again")
    answers = iter(infers)
    found = golden.differences(lambda _: next(answers).probabilities)
    broken = golden.broken(found)
    if model.labels != version.labels:
        broken = "its labels are others, or in another order"
    return Verdict(version.model, version.number, golden.tolerance, found, broken)


def _golden(version: Version) -> Golden:
    if version.golden is None:
        raise UnknownModel(f"{version.path.parent} holds no golden images; export it again")
    return version.golden


def _compare(version: Version, ask: Callable[[bytes, Crops], Probabilities]) -> Verdict:
    golden = _golden(version)
    found = [
        Difference(image.name, crops, difference(ask(image.data, crops), expected))
        for image in golden.images
        for crops, expected in image.expected.items()
    ]
    return Verdict(version.model, version.number, golden.tolerance, found, golden.broken(found))


class _Gateway:
    """A gateway asked over HTTP, with the standard library: one request after the other."""

    def __init__(self, url: str, key: str) -> None:
        self._url, self._headers = url, {"Authorization": f"Bearer {key}"} if key else {}

    def ask(self, path: str, body: bytes | None = None) -> Any:
        """The JSON answer; raises ModelNotReady with what the server said instead of one."""
        headers = self._headers | ({"Content-Type": "image/png"} if body else {})
        request = Request(self._url + path, body, headers)
        try:
            with urlopen(request, timeout=TIMEOUT_S) as response:
                return json.load(response)
        except HTTPError as error:
            with error:
                raise ModelNotReady(f"{self._url}{path} answers {error.code}: {_detail(error)}") from error
        except (OSError, HTTPException, ValueError) as error:
            reason = getattr(error, "reason", error)
            raise ModelNotReady(f"{self._url}{path}: no answer from a gateway there ({reason})") from error

    def row(self, version: Version, picture: bytes, crops: Crops) -> Probabilities:
        """float32 [classes] in the order of the version's own labels; NaN where a label is another."""
        query = urlencode({"crops": crops, "top": len(version.labels)})
        answer = self.ask(f"/classify?{query}", picture)
        if answer["model"]["version"] != version.number:
            raise ModelNotReady(f"{self._url}: the version changed while it was asked; ask again")
        row = np.full(len(version.labels), np.nan, np.float32)
        for prediction in answer["predictions"]:
            index = prediction["index"]
            if index < len(row) and version.labels[index].name == prediction["label"]:
                row[index] = prediction["probability"]
        return row


def _detail(error: HTTPError) -> str:
    try:
        return str(json.load(error)["detail"])
    except (ValueError, KeyError, TypeError):
        return error.reason
