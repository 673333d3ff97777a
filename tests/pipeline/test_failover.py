"""A worker whose server became a replica under it finds the one that took its place."""

from __future__ import annotations

from pathlib import Path

import pytest

from onstream.pipeline.redis.bus import Bus
from onstream.pipeline.redis.connection import OUTAGE
from tests.redis_servers import Pair


def test_a_call_that_meets_a_read_only_replica_is_repeated_on_the_server_that_has_the_address_now(
    tmp_path: Path, run_name: str
) -> None:
    with Pair(tmp_path) as pair:
        bus = Bus.connect(pair.url, run_name, consumer="tester", block_s=0.05, connect_timeout_s=5)
        bus.state.mark_ready("verify")
        assert bus.streams.read("verify", 1, block_s=0.01) == []
        pair.swap()
        bus.state.mark_ready("score")
        assert bus.state.ready_stages() == {"verify", "score"}
        with pytest.raises(OUTAGE):
            bus.streams.read("verify", 1, block_s=0.01)
        assert bus.streams.read("verify", 1, block_s=0.01) == [], (
            "the read after it goes to the new server"
        )
        bus.close()
