"""Redis ends with its run only when every worker has left."""

from __future__ import annotations

import threading

from onstream.pipeline.redis.bus import Bus
from onstream.pipeline.stage import Stats
from onstream.workers.launcher.shutdown import wait_until_alone
from tests.waiting import LONGEST_S


def test_it_waits_for_a_worker_that_was_heard_of_and_says_so(bus: Bus) -> None:
    bus.state.write_heartbeat("verify", Stats())
    said: list[str] = []
    heard = threading.Event()

    def say(sentence: str) -> None:
        said.append(sentence)
        heard.set()

    waiting = threading.Thread(
        target=wait_until_alone,
        args=(bus.state, say, lambda: False),
        kwargs={"alone_s": 0.3, "still_here_s": 0.1},
    )
    waiting.start()
    assert heard.wait(LONGEST_S)
    assert waiting.is_alive()
    assert said[0] == "the run has ended; waiting for tester to leave"
    bus.state.remove_heartbeat()
    waiting.join(5)
    assert not waiting.is_alive()


def test_it_ends_when_told_to(bus: Bus) -> None:
    bus.state.write_heartbeat("verify", Stats())
    wait_until_alone(bus.state, print, lambda: True)
