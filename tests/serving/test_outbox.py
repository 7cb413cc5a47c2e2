"""Events reach a reader in order; a slow one loses the least important first and is told how many captions."""

import asyncio
import threading

from casa.serving.live import Outbox


def event(kind, number):
    return {"type": kind, "number": number}


def test_events_of_other_threads_wake_the_reader():
    async def read():
        outbox = Outbox(8)
        threading.Timer(0.05, outbox.put, [event("answer", 1)]).start()
        return await asyncio.wait_for(outbox.get(), 60)

    assert asyncio.run(read()) == event("answer", 1)


def test_a_slow_reader_loses_usage_then_captions_and_keeps_answers():
    async def read():
        lost = []
        outbox = Outbox(3, lambda: lost.append(1))
        for number in range(4):
            outbox.put(event("caption", number))
            outbox.put(event("usage", number))
        outbox.put(event("answer", 9))
        assert len(lost) == outbox.missed
        return [await outbox.get() for _ in range(3)], outbox.missed, len(outbox)

    heard, missed, left = asyncio.run(read())
    assert [(e["type"], e["number"]) for e in heard] == [("caption", 2), ("caption", 3), ("answer", 9)]
    assert [e.get("missed") for e in heard] == [2, 2, None]
    assert (missed, left) == (2, 0)


def test_without_captions_the_oldest_of_all_is_lost():
    async def read():
        outbox = Outbox(2)
        for number in range(5):
            outbox.put(event("error", number))
        return [(await outbox.get())["number"] for _ in range(2)]

    assert asyncio.run(read()) == [3, 4]


def test_a_reader_that_has_gone_hurts_nobody():
    async def make():
        return Outbox(2)

    asyncio.run(make()).put(event("caption", 1))
