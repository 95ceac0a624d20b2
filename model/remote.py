"""A running gateway, asked as its clients ask it: what is evaluated is the whole way of a photograph."""

from __future__ import annotations

import http.client
import json
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, Final
from urllib.parse import urlsplit

import numpy as np

from model.evaluate import Probabilities, Tally
from model.images import Images
from serving.contract import CROP_COUNT, Crops

CLIENTS: Final = 4
"""Requests under way at once: enough to keep two cores busy, few enough not to be turned away."""
TRIES: Final = 8
TIMEOUT_S: Final = 60.0


class RemoteError(Exception):
    """The gateway cannot be asked, or answers what cannot be counted; the text names it."""


@dataclass(frozen=True)
class Gateway:
    """`http://HOST:PORT`, a gateway of this project; `key` if it wants one."""

    url: str
    key: str = field(default="", repr=False)

    def classes(self) -> list[str]:
        """WordNet ids (or folder names) of its model, in the order of the outputs."""
        labels = self._json("GET", "/labels")
        return [label["wnid"] for label in sorted(labels, key=lambda label: int(label["index"]))]

    def ask(self, encoded: bytes, crops: Crops, classes: list[str]) -> Probabilities:
        """One image file -> float [classes], in this order: each probability is placed by its label's id."""
        path = f"/classify?top={len(classes)}&crops={crops}"
        answer = self._json("POST", path, encoded)
        for attempt in range(TRIES):
            if answer["crops"] == CROP_COUNT[crops]:
                break
            time.sleep(0.05 * 2**attempt)  # degraded: fewer crops because it was busy
            answer = self._json("POST", path, encoded)
        else:
            raise RemoteError(f"{self.url} is busy and answers with {answer['crops']} crops; try again later")
        given = {p["wnid"]: p["probability"] for p in answer["predictions"]}
        if given.keys() != set(classes):
            raise RemoteError(f"{self.url} answers {len(given)} of {len(classes)} classes, or others")
        return np.array([given[name] for name in classes], np.float32)

    def _json(self, method: str, path: str, body: bytes | None = None) -> Any:
        """The answer's JSON; waits where the gateway is full, or the key asks too often."""
        reason = ""
        for attempt in range(TRIES):
            try:
                status, retry_after, text = self._request(method, path, body)
            except (OSError, http.client.HTTPException) as error:
                raise RemoteError(f"{self.url} cannot be reached: {error}") from error
            if status == http.client.OK:
                return json.loads(text)
            reason = f"{status} {text.decode(errors='replace')[:200]}"
            if status not in (http.client.SERVICE_UNAVAILABLE, http.client.TOO_MANY_REQUESTS):
                break
            time.sleep(min(5.0, float(retry_after or 0.05 * 2**attempt)))
        raise RemoteError(f"{self.url}{path.partition('?')[0]}: {reason}")

    def _request(self, method: str, path: str, body: bytes | None) -> tuple[int, str | None, bytes]:
        parts = urlsplit(self.url)
        kind = http.client.HTTPSConnection if parts.scheme == "https" else http.client.HTTPConnection
        connection = kind(parts.netloc, timeout=TIMEOUT_S)
        try:
            headers = {"Content-Type": "application/octet-stream"} if body is not None else {}
            if self.key:
                headers["Authorization"] = f"Bearer {self.key}"
            connection.request(method, parts.path.rstrip("/") + path, body, headers)
            answer = connection.getresponse()
            return answer.status, answer.getheader("Retry-After"), answer.read()
        finally:
            connection.close()


def remote_tally(
    gateway: Gateway, images: Images, crops: Crops, advance: Callable[[int], None] = lambda _: None
) -> Tally:
    """Each image's file sent once, a few at a time; `images` has the gateway's classes in their order."""
    targets, classes = np.array(images.targets, np.int64), list(images.classes)
    total = Tally()

    def answered(start: int) -> tuple[slice, Probabilities]:
        rows = np.arange(start, min(start + 8, len(images)))
        means = [gateway.ask(encoded, crops, classes) for encoded in images.encoded(rows)]
        return slice(start, start + len(rows)), np.stack(means)

    def all_answers() -> Iterator[tuple[slice, Probabilities]]:
        with ThreadPoolExecutor(CLIENTS) as pool:
            yield from pool.map(answered, range(0, len(images), 8))

    for rows, mean in all_answers():
        total += Tally.of(mean, targets[rows])
        advance(len(mean))
    return total
