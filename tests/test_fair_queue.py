"""Start-time fair queueing: shares are equal, order within a client is kept, nothing is lost."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from serving.fair_queue import FairQueue

COST = st.floats(0.5, 100, allow_nan=False)


@given(st.dictionaries(st.sampled_from("abcd"), st.lists(COST, min_size=1, max_size=30), min_size=2))
def test_clients_that_wait_are_served_alike_to_within_one_request_of_each(
    work: dict[str, list[float]],
) -> None:
    queue: FairQueue[tuple[str, float]] = FairQueue()
    for client, costs in work.items():
        for cost in costs:
            queue.push(client, cost, (client, cost))
    most = max(map(max, work.values()))
    served = dict.fromkeys(work, 0.0)
    left = {client: len(costs) for client, costs in work.items()}
    while all(left.values()):
        item = queue.pop()
        assert item is not None
        served[item[0]] += item[1]
        left[item[0]] -= 1
        assert max(served.values()) - min(served.values()) <= 2 * most + 1e-6


@given(st.lists(st.tuples(st.sampled_from("abc"), COST, st.booleans()), max_size=80), st.data())
def test_each_client_s_work_leaves_in_order_and_only_once(
    steps: list[tuple[str, float, bool]], data: st.DataObject
) -> None:
    queue: FairQueue[int] = FairQueue()
    waiting: dict[str, dict[int, float]] = {client: {} for client in "abc"}
    entries = {}
    for number, (client, cost, take) in enumerate(steps):
        entries[number] = queue.push(client, cost, number)
        waiting[client][number] = cost
        if take:
            popped = queue.pop()
            assert popped is not None
            owner = steps[popped][0]
            assert popped == min(waiting[owner])
            del waiting[owner][popped]
        leaves: bool = data.draw(st.booleans(), "leaves")
        if waiting[client] and leaves:
            gone = data.draw(st.sampled_from(sorted(waiting[client])))
            queue.remove(entries[gone])
            queue.remove(entries[gone])
            del waiting[client][gone]
        assert len(queue) == sum(map(len, waiting.values()))
        assert queue.clients == sum(bool(mine) for mine in waiting.values())
        for each, mine in waiting.items():
            assert abs(queue.cost_of(each) - sum(mine.values())) < 1e-6
        heaviest = queue.newest_of_heaviest()
        if heaviest is not None:
            assert queue.cost_of(heaviest.client) >= max(map(queue.cost_of, "abc")) - 1e-6
            assert heaviest.item == max(waiting[heaviest.client])
        else:
            assert not len(queue)
    while (popped := queue.pop()) is not None:
        del waiting[steps[popped][0]][popped]
    assert not any(waiting.values())


def test_a_client_that_was_idle_gets_its_share_and_not_what_it_left_unused() -> None:
    queue: FairQueue[str] = FairQueue()
    for _ in range(50):
        queue.push("busy", 1, "busy")
    for _ in range(20):
        queue.pop()
    for _ in range(10):
        queue.push("late", 1, "late")
    order = [queue.pop() for _ in range(20)]
    assert order.count("late") == 10 and order[:2].count("late") <= 1


def test_clients_that_come_once_are_forgotten() -> None:
    queue: FairQueue[int] = FairQueue()
    queue.push("stays", 1, -1)
    for number in range(10_000):
        queue.push(f"client {number}", 0.001, number)
        queue.pop()
    assert len(queue._accounts) < 3000
