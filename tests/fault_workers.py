"""Worker processes for the tests of faults: the real loop on a real Redis, and the real trainer."""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence

from onstream.pipeline.loop import run_worker
from onstream.pipeline.redis.bus import Bus
from onstream.pipeline.stage import Delivery, Outcome
from onstream.settings.root import Settings
from onstream.settings.sections.run import DeliverySettings
from onstream.workers.verifier.stage import Verifier
from tests.pipeline.stages import Passing

LEASE_S = 0.5
PATIENCE_S = 20.0
BLOCK_S = 0.1
SLICE_S = 0.2


class Keeping(Passing):
    """Takes records and finishes none."""

    def handle(self, new: Sequence[Delivery]) -> list[Outcome]:
        """Nothing comes of it. It takes its time, so that a signal finds the worker at work: a read
        would often end before the heartbeat's thread, which has to end it, gets a core.
        """
        time.sleep(SLICE_S)
        return []


def work(name: str, url: str, run: str, keeps: bool) -> None:
    """The body of a worker of the stage `generate`, which passes records on, or keeps them."""
    bus = Bus.connect(url, run, consumer=name, block_s=BLOCK_S, connect_timeout_s=PATIENCE_S)
    delivery = DeliverySettings(lease=LEASE_S, max_deliveries=100, drain=0)
    sys.exit(
        run_worker(
            Keeping("generate") if keeps else Passing("generate"), bus, delivery, block_s=BLOCK_S
        )
    )


def train(name: str, url: str, settings: str) -> None:
    """The body of a trainer. The fork server has its modules, and what only names it need not."""
    from onstream.workers.trainer.startup import trainer_stage

    parsed = Settings.model_validate_json(settings)
    bus = Bus.connect(
        url, parsed.run.name, consumer=name, block_s=BLOCK_S, connect_timeout_s=PATIENCE_S
    )
    sys.exit(run_worker(trainer_stage(parsed, bus), bus, parsed.delivery, block_s=BLOCK_S))


def verify(name: str, url: str, settings: str) -> None:
    """The body of a verifier."""
    parsed = Settings.model_validate_json(settings)
    bus = Bus.connect(
        url, parsed.run.name, consumer=name, block_s=BLOCK_S, connect_timeout_s=PATIENCE_S
    )
    sys.exit(run_worker(Verifier(parsed, bus), bus, parsed.delivery, block_s=BLOCK_S))
