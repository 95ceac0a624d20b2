"""Whether the engine still answers: ready means that an inference has succeeded a moment ago."""

from __future__ import annotations

import asyncio
import logging
import time
from typing import Final

import numpy as np

from serving.backends import Backend
from serving.contract import CHANNELS, CROP_SIZE
from serving.errors import ModelNotReady

STALE_AFTER: Final = 3
"""Looks without a success after which the engine counts as hung: a single slow one is no fault."""

_NOISE: Final = np.random.default_rng(0).integers(0, 256, (1, CROP_SIZE, CROP_SIZE, CHANNELS), np.uint8)

logger = logging.getLogger("alexnet.model")


class Pulse:
    """Any answered request is a beat; where there is none for `every_s`, a crop of noise is asked.

    So load alone never makes a gateway unready, and an engine that hangs does within four looks.
    """

    def __init__(self, backend: Backend, every_s: float) -> None:
        """`every_s` 0: never looked, and always well."""
        self._backend, self._every_s = backend, every_s
        self._last_s = time.monotonic()

    def beat(self) -> None:
        """An inference has succeeded."""
        self._last_s = time.monotonic()

    def check(self) -> None:
        """Raise ModelNotReady where no inference has succeeded for too long."""
        silent_s = time.monotonic() - self._last_s
        if self._every_s and silent_s > STALE_AFTER * self._every_s:
            raise ModelNotReady(f"the engine has not answered for {silent_s:.0f} s; try again in a moment")

    async def look(self) -> None:
        """Until cancelled."""
        while self._every_s:
            await asyncio.sleep(self._every_s)
            if time.monotonic() - self._last_s < self._every_s:
                continue
            try:
                async with asyncio.timeout(self._every_s):
                    await self._backend.infer(_NOISE, asyncio.get_running_loop().time() + self._every_s)
            except Exception as error:  # noqa: BLE001  whatever it is, the next look tells more
                said = str(error) or type(error).__name__
                logger.warning("the engine did not answer a crop of noise: %s", said)
            else:
                self.beat()
