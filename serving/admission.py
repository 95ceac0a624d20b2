"""Who may come in, and when: a bounded amount of work waits, in an order that is fair to its clients.

    headers ─ room? ─ body ─ wait for a slot ─ decode ─ infer ─ answer
              503            (deadline, fairness, brownout)

Work is counted in crops, and crops in the milliseconds that they are measured to cost. What waits are
encoded photographs: a slot is given before decoding, so that nothing is decoded for a client that left, or
whose time is over.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

from serving.brownout import Brownout
from serving.contract import Crops
from serving.costs import LEVELS, Costs, crops_by_level
from serving.errors import DeadlineExceeded, Overloaded
from serving.fair_queue import Entry, FairQueue


@dataclass(frozen=True)
class Work:
    """One photograph to be answered, as far as admission is concerned."""

    client: str
    model: str
    crops: Crops
    may_degrade: bool = True


@dataclass(frozen=True)
class Limits:
    """How much may wait, and how much is under way at once.

    `places`: inferences that run side by side. `ahead`: as many again are decoded meanwhile. A place is
    worth ten crops, whether of one photograph or of ten.
    """

    places: int = 1
    ahead: int = 1
    max_waiting_crops: int = 640
    max_wait_s: float = 5.0


@dataclass(eq=False)
class _Ticket:
    """Admitted work: what it costs at each level, and the future that is its turn."""

    crops: tuple[int, ...]
    ms: tuple[float, ...]
    level: int = 0
    entry: Entry[_Ticket] | None = None
    turn: asyncio.Future[None] = field(default_factory=lambda: asyncio.get_running_loop().create_future())


class _Sums:
    """Crops and milliseconds of what is admitted and not yet answered, at each level of service."""

    def __init__(self) -> None:
        self.crops, self.ms = [0] * len(LEVELS), [0.0] * len(LEVELS)
        self._tickets: set[_Ticket] = set()

    def add(self, ticket: _Ticket) -> None:
        self._tickets.add(ticket)
        for level in range(len(LEVELS)):
            self.crops[level] += ticket.crops[level]
            self.ms[level] += ticket.ms[level]

    def remove(self, ticket: _Ticket) -> None:
        """Once, however often it is called."""
        if ticket not in self._tickets:
            return
        self._tickets.remove(ticket)
        for level in range(len(LEVELS)):
            self.crops[level] -= ticket.crops[level]
            self.ms[level] -= ticket.ms[level]
        if not self._tickets:
            self.ms = [0.0] * len(LEVELS)  # no rounding is kept


class Admission:
    """Used from one event loop only, so it takes no lock."""

    def __init__(self, limits: Limits, brownout: Brownout | None = None) -> None:
        self.limits, self.costs = limits, Costs()
        self._brownout = brownout
        self._sums, self._queued = _Sums(), _Sums()
        self._queue: FairQueue[_Ticket] = FairQueue()
        self._free = LEVELS[0] * (limits.places + limits.ahead)  # crops

    @property
    def waiting_crops(self) -> int:
        """Crops admitted and not yet answered, as they were asked for."""
        return self._sums.crops[0]

    @property
    def level(self) -> int:
        """Of `LEVELS`; 0 is full service."""
        return self._brownout.level if self._brownout else 0

    def wait_ms(self, level: int | None = None) -> float:
        """Until what is admitted now is answered; `level`: if it were served so."""
        return self._sums.ms[self.level if level is None else level] / self.limits.places

    def retry_after_s(self) -> int:
        """Whole seconds, at least 1, until what waits now will be answered."""
        return max(1, math.ceil(self.wait_ms() / 1000))

    def check(self, work: Work, left_s: float = math.inf) -> None:
        """Raise Overloaded if there is no room for `work`, or if its turn would come too late.

        To be asked before the body is read: a refusal should cost little.
        """
        ticket = self._ticket(work)
        if not self._has_room(ticket) and self._sheddable(work.client, ticket) is None:
            raise self._full()
        self._in_time(work, ticket, left_s)

    @asynccontextmanager
    async def slot(self, work: Work, deadline_s: float | None = None) -> AsyncIterator[int]:
        """Wait for a slot and hold it while the block runs; yields the level of service for it.

        `deadline_s` on the event loop's clock. Raises Overloaded where there is no room, or where the room
        is needed by a client that has less waiting; DeadlineExceeded where the turn came too late.
        """
        clock = asyncio.get_running_loop().time
        left_s = math.inf if deadline_s is None else deadline_s - clock()
        ticket = self._admitted(work, left_s)
        try:
            await self._turn(ticket)
            try:
                if deadline_s is not None and clock() >= deadline_s:
                    raise DeadlineExceeded("the turn came after the request's time was over")
                yield ticket.level if work.may_degrade else 0
            finally:
                self._free += ticket.crops[ticket.level]
        finally:
            self._forget(ticket)
            self._give_turns()

    def measured(self, model: str, crops: int, seconds: float) -> None:
        """Note how long an inference took in its place."""
        self.costs.measured(model, crops, 1000 * seconds)

    def _ticket(self, work: Work) -> _Ticket:
        counts = crops_by_level(work.crops, may_degrade=work.may_degrade and self._brownout is not None)
        return _Ticket(counts, tuple(self.costs.ms(work.model, count) for count in counts))

    def _admitted(self, work: Work, left_s: float) -> _Ticket:
        """In the queue; for it, work of the client with the most may be pushed out."""
        ticket = self._ticket(work)
        self._in_time(work, ticket, left_s)
        while not self._has_room(ticket):
            shed = self._sheddable(work.client, ticket)
            if shed is None:
                raise self._full()
            self._queue.remove(shed)
            self._forget(shed.item)
            shed.item.turn.set_exception(self._full())
        self._sums.add(ticket)
        self._queued.add(ticket)
        ticket.entry = self._queue.push(work.client, ticket.ms[0], ticket)
        self._give_turns()
        return ticket

    async def _turn(self, ticket: _Ticket) -> None:
        """Until the ticket has a slot; a slot that comes in the moment of cancelling goes back."""
        try:
            await ticket.turn
        except asyncio.CancelledError:
            if ticket.turn.done() and not ticket.turn.cancelled():
                self._free += ticket.crops[ticket.level]
            raise
        finally:
            if ticket.entry is not None:
                self._queue.remove(ticket.entry)

    def _give_turns(self) -> None:
        while self._free > 0:
            ticket = self._queue.pop()
            if ticket is None:
                return
            self._queued.remove(ticket)
            if not ticket.turn.done():  # not cancelled, or pushed out, a moment ago
                ticket.level = self._next_level()
                self._free -= ticket.crops[ticket.level]
                ticket.turn.set_result(None)

    def _forget(self, ticket: _Ticket) -> None:
        self._sums.remove(ticket)
        self._queued.remove(ticket)

    def _next_level(self) -> int:
        """By what else waits: one that is alone gets full service however long it takes."""
        if self._brownout is None:
            return 0
        return self._brownout.update([ms / self.limits.places for ms in self._queued.ms])

    def _has_room(self, ticket: _Ticket) -> bool:
        """At the lowest service there is. One that is alone is let in whatever it costs."""
        level = len(LEVELS) - 1
        crops = self._sums.crops[level] + ticket.crops[level]
        return not self._sums.crops[level] or (
            crops <= self.limits.max_waiting_crops and self.wait_ms(level) <= 1000 * self.limits.max_wait_s
        )

    def _sheddable(self, client: str, ticket: _Ticket) -> Entry[_Ticket] | None:
        """What may be pushed out for `client`: the newest work of one for whom more waits, with this too."""
        entry = self._queue.newest_of_heaviest()
        if entry is None or entry.client == client:
            return None
        more = self._queue.cost_of(entry.client) > self._queue.cost_of(client) + ticket.ms[0]
        return entry if more else None

    def _in_time(self, work: Work, ticket: _Ticket, left_s: float) -> None:
        """Raise Overloaded where the turn would come after `left_s`: a refusal now is worth more than then.

        At most the queue, and at most as much of each other client as of this one. What the inference itself
        costs does not count: a guess too high would refuse for ever, and never be corrected.
        """
        if not len(self._queue):
            return
        own_ms = (self._queue.clients + 1) * (self._queue.cost_of(work.client) + ticket.ms[0])
        shrunk = self.wait_ms() / self.wait_ms(0) if self.wait_ms(0) else 1.0
        turn_s = min(self.wait_ms(), own_ms * shrunk / self.limits.places) / 1000
        if turn_s > left_s:
            raise Overloaded(
                f"the turn would come in about {turn_s:.1f} s, and {max(0.0, left_s):.1f} s are left; "
                f"retry in {self.retry_after_s()} s"
            )

    def _full(self) -> Overloaded:
        return Overloaded(
            f"{self.waiting_crops} crops wait, about {self.wait_ms() / 1000:.1f} s of work; "
            f"retry in {self.retry_after_s()} s"
        )
