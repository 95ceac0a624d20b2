"""Work in the order that is fair to those who ask: start-time fair queueing.

Goyal, Vin and Cheng, "Start-Time Fair Queuing" (SIGCOMM 1996). Whoever sends one request waits for at
most one of each other client, however many those have sent before.
"""

from __future__ import annotations

import heapq
from collections import deque
from dataclasses import dataclass, field
from typing import Final, Generic, TypeVar

T = TypeVar("T")

_REMEMBERED: Final = 1024
"""Clients without waiting work that are remembered at most; those who owe nothing are forgotten first."""


@dataclass(eq=False)
class Entry(Generic[T]):
    """One piece of waiting work and what it costs, in any unit."""

    client: str
    cost: float
    item: T
    waiting: bool = True


@dataclass
class _Account(Generic[T]):
    """One client: where in virtual time its newest work starts and ends, and what waits, as it came."""

    start: float = 0.0
    finish: float = 0.0
    cost: float = 0.0
    entries: deque[Entry[T]] = field(default_factory=deque)


class FairQueue(Generic[T]):
    """`push`, `pop` and `remove` cost O(log n). The heaviest client is looked for among those that wait, and
    remembered until work comes or goes: a flood of refusals asks far more often (640 clients: 65 us a time).
    """

    def __init__(self) -> None:
        self._order: list[tuple[float, int, Entry[T]]] = []  # a heap: start in virtual time, arrival
        self._accounts: dict[str, _Account[T]] = {}
        self._waiting: dict[str, int] = {}  # entries by client
        self._virtual_time, self._pushed = 0.0, 0
        self._heaviest: str | None = None

    def __len__(self) -> int:
        return sum(self._waiting.values()) if self._waiting else 0

    @property
    def clients(self) -> int:
        """How many have something waiting."""
        return len(self._waiting)

    def cost_of(self, client: str) -> float:
        """Of what waits for one client."""
        return self._accounts[client].cost if client in self._waiting else 0.0

    def push(self, client: str, cost: float, item: T) -> Entry[T]:
        """Let `item` wait."""
        if len(self._accounts) > _REMEMBERED + len(self._waiting):
            self._forget()
        account = self._accounts.setdefault(client, _Account())
        start = max(self._virtual_time, account.finish, account.start)
        account.start, account.finish = start, start + cost
        entry = Entry(client, cost, item)
        account.entries.append(entry)
        account.cost += cost
        self._heaviest = None
        self._waiting[client] = self._waiting.get(client, 0) + 1
        self._pushed += 1
        heapq.heappush(self._order, (start, self._pushed, entry))
        return entry

    def pop(self) -> T | None:
        """The next in fair order; None where nothing waits."""
        while self._order:
            start, _, entry = heapq.heappop(self._order)
            if entry.waiting:
                self._virtual_time = start
                self._take(entry)
                return entry.item
        return None

    def remove(self, entry: Entry[T]) -> None:
        """Forget work that waits; its client gets the share back. Work that was taken is left alone."""
        if entry.waiting:
            self._accounts[entry.client].finish -= entry.cost
            self._take(entry)

    def newest_of_heaviest(self) -> Entry[T] | None:
        """The last that came from the client for whom most waits."""
        if not self._waiting:
            return None
        if self._heaviest is None:
            self._heaviest = max(self._waiting, key=lambda client: self._accounts[client].cost)
        return self._accounts[self._heaviest].entries[-1]

    def _take(self, entry: Entry[T]) -> None:
        entry.waiting = False
        self._heaviest = None
        account = self._accounts[entry.client]
        account.cost -= entry.cost
        self._waiting[entry.client] -= 1
        if not self._waiting[entry.client]:
            del self._waiting[entry.client]
            account.cost = 0.0  # no rounding is kept
            account.entries.clear()
        while account.entries and not account.entries[0].waiting:
            account.entries.popleft()
        while account.entries and not account.entries[-1].waiting:
            account.entries.pop()

    def _forget(self) -> None:
        owing = [name for name in self._accounts if name not in self._waiting]
        owing.sort(key=lambda name: self._accounts[name].finish)
        for name in owing[: -_REMEMBERED // 2]:
            del self._accounts[name]
