"""The engine's own loop on decoded photographs: no HTTP, no decoding. What a gateway could reach at most.

    python loadtest/ceiling.py REPOSITORY MODEL [--seconds 3]

One inference after the other on all cores, and one a core side by side; the faster is the ceiling.
Prints one line of JSON: {"images_per_s": ...}. A process of its own, so that it is gone afterwards.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from machine import cores
from photographs import generated

from serving.backends import OnnxRuntimeBackend
from serving.preprocess import Pixels, decode_square


async def rate(backend: OnnxRuntimeBackend, square: Pixels, at_once: int, seconds: float) -> float:
    """Photographs a second, `at_once` under way all the time; uint8 [1, 256, 256, 3], as the gateway asks."""
    done, until = 0, time.perf_counter() + seconds

    async def loop() -> None:
        nonlocal done
        while time.perf_counter() < until:
            await backend.infer(square)
            done += 1

    began = time.perf_counter()
    await asyncio.gather(*(loop() for _ in range(at_once)))
    return done / (time.perf_counter() - began)


async def ceiling(repository: Path, model: str, seconds: float) -> float:
    """The faster of the two ways."""
    square = decode_square(generated(1)[0])[None]
    backend = OnnxRuntimeBackend(repository, model, cores())
    await backend.start()
    try:
        for at_once in (1, cores()):
            await rate(backend, square, at_once, 0.3)  # warm
        return max([await rate(backend, square, at_once, seconds / 2) for at_once in (1, cores())])
    finally:
        await backend.close()


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("repository", type=Path)
    parser.add_argument("model")
    parser.add_argument("--seconds", type=float, default=3)
    given = parser.parse_args()
    print(json.dumps({"images_per_s": asyncio.run(ceiling(given.repository, given.model, given.seconds))}))


if __name__ == "__main__":
    main()
