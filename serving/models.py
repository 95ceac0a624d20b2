"""The models of one gateway, by name: the default is there from the start, another once it is asked for."""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Awaitable, Callable, Collection
from contextlib import suppress
from dataclasses import dataclass
from typing import Final

from serving.backends import Backend
from serving.errors import UnknownModel

AGAIN_AFTER_S: Final = 2.0
"""A model that could not be opened is not tried again for so long, however often it is asked for."""


async def _nothing() -> Collection[str]:
    return ()


def _cannot_open(name: str) -> Backend:
    raise UnknownModel(f"no model {name!r} is served here")


@dataclass(frozen=True)
class Others:
    """What may be served beside the default: which names there are now, and how one is opened."""

    names: Callable[[], Awaitable[Collection[str]]] = _nothing
    open: Callable[[str], Backend] = _cannot_open


class Models:
    """Backends by model name. Used from one event loop, so it takes no lock."""

    def __init__(self, default: Backend, name: str, others: Others | None = None) -> None:
        self.default, self.default_name = default, name
        self._others = others or Others()
        self._opened: dict[str, Backend] = {}
        self._opening: dict[str, asyncio.Task[Backend]] = {}
        self._failed_s: dict[str, float] = {}

    async def start(self) -> None:
        """Start the default; raises what it raises."""
        await self.default.start()

    async def get(self, name: str | None = None) -> Backend:
        """The started backend of a model; None: the default's. Raises UnknownModel or ModelNotReady.

        The first request for a model waits until it is opened, all who ask meanwhile wait for the same,
        and one that stops waiting does not end it.
        """
        if name is None or name == self.default_name:
            return self.default
        if name in self._opened:
            return self._opened[name]
        if time.monotonic() - self._failed_s.get(name, math.inf) > AGAIN_AFTER_S:
            del self._failed_s[name], self._opening[name]
        if name not in self._opening:
            await self._must_be_there(name)
            # While the names were read, another request may have begun.
            if name not in self._opening:
                self._opening[name] = asyncio.create_task(self._open(name))
                self._opening[name].add_done_callback(_retrieve)  # though everybody may have left
        return await asyncio.shield(self._opening[name])

    async def names(self) -> list[str]:
        """The default first, the others in the order of the alphabet."""
        return [self.default_name, *sorted(set(await self._others.names()) - {self.default_name})]

    def opened(self, name: str) -> Backend | None:
        """The backend of a model that was asked for before."""
        return self.default if name == self.default_name else self._opened.get(name)

    async def close(self) -> None:
        """Close every backend; what is being opened is waited for."""
        await asyncio.gather(*self._opening.values(), return_exceptions=True)
        for backend in (*self._opened.values(), self.default):
            await backend.close()

    async def _must_be_there(self, name: str) -> None:
        names = await self.names()
        if name not in names:
            there = ", ".join(map(repr, names))
            raise UnknownModel(f"no model {name!r} is served here; there is {there}")

    async def _open(self, name: str) -> Backend:
        backend = self._others.open(name)
        try:
            await backend.start()
        except BaseException:
            self._failed_s[name] = time.monotonic()
            with suppress(Exception):
                await backend.close()
            raise
        self._opened[name] = backend
        return backend


def _retrieve(task: asyncio.Task[Backend]) -> None:
    if not task.cancelled():
        task.exception()
