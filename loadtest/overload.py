"""More than a gateway can do: four times saturation, clients that leave or drip, ten thousand requests.

    python loadtest/overload.py flood MODEL [--images FOLDER] [--seconds 300] [--times 4]
    python loadtest/overload.py storm MODEL [--requests 500] [--leave-ms 5]
    python loadtest/overload.py slow MODEL [--clients 500] [--seconds 60]
    python loadtest/overload.py memory MODEL [--requests 10000]

MODEL is a model's folder in a repository, model_repository/alexnet say.

flood   ten crops at random arrivals, `times` as many as a closed loop found the gateway to answer; once as
        it is, and once with --brownout. Told are the answers a second beside saturation, p99 of what was
        answered, every status, whether /livez always answered, and p50 of one client before and after.
storm   each client sends a photograph and leaves so many milliseconds later; told is the server's processor
        time beside that of answers, and how many inferences were begun for them.
slow    eight clients alone, then beside so many that send a byte a second (half in the head, half in the
        photograph) and come back when they are closed; told are the eight's answers a second, p50 and p99,
        how often the slow ones were closed, and the server's memory.
memory  resident memory after the first fifth of the requests and after the last; the same with a server that
        is made to leak 20 kB a request, which must be seen.
"""

from __future__ import annotations

import argparse
import asyncio
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import httpx
import psutil
from closed_loop import HEADERS, closed_loop, multipart
from dripping import dripping
from figures import percentiles, table
from light_client import LightClient
from machine import machine
from open_loop import Answers, open_loop
from photographs import given_folder, photographs
from servers import Server, free_port, memory, started

TEN = "/classify?crops=ten"
LEAK_BYTES = 20_000


@contextmanager
def gateway(model: Path, body: bytes, *flags: str, leak: bool = False) -> Iterator[Server]:
    """One of our own; `leak`: made to keep LEAK_BYTES of each request."""
    port = free_port()
    program = ["loadtest/leaking.py", str(LEAK_BYTES)] if leak else ["alexnet.py"]
    command = [sys.executable, *program, "serve", "--port", str(port), "--model", model.name]
    command += ["--repository", str(model.resolve().parent), *flags]
    with started(command, port, body, {}) as server:
        yield server


async def flooded(url: str, bodies: list[bytes], rate: float, seconds: float) -> tuple[Answers, int, int]:
    """The answers, and how often /livez was asked, and did not answer 200 within a second."""
    alive = [0, 0]

    async def look(client: httpx.AsyncClient) -> None:
        while True:
            alive[0] += 1
            try:
                alive[1] += (await client.get(f"{url}/livez", timeout=1)).status_code != 200
            except httpx.HTTPError:
                alive[1] += 1
            await asyncio.sleep(0.5)

    async with LightClient(60) as client, httpx.AsyncClient(trust_env=False) as other:
        looking = asyncio.create_task(look(other))
        answers = await open_loop(client.post, [url + TEN], bodies, rate, seconds)
        looking.cancel()
    return answers, alive[0], alive[1]


def p50(url: str, bodies: list[bytes]) -> float:
    """Milliseconds, of one client."""
    return percentiles(closed_loop(url, TEN, bodies, 1, 5).latencies_ms).p50


def flood(given: argparse.Namespace, bodies: list[bytes]) -> list[list[str]]:
    headings = ["", "answered/s", "of saturation", "p50 ms", "p99", "degraded", "statuses", "/livez failed"]
    rows = [[*headings, "p50 of one, before", "after"]]
    saturation = 0.0
    for title, flags in (("as it is", ()), ("--brownout", ("--brownout",))):
        with gateway(given.model, bodies[0], *flags) as server:
            before = p50(server.url, bodies)
            if not saturation:
                saturation = closed_loop(server.url, TEN, bodies, 16, 15).images_per_s
                rows.append(["saturation", f"{saturation:.1f}", "1.00", *[""] * 7])
            found, looks, failed = asyncio.run(
                flooded(server.url, bodies, given.times * saturation, given.seconds)
            )
            after = p50(server.url, bodies)
        times, rate = percentiles(found.latencies_ms), len(found.latencies_ms) / found.seconds
        statuses = ", ".join(f"{count} x {status}" for status, count in sorted(found.statuses.items()))
        speed = [f"{rate:.1f}", f"{rate / saturation:.2f}", f"{times.p50:.0f}", f"{times.p99:.0f}"]
        health = [str(found.degraded), statuses, f"{failed} of {looks}", f"{before:.0f}", f"{after:.0f}"]
        rows.append([title, *speed, *health])
        print(f"{title}: {rate / saturation:.2f} of saturation, {statuses}", file=sys.stderr, flush=True)
    return rows


async def storm_of(url: str, body: bytes, count: int, leave_s: float) -> None:
    host, port = url.removeprefix("http://").split(":")
    head = f"POST {TEN} HTTP/1.1\r\nHost: {host}\r\nContent-Type: {HEADERS['Content-Type']}\r\n"
    request = f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body

    async def one() -> None:
        _, writer = await asyncio.open_connection(host, int(port))
        writer.write(request)
        with suppress(ConnectionError):
            await writer.drain()
        await asyncio.sleep(leave_s)
        writer.transport.abort()

    for start in range(0, count, 50):
        await asyncio.gather(*(one() for _ in range(min(50, count - start))))


def storm(given: argparse.Namespace, bodies: list[bytes]) -> list[list[str]]:
    with gateway(given.model, bodies[0]) as server:
        process = psutil.Process(server.pid)

        def used() -> float:
            times = process.cpu_times()
            return float(times.user + times.system)

        start = used()
        load = closed_loop(server.url, TEN, bodies, 2, 10)
        each = (used() - start) / len(load.latencies_ms)
        time.sleep(2)
        start, began = used(), inferences(server.url)
        asyncio.run(storm_of(server.url, bodies[0], given.requests, given.leave_ms / 1000))
        time.sleep(3)
        spent, begun = used() - start, inferences(server.url) - began
    answered = len(load.latencies_ms)
    return [
        ["", "requests", "processor s", "ms each", "inferences"],
        ["answered", str(answered), f"{each * answered:.1f}", f"{1000 * each:.1f}", f"{began:.0f}"],
        ["left", str(given.requests), f"{spent:.1f}", f"{1000 * spent / given.requests:.1f}", f"{begun:.0f}"],
    ]


def inferences(url: str) -> float:
    """Begun by the gateway so far."""
    lines = httpx.get(f"{url}/metrics").text.splitlines()
    return sum(float(line.split()[1]) for line in lines if line.startswith("alexnet_inferences_total "))


def slow(given: argparse.Namespace, bodies: list[bytes]) -> list[list[str]]:
    headings = ["slow clients", "answered/s", "p50 ms", "p99", "refused", "connected", "closed", "MB"]
    rows = [headings]

    async def beside(server: Server, count: int, seconds: float) -> list[str]:
        async with dripping(server.url, count) as drips:
            await asyncio.sleep(2 if count else 0)
            load = await asyncio.to_thread(closed_loop, server.url, TEN, bodies, 8, seconds)
            times = percentiles(load.latencies_ms)
            speed = [f"{load.images_per_s:.1f}", f"{times.p50:.0f}", f"{times.p99:.0f}", str(load.refused)]
            held = f"{memory(server.pid).rss:.0f}"
            return [str(count), *speed, str(drips.connected), str(drips.closed), held]

    with gateway(given.model, bodies[0]) as server:
        for count, seconds in ((0, 15.0), (given.clients, given.seconds), (0, 15.0)):
            rows.append(asyncio.run(beside(server, count, seconds)))
    return rows


def growth(given: argparse.Namespace, bodies: list[bytes], *, leak: bool) -> tuple[float, float]:
    """MB resident after a fifth of the requests, and after all of them."""
    with gateway(given.model, bodies[0], leak=leak) as server:
        return _after(server, bodies, given.requests // 5), _after(server, bodies, 4 * given.requests // 5)


def _after(server: Server, bodies: list[bytes], requests: int) -> float:
    url = f"{server.url}/classify?crops=center"

    async def ask() -> None:
        async with httpx.AsyncClient(timeout=60, trust_env=False) as client:
            left = iter(range(requests))

            async def one() -> None:
                for number in left:
                    body = bodies[number % len(bodies)]
                    answer = await client.post(url, content=body, headers=HEADERS)
                    answer.raise_for_status()

            await asyncio.gather(*(one() for _ in range(8)))

    asyncio.run(ask())
    return memory(server.pid).rss


def grown(given: argparse.Namespace, bodies: list[bytes]) -> list[list[str]]:
    rows = [["", "MB after a fifth", "MB after all", "growth %"]]
    for title, leak in (("as it is", False), (f"leaking {LEAK_BYTES // 1000} kB a request", True)):
        first, last = growth(given, bodies, leak=leak)
        rows.append([title, f"{first:.0f}", f"{last:.0f}", f"{100 * (last / first - 1):.1f}"])
    return rows


def main() -> None:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument("what", choices=["flood", "storm", "slow", "memory"])
    parser.add_argument("model", type=Path)
    parser.add_argument("--images", type=Path, help="a folder of photographs [default: generated]")
    parser.add_argument("--seconds", type=float, help="[default: 300; slow: 60]")
    parser.add_argument("--clients", type=int, default=500)
    parser.add_argument("--times", type=float, default=4)
    parser.add_argument("--requests", type=int)
    parser.add_argument("--leave-ms", type=float, default=5)
    given = parser.parse_args()
    given.seconds = given.seconds or {"slow": 60}.get(given.what, 300)
    given.requests = given.requests or {"storm": 500}.get(given.what, 10_000)
    bodies = [multipart(file) for file in photographs(given_folder(given.images))]
    print(f"python {' '.join(sys.argv)}\n{machine()}")
    rows = {"flood": flood, "storm": storm, "slow": slow, "memory": grown}[given.what](given, bodies)
    print("\n".join(table(rows)))


if __name__ == "__main__":
    main()
